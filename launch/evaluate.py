"""`m6 eval`: what a trained run can do, on held-out pictures and texts or on a stranger's files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from launch.use import chosen
from training import quality, samples
from training.before_after import KINDS, Before, compare
from training.data.corpus import Corpus
from training.errors import UserError
from training.evaluation import FOLDER, OF_FILES, OF_OTHER, Figures, Samples, tables, write_evaluation
from training.files import replace
from training.judge import judge_of
from training.rivals import ridge
from training.run import home_of
from training.trained import M6

T = TypeVar("T")


def evaluate(
    run: str | None, data: Path | None, pairs: Path | None, texts: Path | None, split: str, target: Path | None
) -> None:
    """Measure, gather samples, write both and a page into the run's folder, print the figures.

    `target`: a file that gets the figures as well.
    """
    run = chosen(run)
    m, home = M6.load(run, data=data), home_of(run)
    console = Console(stderr=True)
    figures: Figures = {"step": m.step, "parameters": sum(weight.numel() for weight in m.network.parameters())}
    with console.status("measuring") as status:
        tell = status.update if console.is_terminal else partial(console.print, markup=False)
        place = data or (Path(m.recipe.data) if m.recipe else Path("data"))
        before = _before(m, place)
        folder = home / OF_FILES
        if pairs or texts:
            own = quality.read_pairs(pairs) if pairs else []
            found, samples = _of_files(m, own, texts)
        else:
            corpus = Corpus.open(place)
            folder = home / (FOLDER if m.is_own(corpus) else OF_OTHER)
            own = [quality.pair_of(corpus.picture(row)) for row in quality.picture_rows(corpus, split)]
            found, samples = _of_corpus(m, corpus, split, own, place, tell)
            figures["split"] = split
        if before and own:
            figures["before_after"] = compare(m, before, Corpus.open(place), split, own, tell)
    figures = quality.finite(figures | found)
    try:
        page = write_evaluation(folder, home.resolve().name, figures, samples)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror})") from None
    if target:
        try:
            replace(target, json.dumps(figures, ensure_ascii=False, indent=1))
        except OSError as error:
            raise UserError(f"--json {target}: cannot be written ({error.strerror})") from None
    _show(figures)
    print(f"page: {page.resolve()}")


def _before(m: M6, place: Path) -> Before | None:
    """What a fine-tuned run started from; None of another, or if that is gone, which is told."""
    if not (m.recipe and m.recipe.start):
        return None
    try:
        return Before.of(m, Corpus.open(place))
    except UserError as error:
        print(f"m6: nothing to compare with: {error}", file=sys.stderr)
        return None


def _of_files(m: M6, pairs: list[quality.Pair], texts: Path | None) -> tuple[Figures, Samples]:
    figures: Figures = {}
    shown = Samples()
    if pairs:
        figures["retrieval"], _ = quality.measure_retrieval(quality.similarities(m, pairs), pairs)
        figures["caption"] = quality.measure_captions(m, pairs)
        sayings, count = samples.captions(pairs, _said(figures))
        shown = Samples(sayings=sayings, counts={"caption": count}, searches=samples.searches(m, pairs))
    if texts:
        figures["text"] = quality.measure_texts(m, quality.read_texts(texts))
    return figures, shown


def _of_corpus(
    m: M6, corpus: Corpus, split: str, pairs: list[quality.Pair], home: Path, tell: quality.Tell
) -> tuple[Figures, Samples]:
    rows = quality.picture_rows(corpus, split)
    if not rows:
        what = "pictures" if corpus.imported else f"pictures of style {quality.STYLE}"
        raise UserError(f"--split {split}: {corpus.folder} has no {what} in it")
    figures: Figures = {}
    shown: dict[str, Any] = {"sayings": [], "counts": {}}
    if m.recipe and m.recipe.image_tokenizer and {"draw", "inpaint"} & m.recipe.tasks.keys():
        drawn, figures["drawing"] = _drawing(m, corpus, split, home, Path(m.recipe.image_tokenizer), tell)
        shown |= drawn
    if m.learned("contrast"):
        tell("finding pictures and texts")
        figures |= _finding(m, corpus, split, home, rows, pairs)
        shown["searches"] = samples.searches(m, pairs)
    if m.learned("caption"):
        tell("naming pictures")
        figures["caption"] = quality.measure_captions(m, pairs)
        _add(shown, "caption", samples.captions(pairs, _said(figures)))
    if m.learned("ask"):
        tell("answering questions")
        figures["answers"] = quality.measure_answers(m, corpus, split)
        _add(shown, "ask", samples.questions(m, corpus, split))
    for kind in KINDS:
        if not len(corpus.text_rows(split, kind)):
            continue  # as of many a corpus that was imported
        tell(f"writing: {kind}")
        figures[f"text_{kind}"] = _writing(m, corpus, split, kind)
        if m.learned(kind):
            shown["sayings"] += samples.texts(m, corpus, split, kind)
    return figures, Samples(**shown)


def _said(figures: Figures) -> list[str]:
    return [text for _, text in figures["caption"]["samples"]]


def _add(shown: dict[str, Any], task: str, found: samples.Counted) -> None:
    shown["sayings"] += found[0]
    shown["counts"][task] = found[1]


def _finding(m: M6, corpus: Corpus, split: str, home: Path, rows: list[int], pairs: list[quality.Pair]) -> Figures:
    own, recalls = quality.measure_retrieval(quality.similarities(m, pairs), pairs)
    texts = [pair.words for pair in pairs]
    figures = {"retrieval": own}
    for name, similarity in _kept(home, lambda cache: ridge.rivals(corpus, cache, split, texts, rows)).items():
        figures[f"retrieval_{name}"], rivals = quality.measure_retrieval(similarity, pairs)
        figures[f"retrieval_above_{name}"] = quality.beside(recalls, rivals, pairs)
    return figures


def _kept(home: Path, make: Callable[[Path], T]) -> T:
    """What is made once and kept in a corpus' home."""
    try:
        return make(home / "cache")
    except OSError as error:
        raise UserError(f"{home / 'cache'}: cannot be written to ({error.strerror})") from None


def _drawing(
    m: M6, corpus: Corpus, split: str, home: Path, tokenizer: Path, tell: quality.Tell
) -> tuple[dict[str, Any], Figures]:
    def learning(done: int, of: int) -> None:
        tell(f"training a judge of drawings: step {done:,} of {of:,}")

    judge = _kept(home, lambda cache: judge_of(corpus, cache, learning))
    tell("drawing")
    return samples.drawings(m, corpus, split, tokenizer, judge)


def _writing(m: M6, corpus: Corpus, split: str, kind: str) -> Figures:
    texts = quality.corpus_texts(corpus, split, kind)
    plain = [text.text for text in texts]
    bits = m.bits([("", text) for text in plain])
    report = {
        "unprompted": quality.bits_a_character(bits, plain),
        "prompted": quality.measure_texts(m, [(quality.prompted(text), text.text) for text in texts]),
    }
    rows = corpus.text_rows("train", kind)
    seen = {"5-gram, all training text": [corpus.text(int(row)).text for row in rows]}
    if m.recipe and m.is_own(corpus):
        seen["5-gram, texts seen"] = quality.seen_texts(corpus, m.recipe, m.step, kind)
    return report | {name: quality.beside_ngram(bits, of, plain) for name, of in seen.items() if of}


def _show(figures: Figures) -> None:
    console = Console()
    for found in tables(figures):
        table = Table(title=found.title, title_justify="left", box=None, padding=(0, 2, 0, 0))
        for number, heading in enumerate(found.head):
            table.add_column(heading, justify="right" if number and heading else "left")
        for row in found.rows:
            table.add_row(*(cell.value for cell in row))
        console.print(table, "")
