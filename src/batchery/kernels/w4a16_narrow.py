# SPDX-License-Identifier: Apache-2.0
"""Four-bit weights times few rows on Hopper, in an order that the source gives.

When to use: some 9 to 64 rows of x (`w4a16_plan.kernel_of`), from one on in a chain or with norms.
When not: more (`w4a16_wide`) or fewer (`w4a16_tiles` begins sooner); other processors than sm_90,
or x whose rows are not aligned to 16 bytes: `w4a16_wide.fits` says.

    yᵀ[N, M] = Σ_g s_g · Σ_i (q_i - z_g) · x_iᵀ     over slices i of J columns, nibbles of a block

A program sums a tile of yᵀ over its part of the columns, as in `w4a16_tiles`. What differs is the
loop. Each slice is a step: its nibbles become 16 bits while the matrix instruction of the step
before runs, those of the next block's first slice too, and the sums of one group are scaled while
those of the next begin. So the matrix units need not wait for arithmetic. Blocks come by bulk
copies into a ring in shared memory, all of it under way at the start; these put zeros for columns
and rows beyond x. In a chain of kernels the words of the ring are there when the kernel before
hands over x (programmatic dependent launch).

Reference: Frantar et al., MARLIN, arXiv 2408.11743 (2024). Ours is written in Gluon, where a kernel
and not the compiler says what waits for what.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchery.kernels.multi_tensor import on_its_device
from batchery.kernels.w4a16_epilogue import Norm, Residual
from batchery.kernels.w4a16_layout import CHUNK, NIBBLES, PackedW4
from batchery.kernels.w4a16_tiles import Runners, aligned, run
from batchery.kernels.w4a16_wide import gluon, nibble_asm, swizzled

__all__ = ["Narrow", "launch"]


class Narrow(NamedTuple):
    """How a program works.

    Attributes:
        batch: rows of x, 8, 16, 32 or 64.
        rows: rows of W, 64 or 128.
        stages: blocks in shared memory.
        registers: of each thread.
    """

    batch: int
    rows: int = 64
    stages: int = 3
    registers: int = 168


def launch(
    x: Tensor,
    weight: PackedW4,
    form: Narrow,
    split: int = 1,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    chained: bool = False,
    norm_of: Norm | None = None,
    add_to: Residual | None = None,
) -> Tensor:
    """Multiply x `(M, K)` by the weight; a gated weight's bias comes woven.

    Args:
        x: `(M, K)`, M > 0; see `w4a16_wide.fits`.
        weight: on x's device.
        form: how each program works.
        split: parts of the columns; 1 where the weight has fewer counters than tiles.
        bias: `(N,)`.
        out: where the result goes.
        chained: read the weight before the kernel before this one has ended, and let the one after
            begin; see `w4a16_matmul`.
        norm_of: what is left to do of the norm of x.
        add_to: to which the result is added; its h is returned.
    """
    (m, k), (n, _) = x.shape, weight.shape
    _, blocks, _, lanes = weight.words.shape
    h = gain = h_squares = x_squares = None
    if norm_of is not None:
        x_squares = norm_of.squares
    if add_to is not None:
        h, gain, out, h_squares = add_to
    if out is None:
        out = x.new_empty(m, n // 2 if weight.gated else n)
    m_tiles = -(-m // form.batch)
    tiles = weight.rows // form.rows * m_tiles
    split = min(split, blocks) if tiles <= len(weight.counters) else 1
    partials = None
    if split > 1:
        partials = x.new_empty(tiles * split * form.batch * form.rows, dtype=torch.float32)
    zeros, groups = weight.zeros, len(weight.scales)
    constants, options, runners = _prepared(
        form,
        x.dtype,
        weight.group_size if groups > 1 else 0,
        zeros is not None,
        weight.gated,
        chained,
        0 if norm_of is None else k,
        0.0 if norm_of is None else norm_of.eps,
    )
    layout = swizzled(lanes)
    words = weight.words.view(-1, lanes)
    descriptors = (
        TensorDescriptor(x, [m, k], [x.stride(0), 1], [form.batch, NIBBLES * lanes], layout),
        TensorDescriptor(words, [*words.shape], [lanes, 1], [CHUNK, lanes], layout),
    )
    beside = (h, gain, h_squares, x_squares)
    tensors = (weight.scales, zeros, bias, out, partials, weight.counters, *beside)
    numbers = (m, n, out.stride(0), weight.rows, blocks, m_tiles, split)
    kinds = (lanes, weight.scales.dtype, None if bias is None else bias.dtype, h is None)
    arguments = (*descriptors, *tensors, *numbers, *constants)
    with on_its_device(x):
        whole = all(t is None or t.data_ptr() % 16 == 0 for t in beside)
        known = runners if whole and aligned(weight, x, out, bias) else {}
        key = (x.get_device(), *kinds, *numbers)
        run(_narrow, known, key, tiles * split, arguments, options)
    return out if add_to is None else add_to.h


@cache
def _prepared(
    form: Narrow, dtype: torch.dtype, group: int, asymmetric: bool, gated: bool, chained: bool,
    width: int, eps: float,
) -> tuple[tuple[Any, ...], dict[str, int], Runners]:  # fmt: skip
    """Return the kernel's constants, its options and its compiled forms."""
    asm = [nibble_asm(dtype, place, asymmetric, False) for place in range(NIBBLES)]
    constants = (group, form.batch, form.rows, form.stages, gated, chained, width, eps, *asm)
    return constants, {"num_warps": 4, "maxnreg": form.registers, "launch_pdl": chained}, {}


if gluon is not None:
    from batchery.kernels.w4a16_epilogue import deliver, row_scales
    from batchery.kernels.w4a16_wide import (
        TensorDescriptor,
        barrier,
        gl,
        mbarrier,
        slice_weights,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )

    BEGIN = gl.constexpr("griddepcontrol.launch_dependents; mov.b32 $0, 0;")
    WAIT = gl.constexpr("griddepcontrol.wait; mov.b32 $0, 0;")

    @gluon.jit
    def _word_rings(words, COUNT: gl.constexpr, STAGES: gl.constexpr):
        """Return rings for the words of 64 rows each."""
        SIZE: gl.constexpr = [STAGES, 64, words.block_type.shape[1]]
        found = ()
        for _ in gl.static_range(COUNT):
            found += (gl.allocate_shared_memory(gl.int16, SIZE, words.layout),)  # type: ignore[assignment]
        return found

    @gluon.jit
    def _barriers(COUNT: gl.constexpr, STAGES: gl.constexpr):
        """Return barriers for the stages of some rings."""
        BAR: gl.constexpr = mbarrier.MBarrierLayout()
        found = ()
        for _ in gl.static_range(COUNT):
            found += (gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR),)  # type: ignore[assignment]
        return found

    @gluon.jit
    def _zeros(COUNT: gl.constexpr, BATCH: gl.constexpr, MMA: gl.constexpr):
        """Return some sums."""
        found = ()
        for _ in gl.static_range(COUNT):
            found += (gl.zeros([64, BATCH], gl.float32, MMA),)  # type: ignore[assignment]
        return found

    @gluon.jit
    def _rows(at, block, stride, COUNT: gl.constexpr, HALVES: gl.constexpr):
        """Load scales or zeros of a block: of each group, for each 64 rows of W."""
        found = ()
        for i in gl.static_range(COUNT * HALVES):
            found += (gl.load(at + (block * COUNT + i // HALVES) * stride + i % HALVES * 64),)  # type: ignore[assignment]
        return found

    @gluon.jit
    def _expect(rings, turn, turns, STAGES: gl.constexpr):
        """Announce the copies of a turn's block; nothing after the last turn."""
        x_ring, x_full, w_rings, w_fulls = rings
        stage = turn % STAGES
        x_bytes: gl.constexpr = 2 * x_ring.shape[1] * x_ring.shape[2]
        w_bytes: gl.constexpr = 2 * w_rings[0].shape[1] * w_rings[0].shape[2]
        mbarrier.expect(x_full.index(stage), x_bytes, turn < turns)
        for h in gl.static_range(len(w_rings)):
            mbarrier.expect(w_fulls[h].index(stage), w_bytes, turn < turns)

    @gluon.jit
    def _copy_words(words, rings, turn, turns, chunk, first, blocks, STAGES: gl.constexpr):
        """Begin the copies of the words of a turn's block."""
        _, _, w_rings, w_fulls = rings
        stage = turn % STAGES
        for h in gl.static_range(len(w_rings)):
            tma.async_copy_global_to_shared(
                words, [((chunk + h) * blocks + first + turn) * 64, 0], w_fulls[h].index(stage),
                w_rings[h].index(stage), turn < turns,
            )  # fmt: skip

    @gluon.jit
    def _copy_x(x, rings, turn, turns, m0, first, STAGES: gl.constexpr):
        """Begin the copy of the columns of x that meet a turn's block."""
        x_ring, x_full, _, _ = rings
        stage = turn % STAGES
        tma.async_copy_global_to_shared(
            x, [m0, (first + turn) * x_ring.shape[2]], x_full.index(stage), x_ring.index(stage),
            turn < turns,
        )  # fmt: skip

    @gluon.jit
    def _let_next_begin():
        gl.inline_asm_elementwise(BEGIN, "=r", [], gl.int32, False, 1)

    @gluon.jit
    def _wait_for_previous():
        gl.inline_asm_elementwise(WAIT, "=r", [], gl.int32, False, 1)

    @gluon.jit
    def _unpack(
        w, z, STEP: gl.constexpr, SPAN: gl.constexpr, HALVES: gl.constexpr, FORMS: gl.constexpr,
        T: gl.constexpr,
    ):  # fmt: skip
        """Return the left operand of a step: one nibble of 64 rows."""
        PLACE: gl.constexpr = STEP % 4
        ROW: gl.constexpr = PLACE // SPAN * HALVES + STEP // 4
        return slice_weights(w, (), z, ROW, PLACE, FORMS[PLACE], 0, len(z) > 0, T)

    @gluon.jit
    def _multiply(left, x_ring, stage, acc, totals, STEP: gl.constexpr, SPAN: gl.constexpr):
        """Begin the products of a step, to be added to a total of its group if there are groups."""
        J: gl.constexpr = left.shape[1]
        H: gl.constexpr = STEP // 4
        P: gl.constexpr = STEP // SPAN % 2
        right = x_ring.index(stage).slice(STEP % 4 * J, J, 1).permute((1, 0))
        if len(totals) == 0:
            new = warpgroup_mma(left, right, acc[H], is_async=True)
            acc = acc[:H] + (new,) + acc[H + 1 :]
        else:
            MMA: gl.constexpr = acc[0].type.layout
            old = totals[P]
            if STEP % SPAN == 0:
                old = gl.zeros([64, acc[0].shape[1]], gl.float32, MMA)
            new = warpgroup_mma(left, right, old, is_async=True)
            totals = totals[:P] + (new,) + totals[P + 1 :]
        return acc, totals

    @gluon.jit
    def _wait(totals, old, STEP: gl.constexpr, SPAN: gl.constexpr):
        """Wait for all but the step begun last; the one before it has the left operand `old`.

        Sums still in flight are left alone: a copy of their registers would be wrong.
        """
        P: gl.constexpr = STEP // SPAN % 2
        if len(totals) > 0 and STEP % SPAN == SPAN - 1:
            new, old = warpgroup_mma_wait(1, (totals[P], old))
            totals = totals[:P] + (new,) + totals[P + 1 :]
        else:
            old = warpgroup_mma_wait(1, (old,))
        return totals, old

    @gluon.jit
    def _wait_all(sums, old):
        """Wait for all steps, which have these sums."""
        if len(sums) == 2:
            a, b, old = warpgroup_mma_wait(0, (sums[0], sums[1], old))
            return (a, b), old
        else:
            a, old = warpgroup_mma_wait(0, (sums[0], old))
            return (a,), old

    @gluon.jit
    def _add(acc, totals, s, STEP: gl.constexpr, SPAN: gl.constexpr, HALVES: gl.constexpr):
        """Add the sums of a group, scaled, if the step is its last."""
        if len(totals) > 0 and STEP % SPAN == SPAN - 1:
            H: gl.constexpr = STEP // 4
            P: gl.constexpr = STEP // SPAN % 2
            scale = s[STEP % 4 // SPAN * HALVES + H].to(gl.float32)[:, None]
            acc = acc[:H] + (acc[H] + totals[P] * scale,) + acc[H + 1 :]
        return acc

    @gluon.jit(
        do_not_specialize=["M", "blocks"], do_not_specialize_on_alignment=["m_tiles", "split"]
    )
    def _narrow(
        x, words, scales, zeros, bias, out, partials, counters, hidden, gain, h_squares, x_squares,
        M, N, out_stride, padded, blocks, m_tiles, split,
        GROUP: gl.constexpr, BATCH: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
        GATED: gl.constexpr, CHAINED: gl.constexpr, WIDTH: gl.constexpr, EPS: gl.constexpr,
        A: gl.constexpr, B: gl.constexpr, C: gl.constexpr, D: gl.constexpr,
    ):  # fmt: skip
        """Sum one output tile `(ROWS, BATCH)` of yᵀ over one of `split` parts of the columns."""
        T: gl.constexpr = x.dtype
        J: gl.constexpr = words.block_type.shape[1]
        FORMS: gl.constexpr = (A, B, C, D)
        MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BATCH, 16])
        LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
        HALVES: gl.constexpr = ROWS // 64
        STEPS: gl.constexpr = 4 * HALVES
        COUNT: gl.constexpr = 4 * J // GROUP if GROUP else 1  # groups of a block
        SPAN: gl.constexpr = 4 // COUNT  # nibbles of a group
        tile = gl.program_id(0) // split
        part = gl.program_id(0) % split
        first = part * blocks // split
        turns = (part + 1) * blocks // split - first
        gl.assume(turns > 0)
        m0 = tile % m_tiles * BATCH
        n0 = tile // m_tiles * ROWS
        # Each copy has a ring and barriers of its own, or the compiler puts warps in step between.
        x_ring = gl.allocate_shared_memory(T, [STAGES, BATCH, 4 * J], x.layout)
        x_full = _barriers(1, STAGES)[0]
        w_rings = _word_rings(words, HALVES, STAGES)
        w_fulls = _barriers(HALVES, STAGES)
        rings = (x_ring, x_full, w_rings, w_fulls)
        for early in gl.static_range(STAGES):
            mbarrier.init(x_full.index(early), count=1)
            for h in gl.static_range(HALVES):
                mbarrier.init(w_fulls[h].index(early), count=1)
        for early in gl.static_range(STAGES):
            _expect(rings, early, turns, STAGES)
            _copy_words(words, rings, early, turns, n0 // 64, first, blocks, STAGES)
        if CHAINED:
            _let_next_begin()
            # A copy of rows beyond x fetches the descriptor, for which the first one would wait.
            ready = _barriers(1, 1)[0].index(0)
            mbarrier.init(ready, count=1)
            mbarrier.expect(ready, 2 * BATCH * 4 * J)
            tma.async_copy_global_to_shared(x, [M, 0], ready, x_ring.index(0))
        else:
            for early in gl.static_range(STAGES):
                _copy_x(x, rings, early, turns, m0, first, STAGES)
        scales_at, zeros_at = scales + n0 + gl.arange(0, 64, gl.SliceLayout(1, MMA)), zeros
        s, z = (), ()
        if GROUP:
            s = _rows(scales_at, first, padded, COUNT, HALVES)
        if zeros is not None:
            zeros_at += n0 + gl.arange(0, 64, gl.SliceLayout(1, LEFT))
            z = _rows(zeros_at, first * (GROUP > 0), padded, COUNT, HALVES)
        acc = _zeros(HALVES, BATCH, MMA)
        # Of two groups at most: one is scaled while the other grows.
        totals = _zeros(min(2, COUNT * HALVES) if GROUP else 0, BATCH, MMA)
        for h in gl.static_range(HALVES):
            mbarrier.wait(w_fulls[h].index(0), 0)
        w = w_rings[0].index(0).load(LEFT)
        left = _unpack(w, z, 0, SPAN, HALVES, FORMS, T)
        old = left
        if CHAINED:
            mbarrier.wait(ready, 0)
            _wait_for_previous()  # weights are no output of the chain; x is
            for early in gl.static_range(STAGES):
                _copy_x(x, rings, early, turns, m0, first, STAGES)
        r = row_scales(x_squares, m0, M, BATCH, WIDTH, EPS)  # on its way while x is
        mbarrier.wait(x_full.index(0), 0)
        for turn in range(turns):
            stage = turn % STAGES
            after = gl.minimum(turn + 1, turns - 1)
            for step in gl.static_range(STEPS):
                acc, totals = _multiply(left, x_ring, stage, acc, totals, step, SPAN)
                if step == 0:
                    barrier()  # all warps are done with the turn before: its stage is free
                    again = gl.where(turn > 0, turn - 1 + STAGES, turns)
                    _expect(rings, again, turns, STAGES)
                    _copy_words(words, rings, again, turns, n0 // 64, first, blocks, STAGES)
                    _copy_x(x, rings, again, turns, m0, first, STAGES)
                    # Here, one turn early: copies wait for loads before them.
                    s_after, z_after = s, z
                    if GROUP:
                        s_after = _rows(scales_at, first + after, padded, COUNT, HALVES)
                        if zeros is not None:
                            z_after = _rows(zeros_at, first + after, padded, COUNT, HALVES)
                else:
                    totals, old = _wait(totals, old, step - 1, SPAN)
                    acc = _add(acc, totals, s, step - 1, SPAN, HALVES)
                old = left
                if step == 3 and HALVES == 2:
                    w = w_rings[1].index(stage).load(LEFT)
                if step < STEPS - 1:
                    left = _unpack(w, z, step + 1, SPAN, HALVES, FORMS, T)
            slot = after % STAGES
            phase = after // STAGES & 1
            mbarrier.wait(w_fulls[0].index(slot), phase)
            w = w_rings[0].index(slot).load(LEFT)
            left = _unpack(w, z_after, 0, SPAN, HALVES, FORMS, T)
            # These waits keep the assembler from unpacking after the last one.
            for h in gl.static_range(1, HALVES):
                mbarrier.wait(w_fulls[h].index(slot), phase)
            mbarrier.wait(x_full.index(slot), phase)
            # Nothing may be in flight to the next turn: its registers would be copied too early.
            if GROUP:
                totals, old = _wait_all(totals, old)
            else:
                acc, old = _wait_all(acc, old)
            acc = _add(acc, totals, s, STEPS - 1, SPAN, HALVES)
            s, z = s_after, z_after
        deliver(
            acc, r, partials, counters, tile, part, split, n0, m0,
            (scales, bias, out, hidden, gain, h_squares), (M, N, out_stride), GROUP, GATED,
        )  # fmt: skip
