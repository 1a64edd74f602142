"""What is taken of strangers' pictures: whole, still ones, and nothing behind them."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from launch.serving.pictures import NoPicture, original, png, seen
from tests.launch.serving.conftest import encoded
from tests.launch.serving.hostile import scanned

PIXELS = 1_000_000
PHOTO = Image.effect_noise((90, 60), 80).convert("RGB")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_is_seen_and_one_that_was_cut_or_added_to_is_not(kind: str) -> None:
    data = encoded(PHOTO, format=kind)
    assert seen(data, PIXELS).size == (90, 60)
    assert seen(data + b"\0" * 9, PIXELS).size == (90, 60)  # some cameras fill up
    for behind in (b"<script>alert(1)</script>", encoded(PHOTO, format="PNG"), b"PK\x05\x06"):
        with pytest.raises(NoPicture, match=r"bytes after the end of the picture: save it anew"):
            seen(data + behind, PIXELS)
    for length in (0, 1, 9, 30, len(data) // 2, len(data) - 1):
        with pytest.raises(NoPicture, match="not a"):
            seen(data[:length], PIXELS)


@pytest.mark.parametrize(
    "options", [{"progressive": True}, {"quality": 100, "subsampling": 0}, {"restart_marker_rows": 1}]
)
def test_the_end_of_every_kind_of_jpeg_is_found(options: dict[str, object]) -> None:
    data = encoded(PHOTO, format="JPEG", comment=b"\xff\xd9 is no end here", **options)
    assert seen(data, PIXELS).size == (90, 60)
    with pytest.raises(NoPicture, match="1 bytes after the end"):
        seen(data + b"x", PIXELS)


def test_pictures_that_move_are_large_or_transparent_are_refused() -> None:
    frames = [Image.effect_noise((48, 48), seed).convert("RGB") for seed in (10, 50, 90)]
    for kind in ("PNG", "WEBP"):
        moving = encoded(frames[0], format=kind, save_all=True, append_images=frames[1:])
        with pytest.raises(NoPicture, match="an animation"):
            seen(moving, PIXELS)
    with pytest.raises(NoPicture, match=r"2000 x 1000 pixels, more than 1,000,000"):
        seen(encoded(Image.new("1", (2000, 1000)), format="PNG"), PIXELS)
    clear = encoded(Image.new("RGBA", (20, 20), (255, 0, 0, 9)), format="PNG")
    assert seen(clear, PIXELS).size == (20, 20)
    with pytest.raises(NoPicture, match="transparent"):
        original(clear, PIXELS)


def test_a_bomb_is_not_unpacked() -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    packed = zlib.compress(bytes(10**7), 9)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    with pytest.raises(NoPicture, match="pixels"):
        seen(bomb, PIXELS)


def test_a_jpeg_of_more_scans_than_any_needs_is_not_decoded() -> None:
    with pytest.raises(NoPicture, match=r"a JPEG of 3,00. scans, more than 100: save it anew"):
        seen(scanned(400, 3000), PIXELS)
    assert seen(scanned(400, 50), PIXELS).size == (400, 400)


def test_what_is_kept_of_a_picture_is_its_pixels_alone() -> None:
    exif = Image.Exif()
    exif[0x010E] = "<script>alert(1)</script>"
    data = encoded(PHOTO, format="JPEG", exif=exif, comment=b"<?php evil() ?>")
    kept = png(seen(data, PIXELS))
    assert b"script" in data and b"php" in data and b"script" not in kept and b"php" not in kept
    assert np.asarray(Image.open(io.BytesIO(kept))).shape == (60, 90, 3)
