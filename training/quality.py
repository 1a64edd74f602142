"""What a trained run can do, measured: finding, naming, answering and writing, each beside its trivial rivals.

On the corpus' own held-out families and texts (TEXTS of each kind), or on a stranger's files. Intervals are of 95 %, by
bootstrap over concept families (pictures) or texts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from PIL import Image

from training.data.corpus import Corpus
from training.data.images import read_picture
from training.data.order import random_at, row_counts, shuffled
from training.data.rows import Picture, Text, clean, clean_lines
from training.data.tasks import TASKS
from training.data.tasks.ask import Ask, Question, plain_questions
from training.data.tasks.contrast import picture_words
from training.data.tasks.writing import poem_prompt, review_prompt
from training.errors import UserError
from training.measures.answers import accuracy
from training.measures.bootstrap import (
    Interval,
    bootstrap,
    bootstrap_score,
    paired_bootstrap,
    paired_bootstrap_score,
)
from training.measures.captions import caption_scores, chrf_of
from training.measures.retrieval import Recall, retrieval
from training.recipe import Recipe, one_line, shown
from training.rivals.ngram import CharacterNgram
from training.rivals.ridge import FLAGS
from training.trained import M6

STYLE = "fluent-3d"  # of the figures: one picture a concept
BLANK = Image.new("RGB", (128, 128), "white")
TEXT_TASKS = {"denoise", "language", "poem", "review"}
TEXTS = 1000  # of each kind
CHOICES = 10  # among which a drawing's words are to be told
SEED = 0

Report = dict[str, Any]
Tell = Callable[[str], object]


@dataclass(frozen=True)
class Pair:
    """A picture and its words. `name` is what it is to be called, `words` what it is to be found by; `en` may be ""."""

    image: Image.Image
    name: str
    words: str
    references: list[str]  # other right captions
    family: str
    en: str


def picture_rows(corpus: Corpus, split: str) -> list[int]:
    """Numbers of a split's pictures that the figures are of: of imported data, all."""
    if corpus.imported:
        return corpus.picture_rows(split).tolist()
    return [row for row in corpus.picture_rows(split, style=STYLE).tolist() if corpus.picture(row).group != FLAGS]


def pair_of(picture: Picture) -> Pair:
    others = [" ".join(picture.tags), picture.en]
    references = [text for text in others if text]
    return Pair(picture.pil(), picture.zh, picture_words(picture), references, picture.family, picture.en)


def read_pairs(path: Path) -> list[Pair]:
    """A stranger's pictures: JSON lines {"image": path beside the file, "zh": …, "en": … or null}. Raises UserError.

    Rows of one "family", if they name one, are drawn together for intervals.
    """
    pairs = []
    for line, row in _lines(path):
        zh, en, image = row.get("zh"), row.get("en"), row.get("image")
        if not (_is_text(zh) and isinstance(image, str) and isinstance(en, str | None)):
            raise UserError(f'{path}, line {line}: must be {{"image": path, "zh": words, "en": words or null}}')
        try:
            picture = read_picture(path.parent / image)
        except UserError as error:
            raise UserError(f"{path}, line {line}: {error}") from None
        name, english = clean(zh), clean(en or "")
        family = row["family"] if _is_text(row.get("family")) else f"{line}"
        pairs.append(Pair(picture, name, name, [english] if english else [], family, english))
    return pairs


def read_texts(path: Path) -> list[tuple[str, str]]:
    """A stranger's texts, (prompt or "", text) each: JSON lines {"text": …, "title": … or absent}. Raises UserError."""
    texts = []
    for line, row in _lines(path):
        text, title = row.get("text"), row.get("title")
        if not (_is_text(text) and isinstance(title, str | None)):
            raise UserError(f'{path}, line {line}: must be {{"text": words, "title": words, or without}}')
        texts.append((f"写一首诗。题目：{title}。" if _is_text(title) else "", text))
    return texts


def _is_text(value: Any) -> TypeGuard[str]:
    """Whether it is a text that says something, and can be encoded."""
    return isinstance(value, str) and bool(clean(value)) and not any("\ud800" <= c <= "\udfff" for c in value)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: no JSON ({one_line(str(error))})") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: {shown(row)} is no object")
            yield number, row
    if not any(line.strip() for line in lines):
        raise UserError(f"{path}: empty")


def prompted(text: Text) -> str:
    """What the text would be asked for by."""
    return poem_prompt(text) if text.kind == "poem" else review_prompt(text)


def corpus_texts(corpus: Corpus, split: str, kind: str) -> list[Text]:
    """TEXTS of a split, the same ones always."""
    rows = corpus.text_rows(split, kind)
    chosen = [rows[shuffled(place, len(rows), (SEED, kind))] for place in range(min(TEXTS, len(rows)))]
    return [corpus.text(int(row)) for row in chosen]


# ---- pictures


def similarities(m: M6, pairs: Sequence[Pair]) -> np.ndarray:
    """float32 [pictures, texts]: how well they fit."""
    return m.compare([pair.image for pair in pairs], [pair.words for pair in pairs])


def measure_retrieval(similarity: np.ndarray, pairs: Sequence[Pair]) -> tuple[Report, dict[str, Recall]]:
    """R@1, 5 and 10 both ways, and the recalls themselves."""
    names = [pair.name for pair in pairs]
    found = retrieval(similarity, names, names)
    both = {"image_to_text": found.image_to_text, "text_to_image": found.text_to_image}
    return {way: _recall(recall, pairs) for way, recall in both.items()}, both


def _recall(recall: Recall, pairs: Sequence[Pair]) -> Report:
    families = [pair.family for pair in pairs]
    figures = {f"r{k}": bootstrap(recall.hits_Q(k), families) for k in (1, 5, 10)}
    return {
        **{name: figure.value for name, figure in figures.items()},
        "n": recall.n,
        "chance_r10": recall.chance_r10,
        "intervals": {name: _ends(figure) for name, figure in figures.items()},
    }


def beside(own: dict[str, Recall], rival: dict[str, Recall], pairs: Sequence[Pair]) -> Report:
    """By how much the run's recalls are above a rival's, paired by picture."""
    families = [pair.family for pair in pairs]
    return {
        way: {f"r{k}": vars(paired_bootstrap(own[way].hits_Q(k), rival[way].hits_Q(k), families)) for k in (1, 5, 10)}
        for way in own
    }


def measure_captions(m: M6, pairs: Sequence[Pair]) -> Report:
    """Names given to pictures, beside those that the same model gives to a blank one."""
    references = [[pair.name, *pair.references] for pair in pairs]
    families = [pair.family for pair in pairs]
    said = m.captions([pair.image for pair in pairs])
    found, blank = (caption_scores(texts, references) for texts in (said, m.captions([BLANK]) * len(pairs)))
    return {
        "exact": found.exact,
        "chrf": found.chrf,
        "cider": found.cider,
        "n": found.n,
        "intervals": {
            "exact": _ends(bootstrap(found.exact_N, families)),
            "chrf": _ends(bootstrap_score(chrf_of, found.chrf_NS, families)),
            "cider": _ends(bootstrap(found.cider_N, families)),
        },
        "blank_image": {"exact": blank.exact, "chrf": blank.chrf, "cider": blank.cider},
        "above_blank_image": {
            "exact": vars(paired_bootstrap(found.exact_N, blank.exact_N, families)),
            "chrf": vars(paired_bootstrap_score(chrf_of, found.chrf_NS, blank.chrf_NS, families)),
            "cider": vars(paired_bootstrap(found.cider_N, blank.cider_N, families)),
        },
        "samples": [[pair.name, text] for pair, text in zip(pairs, said, strict=True)],
    }


def measure_answers(m: M6, corpus: Corpus, split: str) -> Report:
    """Of each kind of question, with and without the picture, beside the commonest answer."""
    task = Ask(corpus, split)
    pictures = [corpus.picture(row) for row in picture_rows(corpus, split)]
    asked: dict[str, list[tuple[Picture, Question]]] = {}
    for place, picture in enumerate(pictures):
        for question in task.questions(picture, random_at(SEED, place)):
            asked.setdefault(question.kind, []).append((picture, question))
        for question in plain_questions(picture):
            asked.setdefault(f"plain, {question.kind}", []).append((picture, question))
    return {kind: _answers(m, kind, questions) for kind, questions in asked.items()}


def _answers(m: M6, kind: str, questions: Sequence[tuple[Picture, Question]]) -> Report:
    true = [question.answer for _, question in questions]
    plain = kind.startswith("plain")
    found = accuracy(m.answers([(question.text, None if plain else p.pil()) for p, question in questions]), true)
    interval = _ends(bootstrap(found.right_N, [picture.family for picture, _ in questions]))
    report = {"accuracy": found.accuracy, "interval": interval, "majority": found.majority, "n": found.n}
    if not plain:
        blank = m.answers([(question.text, BLANK) for _, question in questions])
        report["blank_image"] = accuracy(blank, true).accuracy
    return report


# ---- drawings


def measure_drawings(
    similarity: Callable[[Sequence[Image.Image], Sequence[str]], np.ndarray],
    drawn: Sequence[Image.Image],
    coded: Sequence[Image.Image],
    pairs: Sequence[Pair],
) -> Report:
    """How often a judge's `similarity` tells each drawing's words from those of CHOICES - 1 other families.

    Beside it real pictures of those words, the same from their own codes, and chance: the drawings with others' words
    alone, of which one is taken for theirs.
    """
    words, families = [pair.words for pair in pairs], [pair.family for pair in pairs]
    choices = [_choices(place, families) for place in range(len(pairs))]
    looked_at = {"drawn": drawn, "own_codes": coded, "real_pictures": [pair.image for pair in pairs]}
    hits = {who: _told(similarity(pictures, words), choices) for who, pictures in looked_at.items()}
    hits["shuffled"] = _told(similarity(drawn, words), [_others(place, families) for place in range(len(pairs))])
    found = {who: bootstrap(of, families) for who, of in hits.items()}
    return {
        **{who: {"right": one.value, "interval": _ends(one)} for who, one in found.items()},
        "above_shuffled": vars(paired_bootstrap(hits["drawn"], hits["shuffled"], families)),
        "choices": min(map(len, choices)),
        "n": len(pairs),
    }


def _choices(place: int, families: Sequence[str]) -> list[int]:
    """A place, then others of other families, drawn by lot."""
    return [place, *_others(place, families)[: CHOICES - 1]]


def _others(place: int, families: Sequence[str]) -> list[int]:
    """CHOICES places of other families, drawn by lot."""
    others = [other for other, family in enumerate(families) if family != families[place]]
    return random_at(SEED, place).permutation(others)[:CHOICES].astype(int).tolist()


def _told(similarity: np.ndarray, choices: Sequence[list[int]]) -> np.ndarray:
    """float64: 1 for each picture that fits the first of its choices better than any other."""
    fits = [similarity[place, choice] for place, choice in enumerate(choices)]
    return np.array([float(len(one) > 1 and (one[0] > one[1:]).all()) for one in fits])


# ---- texts


def measure_texts(m: M6, texts: Sequence[tuple[str, str]]) -> Report:
    """Bits a character of (prompt, text) pairs: the end of a text costs bits too, and is no character."""
    return bits_a_character(m.bits(texts), [text for _, text in texts])


def bits_a_character(bits: np.ndarray, texts: Sequence[str]) -> Report:
    """Given the bits of each text."""
    found = bootstrap(-bits, _numbers(texts), lengths(texts))
    return {"bits_per_character": -found.value, "interval": [-found.high, -found.low], "n": len(texts)}


def beside_ngram(bits: np.ndarray, seen: Sequence[str], texts: Sequence[str]) -> Report:
    """The same texts by a character 5-gram that was trained on `seen`, and how many bits a character it needs more."""
    rival = CharacterNgram(seen).bits(texts)
    above = paired_bootstrap(rival, bits, _numbers(texts), lengths(texts))
    return bits_a_character(rival, texts) | {"trained_on_characters": sum(map(len, seen)), "above_run": vars(above)}


def _numbers(texts: Sequence[str]) -> list[str]:
    return [str(number) for number in range(len(texts))]


def lengths(texts: Sequence[str]) -> np.ndarray:
    return np.array([len(clean_lines(text.splitlines())) for text in texts], float)


def seen_texts(corpus: Corpus, recipe: Recipe, step: int, kind: str) -> list[str]:
    """Every text of a kind of which a run of this recipe was shown some part up to a step, whole, and once.

    That is a little more than it was shown: a rival that learns from them is not at a disadvantage.
    """
    counts = row_counts(recipe.tasks, recipe.global_batch, recipe.block)
    items: set[int] = set()
    for name in TEXT_TASKS & counts.keys():
        pool = TASKS[name](corpus, "train").pool
        shown_rows = min(step * counts[name], len(pool))
        items.update(int(pool[shuffled(draw, len(pool), (recipe.seed, name, 0))]) for draw in range(shown_rows))
    own = set(corpus.text_rows("train", kind).tolist())
    return [corpus.text(item).text for item in sorted(items & own)]


def _ends(interval: Interval) -> list[float]:
    return [interval.low, interval.high]


def finite(report: Any) -> Any:
    """A report as JSON has it: numbers that are not finite become null."""
    if isinstance(report, dict):
        return {key: finite(value) for key, value in report.items()}
    if isinstance(report, list | tuple):
        return [finite(value) for value in report]
    return None if isinstance(report, float) and not math.isfinite(report) else report
