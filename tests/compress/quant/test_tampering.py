# SPDX-License-Identifier: Apache-2.0
"""Files that are not as their writer left them, or not what their config says: never read."""

import dataclasses
import json
import struct

import pytest
import torch
from four_bits import ids, llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

transformers = pytest.importorskip("transformers")

from batchery.compress.quant import (  # noqa: E402
    QuantLinear,
    dequantize,
    load_quantized,
    pack_gptq,
    quantize_rtn,
    replace_linears,
    rtn_quantize_model,
    save_quantized,
)
from batchery.compress.quant.digests import KEY  # noqa: E402
from batchery.compress.quant.transformers_plugin import transformers_enabled  # noqa: E402

WHOLE = "model.safetensors"
UP = "model.layers.1.mlp.up_proj"
NORM = "model.layers.0.input_layernorm.weight"
HOW = {"group_size": 32, "symmetric": False}


def four_bits(act_order=False, **settings):
    """A small model of zeros that differ, with an act-order or not."""
    model = llama()
    weights = rtn_quantize_model(model, **{**HOW, **settings})
    if act_order:
        for name, qw in weights.items():
            order = torch.randperm(qw.shape[1], generator=torch.Generator().manual_seed(0))
            weights[name] = dataclasses.replace(qw, g_idx=qw.groups.int()[order])
    replace_linears(model, weights)
    return model


@pytest.fixture
def folder(tmp_path):
    return save_quantized(four_bits(act_order=True), tmp_path)


def into(folder):
    return load_quantized(folder, into=llama())


def by_name(folder):
    with transformers_enabled():
        return transformers.AutoModelForCausalLM.from_pretrained(folder)


both = pytest.mark.parametrize("load", [into, by_name])


def header(file):
    """The header of a safetensors file as a table, and its data."""
    raw = file.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def with_header(file, change):
    table, data = header(file)
    change(table)
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def flip(file, name):
    """Change the lowest bit of a tensor's first number."""
    table, data = header(file)
    raw = bytearray(file.read_bytes())
    raw[len(raw) - len(data) + table[name]["data_offsets"][0]] ^= 1
    file.write_bytes(raw)


def again(file, change=dict, **more):
    """Write a file anew, as a tool without digests does."""
    save_file(change(load_file(file)) | more, file, metadata={"format": "pt"})


def refused(load, folder, message):
    with pytest.raises(ValueError, match=message):
        load(folder)


@both
@pytest.mark.parametrize(
    "name", [*(f"{UP}.{own}" for own in ("qweight", "scales", "qzeros", "g_idx")), NORM]
)
def test_a_flipped_bit_is_named_with_its_file(name, load, folder):
    flip(folder / WHOLE, name)
    refused(load, folder, f"{name} in {WHOLE} was changed after it was written")


def swap_names(table):
    a, b = (f"model.layers.{k}.mlp.up_proj.scales" for k in (0, 1))
    table[a], table[b] = table[b], table[a]


def another_dtype(table):
    table[f"{UP}.scales"]["dtype"] = "BF16"


def another_shape(table):
    table[f"{UP}.scales"]["shape"].reverse()


@both
@pytest.mark.parametrize("change", [swap_names, another_dtype, another_shape])
def test_a_header_that_says_something_else_is_named(change, load, folder):
    with_header(folder / WHOLE, change)
    refused(load, folder, rf"mlp.up_proj.scales in {WHOLE} was changed after it was written")


@both
def test_a_tensor_that_was_added_is_named(load, folder):
    with_header(folder / WHOLE, lambda table: table.update(extra=table.pop(NORM)))
    refused(load, folder, f"extra was added to {WHOLE} after it was written")


@both
@pytest.mark.parametrize("text", ["{", "[1]"])
def test_damaged_digests_are_named(text, load, folder):
    with_header(folder / WHOLE, lambda table: table["__metadata__"].update({KEY: text}))
    refused(load, folder, f"{KEY} in {WHOLE} (is damaged|must be a table)")


@both
def test_what_is_whole_is_read_with_digests_or_without(load, folder):
    model = four_bits(act_order=True)
    assert header(folder / WHOLE)[0]["__metadata__"]["format"] == "pt"
    for _ in range(2):
        assert torch.equal(load(folder)(ids()).logits, model(ids()).logits)
        again(folder / WHOLE)
    assert KEY not in header(folder / WHOLE)[0]["__metadata__"]


@both
@pytest.mark.parametrize("save", [save_quantized, "save_pretrained"])
def test_each_of_many_files_is_checked(save, load, tmp_path):
    model = four_bits().bfloat16()
    if save == "save_pretrained":
        model.save_pretrained(tmp_path, max_shard_size="20KB")
    else:
        save(model, tmp_path, shard_bytes=20_000)
    load(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        name = next(iter(load_file(file)))
        before = file.read_bytes()
        flip(file, name)
        refused(load, tmp_path, f"{name} in {file.name} was changed after it was written")
        file.write_bytes(before)


@both
def test_save_pretrained_writes_digests_again(load, folder):
    load(folder).save_pretrained(folder / "new")
    load(folder / "new")
    flip(folder / "new" / WHOLE, NORM)
    refused(load, folder / "new", f"{NORM} in {WHOLE} was changed after it was written")


@pytest.mark.parametrize("original", [True, False])
def test_names_that_transformers_changes_have_digests(original, tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))
    replace_linears(model, rtn_quantize_model(model, **HOW))
    model.save_pretrained(tmp_path, save_original_format=original)
    table, _ = header(tmp_path / WHOLE)
    expert = next(name for name in table if name.endswith(".qweight") and "experts" in name)
    assert ("block_sparse_moe" in expert) == original
    by_name(tmp_path)
    flip(tmp_path / WHOLE, expert)
    refused(by_name, tmp_path, f"{expert} in {WHOLE} was changed after it was written")


@both
@pytest.mark.parametrize("size", [0, 7, 8, 300])
def test_a_file_cut_in_its_header_says_so(size, load, folder):
    file = folder / WHOLE
    file.write_bytes(file.read_bytes()[:size])
    refused(load, folder, f"{WHOLE} is damaged: it ends in its header")


@both
@pytest.mark.parametrize("part", [0.0, 0.3, 0.8, 1.0, f"{UP}.qweight"])
def test_a_file_cut_short_names_the_tensor_that_it_ends_in(part, load, folder):
    file = folder / WHOLE
    table, data = header(file)
    del table["__metadata__"]
    between = isinstance(part, str)  # after that tensor
    left = table[part]["data_offsets"][1] if between else int(part * (len(data) - 1))
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) - len(data) + left])
    whole = [name for name, at in table.items() if at["data_offsets"][1] <= left]
    lacking = min((at["data_offsets"], name) for name, at in table.items() if name not in whole)[1]
    refused(load, folder, f"{WHOLE} is damaged: it ends in {lacking}$")


@both
def test_a_layer_without_its_words_names_the_folder(load, folder):
    with_header(folder / WHOLE, lambda table: table.pop("__metadata__"))
    own = f"{UP}.qweight"
    again(folder / WHOLE, lambda tensors: {k: t for k, t in tensors.items() if k != own})
    rule = f"files in {folder.name} must have all weights, got 'no {own} for .*in {WHOLE}"
    refused(load, folder, rule)


@both
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", [NORM, "model.embed_tokens.weight", f"{UP}.scales"])
def test_what_is_not_finite_is_named(name, value, load, folder):
    tensor = load_file(folder / WHOLE)[name]
    tensor.view(-1)[-1] = float(value)
    again(folder / WHOLE, **{name: tensor})
    own = f"scales of {UP}" if "scales" in name else name
    refused(load, folder, f"{own} in {WHOLE} must be finite, got 'NaN or infinity'")


class Masked(nn.Sequential):
    def __init__(self, layer):
        super().__init__(layer)
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))


def test_a_mask_may_be_infinite_and_a_bias_not(tmp_path):
    linear = nn.Linear(64, 32)
    qw = quantize_rtn(linear.weight, group_size=32)
    save_quantized(Masked(QuantLinear.from_linear(linear, qw)), tmp_path)
    loaded = load_quantized(tmp_path, into=Masked(nn.Linear(64, 32)))
    assert torch.equal(loaded.mask, torch.full((4, 4), -torch.inf).triu(1))
    tensors = load_file(tmp_path / WHOLE)
    for name, where in (("0.bias", f"bias of 0 in {WHOLE}"), ("mask", f"mask in {WHOLE}")):
        again(tmp_path / WHOLE, lambda _: dict(tensors), **{name: tensors[name] * torch.nan})
        with pytest.raises(ValueError, match=f"{where} must be finite"):
            load_quantized(tmp_path, into=Masked(nn.Linear(64, 32)))


def relabel(folder, *, foreign=True, **entries):
    """Change the config; as other tools write them, files say nothing themselves."""
    if foreign:
        with_header(folder / WHOLE, lambda table: table.update(__metadata__={"format": "pt"}))
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content["quantization_config"] |= entries
    file.write_text(json.dumps(content))


LABELS = {"gptq_v1": "gptq", "gptq_v2": "gptq_v2"}


@both
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("form", LABELS)
def test_zeros_under_the_wrong_label_are_refused(form, act_order, load, tmp_path):
    model = four_bits(act_order)
    save_quantized(model, tmp_path, format=form)
    assert torch.equal(load(tmp_path)(ids()).logits, model(ids()).logits)
    wrong, held = ("gptq_v2", "z - 1") if form == "gptq_v1" else ("gptq", "z")
    relabel(tmp_path, checkpoint_format=wrong)
    rule = rf'qzeros of model.layers.0.* in {WHOLE} hold {held}, it seems, .*"gptq_v1" or "gptq_v2"'
    refused(load, tmp_path, rule)
    for loaded in (load_quantized(tmp_path, format=form, into=llama()),
                   load_quantized(tmp_path, format=form)):  # fmt: skip
        assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    loaded.save_pretrained(tmp_path / "new")
    stored = json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]
    assert stored["checkpoint_format"] == LABELS[form]
    assert "load_as" not in stored
    assert torch.equal(load(tmp_path / "new")(ids()).logits, model(ids()).logits)


@both
@pytest.mark.parametrize("form", LABELS)
def test_our_files_know_their_version_themselves(form, load, tmp_path):
    model = four_bits()
    save_quantized(model, tmp_path, format=form)
    relabel(tmp_path, foreign=False, checkpoint_format=None)
    loaded = load(tmp_path)
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    wrong = ({*LABELS.values()} - {LABELS[form]}).pop()
    relabel(tmp_path, foreign=False, checkpoint_format=wrong)
    refused(load, tmp_path, f"checkpoint_format must be {form} as the files say")


@pytest.mark.parametrize("form", LABELS)
def test_our_files_may_hold_weights_a_step_off_zero(form, tmp_path):
    w = torch.rand(64, 128, generator=torch.Generator().manual_seed(0)) - 0.5
    w += 1 / 15 if form == "gptq_v2" else -1 / 15
    qw = quantize_rtn(w, **HOW)
    save_quantized(nn.Sequential(QuantLinear.from_quantized(qw)), tmp_path, format=form)
    into = nn.Sequential(nn.Linear(128, 64, False))
    assert torch.equal(load_quantized(tmp_path, into=into)[0].dequantize(), dequantize(qw))
    relabel(tmp_path)
    with pytest.raises(ValueError, match=f"qzeros of 0 in {WHOLE} hold"):
        load_quantized(tmp_path, into=nn.Sequential(nn.Linear(128, 64, False)))


def test_a_bias_that_is_not_finite_is_refused_wherever_it_comes_from():
    tensors = pack_gptq(quantize_rtn(torch.randn(32, 64), group_size=32))
    tensors["bias"] = torch.full((32,), torch.nan)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    with pytest.raises(ValueError, match="bias of here must be finite"):
        QuantLinear.from_checkpoint(tensors, config, where="here")
    layer = nn.Module()
    for name, tensor in tensors.items():
        layer.register_buffer(name, tensor)
    with pytest.raises(ValueError, match="bias of 0 must be finite"):
        load_quantized(nn.Sequential(layer), format="gptq_v2")


@pytest.mark.parametrize("form", LABELS)
def test_rows_of_a_large_layer_are_asked_one_by_one(form, tmp_path):
    """Around 0 all of them, but with zeros near 3 in the first half and near 12 in the other."""
    w = torch.rand(600, 128, generator=torch.Generator().manual_seed(0)).log().neg() - 1
    w[300:] *= -1
    qw = quantize_rtn(w, **HOW)
    save_quantized(nn.Sequential(QuantLinear.from_quantized(qw)), tmp_path, format=form)
    model = nn.Sequential(nn.Linear(128, 600, False))
    assert torch.equal(load_quantized(tmp_path, into=model)[0].quantized_weight().zeros, qw.zeros)
    relabel(tmp_path, checkpoint_format=({*LABELS.values()} - {LABELS[form]}).pop())
    with pytest.raises(ValueError, match=f"qzeros of 0 in {WHOLE} hold"):
        load_quantized(tmp_path, into=nn.Sequential(nn.Linear(128, 600, False)))


@both
@pytest.mark.parametrize("form", LABELS)
def test_zeros_without_a_label_need_one(form, load, tmp_path):
    model = four_bits()
    save_quantized(model, tmp_path, format=form)
    relabel(tmp_path, checkpoint_format=None)
    refused(load, tmp_path, f"qzeros of model.layers.0.* in {WHOLE} hold z - 1 or z. Give the form")
    loaded = load_quantized(tmp_path, format=form)
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    model = four_bits(symmetric=True)
    save_quantized(model, tmp_path, format=form)
    relabel(tmp_path, checkpoint_format=None)
    assert torch.equal(load(tmp_path)(ids()).logits, model(ids()).logits)


def positive(w):
    return w.abs()


def nearly_positive(w):
    return w.abs() - 0.1


def some_rows_positive(w):
    """A fifth of the rows 5 steps up: the mean of all is 1."""
    return torch.cat([w[: len(w) // 5].abs(), w[len(w) // 5 :]])


def rows_up_and_down(w):
    """Half of the rows two steps up, the others around 0: the mean of all is 1."""
    return w + w.std(1, keepdim=True) * 0.55 * (torch.arange(len(w)) % 2)[:, None]


def constant(w):
    return torch.ones_like(w)


def positive_and_rarely_large(w):
    """Its mean is a step, as that of weights under the wrong label."""
    return w.abs() ** 5


def half_a_step_up(w):
    return w + 0.16


SHAPES = [positive, nearly_positive, some_rows_positive, rows_up_and_down, constant]
SHAPES += [positive_and_rarely_large, half_a_step_up]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", LABELS)
def test_weights_around_no_zero_are_read_as_the_label_says(form, shape, sign, tmp_path):
    w = torch.randn(140, 128, generator=torch.Generator().manual_seed(0))[:136]
    qw = quantize_rtn(sign * shape(w), **HOW)
    save_quantized(nn.Sequential(QuantLinear.from_quantized(qw)), tmp_path, format=form)
    loaded = load_quantized(tmp_path, into=nn.Sequential(nn.Linear(128, 136, False)))
    assert torch.equal(loaded[0].dequantize(), QuantLinear.from_quantized(qw).dequantize())


@pytest.mark.parametrize("into", [llama, None])
def test_an_explicit_format_is_obeyed_against_zeros_and_config(into, tmp_path):
    save_quantized(four_bits(symmetric=True), tmp_path, format="gptq_v1")
    loaded = load_quantized(tmp_path, format="gptq_v2", into=into and into())
    assert (loaded.get_submodule(UP).quantized_weight().zeros == 7).all()


def test_digests_are_of_all_tensors_and_of_no_other(folder):
    with safe_open(folder / WHOLE, "pt") as file:
        listed = json.loads(file.metadata()[KEY])
        assert listed.keys() == set(file.keys())
    assert {len(digest) for digest in listed.values()} == {64}
    assert len(set(listed.values())) == len(listed)  # equal tensors of other names differ
