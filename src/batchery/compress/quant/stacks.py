# SPDX-License-Identifier: Apache-2.0
"""Experts as transformers keeps them: all of a layer in one parameter, in one of several forms.

The usual one, for H hidden and I inner features of E experts:

    gate_up_proj (E, 2I, H), gate over up      down_proj (E, H, I)      act(gate) * up between them

Others are transposed (`(E, K, N)`: Aria's, Llama 4's, gpt-oss's), have biases `(E, N)` or gate and
up in every other row (gpt-oss's), or combine these two in a way of their own. transformers' classes
say which, and combine by a method; so nothing here knows models, but Llama 4's by its class, which
says nothing: it is given every token once for each expert, already times its share, and zeros in
the place of those that the expert does not get.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "STACKS",
    "combined",
    "expert_weights",
    "gate_and_up",
    "hull_of",
    "is_scaled",
    "is_stacked",
    "join_gate_and_up",
    "stacks_of",
]

STACKS = ("gate_up_proj", "down_proj")
# No other value is taken; older versions of transformers do not say.
USUAL = {"has_gate": True, "has_post_expert_norm": False}
SCALED = "Llama4TextExperts"
COMMON = "transformers.integrations.moe"


def stacks_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights `(E, ...)` of stacked experts by name; none of any other module.

    transformers' classes for them have names that end in `Experts`.

    Examples:
        >>> from transformers import MixtralConfig
        >>> from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        >>> experts = MixtralExperts(MixtralConfig(hidden_size=4, intermediate_size=6))
        >>> {name: tuple(stack.shape) for name, stack in stacks_of(experts).items()}
        {'gate_up_proj': (8, 12, 4), 'down_proj': (8, 4, 6)}
    """
    if not type(module).__name__.endswith("Experts"):
        return {}
    own = module.named_parameters(recurse=False)
    return {name: stack for name, stack in own if stack.dim() == 3}


def expert_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the stacks of a module as `(E, N, K)`, in place.

    Examples:
        >>> from transformers import GptOssConfig
        >>> from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
        >>> experts = GptOssExperts(GptOssConfig(hidden_size=4, intermediate_size=6))
        >>> experts.down_proj.shape[1:], expert_weights(experts)["down_proj"].shape[1:]
        (torch.Size([6, 4]), torch.Size([4, 6]))
    """
    turned = _is_transposed(module)
    return {
        name: stack.detach().transpose(1, 2) if turned else stack.detach()
        for name, stack in stacks_of(module).items()
    }


def is_stacked(module: nn.Module) -> bool:
    """Say whether a module is stacked experts of a form that we know.

    Those without gates or with a norm behind each expert are not, nor any whose class does not say
    how it combines gate and up.

    Examples:
        >>> from transformers import MixtralConfig
        >>> from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        >>> experts = MixtralExperts(MixtralConfig(hidden_size=4, intermediate_size=6))
        >>> is_stacked(experts), is_stacked(nn.Linear(4, 4))
        (True, False)
    """
    return (
        stacks_of(module).keys() == set(STACKS)
        and all(getattr(module, name, value) is value for name, value in USUAL.items())
        and (is_scaled(module) or _gate_of(type(module)) is not None)
    )


def is_scaled(module: nn.Module) -> bool:
    """Say whether stacked experts are given tokens that their shares are already in.

    Examples:
        >>> from transformers import Llama4TextConfig
        >>> from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
        >>> is_scaled(Llama4TextExperts(Llama4TextConfig(hidden_size=4, intermediate_size=6)))
        True
    """
    return type(module).__name__ == SCALED


def _is_transposed(experts: nn.Module) -> bool:
    """Say whether stacked experts are `(E, K, N)`: they tell, or their shapes do."""
    if getattr(experts, "is_transposed", False):
        return True
    first, last = (stacks_of(experts).get(name) for name in STACKS)
    if first is None or last is None:
        return False
    return first.shape[2] == 2 * last.shape[1] and first.shape[1] == last.shape[2]


def _is_joined(experts: nn.Module) -> bool:
    """Say whether gate lies over up, not in every other row."""
    return bool(getattr(experts, "is_concatenated", True))


def _gate_of(kind: type) -> Callable[[Any, Tensor], Tensor] | None:
    """Return what combines gate and up in stacked experts of a class; None where it may not.

    transformers gives it to a class together with `forward`; a subclass with another of only one of
    the two may combine otherwise.
    """
    for base in kind.__mro__:
        own = vars(base).keys() & {"forward", "_apply_gate"}
        if own:
            return vars(base)["_apply_gate"] if len(own) == 2 else None
    return None


def hull_of(experts: nn.Module) -> nn.Module:
    """Return a module like stacked experts without their weights: limits, activation, form.

    Examples:
        >>> from transformers import MixtralConfig
        >>> from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        >>> experts = MixtralExperts(MixtralConfig(hidden_size=4, intermediate_size=6))
        >>> hull = hull_of(experts)
        >>> list(hull.parameters()), hull.act_fn
        ([], SiLUActivation())
    """
    hull = copy.copy(experts)
    hull.is_transposed = _is_transposed(experts)  # type: ignore[assignment]
    hull._parameters = {}
    return hull


def combined(hull: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """Return what stacked experts, or their hull, make of gate and up.

    Examples:
        >>> from transformers import MixtralConfig
        >>> from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        >>> experts = MixtralExperts(MixtralConfig(hidden_size=4, intermediate_size=6))
        >>> combined(experts, torch.tensor([0.0, 30.0]), torch.tensor([2.0, 2.0]))  # silu · up
        tensor([ 0., 60.])
    """
    own = _gate_of(type(hull))
    if own is None or own.__module__ == COMMON:  # without a copy of both
        return hull.act_fn(gate) * up  # type: ignore[operator, no-any-return]
    return own(hull, join_gate_and_up(hull, gate, up))


def gate_and_up(experts: nn.Module) -> tuple[slice, slice]:
    """Return which rows of `gate_up_proj` are gate and which up: one half each, or every other.

    Examples:
        >>> from transformers import MixtralConfig
        >>> from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        >>> experts = MixtralExperts(MixtralConfig(hidden_size=4, intermediate_size=6))
        >>> gate_and_up(experts)
        (slice(None, 6, None), slice(6, None, None))
    """
    if not _is_joined(experts):
        return slice(0, None, 2), slice(1, None, 2)
    half = expert_weights(experts)["gate_up_proj"].shape[1] // 2
    return slice(half), slice(half, None)


def join_gate_and_up(hull: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """Return `(..., 2I)` of gate and up `(..., I)`, in the order of the rows of `gate_up_proj`.

    Examples:
        >>> from transformers import GptOssConfig
        >>> from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
        >>> experts = GptOssExperts(GptOssConfig(hidden_size=4, intermediate_size=6))
        >>> join_gate_and_up(hull_of(experts), torch.zeros(2), torch.ones(2))
        tensor([0., 1., 0., 1.])
    """
    if _is_joined(hull):
        return torch.cat((gate, up), -1)
    return torch.stack((gate, up), -1).flatten(-2)
