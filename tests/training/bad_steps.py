"""What the tests of bad steps run on each rank: real training, with faults put in where they would arise."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.training.engine_ranks import Rank, state_digests
from training.start import init_distributed

ROOT = Path(__file__).resolve().parents[2]
BAD_RANK = 1


@contextlib.contextmanager
def bad_loss(rank: Rank, value: float) -> Iterator[None]:
    """One rank's loss is `value`, with no trace in its gradient."""
    import torch.distributed as dist

    def spoil(_module: object, _batch: object, out: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return out | {"loss_B": out["loss_B"] + (value if dist.get_rank() == BAD_RANK else 0.0)}

    handle = rank.engine.model.register_forward_hook(spoil)
    yield
    handle.remove()


@contextlib.contextmanager
def bad_gradient(rank: Rank) -> Iterator[None]:
    """One rank's gradient of one expert is infinite."""
    import torch.distributed as dist

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return gradient.index_fill(0, torch.tensor([0]), torch.inf) if dist.get_rank() == BAD_RANK else gradient

    _, parameter = expert_weight(rank)
    handle = parameter.register_hook(spoil)
    yield
    handle.remove()


def expert_weight(rank: Rank) -> tuple[str, torch.nn.Parameter]:
    return next((name, p) for name, p in rank.engine.model.named_parameters() if name.endswith("w1_EDF"))


def skip(rank: Rank, step: int) -> str:
    """Take a step that is to be skipped; what was not finite."""
    from training.safeguard import not_finite

    result = rank.engine.step(rank.batches.step(step), lr=1e-3)
    assert result.skipped
    return not_finite(rank.engine, result)


def skip_and_train(data: Path, swap: Path, ds: dict[str, Any], changes: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Steps 1 to 3 and 6 to 8, once with bad steps in between, once from a checkpoint of the start without."""
    from training import checkpoint, checkpoint_files, states

    rank = Rank(data, swap, ds, changes)
    with bad_loss(rank, torch.nan):
        told = [skip(rank, 0)]
    saver = checkpoint.Saver(folder, checkpoint_files.Retention(1), 2**30)
    saver.save(states.parts(rank.engine), 1, {"adam_step": states.adam_step(rank.engine)})
    trained = rank.train(1, 4)
    before = state_digests(rank)
    with bad_loss(rank, torch.inf):
        told.append(skip(rank, 4))
    unchanged = state_digests(rank) == before
    with bad_gradient(rank):
        told.append(skip(rank, 5))
    trained += rank.train(6, 9)  # at once: looking at the states would let the gradients be written out
    after = state_digests(rank)

    saver.wait()
    found = checkpoint.newest(folder)
    assert found is not None and found.manifest["adam_step"] == 0
    checkpoint.load(rank.engine, found.path, found.manifest, rank.blank_step)
    again = rank.train(1, 4)
    same = state_digests(rank) == before
    again += rank.train(6, 9)
    return {
        "told": told, "unchanged": unchanged, "losses": (trained, again),
        "states": same and state_digests(rank) == after, "weight": expert_weight(rank)[0],
    }  # fmt: skip


def train_with_spikes(
    folder: Path, data: Path, resume: bool, overrides: list[str], spikes: Mapping[int, float]
) -> None:
    """A run in `folder`, as `training.loop` has it, but some losses are multiplied, by their place in the order."""
    from training.loop import Training
    from training.recipe import load_recipe

    os.chdir(folder)
    init_distributed()
    recipe = load_recipe(ROOT / "launch/recipes/quickstart.yaml", [*overrides, f"data={data}"])
    training = Training(recipe, "run", resume)
    step = training.engine.step

    def spiking(batches: Any, lr: float) -> Any:
        place = training.guard.place(training.step)
        result = step(batches, lr)
        result.loss *= spikes.get(place, 1.0)
        return result

    training.engine.step = spiking
    training.run()
    training.close()
