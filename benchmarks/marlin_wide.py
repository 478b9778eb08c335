# SPDX-License-Identifier: Apache-2.0
"""Every form of the wide four-bit kernel on the layers of `marlin.py`, beside cuBLAS (Hopper).

Some 40 s. The model of time in `batchery.kernels.w4a16_plan` is fitted to this. The kernel's
results are checked by `tests/kernels/test_w4a16_wide.py`; run that first.
"""

import argparse
import functools
import json
import math
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from marlin import CALLS, microseconds
from marlin_backends import SHAPES, copies, fresh, packed, random

from batchery.kernels.w4a16 import w4a16_matmul
from batchery.kernels.w4a16_plan import FORMS, stripes
from batchery.kernels.w4a16_wide import Share, launch
from batchery.studies.harness import environment

BATCHES = (32, 64, 128, 256, 512, 1024, 2048)
MOST = {64: 128, 32: 64}  # rows of x above which forms for so many are hopeless

Row = dict[str, Any]


def timed(make: Callable[[Any], Callable[[], Any]], weights: list[Any]) -> float:
    """Best time of a call, of a graph that has a call with each weight."""
    calls = [make(weight) for weight in weights]
    return microseconds(calls * math.ceil(CALLS / len(calls)))


def ways(tiles: int, blocks: int, processors: int, many: bool) -> list[Share]:
    """Return the planned share of the work first, then others that may be faster."""
    found = [stripes(tiles, blocks, processors)[0]]
    if tiles > processors // 2:
        found.append((0, tiles, tiles))  # a program for each tile
    if many and tiles * blocks >= processors:
        found.append((0, tiles, processors))
    if many and tiles < processors:
        parts = processors // tiles
        found += [(0, tiles, tiles * p) for p in {1, parts, max(1, parts // 2)} if p <= blocks]
    return list(dict.fromkeys(found))


def measure(shape: str, device: torch.device) -> list[Row]:
    """Time cuBLAS, what the library chooses, and every form and share, by rows of x."""
    n, k = SHAPES[shape]
    dense = [random(n, k) for _ in copies(2 * n * k)]
    rows: list[Row] = []
    for m in BATCHES:
        x = random(m, k)
        cublas = timed(lambda w, x=x: functools.partial(F.linear, x, w), dense)
        rows.append({"shape": shape, "m": m, "cublas": cublas, "forms": []})
    del dense
    torch.cuda.empty_cache()
    first = packed(n, k)
    weights = [fresh(first) for _ in copies(first.nbytes)]
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    blocks = first.words.shape[1]
    for row in rows:
        m, x = row["m"], random(row["m"], k)
        row["chosen"] = timed(lambda w, x=x: functools.partial(w4a16_matmul, x, w), weights)
        for form in FORMS:
            if m > MOST.get(form.batch, m):
                continue
            tiles = -(-first.rows // form.rows) * -(-m // form.batch)
            for share in ways(tiles, blocks, processors, m <= 256):
                call = functools.partial(launch, x, form=form, share=share)
                us = timed(lambda w, call=call: functools.partial(call, weight=w), weights)
                row["forms"].append([list(form), share, us])
    return rows


def report(row: Row) -> str:
    """One line: each form at its planned share and, in brackets, at a share that beats it."""
    text = f"{row['shape']:12s} {row['m']:4d} {row['cublas']:7.1f} {row['chosen']:7.1f} |"
    for form in FORMS:
        own = [entry for entry in row["forms"] if entry[0] == list(form)]
        if not own:
            continue
        best = min(own, key=lambda entry: entry[2])
        text += f" {form.batch}x{form.rows} {own[0][2]:.1f}"
        if best[2] < 0.99 * own[0][2]:
            text += f" ({best[2]:.1f} {'/'.join(map(str, best[1]))})"
    return f"{text} = {row['cublas'] / min(entry[2] for entry in row['forms']):.2f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda")
    found: dict[str, Any] = {"date": date.today().isoformat(), "environment": environment(device)}
    found["layers"] = []
    print("layer           M  cublas  chosen | forms, microseconds")
    for shape in SHAPES:
        found["layers"] += (rows := measure(shape, device))
        print("\n".join(map(report, rows)), flush=True)
        torch.cuda.empty_cache()
        if options.json:  # what is known so far outlives an interruption
            options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
