"""Texts that a trained model writes, side by side: each is told as it comes, and they come and go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from model.decoding import Decoding
from model.flow import Flow, Line
from training.data.tasks import Row
from training.data.tokenizer import Tokenizer
from training.errors import told_as_mistake
from training.prompts import cleaned_text

if TYPE_CHECKING:
    from training.trained import M6

HALF = "\N{REPLACEMENT CHARACTER}"  # stands where a character's bytes are still to come


@dataclass(frozen=True)
class Style:
    """How to write: drawn by lot unless `temperature` is 0."""

    temperature: float = 0.8
    top_p: float = 0.9
    repetition_penalty: float = 1.1
    tokens: int = 96  # at the most
    seed: int = 0


class Prompted(NamedTuple):
    """What is to be written: the row that is read, and how it goes on."""

    row: Row
    settings: Decoding
    seed: int


def prompted(m: M6, prompt: str, style: Style, examples: Sequence[tuple[str, str]] = ()) -> Prompted:
    """What `M6.write` reads. Raises UserError."""
    before = [cleaned_text(part) for example in examples for part in example]
    what = "the prompt with its examples" if examples else "the prompt"
    source = m.prompts.tokens("\n".join([*before, cleaned_text(prompt)]), what=what)
    entries = range(m.tokenizer.eos_id, m.tokenizer.vocab_size)
    with told_as_mistake():
        settings = Decoding(
            min(style.tokens, m.shape.max_positions - len(source)),
            entries,
            m.tokenizer.eos_id,
            temperature=style.temperature,
            top_p=style.top_p if style.temperature else 1.0,
            repetition_penalty=style.repetition_penalty,
        )
    return Prompted(Row(source, [m.tokenizer.eos_id]), settings, style.seed)


class Text:
    """A text that is being written."""

    def __init__(self, tokenizer: Tokenizer, line: Line):
        self.line, self._tokenizer = line, tokenizer
        self._said: list[int] = []
        self._told = ""

    @property
    def going(self) -> bool:
        return self.line.going

    @property
    def tokens(self) -> int:
        """Said so far, with the end."""
        return self.line.length

    def say(self, token: int) -> str:
        """Take in one more token; what can be told of it, "" if that is for later."""
        self._said.append(token)
        text = str(self)
        if text.endswith(HALF) and self.going:
            return ""
        piece, self._told = text[len(self._told) :], text
        return piece

    def __str__(self) -> str:
        return self._tokenizer.decode(self._said)


class Writing:
    """Texts of one model, side by side."""

    def __init__(self, m: M6):
        tokenizer = m.tokenizer
        self.m, self.texts = m, dict[Line, Text]()
        self._flow = Flow(m.network, range(tokenizer.eos_id, tokenizer.vocab_size), tokenizer.eos_id)

    def begin(self, asked: Sequence[Prompted]) -> list[Text]:
        """Read what is to be written, beside what already is."""
        lines = [Line(one.settings, torch.Generator().manual_seed(one.seed)) for one in asked]
        place = 0
        for batch in self.m.batches([one.row for one in asked]):
            own = lines[place : place + len(batch["length_B"])]
            self._flow.join(batch, own)
            place += len(own)
        begun = {line: Text(self.m.tokenizer, line) for line in lines}
        self.texts |= begun
        return list(begun.values())

    def go_on(self) -> list[tuple[Text, str]]:
        """One more token of every text, and what can be told of it. A text that has ended is not `going`."""
        said = [(self.texts[line], token) for line, token in self._flow.step()]
        pieces = [(text, text.say(token)) for text, token in said]
        self.texts = {line: text for line, text in self.texts.items() if line.going}
        return pieces

    def give_up(self, texts: Sequence[Text]) -> None:
        """Write these no further."""
        self._flow.leave([text.line for text in texts])
        self.texts = {line: text for line, text in self.texts.items() if line.going}
