# SPDX-License-Identifier: Apache-2.0
"""Oracles of muP: the paper's rules, with multipliers in the forward pass, on real models."""

import copy
import math

import pytest
import torch
from dist_ranks import run_on_ranks
from torch import nn

from batchery.optim import LAMB, WSDScheduler
from batchery.optim.wind_tunnel import MuP, find_roles, mup_factors

VOCABULARY, LAYERS, BASE = 32, 2, 16


def make(family, width=BASE, tied=False, seed=0, vocabulary=VOCABULARY, **kinds):
    """A small model of a family with fresh weights; biases and gains are random, too."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    shared = {"vocab_size": vocabulary, "tie_word_embeddings": tied, "use_cache": False}
    if family == "gpt2":
        config = transformers.GPT2Config(
            n_embd=width, n_layer=LAYERS, n_head=width // 8, n_positions=32, bos_token_id=0,
            eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **shared, **kinds,
        )  # fmt: skip
    else:
        name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
        config = getattr(transformers, f"{name}Config")(
            hidden_size=width, intermediate_size=2 * width, num_hidden_layers=LAYERS,
            num_attention_heads=width // 8, num_key_value_heads=width // 16 or 1, head_dim=8,
            max_position_embeddings=32, bos_token_id=0, eos_token_id=0, **shared, **kinds,
        )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim == 1:
                    p.add_(0.1 * torch.randn_like(p))
    return model


def tokens(rows=4, length=12, vocabulary=VOCABULARY):
    ids = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def train(model, optimizer, steps, schedule=None):
    losses = []
    for _ in range(steps):
        loss = model(**tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(loss.item())
    return losses


def logits(model):
    with torch.no_grad():
        return model(**tokens()).logits


FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gpt2"]
every_family = pytest.mark.parametrize("family", FAMILIES)
both_ties = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
PLAIN = {"scale_emb": 1.0, "scale_depth": 1.0, "depth": None}


@every_family
@both_ties
def test_at_base_width_it_is_the_identity_to_the_bit(family, tied):
    model, twin = make(family, tied=tied), make(family, tied=tied)
    mup = MuP(BASE, **PLAIN)
    assert mup.apply(model) is model
    assert torch.equal(logits(model), logits(twin))
    groups = mup.param_groups(model, lr=0.01, weight_decay=0.1)
    settings = sorted((g["lr"], g["weight_decay"], g["eps"]) for g in groups)
    assert settings == [(0.01, 0.0, 1e-8), (0.01, 0.1, 1e-8)]


def written_out(model, ratio, emb, branch, lr, decay):
    """The paper's muP, literally: multipliers in hooks, and one group per parameter."""
    matrices = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "c_attn", "c_fc")
    ends = ("o_proj", "down_proj", "c_proj")
    multipliers = dict.fromkeys(ends, branch) | {"lm_head": 1 / ratio}
    multipliers |= dict.fromkeys(("embed_tokens", "wte", "wpe"), emb)
    for path, module in model.named_modules():
        m = multipliers.get(path.rpartition(".")[2])
        if m is not None:
            module.register_forward_hook(lambda module, inputs, output, m=m: output * m)
    groups = []
    for name, p in model.named_parameters():
        matrix = name.split(".")[-2] in matrices + ends and p.ndim == 2
        if matrix:
            p.data.mul_(ratio**-0.5)
        rate = lr / ratio if matrix else lr
        groups.append({"params": [p], "lr": rate, "weight_decay": decay if p.ndim == 2 else 0.0})
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6)


@every_family
@both_ties
def test_it_trains_as_the_rules_written_out_in_the_forward_pass(family, tied):
    width, emb, scale = 4 * BASE, 12.0, 1.4
    ours, literal = (make(family, width, tied).double() for _ in range(2))
    mup = MuP(BASE, scale_emb=emb, scale_depth=scale)
    mup.apply(ours)
    one = torch.optim.AdamW(mup.param_groups(ours, 0.02, 0.3, eps=1e-6), betas=(0.9, 0.95))
    two = written_out(literal, 4.0, emb, scale / math.sqrt(LAYERS), 0.02, 0.3)
    # RMSNorm in transformers computes in float32; the loss does so everywhere
    close = {"rtol": 1e-10, "atol": 1e-10} if family == "gpt2" else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(logits(ours), logits(literal), **close)
    losses = train(ours, one, 6), train(literal, two, 6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(logits(ours), logits(literal), **close)
    assert losses[0][-1] < 0.8 * losses[0][0]


def test_the_papers_numbers():
    # MiniCPM-2.4B: width 2304, base 256, 40 layers, scale_emb 12, scale_depth 1.4
    ratio, kinds = 9.0, {"scale_emb": 12.0, "branch": 1.4 / math.sqrt(40)}
    assert mup_factors("embedding", ratio, **kinds) == (12.0, 1.0, 1.0)
    assert mup_factors("hidden", ratio, **kinds) == (1.0, 1 / 3, 1 / 9)
    assert mup_factors("residual", ratio, **kinds) == (1.4 / math.sqrt(40), 1 / 3, 1 / 9)
    assert mup_factors("head", ratio, **kinds) == (1 / 9, 1.0, 1.0)
    assert mup_factors("norm", ratio, matrix=False, **kinds) == (1.0, 1.0, 1.0)
    assert mup_factors("residual", ratio, matrix=False, **kinds)[1:] == (1.0, 1.0)
    assert mup_factors("final_norm", ratio, matrix=False, tied=True, **kinds)[0] == 1 / 108


@pytest.mark.parametrize(
    ("depth", "multiplier"), [("sqrt", 2**-0.5), ("completep", 0.5), (None, 1)]
)
def test_depth_rules(depth, multiplier):
    model, twin = make("llama"), make("llama")
    MuP(BASE, scale_emb=1.0, scale_depth=3.0, depth=depth).apply(model)
    for layer, plain in zip(model.model.layers, twin.model.layers, strict=True):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            found, wanted = layer.get_submodule(name).weight, plain.get_submodule(name).weight
            torch.testing.assert_close(found, 3 * multiplier * wanted)
        assert torch.equal(layer.mlp.up_proj.weight, plain.mlp.up_proj.weight)


def test_a_given_std_is_reached_whatever_the_initialiser():
    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.embed, self.fc = nn.Embedding(50, width), nn.Linear(width, width)
            self.head = nn.Linear(width, 50)
            nn.init.zeros_(self.head.weight)

    roles = {"embed": "embedding", "fc": "hidden", "head": "head"}
    model = MuP(16, scale_emb=2.0, init_std=0.1, roles=roles).apply(Block(64), width=64)
    assert model.embed.weight.std().item() == pytest.approx(0.2, rel=1e-5)
    assert model.fc.weight.std().item() == pytest.approx(0.1 / 2, rel=1e-5)
    assert not model.head.weight.any()


def first_step(kind, width, tied, seed, vocabulary, rows, length):
    """Return what one step of AdamW takes from the loss, and the mean |change| of the logits."""
    model = make("llama", width, tied, seed, vocabulary)
    if kind == "mup":
        mup = MuP(64, init_std=0.1)
        optimizer = torch.optim.AdamW(mup.param_groups(mup.apply(model), lr=1e-3))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = tokens(rows, length, vocabulary)
    before = model(**batch)
    before.loss.backward()
    optimizer.step()
    with torch.no_grad():
        after = model(**batch)
    change = (after.logits - before.logits.detach()).abs().mean()
    return torch.stack([before.loss.detach() - after.loss, change])


def spread(kind, tied, *batch):
    """Return (loss, logits): over three widths, the largest deviation from the mean change."""
    found = torch.stack([
        torch.stack([first_step(kind, width, tied, seed, *batch) for seed in range(3)]).mean(0)
        for width in (64, 128, 256)
    ])  # fmt: skip
    return (found / found.mean(0) - 1).abs().amax(0).tolist()


@both_ties
def test_the_first_step_lowers_the_loss_alike_at_every_width(tied):
    assert spread("mup", tied, 64, 8, 16)[0] < 0.1


def test_the_first_step_changes_the_logits_alike_at_every_width():
    # Single logits hold a random part, too, of order width^-1/2 over the coherent one, which
    # counts for less the fewer different tokens share the step.
    assert spread("mup", False, 8, 1, 8)[1] < 0.1


def test_without_mup_the_first_step_grows_with_the_width():
    loss, change = spread("plain", False, 64, 8, 16)
    assert loss > 0.5
    assert change > 0.5


def test_it_survives_copies_and_checkpoints(tmp_path):
    from transformers import AutoModelForCausalLM

    mup = MuP(BASE)
    model = mup.apply(make("qwen2", 4 * BASE, tied=True))
    optimizer = torch.optim.AdamW(mup.param_groups(model, lr=0.01))
    train(model, optimizer, 2)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    fresh = mup.apply(make("qwen2", 4 * BASE, tied=True, seed=1))
    fresh.load_state_dict(model.state_dict())
    others = loaded, fresh, copy.deepcopy(model)
    saved = copy.deepcopy(optimizer.state_dict())
    losses = train(model, optimizer, 2)
    for other in others:
        assert torch.equal(logits(other), wanted)
        again = torch.optim.AdamW(mup.param_groups(other, lr=0.01))
        assert [g["lr"] for g in again.param_groups] == [g["lr"] for g in optimizer.param_groups]
        again.load_state_dict(copy.deepcopy(saved))
        assert train(other, again, 2) == losses
        with pytest.raises(ValueError, match="MuP: model must not have been prepared before"):
            mup.apply(other)


def test_models_of_one_config_are_prepared_each_for_itself():
    first = make("llama")
    second = type(first)(first.config)
    mup = MuP(BASE)
    mup.apply(first)
    assert not hasattr(second.config, "mup")
    mup.apply(second)
    assert first.config.mup == second.config.mup
    assert first.model.config is first.config


def adamw(groups):
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def lamb(groups):
    return LAMB(groups, lr=0.01, adapt=False, decoupled=True)


@pytest.mark.parametrize("build", [adamw, lamb])
def test_groups_train_and_keep_their_proportions_through_a_schedule(build):
    mup = MuP(BASE, init_std=0.1)
    model = mup.apply(make("llama", 4 * BASE))
    optimizer = build(mup.param_groups(model, lr=0.01, weight_decay=0.1))
    peaks = [group["lr"] for group in optimizer.param_groups]
    assert {round(peak / 0.01, 6) for peak in peaks} == {12.0, 1.0, 0.25, 0.247487}
    schedule = WSDScheduler(optimizer, 3, 24, 8, min_ratio=0.1, offset=1)
    losses, shares = [], []
    for _ in range(24):
        losses += train(model, optimizer, 1, schedule)
        shares.append(
            [g["lr"] / peak for g, peak in zip(optimizer.param_groups, peaks, strict=True)]
        )
    assert losses[-1] < 0.3 * losses[0]
    assert all(max(row) == pytest.approx(min(row), rel=1e-12) for row in shares)
    assert shares[-1][0] == pytest.approx(0.1)


def test_adamw_and_unadapted_lamb_step_alike():
    mup = MuP(BASE)
    one, two = (mup.apply(make("llama", 4 * BASE)).double() for _ in range(2))
    theirs = torch.optim.AdamW(mup.param_groups(one, lr=0.01))
    ours = LAMB(mup.param_groups(two, lr=0.01), lr=0.01, adapt=False, decoupled=True)
    assert train(one, theirs, 4) == pytest.approx(train(two, ours, 4), rel=1e-6)


def test_layerwise_steps_have_the_length_of_each_groups_rate():
    mup = MuP(BASE)
    model = mup.apply(make("llama", 4 * BASE))
    optimizer = LAMB(mup.param_groups(model, lr=0.01), lr=0.01)
    before = {p: p.detach().clone() for p in model.parameters()}
    train(model, optimizer, 1)
    for group in optimizer.param_groups:
        for p in group["params"] if group["weight_decay"] else []:
            moved = (p.detach() - before[p]).norm() / before[p].norm()
            assert moved.item() == pytest.approx(group["lr"], rel=1e-4)


ROLES = {"0": "embedding", "1": "hidden", "2": "final_norm", "3": "head"}


def stack(width=16):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(9, width), nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, 9)
    )


def test_a_map_of_roles_serves_any_module():
    mup = MuP(4, roles=ROLES, init_std=0.1)
    model = mup.apply(stack(), width=16)
    model[1].bias.requires_grad_(False)
    rates = {
        name: group["lr"]
        for group in mup.param_groups(model, lr=0.1)
        for name, _ in group["params"]
    }
    assert rates == pytest.approx(
        {"0.weight": 1.2, "1.weight": 0.025, "2.weight": 0.1, "2.bias": 0.1, "3.weight": 0.025,
         "3.bias": 0.025}
    )  # fmt: skip
    assert model.mup["width"] == 16
    assert copy.deepcopy(model).mup == model.mup


def test_patterns_fit_names_or_their_last_parts_and_the_first_decides():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    model.register_parameter("scale", nn.Parameter(torch.ones(2)))
    found = find_roles(model, {"blocks.1.bias": "norm", "scale": "norm", "blocks.*": "hidden"})
    assert found == {
        "scale": "norm", "blocks.0.weight": "hidden", "blocks.0.bias": "hidden",
        "blocks.1.weight": "hidden", "blocks.1.bias": "norm",
    }  # fmt: skip


def test_roles_add_to_those_of_a_family():
    model = make("llama")
    model.adapter = nn.Linear(BASE, BASE)
    with pytest.raises(ValueError, match=r"unmatched: adapter.weight, adapter.bias"):
        find_roles(model)
    roles = find_roles(model, {"adapter": "residual", "lm_head": "hidden"})
    assert roles["adapter.weight"] == "residual"
    assert roles["lm_head.weight"] == "hidden"
    assert roles["model.norm.weight"] == "final_norm"


def test_what_is_unknown_or_contradictory_is_named():
    model = make("llama")
    model.config.model_type = "strange"
    message = (
        r"MuP: roles must cover every parameter of LlamaForCausalLM; known without roles: llama, "
        r".*; unmatched: model.embed_tokens.weight, .* and 13 more"
    )
    with pytest.raises(ValueError, match=message):
        MuP(BASE).apply(model)
    for roles, error in (
        (ROLES | {"nothing": "norm"}, r"roles must fit a parameter's name, got \['nothing'\]"),
        (ROLES | {"1": "body"}, "roles must be one of 'embedding', .* got 'body'"),
    ):
        with pytest.raises(ValueError, match=error):
            MuP(4, roles=roles).apply(stack(), width=16)
    shared = stack()
    shared[3].weight = shared[0].weight
    with pytest.raises(ValueError, match="roles must agree on a shared weight"):
        MuP(4, roles=ROLES | {"3": "hidden"}).apply(shared, width=16)
    with pytest.raises(ValueError, match="roles must name the norm before a tied head"):
        MuP(4, roles=ROLES | {"2": "norm"}).apply(shared, width=16)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: MuP(0), "MuP: base_width must be >= 1, got 0"),
        (lambda: MuP(4, scale_emb=0.0), "MuP: scale_emb must be > 0, got 0.0"),
        (lambda: MuP(4, scale_depth=-1.0), "MuP: scale_depth must be > 0, got -1.0"),
        (lambda: MuP(4, depth="cube"), "MuP: depth must be one of 'sqrt', 'completep', got 'cube'"),
        (lambda: MuP(4, init_std=0.0), "MuP: init_std must be > 0"),
        (lambda: MuP(4, roles=ROLES).apply(stack()), "MuP: width must be given without a config"),
        (
            lambda: MuP(4, roles=ROLES | {"1": "residual"}).apply(stack(), width=16),
            "MuP: layers must be given",
        ),
        (
            lambda: MuP(4, roles=ROLES).apply(stack().to("meta"), width=16),
            "MuP: model must hold weights, not meta tensors",
        ),
        (
            lambda: MuP(4, roles=ROLES).param_groups(stack(), lr=0.1),
            "MuP: model must go through apply first",
        ),
        (
            lambda: MuP(8, roles=ROLES).param_groups(
                MuP(4, roles=ROLES).apply(stack(), width=8), 1
            ),
            "MuP: the saved state has base_width=4, this object base_width=8",
        ),
        (
            lambda: MuP(4, roles=ROLES).param_groups(
                MuP(4, roles=ROLES).apply(stack(), width=8), -1
            ),
            "MuP: lr must be >= 0, got -1",
        ),
    ],
)
def test_bad_settings_are_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()


class Ranked(nn.Module):
    """A residual network small enough to shard."""

    def __init__(self, width):
        super().__init__()
        self.embed, self.up = nn.Embedding(8, width), nn.Linear(width, width)
        self.down, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.head = nn.Linear(width, 8, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.norm(x + self.down(torch.relu(self.up(x)))))


RANKED = MuP(
    4, init_std=0.1, roles={"embed": "embedding", "up": "hidden", "down": "residual",
                            "norm": "final_norm", "head": "head"},
)  # fmt: skip


def _losses(rank=0, size=1):
    torch.manual_seed(0)
    model = RANKED.apply(Ranked(16), width=16, layers=1)
    if size > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    optimizer = torch.optim.AdamW(RANKED.param_groups(model, lr=0.01, weight_decay=0.1))
    ids = torch.arange(8)
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(model(ids[rank::size]), ids.roll(1)[rank::size])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.dist
@pytest.mark.slow
def test_sharded_after_apply_it_trains_as_on_one_process():
    both = run_on_ranks(_losses)
    torch.testing.assert_close(torch.stack(both).mean(0), _losses(), rtol=1e-5, atol=1e-6)
