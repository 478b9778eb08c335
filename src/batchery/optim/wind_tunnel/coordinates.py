# SPDX-License-Identifier: Apache-2.0
r"""The coordinate check: do activations keep their size as the model grows wider?

Use it before a wind tunnel is trusted, and after any change of the model or of its roles: it takes
seconds, and a wrong rate or initial scale shows at once. It does not say that a rate is optimal.

Models of several widths take a few steps on one batch. For module k after t steps at width d, let
a be the mean |activation|. The slope is that of the least-squares line

    log a(k, t, d) = slope(k, t) · log d + constant

Under muP it is about 0 for every hidden activation at every step. A slope above 0 grows without
bound; one below 0 fades out. Logits start at -1/2, as sums of random terms over the width, and rise
towards 0 as training makes the terms agree. The norm before a tied head, whose gain holds the
head's multiplier (`batchery.optim.wind_tunnel.MuP`), has -1.

Heads must follow the width, in size or in number. With as many heads of a fixed size at every width
(Qwen3's `head_dim` is 128 unless it is set) the output projection of attention has the same inputs
throughout, while its rate and initial scale fall: its slopes, -1/2 and below, are right.

Reference: Yang et al., "Tensor Programs V", arXiv 2203.03466, appendix D.1. Where we differ: the
slope is reported as a number, so that a test can bound it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from batchery._core.random import derive_seed, seed_of
from batchery._core.validate import integer, require

Columns = dict[str, list[Any]]


def coord_check(
    make_model: Callable[[int], nn.Module],
    widths: Sequence[int],
    batch: Any,
    steps: int = 4,
    *,
    make_optimizer: Callable[[nn.Module], Optimizer],
    loss: Callable[[Any], Tensor] | None = None,
    repeats: int = 1,
    generator: torch.Generator | None = None,
) -> Columns:
    """Train a model of every width for a few steps and record the mean size of its activations.

    A module counts when it gives a floating tensor, or a tuple that begins with one; if it is
    called several times in a forward pass, the mean over its calls is taken.

    Args:
        make_model: width → model with fresh weights, on the device of `batch`.
        widths: two or more.
        batch: what a model is called with: a mapping (as keywords), a tuple, or one argument.
        steps: updates; 0 checks the initial weights alone.
        make_optimizer: model → optimizer, for instance
            `lambda model: AdamW(mup.param_groups(model, lr=0.01))`.
        loss: output → scalar; by default its attribute `loss`.
        repeats: models per width, each with other initial weights; sizes are averaged.
        generator: its seed decides the initial weights. The global generator is left as it was.

    Returns:
        Columns of equal length: `width`, `step` (updates made before), `module` (its name, empty
        for the model) and `size` (mean |activation|); `pandas.DataFrame(columns)` takes them.

    Raises:
        ValueError: fewer than two widths, or a negative number of steps.

    Examples:
        >>> columns = coord_check(
        ...     lambda width: nn.Sequential(nn.Linear(3, width), nn.Linear(width, 1)),
        ...     widths=[16, 32],
        ...     batch=torch.ones(2, 3),
        ...     steps=1,
        ...     make_optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=0.1),
        ...     loss=lambda output: output.square().mean(),
        ... )
        >>> columns["width"], columns["step"], columns["module"]  # doctest: +ELLIPSIS
        ([16, 16, 16, 16, 16, 16, 32, ...], [0, 0, 0, 1, 1, 1, 0, ...], ['0', '1', '', '0', ...])
    """
    owner = "coord_check"
    require(len(set(widths)) >= 2, owner, "widths", "must be two or more", list(widths))
    integer(owner, "steps", steps, at_least=0)
    integer(owner, "repeats", repeats, at_least=1)
    columns: Columns = {"width": [], "step": [], "module": [], "size": []}
    for width in widths:
        runs = []
        for repeat in range(repeats):
            with torch.random.fork_rng():
                torch.manual_seed(derive_seed(seed_of(owner, generator), owner, repeat))
                model = make_model(width)
                runs.append(_sizes(model, batch, steps, make_optimizer(model), loss))
        for step, name in runs[0]:
            sizes = torch.stack([run[step, name] for run in runs])
            for column, value in zip(
                columns.values(), (width, step, name, float(sizes.mean())), strict=True
            ):
                column.append(value)
    return columns


def _sizes(
    model: nn.Module,
    batch: Any,
    steps: int,
    optimizer: Optimizer,
    loss: Callable[[Any], Tensor] | None,
) -> dict[tuple[int, str], Tensor]:
    """Return mean |activation| by (step, module) for one model."""
    seen: dict[tuple[int, str], list[Tensor]] = {}
    step = 0

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, Tensor) and first.is_floating_point():
                size = first.detach().abs().mean(dtype=torch.float64)
                seen.setdefault((step, name), []).append(size)

        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in model.named_modules()]
    try:
        for step in range(steps + 1):  # noqa: B007 (the hooks read it)
            last = step == steps
            with torch.set_grad_enabled(not last):
                output = _call(model, batch)
            if not last:
                value = output.loss if loss is None else loss(output)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    return {place: torch.stack(sizes).mean() for place, sizes in seen.items()}


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def coord_slopes(columns: Mapping[str, Sequence[Any]]) -> dict[str, list[float]]:
    """Return, for every module, the slope of log size against log width after 0, 1, 2, … steps.

    Args:
        columns: as `coord_check` returns them.

    Returns:
        Module → slope by step. A module whose activations are all 0 at some width (a head of
        zeros before the first step) has NaN there.

    Examples:
        >>> columns = {"width": [8, 16, 8, 16], "step": [0, 0, 1, 1], "module": ["fc"] * 4}
        >>> slopes = coord_slopes(columns | {"size": [1.0, 1.0, 3.0, 6.0]})
        >>> [round(slope, 6) + 0 for slope in slopes["fc"]]
        [0.0, 1.0]
    """
    points: dict[tuple[str, int], list[tuple[float, float]]] = {}
    names = ("width", "step", "module", "size")
    for width, step, module, size in zip(*(columns[name] for name in names), strict=True):
        points.setdefault((module, step), []).append((width, size))
    slopes: dict[str, list[float]] = {}
    for (module, _), pairs in sorted(points.items(), key=lambda item: item[0][1]):
        width, size = np.array(pairs, dtype=np.float64).T
        positive = bool((size > 0).all())
        slope = np.polyfit(np.log(width), np.log(size), 1)[0] if positive else np.nan
        slopes.setdefault(module, []).append(float(slope))
    return slopes
