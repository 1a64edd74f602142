"""Rows of a WebDataset shard: a tar whose members KEY.jpg and KEY.txt or KEY.json, one after the other, are a row.

Read as a stream; a member's name is only compared, and never a path on the disk. Names as the webdataset library has
them: the key ends at the first dot of the last part.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

from training.data.images import SUFFIXES
from training.data.importing.folder import CAPTION
from training.data.importing.lines import NO_UTF_8
from training.data.importing.sources import MOST_BYTES, MOST_TEXT_BYTES, Fault, Found, Source
from training.data.importing.tars import Tar, opened
from training.errors import UserError
from training.recipe import one_line

KEY, IMAGE = "__key__", "image"
TEXTS = (CAPTION, "json")  # endings


class Member(NamedTuple):
    """Of a tar. `content`: None where it is none of what a row is made of."""

    key: str
    ending: str
    content: bytes | None
    fault: str = ""


class Shard(Source):
    """Columns `__key__`, `image` (the bytes), `txt` (the caption's first line), and those of the JSON."""

    form = "WebDataset tar"

    def rows(self) -> Iterator[Found]:
        seen: set[str] = set()
        for key, members in groupby(self._members(), lambda member: member.key):
            item = f"{self.name}/{key}"
            if key in seen:
                again = f"{next(members).ending}; a row's members stand together"
                yield Found(item, fault=Fault("a key that was there before", again))
            else:
                seen.add(key)
                yield _row(item, key, members)

    def _members(self) -> Iterator[Member]:
        """What is neither a file nor a folder has a fault; folders are no members."""
        number = 0
        try:
            with opened(self.path) as file:
                tar = Tar(file)
                for member in tar:
                    number += 1
                    if not member.isdir():
                        yield self._member(tar, member)
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            if not number:
                raise UserError(f"{self.path}: no {self.form} ({one_line(str(error))})") from None
            reason = f"damaged after {number:,} members ({one_line(str(error))}); mend it or leave it out"
            raise UserError(f"{self.path}: {reason}") from None

    def _member(self, tar: Tar, member: tarfile.TarInfo) -> Member:
        folder, _, name = member.name.removeprefix("./").rpartition("/")
        stem, _, ending = name.partition(".")
        key, ending = f"{folder}/{stem}" if folder else stem, ending.lower()
        if not member.isreg():
            return Member(key, ending, None, "a link or a device, not a file")
        picture = f".{ending}" in SUFFIXES
        if not picture and ending not in TEXTS:
            return Member(key, ending, None)
        if member.size > (MOST_BYTES if picture else MOST_TEXT_BYTES):
            return Member(key, ending, None, "a member too large")
        return Member(key, ending, tar.read(member))


def _row(item: str, key: str, members: Iterator[Member]) -> Found:
    """One at a time: a stranger may have given a key more than fits."""
    said: dict[str, dict[str, Any]] = {}
    for member in members:
        if member.fault:
            return Found(item, fault=Fault(member.fault, member.ending))
        if member.content is None:
            continue
        kind = member.ending if member.ending in TEXTS else IMAGE
        if kind in said:
            return Found(item, fault=Fault("more than one picture or caption of one key", member.ending))
        try:
            said[kind] = _columns(kind, member.content)
        except UnicodeDecodeError:
            return Found(item, fault=Fault(NO_UTF_8, member.ending))
        except (ValueError, RecursionError) as error:
            return Found(item, fault=Fault("no JSON object", one_line(str(error))))
    return Found(item, {**said.get("json", {}), **said.get(CAPTION, {}), **said.get(IMAGE, {}), KEY: key})


def _columns(kind: str, content: bytes) -> dict[str, Any]:
    """What a member says. Raises ValueError."""
    if kind == IMAGE:
        return {IMAGE: content}
    text = content.decode("utf-8-sig")
    if kind == CAPTION:
        lines = text.splitlines()
        return {CAPTION: lines[0] if lines else ""}
    row = json.loads(text)
    if not isinstance(row, dict):
        raise ValueError("a list or a value")
    return row
