"""Mask-predict: against itself row by row and by hand, and what it must never do."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.m6 import M6
from model.mask_predict import MaskPredict, fill, fill_grid, windows
from tests.model.prompts import TOLERANCE, build, every_config
from tests.model.samples import DENSE, TINY

LAW = settings(deadline=None, derandomize=True, max_examples=20)
MASK, SIDE = 4, 3
CODES = range(TINY.text_vocab, TINY.vocab)
SURE = MaskPredict(CODES, MASK, steps=4, temperature=0, noise=0)
LOTS = MaskPredict(CODES, MASK, steps=4, top_k=5)


def masked_batch(config, rows: int = 5, seed: int = 0, share: float = 0.6) -> dict[str, Tensor]:
    """Rows of a grid of SIDE x SIDE, some of it masked, a few words and the start; every other has a picture."""
    generator = torch.Generator().manual_seed(seed)
    cells, words = SIDE * SIDE, torch.randint(1, 4, (rows,), generator=generator)
    codes = torch.randint(CODES.start, CODES.stop, (rows, cells), generator=generator)
    hidden = torch.rand(rows, cells, generator=generator) < share
    text = torch.randint(5, 60, (rows, 5), generator=generator)
    tokens_BT = torch.cat((codes.masked_fill(hidden, MASK), text), 1)
    source_B = cells + words
    return {
        "tokens_BT": tokens_BT.masked_fill(torch.arange(cells + 5) > source_B[:, None], 0),
        "source_B": source_B,
        "length_B": source_B + 1,
        "image_BPC": torch.randn(rows, config.image_patches, config.image_channels, generator=generator),
        "has_image_B": torch.arange(rows) % 2 == 0,
    }


def lot(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_hand(model: M6, row: dict[str, Tensor], steps: int) -> tuple[Tensor, float]:
    """One row, a position at a time, as the docstring has it: without noise or lots."""
    tokens, score = row["tokens_BT"].clone(), 0.0
    hidden = (tokens[0] == MASK).nonzero()[:, 0].tolist()
    first = len(hidden)
    for step in range(1, steps + 1):
        if not hidden:
            break
        x_BND, *_ = model.hidden_states(tokens, row["source_B"], row["length_B"], row["image_BPC"], row["has_image_B"])
        logs = model.logits(x_BND[0, model.config.image_patches :])[:, CODES.start : CODES.stop].log_softmax(-1)
        order = sorted(hidden, key=lambda place: -logs[place].max().item())
        left = min(math.floor(first * math.cos(step / steps * math.pi / 2)), len(hidden) - 1)
        for place in order[: len(hidden) - left]:
            tokens[0, place] = CODES.start + logs[place].argmax()
            score += logs[place].max().item()
            hidden.remove(place)
    return tokens, score


@every_config
@torch.no_grad()
def test_rows_are_filled_together_as_each_alone_and_by_hand(config):
    model, batch = build(config), masked_batch(config)
    found = fill(model, batch, SURE, lot())
    for row in range(5):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        tokens, score = by_hand(model, alone, SURE.steps)
        assert found.tokens[row].tolist() == tokens[0].tolist()
        assert found.score_B[row].item() == pytest.approx(score, rel=1e-4)


@LAW
@given(st.integers(0, 2**32), st.floats(0, 1), st.integers(1, 12), st.sampled_from([1.0, 3.0]))
def test_kept_tokens_never_change_and_every_mask_is_filled(seed, share, steps, guidance):
    model, batch = build(TINY), masked_batch(TINY, seed=seed, share=share)
    before = {name: value.clone() for name, value in batch.items()}
    twin = batch | {"has_image_B": torch.zeros(5, dtype=torch.bool)}
    how = dataclasses.replace(LOTS, steps=steps, guidance=guidance)
    found = fill(model, batch, how, lot(seed), twin if guidance != 1 else None)
    hidden = batch["tokens_BT"] == MASK
    assert torch.equal(found.tokens[~hidden], batch["tokens_BT"][~hidden])
    assert ((found.tokens[hidden] >= CODES.start) & (found.tokens[hidden] < CODES.stop)).all()
    assert ((found.score_B < 0) == hidden.any(1)).all()
    assert all(torch.equal(batch[name], value) for name, value in before.items())


def test_lots_can_be_repeated():
    model, batch = build(TINY), masked_batch(TINY, share=1)
    first, again, other = (fill(model, batch, LOTS, lot(seed)).tokens for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@torch.no_grad()
def test_guidance_weighs_what_the_twin_lacks():
    model, batch = build(TINY), masked_batch(TINY)
    batch["has_image_B"][:] = True
    twin = batch | {"has_image_B": torch.zeros(5, dtype=torch.bool)}
    one_pass = dataclasses.replace(SURE, steps=1)
    given, without = (fill(model, side, one_pass, lot()) for side in (batch, twin))
    for guidance, same in ((0.0, without), (1.0, given)):
        found = fill(model, batch, dataclasses.replace(one_pass, guidance=guidance), lot(), twin)
        assert torch.equal(found.tokens, same.tokens)
        torch.testing.assert_close(found.score_B, same.score_B, **TOLERANCE)
    assert not torch.equal(given.tokens, without.tokens)


def test_each_pass_leaves_what_the_cosine_leaves_and_takes_one_at_least(monkeypatch):
    model, batch, left = build(TINY), masked_batch(TINY, share=1), []
    whole = M6.hidden_states
    monkeypatch.setattr(
        M6,
        "hidden_states",
        lambda self, tokens, *rest: left.append((tokens == MASK).sum(1).tolist()) or whole(self, tokens, *rest),
    )
    for steps in (3, 40):
        left.clear()
        fill(model, batch, dataclasses.replace(LOTS, steps=steps), lot())
        if steps == 3:
            assert left == [[9] * 5, [7] * 5, [4] * 5]  # 9 cos(30°) = 7.8, 9 cos(60°) = 4.5
        else:
            assert left == [[count] * 5 for count in range(9, 0, -1)]


@LAW
@given(st.integers(1, 9), st.integers(0, 12), st.integers(0, 12))
def test_windows_cover_a_grid_and_overlap_by_half(side, more_rows, more_columns):
    height, width = side + more_rows, side + more_columns
    seen = torch.zeros(height, width, dtype=torch.int64)
    for rows, columns in windows(height, width, side):
        fresh = seen[rows, columns] == 0
        assert fresh.shape == (side, side)
        seen[rows, columns] += 1
        if seen.sum() > side * side and side > 1:
            assert not fresh.all()  # it knows some of its neighbours
    assert seen.min() > 0


@LAW
@given(st.integers(0, 2**32), st.integers(0, 5), st.integers(0, 5))
def test_a_large_grid_keeps_what_is_given(seed, more_rows, more_columns):
    model, batch = build(DENSE), masked_batch(DENSE, rows=2)
    shape = (2, SIDE + more_rows, SIDE + more_columns)
    grid = torch.randint(CODES.start, CODES.stop, shape, generator=lot(seed))
    grid[torch.rand(shape, generator=lot(seed)) < 0.7] = MASK
    before, hidden = grid.clone(), grid == MASK
    found = fill_grid(model, batch, grid, SIDE, LOTS, lot(seed))
    assert torch.equal(grid, before) and torch.equal(found.tokens[~hidden], grid[~hidden])
    assert found.tokens.min() >= CODES.start and found.tokens.max() < CODES.stop


def test_a_grid_of_one_window_is_filled_as_its_row():
    model, batch = build(TINY), masked_batch(TINY)
    twin = batch | {"has_image_B": torch.zeros(5, dtype=torch.bool)}
    guided = dataclasses.replace(LOTS, guidance=2.0)
    row = fill(model, batch, guided, lot(), twin)
    grid = fill_grid(model, batch, batch["tokens_BT"][:, :9].reshape(5, 3, 3), SIDE, guided, lot(), twin)
    assert torch.equal(grid.tokens.flatten(1), row.tokens[:, :9])
    torch.testing.assert_close(grid.score_B, row.score_B)


def test_however_large_the_grid_the_model_reads_a_window(monkeypatch):
    """So its memory does not grow; passes do, with the windows."""
    model, batch, read = build(DENSE), masked_batch(DENSE, rows=1), []
    whole = M6.hidden_states
    monkeypatch.setattr(
        M6, "hidden_states", lambda self, tokens, *rest: read.append(tokens.shape) or whole(self, tokens, *rest)
    )
    for side in (3, 6, 15):
        read.clear()
        fill_grid(model, batch, torch.full((1, side, side), MASK), SIDE, LOTS, lot())
        assert set(read) == {batch["tokens_BT"].shape}
        assert len(read) <= LOTS.steps * len(list(windows(side, side, SIDE)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"top_k": 0}, "top_k=0: must be at least 1"),
        ({"temperature": math.nan}, "temperature=nan: must be a number from 0"),
        ({"noise": -1.0}, "noise=-1.0: must be a number from 0"),
        ({"guidance": math.inf}, "guidance=inf: must be a number"),
        ({"vocabulary": range(3, 3)}, "must be entries in a row"),
        ({"mask": CODES.start}, "must not be in vocabulary"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SURE, **changes)


def test_arguments_that_do_not_fit_together_are_refused():
    model, batch = build(TINY), masked_batch(TINY)
    other = batch | {"tokens_BT": batch["tokens_BT"].roll(1, 1)}
    with pytest.raises(ValueError, match="guidance=2: needs the batch's twin"):
        fill(model, batch, dataclasses.replace(SURE, guidance=2), lot())
    with pytest.raises(ValueError, match="the twin's masks are not where the batch's are"):
        fill(model, batch, SURE, lot(), other)
    with pytest.raises(ValueError, match="the model has 128 entries"):
        fill(model, batch, dataclasses.replace(SURE, vocabulary=range(120, 129)), lot())
    with pytest.raises(ValueError, match="a grid of 2 x 9 is smaller than a window of 3 x 3"):
        fill_grid(model, batch, torch.full((5, 2, 9), MASK), SIDE, SURE, lot())
