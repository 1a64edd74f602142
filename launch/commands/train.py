"""The verbs that make and follow a run: train, image-tokenizer, watch, report."""

from pathlib import Path

import click

from launch.commands.options import HOSTFILE, MASTER_PORT, NODE_RANK, PATH


@click.command()
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--recipe", required=True, type=PATH, help="What is trained: launch/recipes/*.yaml.")
@click.option("--from", "start", help="Fine-tune a run: a name under runs/, or the folder of a run or a checkpoint.")
@click.option("--name", help="The run's folder is runs/NAME; the recipe's file name if not given.")
@click.option("--data", "folder", type=PATH, help="The data's home; the recipe's `data` if not given.")
@click.option("--resume", is_flag=True, help="Go on from the run's last checkpoint.")
@click.option("--allow-change", metavar="KEY", multiple=True, help="Resume though this key of the recipe differs.")
@click.option("--ranks", type=click.IntRange(min=1), help="Processes; one a GPU, or 2 on the CPU, if not given.")
@click.option("--supervise", is_flag=True, help="Go on by itself from the last checkpoint after a crash or a hang.")
@click.option(
    "--restarts",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="With --supervise: how often in a row, without a step more than before.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    help="With --supervise: seconds to save and leave on request.",
)
@click.option("--cluster", help="Plan the run for this cluster (as `m6 plan`), and show the plan beside what comes.")
@click.option("--dry-run", is_flag=True, help="Check the settings and print what would run; start nothing.")
@HOSTFILE
@NODE_RANK
@MASTER_PORT
def train(
    recipe: Path,
    overrides: tuple[str, ...],
    start: str | None,
    name: str | None,
    folder: Path | None,
    resume: bool,
    allow_change: tuple[str, ...],
    ranks: int | None,
    supervise: bool,
    restarts: int,
    grace: float,
    cluster: str | None,
    dry_run: bool,
    hostfile: Path | None,
    node_rank: int | None,
    master_port: int | None,
) -> int:
    """Train on this machine, or on those of a hostfile; KEY=VALUE overrides any key of the recipe (optimizer.lr=3e-4).

    Ctrl-C, SIGTERM or SIGUSR1 saves and ends with exit code 75; a second one ends at once.
    """
    from launch.nodes import Place
    from launch.run import TrainingRun, launch
    from launch.supervisor import Supervision
    from training.parent import GIVEN

    overrides = (*overrides, *([f"{GIVEN}{start}"] if start else []))
    run = TrainingRun(recipe, overrides, name or recipe.stem, folder, resume, allow_change, cluster)
    place = Place(ranks, hostfile, node_rank, master_port)
    return launch(run, place, dry_run, Supervision(restarts, grace) if supervise else None)


@click.command()
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--recipe", required=True, type=PATH, help="What is trained: launch/recipes/image-tokenizer*.yaml.")
@click.option("--name", help="The folder is runs/NAME; the recipe's file name if not given.")
def image_tokenizer(recipe: Path, overrides: tuple[str, ...], name: str | None) -> None:
    """Train pictures <-> codes, by which M6 draws, on the corpus' pictures; measure it, and code them all.

    KEY=VALUE overrides any key of the recipe, such as steps=600.
    """
    from launch.image_tokenizer import train_tokenizer

    train_tokenizer(recipe, overrides, name or recipe.stem)


@click.command()
@click.argument("run")
@click.option("--to-loss", type=click.FloatRange(min=0), help="Tell the tokens, time and energy to this training loss.")
def report(run: str, to_loss: float | None) -> None:
    """Write the run's report, one HTML file, and say where it is. RUN: a name under runs/, or a folder."""
    from launch.report import report_on

    report_on(run, to_loss)


@click.command()
@click.argument("run")
@click.option("--once", is_flag=True, help="Print it once; as where there is no terminal.")
def watch(run: str, once: bool) -> None:
    """Watch a run on the terminal while it trains; Ctrl-C leaves it alone. RUN: a name under runs/, or a folder."""
    from launch.watch import watch as watch_run

    watch_run(run, once)
