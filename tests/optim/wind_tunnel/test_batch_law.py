# SPDX-License-Identifier: Apache-2.0
"""Oracles of the batch-size law: planted laws, and intervals that hold them under noise."""

import numpy as np
import pytest

from batchery.optim.wind_tunnel import (
    MINICPM_BATCH_LAW,
    BatchSizeLaw,
    fit_batch_size_law,
    optimal_batch_size,
)
from batchery.optim.wind_tunnel.batch_law import _optima

COEF, EXPONENT = 1e6, 3.0
SIZES = 2.0 ** np.arange(11, 18)


def readings(sizes=SIZES, losses=None, seed=None, scales=(1.0,)):
    """Runs whose tokens at a loss are a parabola around the planted best batch."""
    losses = np.geomspace(6.0, 2.4, 40) if losses is None else losses
    generator = np.random.default_rng(seed)
    rows = []
    for scale in scales:  # one model each
        for size in sizes:
            away = np.log(size) - np.log(COEF / losses**EXPONENT)
            log_tokens = np.log(scale * 1e9) - 5 * np.log(losses) + 0.15 * away**2
            if seed is not None:  # a run is off as a whole, and each reading a little
                log_tokens += 0.02 * generator.standard_normal()
                log_tokens += 0.005 * generator.standard_normal(len(losses))
            rows += zip(losses, np.full_like(losses, size), np.exp(log_tokens), strict=True)
    return [np.array(column) for column in zip(*rows, strict=True)]


def test_a_planted_law_is_recovered_from_readings_at_the_levels():
    levels = [2.5, 3.0, 4.0, 5.0]
    law = fit_batch_size_law(*readings(losses=np.array(levels)), levels=levels)
    assert law.coef == pytest.approx(COEF, rel=1e-9)
    assert law.exponent == pytest.approx(EXPONENT, rel=1e-9)
    assert law.stderr < 1e-9
    for (level, best), wanted in zip(law.points, sorted(levels), strict=True):
        assert level == pytest.approx(wanted, rel=1e-12)
        assert best == pytest.approx(COEF / wanted**EXPONENT, rel=1e-9)


def test_between_readings_it_interpolates():
    # interpolation errs by the same for every size, so that the best batch stays where it is
    law = fit_batch_size_law(*readings())
    assert law.exponent == pytest.approx(EXPONENT, rel=1e-9)
    assert law.coef == pytest.approx(COEF, rel=1e-9)
    assert [level for level, _ in law.points] == pytest.approx(np.geomspace(6.0, 2.4, 9))


def test_the_order_of_the_readings_and_setbacks_do_not_matter():
    losses, batch, tokens = readings(seed=0)
    order = np.random.default_rng(0).permutation(len(losses))
    wanted = fit_batch_size_law(losses, batch, tokens)
    assert fit_batch_size_law(losses[order], batch[order], tokens[order]) == wanted
    # a later reading with a higher loss says nothing about when the lower one was reached
    late = (5.0, batch[0], tokens.max() * 2)
    spiked = [np.append(c, v) for c, v in zip((losses, batch, tokens), late, strict=True)]
    assert fit_batch_size_law(*spiked) == wanted


def test_the_gradient_behind_the_intervals():
    sizes, levels = np.array([7.0, 8.0, 10.0, 11.5, 12.0]), np.array([2.0, 3.0, 4.0])
    log_loss, log_batch = (grid.ravel() for grid in np.meshgrid(np.log(levels), sizes))
    log_tokens = 0.1 * (log_batch - 12 + 2 * log_loss) ** 2 + 0.01 * np.sin(9 * log_batch)

    def best(log_tokens):
        return _optima("test", None, log_loss, log_batch, log_tokens - 5 * log_loss, levels)

    at, _, gradient, _ = best(log_tokens)
    assert at == pytest.approx(np.log(levels))
    for run, size in enumerate(sizes):
        ends = [best(log_tokens + shift * (log_batch == size))[1] for shift in (-1e-5, 1e-5)]
        assert gradient[run] == pytest.approx((ends[1] - ends[0]) / 2e-5, rel=1e-6)


def test_models_share_the_law_but_not_their_tokens():
    losses, batch, tokens = readings(scales=(1.0, 3.0), losses=np.array([2.5, 3.0, 4.0, 5.0]))
    models = ["small"] * (len(losses) // 2) + ["large"] * (len(losses) // 2)
    law = fit_batch_size_law(losses, batch, tokens, models=models, levels=[2.5, 3.0, 4.0, 5.0])
    assert law.exponent == pytest.approx(EXPONENT, rel=1e-9)
    assert len(law.points) == 8


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 3.0)])
@pytest.mark.parametrize("sizes", [SIZES, 4.0 ** np.arange(5.5, 9.5)], ids=len)
@pytest.mark.filterwarnings("ignore:fit_batch_size_law")
def test_intervals_hold_the_planted_law_under_noise(sizes, scales):
    # 100 data sets: at 95 % the count inside lies between 90 and 99 with odds of 98 in 100
    inside = {"coef": 0, "exponent": 0, "batch": 0}
    for seed in range(100):
        losses, batch, tokens = readings(sizes, seed=seed, scales=scales)
        models = np.arange(len(losses)) // (len(losses) // len(scales))
        law = fit_batch_size_law(losses, batch, tokens, models=models.tolist())
        truth = {"coef": COEF, "exponent": EXPONENT, "batch": COEF / 3.0**EXPONENT}
        found = law.ci | {"batch": law.interval(3.0)}
        for name, (low, high) in found.items():
            inside[name] += low <= truth[name] <= high
    assert all(88 <= count < 100 for count in inside.values()), inside


def test_three_sizes_give_a_law_without_intervals():
    levels = [2.6, 3.0, 4.0, 5.0]
    three = readings(sizes=2.0 ** np.array([12, 14, 16]), losses=np.array(levels))
    law = fit_batch_size_law(*three, levels=levels)
    assert law.exponent == pytest.approx(EXPONENT, rel=1e-9)
    for broken in (lambda: law.ci, lambda: law.stderr, lambda: law.interval(3.0)):
        with pytest.raises(ValueError, match="BatchSizeLaw: covariance must be known"):
            broken()


def test_levels_without_a_best_batch_inside_are_left_out_aloud():
    narrow = readings(sizes=2.0 ** np.arange(14, 17), losses=np.array([2.5, 2.8, 3.2, 3.8, 6.0]))
    levels = [2.5, 2.8, 3.2, 3.8, 6.0]  # best at 6.0: 4,630, below the smallest batch
    with pytest.warns(UserWarning, match=r"no best batch within those tried at losses 6.000"):
        law = fit_batch_size_law(*narrow, levels=levels)
    assert law.exponent == pytest.approx(EXPONENT, rel=1e-9)
    assert len(law.points) == 4


def test_the_papers_instance():
    for loss, tokens in ((4.0, 2.12e5), (3.0, 1.275e6), (2.5, 3.98e6)):
        assert optimal_batch_size(loss, MINICPM_BATCH_LAW) == pytest.approx(tokens, rel=2e-3)
    both = optimal_batch_size(np.array([4.0, 3.0]), MINICPM_BATCH_LAW)
    assert both[0] == optimal_batch_size(4.0, MINICPM_BATCH_LAW)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, b, t: (x[:5], b[:5], t[:5]), "losses must hold 6 readings or more, got 5"),
        (lambda x, b, t: (x, b[1:], t), "shapes must agree"),
        (lambda x, b, t: (-x, b, t), "losses must be positive"),
        (lambda x, b, t: (x, b * 0, t), "batch must be positive"),
        (lambda x, b, t: (x, b, t / 0), "tokens must be positive"),
        (lambda x, b, t: (x, b * 0 + 64, t), "batch must hold 3 sizes or more, got 1"),
    ],
)
def test_data_that_cannot_be_fitted_are_named(change, message):
    with np.errstate(divide="ignore"), pytest.raises(ValueError, match=message):
        fit_batch_size_law(*change(*readings()))


def test_bad_arguments_are_named():
    data = readings()
    with pytest.raises(ValueError, match="models must hold 280 labels, got 1"):
        fit_batch_size_law(*data, models=["one"])
    with pytest.raises(ValueError, match="levels with a best batch must be 3 or more, got 2"):
        fit_batch_size_law(*data, levels=[3.0, 4.0])
    with pytest.raises(ValueError, match="loss must be positive"):
        optimal_batch_size(-1.0, MINICPM_BATCH_LAW)
    with pytest.raises(ValueError, match="BatchSizeLaw: coef must be > 0, got 0.0"):
        BatchSizeLaw(0.0, 1.0)
