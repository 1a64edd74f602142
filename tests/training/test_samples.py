"""Samples to be looked at are what the model does, and are chosen as the page says."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.training.made_checkpoint import make_checkpoints, make_image_tokenizer, make_recipe
from training import quality, samples
from training.data.corpus import Corpus
from training.data.features import augmented
from training.data.tasks.ask import KIND
from training.judge import Judge
from training.recipe import TASK_NAMES
from training.samples import Nearest, some_of_both
from training.trained import M6


@pytest.fixture(scope="module")
def painter(sample_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_tokenizer(sample_corpus, tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    ("good", "bad", "of_good", "of_bad"), [(50, 50, 6, 6), (2, 50, 2, 10), (50, 3, 9, 3), (1, 2, 1, 2)]
)
def test_right_and_wrong_ones_are_shown(good: int, bad: int, of_good: int, of_bad: int) -> None:
    right = [True] * good + [False] * bad
    chosen = some_of_both(right, 12, "key")
    assert len(set(chosen)) == len(chosen) == of_good + of_bad
    assert [right[place] for place in chosen] == [True] * of_good + [False] * of_bad
    assert chosen == some_of_both(right, 12, "key")


def test_captions_keep_their_pictures_and_count_all(sample_corpus: Corpus) -> None:
    rows = quality.picture_rows(sample_corpus, "train")[:10]
    pairs = [quality.pair_of(sample_corpus.picture(row)) for row in rows]
    said = [pair.name if place % 5 == 0 else "东西" for place, pair in enumerate(pairs)]
    sayings, count = samples.captions(pairs, said)
    assert count == (2, 10) and [one.right for one in sayings] == [True] * 2 + [False] * 8
    uris = {pair.name: samples.picture_uri(pair.image) for pair in pairs}
    assert all(one.picture == uris[one.reference] for one in sayings)


def test_questions_are_of_each_kind(small_run: M6, sample_corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_run, "answers", lambda asked: ["有" for _ in asked])
    sayings, (right, of) = samples.questions(small_run, sample_corpus, "train")
    assert len(sayings) == samples.QUESTIONS and sum(one.prompt == KIND for one in sayings) == 4
    assert 0 < right < of and {one.right for one in sayings} == {True, False}


def test_prompts_that_leave_no_room_are_passed_over(
    small_run: M6, sample_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_run, "write", lambda prompt, style: f"{prompt}{style.seed}")
    monkeypatch.setattr(small_run, "text_positions", 200)
    poems = samples.texts(small_run, sample_corpus, "test", "poem")
    assert len(poems) == samples.TEXTS and all(one.output.startswith(one.prompt) for one in poems)
    long = [len(small_run.tokenizer.encode(one.prompt)) for one in poems]
    monkeypatch.setattr(small_run, "text_positions", 2 * min(long))
    found = samples.texts(small_run, sample_corpus, "test", "poem")
    assert found and all(2 * len(small_run.tokenizer.encode(one.prompt)) <= 2 * min(long) for one in found)


def test_searches_mark_the_right_picture(small_run: M6, sample_corpus: Corpus) -> None:
    rows = quality.picture_rows(sample_corpus, "train")[:20]
    pairs = [quality.pair_of(sample_corpus.picture(row)) for row in rows]
    found = samples.searches(small_run, pairs)
    assert len(found) == samples.CHINESE + samples.ENGLISH and sum(one.query.isascii() for one in found) == 3
    for one in found:
        marks = [hit.right for hit in one.hits]
        assert marks == [place == one.rank - 1 for place in range(samples.HITS)] and 1 <= one.rank <= one.of == 20
    assert np.median([one.rank for one in found]) <= 5  # it has learned these


def test_a_training_picture_is_its_own_nearest(sample_corpus: Corpus, painter: Path) -> None:
    rows = sample_corpus.picture_rows("train")[[3, 20]]
    pictures = [sample_corpus.picture(int(row)).pil() for row in rows]
    mirrored = [augmented(picture, 1, square_side=16) for picture in pictures]  # a view that it was trained on
    for found in (Nearest(sample_corpus, painter)(pictures), Nearest(sample_corpus, painter)(mirrored)):
        assert [distance for _, distance in found] == pytest.approx([0, 0], abs=1e-3)
        same = [sample_corpus.picture(row).zh for row, _ in found]
        assert same == [sample_corpus.picture(int(row)).zh for row in rows]
    [(_, distance)] = Nearest(sample_corpus, painter)([Image.effect_noise((16, 16), 200).convert("RGB")])
    assert distance > 0.05


def test_drawings_stand_beside_their_nearest(
    sample_corpus: Corpus, painter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "DRAWINGS", 3)
    monkeypatch.setattr(samples, "OF_TRAINING", 1)
    recipe = make_recipe(sample_corpus).model_copy(
        update={"tasks": dict.fromkeys(TASK_NAMES, 1.0), "image_tokenizer": str(painter)}
    )
    make_checkpoints(tmp_path / "run" / "checkpoints", recipe, sample_corpus, 2)
    monkeypatch.setattr(samples, "JUDGED", 4)
    judge = Judge(sample_corpus.tokenizer.vocab_size).eval()
    found, figures = samples.drawings(M6.load(tmp_path / "run"), sample_corpus, "test", painter, judge)
    assert figures["n"] == 4 and 0 <= figures["drawn"]["right"] <= 1
    drawings = found["drawings"]
    held_out = {sample_corpus.picture(row).zh for row in quality.picture_rows(sample_corpus, "test")}
    assert [one.words in held_out for one in drawings] == [True, True, False]
    assert [one.trained for one in drawings] == [False, False, True]
    assert min(found["distance_held_out"], found["distance_copied"], *(one.distance for one in drawings)) >= 0
