"""A set of answers as a tree of their tokens: what may come next is what some answer goes on with."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

ROOT = 0


class Trie:
    """Answers as token ids, each closed by `end`. Nodes are numbers, from ROOT on.

    Raises ValueError for no answers, and for an answer that holds `end` itself.
    """

    def __init__(self, answers: Iterable[Sequence[int]], end: int):
        self.end = end
        self.tokens = {end}
        self.depth = 0  # tokens of the longest answer, with its end
        self._children: list[dict[int, int]] = [{}]
        for answer in answers:
            if end in answer:
                raise ValueError(f"an answer holds the end token {end}: {list(answer)}")
            self._add([*answer, end])
        if not self.depth:
            raise ValueError("no answers to choose from")

    def _add(self, tokens: list[int]) -> None:
        node = ROOT
        for token in tokens:
            child = self._children[node].setdefault(token, len(self._children))
            if child == len(self._children):
                self._children.append({})
            node = child
        self.tokens.update(tokens)
        self.depth = max(self.depth, len(tokens))

    def allowed(self, node: int) -> Collection[int]:
        """The tokens that may follow: `end` alone at a leaf, nothing after it."""
        return self._children[node].keys()

    def follow(self, node: int, token: int) -> int:
        """The node that an allowed token leads to."""
        return self._children[node][token]
