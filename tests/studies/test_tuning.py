# SPDX-License-Identifier: Apache-2.0
import math

import pytest

from batchery.studies.tuning import walk


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
