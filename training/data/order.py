"""The global order: what stands at a position is a pure function of (seed, position).

The whole data state is one integer, the next position; any number of ranks takes up the same run, and every
position is seen exactly once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from training.data.corpus import Corpus
from training.data.tasks import TASKS, Row, Task
from training.errors import UserError
from training.recipe import Recipe

T = TypeVar("T")

ROUNDS = 4  # of the Feistel network: enough to mix well (Luby and Rackoff 1988)


class GlobalOrder:
    """Rows of several tasks in one endless order; each step of `batch` rows has the same share of each task.

    Within a step each task's rows are spread evenly, so that micro-batches of more rows than there are tasks have
    about the same work on all ranks; those of a grouped task in blocks of `block` positions, which a micro-batch holds
    whole if it is a multiple of that. Each task goes through its pool in an order of its own, a new one each epoch.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        weights: Mapping[str, float],
        batch: int,
        text_positions: int,
        seed: int,
        block: int = 1,
    ):
        self.tasks = sorted(tasks, key=lambda task: task.name)
        if empty := [task for task in self.tasks if not len(task.pool)]:
            switches = " ".join(f"tasks.{task.name}=0" for task in empty)
            raise UserError(
                f"tasks.{empty[0].name}: the corpus has nothing for it in split {empty[0].split!r}: leave it out "
                f"({switches})"
            )
        self.batch, self.text_positions, self.seed = batch, text_positions, seed
        self.counts = row_counts({task.name: weights[task.name] for task in self.tasks}, batch, block)
        self._places = self._spread(block)

    def _spread(self, block: int) -> list[tuple[Task, int]]:
        """Of each place in a step: its task, and which of that task's rows it is."""
        alone = [task for task in self.tasks if not task.grouped]
        grouped = [task for task in self.tasks if task.grouped]
        rows = iter(spread(alone, [self.counts[task.name] for task in alone]))
        # Blocks of one row each, or the grouped task's and others.
        counts = [self.counts[task.name] // block for task in grouped]
        blocks = [*grouped, None]
        places: list[tuple[Task, int]] = []
        for task, turn in spread(blocks, [*counts, self.batch // block - sum(counts)]):
            places += [(task, turn * block + place) if task else next(rows) for place in range(block)]
        return places

    def task_at(self, position: int) -> Task:
        return self._places[position % self.batch][0]

    def row(self, position: int) -> Row:
        task = self.task_at(position)
        return task.row(self.item(position), task.limit(self.text_positions), random_at(self.seed, position))

    def item(self, position: int) -> int:
        """What of its task's pool a position is made of."""
        step, place = divmod(position, self.batch)
        task, turn = self._places[place]
        epoch, draw = divmod(step * self.counts[task.name] + turn, len(task.pool))
        chosen, side = divmod(draw, task.sides)
        chosen = shuffled(chosen, len(task.pool) // task.sides, (self.seed, task.name, epoch))
        return int(task.pool[chosen * task.sides + side])

    def width(self, start: int, stop: int) -> int:
        """Text positions that the rows of [start, stop), within one step, need at the most."""
        places = self._places[start % self.batch : (stop - 1) % self.batch + 1]
        return max(task.limit(self.text_positions) for task, _ in places)


def training_order(corpus: Corpus, recipe: Recipe) -> GlobalOrder:
    """Of a recipe's tasks on the training split. Raises UserError."""
    tasks = [TASKS[task](corpus, "train") for task in recipe.tasks]
    return GlobalOrder(tasks, recipe.tasks, recipe.global_batch, recipe.text_positions, recipe.seed, recipe.block)


def random_at(seed: int, position: int) -> np.random.Generator:
    """The random numbers of one position."""
    return np.random.Generator(np.random.Philox(key=[seed, position]))


def spread(things: Sequence[T], counts: Sequence[int]) -> list[tuple[T, int]]:
    """Each thing as often as it counts, evenly spread, with its turn (from 0)."""
    turns = [((turn + 0.5) / count, i, turn) for i, count in enumerate(counts) for turn in range(count)]
    return [(things[i], turn) for _, i, turn in sorted(turns)]


def row_counts(weights: Mapping[str, float], batch: int, block: int) -> dict[str, int]:
    """Rows of each task in a step, those of a grouped task in whole blocks. Raises UserError if that cannot be."""
    grouped = [name for name in weights if TASKS[name].grouped]
    return allot_blocks(weights, batch, grouped[0], block) if grouped else allot(weights, batch)


def allot_blocks(weights: Mapping[str, float], batch: int, grouped: str, block: int) -> dict[str, int]:
    """`allot`, where the task `grouped` has whole blocks: as many as come nearest to its share, and at least one.

    Raises UserError if that cannot be.
    """
    if batch % block:
        raise UserError(f"global_batch={batch} is not divisible by {block}, the rows of a contrastive group")
    rest = {name: weight for name, weight in weights.items() if name != grouped}
    own = max(1, round(allot(weights, batch)[grouped] / block)) * block
    if rest:
        own = min(own, max(batch - block, block))
    if len(rest) > batch - own:
        raise UserError(f"global_batch={batch} leaves no room for {', '.join(rest)} beside {own} contrastive rows")
    return {grouped: own, **(allot(rest, batch - own) if rest else {})}


def allot(weights: Mapping[str, float], batch: int) -> dict[str, int]:
    """Rows of each task in a step: largest remainders, at least one each. Raises UserError if that cannot be."""
    if len(weights) > batch:
        raise UserError(f"global_batch={batch} is less than the number of tasks, {len(weights)}")
    total = sum(weights.values())
    shares = {name: weight / total * batch for name, weight in weights.items()}
    counts = {name: max(1, int(share)) for name, share in shares.items()}
    while sum(counts.values()) != batch:
        short = sum(counts.values()) < batch
        gaps = {n: shares[n] - counts[n] for n in counts if short or counts[n] > 1}
        name = max(gaps, key=gaps.__getitem__) if short else min(gaps, key=gaps.__getitem__)
        counts[name] += 1 if short else -1
    return counts


def shuffled(index: int, size: int, key: tuple[object, ...]) -> int:
    """Where a keyed random permutation of range(size) sends `index`, in constant memory.

    A Feistel network over the next even power of two, walked until it lands inside (Black and Rogaway 2002).
    """
    half = max((size - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    digest = hashlib.sha256(repr(key).encode()).digest()
    keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS)]
    while True:
        left, right = index >> half, index & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        index = left << half | right
        if index < size:
            return index


def _mix(x: int) -> int:
    """A 64-bit finaliser (SplitMix64, Steele et al. 2014)."""
    x &= 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31
