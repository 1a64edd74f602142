"""Files as strangers have them, whole and hostile."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tests.data_sample import draw
from training.data.importing.forms import open_sources
from training.data.importing.reading import Left, Reader, Settings, Taken

RED, GREEN = draw("circle", "#d33"), draw("square", "#2a4")


def encoded(form: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, 80 if len(mode) == 1 else None).save(out, form, **options)
    return out.getvalue()


def claims(width: int, height: int) -> bytes:
    """A PNG whose header says how large it is, and no more."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def moving(form: str) -> bytes:
    return encoded(form, save_all=True, append_images=[Image.new("RGB", (40, 30), "red")], duration=50)


def lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """JSON lines; pictures given as bytes become files beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for number, row in enumerate(rows):
        if isinstance(image := row.get("image"), bytes):
            (path.parent / f"{number}.png").write_bytes(image)
            row = {**row, "image": f"{number}.png"}
        written.append(json.dumps(row) + "\n")
    path.write_text("".join(written))
    return path


def tar(path: Path, members: Sequence[tuple[str, bytes] | tarfile.TarInfo], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
            else:
                about = tarfile.TarInfo(member[0])
                about.size = len(member[1])
                file.addfile(about, io.BytesIO(member[1]))
    return path


def outcomes(path: Path, settings: Settings | None = None) -> list[Taken | Left]:
    """What is made of each row of a source."""
    (source,) = open_sources([path])
    reader = Reader(source, source.columns(), settings or Settings())
    return [reader(found) for found in source.rows()]


def told(path: Path, settings: Settings | None = None) -> list[str]:
    """Of each row its words, or why it is left out."""
    return [
        f"{one.item}: {one.fault}" if isinstance(one, Left) else getattr(one.row, "zh", "") or one.row.text  # type: ignore[union-attr]
        for one in outcomes(path, settings)
    ]
