"""Servers to test, in a thread of this process or as a process of their own, and a plain client."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.serve import listening, server_of
from launch.serving.abilities import Abilities
from launch.serving.limits import Limits
from launch.serving.service import Service
from launch.serving.shelf import Shelf
from training.trained import M6

ROOT = Path(__file__).resolve().parents[3]
Part = tuple[str, str | bytes]  # a field's name; its text, or a file's bytes


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """Of a refusal."""
        return self.json()["error"]["code"]


@dataclass(frozen=True)
class Client:
    """Of a server at a port of loopback; a connection a request."""

    port: int
    token: str | None = None

    def request(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None, timeout: float = 60
    ) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            own = {"Authorization": f"Bearer {self.token}"} if self.token else {}
            connection.request(method, path, body or None, own | dict(headers or {}))
            response = connection.getresponse()
            return Reply(response.status, dict(response.headers), response.read())

    def get(self, path: str) -> Reply:
        return self.request("GET", path)

    def post(self, path: str, content: Any) -> Reply:
        """As JSON."""
        return self.request("POST", path, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def form(self, path: str, *parts: Part) -> Reply:
        body, kind = form(parts)
        return self.request("POST", path, body, {"Content-Type": kind})

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def counted(self, name: str) -> float:
        """A figure of /metrics, such as m6_requests_total{status="200",task="ask"}; 0 if it is not there."""
        for line in self.get("/metrics").body.decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[-1])
        return 0.0


def form(parts: Sequence[Part], names: Sequence[str] = ()) -> tuple[bytes, str]:
    """A multipart body and its content type; files are called by `names`."""
    boundary, lines = uuid.uuid4().hex, []
    for number, (field, content) in enumerate(parts):
        file = f'; filename="{names[number] if names else "x.png"}"' if isinstance(content, bytes) else ""
        lines += [f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"{file}\r\n\r\n'.encode()]
        lines += [content if isinstance(content, bytes) else content.encode(), b"\r\n"]
    return b"".join([*lines, f"--{boundary}--\r\n".encode()]), f"multipart/form-data; boundary={boundary}"


def head(path: str, length: int | str, kind: str = "image/png") -> bytes:
    """Of a POST, as bytes."""
    lines = ("Host: 127.0.0.1", f"Content-Type: {kind}", f"Content-Length: {length}")
    return "\r\n".join([f"POST {path} HTTP/1.1", *lines, "", ""]).encode()


@contextlib.contextmanager
def serving(m: M6, store: Path, limits: Limits | None = None, token: str | None = None) -> Iterator[Client]:
    """A server in a thread."""
    limits, abilities = limits or Limits(), Abilities(m)
    shelf = Shelf(store, "" if abilities.why_not["search"] else m.identity, limits)
    listener = listening("127.0.0.1", 0)
    port = listener.getsockname()[1]
    server = server_of(Service(m, "run", shelf, limits, abilities), token, "127.0.0.1")
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Client(port, token)
    finally:
        server.should_exit = True
        thread.join()
        shelf.close()


class ServerProcess:
    """`m6 serve` as a person starts it."""

    def __init__(self, run: Path, store: Path, *options: str):
        program = [sys.executable, "-P", "-c", "from launch.cli import main; main()"]
        command = [*program, "serve", str(run), "--port", "0", "--store", str(store), *options]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, cwd=store.parent, env=environment, start_new_session=True
        )
        assert self.process.stderr
        self.said: list[str] = []
        for line in self.process.stderr:
            self.said.append(line)
            if " at http://" in line:
                break
        else:
            raise AssertionError(f"it did not start: {''.join(self.said)}")
        self.client = Client(int(self.said[-1].split(":")[2].split("/")[0]))
        self._reader = threading.Thread(target=lambda: self.said.extend(self.process.stderr or ()), daemon=True)
        self._reader.start()

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit code."""
        self.process.send_signal(number)
        code = self.process.wait(30)
        self._reader.join(5)
        return code

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
