# SPDX-License-Identifier: Apache-2.0
"""Round to nearest: every weight to the closest of sixteen levels of its group.

When to use: no calibration data, or as the baseline of a quantiser that has them. When not: with
data, GPTQ rounds the same levels with a fraction of the error in the outputs.

    symmetric    s = 2·max|w| / 15                      z = 8
    asymmetric   s = (max(w, 0) - min(w, 0)) / 15       z = round(-min(w, 0) / s)
    q = clamp(round(w / s) + z, 0, 15)                  round half to even

The symmetric grid reaches from -8s to 7s: the largest positive weight loses half a step, and all
others gain from a grid that has a zero. s is rounded to the dtype that it will be stored in before
weights are divided by it: what is chosen is what will be read. Clip search tries s times 1, 0.99,
…, 0.25 and keeps, for each group, what has the least squared error.

Reference: Frantar et al., GPTQ, arXiv 2210.17323. Where we differ: MARLIN's script takes s = max/15
for a group without negative weights but keeps z = 8, so that half of the weights are clipped; here
the range is always that of |w|.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from batchery._core.validate import integer, one_of, require
from batchery.compress.quant.weight import LEVELS, MIDDLE, QuantizedWeight

__all__ = ["choose_grid", "quantize_rtn"]

Cost = Callable[[Tensor, Tensor | None], Tensor]

CLIP_STEPS = 76  # of one per cent
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, None)


def quantize_rtn(
    w: Tensor,
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    clip_search: bool = False,
    scale_dtype: torch.dtype | None = torch.float16,
) -> QuantizedWeight:
    """Round a weight to the nearest levels.

    Args:
        w: floating `(N, K)`.
        bits: 4.
        group_size: columns that share a scale; divides K; -1 for all K.
        symmetric: let every zero be 8.
        clip_search: shrink each group's range to where its squared error is least.
        scale_dtype: what scales are rounded to: float16, as most files and kernels have them;
            bfloat16 for a reader that casts them to the dtype of a bfloat16 model; float32. A
            scale too small for it becomes its smallest number. None: as wide as the computation.

    Returns:
        The weight on w's device, scales in `scale_dtype`; without one in float32 or, for a
        float64 w, in float64.

    Raises:
        ValueError: a setting or shape that does not fit, w is not finite, or a scale is too large
            for `scale_dtype`.

    Examples:
        >>> qw = quantize_rtn(torch.tensor([[-7.5, 1.2, 2.0, 7.5]]), group_size=4)
        >>> qw.q, qw.scales
        (tensor([[ 0,  9, 10, 15]], dtype=torch.uint8), tensor([[1.]], dtype=torch.float16))
    """
    owner = "quantize_rtn"
    size = checked_group_size(owner, w, bits, group_size)
    one_of(owner, "scale_dtype", scale_dtype, SCALE_DTYPES)
    wide = w.detach().to(torch.promote_types(w.dtype, torch.float32))
    parts = wide.reshape(len(w), -1, size)

    def squared_error(scales: Tensor, zeros: Tensor | None) -> Tensor:
        d = decode(encode(parts, scales, zeros), scales, zeros).sub_(parts)
        return d.square_().sum(-1)

    cost = squared_error if clip_search else None
    scales, zeros = choose_grid(parts, symmetric=symmetric, scale_dtype=scale_dtype, cost=cost)
    q = encode(parts, scales, zeros).to(torch.uint8).flatten(1)
    return QuantizedWeight(q, stored_scales(owner, scales, scale_dtype), zeros, None, size)


def checked_group_size(owner: str, w: Tensor, bits: int, group_size: int) -> int:
    """Return the columns of a group, or raise."""
    one_of(owner, "bits", bits, (4,))
    fits = w.dim() == 2 and w.numel() > 0
    require(fits, owner, "w", "must be (N, K), not empty", tuple(w.shape))
    require(w.is_floating_point(), owner, "w", "must be floating", w.dtype)
    require(bool(torch.isfinite(w).all()), owner, "w", "must be finite", "NaN or infinity")
    k = w.shape[1]
    size = k if group_size == -1 else integer(owner, "group_size", group_size, at_least=1)
    require(k % size == 0, owner, "group_size", f"must divide K = {k}", group_size)
    return size


def choose_grid(
    w: Tensor,
    *,
    symmetric: bool,
    scale_dtype: torch.dtype | None,
    cost: Cost | None = None,
    at_once: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Choose the scale and zero of every group.

    Args:
        w: floating `(..., G)`, a group in the last dimension.
        symmetric: let every zero be 8.
        scale_dtype: what scales are rounded to; None: not at all.
        cost: what scales and zeros `(S, ...)` would cost each group, for S ranges: the one that
            costs least is taken. Without it the range is that of the weights.
        at_once: the most ranges that `cost` is asked for in one call.

    Returns:
        Scales `(...)` in w's dtype, and zeros uint8 `(...)` or None; scale 1 where all w are 0,
        infinite where it is too large for `scale_dtype`.

    Examples:
        >>> choose_grid(torch.tensor([[-1.0, 2.0]]), symmetric=False, scale_dtype=None)
        (tensor([0.2000]), tensor([5], dtype=torch.uint8))
    """
    low, high = _range(w, symmetric)
    scales, zeros = _grid(low, high, symmetric, scale_dtype)
    if cost is None:
        return scales, zeros
    shares = 1 - torch.arange(CLIP_STEPS, dtype=w.dtype, device=w.device) / 100
    least = torch.full_like(scales, torch.inf)
    for part in shares.view(-1, *[1] * low.dim()).split(at_once):  # type: ignore[no-untyped-call]
        s, z = _grid(low * part, high * part, symmetric, scale_dtype)
        costs, best = cost(s, z).min(0, keepdim=True)
        better = costs[0] < least
        least = torch.where(better, costs[0], least)
        scales = torch.where(better, s.gather(0, best)[0], scales)
        if zeros is not None and z is not None:
            zeros = torch.where(better, z.gather(0, best)[0], zeros)
    return scales, zeros


def _range(w: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    if symmetric:
        high = w.abs().amax(-1)
        return -high, high
    return w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)


def _grid(
    low: Tensor, high: Tensor, symmetric: bool, scale_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    scales = (high - low) / (LEVELS - 1)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    if scale_dtype is not None:
        info = torch.finfo(scale_dtype)
        scales = scales.to(scale_dtype).to(scales.dtype).clamp(min=info.tiny * info.eps)
    if symmetric:
        return scales, None
    # A scale of few digits may be so much too small that a zero would lie above 15.
    return scales, torch.round(-low / scales).clamp(max=LEVELS - 1).to(torch.uint8)


def stored_scales(owner: str, scales: Tensor, scale_dtype: torch.dtype | None) -> Tensor:
    """Return the scales of a grid in the dtype that they were rounded to, or raise."""
    held = bool(torch.isfinite(scales).all())
    rule = "must hold the scales: take bfloat16, float32 or None for weights so large"
    require(held, owner, "scale_dtype", rule, scale_dtype)
    return scales if scale_dtype is None else scales.to(scale_dtype)


def encode(w: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """Return q of w `(..., G)` as whole numbers in w's dtype."""
    offset = MIDDLE if zeros is None else zeros.to(w.dtype)[..., None]
    return (w / scales[..., None]).round_().add_(offset).clamp_(0, LEVELS - 1)


def decode(q: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """Return s·(q - z), written over q."""
    offset = MIDDLE if zeros is None else zeros.to(q.dtype)[..., None]
    return q.sub_(offset).mul_(scales[..., None])
