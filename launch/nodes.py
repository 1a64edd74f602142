"""The machines of a run: which they are, which ranks each has, and how all are started from one of them.

They stand in a hostfile as DeepSpeed's launcher reads it, a line each: `NAME slots=RANKS`. The first has rank 0.
"""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from launch.processes import hearing, insists
from training.errors import LEFT, UserError

PORT = 29500  # at which rank 0 is met, as everywhere in the field
SSH_PORT = 22
ANSWER_SECONDS = 3.0
# What other machines are told of this one's environment, but for what is secret. Each reads environment files itself.
PASSED_ON = ("DS_", "GLOO_", "HF_", "M6_", "NCCL_", "OMP_", "PYTHON", "TORCH_", "WANDB_")
SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD")
ENDED = re.compile(r"pdsh@\S+ (\S+): ssh exited with exit code (\d+)")
ENVIRONMENT_FILE = ".deepspeed_env"  # here or at home, or DS_ENV_FILE names another


@dataclass(frozen=True)
class Nodes:
    """`slots`: the ranks of each machine, by its name and in order; `here`: the number of this one.

    `port`: where rank 0 is met; None for any that is free, where nobody else has to know.
    """

    slots: Mapping[str, int]
    here: int = 0
    port: int | None = None

    @property
    def names(self) -> list[str]:
        return list(self.slots)

    @property
    def world(self) -> int:
        return sum(self.slots.values())

    @property
    def ranks(self) -> range:
        """Those of this machine."""
        counts = list(self.slots.values())
        first = sum(counts[: self.here])
        return range(first, first + counts[self.here])

    def silent(self) -> list[str]:
        """The other machines that cannot be reached. One that refuses the connection is there."""
        others = [name for number, name in enumerate(self.names) if number != self.here]
        with ThreadPoolExecutor(max(len(others), 1)) as threads:
            return [name for name, answers in zip(others, threads.map(_answers, others), strict=True) if not answers]


def _answers(name: str) -> bool:
    try:
        socket.create_connection((name, SSH_PORT), ANSWER_SECONDS).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Place:
    """Where a run is asked to be: on this machine, or on those of a hostfile, all of them or one (`node_rank`)."""

    ranks: int | None = None  # on this machine
    hostfile: Path | None = None
    node_rank: int | None = None
    port: int | None = None

    def nodes(self, ranks: int) -> Nodes:
        """The machines; `ranks` on this one where nothing is said of them. Raises UserError."""
        if self.hostfile is None:
            if self.node_rank is not None or self.port:
                raise UserError("--node-rank and --master-port are of the machines of a --hostfile: give that, too")
            return one_machine(self.ranks or ranks)
        if self.ranks:
            raise UserError(f"--ranks {self.ranks}: on the machines of a hostfile its slots say how many; leave it out")
        slots, here = read_hostfile(self.hostfile), self.node_rank or 0
        if here >= len(slots):
            raise UserError(f"--node-rank {here}: {self.hostfile} has machines 0 to {len(slots) - 1}")
        return Nodes(slots, here, self.port or PORT)

    def options(self) -> list[str]:
        """Those of `m6` that say the same."""
        named = {"--ranks": self.ranks, "--hostfile": self.hostfile, "--node-rank": self.node_rank}
        named["--master-port"] = self.port
        return [word for name, value in named.items() if value is not None for word in (name, str(value))]


def one_machine(ranks: int) -> Nodes:
    """This one alone."""
    return Nodes({"127.0.0.1": ranks})


def read_hostfile(path: Path) -> dict[str, int]:
    """Ranks by machine. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8 text"
        raise UserError(f"--hostfile {path}: cannot be read ({reason})") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = re.fullmatch(r"([\w.:-]+)\s+slots=([1-9]\d{0,4})", text)
        if not found:
            raise UserError(f"{path}, line {number}: {text!r} must be NAME slots=RANKS, such as node0 slots=8")
        if found[1] in slots:
            raise UserError(f"{path}, line {number}: {found[1]} was there before; give each machine one line")
        slots[found[1]] = int(found[2])
    if not slots:
        raise UserError(f"{path}: names no machine; a line for each, such as node0 slots=8")
    return slots


def passed_on(base: Mapping[str, str]) -> dict[str, str]:
    """What of an environment the other machines are told: settings of libraries, but no secrets."""
    return {key: value for key, value in base.items() if key.startswith(PASSED_ON) and not SECRET.search(key)}


def environment_files(base: Mapping[str, str]) -> dict[str, str]:
    """What DeepSpeed's environment files say, with KEY=VALUE a line: the one at home, and the one here.

    Raises UserError.
    """
    named = base.get("DS_ENV_FILE", ENVIRONMENT_FILE)
    found: dict[str, str] = {}
    for path in (Path.home() / named, Path(named)):
        if path.is_file():
            found |= _environment_file(path)
    return found


def _environment_file(path: Path) -> dict[str, str]:
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.strip()
        if text and not text.startswith("#"):
            key, equals, value = text.partition("=")
            if not (equals and re.fullmatch(r"\w+", key)):
                raise UserError(f"{path}, line {number}: {text!r} must be KEY=VALUE")
            found[key] = value
    return found


def run_on_all(
    hostfile: Path, names: Sequence[str], arguments: Sequence[str], environment: Mapping[str, str], marked: bool = True
) -> int:
    """Run `m6 ARGUMENTS --hostfile H --node-rank N` on all its machines, over ssh; the largest of their exit codes.

    The machines need this checkout, its .venv and `runs/` at the same paths. `environment` is set there, too. A signal
    that should end us is passed on to all; and where one fails, the others are asked to leave. What they print comes
    with their names before it if `marked`. Raises UserError.
    """
    own = [*arguments, "--hostfile", str(hostfile.absolute())]
    settings = [f"{key}={value}" for key, value in environment.items()]
    program = [sys.executable, "-P", "-c", "from launch.cli import main; main()", *own]
    command = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(['env', *settings, *program])}"
    start = pdsh(names, f"{_plain(command)} --node-rank %n")
    if not marked:
        start.insert(1, "-N")
    process = subprocess.Popen(start, start_new_session=True, stderr=subprocess.PIPE, text=True)
    with process, hearing(lambda received: _end_on_all(names, own, "KILL" if insists(received) else "TERM")):
        assert process.stderr
        failed = False
        for line in process.stderr:
            ended = ENDED.match(line)
            if not ended:
                print(line, end="", file=sys.stderr, flush=True)
            elif int(ended[2]) != LEFT:
                print(f"m6: {ended[1]}: ended with code {ended[2]}", file=sys.stderr, flush=True)
                if not failed and len(names) > 1:
                    _end_on_all(names, own, "TERM")
                failed = True
    return process.returncode


def pdsh(names: Sequence[str], command: str) -> list[str]:
    """The program that runs a command of a shell on all machines at once, its output marked with their names.

    `%n` in the command is a machine's number. Raises UserError.
    """
    if not shutil.which("pdsh"):
        ways = "apt-get install pdsh, or start the same on each machine with its --node-rank"
        raise UserError(f"pdsh, which starts programs on all machines of a hostfile, is missing: {ways}")
    return ["pdsh", "-S", "-R", "ssh", "-f", str(len(names)), "-w", ",".join(names), command]


def _end_on_all(names: Sequence[str], arguments: Sequence[str], signal: str) -> None:
    """Signal what `run_on_all` started, which is known by its arguments."""
    pattern = f"[m]ain\\(\\) {re.escape(' '.join(arguments))} --node-rank"  # brackets: not pkill's own shell
    subprocess.Popen(pdsh(names, _plain(f"pkill -{signal} -f -- {shlex.quote(pattern)}")), start_new_session=True)


def _plain(command: str) -> str:
    """Words in which pdsh finds nothing to put in."""
    return command.replace("%", "%%")
