"""`m6 image-tokenizer`: trains pictures <-> codes, with a bar while it works and a table of what came out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from training.errors import UserError
from training.image_recipe import load_image_recipe
from training.run import LOCK, lock_run, run_folder


def train_tokenizer(recipe_file: Path, overrides: Sequence[str], name: str) -> None:
    """Train the tokenizer of a recipe into runs/NAME. Raises UserError."""
    recipe = load_image_recipe(recipe_file, list(overrides))
    folder = run_folder(name)
    # Its import takes seconds, and checking does without.
    from training.image_tokenizer import METRICS, train_image_tokenizer

    # Metrics alone are those of a training that was cut off.
    if folder.exists() and {path.name for path in folder.iterdir()} - {LOCK, METRICS}:
        raise UserError(f"{folder} exists: choose another --name")
    with lock_run(folder), _bars() as bars:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int, figures: dict[str, float]) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total, figures="")
            told = f"loss {figures['loss']:.3f}" if figures else ""
            bars.update(tasks[what], completed=done, figures=told)

        measures = train_image_tokenizer(recipe, folder, report)
    console = Console()
    console.print(_table(measures, recipe.split))
    console.print(f"image tokenizer: {folder}", markup=False, highlight=False, soft_wrap=True)


def _table(measures: dict[str, dict[str, float]], split: str) -> Table:
    table = Table(title=f"{split} pictures", box=None)
    headings = ["style", *next(iter(measures.values()))]
    for heading in headings:
        table.add_column(heading.replace("_", " "), justify="left" if heading == "style" else "right")
    for style, figures in measures.items():
        table.add_row(style, *(f"{value:.5g}" for value in figures.values()))
    return table


def _bars() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[figures]}"), console=Console(stderr=True))
