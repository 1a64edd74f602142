"""No picture crosses splits, whatever keys a stranger gave it."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.importing.families import families, splits
from training.data.splits import shared_split, split_of

ROWS = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from([b"%d" % n for n in range(12)])), max_size=20)


@given(ROWS, st.sets(st.sampled_from([b"%d" % n for n in range(12)])), st.sampled_from([0.0, 0.2, 0.9]))
def test_rows_of_one_key_or_one_picture_share_a_split(rows, trained, held_out):
    keys, marks = [key for key, _ in rows], [mark for _, mark in rows]
    found = families(keys, marks)
    chosen = splits(found, marks, trained, held_out)
    for i, (key, mark) in enumerate(rows):
        for j, other in enumerate(rows):
            if key == other[0] or mark == other[1]:
                assert found[i] == found[j] and chosen[i] == chosen[j]
        assert mark not in trained or chosen[i] == "train"
        assert held_out or chosen[i] == "train"
        assert found[i] <= key and found[i] in keys
    alone = {key for key, mark in rows if {k for k, m in rows if m == mark} == {key}}
    for i, (key, _) in enumerate(rows):  # what nothing joins stays as it is
        own = {mark for k, mark in rows if k == key}
        if key in alone and all({k for k, m in rows if m == mark} == {key} for mark in own):
            assert found[i] == key and (own & trained or chosen[i] == shared_split(key, held_out))


def test_families_do_not_depend_on_the_order():
    rows = [("c", b"1"), ("b", b"1"), ("b", b"2"), ("a", b"2"), ("d", b"3")]
    for turn in range(len(rows)):
        turned = rows[turn:] + rows[:turn]
        assert dict(zip(turned, families(*map(list, zip(*turned, strict=True))), strict=True)) == {
            **dict.fromkeys(rows[:4], "a"),
            ("d", b"3"): "d",
        }


def test_shares_are_held_out():
    texts = [f"family {number}" for number in range(4000)]
    counts = Counter(shared_split(text, 0.2) for text in texts)
    assert counts["test"] == pytest.approx(400, rel=0.2) and counts["validation"] == pytest.approx(400, rel=0.2)
    assert {shared_split(text, 0) for text in texts} == {"train"}
    # What is held out elsewhere is split anew.
    again = Counter(shared_split(text, 0.2) for text in texts if split_of(text) != "train")
    assert again["train"] == pytest.approx(0.8 * again.total(), rel=0.1)
