# SPDX-License-Identifier: Apache-2.0
"""Files that lack a tensor, and inputs that lack a column: refused, never guessed."""

import dataclasses
import json

import pytest
import torch
from four_bits import draw
from safetensors.torch import load_file, save_file
from torch import nn

from batchery.compress.quant import (
    QuantLinear,
    dequantize,
    load_quantized,
    pack_awq,
    pack_compressed_tensors,
    pack_gptq,
    save_quantized,
    unpack_gptq,
)
from batchery.compress.quant.scheme import Scheme


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("shape", [(2, 65), (2, 63), ()])
def test_an_input_of_another_width_is_refused(shape, act_order):
    layer = QuantLinear.from_quantized(draw(48, 64, 32, act_order=act_order))
    with pytest.raises(ValueError, match=r"QuantLinear: x must be \(..., 64\), got"):
        layer(torch.ones(shape))


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": True}


def without(tensors, name):
    return {own: tensor for own, tensor in tensors.items() if own != name}


def test_gptq_in_act_order_needs_its_groups():
    tensors = pack_gptq(draw(16, 64, 32, act_order=True))
    rule = "load_quantized: g_idx of L in F must be there: the config says act-order"
    with pytest.raises(ValueError, match=rule):
        Scheme.parse(GPTQ).read(without(tensors, "g_idx"), "L in F")
    unset = {**tensors, "g_idx": torch.full_like(tensors["g_idx"], -1)}
    with pytest.raises(ValueError, match="g_idx of L in F must say each column's group"):
        Scheme.parse(GPTQ).read(unset, "L in F")
    # of one group, or where the config does not say so, it says nothing
    whole = without(pack_gptq(draw(16, 64, 64)), "g_idx")
    assert Scheme.parse({**GPTQ, "group_size": 64}).read(whole, "L in F").g_idx is None
    plain = without(pack_gptq(draw(16, 64, 32)), "g_idx")
    for more in ({"desc_act": False}, {"dynamic": {"+:.*up.*": {"desc_act": False}}}):
        assert Scheme.parse({**GPTQ, **more}).read(plain, "L in F").g_idx is None
    static = pack_gptq(draw(16, 64, 32))
    assert Scheme.parse({**GPTQ, "static_groups": True}).read(static, "L in F").g_idx is None


def ct_config(*groups):
    config = Scheme("compressed-tensors", None, (32,), True).config([])
    group = config["config_groups"]["group_0"]
    made = [{**group, "weights": {**group["weights"], **own}} for own in groups]
    return {**config, "config_groups": {f"group_{k}": own for k, own in enumerate(made)}}


@pytest.mark.parametrize(
    ("name", "entry", "kind"),
    [
        ("weight_g_idx", {"actorder": "group"}, "act-order"),
        ("weight_zero_point", {"symmetric": False}, "zeros"),
    ],
)
def test_compressed_tensors_need_what_the_config_says(name, entry, kind):
    whole = pack_compressed_tensors(draw(16, 64, 32, zeros=True, act_order=True))
    packed = without(whole, name)
    rule = f"load_quantized: {name} of L in F must be there: the config says {kind}"
    with pytest.raises(ValueError, match=rule):
        Scheme.parse(ct_config(entry)).read(packed, "L in F")
    if kind == "act-order":
        unset = {**whole, name: torch.full_like(whole[name], -1)}
        with pytest.raises(ValueError, match=f"{name} of L in F must say each column's group"):
            Scheme.parse(ct_config(entry)).read(unset, "L in F")
    # where groups of the config differ, a layer may be of either
    mixed = Scheme.parse(ct_config(entry, {}))
    assert mixed.read(pack_compressed_tensors(draw(16, 64, 32)), "L in F").group_size == 32


@pytest.mark.parametrize("form", ["gptq_v1", "gptq_v2", "compressed-tensors"])
def test_a_layer_without_its_groups_is_named_with_its_file(form, tmp_path):
    layers = [QuantLinear.from_quantized(draw(64, 64, 32, False, True, seed)) for seed in (0, 1)]
    save_quantized(nn.Sequential(*layers), tmp_path, format=form)
    file = tmp_path / "model.safetensors"
    own = "weight_g_idx" if form == "compressed-tensors" else "g_idx"
    save_file(without(load_file(file), f"1.{own}"), file)
    with pytest.raises(ValueError, match=f"{own} of 1 in model.safetensors must be there"):
        load_quantized(tmp_path, into=nn.Sequential(*(nn.Linear(64, 64, False) for _ in layers)))


def test_groups_that_no_config_names_must_be_alike(tmp_path):
    packed = {0: pack_awq(draw(64, 128, 32)), 1: pack_awq(draw(64, 64, 64))}

    def load():
        tensors = {f"{k}.{own}": t for k, own in packed.items() for own, t in own.items()}
        save_file(tensors, tmp_path / "model.safetensors")
        linears = [nn.Linear(len(own["qweight"]), 64, False) for own in packed.values()]
        return load_quantized(tmp_path, into=nn.Sequential(*linears))

    config = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert [layer.group_size for layer in load()] == [32, 64]
    packed[2] = {name: t.clone() for name, t in packed[0].items()}
    packed[2] |= {name: packed[2][name][:2].clone() for name in ("scales", "qzeros")}
    with pytest.raises(ValueError, match=r"group_size in .* must be one for all layers, .*'2': 64"):
        load()


@pytest.mark.parametrize("label", [None, "gptq", "gptq_v2"])
@pytest.mark.parametrize("version", [1, 2])
def test_zeros_say_what_they_mean_where_the_config_is_silent(version, label):
    qw = draw(16, 64, 32)
    config = {**without(GPTQ, "sym"), "checkpoint_format": label}
    found = Scheme.parse(config).read(pack_gptq(qw, version=version), "L in F")
    assert torch.equal(dequantize(found), dequantize(qw))


def test_zeros_of_an_asymmetric_weight_are_read_by_the_label():
    qw = dataclasses.replace(draw(16, 64, 32), zeros=torch.full((16, 2), 9, dtype=torch.uint8))
    found = unpack_gptq(pack_gptq(qw, version=1), version=1, symmetric=False)
    assert torch.equal(found.zeros, qw.zeros)


def test_no_config_of_before_is_left(tmp_path, monkeypatch):
    from batchery.compress.quant import checkpoint

    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32}))

    def fail(path, content):
        raise OSError("disk full")

    model = nn.Sequential(QuantLinear.from_quantized(draw(64, 64, 32)))
    monkeypatch.setattr(checkpoint, "atomic_write", fail)
    with pytest.raises(OSError, match="disk full"):
        save_quantized(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pack", [pack_gptq, pack_awq])
def test_scales_that_float16_would_change_are_refused(pack):
    qw = draw(16, 64, 32)
    small = dataclasses.replace(qw, scales=torch.full((16, 2), 3e-7, dtype=torch.bfloat16))
    rule = 'scales must be in the range of float16: .*"compressed-tensors".*scale_dtype'
    with pytest.raises(ValueError, match=rule):
        pack(small)
    # its own subnormals, rounding and zeros are none of that
    for scales in (small.scales.half(), torch.full((16, 2), 0.1), torch.zeros(16, 2)):
        kept = pack(dataclasses.replace(qw, scales=scales))["scales"]
        assert torch.equal(kept, scales.half().t())
