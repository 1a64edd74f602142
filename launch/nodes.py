"""The machines of a run: which they are, which ranks each has, and how all are started from one of them.

They stand in a hostfile as DeepSpeed's launcher reads it, a line each: `NAME slots=RANKS`. The first has rank 0.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from launch.processes import hearing, insists
from training.errors import MISTAKE, UserError

PORT = 29500  # at which rank 0 is met, as everywhere in the field
SSH_PORT = 22
ANSWER_SECONDS = 3.0
LOOK_SECONDS, ASK_SECONDS = 0.5, 5.0
LEAVE_SECONDS = 900.0  # that machines have to save and leave, before we do not wait for them any more
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
    slots: dict[str, int] = {}
    for number, line in enumerate(_lines(path, f"--hostfile {path}"), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = re.fullmatch(r"(\w[\w.:-]*)\s+slots=([1-9]\d{0,4})", text)
        if not found:
            raise UserError(f"{path}, line {number}: {text!r} must be NAME slots=RANKS, such as node0 slots=8")
        if found[1] in slots:
            raise UserError(f"{path}, line {number}: {found[1]} was there before; give each machine one line")
        slots[found[1]] = int(found[2])
    if not slots:
        raise UserError(f"{path}: names no machine; a line for each, such as node0 slots=8")
    return slots


def _lines(path: Path, named: str) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8 text"
        raise UserError(f"{named}: cannot be read ({reason})") from None


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
    for number, line in enumerate(_lines(path, str(path)), 1):
        text = line.strip()
        if text and not text.startswith("#"):
            key, equals, value = text.partition("=")
            if not (equals and re.fullmatch(r"\w+", key)):
                raise UserError(f"{path}, line {number}: {text!r} must be KEY=VALUE")
            found[key] = value
    return found


class OnAll:
    """`m6 ARGUMENTS --hostfile H --node-rank N` on all machines of a hostfile, over ssh.

    They need this checkout, its .venv, the hostfile and `runs/` at the same paths. A signal that should end us is
    passed on to all; and where one machine fails, the others are asked to leave.
    """

    def __init__(self, hostfile: Path, names: Sequence[str], arguments: Sequence[str], fine: Collection[int]):
        """`fine`: exit codes of a machine that say nothing of the others."""
        self.names, self.fine = names, {0, *fine}
        self.own = [*arguments, "--hostfile", str(hostfile.absolute())]
        self.codes: dict[str, int] = {}  # of machines that ended with another code than 0
        self._asked: signal.Signals | None = None  # what the machines are asked with, again and again
        self._over = threading.Event()

    def run(self, environment: Mapping[str, str], marked: bool) -> int:
        """The exit code for all, a mistake before any other failure. `environment` is set there, too.

        What they print comes with their names before it if `marked`. Raises UserError.
        """
        settings = [f"{key}={value}" for key, value in environment.items()]
        program = [sys.executable, "-P", "-c", "from launch.cli import main; main()", *self.own]
        command = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(['env', *settings, *program])}"
        start = pdsh(self.names, f"{_plain(command)} --node-rank %n", *([] if marked else ["-N"]))
        process = subprocess.Popen(
            start, start_new_session=True, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
        )
        asking = threading.Thread(target=self._ask, args=(process,), daemon=True)
        with process, hearing(self._hear):
            asking.start()
            assert process.stderr
            for line in process.stderr:
                self._read(line)
        self._over.set()
        asking.join()
        return self._code(process.returncode)

    def _hear(self, received: list[int]) -> None:
        if self._asked is None:
            print("m6: asking all machines to leave; Ctrl-C again ends them at once", file=sys.stderr, flush=True)
        self._asked = signal.SIGINT if insists(received) else signal.SIGTERM

    def _read(self, line: str) -> None:
        ended = ENDED.match(line)
        if not ended:
            print(line, end="", file=sys.stderr, flush=True)
            return
        name, code = ended[1], int(ended[2])
        self.codes[name] = code
        if code not in self.fine:
            print(f"m6: {name}: ended with code {code}", file=sys.stderr, flush=True)
            self._asked = self._asked or signal.SIGTERM

    def _ask(self, process: subprocess.Popen[str]) -> None:
        """Ask again until all have ended: a machine may not have started yet when it was asked first.

        Who does not answer, or not any more, is left.
        """
        asked_at: float | None = None
        while not self._over.wait(ASK_SECONDS if asked_at else LOOK_SECONDS):
            if self._asked is None:
                continue
            asked_at = asked_at or time.monotonic()
            insisting = self._asked == signal.SIGINT
            self._signal("INT" if insisting else "TERM")
            if insisting:  # the second of two is what a machine's own supervisor takes for insisting, too
                time.sleep(ASK_SECONDS)
                self._signal("INT")
            if time.monotonic() - asked_at > (ASK_SECONDS if insisting else LEAVE_SECONDS):
                print("m6: some machines do not answer, and are left to themselves", file=sys.stderr, flush=True)
                process.kill()

    def _signal(self, name: str) -> None:
        """To what we started, which is known by its arguments. Brackets keep pkill's own shell from fitting."""
        pattern = f"[m]ain\\(\\) {re.escape(' '.join(self.own))} --node-rank"
        kill = pdsh(self.names, _plain(f"LC_ALL=C.UTF-8 pkill -{name} -f -- {shlex.quote(pattern)}"))
        quiet = subprocess.DEVNULL
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(kill, stdin=quiet, stdout=quiet, stderr=quiet, timeout=ASK_SECONDS, start_new_session=True)

    def _code(self, ended: int) -> int:
        codes = set(self.codes.values())
        if MISTAKE in codes:
            return MISTAKE
        failures = codes - self.fine
        if failures or ended < 0:
            return max(failures, default=1)
        return max(codes, default=ended)


def pdsh(names: Sequence[str], command: str, *options: str) -> list[str]:
    """The program that runs a command of a shell on all machines at once, its output marked with their names.

    `%n` in the command is a machine's number. Raises UserError.
    """
    if not shutil.which("pdsh"):
        ways = "apt-get install pdsh, or start the same on each machine with its --node-rank"
        raise UserError(f"pdsh, which starts programs on all machines of a hostfile, is missing: {ways}")
    return ["pdsh", "-S", "-R", "ssh", "-f", str(len(names)), *options, "-w", ",".join(names), command]


def _plain(command: str) -> str:
    """Words in which pdsh finds nothing to put in."""
    return command.replace("%", "%%")
