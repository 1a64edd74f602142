"""Rows that are written side by side and come and go: a new one is read and joins after any token of the others.

What Orca (Yu et al. 2022, OSDI) calls iteration-level scheduling: no row waits for others to end. Each has its own
settings and its own lots, so what it says does not depend on its company, but for the rounding of sums.

Shape suffixes: W lines, one for each row, V entries of the vocabulary that may be said.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model import sampling
from model.cache import Cache
from model.decoding import Batch, Decoding
from model.m6 import M6


@dataclass(eq=False)
class Line:
    """A row that is being written. `going`: not yet at its end, or out of room."""

    settings: Decoding
    generator: torch.Generator  # what its lots are drawn from
    length: int = 0  # tokens said, with the end
    going: bool = True


class Flow:
    """Lines of one model, vocabulary and end."""

    def __init__(self, model: M6, vocabulary: range, end: int):
        self.model, self.vocabulary, self.end = model.eval(), vocabulary, end
        self.lines: list[Line] = []
        self._cache: Cache | None = None  # as `_logits_WV` and `_said_WV`, of these lines; None: of no line
        self._logits_WV = self._said_WV = torch.empty(0)

    @torch.no_grad()
    def join(self, batch: Batch, lines: Sequence[Line]) -> None:
        """Read a batch (see `M6.hidden_states`), and write its rows, these lines, from the next `step` on.

        Raises ValueError for settings that lines here cannot have, and for rows that would outgrow the model.
        """
        self._check(batch, lines)
        logits_WV, cache = self.model.prefill(batch, 0, self.vocabulary)
        self.lines += lines
        parts = [cache] if self._cache is None else [self._cache, cache]
        self._cache = Cache.joined(parts, max(line.settings.room - line.length for line in self.lines) - 1)
        said_WV = torch.zeros_like(logits_WV, dtype=torch.bool)
        if len(parts) == 2:
            logits_WV, said_WV = torch.cat((self._logits_WV, logits_WV)), torch.cat((self._said_WV, said_WV))
        self._logits_WV, self._said_WV = logits_WV, said_WV

    @torch.no_grad()
    def step(self) -> list[tuple[Line, int]]:
        """One more token of each line; those that have said their last one leave."""
        if not self.lines:
            return []
        entry_W = self._choose()
        self._said_WV[torch.arange(len(entry_W), device=entry_W.device), entry_W] = True
        said = [(line, entry + self.vocabulary.start) for line, entry in zip(self.lines, entry_W.tolist(), strict=True)]
        for line, token in said:
            line.length += 1
            line.going = token != self.end and line.length < line.settings.room
        token_W = entry_W[self._stay([line for line in self.lines if line.going])] + self.vocabulary.start
        if self._cache is not None:
            self._logits_WV = self.model.extend(token_W, self._cache, self.vocabulary)
        return said

    def leave(self, lines: Collection[Line]) -> None:
        """Write these no further."""
        for line in lines:
            line.going = False
        self._stay([line for line in self.lines if line.going])

    def _stay(self, lines: Sequence[Line]) -> Tensor:
        """Keep these alone; their places among those before."""
        places = [place for place, line in enumerate(self.lines) if line in lines]
        index = torch.tensor(places, dtype=torch.int64, device=self._logits_WV.device)
        if len(places) < len(self.lines):
            self.lines = [self.lines[place] for place in places]
            self._logits_WV, self._said_WV = self._logits_WV[index], self._said_WV[index]
            self._cache = self._cache.select(index) if self._cache is not None and places else None
        return index

    def _choose(self) -> Tensor:
        """Of each line, the likeliest token or one by lot, as its settings have it: entries [W] of the vocabulary."""
        logits_WV = sampling.penalise_said(self._logits_WV, self._said_WV, self._each("repetition_penalty"))
        log_WV = logits_WV.log_softmax(-1)
        entry_W = log_WV.argmax(-1)
        # A lot falls otherwise on sorted entries: a line without a nucleus must not depend on whether others have one.
        for nucleus in (False, True):
            settings = [line.settings for line in self.lines]
            chosen = [n for n, own in enumerate(settings) if own.temperature and (own.top_p < 1) == nucleus]
            if chosen:
                lot_W1 = torch.cat([sampling.lots(1, self.lines[n].generator) for n in chosen])
                top_p = self._each("top_p", torch.float64)[chosen] if nucleus else 1.0
                scaled_WV = log_WV[chosen] / self._each("temperature")[chosen]
                entry_W[chosen] = sampling.drawn(scaled_WV, None, top_p, lot_W1)
        return entry_W

    def _each(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A setting of all lines, [W, 1]."""
        values = [[getattr(line.settings, name)] for line in self.lines]
        return torch.tensor(values, dtype=dtype, device=self._logits_WV.device)

    def _check(self, batch: Batch, lines: Sequence[Line]) -> None:
        for line, length in zip(lines, batch["length_B"].tolist(), strict=True):
            settings, plain = line.settings, Decoding(line.settings.room, self.vocabulary, self.end)
            for name in ("vocabulary", "end", "answers", "beams", "top_k", "no_repeat_ngram", "guidance"):
                if getattr(settings, name) != getattr(plain, name):
                    raise ValueError(f"{name}={getattr(settings, name)}: lines that come and go have none of their own")
            if length + settings.room - 1 > (most := self.model.config.max_positions):
                raise ValueError(f"a row of {length} text positions has no room for {settings.room}: {most} in all")
