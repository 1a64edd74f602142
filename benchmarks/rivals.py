"""What a trained model has to beat: the ridge retriever on unseen concepts, and the character 5-gram on unseen texts.

    python -m benchmarks.rivals [--data data] [--cache data/cache]

Held-out figures of the test split of the real corpus (`m6 data fetch`), with 95 % intervals by bootstrap over
concept families, or over texts. Needs no model; pooled features are kept in the folder `--cache`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np

from training.data.corpus import Corpus
from training.data.splits import Split
from training.data.tasks.contrast import picture_words
from training.measures.bootstrap import Interval, bootstrap
from training.measures.retrieval import Recall, retrieval
from training.rivals.ngram import CharacterNgram
from training.rivals.ridge import fit, pooled_features

STYLE = "fluent-3d"
SPLITS: list[list[Split]] = [["train"], ["train", "validation"]]
KINDS = {"poems": ["poem"], "reviews": ["review"], "both": ["poem", "review"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="data")
    parser.add_argument("--cache", default="data/cache")
    arguments = parser.parse_args()
    corpus = Corpus.open(arguments.data)
    print(f"corpus {corpus.fingerprint[:16]}")
    _retriever(corpus, arguments.cache)
    _ngrams(corpus)


def _retriever(corpus: Corpus, cache: str) -> None:
    start = time.perf_counter()
    features_ND = pooled_features(corpus, cache)
    print(f"features of {len(features_ND)} pictures: {time.perf_counter() - start:.0f} s")
    rows = corpus.picture_rows("test", style=STYLE)
    pictures = [corpus.picture(int(row)) for row in rows]
    labels, families = [p.zh for p in pictures], [p.family for p in pictures]
    for splits in SPLITS:
        retriever = fit(corpus, features_ND, splits)
        for words, texts in ("label and tags", [picture_words(p) for p in pictures]), ("label", labels):
            found = retrieval(retriever.similarity(features_ND[rows], texts), labels, labels)
            for way, recall in ("image to text", found.image_to_text), ("text to image", found.text_to_image):
                cells = " | ".join(_recall_cells(recall, families))
                print(f"| {' + '.join(splits)} | {words} | {way} | {cells} |", flush=True)
    print(f"N {found.image_to_text.n}, chance R@10 {found.image_to_text.chance_r10:.3f}")


def _recall_cells(recall: Recall, families: Sequence[str]) -> list[str]:
    return [_cell(bootstrap(recall.hits_Q(k), families)) for k in (1, 5, 10)]


def _ngrams(corpus: Corpus) -> None:
    tests = [_texts(corpus, "test", [kind]) for kind in ("poem", "review")]
    for trained_on, kinds in KINDS.items():
        texts = _texts(corpus, "train", kinds)
        for ends in (True, False):
            start = time.perf_counter()
            cells = _ngram_cells(CharacterNgram(texts, ends=ends), tests)
            size = f"{sum(map(len, texts)) / 1e6:.2f} M"
            print(
                f"| {trained_on} | {size} | {'yes' if ends else 'no'} | {cells} | {time.perf_counter() - start:.0f} |"
            )


def _texts(corpus: Corpus, split: str, kinds: Sequence[str]) -> list[str]:
    rows = np.concatenate([corpus.text_rows(split, kind) for kind in kinds])
    return corpus.texts.data.column("text").take(rows).to_pylist()


def _ngram_cells(model: CharacterNgram, tests: list[list[str]]) -> str:
    """Bits per character of each set of texts; texts are drawn alone."""
    return " | ".join(
        _cell(bootstrap(model.bits(texts), [str(i) for i in range(len(texts))], np.array(list(map(len, texts)))))
        for texts in tests
    )


def _cell(interval: Interval) -> str:
    return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"


if __name__ == "__main__":
    main()
