# SPDX-License-Identifier: Apache-2.0
"""The record of a run: what its arm returned, how long it took, its peak memory; kept on disk.

`harness.py` makes one for each arm and seed, and keeps it until the study is complete. A kept run
is used again only when the library's code, the versions, the device and the thread count are those
that made it.
"""

import json
import math
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

import torch

from batchery._core.state import atomic_write
from batchery.studies.study import Outcome, Trial


class _PeakMemory:
    """Peak memory between construction and `read()`, in MiB: of the process and of CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        try:  # Linux: forget the peak of earlier runs, so that each run has its own
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def read(self) -> dict[str, float]:
        peaks = {"process_mib": self._process()}
        if self._device.type == "cuda":
            peaks["cuda_mib"] = torch.cuda.max_memory_allocated(self._device) / 2**20
        return {name: round(value, 1) for name, value in peaks.items()}

    @staticmethod
    def _process() -> float:
        try:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) / 2**10
        except OSError:
            pass
        unit = 2**20 if platform.system() == "Darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(function: Callable[[Trial], Any], trial: Trial, device: torch.device) -> dict[str, Any]:
    """Run an arm, or a preparation, and return the record of it."""
    memory = _PeakMemory(device)
    begin = time.perf_counter()
    value = function(trial)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begin
    record: dict[str, Any] = {"seconds": round(seconds, 3), "memory": memory.read()}
    if isinstance(value, Outcome):
        return {"metrics": dict(value.metrics), "series": dict(value.series), **record}
    return {"value": value, **record}


def _is_record(value: Any) -> TypeGuard[dict[str, Any]]:
    """Say whether a value has the shape of what `measure` returns."""
    if not isinstance(value, dict):
        return False
    own = ("metrics", "series") if "metrics" in value else ("value",)
    kinds = {"seconds": float} | dict.fromkeys(("memory", *own), dict)
    return value.keys() == kinds.keys() and all(
        isinstance(value[name], kind) for name, kind in kinds.items()
    )


class KeptRuns:
    """Finished runs of an unfinished study; each file says what made it."""

    def __init__(self, folder: Path, where: dict[str, Any]) -> None:
        """Keep runs in a folder; `where` is the `environment` that makes them."""
        self._folder = folder
        self._made_by = {key: where[key] for key in ("source", "device", "threads", "versions")}

    def _path(self, label: str, seed: int) -> Path:
        return self._folder / f"{label}.{seed}.json"

    def load(self, label: str, seed: int) -> dict[str, Any] | None:
        """Return a run that is whole and was made by what runs now; any other counts as absent."""
        try:
            kept = json.loads(self._path(label, seed).read_text())
        except (OSError, ValueError):
            return None
        if not isinstance(kept, dict) or kept.get("made_by") != self._made_by:
            return None
        record = kept.get("record")
        return record if _is_record(record) else None

    def save(self, label: str, seed: int, record: dict[str, Any]) -> None:
        """Keep a run, with what made it."""
        kept = {"made_by": self._made_by, "record": record}
        atomic_write(self._path(label, seed), to_json(kept).encode())


def to_json(value: Any) -> str:
    """Write a value as JSON; NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_finite(value), indent=1, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
