# SPDX-License-Identifier: Apache-2.0
"""The programs in examples/ run, and do what they say."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def program(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"four_bits", "large_batch"}


def test_large_batch(capsys):
    assert program("large_batch")["main"]() > 0.95
    assert "100 steps" in capsys.readouterr().out


@pytest.mark.slow
def test_four_bits(capsys):
    dense, four_bits = program("four_bits")["main"](steps=60)
    assert abs(dense - four_bits) < 0.1  # both are noisy by design
    assert "in four bits" in capsys.readouterr().out
