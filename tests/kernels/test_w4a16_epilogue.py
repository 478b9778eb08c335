# SPDX-License-Identifier: Apache-2.0
"""Norms between four-bit products: a product that adds to hidden states, and the one after it."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from four_bits import assert_chain_is_alike, draw
from gluon_as_python import product

from batchery.kernels import w4a16_ops
from batchery.kernels.w4a16 import Norm, Residual, w4a16_matmul
from batchery.kernels.w4a16_layout import dequantize_w4, pack_w4
from batchery.kernels.w4a16_narrow import gluon, launch
from batchery.kernels.w4a16_plan import CHAINED, NARROW, plan_narrow

FORMS = sorted({form for _, forms in (*NARROW, *CHAINED) for form in forms})
EPS = 0.3  # large enough to be missed
# Frobenius error of a result: its rounding, that of h · w, and on the CPU those of torch's product
# and of x divided by its root mean square.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
CASES = {  # n, k, group
    "even": (128, 512, 128, ""),
    "odd": (130, 768, 128, "zeros bias"),
    "short": (70, 320, 64, "bias"),
    "group-32": (64, 288, 32, "zeros"),
    "one-group": (96, 328, 328, "zeros bias"),
    "wide": (64, 4224, 128, ""),  # more sums of squares than one load takes
    "gated": (140, 512, 128, "gated bias"),
}


def blocks_of_squares(h):
    m, n = h.shape
    padded = np.zeros((m, -(-n // 64) * 64))
    padded[:, :n] = h**2
    return padded.reshape(m, -1, 64).sum(-1)


def apart(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.skipif(gluon is None, reason="needs Triton's Gluon")
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form)))
@pytest.mark.parametrize("name", CASES)
def test_the_source_as_python_norms_and_adds(form, name):
    n, k, group, extra = CASES[name]
    gated = "gated" in extra
    q = draw(n, k, group, "zeros" in extra)
    weight = pack_w4(q.q, q.scales, q.zeros, gated=gated)
    w = dequantize_w4(weight, torch.float64).numpy()
    generator = np.random.default_rng(form.batch + form.rows)
    for turn, m in enumerate((1, form.batch - 1, form.batch + 3)):
        chained, split = turn != 1, min((3, 1, 6)[turn], weight.words.shape[1])
        x = generator.standard_normal((m, k))
        given = blocks_of_squares(x * generator.uniform(0.5, 2, (m, 1)))
        bias = generator.standard_normal(n) if "bias" in extra else None
        r = 1 / np.sqrt(given.sum(1, keepdims=True) / k + 0.3)
        more = {"chained": chained, "late": turn == 0, "order": generator.permutation}
        wanted = (x * r) @ w.T + (0 if bias is None else bias)
        if gated:
            gate, up = np.split(wanted, 2, 1)
            lying = np.stack(np.split(bias, 2), 1).ravel()
            y = product(x, weight, form, split, bias=lying, given=given, eps=0.3, **more)
            assert apart(y, gate / (1 + np.exp(-gate)) * up) <= 1e-10
            continue
        y = product(x, weight, form, split, bias=bias, given=given, eps=0.3, **more)
        assert apart(y, wanted) <= 1e-10
        for norm in (False, True):
            h, gain = generator.standard_normal((m, n)), generator.standard_normal(n)
            new = (h + (wanted if norm else x @ w.T + (0 if bias is None else bias))).astype(
                np.half
            )
            new = new.astype(float)
            after, squares = np.full((m, n), np.nan), np.full((m, -(-n // 64)), np.nan)
            own = {"given": given, "eps": 0.3} if norm else {}
            add_to = (h, gain, after, squares)
            product(x, weight, form, split, bias=bias, add_to=add_to, **own, **more)
            assert apart(h, new) <= 1e-10
            assert apart(after, new * gain) <= 1e-10
            assert apart(squares, blocks_of_squares(new)) <= 1e-10


def layers(hidden, mlp, dtype, device, group=128, zeros=True, seed=0):
    """Return two weights of a block with biases, the weights in float64, and a norm's weight."""
    generator = torch.Generator().manual_seed(seed)
    packed, biases = [], []
    for place, (n, k, gated) in enumerate(((hidden, mlp, False), (2 * mlp, hidden, True))):
        q = draw(n, k, group or k, zeros, seed=seed + place)
        packed.append(pack_w4(q.q, q.scales, q.zeros, gated=gated, device=device))
        biases.append(torch.randn(n, generator=generator).to(device, dtype))
    gain = (torch.rand(hidden, generator=generator) + 0.5).to(device, dtype)
    wide = [dequantize_w4(weight, torch.float64) for weight in packed]
    return packed, biases, wide, gain


def states(m, *widths, dtype, device="cpu", seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(m, n, generator=generator).to(device, dtype) for n in widths]


def check(m, dtype, device, matmul=w4a16_matmul, factor=1.0, hidden=384, mlp=512, group=128):
    """Compare h += z · Dᵀ and silu(gate)·up of rms_norm(h), biases added, with float64."""
    (down, up), (b, c), (wide_down, wide_up), gain = layers(hidden, mlp, dtype, device, group)
    h, z = states(m, hidden, mlp, dtype=dtype, device=device)
    wanted = h.double() + z.double() @ wide_down.T + b.double()
    residual = Residual.of(h, gain)
    found = matmul(z, down, bias=b, add_to=residual)
    assert found is h
    assert close(h, wanted, factor * TOLERANCE[dtype])
    # From here on with h as it was rounded.
    squares = F.pad(h.double().square(), (0, -hidden % 64)).unflatten(-1, (-1, 64)).sum(-1)
    torch.testing.assert_close(residual.squares.double(), squares, rtol=1e-5, atol=0)
    assert close(residual.x, h.double() * gain.double(), TOLERANCE[dtype])
    normed = F.rms_norm(h.double(), (hidden,), gain.double(), EPS)
    gate, side = (normed @ wide_up.T + c.double()).chunk(2, -1)
    y = matmul(residual.x, up, bias=c, norm_of=Norm(residual.squares, EPS))
    assert close(y, F.silu(gate) * side, 1.5 * factor * TOLERANCE[dtype])  # a product of two
    return h, residual.x, residual.squares, y


def close(found, wanted, tolerance):
    assert found.shape == wanted.shape
    return float((found.double() - wanted).norm()) <= tolerance * float(wanted.norm())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("m", [0, 1, 5, 130])
def test_a_norm_between_products_on_the_cpu(m, dtype):
    factor = 2 if dtype == torch.bfloat16 else 1
    check(m, dtype, torch.device("cpu"), factor=factor)
    check(m, dtype, torch.device("cpu"), factor=factor, hidden=130, group=None)


def test_any_leading_shape_is_taken():
    (down, up), _, _, gain = layers(130, 256, torch.float32, "cpu", group=None)
    h, z = states(6, 130, 256, dtype=torch.float32)
    flat, lead = Residual.of(h.clone(), gain), Residual.of(h.clone().view(2, 3, 130), gain)
    assert lead.squares.shape == (2, 3, 3)
    w4a16_matmul(z, down, add_to=flat)
    w4a16_matmul(z.view(2, 3, 256), down, add_to=lead)
    y = w4a16_matmul(flat.x, up, norm_of=Norm(flat.squares, EPS))
    out = torch.empty(2, 3, 256)
    found = w4a16_matmul(lead.x, up, norm_of=Norm(lead.squares, EPS), out=out)
    assert found is out
    for a, b in zip((*flat, y), (*lead, out), strict=True):
        assert torch.equal(a, b.view(a.shape))


def block(h, z, gain, weights, biases, chained=False):
    """As a model has it; a function of h, which is changed."""
    (down, up), (b, c) = weights, biases
    r = Residual.of(h, gain)
    w4a16_matmul(z, down, bias=b, add_to=r, chained=chained)
    y = w4a16_matmul(r.x, up, bias=c, norm_of=Norm(r.squares, EPS), chained=chained)
    norm = Norm(r.squares[:, :1].repeat(1, 8), 1.0)
    w4a16_matmul(y, down, norm_of=norm, add_to=Residual.of(h, gain))
    return y + 1


def check_compiled(device, dtype, backend):
    weights, biases, _, gain = layers(384, 512, dtype, device)
    both = {"weights": weights, "biases": biases}
    compiled = torch.compile(partial(block, **both), fullgraph=True, backend=backend)
    for seed in (1, 2):
        h, z = states(5, 384, 512, dtype=dtype, device=device, seed=seed)
        again = h.clone()
        wanted = block(h, z, gain, **both)
        assert torch.equal(compiled(again, z, gain), wanted)
        assert torch.equal(again, h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_changed_in_place_compiles(dtype):
    check_compiled("cpu", dtype, "aot_eager")


@pytest.mark.parametrize("normed", [False, True])
def test_a_place_for_the_result_compiles(normed):
    (_, up), _, _, _ = layers(384, 512, torch.float32, "cpu")
    norm = Norm(torch.ones(3, 6), EPS) if normed else None
    compiled = torch.compile(
        lambda x, out: w4a16_matmul(x, up, out=out, norm_of=norm), fullgraph=True, backend="eager"
    )
    (x,), out = states(3, 384, dtype=torch.float32), torch.empty(3, 512)
    assert torch.equal(compiled(x, out), w4a16_matmul(x, up, norm_of=norm))
    assert torch.equal(out, w4a16_matmul(x, up, norm_of=norm))


@pytest.mark.parametrize("name", ["w4a16", "w4a16_adding"])
def test_operations_say_what_they_change(name, kernel_device):
    """Torch's own checks: schema, fake tensors, functional form."""
    on_cuda = kernel_device.type == "cuda"
    dtype = torch.bfloat16 if on_cuda else torch.float32
    (down, up), (b, c), _, gain = layers(384, 512, dtype, kernel_device)
    h, z, x = states(3, 384, 512, 384, dtype=dtype, device=kernel_device)
    if name == "w4a16":
        weight, rows, bias = up, x, c
        more = (False, torch.ones(3, 6, device=kernel_device), EPS)
    else:
        weight, rows, bias, more = down, z, b, (None, 0.0, *Residual.of(h, gain))
    tensors = (weight.words, weight.scales, weight.zeros, weight.counters, bias)
    rest = (*weight.shape, weight.group_size, weight.gated, False, on_cuda)
    operation = getattr(torch.ops.batchery, name).default
    torch.library.opcheck(operation, (rows, *tensors, *rest, *more))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.ones(2, 63)}, r"add_to.h must be \(2, 64\)"),
        ({"h": torch.ones(64, 2).t()}, "add_to.h must be .*dense"),
        ({"weight": torch.ones(64, dtype=torch.half)}, "add_to.weight must be .*float32"),
        ({"x": torch.ones(1, 64)}, "add_to.x must be"),
        ({"squares": torch.ones(2, 2)}, r"add_to.squares must be \(2, 1\)"),
        ({"squares": torch.ones(2, 1, device="meta")}, "add_to.squares must be .* on cpu"),
    ],
)
def test_states_that_do_not_fit_are_named(change, message):
    weight = pack_w4(torch.ones(64, 64, dtype=torch.uint8), torch.ones(64, 1))
    residual = Residual.of(torch.ones(2, 64), torch.ones(64))._replace(**change)
    with pytest.raises(ValueError, match=f"w4a16_matmul: {message}"):
        w4a16_matmul(torch.ones(2, 64), weight, add_to=residual)


def test_what_cannot_be_added_or_normed_is_refused():
    q, scales = torch.ones(64, 64, dtype=torch.uint8), torch.ones(64, 1)
    weight, gated = pack_w4(q, scales), pack_w4(q, scales, gated=True)
    x, residual = torch.ones(2, 64), Residual.of(torch.ones(2, 64), torch.ones(64))
    norm, wanting = Norm(torch.ones(2, 1), EPS), torch.ones(64, requires_grad=True)
    wide = torch.ones(2, 64, requires_grad=True)
    for kinds, message in (
        ({"add_to": residual, "out": torch.ones(2, 64)}, "out must be None"),
        ({"add_to": residual._replace(x=x)}, "add_to must be filled apart"),
        ({"add_to": residual._replace(h=x.view(2, 64))}, "add_to must be filled apart"),
        ({"add_to": residual._replace(x=residual.h)}, "add_to must be filled apart"),
        ({"add_to": residual, "norm_of": Norm(residual.squares, EPS)}, "add_to must be filled"),
        ({"add_to": residual, "batch_invariant": True}, "batch_invariant must be False"),
        ({"norm_of": norm, "batch_invariant": True}, "batch_invariant must be False"),
        ({"norm_of": Norm(torch.ones(2, 2), EPS)}, r"norm_of.squares must be \(2, 1\)"),
        ({"norm_of": Norm(torch.ones(2, 1).double(), EPS)}, "norm_of.squares must be"),
        ({"norm_of": Norm(torch.ones(2, 1), -1.0)}, r"norm_of.eps must be >= 0, got -1.0"),
        ({"norm_of": Norm(torch.ones(2, 1), torch.nan)}, "norm_of.eps must be >= 0, got nan"),
        ({"norm_of": norm, "bias": wanting}, "bias gets no gradient"),
        ({"norm_of": Norm(torch.ones(2, 1, requires_grad=True), EPS)}, "norm_of.squares gets no"),
        ({"add_to": residual._replace(weight=wanting)}, "add_to.weight gets no gradient"),
        ({"add_to": residual._replace(h=wide)}, "add_to.h gets no gradient"),
        ({"add_to": residual._replace(x=wide)}, "add_to.x gets no gradient .*no_grad"),
        ({"norm_of": norm, "impl": "cuda"}, "impl must be one of"),
    ):
        with pytest.raises(ValueError, match=f"w4a16_matmul: .*{message}"):
            w4a16_matmul(x, weight, **kinds)
    with pytest.raises(ValueError, match="add_to takes no gated weight"):
        w4a16_matmul(x, gated, add_to=residual)
    with pytest.raises(ValueError, match="w4a16_matmul: x gets no gradient with norm_of or add_to"):
        w4a16_matmul(x.requires_grad_(), weight, norm_of=norm)
    with torch.no_grad():
        y = w4a16_matmul(x, weight, norm_of=norm)
    assert not y.requires_grad


@pytest.mark.parametrize("filled", ["h", "x"])
def test_states_that_overlap_with_others_are_refused(filled):
    weight = pack_w4(torch.ones(64, 64, dtype=torch.uint8), torch.ones(64, 1))
    bias, gain, room = torch.ones(64), torch.ones(64), torch.ones(5, 64)
    for x, b, w, part in (
        (room[:2], bias, gain, room[1:3]),
        (room[:2].clone(), room[2], gain, room[1:3]),
        (room[:2].clone(), bias, room[1], room[1:3]),
        (room[:4:2], bias, gain, room[1:3]),  # lies among the rows of x
    ):
        residual = Residual.of(torch.ones(2, 64), w)._replace(**{filled: part})
        with pytest.raises(ValueError, match="add_to must be filled apart from what is read"):
            w4a16_matmul(x, weight, bias=b, add_to=residual)
    after = Residual.of(room[:2], gain)
    with pytest.raises(ValueError, match="add_to must be filled apart"):
        w4a16_matmul(torch.ones(2, 64), weight, add_to=after._replace(x=room[1:3]))
    w4a16_matmul(room[4:].expand(2, 64), weight, bias=bias, add_to=after._replace(x=room[2:4]))


def test_what_was_saved_for_a_gradient_and_changed_is_noticed(kernel_device):
    like = {"device": kernel_device, "dtype": torch.half}
    weight = pack_w4(torch.ones(64, 64, dtype=torch.uint8), torch.ones(64, 1), device=kernel_device)
    leaf = torch.ones(2, 64, requires_grad=True, **like)
    h = leaf.detach().clone()
    loss = (leaf * h).sum()
    w4a16_matmul(torch.ones(2, 64, **like), weight, add_to=Residual.of(h, torch.ones(64, **like)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.gpu
@pytest.mark.parametrize(  # every pair takes some ten seconds to compile
    ("form", "dtype"),
    [(form, torch.bfloat16) for form in FORMS] + [(FORMS[-1], torch.float16)],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else str(value)[6:],
)
def test_every_form_norms_and_adds(form, dtype):
    n, k = 1027, 1024
    generator = torch.Generator("cuda").manual_seed(1)
    random = partial(torch.randn, device="cuda", generator=generator)
    q = draw(n, k, 128, True)
    weight = pack_w4(q.q, q.scales, q.zeros, device="cuda")
    w = dequantize_w4(weight, torch.float64)
    for m, split, chained in (
        (1, 1, False),
        (1, 3, True),
        (form.batch - 1, 2, True),
        (form.batch, 16, True),
        (2 * form.batch + 3, 3, True),
    ):
        x, bias, gain = random(m, k).to(dtype), random(n).to(dtype), random(n).to(dtype)
        norm = Norm(random(m, 16).square() * 64, EPS)
        r = (norm.squares.double().sum(1, keepdim=True) / k + EPS).rsqrt()
        wanted = (x.double() * r) @ w.T + bias.double()
        if split > 1:
            y = launch(x, weight, form, split, bias=bias, chained=chained, norm_of=norm)
            assert close(y, wanted, TOLERANCE[dtype])
        h = random(m, n).to(dtype)
        before, residual = h.double(), Residual.of(h, gain)
        residual.x.fill_(torch.nan)
        residual.squares.fill_(torch.nan)
        kinds = {"bias": bias, "chained": chained, "norm_of": norm, "add_to": residual}
        assert launch(x, weight, form, split, **kinds) is h
        assert close(h, before + wanted, TOLERANCE[dtype])
        assert torch.equal(residual.x, (h.float() * gain.float()).to(dtype))
        squares = F.pad(h.double().square(), (0, -n % 64)).unflatten(-1, (-1, 64)).sum(-1)
        torch.testing.assert_close(residual.squares.double(), squares, rtol=1e-5, atol=1e-30)
    assert int(weight.counters.abs().sum()) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("chained", [False, True])
def test_a_norm_between_products_at_any_number_of_rows(chained):
    matmul, dtype = partial(w4a16_matmul, chained=chained), torch.bfloat16
    for m in (0, 1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 130):
        first = check(m, dtype, "cuda", matmul, factor=1 if m <= 64 else 1.5)
        again = check(m, dtype, "cuda", matmul, factor=1 if m <= 64 else 1.5)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    check(16, dtype, "cuda", partial(matmul, impl="torch"), factor=2)
    check(7, dtype, "cuda", matmul, hidden=4224, mlp=256)
    for group, m in ((32, 8), (64, 16), (32, 33), (64, 64)):
        check(m, dtype, "cuda", matmul, group=group)


@pytest.mark.gpu
def test_one_kernel_does_all_up_to_64_rows(monkeypatch):
    calls = []

    def counted(*arguments, **kinds):
        calls.append(kinds)
        return launch(*arguments, **kinds)

    monkeypatch.setattr(w4a16_ops, "launch_narrow", counted)
    for m, count in ((1, 2), (64, 2), (65, 0)):
        calls.clear()
        check(m, torch.bfloat16, "cuda", factor=1.5)
        assert len(calls) == count
        assert all(kinds["norm_of"] or kinds["add_to"] for kinds in calls)


@pytest.mark.gpu
def test_states_may_begin_anywhere():
    (down, _), _, (wide, _), gain = layers(130, 256, torch.half, "cuda", group=None)
    room, z = states(5, 131, 256, dtype=torch.half, device="cuda")
    h = room.flatten()[1 : 1 + 5 * 130].view(5, 130)
    wanted = h.double() + z.double() @ wide.T
    for again in range(3):
        w4a16_matmul(z, down, add_to=Residual.of(h, gain))
        assert close(h, wanted + again * (z.double() @ wide.T), 2e-3)


@pytest.mark.gpu
def test_a_nan_stays_in_its_row_of_the_states():
    weights, biases, _, gain = layers(384, 512, torch.half, "cuda")
    found = []
    for spoilt in (False, True):
        h, z = states(8, 384, 512, dtype=torch.half, device="cuda")
        if spoilt:
            z[5, 3] = torch.nan
        y = block(h, z, gain, weights, biases)
        found.append((h, y))
    kept = torch.arange(8, device="cuda") != 5
    for clean, other in zip(*found, strict=True):
        assert other[5].isnan().all()
        assert torch.equal(clean[kept], other[kept])


@pytest.mark.gpu
def test_what_is_changed_in_place_compiles_on_the_gpu():
    check_compiled("cuda", torch.half, "inductor")


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8, 13, 16, 32, 64])
def test_a_chain_of_blocks_has_the_bits_of_kernels_one_after_another(m):
    """Many layers over the same h, x and squares, as a model has them, replayed with new inputs."""
    made = [layers(2048, 4096, torch.bfloat16, "cuda", seed=seed) for seed in range(3)]
    gains = [gain for *_, gain in made]
    h0, z0 = states(m, 2048, 4096, dtype=torch.bfloat16, device="cuda")
    processors = torch.cuda.get_device_properties(0).multi_processor_count

    def multiply(x, weight, chained, **beside):
        blocks = weight.words.shape[1]
        form, split = plan_narrow(m, weight.rows, blocks, 128, processors, True)
        return launch(x, weight, form, split, chained=chained, **beside)

    def chain(chained):
        h, z = h0.clone(), z0
        residual = Residual.of(h, gains[0])
        for _ in range(8):
            for (down, up), *_, gain in made:
                multiply(z, down, chained, add_to=residual._replace(weight=gain))
                z = multiply(residual.x, up, chained, norm_of=Norm(residual.squares, EPS))
        return h

    assert_chain_is_alike(chain, h0, replays=100)
