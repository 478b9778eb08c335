# SPDX-License-Identifier: Apache-2.0
"""How `w4a16_matmul` is computed for x `(M, K)`: by the kernels or by torch, and as operations.

Operations of torch.library are what torch.compile and autograd see.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from batchery.kernels.multi_tensor import processors_of
from batchery.kernels.w4a16_epilogue import (
    Norm,
    Residual,
    add_by_torch,
    check_apart,
    norm_by_torch,
)
from batchery.kernels.w4a16_layout import PackedW4, dequantized_slices, weave
from batchery.kernels.w4a16_narrow import launch as launch_narrow
from batchery.kernels.w4a16_plan import (
    INVARIANT_BATCH,
    MOST_BATCH,
    MOST_NARROW,
    kernel_of,
    plan_narrow,
    plan_tiles,
    plan_wide,
)
from batchery.kernels.w4a16_tiles import dequantize_tiles
from batchery.kernels.w4a16_tiles import launch as launch_tiles
from batchery.kernels.w4a16_wide import fits
from batchery.kernels.w4a16_wide import launch as launch_wide

__all__ = [
    "by_kernels",
    "filled_by_kernel",
    "multiply_normed",
    "operation",
    "operation_adding",
    "w4a16_reference",
    "woven_silu",
]

OWNER = "w4a16_matmul"
NATIVE_BATCH = 128  # rows up to which torch's four-bit matmul on the CPU beats dequantising


def w4a16_reference(x: Tensor, weight: PackedW4, bias: Tensor | None = None) -> Tensor:
    """Torch form for x `(M, K)` of any floating dtype; a gated weight's bias comes woven."""
    native = weight.native
    if native is not None and x.dtype == torch.bfloat16 and len(x) <= NATIVE_BATCH:
        words, table = native
        x = x.contiguous()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, words, weight.group_size, table)
        y = weave(y.t()).t() if weight.gated else y
    else:
        parts = [F.linear(x, w) for w in dequantized_slices(weight, x.dtype)]
        y = torch.cat(parts, -1)
    y = y if bias is None else y + bias
    return woven_silu(y) if weight.gated else y


def woven_silu(y: Tensor) -> Tensor:
    """Return silu(gate)·up of woven columns."""
    return F.silu(y[:, 0::2]) * y[:, 1::2]


def by_kernels(
    x: Tensor,
    weight: PackedW4,
    bias: Tensor | None,
    out: Tensor | None,
    invariant: bool,
    chained: bool,
) -> Tensor:
    """Run the kernels on x `(M, K)`."""
    m, n = x.shape[0], weight.shape[0]
    shape = (m, n // 2 if weight.gated else n)
    out = x.new_empty(shape) if out is None else out.view(shape)
    rows, (_, blocks, _, lanes) = weight.rows, weight.words.shape
    processors = processors_of(x.device)
    kernel = "tiles"
    if not invariant:
        kernel = kernel_of(m, rows, x.shape[1], weight.group_size, processors, chained)
    if m and kernel != "tiles" and fits(x, weight):
        if kernel == "narrow":
            return _by_narrow(x, weight, bias, out, chained, None, None)
        wide, share = plan_wide(m, rows, blocks, processors)
        return launch_wide(x, weight, wide, share, bias=bias, out=out)
    if m > MOST_BATCH and not invariant:
        y = F.linear(x, dequantize_tiles(weight, x.dtype), bias)
        return out.copy_(woven_silu(y)) if weight.gated else out.copy_(y)
    parts = [(x, out)] if m else []
    if invariant and m > INVARIANT_BATCH:
        # An invariant split serves one tile of rows: its counters would not do for more.
        parts = list(zip(x.split(INVARIANT_BATCH), out.split(INVARIANT_BATCH), strict=True))
    for part, place in parts:
        tile, split = plan_tiles(part.shape[0], rows, blocks, lanes, processors, invariant)
        launch_tiles(part, weight, tile, split, bias=bias, out=place)
    return out


def _by_narrow(
    x: Tensor,
    weight: PackedW4,
    bias: Tensor | None,
    out: Tensor | None,
    chained: bool,
    norm: Norm | None,
    residual: Residual | None,
) -> Tensor:
    """Run the kernel for few rows in the form that is planned."""
    m, group, blocks = len(x), weight.group_size, weight.words.shape[1]
    form, split = plan_narrow(m, weight.rows, blocks, group, processors_of(x.device), chained)
    return launch_narrow(
        x, weight, form, split,
        bias=bias, out=out, chained=chained, norm_of=norm, add_to=residual,
    )  # fmt: skip


def multiply_normed(
    x: Tensor,
    weight: PackedW4,
    bias: Tensor | None,
    out: Tensor | None,
    chained: bool,
    kernel: bool,
    norm: Norm | None,
    residual: Residual | None,
) -> Tensor:
    """Multiply x `(M, K)`, finish its norm, add to hidden states; in one kernel up to 64 rows."""
    if residual is not None and not torch.compiler.is_compiling():
        check_apart(OWNER, x, bias, norm, residual)
    if kernel and 0 < len(x) <= MOST_NARROW and fits(x, weight):
        out = None if out is None else out.view(len(x), -1)
        y = _by_narrow(x, weight, bias, out, chained, norm, residual)
        if residual is not None:
            filled_by_kernel(residual.h, residual.x, residual.squares)
        return y
    x = x if norm is None else norm_by_torch(x, norm)
    if kernel:
        y = by_kernels(x, weight, bias, out, False, chained)
    else:
        y = w4a16_reference(x, weight, bias)
    return y if residual is None else add_by_torch(y, residual)


def filled_by_kernel(*tensors: Tensor) -> None:
    """Tell autograd, which may have saved them, that tensors have changed."""
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def operation(
    x: Tensor,
    weight: PackedW4,
    bias: Tensor | None,
    gated: bool,
    invariant: bool,
    chained: bool,
    kernel: bool,
    norm: Norm | None = None,
) -> Tensor:
    """Multiply x `(M, K)` by kernels or by torch, as an operation; `gated` joins woven columns."""
    tensors = (weight.words, weight.scales, weight.zeros, weight.counters)
    rest = (bias, *weight.shape, weight.group_size, gated, chained, kernel)
    y: Tensor = _w4a16_op(x, *tensors, *rest, invariant, *_in_parts(norm))
    return y


def operation_adding(
    x: Tensor,
    weight: PackedW4,
    bias: Tensor | None,
    chained: bool,
    kernel: bool,
    norm: Norm | None,
    residual: Residual,
) -> None:
    """Multiply x `(M, K)` and add to hidden states, as an operation."""
    tensors = (weight.words, weight.scales, weight.zeros, weight.counters)
    rest = (bias, *weight.shape, weight.group_size, weight.gated, chained, kernel)
    _adding_op(x, *tensors, *rest, *_in_parts(norm), *residual)


def _in_parts(norm: Norm | None) -> tuple[Tensor | None, float]:
    return (None, 0.0) if norm is None else norm


@torch.library.custom_op("batchery::w4a16", mutates_args=())
def _w4a16_op(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    counters: Tensor,
    bias: Tensor | None,
    n: int,
    k: int,
    group_size: int,
    gated: bool,
    chained: bool,
    kernel: bool,
    invariant: bool,
    x_squares: Tensor | None,
    eps: float,
) -> Tensor:
    """What torch.compile and autograd see: counters are as before when it returns."""
    weight = PackedW4(words, scales, zeros, counters, None, (n, k), group_size, gated)
    if x_squares is not None:
        return multiply_normed(x, weight, bias, None, chained, kernel, Norm(x_squares, eps), None)
    if kernel:
        return by_kernels(x, weight, bias, None, invariant, chained)
    return w4a16_reference(x, weight, bias)


@_w4a16_op.register_fake
def _(x: Tensor, *arguments: Any) -> Tensor:
    n, gated = arguments[5], arguments[8]
    return x.new_empty(x.shape[0], n // 2 if gated else n)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, words, scales, zeros, _, _, n, k, group_size, _, _, ctx.kernel, *_ = inputs
    ctx.weight = (words, scales, zeros, n, k, group_size)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    words, scales, zeros, n, k, group_size = ctx.weight
    weight = PackedW4(words, scales, zeros, words, None, (n, k), group_size, False)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        if ctx.kernel:
            grad_x = grad @ dequantize_tiles(weight, grad.dtype)
        else:
            grad_x = grad @ torch.cat(list(dequantized_slices(weight, grad.dtype)))
    if ctx.needs_input_grad[5]:
        grad_bias = grad.sum(0)
    return grad_x, None, None, None, None, grad_bias, *(9 * [None])


_w4a16_op.register_autograd(_gradients, setup_context=_keep)


@torch.library.custom_op("batchery::w4a16_adding", mutates_args=("h", "after", "h_squares"))
def _adding_op(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    counters: Tensor,
    bias: Tensor | None,
    n: int,
    k: int,
    group_size: int,
    gated: bool,
    chained: bool,
    kernel: bool,
    x_squares: Tensor | None,
    eps: float,
    h: Tensor,
    gain: Tensor,
    after: Tensor,
    h_squares: Tensor,
) -> None:
    """A product that is added to h, as torch.compile sees it."""
    weight = PackedW4(words, scales, zeros, counters, None, (n, k), group_size, gated)
    norm = None if x_squares is None else Norm(x_squares, eps)
    residual = Residual(h, gain, after, h_squares)
    multiply_normed(x, weight, bias, None, chained, kernel, norm, residual)
