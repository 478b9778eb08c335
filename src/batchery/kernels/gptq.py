# SPDX-License-Identifier: Apache-2.0
"""One block of GPTQ: columns are rounded one by one, and each corrects those that follow.

When to use: inside `batchery.compress.quant.GPTQ`, which makes the factor and the grids and carries
the errors to the columns after the block.

Weights lie transposed: row i of `w` is column i of the layer, one number for each output. With the
upper factor U of the inverse Hessian, for i = 0, 1, …:

    q_i = clamp(round(w_i / s) + z, 0, 15)
    e_i = (w_i - s·(q_i - z)) / U[i, i]
    w_j ← w_j - U[i, j]·e_i                      for j > i in the block

Outputs do not meet, so a Triton program keeps the block of 32 of them in registers and goes through
its columns without leaving it.

Reference: Frantar et al., GPTQ, arXiv 2210.17323.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from batchery._core.validate import one_of
from batchery.kernels.multi_tensor import on_its_device, tl, triton

__all__ = ["round_block", "round_block_reference"]

Impl = Literal["auto", "torch", "triton"]

OUTPUTS = 32  # of a program: one warp, so that no column waits for a barrier
MIDDLE, HIGHEST = 8, 15
INTEGER = 1.5 * 2**23  # float32 numbers near it are whole: adding it rounds half to even


def round_block(
    w: Tensor,
    factor: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    groups: Tensor,
    *,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Round a block of columns, carrying each one's error to the others.

    Args:
        w: floating `(B, N)`, dense; e is written over it. The kernel takes float32.
        factor: `(B, B)`, of which the upper triangle counts; its rows are dense.
        scales: `(groups, N)`, dense, in w's dtype.
        zeros: uint8 `(groups, N)`, dense, or None where every zero is 8.
        groups: int32 `(B,)`, the row of `scales` that a column takes.
        impl: "triton", "torch", or the first that can run.

    Returns:
        q uint8 `(B, N)`, and e `(B, N)`, which is w.

    Raises:
        RuntimeError: `impl="triton"` where the kernel cannot run.

    Examples:
        >>> w, factor = torch.tensor([[1.4], [2.0]]), torch.tensor([[1.0, 0.5], [0.0, 2.0]])
        >>> q, e = round_block(w, factor, torch.ones(1, 1), None, torch.zeros(2, dtype=torch.int32))
        >>> q.tolist(), e  # 1.4 gives 1; then 2 - 0.5·0.4 = 1.8 gives 2
        ([[9], [10]], tensor([[ 0.4000], [-0.1000]]))
    """
    one_of("round_block", "impl", impl, ("auto", "torch", "triton"))
    can = triton is not None and w.is_cuda and w.dtype == torch.float32
    if impl == "triton" and not can:
        what = "Triton is not installed" if triton is None else "no kernel"
        raise RuntimeError(f"round_block: {what} for {w.dtype} on {w.device}")
    if can and impl != "torch":
        with on_its_device(w):
            return launch(w, factor, scales, zeros, groups)
    return round_block_reference(w, factor, scales, zeros, groups)


def round_block_reference(
    w: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor | None, groups: Tensor
) -> tuple[Tensor, Tensor]:
    """Torch form, for any floating dtype; e lies where w was."""
    s = scales[groups]
    z = torch.full_like(s, MIDDLE) if zeros is None else zeros[groups].to(w.dtype)
    q = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    for i, column in enumerate(w):
        code = (column / s[i]).round_().add_(z[i]).clamp_(0, HIGHEST)
        q[i] = code
        column.sub_(code.sub_(z[i]).mul_(s[i])).div_(factor[i, i])
        w[i + 1 :].addr_(factor[i, i + 1 :], column, alpha=-1)
    return q, w


def launch(
    w: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor | None, groups: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the Triton kernel; e lies where w was."""
    columns, n = w.shape
    q = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    grid = (triton.cdiv(n, OUTPUTS),)
    shared: dict[str, Any] = {"OUTPUTS": OUTPUTS, "num_warps": 1}
    shared |= {"MIDDLE": MIDDLE, "HIGHEST": HIGHEST, "INTEGER": INTEGER}
    block = max(16, triton.next_power_of_2(columns))
    stride = factor.stride(0)
    _round_block[grid](
        w, factor, scales, zeros, groups, q, n, columns, stride, BLOCK=block, **shared
    )
    return q, w


if triton is not None:

    @triton.jit
    def _round_block(
        w, factor, scales, zeros, groups, q, n, columns, stride,
        BLOCK: tl.constexpr, OUTPUTS: tl.constexpr,
        MIDDLE: tl.constexpr, HIGHEST: tl.constexpr, INTEGER: tl.constexpr,
    ):  # fmt: skip
        """Round the columns of OUTPUTS outputs."""
        outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        here = outputs < n
        lanes = tl.arange(0, BLOCK)
        inside = (lanes < columns)[:, None] & here[None, :]
        tile = tl.load(w + lanes[:, None] * n + outputs[None, :], mask=inside, other=0.0)
        for i in range(columns):
            group = tl.load(groups + i)
            s = tl.load(scales + group * n + outputs, mask=here, other=1.0)
            if zeros is None:
                z = tl.full([OUTPUTS], MIDDLE, tl.float32)
            else:
                z = tl.load(zeros + group * n + outputs, mask=here, other=0).to(tl.float32)
            ahead = (lanes > i) & (lanes < columns)
            later = tl.load(factor + i * stride + lanes, mask=ahead, other=0.0)
            pivot = tl.load(factor + i * stride + i)
            column = tl.sum(tl.where((lanes == i)[:, None], tile, 0.0), 0)
            level = tl.minimum(tl.maximum(tl.div_rn(column, s), -32.0), 32.0)
            level = (level + INTEGER) - INTEGER
            code = tl.minimum(tl.maximum(level + z, 0.0), HIGHEST)
            error = tl.div_rn(column - s * (code - z), pivot)
            tile -= later[:, None] * error[None, :]
            tl.store(q + i * n + outputs, code.to(tl.uint8), mask=here)
            tl.store(w + i * n + outputs, error, mask=here)
