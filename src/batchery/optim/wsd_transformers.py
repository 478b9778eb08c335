# SPDX-License-Identifier: Apache-2.0
"""WSD by the arguments of transformers: one import changes, the rates do not.

Use it where a script calls `get_wsd_schedule` of transformers, which need not be installed. In new
code build the `WSDScheduler` itself: only that can leave the end open.

With w0 and ρ of `batchery.optim.wsd`,

    w0 = ρ = min_lr_ratio
    W = num_warmup_steps
    D = num_decay_steps
    T + D = num_training_steps, or W + num_stable_steps + D

Reference: `transformers.optimization`; Hu et al., arXiv 2404.06395.

Where we differ: lengths that disagree are refused; transformers warns, and takes
`num_stable_steps`. A decay of several waves (`num_cycles`) is refused.
"""

from torch.optim import Optimizer

from batchery._core.validate import integer, require
from batchery.optim.wsd import WSDScheduler
from batchery.optim.wsd_curve import DecayShape, WarmupShape


def get_wsd_schedule(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_decay_steps: int,
    num_training_steps: int | None = None,
    num_stable_steps: int | None = None,
    warmup_type: WarmupShape = "linear",
    decay_type: DecayShape = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
) -> WSDScheduler:
    """Build a `WSDScheduler` from the arguments of `transformers.get_wsd_schedule`.

    Its rates equal those of transformers to the bit; warm-up, too, starts at `min_lr_ratio`.

    Args:
        optimizer: whose rates to schedule.
        num_warmup_steps: length of the warm-up.
        num_decay_steps: length of the decay.
        num_training_steps: the whole; or give `num_stable_steps`.
        num_stable_steps: length of the constant phase.
        warmup_type: form of the warm-up.
        decay_type: form of the decay; all of ours are allowed.
        min_lr_ratio: factor at both ends.
        num_cycles: only 0.5, a single fall, is supported.
        last_epoch: as in every torch scheduler.

    Raises:
        ValueError: neither or disagreeing lengths are given, or `num_cycles` is not 0.5.

    Examples:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> scheduler = get_wsd_schedule(optimizer, 10, 20, num_training_steps=100)
        >>> scheduler.decay_start, scheduler.shape
        (80, 'cosine')
    """
    owner = "get_wsd_schedule"
    require(num_cycles == 0.5, owner, "num_cycles", "must be 0.5", num_cycles)
    total = num_training_steps
    if num_stable_steps is not None:
        integer(owner, "num_stable_steps", num_stable_steps, at_least=0)
        total = num_warmup_steps + num_stable_steps + num_decay_steps
        agree = num_training_steps in (None, total)
        require(agree, owner, "num_training_steps", f"must be {total}", num_training_steps)
    given = total is not None
    require(given, owner, "num_training_steps", "or num_stable_steps must be given", total)
    return WSDScheduler(
        optimizer,
        num_warmup_steps,
        total,
        num_decay_steps,
        shape=decay_type,
        min_ratio=min_lr_ratio,
        warmup_start_ratio=min_lr_ratio,
        warmup_shape=warmup_type,
        last_epoch=last_epoch,
    )
