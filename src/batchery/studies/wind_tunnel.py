# SPDX-License-Identifier: Apache-2.0
"""The wind tunnel of the study `wsd`: runs that can be forked, muP's transfer, the scaling law.

Everything here trains the lab's Llama on characters of Python's standard-library source. `Run` and
`stable_run` also carry the perceptron of the schedules' part, which `wsd.py` brings.
"""

from __future__ import annotations

import copy
import functools
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from batchery._core.random import new_generator
from batchery.optim import WSDScheduler
from batchery.optim.wind_tunnel import MuP, fit_batch_size_law, fit_scaling_law
from batchery.studies.char import VOCABULARY, char_text, windows
from batchery.studies.lab import LabSize, new_model
from batchery.studies.lab_loop import Graphs, held_out_loss, train
from batchery.studies.study import Outcome, Scale, Trial
from batchery.studies.tuning import walk

DECAY = 0.1  # share of the steps
TUNING_SEED = 1_000  # apart from the seeds that are judged
_MARKS = np.geomspace(0.05, 1.0, 8)  # of the steps: where the batch-size law is read


class Task(Protocol):
    """A model and its data, trained by AdamW."""

    def new_model(self, seed: int) -> nn.Module:
        """Return a model with fresh weights, on its device."""

    def groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """Return the parameter groups of AdamW."""

    def advance(self, run: Run, steps: int) -> None:
        """Make further steps, on the data that belong to them."""

    def held_out(self, model: nn.Module) -> float:
        """Return the held-out loss in nats per character."""


class Run:
    """A training run that can be forked: weights, optimizer, schedule and order of data."""

    def __init__(
        self, task: Task, seed: int, lr: float, schedule: Callable[[Optimizer], LRScheduler]
    ) -> None:
        """Start from fresh weights."""
        self.task, self.seed, self._lr, self._schedule = task, seed, lr, schedule
        self._wire(task.new_model(seed))

    def _wire(self, model: nn.Module) -> None:
        self.model = model
        self.graphs: Graphs = {}
        groups = self.task.groups(model, self._lr)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        self.schedule = self._schedule(self.optimizer)

    @property
    def step(self) -> int:
        """Updates made."""
        return int(self.schedule.last_epoch)

    def advance(self, to: int) -> Run:
        """Train until `to` updates are made."""
        self.task.advance(self, to - self.step)
        return self

    def loss(self) -> float:
        """Return the held-out loss; infinity once the run has diverged."""
        found = self.task.held_out(self.model)
        return found if math.isfinite(found) else math.inf

    def fork(self, num_decay: int) -> Run:
        """Return a run that decays from here; this one goes on unchanged."""
        branch = copy.copy(self)
        branch._wire(copy.deepcopy(self.model))
        branch.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        branch.schedule.load_state_dict(self.schedule.fork(num_decay))  # type: ignore[attr-defined]
        return branch


def examples(seed: int, step: int, batch: int, context: int) -> Tensor:
    """Draw what step `step` of a seed trains on, whichever run makes the step."""
    return windows(char_text()[0], batch, context, new_generator(seed, "order", step))


@dataclass(frozen=True)
class StableRun:
    """What one stable run with its branches measured, by budget."""

    decayed: dict[float, list[float]]  # share of the decay → losses at the ends of its branches
    before: list[float]  # losses where the longest decay begins; only with several shares
    undecayed: list[float]  # losses at the budgets themselves, without a decay; likewise
    steps: int  # of the stable run up to the last branch, and its branches with the longest decay


def stable_run(
    task: Task,
    seed: int,
    lr: float,
    warmup: int,
    budgets: Sequence[int],
    shares: Sequence[float] = (DECAY,),
) -> StableRun:
    """Train one stable run; for every budget and share fork a decay that ends on the budget."""
    run = Run(task, seed, lr, lambda optimizer: WSDScheduler(optimizer, warmup, offset=1))
    lengths = {(share, end): max(1, round(share * end)) for end in budgets for share in shares}
    longest = [lengths[max(shares), end] for end in budgets]
    ends = {(share, end): end - length for (share, end), length in lengths.items()}
    plain = budgets if len(shares) > 1 else ()
    found: dict[tuple[float, int], float] = {}
    before: dict[int, float] = {}
    undecayed: dict[int, float] = {}
    for at in sorted({*ends.values(), *plain}):
        run.advance(at)
        if at in plain:
            undecayed[at] = run.loss()
        for share, end in [key for key, start in ends.items() if start == at]:
            if plain and share == max(shares):
                before[end] = run.loss()
            found[share, end] = run.fork(end - at).advance(end).loss()
    return StableRun(
        {share: [found[share, end] for end in budgets] for share in shares},
        [before[end] for end in budgets if plain],
        [undecayed[end] for end in budgets if plain],
        budgets[-1] - longest[-1] + sum(longest),
    )


# the lab's Llama


@dataclass(frozen=True)
class LlamaTask:
    """The lab's Llama on characters, in standard parametrisation or in muP."""

    size: LabSize
    device: torch.device
    mup: MuP | None = None

    def new_model(self, seed: int) -> nn.Module:
        """Return a model with fresh weights."""
        model: nn.Module = new_model(self.size, seed)
        return (model if self.mup is None else self.mup.apply(model)).to(self.device)

    def groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """Return one group, or those of muP; nothing is decayed, so that rates alone differ."""
        if self.mup is None:
            return [{"params": list(model.parameters()), "lr": lr, "weight_decay": 0.0}]
        return self.mup.param_groups(model, lr, weight_decay=0.0)

    def advance(self, run: Run, steps: int) -> None:
        """Train on the examples of steps `run.step` and on."""
        rows = (
            examples(run.seed, step, self.size.batch, self.size.context).to(self.device)
            for step in range(run.step, run.step + steps)
        )
        wired = (run.optimizer, run.schedule, steps)
        train(run.model, rows, *wired, micro_batch=self.size.batch, graphs=run.graphs)

    def held_out(self, model: nn.Module) -> float:
        """Return the loss on windows that are the same for every run."""
        return held_out_loss(model, char_text()[1], self.size.context)

    @functools.cached_property
    def parameters(self) -> int:
        """N: parameters without the embedding, which the head shares."""
        model = new_model(self.size)
        count = sum(parameter.numel() for parameter in model.parameters())
        return int(count - model.get_input_embeddings().weight.numel())


def llama(
    width: int, layers: int, *, batch: int, context: int, steps: int = 0, head: int = 64
) -> LabSize:
    """Return a size of the lab's Llama on characters; steps and rate are the study's business."""
    heads = max(1, width // head)
    name = f"char-{layers}x{width}"
    return LabSize(
        name, width, layers, heads, heads, context, batch, steps, 0.0, vocabulary=VOCABULARY
    )


@dataclass(frozen=True)
class Tunnel:
    """How large the wind tunnel is at a scale."""

    widths: tuple[LabSize, ...]  # the rate is found at the first; it must hold at the others
    start: float  # of the walk at the first width
    warmup: int
    sizes: tuple[LabSize, ...]  # of the scaling law; the last is predicted, not fitted
    budgets: tuple[int, ...]  # steps of the law's branches
    bootstrap: int = 0  # refits of the law, for its intervals
    batches: tuple[LabSize, ...] = ()  # of the batch-size law: one model, batches that double


def _tiny(width: int, steps: int = 0) -> LabSize:
    return llama(width, 1, batch=8, context=32, steps=steps, head=16)


def _full(width: int, layers: int, steps: int = 0, batch: int = 64) -> LabSize:
    return llama(width, layers, batch=batch, context=256, steps=steps)


TUNNELS: dict[Scale, Tunnel] = {
    "smoke": Tunnel(
        (_tiny(16, 8), _tiny(32, 8), _tiny(64, 8)),
        2**-7,
        2,
        tuple(map(_tiny, (16, 32, 48, 64))),
        (4, 8, 16),
    ),
    "cpu": Tunnel(
        tuple(_tiny(width, 120) for width in (16, 32, 64, 128)),
        2**-7,
        10,
        tuple(map(_tiny, (16, 32, 64, 128))),
        (80, 160, 320),
    ),
    "gpu": Tunnel(
        tuple(_full(width, 2, 150) for width in (128, 256, 512, 1024)),
        2**-7,
        20,
        (
            _full(128, 3),
            _full(192, 3),
            _full(256, 4),
            _full(384, 4),
            _full(512, 5),
            _full(768, 6),
        ),
        (50, 100, 160, 250, 400),
        bootstrap=100,
        # 2^21 characters each
        batches=tuple(_full(128, 2, 8_192 // batch, batch) for batch in (2, 4, 8, 16, 32)),
    ),
}


def tunnel_mup(tunnel: Tunnel) -> MuP:
    """Return the rules whose base is the first width: there they only make initial stds exact."""
    width = tunnel.widths[0].hidden
    return MuP(width, scale_emb=1.0, scale_depth=1.0, depth=None, init_std=width**-0.5)


def _walk(task: LlamaTask, seed: int, warmup: int, start: float) -> dict[str, Any]:
    """Walk from a rate to the best one for the loss at the end of the task's `steps`, by WSD."""
    steps = task.size.steps

    def schedule(optimizer: Optimizer) -> WSDScheduler:
        return WSDScheduler(optimizer, warmup, steps, DECAY, offset=1)

    return walk(lambda lr: [Run(task, seed, lr, schedule).advance(steps).loss()], start)


def prepare_tunnel(trial: Trial) -> dict[str, Any]:
    """Find the rate at the first width, and fit the batch-size law where the scale has one."""
    tunnel = TUNNELS[trial.scale]
    narrow = {"width": tunnel.widths[0].hidden}
    if trial.scale == "smoke":  # nothing is judged, so nothing is tuned
        return {"narrow": {**narrow, "lr": [tunnel.start], "tried": {}}}
    task = LlamaTask(tunnel.widths[0], trial.device)
    found = {"narrow": {**narrow, **_walk(task, TUNING_SEED, tunnel.warmup, tunnel.start)}}
    if tunnel.batches:
        found["batch_law"] = _batch_law(tunnel, found["narrow"]["lr"][0], trial)
    return found


def _batch_law(tunnel: Tunnel, lr: float, trial: Trial) -> dict[str, Any]:
    """Read the held-out loss along runs of several batch sizes at one rate, and fit the law."""
    losses: list[float] = []
    sizes: list[float] = []
    tokens: list[float] = []
    for size in tunnel.batches:
        batch = size.batch * size.context
        marks = sorted({max(4, round(size.steps * part)) for part in _MARKS})
        wired = (lr, min(tunnel.warmup, marks[0] // 2), marks)
        task = LlamaTask(size, trial.device)
        runs = [stable_run(task, TUNING_SEED + i, *wired).decayed[DECAY] for i in range(2)]
        losses += map(statistics.fmean, zip(*runs, strict=True))
        sizes += [float(batch)] * len(marks)
        tokens += [float(batch * end) for end in marks]
    record: dict[str, Any] = {"losses": losses, "batch": sizes, "tokens": tokens}
    try:
        with warnings.catch_warnings():
            # Levels without a best batch inside are those that are missing from `best`.
            warnings.simplefilter("ignore", UserWarning)
            law = fit_batch_size_law(losses, sizes, tokens)
    except ValueError as error:  # too few levels have a best batch between smallest and largest
        return record | {"exponent": None, "reason": str(error)}
    fit = {"exponent": law.exponent, "coef": law.coef, "ci": law.ci["exponent"]}
    return record | fit | {"best": [list(point) for point in law.points]}


def transfer_arm(use_mup: bool) -> Callable[[Trial], Outcome]:
    """Return the arm that walks at every wider width of the row, from the first one's rate."""

    def run(trial: Trial) -> Outcome:
        tunnel = TUNNELS[trial.scale]
        mup = tunnel_mup(tunnel) if use_mup else None
        start = trial.prepared["tunnel"]["narrow"]["lr"][0]
        wider = tunnel.widths[1:]
        series: dict[str, list[float]] = {name: [] for name in ("width", "lr", "loss")}
        cells, regret, carried = [], [], []  # of each width
        for done, size in enumerate(wider):
            trial.progress(done, len(wider))
            task = LlamaTask(size, trial.device, mup)
            found = _walk(task, trial.seed, tunnel.warmup, start)
            losses = {float(lr): losses[0] for lr, losses in found["tried"].items()}
            series["width"] += [float(size.hidden)] * len(losses)
            series["lr"] += losses
            series["loss"] += losses.values()
            cells.append(float(found["cells"][0]))
            carried.append(found["tried"][f"{start:g}"][0])
            regret.append(carried[-1] - min(losses.values()))
        metrics = {
            "regret": regret[-1],
            "cells": abs(cells[-1]),
            "spread": max(map(abs, cells)),
            "loss_wide": carried[-1],
        }
        return Outcome(metrics, series | {"cells": cells, "regret": regret})

    return run


# the scaling law


@functools.lru_cache(maxsize=2)
def _grid(scale: Scale, device: torch.device, seed: int, lr: float) -> list[list[float]]:
    """Return rows (N, D, loss), one per branch: sizes in order, budgets within."""
    tunnel = TUNNELS[scale]
    rows = []
    for size in tunnel.sizes:
        task = LlamaTask(size, device, tunnel_mup(tunnel))
        found = stable_run(task, seed, lr, tunnel.warmup, tunnel.budgets)
        for end, loss in zip(tunnel.budgets, found.decayed[DECAY], strict=True):
            rows.append([task.parameters, end * size.batch * size.context, loss])
    return rows


def plane_prediction(known: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Predict losses by a plane through the logarithms: log L = a - b log N - c log D.

    Args:
        known: rows (N, D, L), shape (n, 3).
        asked: rows (N, D), shape (m, 2).

    Returns:
        Losses, shape (m,).
    """

    def design(rows: np.ndarray) -> np.ndarray:
        return np.column_stack([np.ones(len(rows)), np.log(rows[:, :2])])

    plane, *_ = np.linalg.lstsq(design(known), np.log(known[:, 2]), rcond=None)
    return np.asarray(np.exp(design(asked) @ plane))


def law_arm(with_floor: bool) -> Callable[[Trial], Outcome]:
    """Return the arm that predicts the largest model's losses from those of the smaller ones."""

    def run(trial: Trial) -> Outcome:
        tunnel = TUNNELS[trial.scale]
        lr = trial.prepared["tunnel"]["narrow"]["lr"][0]
        rows = np.array(_grid(trial.scale, trial.device, trial.seed, lr))
        cut = len(rows) - len(tunnel.budgets)
        known, asked = rows[:cut], rows[cut:]
        series = {"N": rows[:, 0].tolist(), "D": rows[:, 1].tolist(), "L": rows[:, 2].tolist()}
        if with_floor:
            with warnings.catch_warnings():
                # Neighbouring points of short runs are out of order by noise.
                warnings.simplefilter("ignore", UserWarning)
                law = fit_scaling_law(*known.T, bootstrap=tunnel.bootstrap)
            predicted = np.asarray(law.predict(asked[:, 0], asked[:, 1]))
            ends = law.ci if tunnel.bootstrap else {}
            series |= {name: [value, *ends.get(name, ())] for name, value in law.params.items()}
        else:
            predicted = plane_prediction(known, asked[:, :2])
        series["predicted"] = predicted.tolist()
        error = 100 * np.abs(predicted / asked[:, 2] - 1)
        return Outcome({"law_error": float(error.mean())}, series)

    return run
