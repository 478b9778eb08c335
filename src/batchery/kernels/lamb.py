# SPDX-License-Identifier: Apache-2.0
"""One LAMB step over lists of tensors: readable loop, foreach, and fused.

The update is stated in `batchery.optim.lamb`; its arithmetic is here, once per form:

    single    a loop over tensors, the reference that the others are tested against
    foreach   torch's multi-tensor operations; 12 passes over memory
    fused     two passes over all tensors, by Triton on CUDA and by C on the CPU: 10 words of
              traffic per parameter (the norm of the update needs all of it, so two passes are
              the fewest)

Between the passes stand the norms, as a `HalfStep`: ranks that share tensors add theirs up there.
No form waits for the device or changes a gradient.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class LambRule:
    """The settings of a LAMB step that are the same for every tensor of a call.

    See `batchery.optim.LAMB` for their meaning; they are checked there.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6
    weight_decay: float = 0.01
    adapt: bool = True
    bias_correction: bool = True
    grad_averaging: bool = True
    decoupled: bool = False
    trust_clip: tuple[float, float] | None = None
    norm_clip: tuple[float, float] | None = None
    blocks: int = 1
    maximize: bool = False

    @property
    def gain(self) -> float:
        """Weight of the gradient in the first moment."""
        return 1 - self.beta1 if self.grad_averaging else 1.0

    @property
    def coupled_decay(self) -> float:
        """Weight of the parameter inside the update."""
        return 0.0 if self.decoupled else self.weight_decay


def lamb_step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    rule: LambRule,
    lr: float | Tensor,
    *,
    impl: Impl,
    grad_divisor: Tensor | None = None,
    found_inf: Tensor | None = None,
    table: ChunkTable | None = None,
) -> HalfStep:
    """Update moments in place by one LAMB step; `finish()` of what it returns does the parameters.

    Args:
        params: n tensors of one dtype on one device.
        grads: their gradients, same shapes; left as they are.
        exp_avgs: first moments, float32 or wider for low-precision parameters.
        exp_avg_sqs: second moments.
        steps: n 0-d float32 tensors, the number of this step for each parameter (from 1).
        rule: settings.
        lr: learning rate; a 0-d tensor is read on its device.
        impl: which form.
        grad_divisor: 0-d tensor that gradients are divided by (clipping, loss scale).
        found_inf: 0-d tensor; where it is 1 nothing is updated. Fused form only.
        table: chunk table of `params` for the fused form, built for `rule.blocks`.

    Returns:
        The step after its first pass, with the squared norms `(2, n · blocks)` of parameters and
        updates; finished, it gives the trust ratio of each segment, `(n · blocks,)`.
    """
    if impl == "fused":
        if table is None:
            table = ChunkTable(params, blocks=rule.blocks)
        fused = fused_cuda if params[0].is_cuda else _fused_cpu
        with on_its_device(params[0]):
            return fused(
                [params, grads, exp_avgs, exp_avg_sqs, steps],
                rule,
                lr,
                table,
                grad_divisor=grad_divisor,
                found_inf=found_inf,
            )
    dtype = wide_dtype(params, exp_avgs)
    grads = prepared_grads(grads, dtype, grad_divisor, rule.maximize)
    moments = as_dtype(exp_avgs, dtype), as_dtype(exp_avg_sqs, dtype)
    if impl == "foreach":
        directions = _directions_foreach(params, grads, *moments, steps, rule)
    else:
        directions = [
            _direction(*tensors, rule)
            for tensors in zip(params, grads, *moments, steps, strict=True)
        ]
    for kept, wide in zip((exp_avgs, exp_avg_sqs), moments, strict=True):
        if wide is not kept:
            torch._foreach_copy_(kept, wide)
    apply = _apply_foreach if impl == "foreach" else _apply_single

    def finish(squares: Tensor) -> Tensor:
        ratios = trust_ratios(squares, rule)
        apply(params, directions, ratios, rule, lr)
        return ratios

    return HalfStep(pair_of_norms(params, directions, rule.blocks, rule.adapt), finish)


def trust_ratios(squares: Tensor, rule: LambRule) -> Tensor:
    """Turn squared norms `(2, segments)` of parameters and updates into trust ratios.

    A zero parameter or update has ratio 1, so zero-initialised layers move. A norm that is not
    finite makes the ratio NaN: an overflow must not freeze its layer unseen.
    """
    if not rule.adapt:
        return squares.new_ones(squares.shape[1])
    weight, update = squares.sqrt().unbind(0)
    size = weight if rule.norm_clip is None else weight.clamp(*rule.norm_clip)
    ratio = size / update + 0 * update
    ratio = torch.where((weight == 0) | (update == 0), torch.ones_like(ratio), ratio)
    return ratio if rule.trust_clip is None else ratio.clamp(*rule.trust_clip)


def bias_corrections(step: Tensor, rule: LambRule) -> tuple[float | Tensor, float | Tensor]:
    """Return 1 - β1^t and 1 - β2^t: numbers for a step on the CPU, else tensors on its device."""
    if not rule.bias_correction:
        return 1.0, 1.0
    logs = [math.log(beta) if beta > 0 else -math.inf for beta in (rule.beta1, rule.beta2)]
    if step.is_cpu and step.ndim == 0:
        first, second = (-math.expm1(step.item() * log) for log in logs)
        return first, second
    # expm1, because 1 - 0.999 in float32 has lost three digits
    first_tensor, second_tensor = (-torch.expm1(step * log) for log in logs)
    return first_tensor, second_tensor


def _direction(x: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor, rule: LambRule) -> Tensor:
    """Update the moments of one tensor and return its direction u, in the moments' dtype."""
    m.mul_(rule.beta1).add_(g, alpha=rule.gain)
    v.mul_(rule.beta2).addcmul_(g, g, value=1 - rule.beta2)
    correction1, correction2 = bias_corrections(step, rule)
    u = (m / correction1) / ((v / correction2).sqrt() + rule.eps)
    return u + rule.coupled_decay * x.to(u.dtype)


def _directions_foreach(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    rule: LambRule,
) -> list[Tensor]:
    if rule.grad_averaging:
        torch._foreach_lerp_(exp_avgs, grads, 1 - rule.beta1)
    else:
        torch._foreach_mul_(exp_avgs, rule.beta1)
        torch._foreach_add_(exp_avgs, grads)
    torch._foreach_mul_(exp_avg_sqs, rule.beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - rule.beta2)
    roots = torch._foreach_sqrt(exp_avg_sqs)
    if rule.bias_correction:  # m/c1 / (√v/√c2 + eps) = m / (√v · c1/√c2 + c1 · eps): a pass less
        factors, terms = _foreach_corrections(steps, rule)
        torch._foreach_mul_(roots, factors)
        torch._foreach_add_(roots, terms)
    else:
        torch._foreach_add_(roots, rule.eps)
    directions: list[Tensor] = list(torch._foreach_div(exp_avgs, roots))
    if rule.coupled_decay:
        wide = as_dtype(params, directions[0].dtype)
        torch._foreach_add_(directions, wide, alpha=rule.coupled_decay)
    return directions


def _foreach_corrections(steps: list[Tensor], rule: LambRule) -> tuple[list[Any], list[Any]]:
    """Return c1 / √c2 and c1 · eps of each tensor, c = 1 - β^t; on the device by few launches."""
    if steps[0].is_cpu:
        known: dict[float, tuple[float | Tensor, float | Tensor]] = {}  # most have the same step
        numbers = [step.item() for step in steps]
        for number, step in zip(numbers, steps, strict=True):
            if number not in known:
                c1, c2 = bias_corrections(step, rule)
                known[number] = c1 / c2**0.5, c1 * rule.eps
        factors, terms = zip(*(known[number] for number in numbers), strict=True)
        return list(factors), list(terms)
    c1, c2 = (torch.as_tensor(c) for c in bias_corrections(torch.stack(steps), rule))
    return list((c1 / c2.sqrt()).unbind()), list((c1 * rule.eps).unbind())


def _apply_single(
    params: list[Tensor],
    directions: list[Tensor],
    ratios: Tensor,
    rule: LambRule,
    lr: float | Tensor,
) -> None:
    for place, (x, u) in enumerate(zip(params, directions, strict=True)):
        wide = x.to(u.dtype)
        if rule.decoupled:
            wide = wide * (1 - lr * rule.weight_decay)
        ratio = ratios[place * rule.blocks : (place + 1) * rule.blocks]
        scaled = segment_rows(u, rule.blocks) * (lr * ratio)[:, None]
        x.copy_(wide - scaled.reshape(x.shape))


def _apply_foreach(
    params: list[Tensor],
    directions: list[Tensor],
    ratios: Tensor,
    rule: LambRule,
    lr: float | Tensor,
) -> None:
    dtype = directions[0].dtype
    scales = (-lr * ratios).to(dtype)
    wide = as_dtype(params, dtype)
    if rule.decoupled and rule.weight_decay:
        torch._foreach_mul_(wide, 1 - lr * rule.weight_decay)
    if rule.blocks > 1:
        for place, u in enumerate(directions):
            own = scales[place * rule.blocks : (place + 1) * rule.blocks]
            directions[place] = (segment_rows(u, rule.blocks) * own[:, None]).reshape(u.shape)
        torch._foreach_add_(wide, directions)
    elif params[0].is_cpu:
        for x, u, scale in zip(wide, directions, scales.tolist(), strict=True):
            x.add_(u, alpha=scale)
    else:
        torch._foreach_mul_(directions, list(scales.unbind()))
        torch._foreach_add_(wide, directions)
    if wide[0].dtype != params[0].dtype:
        torch._foreach_copy_(params, wide)


def _fused_cpu(
    lists: Sequence[list[Tensor]],
    rule: LambRule,
    lr: float | Tensor,
    table: ChunkTable,
    *,
    grad_divisor: Tensor | None,
    found_inf: Tensor | None,
) -> HalfStep:
    """Step (params, grads, exp_avgs, exp_avg_sqs, steps) by the C kernels."""
    *tensors, steps = lists
    dtype = tensors[0][0].dtype
    if found_inf is not None and found_inf:
        none = torch.empty(2, len(table.segments), dtype=dtype)
        return HalfStep(none, lambda squares: squares.new_ones(squares.shape[1]))
    first, second = (
        torch.as_tensor(c, dtype=torch.float64)
        for c in bias_corrections(torch.stack(steps).double(), rule)
    )
    corrections = torch.stack([first, second.sqrt()], -1).to(dtype).expand(len(steps), 2)
    common = (corrections.contiguous(), rule.eps, rule.coupled_decay)
    partials = torch.empty(2, len(table.chunks), dtype=dtype)
    scale = 1.0 if grad_divisor is None else 1.0 / float(grad_divisor)
    native.call(
        "lamb_moments",
        table,
        tensors,
        *common,
        partials,
        rule.beta1,
        rule.gain,
        rule.beta2,
        1.0 - rule.beta2,
        -scale if rule.maximize else scale,
    )

    def finish(squares: Tensor) -> Tensor:
        ratios, rate = trust_ratios(squares, rule), float(lr)
        keep = 1.0 - rate * rule.weight_decay if rule.decoupled else 1.0
        native.call("lamb_apply", table, tensors, *common, ratios, rate, keep)
        return ratios

    return HalfStep(table.segment_sums_of(partials), finish)


def fused_cuda(
    lists: Sequence[list[Tensor]],
    rule: LambRule,
    lr: float | Tensor,
    table: ChunkTable,
    *,
    grad_divisor: Tensor | None = None,
    found_inf: Tensor | None = None,
    block: int = BLOCK,
    warps: int = WARPS,
) -> HalfStep:
    """Step (params, grads, exp_avgs, exp_avg_sqs, steps) by the Triton kernels."""
    addresses, aligned = table.addresses(*lists)
    params, grads, moments = lists[:3]
    logs = [math.log(beta) if beta > 0 else -math.inf for beta in (rule.beta1, rule.beta2)]
    shared = {
        "ALIGNED": aligned,
        "X": triton_dtype(params[0]),
        "S": triton_dtype(moments[0]),
        "BIAS": rule.bias_correction,
        "BLOCK": block,
        "num_warps": warps,
    }
    grid = (len(table.chunks),)
    common = (addresses, table.chunks, len(params), logs[0], logs[1], rule.eps, rule.coupled_decay)
    _lamb_moments[grid](
        *common,
        table.partials,
        rule.beta1,
        rule.gain,
        rule.beta2,
        1 - rule.beta2,
        grad_divisor,
        found_inf,
        G=triton_dtype(grads[0]),
        NEGATE=rule.maximize,
        **shared,
    )

    def finish(squares: Tensor) -> Tensor:
        ratios = trust_ratios(squares, rule)
        decay = rule.weight_decay if rule.decoupled else 0.0
        with on_its_device(params[0]):
            _lamb_apply[grid](
                *common,
                ratios,
                lr,
                decay,
                found_inf,
                TENSOR_LR=isinstance(lr, Tensor),
                **shared,
            )
        if found_inf is None:
            return ratios
        return ratios.masked_fill(found_inf != 0, 1.0)  # a skipped step has none

    return HalfStep(table.segment_sums(), finish)


if triton is not None:
    from batchery.kernels.multi_tensor import (
        chunk_bounds,
        chunk_load,
        chunk_pointer,
        chunk_store,
    )

    @triton.jit
    def _corrections(addresses, n, place, log1, log2, BIAS: tl.constexpr):
        """Return 1 - β1^t and sqrt(1 - β2^t) for this program's tensor."""
        if BIAS:
            step = tl.load(chunk_pointer(addresses, 4, n, place, tl.float32, False))
            # float64, because 1 - 0.999 in float32 has lost three digits
            first = 1.0 - tl.exp(step.to(tl.float64) * log1)
            second = 1.0 - tl.exp(step.to(tl.float64) * log2)
            return first.to(tl.float32), tl.sqrt(second).to(tl.float32)
        else:
            return 1.0, 1.0

    @triton.jit
    def _lamb_direction(x, m, v, c1, root2, eps, coupled_decay):
        return (m / c1) / (tl.sqrt(v) / root2 + eps) + coupled_decay * x

    @triton.jit
    def _moments_block(
        x_at, g_at, m_at, v_at, i, end, scale, beta1, gain, beta2, gain2,
        c1, root2, eps, coupled_decay, MASKED: tl.constexpr,
    ):  # fmt: skip
        """Write the moments of one block; return its x and its direction."""
        x = chunk_load(x_at, i, end, MASKED)
        g = chunk_load(g_at, i, end, MASKED) * scale
        m = chunk_load(m_at, i, end, MASKED) * beta1 + g * gain
        v = chunk_load(v_at, i, end, MASKED) * beta2 + g * g * gain2
        chunk_store(m_at, i, end, m, MASKED)
        chunk_store(v_at, i, end, v, MASKED)
        u = _lamb_direction(x, m, v, c1, root2, eps, coupled_decay)
        if MASKED:
            u = tl.where(i < end, u, 0.0)  # past the end it is 0 / 0 when eps is 0
        return x, u

    @triton.jit
    def _lamb_moments(
        addresses, chunks, n, log1, log2, eps, coupled_decay,
        partials, beta1, gain, beta2, gain2, grad_divisor, found_inf,
        G: tl.constexpr, NEGATE: tl.constexpr, ALIGNED: tl.constexpr,
        X: tl.constexpr, S: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Pass 1: write both moments; leave Σx² and Σu² of this chunk in `partials`."""
        if found_inf is not None:
            if tl.load(found_inf) != 0.0:
                return
        place, _, begin, end = chunk_bounds(chunks, ALIGNED)
        x_at = chunk_pointer(addresses, 0, n, place, X, ALIGNED)
        g_at = chunk_pointer(addresses, 1, n, place, G, ALIGNED)
        m_at = chunk_pointer(addresses, 2, n, place, S, ALIGNED)
        v_at = chunk_pointer(addresses, 3, n, place, S, ALIGNED)
        c1, root2 = _corrections(addresses, n, place, log1, log2, BIAS)
        scale = 1.0
        if grad_divisor is not None:
            scale = 1.0 / tl.load(grad_divisor).to(tl.float32)
        if NEGATE:
            scale = -scale
        lanes = tl.arange(0, BLOCK)
        weight = tl.zeros([BLOCK], tl.float32)
        update = tl.zeros([BLOCK], tl.float32)
        full = begin + (end - begin) // BLOCK * BLOCK
        for at in range(begin, full, BLOCK):
            x, u = _moments_block(
                x_at, g_at, m_at, v_at, at + lanes, end, scale, beta1, gain, beta2, gain2,
                c1, root2, eps, coupled_decay, False,
            )  # fmt: skip
            weight += x * x
            update += u * u
        if full < end:
            x, u = _moments_block(
                x_at, g_at, m_at, v_at, full + lanes, end, scale, beta1, gain, beta2, gain2,
                c1, root2, eps, coupled_decay, True,
            )  # fmt: skip
            weight += x * x
            update += u * u
        tl.store(partials + tl.program_id(0), tl.sum(weight, 0))
        tl.store(partials + tl.num_programs(0) + tl.program_id(0), tl.sum(update, 0))

    @triton.jit
    def _apply_block(
        x_at, m_at, v_at, i, end, scale, keep, c1, root2, eps, coupled_decay,
        MASKED: tl.constexpr,
    ):  # fmt: skip
        x = chunk_load(x_at, i, end, MASKED)
        m = chunk_load(m_at, i, end, MASKED)
        v = chunk_load(v_at, i, end, MASKED)
        u = _lamb_direction(x, m, v, c1, root2, eps, coupled_decay)
        chunk_store(x_at, i, end, x * keep - scale * u, MASKED)

    @triton.jit
    def _lamb_apply(
        addresses, chunks, n, log1, log2, eps, coupled_decay, ratios, lr, decay, found_inf,
        TENSOR_LR: tl.constexpr, ALIGNED: tl.constexpr,
        X: tl.constexpr, S: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Pass 2: make u again from the moments and write the parameters."""
        if found_inf is not None:
            if tl.load(found_inf) != 0.0:
                return
        place, segment, begin, end = chunk_bounds(chunks, ALIGNED)
        x_at = chunk_pointer(addresses, 0, n, place, X, ALIGNED)
        m_at = chunk_pointer(addresses, 2, n, place, S, ALIGNED)
        v_at = chunk_pointer(addresses, 3, n, place, S, ALIGNED)
        c1, root2 = _corrections(addresses, n, place, log1, log2, BIAS)
        rate = lr
        if TENSOR_LR:
            rate = tl.load(lr).to(tl.float32)
        scale = rate * tl.load(ratios + segment)
        keep = 1.0 - rate * decay
        lanes = tl.arange(0, BLOCK)
        full = begin + (end - begin) // BLOCK * BLOCK
        for at in range(begin, full, BLOCK):
            _apply_block(
                x_at, m_at, v_at, at + lanes, end, scale, keep, c1, root2, eps, coupled_decay, False
            )
        if full < end:
            _apply_block(
                x_at, m_at, v_at, full + lanes, end, scale, keep, c1, root2, eps,
                coupled_decay, True,
            )  # fmt: skip
