# SPDX-License-Identifier: Apache-2.0
"""LoRA of PEFT on top of `QuantLinear`.

    config = lora_for_quantized(LoraConfig(target_modules=["q_proj", "v_proj"]))
    model = get_peft_model(model, config)

PEFT finds adapters for layers by their class, and has a place in its config for classes that it
does not know; that entry is not saved with an adapter. So loading one takes the config, too:

    config = lora_for_quantized(PeftConfig.from_pretrained(path))
    model = PeftModel.from_pretrained(model, path, config=config)

Adapters that start from the dense weight (DoRA, PiSSA, OLoRA, LoftQ and their like) are refused.
Merging makes a dense layer of W + ΔW: to round the sum to four bits again would lose much of ΔW.
"""

import warnings
from functools import cache
from typing import Any

from torch import nn

from batchery._core.validate import import_extra, one_of, require, require_type
from batchery.compress.quant.linear import QuantLinear

__all__ = ["lora_for_quantized"]

OWNER = "lora_for_quantized"
STARTS = (True, False, "gaussian", "eva")  # those that need no dense weight
DENSE_VARIANTS = ("use_dora", "kasa_config", "velora_config")


def lora_for_quantized(config: Any) -> Any:
    """Tell a `peft.LoraConfig` how to adapt `QuantLinear`, and return it.

    Name the layers in `target_modules`; PEFT's "all-linear" finds only classes that it knows.

    Args:
        config: a `LoraConfig`, changed in place.

    Raises:
        ValueError: the adapters would need the dense weight.
        TypeError: the config is no `LoraConfig`.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> from batchery.compress.quant.rtn import quantize_rtn
        >>> linear = nn.Linear(32, 8)
        >>> layer = QuantLinear.from_linear(linear, quantize_rtn(linear.weight, group_size=32))
        >>> config = lora_for_quantized(LoraConfig(r=2, target_modules=["0"]))
        >>> model = get_peft_model(nn.Sequential(layer), config)
        >>> model.get_nb_trainable_parameters()  # 2 · (32 + 8), and all with the bias
        (80, 88)
    """
    kind = import_extra("peft", "hf", OWNER).LoraConfig
    require_type(isinstance(config, kind), OWNER, "config", "must be a LoraConfig", config)
    _require_plain(config)
    config._register_custom_module({QuantLinear: _lora_class()})
    return config


def _require_plain(config: Any) -> None:
    """Refuse adapters that read the base's dense weight, or make another of it."""
    one_of(OWNER, "init_lora_weights", getattr(config, "init_lora_weights", True), STARTS)
    for variant in DENSE_VARIANTS:
        on = getattr(config, variant, None)
        require(not on, OWNER, variant, "must be off: the base has no dense weight", on)


@cache
def _lora_class() -> type[nn.Module]:
    """Return the adapter's class; PEFT is imported here."""
    layer = import_extra("peft.tuners.lora.layer", "hf", OWNER)

    class QuantLoraLinear(layer.Linear):  # type: ignore[misc, name-defined]
        """LoRA whose base is four-bit until it is merged."""

        def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
            gated = isinstance(base_layer, QuantLinear) and base_layer.gated
            rule = "must not be gated: adapt gate and up before they are fused"
            require(not gated, OWNER, "target_modules", rule, adapter_name)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Unsupported layer type")
                super().__init__(base_layer, adapter_name, **kwargs)
            # Whatever the config says: merging is into what `to_dense` makes.
            self.fan_in_fan_out = getattr(base_layer, "transposed", False)
            # Kept out of the module tree.
            self._quantized: list[QuantLinear] = []

        def update_layer(self, *args: Any, **kwargs: Any) -> None:
            """Add an adapter, whose config may not have come through `lora_for_quantized`."""
            _require_plain(kwargs.get("config"))
            super().update_layer(*args, **kwargs)

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Make the base dense, and add the adapters to it."""
            base = self.get_base_layer()
            if isinstance(base, QuantLinear):
                self._quantized, dense = [base], base.to_dense()
                self.base_layer: nn.Module = dense
            try:
                super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            finally:
                if self._quantized and not self.merged:
                    self.base_layer = self._quantized.pop()

        def unmerge(self) -> None:
            """Put the four-bit base back."""
            if self._quantized:
                self.merged_adapters.clear()
                self.base_layer = self._quantized.pop()
            else:
                super().unmerge()

    return QuantLoraLinear
