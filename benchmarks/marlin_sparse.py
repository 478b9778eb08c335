# SPDX-License-Identifier: Apache-2.0
"""The 2:4 four-bit matmul beside the dense four-bit one and cuBLAS, in one run; CUDA only.

The layers of `marlin.py`, float16, groups of 128, batches of 1, 16 and 32 rows; weights rotate over
four times the second-level cache, and all calls are in one CUDA graph. The time of a 2:4 call is
with arranging x where the plan has that. With `--tiles` other tiles and splits are tried, x as it
lies and arranged; arranging is then timed by itself, for layers before may do it.
"""

import argparse
import functools
import itertools
import json
import math
import os
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from marlin import CALLS, limits, microseconds
from marlin_backends import GROUP, SHAPES, Call, copies, cublas, fresh, ours, random

from batchery.kernels.multi_tensor import triton
from batchery.kernels.w4a16_sparse import launch, plan, w4a16_sparse_matmul
from batchery.kernels.w4a16_sparse_layout import (
    PackedSparseW4,
    arrange,
    dequantize_sparse_w4,
    pack_sparse_w4,
)
from batchery.kernels.w4a16_tiles import Tile
from batchery.studies.harness import environment

BATCHES = (1, 16, 32)
PAIRS = [[True, True, False, False], [True, False, True, False], [True, False, False, True]]
PATTERNS = PAIRS + [[not kept for kept in pair] for pair in PAIRS]
TILES = {
    1: (
        Tile(8, 64, stages=3),
        Tile(8, 64, stages=4),
        Tile(8, 64, warps=2, stages=3),
        Tile(8, 128, warps=8, stages=3),
    ),
    16: (
        Tile(16, 64, stages=3),
        Tile(16, 64, stages=2),
        Tile(16, 64, warps=2, stages=3),
        Tile(16, 128, warps=8, stages=3),
    ),
    32: (Tile(32, 64, stages=2), Tile(32, 64, stages=3), Tile(32, 128, warps=8, stages=2)),
}
SPLITS = (1, 2, 3, 4, 6, 8, 16)


def packed(n: int, k: int, group: int = GROUP) -> PackedSparseW4:
    generator = torch.Generator("cuda").manual_seed(0)
    how: dict[str, Any] = {"device": "cuda", "generator": generator}
    kept = torch.tensor(PATTERNS, device="cuda")[torch.randint(0, 6, (n, k // 4), **how)]
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, **how)
    scales = torch.rand(n, k // group, **how).mul_(0.01).add_(1e-3)
    return pack_sparse_w4(q.masked_fill_(~kept.view(n, k), 8), scales.half())


def error(weight: PackedSparseW4, x: torch.Tensor) -> float:
    wanted = x.double() @ dequantize_sparse_w4(weight, torch.float64).T
    y = w4a16_sparse_matmul(x, weight, impl="triton").double()
    return float((y - wanted).norm() / wanted.norm())


def checks() -> dict[str, Any]:
    """Hold some layers to float64, and to what the tests promise of small ones."""
    found: dict[str, Any] = {}
    for dtype in (torch.half, torch.bfloat16):
        errors = []
        for n, k, group in (
            *((*SHAPES[s], GROUP) for s in ("8B qkv", "8B down")),
            (1027, 1056, 32),
        ):
            weight = packed(n, k, group)
            errors += [error(weight, random(m, k, dtype=dtype)) for m in (1, 5, 8, 16, 17, 32, 64)]
        found[f"error_{dtype}"[12:]] = max(errors)
    weight, x = packed(4096, 4096), random(32, 4096)
    same = True
    for m in BATCHES:
        first = w4a16_sparse_matmul(x[:m], weight)
        same &= all(torch.equal(w4a16_sparse_matmul(x[:m], weight), first) for _ in range(100))
    x[3, 5] = torch.nan
    spoilt = w4a16_sparse_matmul(x, weight).isnan()
    stays = bool(spoilt[3].all()) and int(spoilt.any(1).sum()) == 1
    return {**found, "same_bits": same, "nan_stays": stays}


def timed(calls: list[Call], x: torch.Tensor) -> float:
    calls = calls * math.ceil(CALLS / len(calls))
    return microseconds([functools.partial(call, x) for call in calls])


def swept(weights: list[PackedSparseW4], m: int, x: torch.Tensor) -> list[dict[str, Any]]:
    """Times of other tiles and splits, the fastest first."""
    rows, units = weights[0].scales.shape[1], weights[0].words.shape[1]
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    found = []
    for tile in TILES[m]:
        most = processors * 8 // (rows // tile.rows)
        for split, ready in itertools.product(SPLITS, (False, True)):
            if split > max(1, min(most, units)):
                continue
            how: dict[str, Any] = {"tile": tile, "split": split, "arranged": ready}
            calls = [lambda x, w=w, how=how: launch(x, w, **how) for w in weights]
            try:
                us = timed(calls, arrange(x, units) if ready else x)
            except Exception as fault:  # too much shared memory, say, is a result too
                print(f"    {how}: {type(fault).__name__}: {fault}"[:200])
                continue
            found.append({**how, "tile": str(tile), "us": us})
    return sorted(found, key=lambda entry: entry["us"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiles", action="store_true", help="try other tiles and splits")
    parser.add_argument("--layers", help="names of layers, by commas", default=",".join(SHAPES))
    parser.add_argument("--seconds", type=float, default=400, help="no new layer after these")
    folder = os.environ.get("OUT")
    path = Path(folder) / "marlin_sparse.json" if folder else None
    parser.add_argument("--json", type=Path, default=path)
    options = parser.parse_args()
    end = time.perf_counter() + options.seconds
    found: dict[str, Any] = {"date": date.today().isoformat(), "torch": torch.__version__}
    found["environment"] = environment(torch.device("cuda"))
    found |= {"triton": triton.__version__, **limits(), "checks": checks(), "layers": []}
    print({name: value for name, value in found.items() if name != "layers"}, flush=True)
    print(
        "layer         M   cublas    dense      2:4  µs  | dense/2:4  floor/2:4  plan", flush=True
    )
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for name in options.layers.split(","):
        if time.perf_counter() > end:
            print(f"{name}: no time left")
            continue
        n, k = SHAPES[name]
        times: dict[str, dict[int, float]] = {}
        for backend, make in (("cublas", cublas), ("dense", ours)):
            calls = make(n, k)
            times[backend] = {m: timed(calls, random(m, k)) for m in BATCHES}
            del calls
        first = packed(n, k)
        weights = [fresh(first) for _ in copies(first.nbytes)]
        units = first.words.shape[1]
        for m in BATCHES:
            x = random(m, k)
            calls = [lambda x, w=w: w4a16_sparse_matmul(x, w) for w in weights]
            us = timed(calls, x)
            tile, split, arranged = plan(m, first.scales.shape[1], units, processors)
            floor = first.nbytes / found["read_gb_s"] / 1e3
            row = {"layer": name, "m": m, "bytes": first.nbytes, "floor_us": floor}
            row |= {"cublas_us": times["cublas"][m], "dense_us": times["dense"][m], "us": us}
            row |= {"tile": str(tile), "split": split, "arranged": arranged}
            print(
                f"{name:12s} {m:2d} {times['cublas'][m]:8.1f} {times['dense'][m]:8.1f} {us:8.1f}"
                f"     | {times['dense'][m] / us:9.2f}  {floor / us:9.2f}  {tile.batch}x{tile.rows}"
                f" {tile.warps} warps, {tile.stages} stages, split {split}"
                f"{', arranged' if arranged else ''}",
                flush=True,
            )
            if options.tiles:
                row["arrange_us"] = timed([functools.partial(arrange, units=units)], x)
                row["swept"] = swept(weights, m, x)
                for entry in row["swept"][:3]:
                    print(f"    {entry['us']:8.1f}  {entry}")
                print(f"    arranging x: {row['arrange_us']:.1f}", flush=True)
            found["layers"].append(row)
        del first, weights, calls
        torch.cuda.empty_cache()
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
