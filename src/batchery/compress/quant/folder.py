# SPDX-License-Identifier: Apache-2.0
"""A folder of safetensors files, one or many, read one tensor at a time.

What is damaged is named with its file: the first tensor that a file cut short lacks bytes of, and
tensors that are not as the writer left them, where it said by digests how that was.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchery._core.validate import import_extra, require, require_type
from batchery.compress.quant.digests import digests_in, require_unchanged

__all__ = ["SafetensorsFolder"]

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
CONFIG = "config.json"
OLD_CONFIG = "quantize_config.json"  # read where CONFIG has none
HEADER_LIMIT = 100_000_000  # bytes, of the format
DTYPES = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class SafetensorsFolder:
    """The tensors of a folder by name, read one at a time.

    Examples:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> path = Path(tempfile.mkdtemp())
        >>> save_file({"up.weight": torch.ones(1, 2)}, path / "model.safetensors")
        >>> _ = (path / "config.json").write_text('{"quantization_config": {"bits": 4}}')
        >>> folder = SafetensorsFolder(path)
        >>> folder.config(), folder.where({"weight": "up.weight"})
        ({'bits': 4}, 'up in model.safetensors')
        >>> folder.shape("up.weight"), folder.tensor("up.weight")
        (((1, 2), torch.float32), tensor([[1., 1.]]))
    """

    def __init__(self, path: str | Path, names: Sequence[str] = ()) -> None:
        """Find the files and read their headers.

        Args:
            path: the folder.
            names: files in it; by default those of the index, model.safetensors, or all.

        Raises:
            FileNotFoundError: there are none.
            ValueError: a file is damaged, the index names what is not there, or the path is a
                file's.
        """
        self.path = Path(path)
        self.owner = "load_quantized"
        require(not self.path.is_file(), self.owner, "path", "must be the folder", str(path))
        self._open: dict[str, Any] = {}
        self._digests: dict[str, dict[str, str] | None] = {}
        self.metadata: dict[str, str] = {}
        index = self.path / INDEX
        mapped = self._index(index) if index.is_file() and not names else {}
        names = sorted(names or set(mapped.values()) or self._lying())
        if not names:
            what = "no safetensors files"
            raise FileNotFoundError(f"{self.owner}: {what} in {self.path} (pickles are not read)")
        self.files = {tensor: name for name in names for tensor in self._file(name).offset_keys()}
        for tensor, file in mapped.items():
            there = self.files.get(tensor) == file
            require(there, self.owner, INDEX, f"names {tensor} in {file}", "no such tensor")

    def _index(self, path: Path) -> dict[str, str]:
        mapped = self._read_json(path).get("weight_map")
        fits = isinstance(mapped, dict) and all(Path(file).name == file for file in mapped.values())
        require(fits, self.owner, INDEX, "must map tensors to files beside it", mapped)
        return dict(mapped or {})

    def _lying(self) -> list[str]:
        names = [file.name for file in self.path.glob("*.safetensors")]
        return [WHOLE] if WHOLE in names else names

    def _file(self, name: str) -> Any:
        if name not in self._open:
            safetensors = import_extra("safetensors", "hf", self.owner)
            if not (self.path / name).is_file():
                raise FileNotFoundError(f"{self.owner}: {name} is not in {self.path}")
            try:
                file = safetensors.safe_open(self.path / name, framework="pt")
            except safetensors.SafetensorError as error:
                why = where_it_ends(self.path / name) or error
                raise ValueError(f"{self.owner}: {name} is damaged: {why}") from error
            said = file.metadata() or {}
            self._digests[name] = digests_in(self.owner, name, said)
            self.metadata |= said
            self._open[name] = file
        return self._open[name]

    def tensor(self, name: str) -> Tensor:
        """Return a tensor by its full name.

        Raises:
            ValueError: the file has digests, and another one for it.
        """
        file = self.files[name]
        found: Tensor = self._file(file).get_tensor(name)
        require_unchanged(self.owner, file, self._digests[file], name, found)
        return found

    def shape(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return a tensor's shape and dtype."""
        part = self._file(self.files[name]).get_slice(name)
        dtype = part.get_dtype()
        where = f"{name} in {self.files[name]}"
        require(dtype in DTYPES, self.owner, where, f"must be in {sorted(DTYPES)}", dtype)
        return tuple(part.get_shape()), DTYPES[dtype]

    def where(self, names: Mapping[str, str]) -> str:
        """Name a layer and its files, for errors."""
        files = sorted({self.files[full] for full in names.values()})
        layer = next(iter(names.values())).rpartition(".")[0]
        return f"{layer} in {', '.join(files)}"

    def config(self) -> dict[str, Any]:
        """Return the `quantization_config`.

        Raises:
            ValueError: no file has one, or it is no table.
        """
        for name, inner in ((CONFIG, True), (OLD_CONFIG, False)):
            if (self.path / name).is_file():
                content = self._read_json(self.path / name)
                found = content.get("quantization_config") if inner else content
                if found:
                    entry = f"quantization_config in {name}"
                    table = isinstance(found, dict)
                    require(table, self.owner, entry, "must be a table", found)
                    return dict(found)
        raise ValueError(f"{self.owner}: {CONFIG} in {self.path} has no quantization_config")

    def _read_json(self, path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{self.owner}: {path.name} is damaged: {error}") from error
        require_type(isinstance(content, dict), self.owner, path.name, "must be a table", content)
        return dict(content)


def where_it_ends(path: Path) -> str:
    """Say what a safetensors file that is cut short ends in; nothing if it is not, or unreadable.

    It begins with the length of its header in 8 bytes, little-endian; the header is a JSON table
    that says at which bytes behind it each tensor lies.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or (size < 8 + length and length <= HEADER_LIMIT):
            return "it ends in its header"
        if length > HEADER_LIMIT:
            return ""
        header = file.read(length)
    try:
        table = json.loads(header)
        table.pop("__metadata__", None)
        ends = {name: tuple(entry["data_offsets"]) for name, entry in table.items()}
        lost = [(*at, name) for name, at in ends.items() if 8 + length + at[1] > size]
        return f"it ends in {min(lost)[-1]}" if lost else ""
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        return ""
