# SPDX-License-Identifier: Apache-2.0
"""Prune two of every four weights and round the others, in one pass over the columns.

When to use: weights that must take less memory than four bits allow: 2:4 ones take 3/8 of a byte.
`gptq_quantize_model(..., sparsity="2:4")` does it for a model, `compress_24` packs it. When not:
for speed (the 2:4 kernel is at best as fast as the dense one), or where the loss of plain GPTQ is
already felt; pruning costs many times as much.

As in `gptq`, with H⁻¹ = Uᵀ U for the Hessian H of the inputs, but when column i = 0, 4, 8, … is
reached, each row keeps two of the columns i…i+3, those that cost most to lose:

    keep the two largest w_j² / U[j, j]²           of j = i…i+3, w corrected by all columns before i
    d_j = s·clamp(round(w_j / s), -8, 7)           kept;  0 if not
    e_j = (w_j - d_j) / U[j, j]
    w_l ← w_l - U[j, l]·e_j                        for all l > j

A group's scale is that of the values it would keep if they were not rounded, corrected for what is
pruned: the group is walked through twice.

Reference: Frantar and Alistarh, "SparseGPT", ICML 2023, arXiv 2301.00774.

Where we differ: theirs takes the scales of all the weights, before anything is pruned; the weights
that go would widen the grid of those that stay, and those that stay grow.
"""

import torch
from torch import Tensor

from batchery._core.validate import number, one_of, require
from batchery.compress.quant.gptq import GPTQ
from batchery.compress.quant.rtn import (
    SCALE_DTYPES,
    checked_group_size,
    choose_grid,
    quantize_rtn,
    stored_scales,
)
from batchery.compress.quant.weight import MIDDLE, QuantizedWeight

__all__ = ["keep_two_of_four", "prune_quantize_24", "quantize_rtn_24"]

FOUR, TWO = 4, 2
BLOCK = 128  # columns that are corrected at once; for speed alone
LOWEST, HIGHEST = -8, 7


def keep_two_of_four(scores: Tensor) -> Tensor:
    """Return where a score is among the two largest of its four neighbours.

    Args:
        scores: `(..., K)`, K a multiple of 4; of equals the first is kept.

    Returns:
        bool `(..., K)`, two of every four true.

    Raises:
        ValueError: K is not a multiple of 4.

    Examples:
        >>> keep_two_of_four(torch.tensor([3.0, 1.0, 2.0, 2.0])).int()
        tensor([1, 0, 1, 0], dtype=torch.int32)
    """
    k = scores.shape[-1]
    require(k % FOUR == 0, "keep_two_of_four", "scores", "must be (..., K), K a multiple of 4", k)
    fours = scores.reshape(*scores.shape[:-1], -1, FOUR)
    best = torch.argsort(fours, dim=-1, descending=True, stable=True)[..., :TWO]
    return torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, best, True).flatten(-2)


def quantize_rtn_24(
    w: Tensor, *, group_size: int = 128, scale_dtype: torch.dtype | None = torch.float16
) -> QuantizedWeight:
    """Keep the two largest of every four weights, and round them to nearest: the baseline.

    Args:
        w: floating `(N, K)`, K a multiple of 4.
        group_size: columns that share a scale; divides K; -1 for all K.
        scale_dtype: see `quantize_rtn`.

    Returns:
        A symmetric weight; what is pruned has q = 8.

    Raises:
        ValueError: as `quantize_rtn`; K is not a multiple of 4.

    Examples:
        >>> quantize_rtn_24(torch.tensor([[-7.5, 1.2, 2.0, 7.5]]), group_size=4).q
        tensor([[ 0,  8,  8, 15]], dtype=torch.uint8)
    """
    checked_group_size("quantize_rtn_24", w, 4, group_size)
    pruned = w.detach() * keep_two_of_four(w.detach().abs())
    return quantize_rtn(pruned, group_size=group_size, scale_dtype=scale_dtype)


@torch.no_grad()
def prune_quantize_24(
    gptq: GPTQ,
    w: Tensor,
    *,
    group_size: int = 128,
    damp: float = 0.01,
    scale_dtype: torch.dtype | None = torch.float16,
) -> QuantizedWeight:
    """Prune a weight to 2:4 and quantise it for the inputs that a `GPTQ` has seen.

    Args:
        gptq: holds the inputs.
        w: floating `(N, K)`, on its device, K a multiple of 4.
        group_size: columns that share a scale, a multiple of 4; divides K; -1 for all K.
        damp: see `GPTQ.quantize`; where nothing makes the Hessian positive definite, the result is
            that of `quantize_rtn_24`, with a warning.
        scale_dtype: see `quantize_rtn`.

    Returns:
        A symmetric weight in which two of every four columns have q = 8, exactly 0; what is kept
        may round to 8 too.

    Raises:
        ValueError: a setting, shape or value that does not fit; no tokens; inputs not finite; a
            scale too large for `scale_dtype`.

    Examples:
        >>> gptq = GPTQ(8)
        >>> gptq.add_batch(torch.randn(50, 8))
        >>> qw = prune_quantize_24(gptq, torch.randn(6, 8), group_size=8)
        >>> bool(((qw.q == 8).view(6, 2, 4).sum(-1) >= 2).all())
        True
    """
    size = checked_group_size(gptq.name, w, 4, group_size)
    require(size % FOUR == 0, gptq.name, "group_size", "must be a multiple of 4", size)
    k, device = len(gptq.gram), gptq.gram.device
    require(w.shape[1] == k, gptq.name, "w", f"must be (N, {k})", tuple(w.shape))
    require(w.device == device, gptq.name, "w", f"must be on {device}", w.device)
    number(gptq.name, "damp", damp, at_least=0)
    one_of(gptq.name, "scale_dtype", scale_dtype, SCALE_DTYPES)
    hessian = gptq.hessian
    dead = hessian.diagonal() == 0
    hessian.diagonal().masked_fill_(dead, 1.0)
    wide = w.detach().to(hessian.dtype).masked_fill(dead, 0.0)
    factor = gptq.damped_factor(hessian, damp)
    if factor is None:
        return quantize_rtn_24(wide, group_size=size, scale_dtype=scale_dtype)
    rows = wide.t().contiguous()
    q = torch.empty(rows.shape, dtype=torch.uint8, device=device)
    scales = rows.new_empty(k // size, len(w))
    for group in range(len(scales)):
        run, rest = slice(group * size, (group + 1) * size), slice((group + 1) * size, None)
        own = factor[run, run]
        kept = _walk(rows[run].clone(), own)
        scales[group], _ = choose_grid(kept.t(), symmetric=True, scale_dtype=scale_dtype)
        q[run] = _walk(rows[run], own, scales[group]) + MIDDLE
        rows[rest].addmm_(factor[run, rest].t(), rows[run], alpha=-1)
    table = stored_scales(gptq.name, scales.t().contiguous(), scale_dtype)
    return QuantizedWeight(q.t().contiguous(), table, None, None, size)


def _walk(rows: Tensor, factor: Tensor, scales: Tensor | None = None) -> Tensor:
    """Prune rows `(C, N)`, a column of the weight each, and with scales round what is kept.

    Errors take the place of the rows.

    Returns:
        `(C, N)`: the values kept, 0 where pruned; with scales `(N,)`, in steps.
    """
    made = torch.empty_like(rows)
    pivots = factor.diagonal()[:, None]
    for begin in range(0, len(rows), BLOCK):
        end = min(begin + BLOCK, len(rows))
        for i in range(begin, end):
            if i % FOUR == 0:
                cost = (rows[i : i + FOUR] / pivots[i : i + FOUR]).abs()
                keep = keep_two_of_four(cost.t()).t()
            column = rows[i]
            steps = column if scales is None else (column / scales).round_().clamp_(LOWEST, HIGHEST)
            made[i] = torch.where(keep[i % FOUR], steps, 0)
            column.sub_(made[i] if scales is None else made[i] * scales).div_(pivots[i])
            rows[i + 1 : end].addr_(factor[i, i + 1 : end], column, alpha=-1)
        rows[end:].addmm_(factor[begin:end, end:].t(), rows[begin:end], alpha=-1)
    return made
