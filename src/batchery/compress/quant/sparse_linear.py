# SPDX-License-Identifier: Apache-2.0
"""Four-bit layers of which two in every four weights are zero, in three quarters of the memory.

    report = gptq_quantize_model(model, calibration, sparsity="2:4")
    replace_linears(model, report.weights)      # 0.52 bytes a weight, as all four-bit layers
    save_quantized(model, folder)               # in the ordinary formats
    compress_24(model)                          # 0.39 bytes a weight from here on

When to use: a model that is 2:4 already, or must be made to fit a device by all means. When not:
for speed. On an H100 the 2:4 kernel took 0.95 to 1.05 of the dense four-bit kernel's time at one
row, 1.03 to 1.5 times as long at 16 rows, and 1.25 to 1.5 times at 32. And pruning costs quality:
the outputs' error is many times that of GPTQ alone, tens of times for weights drawn at random.

Above 64 rows, for adapters' gradients, and on the CPU, each call makes the dense weight first. The
kernel is no operation that torch.compile knows; CUDA graphs hold it.
"""

import torch
from torch import Tensor, nn

from batchery._core.validate import require
from batchery.compress.quant.checkpoint import quant_layers
from batchery.compress.quant.linear import QuantLinear
from batchery.compress.quant.replace import module_places, replace_everywhere
from batchery.compress.quant.weight import MIDDLE, QuantizedWeight
from batchery.kernels.w4a16_sparse import w4a16_sparse_matmul
from batchery.kernels.w4a16_sparse_layout import (
    PackedSparseW4,
    dequantize_sparse_w4,
    pack_sparse_w4,
    unpack_sparse_w4,
)

__all__ = ["SparseQuantLinear", "compress_24"]

FOUR, TWO = 4, 2


class SparseQuantLinear(QuantLinear):
    """`QuantLinear` with a 2:4 weight in 3/8 of a byte and a scale; `compress_24` makes it.

    Its state is that of a `QuantLinear`. It is symmetric, without act-order, not gated, and its
    rows' bits depend on the batch.

    Examples:
        >>> from batchery.compress.quant.sparse import quantize_rtn_24
        >>> qw = quantize_rtn_24(torch.full((128, 512), -7.5))  # scale 1
        >>> layer = SparseQuantLinear.from_quantized(qw)
        >>> layer(torch.ones(2, 512)).shape, layer.dequantize()[0, :4]
        (torch.Size([2, 128]), tensor([-8., -8.,  0.,  0.]))
        >>> torch.equal(layer.quantized_weight().q, qw.q), layer.packed.nbytes
        (True, 25600)
    """

    @property
    def packed(self) -> PackedSparseW4:  # type: ignore[override]
        """The weight as the kernel reads it."""
        parts = self._buffers
        words, scales, counters = parts["qweight"], parts["scales"], parts["counters"]
        if words is None or scales is None or counters is None:
            raise RuntimeError("SparseQuantLinear: the layer has no weight; load a state_dict")
        shape = (self.rows, self.in_features)
        words = words.view(torch.int16)
        return PackedSparseW4(words, scales, counters, shape, self.group_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return x `(..., K)` · Wᵀ + bias, `(..., N)`, in x's dtype (autocast's, within it)."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        return w4a16_sparse_matmul(x, self.packed, bias=self.bias)

    def quantized_weight(self) -> QuantizedWeight:
        """Return the weight in its plain form, as it was before packing."""
        packed = self.packed
        q, scales = unpack_sparse_w4(packed), self._table(packed.scales)
        return QuantizedWeight(q, scales, None, None, group_size=self.group_size)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight `(N, K)` in a dtype."""
        return dequantize_sparse_w4(self.packed, dtype)

    def _fill(self, qw: QuantizedWeight, device: torch.device) -> None:
        """Take over a weight."""
        rule = "must be symmetric and without act-order"
        fits = qw.zeros is None and qw.g_idx is None
        require(fits, "SparseQuantLinear", "qw", rule, "zeros or g_idx")
        packed = pack_sparse_w4(qw.q, qw.scales, device=device)
        self.group_size = qw.group_size
        self.qweight = packed.words.view(torch.int32)
        self.scales, self.counters = packed.scales, packed.counters


@torch.no_grad()
def compress_24(model: nn.Module) -> list[str]:
    """Keep the four-bit layers that are 2:4 in 0.39 bytes a weight in the place of 0.52.

    Layers that are not, have zeros or act-order, or are gated or batch-invariant, stay. What is
    compressed is saved and loaded as before, and is not fused by `fuse_mlps`.

    Args:
        model: with `QuantLinear` layers, loaded or put there by `replace_linears`; changed in
            place.

    Returns:
        The names of the compressed layers.

    Examples:
        >>> from batchery.compress.quant.sparse import quantize_rtn_24
        >>> linear = nn.Linear(512, 128, bias=False)
        >>> layer = QuantLinear.from_linear(linear, quantize_rtn_24(linear.weight))
        >>> model = nn.Sequential(layer)
        >>> compress_24(model)
        ['0']
        >>> layer.packed.nbytes, model[0].packed.nbytes
        (33792, 25600)
    """
    places = module_places(model)
    found = []
    for name, layer in list(quant_layers(model)):
        weight = _as_24(layer)
        if name and weight is not None:  # the model itself has no place to be replaced at
            new = SparseQuantLinear.from_quantized(weight, layer.bias, dtype=layer.dtype)
            replace_everywhere(model, places, layer, new.train(layer.training))
            found.append(name)
    return found


def _as_24(layer: QuantLinear) -> QuantizedWeight | None:
    """Return the weight of a layer that can be compressed."""
    plain = type(layer) is QuantLinear and layer.zeros is None and layer.g_idx is None
    if not plain or layer.gated or layer.batch_invariant or layer.in_features % FOUR:
        return None
    weight = layer.quantized_weight()
    kept = (weight.q != MIDDLE).view(-1, FOUR).sum(-1)
    return weight if int(kept.max()) <= TWO else None
