"""Every task over HTTP says what the model says, within limits, and to those alone who may ask."""

import base64
import errno
import io
import json
import threading
import time
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from launch.serving.limits import Limits
from launch.serving.pictures import seen
from launch.serving.shelf import Shelf
from tests.launch.serving.served import Client, Reply, form, head, serving
from training.data.images import read_image
from training.errors import UserError
from training.files import replace
from training.painting import Hand
from training.trained import M6
from training.writing import Style

PROMPT = "写一首诗。题目：春晓。作者：佚名。"


@pytest.fixture(scope="module")
def client(m: M6, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with serving(m, tmp_path_factory.mktemp("store")) as client:
        yield client


def text_of(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def test_pictures_are_captioned_as_json_and_as_a_form(client: Client, m: M6, pictures: list[bytes]) -> None:
    expected = {"captions": m.captions(pictures[:3], "tags")}
    as_json = {"images": [text_of(picture) for picture in pictures[:3]], "kind": "tags"}
    assert client.post("/v1/caption", as_json).json() == expected
    assert client.form("/v1/caption", *(("images", one) for one in pictures[:3]), ("kind", "tags")).json() == expected
    alone = client.post("/v1/caption", {"images": f"data:image/png;base64,{text_of(pictures[0])}"})
    assert alone.json() == {"captions": m.captions(pictures[:1])}


def test_questions_are_answered_and_texts_matched(client: Client, m: M6, pictures: list[bytes]) -> None:
    question, choices = "属于哪一类?", ["红色的圆", "蓝色"]
    asked = [("question", question), ("image", pictures[0])]
    assert client.form("/v1/ask", *asked).json() == {"answer": m.ask(question, pictures[0])}
    chosen = client.form("/v1/ask", *asked, *(("choices", one) for one in choices))
    assert chosen.json() == {"answer": m.ask(question, pictures[0], choices)}
    assert client.post("/v1/ask", {"question": question}).json() == {"answer": m.ask(question)}
    matched = client.form("/v1/match", ("image", pictures[0]), ("text", "大红色圆")).json()
    assert matched["probability"] == pytest.approx(m.match(pictures[0], "大红色圆"), rel=1e-4)


def events_of(reply: Reply) -> list[tuple[str, dict]]:
    assert reply.headers["content-type"].startswith("text/event-stream")
    found = []
    for event in reply.body.decode().strip().split("\n\n"):
        name, data = event.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_a_text_comes_whole_or_in_pieces(client: Client, m: M6) -> None:
    expected = m.write(PROMPT, Style(tokens=30, seed=3), examples=[("写诗。", "青山")])
    asked = {"prompt": PROMPT, "tokens": 30, "seed": 3, "examples": [["写诗。", "青山"]]}
    whole = client.post("/v1/write", asked).json()
    assert whole["text"] == expected and 1 <= whole["tokens"] <= 30
    *pieces, last = events_of(client.post("/v1/write", asked | {"stream": True}))
    assert len(pieces) > 3 and {name for name, _ in pieces} == {"piece"}
    assert last == ("done", whole) and "".join(piece["text"] for _, piece in pieces) == expected


def test_drawings_and_edits_are_the_models(client: Client, m: M6, pictures: list[bytes]) -> None:
    hand = Hand(2, 3, steps=2)
    as_json = {"text": "大红色圆", "pictures": 2, "tries": 3, "steps": 2}
    drawn = client.post("/v1/draw", as_json).json()["pictures"]
    assert [read_image(base64.b64decode(one)).tobytes() for one in drawn] == [
        one.tobytes() for one in m.draw("大红色圆", hand)
    ]
    fields = [("image", pictures[0]), ("text", "圆"), ("tries", "2"), ("steps", "2")]
    edited = client.form("/v1/edit", *fields, ("region", "5,5,30,40")).json()["pictures"]
    mask = Image.new("L", Image.open(io.BytesIO(pictures[0])).size)
    mask.paste(255, (5, 5, 35, 45))
    out = io.BytesIO()
    mask.save(out, format="PNG")
    masked = client.form("/v1/edit", *fields, ("mask", out.getvalue())).json()["pictures"]
    assert len(edited) == 1 and edited == masked
    changed = np.asarray(read_image(base64.b64decode(edited[0]))) != np.asarray(read_image(pictures[0]))
    assert changed.any() and not changed.any(2)[np.asarray(mask) == 0].any()


def test_a_collection_is_made_added_to_searched_and_deleted(client: Client, m: M6, pictures: list[bytes]) -> None:
    place = "/v1/collections/%E5%95%86%E5%93%81-1"
    first = client.form(place, *(("images", one) for one in pictures[:4])).json()
    assert (first["name"], first["pictures"], first["indexed"], len(set(first["ids"]))) == ("商品-1", 4, 4, 4)
    more = client.form(place, ("images", pictures[2]), ("images", pictures[5])).json()
    assert more["pictures"] == 5 and more["ids"][0] == first["ids"][2]
    assert client.get(place).json()["ids"] == sorted({*first["ids"], more["ids"][1]})
    hits = client.post(f"{place}/search", {"query": "红色", "k": 3}).json()
    assert hits["indexed"] == 5 and len(hits["hits"]) == 3
    scores = [hit["score"] for hit in hits["hits"]]
    similarity = m.embed_images([pictures[n] for n in (0, 1, 2, 3, 5)]).similarity(m.embed_texts(["红色"]))
    assert scores == sorted(scores, reverse=True) and np.isfinite(similarity).all()
    shown = client.get(f"/{hits['hits'][0]['href']}")
    assert shown.headers["content-type"] == "image/png" and read_image(shown.body).size
    assert {"name": "商品-1", "pictures": 5, "indexed": 5} in client.get("/v1/collections").json()["collections"]
    assert client.request("DELETE", place).status == 204
    assert client.get(place).code == client.post(f"{place}/search", {"query": "红"}).code == "no_collection"
    assert client.get(f"/{hits['hits'][0]['href']}").status == 404


def test_a_collection_outlasts_its_server(m: M6, pictures: list[bytes], tmp_path: Path) -> None:
    with serving(m, tmp_path / "store") as client:
        client.form("/v1/collections/a", ("images", pictures[0]), ("images", pictures[1]))
        found = client.post("/v1/collections/a/search", {"query": "红"}).json()
    (tmp_path / "store" / ".left").mkdir()
    (tmp_path / "store" / "a" / "index" / "index.safetensors").write_bytes(b"of another model")
    with serving(m, tmp_path / "store") as client:
        until(lambda: client.get("/v1/collections/a").json()["indexed"] == 2)
        assert client.post("/v1/collections/a/search", {"query": "红"}).json() == found
    assert not (tmp_path / "store" / ".left").exists()


def test_a_collection_that_is_deleted_while_it_is_filled_is_gone(
    m: M6, pictures: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_model(m, monkeypatch, 0.02)
    with serving(m, tmp_path) as client, ThreadPoolExecutor(1) as pool:
        client.form("/v1/collections/a", ("images", pictures[0]))
        filling = pool.submit(client.form, "/v1/collections/a", *(("images", one) for one in pictures[1:4]))
        until(lambda: client.counted("m6_clients") == 2)
        time.sleep(0.2)
        assert client.request("DELETE", "/v1/collections/a").status == 204
        assert filling.result().json()["indexed"] == 4
        assert client.get("/v1/collections/a").status == 404
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_full_disk_is_told_and_nothing_has_changed(
    m: M6, pictures: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_a_full_disk(path: Path, content: bytes) -> None:
        if len(list(path.parent.iterdir())) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(path, content)

    with serving(m, tmp_path) as client:
        first = client.form("/v1/collections/a", ("images", pictures[0])).json()
        monkeypatch.setattr("launch.serving.shelf.replace", on_a_full_disk)
        for name in "ab":
            refused = client.form(f"/v1/collections/{name}", *(("images", one) for one in pictures[:4]))
            assert (refused.status, refused.code) == (507, "full")
        assert client.get("/v1/collections").json() == {"collections": [{"name": "a", "pictures": 1, "indexed": 1}]}
        assert client.get("/v1/collections/a").json()["ids"] == first["ids"]
        assert len(client.post("/v1/collections/a/search", {"query": "红"}).json()["hits"]) == 1


def test_a_name_may_be_of_any_script_and_one_spelt_otherwise_is_the_same(client: Client, pictures: list[bytes]) -> None:
    for name in ("हिन्दी", "E\u0301te\u0301"):
        made = client.form(f"/v1/collections/{quote(name)}", ("images", pictures[0])).json()
        assert made["name"] == unicodedata.normalize("NFC", name)
        assert client.get(f"/v1/collections/{quote(made['name'])}").status == 200
        assert client.request("DELETE", f"/v1/collections/{quote(name)}").status == 204


def test_the_time_that_pictures_take_to_be_unpacked_counts(
    m: M6, pictures: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(data: bytes, pixels: int) -> Image.Image:
        time.sleep(0.4)
        return seen(data, pixels)

    monkeypatch.setattr("launch.serving.service.seen", slowly)
    with serving(m, tmp_path, Limits(seconds=1)) as client:
        assert client.form("/v1/caption", ("images", pictures[0])).status == 200
        late = client.form("/v1/caption", *(("images", one) for one in pictures[:8]))
        assert (late.status, late.code) == (504, "late")


def until(holds, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_requests_of_a_task_share_a_batch(m: M6, pictures: list[bytes], tmp_path: Path) -> None:
    limits = Limits(company=0.5)
    with serving(m, tmp_path / "store", limits) as client, ThreadPoolExecutor(12) as pool:
        captions = list(pool.map(lambda one: client.form("/v1/caption", ("images", one)).json(), pictures[:12]))
        assert [one["captions"][0] for one in captions] == m.captions(pictures[:12])
        assert client.counted('m6_batch_rows_count{task="caption"}') < 12
        assert client.counted('m6_batch_rows_sum{task="caption"}') == 12
        asked = [{"prompt": PROMPT, "tokens": 20, "seed": seed} for seed in range(6)]
        texts = list(pool.map(lambda one: client.post("/v1/write", one).json()["text"], asked))
        assert texts == [m.write(PROMPT, Style(tokens=20, seed=seed)) for seed in range(6)]
        assert texts == m.writes([PROMPT] * 6, [Style(tokens=20, seed=seed) for seed in range(6)])
        assert client.counted('m6_requests_total{status="200",task="write"}') == 6
        assert client.counted("m6_tokens_total") <= 120


def slow_model(m: M6, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """A token takes so long."""
    extend = m.network.extend

    def slowly(*arguments: object) -> object:
        time.sleep(seconds)
        return extend(*arguments)

    monkeypatch.setattr(m.network, "extend", slowly)


def test_what_takes_too_long_is_given_up(m: M6, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_model(m, monkeypatch, 0.1)
    with serving(m, tmp_path / "store", Limits(seconds=1)) as client:
        start = time.monotonic()
        asked = {"prompt": PROMPT, "tokens": 60, "temperature": 0}
        reply = client.post("/v1/write", asked)
        assert (reply.status, reply.code) == (504, "late") and time.monotonic() - start < 3
        name, told = events_of(client.post("/v1/write", asked | {"stream": True}))[-1]
        assert name == "error" and told["code"] == "late"
        until(lambda: client.counted("m6_tokens_total") > 1)
        time.sleep(0.5)
        said = client.counted("m6_tokens_total")
        time.sleep(0.5)
        assert client.counted("m6_tokens_total") == said < 60


def test_the_text_of_a_client_that_leaves_is_given_up_and_others_go_on(
    m: M6, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_model(m, monkeypatch, 0.05)
    asked = {"prompt": PROMPT, "tokens": 40, "seed": 1}
    expected = m.write(PROMPT, Style(tokens=40, seed=1))
    with serving(m, tmp_path / "store") as client, ThreadPoolExecutor(1) as pool:
        for stream in (False, True):
            stays = pool.submit(client.post, "/v1/write", asked)
            body = json.dumps({"prompt": PROMPT, "tokens": 90, "temperature": 0, "stream": stream}).encode()
            leaves = client.connect()
            leaves.sendall(head("/v1/write", len(body), "application/json") + body)
            time.sleep(0.5)
            leaves.close()
            assert stays.result().json()["text"] == expected
            until(lambda: client.counted("m6_clients") == 1)
            said = client.counted("m6_tokens_total")
            assert said < (1 + stream) * (40 + 60)


def test_an_overload_is_refused_at_once_and_nothing_taken_is_lost(
    m: M6, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_model(m, monkeypatch, 0.05)
    with serving(m, tmp_path / "store", Limits(queue=4, rows=2)) as client, ThreadPoolExecutor(16) as pool:

        def ask(seed: int) -> tuple[Reply, float]:
            start = time.monotonic()
            return client.post("/v1/write", {"prompt": PROMPT, "tokens": 12, "seed": seed}), time.monotonic() - start

        replies = list(pool.map(ask, range(16)))
    taken = [reply for reply, _ in replies if reply.status == 200]
    refused = [(reply, seconds) for reply, seconds in replies if reply.status == 503]
    assert len(taken) >= 4 and refused and len(taken) + len(refused) == 16
    for reply, seconds in refused:
        assert int(reply.headers["retry-after"]) >= 1 and reply.code == "busy" and seconds < 1


def test_pictures_that_cannot_wait_are_not_looked_at(
    m: M6, pictures: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at = []

    def slowly(data: bytes, pixels: int) -> Image.Image:
        looked_at.append(data)
        time.sleep(0.3)
        return seen(data, pixels)

    monkeypatch.setattr("launch.serving.service.seen", slowly)
    with serving(m, tmp_path, Limits(queue=3)) as client, ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda one: client.form("/v1/caption", ("images", one)), pictures[:12]))
    statuses = [reply.status for reply in replies]
    assert statuses.count(200) == len(looked_at) >= 3 and statuses.count(503) == 12 - len(looked_at) > 0


def test_what_a_run_has_not_learned_is_told(m: M6, pictures: list[bytes], tmp_path: Path, monkeypatch) -> None:
    assert m.recipe
    poet = m.recipe.model_copy(update={"tasks": {"poem": 1.0}})
    monkeypatch.setattr(m, "recipe", poet)
    with serving(m, tmp_path / "store") as client:
        tasks = client.get("/v1/model").json()["tasks"]
        assert [task for task, ability in tasks.items() if ability["able"]] == ["write"]
        image = ("images", pictures[0])
        for path, parts in {
            "caption": (image,), "draw": (("text", "圆"),), "collections/a": (image,),
            "match": (("image", pictures[0]), ("text", "圆")), "ask": (("question", "圆?"),),
            "edit": (("image", pictures[0]), ("region", "0,0,9,9")),
        }.items():  # fmt: skip
            reply = client.form(f"/v1/{path}", *parts)
            assert (reply.status, reply.code) == (422, "not_learned"), path
            assert "was trained without task" in reply.json()["error"]["message"]
        assert client.post("/v1/write", {"prompt": "写诗。", "tokens": 3}).status == 200


def test_a_token_is_asked_for_where_there_is_one(m: M6, tmp_path: Path) -> None:
    token = "a-token-of-many-letters"
    with serving(m, tmp_path / "store", token=token) as client:
        stranger, wrong = Client(client.port), Client(client.port, token[:-1])
        for path in ("/v1/model", "/v1/collections", "/metrics"):
            assert client.get(path).status == 200
            for other in (stranger, wrong):
                reply = other.get(path)
                assert (reply.status, reply.code, reply.headers["www-authenticate"]) == (401, "token", "Bearer")
        assert stranger.post("/v1/write", {"prompt": "x"}).status == 401
        assert stranger.get("/health").json() == {"status": "ready", "model": "run", "step": 2}
        assert stranger.get("/").status == stranger.get("/page.js").status == 200
        assert client.request("GET", "/health", headers={"Host": "shop.example"}).status == 200


def test_pages_of_other_servers_may_not_call_this_one(client: Client, pictures: list[bytes]) -> None:
    body, kind = form([("images", pictures[0])])
    for headers, code in (
        ({"Origin": "http://evil.example"}, "origin"),
        ({"Origin": "null"}, "origin"),
        ({"Host": "evil.example"}, "host"),  # by a name that was made to lead here
    ):
        reply = client.request("POST", "/v1/collections/x", body, {"Content-Type": kind} | headers)
        assert (reply.status, reply.code) == (403, code)
    own = {"Origin": f"http://127.0.0.1:{client.port}"}
    assert client.request("POST", "/v1/caption", body, {"Content-Type": kind} | own).status == 200
    assert client.get("/v1/collections").json() == {"collections": []}


def test_every_answer_tells_browsers_to_keep_to_it(client: Client) -> None:
    for path in ("/", "/page.js", "/v1/model", "/nothing", "/metrics"):
        headers = client.get(path).headers
        assert (
            headers["x-content-type-options"] == "nosniff"
            and "default-src 'none'" in headers["content-security-policy"]
        )
        assert "unsafe" not in headers["content-security-policy"] and "access-control-allow-origin" not in headers


def test_the_addresses_are_described(client: Client) -> None:
    described = client.get("/openapi.json").json()
    paths = described["paths"]
    assert {"/v1/caption", "/v1/ask", "/v1/match", "/v1/write", "/v1/draw", "/v1/edit"} < paths.keys()
    names = described["components"]["schemas"]
    for operations in paths.values():
        for operation in operations.values():
            assert operation["summary"]
            for content in operation.get("requestBody", {}).get("content", {}).values():
                assert content["schema"]["$ref"].rpartition("/")[2] in names


def test_faults_are_told_without_their_details(m: M6, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(m.network, "prefill", broken)
    with serving(m, tmp_path / "store") as client:
        reply = client.post("/v1/write", {"prompt": "写诗。"})
        assert (reply.status, reply.code) == (500, "fault") and b"secret" not in reply.body
        assert client.get("/health").status == 200


def test_two_servers_do_not_share_a_store(m: M6, tmp_path: Path) -> None:
    with serving(m, tmp_path), pytest.raises(UserError, match="another server keeps its collections there"):
        Shelf(tmp_path, m.identity, Limits())


def test_many_threads_at_once_get_each_their_own(client: Client, m: M6, pictures: list[bytes]) -> None:
    """All tasks at the same time."""
    captions = m.captions(pictures[:4])
    text = m.write(PROMPT, Style(tokens=12, seed=7))
    answer = m.ask("这是什么?", pictures[3])
    problems: list[object] = []

    def caption(n: int) -> bool:
        return client.form("/v1/caption", ("images", pictures[n % 4])).json() == {"captions": [captions[n % 4]]}

    def write(n: int) -> bool:
        return client.post("/v1/write", {"prompt": PROMPT, "tokens": 12, "seed": 7}).json()["text"] == text

    def ask(n: int) -> bool:
        return client.form("/v1/ask", ("question", "这是什么?"), ("image", pictures[3])).json() == {"answer": answer}

    def draw(n: int) -> bool:
        return len(client.post("/v1/draw", {"text": "圆", "tries": 2, "pictures": 1}).json()["pictures"]) == 1

    def several(act) -> None:
        problems.extend(act for n in range(4) if not act(n))

    threads = [threading.Thread(target=several, args=(act,)) for act in (caption, write, ask, draw, caption)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
