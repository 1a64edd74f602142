"""`m6 data import`: what was taken and what was left, as tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.data import counts
from training.data.corpus import SKIPPED, Corpus
from training.data.importing.build import Summary, import_corpus
from training.data.importing.reading import Settings
from training.errors import UserError

HELD_OUT = ("validation", "test")


def import_data(sources: Sequence[Path], to: Path, base: Path, settings: Settings) -> None:
    """Import, then say what came of it."""
    notes = Console(stderr=True)
    before = _present(to)
    summary = import_corpus(sources, to, base, settings, lambda line: notes.print(line, markup=False))
    console = Console()
    console.print(counts(summary.manifest))
    if summary.left:
        console.print(_left(summary))
    for line in [*_remarks(summary, settings), *_replaced(before, summary)]:
        console.print(line, markup=False, soft_wrap=True)


def _present(to: Path) -> dict[str, Any] | None:
    """The manifest of the import that is there, if it can be read."""
    try:
        return Corpus.open(to).manifest
    except UserError:
        return None


def _replaced(before: dict[str, Any] | None, summary: Summary) -> list[str]:
    if before is None or summary.up_to_date or before["sources"] == summary.manifest["sources"]:
        return []
    rows, names = sum(_total(before, split) for split in ("train", *HELD_OUT)), ", ".join(before["sources"])
    return [f"it took the place of {rows:,} rows of {names}: to have both, give all sources at once"]


def _left(summary: Summary) -> Table:
    table = Table(box=None)
    for heading in ("left out", "rows", "the first of them"):
        table.add_column(heading, justify="right" if heading == "rows" else "left", overflow="fold")
    for name, reason in sorted(summary.left.items(), key=lambda item: -item[1].rows):
        table.add_row(Text(name), f"{reason.rows:,}", Text("\n".join(reason.examples)))
    return table


def _remarks(summary: Summary, settings: Settings) -> list[str]:
    manifest = summary.manifest
    numbers = {split: _total(manifest, split) for split in ("train", *HELD_OUT)}
    left = sum(reason.rows for reason in summary.left.values())
    found = [f"{sum(numbers.values()):,} rows taken, {left:,} left out"]
    if summary.trained:
        found.append(
            f"{summary.trained:,} of the pictures are such as the base trains on: with their families, they are in "
            "the training split"
        )
    if summary.foreign:
        found.append(f"without a Chinese character in its caption: {summary.foreign:,}")
    for split in HELD_OUT if settings.held_out else ():
        if not numbers[split]:
            found.append(f"no row is in the {split} split: too few families for --held-out {settings.held_out:g}")
    if not numbers["train"]:
        found.append("no row is in the training split: too few families, or too large a share is held out")
    if left:
        found.append(f"all that is left out is named in {summary.folder / SKIPPED}")
    if not summary.up_to_date:
        found.append(", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in summary.seconds.items()))
    state = "is up to date, checksums verified" if summary.up_to_date else "is built"
    return [*found, f"{summary.folder} {state}; fingerprint {manifest['fingerprint'][:16]}"]


def _total(manifest: dict[str, Any], split: str) -> int:
    return sum(of.get(split, 0) for kind in ("pictures", "texts") for of in manifest[kind].values())
