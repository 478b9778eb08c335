# SPDX-License-Identifier: Apache-2.0
"""The four-bit matmul beside cuBLAS, other four-bit kernels and the memory's limit, in one run.

On CUDA: the layers of Llama-shaped models of 8 and 70 billion parameters, groups of 128, batches of
1 to 2,048 rows; the weights rotate over four times the second-level cache, and all calls are in one
CUDA graph. Peers are cuBLAS in float16, torch's tinygemm, a plain kernel in Triton
(`marlin_triton_peer.py`) and, where vLLM is installed, its gptq_marlin and Machete; a peer that is
absent or fails is named, and spoils nothing, for it runs in a process of its own. On the CPU: two
layers beside dense ones.
"""

import argparse
import functools
import importlib.metadata
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from marlin_backends import BACKENDS, BATCHES, SHAPES, Call, microseconds, packed, random
from marlin_report import tables
from torch import Tensor

from batchery.cli import device_argument
from batchery.kernels.multi_tensor import tl, triton
from batchery.kernels.w4a16 import w4a16_matmul
from batchery.kernels.w4a16_layout import dequantize_w4
from batchery.studies.harness import environment

CALLS = 12  # in a graph, at least
REST = 0.5  # seconds before each layer: large products of the one before have lowered the clock
PROCESSES = (
    ("ours", "invariant"),
    ("cublas", "tinygemm"),
    ("triton_atomics",),
    ("gptq_marlin",),
    ("machete",),
)
# Rows; above, the first splits batches, the others are hopeless.
MOST = {"invariant": 64, "tinygemm": 64, "triton_atomics": 64}


def eager_microseconds(call: Call, x: Tensor) -> float:
    """Time of a call without a graph, of a layer so small that launching is all."""
    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(200):
            call(x)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e6 / 200)
    return min(times)


def measure(name: str) -> dict[str, Any]:
    """Time one backend on every layer and batch."""
    make, most = BACKENDS[name], MOST.get(name, max(BATCHES))
    dtype = torch.bfloat16 if name == "tinygemm" else torch.half
    found: dict[str, Any] = {"us": {}}
    small = make(1024, 1024)[0]
    if name in ("gptq_marlin", "machete"):
        found["version"] = importlib.metadata.version("vllm")
    found["eager_us"] = eager_microseconds(small, random(1, 1024, dtype=dtype))
    for shape, (n, k) in SHAPES.items():
        calls = make(n, k)
        calls *= math.ceil(CALLS / len(calls))
        row = found["us"][shape] = {}
        torch.cuda.synchronize()
        time.sleep(REST)
        for m in (m for m in BATCHES if m <= most):
            x = random(m, k, dtype=dtype)
            row[str(m)] = microseconds([functools.partial(call, x) for call in calls])
        del calls
        torch.cuda.empty_cache()
    return found


if triton is not None:

    @triton.jit
    def _read(source, sums, BLOCK: tl.constexpr, TURNS: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * (BLOCK * TURNS) + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for turn in tl.static_range(0, TURNS):
            total += tl.load(source + at + turn * BLOCK)
        tl.store(sums + tl.program_id(0), tl.sum(total, 0))


def limits() -> dict[str, Any]:
    """Bytes per second of the best plain read of 4 GiB; operations of a large dense product."""
    source = random(2**30, dtype=torch.float32)
    reads = []
    for block, turns, warps in ((4096, 8, 8), (8192, 8, 8), (2048, 16, 4), (8192, 32, 8)):
        programs = source.numel() // block // turns
        sums = torch.empty(programs, device="cuda")
        read = functools.partial(
            _read[(programs,)], source, sums, BLOCK=block, TURNS=turns, num_warps=warps
        )
        reads.append(microseconds([read], 6))
    a, b = random(8192, 8192), random(8192, 8192)
    dense = microseconds([lambda: F.linear(a, b)], 6)
    found = {"read_gb_s": source.nbytes / min(reads) / 1e3, "dense_tflop_s": 2**40 / dense / 1e6}
    return {"device": torch.cuda.get_device_name(), **found}


def checks() -> dict[str, Any]:
    """Hold real layers to float64 and to what the tests promise of small ones."""
    errors = []
    for n, k in (SHAPES["8B qkv"], SHAPES["8B down"]):
        weight = packed(n, k)
        w = dequantize_w4(weight, torch.float64)
        for m in BATCHES:
            x = random(m, k)
            wanted = x.double() @ w.T
            y = w4a16_matmul(x, weight).double()
            errors.append(float((y - wanted).norm() / wanted.norm()))
    weight, x = packed(4096, 4096), random(130, 4096)
    whole = w4a16_matmul(x, weight, batch_invariant=True)
    alike = all(
        torch.equal(w4a16_matmul(x[:m], weight, batch_invariant=True), whole[:m])
        for m in (1, 2, 7, 16, 17, 33, 64, 65, 129)
    )
    same = True
    for m in (1, 16, 32, 64, 128):
        first = w4a16_matmul(x[:m], weight)
        same &= all(torch.equal(w4a16_matmul(x[:m], weight), first) for _ in range(100))
    x[3, 5] = torch.nan
    spoilt = w4a16_matmul(x[:16], weight).isnan()
    stays = bool(spoilt[3].all()) and int(spoilt.any(1).sum()) == 1
    return {
        "error": float(torch.tensor(errors).max()),
        "invariant": alike,
        "same_bits": same,
        "nan_stays": stays,
    }


def attempt(measurement: Callable[..., dict[str, Any]], *arguments: str) -> dict[str, Any]:
    """Return what was measured, or why it was not."""
    try:
        return measurement(*arguments)
    except ImportError as error:
        return {"absent": str(error)}
    except Exception as error:  # a fault is a result, and what was measured before it is kept
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def one_process(names: list[str]) -> dict[str, Any]:
    """Measure some backends here."""
    found = {name: attempt(measure, name) for name in names}
    if "ours" in names:
        found["checks"] = attempt(checks)
    if "cublas" in names:
        found["limits"] = attempt(limits)
    return found


def on_the_gpu(seconds: float) -> dict[str, Any]:
    """Measure every backend, one process after the other, those that come late not at all."""
    end = time.perf_counter() + seconds
    found: dict[str, Any] = {"date": date.today().isoformat(), "torch": torch.__version__}
    found["environment"] = environment(torch.device("cuda"))
    found |= {"triton": triton.__version__, "backends": {}}
    for names in PROCESSES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "found.json"
            command = [sys.executable, __file__, "--backends", ",".join(names), "--json", path]
            begin = time.perf_counter()
            left = max(1.0, end - begin)
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=left)
                problem = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
            except subprocess.TimeoutExpired:
                problem = f"not done within {left:.0f} s"
            own = json.loads(path.read_text()) if path.is_file() else {}
        found |= own.pop("limits", {})
        if "checks" in own:
            found["checks"] = own.pop("checks")
        for name in names:
            found["backends"][name] = own.get(name) or {"failed": problem[-300:]}
        print(f"{', '.join(names)}: {time.perf_counter() - begin:.0f} s", flush=True)
    return found


def on_the_cpu() -> dict[str, Any]:
    """Two layers of a small model, bfloat16 and float32, two threads."""
    torch.set_num_threads(2)
    rows = []
    for n, k in ((2048, 2048), (5632, 2048)):
        weight = packed(n, k, "cpu")
        for dtype in (torch.bfloat16, torch.float32):
            dense = dequantize_w4(weight, dtype)
            calls: list[Call] = [lambda x, w=dense: F.linear(x, w)]
            calls += [lambda x, w=weight: w4a16_matmul(x, w)]
            for m in (1, 8, 32, 128):
                x = torch.randn(m, k, dtype=dtype)
                times: tuple[list[float], list[float]] = ([], [])
                for _ in range(6):  # in turns
                    for own, call in zip(times, calls, strict=True):
                        begin = time.perf_counter()
                        call(x)
                        own.append((time.perf_counter() - begin) * 1e3)
                ms = [statistics.median(own[1:]) for own in times]
                rows.append({"n": n, "k": k, "m": m, "dtype": str(dtype)[6:], "ms": ms})
                print(
                    f"({n}, {k}) M={m:3d} {str(dtype)[6:]:8s} dense {ms[0]:7.2f} ms, "
                    f"4-bit {ms[1]:7.2f} ms, {ms[0] / ms[1]:.2f} x dense"
                )
    where = environment(torch.device("cpu"))
    found = {"date": date.today().isoformat(), "torch": torch.__version__, "environment": where}
    return found | {"cpu": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--device", type=device_argument, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--seconds", type=float, default=300, help="for everything (CUDA)")
    parser.add_argument("--backends", help="measure these alone, in this process")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.backends:
        found = one_process(options.backends.split(","))
    else:
        found = on_the_gpu(options.seconds) if options.device.type == "cuda" else on_the_cpu()
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if "backends" in found:
        print("\n".join(tables(found)))


if __name__ == "__main__":
    main()
