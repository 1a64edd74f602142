"""The judge learns what pictures show from pixels alone, is trained once, and its figures are those of a law."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import judge as judging
from training import quality
from training.data.corpus import Corpus
from training.data.tasks.contrast import word_rarity
from training.judge import judge_of


def test_it_tells_the_words_of_pictures_and_is_kept(
    sample_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "EPOCHS", 100)  # of few pictures
    told: list[tuple[int, int]] = []
    judge = judge_of(sample_corpus, tmp_path, lambda done, of: told.append((done, of)))
    assert told and told[-1][0] == told[-1][1]
    rows = quality.picture_rows(sample_corpus, "train")[:20]
    pairs = [quality.pair_of(sample_corpus.picture(row)) for row in rows]
    images, texts = [pair.image for pair in pairs], [pair.words for pair in pairs]
    found = judge.similarity(images, texts, sample_corpus.tokenizer, word_rarity(sample_corpus))
    right = found >= found.diagonal()[:, None]
    assert np.median(right.sum(1)) <= 5  # of 20; it has seen these
    monkeypatch.setattr(judging, "train_judge", None)  # it is there
    again = judge_of(sample_corpus, tmp_path)
    np.testing.assert_array_equal(
        again.similarity(images, texts, sample_corpus.tokenizer, word_rarity(sample_corpus)), found
    )


def test_a_damaged_judge_is_trained_again(sample_corpus: Corpus, tmp_path: Path) -> None:
    judge_of(sample_corpus, tmp_path)
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    judge_of(sample_corpus, tmp_path)
    assert path.read_bytes() == whole


def made_pairs(count: int) -> list[quality.Pair]:
    image = Image.new("RGB", (4, 4))
    return [quality.Pair(image, f"{n}", f"{n}", [], f"family {n // 2}", "") for n in range(count)]


@pytest.mark.parametrize("sight", ["sharp", "blind", "lying"])
def test_drawings_are_told_as_well_as_the_judge_sees(sight: str) -> None:
    pairs = made_pairs(40)
    random = np.random.default_rng(0)

    def similarity(pictures: list[Image.Image], texts: list[str]) -> np.ndarray:
        same = np.eye(len(pictures), dtype=np.float32)
        return {"sharp": same, "blind": np.zeros_like(same), "lying": -same}[sight] + 1e-3 * random.random(same.shape)

    images = [pair.image for pair in pairs]
    found = quality.measure_drawings(similarity, images, images, pairs)
    assert found["n"] == 40 and found["choices"] == 10
    right = {who: found[who]["right"] for who in ("drawn", "own_codes", "real_pictures")}
    if sight == "sharp":
        assert set(right.values()) == {1.0} and found["shuffled"]["right"] < 0.35
        assert found["above_shuffled"]["low"] > 0.5
    elif sight == "lying":
        assert set(right.values()) == {0.0}
    else:
        assert all(0 <= one < 0.35 for one in [*right.values(), found["shuffled"]["right"]])


def test_what_a_drawing_is_told_from_is_of_other_families() -> None:
    families = [pair.family for pair in made_pairs(12)]
    for place in range(12):
        first, *others = quality._choices(place, families)
        assert first == place and len({*others}) == 9
        assert all(families[other] != families[place] for other in others)


def test_equal_scores_are_not_told() -> None:
    """Ties never help."""
    images = [pair.image for pair in made_pairs(12)]
    found = quality.measure_drawings(
        lambda pictures, texts: np.ones((len(pictures), len(texts))), images, images, made_pairs(12)
    )
    assert found["drawn"]["right"] == found["shuffled"]["right"] == 0
