# SPDX-License-Identifier: Apache-2.0
"""Mechanisms of every kind whose noise is known, and processes that share a ledger."""

import os

import numpy as np
import torch

from batchery.privacy import (
    Budget,
    DiscreteNoise,
    FactorizationCounter,
    FloatNoise,
    MaxSum,
    SumSelect,
    TreeCounter,
)

RHO = Budget(rho=0.5)


def bits(n, *shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 2, (n, *shape)))


def seeded(horizon=20, shape=(), **kinds):
    return TreeCounter(
        horizon, shape, **({"budget": RHO, "noise": DiscreteNoise(insecure_seed=1)} | kinds)
    )


def forked(function, *arguments):
    """Start a process that runs a function and is gone, with status 0 if nothing was raised."""
    child = os.fork()
    if child == 0:
        try:
            function(*arguments)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def status(child):
    return os.waitpid(child, 0)[1]


MECHANISMS = {
    "tree": lambda: seeded(40, 3),
    "honaker": lambda: seeded(40, 3, estimator="honaker"),
    "scalar": lambda: seeded(40),
    "endless": lambda: seeded(None, 3),
    "pure": lambda: seeded(40, 3, budget=Budget.pure(0.5)),
    "sqrt": lambda: real("sqrt"),
    "one band": lambda: real("banded", bands=1),
    "blt": lambda: real("blt"),
    "float32": lambda: real("banded", bands=3, dtype=torch.float32),
    "max": lambda: column(MaxSum, "recompute"),
    "max tree": lambda: column(MaxSum, "tree"),
    "sparse": lambda: column(MaxSum, "sparse", budget=Budget(rho=900.0), expected_max=30),
    "constant": lambda: column(MaxSum, "constant"),
    "select": lambda: column(SumSelect, "recompute"),
}


def real(strategy, dtype=torch.float64, **kinds):
    noise = FloatNoise(torch.Generator().manual_seed(1), dtype=dtype)
    kinds = {"budget": RHO, "noise": noise, "dtype": dtype} | kinds
    return FactorizationCounter(40, 3, strategy=strategy, **kinds)


def column(kind, mechanism, **kinds):
    noise = DiscreteNoise(insecure_seed=1)
    return kind(40, 3, mechanism=mechanism, **({"budget": RHO, "noise": noise} | kinds))


def together(functions):
    """Run functions in as many processes, begun at the same moment."""
    reading, writing = os.pipe()

    def wait(function):
        os.close(writing)
        os.read(reading, 1)
        function()

    children = [forked(wait, function) for function in functions]
    os.close(writing)
    found = [status(child) for child in children]
    os.close(reading)
    return found
