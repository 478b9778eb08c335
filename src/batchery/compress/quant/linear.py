# SPDX-License-Identifier: Apache-2.0
"""A linear layer with a frozen weight of four bits.

Use it in the place of `nn.Linear` to serve a quantised model, or to train adapters on one. The
weight takes no gradient; x and the bias do. Where activations are many (prompts of thousands of
tokens) it saves memory, not time.

    y = x[..., order] · Wᵀ + bias        w[n, k] = s[n, g(k)] · (q[n, k] - z[n, g(k)])

with `order` bringing the columns of an act-order group together. A gated layer holds gate over up,
and gives silu(gate)·up in one product. The weight lies on its device in one form only, that of the
kernels. `state_dict` has a portable one, in words of eight columns, lowest four bits first:

    qweight int32 [N, ceil(K/8)]   scales [N, K/G]   zeros uint8 [N, K/G]   g_idx int32 [K]
    layout int64 (version, bits, N, K, G)

where N counts gate and up, without `zeros` for a symmetric weight and without `g_idx` for groups in
order. Loading packs it again. Scales keep their dtype when the module's changes: rounding them
would change the weight.

In DistributedDataParallel pass `broadcast_buffers=False`, or every step sends the frozen weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from batchery._core.validate import integer, require, require_type
from batchery.compress.quant.conv1d import TransposedLinear, as_conv1d, as_linear, is_conv1d
from batchery.compress.quant.formats import from_words, to_words
from batchery.compress.quant.scheme import Scheme
from batchery.compress.quant.weight import QuantizedWeight, pack
from batchery.kernels.w4a16 import w4a16_matmul
from batchery.kernels.w4a16_layout import PackedW4, dequantize_w4, dequantized_slices

__all__ = ["QuantLinear"]

VERSION = 1
BITS = 4
STATE = ("qweight", "scales", "zeros", "g_idx", "layout")
BUFFERS = ("qweight", "scales", "zeros", "counters", "g_idx", "order", "native", "native_table")


class QuantLinear(nn.Module):
    """Linear layer whose weight has four bits; made by `from_quantized` or `from_linear`.

    The constructor makes a layer without a weight, for `load_state_dict`.

    Args:
        in_features: K.
        out_features: N.
        bias: have a bias, zero until it is loaded.
        gated: hold 2N rows, gate over up, and give silu(gate)·up.
        batch_invariant: give each row the bits that it would have alone; see `w4a16_matmul`.
        device: of the bias; the weight comes where the loaded tensors are.
        dtype: of the bias, and of the layer that `to_linear` makes; x may have any.

    Attributes:
        bias: frozen, `(N,)` (gated: `(2N,)`) or None.
        dtype: follows `.to(dtype)`.
        transposed: it stands for a `Conv1D`.

    Raises:
        ValueError: a size is below 1.

    Examples:
        >>> from batchery.compress.quant.weight import QuantizedWeight
        >>> q = torch.tensor([[9, 8, 8, 6], [8, 8, 9, 8]], dtype=torch.uint8)
        >>> qw = QuantizedWeight(q, torch.ones(2, 1), None, None, group_size=4)
        >>> layer = QuantLinear.from_quantized(qw)
        >>> layer(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        tensor([[-7.,  3.]])
        >>> sorted(layer.state_dict())
        ['layout', 'qweight', 'scales']
    """

    qweight: Tensor | None
    scales: Tensor | None
    zeros: Tensor | None
    counters: Tensor | None
    g_idx: Tensor | None
    order: Tensor | None
    native: Tensor | None
    native_table: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        gated: bool = False,
        batch_invariant: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make an empty layer; see the class."""
        super().__init__()
        self.in_features = integer("QuantLinear", "in_features", in_features, at_least=1)
        self.out_features = integer("QuantLinear", "out_features", out_features, at_least=1)
        self.gated = gated
        self.batch_invariant = batch_invariant
        self.group_size = in_features
        self.transposed = False
        self.dtype = dtype or torch.get_default_dtype()
        for name in BUFFERS:
            self.register_buffer(name, None, persistent=False)
        self.bias: nn.Parameter | None = None
        if bias:
            zero = torch.zeros(self.rows, device=device, dtype=self.dtype)
            self.bias = nn.Parameter(zero, requires_grad=False)

    @classmethod
    def from_quantized(
        cls,
        qw: QuantizedWeight,
        bias: Tensor | None = None,
        *,
        gated: bool = False,
        batch_invariant: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "QuantLinear":
        """Make a layer of a quantised weight `(N, K)` and a bias `(N,)`.

        Args:
            qw: the weight.
            bias: copied, in `dtype`.
            gated: the weight is gate over up, made by `join_outputs`.
            batch_invariant: see the class.
            device: by default the weight's.
            dtype: by default the bias's or, without one, the scales'.

        Raises:
            ValueError: the kernels have no such group size, the bias does not fit, or a gated
                weight has an odd number of rows.

        Examples:
            >>> from batchery.compress.quant.partition import join_outputs
            >>> from batchery.compress.quant.rtn import quantize_rtn
            >>> gate, up = (quantize_rtn(torch.randn(48, 64), group_size=32) for _ in range(2))
            >>> layer = QuantLinear.from_quantized(join_outputs([gate, up]), gated=True)
            >>> layer(torch.ones(64)).shape
            torch.Size([48])
        """
        n, k = qw.shape
        dtype = dtype or (qw.scales if bias is None else bias).dtype
        device = qw.q.device if device is None else torch.device(device)
        kinds: dict[str, Any] = {"gated": gated, "batch_invariant": batch_invariant}
        layer = cls(k, n // 2 if gated else n, bias=False, dtype=dtype, **kinds)
        layer._fill(qw, device)
        if bias is not None:
            require(bias.shape == (n,), "QuantLinear", "bias", f"must be ({n},)", tuple(bias.shape))
            kept = bias.detach().to(device, dtype, copy=True)
            layer.bias = nn.Parameter(kept, requires_grad=False)
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Module, qw: QuantizedWeight) -> "QuantLinear":
        """Make a layer with the bias, device and dtype of an `nn.Linear`, or of a `Conv1D`.

        Args:
            linear: the dense layer.
            qw: the weight `(N, K)`.

        Raises:
            TypeError: the layer is neither.
            ValueError: the weight has another shape, or a group size that the kernels do not take.

        Examples:
            >>> from batchery.compress.quant.rtn import quantize_rtn
            >>> linear = nn.Linear(64, 32)
            >>> QuantLinear.from_linear(linear, quantize_rtn(linear.weight, group_size=32))
            QuantLinear(in_features=64, out_features=32, bias=True, bits=4, group_size=32)
        """
        known = isinstance(linear, nn.Linear)
        require_type(known or is_conv1d(linear), "QuantLinear", "linear", "is no Linear", linear)
        linear = linear if isinstance(linear, nn.Linear) else as_linear(linear)
        shape = (linear.out_features, linear.in_features)
        require(qw.shape == shape, "QuantLinear", "qw", f"must be {shape}", qw.shape)
        like = linear.weight
        layer = cls.from_quantized(qw, linear.bias, device=like.device, dtype=like.dtype)
        layer.transposed = isinstance(linear, TransposedLinear)
        return layer.train(linear.training)

    @classmethod
    def from_checkpoint(
        cls,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any],
        *,
        where: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "QuantLinear":
        """Make a layer of the tensors that another tool's checkpoint has for it.

        Args:
            tensors: by their name within the layer: `qweight`, `qzeros` and so on, and `bias`.
            config: the checkpoint's `quantization_config`.
            where: the layer and its file, for errors.
            device: where to; by default where the tensors are.
            dtype: by default the bias's or, without one, the scales'.

        Raises:
            ValueError: a tensor does not fit the format, or the config is of none that we read.

        Examples:
            >>> from batchery.compress.quant.formats import pack_awq
            >>> from batchery.compress.quant.rtn import quantize_rtn
            >>> tensors = pack_awq(quantize_rtn(torch.ones(8, 64), group_size=32))
            >>> QuantLinear.from_checkpoint(tensors, {"quant_method": "awq", "group_size": 32})
            QuantLinear(in_features=64, out_features=8, bias=False, bits=4, group_size=32)
        """
        qw = Scheme.parse(config).read(tensors, where)
        return cls.from_quantized(qw, tensors.get("bias"), device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return x `(..., K)` · Wᵀ + bias, `(..., N)`, in x's dtype (autocast's, within it).

        Of a gated layer it is silu(gate)·up.

        Raises:
            ValueError: x has other than K columns.
        """
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        # Before columns are chosen: of a wider x there would be enough.
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            require(False, "QuantLinear", "x", f"must be (..., {self.in_features})", tuple(x.shape))
        order = self._buffers["order"]
        if order is not None:
            x = x.index_select(-1, order)
        return w4a16_matmul(x, self.packed, bias=self.bias, batch_invariant=self.batch_invariant)

    @property
    def rows(self) -> int:
        """Rows of the weight.

        Examples:
            >>> QuantLinear(4, 3).rows, QuantLinear(4, 3, gated=True).rows
            (3, 6)
        """
        return 2 * self.out_features if self.gated else self.out_features

    @property
    def packed(self) -> PackedW4:
        """The weight as the kernels read it, columns in the order of `order`.

        Examples:
            >>> from batchery.compress.quant.rtn import quantize_rtn
            >>> packed = QuantLinear.from_quantized(quantize_rtn(torch.ones(64, 128))).packed
            >>> packed.shape, packed.group_size
            ((64, 128), 128)
        """
        parts = self._buffers  # a module's attributes are slow to read
        words, scales, counters = parts["qweight"], parts["scales"], parts["counters"]
        if words is None or scales is None or counters is None:
            raise RuntimeError("QuantLinear: the layer has no weight; load a state_dict first")
        native, table = parts["native"], parts["native_table"]
        return PackedW4(
            words=words.view(torch.int16),
            scales=scales,
            zeros=parts["zeros"],
            counters=counters,
            native=None if native is None or table is None else (native, table),
            shape=(self.rows, self.in_features),
            group_size=self.group_size,
            gated=self.gated,
        )

    def quantized_weight(self) -> QuantizedWeight:
        """Return the weight in its plain form, as it was before packing.

        Examples:
            >>> from batchery.compress.quant.rtn import quantize_rtn
            >>> qw = quantize_rtn(torch.arange(256.0).view(8, 32), group_size=32)
            >>> torch.equal(QuantLinear.from_quantized(qw).quantized_weight().q, qw.q)
            True
        """
        packed = self.packed
        # q = 1 · (q - 0), exact in float32
        ones = torch.ones_like(packed.scales, dtype=torch.float32)
        none = torch.zeros_like(packed.scales, dtype=torch.uint8)
        plain = replace(packed, scales=ones, zeros=none)
        q = torch.cat([part.to(torch.uint8) for part in dequantized_slices(plain, torch.float32)])
        return QuantizedWeight(
            self._in_first_order(_unweave(q) if self.gated else q),
            self._table(packed.scales),
            None if packed.zeros is None else self._table(packed.zeros),
            self.g_idx,
            group_size=self.group_size,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight `(N, K)` in a dtype.

        Examples:
            >>> q = torch.tensor([[9, 8, 8, 6]], dtype=torch.uint8)
            >>> qw = QuantizedWeight(q, torch.ones(1, 1), None, None, group_size=4)
            >>> QuantLinear.from_quantized(qw).dequantize()
            tensor([[ 1.,  0.,  0., -2.]])
        """
        return self._in_first_order(dequantize_w4(self.packed, dtype))

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Return an `nn.Linear` with the dequantised weight, by default in the layer's dtype.

        Examples:
            >>> q = torch.tensor([[9, 8, 8, 6]], dtype=torch.uint8)
            >>> qw = QuantizedWeight(q, torch.ones(1, 1), None, None, group_size=4)
            >>> linear = QuantLinear.from_quantized(qw).to_linear()
            >>> linear, linear(torch.ones(4))
            (Linear(in_features=4, out_features=1, bias=False), tensor([-1.]))
        """
        require(not self.gated, "QuantLinear", "gated", "must be False for to_linear", self.gated)
        dtype = dtype or self.dtype
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.dequantize(dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=False)
        return linear.train(self.training)

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return what `to_linear` does, in the place of a `Conv1D` as one; its model needs that.

        Examples:
            >>> from transformers.pytorch_utils import Conv1D
            >>> from batchery.compress.quant.rtn import quantize_rtn
            >>> conv = Conv1D(8, 32)
            >>> qw = quantize_rtn(conv.weight.t(), group_size=32)
            >>> QuantLinear.from_linear(conv, qw).to_dense()
            Conv1D(nf=8, nx=32)
        """
        linear = self.to_linear(dtype)
        return as_conv1d(linear) if self.transposed else linear

    @property
    def layout(self) -> Tensor:
        """(version, bits, N, K, G) of the state.

        Examples:
            >>> QuantLinear(64, 32).layout
            tensor([ 1,  4, 32, 64, 64])
        """
        sizes = (self.rows, self.in_features, self.group_size)
        return torch.tensor([VERSION, BITS, *sizes])

    def __getattr__(self, name: str) -> Any:
        """Say of the dense weight, which some modules read in forward, what to do without it.

        An AttributeError, so that those who ask by `hasattr` go on; a property could not say it,
        since `nn.Module` would answer in its place.
        """
        if name == "weight":
            rule = "exclude the layer when quantising, or use dequantize() or to_linear()"
            raise AttributeError(f"{type(self).__name__} has no dense weight: {rule}")
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        """Show sizes, groups and what kind of weight it is."""
        kinds = ", gated=True" if self.gated else ""
        kinds += "" if self.zeros is None else ", zeros=True"
        kinds += "" if self.g_idx is None else ", act_order=True"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={BITS}, group_size={self.group_size}{kinds}"
        )

    def _fill(self, qw: QuantizedWeight, device: torch.device) -> None:
        """Take over a weight."""
        packed, self.order = pack(qw, gated=self.gated, device=device)
        self.group_size = qw.group_size
        # Of int16, collectives know nothing.
        self.qweight = packed.words.view(torch.int32)
        self.scales, self.zeros, self.counters = packed.scales, packed.zeros, packed.counters
        # Layers that were quantised together share it; in files each needs its own.
        self.g_idx = None if qw.g_idx is None else qw.g_idx.to(device, copy=True)
        self.native, self.native_table = packed.native or (None, None)

    def _table(self, table: Tensor) -> Tensor:
        groups = self.in_features // self.group_size
        rows = table[:groups, : self.rows].t()
        return _unweave(rows) if self.gated else rows.contiguous()

    def _in_first_order(self, columns: Tensor) -> Tensor:
        if self.order is None:
            return columns
        first = torch.empty_like(columns)
        first[:, self.order] = columns
        return first

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        """Move all, but leave dtypes: a cast of scales would change the weight."""
        before = {name: getattr(self, name) for name in ("scales", "native_table")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        for name, old in before.items():
            new = getattr(self, name)
            if old is not None and new is not None and new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        old, new = before["scales"], self.scales
        if old is not None and new is not None and old.device.type != new.device.type:
            self.native = self.native_table = None  # only the CPU has them
            if new.device.type == "cpu" and not old.is_meta:
                self._fill(self.quantized_weight(), new.device)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.qweight is None:
            return
        qw = self.quantized_weight()
        state = {"qweight": to_words(qw.q), "scales": qw.scales, "layout": self.layout}
        if qw.zeros is not None:
            state["zeros"] = qw.zeros
        if qw.g_idx is not None:
            state["g_idx"] = qw.g_idx
        destination.update({prefix + name: tensor for name, tensor in state.items()})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        ours = {name: state_dict[prefix + name] for name in STATE if prefix + name in state_dict}
        taken = {prefix + name for name in ours}
        rest = {key: value for key, value in state_dict.items() if key not in taken}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        needed = ("qweight", "scales", "layout")
        absent = [prefix + name for name in needed if name not in ours]
        missing_keys.extend(absent)
        if absent:
            return
        here = self.qweight
        try:
            qw = self._from_state(ours)
            self._fill(qw, qw.q.device if here is None or here.is_meta else here.device)
        except ValueError as error:
            error_msgs.append(f"{prefix.rstrip('.')}: {error}")

    def _from_state(self, state: Mapping[str, Tensor]) -> QuantizedWeight:
        """Return the weight of a portable state, or raise a ValueError."""
        n, k = self.rows, self.in_features
        layout = state["layout"].tolist()
        fits = len(layout) == 5 and layout[:4] == [VERSION, BITS, n, k]
        rule = f"must be version {VERSION}, {BITS} bits, {n}×{k}"
        require(fits, "QuantLinear", "layout", rule, layout)
        words = state["qweight"]
        shape = (n, -(-k // 8))
        same = words.dtype == torch.int32 and words.shape == shape
        require(same, "QuantLinear", "qweight", f"must be int32 {shape}", tuple(words.shape))
        return QuantizedWeight(
            from_words(words)[:, :k].contiguous(),
            state["scales"],
            state.get("zeros"),
            state.get("g_idx"),
            group_size=layout[4],
        )


def _unweave(rows: Tensor) -> Tensor:
    """Return gate over up of gate 0, up 0, gate 1, up 1 and so on."""
    return torch.cat([rows[0::2], rows[1::2]])
