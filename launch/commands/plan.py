"""The verbs before a job: models, doctor, plan, rehearse."""

import math
from pathlib import Path
from typing import Any

import click

from launch.commands.options import HOSTFILE, JSON, MASTER_PORT, NODE_RANK, PATH


@click.command()
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--recipe", type=PATH, help="What would be trained: launch/recipes/*.yaml.")
@click.option("--model", help="A preset, in place of the recipe's model or without a recipe.")
@click.option("--world", type=click.IntRange(min=1), required=True, help="Ranks of the job.")
@click.option("--rank", type=int, default=0, show_default=True, help="The one that is rehearsed.")
@click.option(
    "--layers", type=click.IntRange(min=1), help="Build so many of the layers, and half of them; extrapolate."
)
@click.option("--delinked", is_flag=True, help="The recipe's training after its layers were delinked.")
@JSON
def rehearse(
    overrides: tuple[str, ...],
    recipe: Path | None,
    model: str | None,
    world: int,
    rank: int,
    layers: int | None,
    delinked: bool,
    as_json: bool,
) -> None:
    """Run one rank's real work of a large job here, alone: its memory, its time, what its collectives would move.

    Parameters, states and steps are exactly that rank's; the other ranks are taken to be its copies. No data is needed.
    KEY=VALUE overrides any key of the recipe, such as ds_config=ds_configs/m6-1t.json.
    """
    from launch.rehearse import Job, recipe_of, rehearse_rank

    rehearse_rank(Job(recipe_of(recipe, model, world, overrides, delinked), world, rank, layers), as_json)


class Number(click.FloatRange):
    """From a least to a most number; click lets "nan" through, which is neither less nor more."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is no number.", param, ctx)
        return number


class Filled(Number):
    """Such a number, or `auto`, which is None."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return None if value == "auto" else super().convert(value, param, ctx)


@click.command()
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--model", help="A preset (see m6 models), or a recipe: launch/recipes/*.yaml.")
@click.option("--cluster", help="A name in launch/clusters, or a file like those.")
@click.option("--ds-config", help="The ds_config that will run; the recipe's if not given.")
@click.option("--tokens", type=Number(1, 1e18), help="Trained on; a recipe's steps, or a billion, if not given.")
@click.option(
    "--filled",
    type=Filled(0.001, 1),
    default=1.0,
    show_default=True,
    metavar="SHARE|auto",
    help="Share of a row's positions that hold something: the others are left out, and take memory but next to no "
    "time. auto: as in the recipe's data.",
)
@click.option("--delinked", is_flag=True, help="The recipe's training after its layers were delinked.")
@click.option("--search", is_flag=True, help="Find the cheapest settings that fit, and say why the rest lost.")
@click.option("--explain", metavar="KEY", help="Show a term's formula with the numbers put in, such as step.seconds.")
@click.option("--validate", type=PATH, metavar="CSV", help="Score the planner against published measurements instead.")
@JSON
def plan(
    overrides: tuple[str, ...],
    model: str | None,
    cluster: str | None,
    ds_config: str | None,
    tokens: float | None,
    filled: float | None,
    delinked: bool,
    search: bool,
    explain: str | None,
    validate: Path | None,
    as_json: bool,
) -> None:
    """Will it fit, how fast is it, how long does it take, how many kWh, at what cost: m6-1t on 480 V100, say.

    KEY=VALUE overrides any key of the recipe, such as global_batch=3840 or ds.m6.recompute=true.
    """
    from launch.plan import Request, check_options, plan_search, plan_training, plan_validation

    given = {
        "--model": model, "--cluster": cluster, "--ds-config": ds_config, "--tokens": tokens, "--filled": filled != 1,
        "--delinked": delinked, "--search": search, "--explain": explain, "--validate": validate, "--json": as_json,
        "KEY=VALUE": overrides,
    }  # fmt: skip
    check_options([name for name, value in given.items() if value])
    request = Request(model, cluster, ds_config, tokens, overrides, delinked, filled)
    if validate:
        plan_validation(validate, as_json)
    elif search:
        plan_search(request, as_json)
    else:
        plan_training(request, as_json, explain)


@click.command()
def models() -> None:
    """The model presets: shapes, parameters, and the totals that were published."""
    from launch.models import show_models

    show_models()


@click.command()
@HOSTFILE
@NODE_RANK
@MASTER_PORT
@click.option("--cluster", help="With --hostfile: the cluster file that the plan was made with, to be held against it.")
@click.option("--write-cluster", type=PATH, help="Measure this machine, and write it as a cluster file for m6 plan.")
@click.option("--ranks", type=click.IntRange(min=1), help="With --write-cluster: as m6 train has it.")
@JSON
def doctor(
    hostfile: Path | None,
    node_rank: int | None,
    master_port: int | None,
    cluster: str | None,
    write_cluster: Path | None,
    ranks: int | None,
    as_json: bool,
) -> int:
    """What this machine has, what is missing, and what to do about it; or whether all machines of a hostfile are fit.

    Those are compared in versions, sizes, clocks, disks and links; exit code 1 if one of them is to be seen to.
    """
    from launch.nodes import Place

    if hostfile is None:
        if cluster or node_rank is not None or master_port:
            raise click.UsageError("--cluster, --node-rank and --master-port go with --hostfile: give that, too")
        if write_cluster:
            from launch.measured_cluster import write_cluster as measure_and_write

            measure_and_write(Place(ranks), write_cluster)
            return 0
        if ranks:
            raise click.UsageError("--ranks goes with --write-cluster: give that, too")
        from launch.doctor import examine

        return examine(as_json)
    if write_cluster or ranks:
        raise click.UsageError("--write-cluster and --ranks are of this machine alone: leave --hostfile out")
    from launch.cluster_doctor import examine_cluster

    return examine_cluster(Place(None, hostfile, node_rank, master_port), cluster, as_json)
