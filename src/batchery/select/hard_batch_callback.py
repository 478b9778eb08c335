# SPDX-License-Identifier: Apache-2.0
"""Hard batches inside a transformers Trainer.

The Trainer thinks in epochs of one length, and hands callbacks neither the batches nor their
losses. So the callback puts a loader of its own in place, whose epoch is always the b batches of
an ordinary one, taken from as many rounds as that needs: `num_train_epochs` buys the same updates
whatever δ is. It reads the losses where the model returns them, and keeps the sampler's state
beside the Trainer's checkpoints.

Reference: the method and its source are in `batchery.select.hard_batches`.
"""

from __future__ import annotations

import functools
import json
from collections import deque
from collections.abc import Callable, Generator, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle

from batchery._core.random import new_generator
from batchery._core.state import atomic_write
from batchery._core.validate import import_extra, require
from batchery.select.hard_batches import HardBatchSampler

if TYPE_CHECKING:
    from transformers import TrainerCallback
else:
    TrainerCallback = import_extra("transformers", "hf", "HardBatchCallback").TrainerCallback

_OWNER = "HardBatchCallback"
_KEPT = (
    *("collate_fn", "num_workers", "pin_memory", "worker_init_fn", "prefetch_factor"),
    *("persistent_workers", "multiprocessing_context"),
)


class HardBatchCallback(TrainerCallback):  # type: ignore[misc]
    """Trainer callback that trains on a `HardBatchSampler`'s rounds and reports their losses.

    Call `attach` once, before `train()`. The sampler's batch size is the Trainer's train batch
    over all processes. To resume, keep the checkpoint in `output_dir`: the sampler goes on at its
    own position, so the Trainer is told to skip nothing (`ignore_data_skip`). When the gradient
    accumulation does not divide b, the Trainer makes a smaller step at the end of each of its
    epochs; a resume moves it.

    Args:
        sampler: decides what is trained on.
        losses: gives the loss of each example, `[B]`, from the model's outputs and inputs. By
            default batch mode takes the model's own loss, and sample mode the cross-entropy of
            `logits` `[B, C]` with `labels` `[B]`. With gradient accumulation give it in batch mode
            too: many models divide their loss by the examples of the whole step.

    Examples:
        >>> callback = HardBatchCallback(HardBatchSampler(1000, 8))
        >>> callback.attach(trainer)  # doctest: +SKIP
    """

    def __init__(
        self,
        sampler: HardBatchSampler,
        losses: Callable[[Any, dict[str, Any]], Tensor] | None = None,
    ) -> None:
        """Keep the sampler; see the class."""
        if losses is None and sampler.mode == "sample":
            losses = class_losses
        self.sampler = sampler
        self.losses = losses
        self._loader: _EpochLoader | None = None
        self._loss: Tensor | None = None
        self._hook: RemovableHandle | None = None

    def attach(self, trainer: Any) -> None:
        """Make a Trainer train on the sampler's rounds.

        Raises:
            ValueError: batch size or data set are not the sampler's, or the Trainer splits its
                batches over several devices of one process.
        """
        args, size = trainer.args, trainer.args.train_batch_size * trainer.args.world_size
        require(args.n_gpu <= 1, _OWNER, "args.n_gpu", "must be 1 per process", args.n_gpu)
        rule = f"must be the Trainer's {size}"
        require(
            self.sampler.batch_size == size, _OWNER, "batch_size", rule, self.sampler.batch_size
        )
        count, given = self.sampler.num_examples, len(trainer.train_dataset)
        require(count == given, _OWNER, "train_dataset", f"must hold {count} examples", given)
        build = trainer.get_train_dataloader

        def get_train_dataloader() -> _EpochLoader:
            self._loader = _EpochLoader(build(), self.sampler)
            return self._loader

        train = trainer.train

        @functools.wraps(train)
        def train_and_let_go(*given: Any, **named: Any) -> Any:
            try:
                return train(*given, **named)
            finally:  # the Trainer tells no callback when training raises
                self._let_go()

        args.ignore_data_skip = True
        trainer.get_train_dataloader = get_train_dataloader
        trainer.train = train_and_let_go
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Load the sampler's state when training resumes, and listen to the model."""
        if state.global_step:
            path = self._path(args, state)
            if not path.is_file():
                raise FileNotFoundError(f"{_OWNER}: the sampler's state is not at {path}")
            self.sampler.load_state_dict(_read(path))
        self._hook = parts["model"].register_forward_hook(self._listen, with_kwargs=True)

    def _listen(self, model: nn.Module, args: Any, inputs: dict[str, Any], outputs: Any) -> None:
        if not model.training:
            return
        if self.losses is not None:
            self._loss = self.losses(outputs, inputs).detach()
        elif "loss" in outputs:
            self._loss = outputs["loss"].detach()
        else:
            raise TypeError(f"{_OWNER}: losses must be given, for the model returns no loss")

    def on_substep_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Report the loss of the micro-batch that was trained on."""
        if self._loss is not None and self._loader is not None:
            self.sampler.update(self._loss, self._loader.drawn.popleft())

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Report the loss of the last micro-batch of a step."""
        self.on_substep_end(args, state, control, **parts)

    def on_save(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Write the sampler's state into the checkpoint, a file for each rank."""
        if self._loader is not None:
            _write(self._path(args, state), self.sampler.state_dict(self._loader.taken))

    def _let_go(self) -> None:
        """Listen no longer, and let the loader's workers go, however training ended."""
        if self._hook is not None:
            self._hook.remove()
        if self._loader is not None:
            self._loader.close()

    def _path(self, args: Any, state: Any) -> Path:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        return folder / f"hard_batches.{args.process_index}.safetensors"


def class_losses(outputs: Any, inputs: dict[str, Any]) -> Tensor:
    """Return the cross-entropy of each example, `[B]`, from `logits` `[B, C]` and `labels` `[B]`.

    Raises:
        TypeError: the shapes are others; such a model needs losses of its own.
    """
    logits, labels = outputs["logits"].detach(), inputs.get("labels")
    if labels is None or labels.dim() != 1 or logits.shape[:-1] != labels.shape:
        raise TypeError(f"{_OWNER}: losses must be given for a model that is no classifier")
    return F.cross_entropy(logits.float(), labels, reduction="none")


class _Drawing:
    """Hands on a sampler's batches and keeps them until their losses are known."""

    def __init__(self, sampler: HardBatchSampler, drawn: deque[list[int]]) -> None:
        self.sampler, self.drawn = sampler, drawn

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.sampler:
            self.drawn.append(batch)
            yield batch


class _EpochLoader:
    """Rounds without end, handed on in epochs of the same length.

    Attributes:
        drawn: batches whose losses were not reported yet, the oldest first.
        taken: batches of the round in hand that training has taken.
    """

    def __init__(self, like: DataLoader[Any], sampler: HardBatchSampler) -> None:
        """Draw from the sampler, with all else as in the Trainer's own loader."""
        self.dataset = like.dataset
        self.sampler = sampler
        self.drawn: deque[list[int]] = deque()
        self.taken = 0
        self._loader: DataLoader[Any] = DataLoader(
            like.dataset,
            batch_sampler=_Drawing(sampler, self.drawn),
            generator=new_generator("workers"),  # else each round would move the global stream
            **{name: getattr(like, name) for name in _KEPT},
        )
        self._stream = self._rounds()

    def _rounds(self) -> Generator[Any, None, None]:
        while True:
            self.taken = 0
            for batch in self._loader:
                self.taken += 1
                yield batch

    def close(self) -> None:
        self._stream.close()

    def __iter__(self) -> Iterator[Any]:
        return islice(self._stream, len(self))

    def __len__(self) -> int:
        return self.sampler.batches_per_epoch


def _write(path: Path, state: dict[str, Any]) -> None:
    from safetensors.torch import save

    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    plain = {name: value for name, value in state.items() if name not in tensors}
    atomic_write(path, save(tensors, {"state": json.dumps(plain)}))


def _read(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        plain: dict[str, Any] = json.loads(file.metadata()["state"])
    return plain | tensors
