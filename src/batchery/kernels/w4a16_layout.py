# SPDX-License-Identifier: Apache-2.0
"""Four-bit weights as the kernels read them, and back.

A weight W `(N, K)` is kept as w = s·(q - z): q in 0…15, and a scale s and zero z for each row and
group of G neighbouring columns (z is 8 when there are no zeros).

The form is made so that a matmul needs no shuffle. Columns are cut into blocks of 4J (J is 64, or
32 for groups of 32), rows into chunks of 64. The 16-bit word j of a row holds columns j, J + j,
2J + j and 3J + j of its block, lowest nibble first: nibble i of all words is a tile of J
neighbouring columns by itself, lies inside one group, and meets J neighbouring columns of the
activations. The words of one chunk and block (8 KiB) are contiguous, and so are the blocks of a
chunk: a program streams.

    words   int16 (chunks, blocks, 64, J)
    scales  (groups, rows), any floating dtype
    zeros   uint8 (groups, rows)

Rows are padded to whole tiles, columns to whole blocks, with scale 0. With `gated`, W holds the
gate above the up projection, and their rows are woven together so that one tile has both.

This is no format for storage: keep q, scales and zeros, and pack after loading.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from batchery._core.validate import require

__all__ = [
    "NIBBLES",
    "WIDEST",
    "PackedW4",
    "dequantize_w4",
    "dequantized_slices",
    "groups_of",
    "lane_columns",
    "pack_w4",
    "weave",
]

CHUNK = 64  # rows of a chunk: what one warp group multiplies at once
NIBBLES = 4  # in a word
GROUPS = (32, 64, 128, 256)
WIDEST = 128  # rows of the widest output tile
NATIVE_ROWS = 16  # torch's four-bit matmul on the CPU takes whole blocks of rows
COUNTERS = 1024  # at least so many output tiles can be split, however small the weight


@dataclass(frozen=True)
class PackedW4:
    """A four-bit weight ready for `w4a16_matmul`; made by `pack_w4`.

    Attributes:
        words: int16 `(chunks, blocks, 64, J)`; see the module.
        scales: `(groups, rows)`, rows with padding.
        zeros: uint8 `(groups, rows)`, or None where every zero is 8.
        counters: int32 zeros that the programs of one output tile meet at; zero again after each
            matmul. Two matmuls on one weight must not run at the same time.
        native: on the CPU, where torch has a four-bit matmul for this shape: its words and its
            bfloat16 table of scales and offsets.
        shape: (N, K).
        group_size: G; K for one group a row.
        gated: whether rows are gate and up, to be joined by silu(gate)·up.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    counters: Tensor
    native: tuple[Tensor, Tensor] | None
    shape: tuple[int, int]
    group_size: int
    gated: bool

    @property
    def rows(self) -> int:
        """N with padding."""
        return self.scales.shape[1]

    @cached_property
    def begins(self) -> int:
        """Addresses of all tensors in one number: a bit is 0 where it is in each."""
        zeros = 0 if self.zeros is None else self.zeros.data_ptr()
        own = self.words.data_ptr() | self.scales.data_ptr() | self.counters.data_ptr()
        return own | zeros

    @property
    def nbytes(self) -> int:
        """Bytes that a matmul reads."""
        zeros = 0 if self.zeros is None else self.zeros.nbytes
        return self.words.nbytes + self.scales.nbytes + zeros


def pack_w4(
    q: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    gated: bool = False,
    device: torch.device | str | None = None,
) -> PackedW4:
    """Pack a quantised weight for `w4a16_matmul`.

    Args:
        q: uint8 `(N, K)`, values 0…15, columns in the order of the activations (an act-order
            permutation is applied to q and to the activations by the caller).
        scales: floating `(N, K / G)`; G is 32, 64, 128, 256 or K.
        zeros: uint8 `(N, K / G)`, values 0…15; absent: 8.
        gated: N = 2F rows of gate over up; the matmul then gives silu(gate)·up, F wide.
        device: where to; by default where q is.

    Raises:
        ValueError: a shape, group size or value that cannot be packed.

    Examples:
        >>> q = torch.randint(0, 16, (128, 256), dtype=torch.uint8)
        >>> weight = pack_w4(q, torch.ones(128, 2))
        >>> weight.words.shape, weight.group_size
        (torch.Size([2, 1, 64, 64]), 128)
        >>> torch.equal(dequantize_w4(weight, torch.float32), q - 8.0)
        True
    """
    n, k, groups = _checked(q, scales, zeros, gated)
    device = torch.device(q.device if device is None else device)
    q, scales = q.to(device), scales.to(device)
    zeros = None if zeros is None else zeros.to(device)
    size = k // groups
    native = None
    if device.type == "cpu" and n % NATIVE_ROWS == 0 and size in GROUPS:
        native = _pack_native(q, scales, zeros)
    if gated:
        q, scales = weave(q), weave(scales)
        zeros = None if zeros is None else weave(zeros)
    rows = _padded(n, WIDEST)
    block = NIBBLES * lane_columns(size, k)
    count = _padded(k, block) // size if groups > 1 else 1
    return PackedW4(
        words=_pack_words(_pad(q, rows, _padded(k, block)), block),
        scales=_pad(scales, rows, count).t().contiguous(),
        zeros=None if zeros is None else _pad(zeros, rows, count).t().contiguous(),
        counters=torch.zeros(max(rows // CHUNK, COUNTERS), dtype=torch.int32, device=device),
        native=native,
        shape=(n, k),
        group_size=size,
        gated=gated,
    )


def lane_columns(group_size: int, k: int) -> int:
    """Return J, the columns that one nibble of a row of words covers."""
    return 32 if group_size == 32 and k > 32 else 64


def dequantize_w4(weight: PackedW4, dtype: torch.dtype) -> Tensor:
    """Return the weight `(N, K)` in `dtype`, rows in their first order."""
    w = torch.cat(list(dequantized_slices(weight, dtype)))
    return torch.cat([w[0::2], w[1::2]]) if weight.gated else w


def dequantized_slices(weight: PackedW4, dtype: torch.dtype, rows: int = 512) -> Iterator[Tensor]:
    """Yield the weight in slices of `rows` rows (a multiple of 64), woven where it is gated.

    Slices that stay in the cache until they are multiplied save the CPU most of its time.
    """
    n, k = weight.shape
    groups = k // weight.group_size
    lanes = weight.words.shape[-1]
    wide = torch.promote_types(dtype, torch.float32)
    for begin in range(0, n, rows):
        end = min(begin + rows, n)

        def of_columns(table: Tensor, begin: int = begin, end: int = end) -> Tensor:
            own = table[:groups, begin:end].t().to(wide)
            return own.repeat_interleave(weight.group_size, 1)

        words = weight.words[begin // CHUNK : _padded(end, CHUNK) // CHUNK]
        low, high = words.view(torch.uint8).unflatten(-1, (lanes, 2)).unbind(-1)
        parts = torch.stack([low & 15, low >> 4, high & 15, high >> 4], -2)
        q = parts.transpose(1, 2).reshape(len(words) * CHUNK, -1)[: end - begin, :k]
        offset = 8 if weight.zeros is None else of_columns(weight.zeros)
        yield ((q.to(wide) - offset) * of_columns(weight.scales)).to(dtype)


def weave(rows: Tensor) -> Tensor:
    """Turn gate rows over up rows into gate 0, up 0, gate 1, up 1 and so on."""
    return torch.stack(rows.chunk(2), 1).flatten(0, 1)


def groups_of(owner: str, scales: Tensor, n: int, k: int) -> int:
    """Return the groups of a row of a weight `(n, k)`, or raise where scales do not fit."""
    fits = scales.dim() == 2 and scales.shape[0] == n and scales.shape[1] > 0
    require(fits, owner, "scales", f"must be ({n}, {k} / G)", tuple(scales.shape))
    require(scales.is_floating_point(), owner, "scales", "must be floating", scales.dtype)
    groups = scales.shape[1]
    require(k % groups == 0, owner, "scales", f"must cut {k} columns into equal groups", groups)
    allowed = groups == 1 or k // groups in GROUPS
    require(allowed, owner, "scales", f"must make groups of K or of {GROUPS} columns", k // groups)
    return groups


def _checked(q: Tensor, scales: Tensor, zeros: Tensor | None, gated: bool) -> tuple[int, int, int]:
    """Return N, K and the groups of a row, or raise."""
    owner = "pack_w4"
    require(q.dtype == torch.uint8, owner, "q", "must be uint8", q.dtype)
    require(q.dim() == 2 and q.numel() > 0, owner, "q", "must be (N, K)", tuple(q.shape))
    n, k = q.shape
    require(bool((q < 16).all()), owner, "q", "must be below 16", int(q.max()))
    groups = groups_of(owner, scales, n, k)
    if zeros is not None:
        require(zeros.dtype == torch.uint8, owner, "zeros", "must be uint8", zeros.dtype)
        same = zeros.shape == scales.shape
        require(same, owner, "zeros", f"must be {tuple(scales.shape)}", tuple(zeros.shape))
        require(bool((zeros < 16).all()), owner, "zeros", "must be below 16", int(zeros.max()))
    require(not gated or n % 2 == 0, owner, "q", "must have gate and up rows to be gated", n)
    return n, k, groups


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _pad(table: Tensor, rows: int, columns: int) -> Tensor:
    padded = table.new_zeros(rows, columns)
    padded[: table.shape[0], : table.shape[1]] = table
    return padded


def _pack_words(q: Tensor, block: int) -> Tensor:
    parts = q.view(len(q) // CHUNK, CHUNK, -1, NIBBLES, block // NIBBLES).transpose(1, 2).unbind(3)
    low, high = parts[0] | parts[1] << 4, parts[2] | parts[3] << 4
    return torch.stack([low, high], -1).view(torch.int16).squeeze(-1)


def _pack_native(q: Tensor, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor]:
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
    # torch's operation means (q - 8)·scale + offset
    offset = torch.zeros_like(scales) if zeros is None else (8 - zeros.to(scales)) * scales
    table = torch.stack([scales.t(), offset.t()], -1)
    return words, table.to(torch.bfloat16).contiguous()
