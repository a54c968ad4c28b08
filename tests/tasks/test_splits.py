"""Splits by content: disjoint, complete, independent of the order of the data."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from peft_arena.tasks.base import Item
from peft_arena.tasks.splits import Keyed, cut, cut_by_share, normal_key, with_groups

ROWS = st.lists(st.tuples(st.text(max_size=4), st.text(max_size=2)).map(lambda row: Keyed(row[0], Item(*row))))


@given(ROWS, st.randoms(use_true_random=False))
def test_cut_is_disjoint_complete_and_blind_to_order(rows: list[Keyed], rng: object) -> None:
    sizes = {"test": 2, "validation": 3, "train": None}
    parts = cut(rows, sizes)
    owner: dict[str, str] = {}
    for split, items in parts.items():
        for item in items:
            assert owner.setdefault(normal_key(item.question), split) == split
    assert sorted(item.id for items in parts.values() for item in items) == sorted({row.item.id for row in rows})
    other = cut(rows[::-1], sizes)
    assert {split: {item.id for item in items} for split, items in other.items()} == {
        split: {item.id for item in items} for split, items in parts.items()
    }


@given(ROWS)
def test_shares_leave_no_split_empty_if_there_are_enough(rows: list[Keyed]) -> None:
    parts = cut_by_share(rows, {"train": 0.8, "validation": 0.1, "test": 0.1})
    keys = {normal_key(row.key) for row in rows}
    held = [normal_key(item.question) for items in parts.values() for item in items]
    assert set(held) == keys
    assert all(parts.values()) == (len(keys) >= 3)
    assert len({(normal_key(item.question), split) for split, items in parts.items() for item in items}) == len(keys)


def test_shares_are_kept() -> None:
    rows = [Keyed(str(number), Item(str(number))) for number in range(200)]
    parts = cut_by_share(rows, {"train": 0.7, "validation": 0.1, "test": 0.2})
    assert [len(items) for items in parts.values()] == [140, 20, 40]


@given(ROWS)
def test_the_order_in_which_shares_are_written_plays_no_part(rows: list[Keyed]) -> None:
    shares = {"train": 0.7, "validation": 0.1, "test": 0.2}
    assert cut_by_share(rows, shares) == cut_by_share(rows, dict(sorted(shares.items())))


def test_letter_case_and_white_space_are_no_difference() -> None:
    rows = [Keyed("One  two", Item("One  two")), Keyed(" one TWO\n", Item("one TWO")), Keyed("three", Item("three"))]
    parts = cut(rows, {"test": 1, "train": None})
    assert sorted(map(len, parts.values())) == [1, 2]


@given(ROWS)
def test_items_that_share_a_key_are_one_group_and_no_others_are(rows: list[Keyed]) -> None:
    items = [item for part in cut_by_share(rows, {"train": 0.5, "test": 0.5}).values() for item in part]
    held: dict[str, set[str]] = {}
    for row in rows:
        held.setdefault(normal_key(row.key), set()).add(row.item.id)
    groups: dict[str, set[str]] = {}
    for item in items:
        groups.setdefault(normal_key(item.question), set()).add(item.group)
        assert bool(item.group) == (len(held[normal_key(item.question)]) > 1)
    assert all(len(names) == 1 for names in groups.values())
    named = [next(iter(names)) for names in groups.values() if names != {""}]
    assert len(set(named)) == len(named)


def test_a_group_is_no_part_of_the_id_and_one_that_is_named_stays() -> None:
    alone, named = Item("q", "a"), Item("q", "a", group="passage 3")
    assert alone.id == named.id
    rows = [Keyed("k", named), Keyed("K ", Item("r", "b"))]
    assert [item.group == "passage 3" for item in with_groups(rows)] == [True, False]
    assert all(item.group for item in with_groups(rows))
    assert with_groups([Keyed("k", alone)]) == (alone,)
