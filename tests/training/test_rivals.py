"""The rivals against slow references, and on the sample corpus."""

import io
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data_sample import draw, sample_pictures
from training.data.tasks.contrast import picture_words
from training.measures.retrieval import retrieval
from training.rivals.ngram import CharacterNgram
from training.rivals.ridge import FLAGS, PooledFeatures, RidgeRetriever, fit, pooled_features

LAW = settings(deadline=None, derandomize=True, max_examples=40)
LETTERS = "abcdefgh"
# Long ones of few letters have n-grams of all counts, as the discounts need them.
TEXTS = st.lists(st.text("abc", max_size=60), min_size=1, max_size=6)


# The n-gram


class SlowNgram:
    """The definition, n-gram by n-gram (Chen and Goodman 1999)."""

    def __init__(self, texts, order, ends, alphabet):
        self.order, self.ends, self.floor = order, ends, 1 / (alphabet + ends)
        runs = [["<", *text, *([">"] if ends else [])] for text in texts]
        self.seen = Counter(
            tuple(run[i : i + n]) for run in runs for n in range(1, order + 1) for i in range(len(run) - n + 1)
        )
        self.counts = {gram: self.count(gram) for gram in self.seen}

    def count(self, gram):
        if gram == ("<",):
            return 0
        if len(gram) == self.order or gram[0] == "<":
            return self.seen[gram]
        return sum(longer[1:] == gram for longer in self.seen)

    def discount(self, order, count):
        n1, n2, n3, n4 = (sum(len(g) == order and c == k for g, c in self.counts.items()) for k in (1, 2, 3, 4))
        taken = (0, 0.5, 1, 1.5)
        if n1 and n2 and n3 and n4:
            y = n1 / (n1 + 2 * n2)
            found = (0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
            taken = found if min(found) >= 0 else taken
        return taken[min(count, 3)]

    def chance(self, symbol, context):
        lower = self.chance(symbol, context[1:]) if context else self.floor
        followers = {g: c for g, c in self.counts.items() if len(g) == len(context) + 1 and g[:-1] == context}
        total = sum(followers.values())
        if not total:
            return lower
        left = sum(self.discount(len(g), c) for g, c in followers.items())
        own = followers.get((*context, symbol), 0)
        return (own - self.discount(len(context) + 1, own) + left * lower) / total

    def bits(self, text):
        run = ("<", *text, *([">"] if self.ends else []))
        return [-math.log2(self.chance(run[i], run[max(0, i - self.order + 1) : i])) for i in range(1, len(run))]


@LAW
@given(TEXTS, st.text("abcd", max_size=8), st.integers(1, 5), st.booleans())
def test_ngram_agrees_with_its_definition(texts, text, order, ends):
    fast = CharacterNgram(texts, order, ends, alphabet=8).symbol_bits(text)
    np.testing.assert_allclose(fast, SlowNgram(texts, order, ends, 8).bits(text), rtol=1e-9, atol=1e-9)


@LAW
@given(TEXTS, st.text("abcd", max_size=8), st.integers(1, 5), st.booleans())
def test_probabilities_add_up_to_one(texts, before, order, ends):
    """Whatever came before, over all characters of the alphabet, five of them unseen, and the end."""
    model = CharacterNgram(texts, order, ends, alphabet=len(LETTERS))
    total = sum(2 ** -model.symbol_bits(before + letter)[len(before)] for letter in LETTERS)
    if ends:
        total += 2 ** -model.symbol_bits(before)[-1]
    assert total == pytest.approx(1, abs=1e-9)


def test_texts_do_not_run_into_each_other():
    model = CharacterNgram(["春眠不觉晓", "处处闻啼鸟", "夜来风雨声"])
    texts = ["春眠", "", "鸟声"]
    np.testing.assert_allclose(model.bits(texts), [model.symbol_bits(text).sum() for text in texts])
    assert model.bits_per_character(texts) == pytest.approx(model.bits(texts).sum() / 4)


def test_noise_costs_its_entropy_and_what_was_learnt_by_heart_nothing():
    random = np.random.default_rng(0)
    noise = ["".join(random.choice(list("abcd"), 2000)) for _ in range(12)]
    model = CharacterNgram(noise[:10], ends=False)
    assert 2 <= model.bits_per_character(noise[10:]) < 2.1
    refrain = CharacterNgram(["白日依山尽黄河入海流" * 50])
    assert refrain.bits_per_character(["日依山尽黄河入海流白" * 50]) < 0.1


def test_more_context_helps_on_held_out_poems(sample_corpus):
    train, test = (
        [sample_corpus.text(row).text for row in sample_corpus.text_rows(split, "poem")] for split in ("train", "test")
    )
    bits = [CharacterNgram(train, order).bits_per_character(test) for order in (1, 2, 5)]
    assert bits[0] > bits[1] + 1 and bits[1] > bits[2]


def test_any_text_has_a_probability():
    model = CharacterNgram(["红豆生南国"])
    assert np.isfinite(model.bits(["🐿", "\ud800", "\0", "", "abc"])).all()
    assert np.isfinite(CharacterNgram([]).bits(["红"])).all()
    with pytest.raises(ValueError, match="5 characters in an alphabet of 4"):
        CharacterNgram(["红豆生南国"], alphabet=4)


# The retriever


@pytest.fixture(scope="module")
def features(sample_corpus, tmp_path_factory):
    return pooled_features(sample_corpus, tmp_path_factory.mktemp("features"))


def test_held_out_pictures_find_their_words(sample_corpus, features):
    """Colours and shapes are known from training, their combinations are not."""
    train, rest = (
        np.concatenate([sample_corpus.picture_rows(split) for split in splits])
        for splits in (("train",), ("validation", "test"))
    )
    names = [picture_words(sample_corpus.picture(row)) for row in range(len(features))]
    # A penalty of as many observations as there are, as 3000 is for the whole corpus.
    retriever = RidgeRetriever(features[train], [names[row] for row in train], ridge=len(train))
    held_out = [names[row] for row in rest]
    found = retrieval(retriever.similarity(features[rest], held_out), held_out, held_out)
    for recall in (found.image_to_text, found.text_to_image):
        assert recall.r1 > 3 / len(set(held_out))


def test_ridge_is_the_least_squares_solution():
    """Against the same problem with the penalty as further rows, and TF-IDF written out."""
    random = np.random.default_rng(0)
    x = random.normal(2, 3, (30, 5)).astype(np.float32)
    captions = [" ".join(random.choice(["红", "圆", "Ab"], 2)) for _ in x]
    retriever = RidgeRetriever(x, captions, ridge=7.0)
    standard = (x - x.mean(0)) / x.std(0)
    targets = retriever.text_vectors(captions)
    rows = np.concatenate([standard, math.sqrt(7.0) * np.eye(5)])
    weights, *_ = np.linalg.lstsq(rows, np.concatenate([targets, np.zeros((5, targets.shape[1]))]), rcond=None)
    np.testing.assert_allclose(retriever.weights_DV, weights, atol=1e-4)
    predicted = standard @ weights
    cosines = predicted @ targets.T / np.linalg.norm(predicted, axis=1, keepdims=True)
    np.testing.assert_allclose(retriever.similarity(x, captions), cosines, atol=1e-4)


def test_rare_words_weigh_more():
    retriever = RidgeRetriever(np.eye(3, dtype=np.float32), ["红圆", "红 红", "蓝"])
    common, rare = (math.log(4 / (1 + count)) + 1 for count in (2, 1))
    vector = retriever.text_vectors(["红红蓝马"])[0]
    weights = {gram: vector[column] for gram, column in retriever.vocabulary.items() if vector[column]}
    length = math.hypot((1 + math.log(2)) * common, rare)
    assert weights == pytest.approx({"红": (1 + math.log(2)) * common / length, "蓝": rare / length})
    assert not retriever.text_vectors(["马"]).any()


class Album:
    """What `fit` asks of a corpus."""

    def __init__(self, pictures, imported=False):
        self.pictures, self.imported = pictures, imported

    def picture_rows(self, split):
        return np.array([row for row, picture in enumerate(self.pictures) if picture.split == split])

    def picture(self, row):
        return self.pictures[row]


def test_flags_and_other_splits_are_left_out():
    pictures = [replace(picture, group=FLAGS if "红" in picture.zh else picture.group) for picture in sample_pictures()]
    features = np.random.default_rng(0).random((len(pictures), 3), np.float32)
    retriever = fit(Album(pictures), features, ["train", "validation"])
    kept = [row for row, p in enumerate(pictures) if p.split != "test" and p.group != FLAGS]
    np.testing.assert_allclose(retriever.mean_D, features[kept].mean(0), rtol=1e-5)
    assert "红" not in retriever.vocabulary and "蓝" in retriever.vocabulary
    # A stranger's flags may be what is sold.
    assert "红" in fit(Album(pictures, imported=True), features, ["train", "validation"]).vocabulary


def test_features_are_those_of_the_pictures(sample_corpus, features):
    network = PooledFeatures(sample_corpus.feature_network)
    assert features.shape == (len(sample_corpus.pictures), 1280) and features.dtype == np.float32
    for row in (0, 50, 89):
        alone = network([sample_corpus.picture(row).pil()])[0]
        # Sums in another order for another batch size.
        np.testing.assert_allclose(features[row], alone, rtol=1e-3, atol=1e-4)
    transparent = Image.open(io.BytesIO(draw("ring", "#d33"))).convert("LA")
    assert network([transparent, Image.new("RGBA", (3, 40))]).shape == (2, 1280)


def test_features_are_computed_once(sample_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(PooledFeatures, "__call__", lambda self, images: np.ones((len(images), 2), np.float32))
    first = pooled_features(sample_corpus, tmp_path / "cache")
    monkeypatch.setattr(PooledFeatures, "__call__", None)
    np.testing.assert_array_equal(pooled_features(sample_corpus, tmp_path / "cache"), first)
    (file,) = (tmp_path / "cache").iterdir()
    assert sample_corpus.fingerprint[:16] in file.name
