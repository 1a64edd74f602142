import json
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from tests.data_sample import build_sample
from training.data import corpus
from training.data.corpus import Corpus
from training.errors import UserError


@pytest.fixture
def copy(sample_corpus, tmp_path):
    shutil.copytree(sample_corpus.folder, tmp_path / corpus.FOLDER)
    return tmp_path


def test_rows_and_columns_agree(sample_corpus):
    assert sample_corpus.features.shape == (len(sample_corpus.pictures), 4, 16, 1280)
    assert sample_corpus.features.dtype == np.float16
    row = sample_corpus.picture(5)
    assert row.zh == sample_corpus.pictures[5]["zh"] and row.tags == sample_corpus.pictures[5]["tags"]
    assert isinstance(row.pil(), Image.Image) and row.pil().mode == "RGB"
    assert sample_corpus.text(7).text == sample_corpus.texts[7]["text"]


def test_row_selection(sample_corpus):
    splits = sample_corpus.pictures["split"]
    rows = sample_corpus.picture_rows("validation", source="A", style="fluent-3d")
    assert rows.dtype == np.int64 and len(rows)
    assert all(splits[row] == "validation" and sample_corpus.picture(row).source == "A" for row in rows)
    poems, reviews = (sample_corpus.text_rows("train", kind) for kind in ("poem", "review"))
    assert sorted([*poems, *reviews]) == sample_corpus.text_rows("train").tolist()
    with pytest.raises(AssertionError, match="colour"):
        sample_corpus.picture_rows("train", colour="red")


def test_families_do_not_cross_splits(sample_corpus):
    splits = {}
    for row in range(len(sample_corpus.pictures)):
        item = sample_corpus.picture(row)
        assert splits.setdefault(item.family, item.split) == item.split


def test_every_item_has_source_and_licence(sample_corpus):
    for table in (sample_corpus.pictures, sample_corpus.texts):
        assert all(table["source"]) and all(table["licence"])


def test_building_again_gives_the_same_corpus(sample_corpus, tmp_path):
    again = build_sample(tmp_path)
    assert again.fingerprint == sample_corpus.fingerprint
    assert again.manifest["files"].keys() == sample_corpus.manifest["files"].keys()
    np.testing.assert_allclose(again.features, sample_corpus.features, rtol=2e-3, atol=2e-3)


def test_opens_at_once(sample_corpus):
    start = time.perf_counter()
    Corpus.open(sample_corpus.folder.parent)
    assert time.perf_counter() - start < 1


def test_rows_are_quick(sample_corpus):
    start = time.perf_counter()
    for row in range(1000):
        sample_corpus.text(row % len(sample_corpus.texts))
    # About 20 ms when idle; the bound only tells it from milliseconds a row.
    assert time.perf_counter() - start < 1


def test_missing_corpus_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"no corpus there; run `m6 data fetch --dir"):
        Corpus.open(tmp_path)


def test_damage_is_found(copy):
    path = copy / corpus.FOLDER / corpus.FEATURES
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    opened = Corpus.open(copy)
    with pytest.raises(UserError, match=r"features.npy: damaged"):
        opened.verify()
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"features.npy: missing or of the wrong size"):
        Corpus.open(copy)
    path.unlink()
    with pytest.raises(UserError, match=r"features.npy: missing"):
        Corpus.open(copy)


@pytest.mark.parametrize(("text", "message"), [("{", "damaged"), ("[]", "damaged"), ('{"format": 99}', "format 99")])
def test_manifests_that_cannot_be_read(copy, text, message):
    (copy / corpus.FOLDER / corpus.MANIFEST).write_text(text)
    with pytest.raises(UserError, match=message):
        Corpus.open(copy)


def test_manifest_says_what_is_in_it(sample_corpus):
    manifest = json.loads((sample_corpus.folder / corpus.MANIFEST).read_text())
    assert sum(manifest["pictures"]["A"].values()) == 60 and sum(manifest["pictures"]["C"].values()) == 30
    assert manifest["tokenizer_sha256"] == sample_corpus.tokenizer.sha256
    sample_corpus.verify()


@pytest.mark.parametrize(
    "change",
    [{"files": None}, {"files": ["a"]}, {"files": {}}, {"files": {"tokenizer.model": {}}}, {"fingerprint": None}],
)
def test_a_manifest_that_lacks_something_is_damaged(copy, change):
    manifest_path = copy / corpus.FOLDER / "manifest.json"
    manifest = json.loads(manifest_path.read_text())
    manifest_path.write_text(json.dumps(manifest | change))
    with pytest.raises(UserError, match=r"manifest.json: damaged .*m6 data fetch"):
        Corpus.open(copy)


def test_features_are_standardised_over_the_training_pictures(sample_corpus):
    own = np.asarray(sample_corpus.features[sample_corpus.picture_rows("train")], np.float64)
    spread = own.std((0, 1, 2))
    assert abs(own.mean((0, 1, 2))).max() < 2e-3
    fires = spread > 0.5  # a channel may be silent in a small sample
    assert fires.mean() > 0.9 and abs(spread[fires] - 1).max() < 0.05
