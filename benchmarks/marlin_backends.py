# SPDX-License-Identifier: Apache-2.0
"""What `marlin.py` times: our four-bit matmul and its peers, each on distinct weights of a layer.

A backend takes N and K and returns calls y = call(x), each with a weight of its own; together the
weights fill the second-level cache four times.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from batchery.kernels.w4a16 import w4a16_matmul
from batchery.kernels.w4a16_layout import PackedW4, pack_w4

SHAPES = {
    "8B qkv": (6144, 4096),
    "8B o": (4096, 4096),
    "8B gate_up": (28672, 4096),
    "8B down": (4096, 14336),
    "70B qkv": (10240, 8192),
    "70B o": (8192, 8192),
    "70B gate_up": (57344, 8192),
    "70B down": (8192, 28672),
}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
GROUP = 128
Call = Callable[[Tensor], Any]


def packed(
    n: int, k: int, device: torch.device | str = "cuda", seed: int = 0, group: int = GROUP
) -> PackedW4:
    generator = torch.Generator(device).manual_seed(seed)
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device, generator=generator)
    scales = torch.rand(n, k // group, device=device, generator=generator).mul_(0.01).add_(1e-3)
    return pack_w4(q, scales.half())


def copies(nbytes: int) -> range:
    """Count weights of so many bytes up to four times the second-level cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return range(math.ceil(4 * cache / nbytes))


def random(*shape: int, dtype: torch.dtype = torch.half) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device="cuda")


def fresh(weight: PackedW4) -> PackedW4:
    """Return a copy that lies elsewhere."""
    parts = ("words", "scales", "counters")
    return dataclasses.replace(weight, **{part: getattr(weight, part).clone() for part in parts})


def microseconds(calls: list[Callable[[], Any]], replays: int = 4) -> float:
    """Best time of one call among replays of a graph of all of them, the first left out."""
    for call in calls[:2]:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return min(times[1:])


def ours(n: int, k: int, **how: bool) -> list[Call]:
    first = packed(n, k)
    weights = [fresh(first) for _ in copies(first.nbytes)]
    return [lambda x, w=w: w4a16_matmul(x, w, **how) for w in weights]


def cublas(n: int, k: int) -> list[Call]:
    weights = [random(n, k) for _ in copies(2 * n * k)]
    return [lambda x, w=w: F.linear(x, w) for w in weights]


def tinygemm(n: int, k: int) -> list[Call]:
    table = random(k // GROUP, n, 2, dtype=torch.bfloat16)
    halves = [words(n, k // 8).view(torch.uint8) for _ in copies(n * k // 2)]
    weights = [torch._convert_weight_to_int4pack(half, 8) for half in halves]
    return [lambda x, w=w: torch._weight_int4pack_mm(x, w, GROUP, table) for w in weights]


def gptq_marlin(n: int, k: int) -> list[Call]:
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.scalar_type import scalar_types

    scales = random(k // GROUP, n)
    space = marlin_utils.marlin_make_workspace_new(torch.device("cuda"))
    kind = scalar_types.uint4b8
    how = {"is_k_full": True, "use_atomic_add": False, "use_fp32_reduce": True}
    how["is_zp_float"] = False

    def call(x: Tensor, w: Tensor) -> Tensor:
        nones = 5 * (None,)
        rest = (space, kind, x.shape[0], n, k)
        return ops.marlin_gemm(x, None, w, None, scales, *nones, *rest, **how)

    return [functools.partial(call, w=words(k // 16, 2 * n)) for _ in copies(n * k // 2)]


def machete(n: int, k: int) -> list[Call]:
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    kind = scalar_types.uint4b8
    scales = random(k // GROUP, n)

    def call(x: Tensor, w: Tensor) -> Tensor:
        return ops.machete_mm(x, w, kind, b_group_scales=scales, b_group_size=GROUP)

    plain = (words(n, k // 8).t() for _ in copies(n * k // 2))
    weights = [ops.machete_prepack_B(w, torch.half, kind, torch.half) for w in plain]
    return [functools.partial(call, w=w) for w in weights]


def triton_atomics(n: int, k: int) -> list[Call]:
    from marlin_triton_peer import calls

    return calls(n, k)


BACKENDS: dict[str, Callable[[int, int], list[Call]]] = {
    "ours": ours,
    "invariant": functools.partial(ours, batch_invariant=True),
    "cublas": cublas,
    "tinygemm": tinygemm,
    "triton_atomics": triton_atomics,
    "gptq_marlin": gptq_marlin,
    "machete": machete,
}
