# SPDX-License-Identifier: Apache-2.0
"""How the contract suites build each object that a card names, small; and what it must refuse.

A card's object of a kind that has a suite needs an entry here, and an entry needs a card: both are
tested, so that no system stays outside.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from batchery.cards import load_cards
from batchery.optim import LAMB, LARS, WSDScheduler
from batchery.privacy import (
    Budget,
    DiscreteNoise,
    FactorizationCounter,
    FloatNoise,
    MaxSum,
    SumSelect,
    TreeCounter,
)
from batchery.select import HardBatchSampler, ResumableBatchSampler


@dataclass(frozen=True)
class Case:
    """One object under contract.

    Attributes:
        path: the object's public path, as its card names it.
        build: makes a minimal one. Optimizers take parameters; schedulers take an optimizer;
            samplers take a size and `rank`, `world_size` and `generator` keywords; mechanisms a
            horizon, a number of columns and the `seed` of their noise, None for real noise.
        bad: keyword arguments that must raise, with a pattern of the message.
    """

    path: str
    build: Callable[..., Any]
    bad: list[tuple[dict[str, Any], type[Exception], str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.rsplit(".", 1)[1]


def objects(kind: str) -> list[str]:
    """List the public paths of all objects of a kind, from the cards."""
    return [path for card in load_cards() for path, of in card.objects.items() if of == kind]


def _lamb(params, lr=0.05, **kinds):
    return LAMB(params, lr=lr, **kinds)


def _lars(params, lr=0.5, **kinds):
    return LARS(params, lr=lr, weight_decay=kinds.pop("weight_decay", 0.01), **kinds)


def _wsd(optimizer, num_warmup=3, num_training=20, num_decay=10, **kinds):
    return WSDScheduler(optimizer, num_warmup, num_training, num_decay, **kinds)


def _tree(horizon=20, columns=3, seed=1, **kinds):
    noise = None if seed is None else DiscreteNoise(insecure_seed=seed)
    kinds = {"budget": Budget(rho=0.5), "row_sensitivity": 3**0.5, "noise": noise} | kinds
    return TreeCounter(horizon, columns, **kinds)


def _factorization(horizon=20, columns=3, seed=1, **kinds):
    noise = None if seed is None else FloatNoise(torch.Generator().manual_seed(seed))
    kinds = {"budget": Budget(rho=0.5), "row_sensitivity": 3**0.5, "noise": noise} | kinds
    return FactorizationCounter(horizon, columns, **kinds)


def _max_sum(horizon=20, columns=3, seed=1, **kinds):
    noise = None if seed is None else DiscreteNoise(insecure_seed=seed)
    kinds = {"budget": Budget(rho=0.5), "mechanism": "recompute", "noise": noise} | kinds
    return MaxSum(horizon, columns, **kinds)


def _sum_select(horizon=20, columns=3, seed=1, **kinds):
    noise = None if seed is None else DiscreteNoise(insecure_seed=seed)
    kinds = {"budget": Budget(rho=0.5), "mechanism": "recompute", "noise": noise} | kinds
    return SumSelect(horizon, columns, **kinds)


CASES = {
    case.path: case
    for case in (
        Case(
            "batchery.optim.LAMB",
            _lamb,
            [
                ({"lr": -1.0}, ValueError, "LAMB: lr must be >= 0, got -1.0"),
                ({"lr": "fast"}, TypeError, "LAMB: lr must be a number, got str"),
                ({"betas": (0.9, 1.5)}, ValueError, r"LAMB: betas\[1\] .* got 1.5"),
                ({"adapt": "no"}, ValueError, "LAMB: adapt .* got 'no'"),
            ],
        ),
        Case(
            "batchery.optim.LARS",
            _lars,
            [
                ({"lr": float("nan")}, ValueError, "LARS: lr must be >= 0, got nan"),
                ({"momentum": 1.0}, ValueError, "LARS: momentum .* got 1.0"),
                ({"variant": "x"}, ValueError, "LARS: variant .* got 'x'"),
            ],
        ),
        Case(
            "batchery.optim.WSDScheduler",
            _wsd,
            [
                ({"num_decay": 1.5}, ValueError, "WSDScheduler: num_decay .* got 1.5"),
                ({"num_warmup": 2.5}, TypeError, "WSDScheduler: num_warmup .* got float"),
                ({"num_warmup": 11}, ValueError, "WSDScheduler: num_training .* 11 .* got 20"),
                ({"shape": "exp"}, ValueError, "WSDScheduler: min_ratio .* got 0"),
                ({"unit": "epochs"}, ValueError, "WSDScheduler: unit .* got 'epochs'"),
            ],
        ),
        Case(
            "batchery.select.ResumableBatchSampler",
            ResumableBatchSampler,
            [
                ({"batch_size": 0}, ValueError, "ResumableBatchSampler: batch_size must be >= 1"),
                ({"rank": 1}, ValueError, "rank must be given together with world_size, got 1"),
            ],
        ),
        Case(
            "batchery.select.HardBatchSampler",
            HardBatchSampler,
            [
                ({"delta": 0.0}, ValueError, "HardBatchSampler: delta must be > 0 .* got 0.0"),
                ({"mode": "x"}, ValueError, "HardBatchSampler: mode must be one of .* got 'x'"),
                ({"batch_size": 25}, ValueError, "must make at least 2 batches, got 1"),
            ],
        ),
        Case(
            "batchery.privacy.TreeCounter",
            _tree,
            [
                ({"horizon": 0}, ValueError, "TreeCounter: horizon must be >= 1, got 0"),
                ({"horizon": 2.5}, TypeError, "TreeCounter: horizon must be an integer, got float"),
                ({"budget": 0.5}, TypeError, "TreeCounter: budget must be a Budget, got float"),
                ({"row_sensitivity": 0}, ValueError, "row_sensitivity must be > 0, got 0"),
                ({"estimator": "x"}, ValueError, "estimator must be one of 'prefix', .* got 'x'"),
            ],
        ),
        Case(
            "batchery.privacy.FactorizationCounter",
            _factorization,
            [
                ({"horizon": -1}, ValueError, "FactorizationCounter: horizon must be >= 1, got -1"),
                ({"budget": Budget.pure(1.0)}, ValueError, "budget must not be pure: .*epsilon=1"),
                ({"sampler": "discrete"}, ValueError, "sampler must be 'float': .* got 'discrete'"),
                ({"strategy": "x"}, ValueError, "strategy must be one of 'auto', .* got 'x'"),
            ],
        ),
        Case(
            "batchery.privacy.MaxSum",
            _max_sum,
            [
                ({"horizon": 0}, ValueError, "MaxSum: horizon must be >= 1, got 0"),
                ({"columns": 0}, ValueError, "MaxSum: num_columns must be >= 1, got 0"),
                ({"beta": 1.5}, ValueError, "MaxSum: beta must be > 0 and < 1, got 1.5"),
                ({"budget": Budget(0.0)}, ValueError, "MaxSum: budget must be > 0"),
                ({"hold": "x"}, ValueError, "MaxSum: hold must be one of 'midpoint', .* got 'x'"),
            ],
        ),
        Case(
            "batchery.privacy.SumSelect",
            _sum_select,
            [
                ({"horizon": True}, TypeError, "SumSelect: horizon must be an integer, got bool"),
                ({"mechanism": "sparse"}, ValueError, "SumSelect: mechanism .* got 'sparse'"),
                ({"interval": 0}, ValueError, "SumSelect: interval must be >= 1, got 0"),
                ({"margin": -1}, ValueError, "SumSelect: margin must be >= 0, got -1"),
            ],
        ),
    )
}


def global_randomness():
    """Return the states of every global random stream."""
    import random

    import numpy as np

    numpy_state = np.random.get_state()  # noqa: NPY002
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        numpy_state[1].tolist(),
        numpy_state[2],
    )
