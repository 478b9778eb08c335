# SPDX-License-Identifier: Apache-2.0
"""Finished blocks of a quantisation on disk, so that an interrupted one goes on.

Each block is one safetensors file, whole or absent. `run.json` says by which model, settings and
data the folder was made; each file says by a hash of that to which run it belongs, and by another
what its tensors are. What does not fit is refused, not made anew: a folder that is given by mistake
is not written over.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchery._core.state import atomic_write
from batchery._core.validate import import_extra, require
from batchery.compress.quant.digests import digest_of_tensors
from batchery.compress.quant.targets import Target
from batchery.compress.quant.weight import QuantizedWeight

__all__ = ["Done", "KeptBlocks", "LayerReport", "model_digests"]

PARTS = ("q", "scales", "zeros", "g_idx")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerReport:
    """How well a layer was quantised.

    Attributes:
        name: of its module.
        tokens: that its Hessian is made of.
        error: squared error of its outputs over their squared size, on the calibration data.
        rtn_error: the same of rounding to nearest, of the two largest of every four if 2:4.
        seconds: its share of the time.

    Examples:
        >>> layer = LayerReport("blocks.0.up", tokens=4096, error=0.01, rtn_error=0.02, seconds=0.5)
        >>> layer.rtn_error / layer.error
        2.0
    """

    name: str
    tokens: int
    error: float
    rtn_error: float
    seconds: float


Done = tuple[dict[str, QuantizedWeight], list[LayerReport]]


def model_digests(model: nn.Module) -> dict[str, str]:
    """Return the SHA-256 of all that a model saves, and of its configuration.

    Where a model was loaded from does not count.

    Examples:
        >>> linear = nn.Linear(2, 2)
        >>> before = model_digests(linear)
        >>> linear.weight.data += 1
        >>> [name for name, digest in model_digests(linear).items() if digest != before[name]]
        ['model']
    """
    state = model.state_dict()
    tensors = ((name, value) for name, value in state.items() if isinstance(value, Tensor))
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", None)
    plain = to_dict() if callable(to_dict) else config
    if isinstance(plain, dict):
        plain = {name: value for name, value in plain.items() if name != "_name_or_path"}
    text = json.dumps(plain, sort_keys=True, default=str)
    return {"model": digest_of_tensors(tensors), "config": _hash(text)}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class KeptBlocks:
    """A folder of finished blocks.

    Args:
        owner: what errors say.
        folder: made when it is not there.
        made_by: model, settings and data, JSON-able.

    Raises:
        ValueError: the folder was made by others, is damaged, or has blocks but no `run.json`.

    Examples:
        >>> import tempfile
        >>> from batchery.compress.quant.rtn import quantize_rtn
        >>> targets = [Target("up", torch.ones(8, 32), None)]
        >>> kept = KeptBlocks("me", Path(tempfile.mkdtemp()), {"group_size": 32})
        >>> kept.save(0, {"up": quantize_rtn(targets[0].weight, group_size=32)}, [])
        >>> quantized, reports = kept.load(0, targets)
        >>> quantized["up"].shape, kept.load(1, targets)
        ((8, 32), None)
    """

    def __init__(self, owner: str, folder: Path, made_by: Mapping[str, Any]) -> None:
        """Open the folder."""
        self._owner = owner
        self._files = import_extra("safetensors", "hf", owner)
        self._tensors = import_extra("safetensors.torch", "hf", owner)
        self._folder = folder
        self._run = _hash(json.dumps(made_by, sort_keys=True))
        require(folder.is_dir() or not folder.exists(), owner, "folder", "must be one", str(folder))
        run = folder / "run.json"
        if run.exists():
            self._require_same(self._read_run(run), made_by)
        else:
            blocks = sorted(folder.glob("block-*.safetensors"))
            rule = f"must have a run.json beside {blocks[0].name}" if blocks else ""
            require(not blocks, owner, "folder", rule, str(folder))
            atomic_write(run, json.dumps(made_by, indent=1).encode())

    def _read_run(self, path: Path) -> dict[str, Any]:
        try:
            saved = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise self._damaged(path, error) from error
        if not isinstance(saved, dict):
            raise self._damaged(path, "no mapping")
        return saved

    def _require_same(self, saved: Mapping[str, Any], made_by: Mapping[str, Any]) -> None:
        for name, value in made_by.items():
            had = f"with {name}={saved[name]!r}" if name in saved else f"without {name}"
            same = name in saved and saved[name] == value
            rule = f"was begun {had}; {name} must be the same"
            require(same, self._owner, f"folder {self._folder}", rule, value)

    def _damaged(self, path: Path, why: object) -> ValueError:
        return ValueError(f"{self._owner}: folder has a damaged or foreign file {path}: {why}")

    def _path(self, place: int) -> Path:
        return self._folder / f"block-{place:05d}.safetensors"

    def load(self, place: int, targets: Sequence[Target]) -> Done | None:
        """Return a finished block, None where it is not here.

        Raises:
            ValueError: it is damaged, or of another run or place.
        """
        path = self._path(place)
        if not path.exists():
            return None
        bad = (
            OSError,
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            self._files.SafetensorError,
        )
        try:
            done = self._read(path, place, targets)
        except bad as error:
            raise self._damaged(path, error) from error
        logger.info("block %d is taken from %s", place, path)
        return done

    def _read(self, path: Path, place: int, targets: Sequence[Target]) -> Done:
        with self._files.safe_open(path, "pt") as file:
            metadata = file.metadata()
        if not metadata or "record" not in metadata:
            raise ValueError("it has no record")
        record = json.loads(metadata["record"])
        if (record["run"], record["place"]) != (self._run, place):
            raise ValueError("it is of another run or place")
        tensors = self._tensors.load_file(path)
        if digest_of_tensors(sorted(tensors.items())) != record["tensors"]:
            raise ValueError("its tensors are not those that were saved")
        quantized = {}
        for target in targets:
            parts = {part: tensors.get(f"{target.name}.{part}") for part in PARTS}
            qw = QuantizedWeight(**parts, group_size=record["group_size"][target.name])
            if qw.q.shape != target.weight.shape:
                raise ValueError(f"{target.name} has the shape {tuple(qw.q.shape)}")
            quantized[target.name] = qw.to(target.weight.device)
        return quantized, [LayerReport(**report) for report in record["layers"]]

    def save(
        self,
        place: int,
        quantized: Mapping[str, QuantizedWeight],
        reports: Sequence[LayerReport],
    ) -> None:
        """Keep a finished block."""
        tensors = {}
        for name, qw in quantized.items():
            for part in PARTS:
                tensor = getattr(qw, part)
                if tensor is not None:
                    tensors[f"{name}.{part}"] = tensor.clone(memory_format=torch.contiguous_format)
        record = {
            "run": self._run,
            "place": place,
            "tensors": digest_of_tensors(sorted(tensors.items())),
            "group_size": {name: qw.group_size for name, qw in quantized.items()},
            "layers": [asdict(report) for report in reports],
        }
        data = self._tensors.save(tensors, metadata={"record": json.dumps(record)})
        atomic_write(self._path(place), data)
