# SPDX-License-Identifier: Apache-2.0
"""Examples, losses and the one small training loop of the lab, for causal models of transformers.

    token stream ──batches──> rows (B, T+1) ──token_losses──> nats (B, T) ──train──> weights

Nothing here knows the lab's sizes or its cache; studies of optimizers, schedules and distillation
use these pieces with models of their own.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.checkpoint import checkpoint

from batchery._core.random import new_generator
from batchery._core.validate import import_extra, integer, require
from batchery.studies.graphs import captured

Progress = Callable[[int, int], None]
Graphs = dict[torch.Size, Callable[[Tensor], Tensor]]  # shape of a micro-batch → its losses

# What torch asks for before it vouches for the order of cuBLAS's sums; read at their first use.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

_LOGIT_ROWS = 8_192  # tokens whose logits exist at once: 128 MiB at 4,096 words


def batches(
    tokens: Tensor, batch: int, context: int, seed: int = 0, *, start: int = 0
) -> Iterator[Tensor]:
    """Yield examples without end; those of step t depend on the seed and t alone.

    Every epoch cuts the stream into windows at an offset of its own, and visits each window once
    in random order; the rest that does not fill a batch is left out.

    Args:
        tokens: stream, integer `(n,)`, on any device.
        batch: examples per step, B.
        context: tokens per example, T.
        seed: of offsets and order.
        start: first step to yield, to go on where a run stopped.

    Yields:
        int64 `(B, T + 1)` on the stream's device: T inputs, and the targets one token on.

    Raises:
        ValueError: the stream holds fewer windows than a batch.

    Examples:
        >>> stream = torch.arange(100)
        >>> next(batches(stream, batch=2, context=4)).shape
        torch.Size([2, 5])
    """
    windows = len(tokens) // context - 1
    integer("batches", "batch", batch, at_least=1)
    rule = f"must be <= {windows}, the windows of {context} in {len(tokens)} tokens"
    require(batch <= windows, "batches", "batch", rule, batch)
    per_epoch = windows // batch
    columns = torch.arange(context + 1, device=tokens.device)
    first, skipped = divmod(start, per_epoch)
    for epoch in itertools.count(first):
        generator = new_generator(seed, "epoch", epoch)
        offset = torch.randint(context, (1,), generator=generator)
        order = torch.randperm(windows, generator=generator)[: per_epoch * batch]
        starts = (order * context + offset).to(tokens.device).view(per_epoch, batch)
        for row in starts[skipped:]:
            yield tokens[row[:, None] + columns].long()
        skipped = 0


def token_losses(model: Any, rows: Tensor) -> Tensor:
    """Return the loss of every token, in nats, from pieces of logits.

    Only a part of the logits exists at a time; the backward pass makes each part again. On CUDA
    the forward pass runs in bfloat16 autocast.

    Args:
        model: any causal language model of `transformers` whose head is a module.
        rows: int64 `(B, T + 1)`, as `batches` yields them.

    Returns:
        `(B, T)`, at least float32; its mean is the training loss.
    """
    inputs, targets = rows[:, :-1], rows[:, 1:]
    head = model.get_output_embeddings()

    def piece(hidden: Tensor, target: Tensor) -> Tensor:
        logits = head(hidden)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), target, reduction="none")

    with torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.is_cuda):
        hidden = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
        parts = zip(
            torch.split(hidden.flatten(0, 1), _LOGIT_ROWS),
            torch.split(targets.flatten(), _LOGIT_ROWS),
            strict=True,
        )
        if targets.numel() > _LOGIT_ROWS:
            again = partial(checkpoint, piece, use_reentrant=False, preserve_rng_state=False)
            losses = [again(*part) for part in parts]
        else:
            losses = [piece(*part) for part in parts]
    return torch.cat(losses).view_as(targets)


@contextmanager
def causal_attention(model: Any) -> Iterator[None]:
    """Let a model's attention know by itself that it is causal, and leave cuDNN out of it.

    While a CUDA graph is captured transformers makes a mask, and cuDNN's kernels with one gave NaN
    in bfloat16 where plain arithmetic and the other kernels stayed finite (torch 2.11, H100).
    Right for whole sequences without padding, so for training only.
    """
    before = model.config._attn_implementation
    model.config._attn_implementation = _registered()
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            yield
    finally:
        model.config._attn_implementation = before


@contextmanager
def fixed_order() -> Iterator[None]:
    """Have CUDA's kernels add up in one order, attention's backward pass above all.

    Where cuBLAS was used before this module was imported, without the variable above, torch cannot
    vouch for its products any more, and says so by a RuntimeError.
    """
    settings: Any = torch.utils.deterministic
    before, warned, filled = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        settings.fill_uninitialized_memory,
    )
    settings.fill_uninitialized_memory = False  # for those who look for reads of it; costs passes
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        settings.fill_uninitialized_memory = filled


@cache
def _registered() -> str:
    """Make causal attention known to transformers, and return its name there."""
    transformers = import_extra("transformers", "hf", "lab.train")
    name = "batchery_causal"

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **kinds: Any
    ) -> tuple[Tensor, None]:
        scale = kinds.get("scaling")
        found = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
        return found.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register(name, attend)
    transformers.AttentionMaskInterface.register(name, lambda *_, **__: None)
    return name


@torch.no_grad()
def position_losses(
    model: Any, tokens: Tensor, context: int, *, windows: int = 256, micro_batch: int = 32
) -> Tensor:
    """Return the mean loss at each position of the same evenly spaced windows.

    A model that uses its context loses less at later positions.

    Args:
        model: as in `token_losses`; it is put into evaluation mode and back.
        tokens: held-out stream, integer `(n,)`; moved to the model's device.
        context: tokens per window, T.
        windows: how many.
        micro_batch: windows that go through the model at once.

    Returns:
        float32 `(T,)` on the model's device, in nats per token.
    """
    integer("position_losses", "context", context, at_least=1)
    rule = f"must be < {len(tokens)}, the tokens there are"
    require(len(tokens) > context, "position_losses", "context", rule, context)
    device = next(model.parameters()).device
    starts = torch.linspace(0, len(tokens) - context - 1, windows, dtype=torch.float64).long()
    rows = tokens.cpu()[starts[:, None] + torch.arange(context + 1)].long()
    training = model.training
    model.eval()
    losses = [token_losses(model, part.to(device)) for part in torch.split(rows, micro_batch)]
    model.train(training)
    return torch.cat(losses).mean(0)


def held_out_loss(model: Any, tokens: Tensor, context: int, *, windows: int = 256) -> float:
    """Return the mean of `position_losses`, in nats per token."""
    return float(position_losses(model, tokens, context, windows=windows).mean())


def train(
    model: nn.Module,
    rows: Iterator[Tensor],
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None,
    steps: int,
    *,
    micro_batch: int = 64,
    max_grad_norm: float | None = 1.0,
    graphs: Graphs | None = None,
    fuse: bool = False,
    progress: Progress = lambda done, total: None,
) -> Tensor:
    """Train for some steps; calls that share the iterator add up to one longer call.

    Args:
        model: as in `token_losses`, on the device of the rows.
        rows: an iterator such as `batches` gives.
        optimizer: any; its rate is the scheduler's business.
        scheduler: stepped after every update.
        steps: updates to make.
        micro_batch: examples that go through the model at once; gradients add up.
        max_grad_norm: clip the global norm of the gradients to this.
        graphs: what earlier calls with this model captured on CUDA; filled and used again.
        fuse: compile the pass before it is captured, see `graphs.captured`; two trainings on CUDA
            then differ by rounding.
        progress: called with the number of updates made and `steps`.

    Returns:
        The loss of every step before its update, float32 `(steps,)` on the model's device: nothing
        waits for it on the way.
    """
    losses = torch.zeros(steps, device=next(model.parameters()).device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()
    losses_of: Graphs = {} if graphs is None else graphs
    for step in range(steps):
        batch = next(rows)
        parts = torch.split(batch, micro_batch)
        several = len(parts) > 1
        optimizer.zero_grad(set_to_none=not several)
        for part in parts:
            if part.shape not in losses_of:
                # A compiled pass could lose time by it, and no kept model is made by one.
                fixed = fixed_order() if part.is_cuda and not fuse else nullcontext()
                with causal_attention(model), fixed:
                    losses_of[part.shape] = captured(model, token_losses, part, fuse=fuse)
            if several and parameters[0].grad is None:  # see `captured`
                for parameter in parameters:
                    parameter.grad = torch.zeros_like(parameter)
            loss = losses_of[part.shape](part).mean() * (len(part) / len(batch))
            loss.backward()  # type: ignore[no-untyped-call]
            losses[step] += loss.detach()
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        progress(step + 1, steps)
    return losses
