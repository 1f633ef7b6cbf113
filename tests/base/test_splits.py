"""Splits by name: complete, disjoint, stable; groups are never divided."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.splits import grouping, split_by_fold, split_by_fraction
from utils.errors import UserError


@given(count=st.integers(20, 200), added=st.integers(1, 20), fraction=st.floats(0.05, 0.5), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_fraction_splits_barely_move_when_files_are_added(count: int, added: int, fraction: float, seed: int) -> None:
    old = [f"n{i}" for i in range(count)]
    before = split_by_fraction(old, {"val": fraction}, "train", seed)
    after = split_by_fraction([*reversed(old), *(f"m{i}" for i in range(added))], {"val": fraction}, "train", seed)
    assert len(before["val"]) == round(count * fraction)
    moved = (before["val"] ^ after["val"]) & set(old)
    assert len(moved) <= added + 1


@given(sizes=st.lists(st.integers(1, 9), min_size=8, max_size=30), folds=st.integers(2, 4), seed=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_groups_stay_together(sizes: list[int], folds: int, seed: int) -> None:
    names = [f"patient{p}_slice{i}" for p, size in enumerate(sizes) for i in range(size)]
    group = grouping("^(patient[0-9]+)_")
    parts = split_by_fraction(names, {"val": 0.3, "test": 0.2}, "train", seed, "^(patient[0-9]+)_")
    assert sorted(name for part in parts.values() for name in part) == sorted(names)
    assert sum(len(set(map(group, part))) for part in parts.values()) == len(sizes)
    assert abs(len(parts["val"]) - 0.3 * len(names)) <= max(sizes) + 1
    try:
        held_out = [split_by_fold(names, (k, folds), "^(patient[0-9]+)_") for k in range(folds)]
    except UserError:
        return  # one patient is as large as a fold
    assert sorted(name for _, val in held_out for name in val) == sorted(names)
    for train, val in held_out:
        assert train | val == set(names)
        assert not set(map(group, train)) & set(map(group, val))


def test_folds_are_equal_and_the_same_each_time() -> None:
    names = [f"{i}.png" for i in range(23)]
    folds = [split_by_fold(reversed(names), [k, 5])[1] for k in range(5)]
    assert sorted(map(len, folds)) == [4, 4, 5, 5, 5]
    assert folds[2] == split_by_fold(names, [2, 5])[1]


def test_what_a_group_is() -> None:
    assert grouping(None)("a_1") == "a_1"
    assert grouping("^[a-z]+")("cam3_7") == "cam"
    assert grouping("(x|y)_(1)")("x_1") == "x"
    with pytest.raises(UserError, match="does not match the name 'b'"):
        grouping("a")("b")
    with pytest.raises(ValueError, match="regular expression"):
        grouping("(")


@pytest.mark.parametrize("fold", [[5, 5], [-1, 3], [0, 1], [1], [0, 2, 3]])
def test_impossible_folds(fold: list[int]) -> None:
    with pytest.raises(ValueError, match="val_fold must be"):
        split_by_fold("abcdef", fold)
    with pytest.raises(UserError, match="3 samples are too few"):
        split_by_fold("abc", [0, 4])
