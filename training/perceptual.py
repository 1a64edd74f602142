"""A distance of pictures as a frozen network sees them (Johnson et al. 2016; the form of LPIPS, Zhang et al. 2018).

Shape suffixes: B pictures, c colours (3), H height and W width in px, D channels, h rows and w columns of a map.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data.features import PatchFeatures, normalised

MAPS = (1, 3, 5)  # blocks of EfficientNet-Lite0 after which a map is compared: 1/2, 1/4, 1/8 of the picture's side


class PerceptualLoss(nn.Module):
    """The corpus' own feature network, compared at its middle maps. Raises UserError if its file is none."""

    def __init__(self, feature_network: Path):
        super().__init__()
        features = PatchFeatures(feature_network)
        self.sha256 = features.sha256
        self.network = features.network.requires_grad_(False)

    def forward(self, image_BcHW: Tensor, reference_BcHW: Tensor) -> Tensor:
        """Pictures in [-1, 1] -> squared distance of the maps' unit vectors, mean over places, pictures and maps."""
        with torch.no_grad():
            reference = list(self._maps(reference_BcHW))
        distances = [
            (seen_BDhw - wanted_BDhw).square().sum(1).mean()
            for seen_BDhw, wanted_BDhw in zip(self._maps(image_BcHW), reference, strict=True)
        ]
        return torch.stack(distances).mean()

    def _maps(self, image_BcHW: Tensor) -> Iterator[Tensor]:
        pixels_BcHW = normalised((image_BcHW + 1) * 127.5)
        # With channels last, depthwise convolutions take half the time on a CPU.
        x_BDhw = self.network.stem(pixels_BcHW.contiguous(memory_format=torch.channels_last))
        for start, stop in pairwise((0, *MAPS)):
            x_BDhw = self.network.blocks[start:stop](x_BDhw)
            yield F.normalize(x_BDhw.float(), dim=1)
