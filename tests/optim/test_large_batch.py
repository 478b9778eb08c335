# SPDX-License-Identifier: Apache-2.0
import pytest
from torch import nn

from batchery.optim import layer_adaptation_groups, scale_lr, warmup_fraction


def names(groups):
    return [{name for name, _ in group["params"]} for group in groups]


def test_norms_biases_and_vectors_neither_decay_nor_adapt():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2), nn.RMSNorm(2), nn.PReLU()
    )
    groups = layer_adaptation_groups(model, 0.01)
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    assert names(groups)[0] == {"0.weight", "2.weight"}
    assert names(groups)[0] | names(groups)[1] == {name for name, _ in model.named_parameters()}


def test_options():
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
    kept = layer_adaptation_groups(model, 0.1, skip_1d=False, skip_names=("weight",))
    assert names(kept) == [{"0.bias", "1.bias"}, {"0.weight", "1.weight"}]
    none = layer_adaptation_groups(model, 0.1, skip_1d=False, skip_names=(), skip_modules=())
    assert len(none) == 1


def test_tied_parameters_appear_once_and_frozen_ones_not_at_all():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    assert names(layer_adaptation_groups(model, 0.1)) == [{"0.weight"}, {"0.bias", "1.bias"}]


def test_a_model_without_parameters_is_refused():
    with pytest.raises(ValueError, match="must have trainable parameters"):
        layer_adaptation_groups(nn.ReLU(), 0.1)
    with pytest.raises(ValueError, match="weight_decay must be >= 0, got -1"):
        layer_adaptation_groups(nn.Linear(1, 1), -1)


def test_the_papers_rates_and_warm_ups():
    # Table 1 of the paper: BERT at batch 512 · 2^k has 5e-3 / 2^((6-k)/2)
    for k in range(7):
        assert scale_lr(6.25e-4, 512 * 2**k, 512) == pytest.approx(5e-3 / 2 ** ((6 - k) / 2))
        assert warmup_fraction(512 * 2**k) == pytest.approx(2**k / 320)
    assert scale_lr(0.1, 1024, 256, "linear") == pytest.approx(0.4)
    assert warmup_fraction(10**9) == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scale_lr(0.1, 0, 1), "scale_lr: batch must be >= 1, got 0"),
        (lambda: scale_lr(-0.1, 1, 1), "scale_lr: lr must be >= 0, got -0.1"),
        (lambda: scale_lr(0.1, 1, 1, "cube"), "scale_lr: rule must be one of 'sqrt', 'linear'"),
        (lambda: warmup_fraction(1, 1, 0.0), "base_fraction must be > 0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
