"""From a stranger's files to a corpus that every task reads."""

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.stranger import FORMS
from model.config import ModelConfig
from tests.data_sample import draw, sample_pictures
from tests.training.data.importing.strangers import GREEN, RED, lines, tar
from training.data import build, corpus
from training.data.batches import Collator
from training.data.corpus import Corpus
from training.data.features import PatchFeatures
from training.data.fetch import fetch
from training.data.importing import build as importing
from training.data.importing.build import import_corpus
from training.data.importing.intake import Kept
from training.data.importing.reading import Settings, Taken
from training.data.order import GlobalOrder
from training.data.rows import Picture
from training.data.tasks import TASKS
from training.errors import UserError

FAMILY = Settings(split_by="family")


@pytest.fixture
def base(sample_corpus) -> Path:
    return sample_corpus.folder.parent


@pytest.fixture
def shop(sample_corpus, tmp_path) -> Path:
    """The held-out pictures of the sample corpus as a stranger's."""
    rows = [row for split in ("validation", "test") for row in sample_corpus.picture_rows(split)]
    (tmp_path / "shop").mkdir()
    FORMS["lines"]([sample_corpus.picture(int(row)) for row in rows], tmp_path / "shop")
    return tmp_path / "shop" / "rows.jsonl"


def skipped(home: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (home / corpus.FOLDER / corpus.SKIPPED).read_text().splitlines()]


def test_an_import_is_a_corpus_that_models_of_its_base_can_read(sample_corpus, base, shop, tmp_path):
    texts = lines(
        tmp_path / "texts.jsonl", [{"text": "春眠不觉晓", "title": "春晓"}, {"text": "好", "polarity": "好评"}]
    )
    new = lines(
        tmp_path / "new" / "more.jsonl", [{"image": draw("star", "#a3a"), "zh": "紫色菱形", "tags": "紫色 菱形"}]
    )
    told: list[str] = []
    summary = import_corpus([shop, texts, new], tmp_path / "to", base, Settings(held_out=0), told.append)
    opened = Corpus.open(tmp_path / "to")
    opened.verify()
    assert opened.imported and not summary.up_to_date and not summary.left
    assert opened.manifest["base"] == sample_corpus.fingerprint != opened.fingerprint
    for key in ("tokenizer_sha256", "feature_network_sha256", "augmentations"):
        assert opened.manifest[key] == sample_corpus.manifest[key]
    held_out = len(opened.pictures) - 1
    assert told == [f"1 of {held_out + 1} pictures are to be described: about 0 s on 2 cores"]
    assert sum(map(Counter.total, map(Counter, opened.manifest["pictures"].values()))) == held_out + 1
    last = opened.picture(held_out)
    assert (last.zh, last.tags, last.style) == ("紫色菱形", ["紫色", "菱形"], "imported")
    # What is new is seen as the base's network sees it; the rest was known.
    seen = PatchFeatures(sample_corpus.feature_network)([last.pil()])[0].numpy()
    np.testing.assert_allclose(opened.features[held_out, 0], seen, rtol=2e-3, atol=2e-3)
    known = {
        sample_corpus.picture(row).image: sample_corpus.features[row] for row in range(len(sample_corpus.pictures))
    }
    for row in range(held_out):
        np.testing.assert_array_equal(opened.features[row], known[opened.picture(row).image])
    assert [opened.text(row).kind for row in range(2)] == ["poem", "review"]

    shape = ModelConfig(
        layers=1, hidden=32, ffn=32, heads=2, text_vocab=opened.tokenizer.vocab_size, image_codes=0,
        max_positions=64, image_channels=1280,
    )  # fmt: skip
    weights = dict.fromkeys(TASKS.keys() - {"draw", "inpaint"}, 1)
    order = GlobalOrder([TASKS[name](opened, "train") for name in weights], weights, 32, 64, 1, 8)
    batch = Collator(opened, shape, 8)([order.row(place) for place in range(32)], 64)
    assert batch["has_image_B"].any() and np.isfinite(batch["image_BPC"].numpy()).all()


def test_all_rows_are_taken_or_left(base, tmp_path):
    rows = [
        {"image": RED, "zh": "红圆", "source": "A"}, {"image": GREEN, "zh": "绿方块", "source": "A", "licence": "MIT"},
        {"image": RED, "zh": "红圆"}, {"image": RED, "zh": "圆"}, {"image": RED[:99], "zh": "坏"}, {"zh": "无"},
        {"image": "../x.png", "zh": "外"}, {"image": GREEN, "zh": ""}, {"image": GREEN, "zh": "\u202e"},
        {"text": "一"}, {"text": "一。"}, {"image": RED, "zh": "a circle"},
    ]  # fmt: skip
    first = lines(tmp_path / "shop" / "rows.jsonl", rows)
    second = tar(tmp_path / "t.tar", [("a.png", GREEN), ("a.txt", "绿".encode()), ("b.png", GREEN), ("c.txt", b"c")])
    summary = import_corpus([first, second], tmp_path / "to", base, Settings(held_out=0))
    built = Corpus.open(tmp_path / "to")
    left = skipped(tmp_path / "to")
    ids = [*built.pictures["id"], *built.texts["id"], *(entry["item"] for entry in left)]
    assert sorted(ids) == sorted([f"rows.jsonl:{n}" for n in range(1, 13)] + [f"t.tar/{key}" for key in "abc"])
    assert {name: (reason.rows, reason.examples) for name, reason in summary.left.items()} == {
        "a copy of a row before": (2, ["rows.jsonl:3 (rows.jsonl:1)", "rows.jsonl:11 (rows.jsonl:10)"]),
        "no picture that can be taken": (1, summary.left["no picture that can be taken"].examples),
        "neither a picture nor a text": (2, ["rows.jsonl:6", "t.tar/c"]),
        "a path out of the source's folder": (1, ["rows.jsonl:7 (../x.png)"]),
        "no caption": (3, ["rows.jsonl:8", "rows.jsonl:9", "t.tar/b"]),
    }
    assert summary.foreign == 1
    assert built.manifest["skipped"] == {"rows.jsonl": 7, "t.tar": 2}
    assert built.manifest["pictures"] == {"A": {"train": 2}, "rows.jsonl": {"train": 2}, "t.tar": {"train": 1}}
    assert built.manifest["texts"] == {"rows.jsonl": {"train": 1}}
    licences = {name: source["licence"] for name, source in built.manifest["sources"].items()}
    assert licences == {"A": "MIT; not stated", "rows.jsonl": "not stated", "t.tar": "not stated"}


def test_no_picture_crosses_splits(sample_corpus, base, shop, tmp_path):
    """Not under two keys, and not from what the base trains on."""
    own = [json.loads(line) for line in shop.read_text().splitlines()]
    trained = sample_corpus.picture(int(sample_corpus.picture_rows("train")[0]))
    rows = [
        row | {"family": f"{place} {turn}", "zh": f"{row['zh']}{turn}"}
        for place, row in enumerate(own)
        for turn in "一二"
    ]
    rows += [{"image": trained.image, "zh": f"见过{n}", "family": f"seen {n}"} for n in range(30)]
    import_corpus(
        [lines(shop.parent / "twice.jsonl", rows)], tmp_path / "to", base, Settings(split_by="family", held_out=0.6)
    )
    built = Corpus.open(tmp_path / "to")
    splits: dict[bytes, set[str]] = {}
    for row in range(len(built.pictures)):
        picture = built.picture(row)
        splits.setdefault(picture.image, set()).add(picture.split)
    assert {len(found) for found in splits.values()} == {1}
    assert splits[trained.image] == {"train"}
    poems = [sample_corpus.text(int(row)).text for row in sample_corpus.text_rows("train", "poem")[:20]]
    path = lines(tmp_path / "poems.jsonl", [{"text": text.replace("，", " ")} for text in poems] + [{"text": "别的"}])
    import_corpus([path], tmp_path / "texts", base, Settings(held_out=0.99))
    assert set(Corpus.open(tmp_path / "texts").texts["split"][:20]) == {"train"}
    assert set.union(*splits.values()) == {"train", "validation", "test"}
    assert len(set(built.pictures["family"])) < len(rows)


def test_the_same_again_is_verified_and_kept(base, shop, tmp_path):
    first = import_corpus([shop], tmp_path / "to", base, FAMILY)
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    again = import_corpus([shop], tmp_path / "to", base, FAMILY)
    assert again.up_to_date and again.manifest == first.manifest
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == before
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == [".lock", "corpus"]
    elsewhere = import_corpus([shop], tmp_path / "elsewhere", base, FAMILY)
    assert elsewhere.manifest["fingerprint"] == first.manifest["fingerprint"]
    # Damage is mended.
    (first.folder / corpus.FEATURES).write_bytes(b"damage")
    assert not import_corpus([shop], tmp_path / "to", base, FAMILY).up_to_date
    Corpus.open(tmp_path / "to").verify()


def test_changed_sources_take_the_place_and_what_is_known_is_not_computed_again(base, tmp_path, monkeypatch):
    described: list[int] = []
    write = build.write_features
    monkeypatch.setattr(build, "write_features", lambda *a: described.append(len(a[3])) or write(*a))
    path, red, green = tmp_path / "shop" / "rows.jsonl", draw("ring", "#c11"), draw("ring", "#1c1")
    first = import_corpus([lines(path, [{"image": red, "zh": "红圆"}])], tmp_path / "to", base)
    features = np.array(Corpus.open(tmp_path / "to").features)
    rows = [{"image": green, "zh": "绿"}, {"image": red, "zh": "红圆"}, {"image": red, "zh": "圆"}, {"zh": "无"}]
    second = import_corpus([lines(path, rows)], tmp_path / "to", base)
    assert described == [1, 1] and second.manifest["fingerprint"] != first.manifest["fingerprint"]
    opened = Corpus.open(tmp_path / "to")
    opened.verify()
    for row in (1, 2):
        np.testing.assert_array_equal(opened.features[row], features[0])
    # What is left out counts, too: the list beside the corpus is of these sources.
    third = import_corpus([lines(path, rows[:3])], tmp_path / "to", base)
    assert not third.up_to_date and third.manifest["fingerprint"] == second.manifest["fingerprint"]
    assert skipped(tmp_path / "to") == [] and described == [1, 1, 0]


def test_texts_alone_and_pictures_alone(base, shop, tmp_path):
    import_corpus([lines(tmp_path / "t.jsonl", [{"text": f"第{n}段话"} for n in range(60)])], tmp_path / "texts", base)
    texts = Corpus.open(tmp_path / "texts")
    assert len(texts.pictures) == 0 and texts.features.shape == (0, 4, 16, 1280)
    assert len(texts.text_rows("train")) + len(texts.text_rows("validation")) + len(texts.text_rows("test")) == 60
    assert not len(texts.picture_rows("train"))
    with pytest.raises(UserError, match=r"tasks.caption: .* leave it out \(tasks.caption=0 tasks.match=0\)"):
        tasks = [TASKS[name](texts, "train") for name in ("match", "language", "caption")]
        GlobalOrder(tasks, {"match": 1, "language": 1, "caption": 1}, 8, 64, 1)
    import_corpus([shop], tmp_path / "pictures", base, FAMILY)
    assert not len(Corpus.open(tmp_path / "pictures").text_rows("train"))


@pytest.mark.parametrize("what", ["fetched", "inside", "nothing", "busy", "base", "own base", "column", "damaged"])
def test_what_is_refused_changes_nothing(base, shop, tmp_path, what, monkeypatch):
    to = tmp_path / "to"
    before = import_corpus([shop], to, base, FAMILY).manifest["fingerprint"]
    rows = [{"image": f"{n}.png", "zh": "x"} for n in range(3)]
    cases = {
        "fetched": ([shop], base, tmp_path, "a corpus that `m6 data fetch` built; give another --to"),
        "inside": ([shop.parent], shop.parent / "x", base, "inside the source"),
        "nothing": (
            [lines(tmp_path / "none.jsonl", rows)],
            to,
            base,
            r"nothing to import: all 3 .* no such file, as none",
        ),
        "base": ([shop], to, tmp_path / "nowhere", "no corpus there"),
        "own base": ([shop], to, to / ".." / "to", "its corpus is what --to would replace; give another --base"),
        "column": ([shop], to, base, "--zh nmae: no source has such a column; did you mean name"),
        "damaged": ([cut_tar(tmp_path)], to, base, "damaged after"),
        "busy": ([shop], to, base, "another `m6 data fetch` or `m6 data import` is at work"),
    }
    sources, target, origin, message = cases[what]
    (shop.parent / "0.png").write_bytes(RED)
    chosen = Settings({"zh": "nmae"}) if what == "column" else Settings()
    if what == "column":
        sources = [lines(tmp_path / "named.jsonl", [{"image": "x", "name": "x"}])]
    if what == "fetched":
        origin = to
    with pytest.raises(UserError, match=message):
        if what == "busy":
            with importing.home.alone(to):
                import_corpus(sources, target, origin, chosen)
        import_corpus(sources, target, origin, chosen)
    present = Corpus.open(to)
    present.verify()
    assert present.fingerprint == before and not (to / importing.home.BUILDING).exists()


def entries(home: Path) -> dict[Path, tuple[int, int]]:
    """What is in a folder, but its lock: when it was changed, and how large it is."""
    found = (path for path in home.rglob("*") if path.name != ".lock")
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in found}


@pytest.mark.parametrize("what", ["folder", "file", "link", "other manifest", "fetched", "of another format"])
def test_what_no_import_built_stays(sample_corpus, shop, base, tmp_path, what):
    place = tmp_path / "to" / corpus.FOLDER
    place.parent.mkdir()
    message = "corpus: no corpus, by its manifest; move it elsewhere, or give another --to"
    if what == "file":
        place.write_text("precious")
    elif what == "link":
        place.symlink_to(tmp_path / "nowhere")
    elif what in ("folder", "other manifest"):
        place.mkdir()
        (place / "mine.txt").write_text("precious")
        if what == "other manifest":
            (place / corpus.MANIFEST).write_text('{"name": "a web page", "base": "/"}')
    else:
        message = "a corpus that `m6 data fetch` built; give another --to"
        shutil.copytree(sample_corpus.folder, place)
        (place / corpus.FEATURES).write_bytes(b"damage")
        if what == "of another format":
            manifest = json.loads((place / corpus.MANIFEST).read_text())
            (place / corpus.MANIFEST).write_text(json.dumps(manifest | {"format": 1}))
    before = entries(tmp_path / "to")
    with pytest.raises(UserError, match=message):
        import_corpus([shop], tmp_path / "to", base, FAMILY)
    assert entries(tmp_path / "to") == before


def test_an_import_of_another_format_is_replaced(shop, base, tmp_path):
    manifest = import_corpus([shop], tmp_path / "to", base, FAMILY).manifest
    (tmp_path / "to" / corpus.FOLDER / corpus.MANIFEST).write_text(json.dumps(manifest | {"format": 1}))
    with pytest.raises(UserError, match=r"corpus of format 1, .*; run `m6 data import` to build the corpus anew"):
        Corpus.open(tmp_path / "to")
    assert not import_corpus([shop], tmp_path / "to", base, FAMILY).up_to_date
    Corpus.open(tmp_path / "to").verify()


def test_of_a_link_to_an_import_the_link_is_replaced(shop, base, tmp_path):
    to, elsewhere = tmp_path / "to", tmp_path / "elsewhere"
    first = import_corpus([shop], elsewhere, base, FAMILY)
    to.mkdir()
    (to / corpus.FOLDER).symlink_to(elsewhere / corpus.FOLDER)
    assert import_corpus([shop], to, base, FAMILY).up_to_date
    other = lines(tmp_path / "other.jsonl", [{"text": "别的"}])
    assert import_corpus([other], to, base).manifest["fingerprint"] != first.manifest["fingerprint"]
    assert not (to / corpus.FOLDER).is_symlink() and {path.name for path in to.iterdir()} == {".lock", corpus.FOLDER}
    assert Corpus.open(elsewhere).fingerprint == first.manifest["fingerprint"]


def test_a_source_is_not_replaced(shop, base, tmp_path):
    to, link = tmp_path / "to", tmp_path / "link.jsonl"
    import_corpus([shop], to, base, FAMILY)
    rows = [{"image": RED, "zh": "红圆"}]
    own = lines(to / corpus.FOLDER / "mine" / "rows.jsonl", rows)
    begun = lines(to / importing.home.BUILDING / "rows.jsonl", rows)
    link.symlink_to(own)
    before = entries(to)
    for source in (own, own.parent, link, begun):
        with pytest.raises(UserError, match=r"inside what --to .* would replace; move it elsewhere"):
            import_corpus([source], to, base)
    assert entries(to) == before


@pytest.mark.parametrize("link", [False, True])
def test_what_stands_where_it_would_be_built(shop, base, tmp_path, link):
    partial = tmp_path / "to" / importing.home.BUILDING
    partial.parent.mkdir()
    if link:
        partial.symlink_to(shop.parent)
    else:
        partial.write_text("precious")
    (tmp_path / "to" / ".lock").write_text("another's")
    before = entries(tmp_path)
    with pytest.raises(UserError, match=r"corpus.partial: cannot be made \(File exists\); remove it"):
        import_corpus([shop], tmp_path / "to", base, FAMILY)
    assert entries(tmp_path) == before and (tmp_path / "to" / ".lock").read_text() == "another's"


def cut_tar(folder: Path) -> Path:
    path = tar(
        folder / "t.tar",
        [(f"{n}.{ending}", RED if ending == "png" else b"x") for n in range(9) for ending in ("png", "txt")],
    )
    path.write_bytes(path.read_bytes()[: 8 * 1024])
    return path


def test_a_fetch_does_not_take_the_place_of_an_import(base, shop, tmp_path):
    import_corpus([shop], tmp_path / "to", base, FAMILY)
    with pytest.raises(UserError, match="a corpus that `m6 data import` built; give another --dir"):
        fetch(tmp_path / "to")
    (tmp_path / "to" / corpus.FOLDER / corpus.TOKENIZER).unlink()
    with pytest.raises(UserError, match="run `m6 data import` to build the corpus anew"):
        Corpus.open(tmp_path / "to")
    before = entries(tmp_path / "to")
    with pytest.raises(UserError, match="a corpus that `m6 data import` built; give another --dir"):
        fetch(tmp_path / "to")
    assert entries(tmp_path / "to") == before


def test_no_space(base, shop, tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "_SPARE_BYTES", 2**60)
    with pytest.raises(UserError, match=r"GiB free, .* needed; give another folder"):
        import_corpus([shop], tmp_path / "to", base, FAMILY)
    assert [path.name for path in (tmp_path / "to").iterdir()] == [".lock"]


def test_rows_are_not_held(tmp_path):
    """Neither on their way to the disk nor when they get their splits: of 40 MB a few batches."""
    picture = replace(sample_pictures()[0], image=os.urandom(100_000))
    kept = Kept(tmp_path / "rows", Picture)
    tracemalloc.start()
    for number in range(400):
        kept.add(Taken(picture, f"{number}", b"", ""))
    build.save_rows(tmp_path / corpus.PICTURES, importing._with(kept.table(), split=["test"] * 400))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 15_000_000
    assert kept.path.stat().st_size > 40_000_000


def test_an_import_can_be_the_base_of_another(base, shop, tmp_path):
    first = import_corpus([shop], tmp_path / "first", base, Settings(held_out=0))
    second = import_corpus([shop], tmp_path / "second", tmp_path / "first", replace(FAMILY, held_out=0.9))
    assert second.manifest["base"] == first.manifest["fingerprint"]
    assert second.trained == len(Corpus.open(tmp_path / "second").picture_rows("train")) > 0


def trained_rows(of: Corpus, folder: Path) -> Path:
    """Pictures and poems that a corpus trains on, as a stranger's."""
    pictures = [of.picture(int(row)).image for row in of.picture_rows("train")[:12]]
    poems = [of.text(int(row)).text for row in of.text_rows("train", "poem")[:12]]
    rows = [{"image": image, "zh": f"见过{number}"} for number, image in enumerate(pictures)]
    return lines(folder / "rows.jsonl", rows + [{"text": text} for text in poems])


def test_what_the_base_of_a_base_trains_on_trains_here(sample_corpus, base, shop, tmp_path):
    source, most = trained_rows(sample_corpus, tmp_path / "seen"), Settings(held_out=0.99)
    import_corpus([shop], tmp_path / "first", base, FAMILY)
    import_corpus([lines(tmp_path / "texts.jsonl", [{"text": "别的"}])], tmp_path / "second", tmp_path / "first", most)
    for home in ("first", "second"):
        summary = import_corpus([source], tmp_path / f"{home}'s", tmp_path / home, most)
        built = Corpus.open(tmp_path / f"{home}'s")
        built.verify()
        assert set(built.pictures["split"]) == set(built.texts["split"]) == {"train"} and summary.trained == 12
    # What the first alone trains on is handed on as well.
    first = Corpus.open(tmp_path / "first")
    own, number = trained_rows(first, tmp_path / "own"), len(first.picture_rows("train")[:12])
    assert import_corpus([own], tmp_path / "last", tmp_path / "second", most).trained == number > 0
    assert import_corpus([source], tmp_path / "second's", tmp_path / "second", most).up_to_date


def test_an_import_that_hands_no_marks_on_is_opened_and_made_again(sample_corpus, base, shop, tmp_path):
    first = import_corpus([shop], tmp_path / "first", base, FAMILY)
    (first.folder / corpus.TRAINED).unlink()
    files = {name: entry for name, entry in first.manifest["files"].items() if name != corpus.TRAINED}
    (first.folder / corpus.MANIFEST).write_text(json.dumps(first.manifest | {"files": files}))
    Corpus.open(tmp_path / "first").verify()
    told: list[str] = []
    import_corpus([shop], tmp_path / "second", tmp_path / "first", FAMILY, told.append)
    assert told[0] == (
        f"{first.folder}: does not say what its own base trains on, which may be held out here: "
        "run the `m6 data import` that made it again"
    )
    again = import_corpus([shop], tmp_path / "first", base, FAMILY)
    assert not again.up_to_date and again.manifest == first.manifest
    assert import_corpus([shop], tmp_path / "first", base, FAMILY).up_to_date


def test_killed_at_any_moment_the_old_or_the_new_one_is_there(base, tmp_path, shop):
    """Whole, and never for a moment none."""
    rows = [json.loads(line) for line in shop.read_text().splitlines()]
    paths = [shop, lines(shop.parent / "fewer.jsonl", rows[:5])]
    both = {import_corpus([path], tmp_path / path.stem, base).manifest["fingerprint"] for path in paths}
    to, chance, longest = tmp_path / "to", random.Random(0), 0.0
    import_corpus([paths[0]], to, base)
    command = [sys.executable, str(Path(__file__).with_name("importer.py")), str(to), str(base)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    seen, cut = set(), 0
    with subprocess.Popen(command, text=True, **pipes) as program:
        for turn in range(14):
            program.stdin.write(f"{paths[turn % 2]}\n")
            program.stdin.flush()
            process = os.pidfd_open(int(program.stdout.readline()))
            begin = time.monotonic()
            # The first are left alone, and tell how long one takes.
            end = begin + (longest * chance.random() if turn > 3 else 60)
            while not (over := select.select([process], [], [], 0.001)[0]) and time.monotonic() < end:
                assert (to / corpus.FOLDER / corpus.MANIFEST).is_file()
            cut += not over
            longest = longest if turn > 3 else time.monotonic() - begin
            signal.pidfd_send_signal(process, signal.SIGKILL)
            os.close(process)
            program.stdin.write("\n")
            program.stdin.flush()
            assert program.stdout.readline() == "ended\n"
            present = Corpus.open(to)
            present.verify()
            seen.add(present.fingerprint)
        program.stdin.close()
    assert seen == both and cut > 3
