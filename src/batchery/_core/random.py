# SPDX-License-Identifier: Apache-2.0
"""Private random streams: nothing in the library reads or moves the global generator."""

import contextlib
import hashlib
from collections.abc import Iterator

import torch

from batchery._core.validate import require_type


def derive_seed(*keys: object) -> int:
    """Mix keys (ints and strings) into a 63-bit seed that is the same on every machine.

    Examples:
        >>> derive_seed(0, "epoch", 3) == derive_seed(0, "epoch", 3)
        True
    """
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def new_generator(*keys: object, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator seeded by `derive_seed(*keys)`."""
    return torch.Generator(device=device).manual_seed(derive_seed(*keys))


@contextlib.contextmanager
def initial_weights(*keys: object) -> Iterator[None]:
    """Seed what modules draw their weights from, on the CPU, by the keys; then restore it.

    `torch.manual_seed` would reseed the GPUs' generators as well.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(*keys))
        yield


def seed_of(owner: str, generator: torch.Generator | None) -> int:
    """Return the seed that a user's generator stands for; 0 when none is given.

    Drawing from the generator would advance it, so objects that must agree across ranks and
    survive a resume keep this number and derive every later stream from it.

    Raises:
        TypeError: it is no generator.
    """
    known = generator is None or isinstance(generator, torch.Generator)
    require_type(known, owner, "generator", "must be a torch.Generator or None", generator)
    return 0 if generator is None else generator.initial_seed()
