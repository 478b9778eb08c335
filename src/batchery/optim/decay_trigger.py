# SPDX-License-Identifier: Apache-2.0
"""Starts a WSD decay inside a transformers Trainer, so that it ends on a budget.

Use it to fill a time slot, to spend a number of floating-point operations, or to finish well when
the cluster announces the end by a signal. Without a budget, plan the decay in the scheduler.

With e of the budget B spent in s updates and a decay of D further updates, the decay starts when

    e · (1 + D / s) >= B

For a decay that is a fraction φ of the whole, D = s · φ / (1-φ), which is e >= (1-φ) · B. The run
stops when the decay is done.

Reference: the schedule is that of Hu et al., arXiv 2404.06395; the trigger is ours.
"""

from __future__ import annotations

import signal as signals
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from batchery._core.dist import all_reduce_sum_, rank_and_size
from batchery._core.validate import import_extra, integer, number, require, require_type
from batchery.optim.wsd import WSDScheduler

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
else:
    TrainerCallback = import_extra("transformers", "hf", "DecayTrigger").TrainerCallback


class DecayTrigger(TrainerCallback):  # type: ignore[misc]
    """Trainer callback that calls `start_decay` in time for a budget, and stops after the decay.

    The Trainer must hold a `WSDScheduler` that counts steps, and `max_steps` or
    `num_train_epochs` large enough not to end first. Ranks decide together: the first that
    reaches its budget or gets the signal decides for all.

    The Trainer tells no callback when training raises, and the signal then stays with the trigger.
    Where that matters, train inside `with trigger:`, which gives it back either way.

    Args:
        seconds: wall-clock time from the start of `train()`, decay included.
        flops: floating-point operations of the whole run, all ranks and earlier parts of a
            resumed run included, as counted by `flops_per_step`.
        flops_per_step: operations of one update over all ranks, about 6 · parameters · tokens.
        signal: number of a signal that starts the decay at once, such as `signal.SIGUSR1`.
        num_decay: as in `WSDScheduler.start_decay`; by default the scheduler's own.
        save: ask for a checkpoint just before the decay, to go on from later.
        check_every: updates between two checks of clock and signal when there are several ranks;
            each is one small collective. Operations need none: all ranks count the same.
        process_group: ranks that decide together.

    Raises:
        ValueError: no budget and no signal, or `flops` without `flops_per_step`.

    Examples:
        >>> DecayTrigger(seconds=3600, num_decay=0.1)
        DecayTrigger(seconds=3600, flops=None, signal=None, num_decay=0.1)
    """

    def __init__(
        self,
        *,
        seconds: float | None = None,
        flops: float | None = None,
        flops_per_step: float | None = None,
        signal: int | None = None,
        num_decay: int | float | None = None,
        save: bool = True,
        check_every: int = 10,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Check the budgets; see the class."""
        owner = "DecayTrigger"
        budgets = (seconds, flops, signal)
        given = any(budget is not None for budget in budgets)
        require(given, owner, "seconds, flops or signal", "must be given", budgets)
        for name, value in (
            ("seconds", seconds),
            ("flops", flops),
            ("flops_per_step", flops_per_step),
        ):
            if value is not None:
                number(owner, name, value, above=0)
        paired = (flops is None) == (flops_per_step is None)
        require(paired, owner, "flops_per_step", "must be given with flops", flops_per_step)
        self.seconds = seconds
        self.flops = flops
        self.flops_per_step = flops_per_step
        self.signal = signal
        self.num_decay = num_decay
        self.save = save
        self.check_every = integer(owner, "check_every", check_every, at_least=1)
        self.process_group = process_group
        self._signalled = False
        self._handler: Any = None
        self._began = 0.0
        self._first_step = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Start the clock and listen for the signal."""
        scheduler = kwargs["lr_scheduler"]
        kind = isinstance(scheduler, WSDScheduler)
        require_type(kind, "DecayTrigger", "lr_scheduler", "must be a WSDScheduler", scheduler)
        unit = scheduler.unit
        require(unit == "steps", "DecayTrigger", "lr_scheduler.unit", "must be 'steps'", unit)
        self._began, self._first_step = time.monotonic(), state.global_step
        self._signalled = False
        if self.signal is not None:
            # Python delivers signals to the main thread only.
            main = threading.current_thread() is threading.main_thread()
            require(main, "DecayTrigger", "signal", "needs train() in the main thread", self.signal)
            before = signals.signal(self.signal, self._note_signal)
            if before != self._note_signal:  # else an earlier train() raised
                self._handler = before

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Start the decay when its time has come; stop when it is done."""
        scheduler: WSDScheduler = kwargs["lr_scheduler"]
        if scheduler.phase == "done":
            control.should_training_stop = True
        elif scheduler.phase == "decay" or scheduler.factor() == 0:
            return  # at a rate of 0, before the first update that counts, none can start
        elif self._due(state.global_step, scheduler, args.device):
            if self.save:
                # The Trainer saves after this call; its checkpoint then holds the started decay,
                # whose first rate is still the peak: `rewarm(0)` goes back to the stable phase.
                control.should_save = True
            scheduler.start_decay(self.num_decay)

    def _due(self, step: int, scheduler: WSDScheduler, device: torch.device) -> bool:
        ahead = scheduler.decay_length_from_here(self.num_decay)
        if self.flops is not None and self.flops_per_step is not None:
            if (step + ahead) * self.flops_per_step >= self.flops:
                return True
        due = self._signalled
        if self.seconds is not None:
            spent, here = time.monotonic() - self._began, step - self._first_step
            due |= spent * (1.0 + ahead / max(here, 1)) >= self.seconds
        if rank_and_size(self.process_group)[1] == 1:
            return due
        if step % self.check_every or (self.seconds is None and self.signal is None):
            return False
        return bool(all_reduce_sum_(torch.tensor(float(due), device=device), self.process_group))

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Give the signal back to whoever handled it before; nothing calls this on an exception."""
        self._give_back()

    def _give_back(self) -> None:
        if self.signal is not None and self._handler is not None:
            signals.signal(self.signal, self._handler)
            self._handler = None

    def __enter__(self) -> DecayTrigger:
        """Begin a block after which the signal is its earlier handler's, whatever happens in it."""
        return self

    def __exit__(self, *error: object) -> None:
        """Give the signal back, if training has not."""
        self._give_back()

    def __repr__(self) -> str:
        """Show the budgets."""
        return (
            f"DecayTrigger(seconds={self.seconds}, flops={self.flops}, signal={self.signal}, "
            f"num_decay={self.num_decay})"
        )
