"""Clients that are too slow are cut off in bounded time, and keep nobody waiting."""

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.serving.limits import Limits
from tests.launch.serving.served import Client, head, serving
from training.trained import M6

PATIENCE = 1.0  # s
SLOW = Limits(head=PATIENCE, body=PATIENCE, sending=PATIENCE, idle=1, connections=40)


@pytest.fixture(scope="module")
def client(m: M6, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with serving(m, tmp_path_factory.mktemp("store"), SLOW) as client:
        yield client


def trickle(connection: socket.socket, content: bytes, pause: float = 0.1) -> float:
    """A byte at a time, until the connection is closed: after how many seconds it was."""
    start = time.monotonic()
    connection.settimeout(pause)
    for byte in content:
        try:
            connection.sendall(bytes([byte]))
            if not connection.recv(4096):
                break
        except TimeoutError:
            continue
        except OSError:
            break
    else:
        raise AssertionError("it was never closed")
    return time.monotonic() - start


@pytest.mark.parametrize("what", ["nothing", "head", "second head", "body", "refused body", "chunks"])
def test_a_slow_request_is_cut_off(client: Client, what: str) -> None:
    with contextlib.closing(client.connect()) as connection:
        if what == "nothing":
            connection.settimeout(10)
            start = time.monotonic()
            assert not connection.recv(1)
            assert time.monotonic() - start < PATIENCE + 2
            return
        if what == "second head":
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        path = "/v1/nothing" if what == "refused body" else "/v1/caption"
        start = {
            "body": head(path, 4000, "application/json"),
            "refused body": head(path, 4000, "application/json"),
            "chunks": head(path, 0, "application/json").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"),
        }.get(what, b"")
        connection.sendall(start)
        rest = {"chunks": b"1\r\nx\r\n" * 99}.get(what, b"GET /health HTTP/1.1\r\nX: " + b"x" * 99)
        assert trickle(connection, rest) < PATIENCE + 3
        assert client.get("/health").status == 200


def test_an_idle_connection_is_closed(client: Client) -> None:
    with contextlib.closing(client.connect()) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        reply = b""
        while not reply.endswith(b"}"):  # its head may come by itself
            reply += connection.recv(4096)
        start = time.monotonic()
        assert not connection.recv(1)
        assert time.monotonic() - start < 4


def test_a_client_that_does_not_read_its_answer_is_cut_off(client: Client) -> None:
    """Requests in a row, whose answers fill all buffers there are."""
    with contextlib.closing(client.connect()) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(10)
        with pytest.raises(OSError):
            start = time.monotonic()
            while time.monotonic() - start < 20:
                connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 50)
        assert time.monotonic() - start < 10
    assert client.get("/health").status == 200


def test_many_that_hold_connections_do_not_keep_others_out_for_long(client: Client) -> None:
    with contextlib.ExitStack() as held:
        for _ in range(60):
            with contextlib.suppress(OSError):
                connection = held.enter_context(contextlib.closing(client.connect()))
                connection.sendall(b"POST /v1/caption HTTP/1.1\r\n")
        deadline = time.monotonic() + PATIENCE + 3
        while True:
            try:
                assert client.get("/health").status == 200
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)


def test_a_server_holds_only_so_much_of_what_it_reads(m: M6, tmp_path: Path) -> None:
    limits = Limits(held=3000, bytes=2000, body=5)
    with serving(m, tmp_path, limits) as client, contextlib.ExitStack() as held:
        for _ in range(2):
            connection = held.enter_context(contextlib.closing(client.connect()))
            connection.sendall(head("/v1/caption", 1500, "application/json") + b"x" * 1400)
        time.sleep(0.3)
        reply = client.request("POST", "/v1/ask", b"{" * 1000, {"Content-Type": "application/json"})
        assert (reply.status, reply.code) == (503, "busy")
        large = client.request("POST", "/v1/ask", b"x" * 2001, {"Content-Type": "application/json"})
        assert (large.status, large.code) == (413, "large")
        held.close()
        time.sleep(0.3)
        assert client.post("/v1/ask", {"question": "红?"}).status == 200
