"""`m6 train`: the training program as ranks of DeepSpeed's launcher on this machine."""

import base64
import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from launch import operators
from launch.environment import environment_files, passed_on
from launch.everywhere import OnAll
from launch.nodes import Nodes, Place
from launch.planned import foretold, planned_world, write_plan
from launch.processes import STOPPED, Ranks, first_rank_to_fail, forwarding
from launch.supervisor import Supervision, Supervisor
from model.parts import WHOLE
from training import checkpoint_files
from training.ds_config import DSConfig, default_path, resolve
from training.errors import LEFT, MISTAKE, RESTARTABLE, UserError
from training.heartbeat import read_beat
from training.machine import usable_cores
from training.parent import Parent, load_recipe, settle
from training.recipe import Recipe
from training.run import CHECKPOINTS, PLAN, RANKS, RECIPE, SWAP, lock_run, open_run, run_folder

# On several machines one may be taken for another's that was lost; its lock outlives it for a while.
LOCK_SECONDS = 120.0
CPU_RANKS = 2  # so that expert parallelism is at work on any machine

# Freed memory stays with the process. Each step allocates the same large tensors anew; getting pages from
# the system again costs more than filling them (48 MB: 62 ms against 8 ms). So nothing is trimmed, and blocks
# of up to 1 GiB come from the heap.
KEEP_FREED_MEMORY = ":".join(
    (
        f"glibc.malloc.mmap_threshold={2**30}",
        f"glibc.malloc.trim_threshold={2**40}",
        f"glibc.malloc.top_pad={2**26}",
        # A save's threads would each keep what they freed in an arena of their own: 35 MB more at every save.
        "glibc.malloc.arena_max=1",
    )
)


@dataclass(frozen=True)
class TrainingRun:
    """What is trained. `data` None leaves the recipe's own."""

    recipe: Path
    overrides: tuple[str, ...] = ()
    name: str = "run"
    data: Path | None = None
    resume: bool = False
    allow_change: tuple[str, ...] = ()  # keys of the recipe, on resume
    cluster: str | None = None  # what is planned for, to stand beside what comes

    @property
    def resumed(self) -> Path | None:
        """The folder of the run that is to go on."""
        return run_folder(self.name) if self.resume else None

    def load(self) -> Recipe:
        """The recipe with its overrides, and with what it takes over from the run that it starts from."""
        return load_recipe(self.recipe, self.overrides, self.resumed)

    def settled(self) -> "TrainingRun":
        """With a definite checkpoint to start from, if it starts from another run."""
        return replace(self, overrides=settle(self.recipe, self.overrides, self.resumed))

    def arguments(self) -> list[str]:
        """Those of `training.train`."""
        arguments = ["--recipe", str(self.recipe), "--name", self.name]
        if self.data is not None:
            arguments += ["--data", str(self.data)]
        if self.resume:
            arguments.append("--resume")
        for key in self.allow_change:
            arguments += ["--allow-change", key]
        return [*arguments, *self.overrides]

    def words(self) -> list[str]:
        """Those of `m6 train` that say the same."""
        return [*(["--cluster", self.cluster] if self.cluster else []), *self.arguments()]


class Plan(NamedTuple):
    """What a checked run will do."""

    recipe: Recipe
    folder: Path
    data: Path
    config: DSConfig
    config_path: Path


def launch(run: TrainingRun, place: Place, dry_run: bool = False, supervision: Supervision | None = None) -> int:
    """Train where it is asked; the exit code to end with.

    On this machine there is a rank a GPU, or CPU_RANKS without one, if no number is given. With `supervision` a run
    that fails is started again. Raises UserError for mistakes seen before that.
    """
    run = run.settled()
    if place.node_rank is not None:
        os.environ.update(environment_files(os.environ))
    gpus = count_gpus()
    nodes = place.nodes(gpus or CPU_RANKS)
    if not place.hostfile or place.node_rank is not None:
        check_gpus(nodes, gpus)
    if dry_run:
        return show(run, nodes, gpus, [*place.options(), *(supervision.options() if supervision else [])])
    if place.hostfile and place.node_rank is None:
        return launch_everywhere(run, place.hostfile, nodes, supervision)
    return launch_node(run, nodes, gpus, supervision)


def launch_node(run: TrainingRun, nodes: Nodes, gpus: int, supervision: Supervision | None) -> int:
    """Check the recipe, start this machine's ranks, wait for them; the exit code to end with. Raises UserError."""
    plan = check(run, nodes, gpus)
    if plan.folder.exists() and not nodes.here:
        lock_run(plan.folder, LOCK_SECONDS if len(nodes.slots) > 1 else 0.0).close()  # told here, not by a rank, late
    if not nodes.here:
        keep_plan(plan, run, nodes.world)
    if sys.stderr.isatty():
        print(f"starting {len(nodes.ranks)} rank(s): some 15 seconds to the first sign", file=sys.stderr)
    operators.main()  # told here if one has to be compiled: DeepSpeed would do it in silence
    environment = rank_environment(os.environ, len(nodes.ranks), on_gpu=gpus > 0)
    start = partial(start_ranks, run, nodes, gpu_numbers(gpus), environment)
    if not supervision and len(nodes.slots) > 1:
        # A machine that was cut off would be waited for without end; a save may take what it takes.
        supervision = Supervision(restarts=0, grace=math.inf)
    if supervision:
        code = Supervisor(start, plan.folder, nodes, supervision).run(run.resume)
    else:
        code = explain(*attend(start(run.resume), nodes.ranks, plan.folder / RANKS))
        if code == 1 and (plan.folder / RECIPE).exists():
            print(f"m6: {way_on(plan.folder)}", file=sys.stderr)
    if code == 0 and not nodes.here:
        print(f"done: {plan.folder}; see it by: m6 report {run.name}")
    return code


def way_on(folder: Path) -> str:
    """What to do after a failure."""
    saved = checkpoint_files.steps(folder / CHECKPOINTS)
    again = f"m6 train --recipe {folder / RECIPE} --name {folder.name} --resume"
    return f"{again} goes on after step {saved[-1] if saved else 0}; with --supervise it does by itself"


def launch_everywhere(run: TrainingRun, hostfile: Path, nodes: Nodes, supervision: Supervision | None) -> int:
    """Train on all machines of a hostfile, each started from here; the largest of their codes. Raises UserError."""
    open_run(run.name, run.load(), run.resume, run.allow_change)
    chosen = ["--master-port", str(nodes.port), *(supervision.options() if supervision else [])]
    started = OnAll(hostfile, nodes.names, ["train", *chosen, *run.words()], fine=[LEFT])
    return started.run(passed_on(os.environ), marked=True)


def keep_plan(plan: Plan, run: TrainingRun, world: int) -> None:
    """Write what is foretold, if it is asked; what was foretold of another run, or on other ranks, goes."""
    if run.cluster:
        write_plan(plan.folder, plan.recipe, run.cluster, world)
    elif not run.resume or planned_world(plan.folder) != world:
        (plan.folder / PLAN).unlink(missing_ok=True)


def check(run: TrainingRun, nodes: Nodes, gpus: int) -> Plan:
    """Find mistakes in the settings here, where they are told once, and not by every rank."""
    recipe = run.load()
    parent = Parent.to_begin(recipe) if recipe.start and not run.resume else None
    if run.data is not None:
        recipe = recipe.model_copy(update={"data": str(run.data)})
    folder, data = open_run(run.name, recipe, run.resume, run.allow_change), Path(recipe.data)
    if not data.is_dir():
        raise UserError(f"data={data}: no such folder; run `m6 data fetch --dir {data}`")
    if parent:
        check_background(parent, recipe)
    if (drawing := sorted({"draw", "inpaint"} & recipe.tasks.keys())) and recipe.image_tokenizer is None:
        raise UserError(
            f"tasks.{drawing[0]}: needs pictures as codes: image_tokenizer=FOLDER names a trained tokenizer"
        )
    if recipe.delink.wanted:
        resolve(recipe.delinked(), nodes.world, gpus, folder / SWAP)
    config_path = default_path(gpus) if recipe.ds_config == "auto" else Path(recipe.ds_config)
    return Plan(recipe, folder, data, resolve(recipe, nodes.world, gpus, folder / SWAP), config_path)


def check_background(parent: Parent, recipe: Recipe) -> None:
    """Raise UserError if what the parent finds by (`training.background`) cannot be had."""
    from training.data.corpus import Corpus  # which takes a second to import
    from training.own_data import own_corpus

    finds = "contrast" in recipe.learned & parent.recipe.learned
    if finds and not parent.recipe.start and Corpus.open(recipe.data).fingerprint != parent.manifest["data"]:
        own_corpus(parent.path, parent.manifest, parent.recipe)


def show(run: TrainingRun, nodes: Nodes, gpus: int, chosen: Sequence[str]) -> int:
    """Print what would run, and the command that starts it with the options `chosen`; the exit code to end with."""
    plan = check(run, nodes, gpus)
    facts = (
        recipe_facts(plan)
        | start_facts(plan.recipe)
        | (resume_facts(plan) if run.resume else {})
        | layout_facts(plan.config, nodes.world)
    )
    if run.cluster:
        facts["plan"] = plan_fact(foretold(plan.recipe, run.cluster, nodes.world)["metrics"])
    for name, value in facts.items():
        print(f"{name:14} {value}")
    print(f"nothing was started; to start it: {shlex.join(['m6', 'train', *chosen, *run.words()])}")
    return 0


def recipe_facts(plan: Plan) -> dict[str, str]:
    """What is trained, on what, for how long."""
    from training.data.order import row_counts  # with the tasks, whose import takes seconds

    recipe = plan.recipe
    rows = row_counts(recipe.tasks, recipe.global_batch, recipe.block).items()
    changes = f", changed by {json.dumps(recipe.ds, ensure_ascii=False)}" if recipe.ds else ""
    evaluation = recipe.evaluation
    return {
        "run": f"{plan.folder.name}, in the {'existing' if plan.folder.exists() else 'new'} folder {plan.folder}",
        "data": str(plan.data),
        "steps": f"{recipe.steps:,}, of {recipe.global_batch:,} rows each",
        "tasks": ", ".join(f"{task} {count} ({count / recipe.global_batch:.1%})" for task, count in rows),
        "evaluation": f"first, every {evaluation.every:,} steps, and last, on {evaluation.rows:,} rows a task",
        "checkpoint": f"every {recipe.save_every:,} steps, and last; the newest {recipe.keep} are kept",
        "ds_config": f"{plan.config_path}{changes}",
    }


def start_facts(recipe: Recipe) -> dict[str, str]:
    """Which weights it begins with, if they are a run's."""
    return {"start": recipe.start.checkpoint} if recipe.start else {}


def resume_facts(plan: Plan) -> dict[str, str]:
    """Where it would go on."""
    saved = checkpoint_files.steps(plan.folder / CHECKPOINTS)
    if not saved:
        return {"resume": "from the start: nothing is saved yet"}
    left = plan.recipe.steps - saved[-1]
    rest = f"{left:,} steps are left" if left > 0 else "nothing is left to do, unless steps is raised"
    return {
        "evaluation": f"every {plan.recipe.evaluation.every:,} steps, and last",
        "resume": f"after step {saved[-1]:,}; {rest}",
    }


def layout_facts(config: DSConfig, ranks: int) -> dict[str, str]:
    """How large it is, and where its parts live."""
    counts = config.model.parameter_counts()
    experts = f"{config.model.experts} a layer, {config.model.experts // config.expert_parallel} a rank"
    return {
        "parameters": f"{counts.total:,}, of which a token passes {counts.active:,}",
        "trained": trained_fact(config),
        "experts": experts if config.model.experts else "none: a dense model",
        "ranks": f"{ranks}, in groups of {config.expert_parallel} that share one set of experts",
        "rows a step": f"{ranks} ranks x {config.micro_batch} x {config.accumulation} micro-batches",
        "precision": config.precision,
        "parameters on": str(config.placement.parameters),
        "optimizer on": str(config.placement.optimizer),
        "resident": resident(config),
    }


def trained_fact(config: DSConfig) -> str:
    """Which parts of the model learn, and how large they are."""
    counts = config.model.parameter_counts()
    if config.trained >= WHOLE:
        return "all of them"
    own = counts.of(config.trained)
    return f"{own:,} ({own / counts.total:.2%}): {', '.join(sorted(config.trained))}; the rest is frozen"


def plan_fact(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """What is foretold of a step."""
    step, speed, memory = (metrics[key] for key in ("step_seconds", "tokens_per_second", "memory/host_bytes"))
    return (
        f"{step['value']:.3g} s a step ({step['low']:.3g} to {step['high']:.3g}), {speed['value']:,.0f} tokens/s, "
        f"{memory['value'] / 1e9:,.3g} GB of host memory"
    )


def resident(config: DSConfig) -> str:
    """Bytes of a rank's states by tier."""
    tiers = config.placement.bytes(config.elements, config.sizes)
    held = {tier: sum(kinds.values()) for tier, kinds in tiers.items()}
    return ", ".join(f"{size / 1e9:,.3g} GB {tier}" for tier, size in held.items() if size) + " a rank"


def count_gpus() -> int:
    """GPUs that torch may use; 0 where the CPU was asked for."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def check_gpus(nodes: Nodes, gpus: int) -> None:
    """Raise UserError if this machine has GPUs, but not one for each of its ranks."""
    if gpus and len(nodes.ranks) > gpus:
        raise UserError(f"{len(nodes.ranks)} ranks: this machine has {gpus} GPU(s); give at most that many")


def gpu_numbers(gpus: int) -> list[str]:
    """The numbers of the GPUs that CUDA_VISIBLE_DEVICES leaves (the launcher ignores it); [] on the CPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not gpus or not visible:
        return [str(gpu) for gpu in range(gpus)]
    numbers = [number.strip() for number in visible.split(",")][:gpus]
    if not all(number.isdigit() for number in numbers):
        raise UserError(f"CUDA_VISIBLE_DEVICES={visible}: the launcher takes GPU numbers only, such as 0,1")
    return numbers


def start_ranks(
    run: TrainingRun, nodes: Nodes, gpus: list[str], environment: Mapping[str, str], resume: bool
) -> subprocess.Popen:
    """The launcher of this machine's ranks, in a session of its own, which they share."""
    command = launcher_command(["training.train", *replace(run, resume=resume).arguments()], nodes, gpus)
    return subprocess.Popen(command, env=dict(environment), start_new_session=True)


def launcher_command(program: Sequence[str], nodes: Nodes, gpus: list[str]) -> list[str]:
    """DeepSpeed's launcher of a module, with its arguments, on this machine's ranks, with this Python.

    What `deepspeed` itself starts on each machine; starting it directly saves seconds of imports.
    """
    devices = {name: list(range(count)) for name, count in nodes.slots.items()}
    if gpus:
        devices[nodes.names[nodes.here]] = [int(gpu) for gpu in gpus[: len(nodes.ranks)]]
    machines = base64.urlsafe_b64encode(json.dumps(devices).encode()).decode()
    return [
        *(sys.executable, "-m", "deepspeed.launcher.launch"),
        *("--log_level", "info" if os.environ.get("M6_DEBUG") else "critical"),
        *(f"--world_info={machines}", f"--node_rank={nodes.here}"),
        *(f"--master_addr={nodes.names[0]}", f"--master_port={nodes.port or free_port()}"),
        *("--no_local_rank", "--module", *program),
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(base: Mapping[str, str], ranks: int, on_gpu: bool) -> dict[str, str]:
    """The environment of this machine's ranks: `base`, with defaults for what it does not set."""
    environment = {
        "OMP_NUM_THREADS": str(max(1, usable_cores() // ranks)),
        "GLIBC_TUNABLES": KEEP_FREED_MEMORY,
        "PYTHONUNBUFFERED": "1",
        **base,
        "LOCAL_WORLD_SIZE": str(ranks),
        # DeepSpeed calls ninja by its name.
        "PATH": f"{Path(sys.executable).parent}:{base.get('PATH', os.defpath)}",
    }
    for own in ("CUDA_VISIBLE_DEVICES", "RANK"):  # the launcher sets them for its ranks
        environment.pop(own, None)
    if not on_gpu:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def attend(launcher: subprocess.Popen, ranks: Sequence[int], beats: Path) -> tuple[int, int | None]:
    """Wait for the end of the launcher, and of `ranks` that are left to save. `beats`: the folder of their heartbeats.

    Returns the launcher's exit code, or after a request LEFT, or 128 + the number of the signal that stopped us before
    the ranks could save; and the rank that failed first, if known.
    """
    # Not to the launcher itself: it ends after the others, but would kill those that save for long.
    with forwarding(launcher, to_root=False) as received, Ranks(launcher, ranks) as started:
        failed = first_rank_to_fail(started)
        code = launcher.wait()
        while received and started.running():
            started.wait(0.5)  # a batch system has ended the launcher too
        if received and code not in (0, MISTAKE, LEFT):
            ends = [beat[0].code for rank in started.pids if (beat := read_beat(beats, rank))]
            code = LEFT if ends == [LEFT] * len(ranks) else 128 + received[0]
    return code, failed


def explain(code: int, failed: int | None) -> int:
    """Say why training ended, where the ranks could not; returns the exit code to end with.

    The launcher turns a rank that a signal killed into 256 - signal. A rank explained MISTAKE, LEFT and RESTARTABLE.
    """
    rank, killer = "a rank" if failed is None else f"rank {failed}", -code if code < 0 else 256 - code
    if code in (0, MISTAKE, LEFT):
        return code
    if code in STOPPED:
        print("m6: stopped before it could save", file=sys.stderr)
        return code
    if killer in set(signal.Signals):
        hint = "; most likely memory ran out" if killer == signal.SIGKILL else ""
        print(f"m6: {rank} was killed by {signal.Signals(killer).name}{hint}", file=sys.stderr)
    elif code != RESTARTABLE:
        print(f"m6: {rank} failed (code {code}); its own message is above", file=sys.stderr)
    return 1
