# SPDX-License-Identifier: Apache-2.0
"""What every optimizer owes. `BROKEN` at the end shows that the suite can fail."""

import copy
import io
import pickle

import pytest
import torch
from dist_ranks import run_on_ranks
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from .cases import CASES, global_randomness, objects

OPTIMIZERS = [CASES[path] for path in objects("optimizer") if path in CASES]
every = pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)


def model(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return net.to(dtype)


def batch(step, dtype=torch.float32, rows=8):
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(rows, 6, generator=generator).to(dtype)


def train(net, optimizer, steps, dtype=torch.float32):
    for step in steps:
        optimizer.zero_grad()
        x = batch(step, dtype)
        (net(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def check_resume(build, dtype):
    whole = model(dtype)
    optimizer = build(whole.parameters())
    train(whole, optimizer, range(3), dtype)
    buffer = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    train(whole, optimizer, range(3, 7), dtype)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed = model(dtype, seed=5)
    resumed.load_state_dict(saved["model"])
    other = build(resumed.parameters())
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, range(3, 7), dtype)
    assert same(whole, resumed)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resumes_in_mid_run_bit_for_bit(case, dtype):
    check_resume(case.build, dtype)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_parameters_keep_their_dtype_and_loss_falls(case, dtype):
    net = model(dtype)
    x = batch(0, dtype)

    def loss():
        return float((net(x) - x.sum(1, keepdim=True)).square().mean().detach())

    before = loss()
    optimizer = case.build(net.parameters())
    train(net, optimizer, [0] * 60, dtype)
    assert {p.dtype for p in net.parameters()} == {dtype}
    assert loss() < 0.7 * before
    for state in optimizer.state.values():
        assert all(v.dtype != torch.bfloat16 for v in state.values() if torch.is_tensor(v))


@every
def test_leaves_global_randomness_and_gradients_alone(case):
    net = model()
    optimizer = case.build(net.parameters())
    net(batch(0)).sum().backward()
    kept = [p.grad.clone() for p in net.parameters()]
    before = global_randomness()
    optimizer.step()
    assert global_randomness() == before
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), kept, strict=True))


@every
def test_repr_names_its_settings(case):
    text = repr(case.build(model().parameters(), lr=0.0625))
    assert text.startswith(case.name)
    assert "lr: 0.0625" in text


@every
def test_bad_arguments_are_named(case):
    assert case.bad
    for kinds, error, message in case.bad:
        with pytest.raises(error, match=message):
            case.build(model().parameters(), **kinds)


@every
def test_a_closure_is_called_with_gradients_on_and_its_loss_returned(case):
    net = model()
    optimizer = case.build(net.parameters())
    before = [p.detach().clone() for p in net.parameters()]

    def closure():
        optimizer.zero_grad()
        loss = net(batch(0)).square().mean()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert float(loss) > 0
    assert not all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


@every
def test_without_gradients_nothing_happens(case):
    net, twin = model(), model()
    optimizer = case.build(net.parameters())
    optimizer.step()
    assert same(net, twin)
    assert len(optimizer.state) == 0


@every
def test_groups_have_settings_of_their_own_and_can_be_added_later(case):
    net, twin = model(), model()
    first, second = net[0].parameters(), net[2].parameters()
    optimizer = case.build(first)
    optimizer.add_param_group({"params": list(second), "lr": 0.0})
    train(net, optimizer, range(3))
    assert not same(net[0], twin[0])
    assert same(net[2], twin[2])


@every
def test_accumulated_gradients_are_one_large_batch(case):
    one, two = model(torch.float64), model(torch.float64)
    whole, parts = case.build(one.parameters()), case.build(two.parameters())
    for step in range(3):
        x = batch(step, torch.float64)
        for net, optimizer, pieces in ((one, whole, [x]), (two, parts, x.chunk(4))):
            optimizer.zero_grad()
            for piece in pieces:
                (net(piece).square().mean() / len(pieces)).backward()
            optimizer.step()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


@every
def test_all_forms_agree(case):
    results = []
    for kinds in ({"foreach": False}, {"foreach": True}, {}):
        net = model(torch.float64)
        train(net, case.build(net.parameters(), **kinds), range(5), torch.float64)
        results.append(net)
    for other in results[1:]:
        for p, q in zip(results[0].parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


@every
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_on_like_the_original(case, clone):
    net = model()
    optimizer = case.build(net.parameters())
    train(net, optimizer, range(3))
    other, copied = clone((net, optimizer))
    train(net, optimizer, range(3, 6))
    train(other, copied, range(3, 6))
    assert same(net, other)


@every
def test_a_rate_in_a_tensor_is_followed(case):
    one, two = model(), model()
    rate = torch.tensor(0.1)
    tensor, number = case.build(one.parameters(), lr=rate), case.build(two.parameters(), lr=0.1)
    train(one, tensor, range(2))
    train(two, number, range(2))
    rate.fill_(0.01)
    number.param_groups[0]["lr"] = 0.01
    train(one, tensor, range(2, 4))
    train(two, number, range(2, 4))
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@every
def test_odd_shapes(case):
    shapes = [(), (0,), (1, 1), (3, 5)]
    params = [nn.Parameter(torch.full(shape, 0.5)) for shape in shapes]
    params.append(nn.Parameter(torch.full((4, 6), 0.5).t()))  # not contiguous
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    case.build(params).step()
    for p, old in zip(params, before, strict=True):
        assert p.shape == old.shape
        assert p.numel() == 0 or bool((p < old).all())


def _ddp(rank, size, path):
    """Train with whole state on every rank, then with ZeRO's shares; return both."""
    found = []
    for shares in (False, True):
        net = nn.parallel.DistributedDataParallel(model(torch.float64))
        build = CASES[path].build
        if shares:
            optimizer = ZeroRedundancyOptimizer(net.parameters(), build)
        else:
            optimizer = build(net.parameters())
        for step in range(4):
            optimizer.zero_grad()
            net(batch(step, torch.float64)[rank::size]).square().mean().backward()
            optimizer.step()
        found.append([p.detach() for p in net.parameters()])
    return found


@every
@pytest.mark.dist
def test_two_ranks_step_like_one(case):
    net = model(torch.float64)
    optimizer = case.build(net.parameters())
    for step in range(4):
        optimizer.zero_grad()
        net(batch(step, torch.float64)).square().mean().backward()
        optimizer.step()
    for found in run_on_ranks(_ddp, case.path):
        for parameters in found:
            for p, q in zip(net.parameters(), parameters, strict=True):
                torch.testing.assert_close(p.detach(), q, rtol=1e-10, atol=1e-10)


class Forgetful(torch.optim.SGD):
    """Broken on purpose: its saved state lacks the momentum."""

    def state_dict(self):
        return {**super().state_dict(), "state": {}}


def test_the_suite_catches_an_optimizer_that_forgets():
    with pytest.raises(AssertionError):
        check_resume(lambda params: Forgetful(params, lr=0.1, momentum=0.9), torch.float32)
