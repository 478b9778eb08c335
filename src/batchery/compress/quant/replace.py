# SPDX-License-Identifier: Apache-2.0
"""Four-bit layers in the place of a model's dense ones, and its MLPs in two products.

    report = gptq_quantize_model(model, calibration)
    replace_linears(model, report.weights)      # half a byte a weight from here on
    fuse_mlps(model)                            # for decoding

When to fuse: a model that only answers from now on; fewer, wider products are faster in small
batches. When not: to save it for other tools, or to train adapters on gate or up; do so before.

An MLP as in Llama, Mistral and Qwen, with projections gate, up and down, becomes

    h = silu(x · gateᵀ) * (x · upᵀ)             one product of a gated `QuantLinear`
    y = h · downᵀ

An act-order of down goes into the rows of gate and up: h comes in the order that down wants. What
is such an MLP is not told by its class: it has these three children, and gives what the fused one
gives. Each expert of a mixture is one. q, k and v stay three products, since attention's own code
calls them one by one.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from batchery._core.validate import require, require_type
from batchery.compress.quant.checkpoint import carry_config, replace_module
from batchery.compress.quant.conv1d import linear_weight
from batchery.compress.quant.experts import (
    PROJECTIONS,
    QuantExpert,
    expert_names,
    unstacked,
)
from batchery.compress.quant.linear import QuantLinear
from batchery.compress.quant.partition import fold_act_order, join_outputs
from batchery.compress.quant.stacks import expert_weights, gate_and_up, is_stacked
from batchery.compress.quant.weight import QuantizedWeight, act_order, require_packable

__all__ = [
    "QuantGatedMLP",
    "fuse_mlps",
    "module_places",
    "replace_everywhere",
    "replace_linears",
]

ALIKE = 1e-4  # relative difference in float32; another activation makes more
GATES = (4.0, 400.0, 40_000.0)  # sizes of gates at which activations and limits are told apart


def replace_linears(model: nn.Module, weights: Mapping[str, QuantizedWeight]) -> None:
    """Put `QuantLinear` in the place of the linear layers that have quantised weights.

    All others stay as they are: excluded layers, embeddings, heads tied to them. The dense weights
    go one by one, unless something else holds them. A module that stands at several places is
    replaced at each. A transformers model's `save_pretrained` then writes what `save_quantized`
    does by default.

    Args:
        model: changed in place.
        weights: by the names of `nn.Linear` modules or transformers' `Conv1D`, as
            `gptq_quantize_model` reports and `rtn_quantize_model` returns them; of stacked experts
            all or none, by their parameter's name and the expert's number. The stack becomes a list
            of modules that is called like it: see `experts`.

    Raises:
        ValueError: a name is of no such module or expert of a known form, experts are missing, or a
            weight has another shape or a group size that the kernels do not take; nothing has
            been replaced.
        TypeError: an argument is of another kind, as a report in the place of its weights.

    Examples:
        >>> from batchery.compress.quant.rtn import quantize_rtn
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
        >>> replace_linears(model, {"0": quantize_rtn(model[0].weight, group_size=32)})
        >>> model
        Sequential(
          (0): QuantLinear(in_features=64, out_features=32, bias=True, bits=4, group_size=32)
          (1): ReLU()
          (2): Linear(in_features=32, out_features=1, bias=True)
        )
    """
    owner = "replace_linears"
    require_type(isinstance(model, nn.Module), owner, "model", "must be a module", model)
    rule = "must be a mapping: pass report.weights"
    require_type(isinstance(weights, Mapping), owner, "weights", rule, weights)
    shapes: dict[str, tuple[int, ...]] = {}
    stacks: dict[str, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        dense = linear_weight(module)
        if dense is not None:
            shapes[name] = tuple(dense.shape)
        elif is_stacked(module):
            for own, stack in expert_weights(module).items():
                experts = [f"{name}.{own}.{number}" for number in range(len(stack))]
                shapes |= dict.fromkeys(experts, tuple(stack.shape[1:]))
                stacks.setdefault(name, []).extend(experts)
    for name, qw in weights.items():
        rule = "must name nn.Linear or Conv1D modules, or experts of a known form"
        require(name in shapes, owner, "weights", rule, name)
        fits = qw.shape == shapes[name]
        require(fits, owner, f"weights[{name!r}]", f"must be {shapes[name]}", qw.shape)
        require_packable(owner, "group_size", qw.group_size, qw.shape[1], name)
        act_order(owner, qw)
    for name, experts in list(stacks.items()):
        absent = [own for own in experts if own not in weights]
        if len(absent) == len(experts):
            del stacks[name]
        else:
            require(not absent, owner, "weights", f"must have all experts of {name}", absent[:1])
    places = module_places(model)
    of_experts = {own for experts in stacks.values() for own in experts}
    for name, qw in weights.items():
        if name not in of_experts:
            linear = model.get_submodule(name)
            if linear_weight(linear) is not None:  # it may have stood at another place, too
                replace_everywhere(model, places, linear, QuantLinear.from_linear(linear, qw))
    names = expert_names(model) if stacks else PROJECTIONS
    for name in stacks:
        module = model.get_submodule(name)
        if is_stacked(module):
            layer = partial(_expert_layer, weights, name, gate_and_up(module))
            new = unstacked(module, names, layer)
            replace_everywhere(model, places, module, new)
    carry_config(model)


def _expert_layer(
    weights: Mapping[str, QuantizedWeight],
    stack: str,
    halves: tuple[slice, slice],
    own: str,
    number: int,
    linear: nn.Linear,
) -> QuantLinear:
    """Return the four-bit layer of one projection of an expert."""
    if own == "down_proj":
        return QuantLinear.from_linear(linear, weights[f"{stack}.{own}.{number}"])
    both, rows = weights[f"{stack}.gate_up_proj.{number}"], halves[own == "up_proj"]
    zeros = None if both.zeros is None else both.zeros[rows]
    half = replace(both, q=both.q[rows], scales=both.scales[rows], zeros=zeros)
    return QuantLinear.from_linear(linear, half)


class QuantGatedMLP(nn.Module):
    """down(silu(gate(x))·up(x)) of four-bit weights in two products; `fuse_mlps` makes it.

    Args:
        gate_up_proj: a gated layer.
        down_proj: takes what it gives.

    Examples:
        >>> from batchery.compress.quant.rtn import quantize_rtn
        >>> both, down = (quantize_rtn(torch.ones(n, 32), group_size=32) for n in (64, 8))
        >>> gate_up = QuantLinear.from_quantized(both, gated=True)
        >>> mlp = QuantGatedMLP(gate_up, QuantLinear.from_quantized(down))
        >>> mlp(torch.ones(3, 32)).shape
        torch.Size([3, 8])
    """

    def __init__(self, gate_up_proj: QuantLinear, down_proj: QuantLinear) -> None:
        """Keep the layers."""
        super().__init__()
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj

    def forward(self, x: Tensor) -> Tensor:
        """Return `(..., K)` for x `(..., K)`."""
        y: Tensor = self.down_proj(self.gate_up_proj(x))
        return y


@torch.no_grad()
def fuse_mlps(model: nn.Module) -> list[str]:
    """Let gate and up of each four-bit MLP be one product, and fold down's act-order into them.

    MLPs of another form or activation stay, and those whose gate and up differ in their groups or
    act-order. A fused model has a state of its own names, and can no more be saved for other tools.

    Args:
        model: with `QuantLinear` layers, loaded or put there by `replace_linears`; changed in
            place.

    Returns:
        The names of the fused modules.

    Examples:
        >>> from batchery.compress.quant.rtn import quantize_rtn
        >>> class MLP(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gate_proj, self.up_proj = nn.Linear(64, 96), nn.Linear(64, 96)
        ...         self.down_proj = nn.Linear(96, 64)
        ...
        ...     def forward(self, x):
        ...         return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        >>> model = nn.Sequential(MLP())
        >>> linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        >>> weights = {name: model.get_submodule(name).weight for name in linears}
        >>> rounded = {name: quantize_rtn(w, group_size=32) for name, w in weights.items()}
        >>> replace_linears(model, rounded)
        >>> fuse_mlps(model)
        ['0']
    """
    found = []
    places = module_places(model)
    names = [name for name, module in model.named_modules() if hasattr(module, _names(module)[0])]
    for name in filter(None, names):  # the model itself has no place to be replaced at
        module = model.get_submodule(name)
        fused = _fused(module)
        if fused is not None:
            replace_everywhere(model, places, module, fused)
            found.append(name)
    return found


def _names(module: nn.Module) -> tuple[str, ...]:
    """Return what an MLP would call gate, up and down."""
    return module.names if isinstance(module, QuantExpert) else PROJECTIONS


def module_places(model: nn.Module) -> dict[int, list[str]]:
    """Return all names of each module by its id: references would keep dense weights.

    Examples:
        >>> linear = nn.Linear(2, 2)
        >>> module_places(nn.Sequential(linear, nn.ReLU(), linear))[id(linear)]
        ['0', '2']
    """
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    return places


def replace_everywhere(
    model: nn.Module, places: dict[int, list[str]], old: nn.Module, new: nn.Module
) -> None:
    """Put a module in the place of another, wherever that stands.

    Examples:
        >>> linear = nn.Linear(2, 2)
        >>> model = nn.Sequential(linear, linear)
        >>> replace_everywhere(model, module_places(model), linear, nn.Identity())
        >>> [*model]
        [Identity(), Identity()]
    """
    for name in places.pop(id(old)):
        replace_module(model, name, new)


def _fused(module: nn.Module) -> QuantGatedMLP | None:
    """Return what can stand for a module, None if nothing can."""
    rest = dict(module.named_children())
    layers = [
        layer for name in _names(module) if type(layer := rest.pop(name, None)) is QuantLinear
    ]
    # Beside the three there may be an activation.
    if len(layers) < len(PROJECTIONS) or len(rest) > 1:
        return None
    gate, up, down = layers
    biases: list[Tensor] = [layer.bias for layer in (gate, up) if layer.bias is not None]
    if len(biases) == 1:
        return None
    try:
        weight, halves, order = fold_act_order(
            down.quantized_weight(), [gate.quantized_weight(), up.quantized_weight()]
        )
        gate_up = join_outputs(halves)
    except ValueError:  # sizes or groups differ
        return None
    if order is not None:
        biases = [bias[order] for bias in biases]
        down = _layer_like(down, weight, down.bias)
    bias = torch.cat(biases) if biases else None
    fused = QuantGatedMLP(_layer_like(gate, gate_up, bias, gated=True), down)
    return fused.train(module.training) if _alike(module, fused, gate) else None


def _layer_like(
    layer: QuantLinear, weight: QuantizedWeight, bias: Tensor | None, *, gated: bool = False
) -> QuantLinear:
    kinds: dict[str, Any] = {"batch_invariant": layer.batch_invariant, "dtype": layer.dtype}
    return QuantLinear.from_quantized(weight, bias, gated=gated, **kinds)


def _alike(module: nn.Module, fused: nn.Module, gate: QuantLinear) -> bool:
    """Say whether two modules give the same, in float32, where activations bend and far beyond.

    Far beyond, limits of gate or up show. A module that is not called like an MLP is another.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, gate.in_features, generator=generator, dtype=torch.float32)
    x = x.to(gate.packed.words.device)
    x /= gate(x).std()
    modes = [(own, own.training) for own in module.modules()]
    module.eval()  # dropout would draw from the global generator
    try:
        return all(
            bool((fused(x * size) - wanted).norm() <= ALIKE * wanted.norm())
            for size in GATES
            for wanted in (module(x * size),)
        )
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False
    finally:
        for own, mode in modes:
            own.training = mode
