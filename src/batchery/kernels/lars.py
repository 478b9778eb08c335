# SPDX-License-Identifier: Apache-2.0
"""One LARS step over lists of tensors: readable loop, foreach, and fused.

The update is stated in `batchery.optim.lars`; its arithmetic is here, once per form:

    single    a loop over tensors, the reference that the others are tested against
    foreach   torch's multi-tensor operations
    fused     two passes over all tensors, norms and step, by Triton on CUDA and by C on the CPU

The momentum variant takes the norm of the buffer after its update, so there the first launch
updates the buffer and the second applies it. Between the passes stand the norms, as a `HalfStep`:
ranks that share tensors add theirs up there. No form waits for the device or changes a gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from batchery.kernels import native
from batchery.kernels.multi_tensor import (
    BLOCK,
    WARPS,
    ChunkTable,
    HalfStep,
    Impl,
    as_dtype,
    on_its_device,
    pair_of_norms,
    prepared_grads,
    segment_rows,
    tl,
    triton,
    triton_dtype,
    wide_dtype,
)

Variant = Literal["grad", "update", "momentum"]


@dataclass(frozen=True)
class LarsRule:
    """The settings of a LARS step that are the same for every tensor of a call.

    See `batchery.optim.LARS` for their meaning; they are checked there.
    """

    momentum: float = 0.9
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    trust_coefficient: float = 1e-3
    eps: float = 0.0
    adapt: bool = True
    variant: Variant = "grad"
    trust_clip: bool = False
    lr_in_momentum: bool = False
    blocks: int = 1
    maximize: bool = False


def lars_step_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    rule: LarsRule,
    lr: float | Tensor,
    *,
    first: bool,
    impl: Impl,
    grad_divisor: Tensor | None = None,
    found_inf: Tensor | None = None,
    table: ChunkTable | None = None,
) -> HalfStep:
    """Begin a LARS step; `finish()` of what it returns writes the parameters, in place.

    Args:
        params: n tensors of one dtype on one device.
        grads: their gradients, same shapes; left as they are.
        momentum_buffers: buffers, float32 or wider for low-precision parameters; empty when
            `rule.momentum` is 0 and the variant is not `"momentum"`.
        rule: settings.
        lr: learning rate; a 0-d tensor is read on its device.
        first: this is the parameters' first step, so the buffers start at the first direction.
        impl: which form.
        grad_divisor: 0-d tensor that gradients are divided by (loss scale).
        found_inf: 0-d tensor; where it is 1 nothing is updated. Fused form only.
        table: chunk table of `params` for the fused form, built for `rule.blocks`.

    Returns:
        The step after its first pass, with the squared norms `(2, n · blocks)` of parameters and
        of what the variant measures; finished, it gives the local rate of each segment,
        `(n · blocks,)`.
    """
    if impl == "fused":
        if table is None:
            table = ChunkTable(params, blocks=rule.blocks)
        fused = fused_cuda if params[0].is_cuda else _fused_cpu
        with on_its_device(params[0]):
            return fused(
                [params, grads, momentum_buffers or params],
                rule,
                lr,
                table,
                first=first,
                grad_divisor=grad_divisor,
                found_inf=found_inf,
            )
    dtype = wide_dtype(params, momentum_buffers)
    grads = prepared_grads(grads, dtype, grad_divisor, rule.maximize)
    wide = as_dtype(params, dtype)
    form = _apply_foreach if impl == "foreach" else _apply_single
    decayed = list(torch._foreach_add(grads, wide, alpha=rule.weight_decay))
    if rule.variant == "momentum" and rule.adapt:
        _average(momentum_buffers, decayed, rule, first)
        measured, moved, buffers = momentum_buffers, list(momentum_buffers), []
    else:
        measured = decayed if rule.variant == "update" else grads
        moved, buffers = decayed, list(momentum_buffers)

    def finish(squares: Tensor) -> Tensor:
        ratios = local_rates(squares, rule, lr)
        form(wide, moved, buffers, ratios, rule, lr, first)
        if wide is not params:
            torch._foreach_copy_(params, wide)
        return ratios

    return HalfStep(pair_of_norms(wide, measured, rule.blocks, rule.adapt), finish)


def local_rates(squares: Tensor, rule: LarsRule, lr: float | Tensor) -> Tensor:
    """Turn squared norms `(2, segments)` of parameters and gradients into local rates.

    A zero parameter or gradient has rate 1; a norm that is not finite makes it NaN.
    """
    if not rule.adapt:
        return squares.new_ones(squares.shape[1])
    weight, update = squares.sqrt().unbind(0)
    bottom = update + rule.eps
    if rule.variant == "grad":
        bottom = bottom + rule.weight_decay * weight
    rate = rule.trust_coefficient * weight / bottom + 0 * update
    rate = torch.where((weight == 0) | (update == 0), torch.ones_like(rate), rate)
    return (rate / lr).clamp(max=1.0) if rule.trust_clip else rate


def _average(buffers: list[Tensor], decayed: list[Tensor], rule: LarsRule, first: bool) -> None:
    """Algorithm 1 of the LAMB paper: an exponential average from zero."""
    if first:
        torch._foreach_zero_(buffers)
    torch._foreach_mul_(buffers, rule.momentum)
    torch._foreach_add_(buffers, decayed, alpha=1 - rule.momentum)


def _buffer_weight(rule: LarsRule, first: bool) -> float:
    """Weight of the new direction in the buffer; the first one enters whole."""
    return 1.0 if first else 1 - rule.dampening


def _apply_single(
    params: list[Tensor],
    directions: list[Tensor],
    buffers: list[Tensor],
    ratios: Tensor,
    rule: LarsRule,
    lr: float | Tensor,
    first: bool,
) -> None:
    for place, (x, d) in enumerate(zip(params, directions, strict=True)):
        ratio = ratios[place * rule.blocks : (place + 1) * rule.blocks]
        scaled = (segment_rows(d, rule.blocks) * ratio[:, None].to(d.dtype)).reshape(x.shape)
        inner = lr if rule.lr_in_momentum else 1.0
        outer = 1.0 if rule.lr_in_momentum else lr
        move = scaled * inner
        if buffers:
            buffer = buffers[place]
            weight = _buffer_weight(rule, first)
            buffer.copy_((0.0 if first else rule.momentum) * buffer + weight * move)
            move = move + rule.momentum * buffer if rule.nesterov else buffer
        x.sub_(move * outer)


def _apply_foreach(
    params: list[Tensor],
    directions: list[Tensor],
    buffers: list[Tensor],
    ratios: Tensor,
    rule: LarsRule,
    lr: float | Tensor,
    first: bool,
) -> None:
    scales = ratios * lr if rule.lr_in_momentum else ratios
    scales = scales.to(directions[0].dtype)
    if rule.blocks > 1:
        rows = [segment_rows(d, rule.blocks) for d in directions]
        parts = scales.view(-1, rule.blocks).unbind()
        moves = [
            (row * part[:, None]).reshape(x.shape)
            for row, part, x in zip(rows, parts, params, strict=True)
        ]
    else:
        moves = list(torch._foreach_mul(directions, list(scales.unbind())))
    if buffers:
        if first:
            torch._foreach_copy_(buffers, moves)
        else:
            torch._foreach_mul_(buffers, rule.momentum)
            torch._foreach_add_(buffers, moves, alpha=1 - rule.dampening)
        if rule.nesterov:
            torch._foreach_add_(moves, buffers, alpha=rule.momentum)
        else:
            moves = list(buffers)
    if rule.lr_in_momentum:
        torch._foreach_sub_(params, moves)
    elif isinstance(lr, Tensor):
        torch._foreach_sub_(params, torch._foreach_mul(moves, lr.to(moves[0].dtype)))
    else:
        torch._foreach_sub_(params, moves, alpha=lr)


def _fused_cpu(
    lists: Sequence[list[Tensor]],
    rule: LarsRule,
    lr: float | Tensor,
    table: ChunkTable,
    *,
    first: bool,
    grad_divisor: Tensor | None,
    found_inf: Tensor | None,
) -> HalfStep:
    """Step (params, grads, momentum buffers) by the C kernels."""
    dtype = lists[0][0].dtype
    squares = torch.empty(2, len(table.segments), dtype=dtype)  # read where the rule adapts
    if found_inf is not None and found_inf:
        return HalfStep(squares, lambda squares: squares.new_ones(squares.shape[1]))
    average = rule.variant == "momentum" and rule.adapt
    scale = 1.0 if grad_divisor is None else 1.0 / float(grad_divisor)
    scale = -scale if rule.maximize else scale
    decay, old = rule.weight_decay, 0.0 if first else rule.momentum
    if rule.adapt:
        partials = torch.empty(2, len(table.chunks), dtype=dtype)
        counted = 0.0 if rule.variant == "grad" else decay
        new = 1.0 - rule.momentum
        native.call("lars_norms", table, lists, partials, scale, counted, old, new, average)
        squares = table.segment_sums_of(partials)

    def finish(squares: Tensor) -> Tensor:
        ratios = local_rates(squares, rule, lr)
        if average:
            native.call("lars_apply_average", table, lists, ratios, float(lr))
            return ratios
        new = _buffer_weight(rule, first)
        inner, outer = (float(lr), 1.0) if rule.lr_in_momentum else (1.0, float(lr))
        direct, held = 1.0, 0.0
        if rule.momentum:
            direct, held = (1.0, rule.momentum) if rule.nesterov else (0.0, 1.0)
        tail = (scale, decay, old, new, inner, outer, direct, held)
        native.call("lars_apply", table, lists, ratios, *tail)
        return ratios

    return HalfStep(squares, finish)


def fused_cuda(
    lists: Sequence[list[Tensor]],
    rule: LarsRule,
    lr: float | Tensor,
    table: ChunkTable,
    *,
    first: bool,
    grad_divisor: Tensor | None = None,
    found_inf: Tensor | None = None,
    block: int = BLOCK,
    warps: int = WARPS,
) -> HalfStep:
    """Step (params, grads, momentum buffers) by the Triton kernels."""
    addresses, aligned = table.addresses(*lists)
    params, grads, buffers = lists
    grid = (len(table.chunks),)
    average = rule.variant == "momentum" and rule.adapt
    shared = {
        "ALIGNED": aligned,
        "X": triton_dtype(params[0]),
        "G": triton_dtype(grads[0]),
        "S": triton_dtype(buffers[0]),
        "FIRST": first,
        "AVERAGE": average,
        "NEGATE": rule.maximize,
        "BLOCK": block,
        "num_warps": warps,
    }
    common = (addresses, table.chunks, len(params), rule.weight_decay, rule.momentum)
    if rule.adapt:
        decayed = rule.variant == "update"
        tail = (table.partials, grad_divisor, found_inf)
        _lars_norms[grid](*common, *tail, DECAYED=decayed, **shared)
        squares = table.segment_sums()
    else:  # nobody reads them
        squares = torch.empty(2, len(table.segments), device=params[0].device)

    def finish(squares: Tensor) -> Tensor:
        ratios = local_rates(squares, rule, lr)
        with on_its_device(params[0]):
            _lars_apply[grid](
                *common,
                _buffer_weight(rule, first),
                ratios,
                lr,
                grad_divisor,
                found_inf,
                TENSOR_LR=isinstance(lr, Tensor),
                MOMENTUM=rule.momentum != 0,
                NESTEROV=rule.nesterov,
                LR_INSIDE=rule.lr_in_momentum,
                **shared,
            )
        if found_inf is None:
            return ratios
        return ratios.masked_fill(found_inf != 0, 1.0)  # a skipped step has none

    return HalfStep(squares, finish)


if triton is not None:
    from batchery.kernels.multi_tensor import (
        chunk_bounds,
        chunk_load,
        chunk_pointer,
        chunk_store,
    )

    @triton.jit
    def _gradient_scale(grad_divisor, NEGATE: tl.constexpr):
        scale = 1.0
        if grad_divisor is not None:
            scale = 1.0 / tl.load(grad_divisor).to(tl.float32)
        if NEGATE:
            scale = -scale
        return scale

    @triton.jit
    def _norms_block(
        x_at, g_at, b_at, i, end, scale, weight_decay, momentum,
        FIRST: tl.constexpr, AVERAGE: tl.constexpr, DECAYED: tl.constexpr, MASKED: tl.constexpr,
    ):  # fmt: skip
        """Return x and the tensor whose norm counts; write the buffer when it is an average."""
        x = chunk_load(x_at, i, end, MASKED)
        g = chunk_load(g_at, i, end, MASKED) * scale
        if AVERAGE:
            b = (1.0 - momentum) * (g + weight_decay * x)
            if not FIRST:
                b += momentum * chunk_load(b_at, i, end, MASKED)
            chunk_store(b_at, i, end, b, MASKED)
            return x, b
        elif DECAYED:
            return x, g + weight_decay * x
        else:
            return x, g

    @triton.jit
    def _lars_norms(
        addresses, chunks, n, weight_decay, momentum, partials, grad_divisor, found_inf,
        DECAYED: tl.constexpr, ALIGNED: tl.constexpr, X: tl.constexpr, G: tl.constexpr,
        S: tl.constexpr, FIRST: tl.constexpr, AVERAGE: tl.constexpr, NEGATE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Pass 1: leave Σx² and Σg² (or that of the variant's tensor) of this chunk."""
        if found_inf is not None:
            if tl.load(found_inf) != 0.0:
                return
        place, _, begin, end = chunk_bounds(chunks, ALIGNED)
        x_at = chunk_pointer(addresses, 0, n, place, X, ALIGNED)
        g_at = chunk_pointer(addresses, 1, n, place, G, ALIGNED)
        b_at = chunk_pointer(addresses, 2, n, place, S, ALIGNED)
        scale = _gradient_scale(grad_divisor, NEGATE)
        lanes = tl.arange(0, BLOCK)
        weight = tl.zeros([BLOCK], tl.float32)
        update = tl.zeros([BLOCK], tl.float32)
        full = begin + (end - begin) // BLOCK * BLOCK
        for at in range(begin, full, BLOCK):
            x, u = _norms_block(
                x_at, g_at, b_at, at + lanes, end, scale, weight_decay, momentum,
                FIRST, AVERAGE, DECAYED, False,
            )  # fmt: skip
            weight += x * x
            update += u * u
        if full < end:
            x, u = _norms_block(
                x_at, g_at, b_at, full + lanes, end, scale, weight_decay, momentum,
                FIRST, AVERAGE, DECAYED, True,
            )  # fmt: skip
            weight += x * x
            update += u * u
        tl.store(partials + tl.program_id(0), tl.sum(weight, 0))
        tl.store(partials + tl.num_programs(0) + tl.program_id(0), tl.sum(update, 0))

    @triton.jit
    def _lars_block(
        x_at, g_at, b_at, i, end, scale, weight_decay, momentum, weight, inner, outer,
        FIRST: tl.constexpr, AVERAGE: tl.constexpr, MOMENTUM: tl.constexpr,
        NESTEROV: tl.constexpr, MASKED: tl.constexpr,
    ):  # fmt: skip
        x = chunk_load(x_at, i, end, MASKED)
        if AVERAGE:
            move = chunk_load(b_at, i, end, MASKED) * inner
        else:
            g = chunk_load(g_at, i, end, MASKED) * scale
            move = (g + weight_decay * x) * inner
            if MOMENTUM:
                b = move * weight
                if not FIRST:
                    b += momentum * chunk_load(b_at, i, end, MASKED)
                chunk_store(b_at, i, end, b, MASKED)
                if NESTEROV:
                    move += momentum * b
                else:
                    move = b
        chunk_store(x_at, i, end, x - outer * move, MASKED)

    @triton.jit
    def _lars_apply(
        addresses, chunks, n, weight_decay, momentum, weight, ratios, lr, grad_divisor, found_inf,
        TENSOR_LR: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
        LR_INSIDE: tl.constexpr, ALIGNED: tl.constexpr, X: tl.constexpr, G: tl.constexpr,
        S: tl.constexpr, FIRST: tl.constexpr, AVERAGE: tl.constexpr, NEGATE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Pass 2: update the buffer (unless pass 1 did) and write the parameters."""
        if found_inf is not None:
            if tl.load(found_inf) != 0.0:
                return
        place, segment, begin, end = chunk_bounds(chunks, ALIGNED)
        x_at = chunk_pointer(addresses, 0, n, place, X, ALIGNED)
        g_at = chunk_pointer(addresses, 1, n, place, G, ALIGNED)
        b_at = chunk_pointer(addresses, 2, n, place, S, ALIGNED)
        scale = _gradient_scale(grad_divisor, NEGATE)
        rate = lr
        if TENSOR_LR:
            rate = tl.load(lr).to(tl.float32)
        inner = tl.load(ratios + segment)
        outer = rate
        if LR_INSIDE:
            inner *= rate
            outer = 1.0
        lanes = tl.arange(0, BLOCK)
        full = begin + (end - begin) // BLOCK * BLOCK
        for at in range(begin, full, BLOCK):
            _lars_block(
                x_at, g_at, b_at, at + lanes, end, scale, weight_decay, momentum, weight,
                inner, outer, FIRST, AVERAGE, MOMENTUM, NESTEROV, False,
            )  # fmt: skip
        if full < end:
            _lars_block(
                x_at, g_at, b_at, full + lanes, end, scale, weight_decay, momentum, weight,
                inner, outer, FIRST, AVERAGE, MOMENTUM, NESTEROV, True,
            )  # fmt: skip
