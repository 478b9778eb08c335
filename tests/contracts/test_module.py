# SPDX-License-Identifier: Apache-2.0
"""What every module owes. A broken one at the end shows that the suite can fail."""

import copy
import io
import pickle

import pytest
import torch
from dist_ranks import run_on_ranks
from torch import nn

from .cases import CASES, global_randomness, objects

MODULES = [CASES[path] for path in objects("module") if path in CASES]
every = pytest.mark.parametrize("case", MODULES, ids=lambda case: case.name)


class Trained(nn.Module):
    """The module between two layers that are trained around it, whatever it trains itself."""

    def __init__(self, module, x, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first = nn.Linear(x.shape[-1], x.shape[-1])
            self.module = module
            self.last = nn.Linear(module(x).shape[-1], 1)

    def forward(self, x):
        return self.last(self.module(self.first(x)))


def train(net, batches, lr=0.05):
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=lr)
    for x in batches:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return net


def batches_like(x, steps):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(x.shape, generator=generator) for _ in steps]


def written(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def check_resume(build):
    """A module loaded in mid-training, into one of other weights, goes on like the first."""
    module, x = build(seed=0)
    batches = batches_like(x, range(6))
    whole = train(Trained(module, x), batches[:3])
    state = written(whole.state_dict())
    other = Trained(build(seed=1)[0], x, seed=1)
    assert not torch.equal(other(x), whole(x))
    other.load_state_dict(state)
    for net in (whole, other):
        train(net, batches[3:])
    assert torch.equal(other(x), whole(x))
    one, two = whole.state_dict(), other.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@every
def test_resumes_in_mid_training_bit_for_bit(case):
    check_resume(case.build)


@every
def test_the_dtype_follows_the_input(case):
    module, x = case.build()
    wanted = module(x)
    assert wanted.dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        found = copy.deepcopy(module).to(dtype)(x.to(dtype))
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.05)


@every
@pytest.mark.gpu
def test_the_device_follows_the_input(case):
    module, x = case.build()
    wanted = module(x)
    found = module.to("cuda")(x.to("cuda"))
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-3, atol=1e-3)


@every
def test_evaluation_repeats_itself_and_leaves_input_and_global_randomness_alone(case):
    module, x = case.build()
    module.eval()
    before, kept = global_randomness(), x.clone()
    assert torch.equal(module(x), module(x))
    assert global_randomness() == before
    assert torch.equal(x, kept)


@every
def test_gradients_reach_the_input(case):
    module, x = case.build()
    module.eval()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    x.requires_grad_()
    slope = (torch.autograd.grad(module(x).double().square().sum(), x)[0] * direction).sum()
    with torch.no_grad():
        step = 1e-3  # of float32: the difference is good to three digits
        ends = [module(x + sign * step * direction).double().square().sum() for sign in (1, -1)]
    assert float(slope) == pytest.approx(float(ends[0] - ends[1]) / (2 * step), rel=1e-2)


@every
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_a_copy_is_whole_and_its_own(case, clone):
    module, x = case.build()
    wanted = module(x)
    other = clone(module)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.zero_()
    assert torch.equal(other(x), wanted)


@every
def test_a_state_of_another_size_is_refused(case):
    small = case.build()[0]
    large = case.build(n=48)[0]
    with pytest.raises(RuntimeError, match=type(small).__name__):
        small.load_state_dict(large.state_dict())


@every
def test_repr_names_it_and_bad_arguments_are_named(case):
    assert repr(case.build()[0]).startswith(case.name)
    assert case.bad
    for kinds, error, message in case.bad:
        with pytest.raises(error, match=message):
            case.build(**kinds)


def _on_a_rank(rank, size, path):
    module, x = CASES[path].build()
    whole = torch.cat([x, x + 1])
    net = nn.parallel.DistributedDataParallel(Trained(module, x), broadcast_buffers=False)
    train(net, [batch[rank::size] for batch in batches_like(whole, range(3))])
    return [parameter.detach() for parameter in net.parameters()]


@every
@pytest.mark.dist
def test_two_ranks_train_like_one(case):
    module, x = case.build()
    net = train(Trained(module, x), batches_like(torch.cat([x, x + 1]), range(3)))
    for found in run_on_ranks(_on_a_rank, case.path):
        for parameter, other in zip(net.parameters(), found, strict=True):
            torch.testing.assert_close(parameter.detach(), other, rtol=1e-5, atol=1e-6)


class Forgetful(nn.Module):
    """Broken on purpose: its weight is no part of its state."""

    def __init__(self, seed):
        super().__init__()
        self.scale = torch.rand(4, generator=torch.Generator().manual_seed(seed))

    def forward(self, x):
        return x * self.scale


def test_the_suite_catches_a_module_that_forgets():
    with pytest.raises(AssertionError):
        check_resume(lambda seed: (Forgetful(seed), torch.ones(3, 4)))
