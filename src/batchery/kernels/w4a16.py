# SPDX-License-Identifier: Apache-2.0
"""Activations in 16 bits times weights in 4: y = x · Wᵀ, bound by reading W up to some 32 rows.

When to use: matmuls of few rows (decoding in batches) with a weight packed by `pack_w4`. When not:
training (no gradient reaches W); long prompts gain memory, not time.

    w[n, k] = s[n, g(k)] · (q[n, k] - z[n, g(k)])
    yᵀ[N, M] = Σ_g s[:, g] · ((q - z)[:, g] · x[:, g]ᵀ)        over groups g of G columns

The weight is the left operand: it goes from 4 bits to 16 in registers, and the batch is the short
side of the matrix instruction. For few rows the scales multiply each group's sums in float32, so
the instruction sees exact small integers; for many they multiply the weights. The columns of an
output tile may be split among programs: their float32 sums lie in memory, and the program that
comes last adds them in order. No float atomics: the same bits in every run. With `batch_invariant`
a row's result does not depend on how many other rows there are.

`w4a16_tiles` is for every device; on Hopper it takes the fewest rows, and leaves more of them to
`w4a16_narrow` and `w4a16_wide`. `w4a16_plan.kernel_of` has the rule.

Reference: Frantar et al., MARLIN, arXiv 2408.11743 (2024). Theirs adds split sums in 16 bits, in an
order that follows the number of processors, and shuffles weights into fragments by hand.
"""

import warnings
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from batchery._core.validate import one_of, require
from batchery.kernels.multi_tensor import processors_of, triton
from batchery.kernels.w4a16_layout import PackedW4, dequantized_slices, weave
from batchery.kernels.w4a16_narrow import launch as launch_narrow
from batchery.kernels.w4a16_plan import (
    INVARIANT_BATCH,
    MOST_BATCH,
    kernel_of,
    plan_narrow,
    plan_tiles,
    plan_wide,
)
from batchery.kernels.w4a16_tiles import dequantize_tiles
from batchery.kernels.w4a16_tiles import launch as launch_tiles
from batchery.kernels.w4a16_wide import fits
from batchery.kernels.w4a16_wide import launch as launch_wide

__all__ = ["by_triton", "check_arguments", "w4a16_matmul", "w4a16_reference"]

Impl = Literal["auto", "torch", "triton"]

OWNER = "w4a16_matmul"
IMPLS = get_args(Impl)
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32)
NATIVE_BATCH = 128  # rows up to which torch's four-bit matmul on the CPU beats dequantising


def w4a16_matmul(
    x: Tensor,
    weight: PackedW4,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    batch_invariant: bool = False,
    chained: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Multiply activations by a four-bit weight.

    Args:
        x: `(..., K)`, float16, bfloat16 or float32; the Triton kernels take the first two.
        weight: made by `pack_w4`, on x's device.
        bias: `(N,)`, added before silu(gate)·up.
        out: where the result goes, `(..., N)`, or `(..., N / 2)` for a gated weight.
        batch_invariant: give each row the bits that it would have alone. CUDA only.
        chained: begin to read the weight before the kernel before has ended, and let the kernel
            after do so (programmatic dependent launch). No kernel of the chain so far may have
            written the weight. It saves some tenth of a decoding step in a CUDA graph whose kernels
            all do so, and costs time beside kernels that do not. No effect where the kernel for
            few rows does not run: other devices than Hopper, more than 64 rows or rows that are
            not at multiples of 16 bytes, `batch_invariant`.
        impl: "triton", "torch" (dequantises; on the CPU torch's four-bit matmul for bfloat16), or
            the first that can run.

    Returns:
        x · Wᵀ + bias in x's dtype; summed in float32 by the kernels. Gradients reach x and bias.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
        RuntimeError: `impl="triton"` where the kernels cannot run.

    Examples:
        >>> from batchery.kernels.w4a16_layout import pack_w4
        >>> q = torch.tensor([[9, 8, 8, 6]] * 2, dtype=torch.uint8)
        >>> weight = pack_w4(q, torch.tensor([[1.0], [0.5]]))
        >>> w4a16_matmul(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), weight)
        tensor([[-7.0000, -3.5000]])
    """
    n, k = weight.shape
    fits = (
        x.dim() > 0
        and x.shape[-1] == k
        and x.dtype in DTYPES
        and x.device == weight.words.device
        and (bias is None or bias.shape == (n,))
        and impl in IMPLS
    )
    if not fits:  # messages are made only when they are needed
        check_arguments(OWNER, x, weight.shape, weight.words.device, bias, impl)
    if bias is not None:
        bias = (weave(bias) if weight.gated else bias).to(x.dtype)
    shape = (*x.shape[:-1], n // 2 if weight.gated else n)
    if out is not None:
        fits = out.shape == shape and out.dtype == x.dtype and out.is_contiguous()
        require(fits, OWNER, "out", f"must be {shape}, dense, {x.dtype}", tuple(out.shape))
    rows = x if x.dim() == 2 else x.reshape(-1, k)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    kernel = by_triton(OWNER, x, impl)
    wants_grad = x.requires_grad or (bias is not None and bias.requires_grad)
    if wants_grad and torch.is_grad_enabled():
        y = _operation(rows, weight, bias, False, batch_invariant, chained, kernel)
        y = _join(y) if weight.gated else y
    elif not kernel:
        y = w4a16_reference(rows, weight, bias)
    elif torch.compiler.is_compiling():
        y = _operation(rows, weight, bias, weight.gated, batch_invariant, chained, kernel)
    else:
        y = _by_kernel(rows, weight, bias, out, batch_invariant, chained)
    y = y if len(shape) == 2 else y.view(shape)
    if out is None:
        return y
    return out if y.data_ptr() == out.data_ptr() else out.copy_(y)


def check_arguments(
    owner: str,
    x: Tensor,
    shape: tuple[int, int],
    device: torch.device,
    bias: Tensor | None,
    impl: str,
) -> None:
    """Raise, naming the argument that does not fit a weight of this shape on this device."""
    n, k = shape
    one_of(owner, "impl", impl, IMPLS)
    require(x.dim() > 0 and x.shape[-1] == k, owner, "x", f"must be (..., {k})", tuple(x.shape))
    require(x.dtype in DTYPES, owner, "x", f"must be in {DTYPES}", x.dtype)
    require(x.device == device, owner, "x", f"must be on {device}", x.device)
    given = None if bias is None else tuple(bias.shape)
    require(given in (None, (n,)), owner, "bias", f"must be ({n},)", given)


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
    return _join(y) if weight.gated else y


def _join(y: Tensor) -> Tensor:
    """Return silu(gate)·up of woven columns."""
    return F.silu(y[:, 0::2]) * y[:, 1::2]


def by_triton(owner: str, x: Tensor, impl: Impl) -> bool:
    """Say whether four-bit kernels run on x, or raise if they must and cannot."""
    can = triton is not None and x.is_cuda and x.dtype in HALVES and _modern(owner, x.device)
    if impl == "triton" and not can:
        what = "Triton is not installed" if triton is None else "no kernel"
        raise RuntimeError(f"{owner}: {what} for {x.dtype} on {x.device}")
    return can and impl != "torch"


def _modern(owner: str, device: torch.device) -> bool:
    """Say whether the device has the kernels' instructions; warn if not.

    Not cached: torch.compile warns of caches that it looks through.
    """
    modern = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if not modern:
        warnings.warn(f"{owner}: {device} is too old for the kernels: dequantising", stacklevel=4)
    return modern


def _by_kernel(
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
    kernel = "tiles" if invariant else kernel_of(m, rows, processors, chained)
    if m and kernel != "tiles" and fits(x, weight):
        if kernel == "narrow":
            narrow, split = plan_narrow(m, rows, blocks, weight.group_size, processors, chained)
            return launch_narrow(x, weight, narrow, split, bias=bias, out=out, chained=chained)
        wide, share = plan_wide(m, rows, blocks, processors)
        return launch_wide(x, weight, wide, share, bias=bias, out=out)
    if m > MOST_BATCH and not invariant:
        y = F.linear(x, dequantize_tiles(weight, x.dtype), bias)
        return out.copy_(_join(y)) if weight.gated else out.copy_(y)
    parts = [(x, out)] if m else []
    if invariant and m > INVARIANT_BATCH:
        # An invariant split serves one tile of rows: its counters would not do for more.
        parts = list(zip(x.split(INVARIANT_BATCH), out.split(INVARIANT_BATCH), strict=True))
    for part, place in parts:
        tile, split = plan_tiles(part.shape[0], rows, blocks, lanes, processors, invariant)
        launch_tiles(part, weight, tile, split, bias=bias, out=place)
    return out


def _operation(
    x: Tensor,
    weight: PackedW4,
    bias: Tensor | None,
    gated: bool,
    invariant: bool,
    chained: bool,
    kernel: bool,
) -> Tensor:
    tensors = (weight.words, weight.scales, weight.zeros, weight.counters)
    rest = (bias, *weight.shape, weight.group_size, gated, invariant, chained, kernel)
    y: Tensor = _w4a16_op(x, *tensors, *rest)
    return y


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
    invariant: bool,
    chained: bool,
    kernel: bool,
) -> Tensor:
    """What torch.compile and autograd see: counters are as before when it returns."""
    weight = PackedW4(words, scales, zeros, counters, None, (n, k), group_size, gated)
    if kernel:
        return _by_kernel(x, weight, bias, None, invariant, chained)
    return w4a16_reference(x, weight, bias)


@_w4a16_op.register_fake
def _(x: Tensor, *arguments: Any) -> Tensor:
    n, gated = arguments[5], arguments[8]
    return x.new_empty(x.shape[0], n // 2 if gated else n)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, words, scales, zeros, _, _, n, k, group_size, _, _, _, ctx.kernel = inputs
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
    return grad_x, None, None, None, None, grad_bias, *(7 * [None])


_w4a16_op.register_autograd(_gradients, setup_context=_keep)
