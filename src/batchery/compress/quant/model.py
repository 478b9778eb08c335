# SPDX-License-Identifier: Apache-2.0
"""GPTQ for a whole decoder, block by block, each block fed by the quantised ones before it.

When to use: a causal model of transformers, or any model with a list of blocks, and some hundred
sequences of text like that which it will read. When not: a model that does not fit the device with
the hidden states of all calibration sequences.

    hidden states before block 0          by the model itself
    for each block:
        H of each input of a linear       one run over all sequences; q, k and v share theirs
        q, s, z of its weights            GPTQ, the layers of one input in one factorisation
        hidden states after it            one run more, with the quantised weights

The weights in the model are replaced by their dequantised values; the quantised ones are in the
report, by the names of their modules.

Reference: Frantar et al., GPTQ, arXiv 2210.17323. Where we differ: padding is cut off; an expert of
few tokens takes the inputs of all experts; an interrupted run goes on from its last whole block.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from batchery._core.validate import integer, one_of, require, require_type
from batchery.compress.quant.calibration import (
    BlockCall,
    InputWatch,
    catch_inputs,
    cut_padding,
    digest_of,
    ready_to_watch,
)
from batchery.compress.quant.gptq import GPTQ, check_settings
from batchery.compress.quant.kept_blocks import Done, KeptBlocks, LayerReport, model_digests
from batchery.compress.quant.rtn import SCALE_DTYPES, quantize_rtn
from batchery.compress.quant.sparse import prune_quantize_24, quantize_rtn_24
from batchery.compress.quant.targets import (
    Target,
    decoder_blocks,
    require_most_inside,
    targets_of,
)
from batchery.compress.quant.weight import QuantizedWeight, dequantize, require_packable

__all__ = ["EXCLUDED", "QuantizationReport", "gptq_quantize_model", "rtn_quantize_model"]

# The head, and by the names that transformers has for them routers, and small layers whose weight
# their model reads: what Mamba multiplies by itself, and that of an index over tokens (DeepSeek).
ROUTERS = ("*.gate", "*.gate.wg", "*.router", "*.router.*", "*.shared_expert_gate")
EXCLUDED = ("lm_head", *ROUTERS, "*.dt_proj", "*.weights_proj")

Sparsity = Literal["2:4"]

OWNER = "gptq_quantize_model"


@dataclass(frozen=True)
class QuantizationReport:
    """What `gptq_quantize_model` did.

    Attributes:
        weights: quantised weight by the name of its module; tied modules share one.
        layers: in the order of the model; tied ones once.
        seconds: of the whole call.

    Examples:
        >>> errors = {"up": 0.01, "down": 0.02}
        >>> layers = [LayerReport(name, 40, error, 0.03, 0.1) for name, error in errors.items()]
        >>> report = QuantizationReport({}, layers, seconds=0.2)
        >>> max(report.layers, key=lambda layer: layer.error).name
        'down'
    """

    weights: dict[str, QuantizedWeight]
    layers: list[LayerReport]
    seconds: float


def gptq_quantize_model(
    model: nn.Module,
    calibration: Iterable[Tensor | Mapping[str, Any]],
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    act_order: bool = False,
    static_groups: bool = True,
    damp: float = 0.01,
    block_size: int = 128,
    clip_search: bool = False,
    scale_dtype: torch.dtype | None = torch.float16,
    sparsity: Sparsity | None = None,
    exclude: Sequence[str] = EXCLUDED,
    min_expert_tokens: int = 256,
    folder: str | Path | None = None,
    progress: bool = True,
) -> QuantizationReport:
    """Quantise the linear layers of a decoder's blocks; their weights are replaced in place.

    GPT-2's `Conv1D` is one, by the transpose of its weight; blocks may be of several classes. What
    is outside them (embeddings, head) stays as it is; a model with more linear weights there than
    inside is refused, unless they are excluded. Experts are quantised one by one, whether they are
    modules in a list or the stacked parameters of transformers' `…Experts`; stacks of another form
    (without gates, or with a norm behind each expert) must be excluded. After an error or an
    interruption the blocks that were finished are quantised, the others as they were.

    Args:
        model: on the device that shall compute.
        calibration: batches: token ids `(B, T)`, or keyword arguments of the model, whose
            `attention_mask` says what is padding.
        bits: as in `GPTQ.quantize`, with the eight that follow.
        group_size: 32, 64, 128, 256 or -1: what the kernels take; see there.
        symmetric: see there.
        act_order: see there.
        static_groups: see there.
        damp: see there.
        block_size: see there.
        clip_search: see there.
        scale_dtype: see there.
        sparsity: "2:4" prunes two of every four weights as well, see `prune_quantize_24`; needs a
            symmetric weight without act-order and clip search. It costs many times the error, and
            gives memory, not speed: see `compress_24`.
        exclude: shell-style patterns of module names to leave alone; by default the head, routers
            (`*.gate`, `*.gate.wg`, `*.router`, `*.router.*`, `*.shared_expert_gate`), Mamba's
            `*.dt_proj` and DeepSeek's `*.weights_proj`.
        min_expert_tokens: an expert that saw fewer is quantised for the inputs of all experts of
            its layer.
        folder: where finished blocks are kept, so that a call with the same model as it was, the
            same data and settings goes on where another was interrupted.
        progress: show a bar.

    Raises:
        TypeError: calibration is one batch or holds lists; `exclude` is one string.
        ValueError: a setting that does not fit a layer or the kernels; no tokens, or none that
            reach some layer; a mask that does not fit; inputs or weights that are not finite, or
            weights on the meta device; nothing to quantise, or only the smaller part of the model;
            stacked experts of another form; a folder of another model, data or settings, or
            damaged; a layer that computes otherwise than by `torch.nn.functional.linear` or
            `x @ weight.T`.
        RuntimeError: the model does not call its blocks one after another, calls them again, or
            changes hidden states between them.

    Examples:
        >>> from torch import nn
        >>> blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        >>> class Model(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.blocks = blocks
        ...     def forward(self, x):
        ...         for block in self.blocks:
        ...             x = block(x)
        ...         return x
        >>> report = gptq_quantize_model(
        ...     Model(), [torch.randn(4, 10, 8)], group_size=-1, progress=False
        ... )
        >>> sorted(report.weights), report.layers[0].tokens
        (['blocks.0', 'blocks.1'], 40)
    """
    begin = time.perf_counter()
    integer(OWNER, "min_expert_tokens", min_expert_tokens, at_least=1)
    check_settings(OWNER, bits, damp, block_size, scale_dtype)
    one_of(OWNER, "sparsity", sparsity, (None, "2:4"))
    plain = symmetric and not act_order and not clip_search
    rule = "must be None with zeros, act_order or clip_search"
    require(sparsity is None or plain, OWNER, "sparsity", rule, sparsity)
    how = {
        "bits": bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "act_order": act_order,
        "static_groups": static_groups,
        "damp": damp,
        "block_size": block_size,
        "clip_search": clip_search,
        "scale_dtype": scale_dtype,
        "sparsity": sparsity,
    }
    blocks, targets_in = _blocks_and_targets(OWNER, model, exclude, group_size)
    many = not isinstance(calibration, (Tensor, Mapping, str))
    require_type(many, OWNER, "calibration", "must be an iterable of batches", calibration)
    calls = [call for batch in calibration for call in cut_padding(OWNER, batch)]
    require(bool(calls), OWNER, "calibration", "must hold tokens", "none")
    kept = None
    if folder is not None:
        settings: dict[str, Any] = {
            **how,
            "exclude": list(exclude),
            "min_expert_tokens": min_expert_tokens,
        }
        settings |= {"scale_dtype": str(scale_dtype), "calibration": digest_of(calls)}
        settings |= model_digests(model)
        kept = KeptBlocks(OWNER, Path(folder), settings)
    weights: dict[str, QuantizedWeight] = {}
    layers: list[LayerReport] = []
    names: dict[int, str] = {}  # address of a weight → the first module that has it
    with ready_to_watch(model), torch.no_grad():
        states, caught = catch_inputs(OWNER, model, list(blocks), calls)
        del calls
        places = tqdm(range(len(blocks)), "GPTQ", unit="block", disable=not progress)
        for place in places:
            block, own_calls, found = blocks[place], caught[place], targets_in[place]
            targets = _not_yet_known(found, names)
            done = None if kept is None else kept.load(place, targets)
            if done is None:
                done = _quantize_block(block, targets, own_calls, states, how, min_expert_tokens)
                if kept is not None:
                    kept.save(place, *done)
            quantized, reports = done
            weights |= quantized
            _exchange(targets, quantized)
            for target in found:
                weights[target.name] = weights[names[target.weight.data_ptr()]]
            layers += reports
            if place + 1 < len(blocks):
                for i, call in enumerate(own_calls):
                    states[i] = call(block, states[i])
            own_calls.clear()
    return QuantizationReport(weights, layers, time.perf_counter() - begin)


@torch.no_grad()
def rtn_quantize_model(
    model: nn.Module,
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    clip_search: bool = False,
    scale_dtype: torch.dtype | None = torch.float16,
    exclude: Sequence[str] = EXCLUDED,
) -> dict[str, QuantizedWeight]:
    """Round the linear layers of a decoder's blocks to nearest; their weights are replaced.

    Args:
        model: any that `gptq_quantize_model` takes.
        bits: as in `quantize_rtn`, with the four that follow.
        group_size: 32, 64, 128, 256 or -1: what the kernels take; see there.
        symmetric: see there.
        clip_search: see there.
        scale_dtype: see there.
        exclude: shell-style patterns of module names to leave alone; by default the head, routers
            (`*.gate`, `*.gate.wg`, `*.router`, `*.router.*`, `*.shared_expert_gate`), Mamba's
            `*.dt_proj` and DeepSeek's `*.weights_proj`.

    Returns:
        Quantised weight by the name of its module.

    Raises:
        TypeError: `exclude` is one string.
        ValueError: a setting that does not fit a layer or the kernels; nothing to quantise, or only
            the smaller part of the model; stacked experts of another form; a weight that is not
            finite, or on the meta device. The model is then as it was.

    Examples:
        >>> model = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(64, 64) for _ in range(2))})
        >>> weights = rtn_quantize_model(model, group_size=32)
        >>> sorted(weights), torch.equal(model.blocks[1].weight, dequantize(weights["blocks.1"]))
        (['blocks.0', 'blocks.1'], True)
    """
    one_of("rtn_quantize_model", "bits", bits, (4,))
    one_of("rtn_quantize_model", "scale_dtype", scale_dtype, SCALE_DTYPES)
    how: dict[str, Any] = {"bits": bits, "symmetric": symmetric, "clip_search": clip_search}
    how["scale_dtype"] = scale_dtype
    _, targets_in = _blocks_and_targets("rtn_quantize_model", model, exclude, group_size)
    names: dict[int, str] = {}
    new = [_not_yet_known(found, names) for found in targets_in]
    weights: dict[str, QuantizedWeight] = {}
    for target in itertools.chain.from_iterable(new):
        try:
            weights[target.name] = quantize_rtn(target.weight, group_size=group_size, **how)
        except ValueError as error:
            raise ValueError(f"{target.name}: {error}") from error
    for targets, found in zip(new, targets_in, strict=True):
        _exchange(targets, weights)
        for target in found:
            weights[target.name] = weights[names[target.weight.data_ptr()]]
    return weights


def _blocks_and_targets(
    owner: str, model: nn.Module, exclude: Sequence[str], group_size: int
) -> tuple[nn.ModuleList, list[list[Target]]]:
    """Return the blocks of a model and what to quantise in each."""
    several = not isinstance(exclude, str) and all(isinstance(x, str) for x in exclude)
    require_type(several, owner, "exclude", "must be a sequence of patterns", exclude)
    name, blocks = decoder_blocks(owner, model, exclude)
    found = [
        targets_of(owner, block, f"{name}.{place}", exclude) for place, block in enumerate(blocks)
    ]
    flat = [target for targets in found for target in targets]
    require(bool(flat), owner, "exclude", f"must leave a layer of {name}", tuple(exclude))
    require_most_inside(owner, model, name, flat, exclude)
    for target in flat:
        k = target.weight.shape[1]
        size = k if group_size == -1 else group_size
        require_packable(owner, "group_size", size, k, target.name)
        weight = target.weight
        require(not weight.is_meta, owner, target.name, "must be in memory", "a meta tensor")
        wide = weight.is_floating_point() and weight.itemsize > 1
        require(wide, owner, target.name, "must be floating, of 16 bits or more", weight.dtype)
        finite = bool(torch.isfinite(weight).all())
        require(finite, owner, target.name, "must be finite", "NaN or infinity")
    return blocks, found


def _not_yet_known(found: Sequence[Target], names: dict[int, str]) -> list[Target]:
    """Return the targets whose weights have no name in `names`, and give them one."""
    new = []
    for target in found:
        if names.setdefault(target.weight.data_ptr(), target.name) == target.name:
            new.append(target)
    return new


def _exchange(targets: Sequence[Target], quantized: Mapping[str, QuantizedWeight]) -> None:
    """Give a block its dequantised weights: all of them, or after an interruption none."""
    before = [target.weight.clone() for target in targets]
    try:
        for target in targets:
            target.weight.copy_(dequantize(quantized[target.name], target.weight.dtype))
    except BaseException:  # Ctrl-C too
        for target, weight in zip(targets, before, strict=True):
            target.weight.copy_(weight)
        raise


def _quantize_block(
    block: nn.Module,
    targets: Sequence[Target],
    calls: Sequence[BlockCall],
    states: Sequence[Tensor],
    how: dict[str, Any],
    min_expert_tokens: int,
) -> Done:
    """Watch a block at work, then quantise its targets; the model is left as it is."""
    watch = InputWatch(targets)
    with watch:
        for call, hidden in zip(calls, states, strict=True):
            watch.begin()
            call(block, hidden)
    watch.begin()
    shared: dict[int, tuple[GPTQ, list[Target]]] = {}
    unions: dict[str, GPTQ] = {}
    for target in targets:
        gptq = watch.seen(target.name)
        if target.role is not None and (gptq is None or gptq.tokens < min_expert_tokens):
            if target.role not in unions:
                unions[target.role] = _union(target.role, targets, watch)
            gptq = unions[target.role]
        enough = gptq is not None and gptq.tokens > 0
        rule = "must be read by torch.nn.functional.linear or x @ W.T"
        rule += "; exclude what computes otherwise"
        require(enough, OWNER, target.name, rule, "no tokens")
        if gptq is not None:
            shared.setdefault(id(gptq), (gptq, []))[1].append(target)
    quantized: dict[str, QuantizedWeight] = {}
    reports: dict[str, LayerReport] = {}
    for gptq, members in shared.values():
        for name, qw, report in _quantize_together(gptq, members, how):
            quantized[name], reports[name] = qw, report
    return quantized, [reports[target.name] for target in targets]


def _union(role: str, targets: Sequence[Target], watch: InputWatch) -> GPTQ:
    """Return what all experts of a role saw."""
    alike = [target for target in targets if target.role == role]
    parts = {id(gptq): gptq for gptq in (watch.seen(target.name) for target in alike) if gptq}
    weight = alike[0].weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    union = GPTQ(weight.shape[1], device=weight.device, dtype=wide, name=f"GPTQ of {role}")
    union.merge(list(parts.values()))
    return union


def _quantize_together(
    gptq: GPTQ, members: Sequence[Target], how: dict[str, Any]
) -> list[tuple[str, QuantizedWeight, LayerReport]]:
    """Quantise layers that share their inputs."""
    begin = time.perf_counter()
    joined = torch.cat([target.weight for target in members])
    rounded: Callable[[Tensor], QuantizedWeight]
    if how["sparsity"] is None:
        stacked = gptq.quantize(joined, **{name: how[name] for name in how if name != "sparsity"})
        shared = ("bits", "group_size", "symmetric", "clip_search", "scale_dtype")
        rounded = partial(quantize_rtn, **{name: how[name] for name in shared})
    else:
        grid = {name: how[name] for name in ("group_size", "scale_dtype")}
        stacked = prune_quantize_24(gptq, joined, damp=how["damp"], **grid)
        rounded = partial(quantize_rtn_24, **grid)
    found = []
    row = 0
    for target in members:
        qw = stacked.rows(row, row + len(target.weight))
        row += len(target.weight)
        size = gptq.energy(target.weight) or 1.0  # a layer of zeros has no error
        error = gptq.hessian_error(target.weight, qw) / size
        rtn_error = gptq.hessian_error(target.weight, rounded(target.weight)) / size
        found.append((target, qw, error, rtn_error))
    seconds = time.perf_counter() - begin
    return [
        (
            target.name,
            qw,
            LayerReport(
                target.name, gptq.tokens, error, rtn_error, seconds * len(target.weight) / row
            ),
        )
        for target, qw, error, rtn_error in found
    ]
