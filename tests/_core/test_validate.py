# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from batchery._core.validate import import_extra, integer, number, one_of, require, require_type


@pytest.mark.parametrize("value", [0, 1.5, 3, torch.tensor(2.0)])
def test_number_returns_what_is_inside(value):
    assert number("X", "a", value, at_least=0, at_most=3) is value


@pytest.mark.parametrize(
    ("value", "limits", "message"),
    [
        (-1.0, {"at_least": 0}, "LAMB: lr must be >= 0, got -1.0"),
        (0, {"above": 0}, "LAMB: lr must be > 0, got 0"),
        (1.0, {"at_least": 0, "below": 1}, "LAMB: lr must be >= 0 and < 1, got 1.0"),
        (math.inf, {"at_least": 0, "at_most": 5}, "LAMB: lr must be >= 0 and <= 5, got inf"),
        (math.nan, {}, "LAMB: lr must be a number, got nan"),
    ],
)
def test_number_names_owner_argument_rule_and_value(value, limits, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        number("LAMB", "lr", value, **limits)


@pytest.mark.parametrize("value", ["1", None, True, [1]])
def test_number_refuses_what_is_no_number(value):
    with pytest.raises(TypeError, match="LAMB: lr must be a number, got"):
        number("LAMB", "lr", value)


def test_an_infinite_bound_free_number_is_one():
    assert number("X", "a", math.inf) == math.inf
    assert number("X", "a", math.inf, at_least=0) == math.inf


@pytest.mark.parametrize("value", [1.0, True, "3"])
def test_integer_refuses_other_types(value):
    with pytest.raises(TypeError, match="X: n must be an integer, got"):
        integer("X", "n", value)


def test_integer_bounds():
    assert integer("X", "n", 0, at_least=0) == 0
    with pytest.raises(ValueError, match="X: n must be >= 1, got 0"):
        integer("X", "n", 0, at_least=1)


def test_one_of_lists_the_choices():
    one_of("X", "mode", "a", ["a", "b"])
    with pytest.raises(ValueError, match="X: mode must be one of 'a', 'b', got 'c'"):
        one_of("X", "mode", "c", iter(["a", "b"]))


def test_require():
    with pytest.raises(ValueError, match="X: a must rhyme, got 'b'"):
        require(False, "X", "a", "must rhyme", "b")
    with pytest.raises(TypeError, match="X: a must be a list, got str"):
        require_type(False, "X", "a", "must be a list", "b")


def test_a_missing_extra_is_named():
    with pytest.raises(ImportError, match=r'LAMB needs nowhere_x: pip install "batchery\[hf\]"'):
        import_extra("nowhere_x.part", "hf", "LAMB")
    assert import_extra("json", "hf", "LAMB").loads("1") == 1


def test_an_error_inside_a_present_library_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "half_there.py").write_text("import nowhere_y")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nowhere_y") as caught:
        import_extra("half_there", "hf", "LAMB")
    assert "batchery[" not in str(caught.value)
