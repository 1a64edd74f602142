"""A character n-gram model: interpolated modified Kneser-Ney (Chen and Goodman 1999, sections 3 and 4.1).

It is the rival of a language model's bits per character. An n-gram is known by its row in the table of its order,
and is found by (row of its first n - 1 symbols, last symbol), so that counting is sorting and a whole corpus is done
at once. Sizes: S symbols of a run of texts, G n-grams of one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

ORDER = 5
# All that Unicode can encode: every text has a probability, whichever characters were seen in training.
ALPHABET = 0x110000 - 0x800
START, END, UNSEEN = 0, 1, 2  # symbols; characters come after
FIRST_CHARACTER = 3
NONE = -1  # row of an n-gram that was not seen, or would reach beyond the start of its text
DISCOUNTED = 3  # counts from 3 on have one discount
# Of counts 1, 2 and more where there are too few n-grams to estimate them.
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)


@dataclass(frozen=True)
class Level:
    """The n-grams of one order, and what is left to the order below by each of its contexts.

    `keys_G` are sorted (context's row * symbols + last symbol); `kept_G` is an n-gram's discounted share of its
    context's count. `left` is the rest of each context's share; 1 where nothing ever followed.
    """

    keys_G: np.ndarray
    kept_G: np.ndarray
    left: np.ndarray


@dataclass(frozen=True)
class Counted:
    """The n-grams of one order: keys as in Level, how often each occurs, whether it begins a text, and the row, one
    order below, of its symbols without the first."""

    keys_G: np.ndarray
    times_G: np.ndarray
    begins_G: np.ndarray
    endings_G: np.ndarray


class CharacterNgram:
    """Trained on texts; gives the bits of other texts.

    A text's first characters have shorter contexts, which begin at its start. With `ends`, the end of a text is
    predicted as one more symbol, so that probabilities of all texts add up to 1. `alphabet` is the number of
    characters there could be: each gets an equal share of what the unigrams leave. Raises ValueError if there are
    more in the texts.
    """

    def __init__(self, texts: Sequence[str], order: int = ORDER, ends: bool = True, alphabet: int = ALPHABET):
        self.ends = ends
        self.characters = np.unique(_code_points("".join(texts)))
        self.symbols = FIRST_CHARACTER + len(self.characters)
        if len(self.characters) > alphabet:
            raise ValueError(f"{len(self.characters)} characters in an alphabet of {alphabet}")
        self.floor = 1 / (alphabet + ends)
        self.levels = _levels(_counted(*self._symbols(texts), self.symbols, order), self.symbols)

    def bits_per_character(self, texts: Sequence[str]) -> float:
        """Bits of all texts over their characters; with `ends`, each end costs bits but is no character."""
        return float(self.bits(texts).sum() / sum(map(len, texts)))

    def bits(self, texts: Sequence[str]) -> np.ndarray:
        """float64 [texts]: -log2 of each text's probability."""
        symbols_S, places_S = self._symbols(texts)
        text_S = np.cumsum(symbols_S == START) - 1
        return np.bincount(text_S, self._bits(symbols_S, places_S), minlength=len(texts))

    def symbol_bits(self, text: str) -> np.ndarray:
        """float64 [characters, and one for the end with `ends`]: bits of each symbol after those before it."""
        return self._bits(*self._symbols([text]))[1:]

    def _bits(self, symbols_S: np.ndarray, places_S: np.ndarray) -> np.ndarray:
        """Bits of each symbol; 0 for starts, which are given."""
        chance_S = np.full(len(symbols_S), self.floor)
        contexts_S = np.zeros(len(symbols_S), np.int64)
        for order, level in enumerate(self.levels, 1):
            keys_S = contexts_S * self.symbols + symbols_S
            rows_S = np.where(contexts_S == NONE, NONE, _find(level.keys_G, keys_S))
            # Where there is no context the order below is all there is; where no n-gram, nothing is added to it.
            left_S = np.where(contexts_S == NONE, 1.0, level.left[contexts_S])
            chance_S = chance_S * left_S + np.where(rows_S == NONE, 0.0, level.kept_G[rows_S])
            contexts_S = _shifted(rows_S, places_S, order)
        return np.where(symbols_S == START, 0.0, -np.log2(chance_S))

    def _symbols(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """All texts as one run of symbols, each with its place in its text: its START has place 0."""
        lengths = np.array([len(text) for text in texts], np.int64) + 1 + self.ends
        starts = np.cumsum(lengths) - lengths
        symbols_S = np.full(int(lengths.sum()), UNSEEN, np.int64)
        special_S = np.zeros(len(symbols_S), bool)
        special_S[starts] = True
        if self.ends:
            special_S[starts + lengths - 1] = True
        points = _code_points("".join(texts))
        rows = _find(self.characters, points)
        symbols_S[~special_S] = np.where(rows == NONE, UNSEEN, rows + FIRST_CHARACTER)
        symbols_S[special_S] = END
        symbols_S[starts] = START
        return symbols_S, np.arange(len(symbols_S)) - np.repeat(starts, lengths)


def _counted(symbols_S: np.ndarray, places_S: np.ndarray, symbols: int, orders: int) -> list[Counted]:
    """The n-grams of the orders from 1 on, as far as texts are long enough for one."""
    tables = []
    rows_S = contexts_S = np.zeros(len(symbols_S), np.int64)
    for order in range(1, orders + 1):
        (at,) = np.nonzero(contexts_S != NONE)
        if not len(at):
            break
        keys_G, first_G, row, times_G = np.unique(
            contexts_S[at] * symbols + symbols_S[at], return_index=True, return_inverse=True, return_counts=True
        )
        first_G = at[first_G]
        tables.append(Counted(keys_G, times_G, places_S[first_G] == order - 1, rows_S[first_G]))
        rows_S = np.full(len(symbols_S), NONE)
        rows_S[at] = row
        contexts_S = _shifted(rows_S, places_S, order)
    return tables


def _levels(tables: list[Counted], symbols: int) -> list[Level]:
    """Probabilities of each order. Below the highest, an n-gram counts once for each symbol that came before it;
    one that begins a text has none before it, and counts as often as it occurs."""
    levels, contexts = [], 1
    for table, above in zip_longest(tables, tables[1:]):
        counts_G = table.times_G
        if above:
            before_G = np.bincount(above.endings_G, minlength=len(counts_G))
            counts_G = np.where(table.begins_G, counts_G, before_G)
        counts_G = np.where(table.keys_G % symbols == START, 0, counts_G)
        levels.append(_level(table.keys_G, counts_G, table.keys_G // symbols, contexts))
        contexts = len(counts_G)
    return levels


def _level(keys_G: np.ndarray, counts_G: np.ndarray, context_G: np.ndarray, contexts: int) -> Level:
    taken_G = _discounts(counts_G)[np.minimum(counts_G, DISCOUNTED)]
    totals = np.bincount(context_G, counts_G, contexts)
    left = np.divide(np.bincount(context_G, taken_G, contexts), totals, out=np.ones(contexts), where=totals > 0)
    kept_G = (counts_G - taken_G) / np.maximum(totals[context_G], 1)
    return Level(keys_G, kept_G, left)


def _discounts(counts_G: np.ndarray) -> np.ndarray:
    """What is taken from counts of 0, 1, 2 and more (Chen and Goodman 1999, section 3)."""
    n1, n2, n3, n4 = (int((counts_G == count).sum()) for count in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):
        return np.array([0, *FALLBACK_DISCOUNTS])
    y = n1 / (n1 + 2 * n2)
    estimated = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return estimated if (estimated >= 0).all() else np.array([0, *FALLBACK_DISCOUNTS])


def _shifted(rows_S: np.ndarray, places_S: np.ndarray, order: int) -> np.ndarray:
    """Each symbol's context for the next order: the n-gram of this order that ends before it in its text."""
    return np.where(places_S >= order, np.roll(rows_S, 1), NONE)


def _find(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Rows of `wanted` in sorted `keys`, NONE for what is not there."""
    if not len(keys):
        return np.full(len(wanted), NONE)
    rows = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[rows] == wanted, rows, NONE)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)
