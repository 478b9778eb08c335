# SPDX-License-Identifier: Apache-2.0
"""The C kernels are built, found again, and done without; test_lamb and test_lars check them."""

import warnings

import pytest
import torch
from compiler import compiled
from torch import nn

from batchery._core.state import cache_folder
from batchery.kernels import native
from batchery.optim import LAMB, LARS


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing is compiled yet, and the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    native._library.cache_clear()
    yield monkeypatch
    native._library.cache_clear()


def step(optimizer_class, **kinds):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((300, 70), (9,))]
    optimizer = optimizer_class(params, lr=0.1, weight_decay=0.01, **kinds)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p.detach() for p in params]


@compiled
def test_the_library_is_kept_and_found_again(fresh):
    assert native.native_ready(torch.float32)
    (path,) = (cache_folder() / "native").iterdir()
    before = path.stat().st_mtime_ns
    native._library.cache_clear()
    assert native.native_ready(torch.float32)
    assert path.stat().st_mtime_ns == before


def test_no_kernel_for_half_precision():
    assert not native.native_ready(torch.bfloat16)


@pytest.mark.parametrize("optimizer_class", [LAMB, LARS])
def test_without_a_compiler_the_foreach_form_runs_after_one_warning(fresh, optimizer_class):
    fresh.setenv("PATH", "")
    with pytest.warns(UserWarning, match="no C compiler was found"):
        found = step(optimizer_class)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted = step(optimizer_class, foreach=True)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        with pytest.raises(RuntimeError, match="no fused kernel for torch.float32 on cpu"):
            step(optimizer_class, fused=True)


def test_a_compiler_that_fails_is_named(fresh, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho it broke >&2\nexit 1\n")
    broken.chmod(0o755)
    fresh.setenv("CC", str(broken))
    with pytest.warns(UserWarning, match=f"{broken} did not compile layerwise.c: it broke"):
        assert not native.native_ready(torch.float32)


@compiled
@pytest.mark.parametrize("optimizer_class", [LAMB, LARS])
def test_any_number_of_threads_gives_the_same_bits(optimizer_class):
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(step(optimizer_class, fused=True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
