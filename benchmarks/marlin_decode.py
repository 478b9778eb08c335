# SPDX-License-Identifier: Apache-2.0
"""Decoding with a Llama of 8 billion random parameters: tokens a second in bfloat16 and in 4 bits.

One step for a batch of sequences that each have a full cache of keys and values: everything that a
decoder does, compiled, in one CUDA graph. Both arms hold the same numbers, the dense one those of
the four-bit weights; their logits after two layers are compared before anything is timed (after 32
random ones what bfloat16 rounds has grown). Embedding and head stay in bfloat16 in both, and each
arm takes the faster of torch's two kernels of attention.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from batchery.compress.quant import dequantize, pack, quantize_rtn
from batchery.kernels.w4a16 import w4a16_matmul
from batchery.kernels.w4a16_layout import PackedW4
from batchery.studies.harness import environment

BATCHES = (1, 8, 16, 32, 64)
CONTEXTS = (64, 512)
AIMS = {1: 2.3, 8: 2.3, 16: 2.3, 32: 1.8, 64: 1.3}  # of the specification: W4 over bfloat16
ATTENTION = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
ALIKE = 0.02  # relative difference of logits that bfloat16 may make in two layers


@dataclass(frozen=True)
class Size:
    """Shape of a Llama."""

    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head: int = 128
    mlp: int = 14336
    vocabulary: int = 128256


SIZES = {"8B": Size(), "tiny": Size(2, 256, 4, 2, 64, 512, 1000)}
Weight = Tensor | PackedW4


class Layer(NamedTuple):
    """Weights of one layer, q above k above v, and gate above up."""

    qkv: Weight
    out: Weight
    gate_up: Weight
    down: Weight
    norms: Tensor


class Cache(NamedTuple):
    """Keys and values `(layers, 2, B, kv_heads, T, head)`, and where the next ones go."""

    pairs: Tensor
    place: Tensor
    turn: Tensor


def product(x: Tensor, w: Weight) -> Tensor:
    return w4a16_matmul(x, w) if isinstance(w, PackedW4) else F.linear(x, w)


def gated(x: Tensor, w: Weight) -> Tensor:
    if isinstance(w, PackedW4):
        return w4a16_matmul(x, w)
    gate, up = F.linear(x, w).chunk(2, -1)
    return F.silu(gate) * up


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate pairs of numbers of each head, as Llama does; turn is cosines over sines."""
    half = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)
    return x * turn[0] + half * turn[1]


def layer_step(
    h: Tensor,
    update: Tensor,
    layer: Layer,
    pairs: Tensor,
    place: Tensor,
    turn: Tensor,
    attention: SDPBackend = SDPBackend.MATH,
) -> tuple[Tensor, Tensor]:
    """Bring hidden states `(B, hidden)` through a layer; the cache takes the new token.

    What a layer adds to its input is the next one's to add: in one kernel with its norm.
    """
    h = h + update
    batch, hidden = h.shape
    _, _, kv_heads, _, head = pairs.shape
    x = F.rms_norm(h, (hidden,), layer.norms[0], 1e-5)
    heads = product(x, layer.qkv).view(batch, -1, head)
    q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)
    pairs.index_copy_(3, place, torch.stack([rotated(k, turn), v])[:, :, :, None])
    # Queries that share keys stand as rows of one head; all see the whole cache.
    q = rotated(q, turn).reshape(batch, kv_heads, -1, head)
    with sdpa_kernel([attention, SDPBackend.MATH]):  # the latter where there is no other
        y = F.scaled_dot_product_attention(q, pairs[0], pairs[1]).reshape(batch, -1)
    h = h + product(y, layer.out)
    x = F.rms_norm(h, (hidden,), layer.norms[1], 1e-5)
    return h, product(gated(x, layer.gate_up), layer.down)


class Model:
    """Layers in one form, with an embedding and a head."""

    def __init__(self, layers: list[Layer], embedding: Tensor, head: Tensor) -> None:
        """Keep the weights."""
        self.layers, self.embedding, self.head = layers, embedding, head

    def logits(self, tokens: Tensor, cache: Cache, step: Callable[..., Any]) -> Tensor:
        """Return `(B, vocabulary)` for the tokens `(B,)` that follow the cache."""
        h = self.embedding[tokens]
        update = torch.zeros_like(h)
        for pairs, layer in zip(cache.pairs, self.layers, strict=True):
            h, update = step(h, update, layer, pairs, cache.place, cache.turn)
        return F.linear(F.rms_norm(h + update, h.shape[-1:], eps=1e-5), self.head)


def build(size: Size, device: torch.device) -> dict[str, Model]:
    """Make the dense and the four-bit model of the same numbers."""
    generator = torch.Generator(device).manual_seed(0)
    like: dict[str, Any] = {"device": device, "generator": generator}

    def random(n: int, k: int) -> Tensor:
        return torch.randn(n, k, **like) / k**0.5

    width, kv_width = size.heads * size.head, size.kv_heads * size.head
    shapes = {
        "qkv": (width + 2 * kv_width, size.hidden),
        "out": (size.hidden, width),
        "gate_up": (2 * size.mlp, size.hidden),
        "down": (size.hidden, size.mlp),
    }
    norms = torch.ones(2, size.hidden, device=device, dtype=torch.bfloat16)
    dense, packed = [], []
    for _ in range(size.layers):
        plain = {
            name: quantize_rtn(random(*shape), scale_dtype=torch.bfloat16)
            for name, shape in shapes.items()
        }
        small = {name: pack(qw, gated=name == "gate_up")[0] for name, qw in plain.items()}
        large = {name: dequantize(qw, torch.bfloat16) for name, qw in plain.items()}
        packed.append(Layer(**small, norms=norms))
        dense.append(Layer(**large, norms=norms))
    table, head = (random(size.vocabulary, size.hidden).bfloat16() for _ in range(2))
    return {"bfloat16": Model(dense, table, head), "W4": Model(packed, table, head)}


def new_cache(size: Size, batch: int, context: int, device: torch.device) -> Cache:
    generator = torch.Generator(device).manual_seed(1)
    shape = (size.layers, 2, batch, size.kv_heads, context, size.head)
    pairs = torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)
    place = torch.tensor([context - 1], device=device)
    rates = 500_000 ** -(torch.arange(0, size.head, 2, device=device) / size.head)
    angles = (place * rates).repeat(2)
    return Cache(pairs, place, torch.stack([angles.cos(), angles.sin()]).bfloat16())


def seconds_per_step(
    model: Model, tokens: Tensor, cache: Cache, attention: SDPBackend, steps: int
) -> float:
    """Best of three times of a step that chooses the next tokens, in a graph on CUDA."""
    step = partial(layer_step, attention=attention)
    if not tokens.is_cuda:
        begin = time.perf_counter()
        for _ in range(steps):
            tokens.copy_(model.logits(tokens, cache, step).argmax(-1))
        return (time.perf_counter() - begin) / steps
    torch.compiler.reset()  # or the batches together exceed what one function may be compiled for
    compiled = torch.compile(step, dynamic=False, fullgraph=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            model.logits(tokens, cache, compiled)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens.copy_(model.logits(tokens, cache, compiled).argmax(-1))
    times = []
    for _ in range(4):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(steps):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / steps)
    return min(times[1:])


@torch.no_grad()
def difference(models: dict[str, Model], size: Size, device: torch.device) -> float:
    """Relative difference of the arms' logits after two layers."""
    first, cache = torch.arange(4, device=device), new_cache(replace(size, layers=2), 4, 64, device)
    dense, small = (
        Model(models[name].layers[:2], models[name].embedding, models[name].head)
        .logits(first, cache, layer_step)
        .float()
        for name in ("bfloat16", "W4")
    )
    return float((small - dense).norm() / dense.norm())


@torch.no_grad()
def compare(
    models: dict[str, Model], size: Size, batch: int, context: int, steps: int, device: torch.device
) -> dict[str, Any]:
    """Time both arms, with the attention that is faster in each."""
    cache = new_cache(size, batch, context, device)
    tokens = torch.arange(batch, device=device)
    found: dict[str, Any] = {
        "batch": batch,
        "context": context,
        "attention": {},
        "tokens_per_s": {},
    }
    for name, model in models.items():
        times = {}
        for kind in ATTENTION:
            times[kind.name] = seconds_per_step(model, tokens.clone(), cache, kind, steps)
        fastest = min(times, key=lambda kind: times[kind])
        found["attention"][name] = fastest
        found["tokens_per_s"][name] = batch / times[fastest]
    rates = found["tokens_per_s"]
    line = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
    aim = f" (aim {AIMS[batch]})" if batch in AIMS and size == SIZES["8B"] else ""
    ratio = found["ratio"] = rates["W4"] / rates["bfloat16"]
    print(f"{batch:3d} x {context} tokens: {line} tokens/s, {ratio:.2f} x{aim}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, help="8B on CUDA, else tiny")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=list(CONTEXTS), help="tokens in the cache"
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    on_cuda = device.type == "cuda"
    size = SIZES[options.size or ("8B" if on_cuda else "tiny")]
    found: dict[str, Any] = {"date": date.today().isoformat(), "torch": torch.__version__}
    found["environment"] = environment(device)
    found["device"] = torch.cuda.get_device_name() if on_cuda else "CPU"
    models = build(size, device)
    found["size"], found["logits_differ_by"] = asdict(size), difference(models, size, device)
    print(f"logits of the arms differ by {found['logits_differ_by']:.4f}")
    if not found["logits_differ_by"] < ALIKE:
        raise RuntimeError(f"the arms do not compute the same: {found['logits_differ_by']:.3f}")
    found["steps"] = [
        compare(models, size, batch, context, options.steps, device)
        for context in options.contexts
        for batch in options.batches
    ]
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
