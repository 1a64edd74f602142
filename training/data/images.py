"""Decode images that come from strangers."""

import io

from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 50_000_000
FORMATS = ("PNG", "WEBP", "JPEG")


def read_image(data: bytes) -> Image.Image:
    """The RGB image, transparency on white, in the bytes of a PNG, WebP or JPEG file.

    Raises ValueError with the reason if `data` is not one whole image of at most MAX_PIXELS.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            # The size stands in the header: a decompression bomb is refused before it is decoded.
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            return on_white(image)
    except UnidentifiedImageError:
        raise ValueError(f"not a readable image: none of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"too large: {error}") from error
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"not a readable image: {error}") from error


def on_white(image: Image.Image) -> Image.Image:
    """The image in RGB, its transparent parts white."""
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
