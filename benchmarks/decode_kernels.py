# SPDX-License-Identifier: Apache-2.0
"""What a decoding step has beside its products, for `marlin_decode.py`: norms, rotation, attention.

Kernels of a few microseconds each. With `chained` each begins while the one before it ends, reads
what no kernel of this step writes, and waits; see `w4a16_matmul`. All arms of the benchmark take
them.
"""

from typing import Any

from torch import Tensor

from batchery.kernels.multi_tensor import tl, triton

EPS = 1e-5
BLOCK = 64  # tokens of the cache in a turn

if triton is not None:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    @triton.jit
    def _add_norm(h, update, weight, x, WIDTH: tl.constexpr, EPS: tl.constexpr, C: tl.constexpr):
        if C:
            gdc_launch_dependents()
        column = tl.arange(0, WIDTH)
        w = tl.load(weight + column).to(tl.float32)
        if C:
            gdc_wait()
        at = tl.program_id(0) * WIDTH + column
        v = (tl.load(h + at).to(tl.float32) + tl.load(update + at).to(tl.float32)).to(tl.bfloat16)
        tl.store(h + at, v)
        v = v.to(tl.float32)
        v *= tl.rsqrt(tl.sum(v * v, 0) / WIDTH + EPS)
        tl.store(x + at, (v * w).to(tl.bfloat16))

    @triton.jit
    def _join(y, out, WIDTH, STEP: tl.constexpr, C: tl.constexpr):
        if C:
            gdc_launch_dependents()
            gdc_wait()
        row = tl.program_id(1)
        column = tl.program_id(0) * STEP + tl.arange(0, STEP)
        inside = column < WIDTH
        gate = tl.load(y + row * 2 * WIDTH + column, mask=inside).to(tl.float32)
        up = tl.load(y + row * 2 * WIDTH + WIDTH + column, mask=inside).to(tl.float32)
        gate = (gate / (1 + tl.exp(-gate))).to(tl.bfloat16).to(tl.float32)
        tl.store(out + row * WIDTH + column, (gate * up).to(tl.bfloat16), mask=inside)

    @triton.jit
    def _rotate(first, second, turn, side, HEAD: tl.constexpr):
        """Rotate the halves of heads; turn is cosines over sines."""
        c = tl.load(turn + side).to(tl.float32)
        s = tl.load(turn + HEAD + side).to(tl.float32)
        a = (first * c - second * s).to(tl.bfloat16)
        return a, (second * c + first * s).to(tl.bfloat16)

    @triton.jit
    def _block(keys, values, row, T, HEAD: tl.constexpr):
        """Load keys, in halves, and values of a block of tokens."""
        inside = (row < T)[:, None]
        side, whole = tl.arange(0, HEAD // 2), tl.arange(0, HEAD)
        where = keys + row[:, None] * HEAD + side[None, :]
        first = tl.load(where, mask=inside, other=0.0)
        second = tl.load(where + HEAD // 2, mask=inside, other=0.0)
        v = tl.load(values + row[:, None] * HEAD + whole[None, :], mask=inside, other=0.0)
        return first, second, v

    @triton.jit
    def _turn(q1, q2, k1, k2, v, old, top, total, acc, SCALE: tl.constexpr):
        """Add a block of tokens to sums of which `top` is the highest score."""
        score = (tl.dot(q1, tl.trans(k1)) + tl.dot(q2, tl.trans(k2))) * SCALE
        score = tl.where(old[None, :], score, -1e30)
        higher = tl.maximum(top, tl.max(score, 1))
        faded = tl.exp(top - higher)
        p = tl.exp(score - higher[:, None])
        total = total * faded + tl.sum(p, 1)
        return higher, total, acc * faded[:, None] + tl.dot(p.to(tl.bfloat16), v)

    @triton.jit
    def _attend(
        heads, keys, values, turn, place, out, T,
        KV: tl.constexpr, SHARE: tl.constexpr, HEAD: tl.constexpr, BT: tl.constexpr,
        ROWS: tl.constexpr, C: tl.constexpr,
    ):  # fmt: skip
        """Attend with the queries that share a head of keys, in one sequence; add to the cache."""
        if C:
            gdc_launch_dependents()
        SCALE: tl.constexpr = HEAD**-0.5
        sequence = tl.program_id(0).to(tl.int64)
        kv = tl.program_id(1)
        at = tl.load(place).to(tl.int32)
        side, whole = tl.arange(0, HEAD // 2), tl.arange(0, HEAD)
        keys += (sequence * KV + kv) * T * HEAD
        values += (sequence * KV + kv) * T * HEAD
        row = tl.arange(0, BT)
        k1, k2, v = _block(keys, values, row, T, HEAD)  # older tokens are no output of this step
        if C:
            gdc_wait()
        line = heads + sequence * ((SHARE + 2) * KV * HEAD)
        own = line + (SHARE * KV + kv) * HEAD + side
        new1, new2 = _rotate(
            tl.load(own).to(tl.float32), tl.load(own + HEAD // 2).to(tl.float32), turn, side, HEAD
        )
        new = tl.load(line + (SHARE * KV + KV + kv) * HEAD + whole)
        tl.store(keys + at * HEAD + side, new1)
        tl.store(keys + at * HEAD + HEAD // 2 + side, new2)
        tl.store(values + at * HEAD + whole, new)
        query = tl.arange(0, ROWS)
        mask = (query < SHARE)[:, None]
        where = line + (kv * SHARE + query)[:, None] * HEAD + side[None, :]
        q1, q2 = _rotate(
            tl.load(where, mask=mask, other=0.0).to(tl.float32),
            tl.load(where + HEAD // 2, mask=mask, other=0.0).to(tl.float32),
            turn, side[None, :], HEAD,
        )  # fmt: skip
        # The new token first: what the cache has in its place is left out.
        both = q1.to(tl.float32) * new1.to(tl.float32)[None, :]
        both += q2.to(tl.float32) * new2.to(tl.float32)[None, :]
        top = tl.sum(both, 1) * SCALE
        total = tl.full([ROWS], 1.0, tl.float32)
        acc = tl.zeros([ROWS, HEAD], tl.float32) + new.to(tl.float32)[None, :]
        old = (row < T) & (row != at)
        top, total, acc = _turn(q1, q2, k1, k2, v, old, top, total, acc, SCALE)
        for begin in tl.range(BT, T, BT, num_stages=2):
            rows = begin + row
            k1, k2, v = _block(keys, values, rows, T, HEAD)
            old = (rows < T) & (rows != at)
            top, total, acc = _turn(q1, q2, k1, k2, v, old, top, total, acc, SCALE)
        where = out + sequence * (SHARE * KV * HEAD)
        where += (kv * SHARE + query)[:, None] * HEAD + whole[None, :]
        tl.store(where, (acc / total[:, None]).to(tl.bfloat16), mask=mask)


def _launch(chained: bool) -> dict[str, Any]:
    return {"C": chained, "launch_pdl": chained}


def add_norm(h: Tensor, update: Tensor, weight: Tensor, x: Tensor, chained: bool) -> None:
    """Add to hidden states `(B, width)` in place, and write their norm to x."""
    batch, width = h.shape
    _add_norm[(batch,)](h, update, weight, x, width, EPS, num_warps=16, **_launch(chained))


def join(y: Tensor, out: Tensor, chained: bool) -> None:
    """Write silu(gate)·up of y, gate beside up, to out `(B, width)`."""
    batch, width = out.shape
    _join[(-(-width // 1024), batch)](y, out, width, 1024, **_launch(chained))


def attend(
    heads: Tensor, pairs: Tensor, turn: Tensor, place: Tensor, out: Tensor, chained: bool
) -> None:
    """Rotate queries and keys of heads `(B, q + k + v)`, add to the cache, and attend."""
    _, batch, kv_heads, tokens, head = pairs.shape
    share = heads.shape[1] // head // kv_heads - 2
    sizes = (tokens, kv_heads, share, head, BLOCK, max(16, triton.next_power_of_2(share)))
    grid = (batch, kv_heads)
    _attend[grid](heads, pairs[0], pairs[1], turn, place, out, *sizes, **_launch(chained))
