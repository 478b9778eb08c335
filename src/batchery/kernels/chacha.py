# SPDX-License-Identifier: Apache-2.0
r"""Uniform random words on a CUDA device, by the stream cipher ChaCha20.

When to use: for what must not be foretold, exact noise above all. torch's generators on CUDA are
Philox, which is not cryptographic. When not: for what is to be repeated; a key is used once.

The cipher's state is a 4 x 4 matrix of 32-bit words: four constants, eight of the key, two of the
number of the block, two of a nonce. Ten times, each of its columns and then of its diagonals goes
through the quarter round

    a += b;  d = (d ^ a) <<< 16;    c += d;  b = (b ^ c) <<< 12
    a += b;  d = (d ^ a) <<<  8;    c += d;  b = (b ^ c) <<<  7

and the state from before is added: 64 bytes of the stream, eight words of 64 bits. A thread makes
one block in registers, in some thousand operations.

Reference: Bernstein, "ChaCha, a variant of Salsa20", 2008; RFC 8439. Where we differ from the RFC:
number of the block and nonce have 64 bits each, as in the original, instead of 32 and 96; and word
j of neighbouring blocks stand side by side, so that threads write side by side.
"""

import os
import struct

import torch
from torch import Tensor

from batchery.kernels.multi_tensor import on_its_device, tl, triton

__all__ = ["BLOCKS", "WORDS", "keystream", "random_words", "refuse_capture"]

WORDS = 8  # of 64 bits in a block of the cipher
BLOCKS = 128  # of the cipher in a program: one a thread
WARPS = BLOCKS // 32


def random_words(n: int, device: torch.device) -> Tensor:
    """Return n uniform 64-bit words, int64 `[n]`, under 32 new bytes of the system's entropy.

    Raises:
        RuntimeError: a CUDA graph is being captured, which would keep the key and repeat the words.
    """
    refuse_capture("random_words", device)
    return keystream(os.urandom(32), n, device)


def refuse_capture(owner: str, device: torch.device) -> None:
    """Raise if a CUDA graph is being captured, whose replays would repeat what is drawn once.

    Args:
        owner: whose noise it is, for the message.
        device: whose current stream is asked; the CPU has none.

    Raises:
        RuntimeError: one is.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return
    with torch.cuda.device(device):
        capturing = torch.cuda.is_current_stream_capturing()
    if capturing:
        raise RuntimeError(
            f"{owner}: must not be captured in a CUDA graph, which would repeat its noise"
        )


def keystream(
    key: bytes, n: int, device: torch.device, *, counter: int = 0, nonce: int = 0
) -> Tensor:
    """Return 64-bit words of ChaCha20's stream.

    Args:
        key: 32 bytes.
        n: how many words.
        device: where.
        counter: number of the first block, below 2^64.
        nonce: below 2^64.

    Returns:
        int64 `[n]`: for each 128 blocks their first words of 64 bits, then their second ones, …
    """
    words = torch.empty(n, dtype=torch.int64, device=device)
    state = struct.unpack("<12i", key + struct.pack("<QQ", counter, nonce))
    grid = (triton.cdiv(n, WORDS * BLOCKS),)
    with on_its_device(words):
        _keystream[grid](words, n, *state, BLOCKS=BLOCKS, num_warps=WARPS)
    return words


if triton is not None:

    @triton.jit
    def _added(a, b):
        return tl.add(a, b, sanitize_overflow=False)  # wrapping is meant

    @triton.jit
    def _turned(x, left: tl.constexpr):
        return (x << left) | (x >> (32 - left))

    @triton.jit
    def _quarter(a, b, c, d):
        a = _added(a, b)
        d = _turned(d ^ a, 16)
        c = _added(c, d)
        b = _turned(b ^ c, 12)
        a = _added(a, b)
        d = _turned(d ^ a, 8)
        c = _added(c, d)
        b = _turned(b ^ c, 7)
        return a, b, c, d

    @triton.jit
    def _write(words, at, n, low, low_before, high, high_before):
        low = _added(low, low_before).to(tl.uint64)
        high = _added(high, high_before).to(tl.uint64)
        tl.store(words + at, (low | (high << 32)).to(tl.int64), mask=at < n)

    # Of a key nothing may be compiled in, not even that a part of it is 1.
    @triton.jit(
        do_not_specialize=[
            "k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7", "count0", "count1", "nonce0", "nonce1",
        ]
    )  # fmt: skip
    def _keystream(
        words, n, k0, k1, k2, k3, k4, k5, k6, k7, count0, count1, nonce0, nonce1,
        BLOCKS: tl.constexpr,
    ):  # fmt: skip
        """Write the words of BLOCKS blocks."""
        lanes = tl.arange(0, BLOCKS)
        first = tl.program_id(0).to(tl.int64) * BLOCKS
        count = count0.to(tl.uint32).to(tl.uint64) + (count1.to(tl.uint32).to(tl.uint64) << 32)
        count = count + (first + lanes).to(tl.uint64)
        zero = tl.zeros([BLOCKS], tl.uint32)
        s0, s1, s2, s3 = zero + 0x61707865, zero + 0x3320646E, zero + 0x79622D32, zero + 0x6B206574
        s4, s5 = zero + k0.to(tl.uint32), zero + k1.to(tl.uint32)
        s6, s7 = zero + k2.to(tl.uint32), zero + k3.to(tl.uint32)
        s8, s9 = zero + k4.to(tl.uint32), zero + k5.to(tl.uint32)
        s10, s11 = zero + k6.to(tl.uint32), zero + k7.to(tl.uint32)
        s12, s13 = count.to(tl.uint32), (count >> 32).to(tl.uint32)
        s14, s15 = zero + nonce0.to(tl.uint32), zero + nonce1.to(tl.uint32)
        x0, x1, x2, x3, x4, x5, x6, x7 = s0, s1, s2, s3, s4, s5, s6, s7
        x8, x9, x10, x11, x12, x13, x14, x15 = s8, s9, s10, s11, s12, s13, s14, s15
        for _ in range(10):
            x0, x4, x8, x12 = _quarter(x0, x4, x8, x12)
            x1, x5, x9, x13 = _quarter(x1, x5, x9, x13)
            x2, x6, x10, x14 = _quarter(x2, x6, x10, x14)
            x3, x7, x11, x15 = _quarter(x3, x7, x11, x15)
            x0, x5, x10, x15 = _quarter(x0, x5, x10, x15)
            x1, x6, x11, x12 = _quarter(x1, x6, x11, x12)
            x2, x7, x8, x13 = _quarter(x2, x7, x8, x13)
            x3, x4, x9, x14 = _quarter(x3, x4, x9, x14)
        at = first * 8 + lanes
        _write(words, at, n, x0, s0, x1, s1)
        _write(words, at + BLOCKS, n, x2, s2, x3, s3)
        _write(words, at + 2 * BLOCKS, n, x4, s4, x5, s5)
        _write(words, at + 3 * BLOCKS, n, x6, s6, x7, s7)
        _write(words, at + 4 * BLOCKS, n, x8, s8, x9, s9)
        _write(words, at + 5 * BLOCKS, n, x10, s10, x11, s11)
        _write(words, at + 6 * BLOCKS, n, x12, s12, x13, s13)
        _write(words, at + 7 * BLOCKS, n, x14, s14, x15, s15)
