# SPDX-License-Identifier: Apache-2.0
r"""LARS: momentum SGD whose gradient in every layer is scaled to the layer's weights.

Use it for large-batch convolutional training and for recipes published with it (SimCLR, BYOL,
Barlow Twins). Do not use it at ordinary batches, where plain SGD is as good and has one setting
fewer, nor for transformers, where LAMB or AdamW is the better start.

Per tensor x with gradient g:

    r = η ‖x‖ / (‖g‖ + λ ‖x‖ + eps)        1 where ‖x‖ or ‖g‖ is 0
    d = r · (g + λ x)
    b ← μ b + (1 - dampening) d            b = d at the first step
    x ← x - lr · b                         Nesterov: x - lr · (d + μ b)

Variants in the wild, by `variant`: `"grad"` as above (LARS paper, apex LARC, timm); `"update"` has
r = η ‖x‖ / ‖g + λ x‖ (optax, the SimCLR code); `"momentum"` is Algorithm 1 of the LAMB paper,
b ← μ b + (1-μ)(g + λ x), x ← x - lr · η ‖x‖ / ‖b‖ · b, to be used with `trust_coefficient=1`; it
has no place for Nesterov, dampening or lr inside the buffer, which are refused with it.

Reference: You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks",
arXiv 1708.03888; the momentum variant: arXiv 1904.00962.

Where we differ: the original keeps lr inside the buffer, which differs from the above when lr
changes between steps; `lr_in_momentum=True` reproduces it. `trust_clip=True` is apex's LARC: the
local rate never exceeds the global one. The arithmetic is in `batchery.kernels.lars`.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from batchery._core.validate import number, one_of, require
from batchery.kernels.lars import LarsRule, lars_step_
from batchery.kernels.multi_tensor import HalfStep
from batchery.optim.layerwise import Bucket, LayerwiseOptimizer


class LARS(LayerwiseOptimizer):
    """Layer-wise adaptive rate scaling.

    All settings but `foreach`, `fused` and `capturable` may differ by group.

    Args:
        params: parameters, named parameters, or groups (`layer_adaptation_groups` makes them).
        lr: global learning rate; a 0-d tensor is read on its device.
        momentum: μ, in [0, 1).
        dampening: share of a new direction that is kept out of the buffer.
        weight_decay: λ, added to the gradient.
        nesterov: look ahead along the buffer; needs momentum and no dampening.
        trust_coefficient: η, the local rate of a layer whose gradient is as long as its weights.
        eps: added to the denominator of the local rate.
        adapt: scale steps by the local rate; `"auto"` does so in groups with weight decay.
        variant: which norm is in the denominator; see the module. `"momentum"` takes no
            `dampening`, `nesterov` or `lr_in_momentum`.
        trust_clip: cap the local rate at the global one (LARC).
        lr_in_momentum: multiply by lr before the buffer, not after it.
        blocks: cut dimension 0 into this many equal parts, each with its own rate; sharded
            parameters (FSDP2, DTensor) take 1 only.
        maximize: ascend.
        foreach: use torch's multi-tensor operations; None chooses the fastest form there is.
        fused: use the fused kernels (Triton on CUDA; C on the CPU, compiled on first use).
        capturable: accepted for symmetry with torch.optim; LARS has no step counter.

    Raises:
        ValueError: a setting is outside its range; the message names it and its value.
        TypeError: parameters or gradients are complex, integer or sparse.
        RuntimeError: `fused=True` where there is no kernel; device and dtype are named.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = LARS([weight], lr=1.0, adapt=True, trust_coefficient=0.1)
        >>> (weight[0] * 7).backward()
        >>> optimizer.step()
        >>> weight.detach()  # moved by η ‖x‖ = 0.5 along the gradient, whatever its length
        tensor([2.5000, 4.0000])
    """

    STATES = ("momentum_buffer",)
    FLAGS = ("nesterov", "trust_clip", "lr_in_momentum")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = False,
        trust_coefficient: float = 1e-3,
        eps: float = 0.0,
        adapt: bool | Literal["auto"] = "auto",
        variant: Literal["grad", "update", "momentum"] = "grad",
        trust_clip: bool = False,
        lr_in_momentum: bool = False,
        blocks: int = 1,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        """Check the settings and build the groups; see the class."""
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "adapt": adapt,
            "variant": variant,
            "trust_clip": trust_clip,
            "lr_in_momentum": lr_in_momentum,
            "blocks": blocks,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise when a group's settings make no sense."""
        number("LARS", "momentum", group["momentum"], at_least=0, below=1)
        number("LARS", "dampening", group["dampening"], at_least=0, at_most=1)
        number("LARS", "trust_coefficient", group["trust_coefficient"], above=0)
        number("LARS", "eps", group["eps"], at_least=0)
        one_of("LARS", "variant", group["variant"], ("grad", "update", "momentum"))
        settings = (group["momentum"], group["dampening"])
        possible = not group["nesterov"] or (settings[0] > 0 and settings[1] == 0)
        rule = "needs momentum > 0 and dampening 0"
        require(possible, "LARS", "nesterov", rule, settings)
        if group["variant"] == "momentum":
            for name in ("nesterov", "dampening", "lr_in_momentum"):
                rule = "has no part in variant 'momentum': leave it out"
                require(not group[name], "LARS", name, rule, group[name])

    def rule(self, group: dict[str, Any]) -> LarsRule:
        """Return a group's settings as the kernels take them."""
        return LarsRule(
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            trust_coefficient=group["trust_coefficient"],
            eps=group["eps"],
            adapt=self.adapts(group),
            variant=group["variant"],
            trust_clip=group["trust_clip"],
            lr_in_momentum=group["lr_in_momentum"],
            blocks=group["blocks"],
            maximize=group["maximize"],
        )

    def plan_key(self, group: dict[str, Any]) -> object:
        """Return the settings that decide whether there is a buffer."""
        return group["momentum"], group["variant"], self.adapts(group)

    def init_state(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Make a parameter's momentum buffer when it needs one; its first step fills it."""
        rule, state = self.rule(group), self.state[parameter]
        needed = rule.momentum != 0 or (rule.variant == "momentum" and rule.adapt)
        if needed and state.get("momentum_buffer") is None:
            dtype = self.state_dtype(parameter, group)
            state["momentum_buffer"] = torch.zeros_like(parameter, dtype=dtype)
            self._fresh.add(parameter)

    def bucket_key(self, parameter: Tensor) -> object:
        """Keep first steps apart from later ones."""
        return parameter in self._fresh

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step and return the closure's loss.

        Args:
            closure: reevaluates the model and returns the loss.
        """
        loss, buckets = self.begin_step(closure)
        fresh = [bucket for bucket in buckets if bucket.params[0] in self._fresh]
        self.make_step(buckets, self._begin)
        for bucket in fresh:
            self._fresh.difference_update(bucket.params)
            self._plans.clear()  # the next step's buckets need not keep these apart
            # A first step that a GradScaler skipped is still to come. Only dampening tells it from
            # later ones, so only then is the flag read; this waits, but not once a step is made.
            skipped = bucket.found_inf
            if skipped is not None and bucket.group["dampening"] and skipped:
                for parameter in bucket.params:
                    self.state[parameter].pop("momentum_buffer", None)
        return loss

    def _begin(self, bucket: Bucket) -> HalfStep:
        return lars_step_(
            bucket.local,
            bucket.grads,
            bucket.states.get("momentum_buffer", []),
            self.rule(bucket.group),
            bucket.group["lr"],
            first=bucket.params[0] in self._fresh,
            impl=bucket.impl,
            grad_divisor=bucket.divisor,
            found_inf=bucket.found_inf,
            table=bucket.table,
        )

    def _forget(self) -> None:
        super()._forget()
        self._fresh: set[Tensor] = set()
