# SPDX-License-Identifier: Apache-2.0
import itertools
import re

import pytest
import torch

from batchery.kernels.w4a16_sparse import (
    MOST_BATCH,
    expansion_asm,
    launch,
    plan,
    w4a16_sparse_matmul,
)
from batchery.kernels.w4a16_sparse_layout import (
    UNIT,
    arrange,
    dequantize_sparse_w4,
    pack_sparse_w4,
    unpack_sparse_w4,
)
from batchery.kernels.w4a16_tiles import Tile

# Frobenius error of a result in the dtype: its rounding, and the dtype of products' operands.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
PATTERNS = list(itertools.combinations(range(4), 2))


def draw(n, k, group, *, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (n, k // 4, 4), dtype=torch.uint8, generator=generator)
    order = torch.rand(q.shape, generator=generator).argsort(-1)
    q.scatter_(-1, order[..., :2], 8)
    scales = torch.rand(n, k // group, generator=generator).mul(0.01).add(1e-3).half()
    return q.view(n, k).to(device), scales.to(device)


def by_the_equation(q, scales):
    """w = s (q - 8) in float64."""
    group = q.shape[1] // scales.shape[1]
    return (q.double() - 8) * scales.double().repeat_interleave(group, 1)


def activations(m, k, dtype, device="cpu", seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, k, generator=generator).to(device, dtype)


def oracle(x, w, bias=None):
    y = x.double() @ w.double().T
    return y if bias is None else y + bias.double()


def assert_close(found, wanted):
    assert found.shape == wanted.shape
    error = (found.double() - wanted).norm() / wanted.norm()
    assert float(error) <= TOLERANCE[found.dtype]


def run(x, weight, tile, split=1, *, arranged=False, **rest):
    x = arrange(x, weight.words.shape[1]) if arranged else x
    return launch(x, weight, tile, split, arranged=arranged, **rest)


SHAPES = [(64, 512, 128), (130, 1024, 128), (33, 192, 64), (70, 1056, 32), (70, 200, 200)]


@pytest.mark.parametrize("shape", [*SHAPES, (1, 4, 4)])
def test_what_is_packed_comes_back(shape):
    q, scales = draw(*shape)
    weight = pack_sparse_w4(q, scales)
    assert torch.equal(unpack_sparse_w4(weight), q)
    assert torch.equal(dequantize_sparse_w4(weight, torch.float64), by_the_equation(q, scales))


def test_fours_with_fewer_than_two_values_come_back():
    levels = (0, 7, 8, 15)
    fours = [v for v in itertools.product(levels, repeat=4) if sum(q != 8 for q in v) <= 2]
    q = torch.tensor(fours, dtype=torch.uint8).repeat(1, 33)
    assert len(q) == 1 + 4 * 3 + 6 * 9
    assert torch.equal(unpack_sparse_w4(pack_sparse_w4(q, torch.ones(len(q), 1))), q)


def test_a_lane_holds_the_values_and_codes_that_the_module_says():
    q = torch.full((64, 512), 8, dtype=torch.uint8)
    q[3, 128 + 20 : 128 + 24] = torch.tensor([8, 9, 8, 15])  # run 1, lane 5: columns 1 and 3
    q[3, 384 + 20 : 384 + 24] = torch.tensor([10, 8, 11, 8])  # run 3, lane 5: columns 0 and 2
    words = pack_sparse_w4(q, torch.ones(64, 4)).words
    assert words.shape == (2, 1, 3, 64, 32)
    lane = words[0, 0, :, 3, 5].int() & 0xFFFF
    assert int(lane[0]) == 0x17 << 8  # 9 ^ 8 of column 1 is high, 15 ^ 8 low
    assert int(lane[1]) == 0x32 << 8
    assert int(lane[2]) & 0x7070 == 0x5020  # columns 0 and 2; column 1 and, as it follows, 3
    words[0, 0, :, 3, 5] = 0
    assert not words[:, :, :2].any()


def test_packed_weights_take_three_eighths_of_a_byte_and_a_scale():
    weight = pack_sparse_w4(*draw(1024, 4096, 128))
    assert weight.nbytes == 1024 * 4096 * 3 // 8 + 1024 * 32 * 2


def test_activations_are_brought_in_the_order_of_the_lanes():
    x = torch.arange(2 * 132).view(2, 132)
    found = arrange(x, 1)
    assert found.shape == (2, UNIT)
    assert found[1, :3].tolist() == [132, 136, 140]
    assert found[0, 32:35].tolist() == [1, 5, 9]
    assert found[0, 128:130].tolist() == [128, 0]
    assert int(found.sum()) == int(x.sum())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(4, 256)}, "q must be uint8"),
        ({"q": torch.full((64, 256), 16, dtype=torch.uint8)}, "q must be below 16, got 16"),
        ({"q": torch.full((64, 254), 8, dtype=torch.uint8)}, "q must be .* a multiple of 4"),
        ({"q": torch.full((64, 256), 9, dtype=torch.uint8)}, "two of every four columns at 8"),
        ({"scales": torch.ones(63, 2)}, "scales must be"),
        ({"scales": torch.ones(64, 3)}, "scales must cut 256 columns into equal groups, got 3"),
        ({"scales": torch.ones(64, 16)}, "scales must make groups"),
        ({"scales": torch.ones(64, 2, dtype=torch.int32)}, "scales must be floating"),
    ],
)
def test_a_weight_that_cannot_be_packed_is_named(change, message):
    full = torch.full((64, 256), 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"pack_sparse_w4: .*{message}"):
        pack_sparse_w4(**{"q": full, "scales": torch.ones(64, 2), **change})


def run_assembly(text, values, codes):
    """Interpret expansion_asm; a register is an int64 tensor below 2**32."""
    registers = {"$2": values, "$3": codes}

    def read(name):
        return registers[name] if name in registers else torch.tensor(int(name, 0))

    for line in text.splitlines():
        operation, *rest = re.findall(r"[\w.$]+", line) or [""]
        if operation in ("", ".reg"):
            continue
        target, operands = rest[0], [read(name) for name in rest[1:]]
        if operation == "shr.u32":
            result = operands[0] >> operands[1]
        elif operation == "shl.b32":
            result = operands[0] << operands[1]
        elif operation == "prmt.b32":
            low, high, selector = operands
            result = torch.tensor(0)
            for place in range(4):
                choice = selector >> 4 * place & 15
                byte = torch.where(choice & 4 != 0, high, low) >> 8 * (choice & 3) & 255
                byte = torch.where(choice & 8 != 0, (byte >> 7) * 255, byte)  # copies of its sign
                result = result | byte << 8 * place
        else:
            assert operation == "lop3.b32"
            *three, table = operands
            result = torch.tensor(0)
            for bit in range(8):
                if int(table) >> bit & 1:
                    kept = [v if bit >> 2 - at & 1 else ~v for at, v in enumerate(three)]
                    result = result | (kept[0] & kept[1] & kept[2])
        registers[target] = result & 0xFFFFFFFF
    return registers["$0"], registers["$1"]


@pytest.mark.parametrize("half", [0, 1])
def test_the_assembly_puts_every_value_in_its_place(half):
    """All values at all places, each in the byte of another run and lane."""
    pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16))
    fours = torch.full((len(PATTERNS), 256, 4), 8)
    for own, places in zip(fours, PATTERNS, strict=True):
        own[:, places] = pairs
    # row r of W has pattern r // 256 in run 0 of lane 0, and others elsewhere
    shifts = torch.arange(128).mul(7).remainder(1536)
    rows = (torch.arange(1536)[:, None] + shifts) % 1536
    q = fours.view(-1, 4)[rows].view(1536, 512).to(torch.uint8)
    words = pack_sparse_w4(q, torch.ones(1536, 4)).words.transpose(1, 2).squeeze(2)
    words = words.movedim(1, 0).reshape(3, 1536, 16, 2).contiguous().view(torch.int32).squeeze(-1)
    registers = words.long() & 0xFFFFFFFF
    found = run_assembly(expansion_asm(half), registers[half], registers[2])
    wanted = q.view(1536, 4, 16, 2, 4).long()  # run, pair of lanes, lane, column
    for lane, run_ in itertools.product(range(2), range(2)):
        own = wanted[:, 2 * half + run_, :, lane]
        for word, columns in zip(found, ((0, 1), (2, 3)), strict=True):
            byte = word >> (16 * lane + 8 * run_) & 255
            assert torch.equal(byte, own[..., columns[0]] | own[..., columns[1]] << 4)


NARROW = Tile(16, 64, stages=3)
WIDEST = Tile(64, 128, warps=8, stages=2)  # a third stage does not fit an H100's shared memory
CASES = {
    "one-unit": (64, 512, 128, 3, NARROW, 1, ""),
    "odd-shape": (130, 1032, 1032, 5, NARROW, 2, ""),
    "two-tiles-of-x": (130, 1024, 128, 20, NARROW, 2, ""),
    "group-32": (70, 672, 32, 5, NARROW, 2, ""),
    "group-64": (70, 192, 64, 1, NARROW, 1, ""),
    "group-256": (64, 1024, 256, 4, NARROW, 2, ""),
    "uneven-split": (64, 1536, 128, 4, NARROW, 2, "bias"),
    "one-group": (70, 200, 200, 17, Tile(8, 64), 1, "bias"),
    "widest": (200, 1024, 128, 61, WIDEST, 2, ""),
}
# A kernel takes a second to compile: one of each kind, and whether x is arranged for it.
COMPILED = {
    "odd-shape": (torch.bfloat16, False),
    "group-32": (torch.float16, False),
    "uneven-split": (torch.bfloat16, False),
    "one-group": (torch.bfloat16, True),
    "widest": (torch.float16, True),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_follows_the_equation(name, kernel_device):
    n, k, group, m, tile, split, extra = CASES[name]
    ways = [(torch.float16, False), (torch.float32, True)]  # interpreted, bfloat16 rounds wrongly
    if kernel_device.type == "cuda":
        if name not in COMPILED:
            pytest.skip("compiled like another")
        ways = [COMPILED[name]]
    q, scales = draw(n, k, group, device=kernel_device)
    weight, w = pack_sparse_w4(q, scales), by_the_equation(q, scales)
    for dtype, arranged in ways:
        x = activations(m, k, dtype, kernel_device)
        bias = activations(1, n, dtype, kernel_device)[0] if extra else None
        out = torch.full((m, n), torch.nan, dtype=dtype, device=kernel_device)
        run(x, weight, tile, split, arranged=arranged, bias=bias, out=out)
        assert_close(out, oracle(x, w, bias))
    assert int(weight.counters.abs().sum()) == 0


@pytest.mark.parametrize(("split", "arranged"), [(1, False), (2, False), (2, True)])
def test_small_integers_come_out_exact(split, arranged, kernel_device):
    if kernel_device.type == "cuda" and (split, arranged) != (2, False):
        pytest.skip("compiled like another")
    q, _ = draw(70, 1024, 128, device=kernel_device)
    scales = torch.full((70, 8), 0.25, dtype=torch.float16, device=kernel_device)
    x = torch.arange(3 * 1024, device=kernel_device).view(3, 1024).remainder(5).sub(2).half()
    found = run(x, pack_sparse_w4(q, scales), NARROW, split, arranged=arranged)
    wanted = oracle(x, by_the_equation(q, scales))
    assert float(wanted.abs().max()) < 512  # of which float16 holds every quarter
    assert torch.equal(found, wanted.half())


def test_a_nan_stays_in_its_row(kernel_device):
    weight = pack_sparse_w4(*draw(70, 1024, 128, device=kernel_device))
    x = activations(5, 1024, torch.float16, kernel_device)
    clean = run(x, weight, NARROW, 2)
    x[1, 7], x[3, 1000] = torch.nan, torch.inf
    found = run(x, weight, NARROW, 2)
    assert found[1].isnan().all()
    assert not found[3].isfinite().any()
    kept = [0, 2, 4]
    assert torch.equal(found[kept], clean[kept])


@pytest.mark.parametrize(("k", "group"), [(1024, 128), (200, 200)])
def test_rows_may_lie_anyhow(k, group, kernel_device):
    if kernel_device.type == "cuda" and k == group:
        pytest.skip("compiled like another")
    weight = pack_sparse_w4(*draw(70, k, group, device=kernel_device))
    wide = activations(6, 2 * k, torch.float16, kernel_device)
    out = wide.new_empty(3, 140)[:, :70]
    for x in (wide[:3, :k], wide[:3, 1 : k + 1], wide[::2, 4 : k + 4], wide[:3, ::2]):
        wanted = run(x.contiguous(), weight, NARROW, 2)
        assert torch.equal(run(x, weight, NARROW, 2, out=out), wanted)


@pytest.mark.parametrize("rows", [128, 1024, 4096, 57344])
@pytest.mark.parametrize("units", [1, 8, 56])
def test_a_plan_fits_the_weight(rows, units):
    for batch in (1, 8, 9, 32, MOST_BATCH):
        tile, split, _ = plan(batch, rows, units, 132)
        assert rows % tile.rows == 0
        assert 1 <= split <= units
        assert tile.batch >= batch
    assert plan(1, 4096, 8, 132)[1] > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matmul_on_the_cpu(dtype):
    for m, shape in ((1, (128, 256, 128)), (3, (130, 192, 64)), (70, (64, 100, 100))):
        q, scales = draw(*shape)
        x, bias = activations(m, shape[1], dtype), activations(1, shape[0], dtype)[0]
        found = w4a16_sparse_matmul(x, pack_sparse_w4(q, scales), bias=bias)
        assert_close(found, oracle(x, by_the_equation(q, scales), bias))


def test_matmul_takes_any_leading_shape_and_writes_where_told():
    q, scales = draw(48, 256, 128)
    weight, w = pack_sparse_w4(q, scales), by_the_equation(q, scales)
    x = activations(6, 512, torch.float32)[:, ::2]
    out = torch.full((2, 3, 48), torch.nan)
    assert w4a16_sparse_matmul(x.view(2, 3, 256), weight, out=out) is out
    assert_close(out.view(6, 48), oracle(x, w))
    assert_close(w4a16_sparse_matmul(x[0], weight)[None], oracle(x[:1], w))
    assert w4a16_sparse_matmul(x[:0], weight).shape == (0, 48)


def test_gradients_reach_x_and_bias():
    q, scales = draw(64, 256, 128)
    weight, w = pack_sparse_w4(q, scales), by_the_equation(q, scales)
    x = activations(5, 256, torch.float32).requires_grad_()
    bias = torch.zeros(64, requires_grad=True)
    w4a16_sparse_matmul(x, weight, bias=bias).square().sum().backward()
    y = 2 * oracle(x, w)
    torch.testing.assert_close(x.grad.double(), y @ w, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.grad.double(), y.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 255)}, r"x must be \(..., 256\), got \(2, 255\)"),
        ({"x": torch.ones(2, 256, dtype=torch.float64)}, "x must be in"),
        ({"x": torch.ones(2, 256, device="meta")}, "x must be on cpu"),
        ({"bias": torch.ones(63)}, r"bias must be \(64,\)"),
        ({"out": torch.ones(2, 63)}, "out must be"),
        ({"impl": "cuda"}, "impl must be one of"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(change, message):
    weight = pack_sparse_w4(*draw(64, 256, 128))
    with pytest.raises(ValueError, match=f"w4a16_sparse_matmul: {message}"):
        w4a16_sparse_matmul(**{"x": torch.ones(2, 256), "weight": weight, **change})


def test_forcing_the_kernel_where_it_cannot_run_raises():
    weight = pack_sparse_w4(*draw(64, 256, 128))
    with pytest.raises(RuntimeError, match="w4a16_sparse_matmul: .* on cpu"):
        w4a16_sparse_matmul(torch.ones(2, 256), weight, impl="triton")


@pytest.fixture(scope="module")
def large():
    """A weight whose columns are split; all its tests run the four kernels of the plan."""
    q, scales = draw(1027, 4096, 128, device="cuda")
    return pack_sparse_w4(q, scales), by_the_equation(q, scales)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 7, 8, 9, 16, 17, 32, 33, 63, 64, 65, 130])
def test_every_batch_on_the_gpu(m, large):
    weight, w = large
    x = activations(m, 4096, torch.float16, "cuda")
    assert_close(w4a16_sparse_matmul(x, weight), oracle(x, w))
    assert_close(w4a16_sparse_matmul(x, weight, impl="triton"), oracle(x, w))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 32, 64])
def test_a_hundred_runs_give_the_same_bits(m, large):
    weight, _ = large
    x = activations(m, 4096, torch.float16, "cuda")
    first = w4a16_sparse_matmul(x, weight)
    assert all(torch.equal(w4a16_sparse_matmul(x, weight), first) for _ in range(100))
    assert int(weight.counters.abs().sum()) == 0
