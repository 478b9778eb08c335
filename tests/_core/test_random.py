# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from batchery._core.random import derive_seed, initial_weights, new_generator, seed_of


def test_seeds_are_the_same_everywhere_and_differ_by_every_key():
    # Written down from the definition: blake2b over the keys' repr.
    assert derive_seed(0, "epoch", 3) == derive_seed(0, "epoch", 3)
    keys = [(0, "epoch", 3), (0, "epoch", 4), (1, "epoch", 3), (0, "other", 3), ("0", "epoch", 3)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
    assert all(0 <= derive_seed(*key) < 2**63 for key in keys)


def test_generators_leave_the_global_stream_alone():
    before = torch.get_rng_state()
    first = torch.rand(5, generator=new_generator(1, "a"))
    second = torch.rand(5, generator=new_generator(1, "a"))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


def test_seed_of_does_not_advance_the_generator():
    generator = torch.Generator().manual_seed(7)
    state = generator.get_state()
    assert seed_of("f", generator) == 7
    assert seed_of("f", None) == 0
    with pytest.raises(TypeError, match="f: generator must be a torch.Generator or None, got int"):
        seed_of("f", 3)
    assert torch.equal(state, generator.get_state())


def test_initial_weights_depend_on_the_keys_alone_and_the_global_stream_is_restored():
    before = torch.get_rng_state()
    drawn = []
    for seed in (0, 0, 1):
        with initial_weights(seed, "weights"):
            drawn.append(torch.nn.Linear(2, 2).weight.detach().clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.get_rng_state(), before)
