# SPDX-License-Identifier: Apache-2.0
"""LAMB and LARS beside their peers and the memory limit, in one run, as ratios.

On CUDA: the 389 tensors of a BERT-Large-shaped model (334 M parameters, float32). On the CPU:
10 M parameters, two threads. Peers that are not installed are named as absent.
"""

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchery.cli import device_argument
from batchery.kernels import lamb as lamb_kernel
from batchery.kernels.multi_tensor import ChunkTable
from batchery.optim import LAMB, LARS
from batchery.studies.harness import environment

BERT_LARGE = [(30522, 1024), (512, 1024), (2, 1024), (1024,), (1024,)] + 24 * (
    4 * [(1024, 1024), (1024,)] + [(4096, 1024), (4096,), (1024, 4096), (1024,)] + 4 * [(1024,)]
)
MANY_SMALL = 2000 * [(1000,)]
TEN_MILLION = 4 * [(2000, 1000)] + 4 * [(500, 1000)]

Step = Callable[[], Any]


def make(shapes: Sequence[tuple[int, ...]], device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    tensors = []
    for shape in shapes:
        tensor = torch.randn(shape, device=device, generator=generator).mul_(0.02)
        tensor.requires_grad_()
        tensor.grad = torch.randn(shape, device=device, generator=generator).mul_(1e-3)
        tensors.append(tensor)
    return tensors


def seconds(step: Step, device: torch.device, repeats: int, between: Step = lambda: None) -> float:
    """Median time of one call, after three calls of warm-up; `between` runs before each call."""
    return statistics.median(times_of(step, device, repeats, between))


def times_of(step: Step, device: torch.device, repeats: int, between: Step) -> list[float]:
    times = []
    for _ in range(3):
        step()
    if device.type == "cuda":
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
    else:
        for _ in range(repeats):
            between()
            at = time.perf_counter()
            step()
            times.append(time.perf_counter() - at)
    return times


def in_turns(
    step: Step, base: Step, device: torch.device, repeats: int, between: Step
) -> tuple[float, float]:
    """Median times of a step and of what it is compared with, five stretches of each in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(5):
        for own, call in zip(times, (step, base), strict=True):
            own += times_of(call, device, -(-repeats // 5), between)
    return statistics.median(times[0]), statistics.median(times[1])


def timm_optimizer(name: str) -> Callable[..., torch.optim.Optimizer] | None:
    try:
        found: Callable[..., torch.optim.Optimizer] = getattr(
            importlib.import_module("timm.optim"), name
        )
    except (ImportError, AttributeError, RuntimeError):
        return None
    return found


def contenders(device: torch.device) -> dict[str, Callable[[list[Tensor]], Any] | None]:
    """Return how to build each optimizer; None for a peer that is absent."""
    lamb, lars = timm_optimizer("Lamb"), timm_optimizer("Lars")
    found: dict[str, Callable[[list[Tensor]], Any] | None] = {
        "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
        "AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
        "LAMB": lambda p: LAMB(p),
        "LAMB foreach": lambda p: LAMB(p, foreach=True),
        "timm Lamb": None if lamb is None else lambda p: lamb(p, max_grad_norm=None),
        "SGD fused": lambda p: torch.optim.SGD(p, momentum=0.9, weight_decay=1e-4, fused=True),
        "LARS": lambda p: LARS(p, weight_decay=1e-4),
        "LARS foreach": lambda p: LARS(p, weight_decay=1e-4, foreach=True),
        "timm Lars": None if lars is None else lambda p: lars(p, momentum=0.9, weight_decay=1e-4),
    }
    return found


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read plus written per second by a large copy."""
    source = torch.randn(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device, 20)


MOMENTUM_SGD = ("SGD fused", "LARS", "LARS foreach", "timm Lars")
WORDS = {"AdamW fused": 7, "LAMB": 10, "SGD fused": 5, "LARS": 7}  # float32 words per parameter


def compare(
    shapes: Sequence[tuple[int, ...]],
    device: torch.device,
    repeats: int,
    between: Step = lambda: None,
) -> dict[str, Any]:
    count = sum(torch.Size(shape).numel() for shape in shapes)
    bandwidth = copy_bandwidth(device)
    print(f"{len(shapes)} tensors, {count / 1e6:.1f} M parameters; copy {bandwidth / 1e9:.0f} GB/s")
    rows: dict[str, Any] = {"parameters": count, "copy_gb_s": bandwidth / 1e9}
    builds = contenders(device)
    bases = {name: builds[name](make(shapes, device)).step for name in ("AdamW fused", "SGD fused")}
    for name, build in builds.items():
        if build is None:
            print(f"{name:14s}    absent")
            rows[name] = None
            continue
        optimizer = build(make(shapes, device))
        slow = name.startswith("timm") or "foreach" in name
        turns = max(5, repeats // 4) if slow else repeats
        base = bases["SGD fused" if name in MOMENTUM_SGD else "AdamW fused"]
        time_, base_time = in_turns(optimizer.step, base, device, turns, between)
        ratio = time_ / base_time
        rows[name] = {"ms": time_ * 1e3, "ratio": ratio}
        line = f"{name:14s} {time_ * 1e3:9.3f} ms   {ratio:6.2f} x base"
        if name in WORDS:
            limit = 4 * WORDS[name] * count / bandwidth
            rows[name]["of_limit"] = limit / time_
            line += f"   {limit / time_:5.2f} of the copy bandwidth at {WORDS[name]} words"
        print(line, flush=True)
        del optimizer
    for name, ours in (("timm Lamb", "LAMB"), ("timm Lars", "LARS")):
        peer, own = builds[name], builds[ours]
        if peer is not None and own is not None:
            steps = (build(make(shapes, device)).step for build in (peer, own))
            time_, own_time = in_turns(*steps, device, max(5, repeats // 4), between)
            rows[name]["over_ours"] = time_ / own_time
            print(f"{name:14s} {'':9s}      {time_ / own_time:6.2f} x {ours}, in turns with it")
    return rows


def sweep(device: torch.device) -> list[dict[str, Any]]:
    """Time the fused LAMB kernels over chunk, block and warps."""
    parameters = make(BERT_LARGE, device)
    moments = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
    steps = [torch.ones((), device=device) for _ in parameters]
    grads = [p.grad for p in parameters]
    detached = [p.detach() for p in parameters]
    rows = []
    for chunk in (8192, 16384, 32768, 65536):
        table = ChunkTable(detached, chunk=chunk)
        for block in (1024, 2048, 4096):
            for warps in (4, 8, 16):
                lists = (detached, grads, *moments, steps)

                def step(table=table, block=block, warps=warps, lists=lists):
                    lamb_kernel.fused_cuda(
                        lists,
                        lamb_kernel.LambRule(),
                        1e-3,
                        table=table,
                        block=block,
                        warps=warps,
                    ).finish()

                ms = seconds(step, device, 10) * 1e3
                rows.append({"chunk": chunk, "block": block, "warps": warps, "ms": ms})
                print(
                    f"chunk {chunk:6d} block {block:5d} warps {warps:2d}  {ms:7.3f} ms", flush=True
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device_argument, default=default)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--sweep", action="store_true", help="kernel variants (CUDA)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = options.device
    found: dict[str, Any] = {"date": date.today().isoformat()}
    if device.type == "cuda":
        if options.sweep:
            found["sweep"] = sweep(device)
        found["bert-large"] = compare(BERT_LARGE, device, options.repeats)
        found["many-small"] = compare(MANY_SMALL, device, options.repeats)
    else:
        torch.set_num_threads(2)
        found["ten-million"] = compare(TEN_MILLION, device, options.repeats)
        print("the same, with caches emptied before each step, as a training does")
        other = torch.zeros(2**28)  # 1 GiB
        found["ten-million-cold"] = compare(TEN_MILLION, device, options.repeats, other.sum)
    if options.json:
        found["environment"] = environment(device)
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
