# SPDX-License-Identifier: Apache-2.0
"""How other tools lay four-bit weights out in int32 words: GPTQ, AWQ, compressed-tensors.

Use it to read and write single layers; `load_quantized` and `save_quantized` do whole models. A
word holds eight values, the first in its lowest four bits. For a weight `(N, K)` in groups of G
columns:

    GPTQ   qweight [K/8, N]    nibble i is column 8r+i       scales [K/G, N]
           qzeros [K/G, N/8]   nibble i is row 8c+i          g_idx [K]
                               holds z - 1 in version 1, z in version 2
    AWQ    qweight [K, N/8]    nibble i is row 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]
           qzeros [K/G, N/8]   likewise, z as it is          scales [K/G, N]
    compressed-tensors ("pack-quantized"), in signed values: q and z less 8, plus 8 in the words
           weight_packed [N, K/8]                            weight_scale [N, K/G]
           weight_zero_point [N/8, K/G]  nibble i is row 8r+i; absent if symmetric
           weight_shape [2]                                  weight_g_idx [K], act-order only

`formats_marlin` has MARLIN's. Every unpacker checks shapes, dtypes, finite scales and group
indices, and its errors name the tensor. q, zeros and groups survive a round trip as they are;
scales go to float16 in all but compressed-tensors.

HQQ's tuples are not read: its zeros are fractions, fitted to each group, and neither these formats
nor the kernels' q - z, whole numbers from 0 to 15, hold them. To round them is to quantise again.

Reference: the layouts of AutoGPTQ and GPTQModel, AutoAWQ, and compressed-tensors.

Where we differ: the label "gptq" is on files of both versions. A symmetric weight says itself which
it is: its zeros are 7 in every nibble, or 8; so we ask them wherever the config does not deny
symmetry. Of any other weight we ask q: trained weights lie around 0, so q lies around z in nearly
all rows, and a whole step off under the wrong label, which is refused. Version 1 cannot tell 0 from
16; we read 0.
"""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from batchery._core.validate import one_of, require
from batchery.compress.quant.weight import MIDDLE, QuantizedWeight

__all__ = [
    "pack_awq",
    "pack_compressed_tensors",
    "pack_gptq",
    "unpack_awq",
    "unpack_compressed_tensors",
    "unpack_gptq",
]

PER_WORD = 8
HALF_ERROR = 2**-11 + 1e-3  # relative: float16's own, and what subnormals may add
STEP_ROWS = 256  # of a weight, asked for its version
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
AWQ_INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)


def to_words(nibbles: Tensor) -> Tensor:
    """Pack uint8 `(..., n)`, values 0…15, into int32 `(..., ceil(n / 8))`, lowest nibble first.

    Examples:
        >>> hex(to_words(torch.arange(8, dtype=torch.uint8)).item())
        '0x76543210'
    """
    nibbles = F.pad(nibbles, (0, -nibbles.shape[-1] % PER_WORD))
    pairs = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    # A flat tensor: an axis of length one may have any stride, which a view would refuse.
    return pairs.flatten().view(torch.int32).view(*nibbles.shape[:-1], -1)


def from_words(words: Tensor) -> Tensor:
    """Undo `to_words`: int32 `(..., m)` to uint8 `(..., 8 m)`."""
    pairs = words.flatten().view(torch.uint8)
    return torch.stack([pairs & 15, pairs >> 4], -1).view(*words.shape[:-1], -1)


def pack_gptq(qw: QuantizedWeight, *, version: Literal[1, 2] = 2) -> dict[str, Tensor]:
    """Return `qweight`, `qzeros`, `scales` and `g_idx` as GPTQ checkpoints have them.

    Args:
        qw: N and K multiples of 8.
        version: 1 stores zeros less 1, which older readers expect; 2 stores them as they are.

    Examples:
        >>> q = torch.arange(64, dtype=torch.uint8).view(8, 8) % 16
        >>> qw = QuantizedWeight(q, torch.ones(8, 1), None, None, group_size=8)
        >>> {name: tuple(tensor.shape) for name, tensor in pack_gptq(qw).items()}
        {'qweight': (1, 8), 'qzeros': (1, 1), 'scales': (1, 8), 'g_idx': (8,)}
        >>> torch.equal(unpack_gptq(pack_gptq(qw), version=2).q, q)
        True
    """
    owner = "pack_gptq"
    one_of(owner, "version", version, (1, 2))
    _whole_words(owner, qw, 0, 1)
    zeros = _zeros(qw) if version == 2 else _zeros(qw) - 1 & 15
    return {
        "qweight": to_words(qw.q).t().contiguous(),
        "qzeros": to_words(zeros.t()),
        "scales": half_scales(owner, qw.scales).t().contiguous(),
        "g_idx": qw.groups.to(torch.int32),
    }


def unpack_gptq(
    tensors: Mapping[str, Tensor],
    *,
    version: Literal[1, 2] | None = None,
    symmetric: bool | None = None,
    sure: bool = False,
    where: str = "",
) -> QuantizedWeight:
    """Read a layer of a GPTQ checkpoint.

    Args:
        tensors: `qweight`, `qzeros`, `scales`, and `g_idx` or not.
        version: what the zeros mean, as far as the file says; zeros that are all 7 or all 8
            have precedence, unless `symmetric` is False.
        symmetric: whether the quantiser used no zeros, if that is known.
        sure: the version is certain: neither zeros nor weights are asked.
        where: the layer and its file, for errors.

    Raises:
        ValueError: a tensor is missing or does not fit, it cannot be told what zeros mean, or they
            mean something else by all appearances.

    Examples:
        >>> words = torch.full((1, 8), 0x76543210, dtype=torch.int32)
        >>> sevens = torch.full((1, 1), 0x77777777, dtype=torch.int32)  # version 1, symmetric
        >>> qw = unpack_gptq({"qweight": words, "qzeros": sevens, "scales": torch.ones(1, 8)})
        >>> qw.q[0], qw.zeros
        (tensor([0, 1, 2, 3, 4, 5, 6, 7], dtype=torch.uint8), None)
    """
    read = Reader("unpack_gptq", tensors, where)
    qweight = read.words("qweight")
    n, k = qweight.shape[1], PER_WORD * qweight.shape[0]
    read.require(n % PER_WORD == 0, "qweight", "must have a multiple of 8 columns", n)
    scales = read.scales("scales", axis=1, n=n)
    stored = from_words(read.words("qzeros", (scales.shape[0], n // PER_WORD))).t()
    found = version if sure and version else _gptq_version(read, stored, version, symmetric)
    zeros = stored + 1 & 15 if found == 1 else stored
    qw = read.weight(from_words(qweight.t()), scales.t(), zeros, k, "scales", "g_idx")
    if not sure:
        _require_centred(read, qw, found)
    return qw


def pack_awq(qw: QuantizedWeight) -> dict[str, Tensor]:
    """Return `qweight`, `qzeros` and `scales` in AWQ's GEMM layout; it has no act-order.

    Examples:
        >>> q = torch.arange(64, dtype=torch.uint8).view(8, 8) % 16
        >>> packed = pack_awq(QuantizedWeight(q, torch.ones(8, 1), None, None, group_size=8))
        >>> packed["qweight"].shape, torch.equal(unpack_awq(packed).q, q)
        (torch.Size([8, 1]), True)
    """
    owner = "pack_awq"
    require(qw.g_idx is None, owner, "g_idx", "must be None: AWQ has no act-order", "a g_idx")
    _whole_words(owner, qw, 0)
    n = qw.shape[0]

    def words(table: Tensor) -> Tensor:
        return to_words(table.t().reshape(-1, n // PER_WORD, PER_WORD)[..., AWQ_ORDER].flatten(1))

    return {
        "qweight": words(qw.q),
        "qzeros": words(_zeros(qw)),
        "scales": half_scales(owner, qw.scales).t().contiguous(),
    }


def unpack_awq(tensors: Mapping[str, Tensor], *, where: str = "") -> QuantizedWeight:
    """Read a layer of an AWQ checkpoint, version "gemm"; errors as for `unpack_gptq`.

    Examples:
        >>> words = torch.full((4, 1), 0x75316420, dtype=torch.int32)  # even rows of W, then odd
        >>> eights = torch.full((1, 1), 0x88888888 - 2**32, dtype=torch.int32)
        >>> unpack_awq({"qweight": words, "qzeros": eights, "scales": torch.ones(1, 8)}).q[:, 0]
        tensor([0, 1, 2, 3, 4, 5, 6, 7], dtype=torch.uint8)
    """
    read = Reader("unpack_awq", tensors, where)
    qweight = read.words("qweight")
    k, n = qweight.shape[0], PER_WORD * qweight.shape[1]
    scales = read.scales("scales", axis=1, n=n)
    qzeros = read.words("qzeros", (scales.shape[0], n // PER_WORD))

    def table(words: Tensor) -> Tensor:
        nibbles = from_words(words).view(-1, n // PER_WORD, PER_WORD)
        return nibbles[..., AWQ_INVERSE].flatten(1).t()

    return read.weight(table(qweight), scales.t(), table(qzeros), k, "scales", None)


def pack_compressed_tensors(qw: QuantizedWeight) -> dict[str, Tensor]:
    """Return a layer in the format "pack-quantized"; any N and K, scales in their dtype.

    Examples:
        >>> q = torch.arange(20, dtype=torch.uint8).view(2, 10) % 16
        >>> packed = pack_compressed_tensors(QuantizedWeight(q, torch.ones(2, 2), None, None, 5))
        >>> packed["weight_packed"].shape, torch.equal(unpack_compressed_tensors(packed).q, q)
        (torch.Size([2, 2]), True)
    """
    packed = {
        "weight_packed": to_words(qw.q),
        "weight_scale": qw.scales.contiguous(),
        "weight_shape": torch.tensor(qw.shape, dtype=torch.int64),
    }
    if qw.zeros is not None:
        packed["weight_zero_point"] = to_words(qw.zeros.t()).t().contiguous()
    if qw.g_idx is not None:
        packed["weight_g_idx"] = qw.g_idx
    return packed


def unpack_compressed_tensors(tensors: Mapping[str, Tensor], *, where: str = "") -> QuantizedWeight:
    """Read a layer in the format "pack-quantized"; errors as for `unpack_gptq`.

    Zero points may be packed, or int8 `(N, K/G)` as older versions wrote them.

    Examples:
        >>> words, shape = torch.tensor([[0x43210]], dtype=torch.int32), torch.tensor([1, 5])
        >>> layer = {"weight_packed": words, "weight_shape": shape}
        >>> unpack_compressed_tensors({**layer, "weight_scale": torch.ones(1, 1)}).q
        tensor([[0, 1, 2, 3, 4]], dtype=torch.uint8)
    """
    read = Reader("unpack_compressed_tensors", tensors, where)
    shape = read.tensor("weight_shape")
    read.require(shape.numel() == 2, "weight_shape", "must be (N, K)", shape.tolist())
    n, k = (int(size) for size in shape.tolist())
    sizes = (n, -(-k // PER_WORD))
    q = from_words(read.words("weight_packed", sizes))[:, :k]
    scales = read.scales("weight_scale", axis=0, n=n)
    zeros = None
    if "weight_zero_point" in tensors:
        stored = tensors["weight_zero_point"]
        if stored.dtype == torch.int8:
            read.shaped("weight_zero_point", tuple(scales.shape))
            zeros = (stored + MIDDLE).to(torch.uint8)
            read.require(bool((zeros < 16).all()), "weight_zero_point", "must be -8…7", "more")
        else:
            words = read.words("weight_zero_point", (-(-n // PER_WORD), scales.shape[1]))
            zeros = from_words(words.t())[:, :n].t()
    return read.weight(q, scales, zeros, k, "weight_scale", "weight_g_idx")


class Reader:
    """The tensors of one layer, and checks whose errors name the tensor."""

    def __init__(self, owner: str, tensors: Mapping[str, Tensor], where: str) -> None:
        """Keep what is read; `where` names the layer and its file."""
        self.owner, self.tensors, self.where = owner, tensors, where

    def named(self, name: str) -> str:
        """Return a tensor's name for an error."""
        return f"{name} of {self.where}" if self.where else name

    def require(self, ok: bool, name: str, rule: str, got: object) -> None:
        """Raise a ValueError that names the tensor unless `ok`."""
        require(ok, self.owner, self.named(name), rule, got)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, or raise if the layer lacks it."""
        self.require(name in self.tensors, name, "must be there", sorted(self.tensors))
        return self.tensors[name]

    def shaped(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor of a given shape, or raise."""
        tensor = self.tensor(name)
        self.require(tuple(tensor.shape) == shape, name, f"must be {shape}", tuple(tensor.shape))
        return tensor

    def words(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return a matrix of int32 words of that shape, or raise."""
        words = self.tensor(name)
        self.require(words.dtype == torch.int32, name, "must be int32", words.dtype)
        fits = words.dim() == 2 and words.numel() > 0
        self.require(fits, name, "must be a matrix", tuple(words.shape))
        return words if shape is None else self.shaped(name, shape)

    def scales(self, name: str, *, axis: int, n: int) -> Tensor:
        """Return finite scales with n rows of the weight on that axis, or raise."""
        scales = self.tensor(name)
        self.require(scales.is_floating_point(), name, "must be floating", scales.dtype)
        fits = scales.dim() == 2 and scales.shape[axis] == n and scales.numel() > 0
        rule = f"must have {n} {('rows', 'columns')[axis]}"
        self.require(fits, name, rule, tuple(scales.shape))
        self.require(bool(torch.isfinite(scales).all()), name, "must be finite", "NaN or infinity")
        return scales

    def weight(
        self, q: Tensor, scales: Tensor, zeros: Tensor | None, k: int, table: str, index: str | None
    ) -> QuantizedWeight:
        """Put the parts `(N, …)` together; zeros that are all 8 and groups in order are left out.

        Args:
            q: uint8 `(N, K)`.
            scales: `(N, groups)`.
            zeros: uint8 `(N, groups)`.
            k: K.
            table: name of the scales.
            index: name of g_idx, if the format has one.
        """
        groups = scales.shape[1]
        rule = f"must cut {k} columns into equal groups"
        self.require(k % groups == 0, table, rule, groups)
        size = k // groups
        g_idx = self.tensors.get(index) if index else None
        if g_idx is not None and index is not None:
            g_idx = self._groups(g_idx, index, k, groups)
        if zeros is not None and bool((zeros == MIDDLE).all()):
            zeros = None
        return QuantizedWeight(
            q.contiguous(),
            scales.contiguous(),
            None if zeros is None else zeros.contiguous(),
            g_idx,
            group_size=size,
        )

    def _groups(self, g_idx: Tensor, name: str, k: int, groups: int) -> Tensor | None:
        """Return checked group indices, or None where they are k // G (or -1: not used)."""
        whole = not g_idx.is_floating_point() and g_idx.dtype != torch.bool
        self.require(whole, name, "must be integers", g_idx.dtype)
        self.require(g_idx.shape == (k,), name, f"must be ({k},)", tuple(g_idx.shape))
        if bool((g_idx == -1).all()):
            return None
        low, high = int(g_idx.min()), int(g_idx.max())
        inside = low >= 0 and high < groups
        self.require(inside, name, f"must be in 0…{groups - 1}", low if low < 0 else high)
        counts = torch.bincount(g_idx.long(), minlength=groups)
        rule = f"must give every group {k // groups} columns"
        equal = bool((counts == k // groups).all())
        self.require(equal, name, rule, counts.tolist())
        in_order = torch.arange(k, device=g_idx.device) // (k // groups)
        return None if torch.equal(g_idx.long(), in_order) else g_idx.to(torch.int32)


def _gptq_version(
    read: Reader, stored: Tensor, version: Literal[1, 2] | None, symmetric: bool | None
) -> int:
    """Return what the stored zeros mean, or raise if that is not certain."""
    if symmetric is not False:
        for meaning, value in ((1, MIDDLE - 1), (2, MIDDLE)):
            if bool((stored == value).all()):
                return meaning
    if symmetric:
        rule = "must be 7 (version 1) or 8 (version 2) everywhere in a symmetric weight"
        read.require(False, "qzeros", rule, torch.unique(stored).tolist())
    rule = 'hold z - 1 or z? Give the format: "gptq_v1" or "gptq_v2"'
    read.require(version is not None, "qzeros", rule, f"version {version}")
    return int(version or 0)


def _require_centred(read: Reader, qw: QuantizedWeight, version: int) -> None:
    """Raise where q lies around another zero than the version's: around that of the other version.

    Not where most groups have weights of one sign: their range was made to include 0, and z is at
    an end of it. Most rows must agree, for a few far off may move the mean of all.
    """
    if qw.zeros is None:
        return
    some = slice(None, None, -(-len(qw.q) // STEP_ROWS))
    zeros = qw.zeros[some]
    ends, off = ((0, 1, 15), -1) if version == 1 else ((0, 14, 15), 1)
    one_sided = torch.isin(zeros, zeros.new_tensor(ends)).float().mean()
    rows = qw.q[some].float().mean(1) - zeros.float().mean(1)  # groups are equally large
    agree = ((rows - off).abs() < 0.5).float().mean()
    mean = float(rows.mean())
    held, said = ("z", "z - 1") if version == 1 else ("z - 1", "z")
    rule = f"hold {held}, it seems, not {said} as the config says: q lies a step from z in most "
    rule += 'rows. Give the format: "gptq_v1" or "gptq_v2"'
    wrong = bool(one_sided < 0.5) and bool(agree > 0.5) and abs(mean - off) < 0.25
    read.require(not wrong, "qzeros", rule, f"mean(q - z) = {mean:.2f}")


def half_scales(owner: str, scales: Tensor) -> Tensor:
    """Return scales in float16, or raise where that would change the weight."""
    half = scales.to(torch.float16)
    wide = scales.double()
    off = (half.double() - wide).abs() > HALF_ERROR * wide.abs()  # infinity is far off
    rule = (
        'must be in the range of float16: store them as "compressed-tensors", or quantise with '
        "scale_dtype=torch.float16"
    )
    if bool(off.any()):
        require(False, owner, "scales", rule, float(scales[off][0]))
    return half


def _zeros(qw: QuantizedWeight) -> Tensor:
    if qw.zeros is not None:
        return qw.zeros
    return torch.full(qw.scales.shape, MIDDLE, dtype=torch.uint8, device=qw.q.device)


def _whole_words(owner: str, qw: QuantizedWeight, *axes: int) -> None:
    for axis in axes:
        size = qw.shape[axis]
        rule = "must be a multiple of 8 (compressed-tensors takes any)"
        require(size % PER_WORD == 0, owner, "NK"[axis], rule, size)
