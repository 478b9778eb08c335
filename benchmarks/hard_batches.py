# SPDX-License-Identifier: Apache-2.0
"""Hard batches beside torch's samplers, the selection beside torch's sorts, as ratios.

What a batch costs the training loop (drawing it, and reporting its loss), what the end of a round
costs, and on CUDA whether a report waits for the device. Targets: less than 0.5 % of a training
step, 10^5 batches selected in 5 ms, 10^7 examples in 0.2 s.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, RandomSampler, WeightedRandomSampler

from batchery.cli import device_argument
from batchery.select import HardBatchSampler, ResumableBatchSampler
from batchery.select.selection import falling, highest
from batchery.studies.hard_batches_tasks import resnet18
from batchery.studies.harness import environment

EXAMPLES = 50_000


def seconds(call: Callable[[], Any], repeats: int = 7) -> float:
    """Median time of one call, after one of warm-up."""
    call()
    times = []
    for _ in range(repeats):
        at = time.perf_counter()
        call()
        times.append(time.perf_counter() - at)
    return statistics.median(times)


def samplers(batch: int) -> dict[str, Iterable[list[int]]]:
    everything = range(EXAMPLES)
    weights = torch.rand(EXAMPLES, generator=torch.Generator().manual_seed(0))
    weighted = WeightedRandomSampler(weights.tolist(), EXAMPLES)
    return {
        "RandomSampler": BatchSampler(RandomSampler(everything), batch, drop_last=True),
        "WeightedRandomSampler": BatchSampler(weighted, batch, drop_last=True),
        "ResumableBatchSampler": ResumableBatchSampler(EXAMPLES, batch, drop_last=True),
        "HardBatchSampler, batches": HardBatchSampler(EXAMPLES, batch, 0.5),
        "examples, in order": HardBatchSampler(EXAMPLES, batch, 0.5, mode="sample"),
        "HardBatchSampler, examples": HardBatchSampler(EXAMPLES, batch, 0.5, mode="sample"),
    }


def per_batch(batch: int, device: torch.device) -> dict[str, Any]:
    """Time the drawing of a batch and the report of its loss, starts of passes included."""
    rows: dict[str, Any] = {}
    loss, losses = torch.ones((), device=device), torch.ones(batch, device=device)
    count = 4 * (EXAMPLES // batch)
    for name, sampler in samplers(batch).items():
        stream: Iterator[list[int]] = chain.from_iterable(repeat(sampler))

        report: Callable[[list[int]], None] = {
            "HardBatchSampler, batches": lambda indices, to=sampler: to.update(loss),
            "examples, in order": lambda indices, to=sampler: to.update(losses),
            "HardBatchSampler, examples": lambda indices, to=sampler: to.update(losses, indices),
        }.get(name, lambda indices: None)

        def draw(
            stream: Iterator[list[int]] = stream,
            report: Callable[[list[int]], None] = report,
        ) -> None:
            for indices in islice(stream, count):
                report(indices)

        rows[name] = {"us": seconds(draw, 3) / count * 1e6}
        rows[name]["ratio"] = rows[name]["us"] / rows["RandomSampler"]["us"]
        print(
            f"  {name:28s} {rows[name]['us']:8.1f} us   {rows[name]['ratio']:5.2f} x RandomSampler"
        )
    return rows


def training_step(batch: int, device: torch.device) -> float:
    """Time one step of ResNet-18 on 32 x 32 images."""
    model = resnet18().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(batch, 3, 32, 32, device=device), torch.arange(batch, device=device) % 10

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return seconds(step)


def selection() -> dict[str, Any]:
    """Time the choice of half of the units, and the whole start of a round."""
    rows: dict[str, Any] = {}
    for units, limit in ((100_000, 5.0), (10_000_000, 200.0)):
        whole = units <= 100_000  # batches keep a ranking, examples only what is chosen
        rows[str(units)] = choice(units, whole)
        ours = rows[str(units)]["ours"]
        print(f"  half of {units:,}, target {limit:g} ms: {'met' if ours < limit else 'missed'}")
        for name, value in rows[str(units)].items():
            print(f"    {name:24s} {value:9.2f} ms   {value / ours:6.2f} x ours")
        start = rows[str(units)]["round start"] = round_start(units, whole) * 1e3
        print(f"    start of a round, reports read and all {start:9.2f} ms")
    return rows


def choice(units: int, whole: bool) -> dict[str, float]:
    scores = np.random.default_rng(0).exponential(size=units).astype(np.float32)
    tensor, kept = torch.from_numpy(scores), units // 2
    calls = {
        "ours": lambda: falling(scores) if whole else highest(scores, kept),
        "torch.topk": lambda: torch.topk(tensor, kept, sorted=whole),
        "torch.argsort, stable": lambda: torch.argsort(tensor, descending=True, stable=True),
    }
    return {name: seconds(call, 3) * 1e3 for name, call in calls.items()}


def round_start(units: int, whole: bool) -> float:
    """Time `iter()` after a round in which every unit was reported."""
    size = 2 if whole else 1000
    sampler = HardBatchSampler(
        units * size if whole else units, size, 0.5, mode="batch" if whole else "sample"
    )
    everything = torch.arange(sampler.num_examples)
    losses = torch.rand(sampler.num_examples)
    iter(sampler)
    times = []
    for epoch in range(1, 4):
        sampler.update(losses, everything)
        at = time.perf_counter()
        sampler.set_epoch(epoch)
        iter(sampler)
        times.append(time.perf_counter() - at)
    return statistics.median(times)


def waiting(device: torch.device) -> dict[str, float]:
    """Time a report, and `.item()`, while the device has a tenth of a second of work before it."""
    sampler = HardBatchSampler(EXAMPLES, 50, 0.5, mode="sample")
    matrix = torch.randn(8192, 8192, device=device)
    indices = torch.arange(50, device=device)
    losses = torch.rand(50, device=device)
    calls = {"update": lambda: sampler.update(losses, indices), "item": lambda: losses[0].item()}
    found = {}
    for name, call in calls.items():
        times = []
        for _ in range(5):
            for _ in range(5):
                matrix @ matrix
            at = time.perf_counter()
            call()
            times.append(time.perf_counter() - at)
            torch.cuda.synchronize(device)
        found[name] = statistics.median(times) * 1e6
        print(f"  {name:8s} {found[name]:10.1f} us")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device_argument, default=default)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = options.device
    cuda = device.type == "cuda"
    found: dict[str, Any] = {"date": date.today().isoformat()}
    for batch in (32, 512):
        print(f"a batch of {batch}, {EXAMPLES:,} examples")
        found[f"batch {batch}"] = per_batch(batch, device)
    batch = 512 if cuda else 32
    step = training_step(batch, device)
    found["step"] = {"ms": step * 1e3, "overhead": {}}
    print(f"ResNet-18, batch {batch}: a step takes {step * 1e3:.1f} ms; of it, target 0.5 %, take")
    for name, row in found[f"batch {batch}"].items():
        share = found["step"]["overhead"][name] = row["us"] / step / 1e6
        print(f"  {name:28s} {100 * share:8.3f} %")
    print("selection")
    found["selection"] = selection()
    if cuda:
        print("host time of a call while the device is busy")
        found["waiting"] = waiting(device)
    if options.json:
        found["environment"] = environment(device)
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
