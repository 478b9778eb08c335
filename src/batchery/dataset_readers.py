# SPDX-License-Identifier: Apache-2.0
"""How each data set's files are read: a function of their paths for every form.

What they give is said at `batchery.datasets.load`. A digest of a file's content stands beside the
reader where the bytes of the file itself differ from day to day.
"""

import hashlib
import io
import json
import logging
import sysconfig
import tarfile
import wave
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from batchery._core.state import atomic_write, cache_folder, file_digest
from batchery._core.validate import import_extra

logger = logging.getLogger(__name__)


def recordings_digest(path: Path) -> str:
    """Digest the recordings in an archive: the archive's own bytes differ from day to day."""
    digest = hashlib.sha256()
    for name, data in sorted(recordings(path)):
        digest.update(name.encode() + b"\0" + data)
    return digest.hexdigest()


def recordings(path: Path) -> list[tuple[str, bytes]]:
    """Return names and bytes of the recordings in an archive."""
    found = []
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name.endswith(".wav") else None
            if file is not None:
                found.append((member.name.rsplit("/", 1)[-1], file.read()))
    return found


def text(paths: Sequence[Path]) -> str:
    """Return the files as one string."""
    return "".join(path.read_text("utf-8") for path in paths)


def train_test_jsonl(paths: Sequence[Path]) -> dict[str, list[dict[str, str]]]:
    """Return the records of two files."""
    names = ("train", "test")
    return {
        name: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for name, path in zip(names, paths, strict=True)
    }


def mnist(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """Return the arrays of an archive that numpy wrote."""
    with np.load(paths[0], allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in ("x_train", "x_test")}
        return found | {name: arrays[name].astype(np.int64) for name in ("y_train", "y_test")}


def cifar10_jpeg(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """Decode both splits; the arrays are kept in the cache, since decoding takes seconds."""
    kept = cache_folder() / f"cifar10.{file_digest(paths[0])[:16]}.npz"
    if kept.is_file():
        try:
            return _kept_arrays(kept)
        except _DAMAGED as error:
            logger.warning("%s is damaged (%s); it is made anew", kept, error)
    parquet = import_extra("pyarrow.parquet", "data", "data set 'cifar10'")
    image = import_extra("PIL.Image", "data", "data set 'cifar10'")
    arrays: dict[str, np.ndarray] = {}
    for split, path in zip(("train", "test"), paths, strict=True):
        table = parquet.read_table(path)
        rows = (row["bytes"] for row in table["image"].to_pylist())
        pixels = [np.asarray(image.open(io.BytesIO(row)).convert("RGB")) for row in rows]
        arrays[f"x_{split}"] = np.stack(pixels)
        arrays[f"y_{split}"] = table["label"].to_numpy().astype(np.int64)
    atomic_write(kept, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
    return arrays


# What a changed archive can bring; a changed flag or method is a RuntimeError.
_DAMAGED = (zipfile.BadZipFile, ValueError, OSError, EOFError, KeyError, RuntimeError)


def _kept_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an archive, each read whole, which is when its CRC is checked."""
    with zipfile.ZipFile(path) as archive:
        return {
            name: np.load(io.BytesIO(archive.read(f"{name}.npy")), allow_pickle=False)
            for name in ("x_train", "y_train", "x_test", "y_test")
        }


def cifar10_binary(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """Return the arrays of the authors' binary archive."""
    batches: dict[str, bytes] = {}
    with tarfile.open(paths[0]) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name.endswith(".bin") else None
            if file is not None:
                batches[member.name.rsplit("/", 1)[-1]] = file.read()
    train = b"".join(batches[f"data_batch_{k}.bin"] for k in range(1, 6))
    found = {}
    for split, data in (("train", train), ("test", batches["test_batch.bin"])):
        rows = np.frombuffer(data, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
        found[f"x_{split}"] = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy()
        found[f"y_{split}"] = rows[:, 0].astype(np.int64)
    return found


def digits(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """Return the digits of scikit-learn, a fifth of them for the test."""
    sklearn = import_extra("sklearn.datasets", "study", "data set 'digits'")
    x, y = sklearn.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order].astype(np.float32) / 16, y[order].astype(np.int64)
    return {"x_train": x[:1437], "y_train": y[:1437], "x_test": x[1437:], "y_test": y[1437:]}


def speech(sounds: Sequence[tuple[str, bytes]]) -> dict[str, Any]:
    """Return waves and what their names say, from names and bytes of recordings."""
    waves, labels, speakers, test = [], [], [], []
    for name, data in sorted(sounds):
        label, speaker, index = name.removesuffix(".wav").split("_")
        with wave.open(io.BytesIO(data)) as sound:
            waves.append(np.frombuffer(sound.readframes(sound.getnframes()), np.int16))
        labels.append(int(label))
        speakers.append(speaker)
        test.append(int(index) < 5)  # the repository's own split
    return {
        "waves": waves,
        "labels": np.array(labels, np.int64),
        "speakers": np.array(speakers),
        "test": np.array(test),
    }


def fsdd_parquet(paths: Sequence[Path]) -> dict[str, Any]:
    """Return the recordings in a table."""
    parquet = import_extra("pyarrow.parquet", "data", "data set 'fsdd'")
    rows = parquet.read_table(paths[0], columns=["audio"])["audio"].to_pylist()
    return speech([(row["path"].rsplit("/", 1)[-1], row["bytes"]) for row in rows])


def stdlib_text(paths: Sequence[Path]) -> str:
    """Return the source of Python's standard library, file by file in order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = [
        path
        for path in root.rglob("*.py")
        if not skipped.intersection(path.relative_to(root).parts)
    ]
    texts = (path.read_bytes().decode("utf-8", "replace") for path in sorted(files))
    return "\n".join(texts)


def folder(paths: Sequence[Path]) -> Path:
    """Return where the files are."""
    return paths[0].parent
