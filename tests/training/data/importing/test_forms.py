"""Each form of a stranger's files, whole, hostile and damaged."""

import gzip
import io
import json
import os
import random
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.stranger import FORMS
from tests.training.data.importing.strangers import GREEN, RED, lines, outcomes, tar, told
from training.data.importing import columnar, shards, sources
from training.data.importing.forms import open_sources
from training.data.importing.reading import Settings, Taken
from training.errors import UserError

FILES = {"lines": "rows.jsonl", "csv": "rows.csv", "tar": "shard-00000.tar", "parquet": "rows.parquet"}


def source_in(folder: Path, form: str) -> Path:
    return folder / FILES.get(form, "")


@pytest.mark.parametrize("form", FORMS)
def test_a_stranger_says_the_same_in_each_form(sample_corpus, tmp_path, form):
    pictures = [sample_corpus.picture(row) for row in (0, 7, 70)]
    FORMS[form](pictures, tmp_path)
    settings = Settings(split_by=None if form == "captions" else "family")
    for picture, taken in zip(pictures, outcomes(source_in(tmp_path, form), settings), strict=True):
        assert isinstance(taken, Taken) and (taken.row.image, taken.row.zh) == (picture.image, picture.zh)
        if form != "captions":
            known = ("en", "tags", "group", "subgroup", "style", "source", "licence", "mirrorable")
            assert {name: getattr(taken.row, name) for name in known} == {n: getattr(picture, n) for n in known}
            assert taken.key == picture.family


# ---- JSON lines


def test_lines_that_are_no_rows_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("training.data.importing.lines.MOST_TEXT_BYTES", 200)
    path = tmp_path / "rows.jsonl"
    row = '{"image": "a.png", "zh": "红圆"}'
    (tmp_path / "a.png").write_bytes(RED)
    content = [
        b"\xef\xbb\xbf" + row.encode(), b"", b'{"zh": ', b"[1, 2]", '{"zh": "红"}'.encode("gb18030"), b"7",
        b'{"zh": "' + b"x" * 500 + b'"}', b"[" * 150, row.replace("红圆", "绿圆").encode(),
    ]  # fmt: skip
    path.write_bytes(b"\r\n".join(content))
    first, *faults, last = told(path)
    assert (first, last) == ("红圆", "绿圆")
    assert [fault.partition(" (")[0] for fault in faults] == [
        "rows.jsonl:3: no JSON",
        "rows.jsonl:4: no JSON object",
        "rows.jsonl:5: not UTF-8",
        "rows.jsonl:6: no JSON object",
        "rows.jsonl:7: line too long",
        "rows.jsonl:8: no JSON",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "nothing in it"),
        ("a.jsonl", b"\n \n", "nothing in it"),
        ("a.jsonl", RED, "no JSON lines that can be read; a.jsonl:1: not UTF-8"),
        ("a.json", b'[{"zh": "x"}]', r"a.json:1: no JSON object .*jq -c"),
        ("a.json", b'[\n {\n  "zh": "x"\n }\n]', r"a.json:1: no JSON .*jq -c"),
        ("a.csv", b"image;zh\n1;2", "its cells are divided by semicolons; save it with commas"),
        ("a.csv", b"our shop,,\nimage,zh,sku\n1,2,3", "its first line does not name the columns"),
        ("a.jsonl", '{"zh": "x"}'.encode("utf-16"), "UTF-16; make it UTF-8: iconv -f UTF-16"),
        ("a.jsonl", b'{"a": 1, "b{}": 2}', r"no column of pictures or texts \(it has a, b\{\}\); name it by --image"),
        ("a.jsonl", b'{"image": "x", "b": 2}', r"no column of captions \(it has image, b\); name it by --zh"),
        ("a.csv", b"", "nothing in it"),
        ("a.csv", b"image,zh\n", "nothing in it"),
        ("a.csv", RED, "no table|not UTF-8"),
        ("a.csv", "标题,zh\n1,2".encode("gb18030"), "not UTF-8; if it is GB18030: iconv -f GB18030 -t UTF-8 a.csv"),
        ("a.csv", b"zh,image,zh\n1,2,3", "column 'zh' is named twice"),
        ("a.tsv", "image\tzh\n".encode("utf-16"), "UTF-16"),
        ("a.parquet", b"", "no Parquet file"),
        ("a.parquet", b"PAR1" + b"x" * 50 + b"PAR1", "no Parquet file"),
        ("a.tar", b"", "no WebDataset tar"),
        ("a.tar", b"x" * 2000, "no WebDataset tar"),
        ("a.tar.gz", b"\x1f\x8b\x08" + b"x" * 50, "no WebDataset tar"),
        ("a.zip", b"PK", "of no form that is known: a folder of pictures, or a file ending in .jsonl"),
    ],
)
def test_what_is_no_such_form_is_told_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        outcomes(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_sources_have_names_of_their_own(tmp_path):
    paths = [lines(tmp_path / name / "rows.jsonl", [{}]) for name in "abc"]
    assert [source.name for source in open_sources(paths)] == ["rows.jsonl", "rows.jsonl-2", "rows.jsonl-3"]
    with pytest.raises(UserError, match="given twice"):
        open_sources([paths[0], paths[0].parent / ".." / "a" / "rows.jsonl"])
    with pytest.raises(UserError, match="no such file or folder"):
        open_sources([tmp_path / "nowhere"])


# ---- tables


def test_rows_of_a_table(tmp_path):
    (tmp_path / "a.png").write_bytes(RED)
    content = '\ufeffimage,zh,tags\r\na.png,"红,\r\n圆","红、圆"\r\na.png\r\n\r\na.png,'.encode()
    (tmp_path / "rows.csv").write_bytes(content + "绿".encode("gb18030") + b',\r\na.png,"' + b"x" * 200_000 + b'",\r\n')
    taken, short, encoding, long = outcomes(tmp_path / "rows.csv")
    assert (taken.row.zh, taken.row.tags, taken.row.id) == ("红, 圆", ["红", "圆"], "rows.csv:3")
    assert (short.item, str(short.fault)) == ("rows.csv:4", "not as many cells as columns (1, not 3)")
    assert (encoding.item, encoding.fault.reason) == ("rows.csv:6", "zh: not UTF-8")
    assert long.fault.reason == "no row of a table" and "field limit" in long.fault.detail
    (tmp_path / "rows.tsv").write_bytes(b"file_name\tcaption\na.png\tring\n")
    assert told(tmp_path / "rows.tsv") == ["ring"]


@pytest.mark.parametrize(
    ("content", "last", "sign"),
    [
        ('a.png,"香蕉\n2.png,梨\n3.png,葡萄\n', 5, "unexpected end of data"),
        ('a.png,"香蕉\n2.png,梨\n3.png,"葡萄"\n4.png,李\n', 5, "',' expected after '\"'"),
        ('a.png,"香蕉\n2.png,梨\n3.png,管12"\n4.png,李\n', 5, "the rows after it are in a cell"),
        ('a.png,"12" 管\n', 0, ""),
        ('a.png,"香蕉\n' + "2.png,梨\n" * 20_000, 0, "larger than field limit"),
        ('a.png,"' + "香蕉\n" * 200_000, 0, "larger than field limit"),
        ('a.png,"' + '香蕉","\n' * 200_000, 0, "line too long"),
    ],
)
def test_a_quote_that_is_not_closed_is_not_taken_for_a_cell(tmp_path, content, last, sign):
    (tmp_path / "a.png").write_bytes(RED)
    path = tmp_path / "rows.csv"
    path.write_text("image,zh\na.png,红\n" + content)
    if not sign:
        assert told(path) == ["红", "rows.csv:3: no row of a table (',' expected after '\"')"]
        return
    with pytest.raises(UserError) as error:
        told(path)
    where = f"{path}: a quote that line 3 opens is not closed by line {last or ''}"
    assert str(error.value).startswith(where) and sign in str(error.value)


def test_cells_of_several_lines(tmp_path):
    """Poems, and other things than rows."""
    (tmp_path / "rows.csv").write_text('text,title\n"一,\n二,\n三","a.png\nb.png"\n"最后\n","\n甲"\n"没完,x\n')
    poem, other, last = outcomes(tmp_path / "rows.csv")
    assert (poem.row.text, poem.row.title, other.row.title) == ("一,\n二,\n三", "a.png b.png", "甲")
    assert (last.item, last.fault.detail) == ("rows.csv:9", "unexpected end of data")


def test_lines_of_a_table_that_are_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr("training.data.importing.lines.MOST_TEXT_BYTES", 100)
    monkeypatch.setattr("training.data.importing.lines._CHUNK", 64)
    (tmp_path / "a.png").write_bytes(RED)
    path = tmp_path / "rows.csv"
    whole = "a.png,红\r\n"
    two_lines, too_long = 'a.png,"二\r\n行"\r\n', "x" * 1000
    path.write_text(f"image,zh\r\n{whole}{too_long}\r\n{two_lines}{whole * 30}a.png,{too_long}", newline="")
    first, long, lines_, *others, last = outcomes(path)
    assert [one.row.id for one in (first, lines_, *others)] == [f"rows.csv:{n}" for n in (2, 5, *range(6, 36))]
    assert [str(one.fault) for one in (long, last)] == ["line too long (more than 100 characters)"] * 2
    assert (long.item, last.item) == ("rows.csv:3", "rows.csv:36")
    path.write_text("x" * 1000 + ",zh\n")
    with pytest.raises(UserError, match=r"no table .line too long"):
        outcomes(path)


# ---- Parquet


@pytest.mark.parametrize(
    "values",
    [
        pa.array([10**14], pa.timestamp("s")),
        pa.array([10**9], pa.timestamp("s", tz="Foo/Bar")),
        pa.array([10**8], pa.date32()),
        pa.array([10**18], pa.duration("s")),
    ],
)
def test_values_that_python_has_not_matter_only_where_they_are_wanted(tmp_path, values):
    path, table = tmp_path / "a.parquet", {"image": [RED], "zh": ["红"], "t": values}
    pq.write_table(pa.table(table), path)
    assert told(path) == ["红"]
    (left,) = outcomes(path, Settings(split_by="t"))
    assert left.fault.reason == "t: a value that cannot be read"
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({**table, "file_name": values}), tmp_path / "set" / "metadata.parquet")
    assert told(tmp_path / "set") == ["红"]


def test_columns_of_one_name(tmp_path):
    table = pa.table([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["image", "zh", "zh"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: column 'zh' is named twice; rename one of them"):
        outcomes(tmp_path / "a.parquet")


def test_rows_of_parquet_that_are_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(columnar, "_MOST_ROW_BYTES", 10_000)
    monkeypatch.setattr(columnar, "_MOST_AVERAGE", 20_000)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [RED, b"x" * 30_000, GREEN], "zh": ["红", "大", "绿"]}), path)
    red, large, green = told(path)
    assert (red, green) == ("红", "绿") and large.startswith("a.parquet:2: a row too large (30,0")
    pq.write_table(pa.table({"image": [RED, bytes(90_000)], "zh": ["红", "大"]}), path, compression="zstd")
    with pytest.raises(UserError, match=r"a.parquet: 4\d,\d+ bytes a row in row group 0, more than 20,000; leave such"):
        outcomes(path)


def test_one_row_of_a_dictionary_is_held(tmp_path):
    """The file says a large value once, for many rows."""
    path, size = tmp_path / "a.parquet", 2**20
    table = pa.table({"image": [bytes(size)] * 64, "zh": ["红"] * 64})
    pq.write_table(table, path, compression="none", dictionary_pagesize_limit=2 * size)
    del table
    assert path.stat().st_size < 2 * size
    (source,) = open_sources([path])
    before = pa.total_allocated_bytes()
    assert max(pa.total_allocated_bytes() - before for _ in source.rows()) < 6 * size


def test_a_whole_number_is_one_key_in_all_forms(tmp_path):
    """Beside an empty cell, pandas makes integers floats."""
    (tmp_path / "a.png").write_bytes(RED)
    pq.write_table(pa.table({"image": ["a.png"] * 2, "zh": ["红"] * 2, "sku": [1.0, None]}), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("image,zh,sku\na.png,红,1\na.png,红,1.0\n")
    (tmp_path / "a.jsonl").write_text('{"image": "a.png", "zh": "红", "sku": 1}\n')
    forms, settings = ("parquet", "csv", "jsonl"), Settings(split_by="sku")
    found = [one for form in forms for one in outcomes(tmp_path / f"a.{form}", settings)]
    assert {one.key for one in found if isinstance(one, Taken)} == {"1"} and len(found) == 5


def test_rows_of_parquet(tmp_path):
    (tmp_path / "a.png").write_bytes(RED)
    image = [{"bytes": GREEN, "path": None}, {"bytes": None, "path": "a.png"}, {"bytes": None, "path": None}, None]
    table = pa.table({"image": image, "zh": ["绿", "红", "无", "空"], "tags": [["a"], [], None, ["b"]]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert told(tmp_path / "a.parquet") == [
        "绿",
        "红",
        "a.parquet:3: image: must be a path or a file's bytes (None)",
        "a.parquet:4: neither a picture nor a text",
    ]
    damaged = pa.StringArray.from_buffers(
        1, pa.py_buffer(b"\x00\x00\x00\x00\x02\x00\x00\x00"), pa.py_buffer(b"\xd3\xff")
    )
    for image, zh, fault in (
        ([5], ["x"], "image: must be a path or a file's bytes"),
        ([RED], [5], "zh: must be text"),
        ([RED], [["x"]], "zh: must be text"),
        ([RED], [b"x"], "zh: must be text"),
        ([RED], damaged, "not UTF-8"),
    ):
        pq.write_table(pa.table({"image": image, "zh": zh, "n": [1]}), tmp_path / "b.parquet")
        try:
            assert fault in told(tmp_path / "b.parquet")[0]
        except UserError as error:
            assert fault in str(error)


# ---- folders


def test_a_folder_with_captions(tmp_path):
    outside = tmp_path / "secret.txt"
    outside.write_text("秘密")
    shop = tmp_path / "shop"
    (shop / "in" / ".hidden").mkdir(parents=True)
    for name in ("a.png", "b.PNG", "no caption.jpg", "in/c.png", "gb.png", "out.png", "dir.png", ".d.png", "e.png"):
        (shop / name).write_bytes(RED)
    captions = {"a": "\ufeff红圆\r\n第二行", "b": "绿", "in/c": "", "orphan": "谁", "dir": "目录"}
    for name, text in captions.items():
        (shop / f"{name}.txt").write_text(text, newline="")
    (shop / "gb.txt").write_bytes("红".encode("gb18030"))
    (shop / "out.txt").symlink_to(outside)
    (shop / "e.txt").mkdir()
    (shop / "moving.gif").write_bytes(b"GIF89a")
    (shop / "link").symlink_to(tmp_path)
    assert told(shop) == [
        "红圆",
        "绿",
        "目录",
        "shop/e.png: no caption beside it (e.txt is not there)",
        "shop/gb.png: not UTF-8 (gb.txt)",
        "shop/link: neither a picture nor a caption",
        "shop/moving.gif: neither a picture nor a caption (.gif)",
        "shop/no caption.jpg: no caption beside it (no caption.txt is not there)",
        "shop/orphan.txt: a caption without its picture",
        "shop/out.png: a path out of the source's folder (out.txt)",
        "shop/in/c.png: no caption",
    ]


def test_a_folder_with_metadata(tmp_path):
    for part in ("train", "test"):
        (tmp_path / "set" / part).mkdir(parents=True)
        for name in ("a.png", "b.png"):
            (tmp_path / "set" / part / name).write_bytes(RED)
    lines(tmp_path / "set" / "train" / "metadata.jsonl", [{"file_name": "a.png", "text": "红"}])
    (tmp_path / "set" / "test" / "metadata.csv").write_text("file_name,text\n./b.png,绿\n../train/../../x.png,外\n")
    assert told(tmp_path / "set") == [
        "绿",
        "set/test/metadata.csv:3: a path out of the source's folder (../train/../../x.png)",
        "红",
        "set/test/a.png: a picture that the metadata do not name",
        "set/train/b.png: a picture that the metadata do not name",
    ]


def test_metadata_stay_in_the_folder(tmp_path):
    secret = lines(tmp_path / "secret.jsonl", [{"text": "秘密的话"}])
    folder = tmp_path / "set"
    (folder / "in").mkdir(parents=True)
    (folder / "a.png").write_bytes(RED)
    (folder / "metadata.jsonl").symlink_to(secret)
    os.mkfifo(folder / "metadata.csv")
    lines(folder / "rows.jsonl", [{"file_name": "../a.png", "text": "红"}])
    (folder / "in" / "metadata.jsonl").symlink_to(folder / "rows.jsonl")
    assert told(folder) == [
        "set/metadata.csv: not a file (metadata.csv)",
        "set/metadata.jsonl: a path out of the source's folder (metadata.jsonl)",
        "set/in/metadata.jsonl:1: a path out of the source's folder (../a.png)",
    ]


def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    (tmp_path / "set" / "sub").mkdir(parents=True)
    (tmp_path / "set" / "a.png").write_bytes(RED)
    (tmp_path / "set" / "a.txt").write_text("红")
    scan = os.scandir

    def refused(path):
        if os.path.basename(path) == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UserError, match=r"set/sub: cannot be read .Permission denied.; mend it or leave it out"):
        outcomes(tmp_path / "set")


def test_a_folder_without_pictures(tmp_path):
    with pytest.raises(UserError, match="nothing in it"):
        outcomes(tmp_path)
    (tmp_path / "shard.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"no folder of pictures that can be read; .*shard.tar: neither a picture"):
        outcomes(tmp_path)


# ---- tars


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def test_rows_of_a_tar(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MOST_BYTES", 10_000)
    about = json.dumps({"zh": "绿方块", "image": "/etc/passwd", "tags": ["绿"]}).encode()
    members = [
        ("./a.png", RED), ("./a.txt", "\ufeff红圆\r\n二".encode()), ("a.cls", b"7"),
        ("x/b.json", about), ("x/b.JPG", GREEN),
        ("c.png", RED),
        ("d.png", RED), ("d.jpg", RED), ("d.txt", b"d"),
        ("e.json", b"[1]"), ("e.png", RED),
        ("f.json", b"{"), ("f.png", RED),
        ("g.txt", "红".encode("gb18030")), ("g.png", RED),
        ("h.png", b"x" * 20_000), ("h.txt", b"h"),
        special("i.png", tarfile.SYMTYPE, "/etc/passwd"), ("i.txt", b"i"),
        special("j.png", tarfile.LNKTYPE, "a.png"), special("k", tarfile.CHRTYPE), special("l", tarfile.FIFOTYPE),
        special("folder", tarfile.DIRTYPE),
        ("/etc/m.png", RED), ("/etc/m.txt", b"absolute"), ("../../n.png", RED), ("../../n.txt", b"above"),
        ("a.txt", b"again"), ("o.json", json.dumps({"image": "a.png", "zh": "o"}).encode()),
    ]  # fmt: skip
    expected = [
        "红圆",
        "绿方块",
        "t.tar/c: no caption",
        "t.tar/d: more than one picture or caption of one key (jpg)",
        "t.tar/e: no JSON object (a list or a value)",
        "t.tar/f: no JSON object (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
        "t.tar/g: not UTF-8 (txt)",
        "t.tar/h: a member too large (png)",
        "t.tar/i: a link or a device, not a file (png)",
        "t.tar/j: a link or a device, not a file (png)",
        "t.tar/k: a link or a device, not a file",
        "t.tar/l: a link or a device, not a file",
        "absolute",
        "above",
        "t.tar/a: a key that was there before (txt; a row's members stand together)",
        "t.tar/o: a path, where pictures are inside the file (a.png)",
    ]
    before = sorted(tmp_path.rglob("*"))
    assert told(tar(tmp_path / "t.tar", members)) == expected
    assert [*before, tmp_path / "t.tar"] == sorted(tmp_path.rglob("*"))
    packed = tar(tmp_path / "t.tar.gz", members, "w:gz")
    assert told(packed) == [line.replace("t.tar/", "t.tar.gz/") for line in expected]


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = special(name, kind)
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT)


def member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    return header(name, len(content), kind) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def pax(name: str, value: str) -> bytes:
    record = f" {name}={value}\n"
    length = next(n for n in range(9999) if len(f"{n}{record}") == n)
    return member("pax", f"{length}{record}".encode(), tarfile.XHDTYPE)


@pytest.mark.parametrize(
    ("ahead", "reason"),
    [
        (pax("size", "9" * 26), "is no number"),
        (pax("size", f"{2**62}"), "cut off"),
        (pax("size", "-5"), "is no number"),
        (header("x.png", 2**62), "cut off"),
        (header("x.png", -512), "a negative size"),
        (header("x", 2**31, tarfile.GNUTYPE_LONGNAME), "a header of 2,147,483,648 bytes"),
        (header("x", 2**31, tarfile.GNUTYPE_LONGLINK), "a header of 2,147,483,648 bytes"),
        (header("x", 2**31, tarfile.XHDTYPE), "a header of 2,147,483,648 bytes"),
        (header("x", 2**31, tarfile.XGLTYPE), "a header of 2,147,483,648 bytes"),
        (header("x", -1, tarfile.GNUTYPE_LONGNAME), "a negative size"),
        (member("x", b"x" * 5000, tarfile.GNUTYPE_LONGNAME), "a name of 5,000 characters"),
        (pax("GNU.sparse.map", "a,b"), "a sparse file"),
        (pax("GNU.sparse.major", "1"), "a sparse file"),
        (header("x.png", 0, tarfile.GNUTYPE_SPARSE), "a sparse file"),
        (member("x", b"zzzz", tarfile.XHDTYPE), "is no number"),
        (member("x", b"9 path=abcdef\n", tarfile.XHDTYPE), "is no number"),
        (member("x", b"99 path=abcdef\n", tarfile.XHDTYPE), "damaged attributes"),
        (member("x", b"3 p", tarfile.XHDTYPE), "damaged attributes"),
        (header("x.png")[:-1] + b"x", "bad checksum"),
    ],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_headers_that_are_not_to_be_believed(tmp_path, ahead, reason, pack):
    path = tmp_path / "t.tar"
    path.write_bytes(pack(member("a.png", RED) + member("a.txt", b"a") + ahead + member("b.png", GREEN) + bytes(1024)))
    with pytest.raises(UserError, match=f"t.tar: damaged after [23] members .*{reason}"):
        outcomes(path)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_names_that_have_no_room_in_a_header(tmp_path, form):
    folder = "/".join(["folder"] * (20 if form == tarfile.USTAR_FORMAT else 50))
    comment = {"comment": "a commit"} if form == tarfile.PAX_FORMAT else None
    with tarfile.open(tmp_path / "t.tar", "w", format=form, pax_headers=comment) as file:
        for ending, content in (("png", RED), ("txt", "红".encode())):
            about = tarfile.TarInfo(f"{folder}/红.{ending}")
            about.size, about.mtime = len(content), 0.5
            file.addfile(about, io.BytesIO(content))
    assert [one.row.id for one in outcomes(tmp_path / "t.tar")] == [f"t.tar/{folder}/红"]


def test_of_many_names_the_last_counts(tmp_path):
    names = member("", b"other", tarfile.GNUTYPE_LONGNAME) * 2000 + member("", b"a.png", tarfile.GNUTYPE_LONGNAME)
    (tmp_path / "t.tar").write_bytes(names + member("x", RED) + member("a.txt", "红".encode()) + bytes(1024))
    assert told(tmp_path / "t.tar") == ["红"]


def test_a_tar_that_is_packed_otherwise_is_none(tmp_path):
    for way in ("bz2", "xz"):
        with pytest.raises(UserError, match="no WebDataset tar"):
            outcomes(tar(tmp_path / "t.tar.gz", [("a.png", RED), ("a.txt", b"a")], f"w:{way}"))


def test_a_key_with_more_than_fits_is_not_held(tmp_path, monkeypatch):
    """Members are read one at a time, and no more of a row once it is refused."""
    read = []
    monkeypatch.setattr(
        shards.Shard, "_member", lambda self, tar, member: read.append(1) or shards.Member("a", "png", RED)
    )
    (source,) = open_sources([tar(tmp_path / "t.tar", [("a.png", RED)] * 50)])
    (found,) = source.rows()
    assert found.fault and len(read) == 50


@pytest.mark.parametrize("cut", [700, 3 * 512 + 100, -512 * 20])
def test_a_tar_that_is_cut_off_is_damaged(tmp_path, cut):
    path = tar(tmp_path / "t.tar", [(f"{n}.{ending}", b"x" * 500) for n in range(9) for ending in ("png", "txt")])
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"t.tar: (damaged after \d+ members|no WebDataset tar)"):
        outcomes(path)


def test_a_tar_that_is_cut_off_between_members_is_damaged(tmp_path):
    path = tar(tmp_path / "t.tar", [(f"{n}.{ending}", b"x" * 500) for n in range(9) for ending in ("png", "txt")])
    for kept in (4 * 1024, 4 * 1024 + 60):
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(UserError, match=r"damaged after 4 members .*cut off"):
            outcomes(path)


# ---- all


def test_what_is_damaged_is_a_fault_or_a_mistake_and_never_a_crash(sample_corpus, tmp_path):
    pictures, chance = [sample_corpus.picture(row) for row in (0, 7, 70)], random.Random(0)
    whole = {}
    for form, name in FILES.items():
        (tmp_path / form).mkdir()
        FORMS[form](pictures, tmp_path / form)
        whole[name] = (tmp_path / form / name).read_bytes()
    whole["shard.tar.gz"] = gzip.compress(whole["shard-00000.tar"])
    (tmp_path / "damaged").mkdir()
    for _ in range(150):
        name = chance.choice(sorted(whole))
        data = bytearray(whole[name])
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(data))
            if chance.random() < 0.7:
                data[place] = chance.randrange(256)
            else:
                del data[place : place + chance.choice([1, 100, len(data)])]
            data = data or bytearray(b"x")
        path = tmp_path / "damaged" / name
        path.write_bytes(data)
        try:
            assert outcomes(path)
        except UserError as error:
            assert name in str(error)


def test_counts_tell_how_far_it_is(sample_corpus, tmp_path):
    pictures = [sample_corpus.picture(row) for row in (0, 7, 70)]
    for form, number in {"lines": 3, "csv": 3, "metadata": 3, "captions": 3, "parquet": 3, "tar": None}.items():
        (tmp_path / form).mkdir()
        FORMS[form](pictures, tmp_path / form)
        (source,) = open_sources([source_in(tmp_path / form, form)])
        assert source.count() == number


def test_columns_are_of_the_first_rows_that_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LOOKED_AT", 2)
    path = tmp_path / "a.jsonl"
    path.write_text('x\n{"a": 1}\nx\n{"b": 1}\n{"c": 1}\n')
    (source,) = open_sources([path])
    assert source.columns() == ["a", "b"]
