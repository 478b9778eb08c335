# SPDX-License-Identifier: Apache-2.0
"""Experts in modules against transformers' stacks, in models of a few thousand weights."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import MixtralExperts  # noqa: E402

from batchery.compress.quant import (  # noqa: E402
    GPTQ,
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
from batchery.compress.quant.experts import QuantExperts, unstacked  # noqa: E402
from batchery.compress.quant.replace import QuantGatedMLP  # noqa: E402
from batchery.compress.quant.stacks import is_stacked  # noqa: E402
from batchery.compress.quant.transformers_plugin import transformers_enabled  # noqa: E402

TOKENS = torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(0))
PLAIN = {"group_size": 32}
ACT_ORDER = {"group_size": 32, "symmetric": False, "act_order": True, "static_groups": False}
KINDS = {
    "Mixtral": {"num_local_experts": 4, "intermediate_size": 96},
    "Qwen2Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 64,
    },
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
}
every = pytest.mark.parametrize("kind", KINDS)
HOME = "model.layers.0.mlp.experts"


def decoder(kind="Mixtral", seed=0, **settings):
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **heads, **KINDS[kind], **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.gate.weight.normal_()  # routes that differ
                for stack in layer.mlp.experts.parameters():
                    stack.normal_(std=0.1)
    return model


def quantised(model, how, **more):
    return gptq_quantize_model(
        model, [TOKENS], progress=False, min_expert_tokens=1, **how, **more
    ).weights


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def stack(width=64, inner=96, experts=4, dtype=torch.float64):
    config = transformers.MixtralConfig(
        hidden_size=width, intermediate_size=inner, num_local_experts=experts
    )
    config._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(0)
    module = MixtralExperts(config).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return module


def routed(tokens=10, experts=4, width=64, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, width, generator=generator, dtype=dtype)
    shares, index = torch.rand(tokens, experts, generator=generator, dtype=dtype).topk(2)
    return x, index, shares


def test_a_list_of_experts_follows_the_equation():
    module = stack()
    x, index, shares = routed()
    index[index == 2] = 0  # nobody's; some tokens may stand twice with one expert
    index[:, 1] = torch.where(index[:, 1] == index[:, 0], 3 - index[:, 0], index[:, 1])
    wanted = torch.zeros_like(x)
    for t in range(len(x)):
        for e, p in zip(index[t], shares[t], strict=True):
            gate, up = (module.gate_up_proj[e] @ x[t]).chunk(2)
            wanted[t] += p * (module.down_proj[e] @ (gate * torch.sigmoid(gate) * up))
    found = unstacked(module)(x, index, shares)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(module(x, index, shares), wanted, rtol=1e-10, atol=1e-10)
    assert unstacked(module)(x[:0], index[:0], shares[:0]).shape == (0, 64)


def test_gradients_reach_tokens_and_shares():
    module = stack()
    x, index, shares = routed()
    found = []
    for form in (module, unstacked(module)):
        own, part = x.clone().requires_grad_(), shares.clone().requires_grad_()
        form(own, index, part).square().sum().backward()
        found.append((own.grad, part.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("kind", "how"), [("Mixtral", ACT_ORDER), ("Qwen2Moe", PLAIN), ("Qwen3Moe", ACT_ORDER)]
)
def test_a_replaced_model_says_what_the_quantised_one_said(kind, how):
    model = decoder(kind)
    weights = quantised(model, how)
    wanted = logits(model)
    replace_linears(model, weights)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
    assert not any(parameter.dim() == 3 for parameter in model.parameters())
    for layer in model.model.layers:
        assert isinstance(layer.mlp.experts, QuantExperts)
        assert not layer.mlp.experts.training
    names = ("w1", "w3", "w2") if kind == "Mixtral" else ("gate_proj", "up_proj", "down_proj")
    for number, expert in enumerate(model.get_submodule(HOME)):
        gate, up, down = (expert.get_submodule(name).dequantize() for name in names)
        both = weights[f"{HOME}.gate_up_proj.{number}"]
        assert torch.equal(torch.cat([gate, up]), dequantize(both))
        assert torch.equal(down, dequantize(weights[f"{HOME}.down_proj.{number}"]))


@every
def test_gptq_loses_less_than_rounding_in_every_layer_of_experts(kind):
    model = decoder(kind)
    report = gptq_quantize_model(
        model, [TOKENS], group_size=32, min_expert_tokens=1, progress=False
    )
    lost, rounded = {}, {}
    for layer in report.layers:
        if ".experts." in layer.name:
            home = layer.name.rpartition(".")[0]
            lost[home] = lost.get(home, 0) + layer.error
            rounded[home] = rounded.get(home, 0) + layer.rtn_error
    assert len(lost) == 2
    assert all(lost[home] < 0.9 * rounded[home] for home in lost)


def test_an_expert_without_tokens_takes_those_of_all():
    model = decoder(num_local_experts=5)
    for layer in model.model.layers:
        router = layer.mlp.gate.weight.data
        router[1], router[3], router[4] = -router[0], -router[2], 0  # two are always above 0
    before = copy.deepcopy(model.model.layers[0].mlp.experts)
    caught = []
    handle = model.get_submodule(HOME).register_forward_pre_hook(
        lambda module, args: caught.append(args)
    )
    logits(model)
    handle.remove()
    x, index, _ = caught[0]
    assert torch.bincount(index.flatten(), minlength=5)[4] == 0
    report = gptq_quantize_model(
        model, [TOKENS], group_size=32, min_expert_tokens=1, progress=False
    )
    tokens = {layer.name: layer.tokens for layer in report.layers}
    union = GPTQ(64)
    for number in range(4):
        rows = x[(index == number).any(-1)]
        union.add_batch(rows)
        assert tokens[f"{HOME}.gate_up_proj.{number}"] == len(rows)
    assert tokens[f"{HOME}.gate_up_proj.4"] == union.tokens == 2 * TOKENS.numel()
    wanted = union.quantize(before.gate_up_proj[4], group_size=32)
    found = report.weights[f"{HOME}.gate_up_proj.4"]
    assert (found.q == wanted.q).float().mean() > 0.98
    wanted = logits(model)
    replace_linears(model, report.weights)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)


def test_sums_are_as_wide_as_the_model():
    model = decoder(num_local_experts=5).double()
    model.set_experts_implementation("eager")  # grouped products know no float64
    before, caught = copy.deepcopy(model.get_submodule(HOME)), []
    hook = model.get_submodule(HOME).register_forward_pre_hook(lambda _, args: caught.append(args))
    logits(model)
    hook.remove()
    x, index, _ = caught[0]
    counts = torch.bincount(index.flatten(), minlength=5)
    enough = int(counts.max())  # the others take the inputs of all
    report = gptq_quantize_model(
        model, [TOKENS], group_size=32, min_expert_tokens=enough, scale_dtype=None, progress=False
    )
    errors = {layer.name: layer.error for layer in report.layers}
    for number, count in enumerate(counts.tolist()):
        rows = x[(index == number).any(-1)] if count == enough else x
        name, w = f"{HOME}.gate_up_proj.{number}", before.gate_up_proj[number].detach()
        lost = rows @ (dequantize(report.weights[name], torch.float64) - w).T
        wanted = float(lost.square().sum() / (rows @ w.T).square().sum())
        assert errors[name] == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("Mixtral", "gptq_v2"),
        ("Mixtral", "awq"),
        ("Qwen2Moe", "gptq_v1"),
        ("Qwen3Moe", "compressed-tensors"),
    ],
)
def test_what_was_saved_is_loaded(kind, form, tmp_path):
    model = decoder(kind)
    how = {**ACT_ORDER, "act_order": form != "awq"}
    replace_linears(model, quantised(model, how))
    wanted = logits(model)
    if form == "gptq_v2":
        model.save_pretrained(tmp_path)  # writes that one
    else:
        save_quantized(model, tmp_path, format=form)
    names = load_file(tmp_path / "model.safetensors").keys()
    inner = "block_sparse_moe" if kind == "Mixtral" else "mlp"
    own = "w2" if kind == "Mixtral" else "down_proj"
    word = "weight_packed" if form == "compressed-tensors" else "qweight"
    assert f"model.layers.0.{inner}.experts.3.{own}.{word}" in names
    assert f"model.layers.0.{inner}.gate.weight" in names
    for loaded in (load_quantized(tmp_path), load_quantized(tmp_path, into=decoder(kind, 1))):
        assert isinstance(loaded.model.layers[0].mlp.experts, QuantExperts)
        assert torch.equal(logits(loaded), wanted)


def test_routers_are_named_among_what_is_not_quantised(tmp_path):
    model = decoder()
    replace_linears(model, rtn_quantize_model(model, **PLAIN))
    save_quantized(model, tmp_path, format="compressed-tensors")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head", "model.layers.0.block_sparse_moe.gate"]


@every
def test_transformers_loads_saves_and_dequantises(kind, tmp_path):
    model = decoder(kind)
    replace_linears(model, rtn_quantize_model(model, **PLAIN))
    save_quantized(model, tmp_path / "a")
    with transformers_enabled():
        auto = transformers.AutoModelForCausalLM
        loaded, report = auto.from_pretrained(tmp_path / "a", output_loading_info=True)
        assert not any(report[what] for what in ("missing_keys", "unexpected_keys"))
        loaded.save_pretrained(tmp_path / "b")
        assert torch.equal(logits(auto.from_pretrained(tmp_path / "b")), logits(model))
        dense = loaded.dequantize()
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-5, atol=1e-5)
    dense.save_pretrained(tmp_path / "c")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert is_stacked(plain.get_submodule(HOME))
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)


def test_experts_may_stay_dense_in_whole_layers(tmp_path):
    two = {"num_hidden_layers": 2}
    model = decoder("Qwen3Moe", **two)
    replace_linears(model, rtn_quantize_model(model, exclude=("*.gate", f"{HOME}.*"), **PLAIN))
    assert is_stacked(model.get_submodule(HOME))
    wanted = logits(model)
    save_quantized(model, tmp_path)
    into = decoder("Qwen3Moe", 1, **two)
    for loaded in (load_quantized(tmp_path), load_quantized(tmp_path, into=into)):
        assert is_stacked(loaded.get_submodule(HOME))
        assert not is_stacked(loaded.model.layers[1].mlp.experts)
        torch.testing.assert_close(logits(loaded), wanted, rtol=1e-6, atol=1e-6)


def test_some_experts_of_a_layer_alone_are_refused(tmp_path):
    model = decoder("Qwen3Moe")
    weights = rtn_quantize_model(model, **PLAIN)
    less = {name: qw for name, qw in weights.items() if name != f"{HOME}.down_proj.2"}
    rule = rf"weights must have all experts of {HOME}, got \['{HOME}.down_proj.2'\]"
    with pytest.raises(ValueError, match=f"replace_linears: {rule}"):
        replace_linears(model, less)
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)
    replace_linears(model, weights)
    save_quantized(model, tmp_path)
    file = tmp_path / "model.safetensors"
    gone = f"{HOME}.1.up_proj."
    tensors = {name: t for name, t in load_file(file).items() if not name.startswith(gone)}
    dense = model.get_submodule(gone[:-1]).dequantize()
    save_file({**tensors, f"{gone}weight": dense}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{HOME} must be quantised as a whole, got .*1.up_proj"):
        load_quantized(tmp_path)
    into = load_quantized(tmp_path, into=decoder("Qwen3Moe", 1))  # here they load as they are
    torch.testing.assert_close(logits(into), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "how"), [("Mixtral", ACT_ORDER), ("Qwen2Moe", PLAIN)])
def test_experts_are_fused_like_other_mlps(kind, how):
    model = decoder(kind)
    replace_linears(model, quantised(model, how))
    wanted = logits(model)
    found = fuse_mlps(model)
    assert {name for name in found if ".experts." in name} == {f"{HOME}.{e}" for e in range(4)}
    assert all(isinstance(expert, QuantGatedMLP) for expert in model.get_submodule(HOME))
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)


def test_experts_in_modules_can_be_quantised_again(tmp_path):
    model = decoder()
    replace_linears(model, rtn_quantize_model(model, **PLAIN))
    save_quantized(model, tmp_path)
    dense = load_quantized(tmp_path).dequantize()
    weights = quantised(dense, ACT_ORDER)
    assert f"{HOME}.down_proj.3" in weights  # in a stack again
    wanted = logits(dense)
    replace_linears(dense, weights)
    torch.testing.assert_close(logits(dense), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_four_bit_experts_follow_the_equation(device):
    model = nn.ModuleDict({"experts": stack()})
    weights = {}
    for own, stacked in model["experts"].named_parameters():
        for number, weight in enumerate(stacked.detach()):
            qw = quantize_rtn(weight, group_size=32)
            weight.copy_(dequantize(qw, torch.float64))
            weights[f"experts.{own}.{number}"] = qw
    x, index, shares = routed(tokens=40)
    wanted = model["experts"](x, index, shares)
    replace_linears(model, weights)
    experts = model.to(device)["experts"]
    found = experts(x.to(device).half(), index.to(device), shares.to(device).half())
    assert found.dtype == torch.float16
    assert float((found.cpu().double() - wanted).norm() / wanted.norm()) < 2e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(dtype, tmp_path):
    model = decoder().to(dtype)
    weights = rtn_quantize_model(model, **PLAIN)
    wanted = logits(model).float()
    replace_linears(model, weights)
    save_quantized(model, tmp_path)
    for other in (model, load_quantized(tmp_path)):
        assert logits(other).dtype == dtype
        layers = [m for m in other.modules() if isinstance(m, QuantLinear)]
        assert {layer.dtype for layer in layers} == {dtype}
        assert float((logits(other).float() - wanted).norm() / wanted.norm()) < 2e-2


def test_experts_of_another_form_stay_and_are_named():
    assert is_stacked(stack())

    class ClampedExperts(MixtralExperts):
        def _apply_gate(self, both):
            gate, up = both.chunk(2, -1)
            return F.silu(gate.clamp(max=7)) * up

    assert not is_stacked(ClampedExperts(stack().config))
    for name, value in (("has_gate", False), ("has_post_expert_norm", True)):
        module = stack()
        setattr(module, name, value)
        assert not is_stacked(module)
    assert not is_stacked(nn.Linear(2, 2))
    model = decoder()
    weights = rtn_quantize_model(model, **PLAIN)
    for layer in model.model.layers:
        layer.mlp.experts.__class__ = ClampedExperts
    before = copy.deepcopy(model.state_dict())
    rule = rf"exclude must hold '\*\.experts\.\*', as {HOME} is of no known form"
    with pytest.raises(ValueError, match=f"rtn_quantize_model: {rule}"):
        rtn_quantize_model(model, **PLAIN)
    with pytest.raises(ValueError, match=f"gptq_quantize_model: {rule}"):
        quantised(model, PLAIN)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    rest = copy.deepcopy(model)
    replace_linears(rest, quantised(rest, PLAIN, exclude=("*.gate", "*.experts.*")))
    rule = "weights must name nn.Linear or Conv1D modules, or experts of a known form"
    with pytest.raises(ValueError, match=f"replace_linears: {rule}, got '{HOME}.gate_up_proj.0'"):
        replace_linears(model, weights)
