"""A delinked run says what the shared one said, to the bit, and goes on from there on any layout, in bounded memory."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from launch.checkpoints import delink_run
from tests.model.samples import sample_batch
from tests.ranks import run_ranks
from tests.training import engine_ranks as ranks
from tests.training.made_checkpoint import make_checkpoints, make_recipe
from tests.training.test_train import lines, said, train
from training.checkpoint_files import problems, read_manifest, take_back
from training.data.corpus import Corpus
from training.delink import Plateau
from training.errors import UserError
from training.export import load_checkpoint
from training.recipe import Delink, parse_recipe
from training.run import read_mapping
from training.tensor_files import saved_slices

STEP = 4
SHARED = ranks.MODEL | {"share_layers": True, "layers": 3, "ffn": 128}


def train_shared(data: Path, folder: Path, ds: dict[str, Any]) -> dict[str, Any]:
    """Train to STEP, save there: losses of the steps, and of the rows of the next one."""
    from training import checkpoint, checkpoint_files, states

    rank = ranks.Rank(data, folder / "swap", ds, {"data": str(data), "model": SHARED})
    losses = rank.train(0, STEP)
    corpus = rank.collate.corpus
    facts = {
        "adam_step": states.adam_step(rank.engine), "recipe": rank.recipe.model_dump(mode="json"),
        "tokenizer": corpus.tokenizer.sha256, "data": corpus.fingerprint, "position": STEP * rank.recipe.global_batch,
    }  # fmt: skip
    saver = checkpoint.Saver(folder / "shared" / "checkpoints", checkpoint_files.Retention(1), 2**30)
    saver.save(states.parts(rank.engine), STEP, facts)
    outcome = saver.wait()
    assert outcome is not None and not outcome.error, outcome
    return {"losses": losses, "next": row_losses(rank), "digests": ranks.state_digests(rank)}


def go_on(data: Path, folder: Path, ds: dict[str, Any], name: str) -> dict[str, Any]:
    """From the delinked checkpoint: losses of the next step's rows, and of three more steps."""
    from training import checkpoint

    model = {key: value for key, value in SHARED.items() if key != "share_layers"}
    rank = ranks.Rank(data, folder / "swap", ds, {"data": str(data), "model": model})
    found = checkpoint.newest(folder / "runs" / name / "checkpoints")
    assert found is not None
    checkpoint.load(rank.engine, found.path, found.manifest, rank.blank_step)
    digests = ranks.state_digests(rank)
    return {"next": row_losses(rank), "digests": digests, "losses": rank.train(STEP, STEP + 3)}


def row_losses(rank: ranks.Rank) -> list[Tensor]:
    return [rank.engine.losses(batch)[0] for batch in rank.batches.step(STEP)]


@pytest.fixture(scope="module")
def shared(sample_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of a run that two ranks trained (ep 2), and of those that it became."""
    folder = tmp_path_factory.mktemp("delinked")
    results = run_ranks(2, train_shared, sample_corpus.folder.parent, folder, ranks.settings(ranks.NONE, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("clone", "reset"):
            delink_run("shared", ("global_batch=8",), name, None, name)
    return folder, results


def test_it_says_the_same_and_learns_on(shared: Any, sample_corpus: Corpus) -> None:
    folder, before = shared
    results = run_ranks(2, go_on, sample_corpus.folder.parent, folder, ranks.settings(ranks.NONE, 2), "clone")
    for was, now in zip(before, results, strict=True):
        assert all(torch.equal(left, right) for left, right in zip(was["next"], now["next"], strict=True))
        for layer in range(3):
            for key, found in was["digests"].items():
                assert now["digests"][key.replace("layers.0.", f"layers.{layer}.")] == found
    last, first = before[0]["losses"][-1][0], results[0]["losses"][0][0]
    assert first < last * 1.02  # the loss falls by more than that in these steps
    assert all(later < first for later, _ in results[0]["losses"][1:])


def test_on_another_layout_with_moments_as_before_the_first_step(shared: Any, sample_corpus: Corpus) -> None:
    folder, before = shared
    [result] = run_ranks(1, go_on, sample_corpus.folder.parent, folder, ranks.settings(ranks.CPU, 1), "reset")
    moments = [found for key, found in result["digests"].items() if not key.endswith(".master")]
    assert moments and not any(any(part) for found in moments for part in found.values())
    assert result["losses"][-1][0] < before[0]["losses"][-1][0]


def test_what_is_written(shared: Any) -> None:
    folder, _ = shared
    path = folder / "runs" / "clone" / "checkpoints" / f"step-{STEP}"
    assert problems(path) == []
    manifest = read_manifest(path)
    recipe = parse_recipe(read_mapping(folder / "runs" / "clone" / "recipe.yaml"), [], "")
    assert recipe.model_dump(mode="json") == manifest["recipe"]
    assert recipe.global_batch == 8 and not recipe.model_shape().share_layers
    # As many rows are seen as before: none twice, none left out.
    assert (STEP + manifest["safeguard"]["passed_over"]) * 8 == manifest["position"] == STEP * 16
    before = saved_slices(folder / "shared" / "checkpoints" / f"step-{STEP}", ["rank-00000.safetensors"])
    after = saved_slices(path, ["rank-00000.safetensors"])
    assert {key.replace("layers.2.", "layers.0.") for key in after if not key.startswith("layers.1.")} == set(before)


def test_moments_are_scaled_for_the_layers_that_shared_alone(
    sample_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = make_recipe(sample_corpus, share_layers=True)
    make_checkpoints(tmp_path / "run" / "checkpoints", recipe, sample_corpus, 4)
    found = {}
    for moments in ("clone", "scale"):
        delink_run("run", (), moments, None, moments)
        path = tmp_path / "runs" / moments / "checkpoints" / "step-4"
        assert problems(path) == []
        found[moments] = {
            key: np.concatenate([np.fromfile(p.file, "<f4", p.numel, offset=p.start) for p in pieces])
            for key, pieces in saved_slices(path, read_manifest(path)["files"]).items()
        }
    layers = recipe.model_shape().layers
    for key, cloned in found["clone"].items():
        kind = key.rpartition(".")[2] if key.startswith("layers.") else ""
        scale = {"exp_avg": 1 / layers, "exp_avg_sq": 1 / layers**2}.get(kind, 1)
        np.testing.assert_allclose(found["scale"][key], cloned * scale, rtol=1e-6, err_msg=key)


def test_a_delinked_model_is_the_shared_one(
    sample_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = make_recipe(sample_corpus, share_layers=True, bag_width=8)
    make_checkpoints(tmp_path / "run" / "checkpoints", recipe, sample_corpus, 3, 5)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    delink_run("run", (), "own", 3, None)
    assert (tmp_path / "runs" / "own" / "metrics.jsonl").read_text() == '{"step": 1}\n'
    (was, *_), (now, *_) = (
        load_checkpoint(tmp_path / "run/checkpoints/step-3"),
        load_checkpoint(tmp_path / "runs/own/checkpoints/step-3"),
    )
    batch = sample_batch(was.config)
    assert torch.equal(was(batch)["loss_B"], now(batch)["loss_B"])
    assert now.config == dataclasses.replace(was.config, share_layers=False)
    pointers = {layer.attention.out.weight.data_ptr() for layer in now.layers}
    assert len(pointers) == was.config.layers == 3


RULE = ["model.share_layers=true", "delink.after=3", "delink.then.global_batch=8", "delink.then.optimizer.lr=5e-4"]


def test_by_rule_within_a_run(sample_corpus: Corpus, tmp_path: Path) -> None:
    """From step 3 on with another batch and rate; the run is one: one command, one folder, one line of losses."""
    done = train(sample_corpus, tmp_path, *RULE, "save_every=9", "steps=5")
    assert done.returncode == 0, said(done.stderr)
    assert "step 3: delinked: each of 2 layers has its own weights from now on" in done.stdout
    run = tmp_path / "runs" / "run"
    before, after = (line for line in lines(run) if line["step"] == 3 and "validation" in str(line))
    losses = [{key: value for key, value in line.items() if "loss" in key} for line in (before, after)]
    assert losses[0] == losses[1] and losses[0]
    manifest = read_manifest(run / "checkpoints" / "step-5")
    assert manifest["position"] == 3 * 16 + 2 * 8
    assert manifest["recipe"]["model"]["share_layers"] is False and manifest["recipe"]["optimizer"]["lr"] == 5e-4
    steps = [line["step"] for line in lines(run) if "loss" in line]
    assert steps == sorted(set(steps)) == [1, 2, 3, 4, 5]


def test_a_run_that_was_stopped_goes_on_in_its_stage(sample_corpus: Corpus, tmp_path: Path) -> None:
    """Before delinking it delinks at once; after it, it goes on; from a shared one it delinks again."""
    alone = ["--ranks", "1", "save_every=2", "keep=9", "evaluation.every=9"]
    checkpoints = tmp_path / "runs" / "run" / "checkpoints"
    assert train(sample_corpus, tmp_path, *alone, RULE[0], "steps=3").returncode == 0
    told = []
    for steps in (4, 5, 6):
        if steps == 6:
            for damaged in (3, 4, 5):
                file = checkpoints / f"step-{damaged}" / "rank-00000.safetensors"
                file.write_bytes(file.read_bytes()[:-1])
        done = train(sample_corpus, tmp_path, *alone, *RULE, f"steps={steps}", "--resume")
        assert done.returncode == 0, said(done.stderr)
        told.append([line.split()[1].strip(":") for line in done.stdout.splitlines() if "delinked:" in line])
    assert told == [["3"], [], ["3"]]
    assert [read_manifest(checkpoints / f"step-{step}")["position"] for step in (2, 3, 4, 6)] == [32, 48, 56, 72]


def test_what_could_not_go_on_is_refused_before_it_begins(sample_corpus: Corpus, tmp_path: Path) -> None:
    done = train(sample_corpus, tmp_path, *RULE, "delink.then.global_batch=7", "--dry-run")
    assert done.returncode == 2 and "7" in done.stderr and len(said(done.stderr)) == 1


def test_a_checkpoint_that_was_to_be_replaced_comes_back(tmp_path: Path) -> None:
    """Killed when the old one was hidden and the new one had no name yet."""
    (tmp_path / ".step-3.aside").mkdir()
    (tmp_path / "latest").write_text("step-3 0123")
    take_back(tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["latest", "step-3"]
    (tmp_path / ".step-3.aside").mkdir()
    take_back(tmp_path)  # it is there
    assert (tmp_path / ".step-3.aside").exists()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 9), st.floats(0.001, 0.5), st.floats(0.5, 0.999))
def test_a_loss_that_falls_more_slowly_than_asked_is_flat(window: int, flat: float, rate: float) -> None:
    rule, plateau = Delink(flat=flat, window=window), Plateau()
    for step in range(1, 4 * window + 1):
        plateau.add(rate**step, rule)
        assert plateau.reached(step, rule) == (step >= 2 * window and rate**window > 1 - flat) or math.isclose(
            rate**window, 1 - flat
        )


def test_a_number_of_steps_is_enough() -> None:
    rule, plateau = Delink(after=3), Plateau()
    assert [plateau.reached(step, rule) for step in range(1, 5)] == [False, False, True, True]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["delink.after=3"], "delink: layers that have their own weights cannot be delinked"),
        (
            ["model.share_layers=true", "delink.flat=1.5"],
            r"delink\.flat=1\.5.*must be a finite number from 0 and below 1",
        ),
        (
            ["model.share_layers=true", "delink.after=3", "delink.then.steps=none"],
            r"delink.then: .*steps=.*whole number",
        ),
        (
            ["model.share_layers=true", "delink.after=3", "delink.then.model.layers=9"],
            "model.layers: delinking keeps it",
        ),
        (
            ["model.share_layers=true", "delink.after=3", "delink.then.stepz=4"],
            r"delink.then: .*stepz.*did you mean steps",
        ),
    ],
)
def test_a_rule_that_cannot_be_is_told(overrides: list[str], message: str, sample_corpus: Corpus) -> None:
    with pytest.raises(UserError, match=message) as told:
        parse_recipe(make_recipe(sample_corpus).model_dump(mode="json"), overrides, "recipe")
    assert "\n" not in str(told.value)
    print(told.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.layers=4",), "model.layers=4: it was 3, and the one layer was called as many times"),
        (("model.hidden=64",), "model.hidden=64: it was 32, and delinking keeps the model"),
        (("model.share_layers=true",), "model.share_layers=True: it was False, and delinking keeps the model"),
        (("steps=none",), "steps"),
    ],
)
def test_another_model_is_refused(
    overrides: tuple[str, ...], message: str, sample_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_checkpoints(tmp_path / "run" / "checkpoints", make_recipe(sample_corpus, share_layers=True), sample_corpus, 2)
    with pytest.raises(UserError, match=message):
        delink_run("run", overrides, "own", None, None)
    assert not (tmp_path / "runs").exists()


def test_what_cannot_be_delinked_is_told(
    sample_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_checkpoints(tmp_path / "run" / "checkpoints", make_recipe(sample_corpus, share_layers=True), sample_corpus, 2)
    delink_run("run", (), "own", None, None)
    with pytest.raises(UserError, match="step-2: its 3 layers have their own weights already"):
        delink_run("own", (), "again", None, None)
    with pytest.raises(UserError, match="runs/own exists: choose another --name"):
        delink_run("run", (), "own", None, None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(UserError, match=r"delinked weights take .* MB, and 0 bytes are free"):
        delink_run("run", (), "third", None, None)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run" / "checkpoints" / "step-2" / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged .*m6 verify"):
        delink_run("run", (), "third", None, None)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["own"]


MEASURE = """
import ctypes, gc, json, sys
from pathlib import Path
from launch.checkpoints import delink_run

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

delink_run(sys.argv[2], (), "small", None, None)  # what libraries take once
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
delink_run(sys.argv[1], (), "own", None, None)
print(json.dumps(status("VmHWM") - before))
"""


def test_memory_is_bounded_by_a_piece(sample_corpus: Corpus, tmp_path: Path) -> None:
    large = make_recipe(sample_corpus, share_layers=True, layers=4, hidden=128, ffn=2048, experts=64)
    small = make_recipe(sample_corpus, share_layers=True)
    for name, recipe in (("large", large), ("small", small)):
        make_checkpoints(tmp_path / name / "checkpoints", recipe, sample_corpus, 1)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "large"), str(tmp_path / "small")]
    repository = Path(__file__).parents[2]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, cwd=tmp_path, env={"PYTHONPATH": str(repository)}
    )
    assert done.returncode == 0, done.stderr
    growth, layer = json.loads(done.stdout.splitlines()[-1]), 4 * large.model_shape().parameter_counts().experts
    print(f"one layer {layer:,} bytes; growth {growth:,}")
    assert layer > 130_000_000 and growth < 48_000_000
