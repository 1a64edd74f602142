"""Read the picture packages: 3-D objects (A), stamps (B), Noto drawings (C), each with its Chinese words."""

import io
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from opencc import OpenCC
from PIL import Image

from training.data.archives import read_tar
from training.data.images import read_image
from training.data.rows import Log, Picture, clean
from training.data.sources import BY_ID
from training.data.splits import emoji_family, emoji_key, split_of

LONG_SIDE = 256
_FLAGS, _SYMBOLS = "flags", "symbols"
# Its picture in A is the same as that of 1f431, under another name.
_DUPLICATE_IN_A = "1f63a"
_STAMPS = "usr/share/tuxpaint/stamps/"
_LETTERS = "symbols/alphabets/"
# Letters, digits and signs read differently in a mirror; a clock shows another time.
_UNMIRRORABLE_STAMPS = ("symbols/", "town/roadsigns/", "seasonal/hanukkah/")
_STAMP_GROUPS = {
    "animals": "动物",
    "clothes": "服装",
    "food": "食物",
    "hobbies": "爱好",
    "household": "家居用品",
    "medical": "医疗",
    "military": "军事",
    "naturalforces": "自然力量",
    "people": "人物",
    "plants": "植物",
    "seasonal": "节日",
    "space": "太空",
    "sports": "运动",
    "symbols": "符号",
    "town": "城镇",
    "vehicles": "交通工具",
}


class Labels:
    """Chinese and English words of emoji, by join key, from the emojibase-data package."""

    def __init__(self, archive: Path):
        names = {f"package/{name}.json" for name in ("zh/data", "en/data", "zh/messages", "meta/groups")}
        files = {name: json.loads(data) for name, data in read_tar(archive, names.__contains__)}
        assert files.keys() == names, f"{archive}: pinned package lacks {names - files.keys()}"
        messages, keys = files["package/zh/messages.json"], files["package/meta/groups.json"]
        # A few group names and labels of the package are in traditional characters.
        self._simplify = OpenCC("t2s").convert
        self._names = {entry["key"]: entry["message"] for entry in messages["groups"] + messages["subgroups"]}
        self._keys = keys
        self._zh = {emoji_key(entry["hexcode"]): entry for entry in files["package/zh/data.json"]}
        self._en = {emoji_key(entry["hexcode"]): entry["label"] for entry in files["package/en/data.json"]}

    def __contains__(self, key: str) -> bool:
        return "group" in self._zh.get(key, {})

    def group_key(self, key: str) -> str:
        return self._keys["groups"][str(self._zh[key]["group"])]

    def subgroup_key(self, key: str) -> str:
        return self._keys["subgroups"][str(self._zh[key]["subgroup"])]

    def words(self, key: str) -> dict[str, Any]:
        """The fields zh, tags, en, group and subgroup of a Picture."""
        entry = self._zh[key]
        return {
            "zh": self._simplified(entry["label"]),
            "tags": [self._simplified(tag) for tag in entry.get("tags", [])],
            "en": self._en[key],
            "group": self._simplified(self._names[self.group_key(key)]),
            "subgroup": self._simplified(self._names.get(self.subgroup_key(key), self.subgroup_key(key))),
        }

    def _simplified(self, text: str) -> str:
        return clean(self._simplify(text))


def read_emoji(archive: Path, labels: Labels, source_id: str, log: Log) -> Iterator[Picture]:
    """Pictures of source A or C that have Chinese words, in archive order; each join key once."""
    folder, ending, style = {
        "A": ("package/assets/", ".webp", "fluent-3d"),
        "C": ("package/img/google/64/", ".png", "noto"),
    }[source_id]
    seen = {_DUPLICATE_IN_A} if source_id == "A" else set()
    for name, data in read_tar(archive, lambda name: name.startswith(folder) and name.endswith(ending)):
        key = emoji_key(PurePosixPath(name).stem)
        if key not in labels or key in seen:
            log.drop(source_id, "no Chinese label of its own (skin tones, duplicates)")
            continue
        seen.add(key)
        picture = _emoji(key, data, labels, source_id, style, log)
        if picture is not None:
            yield picture


def _emoji(key: str, data: bytes, labels: Labels, source_id: str, style: str, log: Log) -> Picture | None:
    group, words, family = labels.group_key(key), labels.words(key), emoji_family(key)
    split = split_of(family)
    directed = group in (_FLAGS, _SYMBOLS) or labels.subgroup_key(key) == "time"
    try:
        image = normalised_png(data)
    except ValueError as error:
        log.skip(source_id, key, str(error))
        return None
    return Picture(
        id=f"{source_id}/{key}",
        source=source_id,
        licence=BY_ID[source_id].licence,
        family=family,
        # Flags are named by their country, which nothing in the picture says: they train, and test nothing.
        split="unused" if group == _FLAGS and split == "test" else split,
        style=style,
        mirrorable=not directed and not any(side in words["zh"] for side in "左右"),
        image=image,
        **words,
    )


def read_stamps(archive: Path, log: Log) -> Iterator[Picture]:
    """Stamps of source B with a Chinese sentence, sorted by path, without letters and vector drawings."""
    files = dict(read_tar(archive, lambda name: name.startswith(_STAMPS) and name.endswith((".png", ".svg", ".txt"))))
    for name in sorted(files):
        stem, ending = name.removeprefix(_STAMPS).rsplit(".", 1)
        if ending == "txt" or (ending == "svg" and f"{_STAMPS}{stem}.png" in files):
            continue
        english, chinese = _stamp_sentences(files.get(f"{_STAMPS}{stem}.txt", b""), stem, log)
        if not chinese:
            log.drop("B", "no Chinese sentence")
        elif stem.startswith(_LETTERS):
            log.drop("B", "letters of an alphabet")
        elif ending == "svg":
            log.drop("B", "vector drawing, not rendered")
        else:
            yield from _stamp(stem, files[name], english, chinese, log)


def _stamp(stem: str, data: bytes, english: str, chinese: str, log: Log) -> Iterator[Picture]:
    category, _, rest = stem.partition("/")
    try:
        image = normalised_png(data)
    except ValueError as error:
        log.skip("B", stem, str(error))
        return
    yield Picture(
        id=f"B/{stem}",
        source="B",
        licence=BY_ID["B"].licence,
        family=stem,
        split=split_of(stem),
        style="stamp",
        zh=chinese,
        tags=[],
        en=english,
        group=_STAMP_GROUPS.get(category, ""),
        subgroup=f"{category}/{rest.split('/')[0]}" if "/" in rest else category,
        mirrorable=not stem.startswith(_UNMIRRORABLE_STAMPS),
        image=image,
    )


def _stamp_sentences(data: bytes, stem: str, log: Log) -> tuple[str, str]:
    """The English first line and the `zh_CN.utf8=` line of a stamp's text file."""
    try:
        lines = data.decode().splitlines()
    except UnicodeDecodeError:
        log.skip("B", f"{stem}.txt", "not UTF-8")
        return "", ""
    chinese = next((line.partition("=")[2] for line in lines if line.startswith("zh_CN.utf8=")), "")
    return clean(lines[0]) if lines else "", clean(chinese)


def normalised_png(data: bytes, still: bool = False) -> bytes:
    """PNG, RGB on white, at most LONG_SIDE pixels a side. Raises ValueError as `read_image` does."""
    image = read_image(data, still)
    if max(image.size) > LONG_SIDE:
        image.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    # The default level takes twice the time to save a seventh of the space.
    image.save(out, format="PNG", compress_level=2)
    return out.getvalue()
