# SPDX-License-Identifier: Apache-2.0
"""Hard batches in the real transformers Trainer."""

import multiprocessing
import os
from itertools import chain, repeat

import pytest
import torch
from dist_ranks import run_on_ranks
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from batchery.select import HardBatchCallback, HardBatchSampler

EXAMPLES, BATCH = 36, 4


class Classifier(nn.Module):
    """Notes which examples it was trained on, in order."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 3))
        self.trained = []

    def forward(self, x, labels):
        logits = self.layers(x)
        loss = F.cross_entropy(logits, labels)
        if self.training:
            self.trained.append((x[:, 0].round().int().tolist(), loss.item()))
        return {"loss": loss, "logits": logits}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return EXAMPLES

    def __getitem__(self, index):
        x = torch.tensor([float(index), (index * 5) % 7, (index * 3) % 4])
        return {"x": x, "labels": torch.tensor(index % 3)}


def make(folder, *, epochs=3, losses=None, mode="batch", batch=BATCH, **kinds):
    arguments = {
        "per_device_train_batch_size": BATCH, "num_train_epochs": epochs, "learning_rate": 1e-2,
        "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "seed": 3,
    }  # fmt: skip
    trainer = Trainer(
        Classifier(),
        TrainingArguments(str(folder), **(arguments | kinds)),
        train_dataset=Rows(),
        eval_dataset=Rows(),
    )
    sampler = HardBatchSampler(EXAMPLES, batch, 0.5, mode=mode)
    HardBatchCallback(sampler, losses).attach(trainer)
    return trainer, sampler


def replay(trained, mode="batch"):
    """What a plain loop over the sampler draws when it reports the same losses."""
    sampler = HardBatchSampler(EXAMPLES, BATCH, 0.5, mode=mode)
    found = []
    for batch, (_, loss) in zip(chain.from_iterable(repeat(sampler)), trained, strict=False):
        found.append(batch)
        sampler.update(loss)
    return found


@pytest.mark.parametrize("workers", [0, 1])
def test_the_trainer_trains_on_the_rounds_for_the_updates_of_ordinary_epochs(tmp_path, workers):
    trainer, sampler = make(tmp_path, dataloader_num_workers=workers)
    trainer.train()
    trained = trainer.model.trained
    assert trainer.state.global_step == len(trained) == 3 * EXAMPLES // BATCH
    assert [batch for batch, _ in trained] == replay(trained)
    lengths = [9, 4, 4, 4, 4, 2]
    assert sampler.state_dict()["epoch"] == len(lengths) - 1
    assert len(set(map(tuple, [batch for batch, _ in trained[9:13]]))) == 4


@pytest.mark.parametrize("mode", ["batch", "sample"])
@pytest.mark.parametrize(("accumulation", "workers"), [(1, 0), (1, 1), (3, 0)])
def test_a_run_resumed_in_mid_round_ends_with_the_same_weights(
    tmp_path, mode, accumulation, workers
):
    """Dropout is on: the random stream, too, must go on where it was."""
    kinds = {
        "mode": mode, "save_strategy": "steps", "save_steps": 4,
        "gradient_accumulation_steps": accumulation, "dataloader_num_workers": workers,
    }  # fmt: skip
    whole, _ = make(tmp_path / "whole", **kinds)
    whole.train()
    resumed, sampler = make(tmp_path / "whole", **kinds)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    trained = whole.model.trained
    assert resumed.model.trained == trained[4 * accumulation :]
    assert resumed.state.global_step == whole.state.global_step
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    assert 0 < sampler.state_dict()["batches"]


def test_sample_mode_reports_the_loss_of_each_example(tmp_path):
    seen = []

    def losses(outputs, inputs):
        found = F.cross_entropy(outputs["logits"], inputs["labels"], reduction="none")
        seen.extend(zip(inputs["x"][:, 0].int().tolist(), found.tolist(), strict=True))
        return found

    trainer, sampler = make(tmp_path, mode="sample", losses=losses, epochs=2)
    trainer.train()
    first = torch.tensor([loss for _, loss in sorted(seen[:EXAMPLES])])
    hardest = set(first.topk(16).indices.tolist())
    batches = [batch for batch, _ in trainer.model.trained]
    assert {i for batch in batches[9:13] for i in batch} == hardest
    default, _ = make(tmp_path, mode="sample", epochs=2)
    default.train()
    assert default.model.trained == trainer.model.trained


def test_evaluation_reports_nothing(tmp_path):
    calls = []

    def losses(outputs, inputs):
        calls.append(len(inputs["labels"]))
        return outputs["loss"]

    kinds = {"eval_strategy": "steps", "eval_steps": 2, "losses": losses}
    trainer, _ = make(tmp_path, epochs=2, **kinds)
    trainer.train()
    assert len(calls) == len(trainer.model.trained)
    assert [batch for batch, _ in trainer.model.trained] == replay(trainer.model.trained)


def test_what_does_not_fit_is_named(tmp_path):
    def attach(sampler):
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, use_cpu=True, report_to=[]
        )
        HardBatchCallback(sampler).attach(Trainer(Classifier(), arguments, train_dataset=Rows()))

    with pytest.raises(ValueError, match="HardBatchCallback: batch_size must be the Trainer's 4"):
        attach(HardBatchSampler(EXAMPLES, 2))
    with pytest.raises(ValueError, match="train_dataset must hold 40 examples, got 36"):
        attach(HardBatchSampler(40, 4))


def test_a_checkpoint_without_the_samplers_state_is_refused(tmp_path):
    trainer, _ = make(tmp_path, epochs=1, save_strategy="steps", save_steps=3)
    trainer.train()
    for path in (tmp_path / "checkpoint-3").glob("hard_batches.*"):
        path.unlink()
    again, _ = make(tmp_path, epochs=1)
    with pytest.raises(FileNotFoundError, match="HardBatchCallback: the sampler's state is not at"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_model_without_usable_losses_is_refused(tmp_path):
    trainer, _ = make(tmp_path, mode="sample", epochs=1)
    forward = trainer.model.forward

    def as_sequences(x, labels):
        return {name: value[:, None] if value.dim() else value for name, value in
                forward(x, labels).items()}  # fmt: skip

    trainer.model.forward = as_sequences
    with pytest.raises(TypeError, match="HardBatchCallback: losses must be given"):
        trainer.train()


@pytest.mark.parametrize("workers", [0, 1])
def test_training_that_raises_leaves_neither_hook_nor_workers(tmp_path, workers):
    trainer, _ = make(tmp_path, dataloader_num_workers=workers)

    class Failing(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("out of memory")

    trainer.add_callback(Failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert not trainer.model._forward_hooks
    assert not multiprocessing.active_children()
    trainer.remove_callback(Failing)
    trainer.train()
    assert not trainer.model._forward_hooks


def _two_trainers(rank, size, folder):
    """Train, and train again from a checkpoint in mid-round; return batches and weights of both."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update({"MASTER_ADDR": "localhost", "MASTER_PORT": "29555"})  # the group is there
    found = []
    for checkpoint in (None, f"{folder}/checkpoint-5"):
        kinds = {"save_strategy": "steps", "save_steps": 5, "ddp_backend": "gloo"}
        trainer, _ = make(folder, batch=size * BATCH, **kinds)
        trainer.train(resume_from_checkpoint=checkpoint)
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        found.append(([batch for batch, _ in trainer.model.trained], weights))
    return found


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_share_every_batch_and_resume(tmp_path):
    first, second = run_on_ranks(_two_trainers, str(tmp_path))
    members = {tuple(sorted(batch)) for batch in HardBatchSampler(EXAMPLES, 2 * BATCH)}
    joined = [tuple(sorted(a + b)) for a, b in zip(first[0][0], second[0][0], strict=True)]
    assert len(joined) == 3 * 4
    assert set(joined[:4]) == members
    assert all(len(set(joined[k : k + 2])) == 2 for k in range(4, 12, 2))
    assert set(joined) == members
    for whole, resumed in (first, second):
        assert resumed[0] == whole[0][5:]
        assert torch.equal(resumed[1], first[0][1])
