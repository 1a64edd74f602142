"""The `m6` command. Verbs import what they need when they run, so that `m6 --help` is instant."""

import math
import os
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click

from training.errors import UserError

PATH = click.Path(path_type=Path)
DATA_FOLDER = click.option("--dir", "folder", default="data", type=PATH, show_default=True, help="The data's home.")


HOSTFILE = click.option("--hostfile", type=PATH, help="On these machines, a line each: NAME slots=RANKS; over ssh.")
NODE_RANK = click.option(
    "--node-rank", type=click.IntRange(min=0), help="Be this one of the hostfile's, from 0; the others start elsewhere."
)
MASTER_PORT = click.option(
    "--master-port", type=click.IntRange(1, 65535), help="With --hostfile: where its first machine is met; 29500."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def m6() -> None:
    """Train and use M6, a Chinese multimodal mixture-of-experts transformer.

    Set M6_DEBUG=1 for tracebacks and the launcher's own messages.
    """


@m6.group()
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


@m6.command()
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--recipe", required=True, type=PATH, help="What is trained: launch/recipes/*.yaml.")
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

    run = TrainingRun(recipe, overrides, name or recipe.stem, folder, resume, allow_change, cluster)
    place = Place(ranks, hostfile, node_rank, master_port)
    return launch(run, place, dry_run, Supervision(restarts, grace) if supervise else None)


@m6.command()
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--recipe", required=True, type=PATH, help="What is trained: launch/recipes/image-tokenizer*.yaml.")
@click.option("--name", help="The folder is runs/NAME; the recipe's file name if not given.")
def image_tokenizer(recipe: Path, overrides: tuple[str, ...], name: str | None) -> None:
    """Train pictures <-> codes, by which M6 draws, on the corpus' pictures; measure it, and code them all.

    KEY=VALUE overrides any key of the recipe, such as steps=600.
    """
    from launch.image_tokenizer import train_tokenizer

    train_tokenizer(recipe, overrides, name or recipe.stem)


@m6.command()
@click.argument("run")
@click.option("--to-loss", type=click.FloatRange(min=0), help="Tell the tokens, time and energy to this training loss.")
def report(run: str, to_loss: float | None) -> None:
    """Write the run's report, one HTML file, and say where it is. RUN: a name under runs/, or a folder."""
    from launch.report import report_on

    report_on(run, to_loss)


@m6.command()
@click.argument("run")
@click.option("--once", is_flag=True, help="Print it once; as where there is no terminal.")
def watch(run: str, once: bool) -> None:
    """Watch a run on the terminal while it trains; Ctrl-C leaves it alone. RUN: a name under runs/, or a folder."""
    from launch.watch import watch as watch_run

    watch_run(run, once)


@m6.command()
@click.argument("run")
@click.option("--step", type=click.IntRange(min=0), help="Only the checkpoint of this step.")
def verify(run: str, step: int | None) -> int:
    """Check every file of a run's checkpoints. RUN: a name under runs/, or the folder of a run or a checkpoint.

    Exit codes: 0 if all are whole, 1 if something is damaged, 2 if there is nothing to check.
    """
    _without_gpu()
    from launch.checkpoints import verify_run

    return verify_run(run, step)


@m6.command()
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


@m6.command()
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


RUN = click.option("--run", help="A name under runs/, a run's folder or an export's; the run that saved last if none.")
DATA = click.option("--data", type=PATH, help="The data's home; that of the run's recipe if not given.")


class Box(click.ParamType[tuple[int, int, int, int]]):
    """LEFT,TOP,WIDTH,HEIGHT."""

    name = "box"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int, int, int]:
        try:
            left, top, width, height = (int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not four whole numbers: LEFT,TOP,WIDTH,HEIGHT", param, ctx)
        return left, top, width, height


TRIES = click.option(
    "--tries", type=click.IntRange(1, 256), default=16, show_default=True, help="Of which the best are kept."
)
SEED = click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
REFERENCE = click.option("--reference", type=PATH, help="A picture whose like is to be drawn.")
STEPS = click.option("--steps", type=click.IntRange(1, 1024), help="Passes of mask-predict; 10 if it draws.")
SIZE = click.option(
    "--size", type=click.IntRange(1, 1024), help="px a side of the square that is coded; the tokenizer's if not given."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@m6.command()
@click.argument("images", nargs=-1, required=True, type=PATH, metavar="IMAGE...")
@click.option("--kind", type=click.Choice(["zh", "en", "tags"]), default="zh", show_default=True)
@RUN
@DATA
@JSON
def caption(images: tuple[Path, ...], kind: str, run: str | None, data: Path | None, as_json: bool) -> None:
    """Say what pictures show: a name in Chinese or English, or key words."""
    from launch import use

    use.caption(run, data, images, kind, as_json)


@m6.command()
@click.argument("words", nargs=-1, required=True, metavar="[IMAGE] QUESTION")
@click.option("--choice", "choices", multiple=True, help="An answer that may be given; once for each.")
@RUN
@DATA
def ask(words: tuple[str, ...], choices: tuple[str, ...], run: str | None, data: Path | None) -> None:
    """Answer a question, about a picture or by itself: m6 ask cup.png 这是什么?"""
    if len(words) > 2:
        raise click.UsageError("more than an IMAGE and a QUESTION: put the question in quotes")
    from launch import use

    use.ask(run, data, Path(words[0]) if len(words) == 2 else None, words[-1], choices)


class Example(click.ParamType):
    """PROMPT => TEXT, as two texts."""

    name = "example"

    def convert(
        self, value: str | tuple[str, str], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        if not isinstance(value, str):
            return value
        prompt, _, text = (part.strip() for part in value.partition("=>"))
        if not (prompt and text):
            self.fail(f"{value!r} must be 'PROMPT => TEXT'", param, ctx)
        return prompt, text


@m6.command()
@click.argument("prompt")
@click.option(
    "--example",
    "examples",
    multiple=True,
    type=Example(),
    metavar="'PROMPT => TEXT'",
    help="Read before the prompt; once for each.",
)
@click.option("--tokens", type=click.IntRange(min=1), default=96, show_default=True, help="At the most.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.8, show_default=True, help="0: the likeliest.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=0.9, show_default=True)
@click.option("--repetition-penalty", type=click.FloatRange(min=0, min_open=True), default=1.1, show_default=True)
@SEED
@RUN
@DATA
def write(
    prompt: str,
    examples: tuple[tuple[str, str], ...],
    tokens: int,
    temperature: float,
    top_p: float,
    repetition_penalty: float,
    seed: int,
    run: str | None,
    data: Path | None,
) -> None:
    """Write a text, as it comes to mind: m6 write 写一首诗。题目：春晓。作者：孟浩然。"""
    from launch import use
    from training.trained import Style

    use.write(run, data, prompt, examples, Style(temperature, top_p, repetition_penalty, tokens, seed))


def _check_kept(pictures: int, tries: int) -> None:
    if pictures > tries:
        raise click.UsageError(f"--pictures {pictures}: cannot be more than --tries {tries}")


@m6.command()
@click.argument("text")
@click.option("--to", "target", type=PATH, default="drawing.png", show_default=True)
@click.option("--pictures", type=click.IntRange(1, 64), default=4, show_default=True, help="That are kept.")
@TRIES
@click.option("--guidance", type=click.FloatRange(0, 100), default=3.0, show_default=True, help="What the words weigh.")
@click.option("--temperature", type=click.FloatRange(0.01, 100), default=1.0, show_default=True)
@SEED
@REFERENCE
@STEPS
@SIZE
@RUN
@DATA
def draw(
    text: str,
    target: Path,
    pictures: int,
    tries: int,
    guidance: float,
    temperature: float,
    seed: int,
    reference: Path | None,
    steps: int | None,
    size: int | None,
    run: str | None,
    data: Path | None,
) -> None:
    """Draw pictures for a text; the model itself says which fit best: m6 draw 红色的苹果

    One code after another (task draw); with --reference, --steps or --size by mask-predict (task inpaint).
    """
    _check_kept(pictures, tries)
    from launch import use
    from training.trained import Hand

    hand = Hand(pictures, tries, guidance, temperature, seed=seed, steps=steps, size=size)
    use.draw(run, data, text, reference, hand, target)


@m6.command()
@click.argument("image", type=PATH)
@click.option("--text", default="", help="What the picture shows when it is done.")
@click.option("--region", type=Box(), help="LEFT,TOP,WIDTH,HEIGHT in px: what is redrawn.")
@click.option("--mask", type=PATH, help="Or a picture of the same size, white where it is redrawn.")
@click.option("--to", "target", type=PATH, default="edited.png", show_default=True)
@click.option("--pictures", type=click.IntRange(1, 64), default=1, show_default=True, help="That are kept.")
@TRIES
@click.option("--guidance", type=click.FloatRange(0, 100), default=3.0, show_default=True, help="What is said weighs.")
@SEED
@REFERENCE
@STEPS
@SIZE
@RUN
@DATA
def edit(
    image: Path,
    text: str,
    region: tuple[int, int, int, int] | None,
    mask: Path | None,
    target: Path,
    pictures: int,
    tries: int,
    guidance: float,
    seed: int,
    reference: Path | None,
    steps: int | None,
    size: int | None,
    run: str | None,
    data: Path | None,
) -> None:
    """Redraw a region of a picture and keep the rest: m6 edit cat.png --text 戴帽子的猫 --region 60,0,80,40

    All px outside the region stay as they are.
    """
    if (region is None) == (mask is None):
        raise click.UsageError("say what is redrawn, by --region or by --mask")
    _check_kept(pictures, tries)
    from launch import use
    from training.trained import Hand

    hand = Hand(pictures, tries, guidance, seed=seed, steps=steps, size=size)
    within = region or mask
    assert within is not None
    use.edit(run, data, image, text, within, reference, hand, target)


@m6.command()
@click.argument("query")
@click.option("--images", "folder", required=True, type=PATH, help="The folder to search; its index is kept.")
@click.option("-k", "most", type=click.IntRange(min=1), default=12, show_default=True, help="Pictures at the most.")
@click.option("--sheet", type=PATH, help="Draw them on a contact sheet, in this PNG file.")
@RUN
@DATA
@JSON
def search(
    query: str, folder: Path, most: int, sheet: Path | None, run: str | None, data: Path | None, as_json: bool
) -> None:
    """Find pictures of a folder by meaning."""
    from launch import use

    use.search(run, data, query, folder, most, sheet, as_json)


@m6.command("eval")
@click.option("--pairs", type=PATH, help='Pictures of your own: JSON lines {"image": …, "zh": …, "en": … or null}.')
@click.option("--text", "texts", type=PATH, help='Texts of your own: JSON lines {"text": …, "title": …}.')
@click.option("--split", type=click.Choice(["test", "validation"]), default="test", show_default=True)
@click.option("--json", "target", type=PATH, help="Write all figures to this file.")
@RUN
@DATA
def evaluate(
    pairs: Path | None, texts: Path | None, split: str, target: Path | None, run: str | None, data: Path | None
) -> None:
    """Measure what a run can do: on the corpus' held-out families, or on files of your own.

    Figures, samples and a page of both are left in the run's folder, from where `m6 report` takes them.
    """
    from launch.evaluate import evaluate as measure

    measure(run, data, pairs, texts, split, target)


@m6.command()
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


@m6.command()
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--model", help="A preset (see m6 models), or a recipe: launch/recipes/*.yaml.")
@click.option("--cluster", help="A name in launch/clusters, or a file like those.")
@click.option("--ds-config", help="The ds_config that will run; the recipe's if not given.")
@click.option("--tokens", type=Number(1, 1e18), help="Trained on; a recipe's steps, or a billion, if not given.")
@click.option(
    "--filled",
    type=Number(0.001, 1),
    default=1.0,
    show_default=True,
    help="Share of a row's positions that hold something: the others are left out, and take memory but no time.",
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
    filled: float,
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


@m6.command()
def models() -> None:
    """The model presets: shapes, parameters, and the totals that were published."""
    from launch.models import show_models

    show_models()


@m6.command()
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


def main() -> None:
    """Run the command; every expected failure is one line on stderr.

    Exit codes: 0 done, 1 a failure of ours, 2 a mistake that the user can mend, 75 a training that was asked to stop,
    and saved, 130 anything else that Ctrl-C stopped.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        _fail("the current folder is gone: change to another", 2)
    try:
        code = m6.main(prog_name="m6", standalone_mode=False)
    except click.Abort:
        _fail("stopped", 130)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "m6"
        _fail(f"{error.format_message().rstrip('.')} (see {command} --help)", 2)
    except UserError as error:
        _fail(str(error), 2)
    sys.exit(code or 0)


def _fail(message: str, code: int) -> NoReturn:
    if os.environ.get("M6_DEBUG"):
        traceback.print_exc()
    print(f"m6: {message}", file=sys.stderr)
    sys.exit(code)
