# SPDX-License-Identifier: Apache-2.0
"""Tables and figure of a run of `marlin.py`, from its JSON file.

python benchmarks/marlin_report.py docs/results/marlin.benchmark.h100.json [figure.svg]
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from marlin_backends import BATCHES, GROUP, SHAPES

# Of the specification, for all layers of the 70B model, then of the 8B model: the least speedup
# over cuBLAS, and the least share of the read bandwidth.
SPEEDUPS = {1: (3.0, 2.2), 16: (2.9, 2.0), 32: (2.7, 1.8), 64: (2.0, 1.4), 128: (1.15, 1.0)}
SPEEDUPS |= {256: (0.9, 0.9), 512: (0.9, 0.9)}
SHARES = {1: (0.8, 0.55), 16: (0.75, 0.5), 32: (0.68, 0.45), 64: (0.5, 0.35), 128: (0.27, 0.2)}
PEERS = ("tinygemm", "triton_atomics", "gptq_marlin", "machete")

Found = dict[str, Any]


def micros(found: Found, name: str, shape: str, m: int) -> float | None:
    """Return a backend's time, None where it was not taken."""
    own = found["backends"].get(name, {})  # older files lack some
    value: float | None = own.get("us", {}).get(shape, {}).get(str(m))
    return value


def bytes_of(n: int, k: int, m: int, weight_bytes: float) -> float:
    """Bytes that a product must move: the weight, and rows of 16-bit numbers in and out."""
    return n * k * weight_bytes + 2 * m * (n + k)


FOUR_BITS = 0.5 + 2 / GROUP


def floor_of(found: Found, shape: str, m: int) -> float:
    """Microseconds that reading four-bit weights, or the operations, take at the least."""
    n, k = SHAPES[shape]
    read = bytes_of(n, k, m, FOUR_BITS) / found["read_gb_s"] / 1e3
    return max(read, 2 * m * n * k / found["dense_tflop_s"] / 1e6)


def of_model(found: Found, model: str, m: int) -> dict[str, float] | None:
    """Ratios of all layers of a model together; None where a layer was not timed."""
    shapes = [shape for shape in SHAPES if shape.startswith(model + " ")]
    own = [micros(found, "ours", shape, m) for shape in shapes]
    dense = [micros(found, "cublas", shape, m) for shape in shapes]
    if None in own or None in dense:
        return None
    total = sum(own)
    moved = sum(bytes_of(*SHAPES[shape], m, FOUR_BITS) for shape in shapes)
    ratios = {"cublas": sum(dense) / total, "read": moved / found["read_gb_s"] / 1e3 / total}
    others = [rivals(found, shape, m, PEERS) for shape in shapes]
    if all(others):
        ratios["peer"] = sum(min(times) for times in others) / total
    return ratios


def rivals(found: Found, shape: str, m: int, names: tuple[str, ...]) -> list[float]:
    """Microseconds of those of the named backends that were timed."""
    times = [micros(found, name, shape, m) for name in names]
    return [time for time in times if time is not None]


def tables(found: Found) -> list[str]:
    """Return the lines of both tables, the one by layer first."""
    found = {"read_gb_s": math.nan, "dense_tflop_s": math.nan, **found}
    columns = ("cublas", *PEERS, "invariant", "ours")
    titles = ("cuBLAS", "tiny", "atomics", "marlin", "machete", "invar", "ours")
    lines = ["microseconds", f"{'layer':12s}   M" + "".join(f"{title:>8s}" for title in titles)]
    lines[-1] += "  x cuBLAS  of read"
    for shape in SHAPES:
        for m in BATCHES:
            own, dense = (micros(found, name, shape, m) for name in ("ours", "cublas"))
            if own is None and dense is None:
                continue
            line = f"{shape:12s} {m:3d}"
            for name in columns:
                time = micros(found, name, shape, m)
                line += f"{'–' if time is None else f'{time:.1f}':>8s}"
            if own is not None and dense is not None:
                share = bytes_of(*SHAPES[shape], m, FOUR_BITS) / found["read_gb_s"] / 1e3 / own
                line += f"  {dense / own:8.2f}  {share:7.2f}"
            lines.append(line)
    lines += ["", "all layers of a model (aim)"]
    for m in BATCHES:
        line = f"M={m:3d}"
        for place, model in enumerate(("70B", "8B")):
            ratios = of_model(found, model, m)
            if ratios is None:
                continue
            speedup, share = (
                f" ({aim[m][place]})" if m in aim else "" for aim in (SPEEDUPS, SHARES)
            )
            line += f" | {model}: {ratios['cublas']:.2f}{speedup} x cuBLAS, "
            line += f"{ratios['read']:.2f}{share} of read"
            if "peer" in ratios:
                line += f", {ratios['peer']:.2f} x best peer"
        lines.append(f"{line} | {faster_than_all(found, m)}")
    lines += ["", "eager call: " + ", ".join(eager_calls(found))]
    lines += [f"{name}: {own}" for name, own in found["backends"].items() if "us" not in own]
    head = f"{found.get('device')}, read {found['read_gb_s']:.0f} GB/s"
    return [*lines, f"{head}, dense {found['dense_tflop_s']:.0f} TFLOP/s; {checks(found)}"]


def faster_than_all(found: Found, m: int) -> str:
    """Count the layers on which nothing else was faster; peers that were not timed are left out."""
    counts = [0, 0]
    for shape in SHAPES:
        own = micros(found, "ours", shape, m)
        others = rivals(found, shape, m, ("cublas", *PEERS))
        if own is not None and others:
            counts[0] += own < min(others)
            counts[1] += 1
    return f"fastest on {counts[0]} of {counts[1]}" if counts[1] else "not timed"


def eager_calls(found: Found) -> list[str]:
    return [
        f"{name} {own['eager_us']:.1f} µs"
        for name, own in found["backends"].items()
        if "eager_us" in own and name != "invariant"
    ]


def checks(found: Found) -> str:
    own = found.get("checks", {})
    return ", ".join(f"{name} {value}" for name, value in own.items()) or "not checked"


COLORS = {
    "ours": "C0",
    "gptq_marlin": "C1",
    "machete": "C2",
    "tinygemm": "C3",
    "triton_atomics": "C4",
}


def draw(found: Found, path: Path) -> None:
    """Draw each layer's speedup over cuBLAS against the batch, beside that of the roofline."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    panels = figure.subplots(2, 4, sharex=True, sharey=True)
    for shape, panel in zip(SHAPES, panels.flat, strict=True):
        n, k = SHAPES[shape]
        dense = {m: micros(found, "cublas", shape, m) for m in BATCHES}
        ideal = [(m, time / floor_of(found, shape, m)) for m, time in dense.items() if time]
        panel.plot(*zip(*ideal, strict=True), "k--", lw=1, label="roofline of 4 bits")
        for name, color in COLORS.items():
            times = {m: micros(found, name, shape, m) for m in BATCHES}
            points = [(m, dense[m] / time) for m, time in times.items() if time and dense[m]]
            if points:
                width = 2.2 if name == "ours" else 1.2
                panel.plot(
                    *zip(*points, strict=True), "o-", color=color, lw=width, ms=3, label=name
                )
        panel.axhline(1, color="0.6", lw=0.8)
        panel.set_title(f"{shape}  {n}×{k}", fontsize=9)
        panel.set_xscale("log", base=2)
        panel.set_xticks(BATCHES, [str(m) for m in BATCHES])
        panel.set_ylim(0, 6)
    for panel in panels[:, 0]:
        panel.set_ylabel("speedup over cuBLAS in float16")
    for panel in panels[-1]:
        panel.set_xlabel("rows of x (M)")
    panels[0, 0].legend(fontsize=8)
    figure.suptitle(f"{found['device']}, {found['date']}", fontsize=10)
    figure.savefig(path)


if __name__ == "__main__":
    stored = json.loads(Path(sys.argv[1]).read_text())
    if len(sys.argv) > 2:
        draw(stored, Path(sys.argv[2]))
    else:
        sys.stdout.write("\n".join(tables(stored)) + "\n")
