# SPDX-License-Identifier: Apache-2.0
"""The lab model: a small real language model that many studies share.

Use `load` for a trained model to quantise, prune, distil or serve; use the pieces (`lab_text`,
`new_model`, `batches`, `train`, `held_out_loss`) to train in a way of one's own. It is a Llama of
transformers on the text of `lab_text`: it knows the look of Python code, and little else.

A trained model is kept on disk under a hash of code, versions, data, settings, device and thread
count. The same hash means the same weights to the bit, on the CPU and on CUDA.
"""

import json
import platform
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchery._core import random
from batchery._core.validate import import_extra, one_of, require
from batchery.optim import WSDScheduler, large_batch, layer_adaptation_groups, wsd, wsd_curve
from batchery.studies import graphs, lab_cache, lab_loop
from batchery.studies.lab_loop import (
    Progress,
    batches,
    held_out_loss,
    position_losses,
    token_losses,
    train,
)
from batchery.studies.lab_text import VOCABULARY, Corpus, LabText, lab_text, split_corpus

__all__ = [
    "SIZES",
    "Corpus",
    "LabModel",
    "LabSize",
    "LabText",
    "batches",
    "held_out_loss",
    "lab_text",
    "load",
    "new_model",
    "position_losses",
    "split_corpus",
    "token_losses",
    "train",
]

_DECAY = 0.3  # share of the steps in which the rate falls
_STRETCH = 25  # steps between two looks at the clock and at the losses
_SAVE_EVERY = 20.0  # seconds of training that an interruption may cost
_CODE = (lab_loop, lab_cache, graphs, random, large_batch, wsd, wsd_curve)  # beside the text's own


@dataclass(frozen=True)
class LabSize:
    """Shape of a model, and the recipe by which `load` trains it.

    Attributes:
        name: a word for people and for the cache.
        hidden: width d; the MLP is 8/3 as wide, rounded to a multiple of 32.
        layers: number of blocks.
        heads: query heads; `hidden / heads` must be even.
        kv_heads: key and value heads; divides `heads` (grouped-query attention).
        context: tokens per example, and the longest position that is trained.
        batch: examples per step.
        steps: updates in all.
        lr: peak learning rate of AdamW.
        weight_decay: of matrices, decoupled.
        vocabulary: size of the tokenizer's vocabulary.
        branch_init: initial size of the matrices that end a residual branch, over that of the
            others; below 1 a deep model starts closer to its embedding and learns faster.

    Raises:
        ValueError: widths and heads do not divide.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    context: int
    batch: int = 32
    steps: int = 0
    lr: float = 3e-3
    weight_decay: float = 0.1
    vocabulary: int = VOCABULARY
    branch_init: float = 1.0

    def __post_init__(self) -> None:
        """Refuse heads that do not fit."""
        owner = f"LabSize {self.name}"
        even = self.hidden % (2 * self.heads) == 0
        require(
            even, owner, "heads", f"must divide hidden={self.hidden} into even parts", self.heads
        )
        grouped = self.heads % self.kv_heads == 0
        require(grouped, owner, "kv_heads", f"must divide heads={self.heads}", self.kv_heads)

    @property
    def mlp(self) -> int:
        """Width of the MLP."""
        return max(32, round(self.hidden * 8 / 3 / 32) * 32)


# nano sees an eighth of the text, once. small sees all of it about eight times: in a narrow proxy
# with as many parameters per token, ten times the usual decay lost less on held-out text than the
# usual one, and sixteen passes lost more than eight. On an H200 it takes 58 s (71 with its text),
# to 1.755 nats.
_NANO = LabSize("nano", 128, 4, 4, 2, context=128, batch=8, steps=440, lr=4e-3, branch_init=0.2)
_SMALL = LabSize("small", 512, 12, 8, 2, 512, batch=32, steps=1_750, lr=2e-3, weight_decay=1.0)
SIZES = {size.name: size for size in (_NANO, _SMALL)}


@dataclass(frozen=True)
class LabModel:
    """A trained model with what it was trained and judged on.

    Attributes:
        size: its shape and recipe.
        model: `LlamaForCausalLM`, float32, in evaluation mode; the caller's own copy.
        text: tokenizer and token streams.
        losses: training loss of every step, in nats per token.
        held_out_loss: in nats per token.
        seconds: that the training took, wherever it ran.
        folder: where it is kept: what `from_pretrained` takes, tokenizer included.
    """

    size: LabSize
    model: Any
    text: LabText
    losses: list[float]
    held_out_loss: float
    seconds: float
    folder: Path


def new_model(size: LabSize, seed: int = 0) -> Any:
    """Return an untrained `LlamaForCausalLM` whose weights depend on size and seed alone.

    Matrices start with standard deviation d^-1/2 (times `branch_init` at the ends of residual
    branches): at the usual 0.02 a narrow model spends its first hundreds of steps growing its
    weights. The head is tied to the embedding.

    Returns:
        The model, float32, on the CPU.

    Raises:
        ImportError: `transformers` is not installed.
    """
    transformers = import_extra("transformers", "hf", "lab.new_model")
    config = transformers.LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.context,
        initializer_range=size.hidden**-0.5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        architectures=["LlamaForCausalLM"],  # what inference engines go by
    )
    with random.initial_weights(seed, "weights"):
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(size.branch_init)
            layer.mlp.down_proj.weight.mul_(size.branch_init)
    return model


def load(
    size: str | LabSize = "nano",
    device: torch.device | str = "cpu",
    *,
    seed: int = 0,
    corpus: Corpus | None = None,
    progress: Progress = lambda done, total: None,
) -> LabModel:
    """Return a trained model: from the cache, or trained now by AdamW and WSD.

    An interrupted training goes on from its last saved point.

    Args:
        size: a name in `SIZES`, or a size of one's own.
        device: where to train, and where the model is put.
        seed: of weights and data order.
        corpus: another text than the lab's own.
        progress: called with the number of updates made and their total.

    Raises:
        ImportError: the extra `hf` is not installed.
        ValueError: no size has that name.
    """
    if isinstance(size, str):
        one_of("lab.load", "size", size, SIZES)
        size = SIZES[size]
    safetensors = import_extra("safetensors.torch", "hf", "lab.load")
    device = torch.device(device)
    text = lab_text(size.vocabulary, corpus)
    folder = lab_cache.folder_of(f"{size.name}-{seed}", _made_by(size, seed, device, text))
    if not lab_cache.is_whole(folder):
        _make(folder, size, seed, device, text, progress)
    model = new_model(size, seed)
    safetensors.load_model(model, folder / "model.safetensors")
    record = json.loads((folder / "training.json").read_text())
    return LabModel(size, model.to(device).eval(), text, folder=folder, **record)


def _made_by(size: LabSize, seed: int, device: torch.device, text: LabText) -> dict[str, Any]:
    transformers = import_extra("transformers", "hf", "lab.load")
    cuda = device.type == "cuda"
    return {
        "code": lab_cache.code_digest(*_CODE, sys.modules[__name__]),
        "versions": [torch.__version__, transformers.__version__],
        "text": text.digest,
        "size": asdict(size),
        "seed": seed,
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "threads": None if cuda else torch.get_num_threads(),
    }


class _Run:
    """The training of a lab model, which can be saved between two steps."""

    def __init__(self, size: LabSize, seed: int, device: torch.device, text: LabText) -> None:
        self.size, self.seed = size, seed
        self.tokens = text.train.to(device)
        self.model = new_model(size, seed).to(device)
        groups = layer_adaptation_groups(self.model, size.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=size.lr, betas=(0.9, 0.95), fused=True)
        warmup = max(1, size.steps // 20)
        self.scheduler = WSDScheduler(self.optimizer, warmup, size.steps, _DECAY, offset=1)
        self.graphs: lab_loop.Graphs = {}
        self.losses: list[float] = []
        self.seconds = 0.0

    def finish(self, part: Path, progress: Progress) -> None:
        """Make the steps that are missing, with a saved point in `part` now and then."""
        size, saved = self.size, self.seconds
        start = len(self.losses)
        rows = batches(self.tokens, size.batch, size.context, self.seed, start=start)

        def tick(made: int, _: int) -> None:
            progress(len(self.losses) + made, size.steps)

        for done in range(start, size.steps, _STRETCH):
            if self.seconds - saved > _SAVE_EVERY:
                lab_cache.write_folder(part, self.save)
                saved = self.seconds
            begin = time.perf_counter()
            losses = train(
                self.model,
                rows,
                self.optimizer,
                self.scheduler,
                min(_STRETCH, size.steps - done),
                graphs=self.graphs,
                progress=tick,
            )
            self.losses += losses.tolist()
            self.seconds += time.perf_counter() - begin

    def save(self, folder: Path) -> None:
        """Write all that `restore` needs."""
        safetensors = import_extra("safetensors.torch", "hf", "lab.load")
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
        safetensors.save_file(tensors, folder / "state.safetensors")
        record = {
            "scheduler": self.scheduler.state_dict(),
            "losses": self.losses,
            "seconds": self.seconds,
        }
        (folder / "state.json").write_text(json.dumps(record))

    def restore(self, folder: Path) -> None:
        """Go back to a saved point."""
        safetensors = import_extra("safetensors.torch", "hf", "lab.load")
        tensors = safetensors.load_file(folder / "state.safetensors")
        states: dict[int, dict[str, Tensor]] = {}
        for name in [name for name in tensors if name.startswith("optimizer.")]:
            _, index, key = name.split(".")
            states.setdefault(int(index), {})[key] = tensors[name]
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})
        record = json.loads((folder / "state.json").read_text())
        self.scheduler.load_state_dict(record["scheduler"])
        self.losses, self.seconds = record["losses"], record["seconds"]


def _make(
    folder: Path,
    size: LabSize,
    seed: int,
    device: torch.device,
    text: LabText,
    progress: Progress,
) -> None:
    """Train a model into its folder; go on from the point that an interruption left."""
    safetensors = import_extra("safetensors.torch", "hf", "lab.load")
    run = _Run(size, seed, device, text)
    part = folder.with_name(f"{folder.name}.part")
    if lab_cache.is_whole(part):
        run.restore(part)
    run.finish(part, progress)
    record = {
        "losses": run.losses,
        "held_out_loss": held_out_loss(run.model, text.held_out, size.context),
        "seconds": round(run.seconds, 3),
    }

    def write(target: Path) -> None:
        # `save_pretrained` of the model would do the same, but draws a progress bar.
        safetensors.save_model(run.model, target / "model.safetensors", metadata={"format": "pt"})
        run.model.config.save_pretrained(target)
        run.model.generation_config.save_pretrained(target)
        text.tokenizer.save_pretrained(target)
        (target / "training.json").write_text(json.dumps(record))

    lab_cache.write_folder(folder, write)
    shutil.rmtree(part, ignore_errors=True)
