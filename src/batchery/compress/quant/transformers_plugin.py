# SPDX-License-Identifier: Apache-2.0
"""transformers loads GPTQ, AWQ, MARLIN and compressed-tensors folders with our layers.

    enable_transformers()
    model = AutoModelForCausalLM.from_pretrained(folder)

needs none of the packages that transformers would ask for. It is explicit and reversible: the
entries for these methods in transformers' table of configs are replaced until
`disable_transformers()`. A config that is no four-bit weight with 16-bit activations still goes to
transformers' own class. `save_pretrained` writes the format that was loaded, or GPTQ's version 2
where `replace_linears` or `load_quantized` put the layers into a model; `dequantize()` gives back a
dense model; Trainer and PEFT train adapters (see `lora_for_quantized`).

Before loading, each linear layer whose words are in the files is replaced by a module of empty
buffers named as in the files; afterwards each of those becomes a `QuantLinear`. So sharding and
device maps are transformers' own; but before it reads the files, we read them once from first to
last, and name what was changed after it was written (see `digests`) or is not finite. Stacked
experts become modules first, for files name experts one by one. Layers on the disk, or moved in
from the CPU, are refused; so are files that lack a linear layer of the base model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from batchery._core.validate import import_extra, require
from batchery.compress.quant.checkpoint import (
    described,
    linear_named,
    quant_layers,
    quantized_state_dict,
    read_layer,
    replace_module,
    require_finite,
    require_one_size,
    stored_layers,
)
from batchery.compress.quant.digests import digests_of
from batchery.compress.quant.experts import QuantExperts, layers_in_model, restack
from batchery.compress.quant.folder import SafetensorsFolder
from batchery.compress.quant.linear import QuantLinear
from batchery.compress.quant.scheme import METHODS, Format, Scheme

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers.quantizers import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
else:
    _quantizers = import_extra("transformers.quantizers", "hf", "enable_transformers")
    HfQuantizer = _quantizers.HfQuantizer
    QuantizationConfigMixin = import_extra(
        "transformers.utils.quantization_config", "hf", "enable_transformers"
    ).QuantizationConfigMixin

__all__ = ["disable_transformers", "enable_transformers"]

OWNER = "enable_transformers"
METHOD = "batchery"  # so that transformers does not take the model for one of its own
FORCED: dict[str, dict[str, str]] = {
    "auto": {},
    "gptq_v1": {"quant_method": "gptq", "checkpoint_format": "gptq"},
    "gptq_v2": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
    "awq": {"quant_method": "awq", "version": "gemm"},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
    "marlin": {"quant_method": "marlin"},
}
_replaced: dict[str, Any] = {}


def enable_transformers() -> None:
    """Let transformers' `from_pretrained` load four-bit folders with `QuantLinear`.

    Calling it twice does no more than once.

    Raises:
        ImportError: transformers is not installed.

    Examples:
        >>> import tempfile
        >>> from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
        >>> from batchery.compress.quant import replace_linears, rtn_quantize_model
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, num_hidden_layers=1, **sizes))
        >>> replace_linears(model, rtn_quantize_model(model, group_size=32))
        >>> enable_transformers()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     loaded = AutoModelForCausalLM.from_pretrained(folder)
        >>> loaded.model.layers[0].mlp.up_proj
        QuantLinear(in_features=64, out_features=64, bias=False, bits=4, group_size=32)
        >>> disable_transformers()
    """
    auto = _auto()
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = QuantLinearQuantizer
    for method in METHODS:
        if method not in _replaced:
            _replaced[method] = auto.AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
            auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = QuantLinearConfig


def disable_transformers() -> None:
    """Undo `enable_transformers`; models that are loaded stay as they are.

    Examples:
        >>> from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as table
        >>> before = table["gptq"]
        >>> enable_transformers()
        >>> table["gptq"].__name__
        'QuantLinearConfig'
        >>> disable_transformers()
        >>> table["gptq"] is before
        True
    """
    auto = _auto()
    auto.AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
    for method in list(_replaced):
        before = _replaced.pop(method)
        if before is None:
            del auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method]
        else:
            auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = before


@contextmanager
def transformers_enabled() -> Iterator[None]:
    """Have the plug-in enabled for a while, and as it was afterwards."""
    before = bool(_replaced)
    enable_transformers()
    try:
        yield
    finally:
        if not before:
            disable_transformers()


def attach_quantizer(model: Any) -> None:
    """Let `save_pretrained` write a model whose layers were replaced after it was made."""
    quantizer = ReplacedQuantizer(QuantLinearConfig(quant_method="gptq", bits=4))
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config
    if isinstance(model.get_output_embeddings(), QuantLinear):
        model.config.tie_word_embeddings = False


def from_pretrained(
    path: Path,
    quantization: Mapping[str, Any],
    *,
    format: Format | Literal["auto"] = "auto",
    device: torch.device | str | None = None,
) -> Any:
    """Build a causal language model from a folder; see `load_quantized`."""
    transformers = import_extra("transformers", "hf", "load_quantized")
    Scheme.parse(quantization, form=format)
    config = transformers.AutoConfig.from_pretrained(path)
    table = {"quant_method": "gptq", **quantization, **FORCED[format]}
    config.quantization_config = {**table, "load_as": format}
    with transformers_enabled():
        place = None if device is None else {"": torch.device(device)}
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            path, config=config, device_map=place, output_loading_info=True
        )
    missing = sorted(found["missing_keys"])
    rule = "must have all tensors of the model"
    require(not missing, "load_quantized", f"files in {path.name}", rule, f"no {missing[:3]}")
    return model


class QuantLinearConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """A `quantization_config` as it is in the file.

    Args:
        load_as: `format` of `load_quantized`, which is not stored.
        config: the entries.
    """

    def __init__(self, *, load_as: Format | Literal["auto"] = "auto", **config: Any) -> None:
        """Keep the entries."""
        self.quant_method = METHOD
        self.stored = config
        self.scheme = Scheme.parse(config, form=load_as)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return our config, or transformers' own of what we do not read."""
        try:
            config = cls(**config_dict)
        except ValueError:
            before = _replaced.get(config_dict.get("quant_method", ""))
            if before is None:
                raise
            return before.from_dict(config_dict, **kwargs)
        return (config, kwargs) if kwargs.pop("return_unused_kwargs", False) else config

    def to_dict(self) -> dict[str, Any]:
        """Return the entries, which `save_pretrained` writes."""
        return dict(self.stored)


class StoredLinear(nn.Module):
    """Empty buffers with the names and shapes of a layer's tensors in the files."""

    def __init__(self, linear: nn.Linear, kinds: Mapping[str, tuple[tuple[int, ...], Any]]) -> None:
        """Make the buffers on the meta device."""
        super().__init__()
        self.like = [linear]  # not in the module tree
        for name, (shape, dtype) in kinds.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))

    @property
    def weight(self) -> Tensor:
        """The dense weight, on the meta device: `_init_weights` of some parents fills it in vain.

        GPTBigCode, Mamba2 and NanoChat initialise a child's weight by the parent's rule, and do so
        in loading, too.
        """
        return self.like[0].weight

    def tensors(self) -> dict[str, Tensor]:
        """Return the buffers by name."""
        return dict(self._buffers)  # type: ignore[arg-type]


class QuantLinearQuantizer(HfQuantizer):  # type: ignore[misc]
    """transformers' hooks around loading and saving."""

    requires_calibration = True  # it loads only; `gptq_quantize_model` quantises

    def __init__(self, quantization_config: QuantLinearConfig, **kwargs: Any) -> None:
        """Take over the scheme of the config."""
        super().__init__(quantization_config, **kwargs)
        self.scheme = quantization_config.scheme
        self.where: dict[str, str] = {}
        self.searched = ""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a device map that would offload."""
        places = kwargs.get("device_map")
        if isinstance(places, dict):
            kinds = {"cuda" if isinstance(place, int) else str(place) for place in places.values()}
            kinds = {kind.partition(":")[0] for kind in kinds}
            whole = "disk" not in kinds and (len(kinds) < 2 or "cpu" not in kinds)
            require(whole, OWNER, "device_map", "must not offload layers", places)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files") or []
        safe = bool(files) and all(str(file).endswith(".safetensors") for file in files)
        require(safe, OWNER, "checkpoint_files", "must be safetensors", files)
        plan = getattr(getattr(model.config, "distributed_config", None), "tp_plan", None)
        rule = "must be None: cut weights with slice_outputs and slice_inputs"
        require(plan is None, OWNER, "tp_plan", rule, plan)
        folder = SafetensorsFolder(Path(files[0]).parent, [Path(file).name for file in files])
        self.searched = f"files in {folder.path.name}"
        self.scheme = self.scheme.confirmed(folder.metadata, folder.path.name)
        layers = stored_layers(folder, self.scheme)
        require(bool(layers), OWNER, "checkpoint_files", "must have quantised layers", files)
        quantised = {full for names in layers.values() for full in names.values()}
        read = ((name, folder.tensor(name)) for name in folder.files)
        require_finite(model, (pair for pair in read if pair[0] not in quantised), folder)
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
        places = layers_in_model(model, layers)
        for stored, names in layers.items():
            if any(re.search(pattern, f"{stored}.weight") for pattern in ignored):
                continue
            name = places[stored]
            linear = linear_named(model, name, folder.where(names))
            kinds = {own: folder.shape(full) for own, full in names.items()}
            if f"{stored}.bias" in folder.files:
                kinds["bias"] = folder.shape(f"{stored}.bias")
            replace_module(model, name, StoredLinear(linear, kinds))
            self.where[name] = folder.where(names)
        _whole_experts(model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for name, where in self.where.items():
            stored = model.get_submodule(name)
            tensors, linear = stored.tensors(), stored.like[0]
            offloaded = [own for own, tensor in tensors.items() if tensor.is_meta]
            require(not offloaded, OWNER, where, "must not be offloaded", offloaded)
            replace_module(model, name, read_layer(self.scheme, tensors, linear, where))
        require_one_size(self.scheme, dict(quant_layers(model)), "checkpoint_files")
        _all_loaded(model, self.searched)

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # `save_pretrained` leaves a name in the config.
        known = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for name, layer in list(quant_layers(model)):
            replace_module(model, name, layer.to_dense(known))
        restack(model)
        return model

    def get_state_dict_and_metadata(
        self, model: Any
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Return the state in the format that was loaded, and correct the config."""
        layers = dict(quant_layers(model))
        if not layers:  # adapters were merged into all
            self.remove_quantization_config(model)
            return None, {}
        scheme = replace(self.scheme, version=self.scheme.version or 1)
        if layers.keys() != self.where.keys():  # into some
            self.quantization_config.stored = described(model, scheme.form)[1]
        return _with_metadata(model, quantized_state_dict(model, scheme), scheme)

    def is_serializable(self, **kwargs: Any) -> bool:
        """Say that `save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Say that adapters can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Say that torch.compile works."""
        return True


class ReplacedQuantizer(QuantLinearQuantizer):
    """The hooks of a model that says only when it is saved which layers it has."""

    def get_state_dict_and_metadata(
        self, model: Any
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Return the state as `save_quantized` writes it by default, and complete the config."""
        if not any(quant_layers(model)):  # adapters were merged into all
            self.remove_quantization_config(model)
            return None, {}
        scheme, self.quantization_config.stored = described(model, "gptq_v2")
        return _with_metadata(model, quantized_state_dict(model, scheme), scheme)


def _auto() -> Any:
    return import_extra("transformers.quantizers.auto", "hf", OWNER)


def _with_metadata(
    model: Any, state: dict[str, Tensor], scheme: Scheme
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a state, and the metadata of its files: digests also by the names in files.

    Raises:
        ValueError: transformers would change quantised tensors on their way to the files.
    """
    loading = import_extra("transformers.core_model_loading", "hf", OWNER)
    try:
        stored = loading.revert_weight_conversion(model, dict(state))
    except RuntimeError:  # packed tensors of several sizes do not even join
        stored = {}
    there = {(tensor.data_ptr(), tensor.shape) for tensor in stored.values()}
    ours = tuple(f"{name}." for name, _ in quant_layers(model))
    lost = [
        name
        for name, tensor in state.items()
        if name.startswith(ours) and (tensor.data_ptr(), tensor.shape) not in there
    ]
    rule = "cannot be saved so, as transformers would join tensors: take save_quantized"
    require(not lost, "save_pretrained", "model", rule, lost[:3])
    return state, {**scheme.metadata(), **digests_of({**state, **stored})}


def _all_loaded(model: Any, where: str) -> None:
    """Raise where a weight is not in the files: it would be random.

    New heads on a base model are no loss; transformers reports them.
    """
    ours = tuple(f"{name}." for name, _ in quant_layers(model.base_model))
    weights = {n: p for n, p in model.base_model.named_parameters() if not n.startswith(ours)}
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        weights["output embeddings"] = head.weight
    # transformers marks what it loads or ties
    lost = [n for n, p in weights.items() if not getattr(p, "_is_hf_initialized", False)]
    require(not lost, OWNER, where, "must have all weights", f"no {lost[:3]}")


def _whole_experts(model: nn.Module) -> None:
    """Raise where some experts of a layer are quantised: transformers would stack the others."""
    for name, experts in model.named_modules():
        if isinstance(experts, QuantExperts):
            dense = [own for own, m in experts.named_modules() if isinstance(m, nn.Linear)]
            require(not dense, OWNER, name, "must be quantised as a whole", f"dense {dense[:1]}")
