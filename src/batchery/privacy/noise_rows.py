# SPDX-License-Identifier: Apache-2.0
"""Noise by the row, one row for each step of a stream, and floating-point noise for research.

Rows are drawn in blocks, since one at a time is slow; how many are taken at once does not change
what they are. Noise that has been drawn and not yet used is never written down, never copied, and
does not survive a fork: two runs with the same future noise would reveal what it hides. So states,
copies and forks go on with new noise, unless a seed or a generator was given to begin with.

Nothing here can see that a whole machine or process was copied from outside, by a snapshot of a
virtual machine or by CRIU: what goes on from such a copy twice draws the same noise twice. After
one is restored, load a state (`resume`), which begins with new noise.

Use `FloatNoise` for simulation, for training, and with factorisations whose coefficients are real.
Its guarantee is that of real numbers, which floating-point numbers do not keep (Mironov 2012; the
order of sums matters too, Casacuberta et al. 2022), and torch's generators are not cryptographic.
"""

import math
from fractions import Fraction
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from batchery._core.validate import one_of, require
from batchery.privacy.forks import process
from batchery.privacy.law import NoiseKind
from batchery.privacy.noise import DiscreteNoise
from batchery.privacy.saved_state import Misfit

Sampler = Literal["discrete", "float"]
_BLOCK = 1 << 14  # numbers drawn at once


class Noise(Protocol):
    """Whatever draws noise: `DiscreteNoise`, `FloatNoise`, or a recorder in a test."""

    def sample(self, kind: Any, scale: Fraction, shape: tuple[int, ...]) -> Any:
        """Return an array or tensor of `shape`.

        `scale` is σ² for `kind` `"gaussian"`, and b for `"laplace"` and `"gumbel"`.
        """


class FloatNoise:
    """Floating-point noise from a torch generator: no formal guarantee, see the module.

    Args:
        generator: of the noise; by default a new one, seeded by the system, and anew in every copy
            and fork and after loading a state. One that is given stays the caller's: copies, forks
            and states hold its position, and repeat what it draws.
        device: where noise is drawn; the generator's.
        dtype: of the noise.

    Examples:
        >>> noise = FloatNoise(torch.Generator().manual_seed(0))
        >>> noise.sample("gaussian", Fraction(4), (2, 3)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        generator: torch.Generator | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        """Keep the generator, or seed one; see the class."""
        self.given = generator is not None
        self.generator = _seeded(device or "cpu") if generator is None else generator
        self.dtype = dtype
        self._process = process()

    def sample(
        self, kind: NoiseKind | Literal["gumbel"], scale: Fraction, shape: tuple[int, ...]
    ) -> Tensor:
        """Draw independent numbers of variance σ² = scale, or of Laplace or Gumbel scale b."""
        one_of("FloatNoise", "kind", kind, ("gaussian", "laplace", "gumbel"))
        if self._process != process():
            self.renew()
        drawn = torch.empty(shape, dtype=self.dtype, device=self.generator.device)
        if kind == "gaussian":
            return drawn.normal_(generator=self.generator).mul_(math.sqrt(scale))
        drawn.exponential_(generator=self.generator)
        if kind == "gumbel":
            return drawn.log_().mul_(-float(scale))
        other = torch.empty_like(drawn).exponential_(generator=self.generator)
        return drawn.sub_(other).mul_(float(scale))

    def renew(self) -> None:
        """Seed the generator anew, unless it was given."""
        if not self.given:
            self.generator = _seeded(self.generator.device)
        self._process = process()

    def state(self) -> Tensor | None:
        """Return the state of a generator that was given; None of one seeded by the system."""
        return self.generator.get_state() if self.given else None

    def load(self, state: Tensor | None) -> None:
        """Set the state of a generator that was given; one seeded by the system is seeded anew.

        Raises:
            ValueError: the state is that of the other kind.
        """
        rule = "must be given if, and only if, it was to the saved noise"
        shown = "one" if self.given else None
        require((state is not None) == self.given, "FloatNoise", "generator", rule, shown)
        if state is None:
            self.renew()
        else:
            self.generator.set_state(state)

    def __getstate__(self) -> dict[str, Any]:
        """Leave a generator seeded by the system out of copies."""
        kept = self.__dict__.copy()
        if not self.given:
            kept["generator"] = self.generator.device
        return kept

    def __setstate__(self, kept: dict[str, Any]) -> None:
        """Seed one in its place."""
        self.__dict__.update(kept)
        if not self.given:
            self.generator = _seeded(kept["generator"])

    def __repr__(self) -> str:
        """Show where noise is drawn, and as what."""
        return f"FloatNoise(device='{self.generator.device}', dtype={self.dtype})"


def _seeded(device: torch.device | str) -> torch.Generator:
    generator = torch.Generator(device)
    generator.seed()
    return generator


class NoiseRows:
    """Independent rows of one law, in an order that does not depend on how they are asked for.

    Args:
        noise: what draws them.
        kind: of the law.
        scale: of the law; see `Noise`.
        shape: of one row.
        device: where rows are handed out.
    """

    def __init__(
        self,
        noise: Noise,
        kind: NoiseKind,
        scale: Fraction,
        shape: tuple[int, ...],
        device: torch.device | str | None = None,
    ) -> None:
        """Draw nothing yet; see the class."""
        self.noise = noise
        self.kind: NoiseKind = kind
        self.scale = scale
        self.shape = shape
        self.device = device
        # Another's noise is asked for what is needed and no more: it may be a recording.
        own = isinstance(noise, DiscreteNoise | FloatNoise)
        self._rows = max(1, _BLOCK // max(1, math.prod(shape))) if own else 0
        self._block: Tensor | None = None
        self._used = 0
        self._start: Any = None
        self._process = process()

    def take(self, n: int) -> Tensor:
        """Return the next `n` rows, [n, *shape]. They may share memory with rows not yet taken."""
        if not self._rows:
            return self._draw(n)
        if self._process != process() and self._secret():
            self._forget()
        pieces = []
        while n:
            if self._block is None or self._used == self._rows:
                start = self._noise_state()
                self._block, self._used, self._start = self._draw(self._rows), 0, start
            piece = self._block[self._used : self._used + n]
            self._used += len(piece)
            n -= len(piece)
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def state(self) -> dict[str, Any]:
        """Return where the next row comes from; nothing of what it will be, if by the system."""
        if self._block is None or self._secret():
            return {}
        return {"start": self._start, "used": self._used}

    def load(self, state: dict[str, Any]) -> None:
        """Go to where a saved stream was. The noise itself must be loaded after all its rows."""
        self._forget()
        if state and isinstance(self.noise, DiscreteNoise | FloatNoise):
            used = int(state["used"])
            if not 0 <= used <= self._rows:
                raise Misfit(f"'used' from 0 to {self._rows}, got {used}")
            self.noise.load(state["start"])
            self.take(used)

    def _draw(self, n: int) -> Tensor:
        drawn = self.noise.sample(self.kind, self.scale, (n, *self.shape))
        return torch.as_tensor(drawn, device=self.device)

    def _noise_state(self) -> Any:
        return self.noise.state() if isinstance(self.noise, DiscreteNoise | FloatNoise) else None

    def _secret(self) -> bool:
        return self._noise_state() is None

    def _forget(self) -> None:
        self._block, self._used, self._start = None, 0, None
        self._process = process()

    def __getstate__(self) -> dict[str, Any]:
        """Leave rows not yet used out of copies, unless a seed makes them known anyway."""
        kept = self.__dict__.copy()
        if self._secret():
            kept.update(_block=None, _used=0, _start=None)
        return kept
