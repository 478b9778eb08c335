# SPDX-License-Identifier: Apache-2.0
"""Exact noise beside OpenDP's, a wide tree beside the memory's limit, and tree beside square root.

One thread on the CPU: what is told is per core. On CUDA exact noise is drawn on the device too. The
peer is `pip install opendp==0.16.0`; where it is not installed it is named as absent.
"""

import argparse
import importlib
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable
from datetime import date
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from batchery.cli import device_argument
from batchery.kernels.chacha import random_words
from batchery.privacy import Budget, DiscreteNoise, FactorizationCounter, FloatNoise, TreeCounter
from batchery.studies.harness import environment

RHO = Budget(rho=0.5)
HORIZON = 1 << 14
SIGMA = 100  # of the samples that are compared
# of the specification
AIM = {"noise_per_s": 2e6, "device_noise_per_s": 1e8, "opendp": 20.0, "tree": 0.6, "mse": 5.6}


class Given:
    """The same row again and again: a counter without the cost of its noise."""

    def __init__(self, row: torch.Tensor) -> None:
        """Keep the row."""
        self.row = row

    def sample(self, kind: str, scale: Fraction, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the row, without a copy."""
        return self.row.expand(shape)


def seconds(step: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median time of one call, after two calls of warm-up."""
    times = []
    for _ in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        at = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - at)
    return statistics.median(times[2:])


def opendp_seconds(n: int) -> dict[str, float] | None:
    """Seconds of one sample by OpenDP: called in a loop, and on a vector inside one call."""
    try:
        dp = importlib.import_module("opendp.prelude")
    except ImportError:
        return None
    dp.enable_features("contrib")
    scalar = dp.atom_domain(T=int), dp.absolute_distance(T=int)
    vector = dp.vector_domain(dp.atom_domain(T=int)), dp.l2_distance(T=int)
    one = dp.m.make_gaussian(*scalar, scale=float(SIGMA))
    many = dp.m.make_gaussian(*vector, scale=float(SIGMA))
    cpu, zeros = torch.device("cpu"), [0] * n
    loop = seconds(lambda: [one(0) for _ in range(n)], cpu, 5)
    return {"loop": loop / n, "vector": seconds(lambda: many(zeros), cpu, 5) / n}


def noise(n: int) -> dict[str, Any]:
    """Samples of exact noise per second, beside the system's random words and OpenDP."""
    cpu, exact = torch.device("cpu"), DiscreteNoise()
    words = n / seconds(lambda: exact.source.words(n), cpu, 15)
    print(f"{'random words of the system':34s} {words / 1e6:9.3f} M/s")
    found: dict[str, Any] = {"words_per_s": words}
    for kind, scale in (("gaussian", 7), ("gaussian", SIGMA**2), ("laplace", SIGMA)):
        rate = n / seconds(lambda k=kind, s=scale: exact.sample(k, Fraction(s), (n,)), cpu, 15)
        found[f"{kind} {scale}"] = {"per_s": rate, "of_words": rate / words}
        print(f"{f'{kind} {scale}':34s} {rate / 1e6:9.3f} M/s   {rate / words:7.2f} of the words")
    ours = found[f"gaussian {SIGMA**2}"]["per_s"]
    ratio = ours / AIM["noise_per_s"]
    print(f"{'':34s} {'':13s}   {ratio:7.2f} of the aim, 2 M/s")
    peer = opendp_seconds(min(n, 20_000))
    if peer is None:
        print(f"{'OpenDP':34s}    absent")
        return found | {"opendp": None}
    found["opendp"] = {"version": importlib.metadata.version("opendp")}
    for name, time_ in peer.items():
        found["opendp"][name] = {"per_s": 1 / time_, "ratio": ours * time_}
        line = f"{f'OpenDP, {name}, gaussian {SIGMA**2}':34s} {1e-6 / time_:9.3f} M/s"
        print(f"{line}   ours is {ours * time_:.1f} x" + " (aim 20)" * (name == "loop"))
    return found


def device_noise(device: torch.device, n: int) -> dict[str, Any]:
    """Samples of exact noise per second drawn on a device, beside the cipher's words there."""
    exact = DiscreteNoise(device=device)
    words = n / seconds(lambda: random_words(n, device), device, 15)
    print(f"{'random words of the cipher':34s} {words / 1e6:9.0f} M/s, {n:,} at once")
    found: dict[str, Any] = {"samples": n, "words_per_s": words}
    for kind, scale in (("gaussian", SIGMA**2), ("gaussian", 7), ("laplace", 20)):
        rate = n / seconds(lambda k=kind, s=scale: exact.sample(k, Fraction(s), (n,)), device, 15)
        aim = rate / AIM["device_noise_per_s"]
        found[f"{kind} {scale}"] = {"per_s": rate, "of_words": rate / words, "of_aim": aim}
        line = f"{f'{kind} {scale}, on the device':34s} {rate / 1e6:9.0f} M/s"
        print(f"{line}   {rate / words:7.3f} of the words, {aim:.2f} of the aim, 100 M/s")
    return found


def copy_bandwidth(device: torch.device, bytes_: int) -> float:
    """Bytes read plus written per second by a copy of so many."""
    source = torch.ones(bytes_, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * bytes_ / seconds(lambda: target.copy_(source), device, 15)


def wide(device: torch.device, width: int, repeats: int) -> dict[str, Any]:
    """One update of a wide tree, in times of moving what it must, as a large copy would.

    On a CPU rows of a million floats stay in the cache: then a copy of one row is the limit.
    """
    large = copy_bandwidth(device, 2**30 if device.type == "cuda" else 2**27)
    print(f"{width:,} columns; a large copy moves {large / 1e9:.1f} GB/s")
    found: dict[str, Any] = {"width": width, "copy_gb_s": large / 1e9}
    generator = torch.Generator(device).manual_seed(0)
    real = torch.randn(width, device=device, generator=generator)
    integers = torch.ones(width, dtype=torch.int64, device=device)
    drawn = FloatNoise(generator, dtype=torch.float32)
    single = {"sampler": "float", "dtype": torch.float32}
    # Row, noise and parent are read, the sum read and written, child and release written: 7 rows,
    # and noise that is drawn is written too. A buffer is read twice and written once, of four.
    cases: dict[str, tuple[Any, dict[str, Any], int]] = {
        "tree, int64, noise given": (TreeCounter, {"noise": Given(integers)}, 7 * 8),
        "tree, float32, noise given": (TreeCounter, {"noise": Given(real), **single}, 7 * 4),
        "tree, float32, noise drawn": (TreeCounter, {"noise": drawn, **single}, 8 * 4),
        "tree, int64, exact noise": (TreeCounter, {}, 8 * 8),
        "blt, float32, noise given": (
            FactorizationCounter,
            {"strategy": "blt", "noise": Given(real), **single},
            (7 + 3 * 4) * 4,
        ),
    }
    for name, (build, kinds, bytes_) in cases.items():
        counter = build(HORIZON, width, budget=RHO, row_sensitivity=1e3, device=device, **kinds)
        row = torch.ones(width, dtype=counter.dtype, device=device)
        time_ = seconds(lambda c=counter, r=row: c.update(r), device, repeats)
        near = copy_bandwidth(device, row.nbytes)
        shares = [width * bytes_ / bandwidth / time_ for bandwidth in (large, near)]
        found[name] = {"ms": time_ * 1e3, "of_large_copy": shares[0], "of_row_copy": shares[1]}
        line = f"{name:34s} {time_ * 1e3:9.2f} ms    {shares[0]:7.2f} of a large copy's speed"
        print(f"{line}, {shares[1]:.2f} of a row's" + " (aim 0.6)" * name.endswith("given"))
    return found


def squared_error(copies: int) -> dict[str, Any]:
    """Mean squared error of tree and square root over 1,024 steps, measured and by formula."""
    steps = 1024
    zeros = torch.zeros(steps, copies)
    found: dict[str, Any] = {}
    kinds: tuple[tuple[str, Any, dict[str, Any]], ...] = (
        ("tree", TreeCounter, {}),
        ("honaker", TreeCounter, {"estimator": "honaker"}),
        ("sqrt", FactorizationCounter, {"strategy": "sqrt"}),
    )
    for seed, (name, build, more) in enumerate(kinds):
        source = FloatNoise(torch.Generator().manual_seed(seed))
        counter = build(steps, copies, budget=RHO, sampler="float", noise=source, **more)
        measured = float(counter.update_many(zeros).square().mean())
        found[name] = {"measured": measured, "formula": counter.expected_squared_error()}
    for name in ("tree", "honaker"):
        ratios = {key: found[name][key] / found["sqrt"][key] for key in found[name]}
        found[name]["ratio"] = ratios
        line = f"{f'squared error, {name} / sqrt, T=1024':34s} {ratios['measured']:9.2f} x"
        aim = " (aim 5.6)" if name == "tree" else ""
        print(f"{line}     by formula {ratios['formula']:.2f}{aim}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--device", type=device_argument, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--device-samples", type=int, default=1 << 26)
    parser.add_argument("--widths", type=int, nargs="+", default=[65_536, 1_000_000])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = options.device
    found: dict[str, Any] = {"date": date.today().isoformat(), "environment": environment(device)}
    found["noise"] = noise(options.samples)
    if device.type == "cuda":
        found["device_noise"] = device_noise(device, options.device_samples)
    found["wide"] = [wide(device, width, options.repeats) for width in options.widths]
    found["squared_error"] = squared_error(1000)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
