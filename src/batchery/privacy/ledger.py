# SPDX-License-Identifier: Apache-2.0
r"""What private streams survive crashes by, and what keeps several of them within one budget.

Use it for every stream whose releases leave the process. Not for simulation: each update waits for
the disk, some milliseconds; `update_many` waits once for many releases. For each stream the file
holds what was declared, the state of the mechanism, every release, and what has been spent.

    release   the row is added, noise is drawn      a crash here: nobody has seen that noise
    persist   state and release, in one transaction a crash here: `pending()` has it,
    publish   the caller shows the release          the same value, at no cost
    confirm   that it was shown is written with the next transaction

Nothing is shown that is not on disk, so that no noise is drawn again for what was seen. A release
may be shown twice, never with two values.

One process at a time holds a stream, by a lock that ends with the process. What counts is the
version: an update begins by finding the entry as this process left it, inside the transaction, or
draws nothing. A total is kept by reserving: opening a stream takes all that it may ever cost.
Before its first step closing it gives that back, and opening it declares it anew; afterwards
nothing does.

THE FILE IS AS SENSITIVE AS THE RAW DATA: it holds exact sums, and the noise that hides them. It has
mode 0600. An old copy of it would draw noise again for what was seen: say how much has been
published, and it is refused.

How the file is made and written is in `batchery.privacy.ledger_file`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from batchery._core.state import check_fits
from batchery._core.validate import require, require_type
from batchery.privacy.accounting import Budget
from batchery.privacy.ledger_file import LedgerFile
from batchery.privacy.mechanism import Mechanism
from batchery.privacy.saved_state import state_from_bytes, state_to_bytes
from batchery.privacy.stream import Stream


class BudgetExceeded(ValueError):
    """A stream would take more than what is left of the total; it was not opened.

    Examples:
        >>> import tempfile
        >>> from batchery.privacy import TreeCounter
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Ledger(f"{folder}/clicks.db", total=Budget(rho=0.5)) as ledger:
        ...         ledger.open("clicks", TreeCounter(9, budget=Budget(rho=0.6)))
        Traceback (most recent call last):
        batchery.privacy.ledger.BudgetExceeded: stream 'clicks' costs Budget(rho=0.6); of the
        ledger's Budget(rho=0.5), nothing is reserved already
    """


def within(total: Budget, costs: Sequence[Budget]) -> bool:
    """Say whether mechanisms of these costs, run beside each other, stay within a total.

    Pure ε add up under a pure total. Under another ρ does; and if all of them are continuous
    Gaussian mechanisms, μ² does, against the μ of (ε, δ). A total of Gaussian loss takes no others.
    Numbers are taken as the decimals they are written as: 0.1 and 0.2 fit into 0.3.

    Examples:
        >>> within(Budget(rho=0.3), [Budget(rho=0.1), Budget(rho=0.2)])
        True
        >>> within(Budget.pure(1.0), [Budget(rho=0.1)])
        False
    """
    if total.pure_epsilon is not None:
        pure = [cost.pure_epsilon for cost in costs if cost.pure_epsilon is not None]
        return len(pure) == len(costs) and _sum(pure) <= _sum([total.pure_epsilon])
    gaussian = all(cost.gaussian for cost in costs)
    if total.gaussian and not gaussian:
        return False
    limit = total.for_gaussian() if gaussian else total
    return _sum([cost.rho for cost in costs]) <= _sum([limit.rho])


def _sum(numbers: Sequence[float]) -> Fraction:
    return sum((Fraction(repr(float(number))) for number in numbers), Fraction(0))


@dataclass(frozen=True)
class Account:
    """What a ledger says of one stream.

    Attributes:
        name: of the stream.
        t: steps of its mechanism.
        reserved: what all its releases may cost; nothing, if it was closed before the first step.
        spent: what those up to `t` have cost.
    """

    name: str
    t: int
    reserved: Budget
    spent: Budget


class Ledger:
    """A file of private streams.

    Args:
        path: of the file; it is made when there is none.
        total: what all streams together may cost. It is said once, best when the file is made;
            later it may be left out, and another one is refused.

    Attributes:
        total: the total, or None.

    Raises:
        BudgetExceeded: the file had no total, and its streams have reserved more than this one.
        CorruptLedger: the file is damaged, empty, or no ledger; it is left as it is.
        ValueError: the file has another total.

    Examples:
        >>> import tempfile
        >>> from batchery.privacy import TreeCounter
        >>> folder = tempfile.TemporaryDirectory()
        >>> with Ledger(f"{folder.name}/clicks.db", total=Budget(rho=1.0)) as ledger:
        ...     counter = TreeCounter(1000, budget=Budget(rho=0.5))
        ...     with ledger.open("clicks", counter) as stream:
        ...         release = stream.update(1)  # may now be shown
        ...         stream.confirm(release.t)
        ...     [(account.t, account.reserved) for account in ledger.accounts()]
        [(1, Budget(rho=0.5))]
        >>> folder.cleanup()
    """

    def __init__(self, path: str | Path, *, total: Budget | None = None) -> None:
        """Open the file, or make it; see the class."""
        fits = total is None or isinstance(total, Budget)
        require_type(fits, "Ledger", "total", "must be a Budget", total)
        self.file = LedgerFile(path, None if total is None else asdict(total))
        try:
            with self.file.writing():
                self._agree(total)
        except BaseException:
            self.close()
            raise

    def _agree(self, total: Budget | None) -> None:
        """Read the total, or set it if the file has none."""
        found = self.file.total()
        self.total = None if found is None else _budget(found)
        if total is None or (self.total is not None and _same(total, self.total)):
            return
        rule = f"must be {self.total!r}, as {self.file.path} has it"
        require(self.total is None, "Ledger", "total", rule, total)
        costs = self._reserved()
        if not within(total, costs):
            taken = " and ".join(map(repr, costs))
            raise BudgetExceeded(
                f"{self.file.path} has reserved {taken}, beyond a total of {total!r}"
            )
        self.file.set_total(asdict(total))
        self.total = total

    def _reserved(self, *, without: str | None = None) -> list[Budget]:
        """Return what streams have reserved, but for one of them."""
        heads = [entry.head for entry in self.file.entries()]
        costs = [_budget(head["cost"]) for head in heads if head["name"] != without]
        return [cost for cost in costs if cost.rho > 0]

    def accounts(self) -> list[Account]:
        """Return what every stream has reserved and spent, in order of opening."""
        with self.file.writing():
            heads = [entry.head for entry in self.file.entries()]
        return [
            Account(head["name"], head["t"], _budget(head["cost"]), _budget(head["spent"]))
            for head in heads
        ]

    def open(
        self,
        name: str,
        mechanism: Mechanism,
        *,
        declared: Mapping[str, Any] | None = None,
        published: int = 0,
    ) -> Stream:
        """Go on with a stream, or begin it and reserve its cost.

        Args:
            name: of the stream.
            mechanism: a new one, with the stream's parameters and, if its noise was another's,
                another's again; it is given the saved state.
            declared: further parameters, plain values; from the first step on they must be the
                same every time.
            published: steps whose releases the world is known to have seen.

        Raises:
            BudgetExceeded: the total would be exceeded; nothing more is reserved.
            LedgerConflict: another process holds the stream.
            ValueError: a parameter is not what was declared (it is named), the mechanism has been
                used, or the saved state is behind what was published.
        """
        require_type(isinstance(name, str), "Ledger", "name", "must be a string", name)
        require(bool(name), "Ledger", "name", "must not be empty", name)
        require(mechanism.t == 0, "Ledger", "mechanism", "must be new", mechanism)
        state, own = mechanism.state_dict(), dict(declared or {})
        injected = {"injected": mechanism.injected}
        twice = sorted(own.keys() & (state["settings"] | injected).keys())
        require(not twice, "Ledger", "declared", "must not name the mechanism's settings", twice)
        parameters = json.loads(json.dumps({**state["settings"], **own, **injected}))
        cost = mechanism.cost
        head = {
            "name": name,
            "declared": parameters,
            "cost": asdict(cost),
            "spent": asdict(mechanism.spent),
            "t": 0,
            "published": 0,
            "releases": 0,
            "note": None,
        }
        with ExitStack() as undo:
            with self.file.writing():
                entry = next((e for e in self.file.entries() if e.head["name"] == name), None)
                begun = entry is not None and entry.head["t"] > 0
                if not begun:  # refused before there is a lock, whose file would stay
                    self._require_room(name, cost)
                    mechanism.resume(state, published=int(published))
                entry = entry or self.file.add(head, state_to_bytes(state))
                lock = self.file.lock(entry.id, name)
                undo.callback(lock.close)
                if not begun:
                    entry = replace(entry, head=head, state=state_to_bytes(state))
                owner = f"stream {name!r}"
                check_fits(owner, entry.head["declared"], parameters)
                check_fits(owner, parameters, entry.head["declared"])
                seen = max(int(published), entry.head["published"])
                mechanism.resume(state_from_bytes(entry.state), published=seen)
                # Should locks not work here, the one before finds another version, and stops.
                head = entry.head | {"published": seen}
                entry = replace(entry, version=entry.version + 1, head=head)
                self.file.write(entry)
            undo.pop_all()
        return Stream(self.file, entry, mechanism, lock)

    def _require_room(self, name: str, cost: Budget) -> None:
        """Refuse a stream that does not fit into the total beside the others."""
        self._agree(None)
        others = self._reserved(without=name)
        if self.total is not None and not within(self.total, [*others, cost]):
            taken = " and ".join(map(repr, others)) or "nothing"
            raise BudgetExceeded(
                f"stream {name!r} costs {cost!r}; of the ledger's {self.total!r}, "
                f"{taken} is reserved already"
            )

    def close(self) -> None:
        """Close the file; streams must be closed before."""
        self.file.close()

    def __enter__(self) -> "Ledger":
        """Return the ledger."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def __repr__(self) -> str:
        """Show the file and the total."""
        return f"Ledger({str(self.file.path)!r}, total={self.total!r})"


def _same(one: Budget, other: Budget) -> bool:
    """Compare budgets; the ρ of an (ε, δ) only as far as mathematical libraries agree on it."""
    if one.target is None or one.target != other.target:
        return one == other
    return math.isclose(one.rho, other.rho)


def _budget(fields: Mapping[str, Any]) -> Budget:
    target = fields["target"]
    return Budget(**{**fields, "target": None if target is None else tuple(target)})
