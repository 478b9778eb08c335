# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of four-bit weights: one output tile a program, columns split among programs.

See `batchery.kernels.w4a16` for the equations and for what to call, `w4a16_layout` for the words.

A program sums yᵀ over its part of the columns for a tile of rows of W and rows of x. Words reach
shared memory by asynchronous copies, registers by matrix loads (16-bit words have the shape of
16-bit operands), and four bits become 16 there: two nibbles of a pair of words in one bit operation
and one multiply-add each. The matrix instruction takes them from registers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchery.kernels.multi_tensor import on_its_device, tl, triton
from batchery.kernels.w4a16_layout import NIBBLES, PackedW4

__all__ = ["Runners", "Tile", "aligned", "dequantize_tiles", "launch", "run"]


class Tile(NamedTuple):
    """How one program works.

    Attributes:
        batch: rows of x, a power of two from 8.
        rows: rows of W, a power of two from 64.
        step: words of a row in a loop turn: J, or half of it.
        warps: 4 or 8.
        stages: depth of the pipeline.
        scale_weights: multiply the weights by the scales, not the sums.
    """

    batch: int
    rows: int
    step: int = 64
    warps: int = 4
    stages: int = 4
    scale_weights: bool = False


def launch(
    x: Tensor,
    weight: PackedW4,
    tile: Tile,
    split: int = 1,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply by the Triton kernel: x `(M, K)`, its last dimension dense, M > 0."""
    (m, k), (n, _) = x.shape, weight.shape
    words, scales, zeros, counters = weight.words, weight.scales, weight.zeros, weight.counters
    if out is None:
        out = x.new_empty(m, n // 2 if weight.gated else n)
    asm = x.is_cuda and torch.version.hip is None
    groups, rows = scales.shape
    _, blocks, _, lanes = words.shape
    sizes = (m, n, k, rows, blocks, lanes, groups, counters.shape[0])
    kinds = (weight.group_size, weight.gated, zeros is not None, x.dtype if asm else None)
    call = _prepared(*sizes, *kinds, tile, split)
    partials = None
    if call.partials:
        partials = torch.empty(call.partials, dtype=torch.float32, device=x.device)
    strides = (x.stride(0), out.stride(0))
    key = (x.get_device(), *strides, scales.dtype, None if bias is None else bias.dtype)
    tensors = (x, words, scales, zeros, bias, out, partials, counters)
    arguments = (*tensors, *strides, *call.numbers, *call.constants)
    with on_its_device(x):
        known = call.runners if aligned(weight, x, out, bias) else {}
        run(_w4a16, known, key, call.programs, arguments, call.options)
    return out


Runners = dict[Any, Callable[..., Any]]


def run(
    kernel: Any,
    runners: Runners,
    key: tuple[Any, ...],
    programs: int,
    arguments: tuple[Any, ...],
    options: dict[str, int],
) -> None:
    """Launch a kernel; again without Triton's search for its compiled form, 40 µs of the host.

    Args:
        kernel: to launch.
        runners: compiled forms that differ by nothing but their key; filled here.
        key: all that Triton compiles for and that is not the same for all of `runners`.
        programs: how many.
        arguments: of the kernel, constants too, in its order.
        options: warps and the like.
    """
    runner = runners.get((programs, key))
    if runner is not None:
        runner(*arguments)
        return
    form = kernel[(programs,)](*arguments, **options)
    if form is not None:  # Triton's interpreter has none
        runners[programs, key] = form[(programs, 1, 1)]


def aligned(weight: PackedW4, x: Tensor, out: Tensor, bias: Tensor | None) -> bool:
    """Say whether all begin at multiples of 16 bytes, which Triton compiles for."""
    bits = weight.begins | x.data_ptr() | out.data_ptr()
    return (bits if bias is None else bits | bias.data_ptr()) % 16 == 0


@dataclass(frozen=True)
class _Call:
    """What is the same in every launch of one shape.

    Attributes:
        programs: how many.
        partials: float32 numbers of their sums, 0 where columns are not split.
        numbers: the kernel's integers after the strides.
        constants: what is known at compile time.
        options: warps and stages.
        runners: compiled forms, see `run`.
    """

    programs: int
    partials: int
    numbers: tuple[int, ...]
    constants: tuple[Any, ...]
    options: dict[str, int]
    runners: Runners


@lru_cache(maxsize=4096)
def _prepared(
    m: int, n: int, k: int, rows: int, blocks: int, lanes: int, groups: int, counters: int,
    group_size: int, gated: bool, asymmetric: bool, dtype: torch.dtype | None,
    tile: Tile, split: int,
) -> _Call:  # fmt: skip
    """Return the launch of one shape; `dtype` is None where there is no assembly."""
    step = min(tile.step, lanes)
    m_tiles = triton.cdiv(m, tile.batch)
    tiles = rows // tile.rows * m_tiles
    steps = blocks * lanes // step
    split = min(split, steps) if tiles <= counters else 1
    one_group = groups == 1
    scaled = tile.scale_weights and not one_group
    low, high = (
        "" if dtype is None else nibble_asm(dtype, high, asymmetric, scaled)
        for high in (False, True)
    )
    numbers = (m, n, k, rows, steps, m_tiles, split)
    constants = {
        "GROUP": 0 if one_group else group_size,
        "J": lanes,
        "STEP": step,
        "BATCH": tile.batch,
        "ROWS": tile.rows,
        "SCALE_WEIGHTS": tile.scale_weights,
        "GATED": gated,
        "EVEN": k == blocks * NIBBLES * lanes,
        "LOW": low,
        "HIGH": high,
        "STAGES": tile.stages,
    }
    return _Call(
        programs=tiles * split,
        partials=tiles * split * tile.batch * tile.rows if split > 1 else 0,
        numbers=numbers,
        constants=tuple(constants.values()),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
        runners={},
    )


def dequantize_tiles(weight: PackedW4, dtype: torch.dtype) -> Tensor:
    """Return the weight `(N, K)` in `dtype`, rows as they lie (woven where it is gated)."""
    n, k = weight.shape
    chunks, blocks, _, lanes = weight.words.shape
    out = torch.empty(n, k, dtype=dtype, device=weight.words.device)
    with on_its_device(out):
        _dequantize[(blocks, chunks)](
            weight.words,
            weight.scales,
            weight.zeros,
            out,
            n,
            k,
            weight.rows,
            GROUP=0 if len(weight.scales) == 1 else weight.group_size,
            J=lanes,
            num_warps=4,
        )
    return out


@cache
def nibble_asm(dtype: torch.dtype, high: bool, asymmetric: bool, scaled: bool) -> str:
    """Return PTX that turns two words into the pairs of two of their nibbles.

    A nibble under the exponent of a large power of two is an exact float: 0x6400 | q is 1024 + q in
    float16, and four bits higher 1024 + 16q; 0x4300 | q is 128 + q in bfloat16. One subtraction, or
    one fused multiply-add, leaves q - z exact.

    Operands: two outputs, the words, then -(1024 + z) and -(64 + z) (bfloat16: twice -(128 + z)) if
    asymmetric, then two scales if scaled; all in pairs.
    """
    lines = []
    for out in range(2):
        offset = f"${3 + out}" if asymmetric else ""
        scale = f"${(5 if asymmetric else 3) + out}" if scaled else ""
        lines += nibble_lines(dtype, 2 * high + out, f"${out}", "$2", offset, scale)
    return ptx(lines)


def nibble_lines(
    dtype: torch.dtype, place: int, output: str, words: str, offset: str, scale: str
) -> list[str]:
    """Return PTX that turns a pair of words into the pair of their nibbles `place`, 0 to 3.

    See `nibble_asm`. The operands are named; without `offset` the zero is 8.
    """
    odd = place % 2 == 1
    if dtype == torch.float16:
        kind, magic, shift, mask = "f16x2", "0x64006400", place // 2 * 8, "F0" if odd else "0F"
        factor, constant = ("0x2C002C00", "0xD480D480") if odd else ("0x3C003C00", "0xE408E408")
    else:
        kind, magic, shift, mask = "bf16x2", "0x43004300", 4 * place, "0F"
        factor, constant = "0x3F803F80", "0xC308C308"
    lines = [
        f"mov.b32 f, {factor};",
        f"mov.b32 c, {offset or constant};",
        f"shr.u32 w, {words}, {shift};",
        f"lop3.b32 w, w, 0x00{mask}00{mask}, {magic}, 0xEA;",
        f"fma.rn.{kind} {'w' if scale else output}, w, f, c;",
    ]
    if scale:  # by a multiply-add, for there is no bfloat16 product before sm_90
        lines += [f"fma.rn.{kind} {output}, w, {scale}, n;"]
    return lines


def ptx(lines: list[str]) -> str:
    """Return lines of `nibble_lines` with the registers that they use; n is -0."""
    head = [".reg .b32 w, f, c, s, n;", "mov.b32 n, 0x80008000;"]
    return "{\n" + "\n".join(head + lines) + "\n}"


if triton is not None:

    @triton.jit
    def _pair(ASM: tl.constexpr, FORM: tl.constexpr, operands, D: tl.constexpr):
        if D == tl.float16:  # the tuple of types must be spelt out
            return tl.inline_asm_elementwise(
                ASM, FORM, operands, (tl.float16, tl.float16), is_pure=True, pack=2
            )
        else:
            return tl.inline_asm_elementwise(
                ASM, FORM, operands, (tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
            )

    @triton.jit
    def _weights(words, zeros, scales, PLACE: tl.constexpr, ASM: tl.constexpr, D: tl.constexpr):
        """Return nibbles PLACE and PLACE + 1 as q - z, times the scale where there are scales."""
        if ASM == "":
            first = ((words >> (4 * PLACE)) & 15).to(D)
            second = ((words >> (4 * PLACE + 4)) & 15).to(D)
            if zeros is None:
                first -= 8
                second -= 8
            else:
                first -= zeros[PLACE].to(D)[:, None]
                second -= zeros[PLACE + 1].to(D)[:, None]
            if scales is not None:
                first *= scales[PLACE].to(D)[:, None]
                second *= scales[PLACE + 1].to(D)[:, None]
            return first, second
        elif zeros is None and scales is None:
            return _pair(ASM, "=&r,=&r,r", (words,), D)
        elif zeros is None:
            a = scales[PLACE].to(D)[:, None]
            b = scales[PLACE + 1].to(D)[:, None]
            return _pair(ASM, "=&r,=&r,r,r,r", (words, a, b), D)
        else:
            LIFT: tl.constexpr = 64 if D == tl.float16 else 128  # what a nibble's magic adds
            FIRST: tl.constexpr = 1024 if D == tl.float16 else 128
            low = (-FIRST - zeros[PLACE].to(D))[:, None]
            high = (-LIFT - zeros[PLACE + 1].to(D))[:, None]
            if scales is None:
                return _pair(ASM, "=&r,=&r,r,r,r", (words, low, high), D)
            else:
                a = scales[PLACE].to(D)[:, None]
                b = scales[PLACE + 1].to(D)[:, None]
                return _pair(ASM, "=&r,=&r,r,r,r,r,r", (words, low, high, a, b), D)

    @triton.jit
    def _group_rows(at, block, stride, COUNT: tl.constexpr):
        """Load a row of scales or zeros for each nibble of a block that has COUNT groups."""
        at += block * (COUNT * stride)
        a = tl.load(at)
        if COUNT == 1:
            return a, a, a, a
        b = tl.load(at + stride)
        if COUNT == 2:
            return a, a, b, b
        return a, b, tl.load(at + 2 * stride), tl.load(at + 3 * stride)

    @triton.jit
    def _activations(at, column, inside, lane, K, J: tl.constexpr, EVEN: tl.constexpr):
        """Load the columns of x that meet one nibble, `(STEP, BATCH)`."""
        if EVEN:
            return tl.load(at + column, mask=inside, other=0.0)
        else:
            return tl.load(at + column, mask=inside & (column + lane < K)[:, None], other=0.0)

    @triton.jit
    def _settle(acc):
        """Do nothing, with a use of acc that makes the matrix instructions end in this turn.

        Left in flight to the next turn, they are serialised by the assembler.
        """
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [acc], tl.float32, True, 1)

    @triton.jit
    def _finish(
        acc, scales, bias, out, n_tile, m, inside, N, out_stride,
        GROUP: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, GATED: tl.constexpr,
    ):  # fmt: skip
        """Write acc `(ROWS, BATCH)` to its place in out `(M, N)`."""
        n = n_tile * ROWS + tl.arange(0, ROWS)
        if GROUP == 0:
            acc *= tl.load(scales + n).to(tl.float32)[:, None]
        if bias is not None:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        if GATED:
            pairs = tl.permute(tl.reshape(acc, [ROWS // 2, 2, BATCH]), (0, 2, 1))
            gate, up = tl.split(pairs)
            acc = gate / (1 + tl.exp(-gate)) * up
            n = n_tile * (ROWS // 2) + tl.arange(0, ROWS // 2)
            N = N // 2
        at = out + m.to(tl.int64)[None, :] * out_stride + n[:, None]
        tl.store(at, acc.to(out.dtype.element_ty), mask=inside & (n < N)[:, None])

    @triton.jit
    def _part(sums, spot, inside, other, split, SIZE: tl.constexpr):
        """Load a part's sums; zeros after the last part."""
        at = sums + other * SIZE + spot
        return tl.load(at, mask=inside & (other < split), other=0.0, cache_modifier=".cg")

    @triton.jit
    def _deliver(
        acc, partials, counters, tile, part, split, scales, bias, out, n_tile, m, N,
        inside, out_stride,
        GROUP: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, GATED: tl.constexpr,
    ):  # fmt: skip
        """Write a tile; of one in parts, the program that comes last adds them up in order."""
        if split == 1:
            _finish(
                acc, scales, bias, out, n_tile, m, inside, N, out_stride, GROUP, BATCH, ROWS, GATED
            )
        else:
            row = tl.arange(0, ROWS)
            spot = tl.arange(0, BATCH)[None, :] * ROWS + row[:, None]
            sums = partials + tile.to(tl.int64) * split * (BATCH * ROWS)
            tl.store(sums + part * (BATCH * ROWS) + spot, acc, mask=inside)
            tl.debug_barrier()  # every thread's sums come before this program's count
            if tl.atomic_add(counters + tile, 1, sem="acq_rel") == split - 1:
                acc = tl.zeros([ROWS, BATCH], tl.float32)
                # Four at a time are on their way together; they are added one after another.
                for other in range(0, split, 4):
                    a = _part(sums, spot, inside, other, split, BATCH * ROWS)
                    b = _part(sums, spot, inside, other + 1, split, BATCH * ROWS)
                    c = _part(sums, spot, inside, other + 2, split, BATCH * ROWS)
                    d = _part(sums, spot, inside, other + 3, split, BATCH * ROWS)
                    acc = acc + a + b + c + d
                tl.store(counters + tile, 0)
                _finish(
                    acc, scales, bias, out, n_tile, m, inside, N, out_stride,
                    GROUP, BATCH, ROWS, GATED,
                )  # fmt: skip

    @triton.jit(do_not_specialize=["M", "steps"])
    def _w4a16(
        x, words, scales, zeros, bias, out, partials, counters,
        x_stride, out_stride, M, N, K, padded, steps, m_tiles, split,
        GROUP: tl.constexpr, J: tl.constexpr, STEP: tl.constexpr,
        BATCH: tl.constexpr, ROWS: tl.constexpr, SCALE_WEIGHTS: tl.constexpr,
        GATED: tl.constexpr, EVEN: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
        STAGES: tl.constexpr,
    ):  # fmt: skip
        """Sum one output tile `(ROWS, BATCH)` of yᵀ over one of `split` parts of the columns."""
        D: tl.constexpr = x.dtype.element_ty
        PARTS: tl.constexpr = J // STEP
        COUNT: tl.constexpr = 4 * J // GROUP if GROUP else 1  # groups of a block
        SPAN: tl.constexpr = 4 // COUNT  # nibbles of a group
        SCALED: tl.constexpr = SCALE_WEIGHTS and GROUP != 0
        tile = tl.program_id(0) // split
        part = tl.program_id(0) % split
        n_tile = tile // m_tiles
        first = part * steps // split
        last = (part + 1) * steps // split
        blocks = steps // PARTS
        row = tl.arange(0, ROWS)
        lane = tl.arange(0, STEP)
        m = tile % m_tiles * BATCH + tl.arange(0, BATCH)
        inside = (m < M)[None, :]
        word_base = words + n_tile.to(tl.int64) * (ROWS * J) * blocks
        word_at = (
            word_base + (row // 64 * (blocks * 64 * J) + row % 64 * J)[:, None] + lane[None, :]
        )
        x_at = x + m.to(tl.int64)[None, :] * x_stride + lane[:, None]
        scale_at = scales + n_tile * ROWS + row
        scale = None
        if GROUP and not SCALED:
            scale = _group_rows(scale_at, first // PARTS, padded, COUNT)
        acc = tl.zeros([ROWS, BATCH], tl.float32)
        for turn in tl.range(first, last, num_stages=STAGES):
            block = turn // PARTS
            column = block * (4 * J) + turn % PARTS * STEP
            own = scale
            if GROUP and not SCALED:  # one turn early
                scale = _group_rows(
                    scale_at, tl.minimum(turn + 1, last - 1) // PARTS, padded, COUNT
                )
            elif GROUP:
                own = _group_rows(scale_at, block, padded, COUNT)
            zero = None
            if zeros is not None:
                zero = _group_rows(zeros + n_tile * ROWS + row, block * (GROUP != 0), padded, COUNT)
            w = tl.load(word_at + (block * (64 * J) + turn % PARTS * STEP))
            x0 = _activations(x_at, column, inside, lane, K, J, EVEN)
            x1 = _activations(x_at, column + J, inside, lane, K, J, EVEN)
            x2 = _activations(x_at, column + 2 * J, inside, lane, K, J, EVEN)
            x3 = _activations(x_at, column + 3 * J, inside, lane, K, J, EVEN)
            tiles = (x0, x1, x2, x3)
            total = acc
            for i in tl.static_range(0, 4):
                if i == 0:
                    low, high = _weights(w, zero, own if SCALED else None, 0, LOW, D)
                if i == 2:
                    low, high = _weights(w, zero, own if SCALED else None, 2, HIGH, D)
                if i % 2 == 0:
                    left = low
                else:
                    left = high
                if SCALE_WEIGHTS:
                    acc = tl.dot(left, tiles[i], acc)
                else:
                    if i % SPAN == 0:
                        total = tl.dot(left, tiles[i])
                    else:
                        total = tl.dot(left, tiles[i], total)
                    if i % SPAN == SPAN - 1:
                        if GROUP:
                            total *= own[i].to(tl.float32)[:, None]  # type: ignore[index]
                        acc += total
            if SCALE_WEIGHTS and LOW != "":
                acc = _settle(acc)
        _deliver(
            acc, partials, counters, tile, part, split, scales, bias, out, n_tile, m, N,
            inside, out_stride, GROUP, BATCH, ROWS, GATED,
        )  # fmt: skip

    @triton.jit
    def _dequantize(words, scales, zeros, out, N, K, padded, GROUP: tl.constexpr, J: tl.constexpr):
        """Write the 16-bit weights of one chunk and block."""
        block = tl.program_id(0)
        chunk = tl.program_id(1)
        row = tl.arange(0, 64)
        lane = tl.arange(0, J)
        n = chunk * 64 + row
        base = words + (chunk.to(tl.int64) * tl.num_programs(0) + block) * (64 * J)
        w = tl.load(base + row[:, None] * J + lane[None, :])
        for i in tl.static_range(0, 4):
            column = block * (4 * J) + i * J
            group = column // GROUP if GROUP else 0
            value = ((w >> (4 * i)) & 15).to(tl.float32)
            if zeros is None:
                value -= 8.0
            else:
                value -= tl.load(zeros + group * padded + n).to(tl.float32)[:, None]
            value *= tl.load(scales + group * padded + n).to(tl.float32)[:, None]
            at = out + n.to(tl.int64)[:, None] * K + (column + lane)[None, :]
            inside = (n < N)[:, None] & (column + lane < K)[None, :]
            tl.store(at, value.to(out.dtype.element_ty), mask=inside)
