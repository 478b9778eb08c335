# SPDX-License-Identifier: Apache-2.0
"""What tests of four-bit layers share: weights, inputs, a small model, a few steps of training."""

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


def llama(layers=2, seed=0):
    """Return a small Llama; its tokens are those of `ids`."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config).eval()


def ids(rows=6, length=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 64, (rows, length), generator=generator)
