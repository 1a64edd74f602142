"""Requests a second and how long they take, with batching by task and one at a time, and what an overload is answered.

    python -m benchmarks.serving --run RUN [--clients 1 4 16 64] [--requests 4] [--rounds 3]

Two servers of the run, alike but for `--rows 1`, take turns in each round; each client sends its next request once the
last one is answered. Pictures are those of the corpus' test split, prompts those of its poems, other ones in each
round, the same for both servers. Captions are asked for as forms, texts are streamed. Then a server that lets few wait
is asked by many at once. The clients are in one process, on the same cores as the servers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from training.data.corpus import Corpus
from training.data.tasks.writing import poem_prompt

ROOT = Path(__file__).resolve().parent.parent
ROWS = {"batched": 32, "one at a time": 1}
CROWD, PATIENCE = 200, 16  # clients at once, and rows that may wait for the model then
TOKENS = 48
COLUMNS = (
    *("task", "clients", "server", "p50, s", "p95, s", "first piece, s", "core-s a request", "requests a second"),
    *("times", "lost"),
)


@dataclass(frozen=True)
class Answer:
    status: int
    seconds: float
    first: float  # s to the first piece of a text


Ask = Callable[[int, int], Awaitable[Answer]]  # of a port, the request of a number


@dataclass(frozen=True)
class Server:
    port: int
    process: psutil.Process

    def work(self) -> float:
        """s that its threads have computed so far."""
        times = self.process.cpu_times()
        return times.user + times.system


class Requests:
    """Real ones: the same number is always the same request."""

    def __init__(self, data: Path):
        corpus = Corpus.open(data)
        rows = corpus.picture_rows("test").tolist()
        self.pictures = [corpus.picture(row).image for row in rows]
        poems = corpus.text_rows("test", "poem")[:256].tolist()
        self.prompts = [poem_prompt(corpus.text(row)) for row in poems]

    def caption(self, port: int, number: int) -> Awaitable[Answer]:
        start = b'--mark\r\nContent-Disposition: form-data; name="images"; filename="x.png"\r\n\r\n'
        body = start + self.pictures[number % len(self.pictures)] + b"\r\n--mark--\r\n"
        return ask(port, "/v1/caption", body, "multipart/form-data; boundary=mark", b"captions")

    def write(self, port: int, number: int) -> Awaitable[Answer]:
        asked = {"prompt": self.prompts[number % len(self.prompts)], "tokens": TOKENS, "seed": number, "stream": True}
        return ask(port, "/v1/write", json.dumps(asked).encode(), "application/json", b"event: done")


async def ask(port: int, path: str, body: bytes, kind: str, sign: bytes) -> Answer:
    """A request on a connection of its own; an answer without its `sign` is none (status 0)."""
    start = time.perf_counter()
    lines = (f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Type: {kind}", f"Content-Length: {len(body)}")
    head = "\r\n".join([*lines, "Connection: close", "", ""]).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head + body)
        content = await reader.readuntil(b"\r\n\r\n")
        content += await reader.read(1)
        first = time.perf_counter() - start
        content += await reader.read()
    except (OSError, asyncio.IncompleteReadError):
        return Answer(0, time.perf_counter() - start, 0.0)
    finally:
        writer.close()
    status = int(content.split()[1])
    return Answer(status if status != 200 or sign in content else 0, time.perf_counter() - start, first)


@contextlib.contextmanager
def server(run: str, data: Path, *options: str) -> Iterator[Server]:
    """`m6 serve` with all cores."""
    program = [sys.executable, "-P", "-c", "from launch.cli import main; main()", "serve", run]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with tempfile.TemporaryDirectory() as store:
        process = subprocess.Popen(
            [*program, "--port", "0", "--data", str(data), "--store", store, *options],
            stderr=subprocess.PIPE, text=True, env=environment | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        try:
            assert process.stderr
            line = next((line for line in process.stderr if " at http://" in line), "")
            if not line:
                sys.exit(f"the server did not start: {' '.join(options)}")
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield Server(int(line.split(":")[2].split("/")[0]), psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait()


def load(act: Ask, port: int, clients: int, numbers: Sequence[int]) -> tuple[list[Answer], float]:
    """All requests, by so many clients: what they were answered, and the seconds."""

    async def whole() -> list[Answer]:
        waiting = asyncio.Semaphore(clients)

        async def one(number: int) -> Answer:
            async with waiting:
                return await act(port, number)

        return await asyncio.gather(*(one(number) for number in numbers))

    start = time.perf_counter()
    return asyncio.run(whole()), time.perf_counter() - start


def at(share: float, values: Sequence[float]) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def compare(name: str, act: Ask, servers: dict[str, Server], arguments: argparse.Namespace) -> None:
    """Print the lines of one task."""
    for clients in arguments.clients:
        answers: dict[str, list[Answer]] = {kind: [] for kind in servers}
        rates: dict[str, list[float]] = {kind: [] for kind in servers}
        work = dict.fromkeys(servers, 0.0)
        count = max(clients * arguments.requests, 8)
        for round_number in range(arguments.rounds):
            numbers = range(round_number * count, (round_number + 1) * count)
            for kind in sorted(servers, reverse=round_number % 2 == 1):  # each goes first in turn
                before = servers[kind].work()
                found, seconds = load(act, servers[kind].port, clients, numbers)
                work[kind] += servers[kind].work() - before
                answers[kind] += found
                rates[kind].append(count / seconds)
        quotient = statistics.median(a / b for a, b in zip(rates["batched"], rates["one at a time"], strict=True))
        for kind in servers:
            times = [one.seconds for one in answers[kind]]
            lost = sum(one.status != 200 for one in answers[kind])
            cells = [name, clients, kind, f"{at(0.5, times):.2f}", f"{at(0.95, times):.2f}"]
            cells.append(f"{at(0.5, [one.first for one in answers[kind]]):.2f}" if name == "write" else "")
            cells += [f"{work[kind] / len(times):.3f}", f"{statistics.median(rates[kind]):.2f}"]
            cells += [f"{quotient:.1f}" if kind == "batched" else "", f"{lost} of {len(times)}"]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


def overload(run: str, data: Path, requests: Requests) -> None:
    """A crowd at once, at a server that lets few wait."""
    with server(run, data, "--queue", str(PATIENCE)) as crowded:
        load(requests.caption, crowded.port, 1, range(2))
        answers, seconds = load(requests.caption, crowded.port, CROWD, range(CROWD))
    taken = [one.seconds for one in answers if one.status == 200]
    refused = [one.seconds for one in answers if one.status == 503]
    print(f"\n{CROWD} clients at once, {PATIENCE} may wait: {len(taken)} answered, {len(refused)} refused by 503, "
          f"{CROWD - len(taken) - len(refused)} otherwise, in {seconds:.1f} s")  # fmt: skip
    for name, times in (("answered", taken), ("refused", refused)):
        if times:
            print(f"{name}: p50 {at(0.5, times):.3f} s, p95 {at(0.95, times):.3f} s, at the most {max(times):.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True)
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--requests", type=int, default=4, help="of each client, a round")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    requests = Requests(arguments.data)
    with contextlib.ExitStack() as stack:
        servers = {
            kind: stack.enter_context(server(arguments.run, arguments.data, "--rows", str(rows)))
            for kind, rows in ROWS.items()
        }
        for one in servers.values():
            for act in (requests.caption, requests.write):
                load(act, one.port, 4, range(8))
        print(f"{psutil.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        compare("caption", requests.caption, servers, arguments)
        compare("write", requests.write, servers, arguments)
    overload(arguments.run, arguments.data, requests)


if __name__ == "__main__":
    main()
