"""`m6 rehearse`: one rank of a large job, at work alone on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from launch import operators
from launch.processes import forwarding
from launch.run import count_gpus, rank_environment
from training.ds_config import DSConfig, resolve
from training.errors import MISTAKE, UserError
from training.parent import load_recipe
from training.placement import DEVICE
from training.rank_share import Room, extrapolate, needed
from training.recipe import Recipe, parse_recipe
from training.run import SWAP

LEFT_SHARE, WATCH_SECONDS = 0.03, 0.2  # of the machine's memory, which a rehearsal must leave free
PHASES = 4  # that a rehearsal tells of
# Of a model without a recipe, as M6-T trained: 8 rows a GPU, of 16 patches and, as is recalled, some 128 positions.
ROWS, TEXT_POSITIONS = 8, 112
ROUTING = "balanced: tokens go to experts in turn, what does not divide to the first; then the capacity holds"
FOUND = ("parameters", "memory", "step", "collectives", "energy")


@dataclass(frozen=True)
class Job:
    """A rank of a job, and how many of its model's layers are built (None: all)."""

    recipe: Recipe
    world: int
    rank: int
    layers: int | None = None

    @property
    def whole(self) -> int:
        return self.recipe.model_shape().layers

    @property
    def built(self) -> list[int]:
        """The numbers of layers that are built, one after the other; two tell what a layer costs."""
        layers = self.layers or self.whole
        return [layers] if layers == self.whole else [layers // 2, layers]

    def with_layers(self, layers: int) -> Recipe:
        return parse_recipe(self.recipe.model_dump(mode="json"), [f"model.layers={layers}"], "recipe")


def recipe_of(path: Path | None, model: str | None, world: int, overrides: Sequence[str], delinked: bool) -> Recipe:
    """The recipe that is rehearsed: a file's, of another model if one is named, or a plain one. Raises UserError."""
    changes = [*([f"model={model}"] if model else []), *overrides]
    if path:
        recipe = load_recipe(path, changes)
    elif model:
        plain = {"global_batch": ROWS * world, "text_positions": TEXT_POSITIONS, "tasks": {"caption": 1}, "steps": 1}
        recipe = parse_recipe(plain, changes, "the plain recipe")
    else:
        raise UserError("nothing to rehearse: give --model, such as m6-t-100b, or --recipe")
    if delinked and not recipe.delink.wanted:
        raise UserError("--delinked: the recipe has no delink.after or delink.flat; leave it out")
    return recipe.delinked() if delinked else recipe


def rehearse_rank(job: Job, as_json: bool) -> None:
    """Check, build, step and tell. Raises UserError before anything is built."""
    if not 0 <= job.rank < job.world:
        raise UserError(f"--rank {job.rank}: a job of {job.world} rank(s) has 0 to {job.world - 1}")
    if job.layers and job.layers > job.whole:
        raise UserError(f"--layers {job.layers}: the model has {job.whole}; give at most that many")
    if job.layers == 1 < job.whole:
        raise UserError("--layers 1: what a layer costs is told from the rest by two lengths; give at least 2")
    os.environ["LOCAL_WORLD_SIZE"] = "1"  # of the job's ranks, this machine has one
    gpus = count_gpus()
    config = check_room(job, gpus)
    if config.placement.optimizer.coldest != DEVICE:
        operators.main()  # told here if one has to be compiled
    if not os.access(".", os.W_OK):
        raise UserError(f"{Path.cwd()}: cannot be written to, which swapping may need: start it in another folder")
    with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=".") as folder:
        found = [_measure(job, layers, gpus, Path(folder, SWAP)) for layers in job.built]
    told = summary(job, config, found)
    print(json.dumps(told, indent=1)) if as_json else _print(told)


def check_room(job: Job, gpus: int) -> DSConfig:
    """The ds_config of what is to be built. Raises UserError if that is wrong, or if this machine cannot hold it."""
    for layers in job.built:
        _check_policy(job, layers, gpus)
    if lack := _lack(job, job.built[-1], gpus):
        fitting = (layers for layers in range(job.built[-1] - 1, 1, -1) if not _lack(job, layers, gpus))
        if fits := next(fitting, 0):
            raise UserError(f"{lack}; --layers {fits} would fit")
        raise UserError(lack if job.built[-1] <= 2 else f"{lack}; not even --layers 2 would fit")
    return _resolved(job, job.built[-1], gpus)


def _check_policy(job: Job, layers: int, gpus: int) -> None:
    """Raises UserError for settings that are wrong, or are not those of so many layers."""
    try:
        policy = _resolved(job, layers, gpus, here=False).values.get("m6", {}).get("offload", {})
    except UserError as error:
        raise UserError(
            f"{error}{f' (--layers builds {layers} of {job.whole})' if layers < job.whole else ''}"
        ) from None
    if "device_bytes" in policy and layers < job.whole:
        raise UserError(
            "m6.offload.device_bytes with --layers: what a budget keeps is not in proportion; name the layers"
        )


def _resolved(job: Job, layers: int, gpus: int, here: bool = True) -> DSConfig:
    return resolve(job.with_layers(layers), job.world, gpus, Path(SWAP), here=here)


def _lack(job: Job, layers: int, gpus: int) -> str:
    """What so many layers need beyond what there is; "" if they fit."""
    try:
        config = _resolved(job, layers, gpus, here=False)
    except UserError as error:
        return str(error)
    shortage = Room.here(_free_gpu(gpus), config.swap_folders).shortage(needed(config))
    return f"rank {job.rank} of {job.world} with {layers} layers needs {shortage}" if shortage else ""


def _free_gpu(gpus: int) -> int | None:
    if not gpus:
        return None
    import torch

    return torch.cuda.mem_get_info()[0]


def summary(job: Job, config: DSConfig, found: list[dict[str, Any]]) -> dict[str, Any]:
    """What is told: of the whole model, measured or extrapolated, and of what was built."""
    whole = found[-1]
    if len(found) > 1:
        fewer, more = ({key: one[key] for key in FOUND} for one in found)
        whole = extrapolate(fewer, more, (job.built[0], job.built[1]), job.whole)
    return {
        "model": job.recipe.model.get("preset"),
        "world": job.world,
        "rank": job.rank,
        "expert_parallel": config.expert_parallel,
        "precision": config.precision,
        "layers": {"model": job.whole, "built": job.built[-1], "extrapolated": len(found) > 1},
        "rows": {
            "micro_batch": config.micro_batch,
            "accumulation": config.accumulation,
            "text_positions": job.recipe.text_positions,
            "image_patches": config.model.image_patches,
        },
        "routing": ROUTING,
        **{key: whole[key] for key in FOUND},
        "built": found,
    }


def _measure(job: Job, layers: int, gpus: int, swap: Path) -> dict[str, Any]:
    """What a process of its own finds of so many layers. Raises UserError with its reason, if it gives one."""
    own = ["--world", str(job.world), "--rank", str(job.rank), "--swap", str(swap)]
    command = [sys.executable, "-m", "training.rehearse", *own]
    # In a session of its own, whose end is ours to see to.
    process = subprocess.Popen(
        command,
        env=_environment(job, gpus),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process, forwarding(process, to_root=True) as received:
        assert process.stdin and process.stdout
        process.stdin.write(job.with_layers(layers).model_dump_json())
        process.stdin.close()
        with _ended_when_memory_is(process) as ended:
            found = _listen(process.stdout, f"{layers} of {job.whole} layers")
    if ended.is_set():
        fewer = f"; try --layers {layers - 1}" if layers > 2 else ""
        raise UserError(f"rank {job.rank} with {layers} layers was ended: it has taken all memory but a trace{fewer}")
    if received:
        sys.exit(128 + received[0])
    if process.returncode == MISTAKE:
        sys.exit(MISTAKE)  # it has said which
    if found is None:
        died = f", killed by signal {-process.returncode}; most likely memory ran out" if process.returncode < 0 else ""
        raise UserError(f"rank {job.rank} with {layers} layers came to no end{died}; its own words are above")
    return found


@contextlib.contextmanager
def _ended_when_memory_is(process: subprocess.Popen) -> Iterator[threading.Event]:
    """Meanwhile, kill a process that leaves the machine hardly any memory, and set what is yielded.

    The check beforehand counts what is sure to be needed, not what a step needs at the most; and a machine that has
    run out answers nobody for a long time.
    """
    over, ended = threading.Event(), threading.Event()

    def watch() -> None:
        while not over.wait(WATCH_SECONDS):
            memory = psutil.virtual_memory()
            if memory.available < LEFT_SHARE * memory.total:
                ended.set()
                return process.kill()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield ended
    finally:
        over.set()
        watcher.join()


def _environment(job: Job, gpus: int) -> dict[str, str]:
    environment = rank_environment(os.environ, 1, on_gpu=gpus > 0)
    # Freed memory is given back, which costs some time: what is measured is what is needed, not what is kept.
    environment.pop("GLIBC_TUNABLES")
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # torch's remarks on its own profiler
    return {**quiet, **environment, "RANK": str(job.rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(job.world)}


def _listen(lines: Any, of: str) -> dict[str, Any] | None:
    """Show what a rehearsal says of itself, a bar on a terminal and else lines; what it found, its last word."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar, done = bars.add_task(of, total=PHASES), -1
        for line in lines:
            word = json.loads(line)
            if isinstance(word, dict):
                return word
            done += 1
            bars.update(bar, description=f"{of}: {word}", completed=done)
            if not console.is_terminal:
                console.print(f"{of}: {word}", markup=False, highlight=False, soft_wrap=True)
    return None


def _print(told: dict[str, Any]) -> None:
    layers, rows, built = told["layers"], told["rows"], told["built"][-1]
    console = Console()
    model = told["model"] or "the model"
    console.print(
        f"rank {told['rank']} of {told['world']}, {model}, ep {told['expert_parallel']}, {told['precision']}; "
        f"{rows['accumulation']} micro-batches of {rows['micro_batch']} rows of {rows['image_patches']} patches and "
        f"{rows['text_positions']} tokens\nrouting {told['routing']}",
        highlight=False,
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column(f"measured, {layers['built']} layers", justify="right")
    if layers["extrapolated"]:
        table.add_column(f"extrapolated, {layers['model']} layers", justify="right")
    shown = [_figures(built), *([_figures(told)] if layers["extrapolated"] else [])]
    for name, value in shown[0].items():
        table.add_row(name, value, *(other[name] for other in shown[1:]))
    console.print(table)
    process = built["memory"]["process"]
    grown = process["peak_bytes"] - process["before_bytes"]
    console.print(f"the process itself grew by {decimal(grown)} of host memory at the most", highlight=False)


def _figures(found: dict[str, Any]) -> dict[str, str]:
    """Its lines, by name."""
    memory, joules = found["memory"], found["energy"]["joules"]
    figures = {"parameters here": f"{found['parameters']['total']:,}"}
    for name, tier in (("device", "device"), ("host", "cpu"), ("nvme", "nvme")):
        figures[f"{name} memory"] = decimal(memory[f"{name}_bytes"])
        figures |= {f"  {kind}, {name}": decimal(size) for kind, size in memory["held"][tier].items() if size}
        if tier == DEVICE:
            figures["  the most that a step adds"] = decimal(memory["step_bytes"])
    figures["step, without collectives"] = f"{found['step']['seconds']:.3g} s"
    for kind, moved in found["collectives"].items():
        figures[kind.replace("_", "-")] = f"{moved['calls']:,} calls, {decimal(moved['bytes'])}"
    figures["energy"] = "unknown: no counter" if joules is None else f"{joules:.3g} J a step"
    return figures
