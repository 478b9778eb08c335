# SPDX-License-Identifier: Apache-2.0
"""A folder on disk that is whole or absent, named by a hash of everything that made it.

Use it for what takes long to make, is the same each time, and may be made again at any time. A
change of code, data or settings gives another name; a folder whose files are not those that were
written is reported and made anew. Old folders stay: remove the cache folder's `lab` to free space.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from batchery._core.state import cache_folder, file_digest

_MANIFEST = "manifest.json"

logger = logging.getLogger(__name__)


def code_digest(*modules: ModuleType) -> str:
    """Return a short hash of the source of some modules."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()[:16]


def folder_of(name: str, made_by: Mapping[str, Any]) -> Path:
    """Return where the folder of that name and origin lies, whether or not it exists.

    Args:
        name: a word for people.
        made_by: code, data and settings that decide the content; JSON-able.
    """
    key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "lab" / f"{name}.{key}"


def is_whole(folder: Path) -> bool:
    """Say whether a folder is here with every file as it was written; log what is not."""
    if not folder.exists():
        return False
    try:
        digests = json.loads((folder / _MANIFEST).read_text())
        changed = [name for name, known in digests.items() if file_digest(folder / name) != known]
    except (OSError, ValueError, AttributeError) as error:
        changed = [str(error)]
    if changed:
        logger.warning("%s is damaged (%s); it is not used", folder, ", ".join(changed))
    return not changed


def write_folder(folder: Path, write: Callable[[Path], None]) -> Path:
    """Make a folder so that a crash leaves a whole one or none.

    What lay there is replaced; when another process finishes first, its folder stays.

    Args:
        folder: the folder to make.
        write: puts the files into the temporary folder that it is given.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write(temporary)
        files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
        digests = {str(path.relative_to(temporary)): file_digest(path) for path in files}
        # With the digests inside, a file that never reached the disk is found out: no fsync.
        (temporary / _MANIFEST).write_text(json.dumps(digests, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not is_whole(folder):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
