# SPDX-License-Identifier: Apache-2.0
"""Four-bit weights times many rows on Hopper: programs whose warps have different trades.

When to use: many rows of x, where the matrix units and not memory are the limit, from 65 on, or 33
for tall weights and large ones with groups below 128 (`w4a16_plan.kernel_of`). When not: fewer
(`w4a16_narrow` reads W faster); other processors than sm_90; x whose rows are not aligned to 16
bytes. `fits` says.

    yᵀ[N, M] = Σ_i w_i · x_iᵀ     over slices of J columns: one nibble of a block of words
    w_i = s·(q_i - z)             in registers, in x's dtype

One warp copies words and activations to shared memory. Two groups of four warps take half of the
output tile each: they turn a slice's nibbles into weights while the matrix instruction of the slice
before runs, and as nothing but full and free buffers binds them to each other, one computes
weights while the other multiplies.

There are as many programs as processors. Each first takes whole tiles, those side by side in time
sharing rows of W and x in the cache; what is left (less than one or two tiles for each program) is
cut in equal stripes of turns, as in MARLIN. A tile that lies in several stripes has float32 sums in
memory, and the program that comes last adds them in order: the same bits in every run.

Reference: Frantar et al., MARLIN, arXiv 2408.11743 (2024); theirs is for Ampere. Ours is written in
Gluon, where a kernel and not the compiler says which warp waits for what.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchery.kernels.multi_tensor import on_its_device
from batchery.kernels.w4a16_layout import CHUNK, NIBBLES, PackedW4
from batchery.kernels.w4a16_tiles import Runners, aligned, nibble_lines, ptx, run

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError:  # no Triton, or one without Gluon
    gluon = None

__all__ = [
    "Share",
    "TensorDescriptor",
    "Wide",
    "barrier",
    "fits",
    "gl",
    "gluon",
    "launch",
    "mbarrier",
    "nibble_asm",
    "slice_weights",
    "swizzled",
    "tma",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]

WIDEST = 128  # rows of x of one matrix instruction here
OPTIONS = {"num_warps": 4, "maxnreg": 168}

# How many whole tiles each program takes, how many tiles are left to be cut, and among how many
# programs; as many as tiles: they are not cut.
Share = tuple[int, int, int]


class Wide(NamedTuple):
    """How a program works.

    Attributes:
        batch: rows of x in an output tile, 32, 64, 128 or 256.
        rows: rows of W, 128 or 256, not both 256.
        turns: of the loop whose activations fit in shared memory.
        words: the same for words.
        registers: of each thread that multiplies.
    """

    batch: int = 128
    rows: int = 256
    turns: int = 2
    words: int = 2
    registers: int = 240


def fits(x: Tensor, weight: PackedW4) -> bool:
    """Say whether the kernel can take x `(M, K)` and this weight."""
    if gluon is None or not x.is_cuda or x.dtype not in (torch.float16, torch.bfloat16):
        return False
    pitch, step = x.stride()
    apart = step == 1 and pitch >= x.shape[1] and pitch % 8 == 0
    aligned = x.data_ptr() % 16 == 0 and weight.words.data_ptr() % 16 == 0
    return apart and aligned and _is_hopper(x.device)


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def launch(
    x: Tensor,
    weight: PackedW4,
    form: Wide,
    share: Share,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply x `(M, K)` by the weight; a gated weight's bias comes woven.

    Args:
        x: `(M, K)`, M > 0; see `fits`.
        weight: on x's device.
        form: how each program works.
        share: what each program does; a cut is among at most 512 programs.
        bias: `(N,)`.
        out: where the result goes.
    """
    (m, k), (n, _) = x.shape, weight.shape
    _, blocks, _, lanes = weight.words.shape
    if out is None:
        out = x.new_empty(m, n // 2 if weight.gated else n)
    m_tiles = -(-m // form.batch)
    tiles = -(-weight.rows // form.rows) * m_tiles
    whole, tail, sharers = share
    programs = (tiles - tail) // whole if whole else sharers
    places = 2 * sharers if sharers != tail else 0
    partials = x.new_empty(max(1, places * form.batch * form.rows), dtype=torch.float32)
    zeros, groups = weight.zeros, len(weight.scales)
    constants, runners = _prepared(
        form, x.dtype, weight.group_size if groups > 1 else 0, zeros is not None, weight.gated
    )
    layout = swizzled(lanes)
    words = weight.words.view(-1, lanes)
    narrow = min(form.batch, WIDEST)
    descriptors = (
        TensorDescriptor(x, [m, k], [x.stride(0), 1], [narrow, lanes], layout),
        TensorDescriptor(words, [*words.shape], [lanes, 1], [CHUNK, lanes], layout),
    )
    tensors = (weight.scales, zeros, bias, out, partials, weight.counters)
    numbers = (m, n, out.stride(0), weight.rows, blocks, m_tiles, whole, tail, sharers)
    kinds = (lanes, weight.scales.dtype, None if bias is None else bias.dtype)
    arguments = (*descriptors, *tensors, *numbers, *constants)
    with on_its_device(x):
        known = runners if aligned(weight, x, out, bias) else {}
        run(_wide, known, (x.get_device(), *kinds, *numbers), programs, arguments, OPTIONS)
    return out


@cache
def swizzled(lanes: int) -> Any:
    """Return the layout in shared memory of rows of so many words."""
    return gl.NVMMASharedLayout(2 * lanes, 16, 2)


@cache
def _prepared(
    form: Wide, dtype: torch.dtype, group: int, asymmetric: bool, gated: bool
) -> tuple[tuple[Any, ...], Runners]:
    """Return the kernel's constants, and its compiled forms."""
    asm = [nibble_asm(dtype, place, asymmetric, group > 0) for place in range(NIBBLES)]
    sizes = (form.batch, form.rows, form.turns, form.words)
    return (group, *sizes, gated, form.registers, *asm), {}


@cache
def nibble_asm(dtype: torch.dtype, place: int, asymmetric: bool, scaled: bool) -> str:
    """Return PTX that turns a pair of words into the weights of nibble `place`, 0 to 3.

    Operands: the output, the words, the negative
    of magic plus zero if asymmetric, the scale if scaled; all in pairs.
    """
    scale = f"${2 + asymmetric}" if scaled else ""
    lines = nibble_lines(dtype, place, "$0", "$1", "$2" if asymmetric else "", scale)
    return ptx(lines)


if gluon is not None:
    barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # Triton 3.6, 3.7

    @gluon.jit
    def _run(ASM: gl.constexpr, FORM: gl.constexpr, operands, T: gl.constexpr):
        if T == gl.float16:  # the type must be spelt out
            return gl.inline_asm_elementwise(ASM, FORM, operands, gl.float16, True, 2)
        else:
            return gl.inline_asm_elementwise(ASM, FORM, operands, gl.bfloat16, True, 2)

    @gluon.jit
    def slice_weights(
        words, s, z, HALF: gl.constexpr, PLACE: gl.constexpr, ASM: gl.constexpr,
        GROUP: gl.constexpr, ASYMMETRIC: gl.constexpr, T: gl.constexpr,
    ):  # fmt: skip
        """Return the weights of one nibble of 64 rows; s and z begin with those of its group."""
        if ASYMMETRIC:
            LIFT: gl.constexpr = 128 if T == gl.bfloat16 else (64 if PLACE % 2 else 1024)
            c = (-LIFT - z[HALF].to(T))[:, None]
            if GROUP:
                return _run(ASM, "=&r,r,r,r", (words, c, s[HALF].to(T)[:, None]), T)
            else:
                return _run(ASM, "=&r,r,r", (words, c), T)
        elif GROUP:
            return _run(ASM, "=&r,r,r", (words, s[HALF].to(T)[:, None]), T)
        else:
            return _run(ASM, "=&r,r", (words,), T)

    @gluon.jit
    def _pieces(blocks, whole, tail, sharers):
        """Return how many pieces of tiles this program has, and where its stripe lies."""
        program = gl.minimum(gl.program_id(0), sharers)
        first = program * (tail * blocks) // gl.maximum(sharers, 1)
        last = gl.minimum(program + 1, sharers) * (tail * blocks) // gl.maximum(sharers, 1)
        cut = (last + blocks - 1) // blocks - first // blocks
        return whole + gl.where(last > first, cut, 0), first, last

    @gluon.jit
    def _piece(j, blocks, whole, first, last):
        """Return the tile of a program's j-th piece, and its blocks."""
        side = gl.num_programs(0)
        cut = first // blocks + j - whole  # among the tiles that are cut
        is_cut = j >= whole
        tile = gl.where(is_cut, whole * side + cut, j * side + gl.program_id(0))
        begin = gl.where(is_cut, gl.maximum(first - cut * blocks, 0), 0)
        end = gl.where(is_cut, gl.minimum(last - cut * blocks, blocks), blocks)
        return tile, begin, end

    @gluon.jit
    def _meeting(cut, blocks, tail, sharers):
        """Return the first and the last program that have a part of a tile that is cut."""
        units = tail * blocks
        first = ((cut * blocks + 1) * sharers - 1) // units
        return first, ((cut + 1) * blocks * sharers - 1) // units

    @gluon.jit
    def _copy(
        x, words, rings, share, m_tiles,
        J: gl.constexpr, BATCH: gl.constexpr, ROWS: gl.constexpr,
        TURNS: gl.constexpr, WORDS: gl.constexpr,
    ):  # fmt: skip
        """Fill the rings: the trade of one warp."""
        x_ring, x_full, x_free, w_ring, w_full, w_free = rings
        blocks, whole, tail, sharers = share
        CHUNKS: gl.constexpr = ROWS // 64
        WIDTH: gl.constexpr = x.block_type.shape[0]
        PARTS: gl.constexpr = BATCH // WIDTH
        pieces, first, last = _pieces(blocks, whole, tail, sharers)
        turn = 0
        for j in range(pieces):
            tile, begin, end = _piece(j, blocks, whole, first, last)
            chunk = tile // m_tiles * CHUNKS
            m = tile % m_tiles * BATCH
            for block in range(begin, end):
                w = turn % WORDS
                mbarrier.wait(w_free.index(w), turn // WORDS & 1 ^ 1)
                mbarrier.expect(w_full.index(w), ROWS * J * 2)
                for c in gl.static_range(CHUNKS):
                    tma.async_copy_global_to_shared(
                        words, [((chunk + c) * blocks + block) * 64, 0], w_full.index(w),
                        w_ring.index(w * CHUNKS + c),
                    )  # fmt: skip
                for i in gl.static_range(4):
                    s = turn % TURNS * 4 + i
                    mbarrier.wait(x_free.index(s), turn // TURNS & 1 ^ 1)
                    mbarrier.expect(x_full.index(s), BATCH * J * 2)
                    for c in gl.static_range(PARTS):
                        tma.async_copy_global_to_shared(
                            x, [m + c * WIDTH, (block * 4 + i) * J], x_full.index(s),
                            x_ring.index(s * PARTS + c),
                        )  # fmt: skip
                turn += 1

    @gluon.jit
    def _rows(at, row, group, groups, padded, SPLIT: gl.constexpr):
        """Load scales or zeros of one group for 64 rows of W, or for 128."""
        at += gl.minimum(group, groups - 1) * padded
        first = gl.load(at + gl.minimum(row, padded - 1))  # the last tile may reach beyond W
        if SPLIT:
            return first, gl.load(at + gl.minimum(row + 64, padded - 1))
        else:
            return (first,)

    @gluon.jit
    def _wait(FLIGHT: gl.constexpr, acc, other, left, HALVES: gl.constexpr):
        """Wait until so many products are left; those of `left` are done then."""
        if HALVES == 2:
            acc, other, left = warpgroup_mma_wait(FLIGHT, (acc, other, left))
        else:
            acc, left = warpgroup_mma_wait(FLIGHT, (acc, left))
        return acc, other, left

    @gluon.jit
    def _finish(
        acc, HALF: gl.constexpr, tensors, shelf, n0, m0, sizes,
        TALL: gl.constexpr, GROUP: gl.constexpr, GATED: gl.constexpr, T: gl.constexpr,
    ):  # fmt: skip
        """Write acc `(64, WIDTH)` of yᵀ to its place in out `(M, N)`, by way of shared memory."""
        scales, _, bias, out, _, _ = tensors
        M, N, out_stride, _, _ = sizes
        WIDTH: gl.constexpr = shelf.shape[0]
        if TALL:
            n0 += HALF * 64
        else:
            m0 += HALF * WIDTH
        n = n0 + gl.arange(0, 64, gl.SliceLayout(1, acc.type.layout))
        if GROUP == 0:
            acc *= gl.load(scales + gl.minimum(n, N - 1)).to(gl.float32)[:, None]
        if bias is not None:
            acc += gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
        shelf.permute((1, 0)).store(acc.to(T))
        LINES: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        PAIRS: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
        y = shelf.load(LINES)
        if GATED:  # gate and up are rounded, as they are in a layer that is not fused
            gate, up = gl.split(gl.reshape(y, [WIDTH, 32, 2]))
            gate = gl.convert_layout(gate, PAIRS).to(gl.float32)
            up = gl.convert_layout(up, PAIRS).to(gl.float32)
            y = (gate / (1 + gl.exp(-gate)) * up).to(T)
            n = n0 // 2 + gl.arange(0, 32, gl.SliceLayout(0, PAIRS))
            m = m0 + gl.arange(0, WIDTH, gl.SliceLayout(1, PAIRS))
            N = N // 2
        else:
            n = n0 + gl.arange(0, 64, gl.SliceLayout(0, LINES))
            m = m0 + gl.arange(0, WIDTH, gl.SliceLayout(1, LINES))
        at = out + m.to(gl.int64)[:, None] * out_stride + n[None, :]
        gl.store(at, y, mask=(m < M)[:, None] & (n < N)[None, :])

    @gluon.jit
    def _multiply(
        rings, shelf, share, tensors, sizes,
        WHO: gl.constexpr, GROUP: gl.constexpr, J: gl.constexpr, BATCH: gl.constexpr,
        ROWS: gl.constexpr, TURNS: gl.constexpr, WORDS: gl.constexpr, GATED: gl.constexpr,
        FORMS: gl.constexpr, T: gl.constexpr,
    ):  # fmt: skip
        """Sum half of each tile: the trade of four warps."""
        WIDTH: gl.constexpr = shelf.shape[0]
        MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
        LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
        COUNT: gl.constexpr = 4 * J // GROUP if GROUP else 1  # groups of a block
        SPAN: gl.constexpr = 4 // COUNT  # nibbles of a group
        TALL: gl.constexpr = ROWS == 256  # two halves by rows of W,
        LONG: gl.constexpr = BATCH == 256  # or by rows of x
        CHUNKS: gl.constexpr = ROWS // 64
        OWN: gl.constexpr = CHUNKS // 2
        PARTS: gl.constexpr = BATCH // WIDTH
        HALVES: gl.constexpr = 2 if TALL or LONG else 1
        WIDE: gl.constexpr = 2 if TALL else 1  # scales of one group
        x_ring, x_full, x_free, w_ring, w_full, w_free = rings
        blocks, whole, tail, sharers = share
        scales, zeros, bias, out, partials, counters = tensors
        M, N, out_stride, padded, m_tiles = sizes
        ASYMMETRIC: gl.constexpr = zeros is not None
        pieces, first, last = _pieces(blocks, whole, tail, sharers)
        groups = blocks * COUNT
        turn = 0
        for j in range(pieces):
            tile, begin, end = _piece(j, blocks, whole, first, last)
            n0 = tile // m_tiles * ROWS + WHO * (64 * OWN)
            m0 = tile % m_tiles * BATCH
            row = n0 + gl.arange(0, 64, gl.SliceLayout(1, LEFT))
            # scales and zeros of this group and the next ones, loaded as they fall free
            s, z = (), ()
            AHEAD: gl.constexpr = COUNT if COUNT > 1 else 2
            if GROUP:
                for g in gl.static_range(AHEAD):
                    s += _rows(scales, row, begin * COUNT + g, groups, padded, TALL)
                    if ASYMMETRIC:
                        z += _rows(zeros, row, begin * COUNT + g, groups, padded, TALL)
            elif ASYMMETRIC:
                z = _rows(zeros, row, 0, 1, padded, TALL)
            acc = gl.zeros([64, WIDTH], gl.float32, MMA)
            other = gl.zeros([64, WIDTH], gl.float32, MMA)
            left = gl.zeros([64, J], T, LEFT)
            for block in range(begin, end):
                at = turn % WORDS
                mbarrier.wait(w_full.index(at), turn // WORDS & 1)
                w = w_ring.index(at * CHUNKS + WHO * OWN).load(LEFT)
                if TALL:
                    w_other = w_ring.index(at * CHUNKS + WHO * OWN + 1).load(LEFT)
                for i in gl.static_range(4):
                    slot = turn % TURNS * 4 + i
                    old = left
                    left = slice_weights(w, s, z, 0, i, FORMS[i], GROUP, ASYMMETRIC, T)
                    mbarrier.wait(x_full.index(slot), turn // TURNS & 1)
                    right = x_ring.index(slot * PARTS).permute((1, 0))
                    acc = warpgroup_mma(left, right, acc, is_async=True)
                    if LONG:
                        right = x_ring.index(slot * PARTS + 1).permute((1, 0))
                        other = warpgroup_mma(left, right, other, is_async=True)
                    if i > 0:  # the slice before is done: its weights and activations are free
                        acc, other, old = _wait(2 if LONG else 1, acc, other, old, HALVES)
                        mbarrier.arrive(x_free.index(slot - 1))
                    if TALL:
                        old = left
                        left = slice_weights(w_other, s, z, 1, i, FORMS[i], GROUP, ASYMMETRIC, T)
                        right = x_ring.index(slot * PARTS).permute((1, 0))
                        other = warpgroup_mma(left, right, other, is_async=True)
                        acc, other, old = _wait(1, acc, other, old, HALVES)
                    if GROUP and i % SPAN == SPAN - 1:
                        after = block * COUNT + i // SPAN + AHEAD
                        s = s[WIDE:] + _rows(scales, row, after, groups, padded, TALL)
                        if ASYMMETRIC:
                            z = z[WIDE:] + _rows(zeros, row, after, groups, padded, TALL)
                mbarrier.arrive(w_free.index(at))
                # left in flight to the next turn, they are serialised by the assembler
                acc, other, left = _wait(0, acc, other, left, HALVES)
                mbarrier.arrive(x_free.index(turn % TURNS * 4 + 3))
                turn += 1
            if end - begin == blocks:
                _finish(acc, 0, tensors, shelf, n0, m0, sizes, TALL, GROUP, GATED, T)
                if HALVES == 2:
                    _finish(other, 1, tensors, shelf, n0, m0, sizes, TALL, GROUP, GATED, T)
            else:
                cut = first // blocks + j - whole
                owner, final = _meeting(cut, blocks, tail, sharers)
                program = gl.program_id(0)
                SIZE: gl.constexpr = HALVES * 64 * WIDTH
                spot = (
                    gl.arange(0, 64, gl.SliceLayout(1, MMA))[:, None] * WIDTH
                    + gl.arange(0, WIDTH, gl.SliceLayout(0, MMA))[None, :]
                )
                mine = 2 * program + gl.where(program == owner, 1, 0)
                sums = partials + (mine * 2 + WHO) * SIZE
                gl.store(sums + spot, acc)
                if HALVES == 2:
                    gl.store(sums + 64 * WIDTH + spot, other)
                barrier()  # every thread's sums come before this program's count
                count = counters + owner * 2 + WHO
                if gl.atomic_add(count, 1, sem="acq_rel") == final - owner:
                    gl.store(count, 0)
                    for h in gl.static_range(HALVES):
                        total = gl.zeros([64, WIDTH], gl.float32, MMA)
                        for part in range(owner, final + 1):
                            slot = 2 * part + gl.where(part == owner, 1, 0)
                            at = partials + (slot * 2 + WHO) * SIZE + h * 64 * WIDTH + spot
                            total += gl.load(at, cache_modifier=".cg")
                        _finish(total, h, tensors, shelf, n0, m0, sizes, TALL, GROUP, GATED, T)

    @gluon.jit(do_not_specialize=["M", "blocks", "m_tiles", "whole", "tail", "sharers"])
    def _wide(
        x, words, scales, zeros, bias, out, partials, counters,
        M, N, out_stride, padded, blocks, m_tiles, whole, tail, sharers,
        GROUP: gl.constexpr, BATCH: gl.constexpr, ROWS: gl.constexpr, TURNS: gl.constexpr,
        WORDS: gl.constexpr, GATED: gl.constexpr, REGISTERS: gl.constexpr,
        A: gl.constexpr, B: gl.constexpr, C: gl.constexpr, D: gl.constexpr,
    ):  # fmt: skip
        T: gl.constexpr = x.dtype
        WIDTH: gl.constexpr = x.block_type.shape[0]
        J: gl.constexpr = x.block_type.shape[1]
        FORMS: gl.constexpr = (A, B, C, D)
        XS: gl.constexpr = 4 * TURNS
        BAR: gl.constexpr = mbarrier.MBarrierLayout()
        SHELF: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        x_ring = gl.allocate_shared_memory(T, [XS * (BATCH // WIDTH), WIDTH, J], x.layout)
        w_ring = gl.allocate_shared_memory(gl.int16, [WORDS * (ROWS // 64), 64, J], words.layout)
        shelves = gl.allocate_shared_memory(T, [2, WIDTH, 64], SHELF)
        x_full = gl.allocate_shared_memory(gl.int64, [XS, 1], BAR)
        x_free = gl.allocate_shared_memory(gl.int64, [XS, 1], BAR)
        w_full = gl.allocate_shared_memory(gl.int64, [WORDS, 1], BAR)
        w_free = gl.allocate_shared_memory(gl.int64, [WORDS, 1], BAR)
        for i in gl.static_range(XS):
            mbarrier.init(x_full.index(i), count=1)
            mbarrier.init(x_free.index(i), count=2)
        for i in gl.static_range(WORDS):
            mbarrier.init(w_full.index(i), count=1)
            mbarrier.init(w_free.index(i), count=2)
        rings = (x_ring, x_full, x_free, w_ring, w_full, w_free)
        share = (blocks, whole, tail, sharers)
        tensors = (scales, zeros, bias, out, partials, counters)
        sizes = (M, N, out_stride, padded, m_tiles)
        gl.warp_specialize(
            [
                (_multiply, (
                    rings, shelves.index(0), share, tensors, sizes,
                    0, GROUP, J, BATCH, ROWS, TURNS, WORDS, GATED, FORMS, T,
                )),
                (_multiply, (
                    rings, shelves.index(1), share, tensors, sizes,
                    1, GROUP, J, BATCH, ROWS, TURNS, WORDS, GATED, FORMS, T,
                )),
                (_copy, (x, words, rings, share, m_tiles, J, BATCH, ROWS, TURNS, WORDS)),
            ],
            [4, 1],
            [REGISTERS, 504 - 2 * REGISTERS],
        )  # fmt: skip
