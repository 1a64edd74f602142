"""What the engine tests run on each rank: a small model on the sample corpus, a few steps, and what came of it."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from training.start import init_distributed

# Experts are wide enough for DeepSpeed to swap their weights: it leaves what is under 1 MiB on a rank in memory.
MODEL = {
    "preset": "m6-tiny", "layers": 2, "hidden": 64, "ffn": 2048, "heads": 4, "experts": 8, "k": 2, "text_vocab": 540,
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
        import torch.distributed as dist

        from training import ds_config
        from training.data.batches import Collator, StepBatches
        from training.data.corpus import Corpus
        from training.data.order import GlobalOrder
        from training.data.tasks import TASKS
        from training.engine import Engine
        from training.recipe import parse_recipe

        warnings.simplefilter("ignore")
        init_distributed()
        values = RECIPE | {"ds_config": "ds_configs/cpu.json", "ds": ds} | (changes or {})
        self.recipe = parse_recipe(values, [], "test")
        world = dist.get_world_size()
        self.config = ds_config.resolve(self.recipe, world, 0, swap)
        corpus = Corpus.open(data)
        tasks = [TASKS[name](corpus, "train") for name in self.recipe.tasks]
        recipe = self.recipe
        order = GlobalOrder(tasks, recipe.tasks, recipe.global_batch, recipe.text_positions, recipe.seed, recipe.block)
        self.collate = Collator(corpus, self.config.model, recipe.block)
        self.batches = StepBatches(order, self.collate, self.config.micro_batch, dist.get_rank(), world)
        self.engine = Engine(self.config, self.recipe.seed)

    def train(self, first: int, last: int) -> list[tuple[float, float]]:
        """Loss and gradient norm of the steps [first, last)."""
        from training.schedule import learning_rate

        results = [self.engine.step(self.batches.step(s), learning_rate(self.recipe, s)) for s in range(first, last)]
        return [(result.loss, result.grad_norm) for result in results]

    def save(self, folder: Path, step: int) -> None:
        """As a run does, into `folder`/checkpoints."""
        from training import checkpoint, checkpoint_files, states

        corpus = self.collate.corpus
        facts = {
            "adam_step": states.adam_step(self.engine), "recipe": self.recipe.model_dump(mode="json"),
            "tokenizer": corpus.tokenizer.sha256, "data": corpus.fingerprint,
            "feature_network": corpus.feature_network_sha256,
        }  # fmt: skip
        saver = checkpoint.Saver(folder / "checkpoints", checkpoint_files.Retention(9), 2**30)
        saver.save(states.parts(self.engine), step, facts)
        outcome = saver.wait()
        assert outcome is not None and not outcome.error, outcome

    def blank_step(self) -> None:
        empty = self.collate([], self.recipe.text_positions, self.config.micro_batch)
        self.engine.step([empty] * self.config.accumulation, lr=0.0)


def train(
    data: Path, swap: Path, ds: dict[str, Any], changes: dict[str, Any] | None = None, steps: int = RECIPE["steps"]
) -> list[tuple[float, float]]:
    rank = Rank(data, swap, ds, changes)
    if rank.config.placement.parameters.coldest == "nvme":
        assert list(swap.rglob("*_param.tensor.swp")), "no parameter is truly on the disk"
    return rank.train(0, steps)


def train_on_tiers(data: Path, swap: Path, ds: dict[str, Any], changes: dict[str, Any], steps: int) -> tuple[Any, ...]:
    """Losses and norms, and the bytes of the states by tier and kind, as they are and as they were said to be."""
    from training import states

    rank = Rank(data, swap, ds, changes)
    results, config = rank.train(0, steps), rank.config
    return results, states.bytes_by_tier(rank.engine), config.placement.bytes(config.elements, config.sizes)


def states_kept(data: Path, swap: Path, ds: dict[str, Any], clip: float, once: bool) -> dict[str, Any]:
    """Train four steps with equal numbers kept `once` or, as DeepSpeed has it, twice: the losses, the masters after
    them, and the pairs of states that share their memory."""
    from training import engine

    if not once:
        engine.keep_once = engine.spare_passes = lambda _: None
    rank = Rank(data, swap, ds, {"optimizer": {"lr": 1e-3, "clip": clip}})
    losses = rank.train(0, 4)
    optimizer = rank.engine.deepspeed.optimizer
    gradients, pairs = optimizer.grad_partitions_flat_buffer.untyped_storage().data_ptr(), set()
    masters = optimizer.fp32_partitioned_groups_flat
    for master, working in zip(masters, optimizer.fp16_partitioned_groups_flat, strict=True):
        if master.grad is not None and master.grad.untyped_storage().data_ptr() == gradients:
            pairs.add("gradients")
        if working is not None and master.data_ptr() == working.data_ptr():
            pairs.add("weights")
    return {"losses": losses, "digests": state_digests(rank), "pairs": pairs}


def save_at(
    data: Path, swap: Path, ds: dict[str, Any], folder: Path, step: int, last: int, buffer: int = 2**30
) -> dict[str, Any]:
    """Train to `step`, save there, train on to `last`: the losses after the save, and the weights' digests at it."""
    from training import checkpoint, checkpoint_files, states

    rank = Rank(data, swap, ds)
    rank.train(0, step)
    digests = state_digests(rank)
    saver = checkpoint.Saver(folder, checkpoint_files.Retention(1), buffer)
    saver.save(states.parts(rank.engine), step, {"adam_step": states.adam_step(rank.engine)})
    losses = rank.train(step, last)  # while it is being written
    outcome = saver.wait()
    assert outcome is not None and not outcome.error, outcome
    return {"digests": digests, "losses": losses, "outcome": outcome}


def load_and_train(
    data: Path,
    swap: Path,
    ds: dict[str, Any],
    folder: Path,
    step: int,
    last: int,
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    from training import checkpoint, states

    rank = Rank(data, swap, ds, changes)
    found = checkpoint.newest(folder)
    assert found is not None and found.manifest["step"] == step
    checkpoint.load(rank.engine, found.path, found.manifest, rank.blank_step)
    digests = state_digests(rank)
    losses = rank.train(step, last)
    return {"digests": digests, "losses": losses, "bytes": states.bytes_by_tier(rank.engine)}


def train_parent(data: Path, folder: Path, ds: dict[str, Any], changes: dict[str, Any], steps: int) -> None:
    rank = Rank(data, folder / "swap", ds, changes | {"data": str(data)})
    rank.train(0, steps)
    rank.save(folder, steps)


def fine_tune(
    data: Path,
    parent: Path,
    folder: Path,
    ds: dict[str, Any],
    changes: dict[str, Any],
    steps: Sequence[int],
) -> dict[str, Any]:
    """Go on from `folder`'s newest checkpoint, or begin from the parent's; save after each number of `steps`.

    The losses, the state at both ends, its bytes as they are and as they were said to be, and what the model says next.
    """
    from training import checkpoint, states
    from training.parent import Parent

    started = Parent.at(parent)
    inherited = {"model": started.recipe.model, "start": started.start.model_dump(), "data": str(data)}
    rank = Rank(data, folder / "swap", ds, inherited | changes)
    if rank.config.placement.parameters.coldest == "nvme":
        assert any(p.ds_tensor.final_location == "nvme" for p in rank.engine.model.parameters() if not p.requires_grad)
    if found := checkpoint.newest(folder / "checkpoints"):
        checkpoint.load(rank.engine, found.path, found.manifest, rank.blank_step)
        first = found.manifest["step"]
    else:
        first = 0
        checkpoint.begin(rank.engine, started)
    arrived, losses, config = state_digests(rank), [], rank.config
    for last in steps:
        losses += rank.train(first, last)
        rank.save(folder, last)
        first = last
    batch = {key: value for key, value in rank.batches.step(99)[0].items() if key != "labels_BT"}
    return {
        "losses": losses,
        "arrived": arrived,
        "left": state_digests(rank),
        "bytes": states.bytes_by_tier(rank.engine),
        "said": config.placement.bytes(config.elements, config.sizes),
        "batch": batch,
        "logits": rank.engine.next_logits(batch),
    }


def go_on(
    data: Path, swap: Path, ds: dict[str, Any], folder: Path, last: int, changes: dict[str, Any]
) -> dict[str, Any]:
    """Train to step `last` from the newest checkpoint of `folder`, if there is one, and save there.

    The digests of the state at both ends, and the positions of the rows that this rank trained on.
    """
    from training import checkpoint, checkpoint_files, states

    rank = Rank(data, swap, ds, changes)
    first, arrived = 0, None
    if found := checkpoint.newest(folder):
        checkpoint.load(rank.engine, found.path, found.manifest, rank.blank_step)
        first, arrived = found.manifest["step"], state_digests(rank)
    positions: list[int] = []
    order = rank.batches.order
    row = order.row
    order.row = lambda position: (positions.append(position), row(position))[1]
    rank.train(first, last)
    saver = checkpoint.Saver(folder, checkpoint_files.Retention(1), 2**30)
    saver.save(states.parts(rank.engine), last, {"adam_step": states.adam_step(rank.engine)})
    outcome = saver.wait()
    assert outcome is not None and not outcome.error, outcome
    return {"arrived": arrived, "left": state_digests(rank), "positions": positions}


def state_digests(rank: Rank) -> dict[str, dict[int, bytes]]:
    """Each state's values by global offset, so that layouts can be compared: key -> {offset: bytes}.

    By DeepSpeed's own accessors: a reference for what the checkpoint reads and writes. They know nothing of 8-bit
    states.
    """
    from deepspeed.utils import groups, safe_get_local_fp32_param, safe_get_local_optimizer_state

    if rank.config.optimizer_states == "8-bit":
        return decoded_states(rank)
    found: dict[str, dict[int, bytes]] = {}
    for name, parameter in rank.engine.model.named_parameters():
        first = parameter.ds_zero_partition_rank * parameter.ds_tensor.ds_numel
        real = min(parameter.ds_tensor.ds_numel, parameter.ds_numel - first)
        if real <= 0:
            continue
        if getattr(parameter, "ds_zero_placement_family", "") == "autoep_expert":
            first += parameter.ds_numel * groups._get_expert_parallel_rank(parameter.ds_zero_partition_group_name)
        if not parameter.requires_grad:
            found.setdefault(f"{name}.master", {})[first] = frozen_values(parameter)[:real].numpy().tobytes()
            continue
        for kind in ("master", *(("exp_avg", "exp_avg_sq") if rank.engine.deepspeed.optimizer.optimizer.state else ())):
            get = safe_get_local_fp32_param if kind == "master" else safe_get_local_optimizer_state
            value = get(parameter) if kind == "master" else get(parameter, kind)
            found.setdefault(f"{name}.{kind}", {})[first] = value[:real].detach().numpy().tobytes()
    return found


def frozen_values(parameter: Any) -> Tensor:
    """This rank's share of a frozen weight, fp32, wherever it lives."""
    import torch

    kept, share = parameter.ds_tensor, parameter.ds_tensor.ds_numel
    if kept.final_location != "nvme":
        return kept.detach().float()
    parameter.all_gather()  # by DeepSpeed's own reading
    first = parameter.ds_zero_partition_rank * share
    whole = torch.nn.functional.pad(parameter.data.flatten().float(), (0, share))
    values = whole[first : first + share].clone()
    parameter.partition()
    return values


def decoded_states(rank: Rank) -> dict[str, dict[int, bytes]]:
    from training import states

    found: dict[str, dict[int, bytes]] = {}
    for part in states.parts(rank.engine):
        values = part.source if isinstance(part.source, Tensor) else part.source(0, part.numel)
        found.setdefault(part.key, {})[part.offset] = values.numpy().tobytes()
    return found
