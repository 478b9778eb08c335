# SPDX-License-Identifier: Apache-2.0
"""Models that are not saved by the names and layers that they have: renamed, joined, merged."""

import json

import pytest
import torch
from four_bits import SIZES, close

transformers = pytest.importorskip("transformers")

from batchery.compress.quant import (  # noqa: E402
    load_quantized,
    lora_for_quantized,
    replace_linears,
    rtn_quantize_model,
    save_quantized,
)

GPT2 = {"vocab_size": 64, "n_embd": 64, "n_head": 2, "n_layer": 2}


def assert_alike(one, other):
    tokens = torch.randint(1, 64, (4, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        close(one(tokens).logits, other(tokens).logits)


def by_type(name, **sizes):
    """A small decoder of a type that transformers knows, or skip."""
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if name not in known:
        pytest.skip(f"this version of transformers has no {name}")
    usual = {**SIZES, "num_hidden_layers": 2, "num_layers": 2, "max_position_embeddings": 64}
    usual |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    has = known[name]().to_dict()
    config = known[name](**{own: usual[own] for own in usual if own in has}, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def test_a_family_whose_modules_have_other_names_in_files(tmp_path):
    model = by_type("exaone")
    replace_linears(model, rtn_quantize_model(model, group_size=32))
    save_quantized(model, tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    for folder in ("a", "b"):
        assert_alike(load_quantized(tmp_path / folder), model)


def test_a_family_whose_layers_transformers_joins_in_files(tmp_path):
    model = by_type("sarvam_moe", head_dim=16, n_group=1, topk_group=1)
    replace_linears(model, rtn_quantize_model(model, group_size=32))
    rule = (
        "cannot be saved so, as transformers would join tensors: take save_quantized, got .*q_proj"
    )
    with pytest.raises(ValueError, match=rule):
        model.save_pretrained(tmp_path / "b")
    save_quantized(model, tmp_path / "a")
    assert_alike(load_quantized(tmp_path / "a"), model)


@pytest.mark.parametrize("names", [["c_attn"], ["c_attn", "c_fc", "c_proj"]])
def test_a_loaded_model_with_merged_adapters_is_saved_as_what_it_is(names, tmp_path):
    peft = pytest.importorskip("peft")
    config = transformers.GPT2Config(**GPT2, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).eval()
    replace_linears(model, rtn_quantize_model(model, group_size=32))
    loaded = load_quantized(save_quantized(model, tmp_path / "a"))
    own = {"target_modules": names, "init_lora_weights": False}
    tuned = peft.get_peft_model(loaded, lora_for_quantized(peft.LoraConfig(r=2, **own)))
    merged = tuned.eval().merge_and_unload()
    merged.save_pretrained(tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    if len(names) == 3:
        assert "quantization_config" not in config
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    else:
        left = config["quantization_config"]["dynamic"]
        assert sum("c_attn" in pattern for pattern in left) == 2
        again = load_quantized(tmp_path / "b")
    assert_alike(again, merged)
