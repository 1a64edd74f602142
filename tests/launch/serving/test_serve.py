"""`m6 serve` as it is started and ended."""

import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from click import UsageError
from click.testing import CliRunner

from launch.checkpoints import export_run
from launch.cli import m6
from launch.serve import is_loopback, read_token
from tests.launch.serving.served import ServerProcess, serving
from training.errors import UserError
from training.trained import M6
from training.writing import Style

TOKEN = "a-token-of-many-letters"


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(m6, ["serve", *arguments], standalone_mode=False)
    assert isinstance(done.exception, UserError | UsageError), done.exception
    assert "\n" not in str(done.exception)
    return str(done.exception)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "shop.example"])
def test_a_server_that_others_reach_takes_a_token(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("M6_TOKEN", raising=False)
    assert "takes an access token: name one by --token-file or M6_TOKEN" in refused("run", "--host", host)


def test_tokens_are_read_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    monkeypatch.setenv("M6_TOKEN", f"{TOKEN}-2")
    assert read_token(file) == TOKEN and read_token(None) == f"{TOKEN}-2"
    for content in ("short", "with blanks in between", "不是字母的令牌不是字母的令牌不是字母", ""):
        file.write_text(content)
        assert "at least 16" in refused("run", "--token-file", str(file))
    assert "cannot be read" in refused("run", "--token-file", str(tmp_path / "none"))
    monkeypatch.delenv("M6_TOKEN")
    assert read_token(None) is None
    assert is_loopback("localhost") and is_loopback("::1") and is_loopback("127.1.2.3") and not is_loopback("10.0.0.1")


def test_what_cannot_be_served_is_one_line(served_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"--port {port}: cannot be listened at" in refused("run", "--port", port)
    assert "nowhere: no such run" in refused("nowhere", "--port", "0")
    assert "only of an export" in refused(str(served_run), "--port", "0", "--max-memory", "cpu=1GB")
    assert "must be such as cpu=20GB" in refused("run", "--max-memory", "20GB")


def test_a_request_that_runs_is_finished_when_the_server_is_asked_to_end(
    served_run: Path, m: M6, tmp_path: Path
) -> None:
    with ServerProcess(served_run, tmp_path / "store") as server:
        done: list[tuple[int, str]] = []

        def write() -> None:
            asked = {"prompt": "写一首诗。", "tokens": 90, "temperature": 0}
            reply = server.client.post("/v1/write", asked)
            done.append((reply.status, reply.json()["text"]))

        server.client.post("/v1/write", {"prompt": "写一首诗。", "tokens": 1})
        threads = [threading.Thread(target=write) for _ in range(3)]
        for thread in threads:
            thread.start()
        while server.client.counted("m6_clients") < 4:
            time.sleep(0.01)
        assert server.end(signal.SIGTERM) == 0
        for thread in threads:
            thread.join()
        expected = m.write("写一首诗。", Style(temperature=0, tokens=90))
        assert done == [(200, expected)] * 3
        with pytest.raises(OSError, match="refused"):
            server.client.get("/health")


@pytest.fixture(scope="module")
def export(served_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "export"
    export_run(str(served_run), target=folder, dtype="fp32")
    return folder


def test_a_model_beyond_its_memory_answers_the_same(
    export: Path, pictures: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, part = M6.load(export), M6.load(export, max_memory={"cpu": "600KB"})
    away = [name for name, weight in part.network.named_parameters() if weight.is_meta]
    assert away and len(away) < len(list(part.network.parameters()))
    images = [(picture, "红色的圆") for picture in pictures[:2]]
    for same in (
        lambda m: m.captions(pictures[:3]),
        lambda m: m.ask("这是什么?", pictures[0], ["红", "蓝"]),
        lambda m: m.write("写一首诗。", Style(tokens=20)),
        lambda m: m.matches(images) == pytest.approx(whole.matches(images), abs=1e-5),
        lambda m: m.embed_images(pictures[:2]).similarity(m.embed_texts(["红"])).round(4).tolist(),
        lambda m: m.identity,
    ):
        assert same(part) == same(whole)
    monkeypatch.setattr("training.export.FITS", 0.0)
    unasked = M6.load(export)
    assert unasked.captions(pictures[:3]) == whole.captions(pictures[:3])


def test_an_export_is_served_and_says_what_it_cannot(
    export: Path, m: M6, pictures: list[bytes], tmp_path: Path
) -> None:
    with serving(M6.load(export, max_memory={"cpu": "600KB"}), tmp_path) as client:
        tasks = client.get("/v1/model").json()["tasks"]
        assert not tasks["draw"]["able"] and "an export has no image tokenizer" in tasks["draw"]["why"]
        assert client.form("/v1/caption", ("images", pictures[0])).json() == {"captions": m.captions(pictures[:1])}
        assert client.form("/v1/collections/a", ("images", pictures[0])).json()["indexed"] == 1
