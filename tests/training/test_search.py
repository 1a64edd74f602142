"""Pictures are found by their words, in an index that is built once and kept up to date."""

import copy
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.training.fake_run import make_recipe
from tests.training.small_run import write_pictures
from training import search
from training.data.corpus import Corpus
from training.errors import UserError
from training.search import FILE, Index, contact_sheet, pictures_in
from training.trained import M6


@pytest.fixture
def m(small_run: M6) -> M6:
    return small_run


@pytest.fixture
def folder(sample_corpus: Corpus, tmp_path: Path) -> Path:
    rows = sample_corpus.picture_rows("train", style="fluent-3d")[:24].tolist()
    write_pictures(sample_corpus, rows[:16], tmp_path / "pictures")
    write_pictures(sample_corpus, rows[16:], tmp_path / "pictures" / "more")
    return tmp_path / "pictures"


def indexed(m: M6, folder: Path, place: Path) -> tuple[Index, int]:
    index = Index.open(place, folder, m.identity)
    read = index.update(m)
    index.save(place)
    return index, read


def test_a_picture_is_found_by_its_words(m: M6, sample_corpus: Corpus, folder: Path, tmp_path: Path) -> None:
    index, read = indexed(m, folder, tmp_path / "index")
    assert read == 24
    found = 0
    for path in pictures_in(folder):
        hits = index.search(m, sample_corpus.picture(int(path.stem)).zh, 3)
        assert len(hits) == 3 and hits[0].score >= hits[1].score >= hits[2].score
        found += path in [hit.path for hit in hits]
    assert found >= 20  # of 24; 3 by chance


def test_scores_weigh_the_picture_and_what_is_said_of_it(m: M6, folder: Path, tmp_path: Path) -> None:
    index, _ = indexed(m, folder, tmp_path / "index")
    query = m.embed_texts(["红色"])
    for hit in index.search(m, "红色", 99):
        seen = m.embed_images([str(hit.path)]).similarity(query)[0, 0]
        said = m.embed_texts([hit.details]).similarity(query)[0, 0]
        assert hit.score == pytest.approx((seen + 0.5 * said) / 1.5, abs=1e-5)


def test_a_model_that_has_not_learned_to_caption_searches_by_pictures_alone(
    m: M6, sample_corpus: Corpus, folder: Path, tmp_path: Path
) -> None:
    silent = copy.copy(m)
    silent.recipe = make_recipe(tasks={"contrast": 1.0})
    index, _ = indexed(silent, folder, tmp_path / "index")
    words = sample_corpus.picture(int(next(pictures_in(folder)).stem)).zh
    hits = index.search(silent, words, 99)
    seen = [m.embed_images([str(hit.path)]).similarity(m.embed_texts([words]))[0, 0] for hit in hits]
    assert {hit.details for hit in hits} == {"?"} and seen == sorted(seen, reverse=True)


def test_only_what_is_new_or_changed_is_read_again(m: M6, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "index"
    indexed(m, folder, place)
    assert indexed(m, folder, place)[1] == 0
    names = sorted(path for path in folder.glob("*.png"))
    names[0].unlink()
    shutil.copyfile(names[2], names[1])
    shutil.copyfile(names[3], folder / "new.png")
    os.utime(names[1], ns=(1, 1))
    index, read = indexed(m, folder, place)
    assert read == 2 and len(index.entries) == 24
    fresh = Index(folder, m.identity)
    fresh.update(m)
    kept = {hit.path: hit.score for hit in index.search(m, "蓝色", 99)}
    assert kept == pytest.approx({hit.path: hit.score for hit in fresh.search(m, "蓝色", 99)}, abs=1e-5)


@pytest.mark.parametrize(
    "damage", ["cut off", "a bit", "no metadata", "other entries", "other model", "other folder", "other weights"]
)
def test_an_index_that_does_not_fit_is_built_anew(
    m: M6, folder: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "index"
    indexed(m, folder, place)
    if damage == "cut off":
        (place / FILE).write_bytes((place / FILE).read_bytes()[:-9])
    elif damage == "a bit":
        content = bytearray((place / FILE).read_bytes())
        content[-5] ^= 4
        (place / FILE).write_bytes(content)
    elif damage == "no metadata":
        save_file(load_file(place / FILE), place / FILE)
    elif damage == "other entries":
        save_file(load_file(place / FILE), place / FILE, metadata_of(place) | {"entries": "[]"})
    elif damage == "other weights":
        monkeypatch.setattr(search, "TRUNK", 0.3)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    opened = Index.open(
        place, elsewhere if damage == "other folder" else folder, "x" if damage == "other model" else m.identity
    )
    assert opened.entries == [] and opened.seen is None


def metadata_of(place: Path) -> dict[str, str]:
    with safe_open(place / FILE, framework="numpy") as file:
        return dict(file.metadata())


def test_pictures_that_change_vanish_or_have_strange_names(
    m: M6, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, names = tmp_path / "index", sorted(folder.glob("*.png"))
    strange = os.fsencode(folder) + b"/" + "你好.png".encode("gbk")
    shutil.copyfile(names[0], strange)
    read = search.read_picture
    other = names[5].read_bytes()

    def reads(path: Path) -> Image.Image:
        picture = read(path)
        if path == names[1]:
            path.write_bytes(other)  # after it was read
        return picture

    monkeypatch.setattr(search, "read_picture", reads)
    index, taken = indexed(m, folder, place)
    assert taken == 24 and len(index.skipped) == 1 and "not UTF-8: rename it" in index.skipped[0]
    assert index.skipped[0].isprintable()
    monkeypatch.setattr(search, "read_picture", read)
    assert indexed(m, folder, place)[1] == 1  # the one that changed
    unchanged = search._unchanged

    def vanishes(path: Path, entry: search.Entry) -> bool:
        if path == names[2]:
            path.unlink(missing_ok=True)
        return unchanged(path, entry)

    monkeypatch.setattr(search, "_unchanged", vanishes)
    index, _ = indexed(m, folder, place)
    assert len(index.entries) == 23


def test_an_index_that_is_cut_off_goes_on_from_what_was_kept(
    m: M6, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "BATCH", 4)
    monkeypatch.setattr(search, "PAUSE", 0)
    place = tmp_path / "index"
    index = Index.open(place, folder, m.identity)

    def killed(done: int, of: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index.update(m, killed, lambda: index.save(place))
    assert list(place.iterdir()) == [place / FILE]
    opened, read = indexed(m, folder, place)
    assert read == 24 - 16 and len(opened.entries) == 24
    fresh = Index(folder, m.identity)
    fresh.update(m)
    scores = {hit.path: hit.score for hit in fresh.search(m, "蓝色", 99)}
    assert scores == pytest.approx({hit.path: hit.score for hit in opened.search(m, "蓝色", 99)}, abs=1e-5)


def test_files_that_are_no_pictures_are_passed_over_and_named(m: M6, folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"x")
    (folder / "notes.txt").write_text("x")
    index = Index(folder, m.identity)
    assert index.update(m) == 24 == len(index.entries)
    assert index.update(m) == 0
    assert len(index.skipped) == 2 and "broken.png" in index.skipped[0]


def test_a_folder_without_pictures_is_refused(m: M6, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}: no picture there"):
        Index(tmp_path, m.identity).update(m)
    (tmp_path / "broken.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no picture there \(.*broken.png"):
        Index(tmp_path, m.identity).update(m)
    with pytest.raises(UserError, match="no such folder"):
        Index(tmp_path / "nowhere", m.identity).update(m)


def test_the_contact_sheet_shows_the_pictures_in_order(m: M6, folder: Path) -> None:
    index = Index(folder, m.identity)
    index.update(m)
    hits = index.search(m, "红色", 5)
    sheet = contact_sheet(hits)
    assert sheet.width == 4 * 160 and sheet.height == 2 * 178
    cells = np.asarray(sheet)
    for place in range(8):
        cell = cells[place // 4 * 178 : place // 4 * 178 + 160, place % 4 * 160 : (place % 4 + 1) * 160]
        assert (cell.min() < 250) == (place < 5)
