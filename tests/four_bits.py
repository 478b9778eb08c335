# SPDX-License-Identifier: Apache-2.0
"""What tests of four-bit layers share: weights, inputs, a small model, a few steps of training."""

import torch
import torch.nn.functional as F

from batchery.compress.quant import QuantizedWeight
from batchery.kernels.w4a16_layout import dequantize_w4


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


# What the configs of most families call their sizes.
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def close(one, other):
    """Hold two tensors to each other as float32 allows."""
    assert one.shape == other.shape
    assert float((one - other).norm()) <= 1e-5 * float(other.norm())


def ids(rows=6, length=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 64, (rows, length), generator=generator)


def products(weight, m, extra, both):
    """Yield x, bias, their product with the weight in float64, and the tolerance.

    In float16 and, if both, in bfloat16; extra says whether there is a bias.
    """
    n, k = weight.shape
    device = weight.words.device
    w = dequantize_w4(weight, torch.float64)
    generator = torch.Generator(device).manual_seed(1)
    dtypes = {torch.float16: 1e-3, torch.bfloat16: 4e-3} if both else {torch.float16: 1e-3}
    for dtype, tolerance in dtypes.items():
        x = torch.randn(m, k, device=device, generator=generator).to(dtype)
        bias = torch.randn(n, device=device, generator=generator).to(dtype)
        bias = bias if "bias" in extra else None
        wanted = x.double() @ w.T + (0 if bias is None else bias.double())
        if weight.gated:
            wanted = F.silu(wanted[:, : n // 2]) * wanted[:, n // 2 :]
            bias = None if bias is None else torch.stack(bias.chunk(2), 1).flatten()
        yield x, bias, wanted, tolerance


def assert_chain_is_alike(chain, first, replays):
    """Kernels in a chain, and replays of its graph with new first inputs, have the bits of others.

    `chain(chained)` runs kernels on `first`, a tensor on a GPU, and returns their result.
    """
    wanted = chain(False)
    assert wanted.isfinite().all()
    assert torch.equal(chain(True), wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain(True)
    generator = torch.Generator("cuda").manual_seed(3)
    for _ in range(replays):
        first.copy_(torch.randn(first.shape, device="cuda", generator=generator))
        found.zero_()
        graph.replay()
        assert torch.equal(found, chain(False))
