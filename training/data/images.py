"""Decode images that come from strangers."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from training.data.jpeg import MOST_SCANS, START, scans
from training.errors import UserError

MAX_PIXELS = 50_000_000
FORMATS = ("PNG", "WEBP", "JPEG")
SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")
LONG_SIDE = 512  # pixels that are kept of a stranger's picture: more than any network here looks at


def read_image(data: bytes, still: bool = False) -> Image.Image:
    """The RGB image, transparency on white, in the bytes of a PNG, WebP or JPEG file.

    Raises ValueError with the reason if `data` is not one whole image of at most MAX_PIXELS, or, if `still`, moves.
    """
    return _read(data, on_white, still)


def read_original(data: bytes) -> Image.Image:
    """`read_image` of what is to be edited: ValueError also if it moves or is transparent, which would be lost."""
    return _read(data, opaque, still=True)


def _read(data: bytes, in_rgb: Callable[[Image.Image], Image.Image], still: bool = False) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            # The size stands in the header: a decompression bomb is refused before it is decoded.
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            if data.startswith(START) and (passes := scans(data)) > MOST_SCANS:
                raise ValueError(f"a JPEG of {passes:,} scans, more than {MOST_SCANS}: save it anew")
            # A telephone's MPO is a JPEG with other views of the same behind it.
            if still and image.format != "MPO" and (pictures := getattr(image, "n_frames", 1)) > 1:
                raise ValueError(f"an animation of {pictures} pictures: give one of them")
            return in_rgb(_in_eight_bits(ImageOps.exif_transpose(image)))
    except UnidentifiedImageError:
        raise ValueError(f"not a readable image: none of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"too large: {error}") from error
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"not a readable image: {error}") from error


def read_picture(path: Path) -> Image.Image:
    """`read_image` of a file, at most LONG_SIDE pixels a side. Raises UserError that names it."""
    image = read_file(path, read_image)
    image.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
    return image


def read_file(path: Path, read: Callable[[bytes], Image.Image]) -> Image.Image:
    """What `read` finds in a file. Raises UserError that names it."""
    try:
        return read(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 bits would all be cut to white."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.float64) / 257).clip(0, 255).astype(np.uint8))


def on_white(image: Image.Image) -> Image.Image:
    """The image in RGB, its transparent parts white."""
    if image.mode in ("RGB", "L") and "transparency" not in image.info:
        return image.convert("RGB")  # in a third of the time
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def opaque(image: Image.Image) -> Image.Image:
    """The image in RGB. Raises ValueError if any of it is transparent."""
    if np.asarray(image.convert("RGBA"))[:, :, 3].min(initial=255) < 255:
        raise ValueError("the picture has transparent parts: lay it on a ground first")
    return image.convert("RGB")
