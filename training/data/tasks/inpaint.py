"""Inpainting: the masked codes of a picture, out of those that are kept, its words and a reference picture.

The training of the second, non-autoregressive stage of M6-UFC (Zhang et al. 2021, arXiv 2105.14211): any of the
controls may be missing. Its reference is a block of the picture itself; here it is another view, or another picture
of the same name, seen as M6 sees pictures.
"""

from __future__ import annotations

import math

import numpy as np

from training.data.rows import Picture
from training.data.tasks.base import Random, Row, View
from training.data.tasks.draw import Draw

REFERENCE = 0.5  # how often one is shown, if there is one
BOXED = 0.5  # how often codes are masked only within a box, or only outside one


class Inpaint(Draw):
    name = "inpaint"

    def items(self) -> np.ndarray:
        rows = super().items()
        self.alike: dict[str, list[int]] = {}
        for row in rows.tolist():
            self.alike.setdefault(self.corpus.picture(row).zh, []).append(row)
        return rows

    def row(self, item: int, limit: int, random: Random) -> Row:
        """The grid comes first in the source, so that a cell has the same position whatever the words."""
        view, picture = self.view(item, random), self.corpus.picture(item)
        codes, prompt = self.codes(view, limit), self.prompt(picture, random)
        hidden = {place: codes[place] for place in random_mask(math.isqrt(len(codes)), random)}
        grid = [self.tokenizer.mask_id if place in hidden else code for place, code in enumerate(codes)]
        return Row([*grid, *prompt][: limit - 1], [], self.reference(picture, view, random), hidden=hidden)

    def reference(self, picture: Picture, view: View, random: Random) -> View | None:
        """A view of a picture of this name, but never the one that is to be restored."""
        if random.random() >= REFERENCE:
            return None
        rows = self.alike[picture.zh]
        found = self.view(rows[random.integers(len(rows))], random)
        return None if found == view else found


def random_mask(side: int, random: Random) -> list[int]:
    """Places that are masked of a grid of side x side codes, row by row.

    Of the whole grid, of a box, or of all but a box, a share of cos(u pi / 2), u uniform: so what mask-predict meets
    on its way (MaskGIT, arXiv 2202.04200, section 3.1; the boxes are those of M6-UFC).
    """
    region = np.ones((side, side), bool)
    if random.random() < BOXED:
        height, width = random.integers(1, max(side, 2), 2)
        top, left = random.integers(side - height + 1), random.integers(side - width + 1)
        within = random.random() < 0.5
        region[:] = not within
        region[top : top + height, left : left + width] = within
    places = np.flatnonzero(region)
    count = math.ceil(math.cos(random.random() * math.pi / 2) * len(places))
    return sorted(random.choice(places, count, replace=False).tolist())
