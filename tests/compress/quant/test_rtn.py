# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from batchery.compress.quant import dequantize, quantize_rtn
from batchery.compress.quant.rtn import CLIP_STEPS


def weights(n, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("group", [4, 12, -1])
def test_symmetric_rounding_is_that_of_the_equations(group):
    w = weights(5, 24)
    qw = quantize_rtn(w, group_size=group, scale_dtype=None)
    size = 24 if group == -1 else group
    assert (qw.group_size, qw.zeros, qw.g_idx) == (size, None, None)
    for row in range(5):
        for column in range(24):
            begin = column // size * size
            scale = 2 * float(w[row, begin : begin + size].abs().max()) / 15
            assert float(qw.scales[row, column // size]) == pytest.approx(scale, rel=1e-12)
            level = round(float(w[row, column]) / float(qw.scales[row, column // size]))
            assert int(qw.q[row, column]) == min(max(level + 8, 0), 15)


def test_asymmetric_rounding_is_that_of_the_equations():
    w = weights(5, 24)
    w[0] = w[0].abs()
    w[1] = -w[1].abs()
    qw = quantize_rtn(w, group_size=8, symmetric=False, scale_dtype=None)
    for row in range(5):
        for group in range(3):
            part = w[row, group * 8 : group * 8 + 8]
            low, high = min(0.0, float(part.min())), max(0.0, float(part.max()))
            scale = (high - low) / 15
            assert float(qw.scales[row, group]) == pytest.approx(scale, rel=1e-12)
            assert int(qw.zeros[row, group]) == round(-low / scale)
    # the range reaches both ends, so only rounding of the zero and of w is left
    steps = (dequantize(qw, torch.float64) - w).abs() / qw.scales.repeat_interleave(8, 1)
    assert float(steps.max()) <= 1.0
    assert float(steps[:2].max()) <= 0.5 + 1e-9  # zero is at an end: exact


@pytest.mark.parametrize("sign", [1, -1])
def test_a_group_of_one_sign_keeps_its_range(sign):
    """MARLIN's script halves it: what is above 7 steps of max/15 is clipped."""
    w = sign * weights(16, 64).abs()
    qw = quantize_rtn(w, group_size=32, scale_dtype=None)
    steps = (dequantize(qw, torch.float64) - w).abs() / qw.scales.repeat_interleave(32, 1)
    assert float(steps.max()) <= 0.5 + 1e-9


@pytest.mark.parametrize("symmetric", [True, False])
def test_clip_search_finds_the_best_of_its_ranges(symmetric):
    w = weights(6, 16)
    w[:, ::8] *= 4
    how = {"symmetric": symmetric, "clip_search": True, "scale_dtype": None}
    found = dequantize(quantize_rtn(w, group_size=8, **how), torch.float64)
    for row in range(6):
        for begin in (0, 8):
            part = w[row, begin : begin + 8]
            costs = []
            for step in range(CLIP_STEPS):
                share = 1 - step / 100
                if symmetric:
                    scale, zero = 2 * share * float(part.abs().max()) / 15, 8
                else:
                    low, high = min(0.0, float(part.min())), max(0.0, float(part.max()))
                    scale = (high - low) * share / 15
                    zero = round(-low * share / scale)
                q = (torch.round(part / scale) + zero).clamp(0, 15)
                costs.append(float((scale * (q - zero) - part).square().sum()))
            error = float((found[row, begin : begin + 8] - part).square().sum())
            assert error == pytest.approx(min(costs), rel=1e-10)
    assert CLIP_STEPS == 76


def test_weights_that_are_all_zero_stay_zero():
    for symmetric in (True, False):
        for clip_search in (True, False):
            how = {"group_size": 4, "symmetric": symmetric, "clip_search": clip_search}
            qw = quantize_rtn(torch.zeros(2, 8), **how)
            assert not dequantize(qw, torch.float32).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_wide_whatever_the_weights(dtype):
    w = weights(4, 32).to(dtype)
    qw = quantize_rtn(w, group_size=16, scale_dtype=None)
    assert qw.scales.dtype == torch.float32
    assert torch.equal(qw.q, quantize_rtn(w.float(), group_size=16, scale_dtype=None).q)


@pytest.mark.parametrize("clip_search", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_rounded_with_the_scales_that_are_stored(dtype, clip_search):
    w = weights(64, 128)
    for symmetric in (True, False):
        how = {"symmetric": symmetric, "clip_search": clip_search}
        qw = quantize_rtn(w, group_size=32, scale_dtype=dtype, **how)
        assert qw.scales.dtype == dtype
        steps = w.view(64, 4, 32) / qw.scales.double()[:, :, None]
        z = 8 if qw.zeros is None else qw.zeros.double()[:, :, None]
        wanted = (steps.round() + z).clamp(0, 15)
        assert torch.equal(qw.q.double(), wanted.flatten(1))
        wide = quantize_rtn(w, group_size=32, scale_dtype=None, **how)
        if not clip_search:  # a search may find another range
            assert torch.equal(qw.scales, wide.scales.to(dtype))
        assert dtype != torch.bfloat16 or not torch.equal(qw.q, wide.q)


@pytest.mark.parametrize("sign", [1, -1])  # below 0 the zero would lie at 21, and is 15
def test_scales_too_small_for_their_dtype_become_its_smallest(sign):
    least = 2.0**-24  # of float16
    for high in (1e-12, 1.4 * 15 * least, 2.6 * 15 * least):
        w = sign * torch.tensor([[0.0, high / 2, high, high]], dtype=torch.float64)
        for symmetric in (True, False):
            qw = quantize_rtn(w, group_size=4, symmetric=symmetric)
            assert float(qw.scales) >= least
            steps = (dequantize(qw, torch.float64) - w).abs() / float(qw.scales)
            assert float(steps.max()) < (8 if high > least else 0.5)


def test_scales_too_large_for_their_dtype_are_refused():
    w = torch.full((2, 8), 5e5)
    rule = "quantize_rtn: scale_dtype must hold the scales: take bfloat16, .* got torch.float16"
    for symmetric in (True, False):
        how = {"group_size": 4, "symmetric": symmetric}
        assert torch.isfinite(quantize_rtn(w, scale_dtype=torch.bfloat16, **how).scales).all()
    with pytest.raises(ValueError, match=rule):
        quantize_rtn(w * 10, group_size=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 3}, "quantize_rtn: group_size must divide K = 8, got 3"),
        ({"group_size": -2}, "quantize_rtn: group_size must be >= 1, got -2"),
        ({"scale_dtype": torch.float64}, "quantize_rtn: scale_dtype must be one of torch.float16"),
        ({"bits": 3}, "quantize_rtn: bits must be one of 4, got 3"),
        ({"w": torch.ones(8)}, r"quantize_rtn: w must be \(N, K\), not empty, got \(8,\)"),
        ({"w": torch.ones(2, 8, dtype=torch.int32)}, "quantize_rtn: w must be floating"),
        ({"w": torch.full((2, 8), torch.inf)}, "quantize_rtn: w must be finite"),
    ],
)
def test_what_cannot_be_is_named(change, message):
    given = {"w": torch.ones(2, 8), "group_size": 4, **change}
    with pytest.raises(ValueError, match=message):
        quantize_rtn(given.pop("w"), **given)
