# SPDX-License-Identifier: Apache-2.0
"""MARLIN's own layouts of a symmetric four-bit weight, dense and 2:4, for its users.

Use it to exchange weights with MARLIN's CUDA kernels; ours read none of it. The 2:4 one is read
alone: vLLM and compressed-tensors are giving it up.

The weight is taken as K×N and cut into 16×16 tiles. Four tiles side by side are 1024 values, which
go in the order in which 32 threads hold the fragments of a matrix instruction: thread t has, of
each tile, rows 2(t % 4) + (0, 1, 8, 9) of columns t // 4 and 8 + t // 4. Its eight values make a
word, evens before odds. So a thread reads four words at once.

    B  int32 [K/16, 2 N]
    s  float16 [K/G, N], each 64 columns transposed as 8×8; with one group, each 32 columns in the
       order of an instruction's accumulators

2:4 weights keep two of every four columns k: a value each, and where it stood, in two bits. Here
the weight is the sparse left operand of an instruction of 16 rows and 32 columns. 64 rows are four
instructions j = 0…3, whose row r is row 8(r % 8) + 4(r // 8) + j. Thread t has of each
rows t // 4 and 8 + t // 4, of the 16 columns that are left 2(t % 4) + (0, 1, 8, 9).

    B_24    int32 [K/32, 2 N]   as above, a word of thread t for each j
    B_meta  int16 [K/32, 2 N]   16 columns of a row each, four bits for every four: the first place
                                kept, then the second; in the order of the pairs of instructions
    s       float16 [K/G, N]    each 8 rows in the order 0, 4, 1, 5, 2, 6, 3, 7; as they are with
                                one group

compressed-tensors ("marlin-24") names them weight_packed, meta and scale_packed.

Reference: Frantar et al., MARLIN, arXiv 2408.11743 (2024); for 2:4 the layouts of Sparse-MARLIN,
vLLM and compressed-tensors.
"""

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from batchery._core.validate import require
from batchery.compress.quant.formats import Reader, from_words, half_scales, to_words
from batchery.compress.quant.weight import MIDDLE, QuantizedWeight

__all__ = ["pack_marlin", "unpack_marlin", "unpack_marlin_24"]

TILE = 16
ROWS, COLUMNS = 256, 128  # what its kernel takes multiples of
GROUP = 128
NAMES_24 = ("B_24", "B_meta", "s")
COMPRESSED_24 = ("weight_packed", "meta", "scale_packed")


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

    Examples:
        >>> q = torch.full((256, 128), 7, dtype=torch.uint8)
        >>> packed = pack_marlin(QuantizedWeight(q, torch.ones(256, 1), None, None, group_size=128))
        >>> packed["B"].shape, packed["s"].shape, hex(packed["B"][0, 0].item())
        (torch.Size([8, 512]), torch.Size([1, 256]), '0x77777777')
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

    Examples:
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


def unpack_marlin_24(tensors: Mapping[str, Tensor], *, where: str = "") -> QuantizedWeight:
    """Read a 2:4 layer of four bits; what is pruned has q = 8.

    Args:
        tensors: `B_24`, `B_meta` and `s`, or `weight_packed`, `meta` and `scale_packed`, N a
            multiple of 64 and K of 32, groups of 128 or K.
        where: the layer and its file, for errors.

    Raises:
        ValueError: a tensor is missing or does not fit, or the metadata name a pair of columns that
            is none; compressed-tensors' file has K = 256 in two groups, whose scales it leaves in
            another order than the kernel reads.

    Examples:
        >>> nines = torch.full((1, 128), 0x99999999 - 2**32, dtype=torch.int32)
        >>> first_two = torch.full((1, 128), 0x4444, dtype=torch.int16)
        >>> layer = {"B_24": nines, "B_meta": first_two, "s": torch.ones(1, 64)}
        >>> unpack_marlin_24(layer).q[0, :8]
        tensor([9, 9, 8, 8, 9, 9, 8, 8], dtype=torch.uint8)
    """
    read = Reader("unpack_marlin_24", tensors, where)
    compressed = COMPRESSED_24[0] in tensors
    words_name, meta_name, scales_name = COMPRESSED_24 if compressed else NAMES_24
    words = read.words(words_name)
    steps, width = words.shape
    k, n = 2 * TILE * steps, width // 2
    read.require(width % 128 == 0, words_name, "must have a multiple of 128 columns", width)
    meta = read.shaped(meta_name, (steps, width))
    read.require(meta.dtype == torch.int16, meta_name, "must be int16", meta.dtype)
    scales = read.scales(scales_name, axis=1, n=n)
    groups = len(scales)
    whole = groups == 1 or groups * GROUP == k
    read.require(whole, scales_name, f"must be of groups of {GROUP} or {k} columns", groups)
    known = not (compressed and k == 2 * GROUP and groups == 2)
    rule = "must not be two groups: its writer and the kernel disagree on their order"
    read.require(known, scales_name, rule, groups)
    if groups > 1:
        scales = scales.reshape(groups, -1, 4, 2).transpose(2, 3).reshape(groups, n)
    first, second = _places(read, meta_name, meta)
    kept = _kept(words)
    q = [
        torch.where(
            first == place, kept[..., 0], torch.where(second == place, kept[..., 1], MIDDLE)
        )
        for place in range(4)
    ]
    return read.weight(torch.stack(q, -1).view(n, k), scales.t(), None, k, scales_name, None)


def _kept(words: Tensor) -> Tensor:
    """Return the values that are left, uint8 `(N, K/4, 2)`."""
    steps, width = words.shape
    # step, 64 rows, t // 4, t % 4, instruction, odd column, upper row, upper column
    held = from_words(words).view(steps, width // 128, 8, 4, 4, 2, 2, 2)
    return held.permute(1, 2, 6, 4, 0, 7, 3, 5).reshape(width // 2, -1, 2)


def _places(read: Reader, name: str, meta: Tensor) -> tuple[Tensor, Tensor]:
    """Return which of every four columns are left, uint8 `(N, K/4)` twice."""
    steps, width = meta.shape
    # step, 64 rows, pair of instructions, row % 8, which of the pair, columns 0… or 16…, upper row
    held = from_words(meta).view(steps, width // 128, 2, 8, 2, 2, 2, 4)
    codes = held.permute(1, 3, 6, 2, 4, 0, 5, 7).reshape(width // 2, -1)
    first, second = codes & 3, codes >> 2
    wrong = first >= second
    if bool(wrong.any()):
        code = int(codes[wrong][0])
        read.require(False, name, "must name two of four columns in order", (code & 3, code >> 2))
    return first, second


def _reordered(packed: Tensor, order: Tensor) -> Tensor:
    """Put packed values back: value i of each run goes to place `order[i]`."""
    runs = packed.reshape(-1, len(order))
    first = torch.empty_like(runs)
    first[:, order] = runs
    return first
