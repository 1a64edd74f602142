"""Finding pictures in a folder by words: an index of vectors, built once and kept up to date.

A picture is found by its own vector, and by that of the details which the model writes about it: words of a query
may be among these that a glance at the picture does not suggest. A hundred thousand pictures are looked through in half
a second, one by one, so nothing else is used.

Shape suffixes: N pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from training.data.images import SUFFIXES, read_picture
from training.data.rows import clean
from training.embedding import Embeddings
from training.errors import UserError
from training.files import replace
from training.trained import M6

DETAILS = 0.5  # what the model's own words about a picture weigh beside the picture
FILE = "index.safetensors"  # vectors, and as its metadata whose they are: one file, so that both are of one time
SEEN, SAID, ARRAYS = "image", "details", ("vectors", "words", "weights")
BATCH, KEPT = 32, 16  # pictures that are read at once; batches after which what was read is worth keeping
THUMBNAIL, CAPTION = 160, 18  # pixels


class Entry(NamedTuple):
    """A picture's file, as it was when it was read, and what the model said of it."""

    name: str  # within the folder
    size: int
    changed: int  # ns
    details: str


_ENTRIES = TypeAdapter(list[Entry])


@dataclass(frozen=True)
class Hit:
    """A picture that was found; `score` is a weighted mean of cosines."""

    path: Path
    score: float
    details: str


@dataclass
class Index:
    """Pictures of `folder`, as the model `identity` sees them."""

    folder: Path
    identity: str
    entries: list[Entry] = field(default_factory=list)
    seen: Embeddings | None = None  # of the pictures
    said: Embeddings | None = None  # of their details
    skipped: list[str] = field(default_factory=list)  # files that are no pictures, and why

    @classmethod
    def open(cls, place: Path, folder: Path, identity: str) -> Index:
        """The index that is kept at `place`, or an empty one if it is missing, of another model or not whole."""
        fresh = cls(folder, identity)
        try:
            with safe_open(place / FILE, framework="numpy") as file:
                if (kept := file.metadata()) | fresh._owner() != kept:
                    return fresh
                entries = _ENTRIES.validate_json(kept["entries"])
                seen, said = (
                    Embeddings(*(file.get_tensor(f"{kind}.{name}") for name in ARRAYS)) for kind in (SEEN, SAID)
                )
        except (OSError, ValueError, LookupError, TypeError, SafetensorError):
            return fresh
        whole = {len(array) for part in (seen, said) for array in part.arrays()} == {len(entries)}
        return cls(folder, identity, entries, seen, said) if whole else fresh

    def _owner(self) -> dict[str, str]:
        return {"identity": self.identity, "folder": str(self.folder.resolve())}

    def save(self, place: Path) -> None:
        """Keep it at `place`, a folder of its own, in place of what was kept there. Raises OSError."""
        place.mkdir(parents=True, exist_ok=True)
        assert self.seen and self.said
        arrays = _named(self.seen, SEEN) | _named(self.said, SAID)
        kept = self._owner() | {"entries": _ENTRIES.dump_json(self.entries).decode()}
        replace(place / FILE, save(arrays, metadata=kept))

    def update(
        self,
        m: M6,
        advance: Callable[[int, int], object] = lambda done, of: None,
        keep: Callable[[], object] = lambda: None,
    ) -> int:
        """Take in what is new or changed in the folder, and out what is gone; returns how many pictures were taken in.

        `advance` is told how many of the new ones are done; `keep` is called every KEPT batches, when the index holds
        what has been read. Raises UserError if there is no picture at all.
        """
        found = {str(path.relative_to(self.folder)): path for path in pictures_in(self.folder)}
        known = {
            entry.name: place
            for place, entry in enumerate(self.entries)
            if entry.name in found and _unchanged(found[entry.name], entry)
        }
        new = [name for name in found if name not in known]
        kept = list(known.values())
        entries = [self.entries[place] for place in kept]
        seen, said = ([part[kept]] if part else [] for part in (self.seen, self.said))
        for start in range(0, len(new), BATCH):
            own, images = self._read([found[name] for name in new[start : start + BATCH]])
            if images:
                details = details_of(m, images)
                entries += [entry._replace(details=text) for entry, text in zip(own, details, strict=True)]
                seen.append(m.embed_images(images))
                said.append(m.embed_texts(details))
            advance(min(start + BATCH, len(new)), len(new))
            if entries and (start // BATCH + 1) % KEPT == 0:
                seen, said = self._hold(entries, seen, said)
                keep()
        if not entries:
            raise UserError(f"{self.folder}: no picture there{f' ({self.skipped[0]})' if self.skipped else ''}")
        self._hold(entries, seen, said)
        return len(entries) - len(kept)

    def _hold(
        self, entries: list[Entry], seen: list[Embeddings], said: list[Embeddings]
    ) -> tuple[list[Embeddings], list[Embeddings]]:
        """Be what was gathered; each kind's parts are then one."""
        self.entries, self.seen, self.said = entries, Embeddings.joined(seen), Embeddings.joined(said)
        return [self.seen], [self.said]

    def _read(self, paths: Sequence[Path]) -> tuple[list[Entry], list[Image.Image]]:
        entries: list[Entry] = []
        images = []
        for path in paths:
            try:
                images.append(read_picture(path))
                state = path.stat()
            except (OSError, UserError) as error:
                self.skipped.append(str(error))
                continue
            entries.append(Entry(str(path.relative_to(self.folder)), state.st_size, state.st_mtime_ns, ""))
        return entries, images

    def search(self, m: M6, query: str, most: int) -> list[Hit]:
        """The `most` pictures that fit best, best first."""
        assert self.seen and self.said
        asked = m.embed_texts([query])
        image_N, details_N = (part.similarity(asked)[:, 0] for part in (self.seen, self.said))
        score_N = (image_N + DETAILS * details_N) / (1 + DETAILS)
        best = np.argsort(-score_N, kind="stable")[:most]
        return [
            Hit(self.folder / self.entries[n].name, float(score_N[n]), self.entries[n].details) for n in best.tolist()
        ]


def pictures_in(folder: Path) -> Iterator[Path]:
    """Files under a folder that are pictures by their names, in order. Raises UserError if it is no folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            yield path


def details_of(m: M6, images: Sequence[Image.Image]) -> list[str]:
    """What the model says of each picture: its name and key words."""
    both = zip(m.captions(images), m.captions(images, "tags"), strict=True)
    return [clean(" ".join(said)) or "?" for said in both]


def _named(embeddings: Embeddings, kind: str) -> dict[str, np.ndarray]:
    return {f"{kind}.{name}": array for name, array in zip(ARRAYS, embeddings.arrays(), strict=True)}


def _unchanged(path: Path, entry: Entry) -> bool:
    state = path.stat()
    return (state.st_size, state.st_mtime_ns) == (entry.size, entry.changed)


def contact_sheet(hits: Sequence[Hit], columns: int = 4) -> Image.Image:
    """Thumbnails in reading order, each with its rank and score."""
    rows = -(-len(hits) // columns)
    cell = THUMBNAIL + CAPTION
    sheet = Image.new("RGB", (columns * THUMBNAIL, rows * cell), "white")
    pen = ImageDraw.Draw(sheet)
    for place, hit in enumerate(hits):
        left, top = place % columns * THUMBNAIL, place // columns * cell
        thumbnail = read_picture(hit.path)
        thumbnail.thumbnail((THUMBNAIL - 8, THUMBNAIL - 8))
        corner = (left + (THUMBNAIL - thumbnail.width) // 2, top + (THUMBNAIL - thumbnail.height) // 2)
        sheet.paste(thumbnail, corner)
        pen.text((left + 6, top + THUMBNAIL), f"{place + 1}.  {hit.score:.2f}", fill="black")
    return sheet
