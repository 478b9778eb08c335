# SPDX-License-Identifier: Apache-2.0
"""A small classifier trained at a large batch: LAMB, a schedule without an end, hard batches.

The batch is a fifth of the data. LAMB's rate follows it by the square root; half of the batches,
those the model still gets wrong, take all steps after the first epoch; the rate stays constant
until we decide to stop, and decays then. The run is interrupted once, and goes on.
"""

from itertools import chain, islice, repeat

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from batchery import datasets
from batchery.optim import LAMB, WSDScheduler, layer_adaptation_groups, scale_lr
from batchery.select import HardBatchSampler

BATCH = 256


def build(data: TensorDataset):
    """Return all that has a state."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.LayerNorm(128), nn.Linear(128, 10))
    lr = scale_lr(2e-2, BATCH, base_batch=32)
    optimizer = LAMB(layer_adaptation_groups(model, weight_decay=0.01), lr=lr)
    schedule = WSDScheduler(optimizer, num_warmup=10)  # how long to train is not known yet
    sampler = HardBatchSampler(len(data), BATCH, delta=0.5)
    return model, optimizer, schedule, sampler


def train(state, data: TensorDataset, steps: int) -> None:
    """Make so many steps."""
    model, optimizer, schedule, sampler = state
    loader = DataLoader(data, batch_sampler=sampler)
    for x, y in islice(chain.from_iterable(repeat(loader)), steps):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sampler.update(loss.detach())
        schedule.step()


def main() -> float:
    """Train in two parts, decay, and return the test accuracy."""
    arrays = {key: torch.from_numpy(value) for key, value in datasets.load("digits").items()}
    data = TensorDataset(arrays["x_train"], arrays["y_train"])
    first, again = build(data), build(data)
    train(first, data, 40)
    for new, old in zip(again, first, strict=True):
        new.load_state_dict(old.state_dict())
    train(again, data, 40)
    model, optimizer, schedule, sampler = again
    train(again, data, schedule.start_decay(0.2))  # a fifth of the whole run
    right = (model(arrays["x_test"]).argmax(1) == arrays["y_test"]).float().mean().item()
    ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in optimizer.trust_ratios().items())
    print(f"{schedule.last_epoch} steps, {sampler.epoch + 1} rounds, {schedule.phase}")
    print(f"test accuracy {100 * right:.1f} %, last trust ratios: {ratios}")
    return right


if __name__ == "__main__":
    main()
