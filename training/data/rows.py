"""The two kinds of item in the corpus, and the log of what was left out of it."""

import io
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from PIL import Image

from training.data.splits import Split

# Wide Latin letters and digits; all stand at one distance from the narrow ones.
_WIDE = re.compile("[０-９Ａ-Ｚａ-ｚ]")
_TO_NARROW = ord("A") - ord("Ａ")
# Control and format characters: they print nothing and would each cost a byte piece.
_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\xad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]")


@dataclass(frozen=True)
class Picture:
    """One picture with its words. `image` is PNG, RGB on white, at most 256 pixels on its long side.

    `zh` is a name or a sentence; `en`, `group` and `subgroup` may be empty. `mirrorable` is False for a
    picture that means something else in a mirror.
    """

    id: str
    source: str
    licence: str
    family: str
    split: Split
    style: str
    zh: str
    tags: list[str]
    en: str
    group: str
    subgroup: str
    mirrorable: bool
    image: bytes

    def pil(self) -> Image.Image:
        """The decoded RGB image."""
        return Image.open(io.BytesIO(self.image)).convert("RGB")


@dataclass(frozen=True)
class Text:
    """One text; `kind` is poem (with form, title, author), review (with polarity, topic) or plain, others empty."""

    id: str
    source: str
    licence: str
    split: Split
    kind: str
    text: str
    form: str = ""
    title: str = ""
    author: str = ""
    polarity: str = ""
    topic: str = ""


@dataclass
class Log:
    """What was left out: `skipped` names each defective item, `dropped` counts what is left out by rule."""

    skipped: list[dict[str, str]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)

    def skip(self, source: str, item: str, reason: str) -> None:
        self.skipped.append({"source": source, "item": item, "reason": reason})

    def drop(self, source: str, reason: str) -> None:
        self.dropped[f"{source}: {reason}"] += 1

    def skipped_by_source(self) -> dict[str, int]:
        return dict(sorted(Counter(entry["source"] for entry in self.skipped).items()))


def clean(text: str) -> str:
    """One line without invisible characters: single spaces, wide Latin letters and digits made narrow."""
    line = _INVISIBLE.sub("", " ".join(text.split())).strip()
    return _WIDE.sub(lambda match: chr(ord(match[0]) + _TO_NARROW), line)


def clean_lines(lines: Iterable[str]) -> str:
    """Clean lines joined by newline, empty ones left out."""
    return "\n".join(cleaned for line in lines if (cleaned := clean(line)))
