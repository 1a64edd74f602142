"""Strangers' pictures: one still, whole PNG, JPEG or WebP and nothing after it, whatever its name and type say."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

from PIL import Image

from training.data import jpeg
from training.data.images import FORMATS, LONG_SIDE, read_image, read_original
from training.recipe import one_line

PNG = b"\x89PNG\r\n\x1a\n"


class NoPicture(ValueError):
    """Why it is not taken, in one line."""


def seen(data: bytes, pixels: int) -> Image.Image:
    """The picture as it is looked at, in RGB. Raises NoPicture."""
    image = _decoded(data, pixels, read_image)
    image.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
    return image


def original(data: bytes, pixels: int) -> Image.Image:
    """The picture in its own size, to be edited: it must be opaque. Raises NoPicture."""
    return _decoded(data, pixels, read_original)


def mask(data: bytes, pixels: int) -> Image.Image:
    """A picture in its own size of which only the light counts. Raises NoPicture."""
    return _decoded(data, pixels, read_image)


def png(image: Image.Image) -> bytes:
    """Without anything but its pixels."""
    out = io.BytesIO()
    image.save(out, format="PNG", compress_level=3)
    return out.getvalue()


def _decoded(data: bytes, pixels: int, read: Callable[[bytes], Image.Image]) -> Image.Image:
    if (end := _end(data)) is None:
        raise NoPicture(f"not a whole picture: none of {', '.join(FORMATS)}")
    if data[end:].strip(b"\0"):
        raise NoPicture(f"{len(data) - end} bytes after the end of the picture: save it anew")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, which is not read
            _check_header(data, pixels)
            return read(data)
    except NoPicture:
        raise
    except Exception as error:  # a decoder may stumble in any way over what was made to trip it
        raise NoPicture(one_line(str(error))[:200] or "not a readable image") from None


def _check_header(data: bytes, pixels: int) -> None:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        size, moving = image.size, getattr(image, "n_frames", 1) > 1
    if size[0] * size[1] > pixels:
        raise NoPicture(f"{size[0]} x {size[1]} pixels, more than {pixels:,}: make it smaller")
    if moving:
        raise NoPicture("an animation: give one of its pictures")


def _end(data: bytes) -> int | None:
    """Where the picture's file ends, by its own structure; None if it does not."""
    if data.startswith(PNG):
        return _end_of_png(data)
    if data.startswith(jpeg.START):
        return next((place for marker, place in jpeg.markers(data) if marker == jpeg.END), None)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        size = 8 + int.from_bytes(data[4:8], "little")
        size += size % 2
        return size if size <= len(data) else None
    return None


def _end_of_png(data: bytes) -> int | None:
    place = len(PNG)
    while place + 12 <= len(data):
        kind, place = data[place + 4 : place + 8], place + 12 + int.from_bytes(data[place : place + 4], "big")
        if kind == b"IEND":
            return place if place <= len(data) else None
    return None
