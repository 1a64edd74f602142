"""The one checkpoint mechanism: flat slices in safetensors, written behind the training's back, verified, atomic.

A checkpoint loads on any number of ranks, any expert-parallel size and any offload tier (`training/states.py`), and
nothing in it is a pickle. It is written to a temporary folder, each file is flushed and read back against its checksum,
the manifest of checksums is added, the folder renamed, and only then does `latest` point at it.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from training import states
from training.checkpoint_files import (
    FORMAT,
    NewerFormat,
    Retention,
    checksum,
    commit,
    damage,
    make_room,
    prune,
    read_manifest,
    reading,
    steps,
)
from training.engine import Engine
from training.errors import UserError
from training.recipe import one_line, shown
from training.slices import Slice, SliceReader, SliceWriter
from training.snapshot import Snapshot
from training.tensor_files import SavedSlice, saved_slices

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What became of a save. `error` is empty if it is on the disk."""

    step: int
    error: str
    stall_seconds: float  # for which the training stood still
    write_seconds: float  # until all was on the disk, the stall included
    verify_seconds: float  # then, until it had been read back, and had its name
    bytes: int  # of all ranks' files


@dataclass(frozen=True)
class Found:
    """A verified checkpoint, and newer ones that were refused: a line each."""

    path: Path
    manifest: dict[str, Any]
    refused: list[str]


class Saver:
    """Saves state while training goes on, one save at a time. Construction and calls are collective."""

    def __init__(self, folder: Path, retention: Retention, buffer_bytes: int):
        """`buffer_bytes`: host memory a rank that a snapshot may take."""
        self.folder, self.retention, self.buffer_bytes = folder, retention, buffer_bytes
        self._group = dist.new_group(backend="gloo")  # the writing threads' own, beside the training's
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self._failure: BaseException | None = None

    def save(self, parts: list[states.Part], step: int, facts: dict[str, Any]) -> Outcome | None:
        """Copy this rank's state, begin to write it as `step-<step>`; waits for the save before, returns its outcome.

        `facts` go into the manifest as they are (JSON). When this returns, training may go on.
        """
        started = time.perf_counter()
        before = self.wait()
        snapshot = Snapshot(self.buffer_bytes)
        manifest = {"format": FORMAT, "step": step, **facts}
        slices = {part.key: Slice.of(part) for part in parts}
        stall: list[float] = []
        self._thread = threading.Thread(
            target=self._save, args=(slices, snapshot, manifest, started, stall), name="checkpoint"
        )
        self._thread.start()
        try:
            snapshot.fill(parts)
        except OSError as error:
            reason = one_line(str(error))
            raise UserError(f"the state cannot be read: {reason}; resume from the last checkpoint") from None
        finally:
            snapshot.end()
            stall.append(time.perf_counter() - started)
        return before

    def wait(self) -> Outcome | None:
        """The outcome of the save under way, when it has ended; None if there is none, or it was told before."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        if self._failure:
            raise self._failure
        return self._outcome

    def poll(self) -> Outcome | None:
        """As `wait`, but None where the save is still under way. Not collective: ranks may differ for a moment."""
        return self.wait() if self._thread and not self._thread.is_alive() else None

    def _save(
        self, slices: dict[str, Slice], snapshot: Snapshot, manifest: dict[str, Any], started: float, stall: list[float]
    ) -> None:
        size, error, written = 0, "", started
        try:
            size, written = self._write(slices, snapshot, manifest)
        except UserError as problem:
            error = str(problem)
        except BaseException as failure:
            self._failure = failure
        finally:
            snapshot.close()
        ended = time.perf_counter()
        times = stall[0] if stall else ended - started, written - started, ended - written
        self._outcome = Outcome(manifest["step"], error, *times, size)

    def _write(self, slices: dict[str, Slice], snapshot: Snapshot, manifest: dict[str, Any]) -> tuple[int, float]:
        """Size of all files in bytes, and when (on the performance counter) they were on the disk."""
        final = self.folder / f"step-{manifest['step']}"
        partial = self.folder / f".{final.name}.partial"
        try:
            self._on_first(lambda: make_room(partial))
            writer = SliceWriter(partial, snapshot)
            with _as_user_error():
                dcp.save(slices, storage_writer=writer, process_group=self._group)
            written = time.perf_counter()
            files = self._read_back(partial, writer.written)
            self._on_first(lambda: commit(partial, final, manifest | {"files": files}))
            self._on_first(lambda: prune(self.folder, self.retention))
        except UserError as error:
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"{final}: not saved ({error}); the checkpoints before it are whole") from None
        return sum(facts["bytes"] for facts in files.values()), written

    def _read_back(self, folder: Path, written: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """All ranks' files and checksums, after each rank has found its own on the disk as it wrote them."""
        error = ""
        try:
            for name, facts in written.items():
                if checksum(folder / name, from_disk=True) != facts:
                    error = f"{name} is not what was written: the disk is failing"
        except OSError as problem:
            error = str(problem)
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (error, written), group=self._group)
        _raise_first([error for error, _ in gathered])
        return {name: facts for _, own in gathered for name, facts in own.items()}

    def _on_first(self, action: Callable[[], None]) -> None:
        """Rank 0 acts; a failure of the file system there is raised on every rank."""
        told = [""]
        if dist.get_rank() == 0:
            try:
                action()
            except OSError as error:
                told = [one_line(str(error))]
        dist.broadcast_object_list(told, src=0, group=self._group)
        _raise_first(told)


@contextlib.contextmanager
def _as_user_error() -> Iterator[None]:
    """torch.distributed.checkpoint tells every rank of a failure on any; what the file system refused is a user's."""
    try:
        yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        if all(isinstance(cause, OSError) for cause in causes):
            raise UserError(one_line(str(causes[0]))) from None
        raise


def _raise_first(errors: list[str]) -> None:
    for error in errors:
        if error:
            raise UserError(error)


def newest(folder: Path) -> Found | None:
    """The newest checkpoint that verifies, its files checked by all ranks together; None where there is none at all.

    Collective. Raises UserError if there are checkpoints, and none verifies, or one is a newer version's.
    """
    candidates: list[Any] = [steps(folder)]
    dist.broadcast_object_list(candidates, src=0)
    refused: list[str] = []
    for step in reversed(candidates[0]):
        path = folder / f"step-{step}"
        try:
            manifest = read_manifest(path)
            problem = _damage_of_share(path, manifest["files"])
        except NewerFormat:
            raise
        except UserError as error:
            problem = str(error)
        problems = _gather(problem)
        if not any(problems):
            return Found(path, manifest, refused)
        refused.append(next(filter(None, problems)))
    if refused:
        raise UserError(f"{folder}: no checkpoint there is whole: {'; '.join(refused)}")
    return None


def _damage_of_share(path: Path, files: dict[str, dict[str, Any]]) -> str:
    own = sorted(files)[dist.get_rank() :: dist.get_world_size()]
    return next(filter(None, (damage(path, name, files[name]) for name in own)), "")


def _gather(value: T) -> list[T]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def load(engine: Engine, path: Path, manifest: dict[str, Any], blank_step: Callable[[], None]) -> None:
    """Read a checkpoint into an engine, new or in use, whatever layout wrote it. Collective.

    Raises UserError for another model's.

    `blank_step()` takes one optimizer step of zero gradients at learning rate 0. After the masters are set it
    brings DeepSpeed's own machinery to create the optimizer state and to renew the 16-bit working copies, on
    whichever tier they live.
    """
    reader, adam_step = SliceReader(str(path)), manifest.get("adam_step")
    if type(adam_step) is not int or not 0 <= adam_step <= manifest["step"]:
        raise UserError(f"{path}: adam_step {shown(adam_step)} is none of its {manifest['step']} steps")
    with reading(path):
        _check_model(engine, path, saved_slices(path, manifest["files"]))
        _read(engine, reader, (states.MASTER,), path)
        blank_step()
        if adam_step:
            _read(engine, reader, states.MOMENTS, path)
        else:
            states.clear_moments(engine)
    states.set_adam_step(engine, adam_step)


def _check_model(engine: Engine, path: Path, saved: dict[str, list[SavedSlice]]) -> None:
    own, suffix = states.lengths(engine), f".{states.MASTER}"
    there = {key.removesuffix(suffix): sum(p.numel for p in saved[key]) for key in saved if key.endswith(suffix)}
    for name in sorted(own.keys() | there.keys()):
        if own.get(name) != there.get(name):
            counts = f"{there.get(name, 0):,} values there, {own.get(name, 0):,} here"
            raise UserError(f"{path}: it is of another model ({shown(name)} has {counts})")


def _read(engine: Engine, reader: SliceReader, kinds: tuple[str, ...], path: Path) -> None:
    for parts in states.resident(engine, kinds):
        slices: dict[str, Any] = {part.key: Slice.of(part, view) for part, view in parts}
        try:
            dcp.load(slices, storage_reader=reader, no_dist=True)
        except (CheckpointException, ValueError, RuntimeError) as error:
            raise UserError(f"{path}: it is of another model ({one_line(str(error))[:200]})") from None
