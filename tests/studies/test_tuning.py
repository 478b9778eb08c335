# SPDX-License-Identifier: Apache-2.0
import math

import pytest

from batchery.studies.tuning import basin_width, walk


@pytest.mark.parametrize("start", [2.0**-9, 2.0**-4, 1.0])
def test_a_walk_brackets_the_best_rate_of_every_loss(start):
    tried = []

    def run(lr):
        tried.append(lr)
        return [abs(math.log2(lr) - best) for best in (-5, -3)]

    found = walk(run, start)
    assert found["lr"] == [2.0**-5, 2.0**-3]
    assert found["cells"] == [-5 - math.log2(start), -3 - math.log2(start)]
    assert min(tried) <= 2.0**-6
    assert max(tried) >= 2.0**-2
    assert len(tried) == len(set(tried)) == len(found["tried"])


@pytest.mark.parametrize("optimum", [-7, -1, 0, 3, 8])
@pytest.mark.parametrize("basin", [0.0, 0.5])
def test_a_basin_is_walked_to_its_ends(optimum, basin):
    tried = []

    def run(lr):
        tried.append(lr)
        return [abs(math.log2(lr / 0.1) - optimum) * 0.3]

    found = walk(run, 0.1, basin=basin)
    assert found["lr"] == [pytest.approx(0.1 * 2.0**optimum)]
    assert min(tried) < found["lr"][0] < max(tried)
    assert len(tried) == len(set(tried))
    low, high = found["basin"][0]
    assert high / low == pytest.approx(4.0 if basin else 1.0)


def test_a_walk_that_only_diverges_ends():
    tried = []

    def run(lr):
        tried.append(lr)
        return [math.inf]

    walk(run, 1.0)
    assert len(tried) <= 13


@pytest.mark.parametrize(
    ("losses", "width", "whole"),
    [
        ({0.5: 2.4, 1: 2.0, 2: 2.2}, 2**0.25 * 2**0.5, True),  # a quarter and half of the way
        ({0.25: 2.3, 0.5: 2.05, 1: 2.0, 2: 2.1, 4: 2.3}, 2**1.2 * 2, True),
        ({1: 2.0, 2: 2.05, 4: math.inf, 0.5: 2.2}, 2 * 2**0.5, True),  # one that diverged adds none
        ({1: 2.0, 2: 3.0, 4: 2.0, 0.5: 3.0}, 2**0.2, True),  # the other dip is not of this basin
        ({1: 2.0, 2: 2.05, 0.5: 2.2}, 2 * 2**0.5, False),  # nothing was tried beyond 2
        ({1: 2.0, 2: 2.2, 0.5: 2.1}, 2 * 2**0.5, False),
        ({1: 2.0}, 1.0, False),
    ],
)
def test_a_width_is_interpolated_to_where_the_loss_crosses_the_bar(losses, width, whole):
    found = basin_width(losses, 0.1)
    assert found == (pytest.approx(width), whole)


@pytest.mark.parametrize("scale", [0.01, 7.0])
def test_a_width_is_the_slopes_of_a_wedge_and_knows_no_unit_of_rates(scale):
    """Losses linear in the logarithm on either side: interpolation is exact."""
    tried = {scale * 2.0**k: 2 + (0.03 * k if k > 0 else -0.07 * k) for k in range(-4, 6)}
    width, whole = basin_width(tried, 0.1)
    assert whole
    assert width == pytest.approx(2 ** (0.1 / 0.03 + 0.1 / 0.07))


def test_a_basin_of_runs_that_all_diverged_has_no_width():
    width, whole = basin_width({1.0: math.inf, 2.0: math.inf}, 0.1)
    assert math.isnan(width)
    assert whole


def test_a_walk_gives_what_its_basin_is_measured_by():
    found = walk(lambda lr: [0.06 * math.log2(lr) ** 2], 2.0, basin=0.1)
    tried = {float(lr): loss for lr, (loss,) in found["tried"].items()}
    width, whole = basin_width(tried, 0.1)
    low, high = found["basin"][0]
    assert whole
    assert high / low < width < 4 * high / low
