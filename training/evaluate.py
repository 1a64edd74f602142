"""Evaluation during training: validation loss of each task, and pictures described for the eye."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from model.decoding import greedy
from training.data.batches import WIDTH_MULTIPLE, Collator
from training.data.corpus import Corpus
from training.data.order import random_at, shuffled
from training.data.tasks import TASKS, Row, Task, View
from training.data.tasks.caption import ASK_NAME
from training.engine import Engine
from training.recipe import Recipe
from training.records import Sample

SEED = 0  # of validation rows: the same in every run, so that runs can be compared
SAID_AT_MOST = 16  # tokens of a sample


class Validation:
    """Fixed validation rows of the recipe's tasks, the same at every evaluation and on any number of ranks."""

    def __init__(self, corpus: Corpus, recipe: Recipe, collate: Collator):
        self.corpus, self.collate = corpus, collate
        self.tasks = [TASKS[name](corpus, "validation") for name in recipe.tasks]
        self.tasks = [task for task in self.tasks if len(task.pool)]
        self.blocks = {task.name: recipe.block if task.grouped else 1 for task in self.tasks}
        self.width = {task.name: task.limit(recipe.text_positions) for task in self.tasks}
        self.rows = {task.name: self._rows(task, recipe.evaluation.rows) for task in self.tasks}
        self.sample_rows = self._sample_rows(recipe.evaluation.samples)

    def losses(self, engine: Engine) -> dict[str, float]:
        """Nats a target, {"loss/validation/<task>": …}. Collective."""
        sums = torch.zeros(len(self.tasks), 2, dtype=torch.float64, device=engine.device)
        for index, task in enumerate(self.tasks):
            for rows in _shares(self.rows[task.name], engine.config.micro_batch, self.blocks[task.name]):
                batch = self.collate(rows, self.width[task.name], engine.config.micro_batch)
                loss_B, targets_B = engine.losses(batch)
                sums[index] += torch.tensor([loss_B.sum(dtype=torch.float64), targets_B.sum()]).to(sums)
        dist.all_reduce(sums)
        return {f"loss/validation/{t.name}": (s[0] / s[1]).item() for t, s in zip(self.tasks, sums, strict=True)}

    def samples(self, engine: Engine) -> list[Sample]:
        """Validation pictures named by the model, greedily. Collective; every rank gets them all."""
        if not self.sample_rows:
            return []
        tokenizer = self.corpus.tokenizer
        rows = [self._ask(row) for row in self.sample_rows]
        batch = self.collate(rows, max(len(row.source) + 1 for row in rows))
        del batch["labels_BT"]
        said = greedy(engine.next_logits, batch, SAID_AT_MOST, tokenizer.vocab_size, tokenizer.eos_id)
        pictures = [self.corpus.picture(row) for row in self.sample_rows]
        return [
            Sample(p.image, "caption", ASK_NAME, p.zh, tokenizer.decode(ids))
            for p, ids in zip(pictures, said, strict=True)
        ]

    def _rows(self, task: Task, count: int) -> list[Row]:
        """`count` rows, or as many as there are; of a grouped task whole blocks, or all that there is."""
        pool, sides, block = task.pool, task.sides, self.blocks[task.name]
        count = min(len(pool), max(count - count % block, block))
        drawn = [shuffled(i, len(pool) // sides, (SEED, task.name)) for i in range(count // sides)]
        items = [int(pool[number * sides + side]) for number in drawn for side in range(sides)]
        return [task.row(item, self.width[task.name], random_at(SEED, place)) for place, item in enumerate(items)]

    def _ask(self, row: int) -> Row:
        return Row(self.corpus.tokenizer.encode(ASK_NAME), [self.corpus.tokenizer.eos_id], View(row, 0))

    def _sample_rows(self, count: int) -> list[int]:
        pool = self.corpus.picture_rows("validation")
        question = len(self.corpus.tokenizer.encode(ASK_NAME)) + 1
        if question + WIDTH_MULTIPLE + SAID_AT_MOST > self.collate.model.max_positions:
            return []  # there is no room for the question, rounded up, and an answer
        return [int(pool[shuffled(i, len(pool), (SEED, "samples"))]) for i in range(min(count, len(pool)))]


def _shares(rows: Sequence[Row], size: int, block: int) -> list[Sequence[Row]]:
    """This rank's share of the blocks of rows in batches of `size`, a multiple of `block`.

    The same number of batches on all ranks, the last perhaps empty.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    blocks = [rows[start : start + block] for start in range(0, len(rows), block)]
    own = [row for one in blocks[rank::world] for row in one]
    most = -(-len(blocks) // world) * block
    return [own[start : start + size] for start in range(0, most, size)]
