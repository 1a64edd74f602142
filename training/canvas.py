"""A picture on the white square that an image tokenizer codes, and back: which cells a region touches, what is redrawn.

Shape suffixes: h rows and w columns of the grid of codes.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from PIL import Image

from training.data.features import as_array, augmented
from training.errors import UserError


def region_of(size: tuple[int, int], region: tuple[int, int, int, int] | Image.Image) -> Image.Image:
    """The region of a picture of `size` px as an L image, 255 in it and 0 elsewhere.

    `region`: left, top, width and height in px, or an image of the picture's size, whose lighter half it is. Raises
    UserError if it is empty or leaves the picture.
    """
    if isinstance(region, Image.Image):
        if region.size != size:
            raise UserError(f"the mask has {_by(region.size)} px, the picture {_by(size)}: they must be equal")
        found = region.convert("L").point(lambda grey: 255 * (grey > 127))
        if found.getbbox() is None:
            raise UserError("the mask is empty: what is to be redrawn must be white in it")
        return found
    left, top, width, height = region
    shown = f"region {left},{top},{width},{height}"
    if width < 1 or height < 1:
        raise UserError(f"{shown}: is empty: give left, top, width and height in px")
    if left < 0 or top < 0 or left + width > size[0] or top + height > size[1]:
        raise UserError(f"{shown}: leaves the picture, which has {_by(size)} px")
    found = Image.new("L", size)
    found.paste(255, (left, top, left + width, top + height))
    return found


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


class Canvas:
    """An RGB picture in the middle of a white square of `side` px, cut into cells of `cell` px."""

    def __init__(self, picture: Image.Image, side: int, cell: int):
        self.picture, self.side, self.cell = picture, side, cell
        self.ratio = side / max(picture.size)
        width, height = (max(1, round(length * self.ratio)) for length in picture.size)  # as `features.placed` has it
        self.left, self.top = round((side - width) / 2), round((side - height) / 2)
        self.box = (self.left, self.top, self.left + width, self.top + height)

    def pixels(self) -> np.ndarray:
        """float32 [3, side, side] in [-1, 1]."""
        return as_array(augmented(self.picture, 0, square_side=self.side))

    def cells(self, region: Image.Image) -> np.ndarray:
        """bool [h, w]: cells of which the region (see `region_of`) touches any px."""
        within = np.asarray(region) > 0
        rows, columns = (self._spans(offset) for offset in (self.top, self.left))
        return np.array([[within[row, column].any() for column in columns] for row in rows])

    def _spans(self, offset: int) -> list[slice]:
        """The px of the picture that each cell along a side shows."""
        edges = [(place - offset) / self.ratio for place in range(0, self.side + 1, self.cell)]
        return [slice(max(math.floor(start), 0), max(math.ceil(stop), 0)) for start, stop in pairwise(edges)]

    def redrawn(self, square: Image.Image, region: Image.Image) -> Image.Image:
        """The picture with the region's px out of the square; all others are its own, to the bit."""
        drawn = square.crop(self.box).resize(self.picture.size, Image.Resampling.BICUBIC)
        return Image.composite(drawn, self.picture, region)
