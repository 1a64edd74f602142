"""Bad steps: skipped on all ranks together, or given up with the steps before them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.marks import NVME
from tests.ranks import run_ranks
from tests.training import bad_steps
from tests.training import engine_ranks as ranks
from training.data.corpus import Corpus
from training.errors import UserError
from training.recipe import Spike
from training.safeguard import Safeguard

pytestmark = pytest.mark.timeout(300)
RULE = Spike(factor=2, window=3, after=4)

RUN = [
    "model.layers=2", "model.hidden=64", "model.ffn=128", "model.experts=8", "model.text_vocab=540",
    "global_batch=16", "ds.train_micro_batch_size_per_gpu=4", "text_positions=64", "steps=8", "save_every=2",
    "evaluation.every=4", "evaluation.rows=8", "evaluation.samples=0", "schedule.warmup=2", "tracking.log_every=1",
    "schedule.decay=constant", "tracking.wandb=disabled", "spike.factor=3", "spike.window=4", "spike.after=1",
    "spike.rollbacks=2",
]  # fmt: skip


@pytest.mark.parametrize(
    ("tier", "parallel", "block"),
    [
        (ranks.NONE, 1, {}),
        (ranks.CPU, 2, {"bf16": True}),
        (ranks.CPU, 2, {"bf16": True, "optimizer_states": "8-bit"}),
        pytest.param(ranks.NVME, 2, {}, marks=NVME),
    ],
    ids=["device-ep1", "cpu-ep2-bf16", "cpu-ep2-8-bit", "nvme-ep2"],
)
def test_a_skipped_step_leaves_no_trace_but_its_count(
    sample_corpus: Corpus, tmp_path: Path, tier: dict[str, Any], parallel: int, block: dict[str, Any]
) -> None:
    # Under NVMe offload DeepSpeed writes an expert's gradient of this size to the disk.
    changes = {"model": ranks.MODEL | {"ffn": 2304 if tier is ranks.NVME else 256}}
    ds, data = ranks.settings(tier, parallel, **block), sample_corpus.folder.parent
    results = run_ranks(2, bad_steps.skip_and_train, data, tmp_path / "swap", ds, changes, tmp_path / "checkpoints")
    for result in results:
        holder = parallel - 1  # of rank 1's first expert; without expert parallelism its gradient is rank 0's to keep
        gradient = f"the gradient of {result['weight']} on rank {holder}"
        assert result["told"] == ["the loss on rank 1", "the loss on rank 1", gradient]
        assert result["unchanged"] and result["states"]
        assert result["losses"][0] == result["losses"][1]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps(run: Path) -> list[tuple[int, int, float]]:
    return [(line["step"], line["position"], line["loss"]) for line in lines(run) if "loss" in line]


def events(run: Path, kind: str) -> list[tuple[int, str]]:
    return [(line["step"], line["text"]) for line in lines(run) if line.get("event") == kind]


def test_a_spike_takes_the_run_back_and_past_what_it_saw(sample_corpus: Corpus, tmp_path: Path) -> None:
    data, run = sample_corpus.folder.parent, tmp_path / "runs" / "run"
    run_ranks(2, bad_steps.train_with_spikes, tmp_path, data, False, RUN, {1: 100.0, 5: 100.0})
    whole = steps(run)
    assert [step for step, _, _ in whole] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [position for _, position, _ in whole] == [16 * place for place in (1, 2, 3, 4, 7, 8, 9, 10)]
    assert all(loss < 12 for step, _, loss in whole if step != 2)
    [(step, text)] = events(run, "loss spike")
    assert step == 2 and text.endswith("; there is no checkpoint to go back to")
    [(step, text)] = events(run, "rolled back")
    assert step == 4 and "at step 6, over 3 times the usual" in text
    assert text.endswith("; positions 64 to 95 are passed over; rollback 1 of 2")
    assert [line["step"] for line in lines(run) if "loss/validation/poem" in line] == [0, 4, 8]

    # Resumed before its last two steps it takes them again, to the bit, and goes on to where every step spikes.
    shutil.rmtree(run / "checkpoints" / "step-8")
    spikes = dict.fromkeys(range(11, 30), 100.0)
    with pytest.raises(UserError) as error:
        run_ranks(2, bad_steps.train_with_spikes, tmp_path, data, True, [*RUN, "steps=12"], spikes)
    said = str(error.value)
    assert said.startswith("step 9: loss ") and "after 2 rollbacks (spike.rollbacks)" in said
    assert "go on from runs/run/checkpoints/step-8 with a lower optimizer.lr" in said and "\n" not in said
    assert steps(run)[:8] == whole
    _, second = events(run, "rolled back")
    assert second[0] == 8 and second[1].endswith("; positions 160 to 191 are passed over; rollback 2 of 2")


def test_the_rule_compares_with_the_median_of_the_last_good_steps() -> None:
    guard = Safeguard()
    for loss in (9.0, 5.0, 4.0, 3.0):
        guard.accept(loss, RULE)
    assert guard.losses == [5.0, 4.0, 3.0] and guard.usual_loss() == 4.0
    assert guard.spikes(5, 8.1, RULE) and not guard.spikes(5, 8.0, RULE)
    assert not guard.spikes(4, 100.0, RULE)  # too early
    assert not guard.spikes(5, 100.0, Spike())  # off, as it is by default
    assert not Safeguard().spikes(5, 100.0, RULE)  # nothing to compare with


def test_every_position_is_seen_once_or_passed_over() -> None:
    """Through spikes at several steps, some twice after the same checkpoint, and with restarts from checkpoints."""
    guard, saved, step, seen, given_up = Safeguard(), (0, Safeguard().state()), 0, [], []
    for spike in (False, True, False, False, True, True, False, True, False, False):
        place = guard.place(step)
        step += 1
        seen.append(place)
        if spike:
            guard = guard.back_to(saved[1], step - saved[0])
            given_up += seen[len(seen) - (step - saved[0]) :]
            del seen[len(seen) - (step - saved[0]) :]
            step = saved[0]
        elif step % 2 == 0:
            saved = step, json.loads(json.dumps(guard.state()))
            guard = Safeguard(**saved[1])
    assert guard.rollbacks == 4 and guard.passed_over == len(given_up)
    assert sorted(seen + given_up) == list(range(10)) and guard.place(step) == 10


def test_skipped_steps_are_counted_in_all_and_in_a_row() -> None:
    guard = Safeguard()
    for skipped in (True, True, False, True):
        guard.skip() if skipped else guard.accept(1.0, RULE)
    assert (guard.skipped, guard.skipped_in_a_row) == (3, 1)
    assert Safeguard(**json.loads(json.dumps(guard.state()))) == guard
