# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent, where they may be kept, and saved states that do not fit."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO


def cache_folder() -> Path:
    """Return the folder for what can be had again: downloads, decoded data, compiled kernels."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "batchery"


def atomic_write(path: str | Path, write: bytes | Callable[[BinaryIO], object]) -> Path:
    """Write a file so that a crash leaves the old one or the new one, never a part.

    Args:
        path: the file to make; its folder is created.
        write: the content, or a function that writes it to the open temporary file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            if callable(write):
                write(file)
            else:
                file.write(write)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def check_fits(owner: str, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse a saved state whose settings differ from those of the object that loads it.

    Raises:
        ValueError: a setting is missing or differs; both values are named.
    """
    for name, value in current.items():
        if name not in saved:
            raise ValueError(f"{owner}: the saved state has no {name!r}; it is not {owner}'s state")
        if saved[name] != value:
            raise ValueError(
                f"{owner}: the saved state has {name}={saved[name]!r}, this object {name}={value!r}"
            )


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
