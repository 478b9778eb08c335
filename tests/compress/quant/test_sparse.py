# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch

from batchery.compress.quant import GPTQ, dequantize, quantize_rtn
from batchery.compress.quant.sparse import keep_two_of_four, prune_quantize_24, quantize_rtn_24
from batchery.kernels.w4a16_sparse_layout import dequantize_sparse_w4, pack_sparse_w4

PAIRS = list(itertools.combinations(range(4), 2))


def correlated(tokens, k, seed=0, dtype=torch.float64):
    """Inputs with a few strong directions, and columns of unlike size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator, dtype=torch.float64) / k**0.5
    mix += torch.randn(k, 1, generator=generator, dtype=torch.float64)
    sizes = torch.rand(k, generator=generator, dtype=torch.float64) * 2 + 0.1
    x = torch.randn(tokens, k, generator=generator, dtype=torch.float64) @ mix * sizes
    return x.to(dtype)


def weights(n, k, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator, dtype=torch.float64).to(dtype)


def seen(x):
    gptq = GPTQ(x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32))
    gptq.add_batch(x)
    return gptq


def by_the_equations(w, x, group, found, damp=0.01):
    """SparseGPT with rounding, by the explicit inverse, one row and one column at a time.

    The weight that sets a scale lies half-way between two levels, where the last bit decides:
    there, and only there, the code is taken from what was `found`.
    """
    n, k = w.shape
    h = 2 / len(x) * x.T @ x
    w = w.clone()
    for j in range(k):
        if h[j, j] == 0:
            h[j, j] = 1
            w[:, j] = 0
    h = h + damp * h.diagonal().mean() * torch.eye(k, dtype=h.dtype)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    q = torch.full((n, k), 8, dtype=torch.uint8)
    scales = torch.zeros(n, k // group, dtype=w.dtype)

    def walk(rest, begin, scale, codes):
        """Go through one group; return the values kept."""
        values = []
        for i in range(begin, begin + group):
            if i % 4 == 0:
                cost = [float(rest[j] ** 2 / u[j, j] ** 2) for j in range(i, i + 4)]
                kept = {i + j for j in sorted(range(4), key=lambda j: -cost[j])[:2]}
            d = 0.0
            if i in kept:
                values.append(float(rest[i]))
                d = values[-1]
            if i in kept and scale is not None:
                level = float(rest[i]) / scale
                code = min(max(round(level), -8), 7)
                if abs(abs(level) % 1 - 0.5) < 1e-9 and abs(int(codes[i]) - 8 - level) < 0.6:
                    code = int(codes[i]) - 8
                d = scale * code
                q[row, i] = code + 8
            error = (rest[i] - d) / u[i, i]
            rest[i:] -= error * u[i, i:]
        return values

    for row in range(n):
        rest = w[row].clone()
        for g in range(k // group):
            values = walk(rest.clone(), g * group, None, None)
            scales[row, g] = 2 * max(abs(v) for v in values) / 15
            walk(rest, g * group, float(scales[row, g]), found[row])
    return q, scales


@pytest.mark.parametrize("group", [4, 8, 24])
def test_the_result_is_that_of_the_equations(group):
    x, w = correlated(60, 24), weights(5, 24)
    x[:, 9] = 0
    qw = prune_quantize_24(seen(x), w, group_size=group, scale_dtype=None)
    q, scales = by_the_equations(w, x, group, qw.q)
    assert torch.equal(qw.q, q)
    torch.testing.assert_close(qw.scales, scales, rtol=1e-10, atol=0)
    assert qw.zeros is None
    assert qw.g_idx is None


@pytest.mark.parametrize("group", [32, -1])
def test_two_of_every_four_are_exactly_zero(group):
    x, w = correlated(400, 256, dtype=torch.float32), weights(16, 256, dtype=torch.float32)
    for qw in (
        prune_quantize_24(seen(x), w, group_size=group),
        quantize_rtn_24(w, group_size=group),
    ):
        left = (qw.q != 8).view(16, -1, 4).sum(-1)
        assert int(left.max()) == 2
        assert float(left.double().mean()) > 1.8  # little that is kept rounds to zero
        assert qw.scales.dtype == torch.float16
        packed = pack_sparse_w4(qw.q, qw.scales)
        assert torch.equal(dequantize_sparse_w4(packed), dequantize(qw))


def test_the_larger_two_of_four_are_kept():
    scores = torch.rand(7, 40, generator=torch.Generator().manual_seed(0))
    keep = keep_two_of_four(scores).view(7, 10, 4)
    fours = scores.view(7, 10, 4)
    assert bool((keep.sum(-1) == 2).all())
    least_kept = fours.where(keep, torch.inf).amin(-1)
    assert bool((least_kept > fours.where(~keep, -torch.inf).amax(-1)).all())
    assert keep_two_of_four(torch.zeros(4)).tolist() == [True, True, False, False]


@pytest.mark.parametrize("scale_dtype", [torch.float16, None])
def test_with_inputs_alike_and_apart_it_is_magnitude_pruning_and_rounding(scale_dtype):
    w = weights(6, 32)
    gptq = seen(3 * torch.eye(32, dtype=torch.float64))
    qw = prune_quantize_24(gptq, w, group_size=8, scale_dtype=scale_dtype)
    plain = quantize_rtn_24(w, group_size=8, scale_dtype=scale_dtype)
    assert torch.equal(qw.q, plain.q)
    assert torch.equal(qw.scales, plain.scales)
    pruned = w.clone()
    for row, four in itertools.product(range(6), range(8)):
        own = pruned[row, 4 * four : 4 * four + 4]
        own[own.abs().argsort()[:2]] = 0
    assert torch.equal(plain.q, quantize_rtn(pruned, group_size=8, scale_dtype=scale_dtype).q)


def test_correlated_inputs_gain_a_factor():
    x, w = correlated(4096, 256, dtype=torch.float32), weights(64, 256, dtype=torch.float32)
    gptq = seen(x)
    for group in (32, 128, -1):
        plain = gptq.hessian_error(w, quantize_rtn_24(w, group_size=group))
        found = gptq.hessian_error(w, prune_quantize_24(gptq, w, group_size=group))
        assert found * 20 < plain
        # rounding after pruning, each with the inputs, loses more than both at once
        assert found > gptq.hessian_error(w, gptq.quantize(w, group_size=group))


def errors(d, hessian):
    return ((d @ hessian) * d).sum(-1)


def best_of_all(w, hessian, scale):
    """Least error over every mask of a row of 4 or 8 columns and all codes of what is kept."""
    k = w.shape[1]
    codes = torch.cartesian_prod(*[torch.arange(-8.0, 8.0, dtype=w.dtype)] * (k // 2))
    least = torch.inf
    for pairs in itertools.product(PAIRS, repeat=k // 4):
        kept = [4 * four + j for four, pair in enumerate(pairs) for j in pair]
        d = -w.repeat(len(codes), 1)
        d[:, kept] += codes * scale
        least = min(least, float(errors(d, hessian).min()))
    return least


@pytest.mark.parametrize(("k", "rows", "factor"), [(4, 40, 2.5), (8, 8, 4.0)])
def test_it_comes_near_the_best_of_all_masks_and_codes(k, rows, factor):
    ratios = []
    for seed in range(rows):
        x, w = correlated(40, k, seed), weights(1, k, 100 + seed)
        gptq = seen(x)
        qw = prune_quantize_24(gptq, w, group_size=k, damp=1e-6, scale_dtype=None)
        best = best_of_all(w, gptq.hessian, float(qw.scales))
        plain = gptq.hessian_error(w, quantize_rtn_24(w, group_size=k, scale_dtype=None))
        found = gptq.hessian_error(w, qw)
        assert found >= best * (1 - 1e-9)
        ratios.append((found / best, plain / best))
    found, plain = torch.tensor(ratios, dtype=torch.float64).median(0).values
    assert found < factor
    assert found * 2.5 < plain


def test_columns_of_unlike_size_are_weighed_by_their_cost():
    """A weight that is small, but met by large inputs, is kept."""
    x = torch.diag(torch.tensor([10.0, 1.0, 1.0, 10.0], dtype=torch.float64))
    w = torch.tensor([[1.0, 3.0, 4.0, 0.7]], dtype=torch.float64)
    qw = prune_quantize_24(seen(x), w, group_size=4)
    assert (qw.q != 8).tolist() == [[True, False, False, True]]
    assert (quantize_rtn_24(w, group_size=4).q != 8).tolist() == [[False, True, True, False]]


def test_a_group_takes_its_scale_from_what_it_keeps():
    x = torch.diag(torch.tensor([10.0, 1.0, 1.0, 10.0], dtype=torch.float64))
    w = torch.tensor([[1.0, 3.0, 4.0, 0.7]], dtype=torch.float64)
    qw = prune_quantize_24(seen(x), w, group_size=4, scale_dtype=None)
    torch.testing.assert_close(qw.scales, torch.tensor([[2.0 / 15]], dtype=torch.float64))


def test_a_hessian_that_will_not_do_gives_the_baseline():
    gptq = GPTQ(8, dtype=torch.float64)
    gptq.tokens = 2
    gptq.gram += torch.diag(torch.tensor([1.0] * 7 + [-3.0], dtype=torch.float64))
    w = weights(3, 8)
    with pytest.warns(UserWarning, match="not positive definite"):
        found = prune_quantize_24(gptq, w, group_size=8)
    assert torch.equal(found.q, quantize_rtn_24(w, group_size=8).q)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 5}, "layer 3: group_size must divide K = 16, got 5"),
        ({"group_size": 2}, "layer 3: group_size must be a multiple of 4, got 2"),
        ({"damp": -0.1}, "layer 3: damp must be >= 0, got -0.1"),
        ({"w": torch.ones(2, 8)}, r"layer 3: w must be \(N, 16\), got \(2, 8\)"),
        ({"w": torch.full((2, 16), torch.nan)}, "layer 3: w must be finite"),
        ({"scale_dtype": torch.int8}, "layer 3: scale_dtype must be one of"),
    ],
)
def test_what_cannot_be_is_named(change, message):
    gptq = GPTQ(16, name="layer 3")
    gptq.add_batch(correlated(20, 16, dtype=torch.float32))
    given = {"w": weights(2, 16, dtype=torch.float32), "group_size": 8, **change}
    with pytest.raises(ValueError, match=message):
        prune_quantize_24(gptq, given.pop("w"), **given)


def test_columns_that_are_no_fours_are_named():
    with pytest.raises(ValueError, match="keep_two_of_four: scores must be .*multiple of 4, got 6"):
        quantize_rtn_24(torch.ones(2, 6), group_size=6)
