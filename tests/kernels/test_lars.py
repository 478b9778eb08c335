# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from compiler import needs_compiler

from batchery.kernels.lars import LarsRule, fused_cuda, lars_step_
from batchery.kernels.multi_tensor import ChunkTable

SHAPES = [(40,), (6, 33), (2,), (4, 1000), (2, 2, 2)]

RULES = {
    "default": {},
    "decay": {"weight_decay": 0.1, "eps": 1e-3},
    "blocks": {"blocks": 2, "weight_decay": 0.1},
    "update": {"variant": "update", "weight_decay": 0.1},
    "momentum": {"variant": "momentum", "weight_decay": 0.1, "trust_coefficient": 1.0},
    "nesterov": {"nesterov": True, "weight_decay": 0.1},
    "lr-inside": {"lr_in_momentum": True},
    "larc": {"trust_clip": True, "trust_coefficient": 1.0},
    "dampening": {"dampening": 0.5, "maximize": True},
    "sgd": {"adapt": False, "weight_decay": 0.1},
    "no-momentum": {"momentum": 0.0},
}


def norm(values):
    return math.sqrt(sum(value * value for value in values))


def by_the_equations(x, grads, rule, rates):
    """The update as its papers write it, on Python numbers."""
    size = len(x) // rule.blocks
    buffer = None
    for g, lr in zip(grads, rates, strict=True):
        g = [-value for value in g] if rule.maximize else g
        decayed = [a + rule.weight_decay * b for a, b in zip(g, x, strict=True)]
        if rule.variant == "momentum":
            old = buffer or [0.0] * len(x)
            mu = rule.momentum
            buffer = [mu * b + (1 - mu) * d for b, d in zip(old, decayed, strict=True)]
        measured = {"grad": g, "update": decayed, "momentum": buffer}[rule.variant]
        local = []
        for k in range(rule.blocks):
            part = slice(k * size, (k + 1) * size)
            weight, update = norm(x[part]), norm(measured[part])
            bottom = update + rule.eps
            if rule.variant == "grad":
                bottom += rule.weight_decay * weight
            rate = rule.trust_coefficient * weight / bottom if weight and update else 1.0
            if rule.trust_clip:
                rate = min(rate / lr, 1.0)
            local.append(rate if rule.adapt else 1.0)
        r = [local[i // size] for i in range(len(x))]
        if rule.variant == "momentum":
            x = [x[i] - lr * r[i] * buffer[i] for i in range(len(x))]
            continue
        inside, outside = (lr, 1.0) if rule.lr_in_momentum else (1.0, lr)
        d = [inside * r[i] * decayed[i] for i in range(len(x))]
        if rule.momentum:
            if buffer is None:
                buffer = d
            else:
                buffer = [
                    rule.momentum * b + (1 - rule.dampening) * v
                    for b, v in zip(buffer, d, strict=True)
                ]
            if rule.nesterov:
                d = [v + rule.momentum * b for v, b in zip(d, buffer, strict=True)]
            else:
                d = buffer
        x = [x[i] - outside * d[i] for i in range(len(x))]
    return x


RATES = (0.1, 0.05, 0.2)  # different, so that the place of lr shows


def draw(dtype, device="cpu", seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [(tensor * 0.1).to(device, dtype) for tensor in drawn]


def run(rule, dtype, device, step):
    params = draw(dtype, device)
    buffers = [torch.zeros_like(p) for p in params] if rule.momentum else []
    for k, lr in enumerate(RATES):
        step(params, draw(dtype, device, seed=k + 1), buffers, lr, k == 0)
    return params


def check(found, rule, tolerance):
    grads = [draw(torch.float64, seed=k + 1) for k in range(len(RATES))]
    for i, (p, x) in enumerate(zip(draw(torch.float64), found, strict=True)):
        rows = [g[i].flatten().tolist() for g in grads]
        numbers = by_the_equations(p.flatten().tolist(), rows, rule, RATES)
        wanted = torch.tensor(numbers, dtype=torch.float64).view_as(p)
        torch.testing.assert_close(x.cpu().double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("impl", ["single", "foreach", needs_compiler("fused")])
def test_every_form_follows_the_equations_in_float64(impl, name):
    rule = LarsRule(**RULES[name])

    def step(params, grads, buffers, lr, first):
        lars_step_(params, grads, buffers, rule, lr, first=first, impl=impl).finish()

    check(run(rule, torch.float64, "cpu", step), rule, 1e-10)


@pytest.mark.parametrize("tensor_rate", [False, True])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_the_kernels_follow_the_equations(rule, tensor_rate, kernel_device):
    rule = LarsRule(**rule)
    table = ChunkTable(draw(torch.float32), blocks=rule.blocks, chunk=512, device=kernel_device)

    def step(params, grads, buffers, lr, first):
        rate = torch.tensor(lr, device=kernel_device) if tensor_rate else lr
        lists = (params, grads, buffers or params)
        fused_cuda(lists, rule, rate, table, first=first, block=128, warps=4).finish()

    check(run(rule, torch.float32, kernel_device, step), rule, 1e-5)


def test_zero_weights_and_zero_gradients_have_rate_one(kernel_device):
    rule = LarsRule(weight_decay=0.1)
    params = [torch.zeros(5, device=kernel_device), torch.ones(5, device=kernel_device)]
    grads = [torch.ones(5, device=kernel_device), torch.zeros(5, device=kernel_device)]
    buffers = [torch.zeros_like(p) for p in params]
    table = ChunkTable(params)
    ratios = fused_cuda((params, grads, buffers), rule, 0.5, table, first=True).finish()
    assert ratios.tolist() == [1.0, 1.0]
    assert params[0].tolist() == [-0.5] * 5


def test_found_inf_leaves_everything_alone(kernel_device):
    params = draw(torch.float32, kernel_device)
    before = [p.clone() for p in params]
    grads = [torch.full_like(p, torch.inf) for p in params]
    buffers = [torch.zeros_like(p) for p in params]
    flag = torch.ones((), device=kernel_device)
    lists, table = (params, grads, buffers), ChunkTable(params)
    table.partials[0], table.partials[1] = 4.0, 9.0  # of an earlier step
    ratios = fused_cuda(lists, LarsRule(), 0.1, table, first=True, found_inf=flag).finish()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert all(float(b.abs().sum()) == 0 for b in buffers)
    assert ratios.tolist() == [1.0] * len(params)  # as on the CPU
