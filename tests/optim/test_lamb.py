# SPDX-License-Identifier: Apache-2.0
"""Oracles of LAMB. The equations themselves are tested on the kernels, in tests/kernels."""

import copy
import math

import pytest
import torch
from compiler import needs_compiler
from torch import nn

from batchery.optim import LAMB, layer_adaptation_groups

FORMS = [{"foreach": False}, {"foreach": True}, needs_compiler({"fused": True})]
FORM_IDS = ["single", "foreach", "fused"]


def weights(shapes=((4, 3), (5,), (2, 2, 2)), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [nn.Parameter(tensor.to(dtype)) for tensor in drawn]


def give_grads(params, seed, scale=1.0):
    generator = torch.Generator().manual_seed(100 + seed)
    for p in params:
        drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = (drawn * scale).to(p)


def trajectory(optimizer, params, steps=5, scale=1.0):
    path = []
    for t in range(steps):
        give_grads(params, t, scale)
        optimizer.step()
        path.append([p.detach().clone() for p in params])
    return path


def assert_paths(a, b, tolerance):
    for xs, ys in zip(a, b, strict=True):
        for x, y in zip(xs, ys, strict=True):
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e6])
def test_scaling_the_loss_changes_nothing(form, factor):
    kinds = {"lr": 0.1, "weight_decay": 0.0, "eps": 0.0, "adapt": True, **form}
    one, two = weights(), weights()
    assert_paths(
        trajectory(LAMB(one, **kinds), one),
        trajectory(LAMB(two, **kinds), two, scale=factor),
        1e-10,
    )


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_scaling_the_weights_scales_the_steps(form):
    kinds = {"lr": 0.1, "weight_decay": 0.0, "adapt": True, **form}
    one, two = weights(), weights()
    with torch.no_grad():
        for p in two:
            p.mul_(7)
    a = trajectory(LAMB(one, **kinds), one)
    b = trajectory(LAMB(two, **kinds), two)
    assert_paths([[7 * x for x in xs] for xs in a], b, 1e-10)


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_every_step_has_the_length_of_the_rate_times_the_weights(form):
    params = weights()
    optimizer = LAMB(params, lr=0.03, weight_decay=0.1, **form)
    for t in range(5):
        before = [p.detach().clone() for p in params]
        give_grads(params, t)
        optimizer.step()
        for p, old in zip(params, before, strict=True):
            moved = torch.linalg.vector_norm(p.detach() - old)
            assert moved.item() == pytest.approx(0.03 * old.norm().item(), rel=1e-10)


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_without_adaptation_and_decoupled_it_is_adamw(form):
    one, two = weights(), weights()
    ours = LAMB(one, lr=0.01, weight_decay=0.1, adapt=False, decoupled=True, **form)
    theirs = torch.optim.AdamW(two, lr=0.01, weight_decay=0.1, eps=1e-6)
    assert_paths(trajectory(ours, one), trajectory(theirs, two), 1e-10)


def test_a_ratio_clipped_to_one_is_no_adaptation():
    one, two = weights(), weights()
    clipped = trajectory(LAMB(one, lr=0.01, trust_clip=(1.0, 1.0)), one)
    assert_paths(clipped, trajectory(LAMB(two, lr=0.01, adapt=False), two), 1e-12)


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_first_step_in_closed_form(form):
    params = weights(shapes=((6,),))
    x = params[0].detach().clone()
    give_grads(params, 0)
    g = params[0].grad.clone()
    LAMB(params, lr=0.1, weight_decay=0.01, **form).step()
    u = g / (g.abs() + 1e-6) + 0.01 * x
    torch.testing.assert_close(
        params[0].detach(), x - 0.1 * x.norm() / u.norm() * u, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_a_zero_tensor_moves(form):
    params = [nn.Parameter(torch.zeros(3, dtype=torch.float64))]
    params[0].grad = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    optimizer = LAMB(params, lr=0.1, **form)
    optimizer.step()
    assert optimizer.trust_ratios()[0].item() == 1.0
    torch.testing.assert_close(
        params[0].detach(), torch.tensor([-0.1, 0.1, -0.1]).double(), rtol=1e-5, atol=0
    )


def test_blocks_are_separate_parameters():
    whole = weights(shapes=((6, 4),))
    parts = [nn.Parameter(whole[0].detach()[2 * k : 2 * k + 2].clone()) for k in range(3)]
    one, many = LAMB(whole, lr=0.1, blocks=3), LAMB(parts, lr=0.1)
    for t in range(4):
        give_grads(whole, t)
        for k, part in enumerate(parts):
            part.grad = whole[0].grad[2 * k : 2 * k + 2].clone()
        one.step()
        many.step()
    joined = torch.cat([part.detach() for part in parts])
    torch.testing.assert_close(whole[0].detach(), joined, rtol=1e-10, atol=1e-10)
    ratios = torch.stack(list(many.trust_ratios().values()))
    torch.testing.assert_close(one.trust_ratios()[0], ratios, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", [*FORMS[:2], {}], ids=[*FORM_IDS[:2], "chosen"])
def test_blocks_of_a_transposed_parameter(form):
    one = [nn.Parameter(weights(shapes=((6, 4),))[0].detach().t())]
    two = [nn.Parameter(one[0].detach().contiguous())]
    assert not one[0].is_contiguous()
    kinds = {"lr": 0.1, "blocks": 2, **form}
    assert_paths(trajectory(LAMB(one, **kinds), one), trajectory(LAMB(two, **kinds), two), 1e-12)


@pytest.mark.parametrize("form", FORMS[1:], ids=FORM_IDS[1:])
def test_in_float32_the_forms_agree(form):
    one, two = weights(dtype=torch.float32), weights(dtype=torch.float32)
    kinds = {"lr": 0.05, "weight_decay": 0.1, "max_grad_norm": 1.0}
    loop = trajectory(LAMB(one, foreach=False, **kinds), one)
    assert_paths(loop, trajectory(LAMB(two, **kinds, **form), two), 1e-6)


def test_auto_adapts_only_groups_that_decay_and_ratios_have_names():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    optimizer = LAMB(layer_adaptation_groups(model, 0.01), lr=0.1)
    model(torch.ones(5, 3).double()).square().sum().backward()
    optimizer.step()
    ratios = {name: value.item() for name, value in optimizer.trust_ratios().items()}
    assert set(ratios) == {name for name, _ in model.named_parameters()}
    adapted = {name for name, value in ratios.items() if value != 1.0}
    assert adapted == {"0.weight", "2.weight"}


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_a_parameter_without_gradient_does_not_age(form):
    params = weights()
    optimizer = LAMB(params, lr=0.1, **form)
    give_grads(params, 0)
    params[1].grad = None
    before = params[1].detach().clone()
    optimizer.step()
    assert torch.equal(params[1].detach(), before)
    assert params[1] not in optimizer.state
    give_grads(params, 1)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [2, 1, 2]


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_global_clipping_is_over_all_groups_and_leaves_gradients(form):
    one, two = weights(), weights()
    clipped = LAMB([{"params": one[:1]}, {"params": one[1:]}], lr=0.1, max_grad_norm=0.5, **form)
    plain = LAMB(two, lr=0.1, **form)
    for t in range(3):
        give_grads(one, t)
        give_grads(two, t)
        kept = [p.grad.clone() for p in one]
        nn.utils.clip_grad_norm_(two, 0.5, error_if_nonfinite=True)
        clipped.step()
        plain.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(one, kept, strict=True))
    assert_paths([one], [two], 1e-6)  # torch adds 1e-6 to the norm


def test_bfloat16_parameters_keep_float32_moments_through_a_checkpoint(tmp_path):
    params = weights(dtype=torch.bfloat16)
    optimizer = LAMB(params, lr=0.1)
    trajectory(optimizer, params, 3)
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    others = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = LAMB(others, lr=0.1)
    resumed.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
    for p, q in zip(params, others, strict=True):
        assert resumed.state[q]["exp_avg"].dtype == torch.float32
        assert torch.equal(resumed.state[q]["exp_avg_sq"], optimizer.state[p]["exp_avg_sq"])
    give_grads(params, 9)
    give_grads(others, 9)
    optimizer.step()
    resumed.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@pytest.mark.parametrize(
    "kinds", [{"fused": True}, {"foreach": True}, {"amsgrad": True}], ids=lambda kinds: [*kinds][0]
)
def test_the_state_of_adamw_is_a_warm_start_under_our_own_settings(kinds):
    params = weights(dtype=torch.bfloat16)
    adamw = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, **kinds)
    torch.optim.lr_scheduler.ConstantLR(adamw)  # leaves an initial_lr
    trajectory(adamw, params, 2)
    ours = LAMB(params, lr=torch.tensor(0.1), weight_decay=0.01)
    settings = dict(ours.param_groups[0])
    ours.load_state_dict(copy.deepcopy(adamw.state_dict()))
    assert ours.param_groups[0] == settings
    assert ours.param_groups[0]["lr"] is settings["lr"]
    for p in params:
        assert set(ours.state[p]) == {"step", "exp_avg", "exp_avg_sq"}
        assert ours.state[p]["exp_avg"].dtype == torch.float32
        assert torch.equal(ours.state[p]["exp_avg"], adamw.state[p]["exp_avg"].float())
    trajectory(ours, params, 1)
    assert ours.state[params[0]]["step"].item() == 3
    assert all(ratio.item() != 1.0 for ratio in ours.trust_ratios().values())


def test_a_state_of_ours_brings_its_settings():
    first, params = weights(), weights()
    saved = LAMB(first, lr=0.3, eps=0.0, foreach=False)
    trajectory(saved, first, 1)
    other = LAMB(params, lr=0.1, weight_decay=0.0)
    other.load_state_dict(saved.state_dict())
    ours, theirs = other.state_dict()["param_groups"], saved.state_dict()["param_groups"]
    assert ours == theirs


def test_a_state_without_our_moments_is_refused_and_nothing_is_loaded():
    params = weights()
    sgd = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    trajectory(sgd, params, 1)
    ours = LAMB(params)
    with pytest.raises(
        ValueError,
        match=r"LAMB: state_dict must hold step, exp_avg, exp_avg_sq .*, got \['momentum_buffer'\]",
    ):
        ours.load_state_dict(sgd.state_dict())
    assert len(ours.state) == 0


def test_a_tensor_rate_is_read_at_every_step():
    one, two = weights(), weights()
    rate = torch.tensor(0.1, dtype=torch.float64)
    tensor, number = LAMB(one, lr=rate), LAMB(two, lr=0.1)
    trajectory(tensor, one, 1)
    trajectory(number, two, 1)
    rate.fill_(0.02)
    number.param_groups[0]["lr"] = 0.02
    assert_paths(trajectory(tensor, one, 1), trajectory(number, two, 1), 1e-12)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)],
    ids=["bfloat16", "float32"],
)
def test_states_of_few_bits_do_not_round_the_parameters(foreach, dtype, state_dtype):
    """The first step is that of full states: moments are rounded after it is computed."""
    full, few = ([p.detach().to(dtype).requires_grad_() for p in weights()] for _ in range(2))
    for params, state in ((full, None), (few, state_dtype)):
        optimizer = LAMB(params, lr=0.1, foreach=foreach, state_dtype=state)
        generator = torch.Generator().manual_seed(3)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
        optimizer.step()
    assert optimizer.state[few[0]]["exp_avg"].dtype == state_dtype
    for one, two in zip(full, few, strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=0)


def test_settings_changed_between_steps_take_effect():
    params = weights()
    optimizer = LAMB(params, lr=0.1)
    trajectory(optimizer, params, 1)
    optimizer.param_groups[0]["weight_decay"] = 0.0  # "auto": no adaptation from now on
    trajectory(optimizer, params, 1)
    assert all(ratio.item() == 1.0 for ratio in optimizer.trust_ratios().values())


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"lr": -1.0}, "LAMB: lr must be >= 0, got -1.0"),
        ({"betas": (1.0, 0.9)}, r"LAMB: betas\[0\] must be >= 0 and < 1, got 1.0"),
        ({"betas": (0.9,)}, "LAMB: betas must be two numbers"),
        ({"eps": -1e-8}, "LAMB: eps must be >= 0"),
        ({"weight_decay": -0.1}, "LAMB: weight_decay must be >= 0, got -0.1"),
        ({"max_grad_norm": 0.0}, "LAMB: max_grad_norm must be > 0, got 0.0"),
        ({"trust_clip": (2.0, 1.0)}, r"LAMB: trust_clip must be .*, got \(2.0, 1.0\)"),
        ({"adapt": "always"}, "LAMB: adapt must be True, False or 'auto', got 'always'"),
        ({"blocks": 3}, "LAMB: blocks must divide dimension 0"),
        ({"blocks": 0}, "LAMB: blocks must be >= 1, got 0"),
        ({"foreach": True, "fused": True}, "LAMB: foreach and fused cannot both be True"),
        ({"lr": torch.tensor(-1.0)}, "LAMB: lr must be >= 0, got -1.0"),
        ({"lr": math.inf}, "LAMB: lr must be finite, got inf"),
        ({"betas": 0.9}, "LAMB: betas must be two numbers, got 0.9"),
        ({"trust_clip": 3}, "LAMB: trust_clip must be .*, got 3"),
        ({"norm_clip": (0, "a")}, r"LAMB: norm_clip\[1\] must be a number, got str"),
        ({"state_dtype": "float32"}, "LAMB: state_dtype must be .*, got 'float32'"),
        ({"state_dtype": torch.int8}, "LAMB: state_dtype must be .*, got torch.int8"),
        ({"maximize": "yes"}, "LAMB: maximize must be one of True, False, got 'yes'"),
        ({"decoupled": 0.1}, "LAMB: decoupled must be one of True, False, got 0.1"),
        ({"fused": "auto"}, "LAMB: fused must be one of None, True, False, got 'auto'"),
    ],
)
def test_bad_settings_are_named(kinds, message):
    with pytest.raises((TypeError, ValueError), match=message):
        LAMB(weights(shapes=((4, 3),)), **kinds)


def test_what_has_no_kernel_is_named():
    params = weights(dtype=torch.bfloat16)
    give_grads(params, 0)
    with pytest.raises(
        RuntimeError, match="LAMB: no fused kernel for torch.bfloat16, torch.float32 on cpu"
    ):
        LAMB(params, fused=True).step()


@pytest.mark.gpu
def test_the_loss_scaler_hands_over_its_scale_and_flag():
    params = [nn.Parameter(torch.ones(300, device="cuda")) for _ in range(2)]
    optimizer = LAMB(params, lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    for value, moves in ((torch.inf, False), (2.0, True)):
        before = params[0].detach().clone()
        optimizer.zero_grad()
        scaler.scale(sum((p * value).sum() for p in params)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(params[0].detach(), before) != moves
    assert optimizer.state[params[0]]["step"].item() == 1


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", [{}, {"foreach": True, "capturable": True}])
def test_it_runs_inside_a_cuda_graph(kinds):
    params = [nn.Parameter(torch.ones(1000, 30, device="cuda")) for _ in range(3)]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    captured, plain = LAMB(params, lr=0.1, **kinds), LAMB(twins, lr=0.1, **kinds)
    for p, q in zip(params, twins, strict=True):
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(q)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        plain.step()
    torch.cuda.synchronize()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
