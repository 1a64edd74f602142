"""The verbs on checkpoints: verify, export, delink."""

import os
from pathlib import Path

import click

from launch.commands.options import PATH


@click.command()
@click.argument("run")
@click.option("--step", type=click.IntRange(min=0), help="Only the checkpoint of this step.")
def verify(run: str, step: int | None) -> int:
    """Check every file of a run's checkpoints. RUN: a name under runs/, or the folder of a run or a checkpoint.

    Exit codes: 0 if all are whole, 1 if something is damaged, 2 if there is nothing to check.
    """
    _without_gpu()
    from launch.checkpoints import verify_run

    return verify_run(run, step)


@click.command()
@click.argument("run")
@click.option("--step", type=click.IntRange(min=0), help="The checkpoint of this step; the newest if not given.")
@click.option("--to", "target", type=PATH, help="The new folder; exports/step-N in the run's if not given.")
@click.option("--dtype", type=click.Choice(["bf16", "fp32"]), default="bf16", show_default=True)
@click.option("--shard-size", default="5GB", show_default=True, help="A file's size at the most.")
@click.option("--data", type=PATH, help="The data's home; that of the run's recipe if not given.")
def export(run: str, step: int | None, target: Path | None, dtype: str, shard_size: str, data: Path | None) -> None:
    """Write a checkpoint's weights as safetensors, for inference. RUN: as for `m6 verify`."""
    _without_gpu()
    from launch.checkpoints import export_run

    export_run(run, step, target, dtype, shard_size, data)


@click.command()
@click.argument("run")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--name", required=True, help="Of the new run: runs/NAME.")
@click.option("--step", type=click.IntRange(min=0), help="The checkpoint of this step; the newest if not given.")
@click.option(
    "--moments",
    type=click.Choice(["clone", "scale", "reset"]),
    help="Adam's: those of the shared layer for every layer; scaled to one use's gradient; or all begin anew. By the "
    "recipe's `delink` if not given.",
)
def delink(run: str, overrides: tuple[str, ...], name: str, step: int | None, moments: str | None) -> None:
    """Give each layer of a run that shared one (model.share_layers) its own weights, in a new run to go on with.

    RUN: as for `m6 verify`. KEY=VALUE overrides any key of the recipe but the model's, such as global_batch=64.
    """
    _without_gpu()
    from launch.checkpoints import delink_run

    delink_run(run, overrides, name, step, moments)


def _without_gpu() -> None:
    """For verbs that handle files alone: DeepSpeed, when imported, would look for a GPU and tell what it found."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
