# SPDX-License-Identifier: Apache-2.0
"""A language model trained, put into four bits, and judged without telling of its test texts.

A tiny Llama learns a part of Python's standard library; GPTQ quantises it; how often each of the
two guesses the next token is released with differential privacy, ε = 4 for each, so that no single
test text shows.
"""

import torch

from batchery import datasets
from batchery.compress.quant import gptq_quantize_model, replace_linears
from batchery.optim import LAMB, WSDScheduler, layer_adaptation_groups
from batchery.privacy import Budget, PrivateAccuracy
from batchery.studies import lab

SIZE = lab.LabSize("example", 128, 1, 4, 2, context=64, vocabulary=300)
BATCHES = 20  # of test texts


def accuracy(model, rows: torch.Tensor) -> float:
    """Return the share of right guesses, released once after all batches."""
    judge = PrivateAccuracy(BATCHES, budget=Budget.approx(epsilon=4.0, delta=1e-6))
    for part in rows.chunk(BATCHES):
        with torch.no_grad():
            guess = model(part[:, :-1]).logits[:, -1].argmax(-1)
        judge.update(guess, part[:, -1])
    return judge.compute()


def main(steps: int = 300) -> tuple[float, float]:
    """Train, quantise, and return both accuracies."""
    corpus = lab.split_corpus([datasets.load("stdlib-text")[:500_000]])
    text = lab.lab_text(SIZE.vocabulary, corpus)
    model = lab.new_model(SIZE)
    optimizer = LAMB(layer_adaptation_groups(model, weight_decay=0.01), lr=1e-2)
    schedule = WSDScheduler(optimizer, steps // 20, steps, num_decay=0.3, offset=1)
    batches = lab.batches(text.train, 16, SIZE.context)
    lab.train(model, batches, optimizer, schedule, steps)

    tests = torch.split(text.held_out, SIZE.context + 1)[: BATCHES * 50]
    rows = torch.stack([row for row in tests if len(row) == SIZE.context + 1]).long()
    dense = accuracy(model, rows)
    report = gptq_quantize_model(model, [next(batches)[:, :-1]], group_size=32, progress=False)
    replace_linears(model, report.weights)
    four_bits = accuracy(model, rows)
    print(f"next token right: {dense:.1%} dense, {four_bits:.1%} in four bits")
    return dense, four_bits


if __name__ == "__main__":
    main()
