# SPDX-License-Identifier: Apache-2.0
"""The layer against a dense one with the dequantised weight."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from dist_ranks import run_on_ranks
from four_bits import draw, inputs, train
from torch import nn

from batchery.compress.quant import (
    QuantLinear,
    dequantize,
    lora_for_quantized,
    slice_inputs,
    slice_outputs,
)
from batchery.compress.quant.formats import pack_awq, pack_gptq

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
KINDS = {
    "symmetric": (48, 256, 128, False, False),
    "zeros": (48, 256, 64, True, False),
    "act-order": (48, 256, 64, True, True),
    "one-group": (33, 200, 200, True, False),
    "group-32": (40, 96, 32, False, True),
}


def assert_near(found, wanted, tolerance):
    error = (found.double() - wanted.double()).norm() / wanted.double().norm()
    assert float(error) <= tolerance


def assert_same(found, wanted):
    for field in ("q", "scales", "zeros", "g_idx"):
        a, b = getattr(found, field), getattr(wanted, field)
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b))
    assert found.group_size == wanted.group_size


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_linear_layer_of_the_dequantised_weight(kind, dtype):
    qw = draw(*KINDS[kind])
    n, k = qw.shape
    bias = inputs(n, seed=2)
    layer = QuantLinear.from_quantized(qw, bias)
    w = dequantize(qw, torch.float64)
    for shape in ((k,), (3, k), (2, 5, k), (0, k)):
        x = inputs(*shape, dtype=dtype)
        y = layer(x)
        assert y.dtype == dtype
        assert y.shape == (*shape[:-1], n)
        if y.numel():
            assert_near(y, F.linear(x.double(), w, bias.double()), TOLERANCE[dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_comes_back_as_it_was(kind):
    qw = draw(*KINDS[kind])
    layer = QuantLinear.from_quantized(qw)
    assert_same(layer.quantized_weight(), qw)
    assert torch.equal(layer.dequantize(torch.float64), dequantize(qw, torch.float64))
    dense = layer.to_linear(torch.float32)
    assert torch.equal(dense.weight, dequantize(qw))
    assert dense.bias is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_is_portable(kind, assign):
    qw = draw(*KINDS[kind])
    n, k = qw.shape
    source = nn.Sequential(QuantLinear.from_quantized(qw, inputs(n, seed=2)))
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state["0.layout"].tolist() == [1, 4, n, k, qw.group_size]
    assert state["0.qweight"].shape == (n, -(-k // 8))
    assert int(state["0.qweight"][2, 3]) >> 8 & 15 == int(qw.q[2, 26])
    for target in (
        QuantLinear(k, n),
        QuantLinear.from_quantized(draw(n, k, k, seed=9), torch.ones(n)),
    ):
        model = nn.Sequential(target)
        model.load_state_dict(state, assign=assign)
        assert_same(model[0].quantized_weight(), qw)
        x = inputs(4, k)
        assert torch.equal(model(x), source(x))
        again = model.state_dict()
        assert again.keys() == state.keys()
        assert all(torch.equal(again[name], state[name]) for name in state)


GATED = [kind for kind in KINDS if kind != "one-group"]  # which has 33 rows


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", GATED)
def test_a_gated_layer_joins_gate_and_up(kind, dtype):
    qw = draw(*KINDS[kind])
    rows, k = qw.shape
    bias = inputs(rows, seed=2)
    layer = QuantLinear.from_quantized(qw, bias, gated=True)
    assert (layer.out_features, layer.rows) == (rows // 2, rows)
    assert_same(layer.quantized_weight(), qw)
    assert torch.equal(layer.dequantize(), dequantize(qw))
    assert torch.equal(layer.bias, bias)
    w = dequantize(qw, torch.float64)
    for shape in ((k,), (2, 5, k), (0, k)):
        x = inputs(*shape, dtype=dtype)
        y = layer(x)
        assert y.dtype == dtype
        gate, up = F.linear(x.double(), w, bias.double()).chunk(2, -1)
        assert y.shape == gate.shape
        if y.numel():
            assert_near(y, F.silu(gate) * up, 2 * TOLERANCE[dtype])  # two factors


@pytest.mark.parametrize("kind", GATED)
def test_a_gated_state_is_that_of_gate_over_up(kind):
    qw = draw(*KINDS[kind])
    rows, k = qw.shape
    source = QuantLinear.from_quantized(qw, inputs(rows), gated=True)
    plain = QuantLinear.from_quantized(qw, inputs(rows)).state_dict()
    state = source.state_dict()
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[name], plain[name]) for name in state)
    other = QuantLinear(k, rows // 2, gated=True)
    other.load_state_dict(state)
    assert torch.equal(other(inputs(4, k)), source(inputs(4, k)))
    with pytest.raises(RuntimeError, match=f"layout must be version 1, 4 bits, {rows // 2}×{k}"):
        QuantLinear(k, rows // 2).load_state_dict(state)


def test_a_gated_layer_is_no_dense_layer_and_takes_no_adapter():
    layer = QuantLinear.from_quantized(draw(*KINDS["zeros"]), torch.ones(48), gated=True)
    assert "bits=4, group_size=64, gated=True, zeros=True" in repr(layer)
    with pytest.raises(ValueError, match="QuantLinear: gated must be False for to_linear"):
        layer.to_linear()
    with pytest.raises(ValueError, match="gate and up rows to be gated, got 33"):
        QuantLinear.from_quantized(draw(*KINDS["one-group"]), gated=True)
    peft = pytest.importorskip("peft")
    config = lora_for_quantized(peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="lora_for_quantized: target_modules must not be gated"):
        peft.get_peft_model(nn.Sequential(layer), config)


def test_gradients_pass_a_gated_layer():
    qw = draw(*KINDS["act-order"])
    layer = QuantLinear.from_quantized(qw, inputs(48, seed=2), gated=True)
    x = inputs(4, 256).requires_grad_()
    layer(x).square().sum().backward()
    wanted = x.detach().double().requires_grad_()
    w, bias = dequantize(qw, torch.float64), layer.bias.double()
    gate, up = F.linear(wanted, w, bias).chunk(2, -1)
    (F.silu(gate) * up).square().sum().backward()
    assert_near(x.grad, wanted.grad, 1e-5)


def test_layers_that_share_an_order_have_each_its_own():
    qw = draw(*KINDS["act-order"])
    layers = [QuantLinear.from_quantized(qw.rows(begin, begin + 24)) for begin in (0, 24)]
    assert len({layer.g_idx.data_ptr() for layer in layers}) == 2


def test_an_empty_layer_says_so():
    layer = QuantLinear(64, 8)
    with pytest.raises(RuntimeError, match="QuantLinear: the layer has no weight"):
        layer(torch.ones(1, 64))
    assert sorted(layer.state_dict()) == ["bias"]
    missing = layer.load_state_dict({}, strict=False).missing_keys
    assert sorted(missing) == ["bias", "layout", "qweight", "scales"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layout", torch.tensor([2, 4, 48, 256, 128]), "0: QuantLinear: layout must be version 1"),
        ("layout", torch.tensor([1, 4, 48, 255, 128]), "layout must be .* 48×256"),
        ("layout", torch.tensor([1, 4, 48, 256, 96]), "group_size must divide K = 256, got 96"),
        ("qweight", torch.zeros(48, 31, dtype=torch.int32), r"qweight must be int32 \(48, 32\)"),
        ("scales", torch.full((48, 2), torch.nan), "scales must be finite"),
        ("zeros", torch.full((48, 2), 16, dtype=torch.uint8), "zeros must be below 16"),
        ("g_idx", torch.zeros(256, dtype=torch.int32), "must give every group 128 columns"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(name, value, message):
    layer = QuantLinear.from_quantized(draw(*KINDS["symmetric"]))
    model = nn.Sequential(layer)
    state = {**model.state_dict(), f"0.{name}": value}
    before = layer.quantized_weight()
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)
    assert_same(layer.quantized_weight(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_change_of_dtype_leaves_the_weight(dtype):
    qw = draw(*KINDS["zeros"])
    model = nn.Sequential(nn.Linear(256, 256), QuantLinear.from_quantized(qw, torch.ones(48)))
    assert model[1].dtype == torch.float32
    model.to(dtype)
    assert_same(model[1].quantized_weight(), qw)
    assert model[1].bias.dtype == dtype
    assert model[1].to_linear().weight.dtype == dtype
    if dtype != torch.float64:
        assert model(inputs(3, 256, dtype=dtype)).dtype == dtype
        native = model[1].packed.native
        assert native[1].dtype == torch.bfloat16


def test_a_layer_on_meta_is_filled_by_a_state():
    qw = draw(*KINDS["act-order"])
    source = nn.Sequential(QuantLinear.from_quantized(qw))
    state = source.state_dict()
    model = copy.deepcopy(source).to("meta")
    assert model[0].qweight.is_meta
    assert model[0].scales.is_meta
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    assert torch.equal(model(inputs(3, 256)), source(inputs(3, 256)))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_it_moves_between_devices(kind):
    qw = draw(*KINDS[kind])
    layer = QuantLinear.from_quantized(qw)
    x = inputs(3, qw.shape[1], dtype=torch.float16)
    layer.to("cuda")
    assert layer.packed.native is None
    assert_near(layer(x.cuda()).cpu(), F.linear(x.double(), dequantize(qw, torch.float64)), 1e-3)
    assert_same(layer.quantized_weight().to("cpu"), qw)
    layer.cpu()
    assert_same(layer.quantized_weight(), qw)
    assert (layer.packed.native is None) == (QuantLinear.from_quantized(qw).packed.native is None)
    loaded = QuantLinear.from_quantized(qw, device="cuda")
    loaded.load_state_dict(layer.state_dict())
    assert loaded.qweight.is_cuda


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "shared"])
def test_copies_are_whole(how):
    layer = QuantLinear.from_quantized(draw(*KINDS["act-order"]), torch.ones(48))
    x = inputs(3, 256)
    wanted = layer(x)
    if how == "shared":
        other = layer.share_memory()
        assert other.qweight.is_shared()
    else:
        other = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
        layer.qweight.zero_()
    assert torch.equal(other(x), wanted)


def test_it_takes_over_bias_device_dtype_and_mode_of_a_linear():
    linear = nn.Linear(256, 48, dtype=torch.bfloat16).eval()
    layer = QuantLinear.from_linear(linear, draw(*KINDS["zeros"]))
    assert torch.equal(layer.bias, linear.bias)
    assert layer.bias.data_ptr() != linear.bias.data_ptr()
    assert not layer.training
    assert layer.dtype == torch.bfloat16
    assert repr(layer) == (
        "QuantLinear(in_features=256, out_features=48, bias=True, "
        "bits=4, group_size=64, zeros=True)"
    )


def test_it_is_made_of_another_tools_tensors():
    qw = draw(*KINDS["act-order"])
    config = {"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "gptq"}
    tensors = {**pack_gptq(qw, version=1), "bias": torch.ones(48)}
    layer = QuantLinear.from_checkpoint(tensors, config)
    assert_same(layer.quantized_weight(), qw)
    assert torch.equal(layer.bias, torch.ones(48))
    plain = draw(*KINDS["zeros"])
    awq = QuantLinear.from_checkpoint(pack_awq(plain), {"quant_method": "awq", "bits": 4})
    assert_same(awq.quantized_weight(), plain)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: QuantLinear.from_linear(nn.Linear(64, 48), draw(*KINDS["zeros"])),
            r"qw must be \(48, 64\), got \(48, 256\)",
        ),
        (
            lambda: QuantLinear.from_quantized(draw(*KINDS["zeros"]), torch.ones(47)),
            r"bias must be \(48,\), got \(47,\)",
        ),
        (lambda: QuantLinear.from_quantized(draw(8, 96, 48)), "must make groups"),
        (
            lambda: QuantLinear.from_quantized(draw(*KINDS["zeros"]))(torch.ones(2, 255)),
            r"x must be \(..., 256\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_inputs(kind):
    qw = draw(*KINDS[kind])
    layer = QuantLinear.from_quantized(qw, inputs(qw.shape[0], seed=2))
    x = inputs(4, qw.shape[1]).requires_grad_()
    y = layer(x)
    grad = inputs(*y.shape, seed=3)
    y.backward(grad)
    assert_near(x.grad, grad.double() @ dequantize(qw, torch.float64), 1e-5)
    assert layer.bias.grad is None
    layer.bias.requires_grad_()
    layer(x).backward(grad)
    torch.testing.assert_close(layer.bias.grad, grad.sum(0), rtol=1e-5, atol=1e-5)


def test_autocast_chooses_the_dtype():
    layer = QuantLinear.from_quantized(draw(*KINDS["zeros"]), torch.ones(48))
    x = inputs(3, 256)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer(x.bfloat16()))
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["zeros", "act-order"])
def test_it_compiles_without_a_break(kind):
    layer = QuantLinear.from_quantized(draw(*KINDS[kind]), torch.ones(48))
    x = inputs(3, 256)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_torchs_checkpoint_tools_take_it(tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    source = nn.Sequential(QuantLinear.from_quantized(draw(*KINDS["act-order"]), torch.ones(48)))
    dcp.save(get_model_state_dict(source), checkpoint_id=tmp_path, no_dist=True)
    other = QuantLinear.from_quantized(draw(*KINDS["act-order"], seed=5), torch.zeros(48))
    model = nn.Sequential(other)
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(model, state)
    assert torch.equal(model(inputs(3, 256)), source(inputs(3, 256)))


class Net(nn.Module):
    """A frozen four-bit layer between two trained ones."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 96)
        self.middle = QuantLinear.from_quantized(draw(*KINDS["group-32"]), torch.ones(40))
        self.last = nn.Linear(40, 2)

    def forward(self, x):
        return self.last(self.middle(self.first(x)).relu())


def seeded_net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def _on_a_rank(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    data = [inputs(8, 16, seed=10 + step)[rank::size] for step in range(3)]
    found = {}
    net = seeded_net()
    train(nn.parallel.DistributedDataParallel(net, broadcast_buffers=False), data)
    found["ddp"] = net
    net = seeded_net()
    if rank:
        net.middle.qweight.zero_()  # rank 0 sends its own
    train(nn.parallel.DistributedDataParallel(net), data)
    found["ddp that sends buffers"] = net
    net = seeded_net()
    fully_shard(net, mesh=init_device_mesh("cpu", (size,)))
    train(net, data)
    assert "middle.qweight" in net.state_dict()
    found["fsdp2"] = net
    return {
        kind: (
            {name: getattr(p, "full_tensor", lambda p=p: p)().detach() for name, p in parameters},
            net.middle.quantized_weight().q,
        )
        for kind, net in found.items()
        for parameters in [list(net.named_parameters())]
    }


@pytest.mark.dist
@pytest.mark.slow
def test_data_parallel_training_around_it_is_as_on_one_process():
    alone = train(seeded_net(), [inputs(8, 16, seed=10 + step) for step in range(3)])
    for found in run_on_ranks(_on_a_rank):
        assert len(found) == 3
        for named, q in found.values():
            assert torch.equal(q, alone.middle.quantized_weight().q)
            for name, parameter in alone.named_parameters():
                torch.testing.assert_close(named[name], parameter.detach(), rtol=1e-5, atol=1e-6)


def _tensor_parallel(rank, size):
    up, down = draw(64, 128, 32, True, True), draw(40, 64, 32, True)
    begin, end = (64 // size * r for r in (rank, rank + 1))
    column = QuantLinear.from_quantized(slice_outputs(up, begin, end))
    row = QuantLinear.from_quantized(slice_inputs(down, begin, end))
    y = row(F.silu(column(inputs(5, 128))))
    torch.distributed.all_reduce(y)
    return y


@pytest.mark.dist
@pytest.mark.slow
def test_a_layer_cut_by_outputs_and_one_cut_by_inputs_are_whole_on_two_ranks():
    up, down = draw(64, 128, 32, True, True), draw(40, 64, 32, True)
    w, v = dequantize(up, torch.float64), dequantize(down, torch.float64)
    wanted = F.silu(inputs(5, 128).double() @ w.T) @ v.T
    for found in run_on_ranks(_tensor_parallel):
        assert_near(found, wanted, TOLERANCE[torch.float32])


@pytest.mark.parametrize(("sizes", "argument"), [((0, 5), "in"), ((5, 0), "out"), ((5, -2), "out")])
def test_sizes_below_one_are_named(sizes, argument):
    rule = f"QuantLinear: {argument}_features must be >= 1, got {min(sizes)}"
    with pytest.raises(ValueError, match=rule):
        QuantLinear(*sizes)


def test_the_dense_weight_is_not_there_and_the_error_says_the_way_out():
    layer = QuantLinear.from_quantized(draw(*KINDS["symmetric"]))
    rule = "QuantLinear has no dense weight: exclude the layer .*dequantize.*to_linear"
    with pytest.raises(AttributeError, match=rule):
        _ = layer.weight
    assert not hasattr(layer, "weight")
    assert getattr(layer, "weight", None) is None
    with pytest.raises(AttributeError, match="'QuantLinear' object has no attribute 'wieght'"):
        _ = layer.wieght
