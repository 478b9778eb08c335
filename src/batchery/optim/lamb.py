# SPDX-License-Identifier: Apache-2.0
r"""LAMB: Adam whose step in every layer has a length in proportion to the layer's weights.

Use it when the batch grows to thousands and one learning rate must serve layers whose ratio of
weight to gradient differs by orders of magnitude, or to follow a recipe published with it. Do not
expect it to beat a well-tuned AdamW at a batch that AdamW handles: Nado et al. (arXiv 2102.06356)
tie it by tuning. What it gives is one learning-rate rule over a wide range of batches.

Per tensor x with gradient g at its own step t:

    m ← β1 m + (1-β1) g            m̂ = m / (1-β1^t)
    v ← β2 v + (1-β2) g²           v̂ = v / (1-β2^t)
    u = m̂ / (sqrt(v̂) + eps) + λ x
    r = φ(‖x‖) / ‖u‖               1 where either norm is 0
    x ← x - lr · r · u

so ‖Δx‖ = lr · ‖x‖ when φ is the identity: lr is the relative change of a layer per step, and 1e-2
means one per cent. It is not an AdamW learning rate.

Reference: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes",
ICLR 2020, arXiv 1904.00962.

Where we differ: version 3 of the paper drops the bias correction in favour of warm-up; we keep it
(`bias_correction=False` drops it). "Clipping to 10" in several ports clamps ‖x‖; in version 1 of
the paper it meant the ratio, and `trust_clip` acts on the ratio. Apex clips the global gradient
norm to 1 always; `max_grad_norm` is off unless asked for. A parameter without a gradient does not
age, as in torch.optim. The arithmetic is in `batchery.kernels.lamb`.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from batchery._core.validate import number, require
from batchery.kernels.lamb import LambRule, lamb_step_
from batchery.kernels.multi_tensor import HalfStep
from batchery.optim.layerwise import Bucket, LayerwiseOptimizer


class LAMB(LayerwiseOptimizer):
    """Layer-wise adaptive moments.

    All settings but `foreach`, `fused`, `capturable` and `max_grad_norm` may differ by group.

    Args:
        params: parameters, named parameters, or groups (`layer_adaptation_groups` makes them).
        lr: relative change of a layer per step; a 0-d tensor is read on its device.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment; 0 is allowed.
        weight_decay: λ, inside the update.
        adapt: scale steps by the trust ratio; `"auto"` does so in groups with weight decay.
        bias_correction: divide the moments by 1 - β^t.
        grad_averaging: weight new gradients by 1 - β1 (else 1) in the first moment.
        decoupled: shrink x by 1 - lr · λ instead of adding λ x to the update; with
            `adapt=False` this is AdamW.
        max_grad_norm: clip the gradients' global norm to this, before the moments.
        trust_clip: (low, high) limits of the trust ratio.
        norm_clip: (low, high) limits of ‖x‖, the paper's φ.
        blocks: cut dimension 0 into this many equal parts, each with its own ratio (for fused
            QKV weights or stacked experts); sharded parameters (FSDP2, DTensor) take 1 only.
        state_dtype: dtype of the moments; by default the parameter's, at least float32.
        maximize: ascend.
        foreach: use torch's multi-tensor operations; None chooses the fastest form there is.
        fused: use the fused kernels (Triton on CUDA; C on the CPU, compiled on first use).
        capturable: keep step counters on the device, for CUDA graphs without `fused`.

    Raises:
        ValueError: a setting is outside its range; the message names it and its value.
        TypeError: parameters or gradients are complex, integer or sparse.
        RuntimeError: `fused=True` where there is no kernel; device and dtype are named.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = LAMB([weight], lr=0.1)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> moved = torch.linalg.vector_norm(weight.detach() - torch.tensor([3.0, 4.0]))
        >>> round(moved.item(), 4)  # lr · ‖x‖ = 0.1 · 5
        0.5
    """

    STATES = ("step", "exp_avg", "exp_avg_sq")
    FLAGS = ("bias_correction", "grad_averaging", "decoupled")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        adapt: bool | Literal["auto"] = "auto",
        bias_correction: bool = True,
        grad_averaging: bool = True,
        decoupled: bool = False,
        max_grad_norm: float | None = None,
        trust_clip: tuple[float, float] | None = None,
        norm_clip: tuple[float, float] | None = None,
        blocks: int = 1,
        state_dtype: torch.dtype | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        """Check the settings and build the groups; see the class."""
        if max_grad_norm is not None:
            number("LAMB", "max_grad_norm", max_grad_norm, above=0)
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "adapt": adapt,
            "bias_correction": bias_correction,
            "grad_averaging": grad_averaging,
            "decoupled": decoupled,
            "max_grad_norm": max_grad_norm,
            "trust_clip": trust_clip,
            "norm_clip": norm_clip,
            "blocks": blocks,
            "state_dtype": state_dtype,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise when a group's settings make no sense."""
        betas = group["betas"]
        require(_is_pair(betas), "LAMB", "betas", "must be two numbers", betas)
        for place, beta in enumerate(betas):
            number("LAMB", f"betas[{place}]", beta, at_least=0, below=1)
        number("LAMB", "eps", group["eps"], at_least=0)
        for name in ("trust_clip", "norm_clip"):
            limits = group[name]
            if limits is not None:
                rule = "must be (low, high) with 0 <= low <= high"
                require(_is_pair(limits), "LAMB", name, rule, limits)
                for place, limit in enumerate(limits):
                    number("LAMB", f"{name}[{place}]", limit)
                require(0 <= limits[0] <= limits[1], "LAMB", name, rule, limits)
        dtype = group["state_dtype"]
        fits = dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)
        require(fits, "LAMB", "state_dtype", "must be a floating-point torch.dtype or None", dtype)

    def rule(self, group: dict[str, Any]) -> LambRule:
        """Return a group's settings as the kernels take them."""
        beta1, beta2 = group["betas"]
        return LambRule(
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            adapt=self.adapts(group),
            bias_correction=group["bias_correction"],
            grad_averaging=group["grad_averaging"],
            decoupled=group["decoupled"],
            trust_clip=group["trust_clip"],
            norm_clip=group["norm_clip"],
            blocks=group["blocks"],
            maximize=group["maximize"],
        )

    def init_state(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Make a parameter's step counter and moments when it has none."""
        state = self.state[parameter]
        if state:
            return
        dtype = self.state_dtype(parameter, group)
        device = parameter.device if self.step_on_device(parameter, group) else "cpu"
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        for key in self.STATES[1:]:
            state[key] = torch.zeros_like(parameter, dtype=dtype)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step and return the closure's loss.

        Args:
            closure: reevaluates the model and returns the loss.
        """
        loss, buckets = self.begin_step(closure)
        self.make_step(buckets, self._begin)
        for bucket in buckets:
            if bucket.found_inf is not None:
                steps = bucket.states["step"]
                torch._foreach_sub_(steps, [bucket.found_inf.to(steps[0].device)] * len(steps))
        return loss

    def _begin(self, bucket: Bucket) -> HalfStep:
        steps = bucket.states["step"]
        torch._foreach_add_(steps, 1)
        return lamb_step_(
            bucket.local,
            bucket.grads,
            bucket.states["exp_avg"],
            bucket.states["exp_avg_sq"],
            steps,
            self.rule(bucket.group),
            bucket.group["lr"],
            impl=bucket.impl,
            grad_divisor=bucket.divisor,
            found_inf=bucket.found_inf,
            table=bucket.table,
        )


def _is_pair(value: object) -> bool:
    return hasattr(value, "__len__") and len(value) == 2
