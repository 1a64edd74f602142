"""The training program as a person starts it: through `m6 train`, on real ranks, with real files."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import xxhash
import yaml

from launch.measured_cluster import described
from tests.made_machine import MACHINE
from tests.ranks import run_ranks
from training import checkpoint_files
from training.data.corpus import Corpus
from training.energy import MODELLED
from training.errors import UserError
from training.run import PLAN, lock_run, read_settings
from training.start import init_distributed

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(300)

SMALL = [
    "model.layers=2", "model.hidden=64", "model.ffn=128", "model.experts=8", "model.text_vocab=540",
    "global_batch=16", "ds.train_micro_batch_size_per_gpu=4", "text_positions=64", "steps=6", "save_every=3",
    "evaluation.every=3", "evaluation.rows=8", "evaluation.samples=2", "schedule.warmup=2", "tracking.log_every=1",
]  # fmt: skip


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-c", "from launch.cli import main; main()", *arguments]


def m6(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=cwd, capture_output=True, text=True, timeout=280)


def training(corpus: Corpus, *arguments: str, name: str = "run") -> list[str]:
    recipe = str(ROOT / "launch" / "recipes" / "quickstart.yaml")
    data = str(corpus.folder.parent)
    return ["train", "--recipe", recipe, "--name", name, "--data", data, *SMALL, *arguments]


def train(corpus: Corpus, cwd: Path, *arguments: str, name: str = "run") -> subprocess.CompletedProcess[str]:
    return m6(*training(corpus, *arguments, name=name), cwd=cwd)


def said(errors: str) -> list[str]:
    """The lines on standard error, without the warning of a CUDA build of torch that there is no GPU."""
    return [line for line in errors.splitlines() if "No CUDA runtime is found" not in line]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines(run) if "loss" in line}


@pytest.fixture(scope="module")
def finished(sample_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one whole run in it, tracked in wandb offline, and planned."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "here.yaml").write_text(yaml.safe_dump(described(MACHINE, ranks=2)))
    done = train(sample_corpus, folder, "--cluster", "here.yaml")
    assert done.returncode == 0, done.stderr
    return folder


def test_energy_is_measured_or_said_to_be_modelled_by_the_plan(finished: Path) -> None:
    run = finished / "runs" / "run"
    steps, [stage] = [line for line in lines(run) if "loss" in line], json.loads((run / PLAN).read_text())["stages"]
    joules = [line["energy/joules"] for line in steps]
    assert joules == sorted(joules) and joules[0] > 0
    sources = {line["energy/source"] for line in steps}
    assert sources in ({MODELLED}, {"measured (rapl)"})
    if sources == {MODELLED}:
        later, earlier = steps[-1], steps[0]
        seconds = sum(line["step_seconds"] for line in steps[1:])
        assert later["energy/joules"] - earlier["energy/joules"] >= stage["watts"] * seconds
    summary = json.loads((run / "run.json").read_text())["summary"]
    assert summary["joules"] >= joules[-1] and summary["modelled"] == (sources == {MODELLED})


def test_a_run_leaves_what_the_design_promises(finished: Path) -> None:
    run = finished / "runs" / "run"
    assert {"recipe.yaml", "ds_config.json", "metrics.jsonl", "checkpoints", "wandb"} <= {p.name for p in run.iterdir()}
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"latest", "step-3", "step-6"}
    assert not (run / "swap").exists()
    promised = {
        "step", "position", "tokens", "loss", "loss/caption", "lr", "grad_norm", "step_seconds", "tokens_per_second",
        "flops_utilization", "moe/load_cv", "moe/drop_rate", "moe/drop_rate/image", "memory/device_bytes",
        "memory/host_bytes", "energy/joules", "energy/joules_per_token", "energy/source", "skipped_steps",
    }  # fmt: skip
    steps = [line for line in lines(run) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(promised <= line.keys() for line in steps)
    assert steps[-1]["position"] == 6 * 16
    evaluations = [line for line in lines(run) if "loss/validation/caption" in line]
    assert [line["step"] for line in evaluations] == [0, 3, 6]
    recipe = read_settings(run)[0]
    manifest = checkpoint_files.read_manifest(run / "checkpoints" / "step-6")
    assert recipe.model["preset"] == "m6-tiny"
    assert (manifest["recipe"], manifest["recipe_sha256"]) == (recipe.model_dump(mode="json"), recipe.sha256())


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(sample_corpus: Corpus, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "runs", tmp_path / "runs")
    run = tmp_path / "runs" / "run"
    shutil.rmtree(run / "checkpoints" / "step-6")
    resumed = train(sample_corpus, tmp_path, "--resume", "tracking.wandb=disabled")
    assert resumed.returncode == 0, resumed.stderr
    assert losses(run) == losses(finished / "runs" / "run")
    [event] = [line for line in lines(run) if line.get("event") == "resumed"]
    assert event["step"] == 3 and event["text"] == "3 steps are left, from runs/run/checkpoints/step-3"
    assert (run / "checkpoints" / "step-6" / "manifest.json").exists()
    assert (
        json.loads((run / "run.json").read_text())["wandb"]
        == json.loads((finished / "runs" / "run" / "run.json").read_text())["wandb"]
    )


def test_the_report_is_one_file_with_the_run_in_it(finished: Path) -> None:
    done = m6("report", "run", cwd=finished)
    assert done.returncode == 0, done.stderr
    page = (finished / "runs" / "run" / "report" / "index.html").read_text()
    assert "caption" in page and "<script" not in page
    assert "report/index.html" in done.stdout


def test_a_second_run_of_the_name_is_refused_and_nothing_is_lost(sample_corpus: Corpus, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "runs").rglob("*")}
    again = train(sample_corpus, finished)
    assert again.returncode == 2
    assert said(again.stderr) == ["m6: runs/run exists: choose another --name, or --resume to go on with it"]
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "runs").rglob("*")}


def construct_late(folder: Path, data: Path) -> str:
    """Rank 1 comes to each look at the run's folder seconds after rank 0."""
    from training import loop as program
    from training.recipe import load_recipe

    look = program.open_run
    program.open_run = lambda *args: (time.sleep(3 * int(os.environ["RANK"])), look(*args))[1]
    os.chdir(folder)
    init_distributed()
    overrides = [*SMALL, f"data={data}", "tracking.wandb=disabled"]
    training = program.Training(load_recipe(ROOT / "launch/recipes/quickstart.yaml", overrides), "run", resume=False)
    training.close()
    return str(training.folder)


def test_a_slow_rank_finds_the_folder_as_new_as_the_first_did(sample_corpus: Corpus, tmp_path: Path) -> None:
    assert run_ranks(2, construct_late, tmp_path, sample_corpus.folder.parent) == ["runs/run"] * 2


def resume_others(folder: Path, data: Path, manifests: list[dict[str, Any]]) -> list[str]:
    """What is said to a resumed run whose newest checkpoint has one of these manifests."""
    from training.loop import Training
    from training.recipe import load_recipe

    os.chdir(folder)
    init_distributed()
    recipe = load_recipe(ROOT / "launch/recipes/quickstart.yaml", [*SMALL, f"data={data}", "tracking.wandb=disabled"])
    said = []
    for manifest in manifests:
        write_manifest(Path("runs/run/checkpoints/step-6"), manifest)
        try:
            Training(recipe, "run", resume=True)
        except UserError as error:
            said.append(str(error))
    return said


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    text = json.dumps(manifest)
    (path / checkpoint_files.MANIFEST).write_text(text)
    (path / checkpoint_files.SEAL).write_text(xxhash.xxh3_128_hexdigest(text.encode()))


def test_a_checkpoint_of_another_run_is_refused_in_one_line(
    sample_corpus: Corpus, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "runs", tmp_path / "runs")
    manifest = checkpoint_files.read_manifest(tmp_path / "runs/run/checkpoints/step-6")
    optimizer = manifest["recipe"]["optimizer"] | {"lr": 0.5}
    others = [{"data": "x"}, {"tokenizer": "x"}, {"recipe": manifest["recipe"] | {"optimizer": optimizer, "seed": 7}},
              {"format": checkpoint_files.FORMAT + 1}]  # fmt: skip
    data = sample_corpus.folder.parent
    [said] = run_ranks(1, resume_others, tmp_path, data, [manifest | other for other in others])
    place, own = "runs/run/checkpoints/step-6", checkpoint_files.FORMAT
    assert said == [
        f"{place}: it was trained on another data set; give the --data that it was started with",
        f"{place}: it was trained on another tokenizer; give the --data that it was started with",
        f"{place} has another recipe (seed: was 7, now 1; optimizer.lr: was 0.5, now 0.001): give it as it was, "
        "or --allow-change seed --allow-change optimizer.lr",
        f"{place}: checkpoint format {own + 1}, this program reads {own}; use the newer one",
    ]


def test_a_changed_recipe_is_refused_unless_it_is_allowed(
    sample_corpus: Corpus, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "runs", tmp_path / "runs")
    changes = ["--resume", "steps=7", "optimizer.lr=5e-4", "tracking.wandb=disabled"]
    refused = train(sample_corpus, tmp_path, *changes)
    assert refused.returncode == 2 and refused.stderr.splitlines() == [
        "m6: runs/run has another recipe (optimizer.lr: was 0.001, now 0.0005): give it as it was, "
        "or --allow-change optimizer.lr"
    ]
    allowed = train(sample_corpus, tmp_path, *changes, "--allow-change", "optimizer.lr")
    assert allowed.returncode == 0, allowed.stderr
    assert lines(tmp_path / "runs/run")[-1]["step"] == 7
    assert yaml.safe_load((tmp_path / "runs/run/recipe.yaml").read_text())["optimizer"]["lr"] == 5e-4


def test_a_run_is_one_process_alone(sample_corpus: Corpus, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "runs", tmp_path / "runs")
    with lock_run(tmp_path / "runs" / "run"):
        refused = train(sample_corpus, tmp_path, "--resume", "steps=7", "tracking.wandb=disabled")
    assert refused.returncode == 2
    assert "another process is training there" in refused.stderr and "Traceback" not in refused.stderr


def test_a_diverged_run_stops_before_it_replaces_good_weights(sample_corpus: Corpus, tmp_path: Path) -> None:
    changes = ["optimizer.lr=1e18", "optimizer.clip=0", "schedule.warmup=0", "steps=20", "skips=3"]
    diverged = train(sample_corpus, tmp_path, *changes)
    assert diverged.returncode == 2
    run = tmp_path / "runs" / "run"
    skipped = [line for line in lines(run) if line.get("event") == "skipped step"]
    assert len(skipped) == 3 and skipped[0]["text"].startswith("the loss on rank 0, 1, not finite; positions ")
    step = skipped[-1]["step"]
    assert diverged.stderr.splitlines()[-1].startswith(
        f"m6: step {step}: the loss or the gradient was not finite in 3 steps in a row"
    )
    assert [line["skipped_steps"] for line in lines(run) if "loss" in line][-4:] == [0, 1, 2, 3]
    good = [path.name for path in (run / "checkpoints").glob("step-*")]
    assert all(int(name.removeprefix("step-")) <= step - 3 for name in good) and "Traceback" not in diverged.stderr


def test_a_killed_rank_is_one_line(sample_corpus: Corpus, tmp_path: Path) -> None:
    changes = ["steps=100000", "save_every=100000", "evaluation.every=100000", "evaluation.samples=0"]
    arguments = training(sample_corpus, *changes, "tracking.wandb=disabled")
    started = subprocess.Popen(
        command(*arguments), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        metrics, deadline = tmp_path / "runs" / "run" / "metrics.jsonl", time.monotonic() + 240
        while not (metrics.exists() and '"loss"' in metrics.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        family = psutil.Process(started.pid).children(recursive=True)
        next(process for process in family if process.environ().get("RANK") == "1").kill()
        _, errors = started.communicate(timeout=60)
    finally:
        started.terminate()
    assert started.returncode == 1
    what, way = said(errors)
    assert what == "m6: rank 1 was killed by SIGKILL; most likely memory ran out"
    again = r"m6 train --recipe runs/run/recipe\.yaml --name run --resume"
    assert re.fullmatch(rf"m6: {again} goes on after step \d+; with --supervise it does by itself", way)


def is_lost_peer(peer_stays: bool) -> bool:
    """On rank 0: whether the error of a collective, whose peer is gone or whose arguments are wrong, is a lost peer."""
    import torch
    import torch.distributed as dist

    from training.train import _lost_peer

    dist.init_process_group("gloo")
    dist.barrier()
    if dist.get_rank() and not peer_stays:
        dist.destroy_process_group()  # closes the connections, as the process' end does
        return False
    try:
        dist.all_gather_into_tensor(torch.zeros(5 if peer_stays else 2), torch.zeros(1))
    except RuntimeError as error:
        return _lost_peer(error)
    raise AssertionError("the collective succeeded")


@pytest.mark.parametrize("lost", [True, False])
def test_a_lost_peer_is_told_from_a_mistake_of_ours(lost: bool) -> None:
    assert run_ranks(2, is_lost_peer, not lost)[0] == lost


def test_a_damaged_corpus_is_refused_in_one_line(sample_corpus: Corpus, tmp_path: Path) -> None:
    copy = tmp_path / "data" / "corpus"
    shutil.copytree(sample_corpus.folder, copy)
    content = bytearray((copy / "features.npy").read_bytes())
    content[-1000] ^= 1
    (copy / "features.npy").write_bytes(content)
    recipe = str(ROOT / "launch" / "recipes" / "quickstart.yaml")
    refused = m6("train", "--recipe", recipe, "--name", "run", "--data", str(copy.parent), *SMALL, cwd=tmp_path)
    assert refused.returncode == 2
    assert said(refused.stderr) == [
        f"m6: {copy / 'features.npy'}: damaged; run `m6 data fetch` to build the corpus anew"
    ]
