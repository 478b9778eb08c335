# SPDX-License-Identifier: Apache-2.0
import json
import shutil

import pytest
import torch
from torch import nn

from batchery.compress.quant import gptq_quantize_model

pytest.importorskip("safetensors")

HOW = {"group_size": -1, "progress": False}


class Config:
    def __init__(self, **given):
        self.given = given

    def to_dict(self):
        return self.given


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.scale = nn.Parameter(torch.rand(8))
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        x = x * self.scale
        for block in self.blocks:
            x = block(x)
        return x


X = torch.randn(4, 10, 8, generator=torch.Generator().manual_seed(1))


def quantise(folder, model=None, x=X):
    return gptq_quantize_model(model or Model(), [x], folder=folder, **HOW)


def other(change):
    model = Model()
    change(model)
    return model


def flip_rows(model):
    model.blocks[1].weight.data = model.blocks[1].weight.data.flip(0)


def flip_two_signs(model):
    model.blocks[0].weight.data[0, :2] *= -1


def scale_inputs(model):
    model.scale.data *= 2


def shift(model):
    model.blocks[0].bias.data += 1


@pytest.mark.parametrize("change", [flip_rows, flip_two_signs, scale_inputs, shift])
def test_a_folder_of_another_model_is_refused_and_nothing_copied(tmp_path, change):
    quantise(tmp_path)
    model, same = other(change), other(change)
    rule = f"folder {tmp_path} was begun with model='.*'; model must be the same"
    with pytest.raises(ValueError, match=rule):
        quantise(tmp_path, model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name])


def test_another_configuration_is_refused_another_path_is_not(tmp_path):
    def with_config(**given):
        return other(lambda model: setattr(model, "config", Config(**given)))

    first = quantise(tmp_path, with_config(theta=1.0, _name_or_path="here"))
    again = quantise(tmp_path, with_config(theta=1.0, _name_or_path="there"))
    for name, qw in first.weights.items():
        assert torch.equal(again.weights[name].q, qw.q)
    with pytest.raises(ValueError, match="was begun with config="):
        quantise(tmp_path, with_config(theta=2.0, _name_or_path="here"))


def test_blocks_without_their_run_are_refused(tmp_path):
    quantise(tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"folder must have a run.json beside block-00000"):
        quantise(tmp_path)
    assert not (tmp_path / "run.json").exists()


@pytest.mark.parametrize("content", [b"", b'{"bits": 4', b"[1]", b"\xff\xfe"])
def test_a_damaged_run_is_named(tmp_path, content):
    quantise(tmp_path)
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"folder has a damaged or foreign file .*run\.json"):
        quantise(tmp_path)


def cut(path, folder):
    path.write_bytes(path.read_bytes()[:-7])


def empty(path, folder):
    path.write_bytes(b"")


def flip_a_byte(path, folder):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def no_record(path, folder):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, path)


def of_another_place(path, folder):
    shutil.copy(folder / "block-00000.safetensors", path)


def of_another_run(path, folder):
    quantise(folder / "other", x=X + 1)
    shutil.copy(folder / "other" / path.name, path)


@pytest.mark.parametrize(
    "damage", [cut, empty, flip_a_byte, no_record, of_another_place, of_another_run]
)
def test_a_damaged_or_foreign_block_is_named(tmp_path, damage):
    quantise(tmp_path)
    damage(tmp_path / "block-00001.safetensors", tmp_path)
    pattern = r"folder has a damaged or foreign file .*block-00001\.safetensors"
    with pytest.raises(ValueError, match=pattern):
        quantise(tmp_path)


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("x")
    with pytest.raises(ValueError, match="folder must be one, got "):
        quantise(path)


def test_the_run_says_of_which_model_it_is(tmp_path):
    quantise(tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    assert len(run["model"]) == len(run["config"]) == 64


def test_a_folder_of_another_version_is_refused(tmp_path):
    quantise(tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    del run["damp"]
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match="was begun without damp; damp must be the same, got 0.01"):
        quantise(tmp_path)


@pytest.mark.parametrize(
    ("setting", "value", "error"),
    [
        ("bits", 8, ValueError),
        ("bits", "4", ValueError),
        ("damp", -1, ValueError),
        ("damp", None, TypeError),
        ("block_size", 0, ValueError),
        ("scale_dtype", torch.int8, ValueError),
    ],
)
def test_a_bad_setting_is_refused_before_anything_is_read_or_written(
    setting, value, error, tmp_path
):
    def batches():
        raise AssertionError
        yield

    with pytest.raises(error, match=f"gptq_quantize_model: {setting} must be"):
        gptq_quantize_model(Model(), batches(), folder=tmp_path, **HOW, **{setting: value})
    assert not list(tmp_path.iterdir())
