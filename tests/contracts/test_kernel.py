# SPDX-License-Identifier: Apache-2.0
"""What every kernel over rows owes. Broken ones at the end show that the suite can fail.

Interpreted where there is no CUDA device; then in float32, for the interpreter rounds bfloat16
wrongly.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

from .cases import CASES, KernelProblem, global_randomness, objects

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")  # NaN, on purpose
KERNELS = [CASES[path] for path in objects("kernel") if path in CASES]
every = pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.name)
each = pytest.mark.parametrize(
    ("case", "variant"),
    [(case, variant) for case in KERNELS for variant in case.variants],
    ids=lambda value: getattr(value, "name", value),
)
# Frobenius error of a result in the dtype: its rounding, and that of the products' operands.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
ROWS = (1, 3, 16, 70)


def dtypes(device):
    return [torch.float32] if device.type == "cpu" else [torch.float16, torch.bfloat16]


def draw(problem, rows, dtype, device, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, problem.width, generator=generator).to(device, dtype)


def check_result(problem, x):
    y, wanted = problem.kernel(x), problem.exact(x)
    assert y.dtype == x.dtype
    assert y.device == x.device
    assert y.shape == wanted.shape
    error = (y.double() - wanted).norm() / wanted.norm()
    # A gated product has the errors of two, which the wide kernels round before.
    assert float(error) <= TOLERANCE[x.dtype] * (1.5 if problem.gated else 1)


def check_bits(problem, x, runs):
    first = problem.kernel(x)
    assert all(torch.equal(problem.kernel(x), first) for _ in range(runs))


def check_rows(problem, x):
    """What is not finite in a row spoils that row alone."""
    clean = problem.kernel(x)
    x[1, 7], x[3, problem.width - 1] = torch.nan, torch.inf
    found = problem.kernel(x)
    assert found[1].isnan().all()
    assert not found[3].isfinite().all()
    kept = [row for row in range(len(x)) if row not in (1, 3)]
    assert torch.equal(found[kept], clean[kept])


@each
def test_the_kernel_follows_the_equation_in_every_dtype(case, variant, kernel_device):
    problem = case.build(case.variants[variant], kernel_device)
    for dtype in dtypes(kernel_device):
        for rows in ROWS:
            check_result(problem, draw(problem, rows, dtype, kernel_device))


@each
def test_the_form_in_torch_follows_it_too(case, variant):
    problem = case.build(case.variants[variant], torch.device("cpu"))
    for dtype in (torch.float32, torch.float16):
        x = draw(problem, 5, dtype, torch.device("cpu"))
        check_result(replace(problem, kernel=partial(problem.public, impl="torch")), x)


@each
def test_a_hundred_runs_give_the_same_bits(case, variant, kernel_device):
    problem = case.build(case.variants[variant], kernel_device)
    runs = 2 if kernel_device.type == "cpu" else 100  # the interpreter has no order to change
    for dtype in dtypes(kernel_device):
        for rows in (1, 16, 70):
            check_bits(problem, draw(problem, rows, dtype, kernel_device), runs)


@each
def test_a_nan_stays_in_its_row(case, variant, kernel_device):
    problem = case.build(case.variants[variant], kernel_device)
    for dtype in dtypes(kernel_device):
        check_rows(problem, draw(problem, 6, dtype, kernel_device))


@each
def test_inputs_and_global_randomness_are_left_alone(case, variant, kernel_device):
    problem = case.build(case.variants[variant], kernel_device)
    x = draw(problem, 6, dtypes(kernel_device)[0], kernel_device)
    before, kept = global_randomness(), x.clone()
    problem.kernel(x)
    assert global_randomness() == before
    assert torch.equal(x, kept)


@each
def test_rows_may_lie_apart(case, variant, kernel_device):
    problem = case.build(case.variants[variant], kernel_device)
    x = draw(problem, 6, dtypes(kernel_device)[0], kernel_device)
    apart = torch.stack([x, x + 1], 1).flatten(0, 1)[::2]
    assert not apart.is_contiguous()
    assert torch.equal(problem.kernel(apart), problem.kernel(x))


@every
def test_no_rows_give_no_rows(case):
    problem = case.build(next(iter(case.variants.values())), torch.device("cpu"))
    x = torch.ones(0, problem.width)
    assert problem.public(x).shape == problem.exact(x).shape


@every
def test_a_form_that_cannot_run_is_not_replaced_by_another(case):
    problem = case.build(next(iter(case.variants.values())), torch.device("cpu"))
    with pytest.raises(RuntimeError, match=f"{case.name}: .* on cpu"):
        problem.public(torch.ones(2, problem.width), impl="triton")


@every
def test_bad_arguments_are_named(case):
    problem = case.build(next(iter(case.variants.values())), torch.device("cpu"))
    assert case.bad
    for kinds, error, message in case.bad:
        with pytest.raises(error, match=message):
            problem.public(torch.ones(2, problem.width), **kinds)
    with pytest.raises(
        ValueError, match=rf"{case.name}: x must be .* got \(2, {problem.width + 1}\)"
    ):
        problem.public(torch.ones(2, problem.width + 1))


def broken(kernel):
    return KernelProblem(kernel, kernel, lambda x: x.double().sum(1, keepdim=True), 8, False)


def test_the_suite_catches_a_kernel_that_mixes_rows():
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    mixing = broken(lambda x: x.sum(1, keepdim=True) + 0 * x.sum())
    check_result(mixing, x)
    with pytest.raises(AssertionError):
        check_rows(mixing, x)


def test_the_suite_catches_a_kernel_whose_bits_change():
    noise = torch.Generator().manual_seed(0)

    def changing(x):
        order = torch.randperm(x.shape[1], generator=noise)
        return sum(x[:, [column]] for column in order)

    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    check_result(broken(changing), x)
    with pytest.raises(AssertionError):
        check_bits(broken(changing), x, 20)


def test_the_suite_catches_a_kernel_that_sums_in_sixteen_bits():
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(AssertionError):
        check_result(broken(lambda x: x.half().sum(1, keepdim=True).to(x.dtype)), x)
