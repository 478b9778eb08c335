# SPDX-License-Identifier: Apache-2.0
"""Folders written and read without transformers, and files that are damaged."""

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
)


class Net(nn.Module):
    """Tied embedding and head around two linear layers."""

    def __init__(self, group_size=None, **kinds):
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.block = nn.ModuleDict({"up": nn.Linear(64, 256), "down": nn.Linear(256, 64, False)})
        self.norm = nn.LayerNorm(64)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.head = nn.Linear(64, 32, bias=False)
        self.head.weight = self.embed.weight
        if group_size:
            for seed, (name, linear) in enumerate(self.block.items()):
                qw = draw(linear.out_features, linear.in_features, group_size, seed=seed, **kinds)
                self.block[name] = QuantLinear.from_linear(linear, qw)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(self.norm(x + self.block["down"](self.block["up"](x).relu())))


def seeded(seed=0, **kinds):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(**kinds)


def dense(model):
    """The same model with dequantised layers in float32."""
    copy = seeded()
    copy.load_state_dict({k: v for k, v in model.state_dict().items() if "block" not in k}, False)
    for name, layer in model.block.items():
        copy.block[name] = layer.to_linear(torch.float32)
    return copy


TOKENS = torch.arange(32).view(4, 8)
FORMATS = {
    "gptq_v1": {"zeros": True, "act_order": True},
    "gptq_v2": {"zeros": True, "act_order": True},
    "compressed-tensors": {"zeros": True, "act_order": True},
    "awq": {"zeros": True},
}


@pytest.mark.parametrize("kinds", [{}, None])
@pytest.mark.parametrize("form", FORMATS)
def test_a_model_comes_back(form, kinds, tmp_path):
    model = seeded(group_size=32, **(FORMATS[form] if kinds is None else kinds))
    assert save_quantized(model, tmp_path / "new", format=form) == tmp_path / "new"
    loaded = load_quantized(tmp_path / "new", into=seeded(1))
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    torch.testing.assert_close(loaded(TOKENS), dense(model)(TOKENS), rtol=1e-5, atol=1e-5)
    for name, layer in model.block.items():
        found, wanted = loaded.block[name].quantized_weight(), layer.quantized_weight()
        assert torch.equal(found.q, wanted.q)
        assert (found.g_idx is None) == (wanted.g_idx is None)
        assert (found.zeros is None) == (wanted.zeros is None)
    stored = load_file(tmp_path / "new" / "model.safetensors")
    assert "head.weight" not in stored  # tied
    assert "scratch" not in stored
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_the_config_is_what_tools_of_the_format_write(tmp_path):
    model = seeded(group_size=32, act_order=True)

    def config(form):
        save_quantized(model, tmp_path, format=form)
        return json.loads((tmp_path / "config.json").read_text())["quantization_config"]

    for form, label in (("gptq_v1", "gptq"), ("gptq_v2", "gptq_v2")):
        written = config(form)
        wanted = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
        wanted |= {"sym": True, "checkpoint_format": label, "dynamic": {r"-:^head$": {}}}
        assert wanted.items() <= written.items()
    written = config("compressed-tensors")
    assert written["quant_method"] == "compressed-tensors"
    assert written["format"] == "pack-quantized"
    assert written["ignore"] == ["head"]
    weights = written["config_groups"]["group_0"]["weights"]
    wanted = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    assert (wanted | {"group_size": 32, "actorder": "group"}).items() <= weights.items()
    model = seeded(group_size=32, zeros=True)
    written = config("awq")
    wanted = {"quant_method": "awq", "version": "gemm", "zero_point": True, "group_size": 32}
    assert wanted.items() <= written.items()
    assert written["modules_to_not_convert"] == ["head"]


def test_marlins_folder(tmp_path):
    model = nn.Sequential(QuantLinear.from_quantized(draw(256, 128, 128), torch.ones(256)))
    save_quantized(model, tmp_path, format="marlin")
    assert load_file(tmp_path / "model.safetensors")["0.B"].shape == (8, 512)
    loaded = load_quantized(tmp_path, into=nn.Sequential(nn.Linear(128, 256)))
    x = torch.ones(2, 128)
    assert torch.equal(loaded(x), model(x))


def test_layers_of_different_kinds_share_a_config(tmp_path):
    model = seeded(group_size=32)
    model.block["down"] = QuantLinear.from_quantized(draw(64, 256, 32, True, True))
    for form in ("gptq_v1", "gptq_v2", "compressed-tensors"):
        save_quantized(model, tmp_path, format=form)
        loaded = load_quantized(tmp_path, into=seeded(1))
        assert torch.equal(loaded(TOKENS), model(TOKENS))
        assert loaded.block["up"].g_idx is None
        assert loaded.block["up"].zeros is None


def test_shards_have_an_index_and_old_ones_go(tmp_path):
    model = seeded(group_size=32)
    save_quantized(model, tmp_path, shard_bytes=9000)
    names = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == names
    for name in names:
        assert sum(t.nbytes for t in load_file(tmp_path / name).values()) <= 9000 or (
            len(load_file(tmp_path / name)) == 1
        )
    assert torch.equal(load_quantized(tmp_path, into=seeded(1))(TOKENS), model(TOKENS))
    (tmp_path / "adapter.safetensors").write_bytes(b"kept")
    save_quantized(model, tmp_path)
    left = sorted(file.name for file in tmp_path.iterdir())
    assert left == ["adapter.safetensors", "config.json", "model.safetensors"]


def test_a_folder_left_half_written_is_refused(tmp_path, monkeypatch):
    from batchery.compress.quant import checkpoint

    save_quantized(seeded(group_size=32, zeros=True), tmp_path, format="gptq_v1")

    def fail(path, content):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "atomic_write", fail)
    with pytest.raises(OSError, match="disk full"):
        save_quantized(seeded(group_size=32, zeros=True), tmp_path, format="gptq_v2")
    with pytest.raises(ValueError, match="has no quantization_config"):
        load_quantized(tmp_path, into=seeded(1))


def test_a_model_on_meta_is_filled_and_tied_again(tmp_path):
    model = seeded(group_size=32, zeros=True)
    save_quantized(model, tmp_path)
    with torch.device("meta"):
        empty = Net()
    rule = r"into must have no buffers on the meta device that are not saved, got \['scratch'\]"
    with pytest.raises(ValueError, match=f"load_quantized: {rule}"):
        load_quantized(tmp_path, into=empty)
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.scratch = torch.ones(3)
    loaded = load_quantized(tmp_path, into=empty)
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert torch.equal(loaded.scratch, torch.ones(3))


def by_hand(tmp_path, packed, config, **more):
    """A folder as an old tool wrote it: other file names, zeros for a bias that is not there."""
    tensors = {f"proj.{name}": tensor for name, tensor in packed.items()}
    save_file({**tensors, **more}, tmp_path / "gptq_model-4bit-128g.safetensors")
    name = "config.json" if "quantization_config" in config else "quantize_config.json"
    (tmp_path / name).write_text(json.dumps(config))
    model = nn.Module()
    model.proj = nn.Linear(128, 64, bias=False)
    return model


OLD = {"bits": 4, "group_size": 64, "desc_act": True, "sym": True}


def test_a_folder_of_an_old_tool_is_read(tmp_path):
    qw = draw(64, 128, 64, act_order=True)
    packed = pack_gptq(qw, version=1)
    model = by_hand(tmp_path, packed, OLD, **{"proj.bias": torch.zeros(64).half()})
    loaded = load_quantized(tmp_path, into=model)
    assert loaded.proj.bias is None
    assert torch.equal(loaded.proj.dequantize(), dequantize(qw))


def test_a_bias_that_is_not_zero_is_kept(tmp_path):
    bias = torch.arange(64.0).half()
    packed = pack_gptq(draw(64, 128, 64))
    model = by_hand(tmp_path, packed, OLD, **{"proj.bias": bias})
    assert torch.equal(load_quantized(tmp_path, into=model).proj.bias, bias.float())


def test_the_format_can_be_given(tmp_path):
    qw = draw(64, 128, 64, zeros=True)
    model = by_hand(tmp_path, pack_gptq(qw, version=1), {**OLD, "sym": False})
    file = "proj in gptq_model-4bit-128g.safetensors"
    with pytest.raises(ValueError, match=f"qzeros of {file} hold z - 1 or z"):
        load_quantized(tmp_path, into=model)
    loaded = load_quantized(tmp_path, into=model, format="gptq_v1")
    assert torch.equal(loaded.proj.dequantize(), dequantize(qw))


class Foreign(nn.Module):
    """A layer of another tool: its tensors as buffers."""

    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


@pytest.mark.parametrize("form", ["gptq_v2", "awq", "compressed-tensors"])
def test_layers_of_another_tool_are_replaced_in_place(form):
    qw = draw(64, 128, 64, zeros=True)
    pack = {"gptq_v2": pack_gptq, "awq": pack_awq, "compressed-tensors": pack_compressed_tensors}
    layer = Foreign({**pack[form](qw), "bias": torch.ones(64)})
    model = nn.Sequential(nn.Linear(8, 128), layer).eval()
    assert load_quantized(model, format=form) is model
    assert torch.equal(model[1].dequantize(), dequantize(qw))
    assert torch.equal(model[1].bias, torch.ones(64))
    assert not model[1].training
    with pytest.raises(ValueError, match="model must have layers with"):
        load_quantized(model, format=form)
    with pytest.raises(ValueError, match="format must be given"):
        load_quantized(model)


@pytest.fixture
def folder(tmp_path):
    save_quantized(seeded(group_size=32, zeros=True), tmp_path)
    return tmp_path


def tampered(folder, name, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name]).contiguous()
    save_file({k: v for k, v in tensors.items() if v.numel()}, file)


@pytest.mark.parametrize("size", [3, 100, -1, -5000])
def test_a_file_cut_short_is_refused(folder, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match="load_quantized: model.safetensors is damaged"):
        load_quantized(folder, into=seeded())


@pytest.mark.parametrize("place", [b"", b"_metadata", b"data_offsets"])
def test_a_header_that_was_changed_is_refused(folder, place):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[data.index(place)] ^= 0x55
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="load_quantized: model.safetensors is damaged"):
        load_quantized(folder, into=seeded())


FILE = "in model.safetensors"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("block.up.scales", lambda t: t * float("nan"), f"scales of block.up {FILE} must be fini"),
        ("block.up.scales", lambda t: t[:1], f"qzeros of block.up {FILE} must be .1, 32."),
        ("block.up.qzeros", lambda t: t[:, :5], f"qzeros of block.up {FILE} must be"),
        ("block.up.qweight", lambda t: t[:4], f"g_idx of block.up {FILE} must be .32,."),
        ("block.up.qweight", lambda t: t.long(), f"qweight of block.up {FILE} must be int32"),
        ("block.down.g_idx", lambda t: t.clamp(max=2), f"g_idx of block.down {FILE} must give"),
        ("block.down.qzeros", lambda t: t[:0], f"qzeros of block.down {FILE} must be there"),
        ("block.down.scales", lambda t: t[:, :8], f"scales of block.down {FILE} must have 64"),
        ("block.up.bias", lambda t: t[:7], f"bias of block.up {FILE} must be"),
        ("block.up.bias", lambda t: t[:0], f"bias of block.up {FILE} must be"),
        ("norm.weight", lambda t: t[:0], "must have all tensors of the model, got 'no norm.weight"),
        ("norm.weight", lambda t: t[:5], r"norm.weight in files in .* must be \(64,\), got \(5,\)"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tensor_that_does_not_fit_is_named_and_nothing_changed(
    folder, name, change, message, device
):
    tampered(folder, name, change)
    model = seeded(1).to(device)
    model.scratch = torch.zeros(3)
    before = parts(model)
    with pytest.raises(ValueError, match=message):
        load_quantized(folder, into=model)
    assert_same_parts(parts(model), before)


def parts(model):
    """All modules and tensors of a model by name, and the values of the tensors."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    values = {name: tensor.detach().clone() for name, tensor in tensors}
    return dict(model.named_modules()), dict(tensors), values


def assert_same_parts(found, before):
    for own, old in zip(found[:2], before[:2], strict=True):
        assert own.keys() == old.keys()
        assert all(own[name] is old[name] for name in old)
    assert all(t.is_meta or torch.equal(t, before[2][name]) for name, t in found[2].items())


@pytest.mark.parametrize("place", ["_load_rest", "read_layer", "replace_module"])
def test_an_interruption_changes_nothing(folder, place, monkeypatch):
    from batchery.compress.quant import checkpoint

    plain, calls = getattr(checkpoint, place), []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 2 or place == "_load_rest":
            raise KeyboardInterrupt
        return plain(*given)

    model = seeded(1)
    before = parts(model)
    monkeypatch.setattr(checkpoint, place, interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_quantized(folder, into=model)
    assert_same_parts(parts(model), before)


def test_groups_that_the_kernels_do_not_take_are_named():
    config = {"quant_method": "gptq", "bits": 4, "group_size": 16}
    rule = (
        r"group_size must be in \(32, 64, 128, 256\) and divide K = 64 of L in F, or be K, got 16"
    )
    with pytest.raises(ValueError, match=f"load_quantized: {rule}"):
        QuantLinear.from_checkpoint(pack_gptq(draw(32, 64, 16)), config, where="L in F")


def test_a_weight_of_another_size_than_the_models_is_named(folder):
    model = seeded()
    model.block["up"] = nn.Linear(64, 264)
    with pytest.raises(ValueError, match=r"weight of block.up .* must be \(264, 64\)"):
        load_quantized(folder, into=model)
    model.block["up"] = nn.Identity()
    with pytest.raises(ValueError, match="the model has no nn.Linear block.up in model.safe"):
        load_quantized(folder, into=model)
    model = seeded()
    del model.norm
    with pytest.raises(ValueError, match="must have tensors of the model alone, got .*norm"):
        load_quantized(folder, into=model)


def test_a_config_that_is_missing_damaged_or_of_others_is_refused(folder):
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"bits": 4', '"bits": 8'))
    with pytest.raises(ValueError, match="bits must be 4, got 8"):
        load_quantized(folder, into=seeded())
    config.write_text(text.replace('"group_size": 32', '"group_size": 128'))
    with pytest.raises(ValueError, match="must have groups of 128 columns as the config says"):
        load_quantized(folder, into=seeded())
    config.write_text(text[:40])
    with pytest.raises(ValueError, match="config.json is damaged"):
        load_quantized(folder, into=seeded())
    config.write_text("{}")
    with pytest.raises(ValueError, match="has no quantization_config"):
        load_quantized(folder, into=seeded())


def test_an_index_that_lies_is_refused(tmp_path):
    save_quantized(seeded(group_size=32), tmp_path, shard_bytes=9000)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    moved = json.loads(index.read_text())
    name = next(iter(moved["weight_map"]))
    moved["weight_map"][name] = sorted(set(content["weight_map"].values()))[-1]
    index.write_text(json.dumps(moved))
    with pytest.raises(ValueError, match=f"index.json names {name} in"):
        load_quantized(tmp_path, into=seeded())
    for wrong in ({"weight_map": {name: "../x.safetensors"}}, {}):
        index.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="must map tensors to files beside it"):
            load_quantized(tmp_path, into=seeded())
    index.write_text(json.dumps({"weight_map": {name: "gone.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"gone.safetensors is not in"):
        load_quantized(tmp_path, into=seeded())


def test_pickles_are_not_read(tmp_path):
    torch.save(seeded().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="no safetensors files .*pickles are not read"):
        load_quantized(tmp_path, into=seeded())


def test_what_one_config_cannot_say_is_refused(tmp_path):
    model = seeded(group_size=32)
    model.block["down"] = QuantLinear.from_quantized(draw(64, 256, 64))
    with pytest.raises(ValueError, match="group_size must be one for all layers, got .*down.*64"):
        save_quantized(model, tmp_path)
    with pytest.raises(ValueError, match="model must have a QuantLinear"):
        save_quantized(seeded(), tmp_path)
    with pytest.raises(ValueError, match="format must be one of 'gptq_v1', "):
        save_quantized(model, tmp_path, format="gguf")
    with pytest.raises(ValueError, match="AWQ has no act-order"):
        save_quantized(seeded(group_size=32, act_order=True), tmp_path, format="awq")
    assert list(tmp_path.iterdir()) == []


def test_one_group_a_row_beside_others(tmp_path):
    """Of K columns, it may have the size that the others have; another size no config can say."""
    model = seeded(group_size=64)
    assert model.block["up"].in_features == 64
    save_quantized(model, tmp_path)
    assert torch.equal(load_quantized(tmp_path, into=seeded(1))(TOKENS), model(TOKENS))
    model.block["down"] = QuantLinear.from_quantized(draw(64, 256, 256))
    save_quantized(model, tmp_path)
    assert torch.equal(load_quantized(tmp_path, into=seeded(1))(TOKENS), model(TOKENS))
    model.block["down"] = QuantLinear.from_quantized(draw(64, 256, 32))
    with pytest.raises(ValueError, match="group_size must be one for all layers, got .*up.*64"):
        save_quantized(model, tmp_path)


def test_one_group_a_row(tmp_path):
    qw = dataclasses.replace(draw(64, 128, 128))
    model = nn.Sequential(QuantLinear.from_quantized(qw))
    for form in ("gptq_v2", "compressed-tensors", "awq"):
        save_quantized(model, tmp_path, format=form)
        loaded = load_quantized(tmp_path, into=nn.Sequential(nn.Linear(128, 64, False)))
        assert torch.equal(loaded[0].dequantize(), dequantize(qw))
