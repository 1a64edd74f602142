import io
import json
import struct
import zlib

import pytest
from PIL import Image

from tests.training.data.packages import emoji_packages, image_bytes, tgz
from training.data.images import on_white, read_image, read_original
from training.data.pictures import Labels, normalised_png, read_emoji, read_stamps
from training.data.rows import Log


def test_emoji_are_joined_with_their_words(tmp_path):
    files = emoji_packages(tmp_path)
    log = Log()
    pictures = {p.id: p for p in read_emoji(files["A"], Labels(files["labels"]), "A", log)}
    assert pictures.keys() == {"A/1f402", "A/1f3f4-200d-2620", "A/27a1", "A/1f468-200d-1f33e"}
    ox = pictures["A/1f402"]
    assert (ox.zh, ox.tags, ox.en, ox.group, ox.subgroup) == (
        "公牛",
        ["动物", "金牛座"],
        "ox",
        "动物",
        "哺乳类动物",
    )
    assert (ox.split, ox.style, ox.family, ox.mirrorable, ox.licence) == (
        "train",
        "fluent-3d",
        "1f402",
        True,
        "MIT",
    )
    assert pictures["A/1f468-200d-1f33e"].family == "P-1f33e"
    assert not pictures["A/27a1"].mirrorable
    assert not pictures["A/1f3f4-200d-2620"].mirrorable
    assert log.dropped == {"A: no Chinese label of its own (skin tones, duplicates)": 1}


def test_what_is_clear_is_white_and_nothing_else_changes():
    for mode, clear in (("RGBA", (9, 9, 9, 0)), ("LA", (9, 0))):
        assert on_white(Image.new(mode, (3, 2), clear)).getpixel((0, 0)) == (255, 255, 255)
    keyed = Image.new("RGB", (3, 2), (9, 9, 9))
    keyed.info["transparency"] = (9, 9, 9)
    assert on_white(keyed).getpixel((0, 0)) == (255, 255, 255)
    for mode in ("RGB", "L", "CMYK", "P", "1"):
        image = Image.radial_gradient("L").convert(mode)
        assert on_white(image).tobytes() == image.convert("RGB").tobytes()


def test_a_telephones_picture_is_no_animation():
    """Behind its first picture an MPO has other views of the same."""
    out = io.BytesIO()
    Image.new("RGB", (40, 30)).save(out, "MPO", save_all=True, append_images=[Image.new("RGB", (40, 30), "red")])
    assert read_original(out.getvalue()).size == (40, 30) and read_image(out.getvalue(), still=True).size == (40, 30)
    out = io.BytesIO()
    Image.new("RGB", (40, 30)).save(out, "PNG", save_all=True, append_images=[Image.new("RGB", (40, 30), "red")])
    for read in (read_original, lambda data: read_image(data, still=True)):
        with pytest.raises(ValueError, match="an animation of 2 pictures"):
            read(out.getvalue())


def test_flags_are_never_in_the_test_split(tmp_path):
    # Of all flags some hash to the test bucket; these take no part.
    letters = [f"{code:x}" for code in range(0x1F1E6, 0x1F200)]
    keys = [f"{first}-{second}" for first in letters[:4] for second in letters]
    entries = [{"hexcode": key.upper(), "label": f"旗: {key}", "group": 9, "subgroup": 98} for key in keys]
    files = emoji_packages(tmp_path, entries)
    splits = {p.split for p in read_emoji(files["A"], Labels(files["labels"]), "A", Log())}
    assert "unused" in splits and "train" in splits and "test" not in splits


def test_damaged_pictures_are_skipped_and_named(tmp_path):
    files = emoji_packages(tmp_path)
    whole = image_bytes("PNG")
    folder = "package/img/google/64/"
    data = {"1f402": whole[: len(whole) // 2], "27a1": b"<html>", "1f468-200d-1f33e": whole}
    archive = tgz(tmp_path / "c.tgz", {f"{folder}{key}.png": value for key, value in data.items()})
    log = Log()
    assert [p.id for p in read_emoji(archive, Labels(files["labels"]), "C", log)] == ["C/1f468-200d-1f33e"]
    assert [entry["item"] for entry in log.skipped] == ["1f402", "27a1"]
    assert log.skipped_by_source() == {"C": 2}


def test_stamps(tmp_path):
    root, png = "./usr/share/tuxpaint/stamps/", image_bytes("PNG")
    files = {
        "animals/birds/owl.png": png,
        "animals/birds/owl.txt": "An owl.\nde.utf8=Eule\nzh_CN.utf8=猫头鹰。\n".encode(),
        "animals/birds/owl_mirror.png": png,
        "animals/emu.png": png,
        "animals/emu.txt": b"An emu.\nde.utf8=Emu\n",
        "clothes/hat.svg": b"<svg/>",
        "clothes/hat.txt": "A hat.\nzh_CN.utf8=帽子。\n".encode(),
        "symbols/alphabets/a.png": png,
        "symbols/alphabets/a.txt": "A.\nzh_CN.utf8=字母Ａ。\n".encode(),
        "food/bad.png": png,
        "food/bad.txt": b"\xff\xfe",
    }
    archive = tgz(tmp_path / "b.tgz", {root + name: data for name, data in files.items()})
    log = Log()
    (owl,) = read_stamps(archive, log)
    assert (owl.id, owl.zh, owl.en, owl.group) == ("B/animals/birds/owl", "猫头鹰。", "An owl.", "动物")
    assert (owl.subgroup, owl.family, owl.style) == ("animals/birds", "animals/birds/owl", "stamp")
    assert log.dropped == {
        "B: no Chinese sentence": 3,
        "B: vector drawing, not rendered": 1,
        "B: letters of an alphabet": 1,
    }
    assert log.skipped == [{"source": "B", "item": "food/bad.txt", "reason": "not UTF-8"}]


def test_pictures_are_small_rgb_on_white():
    out = Image.open(io.BytesIO(normalised_png(image_bytes("WEBP", (600, 300), (0, 0, 0, 0)))))
    assert (out.format, out.mode, out.size) == ("PNG", "RGB", (256, 128))
    assert out.getpixel((5, 5)) == (255, 255, 255)
    small = image_bytes("PNG", (30, 20), (9, 8, 7, 255))
    assert Image.open(io.BytesIO(normalised_png(small))).size == (30, 20)
    assert normalised_png(small) == normalised_png(small)


@pytest.mark.parametrize("side", [8_000, 60_000])
def test_huge_pictures_are_refused_unread(side):
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(ValueError, match=r"more than 50000000|too large"):
        normalised_png(bomb + b"\0\0\0\0IDAT\x35\xaf\x06\x1e\0\0\0\0IEND\xaeB\x60\x82")


def test_traditional_group_names_are_simplified(tmp_path):
    files = emoji_packages(tmp_path)
    labels = Labels(files["labels"])
    assert json.dumps(labels.words("1f402"), ensure_ascii=False).count("類") == 0
