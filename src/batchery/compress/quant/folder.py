# SPDX-License-Identifier: Apache-2.0
"""A folder of safetensors files, one or many, read one tensor at a time."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchery._core.validate import import_extra, require, require_type

__all__ = ["SafetensorsFolder"]

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
CONFIG = "config.json"
OLD_CONFIG = "quantize_config.json"  # read where CONFIG has none
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
    """The tensors of a folder by name, read one at a time."""

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
        index = self.path / INDEX
        mapped = self._index(index) if index.is_file() and not names else {}
        names = sorted(names or set(mapped.values()) or self._lying())
        if not names:
            what = "no safetensors files"
            raise FileNotFoundError(f"{self.owner}: {what} in {self.path} (pickles are not read)")
        self.files = {tensor: name for name in names for tensor in self._file(name).keys()}
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
                self._open[name] = safetensors.safe_open(self.path / name, framework="pt")
            except safetensors.SafetensorError as error:
                raise ValueError(f"{self.owner}: {name} is damaged: {error}") from error
        return self._open[name]

    def tensor(self, name: str) -> Tensor:
        """Return a tensor by its full name."""
        found: Tensor = self._file(self.files[name]).get_tensor(name)
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
