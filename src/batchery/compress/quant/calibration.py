# SPDX-License-Identifier: Apache-2.0
"""What the layers of a decoder see: the inputs of its blocks, and sums over them for GPTQ.

A decoder is a list of blocks, each of which maps hidden states to hidden states. So a model can be
quantised block by block: the inputs of the first are caught once, and each block's outputs are the
inputs of the next. What else a block is given (masks, positions) is caught with them.

Padding is cut off before anything runs: rows of a batch with equally many tokens stay together, the
others go through the model in turns. Nothing later needs to know about masks, and a router of
experts never sees padding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from batchery._core.validate import require, require_type
from batchery.compress.quant.digests import digest_of_tensors
from batchery.compress.quant.gptq import GPTQ
from batchery.compress.quant.targets import Target

__all__ = [
    "BlockCall",
    "InputWatch",
    "catch_inputs",
    "cut_padding",
    "digest_of",
    "ready_to_watch",
]

Call = tuple[tuple[Any, ...], dict[str, Any]]

# Products, and what their arguments are called; x and the other factor come last.
OPERANDS: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight"),
    torch.matmul: ("input", "other"),
    Tensor.matmul: ("input", "other"),
    Tensor.__matmul__: ("input", "other"),
    torch.addmm: ("input", "mat1", "mat2"),
    torch.bmm: ("input", "mat2"),
}
CACHES = ("past_key_values", "past_key_value", "cache")


def cut_padding(owner: str, batch: Tensor | Mapping[str, Any]) -> list[Call]:
    """Turn a calibration batch into calls of the model without padding.

    Args:
        owner: what errors say.
        batch: token ids `(B, T)`, or keyword arguments of the model; an `attention_mask` `(B, T)`
            says what is no padding, and `labels` are dropped.

    Raises:
        TypeError: the batch is neither, or its ids are no tensor.
        ValueError: ids or a mask of a wrong shape; a mask has holes.

    Examples:
        >>> ids = torch.arange(6).view(2, 3)
        >>> calls = cut_padding("me", {"input_ids": ids, "attention_mask": ids > 0})
        >>> [keywords["input_ids"].tolist() for _, keywords in calls]
        [[[1, 2]], [[3, 4, 5]]]
    """
    if isinstance(batch, Tensor):
        _check_ids(owner, "calibration", batch)
        return [((batch,), {})]
    known = isinstance(batch, Mapping)
    require_type(known, owner, "calibration", "must yield tensors or mappings", batch)
    given = {name: value for name, value in batch.items() if name != "labels"}
    mask = given.pop("attention_mask", None)
    ids = [name for name in ("input_ids", "inputs_embeds") if given.get(name) is not None]
    for name in ids:
        _check_ids(owner, name, given[name])
    if mask is None:
        return [((), given)]
    require_type(isinstance(mask, Tensor), owner, "attention_mask", "must be a tensor", mask)
    shape = tuple(mask.shape)
    require(len(shape) == 2, owner, "attention_mask", "must be (B, T)", shape)
    for name in ids:
        wanted = tuple(given[name].shape[:2])
        rule = f"must have the shape {wanted} of {name}"
        require(shape == wanted, owner, "attention_mask", rule, shape)
    known = any(isinstance(x, Tensor) and x.shape[:2] == mask.shape for x in given.values())
    require(known, owner, "attention_mask", "must have the shape of another argument", shape)
    mask = mask.bool()
    lengths = mask.sum(1)
    first = mask & ~F.pad(mask, (1, 0))[:, :-1]
    holes = bool((first.sum(1) > 1).any())
    require(not holes, owner, "attention_mask", "must be one run of ones a row", "holes")

    def cut(value: Any, rows: Tensor, length: int) -> Any:
        if isinstance(value, Tensor) and value.shape[:2] == (1, mask.shape[1]):
            value = value.expand(len(mask), *value.shape[1:])  # positions, the same for all rows
        if not isinstance(value, Tensor) or value.shape[:1] != mask.shape[:1]:
            return value
        part = value[rows]
        if value.shape[:2] != mask.shape:
            return part
        return part[mask[rows]].view(len(rows), length, *value.shape[2:])

    calls: list[Call] = []
    for length in sorted(set(lengths.tolist()) - {0}):
        rows = (lengths == length).nonzero()[:, 0]
        calls.append(((), {name: cut(value, rows, length) for name, value in given.items()}))
    return calls


def _check_ids(owner: str, argument: str, ids: Any) -> None:
    """Refuse what is no batch of sequences."""
    require_type(isinstance(ids, Tensor), owner, argument, "must be a tensor", ids)
    shape = tuple(ids.shape)
    if ids.is_floating_point():  # hidden states
        require(len(shape) >= 2, owner, argument, "must be (B, T, ...)", shape)
    else:
        require(len(shape) == 2, owner, argument, "must hold token ids (B, T)", shape)


def digest_of(calls: Sequence[Call]) -> str:
    """Return a hash of all tensors in some calls.

    Examples:
        >>> ids = torch.arange(6).view(2, 3)
        >>> one, same, other = (digest_of([((x,), {})]) for x in (ids, ids.clone(), ids + 1))
        >>> len(one), one == same, one == other
        (64, True, False)
    """
    named: list[tuple[str, Any]] = []
    for positional, keywords in calls:
        named += [(str(place), value) for place, value in enumerate(positional)]
        named += sorted(keywords.items())
    return digest_of_tensors((name, value) for name, value in named if isinstance(value, Tensor))


@dataclass(frozen=True)
class BlockCall:
    """What a block is given beside hidden states.

    Examples:
        >>> call = BlockCall((), {"scale": 3.0}, by_keyword=False)
        >>> call(lambda hidden, scale: (hidden * scale, "attention"), torch.ones(2))
        tensor([3., 3.])
    """

    positional: tuple[Any, ...]
    keywords: dict[str, Any]
    by_keyword: bool

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Run a block on hidden states and return its hidden states."""
        if self.by_keyword:
            out = block(*self.positional, hidden_states=hidden, **self.keywords)
        else:
            out = block(hidden, *self.positional, **self.keywords)
        return _hidden_of(out)  # type: ignore[no-any-return]


def _hidden_of(out: Any) -> Any:
    return out[0] if isinstance(out, tuple | list) else out


class _AllSeen(Exception):
    """The last block was reached."""


@torch.no_grad()
def catch_inputs(
    owner: str, model: nn.Module, blocks: Sequence[nn.Module], calls: Iterable[Call]
) -> tuple[list[Tensor], list[list[BlockCall]]]:
    """Run the model up to its last block; in the first call to its end, to see what it does there.

    Returns:
        For each call the hidden states before the first block; and for each block its calls.

    Raises:
        RuntimeError: the model does not call its blocks one after another, calls them again, or
            changes hidden states between them.

    Examples:
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        >>> states, caught = catch_inputs("me", model, [*model[1:]], cut_padding("me", ids))
        >>> torch.equal(states[0], model[0](ids)), [len(calls) for calls in caught]
        (True, [1, 1])
    """
    device = next(model.parameters()).device
    states: list[Tensor] = []
    caught: list[list[BlockCall]] = [[] for _ in blocks]
    place = 0
    behind: Any = None  # the last block, in the first call

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal place
        if place == len(blocks):
            raise RuntimeError(f"{owner}: the model calls its blocks more than once")
        if module is not blocks[place]:
            raise RuntimeError(f"{owner}: the model does not call its blocks in their order")
        kept = {name: None if name in CACHES else value for name, value in kwargs.items()}
        hidden: Any = args[0] if args else kept.pop("hidden_states")
        if place == 0:
            states.append(hidden)
        elif len(states) == 1 and not _same(behind, hidden):
            where = f"between blocks {place - 1} and {place}"
            raise RuntimeError(f"{owner}: the model changes the hidden states {where}")
        caught[place].append(BlockCall(args[1:], kept, by_keyword=not args))
        place += 1
        if place == len(blocks) and len(states) > 1:
            raise _AllSeen

    def after(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        nonlocal behind
        if len(states) == 1:
            hidden = _hidden_of(out)
            behind = hidden.clone() if isinstance(hidden, Tensor) else hidden

    unique = dict.fromkeys(blocks)
    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in unique]
    handles += [block.register_forward_hook(after) for block in unique]
    body = getattr(model, "base_model", model)  # no need of logits
    try:
        for args, kwargs in calls:
            place = 0
            with contextlib.suppress(_AllSeen):
                body(*_moved(args, device), **_moved(kwargs, device))
            if place < len(blocks):
                raise RuntimeError(f"{owner}: the model called {place} of {len(blocks)} blocks")
    finally:
        for handle in handles:
            handle.remove()
    return states, caught


def _same(one: Any, other: Any) -> bool:
    """Whether two tensors have the same values; NaN is like NaN."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.allclose(one.to(other.device), other, rtol=0, atol=0, equal_nan=True)


def _moved(values: Any, device: torch.device) -> Any:
    if isinstance(values, dict):
        return {name: _moved(value, device) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_moved(value, device) for value in values)
    return values.to(device) if isinstance(values, Tensor) else values


class InputWatch(TorchFunctionMode):
    """While active, sums the inputs of each target; targets with one input share one sum.

    It sees products by `torch.nn.functional.linear`, `x @ weight.T` and `torch.addmm`, whatever
    module makes them, and those by `torch.bmm` of stacked experts that are each given all tokens,
    zeros for those of others.

    Examples:
        >>> linear = nn.Linear(4, 2)
        >>> watch = InputWatch([Target("linear", linear.weight, None)])
        >>> for _ in range(2):
        ...     watch.begin()
        ...     with watch:
        ...         y = linear(torch.ones(3, 4))
        >>> watch.seen("linear").tokens, watch.seen("other")
        (6, None)
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        """Watch some targets."""
        super().__init__()
        self._targets = {target.weight.data_ptr(): target for target in targets}
        self._leaders: dict[str, str] = {}
        self._sums: dict[str, GPTQ] = {}
        self._inputs: dict[int, tuple[str, Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Look at linear products, and let everything pass."""
        names = OPERANDS.get(func)
        if names is not None:
            given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            x, other = (given[name] for name in names[-2:])
            if func is F.linear:
                self._see(x, other)
            elif func is torch.bmm:
                if isinstance(other, nn.Parameter):
                    for own, weight in zip(x, other, strict=True):
                        self._see(own[own.any(-1)], weight.t())
            elif isinstance(other, Tensor) and other.dim() == 2:
                self._see(x, other.t())
        return func(*args, **(kwargs or {}))

    def begin(self) -> None:
        """Forget the tensors of the last call."""
        self._inputs.clear()

    def _see(self, x: Tensor, weight: Tensor) -> None:
        target = self._targets.get(weight.data_ptr())
        if target is None or x.numel() == 0:
            return
        if weight.stride() != target.weight.stride():
            return  # its transpose, of a square one
        # The tensor is kept, so that no other gets its identity.
        first, _ = self._inputs.setdefault(id(x), (target.name, x))
        leader = self._leaders.setdefault(target.name, first)
        if leader == target.name:
            if leader not in self._sums:
                wide = torch.promote_types(weight.dtype, torch.float32)
                k = weight.shape[1]
                self._sums[leader] = GPTQ(
                    k, device=weight.device, dtype=wide, name=f"GPTQ of {leader}"
                )
            self._sums[leader].add_batch(x)
        elif leader != first:
            raise RuntimeError(
                f"{target.name} had the input of {leader} before, now that of {first}"
            )

    def seen(self, name: str) -> GPTQ | None:
        """Return what a target saw, None if nothing."""
        leader = self._leaders.get(name)
        return None if leader is None else self._sums[leader]


@contextlib.contextmanager
def ready_to_watch(model: nn.Module) -> Iterator[None]:
    """Evaluate without cache, and let experts multiply one by one; then restore all that.

    Examples:
        >>> model = nn.Dropout()
        >>> with ready_to_watch(model):
        ...     model.training
        False
        >>> model.training
        True
    """
    training = {module: module.training for module in model.modules()}
    config = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    experts = getattr(config, "_experts_implementation", None)
    model.eval()
    try:
        if cache is not None:
            config.use_cache = False  # type: ignore[union-attr]
        if experts is not None:
            model.set_experts_implementation("eager")  # type: ignore[operator]
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        if cache is not None:
            config.use_cache = cache  # type: ignore[union-attr]
        if experts is not None:
            model.set_experts_implementation(experts)  # type: ignore[operator]
