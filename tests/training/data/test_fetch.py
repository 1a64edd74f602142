import fcntl
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.training.data.packages import emoji_packages, text_packages, weights_package
from training.data import download, fetch, sources
from training.data.build import build_corpus
from training.data.corpus import Corpus, sha256_of
from training.data.fetch import Summary
from training.errors import UserError


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packages")
    return {**emoji_packages(folder), **text_packages(folder), "W1": weights_package(folder)}


@pytest.fixture
def data_dir(packages, tmp_path, monkeypatch) -> Path:
    """A data folder whose downloads are miniature packages, pinned as the real ones are; B cannot be had."""
    downloads = tmp_path / fetch.DOWNLOADS
    downloads.mkdir()
    pinned = []
    for source in sources.SOURCES:
        if source.id in packages:
            data = packages[source.id].read_bytes()
            (downloads / source.file).write_bytes(data)
            source = replace(source, sha256=sha256_of(packages[source.id]))
        pinned.append(source)
    for module in (fetch, download):
        monkeypatch.setattr(module, "SOURCES", tuple(pinned))
    monkeypatch.setattr(fetch, "build_corpus", partial(build_corpus, vocab_size=420))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path


def client(data_dir: Path, name: str, script: str) -> None:
    """Put a package client of our own into the PATH."""
    path = data_dir / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_builds_then_is_up_to_date(data_dir):
    first = fetch.fetch(data_dir)
    assert not first.up_to_date and first.seconds.keys() >= {
        "downloads",
        "pictures",
        "texts",
        "tokenizer",
        "features",
    }
    assert [sum(splits.values()) for splits in first.manifest["pictures"].values()] == [4, 4]
    assert sum(sum(splits.values()) for splits in first.manifest["texts"].values()) == 140
    assert any("tuxpaint-stamps-default 2022.06.04-1: done without (no apt-get" in line for line in first.lines())
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    second = fetch.fetch(data_dir)
    assert second.up_to_date and "up to date" in second.lines()[0]
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == before


def test_damaged_corpus_is_built_anew_after_an_interruption(data_dir):
    built = fetch.fetch(data_dir)
    fingerprint = built.manifest["fingerprint"]
    (built.folder / "tokenizer.model").write_bytes(b"damage")
    # What a killed fetch may leave behind.
    (data_dir / "corpus.partial" / "pictures").mkdir(parents=True)
    again = fetch.fetch(data_dir)
    assert not again.up_to_date and again.manifest["fingerprint"] == fingerprint
    assert sorted(path.name for path in data_dir.iterdir()) == [".lock", "bin", "corpus", "downloads"]
    Corpus.open(data_dir).verify()


def test_old_corpus_stays_until_the_new_one_is_whole(data_dir, monkeypatch):
    built = fetch.fetch(data_dir)
    monkeypatch.setattr(
        fetch, "SOURCES", tuple(replace(s, sha256="0" * 64) if s.id == "B" else s for s in fetch.SOURCES)
    )

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "build_corpus", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch(data_dir)
    assert Corpus.open(data_dir).fingerprint == built.manifest["fingerprint"]


@pytest.mark.parametrize("what", ["folder", "file", "damaged manifest"])
def test_what_no_fetch_built_stays(data_dir, what):
    place = data_dir / "corpus"
    mine = place
    if what == "damaged manifest":
        fetch.fetch(data_dir)
        mine = place / "manifest.json"
    elif what == "folder":
        place.mkdir()
        mine = place / "mine.txt"
    mine.write_text("precious")
    with pytest.raises(UserError, match="no corpus, by its manifest; move it elsewhere, or give another --dir"):
        fetch.fetch(data_dir)
    assert mine.read_text() == "precious" and not (data_dir / "corpus.partial").exists()


def test_required_package_that_cannot_be_had_is_named(data_dir):
    (data_dir / fetch.DOWNLOADS / sources.BY_ID["T1"].file).unlink()
    client(data_dir, "npm", "echo 'npm error code E404' >&2; echo 'npm error 404 not found' >&2; exit 1")
    with pytest.raises(
        UserError,
        match=r"cannot fetch chinese-poetry 2\.0\.1: npm failed: npm error code E404, npm error 404",
    ):
        fetch.fetch(data_dir)
    assert not (data_dir / "corpus").exists()


def test_another_file_under_the_pinned_name_is_refused(data_dir):
    file = sources.BY_ID["T1"].file
    path = data_dir / fetch.DOWNLOADS / file
    path.write_bytes(b"cut off")
    client(data_dir, "npm", f"echo other > {file}")
    with pytest.raises(UserError, match=r"npm brought another chinese-poetry-2\.0\.1\.tgz: SHA-256 \w{64}, pinned"):
        fetch.fetch(data_dir)
    assert path.read_bytes() == b"cut off"
    assert [entry.name for entry in path.parent.iterdir() if entry.name.startswith(".partial")] == []


def test_damaged_download_is_fetched_again(data_dir, packages):
    file = sources.BY_ID["T1"].file
    path = data_dir / fetch.DOWNLOADS / file
    path.write_bytes(b"cut off")
    client(data_dir, "npm", f"/bin/cp {packages['T1']} {file}")
    had, _ = download.download_all(data_dir / fetch.DOWNLOADS)
    assert sha256_of(had["T1"]) == sha256_of(packages["T1"])


def test_two_fetches_do_not_share_a_folder(data_dir):
    with (data_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another `m6 data fetch` or `m6 data import` is at work"):
            fetch.fetch(data_dir)


def test_no_space(data_dir, monkeypatch):
    monkeypatch.setattr(fetch, "_NEEDED_BYTES", 2**60)
    with pytest.raises(UserError, match=r"GiB free, .* needed"):
        fetch.fetch(data_dir)


def test_pins_are_complete():
    assert len(sources.BY_ID) == len(sources.SOURCES) == 7
    for source in sources.SOURCES:
        assert len(source.sha256) == 64 and source.size > 0 and source.licence
        assert os.path.basename(source.file) == source.file
    assert [source.id for source in sources.SOURCES if not source.required] == ["B"]


def test_summary_of_a_small_manifest():
    source = {"package": "p", "version": "1", "licence": "MIT", "what": "things", "missing": ""}
    manifest = {
        "fingerprint": "f" * 64,
        "sources": {"A": source},
        "pictures": {"A": {"train": 3}},
        "texts": {},
    }
    lines = Summary(Path("c"), True, manifest | {"skipped": {"A": 2}, "dropped": {"A: twice": 1}}).lines()
    assert "  A p 1 (MIT): 3 train" in lines and "  left out, A: 2" in lines and "  left out, A: twice: 1" in lines
