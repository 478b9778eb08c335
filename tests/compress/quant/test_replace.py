# SPDX-License-Identifier: Apache-2.0
"""Models with four-bit layers, and fused ones, against dense models of the dequantised weights."""

import copy
import gc
import io
import json
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from batchery.compress.quant import (
    QuantizedWeight,
    QuantLinear,
    dequantize,
    fuse_mlps,
    gptq_quantize_model,
    load_quantized,
    quantize_rtn,
    replace_linears,
    rtn_quantize_model,
    save_quantized,
)
from batchery.compress.quant.replace import QuantGatedMLP

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

from batchery.compress.quant.transformers_plugin import transformers_enabled  # noqa: E402

TOKENS = torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(0))
PLAIN = {"group_size": 32}
ACT_ORDER = {"group_size": 32, "symmetric": False, "act_order": True, "static_groups": False}


def decoder(kind="Llama", **settings):
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **heads, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".bias"):
                    parameter.normal_()
    return model


def quantised(model, how):
    """Quantise a model by GPTQ, and return its weights; it is dense still."""
    return gptq_quantize_model(model, [TOKENS], progress=False, **how).weights


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


@pytest.mark.parametrize("how", [PLAIN, ACT_ORDER])
def test_a_replaced_model_says_what_the_quantised_one_said(how):
    model = decoder(tie_word_embeddings=True, attention_bias=True)
    weights = quantised(model, {**how, "exclude": ("*.o_proj",)})
    wanted = logits(model)
    replace_linears(model, weights)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert set(layers) == set(weights)
    for name, layer in layers.items():
        assert torch.equal(layer.dequantize(), dequantize(weights[name]))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    kept = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert kept == {"lm_head", *(f"model.layers.{i}.self_attn.o_proj" for i in (0, 1))}


def test_dense_weights_are_freed():
    model = decoder()
    dense = [weakref.ref(block.mlp.down_proj.weight) for block in model.model.layers]
    replace_linears(model, rtn_quantize_model(model, **PLAIN))
    gc.collect()
    assert [reference() for reference in dense] == [None, None]


def test_a_module_at_two_places_stays_one():
    model = nn.ModuleDict({"first": nn.Linear(64, 32), "other": nn.Linear(64, 32)})
    model["second"] = model["first"]
    model["other"].weight = model["first"].weight
    qw = quantize_rtn(model["first"].weight, group_size=32)
    bias = model["other"].bias.clone()
    replace_linears(model, {"first": qw, "second": qw, "other": qw})
    assert model["first"] is model["second"]
    assert model["other"] is not model["first"]
    assert torch.equal(model["other"].bias, bias)
    model = nn.Sequential(linear := nn.Linear(64, 32), linear)
    replace_linears(model, {"1": qw})
    assert isinstance(model[0], QuantLinear)
    assert model[0] is model[1]


def test_what_cannot_be_replaced_is_named_and_nothing_is():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    qw = quantize_rtn(model[0].weight, group_size=32)
    for name in ("1", "3", "experts.gate_up_proj.0"):
        message = (
            f"replace_linears: weights must name nn.Linear or Conv1D modules, .*, got '{name}'"
        )
        with pytest.raises(ValueError, match=message):
            replace_linears(model, {"0": qw, name: qw})
    with pytest.raises(ValueError, match=r"weights\['2'\] must be \(8, 32\), got \(32, 64\)"):
        replace_linears(model, {"0": qw, "2": qw})
    assert isinstance(model[0], nn.Linear)


def test_weights_that_cannot_be_packed_are_named_and_nothing_is_replaced():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64), nn.Linear(64, 32))
    first = quantize_rtn(model[0].weight, group_size=32)
    rule = r"group_size must be in \(32, 64, 128, 256\) and divide K = 64 of 2, or be K, got 16"
    with pytest.raises(ValueError, match=f"replace_linears: {rule}"):
        replace_linears(model, {"0": first, "2": quantize_rtn(model[2].weight, group_size=16)})
    uneven = QuantizedWeight(first.q, first.scales, None, torch.zeros(64, dtype=torch.int32), 32)
    with pytest.raises(ValueError, match="replace_linears: g_idx must give every group 32 columns"):
        replace_linears(model, {"0": first, "2": uneven})
    assert all(isinstance(layer, nn.Linear) for layer in model)


def by_name(folder):
    with transformers_enabled():
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True
        )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys"))
    return model


@pytest.mark.parametrize("how", [PLAIN, ACT_ORDER, {"group_size": -1}])
@pytest.mark.parametrize("loaded", [False, True])
def test_save_pretrained_writes_what_loads(how, loaded, tmp_path):
    model = decoder(tie_word_embeddings=True, attention_bias=True)
    if loaded:
        model.save_pretrained(tmp_path / "dense")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    replace_linears(model, quantised(model, {**how, "exclude": ("*.o_proj",)}))
    copy.deepcopy(model).save_pretrained(tmp_path / "a")
    save_quantized(model, tmp_path / "b")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in "ab"]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    for again in (by_name(tmp_path / "a"), load_quantized(tmp_path / "a")):
        assert torch.equal(logits(again), logits(model))
        assert again.lm_head.weight is again.model.embed_tokens.weight
    into = load_quantized(
        tmp_path / "a", into=decoder(tie_word_embeddings=True, attention_bias=True)
    )
    into.save_pretrained(tmp_path / "c", max_shard_size="20KB")
    assert torch.equal(logits(by_name(tmp_path / "c")), logits(model))


def test_save_pretrained_writes_a_head_that_was_tied(tmp_path):
    model = decoder(tie_word_embeddings=True)
    replace_linears(model, {"lm_head": quantize_rtn(model.lm_head.weight, group_size=32)})
    model.save_pretrained(tmp_path)
    again = by_name(tmp_path)
    assert isinstance(again.lm_head, QuantLinear)
    assert torch.equal(logits(again), logits(model))


def test_a_model_inside_another_is_saved_alone(tmp_path):
    model = nn.ModuleDict({"inner": decoder()})
    weights = rtn_quantize_model(model["inner"], **PLAIN)
    replace_linears(model, {f"inner.{name}": qw for name, qw in weights.items()})
    model["inner"].save_pretrained(tmp_path)
    assert torch.equal(logits(by_name(tmp_path)), logits(model["inner"]))


def test_save_pretrained_refuses_what_one_config_cannot_say(tmp_path):
    model = decoder()
    weights = rtn_quantize_model(model, **PLAIN)
    name = "model.layers.1.mlp.down_proj"
    whole = quantize_rtn(model.get_submodule(name).weight, group_size=-1)
    replace_linears(model, {**weights, name: whole})
    with pytest.raises(ValueError, match="group_size must be one for all layers"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_whose_layers_are_dense_again_is_saved_as_such(tmp_path):
    model = decoder()
    weights = rtn_quantize_model(model, **PLAIN)
    replace_linears(model, weights)
    model.dequantize().save_pretrained(tmp_path / "a")
    replace_linears(model, weights)
    for name in weights:
        model.set_submodule(name, model.get_submodule(name).to_linear())
    model.save_pretrained(tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["gptq_v1", "gptq_v2", "awq", "compressed-tensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_quantised_is_what_is_loaded(form, dtype, tmp_path):
    model = decoder().to(dtype)
    weights = quantised(model, {**ACT_ORDER, "act_order": form != "awq"})
    replace_linears(model, weights)
    save_quantized(model, tmp_path, format=form)
    for loaded in (
        load_quantized(tmp_path),
        load_quantized(tmp_path, into=decoder().to(dtype)),
    ):
        for name, qw in weights.items():
            layer = loaded.get_submodule(name)
            assert torch.equal(layer.dequantize(torch.float64), dequantize(qw, torch.float64))
            assert layer.scales.dtype == torch.float16


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("how", [PLAIN, ACT_ORDER])
def test_a_fused_model_says_the_same(kind, how):
    bias = {"mlp_bias": True} if kind == "Llama" else {}
    model = decoder(kind, **bias)
    replace_linears(model, quantised(model, how))
    before = copy.deepcopy(model)
    assert fuse_mlps(model) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert fuse_mlps(model) == []
    torch.testing.assert_close(logits(model), logits(before), rtol=1e-5, atol=1e-5)
    mlp, old = model.model.layers[1].mlp, before.model.layers[1].mlp
    assert isinstance(mlp, QuantGatedMLP)
    assert not mlp.training
    assert mlp.down_proj.g_idx is None
    assert (old.down_proj.g_idx is None) == (how is PLAIN)
    gate_up = mlp.gate_up_proj.dequantize()
    halves = torch.cat([old.gate_proj.dequantize(), old.up_proj.dequantize()])
    moved = (
        halves if how is PLAIN else halves[torch.cat([old.down_proj.order + i for i in (0, 96)])]
    )
    assert torch.equal(gate_up, moved)
    grown = model.generate(TOKENS[:, :8], max_new_tokens=4, do_sample=False, pad_token_id=0)
    wanted = before.generate(TOKENS[:, :8], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(grown, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_is_fused(dtype):
    model = decoder().to(dtype)
    replace_linears(model, rtn_quantize_model(model, **PLAIN))
    wanted = logits(model).float()
    assert len(fuse_mlps(model)) == 2
    assert model.model.layers[0].mlp.gate_up_proj.dtype == dtype
    error = (logits(model).float() - wanted).norm() / wanted.norm()
    assert error < (
        2e-2 if dtype == torch.bfloat16 else 3e-3
    )  # silu·up is rounded once, not thrice


class MLP(nn.Module):
    """An MLP of three projections with any form."""

    def __init__(self, form, width=64, inner=96):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner), nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, width)
        self.form = form

    def forward(self, x):
        return self.form(self.gate_proj(x), self.up_proj(x), self.down_proj)


def stack(form, change=lambda mlp: None, **how):
    model = nn.Sequential(MLP(form))
    change(model[0])
    weights = {
        f"0.{name}": quantize_rtn(module.weight, group_size=32)
        for name, module in model[0].named_children()
        if isinstance(module, nn.Linear) and name in ("gate_proj", "up_proj", "down_proj")
    }
    replace_linears(model, weights)
    return model


def silu(gate, up, down):
    return down(F.silu(gate) * up)


@pytest.mark.parametrize(
    "form",
    [
        lambda gate, up, down: down(F.gelu(gate, approximate="tanh") * up),
        lambda gate, up, down: down(F.gelu(gate) * up),
        lambda gate, up, down: down(F.relu(gate) * up),
        lambda gate, up, down: down(F.silu(0.98 * gate) * up),
        lambda gate, up, down: 0.99 * down(F.silu(gate) * up),
        lambda gate, up, down: down(F.silu(up) * gate),
        lambda gate, up, down: 1.0005 * down(F.silu(gate) * up),
        lambda gate, up, down: down(F.silu(gate) * up.clamp(-2, 2)),
        lambda gate, up, down: down(F.silu(gate) * up.clamp(-1000, 1000)),
        lambda gate, up, down: down(F.silu(gate.clamp(max=20)) * up.clamp(-20, 20)),
        lambda gate, up, down: (down(F.silu(gate) * up),),
        lambda gate, up: gate,
    ],
)
def test_an_mlp_of_another_form_stays(form):
    assert fuse_mlps(stack(silu)) == ["0"]
    model = stack(form)
    assert fuse_mlps(model) == []
    assert isinstance(model[0], MLP)


def _no_bias(mlp):
    mlp.up_proj = nn.Linear(64, 96, bias=False)


def _two_more(mlp):
    mlp.act_fn, mlp.dropout = nn.SiLU(), nn.Dropout()


@pytest.mark.parametrize("change", [_no_bias, _two_more])
def test_an_mlp_with_other_parts_stays(change):
    assert fuse_mlps(stack(silu, change)) == []


def test_gate_and_up_of_different_order_or_groups_stay():
    generator = torch.Generator().manual_seed(0)
    model = stack(silu)
    gate = model[0].gate_proj
    qw = gate.quantized_weight()
    g_idx = (torch.arange(64) // 32)[torch.randperm(64, generator=generator)].int()
    other = QuantizedWeight(qw.q, qw.scales, None, g_idx, 32)
    model[0].gate_proj = QuantLinear.from_quantized(other, gate.bias)
    assert fuse_mlps(model) == []
    whole = quantize_rtn(gate.dequantize(), group_size=-1)
    model[0].gate_proj = QuantLinear.from_quantized(whole, gate.bias)
    assert fuse_mlps(model) == []
    model[0].gate_proj = gate
    model[0].down_proj = nn.Linear(96, 64)
    assert fuse_mlps(model) == []
    assert fuse_mlps(stack(silu)[0]) == []  # the model is the MLP: it has no place


def test_gelu_models_stay_as_they_are():
    model = decoder("Gemma")
    replace_linears(model, rtn_quantize_model(model, **PLAIN))
    assert fuse_mlps(model) == []


def test_a_fused_state_is_portable_but_no_folder(tmp_path):
    model = decoder()
    replace_linears(model, quantised(model, ACT_ORDER))
    fuse_mlps(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = decoder()
    replace_linears(other, rtn_quantize_model(other, group_size=-1))
    fuse_mlps(other)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(logits(other), logits(model))
    rule = r"must not be fused: .* got \['model.layers.0.mlp.gate_up_proj'"
    for save in (lambda: save_quantized(model, tmp_path), lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match=f"save_quantized: model {rule}"):
            save()
    assert not list(tmp_path.iterdir())


def test_a_fused_mlp_compiles_without_a_break():
    model = stack(silu)
    fuse_mlps(model)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))


def test_a_module_that_reads_a_dense_weight_says_what_to_do():
    settings = {"vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4}
    model = transformers.T5EncoderModel(transformers.T5Config(**settings, num_layers=1)).eval()
    replace_linears(model, rtn_quantize_model(model, **PLAIN))
    with pytest.raises(AttributeError, match="QuantLinear has no dense weight: exclude the layer"):
        model(TOKENS)


def test_a_report_in_the_place_of_its_weights_is_named():
    model = decoder()
    report = gptq_quantize_model(model, [TOKENS], progress=False, **PLAIN)
    for wrong in (report, list(report.weights)):
        kind = type(wrong).__name__
        rule = f"replace_linears: weights must be a mapping: pass report.weights, got {kind}"
        with pytest.raises(TypeError, match=rule):
            replace_linears(model, wrong)
    with pytest.raises(TypeError, match="replace_linears: model must be a module, got NoneType"):
        replace_linears(None, report.weights)
