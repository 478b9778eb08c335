# SPDX-License-Identifier: Apache-2.0
"""The few collectives the library needs; all are the identity when no process group runs."""

import torch
import torch.distributed as dist


def rank_and_size(process_group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """Return (rank, world size) in `process_group`, or (0, 1) when nothing is initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(process_group), dist.get_world_size(process_group)


def all_reduce_sum_(
    tensor: torch.Tensor, process_group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Sum `tensor` over the ranks in place and return it.

    The tensor must lie on a device that the group's backend accepts (CPU for gloo, CUDA for NCCL).
    """
    if rank_and_size(process_group)[1] > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=process_group)
    return tensor
