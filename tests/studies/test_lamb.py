# SPDX-License-Identifier: Apache-2.0
from batchery.studies.lamb import STUDY
from batchery.studies.study import SCALES


def test_the_claims_rest_on_the_fixed_rule_and_not_on_retuning():
    claims = [c for c in STUDY.comparisons if c.claim]
    assert {c.metric for c in claims} == {"loss_large", "error_large"}
    assert set(STUDY.seeds) == set(SCALES)
