# SPDX-License-Identifier: Apache-2.0
"""What the study simulates is what the library releases; its claim; its paths at toy size."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from recorded_noise import Given

from batchery import datasets
from batchery.privacy import (
    Budget,
    FactorizationCounter,
    FloatNoise,
    MaxSum,
    SumSelect,
    hard_stream,
)
from batchery.privacy.bounds import recompute_max
from batchery.studies import dp_continual, dp_continual_streams
from batchery.studies.dp_continual import STUDY, recomputed, root_noise
from batchery.studies.dp_continual_streams import BETA, RHO, SIZES, Size, exact_noise
from batchery.studies.study import SCALES, Trial

CPU = torch.device("cpu")


@pytest.mark.parametrize(("horizon", "columns", "n"), [(100, 4, 11), (300, 9, 15), (64, 1, 20)])
@pytest.mark.parametrize("hold", ["midpoint", "last"])
@pytest.mark.parametrize("interval", [None, 1, 7])
def test_the_simulation_releases_what_the_mechanism_does(horizon, columns, n, hold, interval):
    stream = hard_stream(horizon, columns, n)
    midpoint = hold == "midpoint"
    plan = recompute_max(horizon, RHO, BETA, midpoint=midpoint, interval=interval)
    found = recomputed(stream.maxima(), plan, exact_noise(1), midpoint=midpoint)
    mechanism = MaxSum(
        horizon,
        columns,
        budget=RHO,
        mechanism="recompute",
        hold=hold,
        interval=interval,
        consistent=False,
        noise=exact_noise(1),
    )
    wanted = torch.cat([mechanism.update_many(chunk) for chunk in stream.chunks(40)])
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("horizon", [1, 63, 64, 200])
def test_one_transform_is_the_noise_of_the_counter(horizon):
    generator = torch.Generator().manual_seed(1)
    scale = FactorizationCounter(horizon, budget=RHO, strategy="sqrt").design.scale
    found = root_noise(horizon, scale, generator)
    z = FloatNoise(torch.Generator().manual_seed(1)).sample("gaussian", scale, (horizon,))
    counter = FactorizationCounter(horizon, budget=RHO, strategy="sqrt", noise=Given(z.numpy()))
    wanted = counter.update_many(torch.zeros(horizon))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_the_mechanism_that_cheats_charges_one_release():
    plan = dp_continual._plan("cheat", 1024)
    assert (plan.interval, plan.releases, plan.scale) == (1, 1024, 1)
    assert dp_continual._plan("naive", 1024).scale == 1024
    assert dp_continual._plan("recompute", 1000).interval == 17


def test_keywords_of_a_line_are_its_words(monkeypatch):
    text = "if x:\n    returning = 1\nreturn not None\n"
    monkeypatch.setattr(dp_continual_streams.datasets, "load", lambda name: text)
    rows = dp_continual_streams._keywords.__wrapped__()
    assert rows.shape == (4, 35)
    assert rows.sum(1).tolist() == [1, 0, 3, 0]
    assert rows[2, dp_continual_streams.keyword.kwlist.index("None")]


def test_the_verdict_rests_on_the_hard_stream_alone():
    claims = [c for c in STUDY.comparisons if c.claim]
    assert {c.metric for c in claims} == {"slope", "of_bound", "readout", "mu"}
    assert {c.arm for c in claims if c.metric == "slope"} >= {"recompute", "theory", "batch"}
    assert set(STUDY.seeds) == set(SCALES)


def test_slopes_are_least_squares_on_logarithms():
    horizons = [2**e for e in range(10, 21)]
    assert dp_continual._slope(horizons, [3 * t**0.4 for t in horizons]) == pytest.approx(0.4)
    metrics = dp_continual._theory(Trial(0, "cpu", CPU)).metrics
    assert metrics["slope"] == pytest.approx(0.356, abs=0.001)
    assert metrics["error"] == pytest.approx(548, abs=1)


@pytest.fixture
def toy(monkeypatch):
    size = Size((5, 6, 7), 7, (32, 64), 200, True)
    monkeypatch.setitem(SIZES, "gpu", size)
    coins = np.random.default_rng(0)
    rows = torch.from_numpy(coins.random((64, 35)) < 0.1)
    requests = "time,prompt,output\r\n" + "\r\n".join(f"t,{2**k},9" for k in range(12))
    monkeypatch.setattr(dp_continual_streams, "_keywords", lambda: rows)
    monkeypatch.setattr(dp_continual_streams.datasets, "load", lambda name: requests)
    for cached in (dp_continual_streams._stream, dp_continual_streams._answer):
        cached.cache_clear()
    yield Trial(0, "gpu", CPU)
    for cached in (dp_continual_streams._stream, dp_continual_streams._answer):
        cached.cache_clear()


def test_the_gpu_path_runs_at_toy_size(toy):
    outcomes = {}
    for name, arm in STUDY.arms.items():
        shares = []
        outcomes[name] = arm(
            replace(toy, progress=lambda done, total, to=shares: to.append(done / total))
        )
        assert len(shares) > 2, name
        assert shares == sorted(shares), name
        assert shares[-1] < 1, name
    for name, found in outcomes.items():
        assert all(math.isfinite(value) for value in found.metrics.values()), name
        assert set(found.metrics) <= {metric.name for metric in STUDY.metrics}
    for comparison in STUDY.comparisons:
        for arm in (comparison.arm, comparison.baseline):
            assert comparison.metric in outcomes[arm].metrics, comparison
    assert outcomes["theory"].metrics["of_bound"] == 1
    assert outcomes["cheat"].metrics["readout"] < 0.3 < outcomes["naive"].metrics["readout"]
    assert outcomes["recompute"].series["T"] == [32.0, 64.0, 128.0]
    # "auto" is the run of what it chooses.
    chosen = MaxSum(64, 35, budget=Budget(rho=0.5), sampler="float").mechanism
    chosen = "midpoint" if chosen == "recompute" else chosen
    auto, told = outcomes["auto"].metrics, outcomes[chosen].metrics
    assert auto["error_code"] == told["error_code"]
    assert auto["error_wide"] == outcomes["midpoint"].metrics["error_wide"]


@pytest.mark.skipif(not datasets.is_here("azure-llm-conv"), reason="the requests are not here")
def test_the_real_requests_have_one_length_each():
    rows = dp_continual_streams._stream.__wrapped__("requests", 0)
    assert rows.shape == (19_366, 14)
    assert rows.sum(1).eq(1).all()
    assert rows.sum(0).argmax() == 10  # 1,024 to 2,047 tokens


def test_answers_are_judged_against_the_stream(toy):
    rows = dp_continual_streams._stream("keywords", 64)
    sums = rows.cumsum(0)
    silent = dp_continual_streams._answer(MaxSum, "silent", "keywords", 64, 0, CPU)
    assert silent == (float(sums.max()), 64.0)
    behind = dp_continual_streams._answer(SumSelect, "silent", "keywords", 64, 0, CPU)[0]
    assert behind == float((sums.amax(1) - sums[:, 0]).max())
    requests = dp_continual_streams._stream("requests", 0)
    assert requests.int().tolist() == torch.eye(12).int().tolist()  # powers of two
    assert dp_continual_streams._stream("rare", 64).any(0).sum() <= 2
