# SPDX-License-Identifier: Apache-2.0
"""What tests of four-bit layers share: weights, inputs, a training of a few steps."""

import torch

from batchery.compress.quant import QuantizedWeight


def draw(n, k, group, zeros=False, act_order=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = k // group
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    scales = torch.rand(n, groups, generator=generator).mul(0.01).add(1e-3).half()
    z = torch.randint(0, 16, (n, groups), dtype=torch.uint8, generator=generator)
    g_idx = (torch.arange(k) // group)[torch.randperm(k, generator=generator)].int()
    return QuantizedWeight(q, scales, z if zeros else None, g_idx if act_order else None, group)


def inputs(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def train(model, batches, lr=0.1):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model
