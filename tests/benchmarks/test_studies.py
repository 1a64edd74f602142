"""What a study consists of, that it goes on where it was, and its figures by hand. Nothing is trained here."""

import json
import math
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import studies
from benchmarks.studies import PSEUDO, REAL, STUDIES, TOP1, Laboratory
from benchmarks.study_results import Panel, Result, drawn, paired, tables
from model.config import PRESETS
from training.recipe import Recipe, load_recipe

LAYERS = 3


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_compares_and_draws_runs_that_it_has_and_that_can_be_trained(name: str) -> None:
    study = STUDIES[name]
    names = [one.name for one in study.contenders]
    assert len(set(names)) == len(names)
    assert {one for pair in study.comparisons for one in pair} <= set(names)
    assert {one for panel in study.panels for one in panel.runs} <= set(names)
    for one in study.contenders:
        load_recipe(studies.COMMON, list(one.changes))


def test_runs_of_one_name_are_the_same_run_in_all_studies() -> None:
    known: dict[str, studies.Contender] = {}
    for study in STUDIES.values():
        for one in study.contenders:
            assert known.setdefault(one.name, one) == one


def test_equal_active_flops() -> None:
    def flops(name: str) -> int:
        one = next(one for study in STUDIES.values() for one in study.contenders if one.name == name)
        recipe = load_recipe(studies.COMMON, list(one.changes))
        shape = recipe.model_shape()
        router = 6 * shape.layers * shape.hidden * shape.experts
        capacity = recipe.ds.get("m6", {}).get("capacity", "1x")
        used = 1 if capacity == "1x" or not shape.experts else shape.k
        return shape.training_flops(1, 0, shape.layers * used) - router

    assert flops("dense-1x") == flops(TOP1.name) == flops(REAL.name)
    assert flops("dense-2x") == flops("prototype2-kx")


def write_run(laboratory: Laboratory, contender: studies.Contender, lines: list[dict[str, Any]], steps: int) -> None:
    run = laboratory.run(contender, 1)
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"summary": {"steps": steps}}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_that_has_ended_is_passed_over_and_another_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def fail(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(studies.subprocess, "run", fail)
    laboratory = Laboratory(tmp_path, tmp_path / "data", 16)
    write_run(laboratory, TOP1, [], 16)
    laboratory.train(TOP1, 1)
    assert not commands
    for begun in (False, True):
        with pytest.raises(SystemExit, match="m6 train ended with 1"):
            laboratory.train(REAL, 1)
        assert ("--resume" in commands[-1]) == begun
        laboratory.run(REAL, 1).mkdir(exist_ok=True)
        (laboratory.run(REAL, 1) / "recipe.yaml").touch()


def test_what_is_to_be_delinked_is_trained_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(SystemExit, match=PSEUDO.name):
        Laboratory(tmp_path, tmp_path / "data", 16).train(studies.DELINKED[0], 1)


def test_differences_are_paired() -> None:
    mean, half = paired([3.0, 4.0, 8.0], [2.0, 2.0, 5.0])  # 1, 2, 3: deviation 1
    assert mean == pytest.approx(2)
    assert half == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(paired([1.0], [2.0])[1])
    with pytest.raises(ValueError, match="11 pairs"):
        paired([0.0] * 11, [0.0] * 11)


def lines_of(loss: float) -> list[dict[str, Any]]:
    """Sixteen steps, logged each second one: a second each in the first half, three in the second; one was held up."""
    lines: list[dict[str, Any]] = []
    for step in range(2, 17, 2):
        seconds = 50.0 if step == 4 else 1.0 if step <= 8 else 3.0
        load = {"moe/load_cv": 0.5, "moe/drop_rate": 0.75 if step <= 8 else 0.25}
        lines.append({"step": step, "loss": loss + 1, "tokens": 100 * step, "step_seconds": seconds, **load})
        if step % 8 == 0:
            lines.append({"step": step, "loss/validation/poem": loss, "loss/validation/caption": loss + 2 / step})
    return [{"step": 0, "loss/validation/poem": 9.0, "loss/validation/caption": 9.0}, *lines]


def test_figures_of_a_run() -> None:
    shape = PRESETS["m6-tiny"].config
    result = Result(lines_of(2.0), shape, shared=8)
    assert result.loss == pytest.approx(2 + 1 / 16)
    assert result.training_loss == 3.0
    assert [result.seconds(step) for step in (4, 8, 16)] == [4, 8, 32]
    # Half of the assignments were kept: one a token, of two.
    assert result.flops == shape.training_flops(1, 0, shape.layers)
    shared = Recipe.model_validate(
        {"model": {"preset": "m6-tiny", "share_layers": True}, "steps": 1, "global_batch": 1, "tasks": {"poem": 1}}
    ).model_shape()
    assert result.updates(16) == 8 * (shape.parameter_counts().total + shared.parameter_counts().total)


def test_tables_and_plots() -> None:
    shape = PRESETS["m6-tiny"].config
    results = {
        "a": [Result(lines_of(loss), shape) for loss in (2.0, 3.0)],
        "b": [Result(lines_of(loss), shape) for loss in (1.0, 2.0)],
    }
    text = tables(results, [("a", "b")])
    assert "| a | 2.562 ± 0.707 | 3.500 ± 0.707 |" in text
    assert "| a − b | +1.000 ± 0.000 | +1.000 ± 0.000 | +1.000 ± 0.000 | +1.000 ± 0.000 |" in text
    panels = [Panel("cv", "step", "load_cv", ("a",)), Panel("loss & more", "updates", "difference", ("a", "b"))]
    root = ElementTree.fromstring(drawn(panels, results))
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"cv", "loss & more", "a", "b"} <= set(words)
