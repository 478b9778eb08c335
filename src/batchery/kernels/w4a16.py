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
`w4a16_narrow` and `w4a16_wide`. `w4a16_plan.kernel_of` has the rule. RMS norms between products can
be left to them: `w4a16_epilogue`.

Reference: Frantar et al., MARLIN, arXiv 2408.11743 (2024). Theirs adds split sums in 16 bits, in an
order that follows the number of processors, and shuffles weights into fragments by hand.
"""

import warnings
from typing import Literal, get_args

import torch
from torch import Tensor

from batchery._core.validate import one_of, require, require_type
from batchery.kernels.multi_tensor import triton
from batchery.kernels.w4a16_epilogue import Norm, Residual, checked
from batchery.kernels.w4a16_layout import PackedW4, weave
from batchery.kernels.w4a16_ops import (
    OWNER,
    by_kernels,
    filled_by_kernel,
    multiply_normed,
    operation,
    operation_adding,
    w4a16_reference,
    woven_silu,
)

__all__ = [
    "Norm",
    "Residual",
    "by_triton",
    "check_arguments",
    "w4a16_matmul",
    "w4a16_reference",
]

Impl = Literal["auto", "torch", "triton"]

IMPLS = get_args(Impl)
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32)


def w4a16_matmul(
    x: Tensor,
    weight: PackedW4,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    batch_invariant: bool = False,
    chained: bool = False,
    norm_of: Norm | None = None,
    add_to: Residual | None = None,
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
            written the weight. It saves a tenth of a decoding step and more in a CUDA graph whose
            kernels all do so, and costs time beside kernels that do not. No effect where the
            kernel for few rows does not run: other devices than Hopper, more than 64 rows (32 of
            large weights with groups below 128) or rows that are not at multiples of 16 bytes,
            `batch_invariant`.
        norm_of: what is left to be done of the RMS norm of x, where the product that made x had
            `add_to`. For up to 64 rows on Hopper both are done inside the product's kernel, which
            pays in a chain; out of one a norm in one kernel of its own is faster up to 8 rows. No
            gradients.
        add_to: hidden states to which the result is added, in place. Its x and squares are filled
            for the product after, and must be others than those that this one reads.
        impl: "triton", "torch" (dequantises; on the CPU torch's four-bit matmul for bfloat16), or
            the first that can run.

    Returns:
        x · Wᵀ + bias in x's dtype; summed in float32 by the kernels. Gradients reach x and bias.
        With `add_to` its h.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
        TypeError: the weight is none of `pack_w4`.
        RuntimeError: `impl="triton"` where the kernels cannot run.

    Examples:
        >>> from batchery.kernels.w4a16_layout import pack_w4
        >>> q = torch.tensor([[9, 8, 8, 6]] * 2, dtype=torch.uint8)
        >>> weight = pack_w4(q, torch.tensor([[1.0], [0.5]]))
        >>> w4a16_matmul(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), weight)
        tensor([[-7.0000, -3.5000]])

        A norm between two products, h += y · Wᵀ and rms_norm(h) · Wᵀ, without a step of its own:

        >>> r = Residual.of(torch.ones(1, 2), weight=torch.ones(2))
        >>> w4a16_matmul(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), weight, add_to=r)
        tensor([[-6.0000, -2.5000]])
        >>> after = pack_w4(torch.tensor([[9, 8]], dtype=torch.uint8), torch.ones(1, 1))
        >>> w4a16_matmul(r.x, after, norm_of=Norm(r.squares, eps=0.0))
        tensor([[-1.3054]])
    """
    what = "must be a PackedW4, such as QuantLinear's `packed`"
    require_type(isinstance(weight, PackedW4), OWNER, "weight", what, weight)
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
    wants_grad = wants_grad and torch.is_grad_enabled()
    by_operation = kernel and torch.compiler.is_compiling()
    if norm_of is not None or add_to is not None:
        what = "must be False with norm_of or add_to"
        require(not batch_invariant, OWNER, "batch_invariant", what, True)
        norm, residual = checked(OWNER, x, weight, bias, out, norm_of, add_to)
        if not by_operation:
            y = multiply_normed(rows, weight, bias, out, chained, kernel, norm, residual)
        elif residual is None:
            y = operation(rows, weight, bias, weight.gated, False, chained, kernel, norm)
        else:
            operation_adding(rows, weight, bias, chained, kernel, norm, residual)
    elif wants_grad:
        y = operation(rows, weight, bias, False, batch_invariant, chained, kernel)
        y = woven_silu(y) if weight.gated else y
    elif not kernel:
        y = w4a16_reference(rows, weight, bias)
    elif by_operation:
        y = operation(rows, weight, bias, weight.gated, batch_invariant, chained, kernel)
    else:
        y = by_kernels(rows, weight, bias, out, batch_invariant, chained)
    if add_to is not None:
        return add_to.h
    y = y if len(shape) == 2 else y.view(shape)
    if out is None:
        return y
    if torch.compiler.is_compiling() or y.data_ptr() != out.data_ptr():
        return out.copy_(y)
    filled_by_kernel(out)
    return out


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
