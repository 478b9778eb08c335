# SPDX-License-Identifier: Apache-2.0
"""The few real data sets that studies use: where they come from, checked, and parsed.

`load(name)` looks in the folder that `BATCHERY_DATA` names, then in the cache, then at the data
set's canonical address. A file is used only when its SHA-256 is the one written here, so a
truncated or changed file is an error with a name, never a silent change of a result.

From the command line: `batchery data`, `batchery data mnist gsm8k`.
"""

import hashlib
import io
import json
import os
import sysconfig
import tarfile
import urllib.error
import urllib.request
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from batchery._core.state import atomic_write, cache_folder
from batchery._core.validate import import_extra

Parser = Callable[[Sequence[Path]], Any]


class MissingData(RuntimeError):
    """A file is not here and could not be fetched; says which, why, and the command to get it."""

    def __init__(self, name: str, file: str, reason: str, command: str) -> None:
        """Build the one-line message."""
        super().__init__(f"data set {name!r} needs {file}: {reason}; get it with: {command}")


class CorruptData(RuntimeError):
    """A file's content is not what its checksum says; it was not used."""


class UnknownData(LookupError):
    """There is no data set of that name."""


@dataclass(frozen=True)
class File:
    """One file: its name, its SHA-256, and where to fetch it (empty: from a folder only)."""

    name: str
    sha256: str
    url: str = ""
    digest: Callable[[Path], str] | None = None  # instead of the SHA-256 of the file's bytes


@dataclass(frozen=True)
class Dataset:
    """A data set: what it is, its terms, and the ways to get it, the first that is there wins."""

    name: str
    summary: str
    licence: str
    sources: tuple[tuple[tuple[File, ...], Parser], ...]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _recordings_digest(path: Path) -> str:
    """Digest the recordings in an archive: the archive's own bytes differ from day to day."""
    digest = hashlib.sha256()
    for name, data in sorted(_recordings(path)):
        digest.update(name.encode() + b"\0" + data)
    return digest.hexdigest()


def _recordings(path: Path) -> list[tuple[str, bytes]]:
    found = []
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name.endswith(".wav") else None
            if file is not None:
                found.append((member.name.rsplit("/", 1)[-1], file.read()))
    return found


def _single(name: str, sha256: str, url: str, parse: Parser) -> Any:
    """Return the sources of a data set that is one file at one address."""
    return (((File(name, sha256, url),), parse),)


def _text(paths: Sequence[Path]) -> str:
    return "".join(path.read_text("utf-8") for path in paths)


def _train_test_jsonl(paths: Sequence[Path]) -> dict[str, list[dict[str, str]]]:
    names = ("train", "test")
    return {
        name: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for name, path in zip(names, paths, strict=True)
    }


def _mnist(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    with np.load(paths[0], allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in ("x_train", "x_test")}
        return found | {name: arrays[name].astype(np.int64) for name in ("y_train", "y_test")}


def _cifar10_jpeg(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """Decode both splits; the arrays are kept in the cache, since decoding takes seconds."""
    kept = cache_folder() / f"cifar10.{file_digest(paths[0])[:16]}.npz"
    if not kept.is_file():
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
    with np.load(kept, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def _cifar10_binary(paths: Sequence[Path]) -> dict[str, np.ndarray]:
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


def _digits(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    sklearn = import_extra("sklearn.datasets", "study", "data set 'digits'")
    x, y = sklearn.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order].astype(np.float32) / 16, y[order].astype(np.int64)
    return {"x_train": x[:1437], "y_train": y[:1437], "x_test": x[1437:], "y_test": y[1437:]}


def _speech(recordings: Sequence[tuple[str, bytes]]) -> dict[str, Any]:
    waves, labels, speakers, test = [], [], [], []
    for name, data in sorted(recordings):
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


def _fsdd_parquet(paths: Sequence[Path]) -> dict[str, Any]:
    parquet = import_extra("pyarrow.parquet", "data", "data set 'fsdd'")
    rows = parquet.read_table(paths[0], columns=["audio"])["audio"].to_pylist()
    return _speech([(row["path"].rsplit("/", 1)[-1], row["bytes"]) for row in rows])


def _stdlib_text(paths: Sequence[Path]) -> str:
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = [
        path
        for path in root.rglob("*.py")
        if not skipped.intersection(path.relative_to(root).parts)
    ]
    texts = (path.read_bytes().decode("utf-8", "replace") for path in sorted(files))
    return "\n".join(texts)


_GSM8K = (
    "https://raw.githubusercontent.com/openai/grade-school-math/"
    "3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/"
)
_SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/"
    "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt"
)
_FSDD = (
    "https://codeload.github.com/Jakobovski/free-spoken-digit-dataset/tar.gz/"
    "26eb9aaf76e81b692f806f9140c2d2777410d7a1"
)
_AZURE = (
    "https://raw.githubusercontent.com/Azure/AzurePublicDataset/"
    "b469a113cedca53ddc3bdea71a143dc4b7d8700c/data/AzureLLMInferenceTrace_conv.csv"
)
_MNIST = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"
_CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"

_ALL = (
    Dataset(
        "stdlib-text",
        "source of Python's standard library, one text; every machine has it",
        "PSF-2.0",
        (((), _stdlib_text),),
    ),
    Dataset(
        "digits",
        "1,797 handwritten digits of 8 x 8, shuffled once; part of scikit-learn",
        "CC BY 4.0",
        (((), _digits),),
    ),
    Dataset(
        "cifar10",
        "CIFAR-10, 60,000 colour images of 32 x 32 in 10 classes",
        "none stated",
        (
            (
                (
                    File(
                        "images/cifar10_train.parquet",
                        "efc5a519a07612f4ce42a12a689ca6d3e3b7b92374b9e49b8c0eb25d24bac4cf",
                    ),
                    File(
                        "images/cifar10_test.parquet",
                        "d9b2e819e87cdc9e319d306fac036ccf4bfb870779eaf51c82c80fb20bc1a726",
                    ),
                ),
                _cifar10_jpeg,
            ),
            (
                (
                    File(
                        "images/cifar-10-binary.tar.gz",
                        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                        _CIFAR10,
                    ),
                ),
                _cifar10_binary,
            ),
        ),
    ),
    Dataset(
        "mnist",
        "MNIST, 70,000 handwritten digits of 28 x 28",
        "MIT (the copy); terms of the original not stated",
        (
            (
                (
                    File(
                        "images/mnist.npz",
                        "06af5dfe73b70e3bc1c36439982b18a8d76803db9b544f6fdf838a37fbb01b64",
                    ),
                ),
                _mnist,
            ),
            (
                (
                    File(
                        "images/mnist.keras.npz",
                        "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1",
                        _MNIST,
                    ),
                ),
                _mnist,
            ),
        ),
    ),
    Dataset(
        "gsm8k",
        "8,792 grade-school word problems with worked answers; the test split is for evaluation",
        "MIT",
        (
            (
                (
                    File(
                        "text/gsm8k_train.jsonl",
                        "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
                        _GSM8K + "train.jsonl",
                    ),
                    File(
                        "text/gsm8k_test.jsonl",
                        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
                        _GSM8K + "test.jsonl",
                    ),
                ),
                _train_test_jsonl,
            ),
        ),
    ),
    Dataset(
        "tinyshakespeare",
        "one megabyte of Shakespeare",
        "public domain (text); MIT (the copy)",
        _single(
            "text/tinyshakespeare.txt",
            "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            _SHAKESPEARE,
            _text,
        ),
    ),
    Dataset(
        "fsdd",
        "Free Spoken Digit Dataset, 3,000 recordings of ten digits by six speakers at 8 kHz",
        "CC BY-SA 4.0",
        (
            (
                (
                    File(
                        "audio/fsdd.parquet",
                        "77ad9e07fe13d56be92839c9fd579b7d3258c69ea1b7147b122ab50c5f27eff2",
                    ),
                ),
                _fsdd_parquet,
            ),
            (
                (
                    File(
                        "audio/fsdd.tar.gz",
                        "6b1a8e30f4df78a933fe25cf1ca0140c8c6f169c0a83649a15b70a5ae7407014",
                        _FSDD,
                        _recordings_digest,
                    ),
                ),
                lambda paths: _speech(_recordings(paths[0])),
            ),
        ),
    ),
    Dataset(
        "azure-llm-conv",
        "19,366 requests to an LLM service in 2023: time, prompt and output tokens, as CSV",
        "CC BY 4.0",
        _single(
            "traces/AzureLLMInferenceTrace_conv.csv",
            "2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8",
            _AZURE,
            _text,
        ),
    ),
)
_REGISTRY = {dataset.name: dataset for dataset in _ALL}


def names() -> list[str]:
    """Return the names of all data sets."""
    return sorted(_REGISTRY)


def describe(name: str) -> Dataset:
    """Return what is known of a data set.

    Raises:
        UnknownData: there is none of that name; the names there are are listed.
    """
    if name not in _REGISTRY:
        raise UnknownData(f"no data set is called {name!r}; there are {', '.join(names())}")
    return _REGISTRY[name]


def load(name: str) -> Any:
    """Return a data set, parsed.

    Text sets give a string. Image sets give a dict of arrays `x_train`, `y_train`, `x_test`,
    `y_test` (uint8 `[n, 28, 28]` or `[n, 32, 32, 3]`, int64 `[n]`; digits: float32 `[n, 64]` in
    [0, 1]). `gsm8k` gives `{"train": [...], "test": [...]}` of records, `fsdd` a dict with `waves`
    (int16 arrays), `labels`, `speakers` and the mask `test`.

    Raises:
        UnknownData: there is no such data set.
        MissingData: a file is not here and cannot be fetched.
        CorruptData: a file is not what its checksum says.
    """
    paths, parse = _obtain(describe(name))
    return parse(paths)


def fetch(name: str) -> list[Path]:
    """Make sure that a data set's files are here, and return their paths."""
    return _obtain(describe(name))[0]


def is_here(name: str) -> bool:
    """Say whether `load` would find the files of a data set without fetching any."""
    return _find(describe(name)) is not None


def _find(dataset: Dataset) -> tuple[list[Path], tuple[File, ...], Parser] | None:
    """Return paths, files and parser of the first source that is here whole."""
    given = os.environ.get("BATCHERY_DATA")
    folders = [Path(given)] if given else []
    folders.append(cache_folder())
    for files, parse in dataset.sources:
        for folder in folders:
            paths = [folder / file.name for file in files]
            if all(path.is_file() for path in paths):
                return paths, files, parse
    return None


def _obtain(dataset: Dataset) -> tuple[list[Path], Parser]:
    """Find the first source that is here whole; else fetch the first that can be fetched."""
    found = _find(dataset)
    if found is not None:
        paths, files, parse = found
        for file, path in zip(files, paths, strict=True):
            _verify(dataset.name, file, path)
        return paths, parse
    for files, parse in dataset.sources:
        if all(file.url for file in files):
            return [
                _download(dataset.name, file, cache_folder() / file.name) for file in files
            ], parse
    raise _missing(dataset.name, dataset.sources[0][0][0], "it has no address to fetch it from")


def _missing(name: str, file: File, reason: str) -> MissingData:
    return MissingData(name, file.name, reason, f"batchery data {name}")


def _verify(name: str, file: File, path: Path) -> None:
    """Check a file once; a later call trusts the same size and time."""
    stat = path.stat()
    stamp = [stat.st_size, stat.st_mtime_ns, file.sha256]
    ledger = cache_folder() / "verified.json"
    known = json.loads(ledger.read_text()) if ledger.is_file() else {}
    key = str(path.resolve())
    if known.get(key) == stamp:
        return
    try:
        found = (file.digest or file_digest)(path)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise CorruptData(f"data set {name!r}: {path} cannot be read: {error}") from error
    if found != file.sha256:
        raise CorruptData(
            f"data set {name!r}: {path} ({stat.st_size:,} bytes) is truncated or changed: "
            f"its SHA-256 is {found[:16]}…, not {file.sha256[:16]}…; it was not used"
        )
    atomic_write(ledger, json.dumps(known | {key: stamp}).encode())


def _download(name: str, file: File, path: Path) -> Path:
    """Fetch a file into the cache, going on from what an interrupted download left."""
    if path.is_file():
        _verify(name, file, path)
        return path
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        _transfer(file.url, part)
    except (OSError, urllib.error.URLError) as error:
        raise _missing(name, file, f"{file.url} could not be fetched ({error})") from error
    try:
        _verify(name, file, part)
    except CorruptData:
        part.unlink()  # the next attempt begins anew
        raise
    os.replace(part, path)
    return path


def _transfer(url: str, part: Path) -> None:
    from tqdm import tqdm

    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: everything is here already
            raise
        return
    with answer:
        resumed = answer.status == 206
        have = have if resumed else 0
        rest = int(answer.headers.get("Content-Length") or 0)
        whole = have + rest or None
        bar = tqdm(total=whole, initial=have, unit="B", unit_scale=True, desc=part.stem)
        with bar, part.open("ab" if resumed else "wb") as target:
            while block := answer.read(1 << 16):
                target.write(block)
                bar.update(len(block))
    if rest and part.stat().st_size < have + rest:
        raise ConnectionError(f"the connection ended after {part.stat().st_size:,} bytes")
