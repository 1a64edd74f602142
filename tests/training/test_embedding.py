"""What pictures and texts are found by adds up to a weighted mean of cosines, sparse words and all."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.bags import Bags
from model.contrast import embed
from tests.model.samples import TINY
from tests.training.small_run import write_pictures
from training.data.corpus import Corpus
from training.data.tasks.contrast import picture_words, word_rarity
from training.embedding import ASKED, BAG, CALLED, TRUNK, Embeddings, standard_scores
from training.trained import M6

LAW = settings(deadline=None, derandomize=True, max_examples=40)
VOCAB = 30


def made(count: int, seed: int) -> Embeddings:
    random = np.random.default_rng(seed)
    words = np.stack([random.permutation(VOCAB)[:6] for _ in range(count)]).astype(np.int32).reshape(count, 6)
    words[random.random(words.shape) < 0.3] = -1
    return Embeddings(
        random.standard_normal((count, 4)).astype(np.float32), words, random.random(words.shape).astype(np.float32)
    )


def dense(embeddings: Embeddings) -> np.ndarray:
    spread = np.zeros((len(embeddings), VOCAB))
    for row, (words, weights) in enumerate(zip(embeddings.words_NW, embeddings.weights_NW, strict=True)):
        for word, weight in zip(words, weights, strict=True):
            if word >= 0:
                spread[row, word] += weight
    return np.concatenate((embeddings.vectors_ND, spread), 1)


@LAW
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_similarities_are_products_of_what_is_kept(count: int, others: int, seed: int) -> None:
    one, other = made(count, seed), made(others, seed + 1)
    before = dense(one)
    np.testing.assert_allclose(one.similarity(other), dense(one) @ dense(other).T, atol=1e-5)
    np.testing.assert_allclose(one.similarity(other).T, other.similarity(one), atol=1e-5)
    np.testing.assert_array_equal(dense(one), before)


def test_parts_are_joined_and_taken_out_in_order() -> None:
    whole = Embeddings.joined([made(3, 1), made(2, 2)])
    assert len(whole) == 5
    np.testing.assert_array_equal(dense(whole[[4, 0]]), np.stack((dense(made(2, 2))[1], dense(made(3, 1))[0])))
    narrow = Embeddings(made(2, 3).vectors_ND, made(2, 3).words_NW[:, :2], made(2, 3).weights_NW[:, :2])
    joined = dense(Embeddings.joined([narrow, made(3, 1)]))
    np.testing.assert_array_equal(joined, np.concatenate((dense(narrow), dense(made(3, 1)))))
    assert len(Embeddings.joined([])) == 0 and Embeddings.joined([]).similarity(made(3, 1)).shape == (0, 3)


def test_a_pictures_score_is_a_weighted_mean_of_four_cosines(
    small_run: M6, sample_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = sample_corpus.picture_rows("train")[:5].tolist()
    paths = write_pictures(sample_corpus, rows, tmp_path_factory.mktemp("pictures"))
    texts = [picture_words(sample_corpus.picture(row)) for row in rows]
    assert small_run.features
    m, tokenizer, rarity = small_run, sample_corpus.tokenizer, word_rarity(sample_corpus)
    images, words = m.embed_images(paths), m.embed_texts(texts)
    width = m.shape.hidden
    trunk = (images.vectors_ND @ words.vectors_ND.T) - images.vectors_ND[:, width:] @ words.vectors_ND[:, width:].T
    bag = images.vectors_ND[:, width:] @ words.vectors_ND[:, width:].T
    np.testing.assert_allclose(np.linalg.norm(images.vectors_ND[:, :width], axis=1), TRUNK**0.5, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(images.vectors_ND[:, width:], axis=1), BAG**0.5, rtol=1e-5)
    vocab = tokenizer.vocab_size
    features = torch.cat([m.features([sample_corpus.picture(row).pil()]) for row in rows])
    logs = (m.network.bags.image(features.mean(1)) @ m.network.bags.words.weight.T).log_softmax(-1)
    own = np.zeros((len(texts), vocab))
    for text, line in zip(texts, own, strict=True):
        for word in tokenizer.words(text):
            line[word] = rarity.get(word, 0)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    average = (m.network.bags.words.weight @ m.network.bags.image.bias).softmax(-1)
    called = np.clip(np.sqrt(logs.exp().numpy()) - np.sqrt(average.numpy()), 0, None)
    called /= np.linalg.norm(called, axis=1, keepdims=True)
    asked = embed(m.network.bags.asked_image(features.mean(1)) @ m.network.bags.asked_words.weight.T).numpy()
    both = CALLED * called + ASKED * asked
    kept = both >= np.sort(both, axis=1)[:, [-256]]
    expected = trunk + bag + (both * kept) @ own.T
    np.testing.assert_allclose(images.similarity(words), expected, atol=1e-4)
    assert pytest.approx(1) == TRUNK + BAG + CALLED + ASKED


def test_a_text_that_is_near_to_all_pictures_fits_none_the_better(
    small_run: M6, sample_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = sample_corpus.picture_rows("train")[:7].tolist()
    paths = write_pictures(sample_corpus, rows, tmp_path_factory.mktemp("pictures"))
    texts = [picture_words(sample_corpus.picture(row)) for row in rows]
    found = small_run.compare(paths, texts)
    usual_rows = sample_corpus.picture_rows("train").tolist()  # fewer than are taken
    usual = write_pictures(sample_corpus, usual_rows, tmp_path_factory.mktemp("usual"))
    own, others = (small_run.embed_images(some).similarity(small_run.embed_texts(texts)) for some in (paths, usual))
    np.testing.assert_allclose(found, (own - others.mean(0)) / others.std(0), atol=0.05)
    np.testing.assert_array_equal(np.argsort(found, 0), np.argsort(own, 0))  # the best picture of a text stays the best


@LAW
@given(st.integers(2, 9), st.integers(1, 5), st.floats(0.1, 9), st.floats(-5, 5), st.integers(0, 99))
def test_standard_scores_forget_how_near_a_text_is_to_all(
    k: int, m: int, scale: float, shift: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    similarity, usual = random.standard_normal((4, m)), random.standard_normal((k, m))
    scores = standard_scores(similarity, usual)
    np.testing.assert_allclose(standard_scores(similarity * scale + shift, usual * scale + shift), scores, atol=1e-6)
    np.testing.assert_allclose(standard_scores(usual, usual).mean(0), 0, atol=1e-6)
    assert np.isfinite(standard_scores(similarity, usual * 0)).all()


def test_a_model_without_bags_goes_by_its_trunk() -> None:
    trunk = torch.randn(4, 8)
    found = Embeddings.of(trunk, None)
    np.testing.assert_allclose(found.similarity(found), embed(trunk) @ embed(trunk).T, atol=1e-6)


def test_words_that_were_never_taught_count_for_nothing(sample_corpus: Corpus) -> None:
    bags = Bags(dataclasses.replace(TINY, bag_width=4, text_vocab=sample_corpus.tokenizer.vocab_size), 1)
    bags.requires_grad_(False)
    bag = bags(torch.zeros(2, 1, dtype=torch.int64), torch.tensor([1, 1]), torch.zeros(2, 1, TINY.image_channels),
               torch.zeros(2, dtype=torch.bool))  # fmt: skip
    rarity = {word: 2.0 for word in sample_corpus.tokenizer.words("红色")}
    found = Embeddings.of(torch.ones(2, 3), bag).saying(["红色", "𓀀𪚥"], sample_corpus.tokenizer, rarity)
    assert set(found.words_NW[0][found.words_NW[0] >= 0]) == set(rarity)
    assert np.linalg.norm(found.weights_NW[0]) == pytest.approx((CALLED + ASKED) ** 0.5)
    assert (found.words_NW[1] == -1).all() and (found.weights_NW[1] == 0).all()
