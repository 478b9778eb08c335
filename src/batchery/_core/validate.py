# SPDX-License-Identifier: Apache-2.0
"""Argument checks whose messages name the owner, the argument and the value.

Every message reads `LAMB: lr must be >= 0, got -1.0`.
"""

import importlib
import math
from collections.abc import Iterable
from types import ModuleType


def require(ok: bool, owner: str, argument: str, rule: str, got: object) -> None:
    """Raise `ValueError("owner: argument rule, got …")` unless `ok`.

    Examples:
        >>> require(2 > 1, "LAMB", "lr", "must be >= 0", 2)
    """
    if not ok:
        raise ValueError(f"{owner}: {argument} {rule}, got {got!r}")


def require_type(ok: bool, owner: str, argument: str, rule: str, got: object) -> None:
    """Like `require`, for a wrong type: raise `TypeError` naming the type that came."""
    if not ok:
        raise TypeError(f"{owner}: {argument} {rule}, got {type(got).__name__}")


def number(
    owner: str,
    argument: str,
    value: float,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
) -> float:
    """Return `value` when it is a real number inside the given bounds; NaN is inside none.

    Raises:
        TypeError: `value` is not a real number (a bool is not one).
        ValueError: `value` is NaN or outside the bounds.
    """
    real = isinstance(value, int | float) or hasattr(value, "__float__")
    require_type(real and not isinstance(value, bool), owner, argument, "must be a number", value)
    checks = (
        (">=", at_least, value >= at_least),
        (">", above, value > above),
        ("<=", at_most, value <= at_most),
        ("<", below, value < below),
    )
    bounds = [(sign, limit, ok) for sign, limit, ok in checks if math.isfinite(limit)]
    rule = " and ".join(f"{sign} {limit:g}" for sign, limit, _ in bounds) or "a number"
    inside = value == value and all(ok for *_, ok in bounds)
    require(inside, owner, argument, f"must be {rule}", value)
    return value


def integer(owner: str, argument: str, value: int, *, at_least: int | None = None) -> int:
    """Return `value` when it is an integer (a bool is not one) and not below `at_least`."""
    whole = hasattr(value, "__index__") and not isinstance(value, bool)
    require_type(whole, owner, argument, "must be an integer", value)
    if at_least is not None:
        require(value >= at_least, owner, argument, f"must be >= {at_least}", value)
    return value


def one_of(owner: str, argument: str, value: object, choices: Iterable[object]) -> None:
    """Raise `ValueError` listing the choices unless `value` is one of them."""
    choices = list(choices)
    listed = ", ".join(repr(choice) for choice in choices)
    require(value in choices, owner, argument, f"must be one of {listed}", value)


def import_extra(module: str, extra: str, owner: str) -> ModuleType:
    """Import an optional dependency, or say which extra installs it.

    Raises:
        ImportError: the module is absent; the message holds the pip command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name.split(".")[0]):
            raise
        raise ImportError(
            f'{owner} needs {error.name}: pip install "batchery[{extra}]"', name=error.name
        ) from error
