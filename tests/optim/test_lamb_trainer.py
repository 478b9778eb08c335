# SPDX-License-Identifier: Apache-2.0
"""LAMB and LARS in a transformers Trainer, and prepared by accelerate."""

import pytest
import torch
from torch import nn

from batchery.optim import LAMB, LARS, layer_adaptation_groups

KINDS = {LAMB: {"lr": 0.2}, LARS: {"lr": 0.05, "trust_coefficient": 1.0}}


@pytest.mark.slow
@pytest.mark.parametrize("grouped_by", ["trainer", "us"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_transformers_trainer_trains_with_it(tmp_path, kind, grouped_by):
    """Both ways of the card; the Trainer's groups have its own weight decay, not the kwargs'."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    rows = [{"input_ids": [k % 7] * 8, "labels": [k % 7] * 8} for k in range(64)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=30, per_device_train_batch_size=8, report_to=[],
        logging_steps=10, save_strategy="no", use_cpu=True, disable_tqdm=True,
        weight_decay=0.01 if grouped_by == "trainer" else 0.0,
    )  # fmt: skip
    if grouped_by == "trainer":
        given = {"optimizer_cls_and_kwargs": (kind, KINDS[kind])}
    else:
        optimizer = kind(layer_adaptation_groups(model, 0.01), **KINDS[kind])
        given = {"optimizers": (optimizer, None)}
    trainer = Trainer(model, arguments, train_dataset=rows, **given)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(inner, kind)
    ratios = list(inner.trust_ratios().values())
    matrices = sum(p.ndim > 1 for p in model.parameters())
    assert sum(ratio.item() != 1.0 for ratio in ratios) == matrices < len(ratios)


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_prepares_it(kind):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = nn.Linear(3, 1)
    wrapped, optimizer = accelerator.prepare(model, kind(model.parameters(), lr=0.1))
    for _ in range(40):
        loss = (wrapped(torch.eye(3)) - 1).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1
