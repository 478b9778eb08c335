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
from batchery.compress.quant import QuantLinear, dequantize, pack, quantize_rtn
from batchery.kernels.w4a16 import w4a16_matmul
from batchery.kernels.w4a16_plan import plan_tiles
from batchery.kernels.w4a16_tiles import launch
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
            horizon, a number of columns and the `seed` of their noise, None for real noise; modules
            a `seed` and a width `n` of their output, and come with an input; kernels one of
            `variants` and a device, and come as a `KernelProblem`.
        bad: keyword arguments that must raise, with a pattern of the message.
        variants: of a kernel: names of problems, and what makes them.
    """

    path: str
    build: Callable[..., Any]
    bad: list[tuple[dict[str, Any], type[Exception], str]] = field(default_factory=list)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.path.rsplit(".", 1)[1]


@dataclass(frozen=True)
class KernelProblem:
    """A kernel with everything given but its rows x `(M, width)`.

    Attributes:
        kernel: runs the Triton kernel on x.
        public: what users call, with x and keywords; "impl" among them.
        exact: the result for x in float64, by the equation.
        width: columns of x.
        gated: whether the result is a product of two.
    """

    kernel: Callable[[torch.Tensor], torch.Tensor]
    public: Callable[..., torch.Tensor]
    exact: Callable[[torch.Tensor], torch.Tensor]
    width: int
    gated: bool


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


def _quant_linear(seed=0, n=24, k=64, bias=None, **kinds):
    generator = torch.Generator().manual_seed(seed)
    qw = quantize_rtn(torch.randn(n, k, generator=generator) / 8, group_size=32, symmetric=False)
    bias = torch.randn(n, generator=generator) if bias is None else bias
    return QuantLinear.from_quantized(qw, bias, **kinds), torch.randn(5, k, generator=generator)


def _w4a16(variant, device):
    n, k, group_size, gated = variant["n"], variant["k"], variant["group_size"], "gated" in variant
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(n, k, generator=generator) / k**0.5
    qw = quantize_rtn(w, group_size=group_size, symmetric="zeros" not in variant).to(device)
    packed, _ = pack(qw, gated=gated)
    exact = dequantize(qw, torch.float64)

    def kernel(x):
        if x.is_cuda:
            return w4a16_matmul(x, packed, impl="triton")
        _, blocks, _, lanes = packed.words.shape
        return launch(x, packed, *plan_tiles(len(x), packed.rows, blocks, lanes, 132, False))

    def wanted(x):
        y = x.double() @ exact.T
        return torch.nn.functional.silu(y[:, : n // 2]) * y[:, n // 2 :] if gated else y

    def public(x, **kinds):
        return w4a16_matmul(x, packed, **kinds)

    return KernelProblem(kernel, public, wanted, k, gated)


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
                ({"columns": 2.5}, TypeError, "TreeCounter: shape must be an integer, got float"),
                ({"budget": Budget(1e-25)}, ValueError, "TreeCounter: budget must .* 61 bits, got"),
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
                ({"budget": Budget(1e-25)}, ValueError, "MaxSum: budget must .* 61 bits, got"),
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
                ({"budget": Budget(1e-40)}, ValueError, "SumSelect: budget must .* 61 bits, got"),
                ({"budget": Budget(1e40)}, ValueError, "SumSelect: budget must .* 61 bits, got"),
            ],
        ),
        Case(
            "batchery.compress.quant.QuantLinear",
            _quant_linear,
            [
                ({"bias": torch.ones(23)}, ValueError, r"QuantLinear: bias must be \(24,\), got"),
                ({"k": 48}, ValueError, "group_size must divide K = 48, got 32"),
            ],
        ),
        Case(
            "batchery.kernels.w4a16.w4a16_matmul",
            _w4a16,
            [
                ({"impl": "cuda"}, ValueError, "w4a16_matmul: impl must be one of .* got 'cuda'"),
                ({"bias": torch.ones(3)}, ValueError, r"w4a16_matmul: bias must be .* got \(3,\)"),
                ({"out": torch.ones(3)}, ValueError, r"w4a16_matmul: out must be .* got \(3,\)"),
            ],
            {
                "plain": {"n": 192, "k": 512, "group_size": 128},
                "odd": {"n": 70, "k": 320, "group_size": 64, "zeros": True},
                "small-groups": {"n": 64, "k": 256, "group_size": 32, "zeros": True},
                "one-group": {"n": 33, "k": 200, "group_size": -1},
                "gated": {"n": 140, "k": 256, "group_size": 128, "gated": True},
                "gated-zeros": {"n": 70, "k": 192, "group_size": 64, "gated": True, "zeros": True},
            },
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
