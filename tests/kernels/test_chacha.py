# SPDX-License-Identifier: Apache-2.0
"""The cipher against the vectors of RFC 8439, then against a few lines of Python."""

import struct
from contextlib import nullcontext

import pytest
import torch

from batchery.kernels import chacha
from batchery.kernels.chacha import BLOCKS, WORDS, keystream, random_words

# (key, number of the block, nonce, 64 bytes): section 2.3.2, then the five of appendix A.1. The
# RFC's counter of 32 bits and nonce of 96 are read as 64 bits each.
VECTORS = {
    "2.3.2": (
        bytes(range(32)),
        1 | 0x09000000 << 32,
        0x4A000000,
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    "A.1 1": (
        bytes(32),
        0,
        0,
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    "A.1 2": (
        bytes(32),
        1,
        0,
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    "A.1 3": (
        bytes(31) + b"\1",
        1,
        0,
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    "A.1 4": (
        b"\0\xff" + bytes(30),
        2,
        0,
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
    "A.1 5": (
        bytes(32),
        0,
        0x02000000 << 32,
        "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
        "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d",
    ),
}


def turned(x, left):
    return (x << left | x >> 32 - left) & 0xFFFFFFFF


def block(key, counter, nonce):
    """64 bytes by the definition, on Python's integers."""
    start = [*struct.unpack("<4I", b"expand 32-byte k"), *struct.unpack("<8I", key)]
    start += struct.unpack("<4I", struct.pack("<QQ", counter % 2**64, nonce))
    x = start.copy()
    columns = [(i, i + 4, i + 8, i + 12) for i in range(4)]
    diagonals = [(i, (i + 1) % 4 + 4, (i + 2) % 4 + 8, (i + 3) % 4 + 12) for i in range(4)]
    for a, b, c, d in (columns + diagonals) * 10:
        for to, other, left in ((a, b, 16), (c, d, 12), (a, b, 8), (c, d, 7)):
            x[to] = (x[to] + x[other]) % 2**32
            mixed = d if to == a else b
            x[mixed] = turned(x[mixed] ^ x[to], left)
    return struct.pack("<16I", *((p + q) % 2**32 for p, q in zip(x, start, strict=True)))


def in_order(words):
    """Bytes of the stream, from words as the kernel lays them out; whole programs only."""
    blocks = words.cpu().view(-1, WORDS, BLOCKS).transpose(1, 2)
    return blocks.contiguous().numpy().astype("<i8").tobytes()


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_of_the_standard(name, kernel_device):
    key, counter, nonce, wanted = VECTORS[name]
    assert block(key, counter, nonce).hex() == wanted
    words = keystream(key, WORDS * BLOCKS, kernel_device, counter=counter, nonce=nonce)
    assert in_order(words)[:64].hex() == wanted


# Parts of a key that Triton might take for something else: 1, 16, the sign bit, all bits.
KEY = struct.pack("<8I", 1, 16, 0, 2**31, 2**32 - 1, 2**31 - 1, 0x12345678, 0x9ABCDEF0)


@pytest.mark.parametrize("counter", [0, 2**32 - 3, 2**40 + 5, 2**63 - 1, 2**64 - 2])
def test_every_block_of_two_programs(counter, kernel_device):
    words = keystream(KEY, 2 * WORDS * BLOCKS, kernel_device, counter=counter, nonce=2**64 - 1)
    wanted = b"".join(block(KEY, counter + i, 2**64 - 1) for i in range(2 * BLOCKS))
    assert in_order(words) == wanted


@pytest.mark.parametrize("n", [0, 1, 16, 1000, WORDS * BLOCKS + 1])
def test_any_number_of_words_and_no_more(n, kernel_device):
    whole = keystream(KEY, 2 * WORDS * BLOCKS, kernel_device)
    words = keystream(KEY, n, kernel_device)
    assert words.shape == (n,)
    assert words.dtype == torch.int64
    assert torch.equal(words, whole[:n])


def test_every_call_has_a_key_of_its_own(monkeypatch, kernel_device):
    one, two = (random_words(100, kernel_device) for _ in range(2))
    assert not (one == two).any()
    keys = iter([KEY, bytes(32)])

    def urandom(n):
        assert n == 32
        return next(keys)

    monkeypatch.setattr(chacha.os, "urandom", urandom)
    for key in (KEY, bytes(32)):
        assert torch.equal(random_words(9, kernel_device), keystream(key, 9, kernel_device))


def test_a_key_is_not_drawn_where_a_graph_would_keep_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(chacha.os, "urandom", None)  # not to be called
    with pytest.raises(RuntimeError, match="random_words: must not be captured in a CUDA graph"):
        random_words(9, torch.device("cuda"))


@pytest.mark.gpu
def test_no_graph_is_captured_of_random_words():
    words = random_words(9, torch.device("cuda"))  # and compiles

    def capture():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            words.zero_()  # a graph of nothing warns
            random_words(9, words.device)

    with pytest.raises(RuntimeError, match="random_words: must not be captured in a CUDA graph"):
        capture()


@pytest.mark.gpu
def test_many_words_are_uniform():
    words = random_words(1 << 22, torch.device("cuda"))
    ones = torch.stack([(words >> i & 1).sum() for i in range(64)]).double()
    off = (ones / words.numel() - 0.5) * 2 * words.numel() ** 0.5  # standard normal
    assert off.abs().max() < 6
    assert words.unique().numel() == words.numel()  # two alike: once in two million runs
