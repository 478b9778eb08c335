# SPDX-License-Identifier: Apache-2.0
"""What quantising a whole model refuses leaves the model as it was."""

import copy

import pytest
import torch
from four_bits import ids, llama

from batchery.compress.quant import gptq_quantize_model, rtn_quantize_model

pytest.importorskip("transformers")


def assert_same(model, before):
    for name, tensor in before.state_dict().items():
        assert torch.equal(model.state_dict()[name].nan_to_num(7.0), tensor.nan_to_num(7.0))


def test_groups_that_the_kernels_do_not_take_are_refused_before_anything_is_done():
    model = llama(1)
    before = copy.deepcopy(model)
    rule = (
        r"group_size must be in \(32, 64, 128, 256\) and divide K = 64 of .*q_proj, or be K, got "
    )
    for size in (16, 0, -2, 128):
        with pytest.raises(ValueError, match=f"gptq_quantize_model: {rule}{size}"):
            gptq_quantize_model(model, iter(()), group_size=size, progress=False)
        with pytest.raises(ValueError, match=f"rtn_quantize_model: {rule}{size}"):
            rtn_quantize_model(model, group_size=size)
    assert_same(model, before)
    assert {qw.group_size for qw in rtn_quantize_model(model, group_size=-1).values()} == {64, 96}


@pytest.mark.parametrize(
    ("kinds", "rule"), [({"bits": 3}, "bits"), ({"scale_dtype": torch.int8}, "scale_dtype")]
)
def test_settings_are_refused_before_layers_are_named(kinds, rule):
    with pytest.raises(ValueError, match=f"rtn_quantize_model: {rule} must be one of"):
        rtn_quantize_model(llama(1), group_size=32, **kinds)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda weight: weight.to("meta"), "must be in memory, got 'a meta tensor'"),
        (lambda weight: weight.to(torch.float8_e4m3fn), "must be floating, of 16 bits or more"),
    ],
)
def test_weights_that_cannot_be_read_are_named(change, rule):
    model = llama(1)
    linear = model.model.layers[0].mlp.gate_proj
    linear.weight = torch.nn.Parameter(change(linear.weight.detach()), requires_grad=False)
    with pytest.raises(ValueError, match=f"model.layers.0.mlp.gate_proj {rule}"):
        rtn_quantize_model(model, group_size=32)


def test_rounding_leaves_a_model_alone_whose_scales_do_not_fit_and_names_the_layer():
    model = llama(2)
    model.model.layers[1].mlp.down_proj.weight.data[0] = 1e9
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj: quantize_rtn: .*float16"):
        rtn_quantize_model(model, group_size=32)
    assert_same(model, before)


def test_the_layer_that_is_not_finite_is_named_before_any_work():
    model = llama(2)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    before = copy.deepcopy(model)
    rule = "model.layers.1.mlp.up_proj must be finite"
    with pytest.raises(ValueError, match=f"gptq_quantize_model: {rule}"):
        gptq_quantize_model(model, [ids()], group_size=32, progress=False)
    with pytest.raises(ValueError, match=f"rtn_quantize_model: {rule}"):
        rtn_quantize_model(model, group_size=32)
    assert_same(model, before)
