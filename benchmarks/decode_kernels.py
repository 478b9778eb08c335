# SPDX-License-Identifier: Apache-2.0
"""What a decoding step has beside its products, for `marlin_decode.py`.

Norms, rotation and attention, the choice of a token: kernels of a few microseconds each. With
`chained` each begins while the one before it ends, reads what no kernel of this step writes, and
waits; see `w4a16_matmul`. All arms of the benchmark take them, but for norms and silu(gate)·up that
four-bit products do themselves.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from batchery.kernels.multi_tensor import processors_of, tl, triton
from batchery.kernels.w4a16_plan import best_split

EPS = 1e-5
BLOCK = 64  # tokens of the cache in a turn
CHOSEN = 2048  # logits among which a program chooses
HELD = 3  # programs of attention that a processor has, where there are tokens enough

if triton is not None:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    @triton.jit
    def _add_norm(h, update, weight, x, WIDTH: tl.constexpr, EPS: tl.constexpr, C: tl.constexpr):
        if C:
            gdc_launch_dependents()
        D: tl.constexpr = h.dtype.element_ty
        column = tl.arange(0, WIDTH)
        w = tl.load(weight + column).to(tl.float32)
        if C:
            gdc_wait()
        at = tl.program_id(0) * WIDTH + column
        v = (tl.load(h + at).to(tl.float32) + tl.load(update + at).to(tl.float32)).to(D)
        tl.store(h + at, v)
        v = v.to(tl.float32)
        v *= tl.rsqrt(tl.sum(v * v, 0) / WIDTH + EPS)
        tl.store(x + at, (v * w).to(D))

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
        D: tl.constexpr = out.dtype.element_ty
        gate = (gate / (1 + tl.exp(-gate))).to(D).to(tl.float32)
        tl.store(out + row * WIDTH + column, (gate * up).to(D), mask=inside)

    @triton.jit
    def _rotate(first, second, turn, side, HEAD: tl.constexpr):
        """Rotate the halves of heads; turn is cosines over sines."""
        D: tl.constexpr = turn.dtype.element_ty
        c = tl.load(turn + side).to(tl.float32)
        s = tl.load(turn + HEAD + side).to(tl.float32)
        return (first * c - second * s).to(D), (second * c + first * s).to(D)

    @triton.jit
    def _block(keys, values, row, old, HEAD: tl.constexpr):
        """Load keys, in halves, and values of the old tokens of a block."""
        inside = old[:, None]
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
        return higher, total, acc * faded[:, None] + tl.dot(p.to(v.dtype), v)

    @triton.jit
    def _join_parts(
        top, total, acc, sums, counter, part,
        PARTS: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, SHARE: tl.constexpr,
    ):  # fmt: skip
        """Leave a part's sums; the program that comes last joins all in order, and says so."""
        SIZE: tl.constexpr = ROWS * (HEAD + 2)
        query = tl.arange(0, ROWS)
        mask = query < SHARE
        spot = query[:, None] * HEAD + tl.arange(0, HEAD)[None, :]
        ends = ROWS * HEAD + query
        own = sums + part * SIZE
        tl.store(own + spot, acc, mask=mask[:, None])
        tl.store(own + ends, top, mask=mask)
        tl.store(own + ends + ROWS, total, mask=mask)
        tl.debug_barrier()  # every thread's sums come before this program's count
        last = tl.atomic_add(counter, 1, sem="acq_rel") == PARTS - 1
        if last:
            tl.store(counter, 0)
            top = tl.full([ROWS], -1e30, tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, HEAD], tl.float32)
            for i in tl.static_range(PARTS):
                at = sums + i * SIZE
                t = tl.load(at + ends, mask=mask, other=-1e30, cache_modifier=".cg")
                n = tl.load(at + ends + ROWS, mask=mask, other=1.0, cache_modifier=".cg")
                a = tl.load(at + spot, mask=mask[:, None], other=0.0, cache_modifier=".cg")
                higher = tl.maximum(top, t)
                faded, risen = tl.exp(top - higher), tl.exp(t - higher)
                total = total * faded + n * risen
                acc = acc * faded[:, None] + a * risen[:, None]
                top = higher
        return last, total, acc

    @triton.jit
    def _attend(
        heads, keys, values, turn, place, out, sums, counters, T,
        KV: tl.constexpr, SHARE: tl.constexpr, HEAD: tl.constexpr, BT: tl.constexpr,
        ROWS: tl.constexpr, PARTS: tl.constexpr, TURNS: tl.constexpr, C: tl.constexpr,
    ):  # fmt: skip
        """Attend with the queries that share a head of keys, in one sequence; add to the cache.

        To one of the parts of the tokens, the first of which has the new token.
        """
        if C:
            gdc_launch_dependents()
        SCALE: tl.constexpr = HEAD**-0.5
        sequence = tl.program_id(2).to(tl.int64)
        kv = tl.program_id(1)
        at = tl.load(place).to(tl.int32)
        side, whole = tl.arange(0, HEAD // 2), tl.arange(0, HEAD)
        keys += (sequence * KV + kv) * T * HEAD
        values += (sequence * KV + kv) * T * HEAD
        part, first, end = 0, 0, T
        if PARTS > 1:
            part = tl.program_id(0)
            size = tl.cdiv(tl.cdiv(T, BT), PARTS) * BT
            first = part * size
            end = tl.minimum(first + size, T)
        row = first + tl.arange(0, BT)
        old = (row < T) & (row != at)
        k1, k2, v = _block(keys, values, row, old, HEAD)  # older ones are no output of this step
        if C:
            gdc_wait()
        line = heads + sequence * ((SHARE + 2) * KV * HEAD)
        own = line + (SHARE * KV + kv) * HEAD + side
        new1, new2 = _rotate(
            tl.load(own).to(tl.float32), tl.load(own + HEAD // 2).to(tl.float32), turn, side, HEAD
        )
        new = tl.load(line + (SHARE * KV + KV + kv) * HEAD + whole)
        if part == 0:
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
        top = tl.where(part == 0, tl.sum(both, 1) * SCALE, -1e30)
        total = tl.full([ROWS], 1.0, tl.float32)
        acc = tl.zeros([ROWS, HEAD], tl.float32) + new.to(tl.float32)[None, :]
        top, total, acc = _turn(q1, q2, k1, k2, v, old, top, total, acc, SCALE)
        if TURNS:
            for begin in tl.range(first + BT, end, BT, num_stages=2):
                rows = begin + tl.arange(0, BT)
                old = (rows < T) & (rows != at)
                k1, k2, v = _block(keys, values, rows, old, HEAD)
                top, total, acc = _turn(q1, q2, k1, k2, v, old, top, total, acc, SCALE)
        where = out + sequence * (SHARE * KV * HEAD)
        where += (kv * SHARE + query)[:, None] * HEAD + whole[None, :]
        if PARTS == 1:
            tl.store(where, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
        else:
            group = sequence * KV + kv
            sums += group * (PARTS * ROWS * (HEAD + 2))
            last, total, acc = _join_parts(
                top, total, acc, sums, counters + group, part, PARTS, HEAD, ROWS, SHARE
            )
            tl.store(where, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask & last)

    @triton.jit
    def _choose(
        logits, tokens, tops, places, counters, WIDTH,
        STEP: tl.constexpr, PARTS: tl.constexpr, SPOTS: tl.constexpr, C: tl.constexpr,
    ):  # fmt: skip
        """Find the largest of a part of a row; the program that comes last, that of the row."""
        if C:
            gdc_launch_dependents()
            gdc_wait()
        part, row = tl.program_id(0), tl.program_id(1)
        column = part * STEP + tl.arange(0, STEP)
        at = logits + row.to(tl.int64) * WIDTH + column
        value = tl.load(at, mask=column < WIDTH, other=-float("inf")).to(tl.float32)
        top, place = tl.max(value, 0, return_indices=True)
        tl.store(tops + row * PARTS + part, top)
        tl.store(places + row * PARTS + part, part * STEP + place)
        tl.debug_barrier()
        if tl.atomic_add(counters + row, 1, sem="acq_rel") == PARTS - 1:
            tl.store(counters + row, 0)
            spot = tl.arange(0, SPOTS)
            ends = tops + row * PARTS + spot
            all_tops = tl.load(ends, mask=spot < PARTS, other=-float("inf"), cache_modifier=".cg")
            _, best = tl.max(all_tops, 0, return_indices=True)
            chosen = tl.load(places + row * PARTS + best, cache_modifier=".cg")
            tl.store(tokens + row, chosen.to(tl.int64))


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


@cache
def _counters(device: torch.device) -> Tensor:
    """Zeros at which programs meet that share a result; zero again when the last has come."""
    return torch.zeros(4096, dtype=torch.int32, device=device)


def parts_of(tokens: int, groups: int, device: torch.device) -> int:
    """Return the parts that the tokens of each head of keys and sequence are attended to in."""
    places = HELD * (processors_of(device) if device.type == "cuda" else 132)
    if 2 * groups > places:
        return 1
    return best_split(groups, -(-tokens // BLOCK), places, lost=1, added=0.1)[1]


def attend(
    heads: Tensor, pairs: Tensor, turn: Tensor, place: Tensor, out: Tensor, chained: bool
) -> None:
    """Rotate queries and keys of heads `(B, q + k + v)`, add to the cache, and attend."""
    _, batch, kv_heads, tokens, head = pairs.shape
    share = heads.shape[1] // head // kv_heads - 2
    rows = max(16, triton.next_power_of_2(share))
    parts = parts_of(tokens, batch * kv_heads, heads.device)
    sums = counters = None
    if parts > 1:
        size = batch * kv_heads * parts * rows * (head + 2)
        sums = torch.empty(size, dtype=torch.float32, device=heads.device)
        counters = _counters(heads.device)
    turns = tokens > BLOCK * parts
    sizes = (tokens, kv_heads, share, head, BLOCK, rows, parts, turns)
    tensors = (heads, pairs[0], pairs[1], turn, place, out, sums, counters)
    # Without turns it finds room beside three programs of the product before.
    options = _launch(chained) | ({} if turns else {"maxnreg": 128})
    _attend[(parts, kv_heads, batch)](*tensors, *sizes, **options)


def choose(logits: Tensor, tokens: Tensor, chained: bool) -> None:
    """Write the index of the largest of each row to tokens `(B,)`."""
    batch, width = logits.shape
    parts = -(-width // CHOSEN)
    tops = torch.empty(batch, parts, dtype=torch.float32, device=logits.device)
    places = torch.empty(batch, parts, dtype=torch.int32, device=logits.device)
    sizes = (width, CHOSEN, parts, triton.next_power_of_2(parts))
    tensors = (logits, tokens, tops, places, _counters(logits.device))
    _choose[(parts, batch)](*tensors, *sizes, **_launch(chained))
