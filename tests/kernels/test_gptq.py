# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from batchery.kernels.gptq import launch, round_block, round_block_reference


def draw(columns, n, groups, *, zeros=False, device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(columns, n, generator=generator)
    factor = torch.randn(columns, columns + 3, generator=generator).mul(0.2)[:, :columns]
    factor.diagonal().abs_().add_(0.5)
    scales = torch.rand(groups, n, generator=generator).mul(0.2).add(0.1)
    z = torch.randint(0, 16, (groups, n), dtype=torch.uint8, generator=generator)
    of = torch.randint(0, groups, (columns,), dtype=torch.int32, generator=generator)
    floats = [t.to(device, dtype) for t in (w, factor, scales)]
    return *floats, z.to(device) if zeros else None, of.to(device)


def by_the_equations(w, factor, scales, zeros, groups):
    """One number at a time; also how far each lay from half-way between two levels."""
    w, q, e = w.tolist(), [], []
    apart = 1.0
    for i, column in enumerate(w):
        codes, errors = [], []
        for n, value in enumerate(column):
            s = float(scales[groups[i], n])
            z = 8 if zeros is None else int(zeros[groups[i], n])
            apart = min(apart, abs(abs(value / s) % 1 - 0.5))
            code = min(max(round(value / s) + z, 0), 15)
            error = (value - s * (code - z)) / float(factor[i, i])
            for j in range(i + 1, len(w)):
                w[j][n] -= float(factor[i, j]) * error
            codes.append(code)
            errors.append(error)
        q.append(codes)
        e.append(errors)
    return torch.tensor(q, dtype=torch.uint8), torch.tensor(e, dtype=torch.float64), apart


CASES = {
    "block": (16, 40, 2, False),
    "zeros": (16, 40, 3, True),
    "odd": (13, 33, 1, True),
    "one": (1, 5, 1, False),
}


@pytest.mark.parametrize("name", CASES)
def test_the_torch_form_follows_the_equations(name):
    columns, n, groups, zeros = CASES[name]
    given = draw(columns, n, groups, zeros=zeros, dtype=torch.float64)
    q, e, apart = by_the_equations(*given)
    assert apart > 1e-8
    found = round_block_reference(*given)
    assert torch.equal(found[0], q)
    torch.testing.assert_close(found[1], e, rtol=1e-10, atol=1e-10)
    assert found[1].data_ptr() == given[0].data_ptr()


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_follows_the_equations(name, kernel_device):
    columns, n, groups, zeros = CASES[name]
    given = draw(columns, n, groups, zeros=zeros, device=kernel_device)
    q, e, apart = by_the_equations(*given)
    assert apart > 1e-5  # else the last bit of a float32 would decide
    found = launch(*given)
    assert torch.equal(found[0].cpu(), q)
    torch.testing.assert_close(found[1].cpu().double(), e, rtol=1e-5, atol=1e-5)


def test_the_kernel_rounds_half_to_even_and_clips(kernel_device):
    values = [0.5, 1.5, 2.5, -0.5, -1.5, 7.5, 1e30, -1e30, 0.49999997, -8.5]
    w = torch.tensor([values], device=kernel_device)
    one = torch.ones(1, 1, device=kernel_device)
    given = (one, torch.ones(1, 10, device=kernel_device), None)
    groups = torch.zeros(1, dtype=torch.int32, device=kernel_device)
    q, e = launch(w.clone(), *given, groups)
    assert q.tolist() == [[8, 10, 10, 8, 6, 15, 15, 0, 8, 0]]
    wanted = round_block_reference(w.clone(), *given, groups)
    assert torch.equal(q, wanted[0])
    assert torch.equal(e, wanted[1])


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [32, 100, 128])
def test_the_compiled_kernel_agrees_with_the_torch_form(columns):
    given = draw(columns, 1000, 4, zeros=True, device="cuda")
    given[1].mul_(torch.eye(columns, device="cuda") * 0.98 + 0.02)
    again = (given[0].clone(), *given[1:])
    q, e = round_block(*given, impl="triton")
    wanted = round_block(*again, impl="torch")
    # a sum that ends half-way may go either way, and then its row differs
    same = (q == wanted[0]).all(0)
    assert same.float().mean() > 0.95
    torch.testing.assert_close(e[:, same], wanted[1][:, same], rtol=1e-4, atol=1e-4)


def test_a_kernel_that_cannot_run_is_named():
    given = draw(4, 4, 1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="round_block: no kernel for torch.float64 on cpu"):
        round_block(*given, impl="triton")
    with pytest.raises(ValueError, match="round_block: impl must be one of"):
        round_block(*given, impl="fast")
