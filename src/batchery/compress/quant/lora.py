# SPDX-License-Identifier: Apache-2.0
"""LoRA of PEFT on top of `QuantLinear`.

    config = lora_for_quantized(LoraConfig(target_modules=["q_proj", "v_proj"]))
    model = get_peft_model(model, config)

PEFT finds adapters for layers by their class, and has a place in its config for classes that it
does not know; that entry is not saved with an adapter. So loading one takes the config, too:

    config = lora_for_quantized(PeftConfig.from_pretrained(path))
    model = PeftModel.from_pretrained(model, path, config=config)

Merging makes a dense layer of W + ΔW: to round the sum to four bits again would lose much of ΔW.
"""

import warnings
from functools import cache
from typing import Any

from torch import nn

from batchery._core.validate import import_extra, require
from batchery.compress.quant.linear import QuantLinear

__all__ = ["lora_for_quantized"]


def lora_for_quantized(config: Any) -> Any:
    """Tell a `peft.LoraConfig` how to adapt `QuantLinear`, and return it.

    Name the layers in `target_modules`; PEFT's "all-linear" finds only classes that it knows.

    Args:
        config: a `LoraConfig`, changed in place.
    """
    config._register_custom_module({QuantLinear: _lora_class()})
    return config


@cache
def _lora_class() -> type[nn.Module]:
    """Return the adapter's class; PEFT is imported here."""
    layer = import_extra("peft.tuners.lora.layer", "hf", "lora_for_quantized")

    class QuantLoraLinear(layer.Linear):  # type: ignore[misc, name-defined]
        """LoRA whose base is four-bit until it is merged."""

        def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
            gated = isinstance(base_layer, QuantLinear) and base_layer.gated
            rule = "must not be gated: adapt gate and up before they are fused"
            require(not gated, "lora_for_quantized", "target_modules", rule, adapter_name)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Unsupported layer type")
                super().__init__(base_layer, adapter_name, **kwargs)
            # Kept out of the module tree.
            self._quantized: list[QuantLinear] = []

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Make the base dense, and add the adapters to it."""
            base = self.get_base_layer()
            if isinstance(base, QuantLinear):
                self._quantized, dense = [base], base.to_linear()
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
