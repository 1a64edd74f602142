"""`m6 eval`: what a trained run can do, on held-out pictures and texts or on a stranger's files."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch.use import load
from training import quality
from training.data.corpus import Corpus
from training.errors import UserError
from training.files import replace
from training.quality import Report
from training.rivals import ridge
from training.trained import M6


def evaluate(
    run: str | None, data: Path | None, pairs: Path | None, texts: Path | None, split: str, target: Path | None
) -> None:
    """Measure, print a table, and write JSON to `target`, if given."""
    m = load(run, data)
    console = Console(stderr=True)
    report: Report = {"step": m.step, "parameters": sum(weight.numel() for weight in m.network.parameters())}
    with console.status("measuring") as status:
        if pairs or texts:
            report |= _of_files(m, pairs, texts)
        else:
            home = data or (Path(m.recipe.data) if m.recipe else Path("data"))
            report |= {"split": split} | _of_corpus(m, Corpus.open(home), split, home, status.update)
    if target:
        try:
            replace(target, json.dumps(quality.finite(report), ensure_ascii=False, indent=1))
        except OSError as error:
            raise UserError(f"--json {target}: cannot be written ({error.strerror})") from None
    _show(report)


def _of_files(m: M6, pairs: Path | None, texts: Path | None) -> Report:
    report: Report = {}
    if pairs:
        read = quality.read_pairs(pairs)
        report["retrieval"], _ = quality.measure_retrieval(quality.similarities(m, read), read)
        report["caption"] = quality.measure_captions(m, read)
    if texts:
        report["text"] = quality.measure_texts(m, quality.read_texts(texts))
    return report


def _of_corpus(m: M6, corpus: Corpus, split: str, home: Path, tell: quality.Tell) -> Report:
    rows = quality.picture_rows(corpus, split)
    if not rows:
        raise UserError(f"--split {split}: the corpus has no pictures of style {quality.STYLE} in it")
    pairs = [quality.pair_of(corpus.picture(row)) for row in rows]
    report: Report = {}
    if _learned(m, "contrast"):
        tell("finding pictures and texts")
        report |= _finding(m, corpus, split, home, rows, pairs)
    if _learned(m, "caption"):
        tell("naming pictures")
        report["caption"] = quality.measure_captions(m, pairs)
    if _learned(m, "ask"):
        tell("answering questions")
        report["answers"] = quality.measure_answers(m, corpus, split)
    for kind in ("poem", "review"):
        tell(f"writing: {kind}")
        report[f"text_{kind}"] = _writing(m, corpus, split, kind)
    return report


def _learned(m: M6, task: str) -> bool:
    return m.recipe is None or task in m.recipe.tasks


def _finding(m: M6, corpus: Corpus, split: str, home: Path, rows: list[int], pairs: list[quality.Pair]) -> Report:
    own, recalls = quality.measure_retrieval(quality.similarities(m, pairs), pairs)
    try:
        features = ridge.pooled_features(corpus, home / "cache")
    except OSError as error:
        raise UserError(f"{home / 'cache'}: cannot be written to ({error.strerror})") from None
    retriever = ridge.fit(corpus, features, ["train", "validation"] if split == "test" else ["train"])
    similarity = retriever.similarity(features[rows], [pair.words for pair in pairs])
    rival, rivals_recalls = quality.measure_retrieval(similarity, pairs)
    above = quality.beside(recalls, rivals_recalls, pairs)
    return {"retrieval": own, "retrieval_ridge": rival, "retrieval_above_ridge": above}


def _writing(m: M6, corpus: Corpus, split: str, kind: str) -> Report:
    texts = quality.corpus_texts(corpus, split, kind)
    plain = [text.text for text in texts]
    bits = m.bits([("", text) for text in plain])
    report = {
        "unprompted": quality.bits_a_character(bits, plain),
        "prompted": quality.measure_texts(m, [(quality.prompted(text), text.text) for text in texts]),
    }
    rows = corpus.text_rows("train", kind)
    seen = {"5-gram, all training text": [corpus.text(int(row)).text for row in rows]}
    if m.recipe:
        seen["5-gram, texts seen"] = quality.seen_texts(corpus, m.recipe, m.step, kind)
    return report | {name: quality.beside_ngram(bits, of, plain) for name, of in seen.items() if of}


def _show(report: Report) -> None:
    console = Console()
    for title, rows in _tables(report):
        table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
        for number, heading in enumerate(rows[0]):
            table.add_column(heading, justify="right" if number else "left")
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table, "")


def _tables(report: Report) -> list[tuple[str, list[list[str]]]]:
    tables = []
    recalls = {"this run": report.get("retrieval"), "ridge retriever": report.get("retrieval_ridge")}
    lines = [
        [who, way.replace("_", " "), *(f"{found[way][f'r{k}']:.3f}" for k in (1, 5, 10)), f"{found[way]['n']}"]
        for who, found in recalls.items()
        if found
        for way in found
    ]
    if lines:
        tables.append(("Finding", [["", "", "R@1", "R@5", "R@10", "of"], *lines]))
    if caption := report.get("caption"):
        rows = [
            [who, f"{one['exact']:.3f}", f"{one['chrf']:.1f}", f"{one['cider']:.2f}"]
            for who, one in (("this run", caption), ("a blank image", caption["blank_image"]))
        ]
        tables.append(("Naming", [["", "exact", "chrF", "CIDEr-D"], *rows]))
    if answers := report.get("answers"):
        rows = [
            [kind, f"{one['accuracy']:.3f}", f"{one['majority']:.3f}", _number(one.get("blank_image")), f"{one['n']}"]
            for kind, one in answers.items()
        ]
        tables.append(("Answering", [["question", "this run", "commonest answer", "a blank image", "of"], *rows]))
    texts = {"texts": {"this run": report["text"]}} if "text" in report else {}
    texts |= {name: report[f"text_{name}"] for name in ("poem", "review") if f"text_{name}" in report}
    rows = [[kind, who, f"{one['bits_per_character']:.3f}"] for kind, of in texts.items() for who, one in of.items()]
    if rows:
        tables.append(("Writing", [["", "", "bits a character"], *rows]))
    return tables


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
