# SPDX-License-Identifier: Apache-2.0
"""What a four-bit product does with its sums, and a norm that is taken apart among products.

When to use: the RMS norms of a decoder whose products run in `w4a16_narrow`: a norm on its own
waits for the whole product before it, and the product after it waits for the norm. When not: to
train, or where rows of float16 are not small (h · w is not yet divided by anything).

    h += y,  x = h · w,  q[m, t] = Σ h²[m, n] over n = 64t … 64t + 63      a product that adds to h
    y' = r · (x W'ᵀ) + b,  r = 1 / √(Σ_t q[·, t] / K + eps)                the one after it

For r belongs to a row, and rows of a product may be scaled after it as well as before. Sums of
squares are float32 and are added in one order: the same bits in every run.

In a chain of kernels h, x and q come from kernels before. A program reads them after its wait, and
that is enough however far back they were written: what a kernel waits for is the end of the one
before, each of whose programs has waited too before it ended. The same holds for what is written:
all kernels that read the old h, x and q have ended. So every kernel of a chain must wait in every
program, as those of `w4a16_narrow` do (one that is no part of it does not begin before). w is no
output of the chain.
"""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from batchery._core.validate import require
from batchery.kernels.w4a16_layout import CHUNK, PackedW4
from batchery.kernels.w4a16_wide import gluon

__all__ = ["Norm", "Residual", "add_by_torch", "check_apart", "checked", "norm_by_torch"]


class Residual(NamedTuple):
    """What a product is added to, and what it leaves for the product after the next norm.

    Attributes:
        h: `(..., N)`, hidden states, changed in place.
        weight: `(N,)`, of the next norm.
        x: `(..., N)`, filled with h · weight.
        squares: float32 `(..., ceil(N / 64))`, filled with sums of h² over 64 columns each.

    Examples:
        >>> r = Residual.of(torch.ones(3, 130), weight=torch.ones(130))
        >>> r.squares.shape
        torch.Size([3, 3])
    """

    h: Tensor
    weight: Tensor
    x: Tensor
    squares: Tensor

    @classmethod
    def of(cls, h: Tensor, weight: Tensor) -> "Residual":
        """Return one with room for what is to be filled."""
        size = (*h.shape[:-1], -(-h.shape[-1] // CHUNK))
        squares = torch.empty(size, dtype=torch.float32, device=h.device)
        return cls(h, weight, h.new_empty(h.shape), squares)


class Norm(NamedTuple):
    """What is left of an RMS norm to be done for rows that are already times its weight.

    Attributes:
        squares: `Residual.squares` of these rows.
        eps: added to the mean of squares; kernels are compiled for each.

    Examples:
        >>> norm_by_torch(torch.tensor([[3.0, 4.0]]), Norm(torch.tensor([[25.0]]), eps=0.0))
        tensor([[0.8485, 1.1314]])
    """

    squares: Tensor
    eps: float


def checked(
    owner: str,
    x: Tensor,
    weight: PackedW4,
    bias: Tensor | None,
    out: Tensor | None,
    norm: Norm | None,
    residual: Residual | None,
) -> tuple[Norm | None, Residual | None]:
    """Return both as of x `(M, K)`, or raise, naming the tensor that does not fit."""
    n, k = weight.shape
    lead = x.shape[:-1]
    given: dict[str, Tensor | None] = {"x": x, "bias": bias}

    def dense(name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        fits = t.shape == shape and t.dtype == dtype and t.device == x.device
        if not (fits and t.is_contiguous()):  # messages are made only when they are needed
            what = f"must be {tuple(shape)}, dense, {dtype} on {x.device}"
            require(False, owner, name, what, (tuple(t.shape), t.dtype, t.device))
        given[name] = t
        return t.view(-1, shape[-1])

    if residual is not None:
        require(not weight.gated, owner, "add_to", "takes no gated weight", weight.shape)
        require(out is None, owner, "out", "must be None with add_to", "a tensor")
        residual = Residual(
            dense("add_to.h", residual.h, (*lead, n), x.dtype),
            dense("add_to.weight", residual.weight, (n,), x.dtype).view(n),
            dense("add_to.x", residual.x, (*lead, n), x.dtype),
            dense("add_to.squares", residual.squares, (*lead, -(-n // CHUNK)), torch.float32),
        )
    if norm is not None:
        squares = dense("norm_of.squares", norm.squares, (*lead, -(-k // CHUNK)), torch.float32)
        require(0 <= norm.eps < math.inf, owner, "norm_of.eps", "must be >= 0", norm.eps)
        norm = norm._replace(squares=squares)
    if torch.is_grad_enabled():
        for name, t in given.items():
            fits = t is None or not t.requires_grad
            what = "gets no gradient with norm_of or add_to: use torch.no_grad()"
            require(fits, owner, name, what, "requires_grad=True")
    return norm, residual


def check_apart(
    owner: str, x: Tensor, bias: Tensor | None, norm: Norm | None, residual: Residual
) -> None:
    """Raise if what is filled overlaps with anything else that is given."""
    h, weight, after, squares = residual
    if x.is_meta or not x.numel():
        return
    filled = [_span(t) for t in (h, after, squares)]
    read = (x, weight, bias, None if norm is None else norm.squares)
    others = [_span(t) for t in read if t is not None]
    pairs = (*itertools.combinations(filled, 2), *itertools.product(filled, others))
    fits = all(a[1] <= b[0] or b[1] <= a[0] for a, b in pairs)
    require(fits, owner, "add_to", "must be filled apart from what is read", "an overlap")


def _span(t: Tensor) -> tuple[int, int]:
    """Return the addresses from which and up to which a tensor lies."""
    begin = t.data_ptr()
    if t.is_contiguous():
        return begin, begin + t.nbytes
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return begin, begin + (last + 1) * t.element_size()


def add_by_torch(y: Tensor, residual: Residual) -> Tensor:
    """Add y `(M, N)` to h `(M, N)`, and fill x and squares; return h."""
    h, weight, x, squares = residual
    h.copy_(h.float() + y.float())
    x.copy_(h.float() * weight.float())
    padded = F.pad(h.float().square(), (0, -h.shape[-1] % CHUNK))
    squares.copy_(padded.unflatten(-1, (-1, CHUNK)).sum(-1))
    return h


def norm_by_torch(x: Tensor, norm: Norm) -> Tensor:
    """Return x `(M, K)` divided by the root mean squares of its rows."""
    r = (norm.squares.sum(-1, keepdim=True) / x.shape[-1] + norm.eps).rsqrt()
    return (x.float() * r).to(x.dtype)


if gluon is not None:
    from batchery.kernels.w4a16_wide import barrier, gl

    LINES = gl.constexpr(gl.BlockedLayout([4, 1], [16, 2], [1, 4], [0, 1]))

    @gluon.jit
    def row_scales(squares, m0, M, BATCH: gl.constexpr, WIDTH: gl.constexpr, EPS: gl.constexpr):
        """Return r of a tile's rows from their sums of squares, if there is a norm to be done."""
        found = ()
        if WIDTH:
            TILES: gl.constexpr = (WIDTH + 63) // 64
            m = m0 + gl.arange(0, BATCH, gl.SliceLayout(0, LINES))
            t = gl.arange(0, 64, gl.SliceLayout(1, LINES))
            at = squares + m.to(gl.int64)[None, :] * TILES + t[:, None]
            total = gl.zeros([64, BATCH], gl.float32, LINES)
            for first in gl.static_range(0, TILES, 64):
                mask = (m < M)[None, :] & (first + t < TILES)[:, None]
                # By the second level: what changes may lie in the first as it was.
                total += gl.load(at + first, mask=mask, other=0.0, cache_modifier=".cg")
            found += (gl.rsqrt(gl.sum(total, 0) / WIDTH + EPS),)  # type: ignore[assignment]
        return found

    @gluon.jit
    def _fetch(hidden, gain, n0, m0, M, N, stride, BATCH: gl.constexpr):
        """Begin to load what a tile of the product is added to, and the weight of the next norm."""
        found = ()
        if hidden is not None:
            m = m0 + gl.arange(0, BATCH, gl.SliceLayout(0, LINES))
            n = n0 + gl.arange(0, 64, gl.SliceLayout(1, LINES))
            at = hidden + m.to(gl.int64)[None, :] * stride + n[:, None]
            mask = (m < M)[None, :] & (n < N)[:, None]
            old = gl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
            found += (old, gl.load(gain + n, mask=n < N, other=0.0))  # type: ignore[assignment]
        return found

    @gluon.jit
    def _finish(y, r, old, n0, m, tensors, sizes, GROUP: gl.constexpr, GATED: gl.constexpr):
        """Write y `(64, BATCH)` of yᵀ, in lines, to its place in out `(M, N)`."""
        scales, bias, out, hidden, _, h_squares = tensors
        M, N, stride = sizes
        BATCH: gl.constexpr = y.shape[1]
        n = n0 + gl.arange(0, 64, gl.SliceLayout(1, LINES))
        if GROUP == 0:
            y *= gl.load(scales + n).to(gl.float32)[:, None]
        if len(r) > 0:
            y *= r[0][None, :]
        if bias is not None:
            y += gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
        if GATED:
            PAIRS: gl.constexpr = gl.BlockedLayout([2, 1], [16, 2], [1, 4], [0, 1])
            gate, up = gl.split(gl.permute(gl.reshape(y, [32, 2, BATCH]), (0, 2, 1)))
            gate = gl.convert_layout(gate, PAIRS)
            up = gl.convert_layout(up, PAIRS)
            y = gate / (1 + gl.exp(-gate)) * up
            n = n0 // 2 + gl.arange(0, 32, gl.SliceLayout(1, PAIRS))
            m += gl.arange(0, BATCH, gl.SliceLayout(0, PAIRS))
            N = N // 2
        else:
            m += gl.arange(0, BATCH, gl.SliceLayout(0, LINES))
        at = m.to(gl.int64)[None, :] * stride + n[:, None]
        mask = (m < M)[None, :] & (n < N)[:, None]
        if hidden is not None:
            new = (old[0].to(gl.float32) + y).to(hidden.dtype.element_ty)
            gl.store(hidden + at, new, mask=mask)
            y = new.to(gl.float32)  # what is squared and scaled is what the next sum begins with
            spot = h_squares + m.to(gl.int64) * ((N + 63) // 64) + n0 // 64
            gl.store(spot, gl.sum(y * y, 0), mask=(m < M) & (n0 < N))
            y *= old[1].to(gl.float32)[:, None]
        gl.store(out + at, y.to(out.dtype.element_ty), mask=mask)

    @gluon.jit
    def deliver(
        acc, r, partials, counters, tile, part, split, n0, m0, tensors, sizes,
        GROUP: gl.constexpr, GATED: gl.constexpr,
    ):  # fmt: skip
        """Write a tile; of one in parts, the program that comes last adds them up in order."""
        _, _, _, hidden, gain, _ = tensors
        M, N, stride = sizes
        MMA: gl.constexpr = acc[0].type.layout
        HALVES: gl.constexpr = len(acc)
        BATCH: gl.constexpr = acc[0].shape[1]
        SIZE: gl.constexpr = HALVES * 64 * BATCH
        if split == 1:
            for h in gl.static_range(HALVES):
                n = n0 + h * 64
                old = _fetch(hidden, gain, n, m0, M, N, stride, BATCH)
                y = gl.convert_layout(acc[h], LINES)
                _finish(y, r, old, n, m0, tensors, sizes, GROUP, GATED)
        else:
            sums = partials + tile.to(gl.int64) * split * SIZE
            m = gl.arange(0, BATCH, gl.SliceLayout(0, MMA))[None, :]
            spot = m * (HALVES * 64) + gl.arange(0, 64, gl.SliceLayout(1, MMA))[:, None]
            for h in gl.static_range(HALVES):
                gl.store(sums + part * SIZE + spot + h * 64, acc[h], mask=m0 + m < M)
            barrier()  # every thread's sums come before this program's count
            if gl.atomic_add(counters + tile, 1, sem="acq_rel") == split - 1:
                gl.store(counters + tile, 0)
                row = gl.arange(0, BATCH, gl.SliceLayout(0, LINES))[None, :]
                place = row * (HALVES * 64) + gl.arange(0, 64, gl.SliceLayout(1, LINES))[:, None]
                for h in gl.static_range(HALVES):
                    n = n0 + h * 64
                    old = _fetch(hidden, gain, n, m0, M, N, stride, BATCH)
                    y = gl.zeros([64, BATCH], gl.float32, LINES)
                    # Four at a time are on their way together; they are added one after another.
                    for other in range(0, split, 4):
                        at = sums + other * SIZE + h * 64 + place
                        for i in gl.static_range(4):
                            mask = (m0 + row < M) & (other + i < split)
                            y += gl.load(at + i * SIZE, mask=mask, other=0.0, cache_modifier=".cg")
                    _finish(y, r, old, n, m0, tensors, sizes, GROUP, GATED)
