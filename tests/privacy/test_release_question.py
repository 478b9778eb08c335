# SPDX-License-Identifier: Apache-2.0
"""What is asked of records: sensitivities, mechanisms, numbers and words."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from batchery.privacy import Budget, MaxSum, SumSelect
from batchery.privacy.question import BadRecord, Question, _root

ASKS = [
    Question("count"),
    Question("count", ("a", "b", "c")),
    Question("count", ("a",), ("x",)),
    Question("count", ("a",), ("x", "y", "z")),
    Question("sum", ("a",), range=(0, 7)),
    Question("sum", ("a", "b"), range=(-2, 3)),
    Question("sum", ("a", "b"), range=(2, 5)),  # 0, of a bad record, is farther than 2
    Question("sum", ("a",), range=(-9, -3)),
]


@pytest.mark.parametrize("question", ASKS, ids=str)
def test_sensitivity_is_the_most_that_a_record_can_change(question):
    cells = question.values or range(question.range[0], question.range[1] + 1)
    records = [
        dict(zip(question.columns, cells, strict=True))
        for cells in itertools.product(cells, repeat=len(question.columns))
    ]
    rows = np.array([*map(question.row, records), [0] * question.width])  # or a bad record
    changes = np.abs(rows[:, None] - rows)
    assert question.sensitivity(pure=True) == changes.sum(-1).max()
    assert question.sensitivity(pure=False) >= math.sqrt((changes**2).sum(-1).max())
    assert question.sensitivity(pure=False) == pytest.approx(
        math.sqrt((changes**2).sum(-1).max()), rel=1e-12
    )


@pytest.mark.parametrize("square", [2, 3, 4, (1 << 60) - 1, 1 << 60, (1 << 60) + 1])
def test_a_root_is_never_taken_for_less(square):
    assert square <= Fraction(_root(square)) ** 2 <= square * (1 + Fraction(1, 1 << 50))


def test_questions_make_their_mechanisms():
    budget = Budget(rho=0.5)
    assert Question("count").mechanism(10, 5, budget).horizon == 10
    leader = Question("max", ("a", "b")).mechanism(10, 5, budget)
    assert isinstance(leader, MaxSum)
    assert (leader.horizon, leader.num_columns) == (50, 2)
    assert isinstance(Question("select", ("a",), ("x", "y")).mechanism(None, 5, budget), SumSelect)
    for ask in ("max", "select"):  # one line names one value, and any number of columns
        values = Question(ask, ("a",), ("x", "y", "z")).mechanism(10, 5, budget)
        assert values.max_ones == 1
        assert Question(ask, ("a", "b", "c")).mechanism(10, 5, budget).max_ones == 3
    counter = Question("count", ("a",), ("x", "y", "z")).mechanism(1, 1, budget)
    assert 2 <= counter.design.scale < 2.00001
    assert Question("count", ("a",), ("x", "y")).mechanism(1, 1, Budget.pure(1.0)).design.scale == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mean",), "ask must be one of 'count', 'sum', 'max', 'select', got 'mean'"),
        (("sum",), "columns must be given for 'sum'"),
        (("max", ("a", "a")), "columns must be distinct and not empty"),
        (("max", ("a", "")), "columns must be distinct and not empty"),
        (("max", ("a",), ("x", "x")), "values must be distinct"),
        (("max", ("a", "b"), ("x",)), "columns must be one if values are given"),
        (("sum", ("a",), ("x",)), "values must not be given for 'sum'"),
        (("sum", ("a",), (), (3, 3)), "range must be low < high"),
        (("sum", ("a",), (), (0, 1 << 41)), "range must be low < high, within"),
        (("max", ("a",), (), (0, 2)), "range must be 0 to 1 but for 'sum'"),
    ],
)
def test_what_does_not_go_together_is_named(arguments, message):
    with pytest.raises(ValueError, match=f"Question: {message}"):
        Question(*arguments)


CELLS = [
    ("nan", "is NaN"),
    (math.nan, "is NaN"),
    ("inf", "is not a whole number"),
    ("-3", "is negative"),
    (-3, "is negative"),
    ("778", "is outside of 0 to 100"),
    ("9" * 30, "is outside of 0 to 100"),
    ("7.5", "is not a whole number"),
    ("seven", "is not a number"),
    ("1_0", "is not a number"),
    ("1_0.5", "is not a number"),
    ("７", "is not a number"),  # full width
    ("٧", "is not a number"),
    ("", "is empty"),
    (None, "is not a number"),
    ([7], "is not a number"),
]


@pytest.mark.parametrize(("cell", "message"), CELLS)
def test_bad_numbers_are_named_and_not_shown(cell, message):
    question = Question("sum", ("age",), range=(0, 100))
    with pytest.raises(BadRecord, match=f"^column 'age' {message}") as caught:
        question.row({"age": cell})
    for secret in ("778", "7.5", "seven", "99999"):
        assert secret not in str(caught.value)


def test_good_numbers_and_words():
    question = Question("sum", ("age",), range=(-5, 100))
    for cell in (7, "7", " 7 ", "+7", 7.0, "7.0"):
        assert question.row({"age": cell}) == [7]
    assert question.row({"age": True}) == [1]
    assert question.row({"age": "-5"}) == [-5]
    with pytest.raises(BadRecord, match="^column 'age' is outside of -5 to 100$"):
        question.row({"age": -6})
    words = Question("count", ("a",), ("x", "3", "true"))
    assert words.row({"a": " x "}) == [1, 0, 0]
    assert words.row({"a": 3}) == [0, 1, 0]
    assert words.row({"a": True}) == [0, 0, 1]
    for cell in ("secret", None, ["x"], 3.0):
        with pytest.raises(BadRecord, match="^column 'a' holds none of the declared values$"):
            words.row({"a": cell})
    with pytest.raises(BadRecord, match="^column 'a' is missing$"):
        words.row({"b": 1})
