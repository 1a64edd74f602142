"""`m6 report`: write a run's page and print what it learnt."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from training.charts import nats
from training.errors import UserError
from training.report import planned_steps, quarters, write_report
from training.run import FOLDER
from training.tracking import read_lines


def report_on(run: str) -> None:
    """`run`: a name under runs/, or a folder. Raises UserError if nothing was logged there."""
    folder = FOLDER / run if (FOLDER / run).is_dir() else Path(run)
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{run}: no run of that name with a metrics.jsonl; see the folders under {FOLDER}/")
    page = write_report(folder)
    console = Console()
    table = Table(box=None, title="validation loss, nats a token", title_justify="left")
    for heading in ("task", "first quarter", "last quarter", "change"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    found = quarters(read_lines(folder / "metrics.jsonl"), planned_steps(folder))
    for row in found.rows:
        change = "–" if row.change is None else f"{row.change:+.1%}"
        table.add_row(row.task, nats(row.first), found.late(row), change)
    console.print(table)
    if found.standing:
        console.print(found.standing, markup=False)
    console.print(f"report: {page.resolve()}", markup=False, soft_wrap=True)
