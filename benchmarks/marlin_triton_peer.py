# SPDX-License-Identifier: Apache-2.0
"""A plain kernel of four-bit weights in Triton, as one writes it first: a peer in `marlin.py`.

It is written in the manner of GemLite: eight numbers of a column in an int32 word, the words
[K/8, N] read once for each of their rows; weights scaled in float16 before the dot; K split among
programs that add to a zeroed output by float atomics; a few forms, the fastest of which is found
for every layer and batch before it is timed. One row of x is padded to 16: GemLite has kernels of
their own for it, this has none.
"""

import functools
import itertools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from marlin_backends import GROUP, Call, copies, microseconds, random, words
from torch import Tensor

CLOSE = 2e-3  # relative error that float16 may make, in weights, sums and output


class Form(NamedTuple):
    """Columns and depth of a program's tile of weights, and how it is compiled."""

    columns: int
    depth: int
    warps: int
    stages: int


class Weight(NamedTuple):
    """Words `(K/8, N)`, row r bits 4i holding row 8r+i plus 8, and scales `(K/128, N)`."""

    words: Tensor
    scales: Tensor


FORMS = (Form(64, 128, 4, 3), Form(128, 64, 4, 3), Form(64, 64, 4, 4))
SPLITS = (1, 4, 8)  # programs that share a column; all of FORMS divide every K of `marlin.py` so


@triton.jit(do_not_specialize=["m", "split"])
def _matmul(
    x, words, scales, out, m, n, k, split,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.arange(0, ROWS)
    here = rows[:, None] < m
    first = tl.program_id(1) * DEPTH
    depth = first + tl.arange(0, DEPTH)
    shifts = (depth % 8 * 4)[:, None]
    x_at = x + rows[:, None] * k + depth[None, :]
    words_at = words + (depth // 8)[:, None] * n + columns[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, k, DEPTH * split):
        inputs = tl.load(x_at, mask=here, other=0.0)
        codes = (tl.load(words_at) >> shifts) & 15
        scale = tl.load(scales + start // GROUP * n + columns)
        weights = (codes - 8).to(tl.float16) * scale[None, :]
        total = tl.dot(inputs, weights, total)
        x_at += DEPTH * split
        words_at += DEPTH // 8 * split * n
    out_at = out + rows[:, None] * n + columns[None, :]
    if split == 1:
        tl.store(out_at, total.to(tl.float16), mask=here)
    else:
        tl.atomic_add(out_at, total.to(tl.float16), mask=here, sem="relaxed")


def launch(x: Tensor, weight: Weight, form: Form, split: int) -> Tensor:
    """Return x Wᵀ in float16 for up to 64 rows of x."""
    (m, k), n = x.shape, weight.words.shape[1]
    out = (torch.empty if split == 1 else torch.zeros)(m, n, dtype=x.dtype, device=x.device)
    _matmul[n // form.columns, split](
        x, weight.words, weight.scales, out, m, n, k, split,
        GROUP=GROUP, ROWS=max(16, triton.next_power_of_2(m)),
        COLUMNS=form.columns, DEPTH=form.depth, num_warps=form.warps, num_stages=form.stages,
    )  # fmt: skip
    return out


def dequantized(weight: Weight) -> Tensor:
    """Return W `(K, N)` in float64."""
    shifts = torch.arange(0, 32, 4, device=weight.words.device)[:, None]
    codes = (weight.words[:, None] >> shifts & 15).flatten(0, 1)
    return (codes - 8) * weight.scales.double().repeat_interleave(GROUP, 0)


@functools.cache
def check() -> None:
    """Raise where a form is not right."""
    n, k = 256, 2048
    weight = Weight(words(k // 8, n), random(k // GROUP, n))
    for m, form, split in itertools.product((1, 19, 64), FORMS, SPLITS):
        x = random(m, k)
        wanted = x.double() @ dequantized(weight)
        error = float((launch(x, weight, form, split) - wanted).norm() / wanted.norm())
        if not error < CLOSE:
            raise RuntimeError(f"{form}, split {split}: error {error:.1e} at {m} rows")


def fastest(x: Tensor, weights: list[Weight]) -> tuple[Form, int]:
    """Return the form and split that take the least time on these weights."""
    weights = weights * math.ceil(4 / len(weights))

    def time(choice: tuple[Form, int]) -> float:
        return microseconds([functools.partial(launch, x, w, *choice) for w in weights])

    return min(itertools.product(FORMS, SPLITS), key=time)


def calls(n: int, k: int) -> list[Call]:
    """Make the calls of a layer; the first one with so many rows finds the form for them."""
    check()
    scales = random(k // GROUP, n)
    weights = [Weight(words(k // 8, n), scales) for _ in copies(n * k // 2)]
    chosen: dict[int, tuple[Form, int]] = {}

    def call(x: Tensor, weight: Weight) -> Tensor:
        if len(x) not in chosen:
            chosen[len(x)] = fastest(x, weights)
        return launch(x, weight, *chosen[len(x)])

    return [functools.partial(call, weight=weight) for weight in weights]
