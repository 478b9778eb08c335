# SPDX-License-Identifier: Apache-2.0
"""What every scheduler owes. A broken one at the end shows that the suite can fail."""

import io
import math

import pytest
import torch
from dist_ranks import run_on_ranks
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from .cases import CASES, global_randomness, objects

SCHEDULERS = [CASES[path] for path in objects("scheduler") if path in CASES]
every = pytest.mark.parametrize("case", SCHEDULERS, ids=lambda case: case.name)


def optimizer(lrs=(0.1, 0.4), tensor=False):
    groups = [
        {"params": [nn.Parameter(torch.zeros(2))], "lr": torch.tensor(lr) if tensor else lr}
        for lr in lrs
    ]
    return torch.optim.SGD(groups, lr=1.0)


def rates(scheduler, steps):
    found = []
    for _ in range(steps):
        found.append([float(group["lr"]) for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def check_resume(build, at, steps=25):
    whole = rates(build(optimizer()), steps)
    first = build(optimizer())
    before = rates(first, at)
    buffer = io.BytesIO()
    saved = {"optimizer": first.optimizer.state_dict(), "scheduler": first.state_dict()}
    torch.save(saved, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    again = build(optimizer())
    again.optimizer.load_state_dict(loaded["optimizer"])
    again.load_state_dict(loaded["scheduler"])
    assert before + rates(again, steps - at) == whole


@every
def test_it_is_an_lr_scheduler(case):
    assert isinstance(case.build(optimizer()), LRScheduler)


@every
@pytest.mark.parametrize("at", [1, 2, 3, 5, 10, 18, 19, 20, 23])
def test_resumes_anywhere_bit_for_bit(case, at):
    check_resume(case.build, at)


@every
def test_rates_are_finite_never_negative_and_keep_the_groups_ratio(case):
    for low, high in rates(case.build(optimizer()), 25):
        assert math.isfinite(low)
        assert low >= 0
        assert high == pytest.approx(4 * low, rel=1e-12)


@every
def test_the_last_rates_are_those_of_the_groups(case):
    scheduler = case.build(optimizer())
    for _ in range(25):
        scheduler.optimizer.step()
        scheduler.step()
        groups = [group["lr"] for group in scheduler.optimizer.param_groups]
        assert scheduler.get_last_lr() == groups


@every
def test_a_rate_in_a_tensor_is_changed_in_place(case):
    scheduler = case.build(optimizer(tensor=True))
    tensors = [group["lr"] for group in scheduler.optimizer.param_groups]
    found = rates(scheduler, 25)
    assert all(
        group["lr"] is tensor
        for group, tensor in zip(scheduler.optimizer.param_groups, tensors, strict=True)
    )
    wanted = rates(case.build(optimizer()), 25)
    for a, b in zip(found, wanted, strict=True):
        assert a == pytest.approx(b, rel=1e-6)


@every
def test_leaves_global_randomness_alone(case):
    before = global_randomness()
    rates(case.build(optimizer()), 5)
    assert global_randomness() == before


@every
def test_repr_names_it_and_bad_arguments_are_named(case):
    assert repr(case.build(optimizer())).startswith(case.name)
    assert case.bad
    for kinds, error, message in case.bad:
        with pytest.raises(error, match=message):
            case.build(optimizer(), **kinds)


def _on_rank(rank, size, path):
    return rates(CASES[path].build(optimizer()), 25)


@every
@pytest.mark.dist
def test_every_rank_has_the_rates_of_one_process(case):
    wanted = rates(case.build(optimizer()), 25)
    assert run_on_ranks(_on_rank, case.path) == [wanted, wanted]


class Forgetful(LRScheduler):
    """Broken on purpose: how often it was called is not saved."""

    def __init__(self, optimizer):
        self.calls = 0
        super().__init__(optimizer)

    def get_lr(self):
        self.calls += 1
        return [base / self.calls for base in self.base_lrs]

    def state_dict(self):
        return {k: v for k, v in super().state_dict().items() if k != "calls"}


def test_the_suite_catches_a_scheduler_that_forgets():
    with pytest.raises(AssertionError):
        check_resume(Forgetful, 5)
