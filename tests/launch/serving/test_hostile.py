"""Two hundred hostile requests and some slow clients at one server: it refuses them, and goes on for everybody else."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.serving.hostile import Case, cases, encoded
from tests.launch.serving.served import Client, ServerProcess, form, head
from training.trained import M6

HELD = 60.0  # s in which a slow client must have been cut off


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def server(served_run: Path, home: Path, pictures: list[bytes]) -> Iterator[ServerProcess]:
    (home / "temporary").mkdir()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv("TMPDIR", str(home / "temporary"))
        server = stack.enter_context(ServerProcess(served_run, home / "store"))
        assert server.client.form("/v1/collections/kept", ("images", pictures[0])).status == 200
        yield server


def files(*folders: Path) -> dict[str, int]:
    """All there are, and when they were written."""
    found = {}
    for folder in folders:
        for place, _, names in os.walk(folder):
            found |= {path: os.stat(path).st_mtime_ns for name in names if (path := os.path.join(place, name))}
    return found


def outcome(client: Client, case: Case) -> str:
    """The status, or "closed"."""
    try:
        if case.raw is None:
            return str(client.request(case.method, case.path, case.body, case.headers, timeout=20).status)
        with contextlib.closing(client.connect()) as connection:
            connection.settimeout(20)
            with contextlib.suppress(ConnectionError):
                connection.sendall(case.raw)
            answer = connection.recv(4096)
            return answer.split()[1].decode() if answer else "closed"
    except TimeoutError:
        return "hung"
    except (OSError, ConnectionError):
        return "closed"


def normal(client: Client, picture: bytes) -> str:
    return client.form("/v1/caption", ("images", picture)).json()["captions"][0]


def slowly(client: Client, start: bytes, gone: dict[bytes, float]) -> None:
    """A byte a second, until the connection is closed."""
    begun = time.monotonic()
    with contextlib.closing(client.connect()) as connection, contextlib.suppress(OSError):
        connection.settimeout(1)
        connection.sendall(start)
        while time.monotonic() - begun < HELD:
            try:
                if not connection.recv(4096):
                    break
            except TimeoutError:
                connection.sendall(b"x")
    gone[start] = time.monotonic() - begun


def test_hostile_requests_are_refused_and_hurt_nobody(
    server: ServerProcess, home: Path, served_run: Path, m: M6, pictures: list[bytes]
) -> None:
    client, every = server.client, list(cases())
    assert len(every) >= 200
    chunks = head("/v1/caption", 0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"f" * 12 + b"\r\n"
    slow = (b"GET /health HTTP/1.1\r\nX: ", b"", head("/v1/caption", 9999), head("/v1/nothing", 9999), chunks)
    gone: dict[bytes, float] = {}
    threads = [threading.Thread(target=slowly, args=(client, start, gone)) for start in slow for _ in range(3)]
    for thread in threads:
        thread.start()
    before, expected = files(home, served_run.parent), m.caption(pictures[3])
    bad = {}
    for number, case in enumerate(every):
        status = outcome(client, case)
        if not (status == "closed" or (status.isdecimal() and 400 <= int(status) < 500)):
            bad[case.name] = status
        if number % 20 == 0:
            assert normal(client, pictures[3]) == expected
    assert not bad
    assert client.get("/health").status == 200 and normal(client, pictures[3]) == expected
    assert files(home, served_run.parent) == before
    assert client.get("/v1/collections").json()["collections"] == [{"name": "kept", "pictures": 1, "indexed": 1}]
    for thread in threads:
        thread.join()
    assert len(gone) == len(slow) and max(gone.values()) < 45
    assert client.counted("m6_clients") == 1 and len(server.said) == 1  # no traceback either


def test_a_files_name_and_type_are_never_used(
    server: ServerProcess, home: Path, served_run: Path, pictures: list[bytes]
) -> None:
    before, known = files(home, served_run.parent), server.client.get("/v1/collections/kept").json()["ids"]
    for number, name in enumerate(
        (
            "../../../evil.png",
            "/etc/evil",
            "C:\\evil.exe",
            "evil\0.png",
            "<img src=x onerror=alert(1)>.png",
            ".htaccess",
            "x" * 4000,
        )
    ):
        body, kind = form([("images", pictures[number + 1])], [name])
        reply = server.client.request("POST", "/v1/collections/kept", body, {"Content-Type": kind})
        assert reply.status == 200 and name.encode() not in reply.body
    ids = server.client.get("/v1/collections/kept").json()["ids"]
    own = [str(home / "store" / "kept" / "pictures" / f"{one}.png") for one in ids if one not in known]
    assert sorted(files(home, served_run.parent).keys() - before.keys()) == sorted(own) and len(own) == 7


def test_what_hides_within_a_picture_is_not_handed_on(server: ServerProcess) -> None:
    payload = b"*/alert(document.domain)/*<script>alert(1)</script>"
    data = encoded("JPEG", comment=payload)
    added = server.client.form("/v1/collections/hidden", ("images", data)).json()
    shown = server.client.get(f"/v1/collections/hidden/pictures/{added['ids'][0]}")
    assert payload in data and b"alert" not in shown.body and shown.headers["content-type"] == "image/png"
    assert server.client.request("DELETE", "/v1/collections/hidden").status == 204
