# SPDX-License-Identifier: Apache-2.0
"""The factor that WSD puts on the learning rate, as a pure function of the step.

The formulas and their sources are in `batchery.optim.wsd`, whose scheduler calls `rise` and `fall`;
`wsd_factor` is the whole curve, to draw it or to use it in a loop without a scheduler.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from batchery._core.validate import number, one_of, require

DecayShape = Literal["linear", "cosine", "1-sqrt", "sqrt", "square", "exp", "inverse"]
WarmupShape = Literal["linear", "cosine", "1-sqrt"]
Steps = TypeVar("Steps", float, npt.NDArray[Any], Tensor)

_FALL: dict[str, Callable[[float], float]] = {
    "linear": lambda p: 1.0 - p,
    "cosine": lambda p: 0.5 * (1.0 + math.cos(math.pi * p)),
    "1-sqrt": lambda p: 1.0 - math.sqrt(p),
    "sqrt": lambda p: math.sqrt(1.0 - p),
    "square": lambda p: 1.0 - p * p,
}
_RISE: dict[str, Callable[[float], float]] = {
    "linear": lambda p: p,
    "cosine": lambda p: 0.5 * (1.0 - math.cos(math.pi * p)),
    "1-sqrt": lambda p: 1.0 - math.sqrt(1.0 - p),
}


def check_shape(
    owner: str,
    shape: str,
    warmup_shape: str,
    min_ratio: float,
    half_life: float | None,
    warmup_start_ratio: float,
    offset: int,
) -> None:
    """Refuse a shape that is unknown or not defined by what is given with it."""
    one_of(owner, "shape", shape, get_args(DecayShape))
    one_of(owner, "warmup_shape", warmup_shape, get_args(WarmupShape))
    number(owner, "min_ratio", min_ratio, at_least=0, at_most=1)
    number(owner, "warmup_start_ratio", warmup_start_ratio, at_least=0, at_most=1)
    one_of(owner, "offset", offset, (0, 1))
    if half_life is not None:
        require(shape == "exp", owner, "half_life", f"belongs to shape 'exp', not {shape!r}", shape)
        number(owner, "half_life", half_life, above=0)
    elif shape in ("exp", "inverse"):
        rule = f"must be > 0 with shape {shape!r}" + " or half_life given" * (shape == "exp")
        require(min_ratio > 0, owner, "min_ratio", rule, min_ratio)


def rise(step: float, warmup: float, shape: str, start_ratio: float, offset: int) -> float:
    """Return the factor in a warm-up of length `warmup`, `step` units into it."""
    step = step + offset
    progress = float(step) / float(warmup) if step < warmup else 1.0
    value = _RISE[shape](progress)
    return value * (1.0 - start_ratio) + start_ratio


def fall(done: float, decay: float, shape: str, min_ratio: float, half_life: float | None) -> float:
    """Return the factor in a decay of length `decay`, `done` units into it or past it."""
    if half_life is not None:
        return max(min_ratio, math.pow(0.5, min(done, decay) / half_life))
    progress = float(done) / float(decay) if done < decay else 1.0  # of no length: over at once
    if shape == "exp":
        return math.pow(min_ratio, progress)
    if shape == "inverse":
        return 1.0 / (progress / min_ratio + 1.0 - progress)
    return _FALL[shape](progress) * (1.0 - min_ratio) + min_ratio


def wsd_factor(
    step: Steps,
    *,
    warmup: float,
    stable: float,
    decay: float,
    shape: DecayShape = "1-sqrt",
    min_ratio: float = 0.0,
    half_life: float | None = None,
    warmup_start_ratio: float = 0.0,
    warmup_shape: WarmupShape = "linear",
    offset: int = 0,
) -> Steps:
    """Return the factor on the learning rate after `step` updates.

    Args:
        step: updates already made, >= 0: a number, or an array or tensor of any shape.
        warmup: length of the warm-up, W.
        stable: length of the constant phase, T - W; `math.inf` when the end is open.
        decay: length of the decay, D.
        shape: form of the decay.
        min_ratio: ρ, the factor at the end of the decay; a floor when `half_life` is given.
        half_life: for shape `"exp"`: updates in which the rate halves.
        warmup_start_ratio: w0, the factor at the start.
        warmup_shape: form of the warm-up.
        offset: 1 gives the first update a rate above 0.

    Returns:
        A float; for an array a float64 array; for a tensor a tensor on its device, of its dtype
        when that is floating, else float64. All of the shape of `step`.

    Raises:
        ValueError: a negative step or length, an unknown shape, or a shape without the floor or
            half-life that defines it.
        TypeError: a step or length is no number.

    Examples:
        >>> [wsd_factor(s, warmup=2, stable=3, decay=4, shape="linear") for s in (0, 1, 5, 7, 9)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    owner = "wsd_factor"
    check_shape(owner, shape, warmup_shape, min_ratio, half_life, warmup_start_ratio, offset)
    for name, length in (("warmup", warmup), ("stable", stable), ("decay", decay)):
        number(owner, name, length, at_least=0)

    def factor(s: float) -> float:
        require(s >= 0, owner, "step", "must be >= 0", s)
        if s < warmup:
            return rise(s, warmup, warmup_shape, warmup_start_ratio, offset)
        if s <= warmup + stable:
            return 1.0
        return fall(s - warmup - stable, decay, shape, min_ratio, half_life)

    if isinstance(step, Tensor):
        steps = step.detach().cpu().double().numpy()
        dtype = step.dtype if step.is_floating_point() else torch.float64
        values = np.vectorize(factor, otypes=[np.float64])(steps)
        return torch.from_numpy(values).to(step.device, dtype)
    if isinstance(step, np.ndarray):
        return np.asarray(np.vectorize(factor, otypes=[np.float64])(step))
    return factor(number(owner, "step", step))
