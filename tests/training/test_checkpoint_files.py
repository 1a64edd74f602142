"""What befalls a checkpoint's files on the disk: damage, pruning, saves that fail. The state is made up, and small."""

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ranks import run_ranks
from training import checkpoint, checkpoint_files
from training.checkpoint import Outcome, Saver
from training.checkpoint_files import Retention
from training.errors import UserError
from training.states import Part

NUMBERS, STATES = 5001, 3  # elements of each state, which no rank count divides


def parts(step: int) -> list[Part]:
    """This rank's share of the made-up state at a step."""
    rank, world = dist.get_rank(), dist.get_world_size()
    share = -(-NUMBERS // world)
    values = torch.arange(NUMBERS, dtype=torch.float32) + step * NUMBERS
    own = values[rank * share :][:share]
    return [Part(f"layer.{n}.master", rank * share, len(own), NUMBERS, own + n) for n in range(STATES)]


def save(saver: Saver, *steps: int) -> list[Outcome]:
    told = [saver.save(parts(step), step, {"position": step}) for step in steps]
    return [outcome for outcome in (*told, saver.wait()) if outcome]


def save_on_ranks(folder: Path, steps: list[int], newest: int, every: int) -> list[Outcome]:
    dist.init_process_group("gloo")
    return save(Saver(folder, Retention(newest, every), 2**24), *steps)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Path]:
    """A process group of this process, and an empty folder."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield tmp_path / "checkpoints"
    dist.destroy_process_group()


@pytest.fixture
def three(alone: Path) -> Path:
    """Checkpoints at the steps 1, 2 and 3."""
    save(Saver(alone, Retention(3), 2**24), 1, 2, 3)
    return alone


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_two_ranks_write_each_its_own_file(tmp_path: Path) -> None:
    first, second = run_ranks(2, save_on_ranks, tmp_path / "c", [1, 2], 1, 0)
    assert [outcome.step for outcome in first] == [1, 2] and not any(outcome.error for outcome in first + second)
    assert names(tmp_path / "c") == {"latest", "step-2"}
    assert names(tmp_path / "c" / "step-2") == {
        "rank-00000.safetensors", "rank-00001.safetensors", "manifest.json", "manifest.json.xxh3"
    }  # fmt: skip
    assert first[0].bytes == sum(path.stat().st_size for path in (tmp_path / "c/step-2").glob("*.safetensors"))


def test_the_newest_whole_one_is_taken_and_what_was_refused_is_told(three: Path) -> None:
    (three / "step-3" / "rank-00000.safetensors").unlink()
    found = checkpoint.newest(three)
    assert found is not None and found.path.name == "step-2" and found.manifest["position"] == 2
    assert found.refused == [f"{three}/step-3/rank-00000.safetensors: No such file or directory"]


def test_nothing_whole_is_an_error_and_nothing_at_all_is_not(three: Path) -> None:
    for manifest in three.glob("*/manifest.json"):
        manifest.unlink()
    with pytest.raises(UserError, match=r"no checkpoint there is whole: .*step-3/manifest.json: missing"):
        checkpoint.newest(three)
    assert checkpoint.newest(three / "nowhere") is None


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "manifest.json", "manifest.json.xxh3"])
def test_any_flipped_bit_is_found_in_the_named_file(three: Path, name: str) -> None:
    """A short form of `python -m benchmarks.corruption`."""
    path = three / "step-3"
    whole = (path / name).read_bytes()
    for bit in random.Random(name).sample(range(8 * len(whole)), 60):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (path / name).write_bytes(flipped)
        assert name.removesuffix(".xxh3") in "; ".join(checkpoint_files.problems(path)), bit
    (path / name).write_bytes(whole)
    assert checkpoint_files.problems(path) == []


@settings(deadline=None, derandomize=True)
@given(keep=st.floats(0, 1, exclude_max=True), name=st.sampled_from(["rank-00000.safetensors", "manifest.json"]))
def test_any_truncation_is_found(tmp_path_factory: pytest.TempPathFactory, keep: float, name: str) -> None:
    path = truncated_copy(tmp_path_factory)
    whole = (path / name).read_bytes()
    os.truncate(path / name, int(keep * len(whole)))
    found = checkpoint_files.problems(path)
    (path / name).write_bytes(whole)
    assert len(found) == 1 and name in found[0]


_made: list[Path] = []


def truncated_copy(factory: pytest.TempPathFactory) -> Path:
    """One checkpoint for all examples."""
    if not _made:
        folder = factory.mktemp("truncation")
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        save(Saver(folder / "c", Retention(1), 2**24), 1)
        dist.destroy_process_group()
        _made.append(folder / "c" / "step-1")
    return _made[0]


def test_retention_keeps_the_newest_and_every_nth(alone: Path) -> None:
    save(Saver(alone, Retention(2, every=3), 2**24), *range(1, 9))
    assert checkpoint_files.steps(alone) == [3, 6, 7, 8]
    assert (alone / "latest").read_text().startswith("step-8 ")


def test_what_is_being_read_is_not_pruned(three: Path) -> None:
    saver = Saver(three, Retention(1), 2**24)
    with checkpoint_files.reading(three / "step-1"):
        save(saver, 4)
        assert checkpoint_files.steps(three) == [1, 4]
    save(saver, 5)
    assert checkpoint_files.steps(three) == [5]


def test_remains_of_a_save_that_was_cut_off_are_no_checkpoint_and_go(three: Path) -> None:
    shutil.copytree(three / "step-3", three / ".step-4.partial")
    shutil.copytree(three / "step-1", three / ".step-0.removed")
    found = checkpoint.newest(three)
    assert found is not None and found.path.name == "step-3"
    save(Saver(three, Retention(9), 2**24), 4)
    assert names(three) == {"latest", "step-1", "step-2", "step-3", "step-4"}


def test_a_future_that_was_given_up_is_out_of_sight(three: Path) -> None:
    checkpoint_files.set_aside_after(three, 1)
    found = checkpoint.newest(three)
    assert found is not None and found.path.name == "step-1"
    saver = Saver(three, Retention(9), 2**24)
    save(saver, 2)
    assert names(three) == {"latest", "step-1", "step-2", ".step-3.aside"}  # until training has come as far again
    save(saver, 3)
    assert names(three) == {"latest", "step-1", "step-2", "step-3"}


def test_older_ones_that_cannot_be_removed_are_a_remark_and_no_failure(
    three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, where a file that somebody reads leaves another behind."""
    remove = shutil.rmtree

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if path.name == ".step-1.removed" and not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        if path.name != ".step-1.removed":
            remove(path, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", busy)
    saver = Saver(three, Retention(1), 2**24)
    for step in (4, 5):
        (outcome,) = save(saver, step)
        assert outcome.error == "" and checkpoint_files.steps(three)[-1] == step
        assert ("Directory not empty" in outcome.warning) == (step == 4)
    assert checkpoint_files.steps(three) == [5]


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond `size` fails as on a full disk, with an OSError; whoever runs this, root included."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 100, 30_000])
def test_a_full_disk_leaves_the_checkpoints_before_and_no_remains(three: Path, size: int) -> None:
    before = {path: path.read_bytes() for path in three.rglob("*") if path.is_file()}
    saver = Saver(three, Retention(1), 2**24)
    with largest_file(size):
        (outcome,) = save(saver, 4)
    assert "step-4: not saved ([Errno 27] File too large" in outcome.error
    assert before == {path: path.read_bytes() for path in three.rglob("*") if path.is_file()}
    (outcome,) = save(saver, 5)  # there is room again
    assert not outcome.error and checkpoint_files.steps(three) == [5]


def test_a_disk_that_is_full_on_one_rank_is_told_on_all(tmp_path: Path) -> None:
    outcomes = run_ranks(2, save_with_one_full_disk, tmp_path / "c")
    assert [len(each) for each in outcomes] == [1, 1]
    assert all("not saved" in each[0].error for each in outcomes)
    assert list((tmp_path / "c").iterdir()) == []


def save_with_one_full_disk(folder: Path) -> list[Outcome]:
    dist.init_process_group("gloo")
    saver = Saver(folder, Retention(1), 2**24)
    with largest_file(100) if dist.get_rank() else contextlib.nullcontext():
        return save(saver, 1)


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path: Path, alone: Path) -> None:
    alone.write_text("a file is where the folder should be")
    (outcome,) = save(Saver(alone, Retention(1), 2**24), 1)
    assert "not saved" in outcome.error and alone.read_text()


def test_a_newer_format_is_refused(three: Path) -> None:
    newer = checkpoint_files.FORMAT + 1
    manifest = three / "step-3" / "manifest.json"
    text = json.dumps(json.loads(manifest.read_text()) | {"format": newer})
    manifest.write_text(text)
    (three / "step-3" / checkpoint_files.SEAL).write_text(xxhash.xxh3_128_hexdigest(text.encode()))
    for read in (lambda: checkpoint_files.read_manifest(three / "step-3"), lambda: checkpoint.newest(three)):
        with pytest.raises(UserError, match=rf"step-3: checkpoint format {newer}, this program reads"):
            read()


def test_names_that_no_save_gives_are_passed_over_and_stay(three: Path) -> None:
    for name in ("step-0050", "step-٣", "step-7b"):
        (three / name).mkdir()
    assert checkpoint_files.steps(three) == [1, 2, 3]
    (outcome,) = save(Saver(three, Retention(1), 2**24), 4)
    assert (outcome.error, outcome.warning) == ("", "") and checkpoint_files.steps(three) == [4]
    assert (three / "step-0050").is_dir()


def test_a_latest_that_cannot_be_written_keeps_nothing_from_being_pruned(three: Path) -> None:
    (three / "latest").unlink()
    (three / "latest").mkdir()
    (outcome,) = save(Saver(three, Retention(1), 2**24), 4)
    assert outcome.error == "" and outcome.warning.startswith("`latest` could not be written (")
    assert checkpoint_files.steps(three) == [4]


def test_a_folder_that_is_no_checkpoint_is_passed_over(three: Path) -> None:
    (three / "step-7").mkdir()
    (three / "step-7" / "notes.txt").write_text("mine")
    (three / "step-8").write_text("a file")
    found = checkpoint.newest(three)
    assert found is not None and found.path.name == "step-3"
    assert found.refused[1] == f"{three}/step-7/manifest.json: missing"
    assert "step-8" in found.refused[0] and "cannot be read" in found.refused[0]
