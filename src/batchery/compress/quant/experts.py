# SPDX-License-Identifier: Apache-2.0
"""Experts of a mixture as modules, in the place of transformers' stacked parameters.

When to use: `replace_linears` and the loaders do; a list of modules lets each expert have four-bit
layers, and files name experts one by one. When not: many tokens in 16 bits, where transformers'
grouped products are faster than a loop.

For token t with its experts e and their shares p:

    y[t] = Σ_e p[t, e] · down_e(act(gate_e(x[t])) * up_e(x[t]))          summed in the order of e

or another way to combine gate and up, if the stack has one; see `stacks` for their forms. Modules
have one form: three layers.

Each expert runs once, on the tokens routed to it. How many those are is read on the host: no CUDA
graph holds it, and torch.compile breaks there.

Files call the projections, and the modules around them, by older names: transformers says which,
and the modules here have those that the files have (`gate_proj`, or `w1` in Mixtral's).
"""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from batchery._core.validate import import_extra
from batchery.compress.quant.conv1d import as_linear, is_conv1d
from batchery.compress.quant.stacks import (
    STACKS,
    combined,
    expert_weights,
    gate_and_up,
    hull_of,
    is_scaled,
    is_stacked,
    join_gate_and_up,
)

__all__ = [
    "PROJECTIONS",
    "QuantExpert",
    "QuantExperts",
    "ScaledExperts",
    "expert_names",
    "layers_in_model",
    "name_in_files",
    "name_in_model",
    "restack",
    "unstacked",
]

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

Layers = tuple[nn.Module, nn.Module, nn.Module]
Combine = Callable[[Tensor, Tensor], Tensor]


class QuantExpert(nn.Module):
    """down(act(gate(x))·up(x)), its layers under the names that files have for them.

    Args:
        layers: gate, up and down.
        combine: makes one of what gate and up give.
        names: of the layers.

    Examples:
        >>> layers = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        >>> expert = QuantExpert(layers, torch.mul, ("w1", "w3", "w2"))
        >>> expert(torch.ones(2, 4)).shape, expert.layers()[2] is expert.w2
        (torch.Size([2, 4]), True)
    """

    def __init__(self, layers: Layers, combine: Combine, names: Sequence[str]) -> None:
        """Keep the layers."""
        super().__init__()
        self.names = tuple(names)
        for name, layer in zip(names, layers, strict=True):
            self.add_module(name, layer)
        self.combine = combine

    def layers(self) -> list[nn.Module]:
        """Return gate, up and down."""
        return [self.get_submodule(name) for name in self.names]

    def forward(self, x: Tensor) -> Tensor:
        """Return `(..., H)` for x `(..., H)`."""
        gate, up, down = self.layers()
        y: Tensor = down(self.combine(gate(x), up(x)))
        return y


class QuantExperts(nn.ModuleList):
    """Experts one by one, called like a module of stacked experts.

    Args:
        experts: the modules.
        hull: of the stack that they stand for, if `restack` shall make it again.

    Examples:
        >>> layers = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        >>> experts = QuantExperts([QuantExpert(layers, torch.mul, PROJECTIONS)] * 3)
        >>> index = torch.tensor([[0, 2], [2, 1]])
        >>> experts(torch.ones(2, 4), index, torch.full((2, 2), 0.5)).shape
        torch.Size([2, 4])
    """

    def __init__(self, experts: Iterable[QuantExpert], hull: nn.Module | None = None) -> None:
        """Keep the modules."""
        super().__init__(experts)
        self.hull = [hull]  # not in the module tree

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


class ScaledExperts(QuantExperts):
    """Experts one by one, called like Llama 4's: with the share already in each token.

    Examples:
        >>> layers = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        >>> experts = ScaledExperts([QuantExpert(layers, torch.mul, PROJECTIONS)] * 2)
        >>> routed = torch.tensor([1.0, 0.0, 0.0, 1.0])  # token 0 to the first, 1 to the other
        >>> experts(routed[:, None].repeat(1, 4)).any(-1)
        tensor([ True, False, False,  True])
    """

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """Return each expert's outputs.

        Args:
            hidden_states: `(E·T, H)`, all tokens of the first expert, then all of the next; of
                zeros where a token is not routed to the expert, as is then the output.
        """
        x = hidden_states.view(len(self), -1, hidden_states.shape[-1])
        out = torch.zeros_like(x)
        for number, expert in enumerate(self):
            tokens = x[number].any(-1).nonzero()[:, 0]
            if len(tokens):
                out[number, tokens] = expert(x[number, tokens])
        return out.view_as(hidden_states)


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

    Examples:
        >>> from transformers import MixtralConfig
        >>> from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        >>> experts = MixtralExperts(MixtralConfig(hidden_size=4, intermediate_size=6))
        >>> unstacked(experts)[7].down_proj
        Linear(in_features=6, out_features=4, bias=False)
    """
    hull, halves, weights = hull_of(experts), gate_and_up(experts), expert_weights(experts)
    biases = {own: experts._parameters.get(f"{own}_bias") for own in STACKS}
    modules = []
    for number in range(len(weights["down_proj"])):
        both, down = (
            _linear(weights[own][number], None if bias is None else bias.detach()[number])
            for own, bias in biases.items()
        )
        dense = zip(PROJECTIONS, (*(_rows(both, half) for half in halves), down), strict=True)
        made = [linear if layer is None else layer(own, number, linear) for own, linear in dense]
        modules.append(QuantExpert(tuple(made), partial(combined, hull), names))  # type: ignore[arg-type]
    kind = ScaledExperts if is_scaled(experts) else QuantExperts
    return kind(modules, hull).train(experts.training)


def restack(model: nn.Module) -> None:
    """Put stacks back in the place of experts that are modules and whose layers are all dense.

    Args:
        model: changed in place.

    Examples:
        >>> from transformers import MixtralConfig
        >>> from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        >>> experts = MixtralExperts(MixtralConfig(hidden_size=4, intermediate_size=6))
        >>> model = nn.Sequential(unstacked(experts))
        >>> restack(model)
        >>> type(model[0]).__name__, model[0].down_proj.shape
        ('MixtralExperts', torch.Size([8, 4, 6]))
    """
    for name, experts in list(model.named_modules()):
        if isinstance(experts, QuantExperts) and experts.hull[0] is not None:
            layers = [expert.layers() for expert in experts if isinstance(expert, QuantExpert)]
            if all(isinstance(layer, nn.Linear) for own in layers for layer in own):
                parent, _, own = name.rpartition(".")
                stack = _stack(experts.hull[0], layers)
                setattr(model.get_submodule(parent), own, stack.train(experts.training))


def _stack(hull: nn.Module, layers: Sequence[Sequence[Any]]) -> nn.Module:
    """Return stacked experts of the dense layers of each."""
    stack = hull_of(hull)
    for kind, ending in (("weight", ""), ("bias", "_bias")):
        parts = [[getattr(layer, kind) for layer in own] for own in layers]
        if parts[0][0] is None:
            continue
        both = torch.stack([join_gate_and_up(hull, gate.t(), up.t()) for gate, up, _ in parts])
        down = torch.stack([down.t() for *_, down in parts])
        for name, values in zip(STACKS, (both, down), strict=True):
            if values.dim() == 3 and not hull.is_transposed:
                values = values.transpose(1, 2).contiguous()
            stack.register_parameter(name + ending, nn.Parameter(values, requires_grad=False))
    return stack


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _rows(linear: nn.Linear, rows: slice) -> nn.Linear:
    return _linear(linear.weight[rows], None if linear.bias is None else linear.bias[rows])


def expert_names(model: nn.Module) -> tuple[str, ...]:
    """Return what files call gate, up and down of a model's experts.

    Examples:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> with torch.device("meta"):
        ...     model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=1))
        >>> expert_names(model)
        ('w1', 'w3', 'w2')
    """
    names: dict[str, list[str]] = {}
    for conversion in _conversions(model):
        stack = conversion.target_patterns[0].rpartition("experts.")[2]
        found = [re.search(r"experts\.\*\.(\w+)\.weight$", s) for s in conversion.source_patterns]
        if stack in STACKS and all(found):
            names.setdefault(stack, [match[1] for match in found if match])
    own = tuple(name for stack in STACKS for name in names.get(stack, ()))
    return own if len(own) == len(PROJECTIONS) else PROJECTIONS


def name_in_model(model: nn.Module) -> Callable[[str], str]:
    """Return what gives a module's name in the model for its name in files.

    Examples:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> with torch.device("meta"):
        ...     model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=1))
        >>> name_in_model(model)("model.layers.0.block_sparse_moe.gate.weight")
        'model.layers.0.mlp.gate.weight'
    """
    return _renaming([conversion for conversion in _conversions(model) if _renames(conversion)])


def name_in_files(model: nn.Module) -> Callable[[str], str]:
    """Return what gives a name in files, as other tools read them, for one in the model.

    Names change where experts are modules: stacks have no form in files of four bits.

    Examples:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> with torch.device("meta"):
        ...     model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=1))
        >>> mlp = model.model.layers[0].mlp
        >>> mlp.experts = unstacked(mlp.experts, expert_names(model))
        >>> name_in_files(model)("model.layers.0.mlp.experts.3.w2.weight")
        'model.layers.0.block_sparse_moe.experts.3.w2.weight'
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

    So does a `Conv1D`: it becomes a linear layer.

    Args:
        model: changed in place; it may lack or add the base model's prefix.
        stored: names of layers in files.

    Returns:
        The name in the model for each; the stored one where there is no such module.

    Examples:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> with torch.device("meta"):
        ...     model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=1))
        >>> stored = "model.layers.0.block_sparse_moe.experts.3.w2"
        >>> layers_in_model(model, [stored])[stored]
        'model.layers.0.mlp.experts.3.w2'
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    renamed = name_in_model(model)
    forms: dict[str, list[str]] = {}
    for layer in stored:
        # As that of a weight: patterns may end in a dot.
        names = (layer, renamed(f"{layer}.weight").removesuffix(".weight"))
        forms[layer] = [
            f for name in names for f in (name, name.removeprefix(prefix), prefix + name)
        ]
    found = (re.fullmatch(r"(.+)\.\d+\.\w+", form) for own in forms.values() for form in own)
    homes = {match[1] for match in found if match}
    called = expert_names(model)
    for home in homes & {name for name, module in model.named_modules() if is_stacked(module)}:
        parent, _, own = home.rpartition(".")
        setattr(model.get_submodule(parent), own, unstacked(model.get_submodule(home), called))
    there = dict(model.named_modules(remove_duplicate=False))
    places = {layer: next((f for f in own if f in there), layer) for layer, own in forms.items()}
    for place in places.values():
        if place in there and is_conv1d(there[place]):
            parent, _, own = place.rpartition(".")
            setattr(model.get_submodule(parent), own, as_linear(there[place]))
    return places
