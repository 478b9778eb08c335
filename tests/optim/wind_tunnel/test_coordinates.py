# SPDX-License-Identifier: Apache-2.0
"""Oracles of the coordinate check: flat under muP, steep without, exact on known activations."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

from batchery.optim.wind_tunnel import MuP, coord_check, coord_slopes

WIDTHS = [32, 64, 128, 256]
VOCABULARY = 64


def llama(width, tied=False):
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=width // 16, max_position_embeddings=32, use_cache=False,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@functools.cache
def slopes(kind):
    mup = MuP(32, init_std=0.1)
    ids = torch.randint(VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))
    plain = kind == "plain"
    columns = coord_check(
        lambda width: llama(width) if plain else mup.apply(llama(width, kind == "tied")),
        WIDTHS,
        {"input_ids": ids, "labels": ids},
        make_optimizer=lambda model: torch.optim.AdamW(
            model.parameters() if plain else mup.param_groups(model, lr=0.01), lr=0.01
        ),
        repeats=2,
    )
    return coord_slopes(columns)


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_under_mup_hidden_activations_keep_their_size(kind):
    found = slopes(kind)
    hidden = {name: values for name, values in found.items() if name.startswith("model.layers")}
    assert len(hidden) > 20
    for name, values in hidden.items():
        assert len(values) == 5
        # ±0.1 is the specification's bound: terms of order width^-1/2 tilt widths of 32 to 256
        assert max(map(abs, values)) < 0.1, name
    assert max(map(abs, found["model.embed_tokens"])) < 0.02


def test_the_multiplier_of_the_head_is_where_it_belongs():
    # tied: in the gain of the last norm; a random head starts at -1/2 and rises from there
    assert slopes("tied")["model.norm"] == pytest.approx([-1.0] * 5, abs=0.02)
    assert slopes("untied")["model.norm"] == pytest.approx([0.0] * 5, abs=0.02)
    for kind in ("tied", "untied"):
        head = slopes(kind)["lm_head"]
        assert head[0] == pytest.approx(-0.5, abs=0.1)
        assert head == sorted(head)


def test_without_mup_they_grow():
    found = slopes("plain")
    assert max(found["model.layers.1.mlp.down_proj"]) > 0.4
    assert max(found["lm_head"]) > 0.4
    steep = [name for name, values in found.items() if max(values[1:]) > 0.4]
    assert len(steep) > 10


class Constant(nn.Module):
    """Activations of known size: sum over the width, its square root, and one."""

    def __init__(self, width):
        super().__init__()
        self.width, self.weight = width, nn.Parameter(torch.zeros(()))
        self.sum, self.root, self.one = nn.Identity(), nn.Identity(), nn.Identity()
        self.pair = nn.Identity()

    def forward(self, x, scale=1.0):
        self.sum(x * self.width)
        self.root(-x * self.width**0.5)
        self.pair((x * 3, None))
        return (self.one(scale * x) + self.weight).mean()


def check(batch, **kinds):
    return coord_check(
        Constant, [4, 16, 64], batch, 2, loss=lambda output: output,
        make_optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=1.0), **kinds,
    )  # fmt: skip


def test_slopes_of_known_activations():
    columns = check(torch.ones(5))
    assert {len(values) for values in columns.values()} == {3 * 3 * 5}
    found = coord_slopes(columns)
    assert found["sum"] == pytest.approx([1.0] * 3, abs=1e-9)
    assert found["root"] == pytest.approx([0.5] * 3, abs=1e-6)  # float32 activations
    assert found["pair"] == pytest.approx([0.0] * 3, abs=1e-9)
    rows = list(zip(*columns.values(), strict=True))
    assert (16, 1, "sum", 16.0) in rows
    # the model itself: 1, then one step of size 1 down the gradient 1, and another
    assert [size for width, _, name, size in rows if name == "" and width == 4] == [1.0, 0.0, 1.0]
    assert np.isnan(found[""][1])


def test_batches_are_passed_as_the_model_takes_them():
    x = torch.ones(5)
    for batch in ((x, 2.0), {"x": x, "scale": 2.0}):
        columns = check(batch)
        sizes = dict(zip(columns["module"], columns["size"], strict=True))
        assert sizes["one"] == 2.0


def test_the_seed_decides_and_the_model_is_left_clean():
    built = []

    def make_model(width):
        built.append(nn.Sequential(nn.Linear(3, width), nn.Linear(width, 1)))
        return built[-1]

    def sizes(seed, repeats=1):
        return coord_check(
            make_model, [4, 8], torch.ones(2, 3), 1, loss=lambda output: output.mean(),
            make_optimizer=lambda model: torch.optim.Adam(model.parameters()),
            repeats=repeats, generator=torch.Generator().manual_seed(seed),
        )["size"]  # fmt: skip

    before = torch.get_rng_state()
    assert sizes(1) == sizes(1) != sizes(2)
    assert sizes(1) != sizes(1, repeats=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module._forward_hooks for model in built for module in model.modules())


def test_bad_arguments_are_named():
    kinds = {"make_optimizer": lambda model: None, "batch": torch.ones(1)}
    with pytest.raises(ValueError, match=r"coord_check: widths must be two or more, got \[8, 8\]"):
        coord_check(Constant, [8, 8], **kinds)
    with pytest.raises(ValueError, match="coord_check: steps must be >= 0, got -1"):
        coord_check(Constant, [4, 8], steps=-1, **kinds)
