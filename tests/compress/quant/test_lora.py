# SPDX-License-Identifier: Apache-2.0
"""Adapters of PEFT on four-bit layers, with the real PEFT."""

import pytest
import torch
from four_bits import inputs, train
from torch import nn

from batchery.compress.quant import (
    QuantizedWeight,
    QuantLinear,
    lora_for_quantized,
    replace_linears,
    rtn_quantize_model,
)


def four_bits():
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (48, 256), dtype=torch.uint8, generator=generator)
    scales = torch.rand(48, 4, generator=generator).mul(0.01).add(1e-3).half()
    zeros = torch.randint(0, 16, (48, 4), dtype=torch.uint8, generator=generator)
    g_idx = (torch.arange(256) // 64)[torch.randperm(256, generator=generator)].int()
    return QuantLinear.from_quantized(QuantizedWeight(q, scales, zeros, g_idx, 64), torch.ones(48))


def lora_model(**settings):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["up"], r=4, lora_alpha=8, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of PEFT's first weights
        model = nn.Sequential()
        model.add_module("up", four_bits())
        model.add_module("down", nn.Linear(48, 4))
        return peft, peft.get_peft_model(model, lora_for_quantized(config))


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, *({"init_lora_weights": how} for how in ("pissa", "olora", "orthogonal"))],
)
def test_adapters_that_need_the_dense_weight_are_named(settings):
    argument, value = next(iter(settings.items()))
    rule = f"lora_for_quantized: {argument} must be .*, got {value!r}"
    peft, model = lora_model()
    with pytest.raises(ValueError, match=rule):
        lora_model(**settings)
    with pytest.raises(ValueError, match=rule):  # one more, of which nobody told us
        model.add_adapter("other", peft.LoraConfig(target_modules=["up"], r=4, **settings))


@pytest.mark.parametrize("start", [False, "gaussian", "eva"])
def test_adapters_that_need_none_are_taken(start):
    _, model = lora_model(init_lora_weights=start)
    assert "lora_A" in " ".join(model.state_dict())


def test_lora_trains_on_top_and_leaves_the_base():
    _, model = lora_model()
    base = model.base_model.model.up.base_layer
    assert isinstance(base, QuantLinear)
    before = base.quantized_weight().q
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2
    x = inputs(16, 256)
    first = model(x).square().mean().item()
    train(model, [x] * 20, lr=0.3)
    assert model(x).square().mean().item() < 0.9 * first
    assert torch.equal(base.quantized_weight().q, before)


def test_lora_merges_into_a_dense_layer_and_back():
    _, model = lora_model()
    x = inputs(5, 256)
    train(model, [x] * 3)
    wanted = model(x)
    layer = model.base_model.model.up
    layer.merge(safe_merge=True)
    assert isinstance(layer.base_layer, nn.Linear)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    layer.unmerge()
    assert isinstance(layer.base_layer, QuantLinear)
    assert torch.equal(model(x), wanted)
    merged = model.merge_and_unload()
    assert isinstance(merged.up, nn.Linear)
    torch.testing.assert_close(merged(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("turned", [False, True])
def test_lora_on_gpt2_merges_into_its_own_layers(turned):
    """Whatever the config says of how the base stores its weight; square layers too."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "n_embd": 64, "n_head": 2, "n_layer": 1, "n_positions": 16}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).eval()
    replace_linears(model, rtn_quantize_model(model, group_size=32))
    own = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": turned}
    lora = lora_for_quantized(peft.LoraConfig(r=4, init_lora_weights=False, **own))
    tuned = peft.get_peft_model(model, lora).eval()
    ids = torch.arange(12)[None]
    wanted = tuned(ids).logits
    merged = tuned.merge_and_unload()
    assert type(merged.transformer.h[0].attn.c_proj).__name__ == "Conv1D"
    torch.testing.assert_close(merged(ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_lora_that_is_unloaded_leaves_the_layer():
    _, model = lora_model()
    up = model.base_model.model.up.base_layer
    assert model.unload().up is up


def test_an_adapter_is_saved_and_loaded(tmp_path):
    peft, model = lora_model()
    x = inputs(5, 256)
    train(model, [x] * 3)
    wanted = model(x)
    model.save_pretrained(tmp_path)
    base = model.unload()
    assert not torch.equal(base(x), wanted)
    config = lora_for_quantized(peft.PeftConfig.from_pretrained(tmp_path))
    again = peft.PeftModel.from_pretrained(base, tmp_path, config=config)
    assert torch.equal(again(x), wanted)


def test_what_is_no_lora_config_is_named():
    peft = pytest.importorskip("peft")
    for wrong in (None, peft.IA3Config(target_modules=["up"], feedforward_modules=[])):
        rule = f"lora_for_quantized: config must be a LoraConfig, got {type(wrong).__name__}"
        with pytest.raises(TypeError, match=rule):
            lora_for_quantized(wrong)
