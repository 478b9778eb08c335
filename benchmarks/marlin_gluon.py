# SPDX-License-Identifier: Apache-2.0
"""Forms of both Gluon kernels of four-bit weights on the layers of `marlin.py` (Hopper).

Some 60 s, beside cuBLAS. The models of time in `batchery.kernels.w4a16_plan` are fitted to this.
Results are checked by `tests/kernels/test_w4a16_narrow.py` and `test_w4a16_wide.py`; run those
first.
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

from batchery.kernels import w4a16_narrow, w4a16_wide
from batchery.kernels.w4a16 import w4a16_matmul
from batchery.kernels.w4a16_plan import FORMS, NARROW, stripes
from batchery.kernels.w4a16_wide import Share
from batchery.studies.harness import environment

BATCHES = (16, 32, 64, 128, 256, 512, 1024, 2048)
MOST = {64: 128}  # rows of x above which wide forms for so many are hopeless
SPLITS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)

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
        for narrow in next((forms for most, forms in NARROW if m <= most), {}):
            tiles = first.rows // narrow.rows * -(-m // narrow.batch)
            for split in SPLITS:
                if split <= blocks and (split == 1 or tiles * split <= 8 * processors):
                    launch = functools.partial(w4a16_narrow.launch, x, form=narrow, split=split)
                    us = timed(
                        lambda w, launch=launch: functools.partial(launch, weight=w), weights
                    )
                    row["forms"].append(["narrow", list(narrow), split, us])
        for form in FORMS if m >= 32 else ():
            if m > MOST.get(form.batch, m):
                continue
            tiles = -(-first.rows // form.rows) * -(-m // form.batch)
            for share in ways(tiles, blocks, processors, m <= 256):
                launch = functools.partial(w4a16_wide.launch, x, form=form, share=share)
                us = timed(lambda w, launch=launch: functools.partial(launch, weight=w), weights)
                row["forms"].append(["wide", list(form), share, us])
    return rows


def report(row: Row) -> str:
    """One line: cuBLAS, what the library chooses, and the three fastest."""
    text = f"{row['shape']:12s} {row['m']:4d} {row['cublas']:7.1f} {row['chosen']:7.1f} |"
    fastest = sorted(row["forms"], key=lambda entry: entry[-1])
    for kernel, form, cut, us in fastest[:3]:
        text += f" {kernel} {form[0]}x{form[1]} {cut} {us:.1f}"
    return f"{text} = {row['cublas'] / fastest[0][-1]:.2f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda")
    found: dict[str, Any] = {"date": date.today().isoformat(), "environment": environment(device)}
    found["layers"] = []
    print("layer           M  cublas  chosen | the fastest forms, microseconds")
    for shape in SHAPES:
        found["layers"] += (rows := measure(shape, device))
        print("\n".join(map(report, rows)), flush=True)
        torch.cuda.empty_cache()
        if options.json:  # what is known so far outlives an interruption
            options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
