# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from compiler import needs_compiler

from batchery.kernels.lamb import LambRule, fused_cuda, lamb_step_, trust_ratios
from batchery.kernels.multi_tensor import ChunkTable

SHAPES = [(40,), (6, 33), (2,), (4, 1000), (2, 2, 2)]

RULES = {
    "default": {},
    "blocks": {"blocks": 2},
    "decoupled": {"decoupled": True},
    "no-bias-correction": {"bias_correction": False},
    "no-averaging": {"grad_averaging": False, "maximize": True},
    "trust-clip": {"trust_clip": (0.01, 0.05)},
    "norm-clip": {"norm_clip": (0.1, 1.0)},
    "no-adapt": {"adapt": False},
    "no-eps": {"weight_decay": 0.0, "eps": 0.0},
    "no-momentum": {"beta1": 0.0, "beta2": 0.0},
}


def by_the_equations(x, grads, rule, lr):
    """The update as the paper writes it, on Python numbers; returns x and the last ratios."""
    size = len(x) // rule.blocks
    m, v = [0.0] * len(x), [0.0] * len(x)
    for t, g in enumerate(grads, 1):
        if rule.maximize:
            g = [-value for value in g]
        u = []
        for i, value in enumerate(g):
            m[i] = rule.beta1 * m[i] + (1 - rule.beta1 if rule.grad_averaging else 1) * value
            v[i] = rule.beta2 * v[i] + (1 - rule.beta2) * value**2
            c1 = 1 - rule.beta1**t if rule.bias_correction else 1.0
            c2 = 1 - rule.beta2**t if rule.bias_correction else 1.0
            u.append((m[i] / c1) / (math.sqrt(v[i] / c2) + rule.eps))
            if not rule.decoupled:
                u[i] += rule.weight_decay * x[i]
        ratios = []
        for k in range(rule.blocks):
            part = slice(k * size, (k + 1) * size)
            weight, update = (math.sqrt(sum(a * a for a in y[part])) for y in (x, u))
            ratio = 1.0
            if rule.adapt and weight and update:
                low, high = rule.norm_clip or (weight, weight)
                ratio = min(max(weight, low), high) / update
            if rule.adapt and rule.trust_clip:
                ratio = min(max(ratio, rule.trust_clip[0]), rule.trust_clip[1])
            ratios.append(ratio)
        keep = 1 - lr * rule.weight_decay if rule.decoupled else 1.0
        x = [keep * x[i] - lr * ratios[i // size] * u[i] for i in range(len(x))]
    return x, ratios


def draw(dtype, device="cpu", seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [(tensor * 0.1).to(device, dtype) for tensor in drawn]


def run(rule, dtype, device, step, *, count=3, grad_dtype=None, state_dtype=None):
    params = draw(dtype, device)
    state = state_dtype or dtype
    moments = [[torch.zeros_like(p, dtype=state) for p in params] for _ in range(2)]
    on = device if str(device) != "cpu" else "cpu"
    steps = [torch.zeros((), device=on) for _ in params]
    ratios = None
    for k in range(count):
        torch._foreach_add_(steps, 1)
        grads = [g.to(grad_dtype or dtype) for g in draw(torch.float64, device, seed=k + 1)]
        ratios = step(params, grads, *moments, steps)
    return params, ratios


def oracle(rule, count=3):
    params = draw(torch.float64)
    grads = [draw(torch.float64, seed=k + 1) for k in range(count)]
    found = [
        by_the_equations(p.flatten().tolist(), [g[i].flatten().tolist() for g in grads], rule, 0.1)
        for i, p in enumerate(params)
    ]
    wanted = [
        torch.tensor(x, dtype=torch.float64).view_as(p)
        for (x, _), p in zip(found, params, strict=True)
    ]
    return wanted, torch.tensor([r for _, ratios in found for r in ratios], dtype=torch.float64)


def close(found, wanted, tolerance):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("impl", ["single", "foreach", needs_compiler("fused")])
def test_every_form_follows_the_equations_in_float64(impl, name):
    rule = LambRule(**RULES[name])
    params, ratios = run(
        rule, torch.float64, "cpu", lambda *lists: lamb_step_(*lists, rule, 0.1, impl=impl).finish()
    )
    wanted, wanted_ratios = oracle(rule)
    close(params, wanted, 1e-10)
    close([ratios], [wanted_ratios], 1e-10)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_the_kernels_follow_the_equations(rule, kernel_device):
    rule = LambRule(**rule)
    table = ChunkTable(draw(torch.float32), blocks=rule.blocks, chunk=512, device=kernel_device)

    def step(*lists):
        return fused_cuda(lists, rule, 0.1, table, block=128, warps=4).finish()

    params, ratios = run(rule, torch.float32, kernel_device, step)
    wanted, wanted_ratios = oracle(rule)
    close(params, wanted, 1e-5)
    close([ratios], [wanted_ratios], 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_keep_float32_moments(dtype, kernel_device):
    rule = LambRule()
    table = ChunkTable(draw(torch.float32), chunk=512, device=kernel_device)

    def fused(*lists):
        return fused_cuda(lists, rule, 0.1, table, block=128, warps=4).finish()

    def foreach(*lists):
        return lamb_step_(*lists, rule, 0.1, impl="foreach").finish()

    kinds = {"count": 1, "state_dtype": torch.float32}
    found, ratios = run(rule, dtype, kernel_device, fused, **kinds)
    other, other_ratios = run(rule, dtype, kernel_device, foreach, **kinds)
    # One rounding to the parameter's dtype: at most one unit in the last place apart.
    ulp = torch.finfo(dtype).eps
    close(found, [p.cpu().double() for p in other], ulp)
    close([ratios], [other_ratios.cpu().double()], 1e-5)


def test_unaligned_views_and_tensor_rates(kernel_device):
    rule = LambRule()
    size = 700
    whole = draw(torch.float32, kernel_device, shapes=[(size + 1,)])[0]
    views, plain = [whole[1:]], [whole[1:].clone()]
    results = []
    for params in (views, plain):
        lists = [params, [torch.ones(size, device=kernel_device)]]
        lists += [[torch.zeros(size, device=kernel_device)] for _ in range(2)]
        lists += [[torch.ones((), device=kernel_device)]]
        rate = torch.tensor(0.1, device=kernel_device)
        table = ChunkTable(params, chunk=256)
        fused_cuda(lists, rule, rate, table, block=128, warps=4).finish()
        results.append(params[0].clone())
    assert torch.equal(*results)


def test_found_inf_leaves_everything_alone(kernel_device):
    rule = LambRule()
    params = draw(torch.float32, kernel_device)
    before = [p.clone() for p in params]
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    steps = [torch.ones((), device=kernel_device) for _ in params]
    grads = [torch.full_like(p, torch.inf) for p in params]
    table = ChunkTable(params, chunk=512)
    table.partials[0], table.partials[1] = 4.0, 9.0  # of an earlier step
    ratios = fused_cuda(
        (params, grads, *moments, steps),
        rule,
        0.1,
        table,
        grad_divisor=torch.tensor(2.0, device=kernel_device),
        found_inf=torch.ones((), device=kernel_device),
        block=128,
        warps=4,
    ).finish()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert all(float(m.abs().sum()) == 0 for ms in moments for m in ms)
    assert ratios.tolist() == [1.0] * len(params)  # as on the CPU


def test_a_nan_stays_in_its_tensor_and_reaches_all_of_it(kernel_device):
    rule = LambRule()
    params = draw(torch.float32, kernel_device)
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    steps = [torch.ones((), device=kernel_device) for _ in params]
    grads = [torch.ones_like(p) for p in params]
    grads[1][0, 0] = torch.nan
    table = ChunkTable(params, chunk=512)
    fused_cuda((params, grads, *moments, steps), rule, 0.1, table, block=128, warps=4).finish()
    assert [bool(p.isnan().all()) for p in params] == [False, True, False, False, False]
    assert [bool(p.isnan().any()) for p in params] == [False, True, False, False, False]


@pytest.mark.parametrize("infinite", [0, 1])
def test_an_overflowed_norm_does_not_freeze_its_layer_unseen(infinite):
    squares = torch.tensor([[4.0], [1.0]])
    squares[infinite] = torch.inf
    assert not math.isfinite(trust_ratios(squares, LambRule()).item())


def test_gradients_are_left_as_they_are(kernel_device):
    rule = LambRule(maximize=True)
    divisor = torch.tensor(3.0, device=kernel_device)
    for form in ("single", "foreach", "kernel"):
        params = draw(torch.float32, kernel_device)
        lists = [params, draw(torch.float32, kernel_device, seed=9)]
        lists += [[torch.zeros_like(p) for p in params] for _ in range(2)]
        lists += [[torch.ones((), device=kernel_device) for _ in params]]
        before = [g.clone() for g in lists[1]]
        if form == "kernel":
            fused_cuda(lists, rule, 0.1, ChunkTable(params), grad_divisor=divisor).finish()
        else:
            lamb_step_(*lists, rule, 0.1, impl=form, grad_divisor=divisor).finish()
        assert all(torch.equal(a, b) for a, b in zip(lists[1], before, strict=True))


@pytest.mark.gpu
def test_a_hundred_runs_give_the_same_bits():
    rule, shapes = LambRule(), [(1000, 1000), (333,), (4097,), (50, 77)]
    results = []
    for _ in range(100):
        params = draw(torch.float32, "cuda", shapes=shapes)
        lists = [params, draw(torch.float32, "cuda", seed=1, shapes=shapes)]
        lists += [[torch.zeros_like(p) for p in params] for _ in range(2)]
        lists += [[torch.ones((), device="cuda") for _ in params]]
        lamb_step_(*lists, rule, 0.1, impl="fused").finish()
        results.append(params)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


@pytest.mark.gpu
def test_large_tensors_against_float64():
    rule, shapes = LambRule(), [(4096, 1024), (1023, 1025), (7,)]
    wide = draw(torch.float64, "cuda", shapes=shapes)
    lists = [wide, draw(torch.float64, "cuda", seed=1, shapes=shapes)]
    lists += [[torch.zeros_like(p) for p in wide] for _ in range(2)]
    lists += [[torch.ones((), device="cuda") for _ in wide]]
    narrow = [[t.float() for t in tensors] for tensors in lists]
    lamb_step_(*narrow, rule, 0.1, impl="fused").finish()
    lamb_step_(*lists, rule, 0.1, impl="single").finish()
    close(narrow[0], [p.cpu() for p in wide], 1e-5)
