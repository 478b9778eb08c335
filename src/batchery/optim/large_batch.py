# SPDX-License-Identifier: Apache-2.0
"""The recipe around a large batch: which tensors adapt, and how the rate follows the batch.

Use it with LAMB and LARS, whose groups with weight decay adapt; the groups serve AdamW and SGD too.
The rules carry a tuned rate from one batch to another of the same model; they do not find one, nor
say which batch is too large to help. From width to width, `batchery.optim.wind_tunnel` carries it.

With κ = batch / base_batch:

    lr      ← lr · √κ            "sqrt", LAMB
    lr      ← lr · κ             "linear", SGD and LARS
    warm-up = min(1, f · κ)      share of all steps; f is that of base_batch, 1/320 at 512

Reference: You et al., arXiv 1904.00962 (square root, warm-up); Goyal et al., arXiv 1706.02677
(linear).
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from batchery._core.validate import integer, number, one_of, require, require_type

NORMS: tuple[type[nn.Module], ...] = (
    nn.LayerNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def layer_adaptation_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    skip_1d: bool = True,
    skip_names: Sequence[str] = ("bias",),
    skip_modules: tuple[type[nn.Module], ...] = NORMS,
) -> list[dict[str, Any]]:
    """Split a model's parameters into those that decay and adapt, and those that do neither.

    With `adapt="auto"` an optimizer adapts the groups whose weight decay is not zero, so the two
    groups are all that LAMB and LARS need. A parameter shared by two modules appears once.

    Args:
        model: any module; frozen parameters are left out.
        weight_decay: decay of the first group.
        skip_1d: put tensors with fewer than two dimensions into the second group.
        skip_names: last parts of parameter names that belong to the second group.
        skip_modules: classes whose own parameters belong to the second group.

    Returns:
        Two groups with named parameters, `{"params": [(name, tensor), …], "weight_decay": …}`;
        an empty one is left out.

    Raises:
        ValueError: the model has no trainable parameter, or `weight_decay` is negative.
        TypeError: the model is no module, or the names are no sequence.

    Examples:
        >>> groups = layer_adaptation_groups(nn.Linear(3, 2), weight_decay=0.01)
        >>> [(g["weight_decay"], [name for name, _ in g["params"]]) for g in groups]
        [(0.01, ['weight']), (0.0, ['bias'])]
    """
    owner = "layer_adaptation_groups"
    require_type(isinstance(model, nn.Module), owner, "model", "must be a module", model)
    number(owner, "weight_decay", weight_decay, at_least=0)
    named = not isinstance(skip_names, str) and isinstance(skip_names, Sequence)
    require_type(named, owner, "skip_names", "must be a sequence of names", skip_names)
    adapted: list[tuple[str, Tensor]] = []
    plain: list[tuple[str, Tensor]] = []
    seen: set[Tensor] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            skipped = (
                (skip_1d and parameter.ndim < 2)
                or name in skip_names
                or isinstance(module, skip_modules)
            )
            full = f"{prefix}.{name}" if prefix else name
            (plain if skipped else adapted).append((full, parameter))
    require(bool(seen), owner, "model", "must have trainable parameters", type(model).__name__)
    groups = [
        {"params": adapted, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def scale_lr(
    lr: float, batch: int, base_batch: int, rule: Literal["sqrt", "linear"] = "sqrt"
) -> float:
    """Return the learning rate for another batch size.

    The LAMB paper uses the square root, `lr · sqrt(batch / base_batch)`; large-batch SGD and LARS
    the linear rule.

    Raises:
        ValueError: a batch size below 1, a negative `lr` or an unknown rule.

    Examples:
        >>> scale_lr(6.25e-4, 32768, 512)
        0.005
    """
    owner = "scale_lr"
    number(owner, "lr", lr, at_least=0)
    ratio = integer(owner, "batch", batch, at_least=1) / integer(
        owner, "base_batch", base_batch, at_least=1
    )
    one_of(owner, "rule", rule, ("sqrt", "linear"))
    return lr * (math.sqrt(ratio) if rule == "sqrt" else ratio)


def warmup_fraction(batch: int, base_batch: int = 512, base_fraction: float = 1 / 320) -> float:
    """Return the share of all steps that warms up, by the LAMB paper's linear-epoch rule.

    The share grows with the batch (so the warm-up sees the same number of epochs at any batch
    size per unit of learning rate) and is capped at 1.

    Examples:
        >>> warmup_fraction(32768)
        0.2
    """
    owner = "warmup_fraction"
    number(owner, "base_fraction", base_fraction, above=0, at_most=1)
    ratio = integer(owner, "batch", batch, at_least=1) / integer(
        owner, "base_batch", base_batch, at_least=1
    )
    return min(1.0, base_fraction * ratio)
