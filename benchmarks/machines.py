"""Machines that are network namespaces of this one: own addresses, an sshd on each, one switch between them.

They share the file system, as a cluster's machines share `runs/`; processes too.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("ip", "tc", "sshd", "ssh", "ssh-keygen", "pdsh")


def lacking() -> str:
    """What is missing for such machines, in words; "" if nothing is."""
    if os.geteuid():
        return "not root"
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        return f"{', '.join(missing)} not installed"
    return "" if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0 else "no namespaces"


@dataclass(frozen=True)
class Machines:
    """Namespaces `names`, each with its address; `ssh` is what clients among them need to be told."""

    names: Sequence[str]
    ssh: str

    @property
    def addresses(self) -> list[str]:
        return [f"10.77.0.{number + 1}" for number in range(len(self.names))]

    def inside(self, number: int) -> list[str]:
        """The words before a command that runs it on a machine."""
        return ["ip", "netns", "exec", self.names[number]]

    @property
    def environment(self) -> dict[str, str]:
        """Of a command on one of them. Gloo would take the address of the host's name, which is not theirs."""
        return {"PDSH_SSH_ARGS_APPEND": self.ssh, "GLOO_SOCKET_IFNAME": "eth0"}

    def cut_off(self, number: int) -> None:
        """Take a machine off the switch, as if its cable was pulled; nobody is told."""
        _ip("link", "set", _port(self.names[number]), "down")

    def slow_down(self, number: int, rate: str) -> None:
        """Limit what a machine gets, such as to `100mbit`."""
        limit = ["root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
        subprocess.run(["tc", "qdisc", "add", "dev", _port(self.names[number]), *limit], check=True)

    def plug_in(self, number: int) -> None:
        _ip("link", "set", _port(self.names[number]), "up")


@contextlib.contextmanager
def machines(count: int, folder: Path) -> Iterator[Machines]:
    """Set them up, with keys in `folder`; ends what runs on them."""
    mark = f"{os.getpid() % 100_000}"
    switch, names = f"m6s{mark}", [f"m6-{mark}-{number}" for number in range(count)]
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    known = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o ConnectTimeout=5"
    made = Machines(names, f"-i {folder / 'user'} {known}")
    try:
        _ip("link", "add", switch, "type", "bridge")
        _ip("link", "set", switch, "up")
        for name, address in zip(names, made.addresses, strict=True):
            _plug(name, address, switch)
            _serve(made.inside(names.index(name)), folder, address)
        yield made
    finally:
        for name in names:
            for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
                subprocess.run(["kill", "-KILL", pid], capture_output=True)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        subprocess.run(["ip", "link", "delete", switch], capture_output=True)


def _port(name: str) -> str:
    """The switch's end of a machine's cable."""
    return name.replace("m6-", "m6p").replace("-", ".")


def _plug(name: str, address: str, switch: str) -> None:
    _ip("netns", "add", name)
    _ip("link", "add", _port(name), "type", "veth", "peer", "name", "eth0", "netns", name)
    _ip("link", "set", _port(name), "master", switch, "up")
    for words in ("link set lo up", "link set eth0 up", f"address add {address}/24 dev eth0"):
        _ip("-netns", name, *words.split())


def _serve(inside: Sequence[str], folder: Path, address: str) -> None:
    """Root may come in with the one key, and nobody else."""
    Path("/run/sshd").mkdir(exist_ok=True)
    (folder / "sshd_config").write_text(
        f"HostKey {folder / 'host'}\nAuthorizedKeysFile {folder / 'user.pub'}\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nPermitRootLogin prohibit-password\nPidFile none\n"
    )
    sshd = shutil.which("sshd")
    assert sshd
    subprocess.run([*inside, sshd, "-f", folder / "sshd_config", "-o", f"ListenAddress={address}"], check=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
