"""Keys and values of what was read, so that a new token costs one position.

Shape suffixes: B rows, H heads, K columns of the cache, N new columns, d head size, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig


@dataclass(frozen=True)
class LayerCache:
    """The part of one call of a layer: a shared layer has as many as it has calls."""

    kv_2BHKd: Tensor
    filled: int

    def append(self, kv_2BHNd: Tensor) -> tuple[Tensor, Tensor]:
        """Write new columns after those that are filled: keys and values of them all."""
        end = self.filled + kv_2BHNd.shape[3]
        self.kv_2BHKd[:, :, :, self.filled : end] = kv_2BHNd
        k_BHKd, v_BHKd = self.kv_2BHKd[:, :, :, :end].unbind(0)
        return k_BHKd, v_BHKd


@dataclass
class Cache:
    """Keys and values of every layer, with room for tokens to come.

    The columns of the prompt are those of the batch, padding included; then every row takes one column a token.
    """

    kv_L2BHKd: Tensor  # columns from `filled` on hold nothing yet
    seen_BK: Tensor  # bool: all columns but the prompt's padding
    length_B: Tensor  # text positions of each row, so the position of its next token
    prompt: int  # columns of it
    filled: int = 0

    @classmethod
    def empty(cls, config: ModelConfig, valid_BN: Tensor, length_B: Tensor, room: int, dtype: torch.dtype) -> Cache:
        """For a prompt of such valid positions, and `room` tokens more."""
        seen_BK = F.pad(valid_BN, (0, room), value=True)
        rows, columns = seen_BK.shape
        shape = (config.layers, 2, rows, config.heads, columns, config.hidden // config.heads)
        return cls(
            torch.empty(shape, dtype=dtype, device=valid_BN.device), seen_BK, length_B.clone(), valid_BN.shape[1]
        )

    @classmethod
    def joined(cls, parts: Sequence[Cache], room: int) -> Cache:
        """The rows of all parts side by side, with room for `room` tokens more of each.

        What they have read ends at one column; columns of which nobody sees anything are left out. Not for `reorder`.
        """
        first = [int(part.seen_BK[:, : part.filled].any(0).int().argmax()) for part in parts]
        width = max(part.filled - start for part, start in zip(parts, first, strict=True))
        (layers, two, _, heads, _, size), like = parts[0].kv_L2BHKd.shape, parts[0].kv_L2BHKd
        rows = sum(len(part.length_B) for part in parts)
        # Zeros where a shorter part has nothing: what is not seen weighs nothing, but must be finite.
        kv_L2BHKd = like.new_zeros(layers, two, rows, heads, width + room, size)
        seen_BK = F.pad(parts[0].seen_BK.new_zeros(rows, width), (0, room), value=True)
        row = 0
        for part, start in zip(parts, first, strict=True):
            own, columns = slice(row, row + len(part.length_B)), slice(width - part.filled + start, width)
            kv_L2BHKd[:, :, own, :, columns] = part.kv_L2BHKd[:, :, :, :, start : part.filled]
            seen_BK[own, columns] = part.seen_BK[:, start : part.filled]
            row = own.stop
        return cls(kv_L2BHKd, seen_BK, torch.cat([part.length_B for part in parts]), width, width)

    def layer(self, number: int) -> LayerCache:
        return LayerCache(self.kv_L2BHKd[number], self.filled)

    def next_mask(self) -> Tensor:
        """What one more token of each row sees, [B, 1, 1, K] bool: all columns up to its own but padding.

        Raises ValueError if there is no room for it.
        """
        columns = self.seen_BK.shape[1]
        if self.filled == columns:
            raise ValueError(f"the cache is full with {columns} positions; prefill with more room")
        return self.seen_BK[:, None, None, : self.filled + 1]

    def select(self, rows: Tensor) -> Cache:
        """A cache of these rows [B'], in this order, each as often as it is named."""
        return replace(
            self,
            kv_L2BHKd=self.kv_L2BHKd.index_select(2, rows),
            seen_BK=self.seen_BK[rows],
            length_B=self.length_B[rows],
        )

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from what row rows[i] has said [B], in place; both must have begun as one prompt.

        That prompt need not be copied, which is most of a cache.
        """
        for kv_2BHKd in self.kv_L2BHKd:
            said_2BHKd = kv_2BHKd[:, :, :, self.prompt : self.filled]
            said_2BHKd.copy_(said_2BHKd.index_select(1, rows))
