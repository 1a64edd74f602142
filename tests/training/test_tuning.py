"""Fine-tuning under the engine: what is frozen, what has states, and that neither depends on where anything lives."""

from pathlib import Path
from typing import Any

import pytest
import torch

from launch.checkpoints import export_run
from model.parts import ADAPTERS, part_of
from tests.marks import NVME
from tests.ranks import run_ranks
from tests.training import engine_ranks as ranks
from training.data.corpus import Corpus
from training.export import load_checkpoint, load_exported
from training.machine import has_libaio

STEP, LAST = 2, 4
TOLERANCE = 1e-5  # as of tests/training/test_engine.py
ADAPTED = {"tune": {"adapter_rank": 4, "parts": ["norms"]}}
SOME = {"tune": {"parts": ["routers", "attention"]}}
MIXED = {
    "parameters": {"device": "0", "nvme": "1", "cpu": "outside"}, "optimizer": {"device": "outside", "cpu": "0-1"}
}  # fmt: skip

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def parent(sample_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of all weights, written by two ranks with two sets of experts (ep 2)."""
    folder = tmp_path_factory.mktemp("parent")
    ds, data = ranks.settings(ranks.NONE, 2), sample_corpus.folder.parent
    run_ranks(2, ranks.train_parent, data, folder, ds, {}, 2)
    return folder / "checkpoints" / "step-2"


def tuned(
    corpus: Corpus, parent: Path, folder: Path, world: int, ds: dict[str, Any], changes: dict[str, Any], *steps: int
) -> list[dict[str, Any]]:
    return run_ranks(world, ranks.fine_tune, corpus.folder.parent, parent, folder, ds, changes, steps)


def values(results: list[dict[str, Any]], moment: str) -> dict[str, bytes]:
    """Every state whole, from all ranks' parts."""
    parts: dict[str, dict[int, bytes]] = {}
    for result in results:
        for key, found in result[moment].items():
            parts.setdefault(key, {}).update(found)
    return {key: b"".join(part for _, part in sorted(found.items())) for key, found in parts.items()}


def agree(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    return one[0]["losses"] == [pytest.approx(pair, rel=TOLERANCE) for pair in other[0]["losses"]]


@pytest.fixture(scope="module")
def adapted(sample_corpus: Corpus, parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Adapters on two ranks, ep 2, with CPU offload; saved at STEP and at LAST."""
    folder = tmp_path_factory.mktemp("adapted")
    return folder, tuned(sample_corpus, parent, folder, 2, ranks.settings(ranks.CPU, 2), ADAPTED, STEP, LAST)


def test_what_is_frozen_stays_to_the_bit_and_has_no_states(adapted: Any) -> None:
    _, results = adapted
    before, after = values(results, "arrived"), values(results, "left")
    for key in after:
        name, _, kind = key.rpartition(".")
        trained = part_of(name) in (ADAPTERS, "norms")
        assert trained or kind == "master", f"{name} is frozen, and has {kind}"
        assert not trained or f"{name}.exp_avg_sq" in after
        assert kind != "master" or (before[key] != after[key]) == trained, name
    for result in results:
        assert result["bytes"] == result["said"]  # 12 bytes more of what is trained, and nothing of the rest
        assert result["bytes"]["cpu"]["optimizer"] < result["bytes"]["cpu"]["parameters"] / 5


def test_one_rank_without_offload_learns_the_same(
    sample_corpus: Corpus, parent: Path, adapted: Any, tmp_path: Path
) -> None:
    alone = tuned(sample_corpus, parent, tmp_path, 1, ranks.settings(ranks.NONE, 1), ADAPTED, LAST)
    assert agree(alone, adapted[1])
    assert (
        values(alone, "arrived")["vocabulary.weight.master"]
        == values(adapted[1], "arrived")["vocabulary.weight.master"]
    )
    again = tuned(
        sample_corpus, parent, tmp_path / "again", 2, ranks.settings(ranks.CPU, 1, recompute=True), ADAPTED, LAST
    )
    assert agree(again, alone)


@pytest.mark.parametrize("tier", [ranks.CPU, pytest.param(ranks.NVME, marks=NVME)], ids=["cpu", "nvme"])
def test_going_on_is_as_if_it_had_not_stopped(
    sample_corpus: Corpus, parent: Path, adapted: Any, tmp_path: Path, tier: dict[str, Any]
) -> None:
    """Where it was, or with all of it on a disk: to the bit."""
    folder, results = adapted
    keep_alone(folder, tmp_path)
    resumed = tuned(sample_corpus, parent, tmp_path, 2, ranks.settings(tier, 2), ADAPTED, LAST)
    assert [result["losses"] for result in resumed] == [results[0]["losses"][STEP:]] * 2
    assert values(resumed, "left") == values(results, "left")


def keep_alone(run: Path, other: Path) -> None:
    """Let another run have the checkpoint of STEP."""
    (other / "checkpoints").mkdir(parents=True)
    (other / "checkpoints" / f"step-{STEP}").symlink_to(run / "checkpoints" / f"step-{STEP}")


def tier_of(result: dict[str, Any]) -> dict[str, int]:
    return {tier: sum(kinds.values()) for tier, kinds in result["bytes"].items()}


@NVME
def test_frozen_layers_live_where_they_are_told_to(
    sample_corpus: Corpus, parent: Path, adapted: Any, tmp_path: Path
) -> None:
    """A layer on the device, one on the disk, the rest in memory: as in one place, to the bit where the tier is one."""
    ds = ranks.settings({}, 2, offload=MIXED)
    mixed = tuned(sample_corpus, parent, tmp_path / "mixed", 2, ds, ADAPTED, STEP)
    assert agree(mixed, [{"losses": adapted[1][0]["losses"][:STEP]}])
    for result in mixed:
        held = tier_of(result)
        assert held["device"] > 0.3 * held["cpu"] > 0
        assert result["bytes"]["device"]["parameters"] == result["said"]["device"]["parameters"]


def test_8_bit_states_are_of_what_is_trained_alone(sample_corpus: Corpus, parent: Path, tmp_path: Path) -> None:
    tiers = {"offload_param": {"device": "nvme" if has_libaio() else "cpu"}, "offload_optimizer": {"device": "cpu"}}
    ds = ranks.settings(tiers, 2, bf16=True, optimizer_states="8-bit")
    compact = tuned(sample_corpus, parent, tmp_path, 2, ds, ADAPTED, STEP, LAST)
    before, after = values(compact, "arrived"), values(compact, "left")
    changed = {part_of(key) for key in after if key.endswith(".master") and before[key] != after[key]}
    assert changed == {ADAPTERS, "norms"}
    assert {part_of(key) for key in after if not key.endswith(".master")} == changed
    for result in compact:  # blocks' tops are in none of the plan's 7 bytes
        held, said = (result[name]["cpu"]["optimizer"] for name in ("bytes", "said"))
        assert held == pytest.approx(said, rel=0.01)
    keep_alone(tmp_path, tmp_path / "again")
    resumed = tuned(sample_corpus, parent, tmp_path / "again", 2, ds, ADAPTED, LAST)
    assert values(resumed, "left") == after


def test_some_parts_of_shared_layers_learn_alone(sample_corpus: Corpus, tmp_path: Path) -> None:
    """Of one physical layer that is called for all, and recomputed; the rest of it stays as it was."""
    shared, ds = {"model": ranks.MODEL | {"share_layers": True}}, ranks.settings(ranks.NONE, 1)
    run_ranks(1, ranks.train_parent, sample_corpus.folder.parent, tmp_path / "parent", ds, shared, 1)
    begun = tmp_path / "parent" / "checkpoints" / "step-1"
    ds = ranks.settings(ranks.CPU, 2, recompute=True)
    results = tuned(sample_corpus, begun, tmp_path / "child", 2, ds, SOME, STEP)
    before, after = values(results, "arrived"), values(results, "left")
    assert {part_of(key) for key in before if before[key] != after[key]} == {"routers", "attention"}


def test_weights_with_adapters_are_exported_loaded_and_built_on_merged(
    sample_corpus: Corpus, parent: Path, adapted: Any, tmp_path: Path
) -> None:
    folder, results = adapted
    export_run(str(folder), target=tmp_path / "fp32", dtype="fp32")
    exported, (loaded, _, _) = (
        load_exported(tmp_path / "fp32"),
        load_checkpoint(folder / "checkpoints" / f"step-{LAST}"),
    )
    assert exported.config.adapter_rank == 0
    for result in results:
        for plain in (exported, loaded):
            with torch.no_grad():
                said = plain(result["batch"])["logits_BV"]
            torch.testing.assert_close(said, result["logits"], rtol=1e-4, atol=1e-5)
    # Another run that starts from there begins with those weights, whatever its own layout.
    child = tuned(sample_corpus, folder / "checkpoints" / f"step-{LAST}", tmp_path / "child", 1,
                  ranks.settings(ranks.NONE, 1), SOME, 1)  # fmt: skip
    begun, own = values(child, "arrived"), dict(exported.named_parameters())
    assert begun.keys() == {f"{name}.master" for name in own}
    for name, weight in own.items():
        found = torch.frombuffer(bytearray(begun[f"{name}.master"]), dtype=torch.float32)
        torch.testing.assert_close(found.view(weight.shape), weight, rtol=1e-6, atol=1e-7)
