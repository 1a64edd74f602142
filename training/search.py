"""Finding pictures in a folder by words: an index of vectors, built once and kept up to date.

A picture is found by its own vector, and by that of the details which the model writes about it: words of a query
may be among these that a glance at the picture does not suggest. All pictures are looked through, one by one: for the
folders of a shop that is soon done, so nothing else is used.

Shape suffixes: N pictures.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from training.data.images import SUFFIXES, read_picture
from training.data.rows import clean
from training.embedding import ASKED, BAG, CALLED, TRUNK, Embeddings
from training.errors import UserError
from training.files import replace
from training.prompts import Picture
from training.trained import M6

DETAILS = 0.5  # what the model's own words about a picture weigh beside the picture
FILE = "index.safetensors"  # vectors, and as its metadata whose they are: one file, so that both are of one time
SEEN, SAID, ARRAYS = "image", "details", ("vectors", "words", "weights")
NAMES = [f"{kind}.{name}" for kind in (SEEN, SAID) for name in ARRAYS]
BATCH = 32  # pictures that are read at once
PAUSE = 60.0  # s, after which what was read since is worth keeping
THUMBNAIL, CAPTION = 160, 18  # pixels


class Entry(NamedTuple):
    """A picture's file, as it was when it was read, and what the model said of it."""

    name: str  # within the folder
    size: int
    changed: int  # ns
    details: str


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
        """The index that is kept at `place`, or an empty one if it is missing, of another model or damaged."""
        fresh = cls(folder, identity)
        try:
            with safe_open(place / FILE, framework="numpy") as file:
                kept = file.metadata()
                arrays = {name: file.get_tensor(name) for name in sorted(NAMES)}
            listed = kept["entries"]
            if kept != fresh._owner() | {"entries": listed, "digest": _digest(arrays, listed)}:
                return fresh
            entries = [Entry(*entry) for entry in json.loads(listed)]
        except (OSError, ValueError, LookupError, TypeError, SafetensorError):
            return fresh
        seen, said = (Embeddings(*(arrays[f"{kind}.{name}"] for name in ARRAYS)) for kind in (SEEN, SAID))
        return cls(folder, identity, entries, seen, said)

    def _owner(self) -> dict[str, str]:
        weights = f"{TRUNK} {BAG} {CALLED} {ASKED}"
        return {"identity": self.identity, "folder": ascii(str(self.folder.resolve())), "weights": weights}

    def save(self, place: Path) -> None:
        """Keep it at `place`, a folder of its own, in place of what was kept there. Raises OSError."""
        place.mkdir(parents=True, exist_ok=True)
        assert self.seen and self.said
        both = (*self.seen.arrays(), *self.said.arrays())
        arrays = dict(zip(NAMES, both, strict=True))
        entries = json.dumps(self.entries)
        kept = self._owner() | {"entries": entries, "digest": _digest(arrays, entries)}
        replace(place / FILE, save(arrays, metadata=kept))

    def update(
        self,
        m: M6,
        advance: Callable[[int, int], object] = lambda done, of: None,
        keep: Callable[[], object] = lambda: None,
    ) -> int:
        """Take in what is new or changed in the folder, and out what is gone; returns how many pictures were taken in.

        `advance` is told how many of the new ones are done; `keep` is called every PAUSE, when the index holds what
        has been read. Raises UserError if there is no picture at all.
        """
        found = {str(path.relative_to(self.folder)): path for path in pictures_in(self.folder)}
        known = {
            entry.name: place
            for place, entry in enumerate(self.entries)
            if entry.name in found and _unchanged(found[entry.name], entry)
        }
        new = [name for name in found if name not in known]
        kept = list(known.values())
        if self.entries and not new and len(kept) == len(self.entries):
            return 0
        entries, held = [self.entries[place] for place in kept], time.monotonic()
        seen, said = ([part[kept]] if part else [] for part in (self.seen, self.said))
        for start in range(0, len(new), BATCH):
            own, images = self._read([found[name] for name in new[start : start + BATCH]])
            if images:
                patches = m.prompts.patches(images)  # once for all that is asked about them
                details = details_of(m, patches)
                entries += [entry._replace(details=text) for entry, text in zip(own, details, strict=True)]
                seen.append(m.embed_images(patches))
                said.append(m.embed_texts(details))
            advance(min(start + BATCH, len(new)), len(new))
            if entries and time.monotonic() - held > PAUSE:
                seen, said = self._hold(entries, seen, said)
                keep()
                held = time.monotonic()
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
            name = str(path.relative_to(self.folder))
            try:
                name.encode()
                state = path.stat()  # before it is read: if it changes meanwhile, it is read again next time
                images.append(read_picture(path))
            except UnicodeEncodeError:
                self.skipped.append(f"{name!a}: its name is not UTF-8: rename it")
                continue
            except (OSError, UserError) as error:
                self.skipped.append(str(error))
                continue
            entries.append(Entry(name, state.st_size, state.st_mtime_ns, ""))
        return entries, images

    def search(self, m: M6, query: str, most: int) -> list[Hit]:
        """The `most` pictures that fit best, best first."""
        return self.found(m.embed_texts([query]), most)

    def found(self, asked: Embeddings, most: int) -> list[Hit]:
        """`search` for one text, of which these are the embeddings."""
        assert self.seen and self.said
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


def details_of(m: M6, images: Sequence[Picture]) -> list[str]:
    """What the model says of each picture: its name and key words; "?" if it has not learned to."""
    if not m.learned("caption"):
        return ["?"] * len(images)
    both = zip(m.captions(images), m.captions(images, "tags"), strict=True)
    return [clean(" ".join(dict.fromkeys(" ".join(said).split()))) or "?" for said in both]


def _digest(arrays: Mapping[str, np.ndarray], entries: str) -> str:
    digest = xxhash.xxh3_128(entries.encode())
    for name in NAMES:
        digest.update(f"{arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _unchanged(path: Path, entry: Entry) -> bool:
    try:
        state = path.stat()
    except OSError:
        return False
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
