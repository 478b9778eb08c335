# SPDX-License-Identifier: Apache-2.0
"""2:4 weights in whole models, and layers that keep them in 3/8 of a byte."""

import copy
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from batchery.compress.quant import (
    GPTQ,
    QuantLinear,
    compress_24,
    dequantize,
    fuse_mlps,
    gptq_quantize_model,
    load_quantized,
    prune_quantize_24,
    quantize_rtn,
    quantize_rtn_24,
    replace_linears,
    save_quantized,
)
from batchery.compress.quant.sparse_linear import SparseQuantLinear


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(64, 96, bias=False), nn.Linear(64, 96, bias=False)
        self.down_proj = nn.Linear(96, 64)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Model(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X = draw(8, 40, 16) @ draw(16, 64, seed=1)
HOW = {"group_size": 32, "progress": False}
NAMES = ["gate_proj", "up_proj", "down_proj"]
LAYERS = [f"blocks.{place}.{name}" for place in (0, 1) for name in NAMES]


def is_24(qw):
    return int((qw.q != 8).view(len(qw.q), -1, 4).sum(-1).max()) <= 2


def test_a_model_is_pruned_and_quantised_in_one_pass():
    model, plain = Model(), Model()
    first = copy.deepcopy(model)
    report = gptq_quantize_model(model, [X], sparsity="2:4", damp=0.05, **HOW)
    dense = gptq_quantize_model(plain, [X], **HOW)
    assert sorted(report.weights) == sorted(LAYERS)
    for name, qw in report.weights.items():
        assert is_24(qw)
        assert torch.equal(model.get_submodule(name).weight, dequantize(qw))
    gptq = GPTQ(64)
    gptq.add_batch(X)
    joined = torch.cat([first.blocks[0].gate_proj.weight, first.blocks[0].up_proj.weight])
    wanted = prune_quantize_24(gptq, joined, group_size=32, damp=0.05)
    found = torch.cat([report.weights[name].q for name in LAYERS[:2]])
    assert (found == wanted.q).float().mean() > 0.98
    baseline = gptq.hessian_error(joined[:96], quantize_rtn_24(joined[:96], group_size=32))
    entry = report.layers[0]
    assert entry.rtn_error == pytest.approx(baseline / gptq.energy(joined[:96]), rel=1e-3)
    lost, rounded, four_bits = (
        sum(getattr(layer, what) for layer in of.layers)
        for of, what in ((report, "error"), (report, "rtn_error"), (dense, "error"))
    )
    assert four_bits < lost < rounded


def test_settings_that_pruning_has_not_are_named():
    for change in ({"symmetric": False}, {"act_order": True}, {"clip_search": True}):
        with pytest.raises(ValueError, match="sparsity must be None with zeros, act_order or"):
            gptq_quantize_model(Model(), [X], sparsity="2:4", **HOW, **change)
    with pytest.raises(ValueError, match="gptq_quantize_model: sparsity must be one of .*'1:2'"):
        gptq_quantize_model(Model(), [X], sparsity="1:2", **HOW)


def test_an_interrupted_run_is_not_mixed_with_a_dense_one(tmp_path):
    gptq_quantize_model(Model(), [X], sparsity="2:4", folder=tmp_path, **HOW)
    again = gptq_quantize_model(Model(), [X], sparsity="2:4", folder=tmp_path, **HOW)
    assert all(is_24(qw) for qw in again.weights.values())
    with pytest.raises(ValueError, match="was begun with sparsity='2:4'"):
        gptq_quantize_model(Model(), [X], folder=tmp_path, **HOW)


@pytest.mark.parametrize("form", ["gptq_v2", "awq", "compressed-tensors"])
def test_a_compressed_model_says_the_same_and_is_saved_as_all_are(form, tmp_path):
    model = Model()
    report = gptq_quantize_model(model, [X], sparsity="2:4", **HOW)
    wanted = model(X)
    replace_linears(model, report.weights)
    assert compress_24(model) == LAYERS
    assert compress_24(model) == []
    assert fuse_mlps(model) == []
    torch.testing.assert_close(model(X), wanted, rtol=1e-5, atol=1e-5)
    save_quantized(model, tmp_path, format=form)
    loaded = load_quantized(tmp_path, into=Model(1))
    assert type(loaded.blocks[0].up_proj) is QuantLinear
    torch.testing.assert_close(loaded(X), wanted, rtol=1e-5, atol=1e-5)
    assert compress_24(loaded) == LAYERS
    assert torch.equal(loaded(X), model(X))


def layer_of(weight, bias=True, **kinds):
    return QuantLinear.from_quantized(weight, draw(weight.shape[0]) if bias else None, **kinds)


def test_it_takes_three_eighths_of_a_byte_and_a_scale():
    qw = quantize_rtn_24(draw(256, 1024))
    model = nn.Sequential(layer_of(qw, bias=False))
    before = sum(tensor.nbytes for tensor in (model[0].qweight, model[0].scales))
    compress_24(model)
    own = model[0]
    assert before == 256 * 1024 // 2 + 256 * 8 * 2
    held = [tensor for tensor in own.buffers() if tensor is not own.counters]
    assert sum(tensor.nbytes for tensor in held) == 256 * 1024 * 3 // 8 + 256 * 8 * 2
    assert torch.equal(own.quantized_weight().q, qw.q)
    assert torch.equal(own.quantized_weight().scales, qw.scales)
    assert torch.equal(own.dequantize(torch.float64), dequantize(qw, torch.float64))
    assert torch.equal(own.to_linear(torch.float32).weight, dequantize(qw))


def test_its_state_is_that_of_any_four_bit_layer():
    one, other = (layer_of(quantize_rtn_24(draw(48, 64, seed=s), group_size=32)) for s in (0, 1))
    model, sparse = nn.Sequential(one), nn.Sequential(other)
    compress_24(sparse)
    sparse.load_state_dict(model.state_dict())
    x = draw(5, 64)
    torch.testing.assert_close(sparse(x), model(x), rtol=1e-5, atol=1e-5)
    state = sparse.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    dense = layer_of(quantize_rtn(draw(48, 64), group_size=32))
    with pytest.raises(RuntimeError, match="must have two of every four columns at 8"):
        sparse.load_state_dict(nn.Sequential(dense).state_dict())
    zeros = layer_of(quantize_rtn(draw(48, 64), group_size=32, symmetric=False))
    with pytest.raises(RuntimeError, match="SparseQuantLinear: qw must be symmetric and without"):
        sparse.load_state_dict(nn.Sequential(zeros).state_dict())
    with pytest.raises(RuntimeError, match="SparseQuantLinear: the layer has no weight"):
        SparseQuantLinear(64, 48)(x)


def test_what_is_not_24_stays():
    sparse = quantize_rtn_24(draw(64, 64), group_size=32)
    model = nn.ModuleDict(
        {
            "dense": layer_of(quantize_rtn(draw(64, 64), group_size=32)),
            "zeros": layer_of(quantize_rtn(draw(64, 64), group_size=32, symmetric=False)),
            "gated": QuantLinear.from_quantized(sparse, gated=True),
            "invariant": layer_of(sparse, batch_invariant=True),
            "odd": layer_of(quantize_rtn(draw(64, 66), group_size=-1)),
            "two": layer_of(sparse),
            "linear": nn.Linear(64, 64),
        }
    )
    model["same"] = model["two"]
    assert compress_24(model) == ["two"]
    assert model["same"] is model["two"]
    assert type(model["gated"]) is type(model["invariant"]) is QuantLinear
    assert compress_24(layer_of(sparse)) == []  # the model is the layer: it has no place


def test_it_behaves_as_a_module():
    model = nn.Sequential(layer_of(quantize_rtn_24(draw(48, 64), group_size=32))).eval()
    x = draw(5, 64).requires_grad_()
    wanted = model(x)
    compress_24(model)
    assert not model[0].training
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), wanted, rtol=1e-5, atol=1e-5)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half[0].dtype == torch.bfloat16
    assert half[0].scales.dtype == torch.float16
    assert half(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    wanted.square().sum().backward()
    gradient, x.grad = x.grad, None
    model(x).square().sum().backward()
    torch.testing.assert_close(x.grad, gradient, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_the_device_follows_and_gives_the_same():
    model = nn.Sequential(layer_of(quantize_rtn_24(draw(200, 512)))).to("cuda")
    x = draw(5, 512).cuda().half()
    wanted = model(x)
    compress_24(model)
    torch.testing.assert_close(model(x), wanted, rtol=1e-3, atol=1e-2)
    back = model.cpu()
    torch.testing.assert_close(back(x.cpu().float()), wanted.cpu().float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("owner", ["w4a16_matmul", "w4a16_sparse_matmul"])
def test_a_device_that_is_too_old_is_told_for_both_kernels(owner, monkeypatch):
    from batchery.kernels import w4a16, w4a16_sparse

    assert w4a16_sparse.by_triton is w4a16.by_triton
    monkeypatch.setattr(w4a16, "triton", object())
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, runs in (((7, 5), False), ((8, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        x = SimpleNamespace(is_cuda=True, dtype=torch.float16, device=torch.device("cuda:0"))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("default")
            assert [w4a16.by_triton(owner, x, "auto") for _ in range(2)] == [runs, runs]
        wanted = [] if runs else [f"{owner}: cuda:0 is too old for the kernels: dequantising"]
        assert [str(warning.message) for warning in told] == wanted
