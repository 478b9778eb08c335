# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn
from transformers.optimization import get_wsd_schedule as hf_wsd_schedule

from batchery.optim import get_wsd_schedule


def sgd(*rates):
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "lr": lr} for lr in rates]
    return torch.optim.SGD(groups)


@pytest.mark.parametrize("warmup_type", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize("decay_type", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize("floor", [0, 0.07])
@pytest.mark.parametrize("start", [-1, 0])
def test_equals_transformers_to_the_bit(warmup_type, decay_type, floor, start):
    found = []
    for make in (get_wsd_schedule, hf_wsd_schedule):
        optimizer = sgd(0.3, 0.0371)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        scheduler = make(
            optimizer,
            7,
            13,
            num_training_steps=47,
            warmup_type=warmup_type,
            decay_type=decay_type,
            min_lr_ratio=floor,
            last_epoch=start,
        )
        rates = []
        for _ in range(60):
            rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
        found.append(rates)
    assert found[0] == found[1]


def test_transformers_stable_steps_and_refusals():
    assert get_wsd_schedule(sgd(0.3), 5, 10, num_stable_steps=20).num_training == 35
    with pytest.raises(ValueError, match="num_training_steps must be 35, got 40"):
        get_wsd_schedule(sgd(0.3), 5, 10, num_training_steps=40, num_stable_steps=20)
    with pytest.raises(ValueError, match="num_stable_steps must be given"):
        get_wsd_schedule(sgd(0.3), 5, 10)
    with pytest.raises(ValueError, match=r"num_cycles must be 0\.5, got 1\.5"):
        get_wsd_schedule(sgd(0.3), 5, 10, 40, num_cycles=1.5)
