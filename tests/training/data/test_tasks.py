from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.corpus import Corpus
from training.data.order import random_at
from training.data.tasks import TASKS, View
from training.data.tasks.ask import KIND, WHAT, plain_questions
from training.data.tasks.ask import NO as THERE_IS_NONE
from training.data.tasks.ask import YES as THERE_IS
from training.data.tasks.caption import ASK_ENGLISH, ASK_NAME, ASK_TAGS, Caption, full_text
from training.data.tasks.contrast import picture_words
from training.data.tasks.denoise import MASKED_SHARE, mask_spans, window
from training.data.tasks.draw import WORDLESS, draw_prompt
from training.data.tasks.inpaint import REFERENCE, random_mask
from training.data.tasks.match import NO, YES, match_question
from training.data.tasks.writing import poem_prompt, review_prompt
from training.errors import UserError

LAW = settings(deadline=None, derandomize=True)
MASK = -1
SPLITS = ("train", "validation")
PICTURED = ("ask", "caption", "contrast", "draw", "image_denoise", "inpaint", "match")


@pytest.fixture(scope="module")
def drawn_corpus(sample_corpus):
    """The sample with its pictures as codes of a made-up tokenizer: 16 of 200 each."""
    corpus = Corpus.open(sample_corpus.folder.parent)
    corpus.codes = np.random.default_rng(0).integers(0, 200, (len(corpus.pictures), 4, 16)).astype(np.uint16)
    return corpus


@pytest.fixture(scope="module")
def tasks(drawn_corpus):
    return {(name, split): task(drawn_corpus, split) for name, task in TASKS.items() for split in SPLITS}


def spans(masked, tokens):
    """The masked stretches [(start, stop)] of `tokens`, which must be all different."""
    where = {token: place for place, token in enumerate(tokens)}
    kept = [-1, *(where[token] for token in masked if token != MASK), len(tokens)]
    return [(before + 1, after) for before, after in pairwise(kept) if after > before + 1]


@LAW
@given(st.integers(1, 400), st.integers(0, 2**32), st.sampled_from([MASKED_SHARE, 2 * MASKED_SHARE]))
def test_spans_are_masked(length, seed, share):
    tokens = list(range(length))
    masked = mask_spans(tokens, MASK, random_at(seed, 0), share)
    found = spans(masked, tokens)
    # The rounded share, in spans with one mask each: since none touch, as many masks as stretches are missing.
    assert sum(stop - start for start, stop in found) == max(1, round(share * length))
    assert masked.count(MASK) == len(found)
    assert all(one != MASK or other != MASK for one, other in pairwise(masked))
    restored = []
    stretches = iter(found)
    for token in masked:
        restored += range(*next(stretches)) if token == MASK else [token]
    assert restored == tokens


def test_spans_stand_anywhere_and_are_about_three_long():
    tokens, starts, lengths = list(range(100)), [], []
    for seed in range(2000):
        found = spans(mask_spans(tokens, MASK, random_at(seed, 0)), tokens)
        starts += [start for start, _ in found]
        lengths += [stop - start for start, stop in found]
    assert {start // 10 for start in starts} == set(range(10))
    counts = np.bincount(np.array(starts) // 10)
    assert counts.max() < 1.5 * counts.min()
    assert 2.5 < np.mean(lengths) < 3.2  # a Poisson of mean 3, the last one of each text cut short


def test_a_text_of_one_token_is_a_mask():
    assert mask_spans([7], MASK, random_at(0, 0)) == [MASK]


@LAW
@given(st.integers(0, 60), st.integers(1, 60), st.integers(0, 99))
def test_a_window_is_a_stretch(length, size, seed):
    tokens = list(range(length))
    found = window(tokens, size, random_at(seed, 0))
    assert len(found) == min(length, size)
    assert not found or found == tokens[found[0] : found[0] + len(found)]


def test_windows_reach_both_ends():
    starts = {window(list(range(10)), 8, random_at(seed, 0))[0] for seed in range(50)}
    assert starts == {0, 1, 2}


@LAW
@given(source=st.integers(0, 40), target=st.integers(0, 40), limit=st.integers(2, 60))
def test_fit_cuts_to_the_limit(tasks, source, target, limit):
    task = tasks["poem", "train"]
    end = task.tokenizer.eos_id
    asked, said = list(range(100, 100 + source)), list(range(200, 200 + target))
    row = task.fit(asked, said, limit)
    assert len(row.source) + len(row.target) <= limit and row.target
    assert row.source == asked[: len(row.source)] and [*said, end][: len(row.target)] == row.target
    assert (row.target[-1] == end) == (len(row.target) == target + 1)
    if source + target + 1 <= limit:
        assert row.source == asked and row.target == [*said, end]
    else:
        assert len(row.source) + len(row.target) == limit
        assert len(row.source) == source or len(row.source) >= limit // 2


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", TASKS)
def test_rows_are_pure_and_of_their_split(tasks, sample_corpus, name, split):
    task = tasks[name, split]
    assert len(task.pool)
    for position, item in enumerate(task.pool[:40].tolist()):
        number = max(item, ~item)  # a picture's words are its number's complement
        held = sample_corpus.picture(number) if name in PICTURED else sample_corpus.text(number)
        assert held.split == split
        limit = task.limit(96)
        row = task.row(item, limit, random_at(1, position))
        assert row == task.row(item, limit, random_at(1, position))
        assert bool(row.target or row.hidden) == (row.concept is None)
        assert len(row.source) + max(len(row.target), 1) <= limit
        if row.picture is not None and name != "inpaint":  # which shows another one
            assert row.picture.row == item


def test_views_are_the_plain_one_outside_training(tasks):
    for name in ("caption", "image_denoise"):
        seen = {
            split: {tasks[name, split].row(0, 48, random_at(1, position)).picture for position in range(60)}
            for split in SPLITS
        }
        assert seen == {"train": {View(0, k) for k in range(4)}, "validation": {View(0, 0)}}


def test_captions_ask_for_what_they_answer(tasks, sample_corpus):
    task = tasks["caption", "train"]
    item = int(task.pool[0])
    picture = sample_corpus.picture(item)
    answers = {ASK_NAME: picture.zh, ASK_TAGS: " ".join(picture.tags), ASK_ENGLISH: picture.en}
    asked = {question: 0 for question in answers}
    for position in range(600):
        row = task.row(item, 48, random_at(1, position))
        question = task.tokenizer.decode(row.source)
        assert task.tokenizer.decode(row.target) == answers[question] and row.target[-1] == task.tokenizer.eos_id
        asked[question] += 1
    assert asked[ASK_NAME] == pytest.approx(300, abs=60)
    assert asked[ASK_TAGS] == pytest.approx(150, abs=50) and asked[ASK_ENGLISH] == pytest.approx(150, abs=50)


def test_captions_ask_for_nothing_that_is_missing(sample_corpus):
    picture = sample_corpus.picture(0)
    for without, never in (({"en": ""}, ASK_ENGLISH), ({"tags": []}, ASK_TAGS)):
        bare = replace(picture, **without)
        assert never not in {Caption.question(bare, random_at(1, position))[0] for position in range(100)}
    nothing = replace(picture, en="", tags=[])
    assert {Caption.question(nothing, random_at(1, position)) for position in range(50)} == {(ASK_NAME, picture.zh)}
    assert full_text(nothing) == picture.zh


@pytest.mark.parametrize("name", ["denoise", "image_denoise"])
def test_denoising_restores_the_text(tasks, sample_corpus, name):
    task = tasks[name, "train"]
    share = MASKED_SHARE if name == "denoise" else 2 * MASKED_SHARE
    for position, item in enumerate(task.pool[:50].tolist()):
        row = task.row(item, 200, random_at(1, position))
        text = sample_corpus.text(item).text if name == "denoise" else full_text(sample_corpus.picture(item))
        assert task.tokenizer.decode(row.target) == text
        masks = row.source.count(task.tokenizer.mask_id)
        hidden = len(row.target) - 1 - (len(row.source) - masks)
        assert hidden == max(1, round(share * (len(row.target) - 1))) and 1 <= masks <= hidden
        assert (row.picture is None) == (name == "denoise")


@pytest.mark.parametrize("name", ["denoise", "image_denoise"])
@pytest.mark.parametrize("limit", [8, 9, 15])
def test_denoising_a_window_keeps_the_whole_target(tasks, name, limit):
    task = tasks[name, "train"]
    for position, item in enumerate(task.pool[:20].tolist()):
        row = task.row(item, limit, random_at(1, position))
        assert row.target[-1] == task.tokenizer.eos_id and len(row.target) == (limit - 1) // 2 + 1


def test_language_has_no_source(tasks, sample_corpus):
    task = tasks["language", "train"]
    item = int(task.pool[0])
    row = task.row(item, 96, random_at(1, 0))
    assert row.source == [] and task.tokenizer.decode(row.target) == sample_corpus.text(item).text
    short = task.row(item, 8, random_at(1, 0))
    assert len(short.target) == 8 and task.tokenizer.eos_id not in short.target


@pytest.mark.parametrize(("name", "prompt"), [("poem", poem_prompt), ("review", review_prompt)])
def test_writing_is_asked_for(tasks, sample_corpus, name, prompt):
    task = tasks[name, "train"]
    for item in task.pool[:20].tolist():
        text = sample_corpus.text(item)
        row = task.row(item, 200, random_at(1, 0))
        assert task.tokenizer.decode(row.source) == prompt(text) and task.tokenizer.decode(row.target) == text.text
    wanted = (text.form, text.title, text.author) if name == "poem" else (text.polarity, text.topic)
    assert all(part in prompt(text) for part in wanted)


def test_matching_is_right_half_of_the_time_and_wrong_within_the_subgroup(tasks, sample_corpus):
    task = tasks["match", "train"]
    wrong = hard = 0
    for position in range(400):
        item = int(task.pool[position % len(task.pool)])
        picture, row = sample_corpus.picture(item), task.row(item, 48, random_at(1, position))
        question, answer = task.tokenizer.decode(row.source), task.tokenizer.decode(row.target)
        assert answer in (YES, NO) and row.picture.row == item
        assert (question == match_question(picture.zh)) == (answer == YES)
        if answer == NO:
            wrong += 1
            hard += question in [match_question(other.zh) for other in alike(sample_corpus, picture)]
    assert wrong == pytest.approx(200, abs=40) and hard > 0.9 * wrong  # a few draws find only the same name


def alike(corpus, picture):
    rows = corpus.picture_rows("train", subgroup=picture.subgroup)
    return [corpus.picture(int(row)) for row in rows]


def test_a_picture_without_others_is_matched_with_its_own_words(tasks, sample_corpus, monkeypatch):
    task = tasks["match", "train"]
    item = int(task.pool[0])
    picture = sample_corpus.picture(item)
    monkeypatch.setattr(task, "alike", {picture.subgroup: [item]})
    monkeypatch.setattr(task, "pool", np.array([item]))
    for position in range(20):
        assert task.tokenizer.decode(task.row(item, 48, random_at(1, position)).target) == YES


@pytest.mark.parametrize("split", SPLITS)
def test_contrast_pairs_a_picture_with_its_words(tasks, sample_corpus, split):
    task = tasks["contrast", split]
    texts = set()
    for position in range(0, len(task.pool), 2):
        item, words = task.pool[position : position + 2].tolist()
        picture = sample_corpus.picture(item)
        seen, said = task.row(item, 48, random_at(1, position)), task.row(words, 48, random_at(1, position + 1))
        assert seen.picture.row == item and not seen.source and not seen.target
        assert said.picture is None and not said.target and said.concept == seen.concept
        text = task.tokenizer.decode(said.source)
        texts.add(text)
        assert text in (picture.zh, picture.en) or text.split()[0] == picture.zh
        assert set(text.split()[1:]) <= set(picture.tags) or text == picture.en
        if split == "validation":
            assert text == picture_words(picture)
    concepts = {task.row(int(item), 48, random_at(1, 0)).concept for item in task.pool}
    assert len(concepts) == len({sample_corpus.picture(int(item)).zh for item in task.pool[::2]})


@LAW
@given(st.text(st.sampled_from("红苹果a b1，\n")), st.text(st.sampled_from("红苹果")))
def test_fine_pieces_are_the_same_text_and_of_single_characters(tasks, text, chinese):
    tokenizer = tasks["contrast", "train"].tokenizer
    assert tokenizer.decode(tokenizer.encode_finely(text)) == text
    alone = [piece for character in chinese for piece in tokenizer.encode(character)]
    assert tokenizer.encode_finely(chinese) == alone


@pytest.mark.parametrize("split", SPLITS)
def test_questions_have_the_answers_of_the_pictures_own_words(tasks, sample_corpus, split):
    task = tasks["ask", split]
    kinds = dict.fromkeys(("what", "kind", "there is", "there is none", "plain"), 0)
    for position in range(600):
        item = int(task.pool[position % len(task.pool)])
        picture, row = sample_corpus.picture(item), task.row(item, 48, random_at(1, position))
        question, answer = task.tokenizer.decode(row.source), task.tokenizer.decode(row.target)
        if row.picture is None:
            kinds["plain"] += 1
            assert (question, answer) in [(q.text, q.answer) for q in plain_questions(picture)]
        elif question == WHAT:
            kinds["what"] += answer == picture.zh
        elif question == KIND:
            kinds["kind"] += answer == picture.group
        else:
            tag = question.removeprefix("图里有没有").removesuffix("?")
            assert answer == (THERE_IS if tag in picture.tags else THERE_IS_NONE)
            kinds["there is" if answer == THERE_IS else "there is none"] += 1
    assert sum(kinds.values()) == 600 and kinds["plain"] == pytest.approx(180, abs=45)
    assert min(kinds.values()) > 40


def test_a_picture_without_words_is_asked_what_it_is(tasks, sample_corpus):
    bare = replace(sample_corpus.picture(0), group="", tags=[], en="")
    assert plain_questions(bare) == []
    assert [q.text for q in tasks["ask", "train"].questions(bare, random_at(1, 0))] == [WHAT]


@pytest.mark.parametrize("split", SPLITS)
def test_drawing_is_saying_the_codes_of_a_view(tasks, drawn_corpus, split):
    task = tasks["draw", split]
    vocab, wordless, views = task.tokenizer.vocab_size, 0, set()
    for position in range(400):
        item = int(task.pool[position % len(task.pool)])
        row, picture = task.row(item, 60, random_at(1, position)), drawn_corpus.picture(item)
        codes = [token - vocab for token in row.target]
        views.add([codes == view.tolist() for view in drawn_corpus.codes[item]].index(True))
        words = task.tokenizer.decode(row.source)
        wordless += words == draw_prompt("")
        assert row.picture is None and words.startswith(draw_prompt(""))
        assert len(row.source) + len(row.target) == 60  # so each code has one position
        if split == "validation":
            assert words == draw_prompt(picture_words(picture))
    assert views == ({0, 1, 2, 3} if split == "train" else {0})
    assert wordless == (pytest.approx(400 * WORDLESS, abs=20) if split == "train" else 0)


@pytest.mark.parametrize("name", ["draw", "inpaint"])
def test_drawing_needs_codes_and_room(tasks, sample_corpus, name):
    with pytest.raises(UserError, match=rf"tasks\.{name}: needs pictures as codes"):
        TASKS[name](sample_corpus, "train")
    task = tasks[name, "train"]
    with pytest.raises(UserError, match="text_positions=16: a drawing takes 16 positions"):
        task.row(int(task.pool[0]), 16, random_at(1, 0))


@pytest.mark.parametrize("split", SPLITS)
def test_inpainting_hides_codes_of_a_view_and_shows_another(tasks, drawn_corpus, split):
    task = tasks["inpaint", split]
    vocab, mask, wordless, referred, whole = task.tokenizer.vocab_size, task.tokenizer.mask_id, 0, 0, 0
    for position in range(400):
        item = int(task.pool[position % len(task.pool)])
        row, picture = task.row(item, 60, random_at(1, position)), drawn_corpus.picture(item)
        grid, words = row.source[:16], task.tokenizer.decode(row.source[16:])
        assert row.hidden.keys() == {place for place, token in enumerate(grid) if token == mask} and row.hidden
        codes = [row.hidden.get(place, token) - vocab for place, token in enumerate(grid)]
        view = [codes == view.tolist() for view in drawn_corpus.codes[item]].index(True)
        assert words.startswith(draw_prompt("")) and not row.target
        whole += len(row.hidden) == 16
        wordless += words == draw_prompt("")
        if row.picture is not None:
            referred += 1
            other = drawn_corpus.picture(row.picture.row)
            assert other.zh == picture.zh and other.split == split and row.picture != View(item, view)
        if split == "validation":
            assert words == draw_prompt(picture_words(picture)) and view == 0
    assert 20 < whole < 200
    assert wordless == (pytest.approx(400 * WORDLESS, abs=20) if split == "train" else 0)
    # A picture without a namesake has only its other views to show, and outside training it has none.
    assert 0.6 * REFERENCE < referred / 400 <= 1.1 * REFERENCE if split == "train" else referred < 400 * REFERENCE


@LAW
@given(st.integers(1, 9), st.integers(0, 2**32))
def test_some_places_of_a_grid_are_masked(side, seed):
    places = random_mask(side, random_at(seed, 0))
    assert places == sorted(set(places)) and set(places) <= set(range(side * side))
    assert places or side == 1


def test_masks_are_all_sizes_and_reach_every_cell():
    masks = [random_mask(8, random_at(seed, 0)) for seed in range(1000)]
    sizes, cells = np.array([len(mask) for mask in masks]), np.bincount(np.concatenate(masks), minlength=64)
    assert min(np.histogram(sizes, 8, (0, 64))[0]) > 40 and sizes.max() == 64
    assert cells.min() > 0.7 * cells.max()
