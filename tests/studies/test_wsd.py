# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch
from torch import nn

from batchery.optim import WSDScheduler
from batchery.studies import tuning, wind_tunnel, wsd
from batchery.studies.study import SCALES, Trial
from batchery.studies.wind_tunnel import (
    Run,
    StableRun,
    Tunnel,
    llama,
    plane_prediction,
    stable_run,
)
from batchery.studies.wsd import PLANS, STUDY, PerceptronTask, Plan

CPU = torch.device("cpu")
TASK = PerceptronTask(width=16, batch=8)


def test_a_branch_ends_as_a_planned_run_and_leaves_the_stable_run_alone():
    """Weights, optimizer, schedule and data: equal to the bit, or one was not forked."""
    found = stable_run(TASK, 3, 0.01, 4, (20, 40), shares=(0.25, 0.1))

    def planned(steps, num_decay):
        def schedule(optimizer):
            return WSDScheduler(optimizer, 4, steps, num_decay, offset=1)

        return Run(TASK, 3, 0.01, schedule).advance(steps).loss()

    assert found.decayed[0.25] == [planned(20, 5), planned(40, 10)]
    assert found.decayed[0.1] == [planned(20, 2), planned(40, 4)]

    def constant(optimizer):
        return WSDScheduler(optimizer, 4, offset=1)

    run = Run(TASK, 3, 0.01, constant)
    assert found.undecayed == [run.advance(20).loss(), run.advance(40).loss()]
    run = Run(TASK, 3, 0.01, constant)
    assert found.before == [run.advance(15).loss(), run.advance(30).loss()]
    assert found.steps == 30 + 5 + 10


def test_the_share_of_the_steps_is_the_one_claimed():
    """62 % as budgets double; 61.4 % with three of them."""
    for scale in ("cpu", "gpu"):
        budgets = PLANS[scale].budgets
        spent = 0.9 * budgets[-1] + 0.1 * sum(budgets)
        assert spent / sum(budgets) == pytest.approx(0.614, abs=0.001)


def test_cosine_and_wsd_warm_up_alike_and_cosine_ends_at_zero():
    def rates(make, steps):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = make(optimizer)
        found = []
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    cosine = rates(lambda optimizer: wsd._cosine(optimizer, 5, 25), 26)
    stable = rates(lambda optimizer: WSDScheduler(optimizer, 5, offset=1), 6)
    assert cosine[:6] == stable
    assert cosine[15] == pytest.approx(0.5, abs=1e-12)
    assert cosine[25] == pytest.approx(0.0, abs=1e-12)


def test_the_plane_is_exact_on_a_product_of_powers():
    rows = np.array([(n, d, 7 * n**-0.1 * d**-0.2) for n in (1e3, 1e4, 1e5) for d in (1e5, 1e6)])
    found = plane_prediction(rows[:4], rows[4:, :2])
    assert found == pytest.approx(rows[4:, 2], rel=1e-10)


def test_parameters_are_counted_without_the_embedding():
    task = wind_tunnel.LlamaTask(llama(16, 1, batch=2, context=8, head=16), CPU)
    mlp = 32 * 16 * 3
    assert task.parameters == 4 * 16 * 16 + mlp + 3 * 16


def test_the_claims_are_those_of_the_specification():
    claims = {(c.arm, c.baseline, c.metric): c for c in STUDY.comparisons if c.claim}
    for number in (1, 2, 3):
        bar = claims["wsd", "cosine", f"loss_{number}"]
        assert (bar.require, bar.margin) == ("non-inferior", 0.02)
    assert ("wsd", "wsd-2.5", "loss_mean") in claims
    assert ("wsd", "stable", "loss_mean") in claims
    assert ("mup", "sp", "regret") in claims
    assert set(STUDY.seeds) == set(SCALES)


def transfer(monkeypatch, best_of):
    """Run both arms on a row of three widths whose best rates are given, a width to each."""
    sizes = tuple(llama(width, 1, batch=4, context=16, head=16) for width in (16, 32, 64))
    monkeypatch.setitem(wind_tunnel.TUNNELS, "cpu", Tunnel(sizes, 0.0, 0, (), ()))

    def walked(task, seed, warmup, start):
        best = best_of[task.size.hidden] if task.mup is None else start
        return tuning.walk(lambda lr: [abs(math.log2(lr / best))], start)

    monkeypatch.setattr(wind_tunnel, "_walk", walked)
    prepared = {"tunnel": {"narrow": {"lr": [0.25]}}}
    trial = Trial(0, "cpu", CPU, prepared)
    return STUDY.arms["sp"](trial), STUDY.arms["mup"](trial)


def test_the_row_of_widths_is_judged_at_its_end_and_its_spread_is_the_farthest(monkeypatch):
    sp, mup = transfer(monkeypatch, {32: 0.25 / 8, 64: 0.25 / 4})
    assert sp.metrics == {"regret": 2.0, "cells": 2.0, "spread": 3.0, "loss_wide": 2.0}
    assert sp.series["cells"] == [-3.0, -2.0]
    assert sp.series["regret"] == [3.0, 2.0]
    assert mup.metrics == {"regret": 0.0, "cells": 0.0, "spread": 0.0, "loss_wide": 0.0}
    rates = {32: [], 64: []}
    for width, lr in zip(sp.series["width"], sp.series["lr"], strict=True):
        rates[width].append(lr)
    assert rates == {
        32: [0.25 / 16, 0.25 / 8, 0.25 / 4, 0.125, 0.25, 0.5],
        64: [0.25 / 8, 0.25 / 4, 0.125, 0.25, 0.5],
    }


def test_the_rows_begin_at_the_tuned_width_and_end_eight_times_as_wide():
    for scale in ("cpu", "gpu"):
        widths = [size.hidden for size in wind_tunnel.TUNNELS[scale].widths]
        assert [width / widths[0] for width in widths] == [1, 2, 4, 8]


def planted_batch_law(monkeypatch, place, exponent):
    """Fit runs of the gpu's grid whose best batch at a loss of 1.5, near their end, is `place`."""
    tunnel = wind_tunnel.TUNNELS["gpu"]
    total = math.log(tunnel.batches[0].batch * tunnel.batches[0].context * tunnel.batches[0].steps)
    scaled = np.linspace(2.0, -1.0, 4_001)  # log of loss / 1.5
    rates = set()

    def run(task, seed, lr, warmup, marks):
        batch = task.size.batch * task.size.context
        away = np.log(batch / place) + exponent * scaled
        log_tokens = total - 6 * scaled + 0.05 * away**2
        found = np.exp(np.interp(np.log(np.multiply(batch, marks)), log_tokens, scaled))
        rates.add(lr)
        return StableRun({wind_tunnel.DECAY: (1.5 * found).tolist()}, [], [], 0)

    monkeypatch.setattr(wind_tunnel, "stable_run", run)
    found = wind_tunnel._batch_law(tunnel, 2.0**-8, Trial(0, "gpu", CPU))
    assert rates == {2.0**-8}
    return found


def test_the_batch_law_of_the_gpu_grid_finds_a_planted_one(monkeypatch):
    sizes = [size.batch * size.context for size in wind_tunnel.TUNNELS["gpu"].batches]
    assert len(sizes) == 5
    found = planted_batch_law(monkeypatch, sizes[2], 3.0)
    assert found["exponent"] == pytest.approx(3.0, rel=0.05)  # readings are interpolated
    assert found["coef"] / 1.5**3 == pytest.approx(sizes[2], rel=0.05)
    assert found["ci"][0] < found["exponent"] < found["ci"][1]
    assert all(sizes[0] < best < sizes[-1] for _, best in found["best"])


def test_a_best_batch_outside_the_grid_is_no_law(monkeypatch):
    found = planted_batch_law(monkeypatch, 128, 3.0)
    assert found["exponent"] is None
    assert "best batch" in found["reason"]


@pytest.mark.slow
def test_the_gpu_path_runs_at_toy_size(monkeypatch):
    """All that scale `gpu` does, on the CPU: Llama schedules, tuning, both laws, every metric."""

    def size(width, steps=0):
        return llama(width, 1, batch=4, context=16, steps=steps, head=16)

    plan = Plan(size(16), (10, 20, 40), 2, 2.0**-6)
    tunnel = Tunnel(
        (size(16, 12), size(32, 12), size(48, 12)),
        2.0**-6,
        2,
        tuple(map(size, (16, 32, 48, 64))),
        (10, 20, 40),
        bootstrap=3,
        batches=tuple(
            llama(16, 1, batch=batch, context=16, steps=64 // batch, head=16)
            for batch in (1, 2, 4, 8)
        ),
    )
    monkeypatch.setitem(wsd.PLANS, "gpu", plan)
    monkeypatch.setitem(wind_tunnel.TUNNELS, "gpu", tunnel)
    monkeypatch.setattr(tuning, "_MOST_RATES", 4)
    prepared = STUDY.prepare(Trial(0, "gpu", CPU))
    assert len(prepared["cosine"]["lr"]) == 3
    batch_law = prepared["tunnel"]["batch_law"]
    assert sorted(set(batch_law["batch"])) == [16, 32, 64, 128]
    assert len({len(batch_law[name]) for name in ("losses", "batch", "tokens")}) == 1
    assert "exponent" in batch_law
    found = {arm: run(Trial(0, "gpu", CPU, prepared)) for arm, run in STUDY.arms.items()}
    for comparison in STUDY.comparisons:
        for arm in (comparison.arm, comparison.baseline):
            assert math.isfinite(found[arm].metrics[comparison.metric])
    assert len(found["law"].series["alpha"]) == 3
    for arm in ("mup", "sp"):
        assert list(dict.fromkeys(found[arm].series["width"])) == [32, 48]
