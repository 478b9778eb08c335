# SPDX-License-Identifier: Apache-2.0
"""Oracles of LARS. The equations themselves are tested on the kernels, in tests/kernels."""

import copy
import warnings

import pytest
import torch
from compiler import needs_compiler
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from batchery.kernels import multi_tensor
from batchery.optim import LARS

FORMS = [{"foreach": False}, {"foreach": True}, needs_compiler({"fused": True})]
FORM_IDS = ["single", "foreach", "fused"]


def weights(shapes=((4, 3), (5,), (2, 2, 2)), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [nn.Parameter(tensor.to(dtype)) for tensor in drawn]


def trajectory(optimizer, params, steps=5, scale=1.0):
    generator = torch.Generator().manual_seed(7)
    path = []
    for _ in range(steps):
        for p in params:
            drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad = torch.empty_like(p).copy_(drawn) * scale  # as in a backward pass: p's strides
        optimizer.step()
        path.append([p.detach().clone() for p in params])
    return path


def assert_paths(a, b, tolerance=1e-10):
    for xs, ys in zip(a, b, strict=True):
        for x, y in zip(xs, ys, strict=True):
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_without_adaptation_it_is_sgd(form, nesterov, dampening):
    if nesterov:
        dampening = 0.0
    kinds = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "dampening": dampening}
    one, two = weights(), weights()
    ours = LARS(one, adapt=False, nesterov=nesterov, **kinds, **form)
    theirs = torch.optim.SGD(two, nesterov=nesterov, **kinds)
    assert_paths(trajectory(ours, one), trajectory(theirs, two))


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_scaling_the_loss_changes_nothing(form, factor):
    one, two = weights(), weights()
    kinds = {"lr": 0.5, "adapt": True, "trust_coefficient": 0.1, **form}
    assert_paths(
        trajectory(LARS(one, **kinds), one), trajectory(LARS(two, **kinds), two, scale=factor)
    )


def test_the_first_step_moves_by_the_trust_coefficient_times_the_weights():
    params = weights()
    before = [p.detach().clone() for p in params]
    optimizer = LARS(params, lr=1.0, adapt=True, trust_coefficient=0.01)
    trajectory(optimizer, params, 1)
    for p, old in zip(params, before, strict=True):
        moved = torch.linalg.vector_norm(p.detach() - old).item()
        assert moved == pytest.approx(0.01 * old.norm().item(), rel=1e-10)


def test_the_rate_inside_the_buffer_matters_only_when_it_changes():
    def run(inside, rates):
        params = weights()
        optimizer = LARS(params, lr=1.0, weight_decay=0.1, lr_in_momentum=inside)
        path = []
        for rate in rates:
            optimizer.param_groups[0]["lr"] = rate
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
            path.append([p.detach().clone() for p in params])
        return path

    assert_paths(run(True, [0.2] * 4), run(False, [0.2] * 4))
    changed = zip(run(True, [0.2, 0.4])[-1], run(False, [0.2, 0.4])[-1], strict=True)
    assert all(not torch.allclose(a, b) for a, b in changed)


def test_larc_never_exceeds_the_global_rate():
    one, two = weights(), weights()
    huge = LARS(one, lr=0.01, adapt=True, trust_coefficient=1e6, trust_clip=True, weight_decay=0.1)
    plain = LARS(two, lr=0.01, adapt=False, weight_decay=0.1)
    assert_paths(trajectory(huge, one), trajectory(plain, two))


def test_bfloat16_and_resume_are_exact(tmp_path):
    params = weights(dtype=torch.bfloat16)
    optimizer = LARS(params, lr=0.5, weight_decay=0.1, dampening=0.5)
    trajectory(optimizer, params, 3)
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    others = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = LARS(others, lr=0.5)
    resumed.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
    buffer = resumed.state[others[0]]["momentum_buffer"]
    assert buffer.dtype == torch.float32
    trajectory(optimizer, params, 2)
    trajectory(resumed, others, 2)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_state_of_sgd_is_a_warm_start_under_our_own_settings(momentum):
    params = weights(dtype=torch.bfloat16)
    sgd = torch.optim.SGD(params, lr=0.01, momentum=momentum, dampening=0.1, fused=True)
    trajectory(sgd, params, 2)
    kept = [sgd.state[p].get("momentum_buffer") for p in params]
    ours = LARS(params, lr=2.0, weight_decay=0.1)
    settings = dict(ours.param_groups[0])
    ours.load_state_dict(copy.deepcopy(sgd.state_dict()))
    assert ours.param_groups[0] == settings
    for p, buffer in zip(params, kept, strict=True):
        held = ours.state[p].get("momentum_buffer")
        assert held is None if momentum == 0 else torch.equal(held, buffer.float())
    trajectory(ours, params, 1)
    assert all(ratio.item() != 1.0 for ratio in ours.trust_ratios().values())


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"lr": -1.0}, "LARS: lr must be >= 0, got -1.0"),
        ({"momentum": 1.0}, "LARS: momentum must be >= 0 and < 1, got 1.0"),
        ({"dampening": 2.0}, "LARS: dampening must be >= 0 and <= 1, got 2.0"),
        ({"trust_coefficient": 0.0}, "LARS: trust_coefficient must be > 0, got 0.0"),
        ({"variant": "other"}, "LARS: variant must be one of 'grad', 'update', 'momentum'"),
        ({"nesterov": True, "momentum": 0.0}, "LARS: nesterov needs momentum > 0"),
        ({"nesterov": True, "dampening": 0.1}, "LARS: nesterov needs momentum > 0"),
        ({"variant": "momentum", "nesterov": True}, "nesterov has no part in variant 'momentum'"),
        ({"variant": "momentum", "dampening": 0.1}, "dampening has .* leave it out, got 0.1"),
        ({"variant": "momentum", "lr_in_momentum": True}, "LARS: lr_in_momentum has no part"),
        ({"trust_clip": (1, 1)}, r"LARS: trust_clip must be one of True, False, got \(1, 1\)"),
    ],
)
def test_bad_settings_are_named(kinds, message):
    with pytest.raises(ValueError, match=message):
        LARS(weights(), **kinds)


@pytest.mark.parametrize("form", FORMS[1:], ids=FORM_IDS[1:])
@pytest.mark.parametrize("variant", ["grad", "update", "momentum"])
def test_in_float32_the_forms_agree(form, variant):
    one, two = weights(dtype=torch.float32), weights(dtype=torch.float32)
    kinds = {"lr": 1.0, "weight_decay": 0.1, "variant": variant, "trust_coefficient": 0.05}
    loop = trajectory(LARS(one, foreach=False, **kinds), one)
    assert_paths(loop, trajectory(LARS(two, **kinds, **form), two), 1e-6)


@pytest.mark.parametrize(
    "device", [needs_compiler("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_a_first_step_skipped_for_an_overflow_is_still_to_come(device):
    one, two = (nn.Parameter(torch.full((3,), 2.0, device=device)) for _ in range(2))
    kinds = {"lr": 1.0, "adapt": True, "dampening": 0.5}
    optimizer, plain = LARS([one], fused=True, **kinds), LARS([two], **kinds)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    for value in (torch.inf, 3.0, 2.0, torch.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale((one * value).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        if value != torch.inf:
            two.grad = torch.full_like(two, value)
            plain.step()
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def test_missing_triton_is_said_once(monkeypatch):
    monkeypatch.setattr(multi_tensor, "triton", None)
    multi_tensor._warn_without_triton.cache_clear()
    with FakeTensorMode(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            assert not multi_tensor.fused_ready([torch.empty(3, device="cuda")])
    assert [str(warning.message) for warning in said] == [
        "batchery: Triton is not installed; steps on CUDA will be slower"
    ]


@pytest.mark.gpu
def test_the_fused_kernels_agree_with_the_loop():
    shapes = ((300, 70), (5000,), (3, 3, 3), (40, 30, 3, 3))
    one, two = (
        [nn.Parameter(p.detach().cuda()) for p in weights(shapes, torch.float32)] for _ in range(2)
    )
    one[3].data = one[3].data.to(memory_format=torch.channels_last)
    kinds = {"lr": 0.5, "weight_decay": 0.1, "nesterov": True}
    fused, loop = LARS(one, fused=True, **kinds), LARS(two, foreach=False, **kinds)
    assert_paths(trajectory(fused, one), trajectory(loop, two), 1e-5)
