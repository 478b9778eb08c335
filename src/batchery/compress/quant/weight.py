# SPDX-License-Identifier: Apache-2.0
"""A weight of four bits in its plain form: what quantisers make, and formats store.

Use it between a quantiser, a checkpoint and the kernels. It is not small: q takes a byte for each
weight; `pack` makes the form that the kernels read.

    w[n, k] = s[n, g(k)] · (q[n, k] - z[n, g(k)])       q, z in 0…15;  z is 8 where there is none

Column k is in group g(k) = k // group_size, or g_idx[k]: act-order quantises the columns of large
activations first, and some makers form groups in that order. Columns stay in the order of the
activations; only `pack` brings those of a group together.

Reference: Frantar et al., GPTQ, arXiv 2210.17323, whose checkpoints have these four tensors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from batchery._core.validate import integer, require, require_type
from batchery.kernels.w4a16_layout import GROUPS, PackedW4, pack_w4

__all__ = ["QuantizedWeight", "all_finite", "dequantize", "pack", "require_packable"]

LEVELS = 16
MIDDLE = 8  # the zero of a symmetric weight


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A four-bit weight `(N, K)`.

    Attributes:
        q: uint8 `(N, K)`, values 0…15, columns in their first order.
        scales: floating `(N, groups)`, finite.
        zeros: uint8 `(N, groups)`, values 0…15; None where every zero is 8.
        g_idx: int32 `(K,)`, the group of each column; None where it is k // group_size.
        group_size: columns of a group; K for one group a row.

    Raises:
        ValueError: a shape, dtype or value that does not fit.

    Examples:
        >>> q = torch.tensor([[9, 8, 8, 6]], dtype=torch.uint8)
        >>> qw = QuantizedWeight(q, torch.tensor([[0.5, 2.0]]), None, None, group_size=2)
        >>> dequantize(qw, torch.float32)
        tensor([[ 0.5000,  0.0000,  0.0000, -4.0000]])
        >>> qw.shape
        (1, 4)
    """

    q: Tensor
    scales: Tensor
    zeros: Tensor | None
    g_idx: Tensor | None
    group_size: int

    def __post_init__(self) -> None:
        """Refuse what is no weight."""
        owner = "QuantizedWeight"
        require_type(isinstance(self.q, Tensor), owner, "q", "must be a tensor", self.q)
        require(self.q.dtype == torch.uint8, owner, "q", "must be uint8", self.q.dtype)
        fits = self.q.dim() == 2 and self.q.numel() > 0
        require(fits, owner, "q", "must be (N, K), not empty", tuple(self.q.shape))
        n, k = self.q.shape
        integer(owner, "group_size", self.group_size, at_least=1)
        whole = k % self.group_size == 0
        require(whole, owner, "group_size", f"must divide K = {k}", self.group_size)
        table = (n, k // self.group_size)
        shape = tuple(self.scales.shape)
        require(shape == table, owner, "scales", f"must be {table}", shape)
        floating = self.scales.is_floating_point()
        require(floating, owner, "scales", "must be floating", self.scales.dtype)
        _below(owner, "q", self.q, LEVELS)
        finite = bool(torch.isfinite(self.scales).all())
        require(finite, owner, "scales", "must be finite", "NaN or infinity")
        if self.zeros is not None:
            require(
                self.zeros.dtype == torch.uint8, owner, "zeros", "must be uint8", self.zeros.dtype
            )
            shape = tuple(self.zeros.shape)
            require(shape == table, owner, "zeros", f"must be {table}", shape)
            _below(owner, "zeros", self.zeros, LEVELS)
        if self.g_idx is not None:
            dtype, shape = self.g_idx.dtype, tuple(self.g_idx.shape)
            require(dtype == torch.int32, owner, "g_idx", "must be int32", dtype)
            require(shape == (k,), owner, "g_idx", f"must be ({k},)", shape)
            least = int(self.g_idx.min())
            require(least >= 0, owner, "g_idx", "must be >= 0", least)
            _below(owner, "g_idx", self.g_idx, table[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        n, k = self.q.shape
        return n, k

    @property
    def groups(self) -> Tensor:
        """The group of each column, int64 `(K,)`.

        Examples:
            >>> q = torch.zeros(1, 4, dtype=torch.uint8)
            >>> QuantizedWeight(q, torch.ones(1, 2), None, None, group_size=2).groups
            tensor([0, 0, 1, 1])
        """
        if self.g_idx is not None:
            return self.g_idx.long()
        return torch.arange(self.q.shape[1], device=self.q.device) // self.group_size

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """Return the weight on another device.

        Examples:
            >>> q = torch.zeros(1, 4, dtype=torch.uint8)
            >>> qw = QuantizedWeight(q, torch.ones(1, 1), None, None, group_size=4)
            >>> qw.to("cpu").scales.device
            device(type='cpu')
        """
        zeros = None if self.zeros is None else self.zeros.to(device)
        g_idx = None if self.g_idx is None else self.g_idx.to(device)
        return QuantizedWeight(
            self.q.to(device), self.scales.to(device), zeros, g_idx, self.group_size
        )

    def rows(self, begin: int, end: int) -> "QuantizedWeight":
        """Return the weight of some outputs: one of several layers quantised together.

        Examples:
            >>> q = torch.tensor([[9, 9], [7, 7]], dtype=torch.uint8)  # one row of gate, one of up
            >>> both = QuantizedWeight(q, torch.ones(2, 1), None, None, group_size=2)
            >>> dequantize(both.rows(1, 2))
            tensor([[-1., -1.]])
        """
        zeros = None if self.zeros is None else self.zeros[begin:end]
        return QuantizedWeight(
            self.q[begin:end], self.scales[begin:end], zeros, self.g_idx, self.group_size
        )


def _below(owner: str, argument: str, tensor: Tensor, bound: int) -> None:
    most = int(tensor.max())
    require(most < bound, owner, argument, f"must be below {bound}", most)


def dequantize(qw: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight `(N, K)` in a dtype, computed at least in float32.

    Examples:
        >>> q, zeros = (torch.tensor(x, dtype=torch.uint8) for x in ([[0, 3, 15]], [[3]]))
        >>> dequantize(QuantizedWeight(q, torch.tensor([[0.5]]), zeros, None, group_size=3))
        tensor([[-1.5000,  0.0000,  6.0000]])
    """
    wide = torch.promote_types(dtype, torch.float32)
    scales = qw.scales.to(wide)
    zeros = None if qw.zeros is None else qw.zeros.to(wide)
    w = qw.q.to(wide)
    if qw.g_idx is not None:
        columns = qw.groups
        w -= MIDDLE if zeros is None else zeros[:, columns]
        return w.mul_(scales[:, columns]).to(dtype)
    parts = w.view(len(w), -1, qw.group_size)
    parts -= MIDDLE if zeros is None else zeros[:, :, None]
    parts *= scales[:, :, None]
    return w.to(dtype)


def pack(
    qw: QuantizedWeight, *, gated: bool = False, device: torch.device | str | None = None
) -> tuple[PackedW4, Tensor | None]:
    """Pack a weight for `w4a16_matmul`.

    Args:
        qw: groups of 32, 64, 128, 256 or K columns.
        gated: see `pack_w4`.
        device: where to; by default where the weight is.

    Returns:
        The packed weight, and None or the permutation int64 `(K,)` that the caller applies to the
        activations: the matmul takes `x[..., permutation]`.

    Raises:
        ValueError: the kernels have no such group size, or groups are not equally large.

    Examples:
        >>> from batchery.kernels.w4a16 import w4a16_matmul
        >>> q = torch.full((8, 64), 9, dtype=torch.uint8)
        >>> g_idx = torch.arange(64, dtype=torch.int32) % 2
        >>> qw = QuantizedWeight(q, torch.ones(8, 2), None, g_idx, group_size=32)
        >>> packed, permutation = pack(qw)
        >>> permutation[:4]
        tensor([0, 2, 4, 6])
        >>> w4a16_matmul(torch.ones(64)[permutation], packed)
        tensor([64., 64., 64., 64., 64., 64., 64., 64.])
    """
    permutation = act_order("pack", qw)
    q = qw.q if permutation is None else qw.q[:, permutation]
    device = q.device if device is None else torch.device(device)
    packed = pack_w4(q, qw.scales, qw.zeros, gated=gated, device=device)
    return packed, None if permutation is None else permutation.to(device)


def require_packable(owner: str, argument: str, group_size: int, k: int, where: str) -> None:
    """Raise where the kernels take no groups of that size: before all work, not after it.

    Args:
        owner: what errors say.
        argument: what the caller calls the size.
        group_size: columns of a group.
        k: K.
        where: the layer.

    Examples:
        >>> require_packable("me", "size", 48, 96, "up")
        Traceback (most recent call last):
        ValueError: me: size must be in (32, 64, 128, 256) and divide K = 96 of up, or be K, got 48
    """
    fits = group_size == k or (group_size in GROUPS and k % group_size == 0)
    rule = f"must be in {GROUPS} and divide K = {k} of {where}, or be K"
    require(fits, owner, argument, rule, group_size)


def act_order(owner: str, qw: QuantizedWeight) -> Tensor | None:
    """Return the order `(K,)` that brings the columns of a group together; None: they are."""
    if qw.g_idx is None:
        return None
    count = torch.bincount(qw.groups, minlength=qw.scales.shape[1])
    equal = bool((count == qw.group_size).all())
    rule = f"must give every group {qw.group_size} columns"
    require(equal, owner, "g_idx", rule, count.tolist())
    in_order = bool((qw.groups.diff() >= 0).all())
    return None if in_order else torch.argsort(qw.groups, stable=True)


def all_finite(tensor: Tensor, *, infinity: bool = False) -> bool:
    """Say whether a tensor has no NaN and, unless it may, no infinity; 8-bit ones are not read.

    Examples:
        >>> all_finite(torch.tensor([1.0, -torch.inf])), all_finite(torch.arange(3))
        (False, True)
    """
    if not tensor.is_floating_point() or tensor.itemsize == 1 or not tensor.numel():
        return True
    ends = torch.stack(tensor.aminmax())  # NaN where one is; `isfinite` takes ten times as long
    return not bool((ends.isnan() if infinity else ~ends.isfinite()).any())
