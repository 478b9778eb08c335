# SPDX-License-Identifier: Apache-2.0
"""What the parameters of a model are in the network: muP's rules depend on it.

Models of transformers in `FAMILIES` are known by their modules' names; any other module needs a map
from names to roles.

    embedding     a lookup, or a layer whose input does not grow with the width
    hidden        a layer from a width to a width
    residual      such a layer at the end of a residual branch
    head          the layer from the width to the outputs
    norm          a normalisation
    final_norm    the normalisation before the head
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple, get_args

from torch import nn

from batchery._core.validate import one_of, require

Role = Literal["embedding", "hidden", "residual", "head", "norm", "final_norm"]

_LLAMA: dict[str, Role] = {
    "embed_tokens": "embedding",
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "hidden"),
    **dict.fromkeys(("o_proj", "down_proj"), "residual"),
    **dict.fromkeys(("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm"), "norm"),
    "norm": "final_norm",
    **dict.fromkeys(("lm_head", "score"), "head"),
}
_GPT2: dict[str, Role] = {
    **dict.fromkeys(("wte", "wpe"), "embedding"),
    **dict.fromkeys(("c_attn", "c_fc"), "hidden"),
    "c_proj": "residual",
    **dict.fromkeys(("ln_1", "ln_2"), "norm"),
    "ln_f": "final_norm",
    **dict.fromkeys(("lm_head", "score"), "head"),
}
FAMILIES: dict[str, dict[str, Role]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt2": _GPT2,
}
"""Roles by the last part of a module's name, by `config.model_type` of transformers."""


class Placed(NamedTuple):
    """A parameter and its role."""

    name: str
    parameter: nn.Parameter
    role: Role
    tied: bool  # shared by an embedding and the head; its role is "embedding"


def find_roles(model: nn.Module, roles: Mapping[str, Role] | None = None) -> dict[str, Role]:
    """Return the role of every parameter, by its name.

    Models of transformers whose `config.model_type` is in `FAMILIES` need no map. A weight shared
    by an embedding and the head appears once, as an embedding.

    Args:
        model: any module.
        roles: pattern → role, before those of the family; the first that fits decides. A pattern
            (`*` and `?` are wild) must fit the name of a module or parameter, or its last parts.

    Raises:
        ValueError: a parameter has no role, a pattern fits nothing, a role is unknown, or a weight
            is shared between other roles; the message lists names.

    Examples:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
        >>> find_roles(model, {"0": "embedding", "1": "head"})
        {'0.weight': 'embedding', '1.weight': 'head', '1.bias': 'head'}
    """
    return {placed.name: placed.role for placed in place(model, roles)}


def place(model: nn.Module, roles: Mapping[str, Role] | None) -> list[Placed]:
    """Return every parameter, each once, with its role; see `find_roles`."""
    given = {} if roles is None else dict(roles)
    for role in given.values():
        one_of("MuP", "roles", role, get_args(Role))
    kind = getattr(getattr(model, "config", None), "model_type", None)
    patterns = given | {k: v for k, v in FAMILIES.get(kind or "", {}).items() if k not in given}
    unused, unmatched = set(given), []
    found: dict[nn.Parameter, list[tuple[str, Role]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module = name.rpartition(".")[0]
        for pattern, role in patterns.items():
            if any(fnmatchcase(f".{x}", f"*.{pattern}") for x in (name, module)):
                unused.discard(pattern)
                found.setdefault(parameter, []).append((name, role))
                break
        else:
            unmatched.append(name)
    if unmatched:
        more = f" and {len(unmatched) - 8} more" if len(unmatched) > 8 else ""
        known = f"; known without roles: {', '.join(FAMILIES)}" if kind not in FAMILIES else ""
        raise ValueError(
            f"MuP: roles must cover every parameter of {type(model).__name__}{known}; "
            f"unmatched: {', '.join(unmatched[:8])}{more}"
        )
    require(not unused, "MuP", "roles", "must fit a parameter's name", sorted(unused))
    rows = []
    for parameter, uses in found.items():
        kinds = {role for _, role in uses}
        tied = kinds == {"embedding", "head"}
        require(tied or len(kinds) == 1, "MuP", "roles", "must agree on a shared weight", uses)
        name, role = uses[0]
        rows.append(Placed(name, parameter, "embedding" if tied else role, tied))
    return rows
