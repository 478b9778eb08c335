# SPDX-License-Identifier: Apache-2.0
"""Oracles of the factor on the learning rate. The scheduler's are in test_wsd.py."""

import math

import numpy as np
import pytest
import torch

from batchery.optim import wsd_factor

W, STABLE, D = 10, 70, 20
T, S = W + STABLE, W + STABLE + D
LAST = (S - 1 - T) / D  # progress of the last update

SHAPES = {
    "linear": (lambda p: 0.1 + 0.9 * (1 - p)),
    "cosine": (lambda p: 0.1 + 0.9 * (1 + math.cos(math.pi * p)) / 2),
    "1-sqrt": (lambda p: 0.1 + 0.9 * (1 - math.sqrt(p))),
    "sqrt": (lambda p: 0.1 + 0.9 * math.sqrt(1 - p)),
    "square": (lambda p: 0.1 + 0.9 * (1 - p * p)),
    "exp": (lambda p: math.exp(p * math.log(0.1))),
    "inverse": (lambda p: 1 / ((1 - p) / 1 + p / 0.1)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_closed_form_at_the_corners(shape):
    def f(s):
        return wsd_factor(s, warmup=W, stable=STABLE, decay=D, shape=shape, min_ratio=0.1)

    assert f(0) == 0
    assert f(W - 1) == pytest.approx(0.9, abs=1e-12)
    assert f(W) == f(T) == 1
    assert f(T + 1) == pytest.approx(SHAPES[shape](1 / D), abs=1e-12)
    assert f(S - 1) == pytest.approx(SHAPES[shape](LAST), abs=1e-12)
    assert f(S - 1) > f(S)
    assert f(S) == pytest.approx(0.1, abs=1e-12)
    assert f(S + 50) == f(S)


def test_half_life_is_in_steps_and_has_no_end():
    """The paper's T below the line is a half-life, not the length of the stable phase."""

    def f(s):
        return wsd_factor(s, warmup=0, stable=8000, decay=10**6, shape="exp", half_life=5000)

    assert f(8000) == 1
    assert f(13000) == 0.5
    assert f(18000) == 0.25


def test_half_life_holds_at_the_end_and_min_ratio_is_its_floor():
    kinds = {"warmup": 0, "stable": 10, "decay": 20, "shape": "exp", "half_life": 10}
    assert wsd_factor(500, **kinds) == 0.25
    assert wsd_factor(500, min_ratio=0.4, **kinds) == 0.4
    assert wsd_factor(20, min_ratio=0.4, **kinds) == 0.5


def test_the_authors_linear_to_a_tenth():
    """Their class: 0.1 + 0.9 · (S - s) / D after S - D, then 0.1."""
    for s in range(T + 1, S + 5):
        theirs = 0.1 + max(0.9 * (S - s) / D, 0)
        ours = wsd_factor(s, warmup=W, stable=STABLE, decay=D, shape="linear", min_ratio=0.1)
        assert ours == pytest.approx(theirs, abs=1e-12)


def test_factor_of_arrays_and_tensors():
    kinds = {"warmup": W, "stable": STABLE, "decay": D, "shape": "cosine", "min_ratio": 0.2}
    wanted = [wsd_factor(s, **kinds) for s in range(120)]
    array = wsd_factor(np.arange(120).reshape(4, 30), **kinds)
    assert array.shape == (4, 30)
    assert array.ravel().tolist() == wanted
    tensor = wsd_factor(torch.arange(120), **kinds)
    assert tensor.dtype == torch.float64
    assert tensor.tolist() == wanted
    assert wsd_factor(torch.arange(3.0), **kinds).dtype == torch.float32


def test_an_open_end_and_offset():
    assert wsd_factor(10**9, warmup=W, stable=math.inf, decay=D) == 1
    assert wsd_factor(0, warmup=4, stable=1, decay=1, offset=1) == 0.25
    assert wsd_factor(3, warmup=4, stable=1, decay=1, offset=1) == 1
    assert wsd_factor(1, warmup=4, stable=1, decay=1, warmup_start_ratio=0.2) == 0.4
    assert wsd_factor(5.001, warmup=4, stable=1, decay=0) == 0


def test_steps_that_are_none_are_named():
    with pytest.raises(ValueError, match="wsd_factor: step must be >= 0, got -1"):
        wsd_factor(-1, warmup=1, stable=1, decay=1)
    for step, kind in (("a", "str"), ([1, 2], "list"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"wsd_factor: step must be a number, got {kind}"):
            wsd_factor(step, warmup=1, stable=1, decay=1)
