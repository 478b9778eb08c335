# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from batchery.compress.quant import quantize_rtn
from batchery.studies import marlin
from batchery.studies.marlin import PLANS, STUDY
from batchery.studies.study import SCALES, Trial

CPU = torch.device("cpu")


def test_the_layers_of_every_scale_hold_whole_groups():
    for plan in PLANS.values():
        assert plan.size.hidden % 128 == 0
        assert plan.size.mlp % 128 == 0
        assert abs(plan.size.mlp / (plan.size.hidden * 8 / 3) - 1) < 0.13
    tokens = {scale: plan.sequences * plan.size.context for scale, plan in PLANS.items()}
    assert (tokens["cpu"], tokens["gpu"]) == (16_384, 65_536)


def test_the_claims_are_those_of_the_specification():
    claims = {(c.arm, c.baseline, c.metric) for c in STUDY.comparisons if c.claim}
    assert claims == {
        ("gptq-128", "rtn-128", "bar"),
        ("gptq-64", "rtn-64", "bar"),
        ("gptq-32", "rtn-32", "bar"),
        ("gptq-128", "rtn-128-clip", "loss"),
    }
    assert all(c.require == "superior" and c.margin == 0 for c in STUDY.comparisons)
    assert set(STUDY.seeds) == set(SCALES)


def test_four_bits_and_a_scale_take_a_quarter():
    qw = quantize_rtn(torch.randn(4, 256, generator=torch.Generator().manual_seed(0)))
    assert marlin._size_ratio({"a": qw, "b": qw}) == pytest.approx(3.879, abs=1e-3)


@pytest.mark.slow
def test_the_arms_measure_what_they_say():
    prepared = STUDY.prepare(Trial(0, "smoke", CPU))
    found = {
        arm: STUDY.arms[arm](Trial(0, "smoke", CPU, prepared))
        for arm in ("dense", "rtn-128", "gptq-128")
    }
    dense, rtn, gptq = (found[arm].metrics for arm in ("dense", "rtn-128", "gptq-128"))
    assert dense["loss"] == pytest.approx(prepared["loss"][0], abs=0.1)  # on other windows
    assert 0 < gptq["divergence"] < rtn["divergence"]
    assert rtn["increase"] == rtn["loss"] - dense["loss"]
    assert rtn["bar"] == rtn["increase"] / 2
    assert gptq["bar"] == gptq["increase"]
    assert gptq["recovered"] == pytest.approx(100 * (1 - gptq["increase"] / rtn["increase"]))
    assert all(0 < ratio < 1 for ratio in found["gptq-128"].series["error_ratio"])
    assert all(math.isfinite(x) for outcome in found.values() for x in outcome.metrics.values())
