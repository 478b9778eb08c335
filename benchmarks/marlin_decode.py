# SPDX-License-Identifier: Apache-2.0
"""Decoding with a Llama of 8 billion random parameters: tokens a second in bfloat16 and in 4 bits.

One step for a batch of sequences that each have a full cache of keys and values: everything that a
decoder does, in one CUDA graph. All arms hold the same numbers, the dense one those of the four-bit
weights, and take the same kernels beside their products (`decode_kernels.py`); each the faster of
chaining its kernels or not. Products of cuBLAS take no part in a chain, those of four bits do; what
that makes is printed. Embedding and head stay in bfloat16, but for an arm that has the head
in 4 bits too. Before anything is timed the logits of all after two layers are compared with a step
in torch's operations (after 32 random ones what bfloat16 rounds has grown).
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from decode_kernels import EPS, add_norm, attend, join
from torch import Tensor

from batchery.cli import device_argument
from batchery.compress.quant import dequantize, pack, quantize_rtn
from batchery.kernels.w4a16 import w4a16_matmul
from batchery.kernels.w4a16_layout import PackedW4
from batchery.studies.harness import environment

BATCHES = (1, 8, 16, 32, 64)
CONTEXTS = (64, 512)
AIMS = {1: 2.3, 8: 2.3, 16: 2.3, 32: 1.8, 64: 1.3}  # of the specification: W4 over bfloat16
ARMS = ("bfloat16", "W4", "W4 with its head")
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


def product(x: Tensor, w: Weight, chained: bool = False) -> Tensor:
    return w4a16_matmul(x, w, chained=chained) if isinstance(w, PackedW4) else F.linear(x, w)


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate pairs of numbers of each head, as Llama does; turn is cosines over sines."""
    half = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)
    return x * turn[0] + half * turn[1]


def layer_by_torch(h: Tensor, layer: Layer, pairs: Tensor, place: Tensor, turn: Tensor) -> Tensor:
    """Bring hidden states `(B, hidden)` through a layer; the cache takes the new token."""
    batch, hidden = h.shape
    _, _, kv_heads, _, head = pairs.shape
    x = F.rms_norm(h, (hidden,), layer.norms[0], EPS)
    heads = product(x, layer.qkv).view(batch, -1, head)
    q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)
    pairs.index_copy_(3, place, torch.stack([rotated(k, turn), v])[:, :, :, None])
    # Queries that share keys stand as rows of one head; all see the whole cache.
    q = rotated(q, turn).reshape(batch, kv_heads, -1, head)
    y = F.scaled_dot_product_attention(q, pairs[0], pairs[1]).reshape(batch, -1)
    h = h + product(y, layer.out)
    y = product(F.rms_norm(h, (hidden,), layer.norms[1], EPS), layer.gate_up)
    if not isinstance(layer.gate_up, PackedW4):
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    return h + product(y, layer.down)


class Model:
    """Layers in one form, with an embedding and a head."""

    def __init__(self, layers: list[Layer], embedding: Tensor, head: Weight) -> None:
        """Keep the weights."""
        self.layers, self.embedding, self.head = layers, embedding, head
        self.one = torch.ones_like(embedding[0])

    def logits_by_torch(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Return `(B, vocabulary)` for the tokens `(B,)` that follow the cache."""
        h = self.embedding[tokens]
        for pairs, layer in zip(cache.pairs, self.layers, strict=True):
            h = layer_by_torch(h, layer, pairs, cache.place, cache.turn)
        return product(F.rms_norm(h, h.shape[-1:], eps=EPS), self.head)

    def logits(self, tokens: Tensor, cache: Cache, chained: bool) -> Tensor:
        """The same by kernels; what a layer adds to its input is added with the next norm."""
        h = self.embedding[tokens]
        update, x, y = torch.zeros_like(h), torch.empty_like(h), torch.empty_like(h)
        for pairs, layer in zip(cache.pairs, self.layers, strict=True):
            add_norm(h, update, layer.norms[0], x, chained)
            heads = product(x, layer.qkv, chained)
            attend(heads, pairs, cache.turn, cache.place, y, chained)
            add_norm(h, product(y, layer.out, chained), layer.norms[1], x, chained)
            z = product(x, layer.gate_up, chained)
            if not isinstance(layer.gate_up, PackedW4):
                both, z = z, z.new_empty(len(z), z.shape[1] // 2)
                join(both, z, chained)
            update = product(z, layer.down, chained)
        add_norm(h, update, self.one, x, chained)
        return product(x, self.head, chained)


def build(size: Size, device: torch.device) -> dict[str, Model]:
    """Make the dense and the four-bit models of the same numbers."""
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
    table = random(size.vocabulary, size.hidden).bfloat16()
    rounded = quantize_rtn(random(size.vocabulary, size.hidden), scale_dtype=torch.bfloat16)
    head = dequantize(rounded, torch.bfloat16)
    kinds = (dense, head), (packed, head), (packed, pack(rounded)[0])
    return {name: Model(ls, table, h) for name, (ls, h) in zip(ARMS, kinds, strict=True)}


def new_cache(size: Size, batch: int, context: int, device: torch.device) -> Cache:
    generator = torch.Generator(device).manual_seed(1)
    shape = (size.layers, 2, batch, size.kv_heads, context, size.head)
    pairs = torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)
    place = torch.tensor([context - 1], device=device)
    rates = 500_000 ** -(torch.arange(0, size.head, 2, device=device) / size.head)
    angles = (place * rates).repeat(2)
    return Cache(pairs, place, torch.stack([angles.cos(), angles.sin()]).bfloat16())


def choose(logits: Tensor) -> Tensor:
    """Return the index of the largest of each row, in two stages that fill the device."""
    parts = logits.unflatten(-1, (-1, math.gcd(logits.shape[-1], 256)))
    part = parts.amax(-1).argmax(-1)
    rows = torch.arange(len(part), device=part.device)
    return part * parts.shape[-1] + parts[rows, part].argmax(-1)


def seconds_per_step(
    model: Model, tokens: Tensor, cache: Cache, chained: bool, steps: int
) -> float:
    """Best of three times of a step that chooses the next tokens, in a graph on CUDA."""
    if not tokens.is_cuda:
        begin = time.perf_counter()
        for _ in range(steps):
            tokens.copy_(choose(model.logits_by_torch(tokens, cache)))
        return (time.perf_counter() - begin) / steps
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            model.logits(tokens, cache, chained)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens.copy_(choose(model.logits(tokens, cache, chained)))
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
def differences(models: dict[str, Model], size: Size, device: torch.device) -> dict[str, float]:
    """How far the logits of the arms after two layers are from those of torch's operations."""
    first, cache = (
        torch.arange(4, device=device),
        new_cache(replace(size, layers=2), 4, 100, device),
    )

    def logits(model: Model, chained: bool | None) -> Tensor:
        own = cache._replace(pairs=cache.pairs.clone())
        two = Model(model.layers[:2], model.embedding, model.head)
        if chained is None:
            return two.logits_by_torch(first, own).float()
        return two.logits(first, own, chained).float()

    wanted = logits(models["bfloat16"], None)
    whole = wanted.norm()
    ways = (False, True) if device.type == "cuda" else (None,)
    return {
        # A tensor's maximum, which NaN is where there is one.
        name: float(torch.stack([(logits(model, w) - wanted).norm() for w in ways]).max() / whole)
        for name, model in models.items()
    }


@torch.no_grad()
def compare(
    models: dict[str, Model], size: Size, batch: int, context: int, steps: int, device: torch.device
) -> dict[str, Any]:
    """Time the arms, each the faster way."""
    cache = new_cache(size, batch, context, device)
    tokens = torch.arange(batch, device=device)
    found: dict[str, Any] = {"batch": batch, "context": context, "ms": {}, "tokens_per_s": {}}
    for name, model in models.items():
        ways = {"chained": True, "apart": False} if tokens.is_cuda else {"apart": False}
        times = {
            way: seconds_per_step(model, tokens.clone(), cache, chained, steps)
            for way, chained in ways.items()
        }
        found["ms"][name] = {way: 1e3 * seconds for way, seconds in times.items()}
        found["tokens_per_s"][name] = batch / min(times.values())
    rates = found["tokens_per_s"]
    found["ratio"] = {name: rates[name] / rates["bfloat16"] for name in ARMS[1:]}
    apart = {name: found["ms"]["bfloat16"]["apart"] / found["ms"][name]["apart"] for name in ARMS}
    found["ratio_apart"] = apart
    line = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
    ratios = ", ".join(f"{ratio:.2f} x ({apart[n]:.2f})" for n, ratio in found["ratio"].items())
    aim = f" (aim {AIMS[batch]})" if batch in AIMS and size == SIZES["8B"] else ""
    print(f"{batch:3d} x {context} tokens: {line} tokens/s, {ratios} (apart){aim}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--device", type=device_argument, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--size", choices=SIZES, help="8B on CUDA, else tiny")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=list(CONTEXTS), help="tokens in the cache"
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = options.device
    on_cuda = device.type == "cuda"
    size = SIZES[options.size or ("8B" if on_cuda else "tiny")]
    found: dict[str, Any] = {"date": date.today().isoformat(), "torch": torch.__version__}
    found["environment"] = environment(device)
    found["device"] = torch.cuda.get_device_name() if on_cuda else "CPU"
    models = build(size, device)
    found["size"], found["logits_differ_by"] = asdict(size), differences(models, size, device)
    print("logits differ by", ", ".join(f"{d:.4f}" for d in found["logits_differ_by"].values()))
    if not all(difference < ALIKE for difference in found["logits_differ_by"].values()):
        raise RuntimeError("the arms do not compute the same")
    found["steps"] = [
        compare(models, size, batch, context, options.steps, device)
        for context in options.contexts
        for batch in options.batches
    ]
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
