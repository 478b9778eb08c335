# SPDX-License-Identifier: Apache-2.0
"""The decoding step of the benchmark `marlin_decode.py`, and its kernels, against torch.

Interpreted in float32, for the interpreter takes bfloat16 for integers.
"""

import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
decode, kernels = import_module("marlin_decode"), import_module("decode_kernels")
sys.path.pop()
pytestmark = pytest.mark.skipif(kernels.triton is None, reason="needs Triton")

TINY = decode.SIZES["tiny"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def dtype_of(device):
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def apart(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("tokens", "at", "parts"),
    [
        (1, 0, 1),
        (64, 63, 1),
        (100, 7, 1),
        (130, 129, 2),
        (130, 129, 3),  # the last part has two tokens, one of them the new one
        (200, 0, 4),
        (300, 299, 5),
        (512, 130, 8),
        (512, 511, 3),
        (70, 69, 4),  # two parts without tokens
    ],
)
def test_attention_in_parts_is_that_of_torch(tokens, at, parts, kernel_device, monkeypatch):
    monkeypatch.setattr(kernels, "parts_of", lambda *sizes: parts)
    size = replace(TINY, layers=1, heads=6)
    batch, width, dtype = 3, 6 * size.head, dtype_of(kernel_device)
    generator = torch.Generator().manual_seed(tokens)
    cache = decode.new_cache(size, batch, tokens, torch.device("cpu"))
    heads = torch.randn(batch, width + 4 * size.head, generator=generator)
    heads, pairs, turn = (t.to(kernel_device, dtype) for t in (heads, cache.pairs[0], cache.turn))
    place = torch.tensor([at], device=kernel_device)
    wanted = pairs.clone()
    q, k, v = heads.view(batch, -1, size.head).split([6, 2, 2], 1)
    q, k = (decode.rotated(t.double(), turn.double()).to(dtype) for t in (q, k))
    wanted.index_copy_(3, place, torch.stack([k, v])[:, :, :, None])
    q = q.reshape(batch, 2, 3, size.head)
    y = F.scaled_dot_product_attention(q.double(), *wanted.double()).reshape(batch, -1)
    for _ in range(2):  # the second time with the counters of the first
        out = torch.full((batch, width), torch.nan, dtype=dtype, device=kernel_device)
        kernels.attend(heads, pairs, turn, place, out, False)
        assert apart(out, y) < TOLERANCE[dtype]
        assert apart(pairs, wanted.double()) < TOLERANCE[dtype]
    counters = kernels._counters(heads.device)
    assert not counters.any()
    if parts > 1:  # where no part is the last, none writes
        out.fill_(torch.nan)
        counters.fill_(-1)
        kernels.attend(heads, pairs, turn, place, out, False)
        assert out.isnan().all()
        counters.zero_()


def test_there_are_parts_where_programs_are_few():
    def parts(tokens, groups):
        return kernels.parts_of(tokens, groups, torch.device("cpu"))

    assert [parts(512, groups) for groups in (8, 64, 128, 256, 512)] == [8, 4, 3, 1, 1]
    assert [parts(tokens, 8) for tokens in (1, 64, 65, 128, 2048)] == [1, 1, 2, 2, 16]


@pytest.mark.parametrize("width", [5, 2048, 7000])
def test_the_largest_of_each_row_is_chosen(width, kernel_device):
    generator = torch.Generator().manual_seed(width)
    logits = torch.randn(3, width, generator=generator).to(kernel_device, dtype_of(kernel_device))
    logits[1, [1, width - 1]] = 100.0  # of equals the first
    tokens = torch.full((3,), -1, device=kernel_device)
    for _ in range(2):
        kernels.choose(logits, tokens, False)
        assert torch.equal(tokens, logits.argmax(-1))
        assert tokens[1] == 1
    assert not kernels._counters(logits.device).any()


def in_dtype(model, dtype):
    """The model with what is dense in another dtype."""

    def cast(weight):
        return weight.to(dtype) if isinstance(weight, torch.Tensor) else weight

    layers = [decode.Layer(*map(cast, layer)) for layer in model.layers]
    return decode.Model(layers, cast(model.embedding), cast(model.norm), cast(model.head))


def copy_of(cache):
    return cache._replace(pairs=cache.pairs.clone())


def test_a_step_of_every_arm_is_that_of_torch(kernel_device, monkeypatch):
    """Norms are random: one that a product leaves to the wrong one would show."""
    if kernel_device.type == "cpu":  # which has no launches to chain, but the same products
        monkeypatch.setattr(kernels, "_launch", lambda _: {"C": False, "launch_pdl": False})
    dtype = dtype_of(kernel_device)
    models = [in_dtype(model, dtype) for model in decode.build(TINY, kernel_device).values()]
    for context in (20, 100):
        cache = decode.new_cache(TINY, 2, context, kernel_device)
        cache = cache._replace(pairs=cache.pairs.to(dtype), turn=cache.turn.to(dtype))
        tokens = torch.arange(2, device=kernel_device)
        for model in models:
            wanted = model.logits_by_torch(tokens, copy_of(cache)).double()
            for way in decode.WAYS.values():
                found = model.logits(tokens, copy_of(cache), way)
                assert apart(found, wanted) < 3 * TOLERANCE[dtype]
