"""Choosing by lot, and the limits of repetition, against plain lists."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import sampling
from model.sampling import draw, penalise_repetition, repeats_ngram

VOCAB = 12
quick = settings(deadline=None, max_examples=60, derandomize=True)


def lot(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def allowed(logits: list[float], temperature: float, top_k: int | None, top_p: float) -> dict[int, float]:
    """The chance of each token that may be drawn."""
    weights = (torch.tensor(logits, dtype=torch.float64) / temperature).softmax(0).tolist()
    order = sorted(range(len(weights)), key=lambda token: -weights[token])[: top_k or len(weights)]
    total, kept = sum(weights[token] for token in order), {}
    for token in order:
        if sum(kept.values()) / total >= top_p:
            break
        kept[token] = weights[token]
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}


@quick
@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.2, 5),
    top_k=st.none() | st.integers(1, 2 * VOCAB),
    top_p=st.floats(0.05, 0.97) | st.just(1.0),
    banned=st.sets(st.integers(0, VOCAB - 1), max_size=VOCAB - 1),
)
def test_draws_stay_in_their_set(seed, temperature, top_k, top_p, banned):
    logits_V = 3 * torch.randn(VOCAB, generator=lot(seed))
    logits_V[list(banned)] = -torch.inf
    # A hair more of the probability, as sums are rounded.
    may = allowed(logits_V.tolist(), temperature, top_k, min(top_p + 1e-6, 1))
    drawn = draw(logits_V.expand(500, -1), temperature, top_k, top_p, lot(seed)).tolist()
    assert set(drawn) <= may.keys() - banned


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, None, 1.0), (0.7, 5, 1.0), (2.0, None, 0.8), (1.5, 9, 0.6)]
)
def test_draws_come_as_often_as_they_are_likely(temperature, top_k, top_p):
    logits_V, draws = 2 * torch.randn(VOCAB, generator=lot()), 50_000
    found = torch.bincount(draw(logits_V.expand(draws, -1), temperature, top_k, top_p, lot(1)), minlength=VOCAB)
    chances = allowed(logits_V.tolist(), temperature, top_k, top_p)
    for token in range(VOCAB):
        chance = chances.get(token, 0.0)
        assert abs(int(found[token]) - draws * chance) <= 5 * (draws * chance * (1 - chance)) ** 0.5


@pytest.mark.parametrize("peak", [0.0, 0.5, 2.0])
def test_a_nucleus_is_the_same_wherever_it_is_looked_for(peak, monkeypatch):
    """Among all tokens or among the likeliest first, however flat or steep the chances are."""
    logits_WV, tokens = peak * torch.randn(64, 5000, generator=lot()), []
    for few in ((), (64,), (64, 1024), sampling.FEW):
        monkeypatch.setattr(sampling, "FEW", few)
        tokens.append(draw(logits_WV, 1.0, None, 0.9, lot(7)).tolist())
    assert tokens[1:] == tokens[:1] * 3


def test_lines_are_drawn_by_themselves():
    logits_WV = torch.full((3, VOCAB), -torch.inf)
    logits_WV[0, 4] = logits_WV[1, 0] = logits_WV[2, 11] = 1.0
    assert draw(logits_WV, 1.0, None, 1.0, lot()).tolist() == [4, 0, 11]


said = st.lists(st.integers(0, VOCAB - 1), min_size=0, max_size=30)


@quick
@given(said=said, seed=st.integers(0, 99), penalty=st.floats(0.5, 4))
def test_what_was_said_is_made_less_likely(said, seed, penalty):
    logits_WV = torch.randn(1, VOCAB, generator=lot(seed))
    after = penalise_repetition(logits_WV, torch.tensor([said], dtype=torch.int64), penalty)[0].tolist()
    for token, logit in enumerate(logits_WV[0].tolist()):
        expected = logit if token not in said else logit / penalty if logit > 0 else logit * penalty
        assert after[token] == pytest.approx(expected, rel=1e-5)


@quick
@given(said=st.lists(st.integers(0, 2), min_size=0, max_size=30), n=st.integers(1, 4))
def test_tokens_that_would_repeat_an_ngram_are_found(said, n):
    ngrams = {tuple(said[at : at + n]) for at in range(len(said) - n + 1)}
    last = said[len(said) - n + 1 :] if len(said) >= n - 1 else None
    expected = [last is not None and (*last, token) in ngrams for token in range(3)]
    lines_WS = torch.tensor([said, [2] * len(said)], dtype=torch.int64)
    assert repeats_ngram(lines_WS, n, 3)[0].tolist() == expected
