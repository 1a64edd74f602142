"""A tree of answers against the list of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.trie import ROOT, Trie

END = 0
answers = st.lists(st.lists(st.integers(1, 4), max_size=5), min_size=1, max_size=12)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(answers)
def test_every_way_through_the_trie_is_an_answer_and_every_answer_a_way(answers: list[list[int]]):
    trie, found = Trie(answers, END), []

    def visit(node: int, said: list[int]) -> None:
        for token in trie.allowed(node):
            if token == END:
                assert not trie.allowed(trie.follow(node, token))
                found.append(said)
            else:
                visit(trie.follow(node, token), [*said, token])

    visit(ROOT, [])
    assert sorted(found) == sorted(map(list, {tuple(answer) for answer in answers}))
    assert trie.depth == max(map(len, answers)) + 1
    assert trie.tokens == {END}.union(*answers)


def test_sets_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="no answers to choose from"):
        Trie([], END)
    with pytest.raises(ValueError, match=r"an answer holds the end token 0: \[1, 0\]"):
        Trie([[3], [1, 0]], END)
