"""The `m6` command as a person meets it: a real process, its streams and its exit code."""

import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from rich.console import Console

from launch.data import counts

M6 = Path(sysconfig.get_path("scripts"), "m6")


def m6(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [M6, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=60
    )


def test_help_is_instant():
    seconds = []
    for _ in range(3):  # the best of three: the machine may be busy
        begin = time.perf_counter()
        done = m6("--help")
        seconds.append(time.perf_counter() - begin)
    assert done.returncode == 0 and "train" in done.stdout and "doctor" in done.stdout
    assert min(seconds) < 1.0


@pytest.mark.parametrize("verb", [["--help"], ["train", "--help"], ["train", "--recipe", "nowhere.yaml"]])
def test_torch_is_imported_only_where_it_is_needed(verb):
    program = (
        "import sys\nfrom launch.cli import main\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program, *verb], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "m6: No such command 'trian'. Did you mean 'train'? (see m6 --help)"),
        (["train"], "m6: Missing option '--recipe' (see m6 train --help)"),
        (
            ["train", "--recipe", "r.yaml", "--ranks", "0"],
            "m6: Invalid value for '--ranks': 0 is not in the range x>=1 (see m6 train --help)",
        ),
        (["train", "--recipe", "nowhere.yaml"], "m6: nowhere.yaml: no such file"),
        (["data", "show"], "m6: data/corpus: no corpus there; run `m6 data fetch`"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path):
    done = m6(*arguments, cwd=tmp_path, M6_DEBUG="")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message + "\n")


def test_debug_shows_the_traceback_too(tmp_path):
    done = m6("train", "--recipe", "nowhere.yaml", cwd=tmp_path, M6_DEBUG="1")
    assert done.returncode == 2
    assert done.stderr.startswith("Traceback") and done.stderr.endswith("\nm6: nowhere.yaml: no such file\n")


def test_no_verb_shows_the_help():
    done = m6()
    assert done.returncode == 2 and "Commands:" in done.stdout + done.stderr


def test_doctor_reports_as_json():
    done = m6("doctor", "--json")
    report = json.loads(done.stdout)
    found = {finding["name"]: finding for finding in report["findings"]}
    assert done.returncode == 0 and report["can_train"]
    assert found["torch"]["ok"] and found["operator cpu_adam"]["value"] == "built"
    assert all(finding["advice"] for finding in report["findings"] if not finding["ok"])


def test_doctor_without_a_compiler_says_what_to_do(tmp_path):
    command = [sys.executable, "-c", "from launch.cli import main; main()", "doctor"]
    environment = os.environ | {"PATH": str(tmp_path), "COLUMNS": "200"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "apt-get install g++" in done.stdout and "Training cannot run" in done.stdout


def test_data_show_counts_and_samples(sample_corpus):
    done = m6("data", "show", "--dir", str(sample_corpus.folder.parent), COLUMNS="200")
    assert done.returncode == 0, done.stderr
    assert sample_corpus.fingerprint in done.stdout
    assert "poem " in done.stdout and "review " in done.stdout and "picture " in done.stdout


def test_counts_by_package_and_split():
    package = {"package": "p", "version": "1", "licence": "MIT", "missing": ""}
    manifest = {
        "sources": {"A": package, "B": package | {"missing": "no apt-get"}},
        "pictures": {"A": {"train": 1234, "test": 7}},
        "texts": {},
    }
    console = Console(width=200)
    with console.capture() as captured:
        console.print(counts(manifest))
    _, a, b = (line.split() for line in captured.get().splitlines())
    assert a == ["A", "p", "1", "1,234", "0", "7", "0", "MIT"]
    assert b == ["B", "p", "1", "done", "without:", "no", "apt-get"]
