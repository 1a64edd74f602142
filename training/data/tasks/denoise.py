"""Denoising: text with spans masked -> the whole text, alone or beside a picture (M6, arXiv 2103.00823)."""

from __future__ import annotations

import numpy as np

from training.data.tasks.base import Random, Row, Task
from training.data.tasks.caption import full_text

MASKED_SHARE = 0.15  # of the tokens, BERT's rate, which M6 takes
MEAN_SPAN = 3.0  # Poisson mean of a span's length, as in BART and OFA


def mask_spans(tokens: list[int], mask: int, random: Random, share: float = MASKED_SHARE) -> list[int]:
    """Replace spans that make up `share` of the tokens, each by one mask token. No two spans touch."""
    lengths = _span_lengths(max(1, round(share * len(tokens))), random)
    kept = len(tokens) - sum(lengths)
    # Spans stand in gaps between kept tokens, each gap at most once; short texts have fewer gaps than spans.
    lengths = lengths[: kept + 1]
    gaps = np.sort(random.choice(kept + 1, size=len(lengths), replace=False))
    masked, read, written = [], 0, 0
    for gap, length in zip(gaps.tolist(), lengths, strict=True):
        masked += [*tokens[read : read + gap - written], mask]
        read += gap - written + length
        written = gap
    return masked + tokens[read:]


def _span_lengths(total: int, random: Random) -> list[int]:
    lengths = []
    while total:
        lengths.append(min(total, max(1, int(random.poisson(MEAN_SPAN)))))
        total -= lengths[-1]
    return lengths


class Denoise(Task):
    name = "denoise"

    def items(self) -> np.ndarray:
        return self.corpus.text_rows(self.split)

    def row(self, item: int, limit: int, random: Random) -> Row:
        tokens = self.tokenizer.encode(self.corpus.text(item).text)
        # Source and target share the room, the source being the shorter; long texts give a window.
        tokens = window(tokens, (limit - 1) // 2, random)
        return self.fit(mask_spans(tokens, self.tokenizer.mask_id, random), tokens, limit)


class ImageDenoise(Task):
    name = "image_denoise"
    positions = 64

    def items(self) -> np.ndarray:
        return self.corpus.picture_rows(self.split)

    def row(self, item: int, limit: int, random: Random) -> Row:
        tokens = self.tokenizer.encode(full_text(self.corpus.picture(item)))
        tokens = window(tokens, (limit - 1) // 2, random)
        masked = mask_spans(tokens, self.tokenizer.mask_id, random, share=2 * MASKED_SHARE)
        return self.fit(masked, tokens, limit, self.view(item, random))


def window(tokens: list[int], size: int, random: Random) -> list[int]:
    """`size` tokens in a row, from a random place."""
    start = int(random.integers(max(len(tokens) - size, 0) + 1))
    return tokens[start : start + size]
