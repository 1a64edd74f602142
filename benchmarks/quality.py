"""What runs of one recipe with several seeds can do, together: each figure's mean over the seeds, beside its rivals.

    m6 train --recipe launch/recipes/emoji.yaml --name emoji-1 --ranks 1 seed=1    # and 2, 3
    m6 eval --run emoji-1 && m6 eval --run emoji-2 && m6 eval --run emoji-3
    python -m benchmarks.quality emoji-1 emoji-2 emoji-3 [--split test] [--data data]

Finding is measured here, since a bootstrap that is paired with the ridge retriever needs every query: a query's hit is
its mean over the seeds, and whole concept families are drawn. The other figures are read from what `m6 eval` left.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from training import quality
from training.data.corpus import Corpus
from training.evaluation import FIGURES, FOLDER
from training.measures.bootstrap import bootstrap, paired_bootstrap
from training.measures.retrieval import retrieval
from training.rivals import ridge
from training.run import home_of
from training.trained import M6

WAYS = {"image to text": "image_to_text", "text to image": "text_to_image"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--split", default="test", choices=("test", "validation"))
    parser.add_argument("--data", default="data")
    arguments = parser.parse_args()
    figures = [_figures(run, arguments.split) for run in arguments.runs]
    corpus = Corpus.open(arguments.data)
    steps = ", ".join(f"{run} at step {one['step']:,}" for run, one in zip(arguments.runs, figures, strict=True))
    print(f"corpus {corpus.fingerprint[:16]}, {arguments.split} split: {steps}")
    _finding(corpus, arguments, [one["step"] for one in figures])
    _others(figures)


def _figures(run: str, split: str) -> dict[str, Any]:
    """What `m6 eval` left of a run."""
    path = home_of(run) / FOLDER / FIGURES
    found = json.loads(path.read_text()) if path.exists() else {}
    if found.get("split") != split:
        sys.exit(f"{path}: no figures of the {split} split there: m6 eval --run {run} --split {split}")
    return found


def _finding(corpus: Corpus, arguments: argparse.Namespace, steps: list[int]) -> None:
    rows = quality.picture_rows(corpus, arguments.split)
    pairs = [quality.pair_of(corpus.picture(row)) for row in rows]
    names, families = [pair.name for pair in pairs], [pair.family for pair in pairs]
    of = zip(arguments.runs, steps, strict=True)
    models = [M6.load(run, step, arguments.data) for run, step in of]
    own = [retrieval(quality.similarities(m, pairs), names, names) for m in models]
    texts = [pair.words for pair in pairs]
    rivals = ridge.rivals(corpus, Path(arguments.data) / "cache", arguments.split, texts, rows)
    for rival, similarity in rivals.items():
        other = retrieval(similarity, names, names)
        print(f"\n| | | mean of the runs | each | {rival} | difference | not better |\n|" + "---|" * 7)
        for title, way in WAYS.items():
            for k in (1, 5, 10):
                each = [getattr(found, way).hits_Q(k) for found in own]
                mean_Q, rival_Q = np.mean(each, 0), getattr(other, way).hits_Q(k)
                ours, beside = bootstrap(mean_Q, families), paired_bootstrap(mean_Q, rival_Q, families)
                print(
                    f"| {title} | R@{k} | {ours.value:.3f} ({ours.low:.3f} to {ours.high:.3f}) "
                    f"| {' '.join(f'{hits.mean():.3f}' for hits in each)} | {rival_Q.mean():.3f} "
                    f"| {beside.difference:+.3f} ({beside.low:+.3f} to {beside.high:+.3f}) | {beside.not_better:.3f} |"
                )


def _others(figures: list[dict[str, Any]]) -> None:
    print("\n| figure | mean | " + " | ".join(f"run {number}" for number in range(1, len(figures) + 1)) + " |")
    print("|---|" + "---|" * (len(figures) + 1))
    flat = [_flat(one) for one in figures]
    for name in dict.fromkeys(name for one in flat for name in one):
        values = [one[name] for one in flat if name in one]
        print(
            f"| {name} | " + " | ".join(map(_shown, (np.mean(values).item(), *(one.get(name) for one in flat)))) + " |"
        )


def _flat(figures: Any, name: str = "") -> dict[str, float]:
    """Every measure but those of finding, by its path."""
    if isinstance(figures, dict):
        left_out = ("step", "parameters", "samples", "interval", "intervals", "n", "low", "high", "not_better")
        kept = {key: part for key, part in figures.items() if key not in left_out and not key.startswith("retrieval")}
        parts = (_flat(part, f"{name} {key}".strip()) for key, part in kept.items())
        return {key: value for part in parts for key, value in part.items()}
    return {name: figures} if isinstance(figures, int | float) else {}


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


if __name__ == "__main__":
    main()
