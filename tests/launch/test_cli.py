"""The `m6` command as a person meets it: a real process, its streams and its exit code."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.stranger import FORMS
from launch.data import counts
from launch.doctor import hardware
from tests.training.fake_run import make_recipe, make_record
from training.ds_config import resolve
from training.tracking import Tracker

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


@pytest.mark.parametrize(
    "verb",
    [
        ["--help"],
        ["train", "--help"],
        ["train", "--recipe", "nowhere.yaml"],
        ["image-tokenizer", "--recipe", "nowhere.yaml"],
        ["data", "import", "--help"],
    ],
)
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
        (
            ["data", "show"],
            "m6: data/corpus: no corpus there; run `m6 data fetch --dir data`, or make one of your own by "
            "`m6 data import`",
        ),
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


@pytest.mark.parametrize(("flags", "precision"), [({"avx2"}, "fp32"), ({"avx512_bf16"}, "bf16, fp32 masters")])
def test_doctor_says_in_what_precision_the_cpu_trains(flags, precision, tmp_path, monkeypatch):
    monkeypatch.setattr("training.machine.cpu_flags", lambda: flags)
    [finding] = [finding for finding in hardware() if finding.name == "bf16 instructions"]
    assert resolve(make_recipe(), 2, 0, tmp_path).precision == precision
    assert finding.ok and ("train in fp32 here" in finding.advice) == (precision == "fp32")


def test_dry_run_tells_the_whole_plan_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "my data").mkdir()
    recipe = tmp_path / "first.yaml"
    recipe.write_text("{model: m6-tiny, steps: 1200, global_batch: 32, tasks: {caption: 3, poem: 1}}")
    arguments = ["train", "--recipe", str(recipe), "--data", "my data", "evaluation.every=90", "ds.m6.capacity=kx"]
    done = m6(*arguments, "--dry-run", cwd=tmp_path, DS_ACCELERATOR="cpu")
    assert (done.returncode, done.stderr) == (0, "")
    for line in (
        "run            first, in the new folder runs/first",
        "data           my data",
        "steps          1,200, of 32 rows each",
        "tasks          caption 24 (75.0%), poem 8 (25.0%)",
        "evaluation     first, every 90 steps, and last, on 128 rows a task",
        "checkpoint     every 500 steps, and last; the newest 2 are kept",
        "ranks          2, in groups of 2 that share one set of experts",
    ):
        assert line in done.stdout.splitlines()
    assert 'cpu-offload.json, changed by {"m6": {"capacity": "kx"}}\n' in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith("nothing was started; to start it: m6 train --recipe ")
    assert last.endswith(" --name first --data 'my data' evaluation.every=90 ds.m6.capacity=kx")
    assert {path.name for path in tmp_path.iterdir()} == {"my data", "first.yaml"}


def test_report_of_a_run_midway_says_when_its_last_quarter_begins(tmp_path):
    (tmp_path / "recipe.yaml").write_text("steps: 40")
    with Tracker(tmp_path, make_recipe(steps=40), {}) as tracker:
        for step in range(1, 11):
            tracker.step(make_record(step))
        tracker.evaluation(10, {"loss/validation/poem": 5.0})
    done = m6("report", str(tmp_path), COLUMNS="200")
    assert done.returncode == 0, done.stderr
    assert "5.000       not yet       –" in done.stdout
    assert "step 10 of 40; the last quarter begins with step 31\n" in done.stdout


def test_data_show_counts_and_samples(sample_corpus):
    done = m6("data", "show", "--dir", str(sample_corpus.folder.parent), COLUMNS="200")
    assert done.returncode == 0, done.stderr
    assert sample_corpus.fingerprint in done.stdout
    assert "poem " in done.stdout and "review " in done.stdout and "picture " in done.stdout


def test_data_import_tells_what_it_took_and_what_it_left(sample_corpus, tmp_path):
    pictures = [sample_corpus.picture(int(row)) for row in sample_corpus.picture_rows("validation")]
    FORMS["csv"](pictures, tmp_path)
    with (tmp_path / "rows.csv").open("a") as file:
        file.write("[bold]no.png,[red]坏,,,,,,f,,,\r\n")
    command = ("data", "import", "rows.csv", "--to", "to", "--base", str(sample_corpus.folder.parent))
    done = m6(*command, "--zh", "zhh", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "m6: --zh zhh: no source has such a column; did you mean zh?\n")
    done = m6(*command, "--split-by", "family", "--group", "subgroup", cwd=tmp_path, COLUMNS="120")
    assert done.returncode == 0, done.stderr
    assert re.search(r" A +rows.csv \(table\) +\d+ +\d+ +\d+ +0 +CC0-1.0", done.stdout)
    where = f"rows.csv:{len(pictures) + 2} ([bold]no.png)"
    assert re.search(rf" no such file +1 +{re.escape(where)}", done.stdout)
    assert f"{len(pictures)} rows taken, 1 left out\n" in done.stdout
    assert "to/corpus is built; fingerprint " in done.stdout
    assert "0 of " in done.stderr and "pictures are to be described" in done.stderr
    shown = m6("data", "show", "--dir", "to", cwd=tmp_path, COLUMNS="120")
    assert "rows.csv (table)" in shown.stdout and "picture  rows.csv:" in shown.stdout
    assert "left out: 1, by name in to/corpus/skipped.jsonl" in shown.stdout
    (tmp_path / "poems.jsonl").write_text('{"text": "床前明月光", "title": "静夜思"}\n', encoding="utf-8")
    done = m6(*(word.replace("rows.csv", "poems.jsonl") for word in command), cwd=tmp_path, COLUMNS="120")
    assert done.returncode == 0, done.stderr
    assert f"it took the place of {len(pictures)} rows of A, " in done.stdout


def test_counts_by_package_and_split():
    package = {"package": "p", "version": "1", "licence": "MIT", "missing": ""}
    manifest = {
        "sources": {"A": package, "B": package | {"missing": "no apt-get"}},
        "pictures": {"A": {"train": 1234, "test": 7}},
        "texts": {"A": {"train": 1}},
    }
    console = Console(width=200)
    with console.capture() as captured:
        console.print(counts(manifest))
    _, a, b = (line.split() for line in captured.get().splitlines())
    assert a == ["A", "p", "1", "1,235", "0", "7", "0", "MIT"]
    assert b == ["B", "p", "1", "done", "without:", "no", "apt-get"]
