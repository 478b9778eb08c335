# SPDX-License-Identifier: Apache-2.0
r"""WSD: a learning rate that warms up, stays constant, and decays when you decide to stop.

Use it when the end of training is not known at its start: to extend a run, to read off the loss at
several data sizes from one run, or to stop on a budget. Do not compare an undecayed point with the
end of a cosine run: only a decayed branch is a finished model. Where one fixed budget is all there
will ever be, cosine does as well.

With W the end of warm-up, T the start of the decay, D its length and p = (s-T) / D, the learning
rate of update s+1 is lr · f(s), s being the number of updates already made:

    s < W             f = w0 + (1-w0) · (s+offset) / W
    W <= s <= T       f = 1
    T < s < T+D       f = ρ + (1-ρ) · h(p)        h: 1-p, (1+cos πp)/2, 1-√p, √(1-p), 1-p²
                      f = ρ^p                     "exp"
                      f = 0.5^((s-T)/H)           "exp" with half-life H, the paper's
                      f = 1 / (p/ρ + 1-p)         "inverse"
    s >= T+D          f = f(T+D)

Reference: Hu et al., "MiniCPM: Unveiling the Potential of Small Language Models with Scalable
Training Strategies", COLM 2024, arXiv 2404.06395. The default shape, 1-√p to zero, is from Hägele
et al., arXiv 2405.18392.

Where we differ: the paper prints its decay as 0.5^((s-T)/T); the T below the line is a half-life in
steps, as in the authors' code, and read as the length of the stable phase it would hardly decay.
Their code has neither a floor nor an end; `num_decay` ends ours. We have no `resume_stable` (load
the stable phase's state, or `rewarm`) and no default batch-size law. The arguments of transformers
are in `batchery.optim.wsd_transformers`.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from batchery._core.state import check_fits
from batchery._core.validate import integer, number, one_of, require, require_type
from batchery.optim.wsd_curve import DecayShape, WarmupShape, check_shape, fall, rise

Unit = Literal["steps", "samples", "tokens"]
Phase = Literal["warmup", "stable", "decay", "done"]


class WSDScheduler(LRScheduler):
    """Warm-up, stable phase and a decay that may be planned or decided while training.

    Every group keeps its own peak rate and follows the same factor, so that muP groups stay in
    proportion. A rate that is a tensor is filled in place, without a host sync.

    Args:
        optimizer: whose groups' `lr` is the peak.
        num_warmup: length of the warm-up, in `unit`.
        num_training: planned total, in `unit`; None leaves the stable phase open until
            `start_decay`.
        num_decay: length of the decay: an int in `unit`, or a fraction of the total in (0, 1].
            For a decay started at s, a fraction φ means s · φ / (1-φ), so that it is φ of the
            total it ends at.
        shape: form of the decay.
        min_ratio: ρ, the factor at the end.
        half_life: for shape `"exp"`: in `unit`, the paper's form.
        warmup_start_ratio: the factor at the start.
        warmup_shape: form of the warm-up.
        offset: 1 gives the first update of a warm-up a rate above 0.
        unit: what `step(n)` counts. With a batch size that changes, count samples or tokens.
        on_end: what `step` does after the end: hold the last rate, or raise.
        decouple_wd: keep lr · weight decay at its peak value, as AdamW's decay would else fall
            with the rate. It changes `weight_decay` in the groups.
        last_epoch: units already made, less 1, as in every torch scheduler; prefer
            `load_state_dict`.

    Raises:
        ValueError: a length, fraction or shape that makes no sense, or warm-up and decay longer
            than the whole; a `last_epoch` of 0 or more on an optimizer without peak rates.

    Examples:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> scheduler = WSDScheduler(optimizer, num_warmup=2, num_decay=2, shape="linear")
        >>> rates = []
        >>> for step in range(7):
        ...     if step == 4:
        ...         length = scheduler.start_decay()
        ...     rates.append(optimizer.param_groups[0]["lr"])
        ...     optimizer.step()
        ...     scheduler.step()
        >>> rates
        [0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        num_warmup: int,
        num_training: int | None = None,
        num_decay: int | float = 0.1,
        *,
        shape: DecayShape = "1-sqrt",
        min_ratio: float = 0.0,
        half_life: float | None = None,
        warmup_start_ratio: float = 0.0,
        warmup_shape: WarmupShape = "linear",
        offset: int = 0,
        unit: Unit = "steps",
        on_end: Literal["hold", "raise"] = "hold",
        decouple_wd: bool = False,
        last_epoch: int = -1,
    ) -> None:
        """Check the plan and set the first rate; see the class."""
        owner = type(self).__name__
        check_shape(owner, shape, warmup_shape, min_ratio, half_life, warmup_start_ratio, offset)
        one_of(owner, "unit", unit, get_args(Unit))
        one_of(owner, "on_end", on_end, ("hold", "raise"))
        integer(owner, "last_epoch", last_epoch, at_least=-1)
        # Plain numbers, so that a saved state loads with weights_only.
        self.num_warmup = int(integer(owner, "num_warmup", num_warmup, at_least=0))
        self.num_training = num_training
        self.num_decay = self._length("num_decay", num_decay, open_end=num_training is None)
        self.shape = shape
        self.min_ratio = float(min_ratio)
        self.half_life = None if half_life is None else float(half_life)
        self.warmup_start_ratio = float(warmup_start_ratio)
        self.warmup_shape = warmup_shape
        self.offset = int(offset)
        self.unit = unit
        self.on_end = on_end
        self.decouple_wd = decouple_wd
        self.decay_start: int | None = None
        self.decay_length = 0
        self._decay_from = 1.0  # factor at which the decay starts: < 1 when it cuts a warm-up
        self._rewarm_start: int | None = None
        self._rewarm_length = 0
        if num_training is not None:
            total = int(integer(owner, "num_training", num_training, at_least=1))
            self.num_training = total
            length = self.num_decay
            if isinstance(length, float):
                length = max(1, round(length * total))
            rule = f"must be >= num_warmup + num_decay = {num_warmup} + {length}"
            require(num_warmup + length <= total, owner, "num_training", rule, total)
            self.decay_start, self.decay_length = total - length, length
        if last_epoch >= 0:
            known = all("initial_lr" in group for group in optimizer.param_groups)
            rule = "needs an optimizer with initial_lr in its groups: use load_state_dict"
            require(known, owner, "last_epoch", rule, last_epoch)
        super().__init__(optimizer, last_epoch)

    def _initial_step(self) -> None:
        """Read the peaks and set the first rate; the base class calls it, once."""
        self._step_count = 1
        self.last_epoch += 1
        self.base_lrs = [float(lr) for lr in self.base_lrs]
        groups = self.optimizer.param_groups
        self.base_wds: list[float] = []
        if self.decouple_wd:
            decays = all("weight_decay" in group for group in groups)
            rule = "needs an optimizer whose groups have weight_decay"
            require(decays, type(self).__name__, "decouple_wd", rule, type(self.optimizer).__name__)
            # Like torch's initial_lr: a scheduler rebuilt on a decayed optimizer finds the peak.
            self.base_wds = [
                float(group.setdefault("initial_weight_decay", group["weight_decay"]))
                for group in groups
            ]
        self._write()

    def _length(self, argument: str, value: int | float, *, open_end: bool) -> int | float:
        owner = type(self).__name__
        if not isinstance(value, float):
            return int(integer(owner, argument, value, at_least=1))
        number(owner, argument, value, above=0, at_most=1)
        rule = "must be < 1 as a fraction of a total that is not known yet"
        require(value < 1 or not open_end, owner, argument, rule, value)
        return float(value)

    @property
    def phase(self) -> Phase:
        """Where the schedule stands: `"warmup"` (also a re-warm), `"stable"`, `"decay"`, `"done"`.

        A decay that was started but has not yet lowered the rate counts as `"decay"`.
        """
        position, start = self.last_epoch, self.decay_start
        if start is not None and position >= start:
            return "done" if position >= start + self.decay_length else "decay"
        again = self._rewarm_start
        if again is not None and position < again + self._rewarm_length:
            return "warmup"
        return "warmup" if position < self.num_warmup else "stable"

    def factor(self) -> float:
        """Return the factor on every group's peak rate for the next update."""
        position, start = self.last_epoch, self.decay_start
        if start is not None and position >= start:
            return self._decay_from * fall(
                position - start, self.decay_length, self.shape, self.min_ratio, self.half_life
            )
        again, length = self._rewarm_start, self._rewarm_length
        value = 1.0
        if again is not None and position < again + length:
            value = rise(position - again, length, "linear", 0.0, self.offset)
        if position < self.num_warmup:
            value *= rise(
                position, self.num_warmup, self.warmup_shape, self.warmup_start_ratio, self.offset
            )
        return value

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of every group for the next update."""
        factor = self.factor()
        return [base * factor for base in self.base_lrs]

    def step(self, n: int | None = None) -> None:
        """Count `n` units and set the rates; call it after the optimizer's step.

        Args:
            n: samples or tokens of the global batch of the update just made. Steps need none.

        Raises:
            TypeError: `n` is not an integer.
            ValueError: `n` is negative, or missing although the unit is not steps.
            RuntimeError: the schedule had ended and `on_end` is `"raise"`.
        """
        owner = type(self).__name__
        if n is None:
            require(self.unit == "steps", owner, "n", f"must be a number of {self.unit}", n)
            n = 1
        else:
            n = int(integer(owner, "n", n, at_least=0))
        if self.on_end == "raise" and self.phase == "done":
            raise RuntimeError(f"{owner}: the decay ended at {self.last_epoch} {self.unit}")
        if self._step_count == 1 and not getattr(self.optimizer, "_opt_called", False):
            warnings.warn("call optimizer.step() before scheduler.step()", stacklevel=2)
        self._step_count += 1
        self.last_epoch += n
        self._write()

    def _write(self) -> None:
        groups, known = self.optimizer.param_groups, len(self.base_lrs)
        if len(groups) != known:
            rule = f"must keep the {known} groups it had: add groups before the scheduler is built"
            raise ValueError(f"{type(self).__name__}: optimizer {rule}, got {len(groups)}")
        factor, self._last_lr = self.factor(), self.get_lr()
        for group, rate in zip(groups, self._last_lr, strict=True):
            held = group["lr"]
            if isinstance(held, Tensor):
                held.fill_(rate)  # in place: fused kernels and CUDA graphs keep its address
            else:
                group["lr"] = rate
        if self.base_wds and factor > 0:  # at a rate of 0 there is nothing to decay with
            for group, decay in zip(groups, self.base_wds, strict=False):
                group["weight_decay"] = decay / factor

    def decay_length_from_here(self, num_decay: int | float | None = None) -> int:
        """Return how many units a decay that starts now would take; see `start_decay`."""
        given = self.num_decay if num_decay is None else num_decay
        length = self._length("num_decay", given, open_end=True)
        if isinstance(length, float):
            return max(1, round(self.last_epoch * length / (1.0 - length)))
        return length

    def start_decay(self, num_decay: int | float | None = None) -> int:
        """Start the decay now, in place of a planned one.

        In a warm-up it starts from the rate that has been reached.

        Args:
            num_decay: its length in `unit`, or as the fraction of the total it will end at; by
                default as given to the scheduler.

        Returns:
            The length of the decay in `unit`.

        Raises:
            ValueError: the decay has already started (the message says where), or the rate is
                still 0, at the start of a warm-up.

        Examples:
            >>> import torch
            >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
            >>> scheduler = WSDScheduler(optimizer, num_warmup=0, unit="tokens")
            >>> optimizer.step()
            >>> scheduler.step(900)
            >>> scheduler.start_decay(), scheduler.phase  # a tenth of the 1,000 it will end at
            (100, 'decay')
        """
        for name, value in self._plan_from_here("start_decay", num_decay).items():
            setattr(self, name, value)
        return self.decay_length

    def fork(self, num_decay: int | float | None = None) -> dict[str, Any]:
        """Return the state of a branch that decays from here; this schedule goes on unchanged.

        Load it into a scheduler built with the same arguments, beside copies of the weights and of
        the optimizer's state, and go on with the same order of data.

        Args:
            num_decay: as in `start_decay`.

        Examples:
            >>> import torch
            >>> def build():
            ...     weight = torch.nn.Parameter(torch.zeros(1))
            ...     return WSDScheduler(torch.optim.SGD([weight], lr=1.0), num_warmup=0)
            >>> trunk, branch = build(), build()
            >>> branch.load_state_dict(trunk.fork(num_decay=5))
            >>> trunk.phase, branch.phase, branch.time_left()
            ('stable', 'decay', 5)
        """
        return self.state_dict() | self._plan_from_here("fork", num_decay)

    def _plan_from_here(self, method: str, num_decay: int | float | None) -> dict[str, Any]:
        """Return the part of the state that plans the decay, for one that starts now."""
        length = self.decay_length_from_here(num_decay)
        if self.phase in ("decay", "done"):
            raise ValueError(
                f"{type(self).__name__}: {method} must come before a decay, "
                f"got one that started at {self.decay_start} {self.unit}"
            )
        factor, rule = self.factor(), "needs a rate above 0 to fall from: step first, or offset=1"
        require(factor > 0, type(self).__name__, method, rule, factor)
        return {"decay_start": self.last_epoch, "decay_length": length, "_decay_from": factor}

    def rewarm(self, n: int) -> None:
        """Climb linearly from 0 to the peak over `n` units from here; 0 jumps to the peak.

        After a decay it opens a new stable phase (as WSD-S does); before one, a plan stays.

        Raises:
            ValueError: `n` is negative, or reaches past the start of a planned decay.

        Examples:
            >>> import torch
            >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
            >>> scheduler = WSDScheduler(optimizer, num_warmup=0)
            >>> scheduler.rewarm(4)
            >>> scheduler.phase, optimizer.param_groups[0]["lr"]
            ('warmup', 0.0)
        """
        owner = type(self).__name__
        integer(owner, "n", n, at_least=0)
        if self.phase in ("decay", "done"):
            self.decay_start, self.decay_length = None, 0
            self._decay_from = 1.0
        elif self.decay_start is not None:
            room = self.decay_start - self.last_epoch
            require(n <= room, owner, "n", f"must be <= {room}, where the decay starts", n)
        self._rewarm_start, self._rewarm_length = self.last_epoch, n
        self._write()

    def time_left(self) -> float:
        """Return the units left to the end of the decay; infinity while the end is open."""
        if self.decay_start is None:
            return math.inf
        return max(0, self.decay_start + self.decay_length - self.last_epoch)

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _SETTINGS}

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state: settings, peaks, position, decay and re-warm; plain values."""
        state = self._settings() | {name: getattr(self, name) for name in _STATE}
        for name in ("base_lrs", "base_wds", "_last_lr"):
            state[name] = list(getattr(self, name))
        return state

    def load_state_dict(self, state_dict: dict[str, Any], *, strict: bool = True) -> None:
        """Load a state of `state_dict` or `fork`, and set the rates that belong to it.

        Args:
            state_dict: the saved state.
            strict: refuse a state made with other settings. Otherwise this object's settings
                stay, and so does its plan unless the saved decay had started.

        Raises:
            ValueError: it is no state of this class, has another number of groups, or settings
                differ (strict; both values are named) or would have started the decay before.
            TypeError: it is no mapping.
        """
        owner = type(self).__name__
        mapping = isinstance(state_dict, Mapping)
        require_type(mapping, owner, "state_dict", "must be a mapping", state_dict)
        settings = self._settings()
        expected = settings if strict else {"unit": self.unit}
        check_fits(owner, state_dict, expected)
        for name in (*_STATE, "base_lrs", "base_wds"):
            require(name in state_dict, owner, "state_dict", f"must hold {name!r}", [*state_dict])
        found, groups = len(state_dict["base_lrs"]), len(self.optimizer.param_groups)
        require(found == groups, owner, "base_lrs", f"must be of {groups} groups", found)
        start, at = state_dict["decay_start"], state_dict["last_epoch"]
        saved_plan = strict or (start is not None and at >= start)
        if not saved_plan and self.decay_start is not None:
            rule = f"must put the decay after {at}, where the saved run is"
            require(at <= self.decay_start, owner, "num_training", rule, self.num_training)
        for name in _STATE:
            if saved_plan or name not in _PLAN:
                setattr(self, name, state_dict[name])
        self.base_lrs = list(state_dict["base_lrs"])
        if len(state_dict["base_wds"]) == len(self.base_wds):
            self.base_wds = list(state_dict["base_wds"])
        self._write()

    def __repr__(self) -> str:
        """Show the settings that differ between runs, and the position."""
        return (
            f"{type(self).__name__}(num_warmup={self.num_warmup}, "
            f"num_training={self.num_training}, num_decay={self.num_decay}, "
            f"shape={self.shape!r}, min_ratio={self.min_ratio}, unit={self.unit!r}, "
            f"at={self.last_epoch}, phase={self.phase!r})"
        )


_SETTINGS = (
    "num_warmup",
    "num_training",
    "num_decay",
    "shape",
    "min_ratio",
    "half_life",
    "warmup_start_ratio",
    "warmup_shape",
    "offset",
    "unit",
    "on_end",
    "decouple_wd",
)
_PLAN = ("decay_start", "decay_length", "_decay_from")
_STATE = ("last_epoch", "_step_count", *_PLAN, "_rewarm_start", "_rewarm_length")
