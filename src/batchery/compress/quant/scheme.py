# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's `quantization_config` says of its weights, and one layer read by it.

`Scheme.parse` reads the configs of GPTQModel, AutoGPTQ, AutoAWQ, MARLIN (2:4 too, as vLLM names it)
and compressed-tensors, and refuses what is no four-bit weight with 16-bit activations.
`Scheme.config` writes them. `Scheme.read` and `Scheme.write` go between the tensors of a layer and
a `QuantizedWeight`.

Which layers are quantised is not asked of the config: the tensors' names say it.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from batchery._core.validate import one_of, require
from batchery.compress.quant.formats import (
    pack_awq,
    pack_compressed_tensors,
    pack_gptq,
    unpack_awq,
    unpack_compressed_tensors,
    unpack_gptq,
)
from batchery.compress.quant.formats_marlin import (
    COMPRESSED_24,
    NAMES_24,
    pack_marlin,
    unpack_marlin,
    unpack_marlin_24,
)
from batchery.compress.quant.weight import (
    MIDDLE,
    QuantizedWeight,
    all_finite,
    require_packable,
)

__all__ = ["Format", "Scheme", "layers_of"]

Format = Literal["gptq_v1", "gptq_v2", "awq", "compressed-tensors", "marlin"]
FORMATS = get_args(Format)
OWNER = "quantization_config"
ZEROS = "batchery.zeros"  # in files' metadata: the version of GPTQ's zeros, said by their writer
_VERSIONS: dict[str, Literal[1, 2]] = {"gptq_v1": 1, "gptq_v2": 2}

# 2:4 MARLIN under vLLM's names and under those of compressed-tensors; both are read alone.
MARLIN_24, CT_24 = "gptq_marlin_24", "marlin-24"
SCALES_IN_ORDER = (0, 8)  # version of compressed-tensors
METHODS = ("gptq", "awq", "compressed-tensors", "marlin", MARLIN_24)

# The tensor that only a quantised layer has, and what else it may have.
LEADING = {
    "gptq": "qweight",
    "awq": "qweight",
    "compressed-tensors": "weight_packed",
    "marlin": "B",
    MARLIN_24: NAMES_24[0],
    CT_24: COMPRESSED_24[0],
}
NAMES = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": (
        *("weight_packed", "weight_scale", "weight_shape"),
        *("weight_zero_point", "weight_g_idx"),
    ),
    "marlin": ("B", "s", "workspace"),
    MARLIN_24: (*NAMES_24, "workspace"),
    CT_24: COMPRESSED_24,
}
G_IDX = {"gptq": "g_idx", "compressed-tensors": "weight_g_idx"}


@dataclass(frozen=True)
class Scheme:
    """How all quantised layers of a checkpoint are stored.

    Attributes:
        family: "gptq", "awq", "compressed-tensors" or "marlin"; "gptq_marlin_24" or "marlin-24",
            which are not written.
        version: of GPTQ's zeros, 1 or 2; None where the config does not say.
        group_sizes: allowed sizes of groups, -1 for one group a row; empty: any.
        symmetric: no zeros; None where the config does not say.
        act_order: groups follow the order of activations; None where some layers' do.
        sure: the version was given or is the writer's own word, not read from a config.

    Examples:
        >>> scheme = Scheme.parse({"quant_method": "gptq", "bits": 4, "group_size": 128})
        >>> scheme.family, scheme.group_sizes, scheme.version
        ('gptq', (128,), None)
    """

    family: str
    version: Literal[1, 2] | None = None
    group_sizes: tuple[int, ...] = ()
    symmetric: bool | None = None
    act_order: bool | None = False
    sure: bool = False

    @classmethod
    def parse(
        cls, config: Mapping[str, Any], *, form: Format | Literal["auto"] = "auto"
    ) -> "Scheme":
        """Read a `quantization_config`.

        Args:
            config: as in config.json; GPTQ's older quantize_config.json has no `quant_method`.
            form: what the tensors really are, where the config is silent or wrong; obeyed.

        Raises:
            ValueError: these are no four-bit weights that we read; the entry is named.
        """
        one_of("load_quantized", "format", form, ("auto", *FORMATS))
        _table(config, "config")
        if not config and form != "auto":
            return cls(form.partition("_v")[0], _VERSIONS.get(form), sure=form in _VERSIONS)
        method = config.get("quant_method", "gptq" if "bits" in config else None)
        if form == "compressed-tensors" or (form == "auto" and method == "compressed-tensors"):
            return _parse_compressed_tensors(config)
        if form == "auto":
            one_of(OWNER, "quant_method", method, METHODS)
        bits = config.get("bits", config.get("w_bit", 4))
        require(bits == 4, OWNER, "bits", "must be 4", bits)
        stored = config.get("checkpoint_format", config.get("format"))
        marlin = method == "marlin" or stored == "marlin" or config.get("is_marlin_format")
        family = "marlin" if marlin else str(method)
        if method == MARLIN_24 or stored == "marlin_24":
            family = MARLIN_24
        version = _VERSIONS.get("gptq_v1" if stored == "gptq" else str(stored))
        if form != "auto":
            family, version = form.partition("_v")[0], _VERSIONS.get(form)
        elif family == "gptq":
            one_of(OWNER, "checkpoint_format", stored, ("gptq", "gptq_v2", "marlin", None))
        elif family == "awq":
            kind = str(config.get("version") or stored or "gemm").lower()
            one_of(OWNER, "version", kind, ("gemm",))
        entries = {"": config}
        for pattern, own in _table(config.get("dynamic") or {}, "dynamic").items():
            entries[f"dynamic[{pattern!r}]."] = _table(own, f"dynamic[{pattern!r}]")
        sizes = {f"{entry}group_size": own.get("group_size") for entry, own in entries.items()}
        sizes["group_size"] = config.get("group_size", config.get("q_group_size"))
        scheme = cls(
            family=family,
            version=version,
            group_sizes=tuple(
                sorted({_whole(size, own) for own, size in sizes.items() if size is not None})
            ),
            symmetric=config.get("sym") if family in ("gptq", MARLIN_24) else None,
            act_order=_common(
                bool(own["desc_act"]) for own in entries.values() if "desc_act" in own
            ),
            sure=form in _VERSIONS,
        )
        return _checked_24(scheme) if family == MARLIN_24 else scheme

    @property
    def form(self) -> Format:
        """Name of the format that `write` writes.

        Examples:
            >>> Scheme("gptq", version=1).form, Scheme("awq").form
            ('gptq_v1', 'awq')
        """
        found = f"gptq_v{self.version or 2}" if self.family == "gptq" else self.family
        return cast(Format, found)

    def metadata(self) -> dict[str, str]:
        """Return what files of these tensors say of them.

        Examples:
            >>> Scheme("gptq", version=2).metadata()
            {'batchery.zeros': '2'}
        """
        return {ZEROS: str(self.version)} if self.family == "gptq" and self.version else {}

    def confirmed(self, metadata: Mapping[str, str], where: str) -> "Scheme":
        """Return the scheme, sure of its version where the files' metadata say it.

        Raises:
            ValueError: they say another than the config.

        Examples:
            >>> Scheme("gptq").confirmed({"batchery.zeros": "1"}, "model.safetensors").version
            1
        """
        said = metadata.get(ZEROS)
        if said is None or self.family != "gptq" or self.sure:
            return self
        one_of("load_quantized", f"{ZEROS} in {where}", said, ("1", "2"))
        version: Literal[1, 2] = 1 if said == "1" else 2
        rule = f"must be gptq_v{version} as the files say"
        require(self.version in (version, None), OWNER, "checkpoint_format", rule, self.version)
        return replace(self, version=version, sure=True)

    def config(self, kept: Iterable[str], *, lm_head: bool = False) -> dict[str, Any]:
        """Return the `quantization_config` that tools of the family write.

        Args:
            kept: linear layers that are not quantised.
            lm_head: the layer of that name is quantised.

        Examples:
            >>> config = Scheme("awq", group_sizes=(128,)).config(["lm_head"])
            >>> config["group_size"], config["modules_to_not_convert"]
            (128, ['lm_head'])
        """
        size = self.group_sizes[0]
        kept = sorted(kept)
        if self.family == "compressed-tensors":
            return _compressed_tensors_config(self, size, kept)
        config: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": size}
        if self.family == "awq":
            config |= {"quant_method": "awq", "version": "gemm", "zero_point": True}
            return config | {"modules_to_not_convert": kept or None}
        config |= {
            "desc_act": bool(self.act_order),
            "sym": bool(self.symmetric),
            "lm_head": lm_head,
        }
        config |= {"true_sequential": True, "pack_dtype": "int32"}
        stored = {None: "marlin", 1: "gptq", 2: "gptq_v2"}[self.version]
        config["checkpoint_format"] = stored
        if self.family == "marlin":
            config["is_marlin_format"] = True
        if kept:
            config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in kept}
        return config

    def read(self, tensors: Mapping[str, Tensor], where: str) -> QuantizedWeight:
        """Read the weight of a layer.

        Args:
            tensors: by their name within the layer.
            where: the layer and its file, for errors.

        Raises:
            ValueError: a tensor does not fit its format, the config or the kernels; it is named.

        Examples:
            >>> q = torch.full((8, 32), 9, dtype=torch.uint8)
            >>> qw = QuantizedWeight(q, torch.ones(8, 1), None, None, group_size=32)
            >>> torch.equal(Scheme("awq").read(pack_awq(qw), "up").q, q)
            True
        """
        bias = tensors.get("bias")
        fine = bias is None or all_finite(bias)
        require(fine, "load_quantized", f"bias of {where}", "must be finite", "NaN or infinity")
        if self.family == "gptq":
            qw = unpack_gptq(
                tensors,
                version=self.version,
                symmetric=self.symmetric,
                sure=self.sure,
                where=where,
            )
        else:
            unpack = {
                "awq": unpack_awq,
                "marlin": unpack_marlin,
                MARLIN_24: unpack_marlin_24,
                CT_24: unpack_marlin_24,
                "compressed-tensors": unpack_compressed_tensors,
            }[self.family]
            qw = unpack(tensors, where=where)
        allowed = self.group_sizes
        same = not allowed or {qw.group_size, _size(qw)} & set(allowed)
        rule = f"must have groups of {', '.join(map(str, allowed))} columns as the config says"
        require(bool(same), "load_quantized", f"scales of {where}", rule, qw.group_size)
        self._require_all(tensors, qw, where)
        require_packable("load_quantized", "group_size", qw.group_size, qw.shape[1], where)
        return qw

    def _require_all(self, tensors: Mapping[str, Tensor], qw: QuantizedWeight, where: str) -> None:
        """Raise where a tensor that some weights lack is missing, though the config says it is."""
        needed = {}
        if self.act_order and qw.scales.shape[1] > 1 and self.family in G_IDX:
            needed[G_IDX[self.family]] = "act-order"
        if self.symmetric is False and self.family == "compressed-tensors":
            needed["weight_zero_point"] = "zeros"
        for name, kind in needed.items():
            rule = f"must be there: the config says {kind}"
            require(name in tensors, "load_quantized", f"{name} of {where}", rule, sorted(tensors))
            if kind == "act-order":  # -1 is what writers leave where there is no order
                order = tensors[name]
                rule = "must say each column's group: the config says act-order"
                unset = bool((order == -1).all())
                require(not unset, "load_quantized", f"{name} of {where}", rule, "-1 throughout")

    def write(self, qw: QuantizedWeight) -> dict[str, Tensor]:
        """Return the tensors of a layer, by their name within it.

        Raises:
            ValueError: the format cannot hold the weight, or is not written.

        Examples:
            >>> q = torch.full((8, 32), 9, dtype=torch.uint8)
            >>> qw = QuantizedWeight(q, torch.ones(8, 1), None, None, group_size=32)
            >>> sorted(Scheme("awq").write(qw))
            ['qweight', 'qzeros', 'scales']
        """
        written = self.family not in (MARLIN_24, CT_24)
        rule = "is not written: save_quantized writes other formats"
        require(written, "save_pretrained", "format", rule, self.family)
        if self.family == "gptq":
            return pack_gptq(qw, version=self.version or 2)
        if self.family == "awq":
            return pack_awq(qw)
        if self.family == "marlin":
            return pack_marlin(qw)
        zeros, g_idx = qw.zeros, qw.g_idx
        if zeros is None and not self.symmetric:
            zeros = torch.full_like(qw.scales, MIDDLE, dtype=torch.uint8)
        if g_idx is None and self.act_order:
            g_idx = qw.groups.to(torch.int32)
        return pack_compressed_tensors(replace(qw, zeros=zeros, g_idx=g_idx))


def layers_of(names: Iterable[str], family: str) -> dict[str, dict[str, str]]:
    """Group the names of tensors by quantised layer.

    Returns:
        layer → name within the layer → full name.

    Examples:
        >>> layers_of(["a.qweight", "a.scales", "b.weight"], "awq")
        {'a': {'qweight': 'a.qweight', 'scales': 'a.scales'}}
    """
    names = set(names)
    leading = f".{LEADING[family]}"
    found = sorted(name.removesuffix(leading) for name in names if name.endswith(leading))
    return {
        layer: {own: f"{layer}.{own}" for own in NAMES[family] if f"{layer}.{own}" in names}
        for layer in found
    }


def _common(values: Iterable[bool]) -> bool | None:
    """Return the one value of all, None where they differ, False where there are none."""
    found = set(values) or {False}
    return found.pop() if len(found) == 1 else None


def _table(value: Any, entry: str) -> Mapping[str, Any]:
    """Return an entry of a config that must have entries of its own."""
    require(isinstance(value, Mapping), OWNER, entry, "must be a table", value)
    table: Mapping[str, Any] = value
    return table


def _whole(value: Any, entry: str) -> int:
    """Return an entry of a config that must be an integer."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole, OWNER, entry, "must be an integer", value)
    return int(value)


def _size(qw: QuantizedWeight) -> int:
    return -1 if qw.group_size == qw.shape[1] else qw.group_size


def _parse_compressed_tensors(config: Mapping[str, Any]) -> Scheme:
    groups = _table(config.get("config_groups") or {}, "config_groups")
    require(bool(groups), OWNER, "config_groups", "must name a group", groups)
    sizes, symmetric, kinds = set(), set(), set()
    for name, group in groups.items():
        kind = _table(group, name).get("format") or config.get("format")
        one_of(OWNER, f"{name}.format", kind, ("pack-quantized", CT_24))
        kinds.add(str(kind))
        weights = _table(group.get("weights") or {}, f"{name}.weights")
        bits = weights.get("num_bits")
        integers = bits == 4 and weights.get("type", "int") == "int"
        require(integers, OWNER, f"{name}.weights", "must be integers of 4 bits", weights)
        inputs = group.get("input_activations")
        require(not inputs, OWNER, f"{name}.input_activations", "must be None", inputs)
        strategy = weights.get("strategy")
        one_of(OWNER, f"{name}.strategy", strategy, ("group", "channel"))
        size = weights.get("group_size") if strategy == "group" else -1
        sizes.add(_whole(size, f"{name}.weights.group_size"))
        symmetric.add(bool(weights.get("symmetric", True)))
    require(len(kinds) == 1, OWNER, "format", "must be one for all groups", sorted(kinds))
    sparse = kinds == {CT_24}
    scheme = Scheme(
        CT_24 if sparse else "compressed-tensors",
        group_sizes=tuple(sorted(sizes)),
        symmetric=_common(symmetric),
        act_order=_common(group["weights"].get("actorder") == "group" for group in groups.values()),
    )
    if sparse:
        _check_version_24(config.get("version"), sizes)
    return _checked_24(scheme) if sparse else scheme


def _checked_24(scheme: Scheme) -> Scheme:
    """Return the scheme, or raise where 2:4 MARLIN cannot hold its weights."""
    rule = "must be true: 2:4 MARLIN has no zeros"
    require(scheme.symmetric is not False, OWNER, "symmetric", rule, scheme.symmetric)
    in_order = scheme.act_order is False or scheme.group_sizes == (-1,)
    rule = "must be false: 2:4 MARLIN has no act-order"
    require(in_order, OWNER, "act-order", rule, scheme.act_order)
    return scheme


def _check_version_24(version: Any, sizes: set[int]) -> None:
    """Refuse files whose scales may lie in the wrong order, which nothing in them would show.

    Before 0.8, whether compressed-tensors brought the scales of groups into order depended on how
    it was told of the groups; vLLM read such files wrongly. Before 0.7 it wrote no version.
    """
    found = re.match(r"(\d+)\.(\d+)", str(version))
    recent = found is not None and (int(found[1]), int(found[2])) >= SCALES_IN_ORDER
    rule = "must be 0.8 or later: before, scales of groups might lie in the wrong order"
    require(recent or sizes == {-1}, OWNER, "version", rule, version)


def _compressed_tensors_config(scheme: Scheme, size: int, kept: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": bool(scheme.symmetric),
        "strategy": "channel" if size == -1 else "group",
        "group_size": None if size == -1 else size,
        "block_structure": None,
        "dynamic": False,
        "actorder": "group" if scheme.act_order else None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": kept,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
