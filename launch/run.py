"""`m6 train`: the training program as ranks of DeepSpeed's launcher on this machine."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from launch import operators
from training.ds_config import DSConfig, resolve
from training.errors import UserError
from training.machine import usable_cores
from training.recipe import load_recipe
from training.run import SWAP, open_run

CPU_RANKS = 2  # so that expert parallelism is at work on any machine

# Freed memory stays with the process. Each step allocates the same large tensors anew; getting pages from
# the system again costs more than filling them (48 MB: 62 ms against 8 ms). So nothing is trimmed, and blocks
# of up to 1 GiB come from the heap.
KEEP_FREED_MEMORY = ":".join(
    (
        f"glibc.malloc.mmap_threshold={2**30}",
        f"glibc.malloc.trim_threshold={2**40}",
        f"glibc.malloc.top_pad={2**26}",
    )
)

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class TrainingRun:
    """What `training.train` is told; `data` None leaves the recipe's own."""

    recipe: Path
    overrides: tuple[str, ...] = ()
    name: str = "run"
    data: Path | None = None
    resume: bool = False

    def arguments(self) -> list[str]:
        arguments = ["--recipe", str(self.recipe), "--name", self.name]
        if self.data is not None:
            arguments += ["--data", str(self.data)]
        if self.resume:
            arguments.append("--resume")
        return [*arguments, *self.overrides]


def launch(run: TrainingRun, ranks: int | None, dry_run: bool = False) -> int:
    """Check the recipe, start the ranks, wait for them; the exit code to end with.

    `ranks` None is a rank a GPU, or CPU_RANKS without one. Raises UserError for mistakes seen before that.
    """
    gpus = count_gpus()
    if gpus and ranks is not None and ranks > gpus:
        raise UserError(f"--ranks {ranks}: this machine has {gpus} GPU(s); give at most that many")
    ranks = ranks or gpus or CPU_RANKS
    config = check(run, ranks, gpus)
    if dry_run:
        show(config, ranks)
        return 0
    operators.main()  # told here if one has to be compiled: DeepSpeed would do it in silence
    environment = rank_environment(os.environ, ranks, on_gpu=gpus > 0)
    return explain(supervise(launcher_command(run, ranks, gpu_numbers(gpus)), environment))


def check(run: TrainingRun, ranks: int, gpus: int) -> DSConfig:
    """Find mistakes in the settings here, where they are told once, and not by every rank."""
    recipe = load_recipe(run.recipe, list(run.overrides))
    folder = open_run(run.name, recipe, run.resume)
    data = run.data or Path(recipe.data)
    if not data.is_dir():
        raise UserError(f"data={data}: no such folder; run `m6 data fetch --dir {data}`")
    return resolve(recipe, ranks, gpus, folder / SWAP)


def show(config: DSConfig, ranks: int) -> None:
    """Print what would run."""
    counts = config.model.parameter_counts()
    experts = f"{config.model.experts} a layer, {config.model.experts // config.expert_parallel} a rank"
    facts = {
        "parameters": f"{counts.total:,}, of which a token passes {counts.active:,}",
        "experts": experts if config.model.experts else "none: a dense model",
        "ranks": f"{ranks}, in groups of {config.expert_parallel} that share one set of experts",
        "rows a step": f"{ranks} ranks x {config.micro_batch} x {config.accumulation} micro-batches",
        "precision": config.precision,
        "parameters on": config.parameter_tier.replace("none", "the device"),
        "optimizer on": config.optimizer_tier.replace("none", "the device"),
    }
    for name, value in facts.items():
        print(f"{name:14} {value}")


def count_gpus() -> int:
    """GPUs that torch may use; 0 where the CPU was asked for."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def gpu_numbers(gpus: int) -> list[str]:
    """The numbers of the GPUs that CUDA_VISIBLE_DEVICES leaves (the launcher ignores it); [] on the CPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not gpus or not visible:
        return [str(gpu) for gpu in range(gpus)]
    numbers = [number.strip() for number in visible.split(",")][:gpus]
    if not all(number.isdigit() for number in numbers):
        raise UserError(f"CUDA_VISIBLE_DEVICES={visible}: the launcher takes GPU numbers only, such as 0,1")
    return numbers


def launcher_command(run: TrainingRun, ranks: int, gpus: list[str]) -> list[str]:
    """DeepSpeed's launcher with this Python, on this machine alone."""
    devices = ["--num_accelerators", str(ranks)]
    if gpus:
        devices = ["--include", f"localhost:{','.join(gpus[:ranks])}"]
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *("--log_level", "info" if os.environ.get("M6_DEBUG") else "critical"),
        *devices,
        *("--master_port", str(free_port())),
        *("--no_local_rank", "--module", "training.train"),
        *run.arguments(),
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(base: Mapping[str, str], ranks: int, on_gpu: bool) -> dict[str, str]:
    """The environment of the ranks: `base`, with defaults for what it does not set."""
    environment = {
        "OMP_NUM_THREADS": str(max(1, usable_cores() // ranks)),
        "GLIBC_TUNABLES": KEEP_FREED_MEMORY,
        "PYTHONUNBUFFERED": "1",
        **base,
        # DeepSpeed calls ninja by its name.
        "PATH": f"{Path(sys.executable).parent}:{base.get('PATH', os.defpath)}",
    }
    environment.pop("CUDA_VISIBLE_DEVICES", None)  # the launcher sets it for its ranks
    if not on_gpu:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def supervise(command: list[str], environment: Mapping[str, str]) -> int:
    """Run the launcher to its end and return its exit code, or 128 + the number of a signal that stopped us.

    The launcher has a session of its own: a terminal's Ctrl-C would otherwise hit launcher and ranks at once.
    A first signal asks the ranks to end (SIGTERM), a second one kills them.
    """
    process = subprocess.Popen(command, env=dict(environment), start_new_session=True)
    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        stop(process, kill=len(received) > 1)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 128 + received[0] if received else code


def stop(process: subprocess.Popen, kill: bool) -> None:
    """End the ranks and the launcher's inner process; its outer one ends after them, unless still alone."""
    try:
        launcher = psutil.Process(process.pid)
        family = launcher.children(recursive=True) or [launcher]
    except psutil.NoSuchProcess:
        return
    for member in [*family, launcher] if kill else family:
        try:
            member.kill() if kill else member.terminate()
        except psutil.NoSuchProcess:
            continue


def explain(code: int) -> int:
    """Say why training ended, where the ranks could not; returns the exit code to end with.

    The launcher turns a rank that a signal killed into 256 - signal. Code 2 was explained by a rank.
    """
    if code in (128 + number for number in FORWARDED):
        print("m6: stopped", file=sys.stderr)
    elif code < 0 or code > 192:
        killer = signal.Signals(-code if code < 0 else 256 - code)
        hint = "; most likely memory ran out" if killer == signal.SIGKILL else ""
        print(f"m6: a rank was killed by {killer.name}{hint}", file=sys.stderr)
        return 1
    elif code not in (0, 2):
        print(f"m6: training failed (code {code}); the rank's own message is above", file=sys.stderr)
    return code
