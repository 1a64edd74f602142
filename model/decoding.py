"""Autoregressive decoding.

Shape suffixes: B rows, T text positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def greedy(next_logits: Callable[[Batch], Tensor], batch: Batch, room: int, vocab: int, end: int) -> list[list[int]]:
    """Continue each row by its likeliest token until `end`, `room` tokens at the most.

    `next_logits` maps a batch without labels to logits [B, V]; only the first `vocab` entries may be said. Always
    `room` calls, so that all ranks of an expert-parallel model make the same number.
    """
    tokens_BT = torch.nn.functional.pad(batch["tokens_BT"], (0, room))
    length_B = batch["length_B"].clone()
    rows = torch.arange(len(tokens_BT))
    said: list[list[int]] = [[] for _ in rows]
    going_B = torch.ones(len(tokens_BT), dtype=torch.bool)
    for _ in range(room):
        logits_BV = next_logits(batch | {"tokens_BT": tokens_BT, "length_B": length_B})
        best_B = logits_BV[:, :vocab].argmax(-1).cpu()
        going_B &= best_B != end
        tokens_BT[rows[going_B], length_B[going_B]] = best_B[going_B]
        length_B += going_B
        for row in rows[going_B].tolist():
            said[row].append(int(best_B[row]))
    return said
