"""What is done to logits between the model and the choice of a token, and the choice by lot.

Shape suffixes: W lines that are being written, S tokens said, V vocabulary, K candidates of a line, n of an n-gram.
"""

from __future__ import annotations

import torch
from torch import Tensor


def penalise_repetition(logits_WV: Tensor, said_WS: Tensor, penalty: float) -> Tensor:
    """Logits of tokens that were said, divided by `penalty` if positive, else multiplied (CTRL, arXiv 1909.05858)."""
    logits_WS = logits_WV.gather(1, said_WS)
    return logits_WV.scatter(1, said_WS, torch.where(logits_WS > 0, logits_WS / penalty, logits_WS * penalty))


def penalise_said(logits_WV: Tensor, said_WV: Tensor, penalty_W1: Tensor) -> Tensor:
    """`penalise_repetition` of lines that have said unlike many tokens, [W, V] bool, each by a penalty of its own."""
    return torch.where(said_WV, torch.where(logits_WV > 0, logits_WV / penalty_W1, logits_WV * penalty_W1), logits_WV)


def repeats_ngram(said_WS: Tensor, n: int, vocab: int) -> Tensor:
    """[W, V] bool: tokens that would complete an n-gram that the line has said already."""
    banned_WV = torch.zeros(len(said_WS), vocab, dtype=torch.bool, device=said_WS.device)
    if said_WS.shape[1] < n:
        return banned_WV
    ngram_WSn = said_WS.unfold(1, n, 1)
    last_W1n = said_WS[:, None, said_WS.shape[1] - n + 1 :]
    repeated_WS = (ngram_WSn[..., :-1] == last_W1n).all(-1)
    # Added up, since a token may complete n-grams in several places, some of them others.
    return banned_WV.int().scatter_add(1, ngram_WSn[..., -1], repeated_WS.int()) > 0


def draw(logits_WV: Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator) -> Tensor:
    """A token of each line [W], by the softmax of logits / temperature over its likeliest tokens.

    Those are the `top_k` likeliest, and of these the fewest that have `top_p` of the probability together (nucleus
    sampling, arXiv 1904.09751). One number is drawn for each line, on the generator's device, so that the same
    generator gives the same tokens on every device.
    """
    return drawn(logits_WV / temperature, top_k, top_p, lots(len(logits_WV), generator))


def lots(count: int, generator: torch.Generator) -> Tensor:
    """Numbers [count, 1] from 0 to 1, fp64, on the generator's device."""
    return torch.rand(count, 1, dtype=torch.float64, device=generator.device, generator=generator)


def drawn(logits_WV: Tensor, top_k: int | None, top_p: float | Tensor, lot_W1: Tensor) -> Tensor:
    """The tokens [W] that lots fall on, as for `draw`; `top_p` may be each line's own, [W, 1], if all are under 1."""
    nucleus = isinstance(top_p, Tensor) or top_p < 1
    logits_WK, token_WK = _candidates(logits_WV, top_k, sort=nucleus)
    cumulative_WK = logits_WK.double().softmax(-1).cumsum(-1)
    before_WK = torch.nn.functional.pad(cumulative_WK[:, :-1], (1, 0))
    kept_W1 = (before_WK < top_p).sum(-1, keepdim=True)
    mass_W1 = cumulative_WK.gather(1, kept_W1 - 1)
    index_W1 = torch.searchsorted(cumulative_WK, lot_W1.to(mass_W1) * mass_W1, right=True)
    return token_WK.gather(1, index_W1.minimum(kept_W1 - 1))[:, 0]


def _candidates(logits_WV: Tensor, top_k: int | None, sort: bool) -> tuple[Tensor, Tensor]:
    """Logits and tokens, the `top_k` likeliest first, or all; not sorted where it is not needed: that takes longest."""
    vocab = logits_WV.shape[1]
    if top_k is None and not sort:
        return logits_WV, torch.arange(vocab, device=logits_WV.device).expand_as(logits_WV)
    return logits_WV.topk(min(top_k or vocab, vocab))
