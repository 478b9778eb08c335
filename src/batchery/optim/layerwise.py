# SPDX-License-Identifier: Apache-2.0
"""What LAMB and LARS share: the walk over parameters, from groups to the buckets of kernel calls.

A layer-wise optimizer scales each tensor's step by a ratio of norms. Which tensors adapt, and how
its learning rate follows the batch, is in `batchery.optim.large_batch`; what is known of shards in
`batchery.optim.shards`. Everything else about such an optimizer (choosing a form, clipping,
telemetry, saved state) is in `LayerwiseOptimizer`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, ParamsT

from batchery._core.validate import integer, number, one_of, require, require_type
from batchery.kernels.multi_tensor import (
    ChunkTable,
    HalfStep,
    Impl,
    fused_ready,
    require_fused,
    same_order,
)
from batchery.optim.shards import (
    Reduce,
    Shards,
    local_grad,
    local_part,
    reduction_of,
    shards_of,
    sum_together,
)

SHARED = ("foreach", "fused", "capturable", "max_grad_norm")  # settings that all groups have alike


@dataclass
class Bucket:
    """Parameters of one group that go through one kernel call; kept from step to step."""

    group: dict[str, Any]
    params: list[Tensor]  # as the user holds them
    states: dict[str, list[Tensor]]  # this rank's part of each state, by name
    shards: Shards | None
    reduce: Reduce | None
    impl: Impl
    table: ChunkTable | None  # for the fused form
    local: list[Tensor]  # this rank's part of each parameter
    grads: list[Tensor]  # this rank's part of each gradient of this step
    sharded: bool
    divisor: Tensor | None = None  # what this step divides gradients by (clipping, loss scale)
    found_inf: Tensor | None = None  # 1 where a GradScaler found a gradient that is not finite
    ratios: Tensor | None = None  # of the last step

    def refresh(self) -> None:
        """Take up this step's gradients."""
        if not self.sharded:
            self.grads = [p.grad for p in self.params if p.grad is not None]
            return
        self.local = [local_part(p) for p in self.params]
        self.grads = [local_grad(p) for p in self.params]


class LayerwiseOptimizer(Optimizer, ABC):
    """Base of LAMB and LARS: sorts parameters into buckets, each for one kernel call.

    A subclass names its tensors per parameter in `STATES` and its own settings that are True or
    False in `FLAGS`, checks its groups, makes its state, and in `step` hands the buckets of
    `begin_step` to its kernel.
    """

    STATES: tuple[str, ...] = ()
    FLAGS: tuple[str, ...] = ()

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        """Check the settings shared by all groups and build the groups."""
        self._forget()
        owner = type(self).__name__
        both = bool(defaults["foreach"]) and bool(defaults["fused"])
        require(not both, owner, "foreach and fused", "cannot both be True", (True, True))
        super().__init__(params, defaults)
        # Then GradScaler hands over its scale and flag instead of waiting for the flag itself.
        self._step_supports_amp_scaling = bool(defaults["fused"])

    def _forget(self) -> None:
        self._last: list[Bucket] = []
        self._plans: dict[int, tuple[object, list[Bucket]]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or a deep copy: tables and telemetry are made anew."""
        super().__setstate__(state)
        self._forget()
        self._step_supports_amp_scaling = bool(self.defaults["fused"])

    @abstractmethod
    def check_group(self, group: dict[str, Any]) -> None:
        """Raise when a group's settings make no sense."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its settings are checked like the constructor's."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        owner = type(self).__name__
        try:
            _check_rate(owner, "lr", group["lr"])
            _check_rate(owner, "weight_decay", group["weight_decay"])
            rule = "must be True, False or 'auto'"
            require(group["adapt"] in (True, False, "auto"), owner, "adapt", rule, group["adapt"])
            for name in ("maximize", "capturable", *self.FLAGS):
                one_of(owner, name, group[name], (True, False))
            for name in ("foreach", "fused"):
                one_of(owner, name, group[name], (None, True, False))
            for name in SHARED:
                own = self.defaults.get(name)
                rule = f"must be the same in all groups ({own!r})"
                require(group.get(name) == own, owner, name, rule, group.get(name))
            integer(owner, "blocks", group["blocks"], at_least=1)
            self.check_group(group)
            for parameter in group["params"]:
                _check_parameter(owner, parameter, group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def adapts(self, group: dict[str, Any]) -> bool:
        """Say whether a group's steps are scaled by norms."""
        return bool(group["weight_decay"] != 0 if group["adapt"] == "auto" else group["adapt"])

    def begin_step(self, closure: Callable[[], float] | None) -> tuple[float | None, list[Bucket]]:
        """Prepare a step; return the closure's loss, and the buckets with all that they need."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._last = [b for place in range(len(self.param_groups)) for b in self._plan(place)]
        divisor = self._divisor(self._last, getattr(self, "grad_scale", None))
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None:
            found_inf = found_inf.clamp(max=1.0)  # GradScaler adds up the flags of its devices
        here: dict[torch.device, list[Tensor | None]] = {}
        for bucket in self._last:
            device = bucket.local[0].device
            if device not in here:
                here[device] = [t if t is None else t.to(device) for t in (divisor, found_inf)]
            bucket.divisor, bucket.found_inf = here[device]
        return loss, self._last

    def make_step(self, buckets: Sequence[Bucket], begin: Callable[[Bucket], HalfStep]) -> None:
        """Make both passes over every bucket; one all-reduce sums the norms of all on one mesh."""
        alike: dict[object, tuple[Reduce, list[tuple[Bucket, HalfStep]]]] = {}
        for bucket in buckets:
            half = begin(bucket)
            if bucket.reduce is not None and self.adapts(bucket.group):
                together = (bucket.shards, half.squares.device)
                alike.setdefault(together, (bucket.reduce, []))[1].append((bucket, half))
            else:
                bucket.ratios = half.finish()
            del half  # or its tensors would be here while the next bucket makes its own
        for reduce, waiting in alike.values():
            sums = sum_together([half.squares for _, half in waiting], reduce)
            for (bucket, half), own in zip(waiting, sums, strict=True):
                bucket.ratios = half.apply(own)

    def _divisor(self, buckets: Sequence[Bucket], scale: Tensor | None) -> Tensor | None:
        """Return what all gradients are divided by, on the device, or None."""
        limit = self.defaults.get("max_grad_norm")
        if limit is None or not buckets:
            return scale
        alike: dict[object, list[Bucket]] = {}  # whose squares one collective sums
        for bucket in buckets:
            alike.setdefault((bucket.shards, bucket.grads[0].device), []).append(bucket)
        squares = []
        for group in alike.values():
            own = torch.stack([_squared_norm(bucket.grads) for bucket in group]).sum()
            squares.append(own if group[0].reduce is None else group[0].reduce(own))
        total = torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()
        if scale is not None:
            scale = scale.to(total.device)
            total = total / scale
        clip: Tensor = (total / limit).clamp(min=1.0)
        return clip if scale is None else clip * scale

    def _plan(self, place: int) -> list[Bucket]:
        """Return a group's buckets, made again only when its gradients or settings have changed.

        Sorting hundreds of parameters costs more time than a fused step on the device takes.
        """
        group = self.param_groups[place]
        grads = [p.grad for p in group["params"]]
        kinds = [None if g is None else (g.dtype, g.is_contiguous() or g.stride()) for g in grads]
        form = [group[name] for name in ("foreach", "fused", "capturable", "blocks")]
        seen = (kinds, form, self.plan_key(group))
        if place not in self._plans or self._plans[place][0] != seen:
            self._plans[place] = (seen, self._buckets(group))
        buckets = self._plans[place][1]
        for bucket in buckets:
            bucket.refresh()
        return buckets

    def plan_key(self, group: dict[str, Any]) -> object:
        """Return what else, besides gradients and forms, a group's buckets depend on."""
        return None

    def _buckets(self, group: dict[str, Any]) -> list[Bucket]:
        """Sort a group's parameters that have gradients by what one kernel call can take."""
        owner = type(self).__name__
        sorted_: dict[tuple[Any, ...], list[Tensor]] = {}
        for parameter in group["params"]:
            grad = parameter.grad
            if grad is None:
                continue
            require_type(not grad.is_sparse, owner, "gradients", "must be dense", grad)
            self.init_state(parameter, group)
            kept = [self.state[parameter].get(key) for key in self.STATES if key != "step"]
            alike = [parameter, grad, *(state for state in kept if state is not None)]
            key = (
                *(parameter.device, parameter.dtype, grad.dtype),
                shards_of(parameter),
                # One odd tensor keeps no others from fusing; ranks must make the same buckets.
                isinstance(parameter, DTensor) or same_order(alike, group["blocks"]),
                self.bucket_key(parameter),
            )
            sorted_.setdefault(key, []).append(parameter)
        buckets = []
        for params in sorted_.values():
            kept = [key for key in self.STATES if self.state[params[0]].get(key) is not None]
            bucket = Bucket(
                group=group,
                params=params,
                states={key: [local_part(self.state[p][key]) for p in params] for key in kept},
                shards=shards_of(params[0]),
                reduce=reduction_of(params[0]),
                impl="single",
                table=None,
                local=[local_part(p) for p in params],
                grads=[local_grad(p) for p in params],
                sharded=isinstance(params[0], DTensor),
            )
            bucket.impl = self._form(bucket)
            if bucket.impl == "fused":
                bucket.table = ChunkTable(bucket.local, blocks=group["blocks"])
            buckets.append(bucket)
        return buckets

    def bucket_key(self, parameter: Tensor) -> object:
        """Return what else, besides dtype, device and mesh, must be equal within a bucket."""
        return None

    def _form(self, bucket: Bucket) -> Impl:
        """Choose the form of the step; what was asked for and is not there is an error."""
        group, owner = bucket.group, type(self).__name__
        states = [tensors for key, tensors in bucket.states.items() if key != "step"]
        lists, blocks = [bucket.local, bucket.grads, *states], group["blocks"]
        if group["fused"]:
            require_fused(owner, *lists, blocks=blocks)
            return "fused"
        if group["foreach"] is not None or group["fused"] is False:
            return "single" if group["foreach"] is False else "foreach"
        return "fused" if fused_ready(*lists, blocks=blocks) else "foreach"

    def init_state(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Make a parameter's state when it has none."""

    def state_dtype(self, parameter: Tensor, group: dict[str, Any]) -> torch.dtype:
        """Return the dtype of a parameter's moments: at least float32."""
        wanted: torch.dtype | None = group.get("state_dtype")
        if wanted is not None:
            return wanted
        return torch.promote_types(parameter.dtype, torch.float32)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state, whose moments keep their own dtype.

        The state of `torch.optim.AdamW` (for LAMB) or `SGD` (for LARS) loads too, as a warm start:
        its step counters and moments are taken, and all settings stay this optimizer's.

        Raises:
            ValueError: a parameter's state is that of another kind of optimizer.
        """
        saved = state_dict["state"]
        places = [place for group in state_dict["param_groups"] for place in group["params"]]
        rule = f"must hold {', '.join(self.STATES)} for every parameter that has a state"
        for place in places:
            held = saved.get(place) or {}
            whole = not held or all(key in held for key in self.STATES)
            require(whole, type(self).__name__, "state_dict", rule, [*held])
        own = self.param_groups
        super().load_state_dict(state_dict)
        loaded = zip(self.param_groups, own, strict=True)
        # Without these they are another optimizer's settings, whose rate means something else.
        known = {"adapt", *self.FLAGS}
        self.param_groups = [{**old, **new} if known <= new.keys() else old for new, old in loaded]
        for name in self.defaults.keys() & set(SHARED):
            self.defaults[name] = self.param_groups[0][name]
        # torch casts floating state to the parameter's dtype, which would cut float32 moments of
        # bfloat16 parameters: take them from the saved state again.
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        for place, (parameter, group) in zip(places, pairs, strict=True):
            state = self.state.get(parameter, {})
            for key, value in [*state.items()]:
                if key not in self.STATES:  # such as the maximum of AMSGrad
                    del state[key]
                elif key == "step":
                    on = parameter.device if self.step_on_device(parameter, group) else "cpu"
                    state[key] = torch.as_tensor(value, dtype=torch.float32).to(on, copy=True)
                elif value is not None:
                    dtype = self.state_dtype(parameter, group)
                    state[key] = saved[place][key].to(parameter.device, dtype, copy=True)
        self._forget()

    def step_on_device(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Say whether the step counter lies beside the parameter (so that nothing waits for it)."""
        may_fuse = group["fused"] or (group["fused"] is None and group["foreach"] is None)
        return bool(parameter.is_cuda and (group["capturable"] or may_fuse))

    def trust_ratios(self) -> dict[str | int, Tensor]:
        """Return the ratios of the last step, without waiting for the device.

        Returns:
            Parameter name (its place among all parameters, when no names were given) → float32
            tensor on the parameter's device: 0-d, or `(blocks,)` for a group with blocks.
        """
        names: dict[int, str | int] = {}
        for group in self.param_groups:
            given = group.get("param_names")
            for place, parameter in enumerate(group["params"]):
                names[id(parameter)] = len(names) if given is None else given[place]
        found = {}
        for bucket in self._last:
            if bucket.ratios is None:
                continue
            rows = bucket.ratios.view(len(bucket.params), -1)
            for parameter, row in zip(bucket.params, rows, strict=True):
                found[names[id(parameter)]] = row if bucket.group["blocks"] > 1 else row[0]
        return found


def _squared_norm(tensors: list[Tensor]) -> Tensor:
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(tensors, 2, dtype)).square().sum()


def _check_rate(owner: str, name: str, rate: float | Tensor) -> None:
    """Raise unless a setting is finite and not negative; reading a device would wait for it."""
    if isinstance(rate, Tensor):
        require(rate.numel() == 1, owner, name, "must have one element", tuple(rate.shape))
        require_type(not rate.is_complex(), owner, name, "must be real", rate.dtype)
        if not rate.is_cpu:
            return
        rate = float(rate)
    number(owner, name, rate, at_least=0)
    require(math.isfinite(rate), owner, name, "must be finite", rate)


def _check_parameter(owner: str, parameter: Tensor, group: dict[str, Any]) -> None:
    real = parameter.is_floating_point()
    require_type(real, owner, "parameters", "must be real floating-point tensors", parameter)
    flat = getattr(parameter, "_is_flat_param", False)
    rule = "must not be flattened by FSDP1, which hides the layers: use FSDP2 (fully_shard)"
    require(not flat, owner, "parameters", rule, tuple(parameter.shape))
    blocks = group["blocks"]
    if blocks > 1:
        shape = tuple(parameter.shape)
        divisible = len(shape) > 0 and shape[0] % blocks == 0
        rule = f"must divide dimension 0 of every parameter of its group ({shape})"
        require(divisible, owner, "blocks", rule, blocks)
        whole = reduction_of(parameter) is None
        require(whole, owner, "blocks", "must be 1 for a sharded parameter", blocks)
