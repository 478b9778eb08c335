# SPDX-License-Identifier: Apache-2.0
import re

import pytest
import torch
import torch.nn.functional as F

from batchery.kernels.w4a16 import w4a16_matmul, w4a16_reference
from batchery.kernels.w4a16_layout import dequantize_w4, dequantized_slices, pack_w4
from batchery.kernels.w4a16_plan import MOST_BATCH
from batchery.kernels.w4a16_tiles import Tile, dequantize_tiles, launch, nibble_asm

# Frobenius error of a result in the dtype: its rounding, and the dtype of products' operands.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def draw(n, k, group, *, zeros=False, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = k // group
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    scales = torch.rand(n, groups, generator=generator).mul(0.01).add(1e-3).half()
    z = torch.randint(0, 16, (n, groups), dtype=torch.uint8, generator=generator)
    return q.to(device), scales.to(device), z.to(device) if zeros else None


def by_the_equation(q, scales, zeros):
    """w = s (q - z) in float64."""
    group = q.shape[1] // scales.shape[1]
    offset = 8 if zeros is None else zeros.double().repeat_interleave(group, 1)
    return (q.double() - offset) * scales.double().repeat_interleave(group, 1)


def activations(m, k, dtype, device="cpu", seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, k, generator=generator).to(device, dtype)


def oracle(x, w, bias=None, *, gated=False):
    y = x.double() @ w.double().T
    y = y if bias is None else y + bias.double()
    return F.silu(y[:, : len(w) // 2]) * y[:, len(w) // 2 :] if gated else y


def assert_close(found, wanted, tolerance=None):
    assert found.shape == wanted.shape
    error = (found.double() - wanted).norm() / wanted.norm()
    assert float(error) <= (tolerance or TOLERANCE[found.dtype])


def compute_dtype(device):
    """The interpreter rounds bfloat16 wrongly; float32 shows more there anyway."""
    return torch.float32 if device.type == "cpu" else torch.float16


SHAPES = [
    (64, 256, 128),
    (130, 512, 128),
    (70, 192, 64),
    (33, 160, 32),
    (70, 200, 200),
    (96, 512, 256),
]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_packed_comes_back(shape, zeros):
    q, scales, z = draw(*shape, zeros=zeros)
    weight = pack_w4(q, scales, z)
    assert torch.equal(dequantize_w4(weight, torch.float64), by_the_equation(q, scales, z))


def test_a_word_holds_the_columns_that_the_module_says():
    q = torch.zeros(128, 256, dtype=torch.uint8)
    q[3, 5], q[3, 64 + 5], q[3, 128 + 5], q[3, 192 + 5] = 1, 2, 3, 4
    words = pack_w4(q, torch.ones(128, 2)).words
    assert words.shape == (2, 1, 64, 64)
    assert int(words[0, 0, 3, 5]) == 0x4321
    assert int(words.int().abs().sum()) == 0x4321


def test_a_gated_weight_has_gate_and_up_rows_side_by_side():
    q, scales, z = draw(140, 256, 64, zeros=True)
    weight = pack_w4(q, scales, z, gated=True)
    w = by_the_equation(q, scales, z)
    assert torch.equal(dequantize_w4(weight, torch.float64), w)
    lying = torch.cat(list(dequantized_slices(weight, torch.float64, 64)))
    assert torch.equal(lying[0::2], w[:70])
    assert torch.equal(lying[1::2], w[70:])


def test_packed_weights_take_half_a_byte_and_a_scale():
    weight = pack_w4(*draw(1024, 4096, 128)[:2])
    assert weight.nbytes == 1024 * 4096 // 2 + 1024 * 32 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(4, 256)}, "q must be uint8"),
        ({"q": torch.full((64, 256), 16, dtype=torch.uint8)}, "q must be below 16, got 16"),
        ({"q": torch.zeros(64, dtype=torch.uint8)}, "q must be"),
        ({"scales": torch.ones(63, 2)}, "scales must be"),
        ({"scales": torch.ones(64, 3)}, "scales must cut 256 columns into equal groups, got 3"),
        ({"scales": torch.ones(64, 16)}, "scales must make groups"),
        ({"scales": torch.ones(64, 2, dtype=torch.int32)}, "scales must be floating"),
        ({"zeros": torch.full((64, 2), 16, dtype=torch.uint8)}, "zeros must be below 16"),
        ({"zeros": torch.zeros(64, 1, dtype=torch.uint8)}, "zeros must be"),
        (
            {"q": torch.zeros(63, 256, dtype=torch.uint8), "scales": torch.ones(63, 2)},
            "gate and up",
        ),
    ],
)
def test_a_weight_that_cannot_be_packed_is_named(change, message):
    given = {"q": torch.zeros(64, 256, dtype=torch.uint8), "scales": torch.ones(64, 2), **change}
    with pytest.raises(ValueError, match=message):
        pack_w4(**given, gated="gate" in message)


def run_assembly(text, operands, dtype):
    """Interpret the four instructions of nibble_asm; a register is an int32 tensor of pairs."""
    registers = {f"${place}": value for place, value in enumerate(operands, 2)}
    size = operands[0].shape

    def read(name):
        if name in registers:
            return registers[name]
        return torch.full(size, int(name, 0), dtype=torch.int64).to(torch.int32)

    def lanes(value):
        return value.view(torch.int16).view(dtype).double()

    for line in text.splitlines():
        operation, *rest = re.findall(r"[\w.$]+", line) or [""]
        if operation in ("", ".reg"):
            continue
        target, (a, *more) = rest[0], [read(name) for name in rest[1:]]
        if operation == "mov.b32":
            registers[target] = a
        elif operation == "shr.u32":
            registers[target] = ((a.long() & 0xFFFFFFFF) >> more[0].long()).to(torch.int32)
        elif operation == "lop3.b32":
            assert rest[4] == "0xEA"  # (a & b) | c
            registers[target] = (a & more[0]) | more[1]
        else:
            kind = "f16x2" if dtype == torch.float16 else "bf16x2"
            assert operation == f"fma.rn.{kind}"
            value = lanes(a) * lanes(more[0]) + lanes(more[1])
            registers[target] = value.to(dtype).view(torch.int16).view(torch.int32)
    return lanes(registers["$0"]), lanes(registers["$1"])


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("zero", [None, 0, 5, 15])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_assembly_makes_every_word_exact(dtype, zero, scaled):
    words = torch.arange(65536).to(torch.int16)
    q = torch.stack([words.int() >> shift & 15 for shift in (0, 4, 8, 12)])
    pair = words.view(torch.int32)

    def both_lanes(value):
        filled = torch.full((65536,), value, dtype=torch.float64).to(dtype)
        return filled.view(torch.int16).view(torch.int32)

    operands = [pair]
    if zero is not None:
        first, second = (-1024, -64) if dtype == torch.float16 else (-128, -128)
        operands += [both_lanes(first - zero), both_lanes(second - zero)]
    if scaled:
        operands += [both_lanes(0.375), both_lanes(-0.0078125)]
    for high in (False, True):
        found = run_assembly(nibble_asm(dtype, high, zero is not None, scaled), operands, dtype)
        for place, factor in enumerate((0.375, -0.0078125)):
            wanted = q[2 * high + place].double() - (8 if zero is None else zero)
            wanted = (wanted * factor).to(dtype).double() if scaled else wanted
            assert torch.equal(found[place], wanted)


NARROW = Tile(16, 64)
CASES = {
    "one-block": (64, 256, 128, 3, NARROW, 1, ""),
    "odd-shape": (130, 512, 128, 5, NARROW, 2, ""),
    "zeros": (130, 512, 128, 20, NARROW, 2, "zeros"),
    "group-32": (70, 384, 32, 5, NARROW, 3, "zeros"),
    "group-64": (70, 192, 64, 1, NARROW, 1, "zeros"),
    "group-256": (64, 512, 256, 4, NARROW, 2, ""),
    "one-group": (70, 200, 200, 5, NARROW, 1, "zeros"),
    "gated": (140, 512, 128, 5, NARROW, 2, "gated bias"),
    "bias": (70, 256, 128, 17, Tile(8, 64, step=32), 2, "bias"),
    "scaled-weights": (256, 512, 128, 70, Tile(64, 128, 32, 8, 3, True), 2, "zeros"),
    "scaled-32": (64, 256, 32, 20, Tile(32, 64, 64, 4, 3, True), 2, "zeros"),
    "scaled-one-group": (64, 320, 320, 9, Tile(16, 64, 64, 4, 3, True), 2, ""),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_follows_the_equation(name, kernel_device):
    n, k, group, m, tile, split, extra = CASES[name]
    gated = "gated" in extra
    q, scales, zeros = draw(n, k, group, zeros="zeros" in extra, device=kernel_device)
    weight = pack_w4(q, scales, zeros, gated=gated)
    w = by_the_equation(q, scales, zeros)
    dtypes = [torch.float32] if kernel_device.type == "cpu" else [torch.float16, torch.bfloat16]
    for dtype in dtypes:
        x = activations(m, k, dtype, kernel_device)
        bias = activations(1, n, dtype, kernel_device)[0] if "bias" in extra else None
        lying = torch.stack(bias.chunk(2), 1).flatten() if gated else bias
        out = torch.full((m, n // 2 if gated else n), torch.nan, dtype=dtype, device=kernel_device)
        launch(x, weight, tile, split, bias=lying, out=out)
        assert_close(out, oracle(x, w, bias, gated=gated))
    assert int(weight.counters.abs().sum()) == 0


@pytest.mark.parametrize("split", [1, 2])
def test_small_integers_come_out_exact(split, kernel_device):
    q, _, zeros = draw(70, 512, 128, zeros=True, device=kernel_device)
    scales = torch.full(zeros.shape, 0.25, device=kernel_device)
    x = torch.arange(3 * 512, device=kernel_device).view(3, 512).remainder(9).sub(4)
    x = x.to(compute_dtype(kernel_device))
    found = launch(x, pack_w4(q, scales, zeros), NARROW, split)
    # every sum is a multiple of a quarter below 2**10, which float16 holds to a quarter or a half
    assert torch.equal(found, oracle(x, by_the_equation(q, scales, zeros)).to(x.dtype))


def test_a_nan_stays_in_its_row(kernel_device):
    weight = pack_w4(*draw(70, 512, 128, device=kernel_device)[:2])
    x = activations(5, 512, compute_dtype(kernel_device), kernel_device)
    clean = launch(x, weight, NARROW, 2)
    x[1, 7], x[3, 500] = torch.nan, torch.inf
    found = launch(x, weight, NARROW, 2)
    assert found[1].isnan().all()
    assert not found[3].isfinite().any()
    kept = [0, 2, 4]
    assert torch.equal(found[kept], clean[kept])


def test_rows_may_lie_apart(kernel_device):
    weight = pack_w4(*draw(70, 256, 128, device=kernel_device)[:2])
    wide = activations(6, 512, compute_dtype(kernel_device), kernel_device)
    apart, out = wide[::2, :256], wide.new_empty(3, 70)
    assert torch.equal(
        launch(apart, weight, NARROW, out=out), launch(apart.clone(), weight, NARROW)
    )


@pytest.mark.parametrize("shape", [(70, 192, 64), (70, 200, 200), (96, 160, 32)])
def test_dequantizing_tiles_gives_the_weight(shape, kernel_device):
    weight = pack_w4(*draw(*shape, zeros=True, device=kernel_device))
    wanted = torch.cat(list(dequantized_slices(weight, torch.float32)))
    assert torch.equal(dequantize_tiles(weight, torch.float32), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [False, True])
def test_matmul_on_the_cpu(dtype, gated):
    for m, shape in ((1, (128, 256, 128)), (3, (130, 192, 64)), (130, (64, 128, 32))):
        q, scales, zeros = draw(*shape, zeros=True)
        weight = pack_w4(q, scales, zeros, gated=gated)
        x, bias = activations(m, shape[1], dtype), activations(1, shape[0], dtype)[0]
        wanted = oracle(x, by_the_equation(q, scales, zeros), bias, gated=gated)
        # torch's four-bit matmul keeps scale and offset in bfloat16: two roundings more
        loose = 2 * TOLERANCE[dtype] if dtype == torch.bfloat16 else None
        assert_close(w4a16_matmul(x, weight, bias=bias), wanted, loose)


def test_matmul_takes_any_leading_shape_and_writes_where_told():
    q, scales, _ = draw(48, 256, 128)
    weight, w = pack_w4(q, scales), by_the_equation(q, scales, None)
    x = activations(6, 512, torch.float32)[:, ::2]
    out = torch.full((2, 3, 48), torch.nan)
    assert w4a16_matmul(x.view(2, 3, 256), weight, out=out) is out
    assert_close(out.view(6, 48), oracle(x, w))
    assert_close(w4a16_matmul(x[0], weight)[None], oracle(x[:1], w))
    assert w4a16_matmul(x[:0], weight).shape == (0, 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_may_lie_anyhow(dtype):
    weight = pack_w4(*draw(48, 256, 128)[:2])
    wide = activations(6, 512, dtype)
    for x in (wide[:, :256], wide[:, ::2], wide.view(2, 6, 256)[:, -1], wide[:, :256].t().t()):
        assert torch.equal(w4a16_matmul(x, weight), w4a16_matmul(x.contiguous(), weight))
    assert w4a16_matmul(wide[:0, :256], weight).shape == (0, 48)


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_reach_x_and_bias(gated):
    q, scales, zeros = draw(64, 256, 128, zeros=True)
    weight, w = pack_w4(q, scales, zeros, gated=gated), by_the_equation(q, scales, zeros)
    grads = []
    for dense in (False, True):
        x = activations(5, 256, torch.float32).requires_grad_()
        bias = activations(1, 64, torch.float32)[0].requires_grad_()
        y = oracle(x, w, bias, gated=gated) if dense else w4a16_matmul(x, weight, bias=bias)
        y.square().sum().backward()
        grads.append((x.grad, bias.grad))
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_matmul_compiles_without_a_break(trained):
    weight = pack_w4(*draw(64, 256, 128)[:2])
    x = activations(5, 256, torch.float32).requires_grad_(trained)
    compiled = torch.compile(w4a16_matmul, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight), w4a16_matmul(x, weight))


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
    weight = pack_w4(*draw(64, 256, 128)[:2])
    with pytest.raises(ValueError, match=f"w4a16_matmul: {message}"):
        w4a16_matmul(**{"x": torch.ones(2, 256), "weight": weight, **change})


def test_a_weight_of_another_kind_is_named():
    rule = "w4a16_matmul: weight must be a PackedW4, such as QuantLinear's `packed`, got Tensor"
    with pytest.raises(TypeError, match=rule):
        w4a16_matmul(torch.ones(2, 64), torch.ones(64, 64))


def test_forcing_the_kernels_where_they_cannot_run_raises():
    weight = pack_w4(*draw(64, 256, 128)[:2])
    with pytest.raises(RuntimeError, match="w4a16_matmul: .* on cpu"):
        w4a16_matmul(torch.ones(2, 256), weight, impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "dtype", "asymmetric"),
    [
        ((1027, 1024, 128), torch.float16, True),
        ((1027, 1024, 128), torch.bfloat16, True),
        ((1027, 1024, 128), torch.bfloat16, False),
        ((2048, 4096, 32), torch.bfloat16, True),
        ((1090, 2048, 64), torch.float16, True),
        ((512, 1088, 1088), torch.float16, True),
        ((25472, 256, 128), torch.float16, True),  # as many tiles as an H100 holds at once
        ((34048, 256, 128), torch.float16, True),  # more
    ],
)
def test_every_batch_on_the_gpu(shape, dtype, asymmetric):
    q, scales, zeros = draw(*shape, zeros=asymmetric, device="cuda")
    weight, w = pack_w4(q, scales, zeros), by_the_equation(q, scales, zeros)
    for m in (*range(1, 131), 256, 300, MOST_BATCH + 1):
        x = activations(m, shape[1], dtype, "cuda")
        assert_close(w4a16_matmul(x, weight), oracle(x, w))
        assert_close(w4a16_matmul(x, weight, batch_invariant=True), oracle(x, w))
        assert_close(w4a16_reference(x, weight), oracle(x, w))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [5, 300, MOST_BATCH + 1])
def test_activations_may_lie_anyhow_and_change_their_place(m):
    q, scales, zeros = draw(1024, 1024, 128, zeros=True, device="cuda")
    weight, w = pack_w4(q, scales, zeros), by_the_equation(q, scales, zeros)
    wide = activations(m, 1032, torch.float16, "cuda")
    for _ in range(2):  # the second time without Triton's search for the compiled form
        moved = wide[:, 8:].contiguous()
        for x in (wide[:, :1024], wide[:, 8:], wide[:, 1:1025], moved, moved[:1].expand(m, -1)):
            assert_close(w4a16_matmul(x, weight), oracle(x, w))


@pytest.mark.gpu
def test_a_row_has_the_same_bits_in_every_batch():
    weight = pack_w4(*draw(4096, 4096, 128, device="cuda")[:2])
    x = activations(130, 4096, torch.float16, "cuda")
    wanted = w4a16_matmul(x, weight, batch_invariant=True)
    for m in range(1, 130):
        assert torch.equal(w4a16_matmul(x[:m], weight, batch_invariant=True), wanted[:m])


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 64, 128])
def test_a_hundred_runs_give_the_same_bits(m):
    weight = pack_w4(*draw(4096, 4096, 128, device="cuda")[:2])
    x = activations(m, 4096, torch.float16, "cuda")
    first = w4a16_matmul(x, weight)
    assert all(torch.equal(w4a16_matmul(x, weight), first) for _ in range(100))
    assert int(weight.counters.abs().sum()) == 0


@pytest.mark.gpu
def test_matmul_is_captured_and_compiled():
    weight = pack_w4(*draw(1024, 4096, 128, device="cuda")[:2])
    x = activations(16, 4096, torch.float16, "cuda")
    wanted = w4a16_matmul(x, weight)
    assert torch.equal(torch.compile(w4a16_matmul, fullgraph=True)(x, weight), wanted)
    graph, out = torch.cuda.CUDAGraph(), torch.empty_like(wanted)
    with torch.cuda.graph(graph):
        w4a16_matmul(x, weight, out=out)
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_weight_on_another_device_is_multiplied_there():
    q, scales, zeros = draw(256, 512, 128, zeros=True, device="cuda:1")
    weight, w = pack_w4(q, scales, zeros), by_the_equation(q, scales, zeros)
    assert torch.cuda.current_device() == 0
    for m in (5, 5, MOST_BATCH + 1):
        x = activations(m, 512, torch.float16, "cuda:1")
        assert_close(w4a16_matmul(x, weight), oracle(x, w))
