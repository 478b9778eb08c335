# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from batchery.compress.quant import QuantizedWeight, dequantize, pack
from batchery.kernels.w4a16 import w4a16_matmul
from batchery.kernels.w4a16_layout import dequantize_w4


def draw(n, k, group, *, zeros=False, g_idx=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = k // group
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    scales = torch.rand(n, groups, generator=generator).add(0.1)
    z = torch.randint(0, 16, (n, groups), dtype=torch.uint8, generator=generator)
    if g_idx == "mixed":
        g_idx = (torch.randperm(k, generator=generator) // group).int()
    return QuantizedWeight(q, scales, z if zeros else None, g_idx, group)


def by_the_equation(qw):
    n, k = qw.shape
    w = torch.empty(n, k, dtype=torch.float64)
    for row in range(n):
        for column in range(k):
            g = column // qw.group_size if qw.g_idx is None else int(qw.g_idx[column])
            zero = 8 if qw.zeros is None else int(qw.zeros[row, g])
            w[row, column] = float(qw.scales[row, g]) * (int(qw.q[row, column]) - zero)
    return w


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("g_idx", [None, "mixed"])
def test_dequantizing_follows_the_equation(zeros, g_idx):
    qw = draw(5, 24, 8, zeros=zeros, g_idx=g_idx)
    before = qw.q.clone()
    assert torch.equal(dequantize(qw, torch.float64), by_the_equation(qw))
    half = dequantize(qw, torch.float16)
    assert torch.equal(half, dequantize(qw, torch.float32).half())
    assert torch.equal(qw.q, before)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("g_idx", [None, "mixed"])
def test_a_packed_weight_multiplies_alike(zeros, g_idx):
    qw = draw(48, 128, 32, zeros=zeros, g_idx=g_idx)
    packed, permutation = pack(qw)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    wanted = x @ dequantize(qw, torch.float32).T
    assert (permutation is None) == (g_idx is None)
    moved = x if permutation is None else x[:, permutation]
    torch.testing.assert_close(w4a16_matmul(moved, packed), wanted, rtol=1e-5, atol=1e-4)
    if permutation is not None:
        back = torch.empty(48, 128)
        back[:, permutation] = dequantize_w4(packed, torch.float32)
        assert torch.equal(back, dequantize(qw, torch.float32))
        assert torch.equal(qw.g_idx[permutation], torch.arange(128).int() // 32)


def test_groups_that_lie_in_order_need_no_permutation():
    qw = draw(16, 128, 64, g_idx=torch.arange(128, dtype=torch.int32) // 64)
    packed, permutation = pack(qw)
    assert permutation is None
    assert torch.equal(dequantize_w4(packed, torch.float32), dequantize(qw, torch.float32))


def test_a_gated_weight_is_packed_gated():
    qw = draw(32, 128, 64)
    packed, _ = pack(qw, gated=True)
    assert packed.gated
    assert torch.equal(dequantize_w4(packed, torch.float32), dequantize(qw, torch.float32))


def test_groups_of_unlike_size_cannot_be_packed():
    g_idx = torch.zeros(64, dtype=torch.int32)
    g_idx[40:] = 1
    qw = draw(16, 64, 32, g_idx=g_idx)
    with pytest.raises(ValueError, match="pack: g_idx must give every group 32 columns, got"):
        pack(qw)


def test_rows_and_devices():
    qw = draw(6, 16, 8, zeros=True, g_idx="mixed")
    part = qw.rows(2, 5)
    assert part.shape == (3, 16)
    assert torch.equal(dequantize(part), dequantize(qw)[2:5])
    assert torch.equal(dequantize(qw.to("cpu")), dequantize(qw))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(4, 8)}, "q must be uint8, got torch.float32"),
        ({"q": torch.zeros(8, dtype=torch.uint8)}, r"q must be \(N, K\), not empty, got \(8,\)"),
        ({"q": torch.full((4, 8), 16, dtype=torch.uint8)}, "q must be below 16, got 16"),
        ({"group_size": 3}, "group_size must divide K = 8, got 3"),
        ({"group_size": 0}, "group_size must be >= 1, got 0"),
        ({"group_size": 8}, r"scales must be \(4, 1\), got \(4, 2\)"),
        ({"scales": torch.ones(4, 2, dtype=torch.int32)}, "scales must be floating"),
        ({"scales": torch.full((4, 2), torch.nan)}, "scales must be finite"),
        ({"zeros": torch.zeros(4, 2)}, "zeros must be uint8, got torch.float32"),
        ({"zeros": torch.zeros(4, 1, dtype=torch.uint8)}, r"zeros must be \(4, 2\), got \(4, 1\)"),
        ({"zeros": torch.full((4, 2), 16, dtype=torch.uint8)}, "zeros must be below 16"),
        ({"g_idx": torch.zeros(8, dtype=torch.int64)}, "g_idx must be int32, got torch.int64"),
        ({"g_idx": torch.zeros(7, dtype=torch.int32)}, r"g_idx must be \(8,\), got \(7,\)"),
        ({"g_idx": torch.full((8,), 2, dtype=torch.int32)}, "g_idx must be below 2, got 2"),
        ({"g_idx": torch.full((8,), -1, dtype=torch.int32)}, "g_idx must be >= 0, got -1"),
    ],
)
def test_what_is_no_weight_is_named(change, message):
    given = {
        "q": torch.zeros(4, 8, dtype=torch.uint8),
        "scales": torch.ones(4, 2),
        "zeros": None,
        "g_idx": None,
        "group_size": 4,
        **change,
    }
    with pytest.raises(ValueError, match=f"QuantizedWeight: {message}"):
        QuantizedWeight(**given)
