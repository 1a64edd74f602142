"""Collections of pictures that can be searched: a folder each, with the pictures, which their content names, and one
file of what they are found by, which is replaced whole.

    HOME/NAME/pictures/HASH.png
    HOME/NAME/index/index.safetensors

Pictures are written before the index is brought up to date, so whenever a server is killed, its index is the old one or
the new one, and what it has not read yet is read when the next server starts.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
import unicodedata
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from PIL import Image

from launch.serving.limits import Limits
from launch.serving.pictures import png
from launch.serving.refusals import Refusal
from training.embedding import Embeddings
from training.errors import UserError
from training.files import replace
from training.search import Hit, Index
from training.trained import M6

LONGEST_NAME = 50
PICTURE = re.compile("[0-9a-f]{32}")
PICTURES, INDEX, SUFFIX, LOCK = "pictures", "index", ".png", ".lock"


class Collection:
    def __init__(self, folder: Path, identity: str):
        self.folder, self.pictures, self.identity = folder, folder / PICTURES, identity
        self.pictures.mkdir(parents=True, exist_ok=True)
        self.index = self._kept()

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def indexed(self) -> int:
        return len(self.index.entries)

    def ids(self) -> list[str]:
        return sorted(path.stem for path in self.pictures.glob(f"*{SUFFIX}") if PICTURE.fullmatch(path.stem))

    def take(self, m: M6, files: Mapping[str, bytes]) -> None:
        """Write PNG files of these ids, and bring the index up to date. Raises OSError; then nothing has changed."""
        new = [one for one in files if not self._path(one).exists()]
        try:
            for one in new:
                replace(self._path(one), files[one])
            self.update(m)
        except OSError:
            for one in new:
                self._path(one).unlink(missing_ok=True)
            self.index = self._kept()
            raise

    def picture(self, one: str) -> bytes | None:
        """The PNG of an id, if there is one."""
        try:
            return self._path(one).read_bytes() if PICTURE.fullmatch(one) else None
        except FileNotFoundError:
            return None

    def update(self, m: M6) -> None:
        """Bring the index up to date with the pictures."""
        if self.index.update(m, keep=self._save):
            self._save()

    def found(self, asked: Embeddings, most: int) -> list[Hit]:
        return self.index.found(asked, most) if self.indexed else []

    def _kept(self) -> Index:
        return Index.open(self.folder / INDEX, self.pictures, self.identity)

    def _save(self) -> None:
        self.index.save(self.folder / INDEX)

    def _path(self, one: str) -> Path:
        return self.pictures / f"{one}{SUFFIX}"


class Shelf:
    """All collections under one folder. They are made, filled and deleted by one thread."""

    def __init__(self, home: Path, identity: str, limits: Limits):
        """Raises UserError if another server has it."""
        self.home, self.identity, self.limits = home, identity, limits
        self._lock = _locked(home)
        self._clear()
        named = sorted(path for path in home.iterdir() if path.is_dir() and is_name(path.name))
        self._collections = {path.name: Collection(path, identity) for path in named}

    def close(self) -> None:
        """Let another server have it."""
        self._lock.close()

    def _clear(self) -> None:
        """What a server left behind that was killed."""
        for path in self.home.glob(".*/"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.home.glob("*/*/.*.partial"):
            path.unlink(missing_ok=True)

    def __iter__(self) -> Iterator[Collection]:
        return iter([*self._collections.values()])

    def get(self, name: str) -> Collection:
        """Raises Refusal."""
        if collection := self._collections.get(unicodedata.normalize("NFC", name)):
            return collection
        raise Refusal(404, "no_collection", "there is no collection of this name")

    def add(self, m: M6, name: str, files: Mapping[str, bytes]) -> Collection:
        """Put PNG files of these ids into the collection of a name (see `check_name`), made if there is none.

        Raises Refusal, OSError; then nothing has changed.
        """
        made = name not in self._collections
        collection = self._open(name)
        try:
            if len(collection.ids()) + len(files) > self.limits.collected:
                raise Refusal(409, "full", f"a collection has {self.limits.collected:,} pictures at the most")
            collection.take(m, files)
        except (Refusal, OSError):
            if made:
                self.delete(name)
            raise
        return collection

    def _open(self, name: str) -> Collection:
        if name not in self._collections:
            if len(self._collections) >= self.limits.collections:
                raise Refusal(409, "full", f"there are {self.limits.collections} collections: delete one")
            self._collections[name] = Collection(self.home / name, self.identity)
        return self._collections[name]

    def delete(self, name: str) -> None:
        """Raises Refusal, OSError."""
        gone = self.home / f".{uuid.uuid4().hex}"
        self.get(name).folder.rename(gone)
        del self._collections[name]
        shutil.rmtree(gone, ignore_errors=True)


def check_name(name: str) -> str:
    """The name as it is kept, if a collection may have it. Raises Refusal."""
    name = unicodedata.normalize("NFC", name)
    if not is_name(name):
        rule = f"letters, digits, - and _, up to {LONGEST_NAME}, and begins with a letter or digit"
        raise Refusal(422, "name", f"a collection's name has {rule}")
    return name


def is_name(name: str) -> bool:
    """Of any script, with the signs that some write above and below their letters."""
    fits = 0 < len(name) <= LONGEST_NAME and name[0].isalnum()
    return fits and all(one.isalnum() or one in "-_" or unicodedata.category(one)[0] == "M" for one in name)


def _locked(home: Path) -> IO[str]:
    """The folder is this process' alone for as long as the file is open. Raises UserError."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = (home / LOCK).open("a")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{home}: another server keeps its collections there: choose another --store") from None
    except OSError as error:
        raise UserError(f"{home}: cannot be written to ({error.strerror}); choose another --store") from None
    return lock


def named(image: Image.Image) -> tuple[str, bytes]:
    """A picture's id, which equal ones share, and its PNG."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:32], png(image)
