# SPDX-License-Identifier: Apache-2.0
import copy
import json

import pytest
import torch
import torch.nn.functional as F
from four_bits import ids, llama
from torch import nn

from batchery.compress.quant import (
    GPTQ,
    dequantize,
    gptq_quantize_model,
    quantize_rtn,
    rtn_quantize_model,
)
from batchery.compress.quant.calibration import cut_padding
from batchery.compress.quant.targets import decoder_blocks

transformers = pytest.importorskip("transformers")

HOW = {"group_size": 32, "progress": False}


def mixtral(experts=4):
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=experts,
        num_experts_per_tok=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.MixtralForCausalLM(config).eval()


def inputs_of(model, name, tokens):
    """What a layer sees, caught by a hook."""
    caught = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda module, args: caught.append(args[0].detach()))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in caught])


def test_every_layer_is_quantised_for_what_it_sees_behind_quantised_blocks():
    model, tokens = llama(), ids()
    first = copy.deepcopy(model)
    report = gptq_quantize_model(model, tokens.split(3), act_order=True, **HOW)
    linears = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    assert set(report.weights) == linears
    assert [layer.name for layer in report.layers] == [
        name for name, _ in first.named_modules() if name in linears
    ]
    # in block 0 the first inputs are those of the model as it was; in block 1 block 0 is quantised
    half = copy.deepcopy(first)
    for name in linears:
        if name.startswith("model.layers.0."):
            half.get_submodule(name).weight.data.copy_(dequantize(report.weights[name]))
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        for place, source in ((0, first), (1, half)):
            full = f"model.layers.{place}.{name}"
            gptq = GPTQ(source.get_submodule(full).in_features)
            gptq.add_batch(inputs_of(source, full, tokens))
            w = first.get_submodule(full).weight
            wanted = gptq.quantize(w, group_size=32, act_order=True)
            found = report.weights[full]
            assert torch.equal(found.scales, wanted.scales)
            # sums in another order: a weight that lies half-way may go either way
            assert (found.q == wanted.q).float().mean() > 0.98
            entry = next(layer for layer in report.layers if layer.name == full)
            assert entry.tokens == 6 * 24
            wanted_error = gptq.hessian_error(w, found) / gptq.energy(w)
            assert entry.error == pytest.approx(wanted_error, rel=1e-3)
            rtn = gptq.hessian_error(w, quantize_rtn(w, group_size=32)) / gptq.energy(w)
            assert entry.rtn_error == pytest.approx(rtn, rel=1e-3)
    for name in linears:
        weight = model.get_submodule(name).weight
        assert torch.equal(weight, dequantize(report.weights[name], weight.dtype))
    assert torch.equal(model.lm_head.weight, first.lm_head.weight)
    assert torch.equal(model.model.embed_tokens.weight, first.model.embed_tokens.weight)
    assert sum(layer.error for layer in report.layers) < sum(
        layer.rtn_error for layer in report.layers
    )


def test_layers_of_one_input_are_factorised_once(monkeypatch):
    made = []
    plain = GPTQ.quantize

    def count(self, w, **how):
        made.append(len(w))
        return plain(self, w, **how)

    monkeypatch.setattr(GPTQ, "quantize", count)
    gptq_quantize_model(llama(1), [ids()], **HOW)
    assert sorted(made) == [64, 64, 64 + 32 + 32, 192]  # o, down, qkv, gate and up


def test_the_model_is_left_as_it_was_but_for_its_weights():
    model = llama().train()
    before = torch.random.get_rng_state()
    cache = model.config.use_cache
    gptq_quantize_model(model, [ids()], **HOW)
    assert model.training
    assert model.config.use_cache == cache
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_positions_of_one_row_are_cut_for_every_row():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    batch = {"input_ids": torch.arange(6).view(2, 3), "attention_mask": mask}
    ((_, call),) = cut_padding("me", batch | {"position_ids": torch.arange(3)[None]})
    assert call["input_ids"].tolist() == [[0, 1], [4, 5]]
    assert call["position_ids"].tolist() == [[0, 1], [1, 2]]


@pytest.mark.parametrize("left", [True, False])
def test_padding_counts_for_nothing(left):
    rows = [ids(1, length, seed=length) for length in (9, 5, 9, 3)]
    padded = torch.full((5, 9), 63)
    mask = torch.zeros(5, 9, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        place = slice(9 - tokens.shape[1], None) if left else slice(None, tokens.shape[1])
        padded[row, place] = tokens
        mask[row, place] = 1
    batch = {"input_ids": padded, "attention_mask": mask, "labels": padded}
    one, other = llama(), llama()
    found = gptq_quantize_model(one, [batch], **HOW)
    alone = [rows[3], rows[1], torch.cat([rows[0], rows[2]])]
    wanted = gptq_quantize_model(other, alone, **HOW)
    assert [layer.tokens for layer in found.layers] == [26] * len(found.layers)
    for name, qw in wanted.weights.items():
        assert torch.equal(found.weights[name].q, qw.q)


def test_cutting_takes_what_has_a_token_a_column():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 0]])
    batch = {
        "input_ids": torch.arange(9).view(3, 3),
        "position_ids": torch.arange(9).view(3, 3) + 100,
        "image": torch.arange(3),
        "flag": True,
        "attention_mask": mask,
    }
    calls = [keywords for _, keywords in cut_padding("me", batch)]
    assert [call["input_ids"].tolist() for call in calls] == [[[1, 2]], [[3, 4, 5]]]
    assert [call["position_ids"].tolist() for call in calls] == [[[101, 102]], [[103, 104, 105]]]
    assert [call["image"].tolist() for call in calls] == [[0], [1]]
    assert all(call["flag"] is True and "attention_mask" not in call for call in calls)


class Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path, monkeypatch):
    from batchery.compress.quant import model as home

    how = {**HOW, "act_order": True, "static_groups": False, "symmetric": False}
    whole = llama(3)
    wanted = gptq_quantize_model(whole, [ids()], **how)
    plain, made = home._quantize_block, []

    def interrupt(*given):
        if len(made) == 2:
            raise Interrupted
        made.append(1)
        return plain(*given)

    monkeypatch.setattr(home, "_quantize_block", interrupt)
    with pytest.raises(Interrupted):
        gptq_quantize_model(llama(3), [ids()], folder=tmp_path, **how)
    made.pop()  # one block more
    resumed = llama(3)
    found = gptq_quantize_model(resumed, [ids()], folder=tmp_path, **how)
    assert len(made) == 2
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name])
    for name, qw in wanted.weights.items():
        assert torch.equal(found.weights[name].q, qw.q)
        assert torch.equal(found.weights[name].g_idx, qw.g_idx)
    same = [(layer.name, layer.error, layer.rtn_error, layer.tokens) for layer in wanted.layers]
    assert same == [(x.name, x.error, x.rtn_error, x.tokens) for x in found.layers]


@pytest.mark.parametrize(
    "quantise",
    [
        lambda model: gptq_quantize_model(model, [ids()], **HOW),
        lambda model: rtn_quantize_model(model, group_size=32),
    ],
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_whole_blocks(quantise, error, monkeypatch):
    from batchery.compress.quant import model as home

    plain, made = home.dequantize, []

    def interrupt(*given):
        made.append(1)
        if len(made) == 7 + 4:  # in the midst of the second block
            raise error
        return plain(*given)

    model = llama()
    before = copy.deepcopy(model)
    monkeypatch.setattr(home, "dequantize", interrupt)
    with pytest.raises(error):
        quantise(model)
    for name, tensor in model.state_dict().items():
        changed = name.startswith("model.layers.0.") and "proj" in name
        assert torch.equal(tensor, before.state_dict()[name]) != changed


def test_a_folder_of_something_else_is_refused(tmp_path):
    gptq_quantize_model(llama(1), [ids()], folder=tmp_path, **HOW)
    assert json.loads((tmp_path / "run.json").read_text())["group_size"] == 32
    with pytest.raises(
        ValueError, match="was begun with group_size=32; group_size must be the same, got -1"
    ):
        gptq_quantize_model(llama(1), [ids()], folder=tmp_path, group_size=-1, progress=False)
    with pytest.raises(ValueError, match="was begun with calibration="):
        gptq_quantize_model(llama(1), [ids(seed=2)], folder=tmp_path, **HOW)
    with pytest.raises(ValueError, match="was begun with model="):
        gptq_quantize_model(llama(1, seed=1), [ids()], folder=tmp_path, **HOW)


class Experts(nn.Module):
    """A block whose experts are modules in a list."""

    def __init__(self, width, count):
        super().__init__()
        self.gate = nn.Linear(width, count)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, 64), "down": nn.Linear(64, width)})
            for _ in range(count)
        )

    def forward(self, hidden):
        flat = hidden.flatten(0, 1)
        chosen = self.gate(flat).argmax(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            mine = (chosen == number).nonzero()[:, 0]
            if len(mine):
                out[mine] = expert["down"](F.relu(expert["up"](flat[mine])))
        return hidden + out.view_as(hidden)


class Stack(nn.Module):
    def __init__(self, block, count=2):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(block() for _ in range(count))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def hidden(rows=20, length=20, width=32, seed=3):
    return torch.randn(rows, length, width, generator=torch.Generator().manual_seed(seed))


def test_an_expert_has_its_own_tokens_or_those_of_all():
    model, x = Stack(lambda: Experts(32, 3), 1), hidden()
    block = model.blocks[0]
    block.gate.bias.data = torch.tensor([1.0, 0.0, -50.0])  # the last is never chosen
    before = copy.deepcopy(block)
    chosen = block.gate(x.flatten(0, 1)).argmax(-1)
    counts = torch.bincount(chosen, minlength=3).tolist()
    assert counts[0] > counts[1] > 0 == counts[2]
    how = {**HOW, "min_expert_tokens": counts[1] + 1}
    report = gptq_quantize_model(model, [x], **how)
    tokens = {layer.name: layer.tokens for layer in report.layers}
    assert "blocks.0.gate" not in tokens
    assert torch.equal(block.gate.weight, before.gate.weight)
    own, union = GPTQ(32), GPTQ(32)
    own.add_batch(x.flatten(0, 1)[chosen == 0])
    union.add_batch(x)
    for number, gptq in enumerate((own, union, union)):
        name = f"blocks.0.experts.{number}.up"
        assert tokens[name] == gptq.tokens
        w = before.experts[number]["up"].weight
        wanted = gptq.quantize(w, group_size=32).q
        assert (report.weights[name].q == wanted).float().mean() > 0.98


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_stacked_experts_are_quantised_one_by_one(implementation):
    model, tokens = mixtral(), ids()
    model.set_experts_implementation(implementation)
    before = copy.deepcopy(model)
    report = gptq_quantize_model(model, [tokens], min_expert_tokens=1, **HOW)
    assert model.config._experts_implementation == implementation
    experts = "model.layers.0.mlp.experts"
    caught = []
    handle = before.get_submodule(experts).register_forward_pre_hook(
        lambda module, args: caught.append(args)
    )
    with torch.no_grad():
        before(tokens)
    handle.remove()
    x, index, _ = caught[0]
    inner = before.get_submodule(experts)
    for number in range(4):
        rows = x[(index == number).any(-1)]
        gate, up = F.linear(rows, inner.gate_up_proj[number]).chunk(2, -1)
        # block 0 sees its experts behind its own unquantised attention
        for own, inputs in (("gate_up_proj", rows), ("down_proj", F.silu(gate) * up)):
            gptq = GPTQ(inputs.shape[-1])
            gptq.add_batch(inputs)
            qw = report.weights[f"{experts}.{own}.{number}"]
            wanted = gptq.quantize(getattr(inner, own)[number], group_size=32)
            assert (qw.q == wanted.q).float().mean() > 0.98
            stack = getattr(model.get_submodule(experts), own)
            assert torch.equal(stack[number], dequantize(qw))
    router = "model.layers.0.mlp.gate.weight"
    assert torch.equal(model.get_parameter(router), before.get_parameter(router))


def test_a_tied_weight_is_quantised_once():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(32, 32)
            self.second = nn.Linear(32, 32)
            self.second.weight = self.first.weight

        def forward(self, x):
            return x + self.second(torch.relu(self.first(x)))

    model, x = Stack(Twins), hidden()
    model.blocks[1].first.weight = model.blocks[0].first.weight
    w = model.blocks[0].first.weight.detach().clone()
    caught = [x, torch.relu(model.blocks[0].first(x))]
    report = gptq_quantize_model(model, [x], **HOW)
    assert [layer.name for layer in report.layers] == ["blocks.0.first", "blocks.1.second"]
    assert set(report.weights) == {
        f"blocks.{i}.{name}" for i in (0, 1) for name in Twins()._modules
    }
    once = report.weights["blocks.0.first"]
    assert report.weights["blocks.0.second"] is once
    assert report.weights["blocks.1.first"] is once
    gptq = GPTQ(32)  # both places' inputs count
    for inputs in caught:
        gptq.add_batch(inputs)
    assert torch.equal(once.q, gptq.quantize(w, group_size=32).q)
    assert torch.equal(model.blocks[1].first.weight, dequantize(once))


def test_rounding_a_whole_model_rounds_every_layer():
    model = llama()
    before = copy.deepcopy(model)
    weights = rtn_quantize_model(model, group_size=32, symmetric=False)
    assert len(weights) == 14
    for name, qw in weights.items():
        wanted = quantize_rtn(before.get_submodule(name).weight, group_size=32, symmetric=False)
        assert torch.equal(model.get_submodule(name).weight, dequantize(wanted))
        assert torch.equal(qw.q, wanted.q)
    with pytest.raises(
        ValueError, match=r"rtn_quantize_model: group_size must be in .* divide K = 64 of"
    ):
        rtn_quantize_model(model, group_size=5)


def test_the_blocks_are_the_longest_outer_list():
    model = Stack(lambda: Experts(32, 5), 2)
    model.extra = nn.ModuleList([nn.Identity() for _ in range(9)])
    assert decoder_blocks("me", model) == ("blocks", model.blocks)
    assert decoder_blocks("me", llama())[0] == "model.layers"
    with pytest.raises(ValueError, match="me: model must have a list of blocks .* got 'Linear'"):
        decoder_blocks("me", nn.Linear(2, 2))


def test_excluded_layers_stay():
    model = llama(1)
    report = gptq_quantize_model(model, [ids()], exclude=("*.mlp.*", "*.o_proj"), **HOW)
    assert {name.rsplit(".", 1)[1] for name in report.weights} == {"q_proj", "k_proj", "v_proj"}


def test_half_precision_weights_stay_half():
    model = llama(1).bfloat16()
    report = gptq_quantize_model(model, [ids()], **HOW)
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.dtype == torch.bfloat16
    qw = report.weights["model.layers.0.self_attn.q_proj"]
    assert qw.scales.dtype == torch.float16
    assert torch.equal(weight, dequantize(qw, torch.bfloat16))


def test_scales_have_the_dtype_that_was_asked_for(tmp_path):
    how = {**HOW, "scale_dtype": torch.bfloat16}
    first = gptq_quantize_model(llama(1), [ids()], folder=tmp_path, **how)
    again = gptq_quantize_model(llama(1), [ids()], folder=tmp_path, **how)
    plain = rtn_quantize_model(llama(1), group_size=32, scale_dtype=torch.bfloat16)
    for weights in (first.weights, again.weights, plain):
        assert {qw.scales.dtype for qw in weights.values()} == {torch.bfloat16}
    assert all(torch.equal(again.weights[name].q, qw.q) for name, qw in first.weights.items())
    with pytest.raises(ValueError, match="was begun with scale_dtype='torch.bfloat16'"):
        gptq_quantize_model(llama(1), [ids()], folder=tmp_path, **HOW)


def test_what_cannot_be_is_named():
    with pytest.raises(ValueError, match="calibration must hold tokens, got 'none'"):
        gptq_quantize_model(llama(1), [], **HOW)
    with pytest.raises(TypeError, match="calibration must yield tensors or mappings, got list"):
        gptq_quantize_model(llama(1), [[1, 2]], **HOW)
    holes = {"input_ids": ids(1, 3), "attention_mask": torch.tensor([[1, 0, 1]])}
    with pytest.raises(ValueError, match="attention_mask must be one run of ones a row"):
        gptq_quantize_model(llama(1), [holes], **HOW)
    with pytest.raises(ValueError, match=r"divide K = 64 of .*q_proj, or be K, got 5"):
        gptq_quantize_model(llama(1), [ids()], group_size=5, progress=False)
    broken = llama(2)
    broken.model.layers[1].input_layernorm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj: Hessian must be finite"):
        gptq_quantize_model(broken, [ids()], **HOW)
    rule = r"blocks.0.spare must be read by torch.nn.functional.linear or x @ W.T; exclude what"
    with pytest.raises(ValueError, match=rule):
        gptq_quantize_model(Stack(Spare, 1), [hidden()], **HOW)


class Spare(nn.Module):
    """A block with a layer that is never used."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(32, 32)
        self.spare = nn.Linear(32, 32)

    def forward(self, x):
        return self.used(x)


def test_blocks_that_are_skipped_are_named():
    class Skipping(Stack):
        def forward(self, x):
            return self.blocks[1](x)

    with pytest.raises(RuntimeError, match="does not call its blocks in their order"):
        gptq_quantize_model(Skipping(Spare), [hidden()], **HOW)
