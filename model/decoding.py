"""Autoregressive decoding: the likeliest token, beam search, sampling; free or among given answers.

Shape suffixes: B rows, T text positions, K lines that are written for one row, W = B K lines, S tokens said, V entries
of the vocabulary that may be said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model import sampling
from model.m6 import M6
from model.trie import ROOT, Trie

Batch = dict[str, Tensor]

INPUTS = ("tokens_BT", "source_B", "length_B", "image_BPC", "has_image_B")  # of a batch, for the model's trunk


@dataclass(frozen=True)
class Decoding:
    """How to write. By default each token is the likeliest; with `beams` several lines of a row compete; with a
    `temperature` tokens are drawn by lot.

    Raises ValueError, in one line, for what cannot be done.
    """

    room: int  # tokens at the most, the end among them
    vocabulary: range  # entries that may be said: all text pieces, or all image codes
    end: int | None  # closes an answer; None: every answer has `room` tokens
    answers: int = 1  # of each row: draws, or the best of the beams
    beams: int = 1
    length_penalty: float = 1.0  # a score is the summed log-probability over tokens ** length_penalty
    temperature: float = 0.0  # 0: no lot
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int | None = None
    guidance: float = 1.0  # of classifier-free guidance; 1: none

    def __post_init__(self) -> None:
        for name in ("room", "answers", "beams", "top_k", "no_repeat_ngram"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        for name in ("length_penalty", "temperature", "guidance"):
            if not isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)}: must be a number")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: must not be negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be over 0 and at most 1")
        if not 0 < self.repetition_penalty < inf:
            raise ValueError(f"repetition_penalty={self.repetition_penalty}: must be a number over 0")
        self._check_vocabulary()
        self._check_choice()

    def _check_vocabulary(self) -> None:
        if self.vocabulary.step != 1 or not self.vocabulary:
            raise ValueError(f"vocabulary={self.vocabulary}: must be entries in a row, and at least one")
        if self.end is not None and self.end not in self.vocabulary:
            raise ValueError(f"end={self.end}: is not in vocabulary={self.vocabulary}")
        if self.no_repeat_ngram and self.room > len(self.vocabulary):
            raise ValueError(f"no_repeat_ngram with room={self.room}: may leave none of {len(self.vocabulary)} entries")

    def _check_choice(self) -> None:
        if self.temperature and self.beams > 1:
            raise ValueError(f"temperature={self.temperature} with beams={self.beams}: draw or search, not both")
        if not self.temperature and (self.top_k or self.top_p < 1):
            raise ValueError("top_k and top_p limit a draw; set a temperature, or leave them")
        if not self.temperature and self.answers > self.beams:
            raise ValueError(f"answers={self.answers} with beams={self.beams}: without a temperature, beams give them")

    @property
    def lines(self) -> int:
        """Lines that are written for each row."""
        return self.answers if self.temperature else self.beams


class Answer(NamedTuple):
    tokens: list[int]  # without the end
    score: float  # nats


@torch.no_grad()
def generate(
    model: M6,
    batch: Batch,
    settings: Decoding,
    *,
    trie: Trie | None = None,
    twin: Batch | None = None,
    generator: torch.Generator | None = None,
    on_token: Callable[[int, int], None] | None = None,
    called_BV: Tensor | None = None,
    between: Callable[[], object] = lambda: None,
) -> list[list[Answer]]:
    """Answers to each row of a batch (see `M6.hidden_states`), best first, with a cache of keys and values.

    `trie`: the only answers there are. `twin`: the same rows without what shall weigh more, for classifier-free
    guidance (arXiv 2207.12598): logits = twin's + guidance * (batch's - twin's). `generator`: what lots are drawn from.
    `on_token` is told (row, token) as soon as it is said, where a row has one line. `called_BV`: what is added to the
    logits of each row, of the settings' vocabulary; a token that was said is no longer called for. `between` is called
    before each token but the first: what it raises ends the work.

    A score counts what the model gives to the settings' vocabulary after guidance, calls and penalty, before
    temperature, top_k, top_p and trie. Of beams some may find no answer of their own, where a trie has few. Sets the
    model to evaluation. Calls the model as often as is needed: ranks of an expert-parallel model must use `greedy`.

    Raises ValueError where the arguments do not fit together or the model has too few positions.
    """
    _check(model, batch, settings, trie, twin, generator, on_token, called_BV)
    model.eval()
    reader = _Reader(model, settings, batch, twin)
    lines = _Lines(settings, trie, len(batch["length_B"]), reader.device, called_BV)
    logits_WV = reader.begin()
    for last in range(settings.room, 0, -1):
        from_W, token_W = lines.write(logits_WV, generator)
        if on_token is not None:
            for row in lines.going_W.nonzero()[:, 0].tolist():
                on_token(row, int(token_W[row]))
        if last == 1 or not lines.going_W.any():
            break
        between()
        logits_WV = reader.read(from_W, token_W)
    return lines.answers()


def _check(
    model: M6,
    batch: Batch,
    settings: Decoding,
    trie: Trie | None,
    twin: Batch | None,
    generator: torch.Generator | None,
    on_token: Callable[[int, int], None] | None,
    called_BV: Tensor | None,
) -> None:
    if settings.vocabulary.stop > model.config.vocab:
        raise ValueError(f"vocabulary={settings.vocabulary}: the model has {model.config.vocab} entries")
    if settings.temperature and generator is None:
        raise ValueError(f"temperature={settings.temperature}: lots need a generator")
    if on_token is not None and settings.lines > 1:
        raise ValueError(f"{settings.lines} lines are written for each row: their tokens cannot be told one by one")
    if twin is None and settings.guidance != 1:
        raise ValueError(f"guidance={settings.guidance}: needs the batch's twin")
    if twin is not None and len(twin["length_B"]) != len(batch["length_B"]):
        raise ValueError(f"{len(batch['length_B'])} rows, {len(twin['length_B'])} in their twin: must be as many")
    if called_BV is not None and called_BV.shape != (len(batch["length_B"]), len(settings.vocabulary)):
        raise ValueError(f"called_BV of {tuple(called_BV.shape)}: must be rows x entries of {settings.vocabulary}")
    if trie is not None:
        _check_trie(trie, settings)


def _check_trie(trie: Trie, settings: Decoding) -> None:
    if trie.end != settings.end:
        raise ValueError(f"end={settings.end}: the answers to choose from end with {trie.end}")
    if trie.depth > settings.room:
        raise ValueError(f"room={settings.room}: the longest answer to choose from takes {trie.depth} with its end")
    if outside := [token for token in trie.tokens if token not in settings.vocabulary]:
        raise ValueError(f"vocabulary={settings.vocabulary}: answers to choose from hold {min(outside)}")
    if settings.no_repeat_ngram:
        raise ValueError(f"no_repeat_ngram={settings.no_repeat_ngram}: answers to choose from may repeat themselves")


class _Reader:
    """The model behind the lines: what it gives to each line's next token, by a cache with a row for each line.

    With guidance the rows of the twins' lines follow those of the batch's.
    """

    def __init__(self, model: M6, settings: Decoding, batch: Batch, twin: Batch | None):
        self.model, self.settings = model, settings
        self.device = model.vocabulary.weight.device
        self.sides = [batch] if twin is None else [batch, twin]

    def begin(self) -> Tensor:
        """Logits [W, V] of the first token."""
        batch = {name: value.to(self.device) for name, value in stacked(self.sides).items()}
        logits, self.cache = self.model.prefill(batch, self.settings.room - 1, self.settings.vocabulary)
        row_W = torch.arange(len(logits) // len(self.sides), device=self.device)
        rows = self._of_all_sides(row_W.repeat_interleave(self.settings.lines))
        if self.settings.lines > 1:
            self.cache = self.cache.select(rows)
        return self._guided(logits[rows])

    def read(self, from_W: Tensor, token_W: Tensor) -> Tensor:
        """Logits [W, V] of what follows the token, in lines that go on from lines `from_W`."""
        if self.settings.beams > 1:
            self.cache.reorder(self._of_all_sides(from_W))
        token = token_W.repeat(len(self.sides))
        return self._guided(self.model.extend(token, self.cache, self.settings.vocabulary))

    def _of_all_sides(self, rows: Tensor) -> Tensor:
        """The cache's rows of these rows of the first side, and those of their twins."""
        size = len(self.cache.length_B) // len(self.sides)
        return torch.cat([rows + side * size for side in range(len(self.sides))])

    def _guided(self, logits: Tensor) -> Tensor:
        if len(self.sides) == 1:
            return logits
        given_WV, without_WV = logits.chunk(2)
        return torch.lerp(without_WV, given_WV, self.settings.guidance)


def stacked(sides: list[Batch]) -> Batch:
    """The rows of all sides as one batch."""
    width = max(side["tokens_BT"].shape[1] for side in sides)
    padded = [side | {"tokens_BT": F.pad(side["tokens_BT"], (0, width - side["tokens_BT"].shape[1]))} for side in sides]
    return {name: torch.cat([side[name] for side in padded]) for name in INPUTS}


class _Lines:
    """What is being written: `settings.lines` lines for each row, side by side."""

    def __init__(
        self, settings: Decoding, trie: Trie | None, rows: int, device: torch.device, called_BV: Tensor | None
    ):
        # A row's lines stay side by side, whichever goes on from which.
        self.called_WV = None if called_BV is None else called_BV.to(device).repeat_interleave(settings.lines, 0)
        self.settings, self.trie, self.rows = settings, trie, rows
        self.first = settings.vocabulary.start
        self.end = -1 if settings.end is None else settings.end - self.first  # -1: no entry
        size = rows * settings.lines
        self.said_WS = torch.zeros(size, 0, dtype=torch.int64, device=device)  # entries of the settings' vocabulary
        self.length_W = torch.zeros(size, dtype=torch.int64, device=device)  # of what was said, with the end
        self.going_W = torch.ones(size, dtype=torch.bool, device=device)
        self.score_W = torch.zeros(size, device=device)  # summed log-probability
        if settings.beams > 1:
            self.score_W.view(rows, -1)[:, 1:] = -inf  # all are alike at first: one is to go on
        self.nodes = [ROOT] * size  # of the trie, where lines go on

    def write(self, logits_WV: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Say one more token in each line: the line that each goes on from, and the token [W]."""
        log_WV = self._log_probabilities(logits_WV)
        total_WV = self.score_W[:, None] + log_WV
        if self.settings.temperature:
            entry_W = self._draw(log_WV, generator)
            from_W = torch.arange(len(entry_W), device=entry_W.device)
        else:
            from_W, entry_W = self._best(total_WV)
        self._go_on(from_W, entry_W, total_WV[from_W, entry_W])
        return from_W, entry_W + self.first

    def _log_probabilities(self, logits_WV: Tensor) -> Tensor:
        """Of each token, -inf where it may not be said. A line that has ended goes on by entry 0, as it is."""
        settings = self.settings
        if self.called_WV is not None:
            logits_WV = logits_WV + self.called_WV.scatter(1, self.said_WS, 0)
        if settings.repetition_penalty != 1:
            logits_WV = sampling.penalise_repetition(logits_WV, self.said_WS, settings.repetition_penalty)
        log_WV = logits_WV.log_softmax(-1)
        if settings.no_repeat_ngram:
            repeats_WV = sampling.repeats_ngram(self.said_WS, settings.no_repeat_ngram, log_WV.shape[1])
            log_WV = log_WV.masked_fill(repeats_WV, -inf)
        if self.trie is not None:
            log_WV = log_WV.masked_fill(~self._in_trie(self.trie, log_WV), -inf)
        stays_V = torch.full_like(log_WV[0], -inf)
        stays_V[0] = 0
        return torch.where(self.going_W[:, None], log_WV, stays_V)

    def _in_trie(self, trie: Trie, like_WV: Tensor) -> Tensor:
        """[W, V] bool: tokens that some answer goes on with."""
        allowed_WV = torch.zeros_like(like_WV, dtype=torch.bool)
        for line, node in enumerate(self.nodes):
            allowed_WV[line, [token - self.first for token in trie.allowed(node)]] = True
        return allowed_WV

    def _draw(self, log_WV: Tensor, generator: torch.Generator | None) -> Tensor:
        assert generator is not None
        return sampling.draw(log_WV, self.settings.temperature, self.settings.top_k, self.settings.top_p, generator)

    def _best(self, total_WV: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest continuations of all lines of each row: the line [W] and the entry [W] of each.

        A line that has ended keeps its place, so that one beam is greedy, and a beam as wide as there are answers
        misses none.
        """
        merit_WV = total_WV.clone()
        merit_WV[:, 0].masked_fill_(~self.going_W & (self.score_W > -inf), inf)
        vocab, lines = merit_WV.shape[1], self.settings.lines
        index_BK = merit_WV.view(self.rows, -1).topk(lines).indices
        first_B1 = torch.arange(0, self.rows * lines, lines, device=index_BK.device)[:, None]
        return (first_B1 + index_BK // vocab).flatten(), (index_BK % vocab).flatten()

    def _go_on(self, from_W: Tensor, entry_W: Tensor, score_W: Tensor) -> None:
        went_W = self.going_W[from_W]
        self.score_W = score_W
        self.length_W = self.length_W[from_W] + went_W
        self.said_WS = torch.cat((self.said_WS[from_W], entry_W[:, None]), 1)
        # A line without a score goes on from nothing that may be said.
        self.going_W = went_W & (entry_W != self.end) & (score_W > -inf)
        if self.trie is not None:
            moves = zip(from_W.tolist(), entry_W.tolist(), self.going_W.tolist(), strict=True)
            self.nodes = [
                self.trie.follow(self.nodes[line], entry + self.first) if goes else ROOT for line, entry, goes in moves
            ]

    def answers(self) -> list[list[Answer]]:
        """Of each row, best first."""
        score_W = self.score_W / self.length_W**self.settings.length_penalty
        found = [
            Answer(self._text(said[:length]), score)
            for said, length, score in zip(self.said_WS.tolist(), self.length_W.tolist(), score_W.tolist(), strict=True)
        ]
        lines = self.settings.lines
        rows = [[a for a in found[start : start + lines] if a.score > -inf] for start in range(0, len(found), lines)]
        return [sorted(row, key=lambda a: -a.score)[: self.settings.answers] for row in rows]

    def _text(self, said: list[int]) -> list[int]:
        """Token ids without the end."""
        return [entry + self.first for entry in said if entry != self.end]


@torch.no_grad()
def score(model: M6, batch: Batch, rows: int = 32) -> Tensor:
    """Summed log-probability [B] (nats) of each row's targets `labels_BT`, among the whole vocabulary.

    `rows` rows at a time, so that any number of candidates can be ranked. Sets the model to evaluation.
    """
    model.eval()
    parts = [
        {name: value[start : start + rows] for name, value in batch.items()}
        for start in range(0, len(batch["length_B"]), rows)
    ]
    return -torch.cat([model(part)["loss_B"] for part in parts])


def greedy(next_logits: Callable[[Batch], Tensor], batch: Batch, room: int, vocab: int, end: int) -> list[list[int]]:
    """Continue each row by its likeliest token until `end`, `room` tokens at the most.

    `next_logits` maps a batch without labels to logits [B, V]; only the first `vocab` entries may be said. Always
    `room` calls, so that all ranks of an expert-parallel model make the same number.
    """
    tokens_BT = torch.nn.functional.pad(batch["tokens_BT"], (0, room))
    length_B = batch["length_B"].clone()
    rows = torch.arange(len(tokens_BT))
    said: list[list[int]] = [[] for _ in rows]
    going_B = torch.ones(len(tokens_BT), dtype=torch.bool)
    for _ in range(room):
        logits_BV = next_logits(batch | {"tokens_BT": tokens_BT, "length_B": length_B})
        best_B = logits_BV[:, :vocab].argmax(-1).cpu()
        going_B &= best_B != end
        tokens_BT[rows[going_B], length_B[going_B]] = best_B[going_B]
        length_B += going_B
        for row in rows[going_B].tolist():
            said[row].append(int(best_B[row]))
    return said
