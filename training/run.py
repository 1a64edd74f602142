"""A run's folder: `runs/<name>/` with its recipe, its metrics, its checkpoints and its report."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import yaml

from model.config import ModelConfig
from training import checkpoint_files
from training.ds_config import DSConfig
from training.errors import UserError
from training.files import replace
from training.recipe import Recipe, leaves, nearest, one_line, parse_recipe, read_mapping, shown
from training.records import Record, read_json, read_lines

FOLDER = Path("runs")
RECIPE, DS_CONFIG, CHECKPOINTS, SWAP, LOCK = "recipe.yaml", "ds_config.json", "checkpoints", "swap", ".lock"
RANKS, INCIDENTS = ".ranks", "incidents"  # how far each rank is; what a supervisor saw
BACKGROUND = "background.safetensors"  # what finding goes by beside the weights; of a fine-tuned run, or in an export
PLAN = "plan.json"  # what a planner foretold, of each of the run's stages

# What a resumed run may do otherwise: go on longer, elsewhere, watched differently. The ds_config may change too, and
# with it the micro-batches and the capacity, on which dropping depends.
SAVING = {"save_every", "save_buffer", "keep", "keep_every"}
BAD_STEPS = {"skips", "spike"}
CHANGEABLE = {"steps", "ds_config", "ds", "data", "evaluation", "tracking", "delink", *SAVING, *BAD_STEPS}


def read_plan(folder: Path, delinked: bool) -> Record:
    """What was foretold of a run's stage, as `launch/planned.py` writes it; empty if nothing was."""
    stages = read_json(folder / PLAN, {}).get("stages", [])
    return stages[-1 if delinked else 0] if stages else {}


def open_run(name: str, recipe: Recipe, resume: bool, allowed: Sequence[str] = (), root: Path = FOLDER) -> Path:
    """The run's folder, new, or with --resume the old one of the same recipe. Raises UserError.

    `allowed` are keys, such as `optimizer` or `optimizer.lr`, that may differ though they are not CHANGEABLE.
    Writes nothing: a refused run leaves what is there as it was.
    """
    if allowed and not resume:
        raise UserError(f"--allow-change {allowed[0]}: only a resumed run has something to change; add --resume")
    folder = run_folder(name, root)
    if not _begun(folder):
        if resume:
            raise UserError(f"{folder}: no such run to resume")
        return folder
    if not resume:
        raise UserError(f"{folder} exists: choose another --name, or --resume to go on with it")
    if not (folder / RECIPE).exists():
        raise UserError(f"{folder}: no run there ({RECIPE} is missing)")
    earlier = parse_recipe(read_mapping(folder / RECIPE), [], str(folder / RECIPE))
    check_unchanged(earlier, recipe, allowed, str(folder))
    return folder


def run_folder(name: str, root: Path = FOLDER) -> Path:
    """Where a run of this name is, or would be. Raises UserError if it cannot be written, or that is no name."""
    if not re.fullmatch(r"\w[\w.+=-]{0,59}", name):
        raise UserError(f"--name {name!r}: must be a plain folder name of at most 60 letters, digits, . _ + = -")
    folder = root / name
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"{folder}: cannot be written to; start where it can, or mount it for writing")
    return folder


def checkpoints_of(run: str | Path) -> Path:
    """The folder of checkpoints, or the one checkpoint, that is meant by a run's name or a folder. Raises UserError."""
    folder = FOLDER / run if (FOLDER / run).is_dir() else Path(run)
    if not folder.is_dir():
        raise UserError(f"{run}: no such run; see the folders under {FOLDER}/")
    return folder / CHECKPOINTS if (folder / CHECKPOINTS).is_dir() else folder


def home_of(run: str | Path) -> Path:
    """The folder of a run that is meant by its name, by itself or by one of its checkpoints; an export's is its own."""
    folder = FOLDER / run if (FOLDER / run).is_dir() else Path(run)
    nearby = (folder.absolute(), folder.absolute().parent)
    return next((place.parent for place in nearby if place.name == CHECKPOINTS), folder)


def chosen_checkpoints(place: Path, step: int | None = None) -> list[Path]:
    """The checkpoints that are meant, by steps, in a folder of `checkpoints_of`. Raises UserError if there is none."""
    if checkpoint_files.NAME.fullmatch(place.absolute().name):
        return [place]
    steps = checkpoint_files.steps(place)
    if not steps:
        raise UserError(f"{place}: no checkpoints there")
    if step is not None and step not in steps:
        raise UserError(f"--step {step}: no such checkpoint in {place}; there are {', '.join(map(str, steps))}")
    return [place / f"step-{number}" for number in (steps if step is None else [step])]


def check_unchanged(earlier: Recipe, recipe: Recipe, allowed: Sequence[str], started: str) -> None:
    """Refuse a recipe with which what was `started` with the earlier one would become another run. Raises UserError."""
    was, now = (dict(leaves(one.model_dump())) for one in (earlier, recipe))
    for key in allowed:
        if not any(_part_of(known, key) for known in {**was, **now}):
            raise UserError(f"--allow-change {key}: the recipe has no such key{nearest(key, {**was, **now})}")
    changed = [key for key in {**was, **now} if was.get(key) != now.get(key)]
    refused = [key for key in changed if not any(_part_of(key, free) for free in (*CHANGEABLE, *allowed))]
    if refused:
        diff = "; ".join(f"{key}: was {_value(was, key)}, now {_value(now, key)}" for key in refused)
        ways = " ".join(f"--allow-change {key}" for key in refused)
        raise UserError(f"{started} has another recipe ({diff}): give it as it was, or {ways}")


def _part_of(key: str, whole: str) -> bool:
    return key == whole or key.startswith(f"{whole}.")


def _value(leaves: Mapping[str, Any], key: str) -> str:
    return shown(leaves[key]) if key in leaves else "not there"


def _begun(folder: Path) -> bool:
    """Whether there is a run, or anything else; not only what one leaves that was killed as it started."""
    if not folder.exists():
        return False
    names = [path.name for path in folder.iterdir()]
    left = {DS_CONFIG, PLAN, INCIDENTS, f"{INCIDENTS}.jsonl"}
    return not all(name.startswith(".") or name in left for name in names)


def lock_run(folder: Path, patience: float = 0.0) -> IO[str]:
    """Make the folder this process' alone for as long as the returned file is open. Raises UserError.

    `patience`: seconds to wait for one that holds it.

    Two runs in one folder would prune each other's checkpoints and empty each other's swap files.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+")
        _take(lock, patience)
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {socket.gethostname()}")
        lock.flush()
    except BlockingIOError:
        lock.seek(0)
        holder = one_line(lock.read(80))
        ways = "wait for it, have it save and leave by kill -TERM, or choose another --name"
        raise UserError(f"{folder}: another process is training there ({holder}); {ways}") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror})") from None
    return lock


def _take(lock: IO[str], patience: float) -> None:
    until = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
            time.sleep(1)


def check_nothing_lost(folder: Path) -> None:
    """Refuse to begin a run again that had saved checkpoints, of which none is left. Raises UserError."""
    if any(line.get("event") == "saved" for line in read_lines(folder / "metrics.jsonl")):
        way = "bring them back, or choose another --name to begin again"
        raise UserError(f"{folder / CHECKPOINTS}: no checkpoint there, and the run has saved some; {way}")


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
        "optimizer states": block.get("optimizer_states", "fp32"),
    }


def record_settings(folder: Path, recipe: Recipe, config: DSConfig) -> None:
    """Write the resolved recipe and ds_config into the run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(recipe.model_dump(mode="json"), allow_unicode=True, sort_keys=False)
    replace(folder / DS_CONFIG, json.dumps(config.values, indent=1), durable=True)
    replace(folder / RECIPE, text, durable=True)  # last: with it the run has begun


def read_settings(folder: Path) -> tuple[Recipe, dict[str, Any]]:
    """The resolved recipe and ds_config of a run. Raises UserError."""
    recipe = parse_recipe(read_mapping(folder / RECIPE), [], str(folder / RECIPE))
    return recipe, read_mapping(folder / DS_CONFIG)
