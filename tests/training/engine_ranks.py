"""What the engine tests run on each rank: a small model on the sample corpus, a few steps, and what came of it."""

import warnings
from pathlib import Path
from typing import Any

MODEL = {
    "preset": "m6-tiny", "layers": 2, "hidden": 64, "ffn": 256, "heads": 4, "experts": 8, "k": 2, "text_vocab": 540,
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "model": MODEL,
    "steps": 20,
    "global_batch": 16,
    "text_positions": 64,
    "tasks": {"caption": 2, "image_denoise": 1, "denoise": 1, "language": 1, "poem": 1, "review": 1},
    # Clips at every step, and moves the weights far within 20.
    "optimizer": {"lr": 1e-3, "clip": 0.3},
    "schedule": {"warmup": 5},
}
# Every offloaded tensor, however small, goes through the disk.
NVME = {"offload_param": {"device": "nvme", "max_in_cpu": 0}, "offload_optimizer": {"device": "nvme"}}
CPU = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
NONE: dict[str, Any] = {}


def settings(tiers: dict[str, Any], parallel: int, **block: Any) -> dict[str, Any]:
    """A ds_config as overrides of cpu.json."""
    zero = {
        name: {
            "pin_memory": False,
            "nvme_path": "auto",
            **({"buffer_size": "auto"} if name == "offload_param" else {}),
        }
        | tier
        for name, tier in tiers.items()
    }
    return {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage3_param_persistence_threshold": 0, **zero},
        "expert_parallel": {"autoep_size": parallel},
        "bf16": {"enabled": block.pop("bf16", False)},
        "m6": {"capacity": "1x", **block},
    }


class Rank:
    """One rank's engine and batches."""

    def __init__(self, data: Path, swap: Path, ds: dict[str, Any], changes: dict[str, Any] | None = None):
        import deepspeed
        import torch.distributed as dist

        from training import ds_config
        from training.data.batches import Collator, StepBatches
        from training.data.corpus import Corpus
        from training.data.order import GlobalOrder
        from training.data.tasks import TASKS
        from training.engine import Engine
        from training.recipe import parse_recipe

        warnings.simplefilter("ignore")
        deepspeed.init_distributed("gloo", verbose=False)
        values = RECIPE | {"ds_config": "ds_configs/cpu.json", "ds": ds} | (changes or {})
        self.recipe = parse_recipe(values, [], "test")
        world = dist.get_world_size()
        self.config = ds_config.resolve(self.recipe, world, 0, swap)
        corpus = Corpus.open(data)
        tasks = [TASKS[name](corpus, "train") for name in self.recipe.tasks]
        order = GlobalOrder(
            tasks, self.recipe.tasks, self.recipe.global_batch, self.recipe.text_positions, self.recipe.seed
        )
        self.collate = Collator(corpus, self.config.model)
        self.batches = StepBatches(order, self.collate, self.config.micro_batch, dist.get_rank(), world)
        self.engine = Engine(self.config, self.recipe.seed)

    def train(self, first: int, last: int) -> list[tuple[float, float]]:
        """Loss and gradient norm of the steps [first, last)."""
        from training.schedule import learning_rate

        results = [self.engine.step(self.batches.step(s), learning_rate(self.recipe, s)) for s in range(first, last)]
        return [(result.loss, result.grad_norm) for result in results]

    def blank_step(self) -> None:
        empty = self.collate([], self.recipe.text_positions, self.config.micro_batch)
        self.engine.step([empty] * self.config.accumulation, lr=0.0)


def train(
    data: Path, swap: Path, ds: dict[str, Any], changes: dict[str, Any] | None = None
) -> list[tuple[float, float]]:
    return Rank(data, swap, ds, changes).train(0, RECIPE["steps"])


def save_at(data: Path, swap: Path, ds: dict[str, Any], folder: Path, step: int, last: int) -> dict[str, Any]:
    """Train to `step`, save there, train on to `last`: the losses after the save, and the weights' digests at it."""
    from training import checkpoint

    rank = Rank(data, swap, ds)
    rank.train(0, step)
    checkpoint.save(rank.engine, folder, step, {}, keep=1)
    digests = state_digests(rank)
    return {"digests": digests, "losses": rank.train(step, last)}


def load_and_train(data: Path, swap: Path, ds: dict[str, Any], folder: Path, step: int, last: int) -> dict[str, Any]:
    from training import checkpoint

    rank = Rank(data, swap, ds)
    path, manifest = checkpoint.read_manifest(folder)
    checkpoint.load(rank.engine, path, manifest, rank.blank_step)
    digests = state_digests(rank)
    return {"digests": digests, "losses": rank.train(step, last)}


def save_without_space(data: Path, swap: Path, ds: dict[str, Any], folder: Path, room: int) -> Any:
    """Save, train a step, and save again while no file of rank 1 may pass `room` bytes: what was said, and left."""
    import os
    import resource

    from training import checkpoint
    from training.errors import UserError

    trained = Rank(data, swap, ds)
    trained.train(0, 1)
    checkpoint.save(trained.engine, folder, 1, {}, keep=1)
    before = state_digests(trained)
    trained.train(1, 2)
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))  # Python ignores the signal
    said = ""
    try:
        checkpoint.save(trained.engine, folder, 2, {}, keep=1)
    except UserError as error:
        said = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    path, manifest = checkpoint.read_manifest(folder)
    checkpoint.load(trained.engine, path, manifest, trained.blank_step)
    return said, path.name, state_digests(trained) == before


def state_digests(rank: Rank) -> dict[str, dict[int, bytes]]:
    """Each state's values by global offset, so that layouts can be compared: key -> {offset: bytes}."""
    from training.checkpoint import _states

    found: dict[str, dict[int, bytes]] = {}
    for key, value, (offset, _) in _states(rank.engine):
        found.setdefault(key, {})[offset] = value.numpy().tobytes()
    return found
