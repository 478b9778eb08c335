# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs for small models, whose steps are otherwise bound by the launching of kernels.

A step of a small model is hundreds of kernels of a few microseconds; replaying them as one graph
takes a fraction of the time that launching them takes. Elsewhere than on CUDA nothing changes.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn

_WARM_UP = 3  # eager passes before the capture: libraries choose their kernels in them


class _Bound(nn.Module):
    """A function of a model and tensors, as the module that `make_graphed_callables` wants."""

    def __init__(self, model: nn.Module, losses: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.losses = model, losses

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.losses(self.model, *inputs)


@cache
def _compiled(losses: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile once for all models of a process: weights are inputs of the compiled code."""
    return torch.compile(losses, dynamic=False)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the garbage collector away: a graph that it destroys would break the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def captured(
    model: nn.Module, losses: Callable[..., Tensor], *examples: Tensor, fuse: bool = False
) -> Callable[..., Tensor]:
    """Return `losses(model, …)` with its forward and backward pass as CUDA graphs.

    Weights may change between calls, shapes and the model's mode may not. The gradients of a call
    live in the graph's memory until the next one: to add up several, make `p.grad` beforehand and
    zero it in place. Running statistics of batch norm see the warm-up's examples too.

    Args:
        model: in training mode.
        losses: model, tensors → losses; no host sync, no Python state, no random numbers.
        examples: tensors of the shapes and dtypes that will come, on the model's device.
        fuse: compile first, which takes some 20 s for each architecture and shape, and halves a
            step that moves more memory than it multiplies.
    """
    if not examples[0].is_cuda:
        return _Bound(model, losses).train(model.training)
    bound = _Bound(model, _compiled(losses) if fuse else losses).train(model.training)
    # Weights that autocast has cast outside the graph would be stale in it.
    autocast = torch.is_autocast_enabled("cuda")
    with torch.autocast("cuda", enabled=autocast, cache_enabled=False), _uncollected():
        graphed = torch.cuda.make_graphed_callables(
            bound, tuple(x.clone() for x in examples), num_warmup_iters=_WARM_UP
        )
    return cast(Callable[..., Tensor], graphed)
