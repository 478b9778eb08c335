# SPDX-License-Identifier: Apache-2.0
"""Quantised weights cut for tensor parallelism, joined for fused projections, and reordered.

A weight `(N, K)` is cut along N where each rank computes some outputs (column-parallel, as the
weight is K×N on paper), and along K where each rank holds some inputs (row-parallel: the ranks'
outputs are then summed). Nothing is quantised again: the parts hold the same numbers.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from batchery._core.validate import integer, require
from batchery.compress.quant.weight import MIDDLE, QuantizedWeight, act_order

__all__ = ["fold_act_order", "join_outputs", "slice_inputs", "slice_outputs"]

STEP = 8  # rows or columns in a word of the storage formats


def slice_outputs(qw: QuantizedWeight, begin: int, end: int) -> QuantizedWeight:
    """Return rows begin…end of a weight `(N, K)`: some outputs (column-parallel).

    Args:
        qw: any weight; act-order stays as it is, since all inputs are there.
        begin: multiple of 8.
        end: multiple of 8, or N.

    Raises:
        ValueError: a bound lies outside, or between multiples of 8.

    Examples:
        >>> q = torch.arange(64, dtype=torch.uint8).view(16, 4) % 16
        >>> qw = QuantizedWeight(q, torch.ones(16, 1), None, None, group_size=4)
        >>> slice_outputs(qw, 8, 16).shape
        (8, 4)
    """
    _check("slice_outputs", begin, end, qw.shape[0], STEP)
    zeros = None if qw.zeros is None else qw.zeros[begin:end].contiguous()
    return replace(
        qw,
        q=qw.q[begin:end].contiguous(),
        scales=qw.scales[begin:end].contiguous(),
        zeros=zeros,
    )


def slice_inputs(qw: QuantizedWeight, begin: int, end: int) -> QuantizedWeight:
    """Return columns begin…end of a weight `(N, K)`: some inputs (row-parallel).

    Args:
        qw: without act-order, whose groups have columns on every rank.
        begin: multiple of the group size; of 8 where a row is one group.
        end: likewise.

    Raises:
        ValueError: the weight has act-order, or a bound is not between groups.

    Examples:
        >>> q = torch.zeros(8, 128, dtype=torch.uint8)
        >>> qw = QuantizedWeight(q, torch.ones(8, 4), None, None, group_size=32)
        >>> slice_inputs(qw, 64, 128).scales.shape
        torch.Size([8, 2])
    """
    owner = "slice_inputs"
    rule = (
        "must be None: act-order spreads the columns of a group over all ranks. Fold it into "
        "the layer before, cut outputs instead, or quantise without act_order"
    )
    require(qw.g_idx is None, owner, "g_idx", rule, "a g_idx")
    k, size = qw.shape[1], qw.group_size
    one_group = size == k
    _check(owner, begin, end, k, STEP if one_group else size)

    def table(values: Tensor) -> Tensor:
        return values if one_group else values[:, begin // size : end // size].contiguous()

    return QuantizedWeight(
        qw.q[:, begin:end].contiguous(),
        table(qw.scales),
        None if qw.zeros is None else table(qw.zeros),
        None,
        group_size=end - begin if one_group else size,
    )


def join_outputs(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Put weights with the same inputs above one another, as for fused q, k, v or gate and up.

    Args:
        parts: weights `(N_i, K)` with the same groups.

    Returns:
        The weight `(Σ N_i, K)`.

    Raises:
        ValueError: inputs, group sizes or act-orders differ. One permutation of the activations
            must serve all rows, so weights of different act-order cannot be fused.

    Examples:
        >>> q = torch.zeros(8, 32, dtype=torch.uint8)
        >>> gate = QuantizedWeight(q, torch.ones(8, 1), None, None, group_size=32)
        >>> join_outputs([gate, gate]).shape
        (16, 32)
    """
    owner = "join_outputs"
    require(len(parts) > 0, owner, "parts", "must not be empty", len(parts))
    first = parts[0]
    for place, part in enumerate(parts[1:], 1):
        k = first.shape[1]
        require(part.shape[1] == k, owner, f"parts[{place}]", f"must have K = {k}", part.shape[1])
        rule = f"must have groups of {first.group_size}"
        same = part.group_size == first.group_size
        require(same, owner, f"parts[{place}]", rule, part.group_size)
        orders = torch.equal(part.groups, first.groups.to(part.q.device))
        rule = "must have the same g_idx as parts[0]: one act-order serves all rows"
        require(orders, owner, f"parts[{place}]", rule, "another")
    zeros = None
    if any(part.zeros is not None for part in parts):
        zeros = torch.cat([_zeros(part) for part in parts])
    return replace(
        first,
        q=torch.cat([part.q for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=zeros,
    )


def fold_act_order(
    qw: QuantizedWeight, before: Sequence[QuantizedWeight]
) -> tuple[QuantizedWeight, list[QuantizedWeight], Tensor | None]:
    """Bring the columns of a weight's groups together, and let the layers before follow.

    Nothing then moves at inference, and the weight can be cut along its inputs. It is legal where
    only elementwise functions lie between: down after gate and up. It is not where outputs have
    places of their own, as those of attention's heads.

    Args:
        qw: `(N, K)`, with act-order or not.
        before: weights `(K, K_i)` that make its inputs.

    Returns:
        The weight without a `g_idx`; those before, their outputs reordered; and the order int64
        `(K,)`, in which their biases must be taken, too, or None where nothing moved.

    Raises:
        ValueError: a weight before has not K outputs, or groups are not equally large.

    Examples:
        >>> q = torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8)
        >>> g_idx = torch.tensor([0, 1, 0, 1], dtype=torch.int32)
        >>> down = QuantizedWeight(q, torch.ones(1, 2), None, g_idx, group_size=2)
        >>> up = QuantizedWeight(q.t().contiguous(), torch.ones(4, 1), None, None, group_size=1)
        >>> down, (up,), order = fold_act_order(down, [up])
        >>> down.q.tolist(), up.q.flatten().tolist(), order.tolist()
        ([[1, 3, 2, 4]], [1, 3, 2, 4], [0, 2, 1, 3])
    """
    owner, k = "fold_act_order", qw.shape[1]
    for place, part in enumerate(before):
        require(part.shape[0] == k, owner, f"before[{place}]", f"must have N = {k}", part.shape[0])
    order = act_order(owner, qw)
    if order is None:
        return replace(qw, g_idx=None), list(before), None

    def reordered(part: QuantizedWeight) -> QuantizedWeight:
        rows = order.to(part.q.device)
        zeros = None if part.zeros is None else part.zeros[rows]
        return replace(part, q=part.q[rows], scales=part.scales[rows], zeros=zeros)

    folded = replace(qw, q=qw.q[:, order], g_idx=None)
    return folded, [reordered(part) for part in before], order


def _zeros(part: QuantizedWeight) -> Tensor:
    if part.zeros is not None:
        return part.zeros
    return torch.full_like(part.scales, MIDDLE, dtype=torch.uint8)


def _check(owner: str, begin: int, end: int, size: int, step: int) -> None:
    for name, bound in (("begin", begin), ("end", end)):
        integer(owner, name, bound, at_least=0)
        fits = bound <= size and (bound % step == 0 or bound == size)
        require(fits, owner, name, f"must be a multiple of {step} up to {size}", bound)
    require(begin < end, owner, "end", f"must be above {begin}", end)
