# SPDX-License-Identifier: Apache-2.0
"""What a layer-wise optimizer knows of shards: this rank's part of a tensor, and how to sum norms.

Use it where a parameter may be cut over ranks by FSDP2 or tensor parallelism; a plain tensor is one
part, the whole. With x cut into x_1 … x_n,

    ‖x‖² = Σ_k ‖x_k‖²

so a rank sends squares, never tensors, those of all x on one mesh together: one all-reduce for
each dimension of the mesh that cuts them.
Ranks that hold copies of a part are along other dimensions, and add nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from batchery._core.dist import all_reduce_sum_
from batchery._core.validate import require_type

Reduce = Callable[[Tensor], Tensor]
Shards = tuple[Any, tuple[int, ...]]  # a mesh, and its dimensions that cut a tensor


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_grad(parameter: Tensor) -> Tensor:
    """Return this rank's part of a gradient, laid out like its parameter."""
    grad = parameter.grad
    if isinstance(grad, DTensor) and isinstance(parameter, DTensor):
        if grad.placements != parameter.placements:
            grad = grad.redistribute(placements=parameter.placements)
        return local_part(grad)
    require_type(grad is not None, "LayerwiseOptimizer", "gradients", "must exist", grad)
    return grad  # type: ignore[return-value]


def shards_of(parameter: Tensor) -> Shards | None:
    """Return the mesh of a distributed tensor and the mesh dimensions that cut it."""
    if not isinstance(parameter, DTensor):
        return None
    # Not by `Shard`: tensor parallelism under FSDP2 cuts by a placement that is none.
    placements = enumerate(parameter.placements)
    cut = (axis for axis, p in placements if not (p.is_replicate() or p.is_partial()))
    return parameter.device_mesh, tuple(cut)


def reduction_of(parameter: Tensor) -> Reduce | None:
    """Return the sum over the ranks that share a tensor; None when this rank has all of it."""
    shards = shards_of(parameter)
    if shards is None or not shards[1]:
        return None
    mesh, axes = shards

    def reduce(squares: Tensor) -> Tensor:
        for axis in axes:
            all_reduce_sum_(squares, mesh.get_group(axis))
        return squares

    return reduce


def sum_together(squares: Sequence[Tensor], reduce: Reduce) -> list[Tensor]:
    """Sum several tensors over ranks by one reduction, in the widest of their dtypes."""
    sums = reduce(torch.cat([own.flatten() for own in squares]))
    parts = torch.split(sums, [own.numel() for own in squares])
    return [part.to(own.dtype).view_as(own) for part, own in zip(parts, squares, strict=True)]
