# SPDX-License-Identifier: Apache-2.0
"""Experts of a mixture as modules, in the place of transformers' stacked parameters.

When to use: `replace_linears` and the loaders do, for models whose experts have the usual form; a
list of modules lets each expert have four-bit layers, and files name experts one by one. When not:
many tokens in 16 bits, where transformers' grouped products are faster than a loop.

A stack holds `gate_up_proj` `(E, 2I, H)` and `down_proj` `(E, H, I)`. For token t with its experts
e and their shares p:

    y[t] = Σ_e p[t, e] · down_e(act(gate_e(x[t])) * up_e(x[t]))          summed in the order of e

Each expert runs once, on the tokens routed to it. How many those are is read on the host: no CUDA
graph holds it, and torch.compile breaks there.

Files call the projections, and the modules around them, by older names: transformers says which,
and the modules here have those that the files have (`gate_proj`, or `w1` in Mixtral's).
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from batchery._core.validate import import_extra

__all__ = [
    "PROJECTIONS",
    "STACKS",
    "QuantExpert",
    "QuantExperts",
    "expert_names",
    "is_stacked",
    "is_transposed",
    "layers_in_model",
    "name_in_files",
    "name_in_model",
    "stacks_of",
    "unstacked",
]

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
STACKS = ("gate_up_proj", "down_proj")
# What older versions of transformers do not say of a stack is so.
USUAL = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_concatenated": True,
}
COMMON = "transformers.integrations.moe"

Layers = tuple[nn.Module, nn.Module, nn.Module]


class QuantExpert(nn.Module):
    """down(act(gate(x))·up(x)), its layers under the names that files have for them.

    Args:
        layers: gate, up and down.
        act_fn: the activation.
        names: of the layers.
    """

    def __init__(
        self, layers: Layers, act_fn: Callable[[Tensor], Tensor], names: Sequence[str]
    ) -> None:
        """Keep the layers."""
        super().__init__()
        self.names = tuple(names)
        for name, layer in zip(names, layers, strict=True):
            self.add_module(name, layer)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        """Return `(..., H)` for x `(..., H)`."""
        gate, up, down = (self._modules[name] for name in self.names)
        y: Tensor = down(self.act_fn(gate(x)) * up(x))  # type: ignore[misc]
        return y


class QuantExperts(nn.ModuleList):
    """Experts one by one, called like a module of stacked experts.

    Example:
        >>> layers = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        >>> experts = QuantExperts([QuantExpert(layers, nn.SiLU(), PROJECTIONS)] * 3)
        >>> index = torch.tensor([[0, 2], [2, 1]])
        >>> experts(torch.ones(2, 4), index, torch.full((2, 2), 0.5)).shape
        torch.Size([2, 4])
    """

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the shared sum of the experts' outputs.

        Args:
            hidden_states: `(T, H)`.
            top_k_index: int64 `(T, k)`, the experts of each token.
            top_k_weights: `(T, k)`, their shares.

        Returns:
            `(T, H)` in the dtype of `hidden_states`.
        """
        chosen = top_k_index.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=len(self)).tolist()
        out = torch.zeros_like(hidden_states)
        for expert, places in zip(self, torch.split(order, counts), strict=True):
            if len(places):
                tokens = places // top_k_index.shape[1]
                y = expert(hidden_states[tokens]) * top_k_weights.flatten()[places, None]
                out.index_add_(0, tokens, y.to(out.dtype))  # each token once: sums have an order
        return out


def stacks_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights `(E, ...)` of stacked experts by name; none of any other module.

    transformers' classes for them have names that end in `Experts`.
    """
    if not type(module).__name__.endswith("Experts"):
        return {}
    own = module.named_parameters(recurse=False)
    return {name: stack for name, stack in own if stack.dim() == 3}


def is_transposed(experts: nn.Module) -> bool:
    """Say whether stacked experts are `(E, K, N)`: they tell, or their shapes do."""
    if getattr(experts, "is_transposed", False):
        return True
    first, last = (stacks_of(experts).get(name) for name in STACKS)
    if first is None or last is None:
        return False
    return first.shape[2] == 2 * last.shape[1] and first.shape[1] == last.shape[2]


def is_stacked(module: nn.Module) -> bool:
    """Say whether a module is transformers' stacked experts in their usual form.

    Biases, transposed or interleaved stacks, a norm behind the experts and gates of their own
    (clamped ones, for instance) are not.
    """
    own = getattr(type(module), "_apply_gate", None)
    return (
        stacks_of(module).keys() == set(STACKS)
        and not is_transposed(module)
        and all(getattr(module, name, value) is value for name, value in USUAL.items())
        and getattr(own, "__module__", "") == COMMON
    )


def unstacked(
    experts: nn.Module,
    names: Sequence[str] = PROJECTIONS,
    layer: Callable[[str, int, nn.Linear], nn.Module] | None = None,
) -> QuantExperts:
    """Return stacked experts as a list of modules.

    Args:
        experts: what `is_stacked` accepts.
        names: what to call gate, up and down.
        layer: what stands for a layer, given its place in `PROJECTIONS`, the expert's number and
            an `nn.Linear` with a part of the stack; by default that.
    """
    gate_up, down = (experts.get_parameter(name) for name in STACKS)
    modules = []
    for number in range(len(down)):
        dense = zip(PROJECTIONS, (*gate_up[number].chunk(2), down[number]), strict=True)
        linears = [(own, _linear(weight)) for own, weight in dense]
        made = [linear if layer is None else layer(own, number, linear) for own, linear in linears]
        modules.append(QuantExpert(tuple(made), experts.act_fn, names))  # type: ignore[arg-type]
    return QuantExperts(modules).train(experts.training)


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear


def expert_names(model: nn.Module) -> tuple[str, ...]:
    """Return what files call gate, up and down of a model's experts."""
    names: dict[str, list[str]] = {}
    for conversion in _conversions(model):
        stack = conversion.target_patterns[0].rpartition("experts.")[2]
        found = [re.search(r"experts\.\*\.(\w+)\.weight$", s) for s in conversion.source_patterns]
        if stack in STACKS and all(found):
            names.setdefault(stack, [match[1] for match in found if match])
    own = tuple(name for stack in STACKS for name in names.get(stack, ()))
    return own if len(own) == len(PROJECTIONS) else PROJECTIONS


def name_in_model(model: nn.Module) -> Callable[[str], str]:
    """Return what gives a module's name in the model for its name in files."""
    return _renaming([conversion for conversion in _conversions(model) if _renames(conversion)])


def name_in_files(model: nn.Module) -> Callable[[str], str]:
    """Return what gives a name in files, as other tools read them, for one in the model.

    Names change where experts are modules: stacks have no form in files of four bits.
    """
    if not any(isinstance(module, QuantExperts) for module in model.modules()):
        return str
    back = [conversion.reverse_transform() for conversion in reversed(_conversions(model))]
    return _renaming([conversion for conversion in back if _renames(conversion)])


def _conversions(model: nn.Module) -> list[Any]:
    """Return how transformers changes the names and tensors of a model's files."""
    if not hasattr(model, "base_model_prefix"):
        return []
    home = import_extra("transformers.conversion_mapping", "hf", "load_quantized")
    found: list[Any] = home.get_model_conversion_mapping(model, add_legacy=False)
    return found


def _renames(conversion: Any) -> bool:
    loading = import_extra("transformers.core_model_loading", "hf", "load_quantized")
    known = isinstance(conversion, loading.WeightRenaming)
    return known and not isinstance(conversion, loading.PrefixChange)


def _renaming(conversions: Sequence[Any]) -> Callable[[str], str]:
    def renamed(name: str) -> str:
        for conversion in conversions:
            name, _ = conversion.rename_source_key(name)
        return name

    return renamed


def layers_in_model(model: nn.Module, stored: Iterable[str]) -> dict[str, str]:
    """Find the modules of layers in files; stacked experts that have some become modules.

    Args:
        model: changed in place; it may lack or add the base model's prefix.
        stored: names of layers in files.

    Returns:
        The name in the model for each; the stored one where there is no such module.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    renamed = name_in_model(model)
    forms: dict[str, list[str]] = {}
    for layer in stored:
        names = (layer, renamed(layer))
        forms[layer] = [
            f for name in names for f in (name, name.removeprefix(prefix), prefix + name)
        ]
    found = (re.fullmatch(r"(.+)\.\d+\.\w+", form) for own in forms.values() for form in own)
    homes = {match[1] for match in found if match}
    called = expert_names(model)
    for home in homes & {name for name, module in model.named_modules() if is_stacked(module)}:
        parent, _, own = home.rpartition(".")
        setattr(model.get_submodule(parent), own, unstacked(model.get_submodule(home), called))
    there = {name for name, _ in model.named_modules(remove_duplicate=False)}
    return {layer: next((f for f in own if f in there), layer) for layer, own in forms.items()}
