# SPDX-License-Identifier: Apache-2.0
"""The streams of the study of continual release, and how far off the library's mechanisms are.

The hard stream of the lower bound, keywords in the lines of Python's standard library (all, and the
rare ones alone), and prompt lengths of requests to a language model. How large each is at a scale,
`SIZES` says. The mechanisms are made as a user makes them, but for noise that can be drawn again.
"""

from __future__ import annotations

import functools
import keyword
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchery import datasets
from batchery._core.random import derive_seed, new_generator
from batchery.privacy import (
    Budget,
    DiscreteNoise,
    FloatNoise,
    HardStream,
    MaxSum,
    SumSelect,
    hard_shape,
    hard_stream,
)
from batchery.privacy.column_mechanism import ColumnMechanism
from batchery.privacy.noise_rows import Noise
from batchery.studies.study import Scale, Trial

RHO = Budget(rho=0.5)
BETA = 0.05
RARE = ("async", "nonlocal")
RARE_GUESS = 512  # what their maximum is publicly expected to stay below


@dataclass(frozen=True)
class Size:
    """How large the streams are at a scale."""

    exponents: tuple[int, ...]  # of the hard stream's horizons, powers of two
    wide: int  # exponent of the horizon at which counters of all columns run on it too
    lines: tuple[int, ...]  # of source code
    audits: int  # runs with each record
    trace: bool  # whether the requests are used: they may have to be fetched


SIZES: dict[Scale, Size] = {
    "smoke": Size((6, 8, 10), 8, (1 << 8, 1 << 10), 2_000, False),
    "cpu": Size(tuple(range(10, 21)), 14, (1 << 12, 1 << 14, 1 << 16), 40_000, True),
    "gpu": Size(tuple(range(10, 24)), 16, (1 << 14, 1 << 16, 1 << 18), 1_000_000, True),
}


def exact_noise(*keys: object) -> DiscreteNoise:
    """Return exact noise that can be drawn again: nothing here is private."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DiscreteNoise(insecure_seed=derive_seed("dp-continual", *keys))


@functools.lru_cache(maxsize=16)
def hard_with_maxima(exponent: int, seed: int) -> tuple[HardStream, Tensor]:
    """Return the hard stream of a seed with 2^exponent rows, and its true maxima, [T]."""
    horizon = 1 << exponent
    generator = new_generator("dp-continual", seed, exponent)
    stream = hard_stream(horizon, *hard_shape(horizon, RHO.rho), generator)
    return stream, stream.maxima()


@functools.cache
def _keywords() -> Tensor:
    """Return which of Python's keywords are in each line of its library, bool [lines, 35]."""
    text = datasets.load("stdlib-text")
    place = {word: column for column, word in enumerate(keyword.kwlist)}
    line, marks = 0, []
    for match in re.finditer(rf"\b(?:{'|'.join(keyword.kwlist)})\b|\n", text):
        if match[0] == "\n":
            line += 1
        else:
            marks.append((line, place[match[0]]))
    rows = torch.zeros(line + 1, len(place), dtype=torch.bool)
    rows[tuple(torch.tensor(marks).T)] = True
    return rows


@functools.cache
def _stream(name: str, length: int) -> Tensor:
    """Return the first rows of a real stream; all of them for length 0."""
    if name == "requests":  # one bit: the power of two below the number of prompt tokens
        lines = datasets.load("azure-llm-conv").split("\n")[1:]
        prompt = torch.tensor([int(line.split(",")[1]) for line in lines if line])
        found = torch.nn.functional.one_hot(prompt.clamp(min=1).double().log2().long()).bool()
    else:
        found = _keywords()
        if name == "rare":
            kept = torch.tensor([word in RARE for word in keyword.kwlist])
            found = found & kept
    return found[:length] if length else found


Build = Callable[..., ColumnMechanism]  # MaxSum or SumSelect


def _build(
    build: Build,
    arm: str,
    shape: Sequence[int],
    keys: tuple[object, ...],
    device: torch.device,
    kinds: dict[str, Any],
) -> ColumnMechanism:
    """Make an arm's mechanism as the library does, with noise that can be drawn again."""
    keys = (build.__name__, arm, *keys)
    noise: Noise = exact_noise(*keys)
    if arm == "sqrt":
        noise = FloatNoise(new_generator(*keys, device=device))
        kinds = kinds | {"sampler": "float"}
    if arm == "recompute" and build is MaxSum:
        kinds = kinds | {"hold": "last"}
    mechanism = "recompute" if arm == "midpoint" else arm
    return build(*shape, mechanism=mechanism, noise=noise, device=device, **kinds)


@functools.lru_cache(maxsize=64)
def _answer(
    build: Build, arm: str, name: str, length: int, seed: int, device: torch.device
) -> tuple[float, float]:
    """Return the worst error of an arm on a real stream, and its bound.

    "auto" is the run of the arm that it chooses; "silent" answers 0 and asks nothing.
    """
    rows = _stream(name, length)
    sums = rows.cumsum(0)
    top = sums.amax(1)
    if arm == "silent":
        off = top if build is MaxSum else top - sums[:, 0]
        return float(off.max()), float(len(rows))
    kinds: dict[str, Any] = {"budget": RHO, "beta": BETA}
    if build is MaxSum and name == "rare":
        kinds["expected_max"] = min(RARE_GUESS, len(rows))
    if arm == "auto":
        chosen = build(*rows.shape, mechanism="auto", sampler="float", **kinds).mechanism
        chosen = "midpoint" if chosen == "recompute" else chosen
        return _answer(build, chosen, name, length, seed, device)
    mechanism = _build(build, arm, rows.shape, (seed, name, length), device, kinds)
    releases = mechanism.update_many(rows.to(device)).cpu()
    told = releases if build is MaxSum else sums.gather(1, releases[:, None])[:, 0]
    return float((told - top).abs().max()), mechanism.error_bound(BETA)


def _wide(arm: str, trial: Trial) -> float:
    """Return the worst error on the hard stream, at a horizon that a counter can carry."""
    exponent = SIZES[trial.scale].wide
    stream, maxima = hard_with_maxima(exponent, trial.seed)
    shape = (stream.horizon, stream.num_columns)
    kinds: dict[str, Any] = {"budget": RHO, "beta": BETA}
    if arm == "silent":
        return float(maxima.max())
    if arm == "auto":
        chosen = MaxSum(*shape, sampler="float", **kinds).mechanism
        arm = "midpoint" if chosen == "recompute" else chosen
    mechanism = _build(MaxSum, arm, shape, (trial.seed, exponent), trial.device, kinds)
    parts = [mechanism.update_many(chunk.to(trial.device)) for chunk in stream.chunks()]
    return float((torch.cat(parts).cpu() - maxima).abs().max())


def answers(trial: Trial, arm: str) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return how far off an arm is on real streams, and on the hard one at a moderate horizon."""
    size = SIZES[trial.scale]
    most = size.lines[-1]
    asked: dict[str, tuple[Build, str, int]] = {"error_rare": (MaxSum, "rare", most)}
    if size.trace:
        asked["error_requests"] = (MaxSum, "requests", 0)
    if arm not in ("sparse", "midpoint"):  # which do not choose an index
        asked["behind_code"] = (SumSelect, "keywords", most)
        if size.trace:
            asked["behind_requests"] = (SumSelect, "requests", 0)
    every = [(MaxSum, "keywords", length) for length in size.lines] + [*asked.values()]
    found = []
    for done, (build, name, length) in enumerate(every):
        trial.progress(done, len(every) + 1)
        found.append(_answer(build, arm, name, length, trial.seed, trial.device))
    trial.progress(len(every), len(every) + 1)
    curve, rest = found[: len(size.lines)], found[len(size.lines) :]
    metrics = {name: error for name, (error, _) in zip(asked, rest, strict=True)}
    metrics |= {"error_wide": _wide(arm, trial), "error_code": curve[-1][0]}
    series = {
        "lines": [float(length) for length in size.lines],
        "error_code": [error for error, _ in curve],
        "bound_code": [bound for _, bound in curve],
    }
    return metrics, series
