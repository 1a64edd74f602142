"""A run that was asked to leave goes on as if it had not been."""

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.training.test_train import ROOT, SMALL, losses
from training.data.corpus import Corpus
from training.errors import LEFT
from training.records import read_lines
from training.start import init_distributed

pytestmark = pytest.mark.timeout(300)

# Two micro-batches a step; 12 batches and more an evaluation, before step 1 and after steps 3 and 6.
SETTINGS = [*SMALL, "tracking.wandb=disabled"]


def train_and_leave(folder: Path, data: Path) -> list[tuple[int, int]]:
    """One whole run, then another that rank 1 is asked to leave twice: exit code and step of each part of it."""
    from training import loop as program
    from training.recipe import load_recipe

    os.chdir(folder)
    init_distributed()
    recipe = load_recipe(ROOT / "launch/recipes/quickstart.yaml", [*SETTINGS, f"data={data}"])

    def part(name: str, resume: bool, stop_at: Callable[[Any], bool]) -> tuple[int, int]:
        training = program.Training(recipe, name, resume)
        go_on = training.engine.before_batch

        def before_batch() -> None:
            if stop_at(training) and training.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            go_on()

        training.engine.before_batch = before_batch
        code = training.run()
        training.close()
        if training.lock:
            training.lock.close()
        return code, training.step

    def at(place: Callable[[Any], bool], batch: int) -> Callable[[Any], bool]:
        """Whether this is the batch of that number (from 1) at a place."""
        seen = itertools.count(1)
        return lambda training: place(training) and next(seen) == batch

    return [
        part("whole", False, lambda _: False),
        part("left", False, at(lambda training: training.step == 1, 2)),  # of its two micro-batches
        part("left", True, at(lambda training: training.step == 3 and training.evaluation_due, 4)),
        part("left", True, lambda _: False),
    ]


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(run / "metrics.jsonl") if "loss/validation/caption" in line]


def test_a_run_left_in_a_step_and_in_an_evaluation_ends_as_if_it_had_not_been(
    sample_corpus: Corpus, tmp_path: Path
) -> None:
    parts = run_ranks(2, train_and_leave, tmp_path, sample_corpus.folder.parent)
    assert parts == [[(0, 6), (LEFT, 1), (LEFT, 3), (0, 6)]] * 2
    whole, left = tmp_path / "runs" / "whole", tmp_path / "runs" / "left"
    assert losses(left) == losses(whole)
    assert evaluations(left) == evaluations(whole)
    files = [json.loads((run / "checkpoints/step-6/manifest.json").read_text())["files"] for run in (left, whole)]
    assert files[0] == files[1]
    stops = [line["step"] for line in read_lines(left / "metrics.jsonl") if line.get("event") == "stopped"]
    assert stops == [1, 3]
