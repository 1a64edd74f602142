"""Greedy decoding by calls of the whole model, against a loop over single rows, without padding."""

import dataclasses

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.decoding import greedy
from model.m6 import M6
from tests.model.samples import DENSE, TINY, sample_batch

END = 2
ROOM = 6
CONFIGS = {"dense": DENSE, "experts": dataclasses.replace(TINY, capacity="1x")}


def prompts(config: ModelConfig) -> dict[str, Tensor]:
    batch = sample_batch(config, rows=5, text=9)
    del batch["labels_BT"]
    return batch


def naive(model: M6, batch: dict[str, Tensor], row: int, room: int, vocab: int, end: int) -> list[int]:
    tokens, said = batch["tokens_BT"][row, : batch["length_B"][row]].tolist(), []
    while len(said) < room:
        one = {key: value[row : row + 1] for key, value in batch.items()}
        one |= {"tokens_BT": torch.tensor([tokens + said]), "length_B": torch.tensor([len(tokens + said)])}
        best = int(model(one)["logits_BV"][0, :vocab].argmax())
        if best == end:
            break
        said.append(best)
    return said


def decode(model: M6, batch: dict[str, Tensor], room: int, vocab: int, end: int) -> list[list[int]]:
    return greedy(lambda inputs: model(inputs)["logits_BV"], batch, room, vocab, end)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_rows_of_different_lengths_decode_as_if_alone(config: ModelConfig):
    model, batch = M6(config).eval(), prompts(config)
    assert batch["length_B"].unique().numel() > 1
    # To the end of all rooms: no token is the end.
    expected = [naive(model, batch, row, ROOM, config.text_vocab, end=-1) for row in range(5)]
    assert decode(model, batch, ROOM, config.text_vocab, end=-1) == expected
    assert all(len(row) == ROOM for row in expected)
    # An end that the rows come to at different times, one at once.
    end = expected[0][0]
    stopped = [row[: row.index(end)] if end in row else row for row in expected]
    assert decode(model, batch, ROOM, config.text_vocab, end) == stopped
    assert stopped[0] == []


def scripted(script: dict[int, list[int]], calls: list[dict[str, Tensor]]):
    """A model that says each row's script, a word a call, also to a row that came to its end."""

    def next_logits(batch: dict[str, Tensor]) -> Tensor:
        calls.append({key: value.clone() for key, value in batch.items()})
        logits_BV = torch.zeros(len(script), 10)
        for row, words in script.items():
            logits_BV[row, words[len(calls) - 1]] = 1.0
            logits_BV[row, 9] = 5.0  # an image code: likelier than all text, and not to be said
        return logits_BV

    return next_logits


def test_each_row_stops_at_its_end_or_its_room_and_all_calls_are_made():
    batch = {
        "tokens_BT": torch.tensor([[7, 7, 7], [7, 0, 0], [7, 7, 0]]),
        "length_B": torch.tensor([3, 1, 2]),
        "source_B": torch.tensor([3, 1, 1]),
    }
    before = {key: value.clone() for key, value in batch.items()}
    calls: list[dict[str, Tensor]] = []
    said = greedy(scripted({0: [4, END, 5, 6], 1: [1, 3, 4, 5], 2: [END, 3, END, 3]}, calls), batch, 4, 9, END)
    assert said == [[4], [1, 3, 4, 5], []]
    assert len(calls) == 4
    assert calls[-1]["tokens_BT"].tolist() == [[7, 7, 7, 4, 0, 0, 0], [7, 1, 3, 4, 0, 0, 0], [7, 7, 0, 0, 0, 0, 0]]
    assert calls[-1]["length_B"].tolist() == [4, 4, 2]
    assert all(torch.equal(batch[key], value) for key, value in before.items())


def test_no_room_says_nothing():
    assert decode(M6(DENSE), prompts(DENSE), 0, DENSE.text_vocab, END) == [[]] * 5
