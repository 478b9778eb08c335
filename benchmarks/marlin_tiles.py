# SPDX-License-Identifier: Apache-2.0
"""Every tile and split of the four-bit kernel on the layers of `marlin.py` (CUDA).

What `batchery.kernels.w4a16_plan` picks is near the fastest of such sweeps. Each tile is compiled
in a process of its own, checked against float64, and only then timed.
"""

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from marlin import microseconds
from marlin_backends import SHAPES, copies, fresh, packed, random

from batchery.kernels.w4a16_layout import dequantize_w4
from batchery.kernels.w4a16_plan import plan_tiles
from batchery.kernels.w4a16_tiles import Tile, dequantize_tiles, launch
from batchery.studies.harness import environment

BATCHES = (1, 16, 32, 64, 128, 256)
LONG = (256, 512, 1024, 2048, 4096)  # where a dense product of dequantised weights may overtake
SPLITS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14)


# By rows of x in a tile: rows of W, warps, words a turn, stages, and S where weights are scaled.
CANDIDATES = {
    8: "64/4/64/4 64/4/64/6 128/4/64/4 128/4/64/3 128/8/64/4",
    16: "64/4/64/3 64/4/64/4 64/4/64/5 128/4/64/3 128/4/64/4 128/8/64/4",
    32: ("64/4/64/3 64/4/64/4 64/4/32/5 64/4/32/4S 128/4/32/4S 128/8/64/3 128/8/64/4 128/8/32/4S"),
    64: (
        "64/4/64/3 64/4/32/4S 64/4/32/5S 64/4/64/3S 128/4/32/4S 128/8/32/3S 128/8/32/4S "
        "128/8/32/5S 128/8/64/3S 256/8/32/4S"
    ),
    128: (
        "64/4/32/3S 64/4/32/4S 64/4/16/4S 128/4/16/4S 128/4/32/3S 128/8/16/4S "
        "128/8/32/3S 128/8/32/2S 256/8/16/4S"
    ),
    256: "64/4/16/3S 64/4/16/4S 64/4/32/2S 128/8/16/4S 128/8/32/2S 128/8/32/3S",
}


def candidates(batch: int) -> list[Tile]:
    """Return the tiles worth a look at this batch: of its width, and of a neighbour at the ends."""
    wide = next(width for width in CANDIDATES if batch <= width)
    widths = {8: (8, 16), 256: (256, 128)}.get(wide, (wide,))
    return [_tile(width, text) for width in widths for text in CANDIDATES[width].split()]


def _tile(width: int, text: str) -> Tile:
    rows, warps, step, stages = map(int, text.removesuffix("S").split("/"))
    return Tile(width, rows, step, warps, stages, scale_weights=text.endswith("S"))


def try_tile(batch: int, tile: Tile) -> float:
    """Compile a tile for one part and for many, and return the larger error of both."""
    weight, x = packed(1280, 1024), random(batch, 1024)
    wanted = x.double() @ dequantize_w4(weight, torch.float64).T
    errors = []
    for split in (1, 2):
        out = torch.full((batch, 1280), torch.nan, dtype=x.dtype, device="cuda")
        y = launch(x, weight, tile, split, out=out).double()
        errors.append(float((y - wanted).norm() / wanted.norm()))
    return max(errors)


def trial_batch(batch: int, tile: Tile) -> int:
    """Return a batch for which the same kernel is compiled: only one tile of rows is special."""
    return tile.batch if batch <= tile.batch else 2 * tile.batch


def compile_all(processes: int) -> dict[tuple[int, Tile], float | str]:
    """Try every tile in parallel; compiled kernels lie in a folder that goes with this run."""
    jobs = {(trial_batch(m, tile), tile) for m in BATCHES for tile in candidates(m)}
    found: dict[tuple[int, Tile], float | str] = {}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        pending = {pool.submit(try_tile, *job): job for job in jobs}
        for done in concurrent.futures.as_completed(pending):
            try:
                found[pending[done]] = done.result()
            except Exception as problem:  # noqa: BLE001 - a tile that fails is a result
                found[pending[done]] = str(problem)[:160]
    return found


def short(tile: Tile) -> str:
    scaled = " S" * tile.scale_weights
    return f"{tile.batch}x{tile.rows}.{tile.step} w{tile.warps} s{tile.stages}{scaled}"


def sweep(shape: str, works: set[tuple[int, Tile]]) -> list[dict[str, Any]]:
    """Time the planned tile and split of a layer, and every other that works."""
    first = packed(*SHAPES[shape])
    weights = [fresh(first) for _ in copies(first.nbytes)]
    _, blocks, _, lanes = first.words.shape
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    rows = []
    for m in BATCHES:
        x = random(m, SHAPES[shape][1])

        def timed(tile: Tile, split: int, x: Any = x) -> float:
            return microseconds([functools.partial(launch, x, w, tile, split) for w in weights])

        tile, split = plan_tiles(m, first.rows, blocks, lanes, processors, False)
        swept = []
        for other in candidates(m):
            if (trial_batch(m, other), other) not in works:
                continue
            count = first.rows // other.rows * -(-m // other.batch)
            for parts in SPLITS:
                # a fourth round of programs gains nothing, and a split needs its turns
                if parts == 1 or (count * parts <= 16 * processors and parts <= blocks):
                    swept.append((timed(other, parts), short(other), parts))
        best = sorted(swept)[:5]
        rows.append({"shape": shape, "m": m, "plan": [short(tile), split]})
        rows[-1] |= {"us": timed(tile, split), "best": best}
        line = f"{shape:12s} {m:3d} planned {short(tile)} /{split} {rows[-1]['us']:.1f} | "
        print(
            line + ", ".join(f"{name} /{parts} {us:.1f}" for us, name, parts in best[:3]),
            flush=True,
        )
    return rows


def long_batches(shape: str) -> list[dict[str, Any]]:
    """Time the kernel beside cuBLAS and beside a dense product of dequantised weights."""
    weight = packed(*SHAPES[shape])
    dense = dequantize_tiles(weight, torch.half)
    rows = []
    for m in LONG:
        x = random(m, SHAPES[shape][1])
        calls = {
            "cublas": functools.partial(F.linear, x, dense),
            "dequantised": lambda x=x: F.linear(x, dequantize_tiles(weight, torch.half)),
        }
        for tile in candidates(256):
            calls[short(tile)] = functools.partial(launch, x, weight, tile)
        times = {name: microseconds([call]) for name, call in calls.items()}
        rows.append({"shape": shape, "m": m, "us": times})
        line = ", ".join(f"{name} {us:.0f}" for name, us in times.items())
        print(f"{shape:12s} {m:4d} {line}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=14, help="that compile")
    parser.add_argument("--seconds", type=float, default=170, help="after which no layer is begun")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
    begin = time.perf_counter()
    tried = compile_all(options.processes)
    works = {job for job, error in tried.items() if isinstance(error, float) and error < 2e-3}
    for (batch, tile), error in tried.items():
        if (batch, tile) not in works:
            print("left out:", batch, short(tile), error)
    where = environment(torch.device("cuda"))
    found: dict[str, Any] = {"environment": where, "layers": [], "long": []}
    for shape in reversed(SHAPES):
        if time.perf_counter() - begin < options.seconds:
            found["layers"] += sweep(shape, works)
            torch.cuda.empty_cache()
    for shape in ("8B gate_up", "70B down"):
        found["long"] += long_batches(shape)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
