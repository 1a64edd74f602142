"""Only positions that hold something go through the layers: a batch's valid positions as the rows of one tensor.

Shape suffixes: B rows of the batch, N positions of a row, S = B N, T valid positions and filler, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.grouped import few_sizes
from model.rows import MoveRows, inverse_index


@dataclass(frozen=True)
class Packing:
    """Which row of the packed tensor holds which position."""

    position_T: Tensor  # b * N + n of each packed row; S for filler
    row_S: Tensor  # the packed row of each position; T for padding
    length: int  # N

    @classmethod
    def of(cls, valid_BN: Tensor, like: Tensor) -> Packing:
        """Pack the valid positions in their order, for tensors such as `like`. At least one row, if only of filler."""
        found = valid_BN.flatten().nonzero()[:, 0]
        filler = few_sizes(max(len(found), 1), like) - len(found)
        position_T = torch.nn.functional.pad(found, (0, filler), value=valid_BN.numel())
        return cls(position_T, inverse_index(position_T, valid_BN.numel()), valid_BN.shape[1])

    @property
    def valid_T(self) -> Tensor:
        return self.position_T < len(self.row_S)

    def pack(self, x_BND: Tensor) -> Tensor:
        """[B, N, D] -> [T, D], filler zero."""
        return MoveRows.apply(x_BND.flatten(0, 1), self.position_T, self.row_S[None])

    def pack_flags(self, flag_BN: Tensor) -> Tensor:
        """[B, N] bool -> [T], filler False."""
        return torch.nn.functional.pad(flag_BN.flatten(), (0, 1))[self.position_T]

    def unpack(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [B, N, D], padding zero."""
        return MoveRows.apply(x_TD, self.row_S, self.position_T[None]).unflatten(0, (-1, self.length))
