"""A checkpoint loads on any layout, and training goes on as if it had not stopped."""

from pathlib import Path
from typing import Any

import pytest

from tests.marks import NVME
from tests.ranks import run_ranks
from tests.training import engine_ranks as ranks
from training.checkpoint_files import LATEST, MANIFEST, SEAL
from training.data.corpus import Corpus
from training.errors import UserError
from training.machine import has_libaio

STEP, LAST = 4, 8


@pytest.fixture(scope="module")
def saved(sample_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A checkpoint that two ranks wrote (ep 2, CPU offload) at STEP, and how they went on to LAST."""
    folder, swap = tmp_path_factory.mktemp("checkpoints"), tmp_path_factory.mktemp("swap")
    ds = ranks.settings(ranks.CPU, 2)
    return folder, run_ranks(2, ranks.save_at, sample_corpus.folder.parent, swap, ds, folder, STEP, LAST)


def values(results: list[dict[str, Any]], moment: str = "digests") -> dict[str, bytes]:
    """Every state whole, from all ranks' parts."""
    parts: dict[str, dict[int, bytes]] = {}
    for result in results:
        for key, found in result[moment].items():
            parts.setdefault(key, {}).update(found)
    return {key: b"".join(part for _, part in sorted(found.items())) for key, found in parts.items()}


def resume(sample_corpus: Corpus, saved: Any, swap: Path, world: int, tier: dict[str, Any], parallel: int) -> Any:
    ds = ranks.settings(tier, parallel)
    data = sample_corpus.folder.parent
    return run_ranks(world, ranks.load_and_train, data, swap, ds, saved[0], STEP, LAST)


def test_resume_on_the_same_layout_is_equal_to_the_bit(sample_corpus: Corpus, saved: Any, tmp_path: Path) -> None:
    results = resume(sample_corpus, saved, tmp_path, 2, ranks.CPU, 2)
    assert [result["losses"] for result in results] == [result["losses"] for result in saved[1]]
    assert values(results) == values(saved[1])


@pytest.mark.parametrize(
    ("world", "tier", "parallel"),
    [(2, ranks.CPU, 1), (1, ranks.CPU, 1), (2, ranks.NONE, 2), pytest.param(2, ranks.NVME, 2, marks=NVME)],
    ids=["ep1", "one rank", "device", "nvme"],
)
def test_resume_on_another_layout(
    sample_corpus: Corpus, saved: Any, tmp_path: Path, world: int, tier: dict[str, Any], parallel: int
) -> None:
    results = resume(sample_corpus, saved, tmp_path, world, tier, parallel)
    assert values(results) == values(saved[1])  # masters and moments to the bit
    losses, before = results[0]["losses"], saved[1][0]["losses"]
    assert losses == [pytest.approx(pair, rel=1e-5) for pair in before]


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"layers": 1}, r"another model \('layers.1.*' has [\d,]+ values there, 0 here\)"),
        ({"ffn": 128}, r"another model \('layers.0.*' has ([\d,]+) values there, (?!\1)[\d,]+ here\)"),
    ],
    ids=["layers", "sizes"],
)
def test_another_models_is_refused(
    sample_corpus: Corpus, saved: Any, tmp_path: Path, shape: dict[str, int], said: str
) -> None:
    changes = {"model": ranks.MODEL | shape}
    ds, data = ranks.settings(ranks.CPU, 1), sample_corpus.folder.parent
    with pytest.raises(UserError, match=said):
        run_ranks(1, ranks.load_and_train, data, tmp_path, ds, saved[0], STEP, STEP, changes)


def test_files_are_safetensors_and_a_sealed_manifest(saved: Any) -> None:
    names = {path.name for path in (saved[0] / f"step-{STEP}").iterdir()}
    assert names == {
        "rank-00000.safetensors",
        "rank-00001.safetensors",
        MANIFEST,
        SEAL,
    }
    assert {path.name for path in saved[0].iterdir()} == {LATEST, f"step-{STEP}"}


@NVME
def test_what_is_written_is_the_state_at_the_call(sample_corpus: Corpus, tmp_path: Path) -> None:
    """From swap files, through the smallest buffer, while training changes the state: what is read back was there."""
    folder, data = tmp_path / "checkpoints", sample_corpus.folder.parent
    ds = ranks.settings(ranks.NVME, 2)
    saved = run_ranks(2, ranks.save_at, data, tmp_path / "swap", ds, folder, STEP, LAST, 1)
    loaded = run_ranks(2, ranks.load_and_train, data, tmp_path / "swap", ds, folder, STEP, LAST)
    assert values(loaded) == values(saved)
    assert [result["losses"] for result in loaded] == [result["losses"] for result in saved]


def test_four_ranks_to_two_to_one_to_four(sample_corpus: Corpus, tmp_path: Path) -> None:
    """Each leg elsewhere, with other experts a rank: it begins with the very state that the one before left."""
    data, batch = sample_corpus.folder.parent, ranks.RECIPE["global_batch"]
    small = {"model": ranks.MODEL | {"ffn": 128}}
    disk = ranks.NVME if has_libaio() else ranks.CPU
    left, seen = None, []
    legs = [(4, ranks.NONE, 4), (2, disk, 2), (1, ranks.CPU, 1), (4, disk, 2)]
    for last, (world, tier, parallel) in enumerate(legs, 1):
        places = data, tmp_path / "swap", ranks.settings(tier, parallel), tmp_path / "checkpoints"
        leg = run_ranks(world, ranks.go_on, *places, last, small)
        if left:
            assert values(leg, "arrived") == left
        left = values(leg, "left")
        seen += [position for result in leg for position in result["positions"]]
        assert len(list((tmp_path / "checkpoints").glob(f"step-{last}/*.safetensors"))) == world
    assert sorted(seen) == list(range(4 * batch))  # every sample once
