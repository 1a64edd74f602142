"""The load of all experts as one picture: a row a layer and modality, a cell an expert."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence

from training.charts import bins, strength
from training.records import MODALITIES

CELL, MARGIN, LINE = 12, 92, 16  # pixels: of a cell, left of the rows, and of a line of text
WIDTH = 768
EVEN, OVER, UNDER, NONE = (250, 250, 250), (190, 60, 20), (30, 90, 170), (225, 225, 225)


def relative_load(counts: Sequence[int]) -> list[float] | None:
    """Load over the even load, 1 where it is even, of each expert or of neighbours in one cell; None without any."""
    even = statistics.fmean(counts)
    return [statistics.fmean(counts[e] for e in cell) / even for cell in bins(len(counts))] if even else None


def heat_map(wanted: Sequence[Sequence[Sequence[int]]]) -> bytes:
    """A PNG of assignments by layer, modality and expert: four times the even load, or a quarter, has full colour."""
    from PIL import Image, ImageDraw

    cells = len(bins(len(wanted[0][0])))
    size = max(CELL, WIDTH // cells)
    image = Image.new("RGB", (MARGIN + cells * size, LINE + len(wanted) * (len(MODALITIES) * CELL + 4)), "white")
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, 2), "experts; red over, blue under the even load", fill="black")
    for layer, modalities in enumerate(wanted):
        for place, (name, counts) in enumerate(zip(MODALITIES, modalities, strict=True)):
            top = LINE + layer * (len(MODALITIES) * CELL + 4) + place * CELL
            draw.text((4, top), f"layer {layer + 1} {name}" if not place else f"{' ' * 8}{name}", fill="black")
            for number, load in enumerate(relative_load(counts) or [None] * cells):
                left = MARGIN + number * size
                draw.rectangle((left, top, left + size - 2, top + CELL - 2), fill=colour(load))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def colour(load: float | None, even: tuple[int, ...] = EVEN) -> tuple[int, ...]:
    """Of a cell, red, green and blue: None is one without tokens; `even` is that of an even load."""
    if load is None:
        return NONE
    full, share = (OVER if load > 1 else UNDER), strength(load)
    return tuple(round(start + share * (end - start)) for start, end in zip(even, full, strict=True))
