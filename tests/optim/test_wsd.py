# SPDX-License-Identifier: Apache-2.0
import copy
import io
import math
import warnings
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from batchery.optim import WSDScheduler, wsd_factor
from batchery.optim.wsd_curve import DecayShape


def sgd(lrs=(0.3,), tensor=False):
    groups = [
        {"params": [nn.Parameter(torch.zeros(2))], "lr": torch.tensor(lr) if tensor else lr}
        for lr in lrs
    ]
    return torch.optim.SGD(groups, lr=1.0)


def advance(scheduler, steps, n=1):
    """The rate of each of the next updates, first group."""
    found = []
    for _ in range(steps):
        found.append(float(scheduler.optimizer.param_groups[0]["lr"]))
        scheduler.optimizer.step()
        scheduler.step(n)
    return found


# values


@pytest.mark.parametrize("shape", get_args(DecayShape))
def test_scheduler_follows_the_pure_function(shape):
    scheduler = WSDScheduler(sgd(), 10, 100, 20, shape=shape, min_ratio=0.1, offset=1)
    kinds = {"warmup": 10, "stable": 70, "decay": 20, "shape": shape, "min_ratio": 0.1, "offset": 1}
    assert advance(scheduler, 110) == [0.3 * wsd_factor(s, **kinds) for s in range(110)]


def test_fraction_is_of_the_total():
    scheduler = WSDScheduler(sgd(), 10, 200)
    assert (scheduler.decay_start, scheduler.decay_length) == (180, 20)
    branch = WSDScheduler(sgd(), 10)
    advance(branch, 180)
    assert branch.start_decay() == 20  # s / 9


# decided while training


@pytest.mark.parametrize("at", [3, 10, 11, 90])
def test_a_fork_replays_a_planned_run(at):
    """From any stable step; before the end of the warm-up the fork goes on from what it reached."""
    trunk = WSDScheduler(sgd(), 10)
    advance(trunk, at)
    state = trunk.fork(10)
    branch = WSDScheduler(sgd(), 10)
    branch.load_state_dict(state)
    found = advance(branch, 15)
    if at >= 10:
        planned = WSDScheduler(sgd(), 10, at + 10, 10)
        assert advance(planned, at + 15)[at:] == found
    else:
        top = 0.3 * at / 10
        wanted = [top * (1 - math.sqrt(min(p, 10) / 10)) for p in range(15)]
        assert found == pytest.approx(wanted, abs=1e-12)
    assert trunk.decay_start is None
    assert advance(trunk, 200)[-1] == 0.3


def test_start_decay_equals_a_planned_run_and_is_refused_twice():
    scheduler = WSDScheduler(sgd(), 5)
    before = advance(scheduler, 40)
    assert scheduler.phase == "stable"
    assert scheduler.time_left() == math.inf
    scheduler.start_decay(8)
    assert scheduler.phase == "decay"
    assert scheduler.time_left() == 8
    for method in (scheduler.start_decay, scheduler.fork):
        with pytest.raises(ValueError, match="started at 40 steps"):
            method()
    assert before + advance(scheduler, 12) == advance(WSDScheduler(sgd(), 5, 48, 8), 52)
    assert scheduler.phase == "done"
    assert scheduler.time_left() == 0
    with pytest.raises(ValueError, match="started at 40 steps"):
        scheduler.start_decay()


def test_a_decay_from_a_rate_of_zero_is_refused():
    """It would hold the rate at 0 for ever."""
    scheduler = WSDScheduler(sgd(), 5)
    for method in (scheduler.start_decay, scheduler.fork):
        message = f"WSDScheduler: {method.__name__} needs a rate above 0 to fall from"
        with pytest.raises(ValueError, match=message):
            method()
    assert advance(scheduler, 2) == pytest.approx([0, 0.06])
    assert scheduler.start_decay(4) == 4
    scheduler.rewarm(3)
    with pytest.raises(ValueError, match="start_decay needs a rate above 0"):
        scheduler.start_decay()
    for kinds in ({"offset": 1}, {"warmup_start_ratio": 0.1}):
        assert WSDScheduler(sgd(), 5, **kinds).start_decay(4) == 4


def test_start_decay_replaces_a_planned_one():
    scheduler = WSDScheduler(sgd(), 5, 1000)
    advance(scheduler, 90)
    assert scheduler.start_decay() == 10
    assert scheduler.time_left() == 10


def test_a_forked_training_run_equals_a_planned_one():
    """Weights, optimizer, schedule and data order forked together: bit for bit."""
    data = torch.randn(60, 4, 6, generator=torch.Generator().manual_seed(0))

    def build():
        model = nn.Linear(6, 1)
        with torch.no_grad():
            model.weight.fill_(0.1)
            model.bias.zero_()
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    def train(model, optimizer, scheduler, rows):
        for row in rows:
            optimizer.zero_grad()
            (model(row) - row.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()
            scheduler.step()

    planned, optimizer = build()
    train(planned, optimizer, WSDScheduler(optimizer, 5, 40, 10), data[:40])

    model, optimizer = build()
    trunk = WSDScheduler(optimizer, 5)
    train(model, optimizer, trunk, data[:30])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), trunk.fork(10)))
    train(model, optimizer, trunk, data[30:])  # the trunk goes on

    branch, branch_optimizer = build()
    schedule = WSDScheduler(branch_optimizer, 5)
    branch.load_state_dict(saved[0])
    branch_optimizer.load_state_dict(saved[1])
    schedule.load_state_dict(saved[2])
    train(branch, branch_optimizer, schedule, data[30:40])
    assert torch.equal(branch.weight, planned.weight)
    assert not torch.equal(model.weight, planned.weight)


@pytest.mark.parametrize("at", [0, 4, 20, 31, 34, 40, 45])
def test_resume_at_any_point_is_exact(at):
    whole = advance(WSDScheduler(sgd(), 8, 40), 50)
    first = WSDScheduler(sgd(), 8, 40)
    before = advance(first, at)
    again = WSDScheduler(sgd(), 8, 40)
    again.load_state_dict(first.state_dict())
    assert before + advance(again, 50 - at) == whole


def test_rebuilding_on_a_decayed_optimizer_does_not_compound():
    first = WSDScheduler(sgd(), 2, 20, 10)
    advance(first, 15)
    optimizer = sgd()
    optimizer.load_state_dict(first.optimizer.state_dict())
    again = WSDScheduler(optimizer, 2, 20, 10)
    again.load_state_dict(first.state_dict())
    assert again.base_lrs == [0.3]
    assert advance(again, 6) == advance(first, 6)


def test_rewarm_after_a_decay_opens_a_new_stable_phase():
    scheduler = WSDScheduler(sgd(), 2, 20, 10)
    advance(scheduler, 20)
    scheduler.rewarm(4)
    assert scheduler.phase == "warmup"
    assert advance(scheduler, 6) == pytest.approx([0, 0.075, 0.15, 0.225, 0.3, 0.3])
    assert scheduler.phase == "stable"
    assert scheduler.time_left() == math.inf
    scheduler.start_decay(3)
    assert advance(scheduler, 4)[-1] == 0
    scheduler.rewarm(0)  # WSD-S: straight back to the peak
    assert advance(scheduler, 1) == [0.3]


def test_rewarm_in_the_stable_phase_keeps_the_plan():
    scheduler = WSDScheduler(sgd(), 2, 30, 10, shape="linear")
    advance(scheduler, 10)
    with pytest.raises(ValueError, match="n must be <= 10"):
        scheduler.rewarm(11)
    scheduler.rewarm(5)
    assert advance(scheduler, 10) == pytest.approx([0, 0.06, 0.12, 0.18, 0.24] + [0.3] * 5)
    assert scheduler.phase == "decay"
    assert advance(scheduler, 2) == pytest.approx([0.3, 0.27])


# units


def test_samples_with_a_constant_batch_equal_steps():
    steps = advance(WSDScheduler(sgd(), 8, 40, 10), 45)
    samples = WSDScheduler(sgd(), 8 * 32, 40 * 32, 10 * 32, unit="samples")
    assert advance(samples, 45, n=32) == steps


def test_tokens_with_a_batch_that_changes():
    scheduler = WSDScheduler(sgd(), 0, 1000, 500, shape="linear", unit="tokens")
    for n, rate in ((400, 0.3), (200, 0.24), (150, 0.15), (400, 0.0)):
        scheduler.optimizer.step()
        scheduler.step(n)
        assert scheduler.get_last_lr() == pytest.approx([rate])
    assert scheduler.phase == "done"


@pytest.mark.parametrize("unit", ["samples", "tokens"])
def test_a_step_that_does_not_say_how_many_is_refused(unit):
    """Counting 1 token a step would never leave the warm-up, and nobody would notice."""
    scheduler = WSDScheduler(sgd(), 5, unit=unit)
    scheduler.optimizer.step()
    with pytest.raises(ValueError, match=f"n must be a number of {unit}, got None"):
        scheduler.step()
    with pytest.raises(TypeError, match="n must be an integer, got float"):
        scheduler.step(1.5)


def test_the_end_can_raise():
    scheduler = WSDScheduler(sgd(), 2, 20, 10, on_end="raise")
    advance(scheduler, 20)
    with pytest.raises(RuntimeError, match="ended at 20 steps"):
        scheduler.step()


# rates


def test_a_tensor_rate_is_filled_in_place_and_groups_keep_their_ratio():
    optimizer = sgd((0.4, 0.1), tensor=True)
    held = [group["lr"] for group in optimizer.param_groups]
    scheduler = WSDScheduler(optimizer, 4, 20, 10)
    plain = WSDScheduler(sgd((0.4, 0.1)), 4, 20, 10)
    for _ in range(25):
        for group, tensor, other in zip(
            optimizer.param_groups, held, plain.optimizer.param_groups, strict=True
        ):
            assert group["lr"] is tensor
            assert float(tensor) == pytest.approx(other["lr"], rel=1e-6, abs=1e-9)
        for s in (scheduler, plain):
            s.optimizer.step()
            s.step()


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_device():
    weight = nn.Parameter(torch.zeros(2, device="cuda"))
    optimizer = torch.optim.AdamW([weight], lr=torch.tensor(0.1, device="cuda"), fused=True)
    scheduler = WSDScheduler(optimizer, 4, 20, 10)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(25):
            scheduler.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_order_of_calls_is_checked():
    scheduler = WSDScheduler(sgd(), 4)
    with pytest.warns(UserWarning, match=r"optimizer\.step"):
        scheduler.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        advance(WSDScheduler(sgd(), 4), 3)


def test_weight_decay_can_keep_its_strength():
    """With gradients of zero AdamW only decays: by 1 - lr · λ, or not at all at a rate of 0."""
    groups = [
        {"params": [nn.Parameter(torch.ones(1, dtype=torch.float64))], "weight_decay": decay}
        for decay in (0.5, 0.0)
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    scheduler = WSDScheduler(optimizer, 3, 20, 10, decouple_wd=True)
    first, second = (group["params"][0] for group in optimizer.param_groups)
    for step in range(24):
        if step == 15:  # rebuilt on an optimizer in the middle of its decay
            saved = scheduler.state_dict()
            scheduler = WSDScheduler(optimizer, 3, 20, 10, decouple_wd=True)
            scheduler.load_state_dict(saved)
            assert scheduler.base_wds == [0.5, 0.0]
        before = float(first.detach())
        for parameter in (first, second):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        scheduler.step()
        kept = 0.95 if 1 <= step < 20 else 1.0
        assert float(first.detach()) == pytest.approx(before * kept, rel=1e-12)
    assert float(second.detach()) == 1.0
    with pytest.raises(ValueError, match="decouple_wd needs an optimizer .* got 'Rprop'"):
        WSDScheduler(torch.optim.Rprop([first]), 3, decouple_wd=True)


# state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_warmup": 9}, "num_warmup=8, this object num_warmup=9"),
        ({"shape": "linear"}, "shape='1-sqrt', this object shape='linear'"),
        ({"num_training": 80}, "num_training=40, this object num_training=80"),
        ({"unit": "tokens"}, "unit='steps', this object unit='tokens'"),
    ],
)
def test_a_state_of_other_settings_is_refused(change, message):
    first = WSDScheduler(sgd(), 8, 40)
    advance(first, 20)
    settings = {"num_warmup": 8, "num_training": 40} | change
    other = WSDScheduler(sgd(), **settings)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(first.state_dict())
    if "unit" in change:
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(first.state_dict(), strict=False)


def test_not_strict_extends_a_run_but_keeps_a_decay_that_began():
    first = WSDScheduler(sgd(), 8, 40, 4)
    advance(first, 20)
    longer = WSDScheduler(sgd(), 8, 80, 8)
    longer.load_state_dict(first.state_dict(), strict=False)
    assert (longer.last_epoch, longer.decay_start) == (20, 72)
    advance(first, 18)
    longer.load_state_dict(first.state_dict(), strict=False)
    assert (longer.decay_start, longer.decay_length) == (36, 4)
    assert advance(longer, 3) == advance(first, 3)


def test_not_strict_refuses_a_plan_that_lies_behind():
    first = WSDScheduler(sgd(), 8)
    advance(first, 60)
    with pytest.raises(ValueError, match="num_training must put the decay after 60, .* got 50"):
        WSDScheduler(sgd(), 8, 50, 10).load_state_dict(first.state_dict(), strict=False)


def test_numbers_of_numpy_leave_a_plain_state():
    scheduler = WSDScheduler(sgd(), np.int64(8), np.int64(40), np.float64(0.25))
    scheduler.optimizer.step()
    scheduler.step(np.int64(1))
    buffer = io.BytesIO()
    torch.save(scheduler.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert loaded["decay_length"] == 10
    assert {type(value) for value in loaded.values()} <= {int, float, str, bool, list, type(None)}


def test_groups_added_behind_the_schedulers_back_are_named():
    """It knows no peak rate for them."""
    scheduler = WSDScheduler(sgd(), 8)
    scheduler.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ValueError, match="WSDScheduler: optimizer must keep the 1 groups .* got 2"):
        scheduler.rewarm(0)
    scheduler.optimizer.step()
    with pytest.raises(ValueError, match="WSDScheduler: optimizer must keep the 1 groups .* got 2"):
        scheduler.step()


def test_foreign_states_are_refused():
    with pytest.raises(TypeError, match="WSDScheduler: state_dict must be a mapping, got NoneType"):
        WSDScheduler(sgd(), 8).load_state_dict(None)
    state = WSDScheduler(sgd((0.1, 0.2)), 8).state_dict()
    with pytest.raises(ValueError, match="base_lrs must be of 1 groups, got 2"):
        WSDScheduler(sgd(), 8).load_state_dict(state)
    with pytest.raises(ValueError, match="no 'num_warmup'"):
        WSDScheduler(sgd(), 8).load_state_dict({"last_epoch": 3})


# errors


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"num_decay": 0.0}, r"num_decay must be > 0 and <= 1, got 0\.0"),
        ({"num_decay": 1.5}, r"num_decay must be > 0 and <= 1, got 1\.5"),
        ({"num_decay": 1.0}, r"num_decay must be < 1 as a fraction .* got 1\.0"),
        ({"num_decay": 0}, "num_decay must be >= 1, got 0"),
        ({"num_warmup": -1}, "num_warmup must be >= 0, got -1"),
        (
            {"num_training": 24, "num_decay": 20},
            r"num_training must be >= num_warmup \+ num_decay = 5 \+ 20, got 24",
        ),
        ({"shape": "log"}, "shape must be one of .*'1-sqrt'.* got 'log'"),
        ({"shape": "exp"}, "min_ratio must be > 0 with shape 'exp' or half_life given"),
        ({"shape": "inverse"}, "min_ratio must be > 0 with shape 'inverse'"),
        ({"half_life": 5.0}, "half_life belongs to shape 'exp'"),
        ({"min_ratio": 2.0}, r"min_ratio must be >= 0 and <= 1, got 2\.0"),
        ({"unit": "epochs"}, "unit must be one of"),
        ({"on_end": "stop"}, "on_end must be one of"),
        ({"offset": 2}, "offset must be one of 0, 1, got 2"),
    ],
)
def test_bad_arguments_are_named(kinds, message):
    with pytest.raises(ValueError, match=f"WSDScheduler: {message}"):
        WSDScheduler(sgd(), **{"num_warmup": 5, **kinds})


def test_a_position_on_an_optimizer_without_peaks_is_refused_in_one_line():
    with pytest.raises(ValueError, match="WSDScheduler: last_epoch needs .* got 5") as raised:
        WSDScheduler(sgd(), 5, last_epoch=5)
    assert "\n" not in str(raised.value)


def test_negative_steps_are_refused():
    scheduler = WSDScheduler(sgd(), 5)
    with pytest.raises(ValueError, match="WSDScheduler: n must be >= 0, got -2"):
        scheduler.step(-2)
    with pytest.raises(ValueError, match="num_decay must be >= 1, got -3"):
        scheduler.start_decay(-3)
