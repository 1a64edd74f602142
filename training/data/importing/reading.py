"""A stranger's row becomes a picture or a text of the corpus, or is left out for a reason."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from PIL import Image

from training.data.importing.sources import MOST_BYTES, Fault, Found, Source, plain, read_inside
from training.data.pictures import normalised_png
from training.data.rows import Picture, Text, clean, clean_lines
from training.data.texts import MAX_CHARACTERS
from training.errors import UserError
from training.recipe import nearest, shown

# Of each field of a row, the columns that hold it if nobody says otherwise; the first that is not empty.
FIELDS: dict[str, tuple[str, ...]] = {
    "image": ("image", "file_name"),
    "zh": ("zh", "caption", "txt", "text"),
    **{name: (name,) for name in ("en", "tags", "group", "subgroup", "style", "source", "licence", "mirrorable")},
    **{name: (name,) for name in ("text", "title", "author", "form", "polarity", "topic")},
}
STYLE, LICENCE = "imported", "not stated"
FORM, TOPIC = "诗", "商品"  # of a poem, of a review, that do not say it
_POLARITIES = {
    **dict.fromkeys(("好评", "正面", "positive", "pos", "1"), "好评"),
    **dict.fromkeys(("差评", "负面", "negative", "neg", "0"), "差评"),
}
_TRUE_FALSE = {"true": True, "1": True, "false": False, "0": False}
MOST_WORDS = 500  # characters of a caption, or of any other short field
MOST_TAGS = 50
MARK_BYTES = 16
LEAST_SIDE = 8  # px, of a picture as it is kept
_WHOLE = re.compile(r"(-?\d+)\.0")
_SEPARATORS = re.compile(r"[,，、;；|\s]+")
_DAMAGED = re.compile("[\ufffd\ue000-\uf8ff\U000f0000-\U0010ffff]")  # what a wrong encoding leaves


@dataclass(frozen=True)
class Settings:
    """What a person said of the sources. `columns`: of fields; `split_by`: a column; `held_out`: a share."""

    columns: Mapping[str, str] = field(default_factory=dict)
    split_by: str | None = None
    held_out: float = 0.2


class Taken(NamedTuple):
    """A row of the corpus, its split and family yet to come: by its `key`, and by its `mark`, equal for one picture."""

    row: Picture | Text
    key: str
    mark: bytes
    words: str  # with the mark: what makes a copy


class Left(NamedTuple):
    """A row that is left out."""

    item: str
    fault: Fault


class Reader:
    """Reads the rows of one source."""

    def __init__(self, source: Source, columns: Sequence[str], settings: Settings):
        """`columns`: of the source. Raises UserError if it has none for pictures or texts."""
        self.name, self.split_by, self.named = source.name, settings.split_by, settings.columns
        self.columns = {
            name: (own,) if (own := settings.columns.get(name)) in columns and own else usual
            for name, usual in FIELDS.items()
        }
        has = {name for name, names in self.columns.items() if not set(names).isdisjoint(columns)}
        for needed, what, way in (("image", "pictures or texts", "--image or --text"), ("zh", "captions", "--zh")):
            if not has & {needed, "text"}:
                names = ", ".join(map(plain, columns)) or "none"
                usual = " or ".join(FIELDS[needed])
                why = f"no column of {what} (it has {names}); name it by {way}, if it is not {usual}"
                raise UserError(f"{source.path}: {why}")

    def __call__(self, found: Found) -> Taken | Left:
        try:
            if found.fault:
                raise found.fault
            if self._value("image", found) is not None:
                return self._picture(found)
            if self._value("text", found) is not None:
                return self._text(found)
            raise Fault("neither a picture nor a text")
        except Fault as fault:
            return Left(plain(found.item), Fault(fault.reason, plain(fault.detail)))

    def _picture(self, found: Found) -> Taken:
        zh = self._words("zh", found)
        if not zh:
            raise Fault("no caption")
        _check_says_something(zh)
        png = self._png(found)
        tags = self._tags(found)
        mirrorable = self._truth("mirrorable", found)
        picture = Picture(
            id=plain(found.item),
            source=self._words("source", found) or self.name,
            licence=self._words("licence", found) or LICENCE,
            family="",
            split="train",
            style=self._words("style", found) or STYLE,
            zh=zh,
            tags=tags,
            en=self._words("en", found),
            group=self._words("group", found),
            subgroup=self._words("subgroup", found),
            mirrorable=not any(side in zh for side in "左右") if mirrorable is None else mirrorable,
            image=png,
        )
        return Taken(picture, self._key(found) if self.split_by else zh, mark_of(png), f"{zh}\n{picture.en}\n{tags}")

    def _text(self, found: Found) -> Taken:
        text = clean_lines(self._string("text", found).split("\n"))
        if len(text) > MAX_CHARACTERS:
            raise Fault("a text too long", f"{len(text):,} characters, more than {MAX_CHARACTERS:,}")
        _check_says_something(text)
        title, author, polarity = (self._words(name, found) for name in ("title", "author", "polarity"))
        about: dict[str, str] = {"kind": "plain"}
        if polarity:
            if polarity.lower() not in _POLARITIES:
                raise Fault("polarity: must be 好评 or 差评", shown(polarity))
            topic = self._words("topic", found) or TOPIC
            about = {"kind": "review", "polarity": _POLARITIES[polarity.lower()], "topic": topic}
        elif title:
            form = self._words("form", found) or FORM
            about = {"kind": "poem", "form": form, "title": title, "author": author}
        row = Text(
            id=plain(found.item),
            source=self._words("source", found) or self.name,
            licence=self._words("licence", found) or LICENCE,
            split="train",
            text=text,
            **about,
        )
        key = self._key(found) if self.split_by in found.columns else title + author or text
        return Taken(row, key, mark_of_text(text), "")

    def _value(self, name: str, found: Found) -> Any:
        """None where there is none. A column that a person named is the one wherever a row has it."""
        named = self.named.get(name)
        for column in [named] if named and named in found.columns else self.columns[name]:
            value = found.columns.get(column)
            if value is not None and not (isinstance(value, str) and not value.strip()):
                return value
        return None

    def _string(self, name: str, found: Found) -> str:
        value = self._value(name, found)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise Fault(f"{name}: must be text", shown(value))
        return _checked(name, value)

    def _words(self, name: str, found: Found) -> str:
        """One line."""
        return _short(name, clean(self._string(name, found)))

    def _tags(self, found: Found) -> list[str]:
        value = self._value("tags", found)
        tags = _SEPARATORS.split(value) if isinstance(value, str) else [] if value is None else value
        if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
            raise Fault("tags: must be text or a list of texts", shown(value))
        if len(tags) > MOST_TAGS:
            raise Fault("tags: too many", f"{len(tags)}, more than {MOST_TAGS}")
        cleaned = (_short("tags", clean(_checked("tags", tag))) for tag in tags)
        return list(dict.fromkeys(tag for tag in cleaned if tag))

    def _truth(self, name: str, found: Found) -> bool | None:
        value = self._value(name, found)
        if value is None or isinstance(value, bool):
            return value
        if str(value).lower() not in _TRUE_FALSE:
            raise Fault(f"{name}: must be true or false", shown(value))
        return _TRUE_FALSE[str(value).lower()]

    def _key(self, found: Found) -> str:
        """What the row's split goes by. 1.0 is 1: pandas makes it of 1 where a cell of the column is empty."""
        assert self.split_by
        value = found.columns.get(self.split_by)
        if isinstance(value, dict | list | bytes):
            raise Fault(f"{self.split_by}: must be one value to split by", shown(value))
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        key = "" if value is None or (isinstance(value, float) and math.isnan(value)) else clean(str(value))
        if not key:
            raise Fault(f"no {self.split_by} to split by")
        whole = _WHOLE.fullmatch(key)
        return _checked(self.split_by, whole[1] if whole else key)

    def _png(self, found: Found) -> bytes:
        data = self._bytes(found)
        try:
            png = normalised_png(data, still=True)
        except ValueError as error:
            raise Fault("no picture that can be taken", str(error)) from None
        with Image.open(io.BytesIO(png)) as image:
            if min(image.size) < LEAST_SIDE:
                raise Fault("a picture too small or too narrow", f"kept as {image.width} x {image.height} px")
        return png

    def _bytes(self, found: Found) -> bytes:
        """Of the picture's file."""
        value = self._value("image", found)
        if isinstance(value, Mapping):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, str):
            if found.root is None:
                raise Fault("a path, where pictures are inside the file", value)
            return read_inside(found.root, value, MOST_BYTES)
        if not isinstance(value, bytes):
            raise Fault("image: must be a path or a file's bytes", shown(value))
        if len(value) > MOST_BYTES:
            raise Fault("a file too large", f"{len(value):,} bytes, more than {MOST_BYTES:,}")
        return value


def mark_of(data: bytes) -> bytes:
    """Equal for equal content."""
    return hashlib.blake2b(data, digest_size=MARK_BYTES).digest()


def mark_of_text(text: str) -> bytes:
    """Equal for texts of the same letters."""
    return mark_of("".join(character for character in text.lower() if character.isalnum()).encode())


def check_columns(settings: Settings, known: Sequence[Sequence[str]]) -> None:
    """Raises UserError for a named column that no source has. `known`: the columns of each."""
    everything = list(dict.fromkeys(name for columns in known for name in columns))
    named = {f"--{name}": column for name, column in settings.columns.items()}
    named |= {"--split-by": settings.split_by} if settings.split_by else {}
    for option, column in named.items():
        if column not in everything:
            raise UserError(
                f"{option} {column}: no source has such a column{nearest(column, [plain(name) for name in everything])}"
            )


def _checked(name: str, text: str) -> str:
    """Raises Fault for what a wrong encoding leaves."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise Fault(f"{name}: not UTF-8", text[:40])
    if _DAMAGED.search(text):
        raise Fault(f"{name}: characters that are damaged", text[:40])
    return text


def _short(name: str, text: str) -> str:
    if len(text) > MOST_WORDS:
        raise Fault(f"{name}: too long", f"{len(text):,} characters, more than {MOST_WORDS}")
    return text


def _check_says_something(text: str) -> None:
    if not any(character.isalnum() for character in text):
        raise Fault("words without a letter", text[:40])
