"""What `m6 eval` measures is what the model does, of the right pictures and texts."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.stranger import FORMS
from tests.training.small_run import write_pictures
from training import quality
from training.data.corpus import Corpus
from training.data.importing.build import import_corpus
from training.data.importing.reading import Settings
from training.data.order import GlobalOrder
from training.data.tasks import TASKS
from training.errors import UserError
from training.quality import Pair
from training.recipe import parse_recipe
from training.rivals import ridge
from training.trained import M6


@pytest.fixture
def m(small_run: M6) -> M6:
    return small_run


@pytest.fixture(scope="module")
def pairs(sample_corpus: Corpus) -> list[Pair]:
    rows = quality.picture_rows(sample_corpus, "train")[:20]
    return [quality.pair_of(sample_corpus.picture(row)) for row in rows]


def test_pictures_are_of_one_style_and_no_flags(sample_corpus: Corpus) -> None:
    for split in ("validation", "test"):
        pictures = [sample_corpus.picture(row) for row in quality.picture_rows(sample_corpus, split)]
        assert pictures and {(p.style, p.split) for p in pictures} == {("fluent-3d", split)}


def test_imported_pictures_are_measured_whatever_their_style(
    m: M6, sample_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a run that was trained on another corpus."""
    rows = [row for split in ("validation", "test") for row in sample_corpus.picture_rows(split)]
    FORMS["captions"]([sample_corpus.picture(int(row)) for row in rows], tmp_path)
    for held_out in (0.8, 0):
        import_corpus(
            [tmp_path], tmp_path.with_name(f"{held_out}"), sample_corpus.folder.parent, Settings(held_out=held_out)
        )
    imported = Corpus.open(tmp_path.with_name("0.8"))
    rows = quality.picture_rows(imported, "test")
    pairs = [quality.pair_of(imported.picture(row)) for row in rows]
    assert {imported.picture(row).style for row in rows} == {"imported"} and len(rows) == len(
        imported.picture_rows("test")
    )
    similarity = quality.similarities(m, pairs)
    found, recalls = quality.measure_retrieval(similarity, pairs)
    assert found["image_to_text"]["r5"] > found["image_to_text"]["chance_r10"] / 2
    for rival in ridge.rivals(imported, tmp_path / "cache", "test", [pair.words for pair in pairs], rows).values():
        assert quality.beside(recalls, quality.measure_retrieval(rival, pairs)[1], pairs).keys() == recalls.keys()
    names = {pair.image.tobytes(): pair.name for pair in pairs}
    monkeypatch.setattr(m, "captions", lambda images: [names.get(image.tobytes(), "") for image in images])
    monkeypatch.setattr(m, "answers", lambda questions: ["有" for _ in questions])
    assert quality.measure_captions(m, pairs)["exact"] == 1
    # Captions alone ask for nothing but what it is.
    assert quality.measure_answers(m, imported, "test").keys() == {"what"}
    # With nothing to learn from there are no rivals.
    nothing = Corpus.open(tmp_path.with_name("0"))
    assert not quality.picture_rows(nothing, "test") and not quality.corpus_texts(nothing, "train", "poem")
    monkeypatch.setattr(Corpus, "picture_rows", lambda *_: np.arange(0))
    assert ridge.rivals(nothing, tmp_path / "cache", "test", [], []) == {}


def test_what_was_learned_is_found(m: M6, pairs: list[Pair]) -> None:
    similarity = quality.similarities(m, pairs)
    found, recalls = quality.measure_retrieval(similarity, pairs)
    for way in ("image_to_text", "text_to_image"):
        one = found[way]
        assert one["n"] == 20 and one["chance_r10"] == pytest.approx(0.5) and one["r1"] <= one["r5"] <= one["r10"]
        assert one["r5"] > 0.6  # a quarter by chance
        low, high = one["intervals"]["r5"]
        assert low <= one["r5"] <= high
    assert quality.beside(recalls, recalls, pairs)["image_to_text"]["r1"]["difference"] == 0
    shuffled, _ = quality.measure_retrieval(np.roll(similarity, 7, 1), pairs)
    assert shuffled["image_to_text"]["r5"] < found["image_to_text"]["r5"]


def test_names_are_scored_beside_those_of_a_blank_picture(
    m: M6, pairs: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {pair.image.tobytes(): pair.name for pair in pairs}
    monkeypatch.setattr(m, "captions", lambda images: [names.get(image.tobytes(), "东西") for image in images])
    found = quality.measure_captions(m, pairs)
    assert found["exact"] == 1 and found["chrf"] == pytest.approx(100) and found["n"] == 20
    assert found["intervals"]["chrf"] == pytest.approx([100, 100])
    above = found["above_blank_image"]
    assert found["blank_image"]["exact"] == 0 and above["chrf"]["low"] > 50 and above["exact"]["difference"] == 1


def test_questions_are_scored_by_kind(m: M6, sample_corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(m, "answers", lambda questions: ["有" for _ in questions])
    found = quality.measure_answers(m, sample_corpus, "test")
    assert found.keys() == {"what", "kind", "whether", "plain, kind", "plain, english", "plain, chinese"}
    assert found["whether"]["accuracy"] == found["whether"]["blank_image"] > 0.2 and found["what"]["accuracy"] == 0
    assert found["kind"]["majority"] == 1 and "blank_image" not in found["plain, kind"]  # all are of one group


def test_bits_are_summed_over_texts(m: M6) -> None:
    texts = [("", "床前明月光"), ("写一首诗。", "疑是地上霜，春眠不觉晓")]
    found = quality.measure_texts(m, texts)
    assert found["bits_per_character"] == pytest.approx(m.bits(texts).sum() / 16) and found["n"] == 2
    low, high = found["interval"]
    assert low <= found["bits_per_character"] <= high


def test_texts_seen_are_those_of_the_global_order(sample_corpus: Corpus) -> None:
    values = {"model": {"preset": "m6-tiny", "text_vocab": 540}, "steps": 9, "global_batch": 8,
              "tasks": {"poem": 2, "caption": 1, "review": 1}}  # fmt: skip
    recipe = parse_recipe(values, [], "test")
    order = GlobalOrder([TASKS[name](sample_corpus, "train") for name in recipe.tasks], recipe.tasks, 8, 96, 1)
    for steps in (0, 4, 400):
        shown = {(order.task_at(place).name, order.item(place)) for place in range(steps * 8)}
        for kind in ("poem", "review"):
            texts = {sample_corpus.text(item).text for name, item in shown if name == kind}
            seen = quality.seen_texts(sample_corpus, recipe, steps, kind)
            assert len(seen) == len(texts) and set(seen) == texts
    assert len(seen) == len(sample_corpus.text_rows("train", "review"))


def test_a_rival_that_knows_the_texts_needs_fewer_bits(sample_corpus: Corpus) -> None:
    texts = [sample_corpus.text(int(row)).text for row in sample_corpus.text_rows("train", "poem")[:40]]
    found = quality.beside_ngram(np.full(40, 500.0), texts, texts)
    assert found["bits_per_character"] < 4 and found["above_run"]["high"] < 0
    assert found["trained_on_characters"] == sum(map(len, texts))


def test_a_strangers_files_are_read(sample_corpus: Corpus, tmp_path: Path) -> None:
    write_pictures(sample_corpus, [3, 4], tmp_path / "in")
    rows = [{"image": "in/3.png", "zh": "红圆", "en": None}, {"image": "in/4.png", "zh": "方块", "en": "square"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    first, second = quality.read_pairs(tmp_path / "pairs.jsonl")
    assert first.image.tobytes() == sample_corpus.picture(3).pil().tobytes() and first.references == []
    assert (second.name, second.words, second.references) == ("方块", "方块", ["square"])
    (tmp_path / "texts.jsonl").write_text('{"text": "春眠", "title": "春晓"}\n{"text": "好"}')
    assert quality.read_texts(tmp_path / "texts.jsonl") == [("写一首诗。题目：春晓。", "春眠"), ("", "好")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", ": empty"),
        ("x", ", line 1: no JSON"),
        ("[1]", ", line 1: .* is no object"),
        ('{"zh": "x"}', ", line 1: must be"),
        ('\n{"image": "no.png", "zh": "x"}', ", line 2: .*no.png: No such file"),
        ('{"image": "p.jsonl", "zh": "x"}', ", line 1: .*p.jsonl: not a readable image"),
        ('{"image": "p.jsonl", "zh": "\\u200b"}', ", line 1: must be"),
        ('{"image": "p.jsonl", "zh": "\\ud800"}', ", line 1: must be"),
        ('{"image": "p.jsonl", "zh": "x", "en": 5}', ", line 1: must be"),
    ],
)
def test_a_strangers_bad_files_are_refused_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        quality.read_pairs(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_numbers_that_are_not_finite_become_null() -> None:
    assert quality.finite({"a": [float("nan"), 1.0], "b": (2, "x")}) == {"a": [None, 1.0], "b": [2, "x"]}
