# SPDX-License-Identifier: Apache-2.0
"""C kernels for the CPU, compiled on first use by the machine's own compiler.

torch's operations on the CPU read memory anew, each of them; a step of a layer-wise optimizer is
bound by memory and has several. `layerwise.c` makes it in two passes, like the Triton kernels.
Compiling takes about a second; the library is kept in the cache folder, under a hash of source,
compiler, flags and processor. Where there is no compiler, callers take their torch form.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from batchery._core.state import atomic_write, cache_folder

if TYPE_CHECKING:
    from batchery.kernels.multi_tensor import ChunkTable

REALS = {torch.float32: "float", torch.float64: "double"}
_SOURCE = Path(__file__).with_name("layerwise.c")
_FLAGS = ("-std=c11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
# Flags to compile and to link with, the best first. Without a library of its own the code finds
# torch's OpenMP, so that one team of threads serves both. Apple's compiler has none.
_ATTEMPTS: tuple[tuple[list[str], list[str]], ...] = (
    (["-march=native", "-fopenmp"], []),
    (["-march=native", "-fopenmp"], ["-fopenmp"]),
    (["-march=native"], []),
    ([], []),
)


class Table(ctypes.Structure):
    """A `ChunkTable` with the addresses of its lists, as `layerwise.c` reads it."""

    _fields_ = (
        ("addresses", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("chunks", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


def native_ready(dtype: torch.dtype) -> bool:
    """Say whether there are kernels for a dtype; compiles them if need be."""
    return dtype in REALS and _library(dtype) is not None


def call(
    name: str, table: "ChunkTable", lists: Sequence[list[Tensor]], *arguments: Tensor | float
) -> None:
    """Run a function of `layerwise.c` over all chunks.

    Args:
        name: of the function.
        table: chunks of the lists, on the CPU.
        lists: tensors of one dtype in `REALS`, contiguous.
        arguments: what the function takes beside the table: tensors, numbers (double), flags (int).
    """
    library = _library(lists[0][0].dtype)
    if library is None:
        raise RuntimeError("batchery.kernels.native: no C compiler was found")
    addresses, _ = table.addresses(*lists)
    n, count = addresses.shape[1], len(table.chunks)
    where = addresses.data_ptr(), n, table.chunks.data_ptr(), count, torch.get_num_threads()
    head = Table(*where)
    library[name](ctypes.byref(head), *(_argument(value) for value in arguments))


def _argument(value: Tensor | float) -> object:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return int(value) if isinstance(value, bool) else ctypes.c_double(value)


@cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Return the kernels for a dtype, or None with one warning where they cannot be made."""
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        _warn("no C compiler was found (CC, cc, gcc, clang)")
        return None
    problems = []
    for extra, link in _ATTEMPTS:
        flags = [*_FLAGS, *extra, f"-DREAL={REALS[dtype]}"]
        try:
            return ctypes.CDLL(str(_compiled(compiler, flags, link)))
        except subprocess.CalledProcessError as error:
            problems.append(error.stderr.strip().partition("\n")[0])
        except OSError as error:
            problems.append(str(error))
    _warn(f"{compiler} did not compile {_SOURCE.name}: {problems[-1]}")
    return None


def _compiled(compiler: str, flags: list[str], link: list[str]) -> Path:
    version = _run(compiler, "--version")
    parts = (_SOURCE.read_text(), version, *flags, *link, platform.machine(), _features())
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    path = cache_folder() / "native" / f"layerwise.{digest}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            unit, made = str(Path(folder) / "made.o"), Path(folder) / "made.so"
            _run(compiler, *flags, "-c", str(_SOURCE), "-o", unit)
            _run(compiler, "-shared", unit, "-o", str(made), "-lm", *link)
            atomic_write(path, made.read_bytes())
    return path


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _features() -> str:
    """Return what -march=native depends on: one cache folder may serve several machines."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _warn(problem: str) -> None:
    warnings.warn(f"batchery: {problem}; steps on the CPU will be slower", stacklevel=3)
