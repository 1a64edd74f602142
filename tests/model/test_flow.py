"""Lines that come and go say what each would have said alone."""

import pytest
import torch

from model.config import ModelConfig
from model.decoding import Batch, Decoding, generate
from model.flow import Flow, Line
from model.m6 import M6
from tests.model.prompts import CONFIGS, build, every_config, prompts

END = 2


def settings(config: ModelConfig) -> list[Decoding]:
    """Of every kind in turn."""
    entries = range(1, config.text_vocab)
    return [
        Decoding(7, entries, END),
        Decoding(9, entries, END, temperature=0.7, top_p=0.8),
        Decoding(5, entries, END, temperature=1.3, repetition_penalty=1.6),
        Decoding(8, entries, END, temperature=0.9, top_p=0.95, repetition_penalty=1.2),
        Decoding(3, entries, END, repetition_penalty=2.0),
    ]


def row(batch: Batch, place: int) -> Batch:
    length = int(batch["length_B"][place])
    one = {name: value[place : place + 1] for name, value in batch.items()}
    return one | {"tokens_BT": one["tokens_BT"][:, :length]}


def alone(model: M6, batch: Batch, place: int, own: Decoding) -> list[int]:
    generator = torch.Generator().manual_seed(place)
    [[answer]] = generate(model, row(batch, place), own, generator=generator)
    return answer.tokens


@every_config
def test_a_line_says_in_any_company_what_it_says_alone(config: ModelConfig) -> None:
    """The first two begin together; the others join after one and three tokens; one leaves before its end."""
    model, batch = build(config), prompts(config)
    lines = [Line(own, torch.Generator().manual_seed(place)) for place, own in enumerate(settings(config))]
    said: dict[Line, list[int]] = {line: [] for line in lines}
    flow = Flow(model, lines[0].settings.vocabulary, END)
    flow.join({name: value[:2] for name, value in batch.items()}, lines[:2])
    joining = {1: (2, 3), 3: (4,)}
    for step in range(20):
        for place in joining.get(step, ()):
            flow.join(row(batch, place), [lines[place]])
        if step == 5:
            flow.leave([lines[3]])
        for line, token in flow.step():
            said[line] += [token] * (token != END)
    assert not flow.lines and not flow.step() and not any(line.going for line in lines)
    for place, line in enumerate(lines):
        expected = alone(model, batch, place, line.settings)
        assert said[line] == (expected[:4] if place == 3 else expected), place


def test_a_row_that_would_outgrow_the_model_or_wants_beams_is_refused() -> None:
    config = CONFIGS["dense"]
    flow, batch = Flow(build(config), range(1, 50), END), prompts(config)
    for own, message in (
        (Decoding(config.max_positions, range(1, 50), END), r"a row of \d+ text positions has no room for 24: 24"),
        (Decoding(3, range(1, 50), END, beams=2), "beams=2: lines that come and go"),
        (Decoding(3, range(1, 49), END), "vocabulary="),
    ):
        with pytest.raises(ValueError, match=message):
            flow.join(row(batch, 0), [Line(own, torch.Generator())])
    assert not flow.lines
