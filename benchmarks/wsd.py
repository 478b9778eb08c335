# SPDX-License-Identifier: Apache-2.0
"""WSDScheduler and muP beside their peers, in one run, as ratios.

The scheduler's step by number of groups, beside LambdaLR (with the WSD of transformers) and
CosineAnnealingLR; with rates in CUDA tensors, where nothing may wait for the device. A training
step of the lab's Llama in muP, beside the plain model and beside multipliers in the forward pass.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from transformers import get_wsd_schedule as peer_schedule

from batchery.cli import device_argument
from batchery.optim import WSDScheduler
from batchery.optim.wind_tunnel import MuP
from batchery.studies.graphs import captured
from batchery.studies.harness import environment
from batchery.studies.lab import SIZES, new_model
from batchery.studies.lab_loop import causal_attention, token_losses

WARMUP, TOTAL, DECAY = 1_000, 1_000_000, 900_000  # most steps timed lie in the decay
TARGET_US = 3.0  # per group, on the CPU
Make = Callable[[Optimizer], LRScheduler]

SCHEDULERS: dict[str, Make] = {
    "WSDScheduler": lambda optimizer: WSDScheduler(optimizer, WARMUP, TOTAL, DECAY),
    "LambdaLR (transformers)": lambda optimizer: peer_schedule(optimizer, WARMUP, DECAY, TOTAL),
    "CosineAnnealingLR": lambda optimizer: CosineAnnealingLR(optimizer, TOTAL),
}


def optimizer_of(groups: int, device: torch.device, tensor_lr: bool) -> Optimizer:
    def lr() -> Any:
        return torch.tensor(0.1, device=device) if tensor_lr else 0.1

    rows = [
        {"params": [nn.Parameter(torch.zeros(1, device=device))], "lr": lr()} for _ in range(groups)
    ]
    return torch.optim.AdamW(rows, fused=tensor_lr and device.type == "cuda")


def started(make: Make, groups: int, device: torch.device, tensor_lr: bool) -> LRScheduler:
    """Build a scheduler and bring it past its warm-up, so that the decay is what is timed."""
    scheduler = make(optimizer_of(groups, device, tensor_lr))
    scheduler.optimizer.step()
    scheduler.step()
    if isinstance(scheduler, WSDScheduler):
        scheduler.step(2 * (TOTAL - DECAY))
    else:
        scheduler.last_epoch = 2 * (TOTAL - DECAY)
    return scheduler


def microseconds(scheduler: LRScheduler, calls: int, repeats: int) -> float:
    """Median over repeats of the time of one step."""
    times = []
    for _ in range(repeats):
        at = time.perf_counter()
        for _ in range(calls):
            scheduler.step()
        times.append((time.perf_counter() - at) / calls)
    return statistics.median(times) * 1e6


def compare_steps(
    device: torch.device, tensor_lr: bool, repeats: int, counts: Sequence[int] = (1, 2, 8, 32)
) -> list[dict[str, Any]]:
    kind = f"rates in {device.type} tensors" if tensor_lr else "rates as numbers"
    print(f"step(), {kind}: microseconds per call (per group), ratio to LambdaLR")
    rows = []
    for groups in counts:
        found = {
            name: microseconds(started(make, groups, device, tensor_lr), 500, repeats)
            for name, make in SCHEDULERS.items()
        }
        base = found["LambdaLR (transformers)"]
        for name, us in found.items():
            print(
                f"{groups:4d} groups  {name:24s} {us:8.2f} ({us / groups:5.2f})  {us / base:5.2f}"
            )
        rows.append({"groups": groups, "us": found})
    ours = max(row["us"]["WSDScheduler"] / row["groups"] for row in rows)
    if not tensor_lr:
        print(f"worst per group: {ours:.2f} us, target {TARGET_US:g}")
    return rows


def waits_for_device(make: Make) -> bool:
    """Say whether a step with a rate in a CUDA tensor makes the host wait."""
    scheduler = started(make, 4, torch.device("cuda"), tensor_lr=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            scheduler.step()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def multiply(factor: float) -> Callable[..., Any]:
    def hook(module: nn.Module, arguments: Any, output: Any) -> Any:
        return output * factor

    return hook


def models(size: str, device: torch.device) -> dict[str, tuple[Any, Optimizer]]:
    """Return plain, muP in the weights, and muP as the paper's code has it, with an optimizer."""
    shape = SIZES[size]
    mup = MuP(shape.hidden // 4)
    adamw = partial(torch.optim.AdamW, lr=1e-3, fused=True)
    plain = new_model(shape).to(device)
    folded = mup.apply(new_model(shape)).to(device)
    hooked = new_model(shape).to(device)
    hooked.model.embed_tokens.register_forward_hook(multiply(mup.scale_emb))
    hooked.model.norm.register_forward_hook(multiply(0.25))
    for layer in hooked.model.layers:
        for branch in (layer.self_attn.o_proj, layer.mlp.down_proj):
            branch.register_forward_hook(multiply(mup.scale_depth / shape.layers**0.5))
    return {
        "plain": (plain, adamw(plain.parameters())),
        "muP, in the weights": (folded, adamw(mup.param_groups(folded, lr=1e-3))),
        "muP, forward multipliers": (hooked, adamw(hooked.parameters())),
    }


def compare_models(size: str, device: torch.device, repeats: int) -> dict[str, Any]:
    """Time forward and whole steps of the three models in turn, so that all drift alike.

    On CUDA the passes are graphs: else the host, which launches them, decides and not the device.
    """
    shape = SIZES[size]
    batch = min(shape.batch, 8) if device.type == "cpu" else shape.batch
    rows = torch.randint(shape.vocabulary, (batch, shape.context + 1), device=device)
    contenders = models(size, device)
    times: dict[str, dict[str, list[float]]] = {
        name: {"forward": [], "step": []} for name in contenders
    }
    losses = {}
    for name, (model, _) in contenders.items():
        with causal_attention(model):
            losses[name] = captured(model, token_losses, rows)
    for turn in range(repeats + 2):
        for name, (_, optimizer) in contenders.items():
            marks = [_now(device)]
            loss = losses[name](rows).mean()
            marks.append(_now(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            marks.append(_now(device))
            if turn >= 2:
                times[name]["forward"].append(marks[1] - marks[0])
                times[name]["step"].append(marks[2] - marks[0])
    print(f"training step of the lab's Llama {size!r} on {device.type}: ms, ratio to plain")
    found: dict[str, Any] = {}
    for name, parts in times.items():
        found[name] = {}
        line = ""
        for part, seconds in parts.items():
            ms = statistics.median(seconds) * 1e3
            # The median of the ratios of neighbours: a machine that slows down slows both.
            pairs = zip(seconds, times["plain"][part], strict=True)
            ratio = statistics.median(mine / plain for mine, plain in pairs)
            found[name] |= {f"{part}_ms": ms, f"{part}_ratio": ratio}
            line += f"  {part} {ms:8.2f} {ratio:6.3f}"
        print(f"{name:26s}{line}")
    return found


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device_argument, default=default)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = options.device
    found: dict[str, Any] = {"date": date.today().isoformat()}
    cpu = torch.device("cpu")
    found["numbers"] = compare_steps(cpu, False, options.repeats)
    if device.type == "cuda":
        found["tensors"] = compare_steps(device, True, options.repeats)
        found["waits"] = {name: waits_for_device(make) for name, make in SCHEDULERS.items()}
        for name, waits in found["waits"].items():
            print(f"{name:24s} {'waits' if waits else 'does not wait'} for the device")
    else:
        torch.set_num_threads(2)
        found["tensors"] = compare_steps(cpu, True, options.repeats)
    size = "small" if device.type == "cuda" else "nano"
    found["mup"] = compare_models(size, device, 2 * options.repeats)
    ours = found["numbers"][0]["us"]["WSDScheduler"]
    share = 100 * ours / 1e3 / found["mup"]["plain"]["step_ms"]
    print(f"a step of WSDScheduler is {share:.4f} % of a training step")
    if options.json:
        found["environment"] = environment(device)
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
