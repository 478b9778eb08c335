# SPDX-License-Identifier: Apache-2.0
import pytest

from batchery._core.state import atomic_write, check_fits


def test_atomic_write_makes_the_folder_and_replaces(tmp_path):
    path = tmp_path / "a" / "b.txt"
    assert atomic_write(path, b"one") == path
    atomic_write(path, lambda file: file.write(b"two"))
    assert path.read_bytes() == b"two"
    assert [entry.name for entry in path.parent.iterdir()] == ["b.txt"]


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = atomic_write(tmp_path / "b.txt", b"old")

    def half(file):
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, half)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["b.txt"]


def test_check_fits_names_both_values():
    check_fits("S", {"n": 3, "more": 1}, {"n": 3})
    with pytest.raises(ValueError, match="S: the saved state has n=3, this object n=4"):
        check_fits("S", {"n": 3}, {"n": 4})
    with pytest.raises(ValueError, match="S: the saved state has no 'n'"):
        check_fits("S", {}, {"n": 4})
