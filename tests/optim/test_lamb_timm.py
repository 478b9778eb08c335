# SPDX-License-Identifier: Apache-2.0
"""LAMB and LARS beside timm's, step by step: 1e-10 in float64, 1e-5 in float32.

The equations agree. By name: `always_adapt=False` there is `adapt="auto"` here; `trust_clip=True`
of Lamb is `(0, 1)`; `decoupled_decay` is `decoupled`; `trust_coeff` is `trust_coefficient`.
Defaults differ: Lamb clips gradients to a norm of 1, Lars has an `eps` of 1e-8.

What does not agree: decoupled, Lamb measures weights after their decay, LAMB before (tested as the
one factor that it is). And, not compared: steps are counted by group there, by parameter here,
where some gradients are None; moments have the parameters' dtype there, at least float32 here; a
norm that is not finite may give a ratio of 0 or 1 there, NaN here.
"""

import importlib
import sys
import types
from pathlib import Path

import pytest
import torch
from compiler import needs_compiler
from torch import nn

from batchery.optim import LAMB, LARS

FORMS = [{"foreach": False}, {"foreach": True}, needs_compiler({"fused": True})]
FORM_IDS = ["single", "foreach", "fused"]
SHAPES = ((40, 30), (17,), (6, 3, 3, 3), (1,), (300, 5), (8, 4))
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
RATES = (0.01, 0.03, 0.05, 0.05, 0.02, 0.007, 0.001)  # one a step, as a schedule would set them


@pytest.fixture(scope="module")
def timm():
    """timm's two optimizers, without the packages around them: those import torchvision."""
    root = Path(sys.prefix, "oracles", "timm")
    if not root.is_dir():
        pytest.skip("timm is not here; `make test` installs it")
    with pytest.MonkeyPatch.context() as patch:
        for name, path in (("timm", root), ("timm.optim", f"{root}/optim")):
            package = types.ModuleType(name)
            package.__path__ = [path]
            patch.setitem(sys.modules, name, package)
        lamb, lars = (importlib.import_module(f"timm.optim.{name}") for name in ("lamb", "lars"))
        for name in [name for name in sys.modules if name.startswith("timm.optim.")]:
            del sys.modules[name]
    return types.SimpleNamespace(Lamb=lamb.Lamb, Lars=lars.Lars)


def two_groups(dtype):
    """Return parameters, one of them zero, and groups of them with and without weight decay."""
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
    drawn[-1].zero_()
    params = [nn.Parameter(tensor.to(dtype)) for tensor in drawn]
    groups = [
        {"params": params[::2], "weight_decay": 0.02},
        {"params": params[1::2], "weight_decay": 0.0},
    ]
    return params, groups


def assert_same_steps(ours, theirs, one, two):
    generator = torch.Generator().manual_seed(4)
    tolerance = TOLERANCES[one[0].dtype]
    for rate in RATES:
        for p, q in zip(one, two, strict=True):
            g = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            p.grad, q.grad = g, g.clone()
        for optimizer in (ours, theirs):
            for group in optimizer.param_groups:
                group["lr"] = rate * optimizer.defaults["lr"]
            optimizer.step()
        for p, q in zip(one, two, strict=True):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("always", [True, False], ids=["adapt all", "adapt what decays"])
@pytest.mark.parametrize(
    ("here", "there"),
    [
        ({}, {}),
        ({"trust_clip": (0, 1)}, {"trust_clip": True}),
        ({"max_grad_norm": 0.5}, {"max_grad_norm": 0.5}),
        ({"bias_correction": False}, {"bias_correction": False}),
        ({"grad_averaging": False}, {"grad_averaging": False}),
        ({"betas": (0.5, 0.8), "eps": 1e-3}, {"betas": (0.5, 0.8), "eps": 1e-3}),
    ],
    ids=lambda kinds: next(iter(kinds), "plain"),
)
def test_lamb(timm, form, dtype, always, here, there):
    (one, mine), (two, yours) = two_groups(dtype), two_groups(dtype)
    ours = LAMB(mine, lr=1.0, adapt=True if always else "auto", **here, **form)
    theirs = timm.Lamb(yours, lr=1.0, always_adapt=always, **{"max_grad_norm": None, **there})
    assert_same_steps(ours, theirs, one, two)


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_a_decoupled_step_of_lamb_differs_by_the_share_that_decay_leaves(timm, form):
    (one, _), (two, _) = two_groups(torch.float64), two_groups(torch.float64)
    kinds = {"lr": 0.5, "weight_decay": 0.02}
    ours = LAMB(one, decoupled=True, **kinds, **form)
    theirs = timm.Lamb(two, decoupled_decay=True, max_grad_norm=None, **kinds)
    left = [p.detach() * (1 - 0.5 * 0.02) for p in one]
    for p, q in zip(one, two, strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    ours.step()
    theirs.step()
    for p, q, x in zip(one[:-1], two[:-1], left[:-1], strict=True):
        torch.testing.assert_close((p - x) * (1 - 0.5 * 0.02), q - x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(one[-1], two[-1], rtol=1e-10, atol=1e-10)  # a zero has ratio 1


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("always", [True, False], ids=["adapt all", "adapt what decays"])
@pytest.mark.parametrize(
    "kinds",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.0},
        {"momentum": 0.9, "trust_clip": True},
        {"momentum": 0.9, "eps": 0.1},
    ],
    ids=lambda kinds: " ".join(kinds),
)
def test_lars(timm, form, dtype, always, kinds):
    kinds = {"lr": 10.0, "eps": 1e-8, **kinds}
    (one, mine), (two, yours) = two_groups(dtype), two_groups(dtype)
    ours = LARS(mine, adapt=True if always else "auto", trust_coefficient=0.1, **kinds, **form)
    theirs = timm.Lars(yours, always_adapt=always, trust_coeff=0.1, **kinds)
    assert_same_steps(ours, theirs, one, two)
