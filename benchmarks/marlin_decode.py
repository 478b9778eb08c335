# SPDX-License-Identifier: Apache-2.0
"""Decoding with a Llama of 8 billion random parameters: tokens a second in bfloat16 and in 4 bits.

One step for a batch of sequences that each have a full cache of keys and values: everything that a
decoder does, in one CUDA graph. All arms hold the same numbers, the dense one those of the four-bit
weights, and take the same kernels beside their products (`decode_kernels.py`), but for what
four-bit products do themselves: silu(gate)·up, and in one of three ways the norms between two of
them. Each arm has the fastest of its ways; the file has all. Products of cuBLAS take no part
in a chain. Embedding and head stay in bfloat16, but for an arm that has the head in 4 bits too.

Before anything is timed, what is timed is compared, over two layers (after 32 random ones what
bfloat16 rounds has grown), with a step in torch's operations: logits, cache and tokens.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from decode_kernels import EPS, add_norm, attend, choose, join
from torch import Tensor

from batchery.cli import device_argument
from batchery.compress.quant import dequantize, pack, quantize_rtn
from batchery.kernels.w4a16 import Norm, Residual, w4a16_matmul
from batchery.kernels.w4a16_layout import PackedW4
from batchery.kernels.w4a16_plan import MOST_NARROW
from batchery.studies.harness import environment

BATCHES = (1, 8, 16, 32, 64, 128)
CONTEXTS = (64, 512)
AIMS = {1: 2.3, 8: 2.3, 16: 2.3, 32: 1.8, 64: 1.3}  # of the specification: W4 over bfloat16
ARMS = ("bfloat16", "W4", "W4 with its head")
ALIKE = 0.02  # relative difference that bfloat16 may make in two layers


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


class Way(NamedTuple):
    """How a step is launched: are kernels chained, and do four-bit products take the norms?"""

    chained: bool
    norms: bool


WAYS = {
    "chained": Way(True, True),
    "chained, norms apart": Way(True, False),
    "apart": Way(False, False),
}


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


def product(x: Tensor, w: Weight, chained: bool = False, norm: Norm | None = None) -> Tensor:
    """Multiply; only four bits take rows whose norm is not done."""
    if isinstance(w, PackedW4):
        return w4a16_matmul(x, w, chained=chained, norm_of=norm)
    return F.linear(x, w)


def add_product(y: Tensor, w: Weight, stream: Residual, way: Way, after: Weight) -> Norm | None:
    """Add a product to the stream and ready the norm before `after`; return what is left of it.

    Few rows of four bits do it themselves, if those after can do the rest.
    """
    both = isinstance(w, PackedW4) and isinstance(after, PackedW4)
    if both and way.norms and len(y) <= MOST_NARROW:
        w4a16_matmul(y, w, chained=way.chained, add_to=stream)
        return Norm(stream.squares, EPS)
    add_norm(stream.h, product(y, w, way.chained), stream.weight, stream.x, way.chained)
    return None


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
    """Layers in one form, with an embedding, the last norm and a head."""

    def __init__(self, layers: list[Layer], embedding: Tensor, norm: Tensor, head: Weight) -> None:
        """Keep the weights."""
        self.layers, self.embedding, self.norm, self.head = layers, embedding, norm, head

    def logits_by_torch(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Return `(B, vocabulary)` for the tokens `(B,)` that follow the cache."""
        h = self.embedding[tokens]
        for pairs, layer in zip(cache.pairs, self.layers, strict=True):
            h = layer_by_torch(h, layer, pairs, cache.place, cache.turn)
        return product(F.rms_norm(h, h.shape[-1:], self.norm, EPS), self.head)

    def logits(self, tokens: Tensor, cache: Cache, way: Way) -> Tensor:
        """The same by kernels; what a layer adds to its input is added with the next norm."""
        chained = way.chained
        h = self.embedding[tokens]
        y, norm = torch.empty_like(h), None
        stream = Residual.of(h, self.layers[0].norms[0])
        add_norm(h, torch.zeros_like(h), stream.weight, stream.x, chained)
        following = [(layer.norms[0], layer.qkv) for layer in self.layers[1:]]
        following += [(self.norm, self.head)]
        for pairs, layer, (last, after) in zip(cache.pairs, self.layers, following, strict=True):
            heads = product(stream.x, layer.qkv, chained, norm)
            attend(heads, pairs, cache.turn, cache.place, y, chained)
            stream = stream._replace(weight=layer.norms[1])
            norm = add_product(y, layer.out, stream, way, layer.gate_up)
            z = product(stream.x, layer.gate_up, chained, norm)
            if not isinstance(layer.gate_up, PackedW4):
                both, z = z, z.new_empty(len(z), z.shape[1] // 2)
                join(both, z, chained)
            stream = stream._replace(weight=last)
            norm = add_product(z, layer.down, stream, way, after)
        return product(stream.x, self.head, chained, norm)


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

    def some_norms(count: int) -> Tensor:
        return (torch.rand(count, size.hidden, **like) + 0.5).bfloat16()

    dense, packed = [], []
    for _ in range(size.layers):
        plain = {
            name: quantize_rtn(random(*shape), scale_dtype=torch.bfloat16)
            for name, shape in shapes.items()
        }
        small = {name: pack(qw, gated=name == "gate_up")[0] for name, qw in plain.items()}
        large = {name: dequantize(qw, torch.bfloat16) for name, qw in plain.items()}
        norms = some_norms(2)
        packed.append(Layer(**small, norms=norms))
        dense.append(Layer(**large, norms=norms))
    table = random(size.vocabulary, size.hidden).bfloat16()
    rounded = quantize_rtn(random(size.vocabulary, size.hidden), scale_dtype=torch.bfloat16)
    head = dequantize(rounded, torch.bfloat16)
    kinds = (dense, head), (packed, head), (packed, pack(rounded)[0])
    norm = some_norms(1)[0]
    return {name: Model(ls, table, norm, h) for name, (ls, h) in zip(ARMS, kinds, strict=True)}


def new_cache(size: Size, batch: int, context: int, device: torch.device) -> Cache:
    generator = torch.Generator(device).manual_seed(1)
    shape = (size.layers, 2, batch, size.kv_heads, context, size.head)
    pairs = torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)
    place = torch.tensor([context - 1], device=device)
    rates = 500_000 ** -(torch.arange(0, size.head, 2, device=device) / size.head)
    angles = (place * rates).repeat(2)
    return Cache(pairs, place, torch.stack([angles.cos(), angles.sin()]).bfloat16())


def captured(step: Callable[[], Tensor | None]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Return a step in a graph, and where its result lies."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    return graph, found


def seconds_per_step(model: Model, tokens: Tensor, cache: Cache, way: Way, steps: int) -> float:
    """Best of three times of a step that chooses the next tokens, in a graph on CUDA."""
    if not tokens.is_cuda:
        begin = time.perf_counter()
        for _ in range(steps):
            tokens.copy_(model.logits_by_torch(tokens, cache).argmax(-1))
        return (time.perf_counter() - begin) / steps
    graph, _ = captured(lambda: choose(model.logits(tokens, cache, way), tokens, way.chained))
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


def replayed(model: Model, tokens: Tensor, cache: Cache, way: Way) -> tuple[Tensor, Tensor]:
    """Return logits and new keys and values of a step as it is timed, from a graph on CUDA."""
    own = cache._replace(pairs=cache.pairs.clone())
    if not tokens.is_cuda:
        return model.logits_by_torch(tokens, own), own.pairs[..., own.place, :]
    chosen = torch.full_like(tokens, -1)

    def step() -> Tensor:
        y = model.logits(tokens, own, way)
        choose(y, chosen, way.chained)
        return y

    graph, y = captured(step)
    own.pairs.copy_(cache.pairs)
    y.fill_(torch.nan)
    graph.replay()
    if not torch.equal(chosen, y.argmax(-1)):
        raise RuntimeError("the tokens chosen are not those of the largest logits")
    return y, own.pairs[..., own.place, :]


@torch.no_grad()
def differences(
    models: dict[str, Model],
    size: Size,
    sizes: Iterable[tuple[int, int]],
    device: torch.device,
) -> dict[str, float]:
    """How far at most the arms are from torch's operations after two layers, by `replayed`.

    Args:
        models: the arms.
        size: of the models.
        sizes: of batches and contexts.
        device: of the models.
    """
    found = dict.fromkeys(models, 0.0)
    two = {
        name: Model(model.layers[:2], model.embedding, model.norm, model.head)
        for name, model in models.items()
    }
    for batch, context in sizes:
        tokens = torch.arange(batch, device=device)
        cache = new_cache(replace(size, layers=2), batch, context, device)
        own = cache._replace(pairs=cache.pairs.clone())
        wanted = two["bfloat16"].logits_by_torch(tokens, own), own.pairs[..., own.place, :]
        for name, model in two.items():
            for way in WAYS.values() if tokens.is_cuda else (WAYS["apart"],):
                apart = map(_apart, replayed(model, tokens, cache, way), wanted)
                found[name] = _largest(found[name], *apart)
    return found


def _apart(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def _largest(*values: float) -> float:
    """Return the largest, or NaN where there is one."""
    return float(torch.tensor(values).max())


@torch.no_grad()
def compare(
    models: dict[str, Model], size: Size, batch: int, context: int, steps: int, device: torch.device
) -> dict[str, Any]:
    """Time the arms, each the faster way."""
    cache = new_cache(size, batch, context, device)
    tokens = torch.arange(batch, device=device)
    found: dict[str, Any] = {"batch": batch, "context": context, "ms": {}, "tokens_per_s": {}}
    for name, model in models.items():
        names = ["chained", "apart"] if name == "bfloat16" else list(WAYS)
        times = {
            way: seconds_per_step(model, tokens.clone(), cache, WAYS[way], steps)
            for way in (names if tokens.is_cuda else ["apart"])
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
    found["size"] = asdict(size)
    sizes = itertools.product(options.batches, options.contexts)
    found["differ_by"] = differences(models, size, sizes, device)
    print("logits and cache differ by", ", ".join(f"{d:.4f}" for d in found["differ_by"].values()))
    if not all(difference < ALIKE for difference in found["differ_by"].values()):
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
