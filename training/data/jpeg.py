"""A JPEG file by its markers (ITU-T T.81, annex B), without decoding it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile

START, SCAN, END = b"\xff\xd8", 0xDA, 0xD9
_LONE = {0x01, *range(0xD0, 0xDA)}  # markers without a length
# Of a progressive file: encoders make about ten. Each costs a pass over all pixels, however few bytes it has.
MOST_SCANS = 100


def markers(data: bytes) -> Iterator[tuple[int, int]]:
    """Each marker and the place behind it, up to the end of the data."""
    place = len(START)
    while (place := data.find(b"\xff", place)) >= 0 and place + 1 < len(data):
        marker = data[place + 1]
        if marker in (0x00, 0xFF):  # within what is coded; a filler
            place += 1 + (marker == 0)
            continue
        yield marker, place + 2
        place += 2
        if marker not in _LONE:
            place += int.from_bytes(data[place : place + 2], "big")


def scans(data: bytes) -> int:
    """Of the first picture in the file."""
    return sum(marker == SCAN for marker, _ in takewhile(lambda found: found[0] != END, markers(data)))
