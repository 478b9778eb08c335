# SPDX-License-Identifier: Apache-2.0
"""LAMB and LARS with parameters on several ranks, and on several devices of one process."""

import sys

import pytest
import torch
from compiler import compiled
from dist_ranks import run_on_ranks
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from batchery.optim import LAMB, LARS, layer_adaptation_groups
from batchery.optim.shards import sum_together

KINDS = {
    LAMB: {"lr": 0.1, "max_grad_norm": 0.5},
    LARS: {"lr": 1.0, "trust_coefficient": 0.1},
}


def sharded_net(between):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 6), between, nn.Linear(6, 4, bias=False)).double()


def train_sharded(model, kind, place=0, parts=1):
    """Take three steps on every `parts`-th row, each matrix a group; return the trust ratios."""
    groups = layer_adaptation_groups(model, 0.01)
    groups += [{**groups[0], "params": [p], "lr": 0.05} for p in groups[0]["params"][1:]]
    groups[0]["params"] = groups[0]["params"][:1]
    optimizer = kind(groups, **KINDS[kind])
    data = torch.Generator().manual_seed(1)
    for _ in range(3):
        x = torch.randn(8, 7, generator=data).double()
        optimizer.zero_grad()
        model(x[place::parts]).square().mean().backward()
        optimizer.step()
    return optimizer.trust_ratios()


def _trained(model, kind, place, parts):
    """Return the whole parameters, the ratios, and the sizes that were summed over ranks."""
    calls = []
    original = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda *a, **k: (calls.append(a[0].numel()), original(*a, **k))
    ratios = train_sharded(model, kind, place, parts)
    torch.distributed.all_reduce = original
    return [p.full_tensor().detach() for p in model.parameters()], ratios, calls


def _fsdp(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (size,))
    found = []
    for kind in KINDS:
        model = sharded_net(nn.LayerNorm(6))
        fully_shard(model, mesh=mesh)
        found.append(_trained(model, kind, rank, size))
    return found


def _tensor_parallel(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    found = []
    for kind in KINDS:
        model = sharded_net(nn.Tanh())
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(model, mesh["tensor"], plan)
        fully_shard(model, mesh=mesh["data"])
        found.append(_trained(model, kind, rank // 2, 2))
    return found


def assert_like_one_process(found, between):
    for place, kind in enumerate(KINDS):
        model = sharded_net(between())
        ratios = train_sharded(model, kind)
        for full, theirs, _ in (of_rank[place] for of_rank in found):
            for p, q in zip(model.parameters(), full, strict=True):
                torch.testing.assert_close(p.detach(), q, rtol=1e-10, atol=1e-10)
            assert theirs == pytest.approx({k: v.item() for k, v in ratios.items()}, rel=1e-10)


@pytest.mark.dist
@pytest.mark.slow
def test_sharded_by_fsdp2_they_step_as_on_one_process():
    found = run_on_ranks(_fsdp)
    assert_like_one_process(found, lambda: nn.LayerNorm(6))
    for (*_, lamb), (*_, lars) in found:
        assert lamb == [1, 4] * 3  # a step: the clip's square, then all groups that adapt
        assert lars == [4] * 3


def test_one_reduction_sums_tensors_of_several_shapes_and_dtypes():
    calls = []

    def reduce(squares):
        calls.append(squares.dtype)
        return squares * 3

    own = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1 / 3], [0.1]]).double()
    single, double = sum_together(own, reduce)
    assert calls == [torch.float64]
    assert single.dtype == torch.float32
    assert torch.equal(single, own[0] * 3)
    assert torch.equal(double, own[1] * 3)


@pytest.mark.dist
@pytest.mark.slow
def test_sharded_along_two_axes_they_step_as_on_one_process():
    assert_like_one_process(run_on_ranks(_tensor_parallel, size=4), nn.Tanh)


STEPS = {LAMB: "lamb_step_", LARS: "lars_step_"}


@pytest.mark.parametrize(("kind", "scaled"), [(LAMB, False), (LAMB, True), (LARS, True)])
def test_a_step_over_two_devices_mixes_none_of_their_tensors(kind, scaled, monkeypatch):
    """On tensors without memory, which refuse operands of two devices as real ones do."""
    module, name, seen = sys.modules[kind.__module__], STEPS[kind], []

    def spy(params, *lists, grad_divisor, found_inf, **kinds):
        given = [tensor for tensor in (grad_divisor, found_inf) if tensor is not None]
        seen.append((params[0].device.index, [tensor.device.index for tensor in given]))
        return step(params, *lists, grad_divisor=grad_divisor, found_inf=found_inf, **kinds)

    step = getattr(module, name)
    monkeypatch.setattr(module, name, spy)
    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(3, device=f"cuda:{k}")) for k in (1, 0, 1)]
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer = kind(params, foreach=True, capturable=True, **KINDS[kind])
        if scaled:  # as GradScaler sets them, on its own device
            optimizer.grad_scale = torch.empty((), device="cuda:0")
            optimizer.found_inf = torch.empty((), device="cuda:0")
        optimizer.step()
    given = 2 if scaled else 1  # the clip's divisor alone
    assert seen == [(1, [1] * given), (0, [0] * given)]


@compiled
def test_a_flag_added_up_over_devices_is_one_skipped_step():
    """GradScaler's flag is the number of devices that found an overflow."""
    params = [nn.Parameter(torch.ones(3))]
    optimizer = LAMB(params, fused=True)
    params[0].grad = torch.full((3,), torch.inf)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(2.0)
    optimizer.step()
    assert optimizer.state[params[0]]["step"].item() == 0
    assert params[0].tolist() == [1.0] * 3


def on(*devices):
    """Draw a matrix, a vector and a cube, by turns on the given devices."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator) for shape in ((4, 3), (5,), (2, 2, 2))]
    return [nn.Parameter(x.to(devices[k % len(devices)])) for k, x in enumerate(drawn)]


def train_scaled(optimizer, params):
    """Take five steps under a GradScaler, the second of which overflows on every device."""
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    for step, factor in enumerate((1.0, torch.inf, 2.0, 3.0, 0.5)):
        optimizer.zero_grad()
        drawn = torch.Generator().manual_seed(step)
        parts = [(p * torch.randn(p.shape, generator=drawn).to(p) * factor).sum() for p in params]
        scaler.scale(sum(part.to("cuda:0") for part in parts)).backward()
        scaler.step(optimizer)
        scaler.update()
    return params


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("devices", [("cuda:1",), ("cuda:1", "cuda:0")], ids=["other", "both"])
def test_other_devices_than_the_current_one_step_as_it_does(kind, devices):
    assert torch.cuda.current_device() == 0
    kinds = {"weight_decay": 0.01, **KINDS[kind]}
    one, two, loop = on(*devices), on("cuda:0"), on("cuda:0")
    optimizer = kind(one, fused=True, **kinds)
    train_scaled(optimizer, one)
    train_scaled(kind(two, fused=True, **kinds), two)
    train_scaled(kind(loop, foreach=False, **kinds), loop)
    for p, q, r in zip(one, two, loop, strict=True):
        assert torch.isfinite(p).all()
        torch.testing.assert_close(p.to(q.device), q, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(q, r, rtol=1e-5, atol=1e-5)
    assert kind is LARS or {optimizer.state[p]["step"].item() for p in one} == {4}
