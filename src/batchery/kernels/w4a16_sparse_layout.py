# SPDX-License-Identifier: Apache-2.0
"""2:4 weights of four bits as their kernel reads them, at 3/8 of a byte each, and back.

A weight W `(N, K)` is kept as w = s·(q - 8), as in `w4a16_layout`; at most two of columns
4c…4c+3 have q ≠ 8. Of each four columns only the two values are kept, and a code of three bits that
says which of the first three columns is kept; the last follows.

Columns are cut into units of 512, those into four runs of 128, rows into chunks of 64. In lane j
(of 32) of a row, a byte holds the two values of columns 4j…4j+3 of one run, a nibble their code:

    plane 0    values of run 0, of run 1         (low byte first)
    plane 1    values of run 2, of run 3
    plane 2    codes of run 0, 1, 2, 3           (lowest nibble first)

    words      int16 (chunks, units, 3, 64, 32): what a program reads in one turn is contiguous
    scales     (groups, rows), any floating dtype

Values are stored as q xor 8, so that 0 is the zero level. The low nibble has the value of column 0,
the high one that of column 1, where those are kept; columns 2 and 3 take what is left: the kernel
needs two bitwise selections to put every value in its place.

Rows are padded to whole tiles with scale 0, columns to whole units with the zero level. This is no
format for storage: keep q and scales, and pack after loading.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from batchery._core.validate import require
from batchery.kernels.w4a16_layout import CHUNK, WIDEST, groups_of

__all__ = [
    "LANES",
    "UNIT",
    "PackedSparseW4",
    "arrange",
    "dequantize_sparse_w4",
    "pack_sparse_w4",
    "unpack_sparse_w4",
]

LANES = 32
UNIT = 16 * LANES  # columns
GROUPS = (32, 64, 128, 256)
ZERO = 8
COUNTERS = 1024  # at least so many output tiles can be split, however small the weight
# The two columns kept, a bit each, for those that are not zero: 0 where these are three or four.
KEPT = (3, 3, 3, 3, 5, 5, 6, 0, 9, 9, 10, 0, 12, 0, 0, 0)


@dataclass(frozen=True)
class PackedSparseW4:
    """A 2:4 weight of four bits ready for `w4a16_sparse_matmul`; made by `pack_sparse_w4`.

    Attributes:
        words: int16 `(chunks, units, 3, 64, 32)`; see the module.
        scales: `(groups, rows)`, rows and groups with padding.
        counters: int32 zeros that the programs of one output tile meet at; zero again after each
            matmul. Two matmuls on one weight must not run at the same time.
        shape: (N, K).
        group_size: G; K for one group a row.
    """

    words: Tensor
    scales: Tensor
    counters: Tensor
    shape: tuple[int, int]
    group_size: int

    @property
    def nbytes(self) -> int:
        """Bytes that a matmul reads."""
        return self.words.nbytes + self.scales.nbytes


def pack_sparse_w4(
    q: Tensor, scales: Tensor, *, device: torch.device | str | None = None
) -> PackedSparseW4:
    """Pack a symmetric 2:4 weight.

    Args:
        q: uint8 `(N, K)`, values 0…15, at most two of every four columns not 8; K is a multiple
            of 4.
        scales: floating `(N, K / G)`; G is 32, 64, 128, 256 or K.
        device: where to; by default where q is.

    Raises:
        ValueError: a shape, group size or value that cannot be packed.

    Examples:
        >>> q = torch.tensor([[8, 15, 8, 1, 9, 8, 8, 8]] * 2, dtype=torch.uint8)
        >>> weight = pack_sparse_w4(q, torch.ones(2, 1))
        >>> weight.words.shape, torch.equal(unpack_sparse_w4(weight), q)
        (torch.Size([2, 1, 3, 64, 32]), True)
    """
    n, k, groups = _checked(q, scales)
    device = torch.device(q.device if device is None else device)
    rows, columns = -(-n // WIDEST) * WIDEST, -(-k // UNIT) * UNIT
    padded = torch.full((rows, columns), ZERO, dtype=torch.uint8, device=device)
    padded[:n, :k] = q.to(device)
    size = k // groups
    count = columns // size if groups > 1 else 1
    table = torch.zeros(count, rows, dtype=scales.dtype, device=device)
    table[:groups, :n] = scales.t().to(device)
    return PackedSparseW4(
        words=_pack_words(padded),
        scales=table,
        counters=torch.zeros(max(rows // CHUNK, COUNTERS), dtype=torch.int32, device=device),
        shape=(n, k),
        group_size=size,
    )


def _checked(q: Tensor, scales: Tensor) -> tuple[int, int, int]:
    """Return N, K and the groups of a row, or raise."""
    owner = "pack_sparse_w4"
    require(q.dtype == torch.uint8, owner, "q", "must be uint8", q.dtype)
    fits = q.dim() == 2 and q.numel() > 0 and q.shape[1] % 4 == 0
    require(fits, owner, "q", "must be (N, K), K a multiple of 4", tuple(q.shape))
    n, k = q.shape
    require(bool((q < 16).all()), owner, "q", "must be below 16", int(q.max()))
    most = int((q != ZERO).view(n, -1, 4).sum(-1).max())
    require(most <= 2, owner, "q", "must have two of every four columns at 8", 4 - most)
    return n, k, groups_of(owner, scales, n, k)


def _pack_words(q: Tensor) -> Tensor:
    fours = (q ^ ZERO).view(len(q) // CHUNK, CHUNK, -1, 4, LANES, 4).transpose(1, 2)
    u0, u1, u2, u3 = fours.unbind(-1)
    used = (u0 != 0) | (u1 != 0).to(torch.uint8) << 1 | (u2 != 0).to(torch.uint8) << 2
    used |= (u3 != 0).to(torch.uint8) << 3
    kept = torch.tensor(KEPT, dtype=torch.uint8, device=q.device)[used.int()]
    low = torch.where(kept & 1 != 0, u0, torch.where(kept & 4 != 0, u2, u3))
    high = torch.where(kept & 2 != 0, u1, torch.where(kept & 8 != 0, u3, u2))
    values, (a, b, c, d) = low | high << 4, (kept & 7).unbind(-2)
    planes = [values[..., 0:2, :], values[..., 2:4, :], torch.stack([a | b << 4, c | d << 4], -2)]
    # (chunks, units, planes, 64, lanes, two bytes): a word has the two bytes of a lane
    joined = torch.stack(planes, 2).transpose(-1, -2).contiguous()
    return joined.view(torch.int16).squeeze(-1)


def unpack_sparse_w4(weight: PackedSparseW4) -> Tensor:
    """Return q, uint8 `(N, K)`."""
    n, k = weight.shape
    chunks, units = weight.words.shape[:2]
    parts = weight.words[..., None].view(torch.uint8)  # (chunks, units, 3, 64, 32, 2)
    values = torch.cat([parts[:, :, 0], parts[:, :, 1]], -1)
    codes = parts[:, :, 2].repeat_interleave(2, -1)
    codes = codes >> torch.tensor([0, 4, 0, 4], dtype=torch.uint8, device=codes.device) & 7
    bits = torch.tensor([1, 2, 4], dtype=torch.uint8, device=codes.device)
    kept = (codes[..., None] & bits) != 0
    last = kept.sum(-1) == 1
    a, b = values & 15, values >> 4
    columns = [
        a * kept[..., 0],
        b * kept[..., 1],
        torch.where(kept[..., 0], b, a) * kept[..., 2],
        torch.where(kept[..., 1], a, b) * last,
    ]
    fours = torch.stack(columns, -1)  # (chunks, units, 64, lanes, runs, 4)
    q = fours.permute(0, 2, 1, 4, 3, 5).reshape(chunks * CHUNK, units * UNIT)
    return q[:n, :k] ^ ZERO


def dequantize_sparse_w4(weight: PackedSparseW4, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight `(N, K)` in a dtype, computed at least in float32."""
    n, k = weight.shape
    wide = torch.promote_types(dtype, torch.float32)
    scales = weight.scales[: k // weight.group_size, :n].t().to(wide)
    w = unpack_sparse_w4(weight).to(wide).sub_(ZERO)
    return w.mul_(scales.repeat_interleave(weight.group_size, 1)).to(dtype)


def arrange(x: Tensor, units: int) -> Tensor:
    """Bring activations `(M, K)` in the order of the lanes, filled up to whole units with zeros.

    Column 4j + i of each 128 goes to 32i + j. Layers of one input may share the result.
    """
    missing = units * UNIT - x.shape[1]
    x = F.pad(x, (0, missing)) if missing else x
    return x.reshape(len(x), -1, LANES, 4).transpose(-1, -2).reshape(len(x), -1)
