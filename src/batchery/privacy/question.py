# SPDX-License-Identifier: Apache-2.0
"""What is asked of a stream of records: how one becomes a row of integers, and which mechanism.

Everything that decides about noise is declared before the first record: columns, values, range. A
record that does not fit is named by its column, never by its content.

    "count"   records; or in each column of 0 and 1; or with each of the declared values
    "sum"     of each column, whole numbers in a declared range
    "max"     the largest count; rows of one 1 with values, of any with columns
    "select"  the column, or the value, whose count is largest

One record changes a row by Δ: 1 for a count of records, √2 for one of several values (L1: 2), and
for d columns of a range of width w, with 0 in it, w √d (L1: w d). A record that cannot be read may
be counted as zeros, since 0 is in every range and is what no value gives.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from batchery._core.validate import integer, one_of, require
from batchery.privacy.accounting import Budget
from batchery.privacy.counters import TreeCounter
from batchery.privacy.max_sum import MaxSum, SumSelect
from batchery.privacy.mechanism import Mechanism, Undrawable
from batchery.privacy.noise_rows import Noise

Ask = Literal["count", "sum", "max", "select"]
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_LARGEST = 1 << 40  # of a range


class BadRecord(ValueError):
    """A record does not fit what was declared; the message does not show what it holds."""


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        ask: see the module.
        columns: names of the columns that are read; none to count records.
        values: all values of the one column, where it holds a word and not a number.
        range: least and largest number in a column of "sum".

    Raises:
        ValueError: these do not go together.

    Examples:
        >>> question = Question("count", ("city",), ("paris", "rome"))
        >>> question.row({"city": "rome"})
        [0, 1]
        >>> question.shown([3, 4])
        {'paris': 3, 'rome': 4}
    """

    ask: Ask
    columns: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    range: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        """Check what is asked; see the class."""
        one_of("Question", "ask", self.ask, get_args(Ask))
        for name, given in (("columns", self.columns), ("values", self.values)):
            distinct = len(set(given)) == len(given) and all(given)
            require(distinct, "Question", name, "must be distinct and not empty", list(given))
        some = bool(self.columns) or self.ask == "count"
        require(some, "Question", "columns", f"must be given for {self.ask!r}", list(self.columns))
        if self.values:
            one = len(self.columns) == 1
            require(one, "Question", "columns", "must be one if values are given", self.columns)
            rule = "must not be given for 'sum', which adds numbers"
            require(self.ask != "sum", "Question", "values", rule, list(self.values))
        for end in self.range:
            integer("Question", "range", end)
        low, high = self.range
        ordered = low < high and max(-low, high) <= _LARGEST
        require(ordered, "Question", "range", "must be low < high, within ±2^40", self.range)
        rule = "must be 0 to 1 but for 'sum'"
        require(self.ask == "sum" or self.range == (0, 1), "Question", "range", rule, self.range)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the entries of a row; none if it counts records."""
        return self.values or self.columns

    @property
    def width(self) -> int:
        """Number of entries of a row."""
        return max(1, len(self.labels))

    def row(self, record: Mapping[str, Any]) -> list[int]:
        """Return the row of a record.

        Args:
            record: values by column; of JSON, or text.

        Raises:
            BadRecord: a column is missing, or its value is none that was declared.
        """
        if not self.columns:
            return [1]
        for column in self.columns:
            if column not in record:
                raise BadRecord(f"column {column!r} is missing")
        if self.values:
            found = _word(record[self.columns[0]])
            if found not in self.values:
                raise BadRecord(f"column {self.columns[0]!r} holds none of the declared values")
            return [int(value == found) for value in self.values]
        return [self._number(column, record[column]) for column in self.columns]

    def _number(self, column: str, cell: Any) -> int:
        try:
            value = _whole(cell)
        except BadRecord as error:
            raise BadRecord(f"column {column!r} {error}") from None
        low, high = self.range
        if value < 0 <= low:
            raise BadRecord(f"column {column!r} is negative")
        if not low <= value <= high:
            raise BadRecord(f"column {column!r} is outside of {low} to {high}")
        return value

    def sensitivity(self, *, pure: bool) -> float:
        """Return the most by which one record, replaced or unreadable, changes a row: L1 or L2."""
        if self.values:
            entries = min(2, self.width)
            return entries if pure else _root(entries)
        step = max(self.range[1], 0) - min(self.range[0], 0)
        return step * self.width if pure else _root(step * step * self.width)

    @property
    def steps_each_record(self) -> bool:
        """Whether the mechanism takes every record by itself, or the sum of a batch."""
        return self.ask in ("max", "select")

    def mechanism(
        self, horizon: int | None, every: int, budget: Budget, noise: Noise | None = None
    ) -> Mechanism:
        """Return a new mechanism, with exact integer noise.

        Args:
            horizon: number of releases, or None.
            every: records for each of them.
            budget: of all releases.
            noise: in place of the mechanism's own; for tests.

        Raises:
            ValueError: an argument is outside its range, or the noise it takes cannot be drawn.
        """
        if self.steps_each_record:
            build = MaxSum if self.ask == "max" else SumSelect
            records = None if horizon is None else horizon * every
            ones = 1 if self.values else None  # a record has one value, or none
            return build(records, self.width, budget=budget, max_ones=ones, noise=noise)
        sensitivity = self.sensitivity(pure=budget.pure_epsilon is not None)
        try:
            return TreeCounter(
                horizon, self.width, budget=budget, row_sensitivity=sensitivity, noise=noise
            )
        except Undrawable:
            if self.ask != "sum":
                raise
            rule = f"range must ask for exact noise of less than 61 bits within {budget!r}"
            raise Undrawable(f"Question: {rule}, got {self.range}") from None

    def rows(self, records: list[list[int]], every: int) -> Tensor:
        """Return what the mechanism is given for whole batches of records, [n, width]."""
        tensor = torch.tensor(records, dtype=torch.int64)
        return tensor if self.steps_each_record else tensor.reshape(-1, every, self.width).sum(1)

    def answer(self, sums: list[int]) -> Any:
        """Return the true release for column sums, in the form in which the mechanism has it."""
        if self.steps_each_record:
            return max(sums) if self.ask == "max" else sums.index(max(sums))
        return list(sums)

    def shown(self, value: Any) -> Any:
        """Return a release by its names: a number, a name, or numbers by name."""
        if self.ask == "select":
            return self.labels[value]
        if self.ask == "max":
            return value
        return dict(zip(self.labels, value, strict=True)) if self.labels else value[0]

    def declared(self) -> dict[str, Any]:
        """Return the plain values that must stay the same for a stream."""
        return {
            "ask": self.ask,
            "columns": list(self.columns),
            "values": list(self.values),
            "range": list(self.range),
        }


def _root(square: int) -> float:
    """Return √square, or the next float above it."""
    whole = math.isqrt(square)
    return whole if whole * whole == square else math.nextafter(math.sqrt(square), math.inf)


def _word(cell: Any) -> str | None:
    if isinstance(cell, bool):
        return str(cell).lower()  # as JSON writes it
    return str(cell).strip() if isinstance(cell, str | int) else None


def _whole(cell: Any) -> int:
    if isinstance(cell, str):
        text = cell.strip()
        if _WHOLE.fullmatch(text):
            return int(text)
        try:
            if "_" in text or not text.isascii():  # 1_0, and digits of any script, are for Python
                raise ValueError
            cell = float(text)
        except ValueError:
            raise BadRecord("is not a number" if text else "is empty") from None
    if not isinstance(cell, int | float):
        raise BadRecord("is not a number")
    if isinstance(cell, int):
        return int(cell)
    if math.isnan(cell):
        raise BadRecord("is NaN")
    if math.isinf(cell) or not cell.is_integer():
        raise BadRecord("is not a whole number")
    return int(cell)
