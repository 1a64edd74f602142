"""`m6 report`: write a run's page and print what it learnt."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from training.charts import nats
from training.errors import UserError
from training.records import Record, read_lines
from training.report import is_delinked, planned_steps, quarters, reach, write_report
from training.run import FOLDER, home_of
from training.screen import duration


def report_on(run: str, to_loss: float | None = None) -> None:
    """`run`: a name under runs/, or a folder. `to_loss`: tell what it took to get there.

    Raises UserError if nothing was logged there.
    """
    folder = home_of(run)
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{run}: no run of that name with a metrics.jsonl; see the folders under {FOLDER}/")
    page = write_report(folder)
    console = Console()
    table = Table(box=None, title="validation loss, nats a token", title_justify="left")
    for heading in ("task", "first quarter", "last quarter", "change"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    lines = read_lines(folder / "metrics.jsonl")
    found = quarters(lines, planned_steps(folder, is_delinked(lines)))
    for row in found.rows:
        change = "–" if row.change is None else f"{row.change:+.1%}"
        table.add_row(row.task, nats(row.first), found.late(row), change)
    console.print(table if found.rows else "no validation loss: the corpus has nothing in its validation split")
    if found.standing:
        console.print(found.standing, markup=False)
    if to_loss is not None:
        console.print(cost_of(lines, to_loss), markup=False, soft_wrap=True)
    console.print(f"report: {page.resolve()}", markup=False, soft_wrap=True)


def cost_of(lines: list[Record], loss: float) -> str:
    """What it took until the training loss was at a level."""
    reached = reach([line for line in lines if "loss" in line], loss)
    if reached is None:
        return f"loss {loss:g}: not reached"
    energy = f"{reached.joules:,.0f} J, {reached.source}" if reached.joules is not None else f"energy {reached.source}"
    return (
        f"loss {loss:g}: reached at step {reached.step:,}, with {reached.tokens:,} tokens, in "
        f"{duration(reached.seconds)} of steps; {energy}"
    )
