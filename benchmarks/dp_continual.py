# SPDX-License-Identifier: Apache-2.0
"""Exact noise and private counters beside their peers and the memory limit, in one run, as ratios.

One thread on the CPU: what is told is per core. Peers that are not installed are named as absent.
"""

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batchery.privacy import (
    Budget,
    DiscreteNoise,
    FactorizationCounter,
    FloatNoise,
    MaxSum,
    TreeCounter,
)

RHO = Budget(rho=0.5)
WIDE = 10**6


class Given:
    """The same row again and again: a counter without the cost of its noise."""

    def __init__(self, row: Any) -> None:
        """Keep the row."""
        self.row = row

    def sample(self, kind: str, scale: Fraction, shape: tuple[int, ...]) -> Any:
        """Return the row, without a copy."""
        return self.row.expand(shape)


def seconds(step: Callable[[], Any], device: torch.device, repeats: int = 7) -> float:
    """Median time of one call, after one call of warm-up."""
    times = []
    for _ in range(repeats + 1):
        at = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - at)
    return statistics.median(times[1:])


def opendp_seconds(sigma: float, n: int) -> tuple[float, float] | None:
    """Seconds of one sample by OpenDP: called in a loop, and inside one call on a vector."""
    try:
        dp = importlib.import_module("opendp.prelude")
    except ImportError:
        return None
    dp.enable_features("contrib")
    one = dp.m.make_gaussian(dp.atom_domain(T=int), dp.absolute_distance(T=int), scale=sigma)
    many = dp.m.make_gaussian(
        dp.vector_domain(dp.atom_domain(T=int)), dp.l2_distance(T=int), scale=sigma
    )
    cpu = torch.device("cpu")
    zeros = [0] * n
    loop = seconds(lambda: [one(0) for _ in range(n // 10)], cpu, 3) / (n // 10)
    return loop, seconds(lambda: many(zeros), cpu, 3) / n


def noise(n: int) -> dict[str, Any]:
    cpu = torch.device("cpu")
    exact = DiscreteNoise()
    generator = np.random.default_rng(0)
    words = n / seconds(lambda: exact.source.words(n), cpu)
    rounded = n / seconds(lambda: np.rint(generator.normal(0, 10, n)).astype(np.int64), cpu)
    print(f"{'random words of the system':32s} {words / 1e6:8.2f} M/s")
    print(f"{'numpy, rounded (not private)':32s} {rounded / 1e6:8.2f} M/s")
    rows: dict[str, Any] = {"words_per_s": words, "numpy_rounded_per_s": rounded}
    laws = [("gaussian", 55), ("gaussian", 10**4), ("gaussian", 2 * 10**7), ("laplace", 1000)]
    for kind, scale in laws:
        begin = time.perf_counter()
        exact.sample(kind, Fraction(scale), (1,))
        table = time.perf_counter() - begin
        rate = n / seconds(lambda k=kind, s=scale: exact.sample(k, Fraction(s), (n,)), cpu)
        rows[f"{kind} {scale}"] = {"per_s": rate, "table_s": table, "of_words": rate / words}
        line = f"{f'{kind} {scale}':32s} {rate / 1e6:8.2f} M/s   {rate / words:5.2f} of the words"
        print(f"{line}   table {table * 1e3:.0f} ms")
    peer = opendp_seconds(100.0, 10_000)
    if peer is None:
        print("OpenDP                              absent")
        return rows | {"opendp": None}
    rate = rows["gaussian 10000"]["per_s"]
    for name, time_ in zip(("loop", "vector"), peer, strict=True):
        rows[f"opendp_{name}"] = {"per_s": 1 / time_, "ratio": rate * time_}
        print(f"{'OpenDP, ' + name:32s} {1e-6 / time_:8.3f} M/s   ours is {rate * time_:.0f} x")
    return rows


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read plus written per second by a large copy."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device, 15)


def wide(device: torch.device, width: int) -> dict[str, Any]:
    """One step of wide counters. Bytes: of rows read and written, each once."""
    bandwidth = copy_bandwidth(device)
    print(f"{width} columns; copy {bandwidth / 1e9:.1f} GB/s")
    rows: dict[str, Any] = {"copy_gb_s": bandwidth / 1e9}
    kinds: dict[str, Any] = {"budget": RHO, "row_sensitivity": width**0.5, "device": device}
    single = {"sampler": "float", "dtype": torch.float32}
    drawn = FloatNoise(device=device, dtype=torch.float32)
    given = Given(drawn.sample("gaussian", Fraction(1), (width,)))
    integers = Given(torch.ones(width, dtype=torch.int64, device=device))
    # Row, sum twice, noise, parent and child in the stack, and the release; a buffer twice.
    cases: list[tuple[str, Callable[[], Any], int]] = [
        ("noise alone, float32", lambda: given.row.normal_(generator=drawn.generator), 4),
        ("tree, int64, noise given", tree(width, noise=integers, **kinds), 7 * 8),
        ("tree, int64, exact noise", tree(width, **kinds), 7 * 8),
        ("tree, float32, noise given", tree(width, noise=given, **kinds, **single), 7 * 4),
        ("tree, float32", tree(width, **kinds, **single), 8 * 4),
        ("blt, float32", blt(width, **kinds, **single), (7 + 3 * 4) * 4),
    ]
    for name, step, bytes_ in cases:
        time_ = seconds(step, device)
        share = width * bytes_ / bandwidth / time_
        rows[name] = {"ms": time_ * 1e3, "of_limit": share}
        print(f"{name:32s} {time_ * 1e3:9.2f} ms   {share:5.2f} of the bandwidth", flush=True)
    return rows


def tree(width: int, **kinds: Any) -> Callable[[], Any]:
    counter = TreeCounter(1 << 14, width, **kinds)
    row = torch.ones(width, dtype=counter.dtype, device=counter.device)
    return lambda: counter.update(row)


def blt(width: int, **kinds: Any) -> Callable[[], Any]:
    counter = FactorizationCounter(1 << 14, width, strategy="blt", **kinds)
    row = torch.ones(width, dtype=counter.dtype, device=counter.device)
    return lambda: counter.update(row)


def streams(n: int) -> dict[str, Any]:
    """Whole streams at once, and single steps; the squared error of the tree and of its rivals."""
    cpu = torch.device("cpu")
    rows: dict[str, Any] = {}
    ones = torch.ones(n, dtype=torch.int64)
    bits = torch.randint(0, 2, (n, 35), generator=torch.Generator().manual_seed(0))
    cases: list[tuple[str, int, Callable[[], Any]]] = [
        ("tree", n, lambda: TreeCounter(n, budget=RHO).update_many(ones)),
        ("sqrt", n, lambda: FactorizationCounter(n, budget=RHO).update_many(ones)),
        ("MaxSum, 35 columns", n, lambda: MaxSum(n, 35, budget=RHO).update_many(bits)),
        ("tree, step by step", 2000, steps(TreeCounter(n, budget=RHO))),
        ("honaker", 2000, steps(TreeCounter(n, budget=RHO, estimator="honaker"))),
    ]
    for name, count, step in cases:
        time_ = seconds(step, cpu, 3) / count
        rows[name] = {"us_per_row": time_ * 1e6}
        print(f"{name:32s} {time_ * 1e6:9.3f} us a row", flush=True)
    zeros = torch.zeros(1024, 2000)
    errors = {}
    for name, build in (("tree", TreeCounter), ("sqrt", FactorizationCounter)):
        counter: Any = build(1024, 2000, budget=RHO, sampler="float")
        errors[name] = float(counter.update_many(zeros).square().mean())
    rows["mse_ratio"] = errors["tree"] / errors["sqrt"]
    print(f"squared error at T = 1024: tree {rows['mse_ratio']:.2f} x sqrt")
    return rows


def steps(counter: Any, count: int = 2000) -> Callable[[], Any]:
    return lambda: [counter.update(1) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=WIDE)
    parser.add_argument("--rows", type=int, default=1 << 17)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    found: dict[str, Any] = {"torch": torch.__version__, "device": str(device)}
    found["noise"] = noise(options.samples)
    found["wide"] = wide(device, options.width)
    found["streams"] = streams(options.rows)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
