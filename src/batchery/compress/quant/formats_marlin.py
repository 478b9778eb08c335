# SPDX-License-Identifier: Apache-2.0
"""MARLIN's own layout of a symmetric four-bit weight, read and written for its users.

Use it to exchange weights with MARLIN's CUDA kernel; ours reads none of it.

The weight is taken as K×N and cut into 16×16 tiles. Four tiles side by side are 1024 values, which
go in the order in which 32 threads hold the fragments of a matrix instruction: thread t has, of
each tile, rows 2(t % 4) + (0, 1, 8, 9) of columns t // 4 and 8 + t // 4. Its eight values make a
word, evens before odds. So a thread reads four words at once.

    B  int32 [K/16, 2 N]
    s  float16 [K/G, N], each 64 columns transposed as 8×8; with one group, each 32 columns in the
       order of an instruction's accumulators

Reference: Frantar et al., MARLIN, arXiv 2408.11743 (2024).
"""

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from batchery._core.validate import require
from batchery.compress.quant.formats import Reader, from_words, half_scales, to_words
from batchery.compress.quant.weight import QuantizedWeight

__all__ = ["pack_marlin", "unpack_marlin"]

TILE = 16
ROWS, COLUMNS = 256, 128  # what its kernel takes multiples of
GROUP = 128


@cache
def weight_order() -> Tensor:
    """Return where each of 1024 packed values lies in four tiles, int64 `(1024,)`."""
    thread = torch.arange(32).view(32, 1, 1, 1)
    tile = torch.arange(4).view(4, 1, 1)
    half = torch.arange(2).view(2, 1)
    row = 2 * (thread % 4) + torch.tensor([0, 1, 8, 9])
    column = thread // 4 + 8 * half
    held = TILE * TILE * tile + TILE * row + column
    return held.view(-1, 4, 2).transpose(1, 2).flatten()


@cache
def scale_order(grouped: bool) -> Tensor:
    """Return where each of 64 (or, with one group, 32) packed scales lies."""
    if grouped:
        return torch.arange(64).view(8, 8).t().flatten()
    pair = torch.tensor([0, 1, 8, 9, 16, 17, 24, 25])
    return (2 * torch.arange(4)[:, None] + pair).flatten()


def pack_marlin(qw: QuantizedWeight) -> dict[str, Tensor]:
    """Return `B` and `s`.

    Args:
        qw: symmetric, without act-order, N a multiple of 256 and K of 128, groups of 128 or K.

    Raises:
        ValueError: MARLIN has no form for the weight.
    """
    owner = "pack_marlin"
    (n, k), size = qw.shape, qw.group_size
    require(qw.zeros is None, owner, "zeros", "must be None: MARLIN is symmetric", "zeros")
    require(qw.g_idx is None, owner, "g_idx", "must be None: MARLIN has no act-order", "a g_idx")
    require(n % ROWS == 0, owner, "N", f"must be a multiple of {ROWS}", n)
    require(k % COLUMNS == 0, owner, "K", f"must be a multiple of {COLUMNS}", k)
    require(size in (GROUP, k), owner, "group_size", f"must be {GROUP} or {k}", size)
    tiles = qw.q.t().reshape(k // TILE, TILE, n // TILE, TILE).transpose(1, 2)
    order = weight_order().to(qw.q.device)
    words = to_words(tiles.reshape(-1, len(order))[:, order])
    scales = half_scales(owner, qw.scales).t()
    order = scale_order(size < k).to(scales.device)
    scales = scales.reshape(-1, len(order))[:, order]
    return {"B": words.view(k // TILE, 2 * n), "s": scales.reshape(k // size, n)}


def unpack_marlin(tensors: Mapping[str, Tensor], *, where: str = "") -> QuantizedWeight:
    """Read `B` and `s`; errors as for `unpack_gptq`.

    Example:
        >>> q = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 128) % 16
        >>> qw = QuantizedWeight(q, torch.ones(256, 1), None, None, group_size=128)
        >>> torch.equal(unpack_marlin(pack_marlin(qw)).q, q)
        True
    """
    read = Reader("unpack_marlin", tensors, where)
    words = read.words("B")
    k, n = TILE * words.shape[0], words.shape[1] // 2
    read.require(words.shape[1] % 128 == 0, "B", "must have a multiple of 128 columns", 2 * n)
    scales = read.scales("s", axis=1, n=n)
    order = scale_order(scales.shape[0] > 1).to(scales.device)
    scales = _reordered(scales, order).view_as(scales)
    nibbles = _reordered(from_words(words), weight_order().to(words.device))
    tiles = nibbles.view(k // TILE, n // TILE, TILE, TILE).transpose(1, 2)
    return read.weight(tiles.reshape(k, n).t(), scales.t(), None, k, "s", None)


def _reordered(packed: Tensor, order: Tensor) -> Tensor:
    """Put packed values back: value i of each run goes to place `order[i]`."""
    runs = packed.reshape(-1, len(order))
    first = torch.empty_like(runs)
    first[:, order] = runs
    return first
