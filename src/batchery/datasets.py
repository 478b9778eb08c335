# SPDX-License-Identifier: Apache-2.0
"""The few real data sets that studies use: where they come from, checked, and parsed.

`load(name)` looks in the folder that `BATCHERY_DATA` names, then in the cache, then at the data
set's canonical address. A file is used only when its SHA-256 is the one written here, so a
truncated or changed file is an error with a name, never a silent change of a result.

From the command line: `batchery data`, `batchery data mnist gsm8k`.
"""

import http.client
import os
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchery import dataset_readers as read
from batchery._core.state import cache_folder, file_digest

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


def _single(name: str, sha256: str, url: str, parse: Parser) -> Any:
    """Return the sources of a data set that is one file at one address."""
    return (((File(name, sha256, url),), parse),)


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
_MINILM = (
    "https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2/resolve/"
    "1110a243fdf4706b3f48f1d95db1a4f5529b4d41/"
)
_MNIST = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"
_CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"

_ALL = (
    Dataset(
        "stdlib-text",
        "source of Python's standard library, one text; every machine has it",
        "PSF-2.0",
        (((), read.stdlib_text),),
    ),
    Dataset(
        "digits",
        "1,797 handwritten digits of 8 x 8, shuffled once; part of scikit-learn",
        "CC BY 4.0",
        (((), read.digits),),
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
                read.cifar10_jpeg,
            ),
            (
                (
                    File(
                        "images/cifar-10-binary.tar.gz",
                        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                        _CIFAR10,
                    ),
                ),
                read.cifar10_binary,
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
                read.mnist,
            ),
            (
                (
                    File(
                        "images/mnist.keras.npz",
                        "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1",
                        _MNIST,
                    ),
                ),
                read.mnist,
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
                read.train_test_jsonl,
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
            read.text,
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
                read.fsdd_parquet,
            ),
            (
                (
                    File(
                        "audio/fsdd.tar.gz",
                        "6b1a8e30f4df78a933fe25cf1ca0140c8c6f169c0a83649a15b70a5ae7407014",
                        _FSDD,
                        read.recordings_digest,
                    ),
                ),
                lambda paths: read.speech(read.recordings(paths[0])),
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
            read.text,
        ),
    ),
    Dataset(
        "minilm",
        "all-MiniLM-L6-v2, a sentence encoder: configuration, weights and tokenizer",
        "Apache-2.0",
        (
            (
                tuple(
                    File(f"models/all-MiniLM-L6-v2/{name}", digest, _MINILM + name)
                    for name, digest in (
                        (
                            "config.json",
                            "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                        ),
                        (
                            "model.safetensors",
                            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                        ),
                        (
                            "tokenizer.json",
                            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                        ),
                    )
                ),
                read.folder,
            ),
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
    (int16 arrays), `labels`, `speakers` and the mask `test`, `minilm` the folder of its files.

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
    """Check a file, each time that it is to be used."""
    try:
        found = (file.digest or file_digest)(path)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise CorruptData(f"data set {name!r}: {path} cannot be read: {error}") from error
    if found != file.sha256:
        raise CorruptData(
            f"data set {name!r}: {path} ({path.stat().st_size:,} bytes) is truncated or changed: "
            f"its SHA-256 is {found[:16]}…, not {file.sha256[:16]}…; it was not used"
        )


def _download(name: str, file: File, path: Path) -> Path:
    """Fetch a file into the cache, going on from what an interrupted download left."""
    if path.is_file():
        _verify(name, file, path)
        return path
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        _transfer(file.url, part)
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
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
