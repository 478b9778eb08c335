# SPDX-License-Identifier: Apache-2.0
import os
import signal
import time

import pytest
import torch
from dist_ranks import run_on_ranks
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from batchery.optim import DecayTrigger, WSDScheduler

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=16,
)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4096

    def __getitem__(self, index):
        row = torch.arange(8) % 32
        return {"input_ids": row, "labels": row}


class Watch(TrainerCallback):
    """Keeps the rate of every update, and may do something after one."""

    def __init__(self, act=lambda step: None):
        self.rates, self.act = [], act

    def on_step_begin(self, args, state, control, optimizer, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args, state, control, **kwargs):
        self.act(state.global_step)


def train(folder, trigger, act=lambda step: None, scheduler=None, max_steps=300, resume=None):
    model = LlamaForCausalLM(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = (scheduler or WSDScheduler)(optimizer, 2, shape="linear")
    watch = Watch(act)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=2,
            max_steps=max_steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=Rows(),
        optimizers=(optimizer, scheduler),
        # the watch acts before the trigger looks
        callbacks=[watch, *([trigger] if trigger else [])],
    )
    trainer.train(resume_from_checkpoint=resume)
    return watch.rates, scheduler, trainer


def test_flops_budget_is_spent_exactly_and_a_checkpoint_kept(tmp_path):
    trigger = DecayTrigger(flops=40e6, flops_per_step=1e6)
    rates, scheduler, trainer = train(tmp_path, trigger)
    assert len(rates) == 40
    assert scheduler.decay_start == 36
    assert rates[:3] == [0, 5e-3, 1e-2]
    assert rates[3:37] == [1e-2] * 34
    assert rates[37:] == pytest.approx([7.5e-3, 5e-3, 2.5e-3])
    assert (tmp_path / "checkpoint-36").is_dir()


def test_a_run_resumed_in_the_decay_ends_as_if_never_cut(tmp_path):
    whole, *_ = train(tmp_path / "a", DecayTrigger(flops=40e6, flops_per_step=1e6))
    train(tmp_path / "b", DecayTrigger(flops=40e6, flops_per_step=1e6))
    again, scheduler, _ = train(
        tmp_path / "b",
        DecayTrigger(flops=40e6, flops_per_step=1e6, save=False),
        resume=str(tmp_path / "b" / "checkpoint-36"),
    )
    assert again == whole[36:]
    assert scheduler.phase == "done"


def test_a_signal_starts_the_decay_and_its_handler_is_given_back(tmp_path):
    def before(number, frame):
        raise AssertionError("the trigger did not take the signal")

    old = signal.signal(signal.SIGUSR1, before)
    try:
        rates, scheduler, _ = train(
            tmp_path,
            DecayTrigger(signal=signal.SIGUSR1, num_decay=5, save=False),
            act=lambda step: os.kill(os.getpid(), signal.SIGUSR1) if step == 12 else None,
        )
        assert signal.getsignal(signal.SIGUSR1) is before
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert scheduler.decay_start == 12
    assert len(rates) == 17


def test_training_that_raises_inside_with_gives_the_signal_back(tmp_path):
    def fail(step):
        raise RuntimeError("out of memory")

    before = signal.getsignal(signal.SIGUSR1)
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        DecayTrigger(signal=signal.SIGUSR1, save=False) as trigger,
    ):
        train(tmp_path, trigger, act=fail)
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_second_training_after_one_that_raised_gives_the_signal_back(tmp_path):
    """Without `with` the trigger still holds it; its own handler is not what it must give back."""

    def fail(step):
        raise RuntimeError("out of memory")

    before = signal.getsignal(signal.SIGUSR1)
    trigger = DecayTrigger(signal=signal.SIGUSR1, save=False)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            train(tmp_path, trigger, act=fail)
        train(tmp_path, trigger, max_steps=2)
        assert signal.getsignal(signal.SIGUSR1) is before
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_time_budget_starts_the_decay_in_time(tmp_path, monkeypatch):
    """A clock that moves 1 s an update: 50 s with half for the decay start it at update 25."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def act(step):
        clock[0] += 1

    rates, scheduler, _ = train(
        tmp_path, DecayTrigger(seconds=50, num_decay=0.5, save=False), act=act
    )
    assert scheduler.decay_start == 25
    assert len(rates) == 50


def test_a_budget_spent_before_the_first_update_waits_for_it(tmp_path):
    """A first step that overflows in fp16 leaves the rate at 0, from where nothing can fall."""
    scheduler = WSDScheduler(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), 2)
    trigger = DecayTrigger(flops=1.0, flops_per_step=1.0, num_decay=5, save=False)
    args, control = TrainingArguments(str(tmp_path), use_cpu=True), TrainerControl()
    state = TrainerState(global_step=1)
    trigger.on_step_end(args, state, control, lr_scheduler=scheduler)
    assert scheduler.phase == "warmup"
    scheduler.optimizer.step()
    scheduler.step()
    trigger.on_step_end(args, state, control, lr_scheduler=scheduler)
    assert scheduler.decay_start == 1


def _first_due(rank, kinds, signalled):
    """The update at which a rank starts its decay, without a Trainer."""
    scheduler = WSDScheduler(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), 2)
    trigger = DecayTrigger(num_decay=5, **kinds)
    for step in range(1, 100):
        scheduler.optimizer.step()
        scheduler.step()
        trigger._signalled = rank == 1 and step >= signalled
        if trigger._due(step, scheduler, torch.device("cpu")):
            return step
    return None


def _on_rank(rank, size):
    by_signal = _first_due(rank, {"signal": signal.SIGUSR1}, 13)
    by_flops = _first_due(rank, {"flops": 42.0, "flops_per_step": 1.0}, 1000)
    return by_signal, by_flops


@pytest.mark.dist
@pytest.mark.slow
def test_ranks_start_together():
    """One rank's signal counts for all at the next check; operations are met without a check."""
    assert run_on_ranks(_on_rank) == [(20, 37), (20, 37)]


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="seconds, flops or signal must be given"):
        DecayTrigger()
    with pytest.raises(ValueError, match="flops_per_step must be given with flops"):
        DecayTrigger(flops=1e9)
    with pytest.raises(ValueError, match="seconds must be > 0, got 0"):
        DecayTrigger(seconds=0)

    def constant(optimizer, *args, **kwargs):
        return torch.optim.lr_scheduler.ConstantLR(optimizer)

    with pytest.raises(TypeError, match="must be a WSDScheduler, got ConstantLR"):
        train(tmp_path, DecayTrigger(seconds=1), scheduler=constant)
