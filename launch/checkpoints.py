"""`m6 verify`, `m6 export`, `m6 delink`: a run's checkpoints, checked, turned into weights or into another run's."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from training import checkpoint_files
from training.errors import UserError
from training.recipe import parse_recipe
from training.run import RECIPE, checkpoints_of, chosen_checkpoints, home_of, run_folder

POINTER = re.compile(r"(step-[0-9]+) ([0-9a-f]{32})")
EXPORTS = "exports"


@dataclass(frozen=True)
class Verified:
    """What was found of a checkpoint; `problems` is empty if it is whole."""

    path: Path
    files: int
    bytes: int
    written: str
    problems: list[str]


def verify_run(run: str, step: int | None) -> int:
    """Check a run's checkpoints, or that of one step, and print what was found; 0 if all is well, else 1.

    `run`: a name under runs/, or the folder of a run or of one checkpoint. Raises UserError if there is none.
    """
    place = checkpoints_of(run)
    paths = chosen_checkpoints(place, step)
    with _bars() as bars:
        found = [verified for path in paths if (verified := _verified(path, bars))]
    problems = [problem for verified in found for problem in verified.problems]
    if step is None and place not in paths:
        problems += filter(None, [_pointer_problem(place)])
    console = Console()
    console.print(_table(found))
    for problem in problems:
        console.print(problem, markup=False, highlight=False, soft_wrap=True)
    return 1 if problems else 0


def export_run(
    run: str,
    step: int | None = None,
    target: Path | None = None,
    dtype: str = "bf16",
    shard_size: str = "5GB",
    data: Path | None = None,
) -> None:
    """Write the weights of a run's newest checkpoint, or that of one step, for inference. Raises UserError.

    `target` None is exports/step-N in the run's folder; `data` None is where the checkpoint's recipe has the corpus.
    """
    from training.data.corpus import Corpus  # their imports take seconds, and verifying does without
    from training.export import plan, write

    path = chosen_checkpoints(checkpoints_of(run), step)[-1].absolute()
    target = target or path.parent.parent / EXPORTS / path.name
    if target.exists():
        raise UserError(f"{target} exists: choose another --to")
    with checkpoint_files.reading(path):
        manifest = checkpoint_files.read_manifest(path)
        recipe = parse_recipe(manifest.get("recipe", {}), [], str(path / checkpoint_files.MANIFEST))
        planned = plan(path, manifest, recipe, Corpus.open(data or recipe.data), dtype, shard_size)
        with _bars() as bars:
            verified = _verified(path, bars)
            if verified and verified.problems:
                raise UserError(f"{verified.problems[0]}; `m6 verify {run}` shows which --step is whole")
            bar = bars.add_task("writing", total=planned.bytes)
            write(planned, target, partial(bars.advance, bar))
    what = f"step {manifest['step']}, {decimal(planned.bytes)} of {dtype} weights in {len(planned.files)} file(s)"
    Console().print(f"exported: {target} ({what})", markup=False, highlight=False, soft_wrap=True)


def delink_run(run: str, overrides: tuple[str, ...], name: str, step: int | None, moments: str | None) -> None:
    """Give each layer of a run that shares one its own weights, as the beginning of the run `name`. Raises UserError.

    `run` and `step` as of `export_run`; `overrides` are of the recipe; `moments`: clone, scale, reset, or
    None, as the recipe says.
    """
    from training.data.order import row_counts
    from training.delink import plan, write_run

    path = chosen_checkpoints(checkpoints_of(run), step)[-1].absolute()
    folder = run_folder(name)
    if folder.exists():
        raise UserError(f"{folder} exists: choose another --name")
    with checkpoint_files.reading(path):
        manifest = checkpoint_files.read_manifest(path)
        shared = parse_recipe(manifest.get("recipe", {}), [], str(path))
        recipe = parse_recipe(shared.delinked().model_dump(mode="json"), list(overrides), str(path))
        row_counts(recipe.tasks, recipe.global_batch, recipe.block)  # told here, not when it is to go on
        planned = plan(path, manifest, recipe, moments or shared.delink.moments)
        with _bars() as bars:
            verified = _verified(path, bars)
            if verified and verified.problems:
                raise UserError(f"{verified.problems[0]}; `m6 verify {run}` shows which --step is whole")
            bar = bars.add_task("writing", total=planned.bytes)
            written = write_run(planned, home_of(path), folder, partial(bars.advance, bar))
    layers = planned.recipe.model_shape().layers
    console = Console()
    told = f"delinked: {written} (1 layer -> {layers}, {decimal(planned.bytes)})"
    go_on = f"go on:    m6 train --recipe {folder / RECIPE} --name {name} --resume"
    for line in (told, go_on):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _verified(path: Path, bars: Progress) -> Verified | None:
    """Check a checkpoint; None if a running training has just pruned it."""
    try:
        with checkpoint_files.reading(path):
            sizes = [file.stat().st_size for file in path.iterdir()]
            written = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
            bar = bars.add_task(path.name, total=sum(sizes))
            problems = checkpoint_files.problems(path, partial(bars.advance, bar))
    except OSError as error:
        if not path.exists():
            return None
        sizes, written, problems = [], "", [f"{error.filename}: {error.strerror}"]
    return Verified(path, len(sizes), sum(sizes), written, problems)


def _pointer_problem(place: Path) -> str:
    """What is wrong with `latest`; "" if it names a checkpoint that is there, by its checksum."""
    path = place / checkpoint_files.LATEST
    try:
        said = POINTER.fullmatch(path.read_text(encoding="utf-8"))
        if said is None:
            return f"{path}: damaged (it does not say which checkpoint is the latest)"
        if not (place / said[1]).is_dir():
            return f"{path}: names {said[1]}, which is not there"
        seal = (place / said[1] / checkpoint_files.SEAL).read_text(encoding="utf-8")
        return "" if seal == said[2] else f"{path}: the checksum that it names is not that of {said[1]}"
    except FileNotFoundError as error:
        return f"{error.filename}: missing"
    except (OSError, ValueError) as error:
        return f"{path}: cannot be read ({error})"


def _table(found: list[Verified]) -> Table:
    table = Table(box=None)
    for heading in ("step", "size", "files", "written", "state"):
        table.add_column(heading, justify="left" if heading in ("written", "state") else "right", no_wrap=True)
    for verified in found:
        state = "damaged" if verified.problems else "whole"
        step = verified.path.absolute().name.removeprefix("step-")
        table.add_row(step, decimal(verified.bytes), str(verified.files), verified.written, state)
    return table


def _bars() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
