# SPDX-License-Identifier: Apache-2.0
r"""Exact integer noise drawn where it is used, on a CUDA device.

Use it through `DiscreteNoise(device="cuda")`, which counters on a CUDA device have by themselves.
Laws beyond σ = 4096 or b = 512, and noise with a seed, are drawn on the CPU and moved.

    words   64 bits each, of the cipher ChaCha20 under 32 bytes of the system's entropy, new at
            every call: nothing is kept that a state, a copy or a fork could repeat
    k       by a search for 63 of the bits in a table of step 1, as on the CPU; where a word equals
            an entry, one in some 2^50, further bits decide on the CPU
    sign    the last bit; 0 has half of its weight in the table, so that -0 need not be drawn again

Reference: that of `batchery.privacy.noise`; Bernstein, "ChaCha, a variant of Salsa20", 2008.

Where we differ from the CPU's sampler: above σ = 256 it draws a fine part beside a coarse one, and
its table stays small; here a larger one serves, of at most 38,000 entries. Words are as hard to
foretell as the cipher makes them: on Linux the system's own come from the same one.
"""

from functools import lru_cache

import torch
from torch import Tensor

from batchery.kernels.chacha import random_words
from batchery.kernels.multi_tensor import triton
from batchery.privacy.law import BITS, Law, Source, cumulative, resolve

_WIDEST = {"gaussian": 4096**2, "laplace": 512}  # scales whose table is made in half a second
_CHUNK = 1 << 24  # samples that are searched for at once, in six times their memory


def can_draw(law: Law, device: torch.device) -> bool:
    """Say whether a law's noise can be drawn on a device."""
    return device.type == "cuda" and triton is not None and law.scale <= _WIDEST[law.kind]


def draw_on(device: torch.device, law: Law, shape: tuple[int, ...], source: Source) -> Tensor:
    """Draw integers of a law on a device.

    Args:
        device: CUDA.
        law: of the noise.
        shape: of the result.
        source: of the bits that decide where a word does not.

    Returns:
        int64 tensor of that shape.
    """
    drawn = random_words(torch.Size(shape).numel(), device)
    law = Law(law.kind, law.scale, 1, halved=True)
    for part in torch.split(drawn, _CHUNK):
        invert_(part, law, source)
    return drawn.view(shape)


def invert_(words: Tensor, law: Law, source: Source) -> Tensor:
    """Turn uniform words into integers of a law, in place.

    Args:
        words: 64 bits each, int64 [n].
        law: of step 1, halved.
        source: of further bits where a word equals an entry of the table.

    Returns:
        `words`, now noise. The host waits for the device once.

    Examples:
        >>> from fractions import Fraction
        >>> from batchery.privacy.noise import BitSource
        >>> law = Law("laplace", Fraction(1), 1, halved=True)
        >>> invert_(torch.tensor([0, 2**63 - 2, 2**63 - 1]), law, BitSource())
        tensor([ 0,  1, -1])
    """
    table = _table(law, words.device)
    uniform = (words >> 1).bitwise_and_((1 << BITS) - 1)  # the sign that was shifted in is cut off
    k = torch.searchsorted(table, uniform, right=True)
    ties = (table[k - 1] == uniform).nonzero().flatten()
    for at in ties.tolist():
        k[at] = resolve(law, int(uniform[at]), BITS, source)
    return words.bitwise_and_(1).mul_(-2).add_(1).mul_(k)  # 1 or -1, times k


@lru_cache(maxsize=64)
def _table(law: Law, device: torch.device) -> Tensor:
    return torch.tensor(cumulative(law, BITS), dtype=torch.int64).to(device)
