# SPDX-License-Identifier: Apache-2.0
"""Which weights of a decoder are quantised: its list of blocks, and the linear layers in each.

A weight is `(N, K)`, whichever way a module stores it: that of a `Conv1D`, and stacked experts that
are stored `(E, K, N)`, are seen transposed, in place.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from batchery._core.validate import require
from batchery.compress.quant.conv1d import linear_weight
from batchery.compress.quant.stacks import expert_weights, is_stacked, stacks_of

__all__ = ["Target", "decoder_blocks", "require_most_inside", "targets_of"]

WORTH_A_WORD = 0.05  # of the linear weights, left as they are

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """A weight to quantise.

    Attributes:
        name: of the linear module in the model; of an expert of a stacked parameter, the
            parameter's name and the expert's number.
        weight: `(N, K)`, sharing the model's memory; transposed where that is.
        role: of experts, the name with the expert's number left out; else None.

    Examples:
        >>> block = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 6) for _ in range(2))})
        >>> target = targets_of("me", block, "blocks.0", [])[1]
        >>> target.name, target.role, target.weight.shape
        ('blocks.0.experts.1', 'blocks.0.experts.*', torch.Size([6, 4]))
    """

    name: str
    weight: Tensor
    role: str | None


def targets_of(owner: str, block: nn.Module, prefix: str, exclude: Sequence[str]) -> list[Target]:
    """Find the linear layers of a block, and the stacked experts of transformers.

    Args:
        owner: what errors say.
        block: the block.
        prefix: its name in the model.
        exclude: shell-style patterns of full names.

    Raises:
        ValueError: stacked experts that `replace_linears` does not take are not excluded.

    Examples:
        >>> block = nn.ModuleDict({"up": nn.Linear(4, 6), "gate": nn.Linear(4, 2)})
        >>> [target.name for target in targets_of("me", block, "blocks.0", ["*.gate"])]
        ['blocks.0.up']
    """
    wanted = [
        target for target in _all_targets(block, prefix) if not _matches(target.name, exclude)
    ]
    odd = [
        name
        for name, module in block.named_modules(prefix=prefix)
        if stacks_of(module)
        and not is_stacked(module)
        and any(target.name.startswith(f"{name}.") for target in wanted)
    ]
    if odd:
        patterns = dict.fromkeys(repr(f"*.{own.rpartition('.')[2]}.*") for own in odd)
        rule = f"must hold {', '.join(patterns)}, as {odd[0]} is of no known form"
        require(False, owner, "exclude", rule, tuple(exclude))
    return wanted


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _all_targets(block: nn.Module, prefix: str) -> list[Target]:
    """Return the targets of a block, none excluded."""
    targets: list[Target] = []
    lists = [name for name, inner in block.named_modules() if isinstance(inner, nn.ModuleList)]
    for name, module in block.named_modules():
        full = ".".join(part for part in (prefix, name) if part)
        weight = linear_weight(module)
        if weight is not None:
            around = [outer for outer in lists if name.startswith(f"{outer}.")]
            role = None
            if around:
                inside = name.removeprefix(f"{around[-1]}.").split(".", 1)
                role = ".".join([prefix, around[-1], "*", *inside[1:]])
            targets.append(Target(full, weight, role))
        for own, stack in expert_weights(module).items():
            for expert, weight in enumerate(stack):
                targets.append(Target(f"{full}.{own}.{expert}", weight, f"{full}.{own}.*"))
    return targets


def decoder_blocks(
    owner: str, model: nn.Module, exclude: Sequence[str] = ()
) -> tuple[str, nn.ModuleList]:
    """Find the blocks: the longest outermost list of modules that hold linear layers.

    Their classes may differ, as where attention and Mamba take turns; then each must hold some. A
    list of which all is excluded is taken only when there is no other.

    Returns:
        The name of the list in the model, and the list.

    Raises:
        ValueError: there is none.

    Examples:
        >>> blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        >>> model = nn.ModuleDict({"h": blocks, "head": nn.Linear(4, 9)})
        >>> name, found = decoder_blocks("me", model)
        >>> name, found is blocks
        ('h', True)
    """
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer, _ in found):
            continue
        if isinstance(module, nn.ModuleList) and len(module):
            alike = len({type(block) for block in module}) == 1
            holding = [_has_linear(block) for block in module]
            if all(holding) or (alike and any(holding)):
                found.append((name, module))
    rule = "must have a list of blocks with linear layers"
    require(bool(found), owner, "model", rule, type(model).__name__)

    def rank(entry: tuple[str, nn.ModuleList]) -> tuple[bool, int]:
        names = (target.name for target in _all_targets(entry[1], entry[0]))
        return not all(_matches(name, exclude) for name in names), len(entry[1])

    return max(found, key=rank)


def require_most_inside(
    owner: str, model: nn.Module, name: str, inside: Iterable[Target], exclude: Sequence[str]
) -> None:
    """Refuse to quantise a fragment; say so when much is left.

    Args:
        owner: what errors say.
        model: the whole.
        name: of the list of blocks that was chosen.
        inside: the weights to quantise.
        exclude: shell-style patterns of full names.

    Raises:
        ValueError: most linear weights lie outside; the head and what is excluded do not count.

    Examples:
        >>> blocks, tower = nn.ModuleList([nn.Linear(4, 4)]), nn.Sequential(nn.Linear(9, 9))
        >>> model = nn.ModuleDict({"h": blocks, "t": tower})
        >>> inside = targets_of("me", blocks, "h", [])
        >>> require_most_inside("me", model, "h", inside, ["t.*"])
        >>> require_most_inside("me", model, "h", inside, [])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: me: model must have most of its linear weights ... got '16 in h, 81 outside it'
    """
    own = {target.weight.data_ptr(): target.weight.numel() for target in inside}
    heads = [layer for layer in model.children() if isinstance(layer, nn.Linear)]
    if callable(getattr(model, "get_output_embeddings", None)):
        heads.append(model.get_output_embeddings())  # type: ignore[operator]
    skipped = {head.weight.data_ptr() for head in heads if isinstance(head, nn.Linear)}
    everything = [(target.name, target.weight) for target in _all_targets(model, "")]
    others = {
        weight.data_ptr(): weight.numel()
        for at, weight in everything
        if not _matches(at, exclude) and weight.data_ptr() not in (own.keys() | skipped)
    }
    here, elsewhere = sum(own.values()), sum(others.values())
    rule = "must have most of its linear weights in one list of blocks"
    got = f"{here} in {name}, {elsewhere} outside it"
    require(elsewhere <= here, owner, "model", f"{rule}; exclude what shall stay", got)
    if elsewhere > WORTH_A_WORD * (here + elsewhere):
        logger.warning("%s: the linear weights outside stay as they are: %s", owner, got)


def _has_linear(block: nn.Module) -> bool:
    return any(linear_weight(inner) is not None for inner in block.modules())
