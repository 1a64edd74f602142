"""The same command on all machines of a hostfile, started from one of them."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from launch.processes import hearing, insists
from training.errors import MISTAKE, UserError

LOOK_SECONDS, ASK_SECONDS = 0.5, 5.0
LEAVE_SECONDS = 900.0  # that machines have to save and leave, before we do not wait for them any more
ENDED = re.compile(r"pdsh@\S+ (\S+): ssh exited with exit code (\d+)")


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
