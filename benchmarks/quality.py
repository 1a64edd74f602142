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
    corpus = Corpus.open(arguments.data)
    print(f"corpus {corpus.fingerprint[:16]}, {arguments.split} split, {len(arguments.runs)} runs")
    _finding(corpus, arguments.runs, arguments.split, Path(arguments.data) / "cache")
    _others([json.loads((home_of(run) / FOLDER / FIGURES).read_text()) for run in arguments.runs])


def _finding(corpus: Corpus, runs: list[str], split: str, cache: Path) -> None:
    rows = quality.picture_rows(corpus, split)
    pairs = [quality.pair_of(corpus.picture(row)) for row in rows]
    names, families = [pair.name for pair in pairs], [pair.family for pair in pairs]
    features = ridge.pooled_features(corpus, cache)
    retriever = ridge.fit(corpus, features, ["train", "validation"] if split == "test" else ["train"])
    rival = retrieval(retriever.similarity(features[rows], [pair.words for pair in pairs]), names, names)
    own = [retrieval(quality.similarities(M6.load(run), pairs), names, names) for run in runs]
    print(
        "\n| | | mean of the runs | each | ridge retriever | difference | not better |\n|---|---|---|---|---|---|---|"
    )
    for title, way in WAYS.items():
        for k in (1, 5, 10):
            each = [getattr(found, way).hits_Q(k) for found in own]
            mean_Q, rival_Q = np.mean(each, 0), getattr(rival, way).hits_Q(k)
            ours, beside = bootstrap(mean_Q, families), paired_bootstrap(mean_Q, rival_Q, families)
            print(
                f"| {title} | R@{k} | {ours.value:.3f} ({ours.low:.3f} to {ours.high:.3f}) "
                f"| {' '.join(f'{hits.mean():.3f}' for hits in each)} | {rival_Q.mean():.3f} "
                f"| {beside.difference:+.3f} ({beside.low:+.3f} to {beside.high:+.3f}) | {beside.not_better:.3f} |"
            )


def _others(figures: list[dict[str, Any]]) -> None:
    print("\n| figure | " + " | ".join(f"run {number}" for number in range(1, len(figures) + 1)) + " |")
    print("|---|" + "---|" * len(figures))
    for name in dict.fromkeys(name for one in figures for name in _flat(one)):
        print(f"| {name} | " + " | ".join(_shown(_flat(one).get(name)) for one in figures) + " |")


def _flat(figures: Any, name: str = "") -> dict[str, float]:
    """Every number but those of intervals and of finding, by its path."""
    if isinstance(figures, dict):
        left_out = ("interval", "intervals", "samples", "retrieval", "retrieval_ridge", "retrieval_above_ridge")
        parts = (_flat(part, f"{name} {key}".strip()) for key, part in figures.items() if key not in left_out)
        return {key: value for part in parts for key, value in part.items()}
    return {name: figures} if isinstance(figures, int | float) else {}


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


if __name__ == "__main__":
    main()
