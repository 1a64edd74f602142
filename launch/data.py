"""`m6 data`: the corpus as tables on the terminal."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from rich.console import Console
from rich.table import Table

from training.data.corpus import SKIPPED, Corpus
from training.data.splits import Split

SPLITS = get_args(Split)
KINDS = ("poem", "review", "plain")
SAMPLES = 3  # of each kind
SAMPLE_WIDTH = 60  # characters


def fetch_data(folder: Path) -> None:
    """Fetch and build what is missing, then say what is there."""
    from training.data.fetch import fetch  # imports torch, which showing a corpus does not need

    summary = fetch(folder)
    console = Console()
    console.print(counts(summary.manifest))
    for what, number in (summary.manifest["skipped"] | summary.manifest["dropped"]).items():
        console.print(f"left out, {what}: {number}", markup=False)
    if summary.seconds:
        console.print(", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in summary.seconds.items()))
    state = "is up to date, checksums verified" if summary.up_to_date else "is built"
    console.print(f"{summary.folder} {state}", markup=False)


def show_data(folder: Path) -> None:
    """Counts, licences and a few samples, of the validation split if it has any. Raises UserError without a corpus."""
    corpus = Corpus.open(folder)
    console = Console()
    console.print(counts(corpus.manifest))
    console.print(f"fingerprint {corpus.fingerprint}", markup=False)
    if left := sum(corpus.manifest["skipped"].values()):
        console.print(f"left out: {left:,}, by name in {corpus.folder / SKIPPED}", markup=False, soft_wrap=True)
    console.print()
    for row in _spread(_held_out(corpus.picture_rows)):
        picture = corpus.picture(row)
        words = filter(None, (picture.zh, "、".join(picture.tags), picture.en))
        console.print(f"picture  {picture.id}  {' | '.join(words)}", markup=False)
    for kind in KINDS:
        for row in _spread(_held_out(partial(corpus.text_rows, kind=kind))):
            text = corpus.text(row)
            about = " ".join(filter(None, (text.title, text.author, text.topic, text.polarity)))
            console.print(f"{kind:8s} {about}: {_shortened(text.text)}", markup=False)


def counts(manifest: dict[str, Any]) -> Table:
    """A line a package: rows by split, its licence, or why it is missing."""
    table = Table(box=None)
    for heading in ("", "package", *SPLITS, "licence"):
        table.add_column(heading, justify="right" if heading in SPLITS else "left", overflow="fold")
    kinds = (manifest["pictures"], manifest["texts"])
    for name, source in manifest["sources"].items():
        own = [rows[name] for rows in kinds if name in rows]
        numbers = [f"{sum(rows.get(split, 0) for rows in own):,}" if own else "" for split in SPLITS]
        licence = f"done without: {source['missing']}" if source["missing"] else source["licence"]
        table.add_row(name, f"{source['package']} {source['version']}", *numbers, licence)
    return table


def _held_out(rows: Callable[[str], np.ndarray]) -> np.ndarray:
    """Of the validation split, or, if there is nothing in it, of the training split."""
    found = rows("validation")
    return found if len(found) else rows("train")


def _spread(rows: np.ndarray) -> list[int]:
    """SAMPLES rows, evenly from the whole."""
    return [int(row) for row in rows[:: max(1, len(rows) // SAMPLES)][:SAMPLES]]


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SAMPLE_WIDTH else line[:SAMPLE_WIDTH] + "…"
