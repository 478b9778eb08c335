# SPDX-License-Identifier: Apache-2.0
"""from_pretrained of folders as other tools write them, with the real transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

transformers = pytest.importorskip("transformers")

from batchery.compress.quant import (  # noqa: E402
    QuantLinear,
    load_quantized,
    lora_for_quantized,
    pack_awq,
    pack_compressed_tensors,
    pack_gptq,
    quantize_rtn,
    replace_linears,
    rtn_quantize_model,
    save_quantized,
)
from batchery.compress.quant.transformers_plugin import (  # noqa: E402
    disable_transformers,
    enable_transformers,
    transformers_enabled,
)

TOKENS = torch.arange(24).view(2, 12) % 32


def config(**settings):
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return transformers.LlamaConfig(**{**sizes, **heads, **settings})


def llama(**settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config(**settings)).eval()


def quantized(linear, *, symmetric):
    qw = quantize_rtn(linear.weight.detach(), group_size=32, symmetric=symmetric)
    return type(qw)(qw.q, qw.scales.half(), qw.zeros, None, 32)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
CT_WEIGHTS = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": 32,
    "dynamic": False,
}
TOOLS = {
    "gptq": (lambda qw: pack_gptq(qw, version=1), {**GPTQ, "sym": True}, True),
    "gptq-v1-asymmetric": (
        lambda qw: pack_gptq(qw, version=1),
        {**GPTQ, "sym": False, "checkpoint_format": "gptq"},
        False,
    ),
    "gptq-v2": (pack_gptq, {**GPTQ, "sym": False, "checkpoint_format": "gptq_v2"}, False),
    "awq": (
        pack_awq,
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
        False,
    ),
    "compressed-tensors": (
        pack_compressed_tensors,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": CT_WEIGHTS}},
            "ignore": ["lm_head"],
        },
        True,
    ),
}


def write(folder, tool, **settings):
    """Write a folder as a tool does, and return the model with dequantised weights."""
    pack, quantization, symmetric = TOOLS[tool]
    model = llama(**settings)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            qw = quantized(linear, symmetric=symmetric)
            layer = QuantLinear.from_linear(linear, qw)
            with torch.no_grad():
                linear.weight.copy_(layer.dequantize())
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{own}": tensor for own, tensor in pack(qw).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(content))
    return model


@pytest.fixture
def enabled():
    with transformers_enabled():
        yield


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_of_a_tool_is_loaded(tool, tied, tmp_path, enabled):
    dense = write(tmp_path, tool, tie_word_embeddings=tied, attention_bias=tied)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys"))
    assert len(layers(model)) == 14
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    torch.testing.assert_close(model(TOKENS).logits, dense(TOKENS).logits, rtol=1e-5, atol=1e-5)
    made = model.generate(TOKENS, max_new_tokens=4, do_sample=False)
    assert torch.equal(made, dense.generate(TOKENS, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("tool", TOOLS)
def test_it_saves_what_it_loaded(tool, tmp_path, enabled):
    write(tmp_path / "a", tool, tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    stored = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert stored == TOOLS[tool][1]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_layers_take_the_models_dtype(tmp_path, enabled):
    write(tmp_path, "gptq", attention_bias=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.dtype == torch.bfloat16
    assert layer.bias.dtype == torch.bfloat16
    assert layer.scales.dtype == torch.float16
    assert model(TOKENS).logits.dtype == torch.bfloat16


def test_a_base_model_takes_the_files_of_one_with_a_head(tmp_path, enabled):
    dense = write(tmp_path, "gptq-v2")
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert len(layers(base)) == 14
    found, wanted = base(TOKENS).last_hidden_state, dense.model(TOKENS).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_shards_and_a_device_map(tmp_path, enabled):
    dense = write(tmp_path / "a", "awq")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", max_shard_size="20KB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) == 3
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", device_map="cpu")
    torch.testing.assert_close(again(TOKENS).logits, dense(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_dequantize_gives_a_dense_model(tmp_path, enabled):
    dense = write(tmp_path / "a", "compressed-tensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a").dequantize()
    assert not layers(model)
    torch.testing.assert_close(model(TOKENS).logits, dense(TOKENS).logits, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "b")
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.equal(plain(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("form", ["gptq_v1", "gptq_v2", "compressed-tensors", "awq"])
def test_a_model_that_we_saved_is_loaded_by_name(form, tmp_path):
    model = llama(tie_word_embeddings=True)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            qw = quantized(linear, symmetric=form != "awq")
            model.set_submodule(name, QuantLinear.from_linear(linear, qw))
    save_quantized(model, tmp_path, format=form)
    loaded = load_quantized(tmp_path)
    assert isinstance(loaded, transformers.LlamaForCausalLM)
    assert len(layers(loaded)) == 14
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    into = llama(tie_word_embeddings=True)
    assert torch.equal(load_quantized(tmp_path, into=into)(TOKENS).logits, model(TOKENS).logits)


def test_a_head_may_be_quantised_though_it_was_tied(tmp_path):
    model = llama(tie_word_embeddings=True)
    model.lm_head = QuantLinear.from_linear(model.lm_head, quantized(model.lm_head, symmetric=True))
    save_quantized(model, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["quantization_config"]["lm_head"]
    assert not content["tie_word_embeddings"]
    loaded = load_quantized(tmp_path)
    assert list(layers(loaded)) == ["lm_head"]
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_the_format_can_be_given(tmp_path):
    dense = write(tmp_path, "gptq-v1-asymmetric")
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    del content["quantization_config"]["checkpoint_format"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="hold z - 1 or z"):
        load_quantized(tmp_path)
    model = load_quantized(tmp_path, format="gptq_v1", device="cpu")
    torch.testing.assert_close(model(TOKENS).logits, dense(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_it_can_be_switched_off_again(tmp_path):
    from transformers.quantizers import auto

    before = dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING), dict(auto.AUTO_QUANTIZER_MAPPING)
    enable_transformers()
    enable_transformers()
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING != before[0]
    with transformers_enabled():
        pass
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING != before[0]
    disable_transformers()
    disable_transformers()
    after = auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING
    assert after == before


def test_configs_of_other_weights_go_to_transformers_own(enabled):
    from transformers.quantizers.auto import AutoQuantizationConfig

    eight = {"quant_method": "gptq", "bits": 8, "group_size": 128, "desc_act": False}
    assert type(AutoQuantizationConfig.from_dict(eight)) is transformers.GPTQConfig
    four = AutoQuantizationConfig.from_dict({**eight, "bits": 4})
    assert type(four) is not transformers.GPTQConfig
    assert four.to_dict() == {**eight, "bits": 4}
    assert json.loads(four.to_json_string()) == {**eight, "bits": 4}


def spoiled(folder, name, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


PROJ = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("own", "change", "message"),
    [
        (
            "scales",
            lambda t: t * float("nan"),
            f"scales of {PROJ} in model.safetensors must be fin",
        ),
        ("qzeros", lambda t: t[:1], f"qzeros of {PROJ} in model.safetensors must be"),
        ("qweight", lambda t: t.long(), f"qweight of {PROJ} in model.safetensors must be int32"),
        ("g_idx", lambda t: t + 1, f"g_idx of {PROJ} in model.safetensors must be in 0…1"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(own, change, message, tmp_path, enabled):
    write(tmp_path, "gptq-v2")
    spoiled(tmp_path, f"{PROJ}.{own}", change)
    with pytest.raises(ValueError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def lacking(folder, *starts):
    file = folder / "model.safetensors"
    kept = {k: t for k, t in load_file(file).items() if not k.startswith(starts)}
    save_file(kept, file, metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "start", [f"{PROJ}.qweight", PROJ, "lm_head", "model.embed_tokens", "model.norm"]
)
def test_a_weight_that_the_files_lack_is_refused(start, tied, tmp_path, enabled):
    write(tmp_path, "gptq-v2", tie_word_embeddings=tied)
    lacking(tmp_path, start)
    if tied and start == "lm_head":  # the embedding's
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        return
    named = "output embeddings" if start == "lm_head" else start.removeprefix("model.")
    named = named.removesuffix(".qweight")
    with pytest.raises(ValueError, match=f"must have all weights, got .*{named}"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("start", [f"{PROJ}.qweight", PROJ, "model.norm", "model.embed"])
def test_by_name_no_tensor_may_be_missing(start, tied, tmp_path):
    write(tmp_path, "gptq-v2", tie_word_embeddings=tied)
    lacking(tmp_path, start)
    with pytest.raises(ValueError, match="checkpoint_files must have|files in .* must have all"):
        load_quantized(tmp_path)


def test_a_new_head_is_no_missing_layer(tmp_path, enabled):
    write(tmp_path, "gptq-v2")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert len(layers(model)) == 14


def test_files_that_do_not_fit_the_model_are_refused(tmp_path, enabled):
    write(tmp_path, "gptq-v2")
    wider = config(intermediate_size=128)
    wider.quantization_config = TOOLS["gptq-v2"][1]
    with pytest.raises(ValueError, match=r"weight of .*mlp.*_proj in model.safetensors must be \("):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, config=wider)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    extra = {"model.more.qweight": tensors[f"{PROJ}.qweight"].clone()}
    save_file({**tensors, **extra}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the model has no nn.Linear model.more in model.safetens"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_offloading_is_refused(tmp_path, enabled):
    write(tmp_path, "gptq-v2")
    places = {"model.embed_tokens": "cpu", "model": "disk", "lm_head": "cpu"}
    with pytest.raises(ValueError, match="device_map must not offload layers"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places)


@pytest.mark.parametrize("places", ["meta", {"": "meta"}])
def test_layers_without_values_are_refused(places, tmp_path, enabled):
    write(tmp_path, "gptq-v2")
    rule = r"mlp.down_proj in model.safetensors must not be offloaded, got \['qweight', "
    with pytest.raises(ValueError, match=rule):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places)


@pytest.mark.slow
def test_the_trainer_trains_an_adapter(tmp_path, enabled):
    peft = pytest.importorskip("peft")
    write(tmp_path / "base", "gptq")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = {name: layer.quantized_weight().q for name, layer in layers(model).items()}
    lora = peft.LoraConfig(
        target_modules=["q_proj", "down_proj"], r=4, lora_alpha=64, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(
        peft.prepare_model_for_kbit_training(model), lora_for_quantized(lora)
    )
    rows = [{"input_ids": [k % 7] * 8, "labels": [k % 7] * 8} for k in range(64)]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"), max_steps=30, per_device_train_batch_size=8, report_to=[],
        logging_steps=10, save_strategy="no", learning_rate=0.02, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    model.eval()
    wanted = model(TOKENS).logits
    after = {
        name.removeprefix("base_model.model.").replace(
            ".base_layer", ""
        ): layer.quantized_weight().q
        for name, layer in layers(model).items()
    }
    assert all(torch.equal(after[name], q) for name, q in before.items())
    model.save_pretrained(tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    stored = lora_for_quantized(peft.PeftConfig.from_pretrained(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", config=stored).eval()
    torch.testing.assert_close(again(TOKENS).logits, wanted, rtol=1e-5, atol=1e-5)
    merged = again.merge_and_unload()
    # x(W + ΔW) against xW + xΔW, whose terms are ten times their sum
    torch.testing.assert_close(merged(TOKENS).logits, wanted, rtol=1e-4, atol=1e-4)


def test_older_names_of_files_and_configs(tmp_path, enabled):
    dense = write(tmp_path, "gptq")
    content = json.loads((tmp_path / "config.json").read_text())
    quantization = content.pop("quantization_config")
    del quantization["quant_method"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "quantize_config.json").write_text(json.dumps(quantization))
    model = load_quantized(tmp_path)
    torch.testing.assert_close(model(TOKENS).logits, dense(TOKENS).logits, rtol=1e-5, atol=1e-5)


def tiny_model(kind):
    sizes = {"vocab_size": 32, "num_hidden_layers": 2, "hidden_size": 64}
    if kind == "GPTBigCode":
        settings = {"n_head": 4, "n_positions": 32}
    else:
        settings = {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "expand": 2}
    made = getattr(transformers, f"{kind}Config")(**sizes, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{kind}ForCausalLM")(made).eval()


@pytest.mark.parametrize("kind", ["GPTBigCode", "Mamba2"])
def test_a_model_that_initialises_its_childrens_weights_is_loaded(kind, tmp_path):
    model = tiny_model(kind)
    replace_linears(model, rtn_quantize_model(model, group_size=32))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load_quantized(tmp_path)(TOKENS).logits, model(TOKENS).logits)


def test_a_damaged_config_is_named_by_name(tmp_path):
    write(tmp_path, "gptq")
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "quantization_config": [1]}))
    with pytest.raises(ValueError, match="quantization_config in config.json must be a table"):
        load_quantized(tmp_path)
    file.write_text(json.dumps({**content, "quantization_config": {**GPTQ, "dynamic": [1]}}))
    with pytest.raises(ValueError, match="quantization_config: dynamic must be a table, got .1."):
        load_quantized(tmp_path)
