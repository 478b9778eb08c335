# SPDX-License-Identifier: Apache-2.0
"""Models that no folder holds, and arguments that are no model or folder."""

import copy
import json

import pytest
import torch
from torch import nn

from batchery.compress.quant import (
    QuantLinear,
    dequantize,
    load_quantized,
    quantize_rtn,
    save_quantized,
)

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


def dense(*sizes):
    generator = torch.Generator().manual_seed(0)
    layers = [nn.Linear(64, size, bias=False) for size in sizes]
    with torch.no_grad():
        for layer in layers:
            layer.weight.normal_(generator=generator)
    return nn.Sequential(*layers)


def four_bits(*sizes):
    """Layers in a row, for float16 scales, which every format keeps."""
    layers = []
    for linear in dense(*sizes):
        qw = quantize_rtn(linear.weight, group_size=32, scale_dtype=torch.float16)
        layers.append(QuantLinear.from_linear(linear, qw))
    return nn.Sequential(*layers)


@pytest.fixture
def folder(tmp_path):
    return save_quantized(four_bits(64), tmp_path)


def test_a_quantization_config_that_is_no_table_is_refused(folder):
    (folder / "config.json").write_text(json.dumps({"quantization_config": [1]}))
    with pytest.raises(ValueError, match="quantization_config in config.json must be a table"):
        load_quantized(folder, into=dense(64))


def test_a_layer_at_two_places_is_not_saved(tmp_path):
    model = four_bits(64, 64)
    model[1] = model[0]
    rule = r"save_quantized: model must have each QuantLinear at one place .*\['1'\]"
    with pytest.raises(ValueError, match=rule):
        save_quantized(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
    model[1] = copy.deepcopy(model[0])
    save_quantized(model, tmp_path)
    assert torch.equal(load_quantized(tmp_path, into=dense(64, 64))(X), model(X))


@pytest.mark.parametrize("form", ["gptq_v2", "awq"])
def test_sizes_that_a_format_does_not_have_name_the_layer(form, tmp_path):
    model = four_bits(64, 132)
    rule = "^1: pack_.*: N must be a multiple of 8 .compressed-tensors takes any.*, got 132"
    with pytest.raises(ValueError, match=rule):
        save_quantized(model, tmp_path, format=form)
    assert list(tmp_path.iterdir()) == []
    save_quantized(model, tmp_path, format="compressed-tensors")
    loaded = load_quantized(tmp_path, into=dense(64, 132))
    assert torch.equal(loaded[1].dequantize(), dequantize(model[1].quantized_weight()))


def test_arguments_of_a_wrong_kind_are_named(folder):
    file = folder / "model.safetensors"
    with pytest.raises(
        ValueError, match=r"load_quantized: path must be the folder, got '.*tensors'"
    ):
        load_quantized(file, into=dense(64))
    with pytest.raises(TypeError, match="load_quantized: into must be a module, got str"):
        load_quantized(folder, into="model")
    with pytest.raises(TypeError, match="load_quantized: model_or_path must be .*, got NoneType"):
        load_quantized(None)
    model = four_bits(64)
    with pytest.raises(TypeError, match="save_quantized: model must be a module, got str"):
        save_quantized("model", folder)
    with pytest.raises(ValueError, match=r"save_quantized: path must be a folder, got '.*tensors'"):
        save_quantized(model, file)
    for size in (0, -1):
        with pytest.raises(ValueError, match="save_quantized: shard_bytes must be >= 1, got"):
            save_quantized(model, folder, shard_bytes=size)
    with pytest.raises(TypeError, match="save_quantized: shard_bytes must be an integer, got str"):
        save_quantized(model, folder, shard_bytes="5GB")
    assert torch.equal(load_quantized(folder, into=dense(64))(X), model(X))  # nothing was touched
