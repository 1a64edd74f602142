"""Decoding with a cache of keys and values against the full pass without one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.config import ModelConfig
from tests.model.prompts import ROOM, TOLERANCE, build, every_config, prompts
from tests.model.samples import DENSE, TINY


def continued(batch: dict[str, Tensor], said_BS: Tensor) -> dict[str, Tensor]:
    """The batch with further tokens of each row, after its own."""
    tokens_BT = torch.nn.functional.pad(batch["tokens_BT"], (0, said_BS.shape[1]))
    for row, length in enumerate(batch["length_B"].tolist()):
        tokens_BT[row, length : length + said_BS.shape[1]] = said_BS[row]
    return batch | {"tokens_BT": tokens_BT, "length_B": batch["length_B"] + said_BS.shape[1]}


def random_tokens(config: ModelConfig, rows: int, seed: int = 0) -> Tensor:
    return torch.randint(0, config.vocab, (rows, ROOM), generator=torch.Generator().manual_seed(seed))


@every_config
@settings(deadline=None, max_examples=15, derandomize=True)
@given(rows=st.integers(1, 7), text=st.integers(2, 15), seed=st.integers(0, 99))
def test_logits_of_every_token_are_those_of_the_full_pass(config: ModelConfig, rows: int, text: int, seed: int):
    """Rows with and without pictures and sources, of different lengths, whatever was said."""
    model, batch, said_BS = build(config), prompts(config, rows, text, seed), random_tokens(config, rows, seed)
    logits_BV, cache = model.prefill(batch, ROOM)
    torch.testing.assert_close(logits_BV, model(batch)["logits_BV"], **TOLERANCE)
    for step in range(ROOM):
        logits_BV = model.extend(said_BS[:, step], cache)
        expected_BV = model(continued(batch, said_BS[:, : step + 1]))["logits_BV"]
        torch.testing.assert_close(logits_BV, expected_BV, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("config", [DENSE, TINY], ids=["dense", "experts"])
def test_16_bit_logits_stay_near_the_full_pass(config: ModelConfig):
    """Nearer than rounding moves them, on the whole: of experts a few tokens may choose others."""
    model, batch, said_BS = build(config, torch.bfloat16), prompts(config), random_tokens(config, 5)
    exact = build(config)
    _, cache = model.prefill(batch, ROOM)
    assert cache.kv_L2BHKd.dtype == torch.bfloat16
    for step in range(ROOM):
        logits_BV = model.extend(said_BS[:, step], cache)
        assert logits_BV.dtype == torch.float32
        whole = continued(batch, said_BS[:, : step + 1])
        full_BV, exact_BV = model(whole)["logits_BV"], exact(whole)["logits_BV"]
        assert (logits_BV - full_BV).abs().median() <= (full_BV - exact_BV).abs().median()


@every_config
def test_selected_rows_go_on_as_they_would_have(config: ModelConfig):
    """In another order, repeated and left out."""
    model, batch, said_BS = build(config), prompts(config), random_tokens(config, 5)
    _, cache = model.prefill(batch, ROOM)
    model.extend(said_BS[:, 0], cache)
    rows = torch.tensor([4, 0, 0, 2, 4, 1])
    chosen = cache.select(rows)
    new_B = torch.arange(1, 7)
    after_BV = model.extend(new_B, chosen)
    said = torch.cat((said_BS[rows, :1], new_B[:, None]), 1)
    expected_BV = model(continued({name: value[rows] for name, value in batch.items()}, said))["logits_BV"]
    torch.testing.assert_close(after_BV, expected_BV, **TOLERANCE)
    # What it was chosen from is as it was.
    untouched_BV = model.extend(said_BS[:, 1], cache)
    torch.testing.assert_close(untouched_BV, model(continued(batch, said_BS[:, :2]))["logits_BV"], **TOLERANCE)


@every_config
def test_lines_of_one_prompt_go_on_from_each_other(config: ModelConfig):
    model, two = build(config), {name: value[:2] for name, value in prompts(config).items()}
    rows = torch.tensor([0, 0, 0, 1, 1])
    batch, said_BS = {name: value[rows] for name, value in two.items()}, random_tokens(config, 5)
    cache = model.prefill(two, ROOM)[1].select(rows)
    for step in range(3):
        model.extend(said_BS[:, step], cache)
    from_B = torch.tensor([2, 0, 2, 4, 4])
    cache.reorder(from_B)
    said_BS = torch.cat((said_BS[from_B, :3], said_BS[:, 3:]), 1)
    after_BV = model.extend(said_BS[:, 3], cache)
    torch.testing.assert_close(after_BV, model(continued(batch, said_BS[:, :4]))["logits_BV"], **TOLERANCE)


def test_logits_of_some_entries_are_those_of_all():
    model, batch = build(TINY), prompts(TINY)
    token_B = torch.arange(5)
    for entries in (range(TINY.text_vocab), range(TINY.text_vocab, TINY.vocab), range(3, 4)):
        part_BV, part = model.prefill(batch, 1, entries)
        all_BV, whole = model.prefill(batch, 1)
        assert part_BV.shape == (5, len(entries))
        torch.testing.assert_close(part_BV, all_BV[:, entries.start : entries.stop], **TOLERANCE)
        after_BV = model.extend(token_B, whole)[:, entries.start : entries.stop]
        torch.testing.assert_close(model.extend(token_B, part, entries), after_BV, **TOLERANCE)


def test_the_cache_leaves_the_batch_alone_and_keeps_no_gradients():
    model, batch = build(TINY), prompts(TINY)
    before = {name: value.clone() for name, value in batch.items()}
    logits_BV, cache = model.prefill(batch, 2)
    assert not model.extend(logits_BV.argmax(-1), cache).requires_grad and not logits_BV.requires_grad
    assert all(torch.equal(batch[name], value) for name, value in before.items())


def test_there_is_no_room_beyond_the_models_positions_or_the_caches():
    model, batch = build(TINY), prompts(TINY)
    longest = int(batch["length_B"].max())
    with pytest.raises(
        ValueError, match=f"a row of {longest} text positions has no room for 30 more: the model has 24"
    ):
        model.prefill(batch, 30)
    _, cache = model.prefill(batch, 24 - longest)
    for _ in range(24 - longest):
        model.extend(torch.zeros(5, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="the cache is full with 28 positions; prefill with more room"):
        model.extend(torch.zeros(5, dtype=torch.int64), cache)
