"""Mask-predict: all masks of a row's source are filled in a few passes, the surest first.

The second stage of M6-UFC (Zhang et al. 2021, arXiv 2105.14211) draws so: words, a reference picture and kept codes are
read, and the masked codes are predicted all at once, where an autoregressive model would need a pass for each. Which of
them stay after a pass, and how many, is MaskGIT's rule (Chang et al. 2022, arXiv 2202.04200, section 3.2): the most
confident ones, by a cosine schedule. M6-UFC chooses among several samples of each pass, and stops early, by two
estimators of relevance and fidelity that it trains; here the passes are as many as are asked for, and candidates are
compared once they are whole: by the caller for relevance, by `score` for what stands in for fidelity.

Larger grids than the model was trained on are filled window by window (ours): each is a row of the trained length, and
keeps what its neighbours have said.

Shape suffixes: B rows, T text positions, P image patches, D hidden size, S masked positions, V entries of the
vocabulary that may be said, h rows and w columns of a grid of codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model import sampling
from model.decoding import Batch, stacked
from model.m6 import M6


@dataclass(frozen=True)
class MaskPredict:
    """How to fill masks. Raises ValueError, in one line, for what cannot be done."""

    vocabulary: range  # entries that may be said
    mask: int  # the entry that stands for what is to be filled
    steps: int = 10  # passes
    temperature: float = 1.0  # of the lot that draws each token; 0: the likeliest
    top_k: int | None = None
    noise: float = 4.5  # Gumbel noise on log-confidence, falling to 0 with the steps: MaskGIT's choice temperature
    guidance: float = 1.0  # of classifier-free guidance; 1: none

    def __post_init__(self) -> None:
        for name in ("steps", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        for name in ("temperature", "noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number from 0")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance={self.guidance}: must be a number")
        if self.vocabulary.step != 1 or not self.vocabulary:
            raise ValueError(f"vocabulary={self.vocabulary}: must be entries in a row, and at least one")
        if self.mask in self.vocabulary:
            raise ValueError(f"mask={self.mask}: must not be in vocabulary={self.vocabulary}")


class Filled(NamedTuple):
    tokens: Tensor  # int64, as those that came in, but without masks
    score_B: Tensor  # summed log-probability of what was filled, nats, when it was; after guidance


@torch.no_grad()
def fill(
    model: M6,
    batch: Batch,
    settings: MaskPredict,
    generator: torch.Generator,
    twin: Batch | None = None,
    between: Callable[[], object] = lambda: None,
) -> Filled:
    """Fill the masks of a batch's source (see `M6.hidden_states`): tokens_BT, of which all others stay as they are.

    `twin`: the same rows, with masks at the same places, without what shall weigh more, as for
    `model.decoding.generate`. `between` is called before each pass: what it raises ends the work. Sets the model to
    evaluation. Stops when nothing is masked any more, so ranks of an
    expert-parallel model must have as many masks.

    Raises ValueError where the settings do not fit the model or the twin the batch.
    """
    _check(model, batch, settings, twin)
    model.eval()
    sides = [batch] if twin is None else [batch, twin]
    device = model.vocabulary.weight.device
    read = {name: value.to(device) for name, value in stacked(sides).items()}
    masked_BT = (read["tokens_BT"] == settings.mask).chunk(len(sides))[0]
    first_B, score_B = masked_BT.sum(1), torch.zeros(len(masked_BT), device=device)
    for step in range(1, settings.steps + 1):
        if not masked_BT.any():
            break
        between()
        log_SV = _log_probabilities(model, read, masked_BT, settings)
        entry_S = _draw(log_SV, settings, generator)
        log_S = log_SV.gather(1, entry_S[:, None])[:, 0]
        left_B = (first_B * math.cos(step / settings.steps * math.pi / 2)).floor().long()
        taken_BT = _surest(masked_BT, log_S + _noise(log_S, step, settings, generator), left_B)
        for tokens_BT in read["tokens_BT"].chunk(len(sides)):  # views: both sides read on from what was filled
            tokens_BT[taken_BT] = entry_S[taken_BT[masked_BT]] + settings.vocabulary.start
        score_B += torch.zeros_like(taken_BT, dtype=log_S.dtype).masked_scatter(masked_BT, log_S).mul(taken_BT).sum(1)
        masked_BT = masked_BT & ~taken_BT
    return Filled(read["tokens_BT"].chunk(len(sides))[0][:, : batch["tokens_BT"].shape[1]], score_B)


def _check(model: M6, batch: Batch, settings: MaskPredict, twin: Batch | None) -> None:
    if settings.vocabulary.stop > model.config.vocab:
        raise ValueError(f"vocabulary={settings.vocabulary}: the model has {model.config.vocab} entries")
    if twin is None:
        if settings.guidance != 1:
            raise ValueError(f"guidance={settings.guidance}: needs the batch's twin")
        return
    masks = [(side["tokens_BT"] == settings.mask).nonzero().tolist() for side in (batch, twin)]
    if len(twin["tokens_BT"]) != len(batch["tokens_BT"]) or masks[0] != masks[1]:
        raise ValueError("the twin's masks are not where the batch's are")


def _log_probabilities(model: M6, read: Batch, masked_BT: Tensor, settings: MaskPredict) -> Tensor:
    """Of what may stand at each masked position, [S, V] fp32, guided by the twin if there is one."""
    x_BND, *_ = model.hidden_states(
        read["tokens_BT"], read["source_B"], read["length_B"], read["image_BPC"], read["has_image_B"]
    )
    x_BTD = x_BND[:, model.config.image_patches :]
    logits = [
        model.logits(side_BTD[masked_BT], settings.vocabulary).float() for side_BTD in x_BTD.split(len(masked_BT))
    ]
    guided_SV = logits[0] if len(logits) == 1 else torch.lerp(logits[1], logits[0], settings.guidance)
    return guided_SV.log_softmax(-1)


def _draw(log_SV: Tensor, settings: MaskPredict, generator: torch.Generator) -> Tensor:
    if not settings.temperature:
        return log_SV.argmax(-1)
    return sampling.draw(log_SV, settings.temperature, settings.top_k, 1.0, generator)


def _noise(log_S: Tensor, step: int, settings: MaskPredict, generator: torch.Generator) -> Tensor:
    """Gumbel noise [S], less with each step: so that the first codes to stay are not all of the plain background."""
    lot_S = torch.rand(len(log_S), dtype=torch.float64, device=generator.device, generator=generator)
    gumbel_S = -torch.log(-torch.log(lot_S.clamp(1e-12, 1 - 1e-12)))
    return (settings.noise * (1 - step / settings.steps) * gumbel_S).to(log_S)


def _surest(masked_BT: Tensor, confidence_S: Tensor, left_B: Tensor) -> Tensor:
    """[B, T] bool: the most confident of each row's masked positions, all but `left_B`, and at least one."""
    confidence_BT = torch.full(masked_BT.shape, -math.inf, device=masked_BT.device)
    confidence_BT = confidence_BT.masked_scatter(masked_BT, confidence_S)
    rank_BT = confidence_BT.argsort(dim=1, descending=True, stable=True).argsort(1)
    take_B = (masked_BT.sum(1) - left_B).clamp(min=1)
    return masked_BT & (rank_BT < take_B[:, None])


def fill_grid(
    model: M6,
    batch: Batch,
    grid_Bhw: Tensor,
    side: int,
    settings: MaskPredict,
    generator: torch.Generator,
    twin: Batch | None = None,
    between: Callable[[], object] = lambda: None,
) -> Filled:
    """Fill the masks of grids of any size from side x side on, by windows of that size: tokens [B, h, w].

    `batch`'s rows (and the twin's) begin with a grid of side * side tokens, row by row, whatever they are: that is
    where each window goes. Windows overlap by half, and go row by row; what one has filled is kept by those that come
    after. So a model reads rows of one length, and the memory for it is a window's, however large the grid; the time
    grows with the number of windows, (2 h / side - 1)(2 w / side - 1) at the most. A window sees no farther than its
    own cells.

    Raises ValueError for a grid that is smaller than a window, and as `fill`.
    """
    grid_Bhw = grid_Bhw.clone()
    score_B = torch.zeros(len(grid_Bhw))
    for rows, columns in windows(grid_Bhw.shape[1], grid_Bhw.shape[2], side):
        window_Bhw = grid_Bhw[:, rows, columns]
        if not (window_Bhw == settings.mask).any():
            continue
        other = None if twin is None else _placed(twin, window_Bhw)
        tokens_BT, scored_B = fill(model, _placed(batch, window_Bhw), settings, generator, other, between)
        grid_Bhw[:, rows, columns] = tokens_BT[:, : side * side].reshape(window_Bhw.shape).to(grid_Bhw.device)
        score_B += scored_B.to(score_B.device)
    return Filled(grid_Bhw, score_B)


def windows(height: int, width: int, side: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of windows of side x side cells that overlap by half and cover a grid, row by row."""
    if min(height, width) < side:
        raise ValueError(f"a grid of {height} x {width} is smaller than a window of {side} x {side}")
    step = max(side // 2, 1)

    def starts(cells: int) -> list[int]:
        return [*range(0, cells - side, step), cells - side]

    for top in starts(height):
        for left in starts(width):
            yield slice(top, top + side), slice(left, left + side)


def _placed(batch: Batch, window_Bhw: Tensor) -> Batch:
    """The batch with a window at the beginning of its rows."""
    tokens_BT = batch["tokens_BT"].clone()
    window_BP = window_Bhw.flatten(1)
    tokens_BT[:, : window_BP.shape[1]] = window_BP
    return batch | {"tokens_BT": tokens_BT}
