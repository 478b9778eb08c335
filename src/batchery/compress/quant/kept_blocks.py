# SPDX-License-Identifier: Apache-2.0
"""Finished blocks of a quantisation on disk, so that an interrupted one goes on.

Each block is one safetensors file, whole or absent. It says what the weights were that it was made
of; the folder says by which settings and data. What does not fit is refused, not made anew: a
folder that is given by mistake is not written over.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from batchery._core.state import atomic_write, check_fits
from batchery._core.validate import import_extra
from batchery.compress.quant.calibration import Target
from batchery.compress.quant.weight import QuantizedWeight

__all__ = ["Done", "KeptBlocks", "LayerReport"]

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
    """

    name: str
    tokens: int
    error: float
    rtn_error: float
    seconds: float


Done = tuple[dict[str, QuantizedWeight], list[LayerReport]]


class KeptBlocks:
    """A folder of finished blocks.

    Args:
        owner: what errors say.
        folder: made when it is not there.
        made_by: settings and data, JSON-able.

    Raises:
        ValueError: the folder was made by others.
    """

    def __init__(self, owner: str, folder: Path, made_by: Mapping[str, Any]) -> None:
        """Open the folder."""
        self._owner = owner
        self._files = import_extra("safetensors", "hf", owner)
        self._tensors = import_extra("safetensors.torch", "hf", owner)
        self._folder = folder
        run = folder / "run.json"
        if run.exists():
            check_fits(owner, json.loads(run.read_text()), made_by)
        else:
            atomic_write(run, json.dumps(made_by, indent=1).encode())

    def _path(self, place: int) -> Path:
        return self._folder / f"block-{place:05d}.safetensors"

    def load(self, place: int, targets: Sequence[Target]) -> Done | None:
        """Return a finished block, None where it is not here.

        Raises:
            ValueError: it was made of other weights.
        """
        path = self._path(place)
        if not path.exists():
            return None
        with self._files.safe_open(path, "pt") as file:
            record = json.loads(file.metadata()["record"])
        check_fits(self._owner, record["made_by"], _fingerprint(targets))
        tensors = self._tensors.load_file(path)
        quantized = {}
        for target in targets:
            parts = {part: tensors.get(f"{target.name}.{part}") for part in PARTS}
            qw = QuantizedWeight(**parts, group_size=record["group_size"][target.name])
            quantized[target.name] = qw.to(target.weight.device)
        logger.info("block %d is taken from %s", place, path)
        return quantized, [LayerReport(**report) for report in record["layers"]]

    def save(
        self,
        place: int,
        targets: Sequence[Target],
        quantized: Mapping[str, QuantizedWeight],
        reports: Sequence[LayerReport],
    ) -> None:
        """Keep a finished block whose targets still have their first weights."""
        tensors = {}
        for name, qw in quantized.items():
            for part in PARTS:
                tensor = getattr(qw, part)
                if tensor is not None:
                    tensors[f"{name}.{part}"] = tensor.clone(memory_format=torch.contiguous_format)
        record = {
            "made_by": _fingerprint(targets),
            "group_size": {name: qw.group_size for name, qw in quantized.items()},
            "layers": [asdict(report) for report in reports],
        }
        data = self._tensors.save(tensors, metadata={"record": json.dumps(record)})
        atomic_write(self._path(place), data)


def _fingerprint(targets: Sequence[Target]) -> dict[str, Any]:
    """Return what tells the weights of a block from others."""
    return {
        target.name: [
            list(target.weight.shape),
            int(torch.hash_tensor(target.weight).view(torch.int64)),
        ]
        for target in targets
    }
