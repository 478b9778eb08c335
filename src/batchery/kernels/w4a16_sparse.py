# SPDX-License-Identifier: Apache-2.0
"""Activations in 16 bits times weights in 4 of which two in every four are zero: y = x · Wᵀ.

When to use: matmuls of up to 64 rows with a 2:4 weight packed by `pack_sparse_w4`, to hold it in
0.39 bytes a weight rather than 0.52. When not: for speed. Zeros are multiplied like all others, and
rebuilding words costs what reading less saves: with groups of 128 on an H100 it takes 0.95 to 1.05
of the time of `w4a16_matmul` at one row, 1.03 to 1.5 times as long at 16, 1.25 to 1.5 at 32.

    w[n, k] = s[n, g(k)] · (q[n, k] - 8)             at most two of columns 4c…4c+3 have q ≠ 8
    yᵀ[N, M] = Σ_g s[:, g] · ((q - 8)[:, g] · x[:, g]ᵀ)      over groups g of G columns

A program reads 3/8 of a byte a weight and rebuilds in registers words of four nibbles like those of
the dense kernel, see `w4a16_sparse_layout`; the rest, with the split of the columns and the sums in
float32 that are added in order, is as in `w4a16`. Groups of 32 and 64 columns scale the weights.

The lanes of a word meet every fourth column of x. Either a program takes four neighbours as one
number of 64 bits and cuts it in registers, or x is brought in the order of the lanes before the
launch (`arrange`): one small kernel more, and none where layers before give that order.

Reference: Frantar et al., MARLIN, arXiv 2408.11743 (2024), section on sparsity. Theirs feeds values
and places to the sparse matrix instruction, which Triton does not reach; here sparsity saves
reading, not arithmetic.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from batchery._core.validate import require
from batchery.kernels.multi_tensor import on_its_device, processors_of, tl, triton
from batchery.kernels.w4a16 import Impl, by_triton, check_arguments
from batchery.kernels.w4a16_plan import best_split
from batchery.kernels.w4a16_sparse_layout import (
    LANES,
    UNIT,
    PackedSparseW4,
    arrange,
    dequantize_sparse_w4,
)
from batchery.kernels.w4a16_tiles import Tile, nibble_asm

__all__ = ["expansion_asm", "launch", "plan", "w4a16_sparse_matmul"]

OWNER = "w4a16_sparse_matmul"
MOST_BATCH = 64

# For batches of at most so many rows: the tile (its `step` and `scale_weights` do not count), the
# programs of it that a processor holds, and whether x is arranged before. Measured, but not swept.
TILES = (
    (8, Tile(8, 64, stages=3), 3, False),
    (16, Tile(16, 64, stages=3), 3, False),
    (32, Tile(32, 64, stages=2), 2, True),
    (MOST_BATCH, Tile(64, 128, warps=8, stages=2), 1, True),
)
LOST, ADDED = 1, 0.5  # in turns: what a program loses at its ends, and what adding a part costs


def w4a16_sparse_matmul(
    x: Tensor,
    weight: PackedSparseW4,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Multiply activations by a 2:4 weight of four bits.

    Args:
        x: `(..., K)`, float16, bfloat16 or float32; the Triton kernel takes the first two.
        weight: made by `pack_sparse_w4`, on x's device.
        bias: `(N,)`.
        out: where the result goes, `(..., N)`, dense.
        impl: "triton" (no gradient), "torch" (dequantises), or the first that can run; above 64
            rows, and where a gradient is asked for, "auto" is "torch".

    Returns:
        x · Wᵀ + bias in x's dtype; summed in float32 by the kernel.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
        RuntimeError: `impl="triton"` where the kernel cannot run.

    Examples:
        >>> from batchery.kernels.w4a16_sparse_layout import pack_sparse_w4
        >>> q = torch.tensor([[9, 8, 8, 6]] * 2, dtype=torch.uint8)
        >>> weight = pack_sparse_w4(q, torch.tensor([[1.0], [0.5]]))
        >>> w4a16_sparse_matmul(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), weight)
        tensor([[-7.0000, -3.5000]])
    """
    n, k = weight.shape
    check_arguments(OWNER, x, weight.shape, weight.words.device, bias, impl)
    bias = None if bias is None else bias.to(x.dtype)
    shape = (*x.shape[:-1], n)
    if out is not None:
        fits = out.shape == shape and out.dtype == x.dtype and out.is_contiguous()
        require(fits, OWNER, "out", f"must be {shape}, dense, {x.dtype}", tuple(out.shape))
    rows = x.reshape(-1, k)
    learns = x.requires_grad or (bias is not None and bias.requires_grad)
    few = len(rows) <= MOST_BATCH and not (learns and torch.is_grad_enabled())
    if not (by_triton(OWNER, rows, impl) and (few or impl == "triton")):
        y = F.linear(rows, dequantize_sparse_w4(weight, x.dtype), bias).view(shape)
        return y if out is None else out.copy_(y)
    y = rows.new_empty(len(rows), n) if out is None else out.view(-1, n)
    units, processors = weight.words.shape[1], processors_of(x.device)
    for part, place in zip(rows.split(MOST_BATCH), y.split(MOST_BATCH), strict=True):
        if len(part):
            tile, split, arranged = plan(len(part), weight.scales.shape[1], units, processors)
            part = arrange(part, units) if arranged else part
            launch(part, weight, tile, split, arranged=arranged, bias=bias, out=place)
    return y.view(shape) if out is None else out


@lru_cache(maxsize=4096)
def plan(batch: int, rows: int, units: int, processors: int) -> tuple[Tile, int, bool]:
    """Choose the tile, the parts that columns are split in, and whether x is arranged.

    See `w4a16.plan`.

    Args:
        batch: rows of x, at most 64.
        rows: rows of W, with padding.
        units: units of columns.
        processors: of the device.
    """
    _, tile, held, arranged = next(entry for entry in TILES if batch <= entry[0])
    _, split = best_split(rows // tile.rows, units, processors * held, LOST, ADDED)
    return tile, split, arranged


def launch(
    x: Tensor,
    weight: PackedSparseW4,
    tile: Tile,
    split: int = 1,
    *,
    arranged: bool = False,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply by the Triton kernel.

    Args:
        x: `(M, K)` in 16 bits, M > 0; or what `arrange` returns, in any floating dtype.
        weight: the weight.
        tile: how a program works.
        split: parts of the columns.
        arranged: whether x comes from `arrange`.
        bias: `(N,)` in x's dtype.
        out: `(M, N)`, rows dense.
    """
    m, (n, k) = len(x), weight.shape
    out = x.new_empty(m, n) if out is None else out
    if not arranged:
        whole = x.stride(1) == 1 and x.stride(0) % 4 == 0 and x.data_ptr() % 8 == 0
        x = (x if whole else x.clone(memory_format=torch.contiguous_format)).view(torch.int64)
    groups, rows = weight.scales.shape
    units = weight.words.shape[1]
    m_tiles = triton.cdiv(m, tile.batch)
    tiles = rows // tile.rows * m_tiles
    split = min(split, units) if tiles <= len(weight.counters) else 1
    numbers = tiles * split * tile.batch * tile.rows if split > 1 else 0
    partials = x.new_empty(numbers, dtype=torch.float32) if numbers else None
    asm = x.is_cuda and torch.version.hip is None
    constants: dict[str, Any] = {
        "GROUP": 0 if groups == 1 else weight.group_size,
        "LANES": LANES,
        "BATCH": tile.batch,
        "ROWS": tile.rows,
        "ARRANGED": arranged,
        "EVEN": k == units * UNIT,
        "FIRST": expansion_asm(0) if asm else "",
        "SECOND": expansion_asm(1) if asm else "",
        "LOW": nibble_asm(out.dtype, False, False, False) if asm else "",
        "HIGH": nibble_asm(out.dtype, True, False, False) if asm else "",
        "STAGES": tile.stages,
    }
    tensors = (x, weight.words, weight.scales, bias, out, partials, weight.counters)
    with on_its_device(x):
        _w4a16_sparse[(tiles * split,)](
            *tensors, x.stride(0), out.stride(0), m, n, k, rows, units, m_tiles, split,
            **constants, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


def expansion_asm(half: int) -> str:
    """Return PTX that turns a pair of words of plane `half`, and of codes, into dense nibbles.

    `prmt` with a code as selector looks up masks of nibbles for four bytes at once: which of
    columns 0 and 1 is kept, and which of 2 and 3. Column 2 takes the value of column 1 where column
    0 is kept, and 3 that of 0 where 1 is: the values with their nibbles swapped. The exclusive or
    that ends each line gives the zero level to what is pruned, and q to what is kept.

    Operands: two outputs, columns 0 and 1 of both runs, and columns 2 and 3; values; codes.
    """
    gather = ("0x4420", "0x4431")[half]  # the codes of two runs in two lanes: 16 bits
    lines = [
        ".reg .b32 s, a, b, w, t;",
        f"prmt.b32 s, $3, 0, {gather};",
        "prmt.b32 a, 0xFFF00F00, 0xFFF00F00, s;",
        "prmt.b32 b, 0x00F0F000, 0x000F0FFF, s;",
        "shr.u32 w, $2, 4;",
        "shl.b32 t, $2, 4;",
        "lop3.b32 w, w, t, 0x0F0F0F0F, 0xE4;",  # the low nibbles of w, the high ones of t
        "lop3.b32 t, a, w, $2, 0xCA;",  # w where a, else the values
        "lop3.b32 $0, $2, a, 0x88888888, 0x6A;",  # (first & second) ^ third
        "lop3.b32 $1, t, b, 0x88888888, 0x6A;",
    ]
    return "{\n" + "\n".join(lines) + "\n}"


if triton is not None:
    from batchery.kernels.w4a16_tiles import _deliver, _group_rows, _weights

    @triton.jit
    def _dense_byte(value, code):
        """Return nibbles 0 and 1, and nibbles 2 and 3, of one four: what `expansion_asm` does."""
        a = value & 15
        b = value >> 4
        k0 = code & 1
        k1 = (code >> 1) & 1
        k2 = code >> 2
        k3 = 2 - k0 - k1 - k2
        low = a * k0 | (b * k1) << 4
        high = tl.where(k0 == 1, b, a) * k2 | (tl.where(k1 == 1, a, b) * k3) << 4
        return low ^ 0x88, high ^ 0x88

    @triton.jit
    def _expand(values, codes, HALF: tl.constexpr, ASM: tl.constexpr):
        """Return words of columns 0 and 1 of two runs, and of columns 2 and 3."""
        if ASM == "":
            value = values.to(tl.int32) & 0xFFFF
            code = codes.to(tl.int32) >> (8 * HALF)
            low0, high0 = _dense_byte(value & 255, code & 7)
            low1, high1 = _dense_byte(value >> 8, (code >> 4) & 7)
            return (low0 | low1 << 8).to(tl.int16), (high0 | high1 << 8).to(tl.int16)
        else:
            return tl.inline_asm_elementwise(
                ASM, "=&r,=&r,r,r", (values, codes), (tl.int16, tl.int16), is_pure=True, pack=2
            )

    @triton.jit
    def _activations(
        at, run, inside, lane, K,
        LANES: tl.constexpr, ARRANGED: tl.constexpr, EVEN: tl.constexpr, D: tl.constexpr,
    ):  # fmt: skip
        """Load what the lanes of a run meet: columns 0, 1, 2 and 3 of fours, `(LANES, BATCH)`."""
        if ARRANGED:
            at += run * (4 * LANES)
            x0 = tl.load(at, mask=inside, other=0.0)
            x1 = tl.load(at + LANES, mask=inside, other=0.0)
            x2 = tl.load(at + 2 * LANES, mask=inside, other=0.0)
            x3 = tl.load(at + 3 * LANES, mask=inside, other=0.0)
            return x0, x1, x2, x3
        else:
            here = inside
            if not EVEN:
                here = inside & (4 * (run * LANES + lane) < K)[:, None]
            four = tl.load(at + run * LANES, mask=here, other=0)
            x0 = four.to(tl.int16).to(D, bitcast=True)
            x1 = (four >> 16).to(tl.int16).to(D, bitcast=True)
            x2 = (four >> 32).to(tl.int16).to(D, bitcast=True)
            x3 = (four >> 48).to(tl.int16).to(D, bitcast=True)
            return x0, x1, x2, x3

    @triton.jit(do_not_specialize=["M", "units"])
    def _w4a16_sparse(
        x, words, scales, bias, out, partials, counters,
        x_stride, out_stride, M, N, K, padded, units, m_tiles, split,
        GROUP: tl.constexpr, LANES: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr,
        ARRANGED: tl.constexpr, EVEN: tl.constexpr,
        FIRST: tl.constexpr, SECOND: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
        STAGES: tl.constexpr,
    ):  # fmt: skip
        """Sum one output tile `(ROWS, BATCH)` of yᵀ over one of `split` parts of the units."""
        D: tl.constexpr = out.dtype.element_ty
        RUN: tl.constexpr = 4 * LANES
        PLANE: tl.constexpr = 64 * LANES
        BY_RUN: tl.constexpr = GROUP >= RUN  # a run has one scale a row
        tile = tl.program_id(0) // split
        part = tl.program_id(0) % split
        n_tile = tile // m_tiles
        first = part * units // split
        last = (part + 1) * units // split
        row = tl.arange(0, ROWS)
        lane = tl.arange(0, LANES)
        m = tile % m_tiles * BATCH + tl.arange(0, BATCH)
        inside = (m < M)[None, :]
        words += n_tile.to(tl.int64) * (ROWS // 64) * units * (3 * PLANE)
        word_at = (row // 64 * (units * (3 * PLANE)) + row % 64 * LANES)[:, None] + lane[None, :]
        word_at = words + word_at
        x_at = x + m.to(tl.int64)[None, :] * x_stride + lane[:, None]
        scale_at = scales + n_tile * ROWS + row
        scale = None
        if BY_RUN:
            scale = _group_rows(scale_at, first, padded, 4 * RUN // GROUP)
        acc = tl.zeros([ROWS, BATCH], tl.float32)
        for unit in tl.range(first, last, num_stages=STAGES):
            own = scale
            if BY_RUN:  # one turn early
                scale = _group_rows(
                    scale_at, tl.minimum(unit + 1, last - 1), padded, 4 * RUN // GROUP
                )
            at = word_at + unit * (3 * PLANE)
            values = (tl.load(at), tl.load(at + PLANE))
            codes = tl.load(at + 2 * PLANE)
            for run in tl.static_range(0, 4):
                if run == 0:
                    low, high = _expand(values[0], codes, 0, FIRST)
                if run == 2:
                    low, high = _expand(values[1], codes, 1, SECOND)
                w0, w1 = _weights(low, None, None, 2 * (run % 2), HIGH if run % 2 else LOW, D)
                w2, w3 = _weights(high, None, None, 2 * (run % 2), HIGH if run % 2 else LOW, D)
                if GROUP and not BY_RUN:
                    group = ((unit * 4 + run) * RUN + 4 * lane) // GROUP
                    s = tl.load(scale_at[:, None] + (group * padded)[None, :]).to(D)
                    w0 *= s
                    w1 *= s
                    w2 *= s
                    w3 *= s
                x0, x1, x2, x3 = _activations(
                    x_at, unit * 4 + run, inside, lane, K, LANES, ARRANGED, EVEN, D
                )
                total = tl.dot(w0, x0)
                total = tl.dot(w1, x1, total)
                total = tl.dot(w2, x2, total)
                total = tl.dot(w3, x3, total)
                if BY_RUN:
                    total *= own[run].to(tl.float32)[:, None]  # type: ignore[index]
                acc += total
        _deliver(
            acc, partials, counters, tile, part, split, scales, bias, out, n_tile, m, N,
            inside, out_stride, GROUP, BATCH, ROWS, False,
        )  # fmt: skip
