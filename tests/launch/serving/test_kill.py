"""Whenever a server is killed, the index of a collection is the old one or the new one."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from launch.serving.limits import Limits
from launch.serving.shelf import Collection, Shelf, named
from tests.launch.serving.served import Client, ServerProcess
from training.data.images import read_image
from training.trained import M6

OLD, NEW = 3, 7  # pictures before and after


@pytest.fixture(scope="module")
def images(pictures: list[bytes]) -> list[Image.Image]:
    return [read_image(picture) for picture in pictures]


@pytest.fixture(scope="module")
def before(m: M6, images: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Gives a store with one collection, as it was at first: an index knows its pictures by their place."""
    home = tmp_path_factory.mktemp("before") / "store"
    collection = Collection(home / "a", m.identity)
    collection.take(m, dict(map(named, images[:OLD])))
    shutil.copytree(home, kept := home.with_name("kept"))

    def restored() -> Path:
        shutil.rmtree(home)
        return Path(shutil.copytree(kept, home))

    return restored


def in_child(work: Callable[[], object]) -> int:
    """Do it in a fork of this process, whose number is given back."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # a fork has none of its parent's
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def check(home: Path, m: M6) -> int:
    """Of how many pictures the index is; what it lacks is read by whoever opens it next."""
    shelf = Shelf(home, m.identity, Limits())
    try:
        collection = shelf.get("a")
        indexed = collection.indexed
        hits = collection.found(m.embed_texts(["红色"]), 99)
        assert len(hits) == indexed and {hit.path.stem for hit in hits} <= set(collection.ids())
        assert all(read_image(path.read_bytes()) for path in collection.pictures.iterdir())
        collection.update(m)
        assert collection.indexed == len(collection.ids())
    finally:
        shelf.close()
    return indexed


MOMENTS = ("picture written", "index half written", "index written", "index in place")


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_the_worst_moments(moment: str, before: Callable[[], Path], images: list[Image.Image], m: M6) -> None:
    home, place = before(), Path.replace

    def killing(self: Path, target: Path) -> Path:
        """Before or after a file gets its name."""
        index = self.name.startswith(".index")
        if index and moment == "index half written":
            os.truncate(self, self.stat().st_size // 2)
        if moment == "picture written" if not index else moment.endswith("written"):
            os.kill(os.getpid(), signal.SIGKILL)
        done = place(self, target)
        if index:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    def add() -> None:
        Path.replace = killing  # type: ignore[method-assign]  # in the child alone
        collection = Collection(home / "a", m.identity)
        collection.take(m, dict(map(named, images[:NEW])))

    _, status = os.waitpid(in_child(add), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert check(home, m) == (NEW if moment == "index in place" else OLD)


def test_killed_at_any_moment(before: Callable[[], Path], images: list[Image.Image], m: M6) -> None:
    def add(home: Path) -> None:
        collection = Collection(home / "a", m.identity)
        collection.take(m, dict(map(named, images[:NEW])))

    found, kills = set(), 5
    seconds = 0.0
    for number in range(kills + 1):
        home = before()
        start = time.monotonic()
        child = in_child(lambda home=home: add(home))
        if number:  # the first one tells how long it takes
            time.sleep(seconds * (number - 0.5) / kills)
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seconds = seconds or time.monotonic() - start
        found.add(check(home, m))
    assert found == {OLD, NEW}


def test_a_killed_server_goes_on_where_it_was(served_run: Path, pictures: list[bytes], tmp_path: Path) -> None:
    store, place = tmp_path / "store", "/v1/collections/a"

    def indexed(client: Client) -> tuple[int, int]:
        found = client.get(place).json()
        return found["pictures"], found["indexed"]

    with ServerProcess(served_run, store) as server:
        known = server.client.form(place, *(("images", one) for one in pictures[:2])).json()["indexed"]
        thread = threading.Thread(target=add, args=(server.client, [("images", one) for one in pictures[2:10]]))
        thread.start()
        time.sleep(0.3)
        server.process.kill()
        thread.join()
    with ServerProcess(served_run, store) as server:
        deadline = time.monotonic() + 30
        while len({*indexed(server.client)}) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        hits = server.client.post(f"{place}/search", {"query": "红", "k": 99}).json()
        assert hits["indexed"] == len(hits["hits"]) >= known >= 2


def add(client: Client, parts: list[tuple[str, str | bytes]]) -> None:
    try:
        client.form("/v1/collections/a", *parts)
    except OSError:
        return  # it was killed
