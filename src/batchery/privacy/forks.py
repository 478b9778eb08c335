# SPDX-License-Identifier: Apache-2.0
"""Which process this is, so that what must not be in two of them is recognised after a fork.

A process's number alone does not say: in a namespace of its own a child may have its parent's.
"""

import os

_forks = 0  # between the first process of this program and this one


def process() -> tuple[int, int]:
    """Return what is another in every process that comes of a fork.

    Examples:
        >>> process() == process()
        True
    """
    return os.getpid(), _forks


def _count() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):  # there is no fork elsewhere
    os.register_at_fork(after_in_child=_count)
