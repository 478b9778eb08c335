# SPDX-License-Identifier: Apache-2.0
import pytest

from batchery.studies.lamb import STUDY, _tune
from batchery.studies.study import SCALES


@pytest.mark.parametrize("optimum", [-7, -1, 0, 3, 8])
@pytest.mark.parametrize("basin", [0.0, 0.5])
def test_tuning_ends_inside_whatever_the_start(optimum, basin):
    tried = []

    def run(lr):
        tried.append(lr)
        import math

        return abs(math.log2(lr / 0.1) - optimum) * 0.3

    found = _tune(run, 0.1, basin)
    assert found["lr"] == pytest.approx(0.1 * 2.0**optimum)
    assert min(tried) < found["lr"] < max(tried)
    assert len(tried) == len(set(tried))
    width = found["basin"][1] / found["basin"][0]
    assert width == pytest.approx(4.0 if basin else 1.0)


def test_the_claims_rest_on_the_fixed_rule_and_not_on_retuning():
    claims = [c for c in STUDY.comparisons if c.claim]
    assert {c.metric for c in claims} == {"loss_large", "error_large"}
    assert set(STUDY.seeds) == set(SCALES)
