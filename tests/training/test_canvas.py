"""A picture on its square: cells and px agree, and what is outside a region stays."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from training.canvas import Canvas, region_of
from training.data.features import as_picture

LAW = settings(deadline=None, derandomize=True)


@st.composite
def scenes(draw):
    """A picture's size and a box in it."""
    width, height = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return (width, height), (left, top, draw(st.integers(1, width - left)), draw(st.integers(1, height - top)))


def painted(size, box):
    """A black picture with the box in white."""
    picture = Image.new("RGB", size)
    picture.paste("white", (box[0], box[1], box[0] + box[2], box[1] + box[3]))
    return picture


@LAW
@given(scenes(), st.sampled_from([(16, 4), (64, 8), (128, 8)]))
def test_cells_are_those_in_which_the_region_shows(scene, square):
    size, box = scene
    side, cell = square
    region = region_of(size, box)
    cells = Canvas(painted(size, box), side, cell).cells(region)
    assert cells.shape == (side // cell, side // cell) and cells.any()
    # Scaled without smoothing, the box lies within its cells; rounded outwards, they are few more than it needs.
    shown = Canvas(region.convert("RGB"), side, cell)
    hit = np.zeros((side, side), bool)
    left, top, right, bottom = shown.box
    scaled = region.resize((right - left, bottom - top), Image.Resampling.NEAREST)
    hit[top:bottom, left:right] = np.asarray(scaled) > 0
    touched = hit.reshape(side // cell, cell, side // cell, cell).any((1, 3))
    assert not (touched & ~cells).any()
    assert cells.sum() <= (box[2] * shown.ratio / cell + 2) * (box[3] * shown.ratio / cell + 2)


@LAW
@given(scenes())
def test_only_the_region_is_redrawn(scene):
    size, box = scene
    canvas, region = Canvas(Image.new("RGB", size, "red"), 32, 4), region_of(size, box)
    found = canvas.redrawn(Image.new("RGB", (32, 32), "blue"), region)
    assert found.tobytes() == Image.composite(Image.new("RGB", size, "blue"), canvas.picture, region).tobytes()


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (30, 64), (200, 150)])
def test_what_is_put_back_stands_where_it_was(size):
    across, down = np.meshgrid(np.linspace(40, 220, size[0]), np.linspace(40, 220, size[1]))
    picture = Image.fromarray(np.stack([across, down, (across + down) / 2], 2).astype(np.uint8))
    canvas = Canvas(picture, 64, 8)
    found = canvas.redrawn(as_picture(torch.from_numpy(canvas.pixels())), region_of(size, (0, 0, *size)))
    error = np.abs(np.asarray(found, np.int16) - np.asarray(picture))
    step = 180 / min(size) / canvas.ratio  # of grey, from a px of the square to the next
    assert error.mean() < step / 2 and error.max() < 2 * step


@LAW
@given(scenes())
def test_a_box_and_its_mask_are_one_region(scene):
    size, box = scene
    assert region_of(size, painted(size, box)).tobytes() == region_of(size, box).tobytes()
