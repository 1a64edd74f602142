"""Tokens a second of greedy decoding: with the cache of keys and values, and by the whole pass for each token.

    python -m benchmarks.decoding [--preset m6-tiny] [--rows 1 8] [--new 256] [--rounds 5]

Prompts of the corpus' validation rows (pictures with a question, titles of poems, topics of reviews), other ones in
each round, the same for both; no end, so that both say all `--new` tokens. The weights are those of a model that is not
trained: they do not change the work. One after the other in each round; medians over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from model.config import PRESETS
from model.decoding import Batch, Decoding, generate, greedy
from model.m6 import M6
from training.data.batches import Collator
from training.data.corpus import Corpus
from training.data.order import random_at
from training.data.tasks import TASKS, Row

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("caption", "poem", "review")
WARM_UP = 8  # tokens of a call that is not timed


class Prompts:
    """Rows of the corpus without what is to be said."""

    def __init__(self, data: Path, preset: str):
        corpus = Corpus.open(data)
        self.collate = Collator(corpus, PRESETS[preset].config)
        self.tasks = [TASKS[kind](corpus, "validation") for kind in KINDS]
        self.end = corpus.tokenizer.eos_id
        self.taken = 0

    def take(self, count: int) -> Batch:
        rows = [self._next() for _ in range(count)]
        batch = self.collate(rows, max(len(row.source) + 1 for row in rows))
        del batch["labels_BT"]
        return batch

    def _next(self) -> Row:
        task, random = self.tasks[self.taken % len(KINDS)], random_at(0, self.taken)
        self.taken += 1
        row = task.row(int(random.choice(task.pool)), 128, random)
        return Row(row.source, [self.end], row.picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="m6-tiny")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    arguments = parser.parse_args()
    model, prompts = M6(PRESETS[arguments.preset].config).eval(), Prompts(arguments.data, arguments.preset)
    print("| rows | prompts, tokens | with the cache | without | times as many | equal tokens |")
    print("|---|---|---|---|---|---|")
    for rows in arguments.rows:
        print(compare(model, [prompts.take(rows) for _ in range(arguments.rounds)], arguments.new), flush=True)


def compare(model: M6, batches: list[Batch], new: int) -> str:
    """A line of the table."""
    seconds: dict[Callable[[M6, Batch, int], list[list[int]]], list[float]] = {with_cache: [], without_cache: []}
    equal = []
    for batch in batches:
        said = []
        for decode, times in seconds.items():
            decode(model, batch, WARM_UP)
            start = time.perf_counter()
            said.append(decode(model, batch, new))
            times.append(time.perf_counter() - start)
        equal += [
            one == other for ours, theirs in zip(*said, strict=True) for one, other in zip(ours, theirs, strict=True)
        ]
    rows, lengths = len(batches[0]["length_B"]), torch.cat([batch["length_B"] for batch in batches])
    rates = [rows * new / statistics.median(times) for times in seconds.values()]
    ratio = statistics.median(theirs / ours for ours, theirs in zip(*seconds.values(), strict=True))
    return (
        f"| {rows} | {lengths.min()}–{lengths.max()} | {rates[0]:.0f} | {rates[1]:.0f} | {ratio:.1f} "
        f"| {statistics.mean(equal):.1%} |"
    )


def with_cache(model: M6, batch: Batch, new: int) -> list[list[int]]:
    settings = Decoding(room=new, vocabulary=range(model.config.text_vocab), end=None)
    return [answers[0].tokens for answers in generate(model, batch, settings)]


@torch.no_grad()
def without_cache(model: M6, batch: Batch, new: int) -> list[list[int]]:
    return greedy(lambda whole: model(whole)["logits_BV"], batch, new, model.config.text_vocab, end=-1)


if __name__ == "__main__":
    main()
