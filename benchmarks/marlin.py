# SPDX-License-Identifier: Apache-2.0
"""The four-bit matmul beside cuBLAS, torch's four-bit matmul and the memory limit, in one run.

On CUDA: the layers of Llama-shaped models of 8 and 70 billion parameters, batches of 1 to 256 rows,
weights rotated over four times the second-level cache, all copies in one CUDA graph. `--sweep`
times every tile and split beside the planned one. On the CPU: two layers against dense ones.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from batchery.kernels.multi_tensor import tl, triton

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
BATCHES = (1, 16, 32, 64, 128, 256)
TARGETS = {  # least speedup over cuBLAS: of the 70B layers, of the 8B layers
    1: (2.7, 2.2),
    16: (2.6, 2.1),
    32: (2.3, 1.9),
    64: (1.7, 1.4),
    128: (1.15, 1.0),
    256: (0.9, 0.9),
}
SPLITS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14)
GROUP = 128
ROTATE = 250e6  # bytes of distinct weights, over four times the cache
TINY_BATCH = 64  # torch's four-bit matmul takes time in proportion to the batch


def candidates(batch: int) -> list[Any]:
    """Return the tiles worth a look at this batch."""
    from batchery.kernels.w4a16_tiles import Tile

    def tiles(width: int, *rest: tuple[Any, ...]) -> list[Tile]:
        names = ("rows", "warps", "step", "stages", "scale_weights")
        return [Tile(width, **dict(zip(names, entry, strict=True))) for entry in rest]

    few = tiles(
        16,
        (64, 4, 64, 3, False),
        (64, 4, 64, 4, False),
        (64, 4, 64, 5, False),
        (128, 4, 64, 3, False),
        (128, 4, 64, 4, False),
        (128, 8, 64, 4, False),
    )
    if batch <= 8:
        few += tiles(
            8,
            (64, 4, 64, 4, False),
            (64, 4, 64, 6, False),
            (128, 4, 64, 4, False),
            (128, 4, 64, 3, False),
            (128, 8, 64, 4, False),
        )
    by_batch = {
        32: tiles(
            32,
            (64, 4, 64, 3, False),
            (64, 4, 64, 4, False),
            (64, 4, 32, 5, False),
            (64, 4, 32, 4, True),
            (128, 4, 32, 4, True),
            (128, 8, 64, 3, False),
            (128, 8, 64, 4, False),
            (128, 8, 32, 4, True),
        ),
        64: tiles(
            64,
            (64, 4, 64, 3, False),
            (64, 4, 32, 4, True),
            (64, 4, 32, 5, True),
            (64, 4, 64, 3, True),
            (128, 4, 32, 4, True),
            (128, 8, 32, 3, True),
            (128, 8, 32, 4, True),
            (128, 8, 32, 5, True),
            (128, 8, 64, 3, True),
            (256, 8, 32, 4, True),
        ),
        128: tiles(
            128,
            (64, 4, 32, 3, True),
            (64, 4, 32, 4, True),
            (64, 4, 16, 4, True),
            (128, 4, 16, 4, True),
            (128, 4, 32, 3, True),
            (128, 8, 16, 4, True),
            (128, 8, 32, 3, True),
            (128, 8, 32, 2, True),
            (256, 8, 16, 4, True),
        ),
        256: tiles(
            256,
            (64, 4, 16, 3, True),
            (64, 4, 16, 4, True),
            (64, 4, 32, 2, True),
            (128, 8, 16, 4, True),
            (128, 8, 32, 2, True),
            (128, 8, 32, 3, True),
        ),
    }
    if batch <= 16:
        return few
    if batch == 256:
        return by_batch[256] + by_batch[128]
    return by_batch[min(most for most in by_batch if batch <= most)]


if triton is not None:

    @triton.jit
    def _read(source, sums, BLOCK: tl.constexpr, TURNS: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * (BLOCK * TURNS) + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for turn in tl.static_range(0, TURNS):
            total += tl.load(source + at + turn * BLOCK)
        tl.store(sums + tl.program_id(0), tl.sum(total, 0))


def packed(n: int, k: int, device: torch.device, seed: int = 0) -> Any:
    from batchery.kernels.w4a16_layout import pack_w4

    generator = torch.Generator(device).manual_seed(seed)
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device, generator=generator)
    scales = torch.rand(n, k // GROUP, device=device, generator=generator).mul_(0.01).add_(1e-3)
    return pack_w4(q, scales.half())


def error(y: Tensor, x: Tensor, w: Tensor) -> float:
    """Relative Frobenius error against float64."""
    wanted = x.double() @ w.double().T
    return float((y.double() - wanted).norm() / wanted.norm())


def try_tile(batch: int, tile: Any) -> dict[str, Any]:
    """Compile a tile for one part and for many, in a process of its own, and check both."""
    from batchery.kernels.w4a16_layout import dequantize_w4
    from batchery.kernels.w4a16_tiles import launch

    device = torch.device("cuda")
    weight = packed(1280, 1024, device)
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(batch, 1024, device=device, generator=generator).half()
    w = dequantize_w4(weight, torch.float64)
    begin = time.perf_counter()
    errors = []
    for split in (1, 2):
        out = torch.full((batch, 1280), torch.nan, dtype=x.dtype, device=device)
        errors.append(error(launch(x, weight, tile, split, out=out), x, w))
    return {"tile": vars(tile), "batch": batch, "errors": errors, "s": time.perf_counter() - begin}


def trial_batch(batch: int, tile: Any) -> int:
    """Return a batch for which the same kernel is compiled: only one tile of rows is special."""
    return int(tile.batch if batch <= tile.batch else 2 * tile.batch)


def compile_all(processes: int) -> list[dict[str, Any]]:
    """Try every tile in parallel; the compiled kernels lie in a folder that goes with this run."""
    jobs = {(trial_batch(m, tile), tile) for m in BATCHES for tile in candidates(m)}
    context = multiprocessing.get_context("spawn")
    found = []
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        pending = {pool.submit(try_tile, *job): job for job in jobs}
        for done in concurrent.futures.as_completed(pending):
            try:
                found.append(done.result())
            except Exception as problem:  # noqa: BLE001 - a variant that fails is a result
                batch, tile = pending[done]
                found.append({"tile": vars(tile), "batch": batch, "failed": str(problem)[:300]})
    return found


def microseconds(calls: list[Callable[[], Any]], replays: int = 4) -> float:
    """Best time of one call among replays of a graph of all of them."""
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


def copies_of(nbytes: int) -> int:
    return max(1, -(-int(ROTATE) // nbytes))


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of the best plain read of 4 GiB."""
    source = torch.randn(2**30, device=device)
    times = []
    for block, turns, warps in ((4096, 8, 8), (8192, 8, 8), (2048, 16, 4), (8192, 32, 8)):
        programs = source.numel() // block // turns
        sums = torch.empty(programs, device=device)
        read = functools.partial(
            _read[(programs,)], source, sums, BLOCK=block, TURNS=turns, num_warps=warps
        )
        times.append(microseconds([read], 6))
    return source.nbytes / min(times) * 1e6


def baselines(n: int, k: int, device: torch.device) -> dict[str, dict[int, float]]:
    """Time cuBLAS in float16 and torch's four-bit matmul."""
    found: dict[str, dict[int, float]] = {"cublas": {}, "tinygemm": {}}
    dense = [
        torch.randn(n, k, device=device, dtype=torch.half).mul_(0.02)
        for _ in range(copies_of(2 * n * k))
    ]
    for m in BATCHES:
        x = torch.randn(m, k, device=device, dtype=torch.half)
        found["cublas"][m] = microseconds([functools.partial(F.linear, x, w) for w in dense])
    del dense
    half_bytes = [
        torch.randint(0, 255, (n, k // 2), dtype=torch.uint8, device=device)
        for _ in range(copies_of(n * k // 2))
    ]
    words = [torch._convert_weight_to_int4pack(b, 8) for b in half_bytes]
    table = torch.randn(k // GROUP, n, 2, device=device, dtype=torch.bfloat16)
    for m in BATCHES:
        if m > TINY_BATCH:
            break
        x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        calls = [functools.partial(torch._weight_int4pack_mm, x, w, GROUP, table) for w in words]
        found["tinygemm"][m] = microseconds(calls, 3)
    return found


def measure(
    name: str, tiles: dict[int, list[Any]], device: torch.device
) -> Iterator[dict[str, Any]]:
    """Time the planned tile and split of one layer, and every other one that is asked for."""
    from batchery.kernels.w4a16 import plan, w4a16_matmul
    from batchery.kernels.w4a16_layout import dequantize_w4
    from batchery.kernels.w4a16_tiles import launch

    n, k = SHAPES[name]
    first = packed(n, k, device)
    weights = [first]
    for _ in range(copies_of(first.nbytes) - 1):
        fresh = {part: getattr(first, part).clone() for part in ("words", "scales", "counters")}
        weights.append(dataclasses.replace(first, **fresh))
    few = torch.arange(0, n, max(1, n // 256), device=device)
    w = dequantize_w4(first, torch.float32)[few] if n * k < 2**28 else None
    _, blocks, _, lanes = first.words.shape
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    for m in BATCHES:
        x = torch.randn(m, k, device=device, dtype=torch.half)
        planned = plan(m, first.rows, blocks, lanes, processors, False)
        row: dict[str, Any] = {"shape": name, "m": m, "plan": [str(planned[0]), planned[1]]}
        row["bytes"] = first.nbytes + 2 * m * (n + k)
        if w is not None:
            row["error"] = error(w4a16_matmul(x, first)[:, few], x, w)
        calls = [functools.partial(w4a16_matmul, x, weight) for weight in weights]
        row["us"] = microseconds(calls, 5)
        calls = [functools.partial(w4a16_matmul, x, v, batch_invariant=True) for v in weights]
        row["invariant_us"] = microseconds(calls) if m <= 64 else None
        row["swept"] = []
        for tile in tiles.get(m, []):
            count = first.rows // tile.rows * -(-m // tile.batch)
            for split in SPLITS:
                # a fourth round of programs gains nothing, and a split needs its turns
                if split > 1 and (count * split > 16 * processors or split > blocks):
                    continue
                calls = [functools.partial(launch, x, v, tile, split) for v in weights]
                row["swept"].append([str(tile), split, microseconds(calls)])
        yield row


def long_batches(device: torch.device) -> list[dict[str, Any]]:
    """Find where a dense product of dequantised weights overtakes the kernel."""
    from batchery.kernels.w4a16_tiles import dequantize_tiles, launch

    rows = []
    for name in ("8B gate_up", "70B down"):
        n, k = SHAPES[name]
        weight = packed(n, k, device)
        dense = dequantize_tiles(weight, torch.half)
        for m in (256, 512, 1024, 2048, 4096):
            x = torch.randn(m, k, device=device, dtype=torch.half)
            row: dict[str, Any] = {"shape": name, "m": m}
            row["cublas"] = microseconds([functools.partial(F.linear, x, dense)])
            row["dequantised"] = microseconds(
                [lambda x=x, v=weight: F.linear(x, dequantize_tiles(v, torch.half))]
            )
            for tile in candidates(256):
                if tile.scale_weights:
                    name_ = f"{tile.batch}x{tile.rows} w{tile.warps} s{tile.stages}"
                    row[name_] = microseconds([functools.partial(launch, x, weight, tile)])
            rows.append(row)
    return rows


def promises(device: torch.device) -> dict[str, bool]:
    """Check on a real layer what the tests check on small ones."""
    from batchery.kernels.w4a16 import w4a16_matmul

    weight = packed(4096, 4096, device)
    x = torch.randn(130, 4096, device=device, dtype=torch.half)
    whole = w4a16_matmul(x, weight, batch_invariant=True)
    alike = all(
        torch.equal(w4a16_matmul(x[:m], weight, batch_invariant=True), whole[:m])
        for m in (1, 2, 7, 16, 17, 33, 64, 65, 129)
    )
    same = True
    for m in (1, 16, 32, 64, 128):
        first = w4a16_matmul(x[:m], weight)
        same &= all(torch.equal(w4a16_matmul(x[:m], weight), first) for _ in range(50))
    spoilt = x[:16].clone()
    spoilt[3, 5] = torch.nan
    y = w4a16_matmul(spoilt, weight)
    rows = y.isnan().any(1)
    stays = bool(y[3].isnan().all()) and int(rows.sum()) == 1
    reset = int(weight.counters.abs().sum()) == 0
    return {"batch invariant": alike, "same bits": same, "NaN stays": stays, "reset": reset}


def eager_microseconds(device: torch.device) -> float:
    """Time of one call without a graph, of a layer so small that launching is all."""
    from batchery.kernels.w4a16 import w4a16_matmul

    weight = packed(1024, 1024, device)
    x = torch.randn(1, 1024, device=device, dtype=torch.half)
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(100):
            w4a16_matmul(x, weight)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e4)
    return min(times)


def short(text: str) -> str:
    """Shorten `Tile(batch=16, rows=64, …)`."""
    values = re.findall(r"=(\w+)", text)
    batch, rows, step, warps, stages, scale = values
    return f"{batch}x{rows}.{step} w{warps} s{stages}" + " S" * (scale == "True")


def report(found: dict[str, Any]) -> None:
    """Print the tables, the most important last."""
    sweep = any(row["swept"] for row in found["layers"])
    print(
        "trial: error of the worst variant",
        max((max(t["errors"]) for t in found["tried"] if "errors" in t), default=None),
    )
    for trial in found["tried"]:
        if "failed" in trial:
            print("FAILED", trial["batch"], trial["tile"], trial["failed"][:160])
    for row in found.get("long", []):
        text = "  ".join(
            f"{key} {value:.0f}" for key, value in row.items() if key not in ("shape", "m")
        )
        print(f"long {row['shape']} M={row['m']}: {text}")
    if sweep:
        print("sum over the layers of a model, each at its best split: three best tiles")
        for model in ("8B", "70B"):
            for m in BATCHES:
                sums: dict[str, float] = {}
                for row in found["layers"]:
                    if row["m"] == m and row["shape"].startswith(model + " "):
                        best: dict[str, float] = {}
                        for tile, _, us in row["swept"]:
                            best[tile] = min(us, best.get(tile, us))
                        for tile, us in best.items():
                            sums[tile] = sums.get(tile, 0.0) + us
                ranked = sorted(sums.items(), key=lambda item: item[1])[:3]
                print(
                    f"{model:3s} M={m:3d} ", " | ".join(f"{short(t)} {us:.1f}" for t, us in ranked)
                )
    print(
        f"{'layer':12s} {'M':>3s} cublas  tiny planned invar | x cublas  of read" + "  best" * sweep
    )
    bandwidth = found["read_gb_s"] * 1e9
    for row in found["layers"]:
        base = found["baselines"][row["shape"]]
        cublas, tiny = base["cublas"][row["m"]], base["tinygemm"].get(row["m"])
        line = f"{row['shape']:12s} {row['m']:3d} {cublas:6.1f} {tiny or 0:5.0f} {row['us']:7.1f} "
        line += f"{row['invariant_us'] or 0:5.1f} | {cublas / row['us']:5.2f}   "
        line += f"{row['bytes'] / bandwidth / row['us'] * 1e6:5.2f}"
        if row["swept"]:
            tile, split, us = min(row["swept"], key=lambda entry: entry[2])
            line += f"   {us:6.1f} = {cublas / us:4.2f}x {short(tile)} /{split}"
        print(line)
    for place, model in enumerate(("70B", "8B")):
        for m in BATCHES:
            rows = [
                r for r in found["layers"] if r["m"] == m and r["shape"].startswith(model + " ")
            ]
            base = sum(found["baselines"][row["shape"]]["cublas"][m] for row in rows)
            ours = sum(row["us"] for row in rows)
            best = sum(min([e[2] for e in row["swept"]] or [row["us"]]) for row in rows)
            floor = sum(row["bytes"] for row in rows) / bandwidth * 1e6
            print(
                f"{model:3s} M={m:3d} all layers: {base / ours:.2f} x cuBLAS (best tiles "
                f"{base / best:.2f}, target {TARGETS[m][place]}), {floor / ours:.2f} of read"
            )
    print(
        found["device"],
        f"read {found['read_gb_s']:.0f} GB/s, eager call {found['eager_us']:.1f} us",
    )
    print(found["promises"], "seconds", found["seconds"])


def on_the_gpu(options: argparse.Namespace) -> dict[str, Any]:
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
    device = torch.device("cuda")
    begin = time.perf_counter()
    seconds = {}
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(device)}
    found["tried"] = compile_all(options.processes) if options.sweep else []
    seconds["compile"] = time.perf_counter() - begin
    works = {
        (trial["batch"], str(trial["tile"]))
        for trial in found["tried"]
        if max(trial.get("errors", [1.0])) < 2e-3
    }
    tiles = {
        m: [t for t in candidates(m) if (trial_batch(m, t), str(vars(t))) in works] for m in BATCHES
    }
    found["promises"] = promises(device)
    found["read_gb_s"] = read_bandwidth(device) / 1e9
    found["eager_us"] = eager_microseconds(device)
    found["baselines"] = {name: baselines(*shape, device) for name, shape in SHAPES.items()}
    seconds["baselines"] = time.perf_counter() - begin
    found["layers"] = []
    for name in reversed(SHAPES):
        # what is left of the time goes to the smaller layers
        late = time.perf_counter() - begin > options.seconds
        found["layers"] += measure(name, {} if late else tiles, device)
        torch.cuda.empty_cache()
        seconds[name] = time.perf_counter() - begin
    if options.sweep:
        found["long"] = long_batches(device)
    found["seconds"] = {name: round(at) for name, at in seconds.items()}
    return found


def on_the_cpu() -> dict[str, Any]:
    """Two layers of a small model, bfloat16 and float32, two threads."""
    from batchery.kernels.w4a16 import w4a16_matmul
    from batchery.kernels.w4a16_layout import dequantize_w4

    torch.set_num_threads(2)
    rows = []
    for n, k in ((2048, 2048), (5632, 2048)):
        weight = packed(n, k, torch.device("cpu"))
        for dtype in (torch.bfloat16, torch.float32):
            dense = dequantize_w4(weight, dtype)
            for m in (1, 8, 32, 128):
                x = torch.randn(m, k, dtype=dtype)
                times = []
                for call in (
                    functools.partial(F.linear, x, dense),
                    functools.partial(w4a16_matmul, x, weight),
                ):
                    call()
                    took = []
                    for _ in range(5):
                        begin = time.perf_counter()
                        call()
                        took.append((time.perf_counter() - begin) * 1e3)
                    times.append(statistics.median(took))
                rows.append({"n": n, "k": k, "m": m, "dtype": str(dtype), "ms": times})
                print(
                    f"({n}, {k}) M={m:3d} {str(dtype)[6:]:8s} dense {times[0]:7.2f} ms, "
                    f"4-bit {times[1]:7.2f} ms, {times[0] / times[1]:.2f} x dense"
                )
    return {"cpu": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sweep", action="store_true", help="every tile and split (CUDA)")
    parser.add_argument("--processes", type=int, default=14, help="that compile for the sweep")
    parser.add_argument("--seconds", type=float, default=170, help="after which nothing is swept")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = on_the_gpu(options) if options.device == "cuda" else on_the_cpu()
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.device == "cuda":
        report(found)


if __name__ == "__main__":
    main()
