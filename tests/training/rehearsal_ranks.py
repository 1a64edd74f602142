"""What the tests of rehearsals run: the same steps on real ranks and on one rank alone."""

import tempfile
import warnings
from pathlib import Path
from typing import Any

from tests.training.engine_ranks import CPU, NONE, settings

MODEL = {
    "preset": "m6-tiny", "layers": 2, "hidden": 64, "ffn": 256, "heads": 4, "experts": 8, "k": 2, "text_vocab": 540,
}  # fmt: skip
ROWS = 4  # of a micro-batch

Case = tuple[dict[str, Any], int, int, dict[str, Any]]
# By ranks: tier, ep, accumulation, changes of the model.
CASES: dict[int, dict[str, Case]] = {
    2: {
        "ep 2": (NONE, 2, 2, {}),
        "ep 1, offload": (CPU, 1, 1, {}),
        "shared layers, offload": (CPU, 2, 2, {"share_layers": True, "layers": 3}),
        "dense": (NONE, 1, 1, {"experts": 0}),
    },
    4: {
        "ep 4, offload": (CPU, 4, 2, {}),
        "ep 2, shared layers": (NONE, 2, 1, {"share_layers": True}),
    },
}


# Of which some layers are to tell of all.
BY_LAYERS = {f"{layers} layers": (CPU, 2, 1, {"layers": layers}) for layers in (2, 4, 5)}


def recipe(world: int, case: Case) -> Any:
    from training.recipe import parse_recipe

    tier, parallel, accumulation, changes = case
    values = {
        "model": MODEL | changes,
        "ds_config": "ds_configs/cpu.json",
        "ds": settings(tier, parallel) | {"train_micro_batch_size_per_gpu": ROWS},
        "steps": 3,
        "global_batch": ROWS * world * accumulation,
        "text_positions": 48,
        "tasks": {"caption": 1},
    }
    return parse_recipe(values, [], "test")


def real(world: int) -> dict[str, Any]:
    """What is measured of each case on this rank of a real job."""
    import torch.distributed as dist

    from training.start import init_distributed
    from training.traffic import counted

    init_distributed()
    with counted(dist.ProcessGroup) as traffic:
        return _measured(CASES[world], world, dist.get_rank(), traffic)


def alone(world: int, rank: int) -> dict[str, Any]:
    """What is measured by a rehearsal of that rank, of each case and of BY_LAYERS."""
    from training import absent
    from training.traffic import counted

    absent.join(rank, world)
    with counted(absent.AbsentPeers) as traffic:
        return _measured(CASES[world] | (BY_LAYERS if world == 2 else {}), world, rank, traffic)


def _measured(cases: dict[str, Case], world: int, rank: int, traffic: Any) -> dict[str, Any]:
    from training import ds_config, rehearse

    warnings.simplefilter("ignore")
    rehearse.TIMED_STEPS = 1  # by time, ranks could disagree on their number
    found = {}
    for name, case in cases.items():
        work = recipe(world, case)
        with tempfile.TemporaryDirectory() as folder:
            config = ds_config.resolve(work, world, 0, Path(folder))
            rehearsal = rehearse.Rehearsal(work, config, rank, lambda _: None)
            found[name] = rehearsal.measure(traffic)
            rehearsal.close()
    return found
