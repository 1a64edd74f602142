"""Training steps to measure: our engine on full rows of real text, with a clock of phases.

Every position holds a token and is a target, so that models of other libraries can be given the same work.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.phases import PhaseClock
from model.config import PRESETS, ModelConfig
from training.data.corpus import Corpus
from training.data.order import GlobalOrder
from training.data.tasks import TASKS
from training.ds_config import resolve
from training.engine import Engine
from training.recipe import parse_recipe

CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"
TIERS = {"device": "cpu.json", "cpu": "cpu-offload.json", "nvme": "nvme.json"}  # where states live
TEXTS = {"language": 1, "poem": 1, "review": 1}
ROW = 128  # positions of a row
STEPS = 1000  # of the schedule, more than are taken


def text_model(preset: str, **changes: Any) -> ModelConfig:
    """A preset with gated experts and top-k routing, as Mixtral has, for text alone (no row has a picture)."""
    shape = {"gated_experts": True, "routing": "top-k", "image_patches": 1, "image_channels": 1}
    return dataclasses.replace(PRESETS[preset].config, **shape, **changes)


class Text:
    """Real text of the corpus as full rows of token ids, other ones on each rank and in each step."""

    def __init__(self, data: Path, tokens: int):
        """`tokens`: of a step, on all ranks."""
        corpus = Corpus.open(data)
        self.begin = corpus.tokenizer.bos_id
        self.order = GlobalOrder([TASKS[name](corpus, "train") for name in TEXTS], TEXTS, len(TEXTS), 2 * ROW, seed=1)
        self.rows = tokens // ROW // dist.get_world_size()
        self.position = dist.get_rank() * 2**40
        self.stream: list[int] = []

    def take(self) -> Tensor:
        """This rank's ids [B, ROW + 1] of the next step; the last column is a target only."""
        needed = self.rows * (ROW + 1)
        while len(self.stream) < needed:
            row = self.order.row(self.position)
            self.stream += [self.begin, *row.source, *row.target]
            self.position += 1
        ids, self.stream = self.stream[:needed], self.stream[needed:]
        return torch.tensor(ids).view(self.rows, ROW + 1)


@dataclass(frozen=True)
class Measured:
    seconds: float
    flops: int  # active ones, of all ranks
    phases: dict[str, float]  # seconds of this rank, which add up


class OurStep:
    """Our engine with one micro-batch a step; each call takes a step. Collective."""

    def __init__(
        self,
        config: ModelConfig,
        tier: str,
        tokens: int,
        swap: Path,
        bf16: bool = False,
        states: str = "fp32",
        zero: dict[str, Any] | None = None,
    ):
        """`states`: `m6.optimizer_states`; `zero`: what differs in the ds_config's `zero_optimization`."""
        self.config = config
        rows, base = tokens // ROW, PRESETS["m6-tiny"].config
        changes = {key: value for key, value in vars(config).items() if value != getattr(base, key)}
        recipe = {
            "model": {"preset": "m6-tiny", **{k: v for k, v in changes.items() if not k.startswith("capacity")}},
            "ds_config": str(CONFIGS / TIERS[tier]),
            "ds": {
                "train_micro_batch_size_per_gpu": rows // dist.get_world_size(),
                "bf16": {"enabled": bf16},
                "m6": {"capacity": config.capacity, "optimizer_states": states},
                "zero_optimization": zero or {},
            },
            "global_batch": rows,
            "steps": STEPS,
            "text_positions": ROW,
            "tasks": TEXTS,
        }
        resolved = resolve(parse_recipe(recipe, [], "benchmark"), dist.get_world_size(), 0, swap)
        self.engine = Engine(resolved, seed=1)
        self.clock = PhaseClock()
        self.clock.install()

    def __call__(self, ids: Tensor) -> Measured:
        self.clock.restart()
        start = time.perf_counter()
        with self.clock.phase("data"):
            batch = full_rows(ids, self.config)
        result = self.engine.step([batch], lr=1e-4)
        phases = self.clock.read()
        kept = int(result.routing[:, :, 1].sum())
        flops = self.config.training_flops(result.tokens, result.said, kept)
        return Measured(time.perf_counter() - start, flops, phases)


def full_rows(ids: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    rows = len(ids)
    return {
        "tokens_BT": ids[:, :-1],
        "labels_BT": ids[:, 1:],
        "source_B": torch.zeros(rows, dtype=torch.int64),
        "length_B": torch.full((rows,), ROW),
        "image_BPC": torch.zeros(rows, config.image_patches, config.image_channels),
        "has_image_B": torch.zeros(rows, dtype=torch.bool),
    }
