# SPDX-License-Identifier: Apache-2.0
"""Families of decoders that are built in their own way, from quantising to loading.

GPT-2's layers are `Conv1D`, Jamba's and Zamba's lists of blocks have two classes, gpt-oss's and
Llama 4's stacks of experts are transposed.
"""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from four_bits import SIZES, close, inputs
from torch import nn

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

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
from batchery.compress.quant.conv1d import as_conv1d, as_linear, linear_weight  # noqa: E402
from batchery.compress.quant.experts import (  # noqa: E402
    QuantExperts,
    ScaledExperts,
    restack,
    unstacked,
)
from batchery.compress.quant.stacks import expert_weights, is_stacked  # noqa: E402
from batchery.compress.quant.targets import decoder_blocks  # noqa: E402
from batchery.compress.quant.transformers_plugin import transformers_enabled  # noqa: E402

TOKENS = torch.randint(1, 64, (4, 24), generator=torch.Generator().manual_seed(0))
ACT_ORDER = {"group_size": 32, "symmetric": False, "act_order": True, "static_groups": False}

GPT2 = {"vocab_size": 64, "n_embd": 64, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
EXPERTS = {"num_hidden_layers": 1, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"mamba_d_state": 16, "mamba_dt_rank": 16}
KINDS = {
    "GPT2LMHead": {**GPT2, "n_layer": 2},
    "OpenAIGPTLMHead": {**GPT2, "n_layer": 2},
    "JambaForCausalLM": {
        **SIZES,
        **MAMBA,
        "num_hidden_layers": 3,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 3,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "ZambaForCausalLM": {
        **SIZES,
        **MAMBA,
        "num_hidden_layers": 6,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "n_mamba_heads": 2,
    },
    "GptOssForCausalLM": {**SIZES, **EXPERTS},
    "Llama4ForCausalLM": {**SIZES, **EXPERTS, "intermediate_size_mlp": 128},
}
every = pytest.mark.parametrize("kind", KINDS)
of_experts = pytest.mark.parametrize("kind", ["GptOssForCausalLM", "Llama4ForCausalLM"])


def decoder(kind, seed=0):
    named = {"Llama4ForCausalLM": "Llama4Text", "GPT2LMHead": "GPT2"}
    name = named.get(kind, kind.removesuffix("ForCausalLM").removesuffix("LMHead"))
    config = getattr(transformers, f"{name}Config")(**KINDS[kind])
    whole = kind if kind.endswith("LM") else f"{kind}Model"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, whole)(config).eval()
        with torch.no_grad():
            for module in model.modules():
                if linear_weight(module) is not None:
                    linear_weight(module).normal_(std=0.2)
            for own, parameter in model.named_parameters():
                if own.endswith(("bias", "router.weight")):  # routes that differ
                    parameter.normal_(std=0.5)
                elif ".experts." in own:
                    parameter.normal_(std=0.3)
    return model


def quantised(model, **how):
    how = {"group_size": 32, **how}
    return gptq_quantize_model(model, [TOKENS], progress=False, min_expert_tokens=1, **how)


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def states(model, home):
    """What the blocks of a list of that name give."""
    found = []
    blocks = model.get_submodule(home)

    def seen(block, args, out):
        found.append(out[0] if isinstance(out, tuple | list) else out)

    handles = [block.register_forward_hook(seen) for block in blocks]
    logits(model)
    for handle in handles:
        handle.remove()
    assert len(found) == len(blocks)
    return found


@every
@pytest.mark.parametrize("how", [{}, ACT_ORDER], ids=["plain", "act-order"])
def test_a_replaced_model_says_what_the_quantised_one_said(kind, how):
    model = decoder(kind)
    dense = logits(model)
    report = quantised(model, **how)
    assert all(layer.error < layer.rtn_error for layer in report.layers)
    home, _ = decoder_blocks("me", model)
    wanted, blocks = logits(model), states(model, home)
    assert (wanted - dense).abs().max() > 1e-3
    replace_linears(model, report.weights)
    close(logits(model), wanted)
    for found, own in zip(states(model, home), blocks, strict=True):
        close(found, own)
    left = {name for name, m in model.named_modules() if linear_weight(m) is not None}
    assert {name.rpartition(".")[2] for name in left} <= {"lm_head", "router", "dt_proj"}


@every
def test_rounding_rounds_every_weight_as_it_is_multiplied(kind):
    model = decoder(kind)
    before = copy.deepcopy(model)
    weights = rtn_quantize_model(model, group_size=32)
    for name, qw in weights.items():
        home, _, own = name.rpartition(".")
        if own.isdigit():
            home, _, stack = home.rpartition(".")
            one, two = (
                expert_weights(m.get_submodule(home))[stack][int(own)] for m in (before, model)
            )
        else:
            one, two = (linear_weight(m.get_submodule(name)) for m in (before, model))
        wanted = quantize_rtn(one, group_size=32)
        assert torch.equal(qw.q, wanted.q)
        assert torch.equal(two, dequantize(wanted))


@every
@pytest.mark.parametrize("form", ["gptq_v2", "compressed-tensors"])
def test_what_was_saved_is_loaded(kind, form, tmp_path):
    model = decoder(kind)
    weights = rtn_quantize_model(model, group_size=32)
    wanted = logits(model)
    replace_linears(model, weights)
    save_quantized(model, tmp_path / "a", format=form)
    with transformers_enabled():
        auto = transformers.AutoModelForCausalLM
        found, report = auto.from_pretrained(tmp_path / "a", output_loading_info=True)
        assert not any(report[what] for what in ("missing_keys", "unexpected_keys"))
        into = load_quantized(tmp_path / "a", into=decoder(kind, 1))
        for loaded in (found, load_quantized(tmp_path / "a"), into):
            close(logits(loaded), wanted)
            count = sum(isinstance(m, QuantLinear) for m in loaded.modules())
            assert count == sum(isinstance(m, QuantLinear) for m in model.modules()) > 0
        found.save_pretrained(tmp_path / "b")
        close(logits(auto.from_pretrained(tmp_path / "b")), wanted)


@every
def test_a_dense_model_has_its_own_classes_again(kind, tmp_path):
    model = decoder(kind)
    classes = {name: type(m) for name, m in model.named_modules()}
    weights = rtn_quantize_model(model, group_size=32)
    tensors = {name: x.clone() for name, x in model.state_dict().items()}
    replace_linears(model, weights)
    save_quantized(model, tmp_path / "a")
    for loaded in (model, load_quantized(tmp_path / "a")):
        dense = loaded.dequantize()
        assert {name: type(m) for name, m in dense.named_modules()} == classes
        found = dense.state_dict()
        assert found.keys() == tensors.keys()
        for name, x in tensors.items():
            close(found[name], x)
    dense.save_pretrained(tmp_path / "b")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    close(logits(plain), logits(dense))


def test_a_loaded_gpt_2_writes_the_text_of_the_dense_one(tmp_path):
    model = decoder("GPT2LMHead")
    replace_linears(model, quantised(model).weights)
    save_quantized(model, tmp_path)
    loaded = load_quantized(tmp_path)
    assert isinstance(loaded.transformer.h[0].attn.c_attn, QuantLinear)
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    wanted = model.dequantize().generate(TOKENS[:1], **how)
    assert torch.equal(loaded.generate(TOKENS[:1], **how), wanted)


def test_files_of_gpt_2_have_the_tensors_of_linear_layers(tmp_path):
    model = decoder("GPT2LMHead")
    kept = ("*.attn.*", "lm_head")
    replace_linears(model, rtn_quantize_model(model, group_size=32, exclude=kept))
    save_quantized(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    home = "transformer.h.1.mlp.c_fc"
    assert tensors[f"{home}.qweight"].shape == (64 // 8, 256)
    assert tensors[f"{home}.scales"].shape == (64 // 32, 256)
    assert tensors[f"{home}.bias"].shape == (256,)
    assert tensors["transformer.h.1.attn.c_attn.weight"].shape == (64, 192)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert r"-:^transformer\.h\.1\.attn\.c_attn$" in config["dynamic"]
    assert isinstance(load_quantized(tmp_path).transformer.h[1].attn.c_attn, Conv1D)


class Stack(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("how", [{"group_size": 32}, ACT_ORDER, {"clip_search": True}])
@pytest.mark.parametrize("size", [64, 96])
def test_gptq_of_a_conv1d_is_that_of_the_linear_layer(how, size):
    linear, x = nn.Linear(64, size), inputs(4, 20, 64)
    linear.weight.data = inputs(size, 64, seed=1)
    conv = as_conv1d(linear)
    assert isinstance(conv, Conv1D)
    assert torch.equal(conv.weight, linear.weight.T)
    how = {"group_size": -1, "progress": False, **how}
    one, two = Stack(linear), Stack(conv)
    wanted, found = (gptq_quantize_model(model, [x], **how) for model in (one, two))
    for part in ("q", "scales", "zeros", "g_idx"):
        own, other = (getattr(report.weights["blocks.0"], part) for report in (wanted, found))
        assert own is other is None or torch.equal(own, other)
    assert torch.equal(conv.weight, linear.weight.T)
    assert found.layers[0].error == pytest.approx(wanted.layers[0].error, rel=1e-5)


def test_a_conv1d_goes_there_and_back():
    conv = Conv1D(48, 64).eval()
    nn.init.normal_(conv.bias)
    linear = as_linear(conv)
    x = inputs(3, 64)
    close(linear(x), conv(x))
    assert linear.weight.data_ptr() == conv.weight.data_ptr()
    qw = quantize_rtn(linear.weight, group_size=32)
    layer = QuantLinear.from_linear(conv, qw)
    assert not layer.training
    dense = copy.deepcopy(layer).to_dense()
    assert type(dense) is Conv1D
    assert torch.equal(dense.weight, dequantize(qw).T)
    assert dense.weight.is_contiguous()
    close(dense(x), layer(x))
    assert type(layer.to_linear()) is nn.Linear  # what adapters are merged into
    plain = QuantLinear.from_linear(nn.Linear(64, 48), qw)
    assert type(plain.to_dense()) is nn.Linear


class Turned(Conv1D):
    """Multiplies by its weight, not by the transpose; its name tells of nothing."""

    def forward(self, x):
        return x @ self.weight.T


Turned.__name__ = "Conv1D"


def test_a_square_conv1d_that_multiplies_by_its_transpose_is_named():
    with pytest.raises(ValueError, match=r"blocks\.0 must be read by torch\.nn\.functional"):
        gptq_quantize_model(
            Stack(Turned(64, 64)), [inputs(4, 8, 64)], progress=False, group_size=-1
        )


def test_blocks_of_several_classes_must_each_hold_a_linear_layer():
    def wide():
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    mixed = Stack(nn.Linear(8, 8), wide(), nn.Linear(8, 8))
    assert decoder_blocks("me", mixed) == ("blocks", mixed.blocks)
    alike = Stack(wide(), nn.Sequential(nn.ReLU()))
    assert decoder_blocks("me", alike) == ("blocks", alike.blocks)
    inner = Stack(wide(), wide())
    outer = nn.ModuleDict({"parts": nn.ModuleList([nn.ReLU(), inner])})
    assert decoder_blocks("me", outer) == ("parts.1.blocks", inner.blocks)
    with pytest.raises(ValueError, match="me: model must have a list of blocks with linear layers"):
        decoder_blocks("me", Stack(nn.Linear(8, 8), nn.ReLU()))


def test_weights_that_blocks_share_are_quantised_once():
    model = decoder("ZambaForCausalLM")
    report = quantised(model)
    own = {
        name: qw for name, qw in report.weights.items() if name.endswith("feed_forward.down_proj")
    }
    assert len(own) == 2
    assert len({id(qw) for qw in own.values()}) == 1
    assert sum(layer.name in own for layer in report.layers) == 1


def test_mamba_multiplies_by_dt_proj_itself():
    model = decoder("JambaForCausalLM")
    assert not any("dt_proj" in name for name in quantised(model).weights)
    rule = r"mamba\.dt_proj must be read by torch\.nn\.functional\.linear or x @ W\.T; exclude"
    with pytest.raises(ValueError, match=rule):
        quantised(model, exclude=("lm_head", "*.router"), group_size=-1)


def caught_experts(kind):
    """A model, the name of its first experts and what they are called with."""
    model = decoder(kind)
    home = next(name for name, m in model.named_modules() if is_stacked(m))
    caught = []
    handle = model.get_submodule(home).register_forward_pre_hook(
        lambda module, args: caught.append(args)
    )
    logits(model)
    handle.remove()
    return model, home, caught[0]


def wide(stack, args):
    """Experts in float64 and what they are called with."""
    stack = copy.deepcopy(stack).double()
    if hasattr(stack, "config"):
        stack.config._experts_implementation = "eager"  # grouped products know no float64
    return stack, [arg.double() if arg.is_floating_point() else arg for arg in args]


def equation(kind, experts, number, x):
    """One expert by its formula, from the stacks as transformers documents them."""
    both, down = experts.gate_up_proj[number], experts.down_proj[number]
    if kind.startswith("Llama4"):
        gate, up = (x @ both).chunk(2, -1)
        return (up * F.silu(gate)) @ down
    joint = x @ both + experts.gate_up_proj_bias[number]
    gate, up = joint[:, 0::2].clamp(max=7.0), joint[:, 1::2].clamp(-7.0, 7.0)
    inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return inner @ down + experts.down_proj_bias[number]


@of_experts
@torch.no_grad()
def test_a_list_of_experts_follows_the_equation(kind):
    model, home, args = caught_experts(kind)
    stack, args = wide(model.get_submodule(home), args)
    args[0] = args[0] * 20  # beyond limits
    experts = unstacked(stack)
    assert type(experts) is (ScaledExperts if kind.startswith("Llama4") else QuantExperts)
    x = args[0]
    wanted = torch.zeros_like(x)
    if kind.startswith("Llama4"):
        for number, (own, out) in enumerate(zip(x.chunk(4), wanted.chunk(4), strict=True)):
            out.copy_(equation(kind, stack, number, own))
    else:
        for t in range(len(x)):
            for number, share in zip(args[1][t], args[2][t], strict=True):
                wanted[t] += share * equation(kind, stack, number, x[t : t + 1])[0]
    torch.testing.assert_close(experts(*args), wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(stack(*args), wanted, rtol=1e-10, atol=1e-10)


@of_experts
def test_gradients_reach_tokens_and_shares(kind):
    model, home, args = caught_experts(kind)
    stack, args = wide(model.get_submodule(home), args)
    found = []
    for form in (stack, unstacked(stack)):
        own = [arg.clone().requires_grad_() if arg.is_floating_point() else arg for arg in args]
        form(*own).square().sum().backward()
        found.append([arg.grad for arg in own if arg.is_floating_point()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@of_experts
def test_a_stack_goes_there_and_back(kind):
    model, home, args = caught_experts(kind)
    stack = model.get_submodule(home)
    holder = nn.ModuleDict({"experts": unstacked(stack)})
    with torch.no_grad():
        wanted = stack(*args)
        close(holder["experts"](*args), wanted)
        restack(holder)
        close(holder["experts"](*args), wanted)
    assert type(holder["experts"]) is type(stack)
    found = dict(holder["experts"].named_parameters())
    assert found.keys() == dict(stack.named_parameters()).keys()
    for name, parameter in stack.named_parameters():
        assert torch.equal(found[name], parameter)
        assert found[name].is_contiguous()


@of_experts
def test_an_expert_is_quantised_for_its_own_tokens(kind):
    model, home, args = caught_experts(kind)
    linears = [name for name, m in model.named_modules() if type(m) is nn.Linear]
    stack = copy.deepcopy(model.get_submodule(home))
    report = quantised(model, exclude=("lm_head", "*.router", *linears))  # the inputs stay
    tokens = {layer.name: layer.tokens for layer in report.layers}
    for number in range(4):
        if kind.startswith("Llama4"):
            own = args[0].chunk(4)[number]
            rows = own[(own != 0).any(-1)]
        else:
            rows = args[0][(args[1] == number).any(-1)]
        assert 0 < len(rows) < TOKENS.numel()
        gptq = GPTQ(64)
        gptq.add_batch(rows)
        name = f"{home}.gate_up_proj.{number}"
        assert tokens[name] == tokens[f"{home}.down_proj.{number}"] == len(rows)
        wanted = gptq.quantize(expert_weights(stack)["gate_up_proj"][number], group_size=32)
        assert (report.weights[name].q == wanted.q).float().mean() > 0.98


def test_only_experts_that_are_usual_mlps_are_fused():
    model = decoder("Llama4ForCausalLM")
    replace_linears(model, rtn_quantize_model(model, group_size=32))
    wanted = logits(model)
    home = "model.layers.0.feed_forward.experts"
    assert {f"{home}.{e}" for e in range(4)} <= set(fuse_mlps(model))
    close(logits(model), wanted)
    model = decoder("GptOssForCausalLM")
    replace_linears(model, rtn_quantize_model(model, group_size=32))
    assert fuse_mlps(model) == []
