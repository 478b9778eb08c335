# SPDX-License-Identifier: Apache-2.0
"""What smaller groups cost: four-bit layers with a scale for 128, 64 and 32 columns (Hopper).

Some 30 s. On the layers of `marlin.py`, the time of each kernel that can run as it is planned, and
which of them `batchery.kernels.w4a16_plan.kernel_of` takes. Results are checked by the tests of the
kernels; run those first.
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
from marlin import CALLS, microseconds
from marlin_backends import SHAPES, copies, fresh, packed, random
from torch import Tensor

from batchery.kernels import w4a16_narrow, w4a16_tiles, w4a16_wide
from batchery.kernels.w4a16_layout import PackedW4
from batchery.kernels.w4a16_plan import (
    MOST_NARROW,
    kernel_of,
    plan_narrow,
    plan_tiles,
    plan_wide,
)
from batchery.studies.harness import environment

GROUPS = (128, 64, 32)
BATCHES = (1, 8, 16, 32, 64, 128)
MOST_TILES = 64  # rows of x above which tiles are hopeless here
FEWEST_WIDE = 32

Launch = Callable[[Tensor, PackedW4], Tensor]


def launches(m: int, w: PackedW4, processors: int) -> dict[str, Launch]:
    """Return each kernel that is worth trying for m rows of x, as it is planned."""
    _, blocks, _, lanes = w.words.shape
    found: dict[str, Launch] = {}
    if m <= MOST_TILES:
        tile, split = plan_tiles(m, w.rows, blocks, lanes, processors, False)
        found["tiles"] = functools.partial(w4a16_tiles.launch, tile=tile, split=split)
    if m <= MOST_NARROW:
        form, split = plan_narrow(m, w.rows, blocks, w.group_size, processors, False)
        found["narrow"] = functools.partial(w4a16_narrow.launch, form=form, split=split)
    if m >= FEWEST_WIDE:
        wide, share = plan_wide(m, w.rows, blocks, processors)
        found["wide"] = functools.partial(w4a16_wide.launch, form=wide, share=share)
    return found


def measure(shape: str, group: int, processors: int) -> list[dict[str, Any]]:
    """Time the kernels of a layer, by rows of x."""
    n, k = SHAPES[shape]
    first = packed(n, k, group=group)
    weights = [fresh(first) for _ in copies(first.nbytes)]
    weights *= math.ceil(CALLS / len(weights))
    rows = []
    for m in BATCHES:
        x = random(m, k)
        us = {
            name: microseconds([functools.partial(launch, x, w) for w in weights])
            for name, launch in launches(m, first, processors).items()
        }
        chosen = kernel_of(m, first.rows, k, group, processors, False)
        rows.append({"shape": shape, "group": group, "m": m, "us": us, "chosen": chosen})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda")
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    found: dict[str, Any] = {"date": date.today().isoformat(), "environment": environment(device)}
    found["layers"] = []
    print("layer          M  group | microseconds, chosen first | over groups of 128, over fastest")
    for shape in SHAPES:
        coarse: dict[int, float] = {}
        for group in GROUPS:
            for row in measure(shape, group, processors):
                us, m, chosen = row["us"], row["m"], row["chosen"]
                coarse.setdefault(m, us[chosen])
                text = f"{chosen} {us[chosen]:.1f}"
                text += "".join(f", {name} {t:.1f}" for name, t in us.items() if name != chosen)
                ratios = f"{us[chosen] / coarse[m]:.2f} {us[chosen] / min(us.values()):.2f}"
                print(f"{shape:12s} {m:3d} {group:6d} | {text} | {ratios}", flush=True)
                found["layers"].append(row)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
