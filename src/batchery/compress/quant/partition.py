# SPDX-License-Identifier: Apache-2.0
"""Quantised weights cut for tensor parallelism, and joined for fused projections.

A weight `(N, K)` is cut along N where each rank computes some outputs (column-parallel, as the
weight is K×N on paper), and along K where each rank holds some inputs (row-parallel: the ranks'
outputs are then summed). Nothing is quantised again: the parts hold the same numbers.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from batchery._core.validate import integer, require
from batchery.compress.quant.weight import MIDDLE, QuantizedWeight

__all__ = ["join_outputs", "slice_inputs", "slice_outputs"]

STEP = 8  # rows or columns in a word of the storage formats


def slice_outputs(qw: QuantizedWeight, begin: int, end: int) -> QuantizedWeight:
    """Return rows begin…end of a weight `(N, K)`: some outputs (column-parallel).

    Args:
        qw: any weight; act-order stays as it is, since all inputs are there.
        begin: multiple of 8.
        end: multiple of 8, or N.

    Raises:
        ValueError: a bound lies outside, or between multiples of 8.

    Example:
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

    Example:
        >>> q = torch.zeros(8, 128, dtype=torch.uint8)
        >>> qw = QuantizedWeight(q, torch.ones(8, 4), None, None, group_size=32)
        >>> slice_inputs(qw, 64, 128).scales.shape
        torch.Size([8, 2])
    """
    owner = "slice_inputs"
    rule = (
        "must be None: act-order spreads the columns of a group over all ranks. Cut outputs "
        "instead, or quantise without act_order"
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

    Example:
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
