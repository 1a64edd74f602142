"""What each lane computes, for all that was asked of it at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from launch.serving.desk import Desk, Lane
from launch.serving.shelf import Collection
from launch.serving.writers import WritingLane
from training.painting import Hand, Region
from training.search import Hit
from training.trained import M6


def captions(m: M6, asked: Sequence[tuple[list[np.ndarray], str]]) -> list[list[str]]:
    """Of lists of pictures' patches, all of one kind."""
    said = iter(m.captions([one for patches, _ in asked for one in patches], asked[0][1]))
    return [[next(said) for _ in patches] for patches, _ in asked]


def answers(m: M6, asked: Sequence[tuple[str, np.ndarray | None, tuple[str, ...]]]) -> list[str]:
    """To questions, about pictures or not, all with the same choices."""
    return m.asks([(question, patches) for question, patches, _ in asked], asked[0][2])


def matches(m: M6, asked: Sequence[tuple[np.ndarray, str]]) -> list[float]:
    return m.matches(asked)


def drawings(m: M6, asked: Sequence[tuple[str, Hand, Image.Image | None]]) -> list[list[Image.Image]]:
    return [m.draw(text, hand, reference) for text, hand, reference in asked]


def edits(m: M6, asked: Sequence[tuple[Image.Image, str, Region, Image.Image | None, Hand]]) -> list[list[Image.Image]]:
    return [m.edit(*one) for one in asked]


def searches(m: M6, asked: Sequence[tuple[Collection, str, int]]) -> list[list[Hit]]:
    """In any collections."""
    queries = m.embed_texts([query for _, query, _ in asked])
    return [collection.found(queries[[n]], most) for n, (collection, _, most) in enumerate(asked)]


def changes(m: M6, asked: Sequence[Callable[[M6], Any]]) -> list[Any]:
    """Of collections."""
    return [change(m) for change in asked]


def open_lanes(desk: Desk, m: M6, rows: int) -> None:
    """All of them: what they compute gives way to one another between tokens."""
    m.between = desk.between
    works: dict[str, tuple[Callable[[M6, Any], Sequence[Any]], int]] = {
        "caption": (captions, rows), "ask": (answers, rows), "match": (matches, rows), "search": (searches, rows),
        # These fill a batch each: a drawing by its tries, an index by its pictures.
        "draw": (drawings, 1), "edit": (edits, 1), "index": (changes, 1),
    }  # fmt: skip
    desk.open(
        WritingLane(desk, m, rows), *(Lane(desk, task, partial(work, m), most) for task, (work, most) in works.items())
    )
