"""The machines of a run: which they are, and which ranks each has.

They stand in a hostfile as DeepSpeed's launcher reads it, a line each: `NAME slots=RANKS`. The first has rank 0.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from launch.environment import lines
from training.errors import UserError

PORT = 29500  # at which rank 0 is met, as everywhere in the field
SSH_PORT = 22
ANSWER_SECONDS = 3.0


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
    for number, line in enumerate(lines(path, f"--hostfile {path}"), 1):
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
