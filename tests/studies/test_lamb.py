# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from batchery.studies import lamb
from batchery.studies.lab import LabSize
from batchery.studies.lamb import STUDY, Size
from batchery.studies.study import SCALES, Trial

CPU = torch.device("cpu")


def test_the_claims_rest_on_the_fixed_rule_and_not_on_retuning():
    claims = [c for c in STUDY.comparisons if c.claim]
    assert {c.metric for c in claims} == {"loss_large", "error_large"}
    assert set(STUDY.seeds) == set(SCALES)


def test_the_gpu_path_runs_at_toy_size(monkeypatch):
    """The Llama arms on the CPU: every metric, micro-batches included, and a run that diverges."""
    model = LabSize("toy", 16, 1, 1, 1, context=8, vocabulary=257)
    stream = torch.arange(2_000) * 7 % 251
    monkeypatch.setitem(lamb.SIZES, "gpu", Size(model, 64, (4, 16), 1 / 80, 1, (64, 512)))
    monkeypatch.setattr(lamb, "_tokens", lambda device: (stream, stream))
    monkeypatch.setattr(lamb, "MICRO_BATCH", 8)
    prepared = {arm: {"base": {"lr": [1e-3]}, "large": {"lr": [2e-3]}} for arm in STUDY.arms}
    trial = Trial(0, "gpu", CPU, prepared)
    for arm in ("adamw", "sgd", "lamb"):
        found = STUDY.arms[arm](trial)
        assert set(found.metrics) == {"loss_large", "loss_base", "loss_retuned"}
        assert all(math.isfinite(value) for value in found.metrics.values())
        assert found.series["batch"] == [4.0, 16.0]
    assert lamb._train_text("sgd", 1e30, 4, 0, trial) == pytest.approx(math.inf)
