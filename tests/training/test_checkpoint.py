"""A checkpoint loads on any layout, and training goes on as if it had not stopped."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.training import engine_ranks as ranks
from training import checkpoint
from training.data.corpus import Corpus
from training.errors import UserError
from training.machine import has_libaio

STEP, LAST = 4, 8
NVME = pytest.mark.skipif(not has_libaio(), reason="libaio's headers are not installed: no NVMe offload")


@pytest.fixture(scope="module")
def saved(sample_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A checkpoint that two ranks wrote (ep 2, CPU offload) at STEP, and how they went on to LAST."""
    folder, swap = tmp_path_factory.mktemp("checkpoints"), tmp_path_factory.mktemp("swap")
    ds = ranks.settings(ranks.CPU, 2)
    return folder, run_ranks(2, ranks.save_at, sample_corpus.folder.parent, swap, ds, folder, STEP, LAST)


def values(results: list[dict[str, Any]]) -> dict[str, bytes]:
    """Every state whole, from all ranks' parts."""
    parts: dict[str, dict[int, bytes]] = {}
    for result in results:
        for key, found in result["digests"].items():
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


def test_files_are_safetensors_and_a_manifest(saved: Any) -> None:
    names = {path.name for path in (saved[0] / f"step-{STEP}").iterdir()}
    assert checkpoint.MANIFEST in names
    assert all(name.endswith(".safetensors") for name in names - {checkpoint.MANIFEST})
    assert {path.name for path in saved[0].iterdir()} == {checkpoint.LATEST, f"step-{STEP}"}


def damaged(saved: Any, tmp_path: Path) -> Path:
    import shutil

    shutil.copytree(saved[0], tmp_path / "copy")
    return tmp_path / "copy"


def test_a_flipped_bit_is_refused_by_name(saved: Any, tmp_path: Path) -> None:
    folder = damaged(saved, tmp_path)
    victim = sorted((folder / f"step-{STEP}").glob("*.safetensors"))[0]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(UserError, match=victim.name):
        checkpoint.read_manifest(folder)


def test_a_newer_format_and_a_missing_checkpoint_are_refused(saved: Any, tmp_path: Path) -> None:
    folder = damaged(saved, tmp_path)
    path = folder / f"step-{STEP}" / checkpoint.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": checkpoint.FORMAT + 1}))
    with pytest.raises(UserError, match="format 2, this program reads 1"):
        checkpoint.read_manifest(folder)
    with pytest.raises(UserError, match="no checkpoint there"):
        checkpoint.read_manifest(tmp_path / "nowhere")


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(sample_corpus: Corpus, tmp_path: Path) -> None:
    """A file that may not grow fails like a full disk; the parameters alone need more than its 4 KiB."""
    folder, swap = tmp_path / "checkpoints", tmp_path / "swap"
    ds = ranks.settings(ranks.CPU, 2)
    results = run_ranks(2, ranks.save_without_space, sample_corpus.folder.parent, swap, ds, folder, 4096)
    for said, newest, as_it_was in results:
        assert said.startswith(f"{folder / 'step-2'}: cannot be written (") and "File too large" in said
        assert said.endswith("; the checkpoints before it are whole") and len(said.splitlines()) == 1
        assert (newest, as_it_was) == ("step-1", True)
    assert {path.name for path in folder.iterdir()} == {checkpoint.LATEST, "step-1"}
