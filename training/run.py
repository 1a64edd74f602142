"""A run's folder: `runs/<name>/` with its recipe, its metrics, its checkpoints and its report."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from model.config import ModelConfig
from training.ds_config import DSConfig
from training.errors import UserError
from training.recipe import Recipe, parse_recipe, read_mapping

FOLDER = Path("runs")
RECIPE, DS_CONFIG, CHECKPOINTS, SWAP, LOCK = "recipe.yaml", "ds_config.json", "checkpoints", "swap", ".lock"

# What a resumed run may do otherwise: go on longer, elsewhere, watched differently. The ds_config may change too, and
# with it the micro-batches and the capacity, on which dropping depends.
CHANGEABLE = {"steps", "ds_config", "ds", "data", "evaluation", "tracking", "save_every", "keep"}


def open_run(name: str, recipe: Recipe, resume: bool, root: Path = FOLDER) -> Path:
    """The run's folder, new, or with --resume the old one of the same recipe. Raises UserError.

    Writes nothing: a refused run leaves what is there as it was.
    """
    if not re.fullmatch(r"\w[\w.+=-]{0,59}", name):
        raise UserError(f"--name {name!r}: must be a plain folder name of at most 60 letters, digits, . _ + = -")
    folder = root / name
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"{folder}: cannot be written to; start where it can, or mount it for writing")
    if not folder.exists():
        if resume:
            raise UserError(f"{folder}: no such run to resume")
        return folder
    if not resume:
        raise UserError(f"{folder} exists: choose another --name, or --resume to go on with it")
    if not (folder / RECIPE).exists():
        raise UserError(f"{folder}: no run there ({RECIPE} is missing)")
    earlier = parse_recipe(read_mapping(folder / RECIPE), [], str(folder / RECIPE))
    wanted = recipe.model_dump()
    for key, value in earlier.model_dump().items():
        if key not in CHANGEABLE and value != wanted[key]:
            raise UserError(f"{key}: {folder} was started with {value}, not {wanted[key]}")
    return folder


def lock_run(folder: Path) -> IO[str]:
    """Make the folder this process' alone for as long as the returned file is open. Raises UserError.

    Two runs in one folder would prune each other's checkpoints and empty each other's swap files.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another process is training there; wait for it, or choose another --name") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror})") from None
    return lock


def tell_changes(folder: Path, config: DSConfig) -> None:
    """Print one line if a resumed run is to go on with another ds_config than its folder's, in what matters."""
    if not (folder / DS_CONFIG).exists():
        return
    earlier, now = _traits(read_mapping(folder / DS_CONFIG)), _traits(config.values)
    changes = [f"{name} {earlier[name]} -> {now[name]}" for name in now if now[name] != earlier[name]]
    if changes:
        print(f"resumed with other settings: {', '.join(changes)}", flush=True)


def _traits(values: Mapping[str, Any]) -> dict[str, Any]:
    """What of a resolved ds_config the numbers, the memory or the speed of a run depend on, as a person names it."""
    block, zero = values.get("m6", {}), values.get("zero_optimization", {})
    return {
        "precision": "bf16" if values.get("bf16", {}).get("enabled") else "fp32",
        "capacity": block.get("capacity", ModelConfig.capacity),
        "capacity factor": block.get("capacity_factor", ModelConfig.capacity_factor),
        "micro-batch": values.get("train_micro_batch_size_per_gpu"),
        "expert parallelism": values.get("expert_parallel", {}).get("autoep_size"),
        "parameters on": zero.get("offload_param", {}).get("device", "none"),
        "optimizer on": zero.get("offload_optimizer", {}).get("device", "none"),
    }


def record_settings(folder: Path, recipe: Recipe, config: DSConfig) -> None:
    """Write the resolved recipe and ds_config into the run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(recipe.model_dump(mode="json"), allow_unicode=True, sort_keys=False)
    (folder / RECIPE).write_text(text, encoding="utf-8")
    (folder / DS_CONFIG).write_text(json.dumps(config.values, indent=1), encoding="utf-8")


def read_settings(folder: Path) -> tuple[Recipe, dict[str, Any]]:
    """The resolved recipe and ds_config of a run. Raises UserError."""
    recipe = parse_recipe(read_mapping(folder / RECIPE), [], str(folder / RECIPE))
    return recipe, read_mapping(folder / DS_CONFIG)
