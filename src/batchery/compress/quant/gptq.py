# SPDX-License-Identifier: Apache-2.0
"""GPTQ: round a weight column by column, and let the columns to come make up for the errors.

When to use: four-bit weights of a trained linear layer when there are a few thousand tokens of its
input. When not: without data (`quantize_rtn`), or for weights that will be trained further.

With inputs X `(n, K)`, H = (2/n) XᵀX, the error of the outputs is tr((Ŵ-W) H (Ŵ-W)ᵀ). A column
that was never used is set to 0. With λ = damp·mean(diag H):

    H⁻¹ = Uᵀ U                           of H + λI, U upper
    for i = 0, 1, …                      in the order of the columns, or of falling H[i, i]
        q_i = clamp(round(w_i / s) + z, 0, 15)
        e_i = (w_i - s·(q_i - z)) / U[i, i]
        w_j ← w_j - U[i, j]·e_i          for all j > i

A group's scale is chosen when its first column is reached, so it fits the corrected weights.
Act-order with static groups needs them earlier: from the weights as they were. Scales are rounded
to the dtype that they will be stored in before columns are: that error is made up for, too.

Reference: Frantar et al., "GPTQ", ICLR 2023, arXiv 2210.17323.

Where we differ: clip search judges a range by what GPTQ itself makes of the group, Σ e², which is
the group's share of the final error; the official script weighs the errors of plain rounding, which
GPTQ does not make. U comes from one Cholesky factor and one triangular inverse (H with its columns
reversed is L Lᵀ, and U is L⁻¹ reversed back), without ever forming H⁻¹. The official script's
symmetric scale for a group of one sign is not followed; see `rtn`.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from batchery._core.validate import integer, number, one_of, require
from batchery.compress.quant.rtn import (
    SCALE_DTYPES,
    checked_group_size,
    choose_grid,
    quantize_rtn,
    stored_scales,
)
from batchery.compress.quant.weight import QuantizedWeight, dequantize
from batchery.kernels.gptq import Impl, round_block

__all__ = ["GPTQ", "check_settings", "inverse_factor"]

DAMPINGS = 3  # tries, each ten times the last
SEARCHED = 2**24  # weights that a clip search rounds at once: 64 MiB


def check_settings(
    owner: str, bits: int, damp: float, block_size: int, scale_dtype: torch.dtype | None
) -> None:
    """Raise where `GPTQ.quantize` would, whatever the weight.

    Examples:
        >>> check_settings("me", bits=4, damp=0.01, block_size=0, scale_dtype=torch.float16)
        Traceback (most recent call last):
        ValueError: me: block_size must be >= 1, got 0
    """
    one_of(owner, "bits", bits, (4,))
    number(owner, "damp", damp, at_least=0)
    integer(owner, "block_size", block_size, at_least=1)
    one_of(owner, "scale_dtype", scale_dtype, SCALE_DTYPES)


def inverse_factor(hessian: Tensor, damp: float = 0.0) -> Tensor | None:
    """Return the upper U with Uᵀ U = (H + λI)⁻¹, λ = damp·mean(diag H).

    Args:
        hessian: symmetric `(K, K)`.
        damp: relative damping.

    Returns:
        `(K, K)`, or None where the damped H is not positive definite.

    Examples:
        >>> inverse_factor(torch.diag(torch.tensor([4.0, 1.0])))
        tensor([[0.5000, 0.0000],
                [0.0000, 1.0000]])
    """
    reversed_ = hessian.flip(0, 1)
    reversed_.diagonal().add_(damp * hessian.diagonal().mean())
    lower, info = torch.linalg.cholesky_ex(reversed_)
    if int(info) != 0:
        return None
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.flip(0, 1).contiguous()


class GPTQ:
    """The inputs of one linear layer, or of several that share them, and how they round weights.

    Args:
        in_features: K.
        device: where to sum and quantise.
        dtype: of the sums, float32 or float64.
        name: what errors and warnings say.

    Attributes:
        gram: Σ x xᵀ over tokens, `(K, K)`.
        tokens: n.

    Raises:
        ValueError: `in_features` is below 1, or another dtype.

    Examples:
        >>> gptq = GPTQ(4)
        >>> gptq.add_batch(torch.randn(2, 10, 4))
        >>> qw = gptq.quantize(torch.randn(6, 4), group_size=4)
        >>> qw.shape, gptq.tokens
        ((6, 4), 20)
    """

    def __init__(
        self,
        in_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        name: str = "GPTQ",
    ) -> None:
        """Start with no tokens."""
        integer(name, "in_features", in_features, at_least=1)
        wide = dtype in (torch.float32, torch.float64)
        require(wide, name, "dtype", "must be float32 or float64", dtype)
        self.name = name
        self.tokens = 0
        self.gram = torch.zeros(in_features, in_features, device=device, dtype=dtype)

    def __repr__(self) -> str:
        """Name the layer, its width and the tokens seen."""
        return f"GPTQ({len(self.gram)}, name={self.name!r}, tokens={self.tokens})"

    @torch.no_grad()
    def add_batch(self, x: Tensor) -> None:
        """Take more inputs.

        Args:
            x: floating `(..., K)`; leave padding out.

        Raises:
            ValueError: the last dimension is not K.
        """
        k = len(self.gram)
        fits = x.dim() > 0 and x.shape[-1] == k
        require(fits, self.name, "x", f"must be (..., {k})", tuple(x.shape))
        rows = x.detach().reshape(-1, k).to(self.gram.device)
        if len(rows) == 0:
            return
        self.tokens += len(rows)
        if rows.is_cuda and rows.dtype in (torch.float16, torch.bfloat16):
            # Products of 16-bit numbers are exact in float32: the fast unit loses nothing.
            self.gram += torch.mm(rows.t(), rows, out_dtype=torch.float32)
            return
        rows = rows.to(self.gram.dtype)
        self.gram.addmm_(rows.t(), rows)

    def merge(self, others: Sequence["GPTQ"]) -> None:
        """Take the inputs that others saw.

        Examples:
            >>> one, other = GPTQ(2), GPTQ(2)
            >>> other.add_batch(torch.ones(5, 2))
            >>> one.merge([other])
            >>> one.tokens
            5
        """
        for other in others:
            self.gram += other.gram
            self.tokens += other.tokens

    @property
    def hessian(self) -> Tensor:
        """H = (2/n) Σ x xᵀ, `(K, K)`, undamped.

        Raises:
            ValueError: no tokens came, or they were not finite.

        Examples:
            >>> gptq = GPTQ(2)
            >>> gptq.add_batch(torch.tensor([[1.0, 0.0], [2.0, 1.0]]))
            >>> gptq.hessian
            tensor([[5., 2.],
                    [2., 1.]])
        """
        self._require_tokens()
        # A NaN, an infinity or an overflow in x shows in the diagonal.
        finite = bool(torch.isfinite(self.gram.diagonal()).all())
        require(finite, self.name, "Hessian", "must be finite", "NaN or infinity")
        return self.gram * (2 / self.tokens)

    def _require_tokens(self) -> None:
        require(self.tokens > 0, self.name, "calibration", "must hold tokens", self.tokens)

    @torch.no_grad()
    def quantize(
        self,
        w: Tensor,
        *,
        bits: int = 4,
        group_size: int = 128,
        symmetric: bool = True,
        act_order: bool = False,
        static_groups: bool = True,
        damp: float = 0.01,
        block_size: int = 128,
        clip_search: bool = False,
        scale_dtype: torch.dtype | None = torch.float16,
        impl: Impl = "auto",
    ) -> QuantizedWeight:
        """Quantise a weight for the inputs seen.

        Rows do not meet: layers that share their input may be stacked along N, and cost one
        factorisation.

        Args:
            w: floating `(N, K)`, on the device of the sums.
            bits: 4.
            group_size: columns that share a scale; divides K; -1 for all K.
            symmetric: let every zero be 8.
            act_order: round the columns of the largest inputs first.
            static_groups: with act-order, let groups be neighbouring columns, their scales taken
                from w itself: nothing moves at inference. Otherwise groups follow the order of
                rounding, and the result has a `g_idx`. Without act-order it makes no difference.
            damp: share of the Hessian's mean diagonal that is added to it; ten and a hundred times
                as much where that does not make it positive definite, and then no GPTQ but RTN.
            block_size: columns that are corrected at once; for speed alone.
            clip_search: try 76 ranges for each group, and keep the one with the least Σ e²; for
                static groups, with the least squared error of the weights.
            scale_dtype: what scales are rounded to; see `quantize_rtn`.
            impl: form of `round_block`.

        Returns:
            The weight, scales in `scale_dtype`; without one in the dtype of the sums.

        Raises:
            ValueError: a setting, shape or value that does not fit; no tokens; inputs that were
                not finite; a scale too large for `scale_dtype`.

        Examples:
            >>> generator = torch.Generator().manual_seed(0)
            >>> w, x = (torch.randn(n, 32, generator=generator) for n in (8, 100))
            >>> gptq = GPTQ(32)
            >>> gptq.add_batch(x.cumsum(1))  # columns that hang together
            >>> plain, better = quantize_rtn(w, group_size=32), gptq.quantize(w, group_size=32)
            >>> gptq.hessian_error(w, better) < gptq.hessian_error(w, plain)
            True
        """
        check_settings(self.name, bits, damp, block_size, scale_dtype)
        size = checked_group_size(self.name, w, bits, group_size)
        k = len(self.gram)
        require(w.shape[1] == k, self.name, "w", f"must be (N, {k})", tuple(w.shape))
        device = self.gram.device
        require(w.device == device, self.name, "w", f"must be on {device}", w.device)
        grid: dict[str, Any] = {"symmetric": symmetric, "scale_dtype": scale_dtype}
        hessian = self.hessian
        dead = hessian.diagonal() == 0
        hessian.diagonal().masked_fill_(dead, 1.0)
        wide = w.detach().to(hessian.dtype).masked_fill(dead, 0.0)
        order = None
        if act_order:
            order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        factor = self.damped_factor(hessian if order is None else hessian[order][:, order], damp)
        if factor is None:
            return quantize_rtn(wide, group_size=size, clip_search=clip_search, **grid)
        groups = torch.arange(k, device=device) // size
        rounder = _Rounder(wide, size, symmetric, scale_dtype, clip_search, block_size, impl)
        if order is not None and static_groups:
            grids = quantize_rtn(wide, group_size=size, clip_search=clip_search, **grid)
            q = rounder.with_grids(wide.t()[order].contiguous(), factor, groups[order], grids)
        else:
            rows = wide.t() if order is None else wide.t()[order]
            q = rounder.in_turn(rows.contiguous(), factor, groups)
        g_idx = None
        if order is not None:
            inverse = torch.argsort(order)
            q = q[inverse]
            g_idx = None if static_groups else groups[inverse].int()
        zeros = None if rounder.zeros is None else rounder.zeros.t().contiguous()
        scales = stored_scales(self.name, rounder.scales.t().contiguous(), scale_dtype)
        return QuantizedWeight(q.t().contiguous(), scales, zeros, g_idx, size)

    def damped_factor(self, hessian: Tensor, damp: float) -> Tensor | None:
        """Return the factor of a Hessian at the first of three dampings that will do.

        None, with a warning, where none does.

        Examples:
            >>> hessian = torch.diag(torch.tensor([3.5, 0.5]))  # λ = 0.25 · 2
            >>> GPTQ(2).damped_factor(hessian, damp=0.25)
            tensor([[0.5000, 0.0000],
                    [0.0000, 1.0000]])
        """
        for _ in range(DAMPINGS):
            factor = inverse_factor(hessian, damp)
            if factor is not None:
                return factor
            damp *= 10
        message = f"{self.name}: the Hessian is not positive definite at damp={damp / 10:g}: RTN"
        warnings.warn(message, stacklevel=3)
        return None

    @torch.no_grad()
    def hessian_error(self, w: Tensor, qw: QuantizedWeight) -> float:
        """Return tr((Ŵ-W) H (Ŵ-W)ᵀ): twice the mean squared error of the outputs, summed.

        Args:
            w: `(N, K)`.
            qw: its quantised form.

        Raises:
            ValueError: no tokens came.

        Examples:
            >>> gptq = GPTQ(2)
            >>> gptq.add_batch(torch.eye(2))
            >>> w = torch.tensor([[-7.5, 0.5]])  # rounded to -8 and 0
            >>> gptq.hessian_error(w, quantize_rtn(w, group_size=2))
            0.5
        """
        return self.energy(dequantize(qw, self.gram.dtype) - w.to(self.gram.dtype))

    @torch.no_grad()
    def energy(self, w: Tensor) -> float:
        """Return tr(W H Wᵀ): the same of the outputs themselves; errors too.

        Examples:
            >>> gptq = GPTQ(2)
            >>> gptq.add_batch(torch.eye(2))
            >>> gptq.energy(torch.tensor([[3.0, 4.0]]))
            25.0
        """
        self._require_tokens()
        w = w.to(self.gram.dtype)
        return float(((w @ self.gram) * w).sum()) * 2 / self.tokens


class _Rounder:
    """Rounds rows `(K, N)`, one for each column of the weight, with grids `(groups, N)`.

    Both ways spend the rows and return q `(K, N)`.
    """

    def __init__(
        self,
        w: Tensor,
        group_size: int,
        symmetric: bool,
        scale_dtype: torch.dtype | None,
        clip_search: bool,
        block_size: int,
        impl: Impl,
    ) -> None:
        shape = (w.shape[1] // group_size, w.shape[0])
        self.scales = w.new_empty(shape)
        self.zeros = None if symmetric else w.new_empty(shape, dtype=torch.uint8)
        self._group_size = group_size
        self._scale_dtype = scale_dtype
        self._clip_search = clip_search
        self._block_size = block_size
        self._impl = impl

    def with_grids(
        self, rows: Tensor, factor: Tensor, groups: Tensor, grids: QuantizedWeight
    ) -> Tensor:
        """Take the grids of another quantised weight."""
        self.scales.copy_(grids.scales.t())
        if self.zeros is not None and grids.zeros is not None:
            self.zeros.copy_(grids.zeros.t())
        return self._round(rows, factor, self.scales, self.zeros, groups.int())

    def in_turn(self, rows: Tensor, factor: Tensor, groups: Tensor) -> Tensor:
        """Choose a group's grid when all rows before it have been rounded."""
        q = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
        groups = groups.int()
        size = self._group_size
        for group in range(len(self.scales)):
            run, rest = slice(group * size, (group + 1) * size), slice((group + 1) * size, None)
            own = factor[run, run]
            self._choose(group, rows[run], own)
            q[run] = self._round(rows[run], own, self.scales, self.zeros, groups[run])
            rows[rest].addmm_(factor[run, rest].t(), rows[run], alpha=-1)
        return q

    def _choose(self, group: int, rows: Tensor, factor: Tensor) -> None:
        first = torch.zeros(len(rows), dtype=torch.int32, device=rows.device)

        def cost(scales: Tensor, zeros: Tensor | None) -> Tensor:
            # Each range has outputs of its own.
            errors = rows.repeat(1, len(scales))
            tables = (scales.view(1, -1), None if zeros is None else zeros.view(1, -1))
            self._round(errors, factor, *tables, first)
            return errors.square_().sum(0).view_as(scales)

        scales, zeros = choose_grid(
            rows.t(),
            symmetric=self.zeros is None,
            scale_dtype=self._scale_dtype,
            cost=cost if self._clip_search else None,
            at_once=max(1, SEARCHED // rows.numel()),
        )
        self.scales[group] = scales
        if self.zeros is not None and zeros is not None:
            self.zeros[group] = zeros

    def _round(
        self, rows: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor | None, groups: Tensor
    ) -> Tensor:
        """Round rows with known grids; their errors take their place."""
        q = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
        for begin in range(0, len(rows), self._block_size):
            block = slice(begin, min(begin + self._block_size, len(rows)))
            own = (rows[block], factor[block, block])
            q[block], errors = round_block(*own, scales, zeros, groups[block], impl=self._impl)
            rows[block.stop :].addmm_(factor[block, block.stop :].t(), errors, alpha=-1)
        return q
