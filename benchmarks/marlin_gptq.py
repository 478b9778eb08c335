# SPDX-License-Identifier: Apache-2.0
"""GPTQ of one block of a Llama of 8 billion parameters: seconds to quantise its seven layers.

What users call, `gptq_quantize_model`, on a model of one block with random weights in bfloat16: 128
sequences of 2,048 tokens, their embeddings mixed by a fixed random matrix, come in batches. First
the whole call is timed, at first with nothing compiled, with plain settings, act-order and clip
search; then its parts: the sums of the block's four inputs, the factorisations of their Hessians,
and the rounding of the layers that share each, factorisation included. The peer rounds as the
algorithm is written, in torch: each layer for itself, column by column, from the same sums. Where
the errors that both leave differ, nothing is kept. On the CPU a small block, to try this.
"""

import argparse
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from batchery.cli import device_argument
from batchery.compress.quant import GPTQ, QuantizationReport, gptq_quantize_model
from batchery.compress.quant.gptq import inverse_factor
from batchery.studies.harness import environment

AIM, LAYER_AIM = 8.0, 1.5  # seconds, of the specification: for a block, and its down alone
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "act_order": {"act_order": True},
    "clip_search": {"clip_search": True},
}
GROUP, BLOCK, DAMP = 128, 128, 0.01
ALIKE = 0.02  # relative difference of the errors that another order of operations may make
# Layers by the input that they share; the first is where it is looked at.
INPUTS = {
    "q k v": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@dataclass(frozen=True)
class Size:
    """Shape of a block, and the tokens that it sees."""

    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    mlp: int = 14336
    sequences: int = 128
    tokens: int = 2048  # of a sequence
    batch: int = 4  # sequences


SIZES = {"8B": Size(), "tiny": Size(256, 4, 2, 768, 8, 128)}


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Time of one call, with what it left the device to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def build(size: Size, device: torch.device) -> Any:
    """Make a Llama of one block with random weights, in bfloat16."""
    config = transformers.LlamaConfig(
        vocab_size=256,  # of no use: the block is given embeddings
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=1,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.tokens,
        tie_word_embeddings=True,
    )
    with device, torch.random.fork_rng():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    return model


def calibration(size: Size, device: torch.device) -> list[dict[str, Tensor]]:
    """Make batches z A of embeddings, z and A normal."""
    generator = torch.Generator(device).manual_seed(1)
    like: dict[str, Any] = {"device": device, "dtype": torch.bfloat16, "generator": generator}
    mixing = torch.randn(size.hidden, size.hidden, **like) / size.hidden**0.5
    shape = (size.batch, size.tokens, size.hidden)
    count = size.sequences // size.batch
    return [{"inputs_embeds": torch.randn(shape, **like) @ mixing} for _ in range(count)]


@torch.no_grad()
def whole_call(
    model: Any, batches: list[dict[str, Tensor]], how: dict[str, Any], repeats: int
) -> dict[str, Any]:
    """Time the call with a setting, the first time and then the best of the others."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reports: list[QuantizationReport] = []

    def call() -> None:
        reports.append(gptq_quantize_model(model, batches, progress=False, **how))

    times = []
    for _ in range(1 + repeats):
        times.append(seconds(call, model.device))
        model.load_state_dict(before)
    ratios = {layer.name: layer.error / layer.rtn_error for layer in reports[0].layers}
    return {"first_s": times[0], "s": min(times[1:]), "error_over_rtn": ratios}


@torch.no_grad()
def sums(model: Any, batches: list[dict[str, Tensor]]) -> tuple[dict[str, GPTQ], dict[str, float]]:
    """Sum what the layers see; seconds of summing alone, by input."""
    block = model.model.layers[0]
    gptqs: dict[str, GPTQ] = {}
    spent = dict.fromkeys(INPUTS, 0.0)

    def see(name: str, _: Any, given: tuple[Tensor, ...]) -> None:
        spent[name] += seconds(functools.partial(gptqs[name].add_batch, given[0]), model.device)

    handles = []
    for name, layers in INPUTS.items():
        layer = block.get_submodule(layers[0])
        gptqs[name] = GPTQ(layer.in_features, device=model.device)
        handles.append(layer.register_forward_pre_hook(functools.partial(see, name)))
    for batch in batches:
        model.model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return gptqs, spent


def column_by_column(w: Tensor, hessian: Tensor) -> Tensor:
    """Return the rounded weight as the algorithm is written: float32, eager, corrections late."""
    w = w.float().clone()
    hessian = hessian.clone()
    hessian.diagonal().add_(DAMP * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    rounded = torch.empty_like(w)
    for begin in range(0, w.shape[1], BLOCK):
        end = begin + BLOCK
        block, own = w[:, begin:end].clone(), factor[begin:end, begin:end]
        errors = torch.empty_like(block)
        for i in range(BLOCK):
            if (begin + i) % GROUP == 0:
                most = block[:, i : i + GROUP].abs().amax(1)
                scale = (most * (2 / 15)).half().float()
            column = block[:, i]
            new = torch.clamp(torch.round(column / scale), -8, 7) * scale
            rounded[:, begin + i] = new
            errors[:, i] = error = (column - new) / own[i, i]
            block[:, i:] -= torch.outer(error, own[i, i:])
        w[:, end:] -= errors @ factor[begin:end, end:]
    return rounded


@torch.no_grad()
def parts(weights: list[Tensor], gptq: GPTQ, repeats: int) -> dict[str, Any]:
    """Time the factorisation, the rounding and the peer for one input; compare the errors."""
    joined, hessian, device = torch.cat(weights), gptq.hessian, weights[0].device

    def best(call: Callable[[], Any]) -> float:
        return min(seconds(call, device) for _ in range(1 + repeats))

    found: dict[str, Any] = {"factor_s": best(lambda: inverse_factor(hessian, DAMP))}
    found["rounding_s"] = {
        setting: best(functools.partial(gptq.quantize, joined, **how))
        for setting, how in SETTINGS.items()
    }
    rounded: list[Tensor] = []

    def peer() -> None:
        rounded[:] = [column_by_column(w, hessian) for w in weights]

    found["peer_s"] = best(peer)
    own = gptq.hessian_error(joined, gptq.quantize(joined))
    return found | {"error_over_peer": own / gptq.energy(torch.cat(rounded) - joined.float())}


def report(found: dict[str, Any]) -> list[str]:
    """Lines for people."""
    real = found["size"] == asdict(SIZES["8B"])
    lines = [
        f"{found['device']}: whole call, and error of outputs over that of rounding to nearest"
    ]
    for setting, own in found["whole"].items():
        line = f"{setting:12s} at first {own['first_s']:5.2f} s, then {own['s']:5.2f} s"
        line += f" ({own['s'] / AIM:.2f} of the aim of {AIM:g} s)" if real else ""
        errors = own["error_over_rtn"].values()
        lines.append(f"{line}; {min(errors):.2f} to {max(errors):.2f}")
    lines += ["", f"{'input':9s}{'sums':>10s}{'factor':>10s}"]
    lines[-1] += "".join(f"{name:>13s}" for name in SETTINGS) + "         peer   error over its"
    for name, own in found["parts"].items():
        times = [own["sums_s"], own["factor_s"], *own["rounding_s"].values(), own["peer_s"]]
        widths = (8, 8, 11, 11, 11, 11)
        line = "".join(f"{s:{width}.3f} s" for s, width in zip(times, widths, strict=True))
        lines.append(f"{name:9s}{line}   {own['error_over_peer']:.4f}")
    rounding = sum(own["rounding_s"]["plain"] for own in found["parts"].values())
    peer = sum(own["peer_s"] for own in found["parts"].values())
    lines.append(f"rounding {rounding:.3f} s, peer {peer:.2f} s: {peer / rounding:.1f} x")
    if real:
        down = found["parts"]["down"]["rounding_s"]["plain"]
        lines.append(f"down alone {down:.3f} s, {down / LAYER_AIM:.2f} of the aim of {LAYER_AIM} s")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--device", type=device_argument, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--size", choices=SIZES, help="8B on CUDA, else tiny")
    parser.add_argument("--repeats", type=int, default=2, help="of each call, after the first")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = options.device
    on_cuda = device.type == "cuda"
    size = SIZES[options.size or ("8B" if on_cuda else "tiny")]
    found: dict[str, Any] = {"date": date.today().isoformat(), "torch": torch.__version__}
    found["environment"] = environment(device)
    found["device"] = torch.cuda.get_device_name() if on_cuda else "CPU"
    found["size"] = asdict(size)
    model, batches = build(size, device), calibration(size, device)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # so that the first call compiles
        found["whole"] = {
            setting: whole_call(model, batches, how, options.repeats)
            for setting, how in SETTINGS.items()
        }
        gptqs, spent = sums(model, batches)
        found["parts"] = {}
        for name, layers in INPUTS.items():
            modules = (model.model.layers[0].get_submodule(layer) for layer in layers)
            weights = [module.weight.detach() for module in modules]
            own = parts(weights, gptqs[name], options.repeats)
            found["parts"][name] = {"sums_s": spent[name], **own}
    print("\n".join(report(found)))
    errors = [own["error_over_peer"] for own in found["parts"].values()]
    if not all(error < 1 + ALIKE for error in errors):
        raise RuntimeError(f"the errors are {errors} times those of the plain algorithm")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
