# SPDX-License-Identifier: Apache-2.0
"""What LAMB and LARS have of their base: buckets, and the refusal of what has no layers."""

import pytest
import torch
from compiler import compiled, needs_compiler
from torch import nn

from batchery.optim import LAMB, LARS


def weights(shapes):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]


def trajectory(optimizer, params, steps=5):
    generator = torch.Generator().manual_seed(7)
    path = []
    for _ in range(steps):
        for p in params:
            drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad = torch.empty_like(p).copy_(drawn)  # as in a backward pass: p's strides
        optimizer.step()
        path += [p.detach().clone() for p in params]
    return path


@pytest.mark.parametrize("kind", [LAMB, LARS])
@pytest.mark.parametrize("fused", [needs_compiler(True), needs_compiler(None)])
def test_weights_in_channels_last_are_fused_too(kind, fused):
    one, two = weights(((4, 3, 2, 2), (5, 4))), weights(((4, 3, 2, 2), (5, 4)))
    one[0].data = one[0].data.to(memory_format=torch.channels_last)
    optimizer = kind(one, lr=0.1, weight_decay=0.1, fused=fused)
    rows = trajectory(optimizer, one)
    assert not one[0].is_contiguous()
    assert [bucket.impl for bucket in optimizer._last] == ["fused"]
    loop = trajectory(kind(two, lr=0.1, weight_decay=0.1, foreach=False), two)
    torch.testing.assert_close(rows, loop, rtol=1e-10, atol=1e-10)


@compiled
def test_one_tensor_that_cannot_be_fused_keeps_no_others_from_it():
    params = weights(((4, 3), (5, 4)))
    params[0].grad = torch.ones(3, 4, dtype=torch.float64).t()
    params[1].grad = torch.ones_like(params[1])
    optimizer = LARS(params)
    optimizer.step()
    assert [bucket.impl for bucket in optimizer._last] == ["foreach", "fused"]
    with pytest.raises(ValueError, match=r"alike and without gaps to be fused, got \(4, 3\)"):
        LARS(params, fused=True).step()


def test_a_bad_group_is_refused_and_leaves_the_optimizer_whole():
    params = weights(((4, 3), (5,)))
    optimizer = LAMB(params[:1], lr=0.1)
    with pytest.raises(ValueError, match="LAMB: lr must be >= 0"):
        optimizer.add_param_group({"params": params[1:], "lr": -1})
    with pytest.raises(ValueError, match=r"max_grad_norm must be the same in all .*, got 1.0"):
        optimizer.add_param_group({"params": params[1:], "max_grad_norm": 1.0})
    assert len(optimizer.param_groups) == 1


def test_sparse_complex_and_flattened_parameters_are_refused():
    embedding = nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="LAMB: gradients must be dense"):
        LAMB(embedding.parameters()).step()
    with pytest.raises(TypeError, match="LAMB: parameters must be real"):
        LAMB([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    flat = nn.Parameter(torch.zeros(5))
    flat._is_flat_param = True
    with pytest.raises(ValueError, match="use FSDP2"):
        LAMB([flat])


@pytest.mark.parametrize(("saved", "own"), [(1e-3, None), (None, 1e-3)])
def test_clipping_is_that_of_the_loaded_state(saved, own):
    shapes = ((4, 3), (5,))
    first, second = (LAMB(weights(shapes), lr=0.1, max_grad_norm=limit) for limit in (saved, own))
    second.load_state_dict(first.state_dict())
    paths = (trajectory(o, o.param_groups[0]["params"]) for o in (first, second))
    for p, q in zip(*paths, strict=True):
        assert torch.equal(p, q)
    second.add_param_group({"params": weights(((2, 2),)), "max_grad_norm": saved})


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_state_without_steps_is_known_by_its_settings(scheduled):
    lamb, lars, other = (k(weights(((4, 3),)), lr=r) for k, r in ((LAMB, 1), (LARS, 3), (LARS, 2)))
    if scheduled:
        torch.optim.lr_scheduler.ConstantLR(lars)  # which puts initial_lr into the groups
        lars.param_groups[0]["lr"] = 3
    lars.load_state_dict(lamb.state_dict())
    assert lars.param_groups[0]["lr"] == 3
    assert "betas" not in lars.param_groups[0]
    lars.load_state_dict(other.state_dict())
    assert lars.param_groups[0]["lr"] == 2
