# SPDX-License-Identifier: Apache-2.0
import pytest

from batchery.kernels.w4a16_plan import (
    FORMS,
    INVARIANT_BATCH,
    kernel_of,
    plan_narrow,
    plan_tiles,
    plan_wide,
    stripes,
)

LOW, TALL = 4096, 28672  # rows of W


@pytest.mark.parametrize("rows", [128, 1024, 4096, 8192, 10240, 28672, 57344])
@pytest.mark.parametrize(("blocks", "lanes"), [(1, 64), (16, 64), (112, 64), (16, 32)])
def test_tiles_and_parts_fit_the_weight(rows, blocks, lanes):
    for batch in (1, 16, 17, 64, 128, 129, 1024):
        tile, split = plan_tiles(batch, rows, blocks, lanes, 132, False)
        assert rows % tile.rows == 0
        assert 1 <= split <= blocks * lanes // min(tile.step, lanes)
        assert tile.batch >= min(batch, 128)


@pytest.mark.parametrize("rows", [128, 1024, 4096, 8192, 10240, 28672, 57344])
@pytest.mark.parametrize("blocks", [1, 2, 16, 112])
def test_narrow_forms_and_parts_fit_the_weight(rows, blocks):
    for batch in (1, 8, 9, 16, 17, 32, 33, 64):
        for chained in (False, True):
            form, split = plan_narrow(batch, rows, blocks, 128, 132, chained)
            assert rows % form.rows == 0
            assert 1 <= split <= blocks
            assert form.batch >= min(batch, 32)
            form, _ = plan_narrow(batch, rows, blocks, 64, 132, chained)
            assert form.batch * form.rows < 64 * 128


def test_an_invariant_plan_splits_alike_whatever_the_batch():
    plans = [plan_tiles(batch, 4096, 32, 64, 132, True) for batch in range(1, INVARIANT_BATCH + 1)]
    assert len({(tile.rows, tile.step, tile.scale_weights, split) for tile, split in plans}) == 1
    assert plans[0][1] > 1
    assert min(tile.batch for tile, _ in plans) == 16  # one matrix instruction for all


@pytest.mark.parametrize(("rows", "last"), [(LOW, (8, 64)), (TALL, (16, 32))])
def test_kernels_follow_one_another_as_rows_of_x_grow(rows, last):
    batches = [last[0], last[0] + 1, last[1], last[1] + 1]
    wanted = ["tiles", "narrow", "narrow", "wide"]
    assert [kernel_of(batch, rows, 4096, 128, 132, False) for batch in batches] == wanted
    chained = [kernel_of(batch, rows, 4096, 128, 132, True) for batch in (1, 64, 65)]
    assert chained == ["narrow", "narrow", "wide"]


@pytest.mark.parametrize(
    ("rows", "columns", "wanted"),
    [
        (4096, 14336, ["tiles", "narrow", "narrow", "narrow", "wide"]),
        (8192, 28672, ["tiles", "narrow", "narrow", "wide", "wide"]),
        (28672, 4096, ["tiles", "narrow", "narrow", "wide", "wide"]),
    ],
)
def test_small_groups_go_to_kernels_that_have_forms_for_them(rows, columns, wanted):
    for group in (32, 64):
        found = [kernel_of(m, rows, columns, group, 132, False) for m in (16, 17, 32, 33, 65)]
        assert found == wanted
        assert kernel_of(1, rows, columns, group, 132, True) == "narrow"
        assert kernel_of(33, rows, columns, group, 132, True) == (
            "wide" if rows * columns > 2**19 * 132 else "narrow"
        )


def test_a_tall_weight_is_not_split_and_its_tiles_are_at_work_at_once_where_they_can():
    for batch in (1, 16, 32, 64):
        assert plan_tiles(batch, TALL, 16, 64, 132, False)[1] == 1
        assert plan_tiles(batch, LOW, 16, 64, 132, False)[1] > 1
    assert plan_tiles(1, TALL, 16, 64, 132, False) != plan_tiles(1, 57344, 32, 64, 132, False)


def test_the_cheaper_form_is_taken():
    layers = (3584, 74), (8192, 112)
    tiles = [plan_tiles(32, rows, blocks, 64, 132, False)[0] for rows, blocks in layers]
    assert [tile.rows for tile in tiles] == [64, 128]
    narrow = [plan_narrow(32, rows, blocks, 128, 132, False)[0] for rows, blocks in layers]
    assert [form.rows for form in narrow] == [64, 128]


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
