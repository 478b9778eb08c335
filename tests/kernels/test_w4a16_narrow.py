# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from four_bits import assert_chain_is_alike, draw, products
from gluon_as_python import product

from batchery.kernels.w4a16 import w4a16_matmul
from batchery.kernels.w4a16_layout import dequantize_w4, pack_w4
from batchery.kernels.w4a16_narrow import Narrow, gluon, launch
from batchery.kernels.w4a16_plan import CHAINED, NARROW
from batchery.kernels.w4a16_wide import fits

FORMS = sorted({form for _, forms in (*NARROW, *CHAINED) for form in forms})
SMALL, TALL = list(NARROW[0][1])  # of 16 rows of x; 64 and 128 of W

CASES = {
    "even": (1280, 1024, 128, 16, ""),
    "odd": (1027, 1024, 128, 11, "zeros bias"),
    "group-32": (770, 1088, 32, 13, "zeros"),
    "group-64": (640, 960, 64, 37, "zeros bias"),
    "group-256": (512, 2048, 256, 5, "zeros"),
    "one-group": (512, 1096, 1096, 9, "zeros"),
    "one-group-of-8": (512, 1096, 1096, 9, ""),
    "gated": (1402, 1024, 128, 7, "gated bias"),
    "one-row": (384, 512, 128, 1, ""),
}


@pytest.mark.skipif(gluon is None, reason="needs Triton's Gluon")
@pytest.mark.parametrize("form", [SMALL, TALL, Narrow(8, 128, 2), Narrow(32, 64, 4)])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("chained", [False, True])
def test_the_source_as_python_follows_the_equation(form, name, late, chained):
    n, k, group, m, extra = CASES[name]
    n = min(n, 130)
    gated = "gated" in extra
    q = draw(n, k, group, "zeros" in extra)
    weight = pack_w4(q.q, q.scales, q.zeros, gated=gated)
    generator = np.random.default_rng(0)
    x, bias = generator.standard_normal((m, k)), generator.standard_normal(n)
    wanted = x @ dequantize_w4(weight, torch.float64).numpy().T + bias
    if gated:
        gate, up = np.split(wanted, 2, 1)
        wanted = gate / (1 + np.exp(-gate)) * up
        bias = np.stack(np.split(bias, 2), 1).ravel()
    for split in (1, min(3, weight.words.shape[1])):
        more = {"chained": chained, "late": late, "bias": bias, "order": generator.permutation}
        found = product(x, weight, form, split, **more)
        assert np.linalg.norm(found - wanted) <= 1e-10 * np.linalg.norm(wanted)


def pack(n, k, group, zeros=False, gated=False):
    w = draw(n, k, group, zeros)
    return pack_w4(w.q, w.scales, w.zeros, gated=gated, device="cuda")


def close(found, wanted, tolerance):
    return float((found.double() - wanted).norm() / wanted.norm()) <= tolerance


def test_rows_on_the_cpu_do_not_fit():
    q, scales = torch.ones(2, 64, dtype=torch.uint8), torch.ones(2, 1)
    assert not fits(torch.ones(2, 64, dtype=torch.half), pack_w4(q, scales))


def test_a_chain_means_nothing_to_a_cpu():
    q = draw(64, 256, 128, False)
    weight = pack_w4(q.q, q.scales)
    found = []
    for chained in (False, True):
        x = torch.linspace(-1, 1, 3 * 256).view(3, 256).requires_grad_()
        y = w4a16_matmul(x, weight, chained=chained)
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(  # every pair takes a few seconds to compile
    ("form", "name"),
    [(form, name) for form in (SMALL, TALL) for name in CASES]
    + [(form, "odd") for form in FORMS if form not in (SMALL, TALL)],
)
def test_the_kernel_follows_the_equation(form, name):
    n, k, group, m, extra = CASES[name]
    gated = "gated" in extra
    weight = pack(n, k, group, "zeros" in extra, gated)
    for x, bias, wanted, tolerance in products(weight, m, extra, both=name == "odd"):
        assert fits(x, weight)
        for split in (1, 2, 3, 16):
            out = torch.full((m, n // 2 if gated else n), torch.nan, dtype=x.dtype, device="cuda")
            launch(x, weight, form, split, bias=bias, out=out)
            assert close(out, wanted, tolerance), split
    assert int(weight.counters.abs().sum()) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_every_number_of_rows_and_turns_is_right(form):
    generator = torch.Generator("cuda").manual_seed(2)
    for k in (256, 512, 768, 1024, 2560):  # one block, fewer than stages, as many, more
        weight = pack(256, k, 128)
        w = dequantize_w4(weight, torch.float64)
        for m in {1, form.batch - 1, form.batch, form.batch + 1, 2 * form.batch + 3}:
            wide = torch.randn(m, k + 8, device="cuda", generator=generator).half()
            x = wide[:, :k]  # rows lie apart
            for split in (1, 2):
                out = torch.full((m, 256), torch.nan, dtype=torch.half, device="cuda")
                launch(x, weight, form, split, out=out)
                assert close(out, x.double() @ w.T, 1e-3), (k, m, split)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_runs_give_the_same_bits_and_a_nan_stays_in_its_row(form):
    weight = pack(4096, 4096, 128)
    x = torch.randn(form.batch, 4096, device="cuda").half()
    for split in (1, 5):
        first = launch(x, weight, form, split)
        assert all(torch.equal(launch(x, weight, form, split), first) for _ in range(100))
        spoilt = x.clone()
        spoilt[5, 3] = torch.nan
        found = launch(spoilt, weight, form, split)
        assert found[5].isnan().all()
        kept = torch.arange(form.batch, device="cuda") != 5
        assert torch.equal(found[kept], first[kept])


@pytest.mark.gpu
def test_a_graph_replays_it():
    weight = pack(1024, 2048, 128)
    x = torch.randn(16, 2048, device="cuda").half()
    out = torch.empty(16, 1024, dtype=torch.half, device="cuda")
    launch(x, weight, SMALL, 3, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(x, weight, SMALL, 3, out=out)
    x.copy_(torch.randn(16, 2048, device="cuda"))
    wanted = launch(x, weight, SMALL, 3)
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_a_chain_gives_the_bits_of_kernels_one_after_another(form):
    weights = [pack(2048, 2048, 128) for _ in range(3)]
    first = torch.randn(form.batch, 2048, device="cuda").half()

    def chain(chained):
        x = first
        for turn in range(12):
            for weight, split in zip(weights, (1, 4, 3), strict=True):
                x = launch(x, weight, form, split, chained=chained)
                if turn % 2:  # a kernel that does not wait by itself stands between
                    x = x / x.abs().amax()
            x = x / x.abs().amax()
        return x

    assert_chain_is_alike(chain, first, replays=20)
    assert not any(int(weight.counters.abs().sum()) for weight in weights)


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
def test_a_chained_product_is_right_at_any_number_of_rows(gated):
    weight = pack(1024, 1024, 128, gated=gated)
    w = dequantize_w4(weight, torch.float64)
    for m in (0, 1, 8, 9, 16, 17, 33, 64, 65):
        x = torch.randn(m, 1024, device="cuda").half()
        wanted = x.double() @ w.T
        if gated:
            wanted = F.silu(wanted[:, :512]) * wanted[:, 512:]
        found = w4a16_matmul(x, weight, chained=True)
        assert found.shape == wanted.shape
        assert m == 0 or close(found, wanted, 1e-3), m
    compiled = torch.compile(lambda x: w4a16_matmul(x, weight, chained=True), fullgraph=True)
    assert torch.equal(compiled(x[:16]), w4a16_matmul(x[:16], weight, chained=True))
    alone, beside = (
        w4a16_matmul(x[:16], weight, batch_invariant=True, chained=chained)
        for chained in (False, True)
    )
    assert torch.equal(alone, beside)


@pytest.mark.gpu
def test_a_weight_with_too_few_counters_is_not_split():
    weight = pack(1024, 2048, 128)
    few = replace(weight, counters=weight.counters[:3])
    x = torch.randn(16, 2048, device="cuda").half()
    assert torch.equal(launch(x, few, SMALL, 4), launch(x, weight, SMALL, 1))
