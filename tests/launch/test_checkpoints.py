"""`m6 verify` and `m6 export` as a person meets them."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from launch import checkpoints
from launch.checkpoints import export_run, verify_run
from tests.launch.test_cli import m6
from tests.training.made_checkpoint import first_model, make_checkpoints, make_recipe, same_values
from tests.training.test_checkpoint_files import largest_file
from training import checkpoint_files
from training.data.corpus import Corpus
from training.errors import UserError
from training.export import load_exported

FILE = "rank-00000.safetensors"


@pytest.fixture(scope="module")
def made(sample_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with checkpoints at the steps 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("runs") / "made"
    make_checkpoints(folder / "checkpoints", make_recipe(sample_corpus), sample_corpus, 4, 8, 12)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of it that may be spoilt, as runs/made in the working folder."""
    shutil.copytree(made, tmp_path / "runs" / "made")
    return tmp_path / "runs" / "made"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_verify_and_export_from_the_command_line(run: Path) -> None:
    folder, wide = run.parent.parent, {"COLUMNS": "200", "M6_DEBUG": ""}
    done = m6("verify", "made", cwd=folder, **wide)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0] == ["step", "size", "files", "written", "state"]
    assert [(row[0], row[3], row[-1]) for row in rows[1:]] == [(step, "3", "whole") for step in ("4", "8", "12")]

    done = m6("export", "made", "--step", "8", "--to", "weights", "--dtype", "fp32", cwd=folder, **wide)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("exported: weights (step 8, ") and done.stdout.endswith(" in 1 file(s))\n")
    recipe = checkpoints.parse_recipe(checkpoint_files.read_manifest(run / "checkpoints/step-8")["recipe"], [], "")
    assert same_values(load_exported(folder / "weights"), first_model(recipe, 8))

    flip(run / "checkpoints" / "step-8" / FILE)
    done = m6("verify", "made", cwd=folder, **wide)
    assert done.returncode == 1
    assert [line.split()[-1] for line in done.stdout.splitlines()[1:4]] == ["whole", "damaged", "whole"]
    problem = "runs/made/checkpoints/step-8/rank-00000.safetensors: damaged (its checksum is not the manifest's)"
    assert done.stdout.splitlines()[4:] == [problem]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "nowhere"], "nowhere: no such run; see the folders under runs/"),
        (["verify", "runs"], "runs: no checkpoints there"),
        (
            ["verify", "made", "--step", "5"],
            "--step 5: no such checkpoint in runs/made/checkpoints; there are 4, 8, 12",
        ),
        (["export", "made", "--to", "runs"], "runs exists: choose another --to"),
    ],
)
def test_what_is_not_there_is_told(
    run: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    from launch.cli import m6

    monkeypatch.chdir(run.parent.parent)
    with pytest.raises(UserError) as caught:
        m6.main(arguments, standalone_mode=False)
    assert str(caught.value) == message


def test_a_checkpoint_by_its_folder_or_step(run: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    flip(run / "checkpoints" / "step-4" / FILE)
    (run / "checkpoints" / "latest").unlink()
    assert verify_run(str(run / "checkpoints" / "step-12"), None) == 0
    assert verify_run(str(run), 8) == 0
    assert verify_run(str(run), 4) == 1
    monkeypatch.chdir(run / "checkpoints" / "step-8")
    capsys.readouterr()
    assert verify_run(".", None) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[0] == "8"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "missing"),
        ("step-12", "damaged (it does not say which checkpoint is the latest)"),
        (f"step-16 {'0' * 32}", "names step-16, which is not there"),
        (f"step-12 {'0' * 32}", "the checksum that it names is not that of step-12"),
    ],
)
def test_latest_is_held_against_what_is_there(run: Path, capsys, text: str | None, problem: str) -> None:
    latest = run / "checkpoints" / "latest"
    latest.unlink()
    if text is not None:
        latest.write_text(text)
    assert verify_run(str(run), None) == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"{latest}: {problem}"


def test_latest_is_right_after_a_future_was_given_up(run: Path) -> None:
    checkpoint_files.set_aside_after(run / "checkpoints", 8)
    assert verify_run(str(run), None) == 0


def test_every_file_that_is_wrong_is_named(run: Path, capsys) -> None:
    home = run / "checkpoints"
    flip(home / "step-4" / FILE)
    flip(home / "step-8" / "manifest.json")
    (home / "step-12" / FILE).unlink()
    assert verify_run(str(run), None) == 1
    problems = capsys.readouterr().out.splitlines()[4:]
    assert [problem.partition(": ")[0] for problem in problems] == [
        f"{home}/step-4/{FILE}", f"{home}/step-8/manifest.json", f"{home}/step-12/{FILE}"
    ]  # fmt: skip


def test_what_is_pruned_meanwhile_is_no_damage(run: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    listed = checkpoint_files.steps

    def list_and_prune(home: Path) -> list[int]:
        found = listed(home)
        shutil.rmtree(home / "step-4", ignore_errors=True)
        return found

    monkeypatch.setattr(checkpoint_files, "steps", list_and_prune)
    assert verify_run(str(run), None) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["step", "8", "12"]


def test_what_is_verified_is_not_pruned(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = checkpoint_files.problems

    def check_while_pruning(path: Path, advance) -> list[str]:
        checkpoint_files.prune(run / "checkpoints", checkpoint_files.Retention(1))
        assert path.is_dir()
        return check(path, advance)

    monkeypatch.setattr(checkpoint_files, "problems", check_while_pruning)
    assert verify_run(str(run), 4) == 0
    assert checkpoint_files.steps(run / "checkpoints") == [4, 12]


def test_export_takes_the_newest_and_refuses_a_damaged_one(run: Path) -> None:
    export_run(str(run))
    description = json.loads((run / "exports" / "step-12" / "config.json").read_text())
    assert (description["step"], description["dtype"]) == (12, "bf16")
    assert {weight.dtype for weight in load_exported(run / "exports" / "step-12").parameters()} == {torch.bfloat16}
    flip(run / "checkpoints" / "step-8" / FILE)
    with pytest.raises(UserError, match=r"step-8/rank-00000.safetensors: damaged .*; `m6 verify .*` shows which"):
        export_run(str(run), 8)
    assert os.listdir(run / "exports") == ["step-12"]


def test_mistakes_in_an_export_leave_nothing(run: Path, sample_corpus: Corpus, tmp_path: Path) -> None:
    before = sorted(path for path in run.rglob("*"))
    for arguments, message in (
        ({"shard_size": "big"}, "--shard-size big: must be a size such as 5GB"),
        ({"data": tmp_path / "nowhere"}, "nowhere/corpus: no corpus there"),
    ):
        with pytest.raises(UserError, match=message):
            export_run(str(run), **arguments)
    with (
        largest_file(100_000),
        pytest.raises(UserError, match=r"exports/step-12: cannot be written \(.*File too large"),
    ):
        export_run(str(run))
    assert sorted(path for path in run.rglob("*") if path.name != "exports") == before
    remains = run / "exports" / ".step-12.partial"  # of an export that was killed
    remains.mkdir()
    (remains / "half").write_text("")
    export_run(str(run))
    assert os.listdir(run / "exports") == ["step-12"] and not (run / "exports" / "step-12" / "half").exists()
