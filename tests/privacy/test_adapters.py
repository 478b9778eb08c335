# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from dist_ranks import run_on_ranks
from recorded_noise import Zero
from rounded_scales import ROUNDED

from batchery.privacy import (
    Budget,
    DiscreteNoise,
    MaxSum,
    OnOneRank,
    PrivateAccuracy,
    TreeCounter,
)

pytestmark = pytest.mark.filterwarnings("ignore:noise from insecure_seed")
RHO = Budget(rho=0.5)


def counter():
    return TreeCounter(5, 3, budget=RHO, noise=DiscreteNoise(insecure_seed=1))


def row(rank, t):
    return torch.arange(3) * (rank + 1) + t


def _on_rank(rank, size):
    private = OnOneRank(counter() if rank == 0 else None)
    written = []
    found = [private.update(row(rank, t), commit=written.append) for t in range(5)]
    try:
        private.update(row(rank, 5))
    except Exception as error:
        return torch.stack(found), len(written), f"{type(error).__name__}: {error}"
    raise AssertionError("beyond the horizon")


@pytest.mark.dist
def test_all_ranks_learn_the_release_of_the_first():
    wanted = counter().update_many(torch.stack([row(0, t) + row(1, t) for t in range(5)]))
    (one, written, here), (two, silent, there) = run_on_ranks(_on_rank)
    assert torch.equal(one, wanted)
    assert torch.equal(two, wanted)
    assert (written, silent) == (5, 0)
    assert here.startswith("HorizonExceeded: TreeCounter: 1 more after 5")
    assert there == "RuntimeError: OnOneRank: HorizonExceeded on the first rank"


def test_one_process_is_the_mechanism_itself():
    private = OnOneRank(counter())
    found = torch.stack([private.update(row(0, t)) for t in range(5)])
    assert torch.equal(found, counter().update_many(torch.stack([row(0, t) for t in range(5)])))
    assert (
        OnOneRank(MaxSum(3, 2, budget=RHO, mechanism="constant")).update(torch.zeros(2).long()) == 0
    )
    with pytest.raises(ValueError, match="OnOneRank: mechanism must be given on the first rank"):
        OnOneRank(None)


def test_accuracy_without_noise_is_the_accuracy():
    accuracy = PrivateAccuracy(4, budget=RHO, noise=Zero())
    assert math.isnan(accuracy.compute())
    accuracy.update(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 0]))
    accuracy.update(torch.tensor([[4]]), torch.tensor([[0]]))
    assert accuracy.compute() == 0.5
    with pytest.raises(ValueError, match="predicted must have the shape of target"):
        accuracy.update(torch.zeros(3), torch.zeros(2))


def test_confusion_counts_are_those_of_all_batches_since_the_reset():
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(0, 3, (5, 2, 20), generator=generator)
    accuracy = PrivateAccuracy(5, budget=RHO, num_classes=3, noise=Zero())
    assert accuracy.confusion().tolist() == [[0] * 3] * 3
    for reset in (0, 2):
        if reset:
            accuracy.reset()
            assert math.isnan(accuracy.compute())
        for predicted, target in batches[reset : reset + 2]:
            accuracy.update(predicted, target)
        predicted, target = batches[reset : reset + 2].transpose(0, 1).reshape(2, -1)
        wanted = [
            [int(((target == i) & (predicted == j)).sum()) for j in range(3)] for i in range(3)
        ]
        assert accuracy.confusion().tolist() == wanted
        assert accuracy.compute() == pytest.approx(float((target == predicted).double().mean()))


def test_accuracy_is_that_of_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics.classification")
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(0, 4, (6, 2, 30), generator=generator)
    ours = [PrivateAccuracy(6, budget=RHO, num_classes=k, noise=Zero()) for k in (None, 4)]
    theirs = torchmetrics.MulticlassAccuracy(4, average="micro")
    cells = torchmetrics.MulticlassConfusionMatrix(4)
    for step, (predicted, target) in enumerate(batches):
        for metric in (*ours, theirs, cells):
            if step == 3:
                metric.reset()
            metric.update(predicted, target)
        for metric in ours:
            assert metric.compute() == pytest.approx(float(theirs.compute()), rel=1e-6)  # float32
        assert torch.equal(ours[1].confusion(), cells.compute())


@pytest.mark.parametrize("classes", [None, 3])
def test_accuracy_resumes_with_the_noise_in_it(classes):
    def build():
        noise = DiscreteNoise(insecure_seed=1)
        return PrivateAccuracy(6, budget=RHO, num_classes=classes, noise=noise)

    batches = torch.randint(0, 3, (6, 2, 20), generator=torch.Generator().manual_seed(0))
    whole, states = build(), []
    for step, (predicted, target) in enumerate(batches):
        if step == 2:
            whole.reset()
        whole.update(predicted, target, commit=states.append)
    for state in (states[0], states[3]):
        again = build()
        again.load_state_dict(state)
        for step, (predicted, target) in enumerate(batches):
            if step == 2 and again.counter.t == 2:
                again.reset()
            if step >= again.counter.t:
                again.update(predicted, target)
        assert again.compute() == whole.compute()
        assert again.spent == whole.spent == RHO
        if classes:
            assert torch.equal(again.confusion(), whole.confusion())


def test_what_accuracy_refuses_is_named_and_leaves_no_trace():
    accuracy = PrivateAccuracy(4, budget=RHO, num_classes=3, noise=Zero())
    labels = torch.tensor([0, 1, 2])
    accuracy.update(labels, labels)
    before = repr(accuracy.state_dict())
    wrong = [
        (
            TypeError,
            lambda: accuracy.update(labels, [0, 1, 2]),
            "target must be a tensor, got list",
        ),
        (TypeError, lambda: accuracy.update(None, labels), "predicted must be a tensor, got None"),
        (ValueError, lambda: accuracy.update(labels, labels + 1), "target must hold class indices"),
        (ValueError, lambda: accuracy.update(labels - 1, labels), "predicted must hold class ind"),
        (ValueError, lambda: accuracy.update(labels / 2, labels), "indices below 3, got .*float32"),
        (TypeError, lambda: accuracy.load_state_dict(3), "state_dict must be a mapping, got int"),
        (ValueError, lambda: accuracy.load_state_dict({}), "state_dict must hold 'counter'"),
        (TypeError, lambda: PrivateAccuracy(4, budget=0.5), "budget must be a Budget, got float"),
        (ValueError, lambda: PrivateAccuracy(0, budget=RHO), "batches must be >= 1, got 0"),
        (ValueError, lambda: PrivateAccuracy(4, budget=RHO, num_classes=1), "num_classes must be"),
        (ValueError, PrivateAccuracy(4, budget=RHO).confusion, "num_classes must be given"),
    ]
    state = accuracy.state_dict()
    floats = state["base"].double()
    for part in ({"base": 3}, {"base": torch.zeros(2)}, {"base": floats}, {"since": -1}):
        bad = lambda part=part: accuracy.load_state_dict({**state, **part})  # noqa: E731
        wrong.append((ValueError, bad, "state_dict"))
    for error, call, message in wrong:
        with pytest.raises(error, match=f"PrivateAccuracy: .*{message}"):
            call()
        assert repr(accuracy.state_dict()) == before
    with pytest.raises(TypeError, match="OnOneRank: row must be a tensor, got list"):
        OnOneRank(counter()).update([1, 2, 3])


def test_accuracy_pays_for_both_counts():
    # Both counts move by one: squared sensitivity 2 in 3 levels; L1 sensitivity 2.
    assert PrivateAccuracy(4, budget=RHO).counter.design.scale == pytest.approx(6, rel=ROUNDED)
    assert PrivateAccuracy(4, budget=Budget.pure(1.0)).counter.design.scale == 6
    # Another record moves from one cell of a confusion matrix to another.
    for budget in (RHO, Budget.pure(1.0)):
        cells = PrivateAccuracy(4, budget=budget, num_classes=9).counter.design
        assert cells.scale == PrivateAccuracy(4, budget=budget).counter.design.scale
