"""Real training under the supervisor, asked to leave; `python -m benchmarks.kills` kills it."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from benchmarks.kills import command
from tests.training.test_train import said
from training import checkpoint_files
from training.data.corpus import Corpus

pytestmark = pytest.mark.timeout(600)


def test_a_supervised_training_saves_and_leaves_on_request(sample_corpus: Corpus, tmp_path: Path) -> None:
    started = subprocess.Popen(
        command(sample_corpus.folder.parent, "run", "--supervise", "steps=100000", "save_every=100000"),
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    run, deadline = tmp_path / "runs" / "run", time.monotonic() + 240
    try:
        while not ((run / "metrics.jsonl").exists() and '"loss"' in (run / "metrics.jsonl").read_text()):
            assert time.monotonic() < deadline and started.poll() is None
            time.sleep(0.1)
        started.send_signal(signal.SIGUSR1)
        errors = started.communicate(timeout=60)[1]
    finally:
        started.terminate()
    [step] = checkpoint_files.steps(run / "checkpoints")
    assert started.returncode == 75 and checkpoint_files.problems(run / "checkpoints" / f"step-{step}") == []
    assert said(errors) == [f"m6: stopped on request at step {step}, saved; go on with --resume"]
