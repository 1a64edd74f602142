"""Pictures as patch features: a CNN's, stored beforehand, or the patches' own pixels.

Shape suffixes: B rows, P patches of a picture, C channels of a patch, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.initialise import Linear, Table


def patchify(image_BcHW: Tensor, patches: int) -> Tensor:
    """Cut square pictures [B, 3, H, H] into a square grid of patches [B, P, 3 * p * p], row by row.

    Raises ValueError if `patches` is no square number, or its root does not divide H.
    """
    b, c, height, _ = image_BcHW.shape
    side = round(patches**0.5)
    if side * side != patches or height % side:
        raise ValueError(f"a picture of {height} px cannot be cut into {patches} square patches")
    p = height // side
    grid = image_BcHW.reshape(b, c, side, p, side, p)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(b, patches, c * p * p)


class PatchEmbedding(nn.Module):
    """Patch features -> hidden size, with the patch's place in the grid (M6, arXiv 2103.00823)."""

    def __init__(self, config: ModelConfig, *key: object):
        super().__init__()
        self.project = Linear(config.image_channels, config.hidden, config.init_std, *key, "image")
        self.norm = nn.LayerNorm(config.hidden)
        self.position = Table(config.image_patches, config.hidden, config.init_std, *key, "image position")

    def forward(self, image_BPC: Tensor) -> Tensor:
        """[B, P, C] -> [B, P, D]."""
        place_P = torch.arange(image_BPC.shape[1], device=image_BPC.device)
        return self.norm(self.project(image_BPC)) + self.position(place_P)
