"""Whether every way to start a training starts the same one: two ranks, on one machine or two, and their losses.

python -m benchmarks.launching [--data data]. Needs root, pdsh and sshd: machines are network namespaces of this one
(`benchmarks/machines.py`); what Slurm offers is played by two short scripts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.kills import ROOT, command
from benchmarks.machines import Machines, lacking, machines

STEPS = 4
# What Slurm offers a batch script: a task on each node, and what is asked of it.
SLURM = {
    "srun": """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait $task; code=$?; [ $code -le ${worst:-0} ] || worst=$code; done
exit ${worst:-0}
""",
    "scontrol": """#!/bin/bash
case $1 in
    show) printf 'localhost\\n127.0.0.1\\n' ;;
    requeue) echo "$@" >>asked ;;
esac
""",
    "squeue": """#!/bin/bash
echo RUNNING
""",
}


@dataclass(frozen=True)
class Start:
    """What is started, one process for each word list, with additions to the environment."""

    words: Sequence[Sequence[str]]
    environment: Mapping[str, str]

    def processes(self, folder: Path) -> list[subprocess.Popen[str]]:
        return [
            subprocess.Popen(
                own, cwd=folder, env=os.environ | self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                text=True, start_new_session=True,
            )
            for own in self.words
        ]  # fmt: skip


def training(data: Path, *arguments: str) -> list[str]:
    """`m6 train` of a small model, whose first losses do not depend on the number of steps."""
    return command(data, "run", "schedule.decay=constant", *arguments)


def options(words: Sequence[str]) -> list[str]:
    """Those of `m6 train`, of a whole command."""
    return list(words[words.index("train") + 1 :])


def hostfile(names: Sequence[str], folder: Path) -> str:
    path = folder / "hosts"
    path.write_text("".join(f"{name} slots=1\n" for name in names))
    return str(path)


def alone(folder: Path, words: Sequence[str], two: Machines) -> Start:
    return Start([words], {})


def by_pdsh(folder: Path, words: Sequence[str], two: Machines) -> Start:
    """From the first of two machines, `m6 train --hostfile`."""
    return Start([[*two.inside(0), *words, "--hostfile", hostfile(two.addresses, folder)]], two.environment)


def by_hand(folder: Path, words: Sequence[str], two: Machines) -> Start:
    """On each of two machines, with its --node-rank."""
    own = ["--hostfile", hostfile(two.addresses, folder), "--node-rank"]
    return Start([[*two.inside(number), *words, *own, str(number)] for number in range(2)], two.environment)


def by_deepspeed(folder: Path, words: Sequence[str], two: Machines) -> Start:
    """DeepSpeed's own launcher, with a hostfile and pdsh. What is not its to pass on stands in its environment file."""
    # `m6 train` would give each rank its share of the cores; sums depend on the number of threads.
    settings = two.environment | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    passed = ("GLOO_SOCKET_IFNAME", "DS_ACCELERATOR", "OMP_NUM_THREADS", "PATH")
    (folder / ".deepspeed_env").write_text("".join(f"{key}={settings[key]}\n" for key in passed))
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", hostfile(two.addresses, folder)]
    launcher += ["--no_ssh_check", "--master_addr", two.addresses[0], "--no_local_rank", "--module", "training.train"]
    return Start([[*two.inside(0), *launcher, *options(words)]], two.environment)


def by_slurm(folder: Path, words: Sequence[str], two: Machines | None = None) -> Start:
    """`launch/slurm.sbatch`, on two nodes that are both this machine."""
    for name, text in SLURM.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    _environment_at(folder)
    own = options(words)
    place = own.index("--name")
    settings = {
        "SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "nodes[0-1]",
        "PATH": f"{folder}:{os.environ['PATH']}",
    }  # fmt: skip
    script = str(ROOT / "launch" / "slurm.sbatch")
    return Start([["bash", script, own[place + 1], *own[:place], *own[place + 2 :]]], settings)


def by_kubernetes(folder: Path, words: Sequence[str], two: Machines | None = None) -> Start:
    """The command of `launch/kubernetes.yaml`'s containers, in two pods that are both this machine."""
    _environment_at(folder)
    *_, job = yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text(encoding="utf-8"))
    [container] = job["spec"]["template"]["spec"]["containers"]
    own = options(words)
    place = own.index("--recipe")
    [script] = container["args"]
    script = script.replace("/etc/m6/hostfile", hostfile(["localhost", "127.0.0.1"], folder))
    script = script.replace("launch/recipes/quickstart.yaml", " ".join(own[place + 1 :]))
    settings = {entry["name"]: str(entry["value"]) for entry in container["env"]} | {"NAME": "run"}
    pods = [["env", f"JOB_COMPLETION_INDEX={number}", *container["command"], script] for number in range(2)]
    return Start(pods, settings)


def by_accelerate(folder: Path, words: Sequence[str], two: Machines | None = None) -> Start:
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
    launcher += [str(ROOT / "launch" / "accelerate.yaml"), "--num_processes", "2", "-m", "training.train"]
    return Start([[*launcher, *options(words)]], {"PYTHONPATH": str(ROOT)})


def _environment_at(folder: Path) -> None:
    (folder / ".venv").unlink(missing_ok=True)
    (folder / ".venv").symlink_to(sys.prefix)


WAYS: dict[str, Callable[[Path, Sequence[str], Machines], Start]] = {
    "m6 train --ranks 2": alone,
    "m6 train --hostfile H, two machines, pdsh": by_pdsh,
    "m6 train --hostfile H --node-rank N on each of two": by_hand,
    "deepspeed --hostfile H, two machines, pdsh": by_deepspeed,
    "sbatch launch/slurm.sbatch, two nodes": by_slurm,
    "launch/kubernetes.yaml, two pods": by_kubernetes,
    "accelerate launch, two processes": by_accelerate,
}


def losses(folder: Path) -> list[float]:
    """Of the run's steps, as far as they are told."""
    path = folder / "runs" / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line["loss"] for line in lines if "loss" in line]


def finish(processes: Sequence[subprocess.Popen[str]], seconds: float = 300) -> str:
    """Wait until all have ended well; what they said on standard error. Raises RuntimeError with that otherwise."""
    said = "".join(process.communicate(timeout=seconds)[1] for process in processes)
    if any(process.returncode for process in processes):
        raise RuntimeError(said)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    data = parser.parse_args().data.absolute()
    if lack := lacking():
        sys.exit(f"no machines can be made: {lack}")
    print("| started by | seconds | losses of the first steps | as the first |\n|---|---|---|---|")
    first: list[float] = []
    folder = Path(tempfile.mkdtemp(prefix="launching-"))
    (folder / "keys").mkdir()
    with machines(2, folder / "keys") as two:
        for number, (name, way) in enumerate(WAYS.items()):
            (folder / str(number)).mkdir()
            begun = time.perf_counter()
            finish(
                way(folder / str(number), training(data, f"steps={STEPS}", "model.text_vocab=16000"), two).processes(
                    folder / str(number)
                )
            )
            seconds, found = time.perf_counter() - begun, losses(folder / str(number))
            first = first or found
            shown = ", ".join(f"{loss:.6f}" for loss in found)
            print(f"| {name} | {seconds:.0f} | {shown} | {'equal' if found == first else 'NOT EQUAL'} |", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
