# SPDX-License-Identifier: Apache-2.0
import pytest

from batchery.kernels.w4a16_plan import (
    FORMS,
    INVARIANT_BATCH,
    TILES,
    is_wide,
    plan_tiles,
    plan_wide,
    stripes,
)


@pytest.mark.parametrize("rows", [128, 1024, 4096, 57344])
@pytest.mark.parametrize(("blocks", "lanes"), [(1, 64), (16, 64), (112, 64), (16, 32)])
def test_tiles_and_parts_fit_the_weight(rows, blocks, lanes):
    for batch in (1, 16, 17, 64, 128, 129, 1024):
        tile, split = plan_tiles(batch, rows, blocks, lanes, 132, False)
        assert rows % tile.rows == 0
        assert 1 <= split <= blocks * lanes // min(tile.step, lanes)
        assert tile.batch >= min(batch, TILES[0][1].batch)


def test_an_invariant_plan_splits_alike_whatever_the_batch():
    plans = [plan_tiles(batch, 4096, 32, 64, 132, True) for batch in range(1, INVARIANT_BATCH + 1)]
    assert len({(tile.rows, tile.step, tile.scale_weights, split) for tile, split in plans}) == 1
    assert plans[0][1] > 1
    assert min(tile.batch for tile, _ in plans) == 16  # one matrix instruction for all


def test_large_layers_and_many_rows_are_wide():
    small, large = 4096 * 4096 // 4, 28672 * 8192 // 4
    assert not any(is_wide(16, words) for words in (small, large))
    assert [is_wide(32, small), is_wide(32, large)] == [False, True]
    assert [is_wide(64, small), is_wide(64, large)] == [False, True]
    assert all(is_wide(65, words) for words in (1, small, large))


@pytest.mark.parametrize("batch", [17, 64, 65, 256, 300, 4096])
@pytest.mark.parametrize(("rows", "blocks"), [(128, 1), (4096, 16), (57344, 32), (8192, 112)])
def test_wide_shares_hold_every_tile_and_stay_in_the_counters(batch, rows, blocks):
    form, (whole, tail, sharers) = plan_wide(batch, rows, blocks, 132)
    tiles = -(-rows // form.rows) * -(-batch // form.batch)
    assert form in FORMS
    assert whole * 132 + tail == tiles
    assert sharers == tail or sharers <= 132


def test_stripes_take_the_turns_that_they_say():
    assert stripes(128, 32, 132) == ((0, 128, 128), 33.5)  # one round: nothing is cut
    assert stripes(64, 32, 132) == ((0, 64, 128), 16 + 1.5 + 2)  # two parts of each
    assert stripes(448, 32, 132) == ((3, 52, 104), 3 * 33.5 + 16 + 1.5 + 2)
    assert stripes(80, 32, 132)[0] == (0, 80, 132)  # stripes whose ends lie anywhere
