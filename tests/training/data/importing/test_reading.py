"""What becomes of a stranger's row: a picture, a text, or the reason why neither."""

import io
import json
import os

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.training.data.importing.strangers import GREEN, RED, claims, encoded, lines, moving, outcomes, told
from training.data.build import schema_of
from training.data.importing import sources
from training.data.importing.forms import open_sources
from training.data.importing.reading import FIELDS, Left, Reader, Settings, Taken, check_columns
from training.data.importing.sources import Found
from training.data.rows import Picture, Text
from training.errors import UserError


def reason(path, image=RED, chosen: Settings | None = None, **columns) -> str:
    """Why a row of this picture is left out; "" if it is not."""
    found = outcomes(lines(path / "rows.jsonl", [{"image": image, "zh": "红圆"} | columns]), chosen)[0]
    return found.fault.reason if isinstance(found, Left) else ""


# ---- pictures


@pytest.mark.parametrize(
    ("image", "fault"),
    [
        (RED[: len(RED) // 2], "no picture that can be taken"),
        (RED[:20], "no picture that can be taken"),
        (b"<html>", "no picture that can be taken"),
        (b"GIF89a" + bytes(30), "no picture that can be taken"),
        (claims(60_000, 60_000), "no picture that can be taken"),
        (claims(0, 0), "no picture that can be taken"),
        (moving("WEBP"), "no picture that can be taken"),
        (moving("PNG"), "no picture that can be taken"),
        (encoded(size=(1, 1)), "a picture too small or too narrow"),
        (encoded(size=(2000, 20)), "a picture too small or too narrow"),
        (b"", "no picture that can be taken"),
        (encoded("JPEG", "CMYK"), ""),
        (encoded("PNG", "I;16"), ""),
        (encoded("WEBP"), ""),
        (encoded("MPO", save_all=True, append_images=[Image.new("RGB", (40, 30))]), ""),
    ],
)
def test_pictures(tmp_path, image, fault):
    assert reason(tmp_path, image) == fault


def test_pictures_are_kept_on_white_upright_and_small(tmp_path):
    clear = Image.new("RGBA", (1000, 500), (255, 0, 0, 0))
    turned = Image.new("RGB", (40, 20), "blue")
    for number, (picture, options) in enumerate([(clear, {}), (turned, {"exif": orientation(6)})]):
        out = io.BytesIO()
        picture.save(out, "PNG", **options)
        (taken,) = outcomes(lines(tmp_path / str(number) / "rows.jsonl", [{"image": out.getvalue(), "zh": "图"}]))
        kept = Image.open(io.BytesIO(taken.row.image))
        assert kept.mode == "RGB" and kept.size == [(256, 128), (20, 40)][number]
        assert number or kept.getpixel((0, 0)) == (255, 255, 255)


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def test_paths_stay_in_the_folder(tmp_path):
    shop = tmp_path / "shop"
    (shop / "in").mkdir(parents=True)
    (tmp_path / "out.png").write_bytes(RED)
    (shop / "in" / "a.png").write_bytes(RED)
    (shop / "inner.png").symlink_to(shop / "in" / "a.png")
    (shop / "outer.png").symlink_to(tmp_path / "out.png")
    (shop / "loop.png").symlink_to(shop / "loop.png")
    (shop / "outside").symlink_to(tmp_path)
    os.mkfifo(shop / "pipe.png")
    out, none, broken = "a path out of the source's folder", "no such file", "a file that cannot be read"
    names = {
        "in/a.png": "", "./in/../in/a.png": "", "inner.png": "", str(shop / "in" / "a.png"): "",
        "../out.png": out, str(tmp_path / "out.png"): out, "outer.png": out, "outside/out.png": out,
        "../../../../../../etc/hostname": out, "/nowhere/a.png": out, "/dev/zero": out,
        "in": "not a file", ".": "not a file", "pipe.png": "not a file",
        "no.png": none, "in\\a.png": none,
        "http://127.0.0.1/a.png": "a web address, not a file", "file:///etc/hostname": "a web address, not a file",
        "a\0.png": broken, "\ud800.png": broken, "x" * 300: broken, "loop.png": broken,
        "  ": "neither a picture nor a text",
    }  # fmt: skip
    rows = [{"image": name, "zh": f"图{number}"} for number, name in enumerate(names)]
    found = outcomes(lines(shop / "rows.jsonl", rows))
    assert [one.fault.reason if isinstance(one, Left) else "" for one in found] == list(names.values())


# ---- words


@pytest.mark.parametrize(
    ("zh", "fault"),
    [
        ("", "no caption"),
        (None, "no caption"),
        ("\u200b\u202e", "no caption"),
        ("。。！", "words without a letter"),
        ("红" * 501, "zh: too long"),
        ("红\ufffd圆", "zh: characters that are damaged"),
        ("红\ue001", "zh: characters that are damaged"),
        ("红\ud800", "zh: not UTF-8"),
        (7, "zh: must be text"),
        (["红"], "zh: must be text"),
        ("1", ""),
    ],
)
def test_captions(tmp_path, zh, fault):
    assert reason(tmp_path, zh=zh) == fault


def test_words_are_cleaned(tmp_path):
    row = {"image": RED, "zh": " 红\u202e\x07\u200b圆\r\nＡ\t１ ", "en": "a\x1b[31mred  ring", "group": "\ufeff图形"}
    (taken,) = outcomes(lines(tmp_path / "rows.jsonl", [row]))
    assert (taken.row.zh, taken.row.en, taken.row.group) == ("红圆 A 1", "a[31mred ring", "图形")


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        (None, []),
        ("红、圆，图形", ["红", "圆", "图形"]),
        ("红 圆\t红", ["红", "圆"]),
        (["红 色", "", "圆", "红 色"], ["红 色", "圆"]),
        ([1], "tags: must be text or a list of texts"),
        ({"a": 1}, "tags: must be text or a list of texts"),
        (["x"] * 51, "tags: too many"),
        (["红\ud800"], "tags: not UTF-8"),
    ],
)
def test_tags(tmp_path, tags, found):
    (one,) = outcomes(lines(tmp_path / "rows.jsonl", [{"image": RED, "zh": "红", "tags": tags}]))
    assert (one.fault.reason if isinstance(one, Left) else one.row.tags) == found


def test_what_a_row_does_not_say(tmp_path):
    rows = [
        {"image": RED, "zh": "红圆"},
        {"image": RED, "zh": "左箭头"},
        {"image": RED, "zh": "左手", "mirrorable": True},
    ]
    plain, arrow, hand = (one.row for one in outcomes(lines(tmp_path / "rows.jsonl", rows)))
    assert (plain.source, plain.licence, plain.style) == ("rows.jsonl", "not stated", "imported")
    assert (plain.tags, plain.en, plain.group, plain.subgroup) == ([], "", "", "")
    assert (plain.mirrorable, arrow.mirrorable, hand.mirrorable) == (True, False, True)
    assert reason(tmp_path, mirrorable="perhaps") == "mirrorable: must be true or false"


# ---- columns


def test_columns_of_other_names(tmp_path):
    rows = [{"photo": RED, "标题": "红圆", "zh": "不是", "price": 3, "id": 7}]
    path = lines(tmp_path / "rows.jsonl", [{**rows[0], "photo": "0.png"}])
    (tmp_path / "0.png").write_bytes(RED)
    (taken,) = outcomes(path, Settings({"image": "photo", "zh": "标题"}, split_by="id"))
    assert (taken.row.zh, taken.key) == ("红圆", "7")


def test_a_named_column_that_is_not_there_is_left_empty_only_where_others_have_it(tmp_path):
    """The caption of a folder is its own, whatever the columns of a table are called."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "a.png").write_bytes(RED)
    (tmp_path / "shop" / "a.txt").write_text("红圆")
    assert told(tmp_path / "shop", Settings({"zh": "标题"})) == ["红圆"]


def test_a_named_column_counts_wherever_a_row_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LOOKED_AT", 2)
    rows = [{"zh": "旧一"}, {"zh": "旧二"}, {"zh": "旧三", "标题": "新三"}, {"zh": "旧四", "标题": ""}]
    late = lines(tmp_path / "late.jsonl", [{"image": RED} | row for row in rows])
    assert told(late, Settings({"zh": "标题"})) == ["旧一", "旧二", "新三", "late.jsonl:4: no caption"]
    early = lines(tmp_path / "early.jsonl", [{"image": RED} | row for row in reversed(rows)])
    none = [f"early.jsonl:{number}: no caption" for number in (1, 3, 4)]
    assert told(early, Settings({"zh": "标题"})) == [none[0], "新三", *none[1:]]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (Settings({"zh": "captoin"}), "--zh captoin: no source has such a column; did you mean caption?"),
        (Settings({"image": "x" * 9}), "--image xxxxxxxxx: no source has such a column; known: caption, photo, sku"),
        (Settings(split_by="SKU"), "--split-by SKU: no source has such a column; known: caption, photo, sku"),
    ],
)
def test_columns_that_no_source_has(chosen, message):
    with pytest.raises(UserError) as error:
        check_columns(chosen, [["caption"], ["photo", "caption"], ["sku"]])
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("a ", "a"),
        (7, "7"),
        (2.5, "2.5"),
        (2.0, "2"),
        ("2.0", "2"),
        ("-2.0", "-2"),
        ("1.2.0", "1.2.0"),
        (1e16, "10000000000000000"),
        (float("inf"), "inf"),
        (True, "True"),
        (None, "no id to split by"),
        (" ", "no id to split by"),
        (float("nan"), "no id to split by"),
        ([1], "id: must be one value to split by"),
        ("\ud800", "id: not UTF-8"),
    ],
)
def test_what_splits_go_by(tmp_path, value, key):
    (one,) = outcomes(
        lines(tmp_path / "rows.jsonl", [{"image": RED, "zh": "红", "id": value}]), Settings(split_by="id")
    )
    assert (one.fault.reason if isinstance(one, Left) else one.key) == key


# ---- texts


def test_texts(tmp_path):
    rows = [
        {"text": "春眠不觉晓，\r\n\n处处闻啼鸟。", "title": "春晓", "author": "孟浩然"},
        {"text": "很好用", "polarity": "Positive"},
        {"text": "不好用", "polarity": "差评", "topic": "电脑", "title": "不看"},
        {"text": "一段话", "image": None},
        {"text": "别的", "polarity": "5 stars"},
        {"text": "……"},
        {"text": "长" * 4001},
        {"text": 5},
        {"image": GREEN, "text": "绿方块"},
    ]
    poem, good, bad, plain, *left, picture = outcomes(lines(tmp_path / "rows.jsonl", rows))
    assert poem.row == Text(
        "rows.jsonl:1", "rows.jsonl", "not stated", "train", "poem", "春眠不觉晓，\n处处闻啼鸟。",
        form="诗", title="春晓", author="孟浩然",
    )  # fmt: skip
    assert poem.key == "春晓孟浩然" and plain.key == "一段话"
    assert [(t.row.kind, t.row.polarity, t.row.topic, t.row.title) for t in (good, bad, plain)] == [
        ("review", "好评", "商品", ""),
        ("review", "差评", "电脑", ""),
        ("plain", "", "", ""),
    ]
    assert [one.fault.reason for one in left] == [
        "polarity: must be 好评 or 差评",
        "words without a letter",
        "a text too long",
        "text: must be text",
    ]
    assert isinstance(picture.row, Picture) and picture.row.zh == "绿方块"


# ---- anything

SIMPLE = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
LIKELY = st.sampled_from(["a.png", "红圆", "好评"])
VALUES = st.recursive(
    SIMPLE | LIKELY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["bytes", "path"]), inner, max_size=2),
    max_leaves=4,
)
NAMES = sorted({name for names in FIELDS.values() for name in names} | {"id"})


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=8), st.text(max_size=9), st.sampled_from([None, "id"]))
def test_any_row_is_taken_or_left_and_can_be_written(tmp_path, columns, item, split_by):
    (tmp_path / "a.png").write_bytes(RED)
    (source,) = open_sources([lines(tmp_path / "rows.jsonl", [{}])])
    reader = Reader(source, [*columns, "image", "zh", "text"], Settings(split_by=split_by))
    outcome = reader(Found(item, columns, tmp_path))
    if isinstance(outcome, Taken):
        kind = type(outcome.row)
        pa.RecordBatch.from_pylist([vars(outcome.row)], schema_of(kind)).validate(full=True)
        assert outcome.key and len(outcome.mark) == 16
    else:
        assert outcome.fault.reason.isprintable()
        json.dumps([outcome.item, outcome.fault.detail], ensure_ascii=False).encode()
