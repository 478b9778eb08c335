# SPDX-License-Identifier: Apache-2.0
import re
from types import FunctionType, SimpleNamespace

import pytest
import torch
from four_bits import products

from batchery.kernels.w4a16_layout import pack_w4
from batchery.kernels.w4a16_plan import FORMS, stripes
from batchery.kernels.w4a16_wide import Wide, fits, gluon, launch, nibble_asm


def run_assembly(text, operands, dtype):
    """Interpret nibble_asm; a register is an int32 tensor of pairs."""
    registers = {f"${place}": value for place, value in enumerate(operands, 1)}

    def read(name):
        if name in registers:
            return registers[name]
        return torch.full_like(operands[0].long(), int(name, 0)).to(torch.int32)

    def lanes(value):
        return value.view(torch.int16).view(dtype).double()

    for line in text.splitlines():
        operation, *names = re.findall(r"[\w.$]+", line) or [""]
        if operation in ("", ".reg"):
            continue
        a, *more = [read(name) for name in names[1:]]
        if operation == "mov.b32":
            value = a
        elif operation == "shr.u32":
            value = ((a.long() & 0xFFFFFFFF) >> more[0].long()).to(torch.int32)
        elif operation == "lop3.b32":
            assert names[4] == "0xEA"  # (a & b) | c
            value = (a & more[0]) | more[1]
        else:
            assert operation == f"fma.rn.{'f16x2' if dtype == torch.float16 else 'bf16x2'}"
            wide = lanes(a) * lanes(more[0]) + lanes(more[1])
            value = wide.to(dtype).view(torch.int16).view(torch.int32)
        registers[names[0]] = value
    return lanes(registers["$0"])


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("zero", [None, 0, 5, 15])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_assembly_makes_every_weight_exact(dtype, zero, scaled):
    words = torch.arange(65536).to(torch.int16)
    scale = 0.375 if scaled else 1.0
    for place in range(4):
        lift = 128 if dtype == torch.bfloat16 else (1024, 64)[place % 2]
        values = ([] if zero is None else [-lift - zero]) + [scale] * scaled
        filled = [torch.full((65536,), v, dtype=torch.float64).to(dtype) for v in values]
        operands = [
            words.view(torch.int32),
            *(v.view(torch.int16).view(torch.int32) for v in filled),
        ]
        found = run_assembly(nibble_asm(dtype, place, zero is not None, scaled), operands, dtype)
        wanted = (words.int() >> 4 * place & 15).double() - (8 if zero is None else zero)
        assert torch.equal(found, (wanted * scale).to(dtype).double())


def shares():
    for tiles in (1, 2, 5, 7, 16, 31, 33, 131, 132, 133, 200, 264, 300, 1000):
        for blocks in (1, 3, 16, 112):
            for processors in (7, 132):
                yield tiles, blocks, stripes(tiles, blocks, processors)[0]
    yield 5, 3, (0, 5, 4)
    yield 29, 5, (3, 8, 7)


def as_python(function, program, programs):
    """Return a function of the kernel as one of Python, in one program."""
    gl = SimpleNamespace(
        program_id=lambda axis: program,
        num_programs=lambda axis: programs,
        minimum=min,
        maximum=max,
        where=lambda condition, a, b: a if condition else b,
    )
    return FunctionType(function.fn.__code__, {"gl": gl})


@pytest.mark.skipif(gluon is None, reason="needs Triton's Gluon")
def test_every_turn_of_every_tile_is_some_programs_and_they_find_each_other():
    from batchery.kernels import w4a16_wide as wide

    for tiles, blocks, (whole, tail, sharers) in shares():
        programs = (tiles - tail) // whole if whole else sharers
        assert sharers <= programs
        done = torch.zeros(tiles, blocks, dtype=torch.int64)
        places, owners = set(), set()
        for program in range(programs):
            parts = [
                as_python(f, program, programs) for f in (wide._pieces, wide._piece, wide._meeting)
            ]
            pieces, first, last = parts[0](blocks, whole, tail, sharers)
            begun = []
            for j in range(pieces):
                tile, begin, end = parts[1](j, blocks, whole, first, last)
                assert begin < end
                done[tile, begin:end] += 1
                if end - begin == blocks:
                    continue
                cut = first // blocks + j - whole
                assert tile == whole * programs + cut
                owner, final = parts[2](cut, blocks, tail, sharers)
                assert owner <= program <= final
                assert (begin == 0) == (program == owner)
                assert (end == blocks) == (program == final)
                place = 2 * program + (program == owner)
                assert place < 2 * sharers
                assert place not in places
                places.add(place)
                begun += [owner] if program == owner else []
            assert len(begun) <= 1  # a program's count serves one tile
            owners.update(begun)
        assert torch.equal(done, torch.ones_like(done))
        assert max(owners, default=0) < 512


def test_only_rows_aligned_on_hopper_fit():
    assert not fits(
        torch.ones(2, 64), pack_w4(torch.ones(2, 64, dtype=torch.uint8), torch.ones(2, 1))
    )


SMALL = Wide(128, 128, 2, 3)
OTHERS = [form for form in FORMS if form != SMALL]

CASES = {
    "even": (1280, 1024, 128, 256, ""),
    "odd": (1027, 1024, 128, 300, "zeros bias"),
    "group-32": (770, 1088, 32, 130, "zeros"),
    "group-64": (640, 960, 64, 129, "zeros"),
    "group-256": (512, 2048, 256, 513, ""),
    "one-group": (512, 1096, 1096, 200, "zeros"),
    "gated": (1402, 1024, 128, 257, "gated bias"),
}


def draw(n, k, group, zeros):
    generator = torch.Generator("cuda").manual_seed(0)
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda", generator=generator)
    scales = torch.rand(n, k // group, device="cuda", generator=generator).mul(0.01).add(1e-3)
    z = torch.randint(0, 16, (n, k // group), dtype=torch.uint8, device="cuda", generator=generator)
    return q, scales.half(), z if zeros else None


@pytest.mark.gpu
@pytest.mark.parametrize(  # every pair takes a few seconds to compile
    ("form", "name"), [(SMALL, name) for name in CASES] + [(form, "odd") for form in OTHERS]
)
def test_the_kernel_follows_the_equation(form, name):
    n, k, group, m, extra = CASES[name]
    gated = "gated" in extra
    weight = pack_w4(*draw(n, k, group, "zeros" in extra), gated=gated)
    for x, bias, wanted, tolerance in products(weight, m, extra, both=name == "odd"):
        assert fits(x, weight)
        tiles = -(-weight.rows // form.rows) * -(-m // form.batch)
        for share in ((0, tiles, tiles), (0, tiles, 2 * tiles), (0, tiles, 7)):
            out = torch.full((m, n // 2 if gated else n), torch.nan, dtype=x.dtype, device="cuda")
            launch(x, weight, form, share, bias=bias, out=out)
            assert float((out.double() - wanted).norm() / wanted.norm()) <= tolerance
    assert int(weight.counters.abs().sum()) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_runs_give_the_same_bits_and_a_nan_stays_in_its_row(form):
    weight = pack_w4(*draw(4096, 4096, 128, False))
    x = torch.randn(300, 4096, device="cuda").half()
    tiles = 4096 // form.rows * -(-300 // form.batch)
    arguments = (weight, form, (0, tiles, 132))
    first = launch(x, *arguments)
    assert all(torch.equal(launch(x, *arguments), first) for _ in range(100))
    x[7, 3] = torch.nan
    found = launch(x, *arguments)
    assert found[7].isnan().all()
    kept = torch.arange(300, device="cuda") != 7
    assert torch.equal(found[kept], first[kept])
