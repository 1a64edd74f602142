"""Measures against hand-worked values and slow references that share no code with them."""

import math
from dataclasses import astuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import CHRF

from training.measures.answers import accuracy
from training.measures.bootstrap import bootstrap, bootstrap_score, paired_bootstrap, paired_bootstrap_score
from training.measures.captions import caption_scores, chrf_of, cider_d
from training.measures.images import kid, psnr, ssim
from training.measures.retrieval import retrieval

LAW = settings(deadline=None, derandomize=True, max_examples=60)
words = st.text("戒指松鼠红圆 a", min_size=1, max_size=9).filter(str.strip)


# Retrieval


def test_recall_by_hand():
    similarity = np.array([[0.9, 0.1, 0.2], [0.8, 0.3, 0.1], [0.1, 0.2, 0.4]])
    found = retrieval(similarity, ["猫", "狗", "鱼"], ["猫", "狗", "鱼"])
    assert found.image_to_text.ranks_Q.tolist() == [1, 2, 1]
    assert found.image_to_text.r1 == pytest.approx(2 / 3) and found.image_to_text.r5 == 1
    assert found.text_to_image.ranks_Q.tolist() == [1, 1, 1]
    assert found.image_to_text.hits_Q(1).tolist() == [1, 0, 1]
    assert found.image_to_text.n == 3 and found.image_to_text.chance_r10 == 1


def test_equal_captions_are_one_positive():
    # The second image finds its caption with the third text, though the second text comes later.
    similarity = np.array([[0.5, 0.1, 0.1], [0.2, 0.1, 0.9]])
    found = retrieval(similarity, ["猫", "狗"], ["猫", "狗", "狗"])
    assert found.image_to_text.ranks_Q.tolist() == [1, 1]
    assert found.text_to_image.ranks_Q.tolist() == [1, 2, 1]


def test_a_model_that_says_the_same_of_everything_finds_nothing():
    captions = [f"图{i}" for i in range(40)]
    found = retrieval(np.zeros((40, 40)), captions, captions)
    assert found.image_to_text.r10 == found.text_to_image.r10 == 0


def test_chance_is_what_random_similarities_reach():
    captions = [f"图{i // 2}" for i in range(60)]
    random = np.random.default_rng(0)
    found = [retrieval(random.random((60, 60)), captions, captions).image_to_text for _ in range(60)]
    # A standard error of about half a percent.
    assert np.mean([recall.r10 for recall in found]) == pytest.approx(found[0].chance_r10, abs=0.02)
    distinct = [str(i) for i in range(179)]
    assert retrieval(np.eye(179), distinct, distinct).image_to_text.chance_r10 == pytest.approx(10 / 179)


@LAW
@given(st.integers(0, 10_000), st.integers(1, 8))
def test_ranks_are_those_of_a_sorted_list(seed, size):
    random = np.random.default_rng(seed)
    captions = [str(random.integers(4)) for _ in range(size)]
    # Few values, so that there are ties.
    similarity = random.integers(0, 4, (size, size)) / 4
    ranks = retrieval(similarity, captions, captions).image_to_text.ranks_Q
    for i in range(size):
        order = sorted(range(size), key=lambda j: (-similarity[i, j], captions[j] == captions[i]))
        wrong_before = 0
        for j in order:
            if captions[j] == captions[i]:
                break
            wrong_before += 1
        assert ranks[i] == wrong_before + 1


@pytest.mark.parametrize(
    ("similarity", "images", "texts", "problem"),
    [
        (np.zeros((1, 2)), ["猫"], ["狗", "鱼"], "no candidate"),
        (np.zeros((2, 2)), ["猫"], ["猫", "狗"], "similarities"),
        (np.full((1, 1), np.nan), ["猫"], ["猫"], "not a number"),
    ],
)
def test_what_cannot_be_ranked_is_refused(similarity, images, texts, problem):
    with pytest.raises(ValueError, match=problem):
        retrieval(similarity, images, texts)


# Captions


def cut(text, n):
    return [text[i : i + n] for i in range(len(text) - n + 1)]


def slow_cider_d(said, references, sigma=6.0):
    """CIDEr-D as a dense vector over all n-grams of the corpus, one length at a time."""
    clean = [["".join(text.split()) for text in texts] for texts in references]
    scores = []
    for caption, of in zip(["".join(text.split()) for text in said], clean, strict=True):
        by_reference = []
        for reference in of:
            total = 0.0
            for n in (1, 2, 3, 4):
                grams = sorted({*cut(caption, n), *cut(reference, n)})
                idf = np.array(
                    [
                        math.log(len(said) / max(1, sum(any(g in text for text in texts) for texts in clean)))
                        for g in grams
                    ]
                )
                c = np.array([cut(caption, n).count(g) for g in grams]) * idf
                r = np.array([cut(reference, n).count(g) for g in grams]) * idf
                norm = np.linalg.norm(c) * np.linalg.norm(r)
                total += np.minimum(c, r) @ r / norm if norm else 0
            total *= math.exp(-((len(caption) - len(reference)) ** 2) / (2 * sigma**2))
            by_reference.append(total / 4)
        scores.append(10 * np.mean(by_reference))
    return scores


@LAW
@given(st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=3)), min_size=1, max_size=6))
def test_cider_d_agrees_with_a_slow_one(items):
    said, references = zip(*items, strict=True)
    np.testing.assert_allclose(cider_d(said, references), slow_cider_d(said, references), atol=1e-9)


def test_cider_d_by_hand():
    references = [["戒指"], ["松鼠"], ["松树"]]
    right, half, wrong = cider_d(["戒指", "松", "鱼"], references)
    # Of the four lengths two fit into a caption of two characters: perfect in both.
    assert right == pytest.approx(5.0)
    # 松 has idf ln(3/2), 鼠 ln 3; only length 1 matches, and one character is missing.
    a, b = math.log(1.5), math.log(3)
    assert half == pytest.approx(10 / 4 * a * a / (a * math.hypot(a, b)) * math.exp(-1 / 72))
    assert wrong == 0


def test_a_caption_that_repeats_itself_gains_nothing():
    references = [["戒指很漂亮"], ["松鼠"], ["红圆"]]
    once, _, _ = cider_d(["戒指很漂亮", "松鼠", "红圆"], references)
    twice, _, _ = cider_d(["戒指很漂亮戒指很漂亮", "松鼠", "红圆"], references)
    assert once == pytest.approx(10) and twice < once


def test_caption_scores_over_several_references():
    references = [["戒指", "结婚 订婚 钻戒", "ring"], ["松鼠", "squirrel"], ["红圆"]]
    scores = caption_scores(["戒指", "squirrel", "鱼"], references)
    # Exact match is with the label alone; chrF takes the reference that fits best.
    assert scores.exact_N.tolist() == [1, 0, 0] and scores.exact == pytest.approx(1 / 3)
    assert chrf_of(scores.chrf_NS).tolist() == pytest.approx([100, 100, 0])
    assert 0 < scores.chrf < 100 and scores.n == 3
    assert scores.cider == pytest.approx(scores.cider_N.mean())
    perfect = caption_scores([of[0] for of in references], references)
    assert perfect.exact == 1 and perfect.chrf == pytest.approx(100)
    with pytest.raises(ValueError, match="3 captions of 2 pictures"):
        caption_scores(["", "", ""], references[:2])
    with pytest.raises(ValueError, match="references"):
        caption_scores(["猫"], [[]])


def test_chrf_by_hand():
    # 戒指 against 戒子: one of two characters, no bigram; orders 1 and 2 count, longer ones do not exist.
    scores = caption_scores(["戒指"], [["戒子"]])
    assert scores.chrf == pytest.approx(100 * (0.5 + 0) / 2)


@LAW
@given(st.lists(st.tuples(words | st.just(""), st.lists(words, min_size=1, max_size=3)), min_size=1, max_size=6))
def test_chrf_is_that_of_sacrebleu(pairs):
    said, references = [caption for caption, _ in pairs], [of for _, of in pairs]
    found = caption_scores(said, references)
    streams = [[of[i] if i < len(of) else None for of in references] for i in range(3)]
    assert found.chrf == pytest.approx(CHRF().corpus_score(said, streams).score, abs=1e-9)
    each = [CHRF().sentence_score(caption, of).score for caption, of in pairs]
    assert chrf_of(found.chrf_NS).tolist() == pytest.approx(each, abs=1e-9)


def test_several_references_of_one_picture_make_an_ngram_no_commoner():
    repeated = cider_d(["猫狗", "鱼"], [["猫狗", "猫狗"], ["鱼"]])
    np.testing.assert_allclose(repeated, [5.0, 2.5])


# Answers


def test_accuracy_beside_the_majority_answer():
    found = accuracy(["是", "是", "否", "否"], ["是", "否", "否", "否"])
    assert (found.accuracy, found.majority, found.majority_answer, found.n) == (0.75, 0.75, "否", 4)
    assert found.right_N.tolist() == [1, 0, 1, 1]
    for said, true in ([], []), (["是"], ["是", "否"]):
        with pytest.raises(ValueError, match="questions"):
            accuracy(said, true)


# Bootstrap


def test_the_interval_holds_the_truth_as_often_as_it_says():
    random, held = np.random.default_rng(0), 0
    for seed in range(200):
        values = (random.random(80) < 0.3).astype(float)
        interval = bootstrap(values, [str(i) for i in range(80)], seed=seed, resamples=400)
        assert interval.value == values.mean()
        held += interval.low <= 0.3 <= interval.high
    assert 178 <= held <= 199  # 95 %, four standard errors and the percentile interval's own shortfall


def test_families_are_drawn_whole():
    """Ten copies of each query in a family of its own tell no more than one: the interval stays as wide."""
    values = np.random.default_rng(0).random(50)
    names = [str(i) for i in range(50)]
    once = bootstrap(values, names)
    copies = bootstrap(np.repeat(values, 10), list(np.repeat(names, 10)))
    independent = bootstrap(np.repeat(values, 10), [str(i) for i in range(500)])
    assert copies.high - copies.low == pytest.approx(once.high - once.low, rel=0.05)
    assert independent.high - independent.low < 0.5 * (once.high - once.low)


def test_weighted_mean_is_bits_over_characters():
    interval = bootstrap(np.array([10.0, 30.0]), ["a", "b"], np.array([5, 5]))
    assert (interval.value, interval.low, interval.high) == (4.0, 2.0, 6.0)


def test_a_score_of_sums_is_scored_after_resampling():
    # Of two families one is drawn twice, or each once: the root of 9 + 9, 9 + 16 or 16 + 16.
    interval = bootstrap_score(lambda sums: np.sqrt(sums[..., 0]), np.array([[9.0], [16.0]]), ["a", "b"])
    assert (interval.value, interval.low, interval.high) == (5.0, np.sqrt(18), np.sqrt(32))
    first, second = np.array([[4.0], [9.0]]), np.array([[0.0], [0.0]])
    paired = paired_bootstrap_score(lambda sums: sums[..., 0], first, second, ["a", "b"])
    assert (paired.difference, paired.low, paired.high, paired.not_better) == (13.0, 8.0, 18.0, 0.0)


def test_paired_systems_share_their_resamples():
    """Two systems that differ by a constant differ by it in every resample, however much both vary."""
    values = np.random.default_rng(0).random(40)
    families = [str(i // 2) for i in range(40)]
    better = paired_bootstrap(values + 0.01, values, families)
    assert (better.difference, better.low, better.high) == pytest.approx((0.01, 0.01, 0.01)) and better.not_better == 0
    worse = paired_bootstrap(values, values + 0.01, families)
    assert worse.difference == pytest.approx(-0.01) and worse.not_better == 1
    assert paired_bootstrap(values, values, families).not_better == 1  # equal is not better


def test_the_share_not_better_is_the_probability_of_a_drawn_difference():
    # Four families, one of which the first wins and none of which it loses: a tie if that one is never drawn.
    paired = paired_bootstrap(np.array([1.0, 0, 0, 0]), np.zeros(4), list("abcd"), resamples=20_000)
    assert paired.not_better == pytest.approx(0.75**4, abs=0.015)


def test_seeds_repeat_and_chunks_do_not_matter(monkeypatch):
    values, families = np.random.default_rng(0).random(30), [str(i) for i in range(30)]
    first = bootstrap(values, families, seed=1)
    assert first == bootstrap(values, families, seed=1) != bootstrap(values, families, seed=2)
    monkeypatch.setattr("training.measures.bootstrap.CELLS", 100)
    # Matrix products of other sizes add in another order on some processors.
    assert astuple(bootstrap(values, families, seed=1)) == pytest.approx(astuple(first), rel=1e-12)


def test_what_cannot_be_resampled_is_refused():
    with pytest.raises(ValueError, match="0 queries"):
        bootstrap(np.array([]), [])
    with pytest.raises(ValueError, match="1 values, 2 weights of 2 queries"):
        paired_bootstrap(np.ones(2), np.ones(1), ["a", "b"])
    with pytest.raises(ValueError, match="weight"):
        bootstrap(np.ones(2), ["a", "b"], np.array([1, 0]))


# Images


def pictures(seed=0, count=2, side=16):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_psnr_by_hand():
    black, gray = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.1)
    torch.testing.assert_close(psnr(gray, black), torch.tensor([20.0, 20.0]))
    assert psnr(black, black).tolist() == [math.inf, math.inf]


def slow_ssim(x, y):
    """Window by window, pixel by pixel weights, of one plane."""
    place = np.arange(11) - 5
    gauss = np.exp(-(place[:, None] ** 2 + place[None] ** 2) / (2 * 1.5**2))
    gauss /= gauss.sum()
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
            ma, mb = (gauss * a).sum(), (gauss * b).sum()
            va, vb = (gauss * (a - ma) ** 2).sum(), (gauss * (b - mb) ** 2).sum()
            cov = (gauss * (a - ma) * (b - mb)).sum()
            c1, c2 = 0.01**2, 0.03**2
            values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return np.mean(values)


def test_ssim_agrees_with_a_slow_one():
    x, y = pictures(0), (pictures(0) + 0.3 * pictures(1)).clamp(max=1)
    expected = [
        np.mean([slow_ssim(a.numpy(), b.numpy()) for a, b in zip(p, q, strict=True)]) for p, q in zip(x, y, strict=True)
    ]
    np.testing.assert_allclose(ssim(x, y), expected, rtol=1e-5)


def test_ssim_of_flat_and_equal_pictures():
    x = pictures()
    torch.testing.assert_close(ssim(x, x), torch.ones(2))
    # Without structure only the luminance term is left.
    flat = ssim(torch.full((1, 3, 11, 11), 0.2), torch.full((1, 3, 11, 11), 0.4))
    assert flat.item() == pytest.approx((2 * 0.2 * 0.4 + 1e-4) / (0.2**2 + 0.4**2 + 1e-4), rel=1e-5)


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_images_of_another_scale_or_shape_are_refused(measure):
    with pytest.raises(ValueError, match="outside"):
        measure(pictures() * 255, pictures())
    with pytest.raises(ValueError, match="the same NCHW"):
        measure(pictures(count=1), pictures())
    with pytest.raises(ValueError, match="11 a side"):
        ssim(pictures(side=8), pictures(side=8))


def test_kid_is_the_mean_over_pairs():
    x, y = np.random.default_rng(0).random((5, 4)), np.random.default_rng(1).random((6, 4))

    def kernel(a, b):
        return (a @ b / 4 + 1) ** 3

    within_x = np.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    within_y = np.mean([kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    between = np.mean([kernel(a, b) for a in x for b in y])
    assert kid(torch.tensor(x), torch.tensor(y)) == pytest.approx(within_x + within_y - 2 * between)


def draw(seed):
    return torch.randn(50, 8, generator=torch.Generator().manual_seed(seed))


def test_kid_is_unbiased_and_sees_a_shift():
    same = [kid(draw(2 * seed), draw(2 * seed + 1)) for seed in range(100)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 10 and min(same) < 0
    assert kid(draw(0), draw(1) + 1) > 10 * np.std(same)
    with pytest.raises(ValueError, match="two in each"):
        kid(draw(0)[:1], draw(1))
