"""The one checkpoint mechanism: flat slices in safetensors, written behind the training's back, verified, atomic.

A checkpoint loads on any number of ranks, any expert-parallel size and any offload tier (`training/states.py`), and
nothing in it is a pickle. It is written to a temporary folder, each file is flushed and read back against its checksum,
the manifest of checksums is added, the folder renamed, and only then does `latest` point at it.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from training import delink as delinking
from training import states
from training.checkpoint_files import (
    FORMAT,
    NewerFormat,
    Retention,
    checksum,
    commit,
    damage,
    make_room,
    point_at,
    prune,
    read_manifest,
    reading,
    steps,
)
from training.engine import Engine
from training.errors import RestartableError, UserError
from training.parent import Parent
from training.recipe import Recipe, one_line, shown
from training.slices import Slice, SliceReader, SliceWriter
from training.snapshot import Snapshot
from training.start import PATIENCE
from training.tensor_files import SavedSlice, saved_slices
from training.weights import CHUNK, SavedWeights

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What became of a save. `error` is empty if it is on the disk."""

    step: int
    error: str
    warning: str  # what went wrong after it was on the disk
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

    def __init__(
        self, folder: Path, retention: Retention, buffer_bytes: int, get_on: Callable[[], object] = lambda: None
    ):
        """`buffer_bytes`: host memory a rank that a snapshot may take. `get_on` is called after each piece written."""
        self.folder, self.retention, self.buffer_bytes = folder, retention, buffer_bytes
        self._get_on = get_on
        # The writing threads' own, beside the training's.
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
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
            raise RestartableError(f"the state cannot be read: {reason}; resume from the last checkpoint") from None
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
        size, error, warning, written = 0, "", "", started
        snapshot.await_turn()
        try:
            size, written, warning = self._write(slices, snapshot, manifest)
        except UserError as problem:
            error = str(problem)
        except BaseException as failure:
            self._failure = failure
        finally:
            snapshot.close()
        ended = time.perf_counter()
        times = stall[0] if stall else ended - started, written - started, ended - written
        self._outcome = Outcome(manifest["step"], error, warning, *times, size)

    def _write(self, slices: dict[str, Slice], snapshot: Snapshot, manifest: dict[str, Any]) -> tuple[int, float, str]:
        """Size of all files in bytes, when (performance counter) they were on the disk, and what went wrong later."""
        final = self.folder / f"step-{manifest['step']}"
        partial = self.folder / f".{final.name}.partial"
        try:
            on_first_rank(lambda: make_room(partial), self._group)
            own, error = self._write_own(partial, slices, snapshot)
            written = time.perf_counter()
            files = self._read_back(partial, own, error)
            on_first_rank(lambda: commit(partial, final, manifest | {"files": files}), self._group)
        except UserError as problem:
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"{final}: not saved ({problem}); the checkpoints before it are whole") from None
        size = sum(facts["bytes"] for facts in files.values())
        return size, written, self._tidy(final)

    def _tidy(self, final: Path) -> str:
        """What went wrong with all but the new checkpoint itself, `final`; "" if nothing did."""
        problems = []
        for action, said in (
            (lambda: point_at(final), "`latest` could not be written"),
            (lambda: prune(self.folder, self.retention), "older checkpoints could not be removed"),
        ):
            try:
                on_first_rank(action, self._group)
            except UserError as problem:
                problems.append(f"{said} ({problem})")
        return "; ".join(problems)

    def _write_own(
        self, folder: Path, slices: dict[str, Slice], snapshot: Snapshot
    ) -> tuple[dict[str, dict[str, Any]], str]:
        """This rank's files, with sizes and checksums, and what kept it from writing them ("": nothing)."""
        writer = SliceWriter(folder, snapshot, list(slices), self._get_on)
        try:
            # Each rank knows its own slices; to plan together, rank 0 would gather those of all, and spread them again.
            dcp.save(slices, storage_writer=writer, no_dist=True)
        except CheckpointException as failure:
            [(error, _)] = failure.failures.values()
            if not isinstance(error, OSError):
                raise
            return {}, one_line(str(error))
        finally:
            snapshot.close()
        return writer.written, ""

    def _read_back(self, folder: Path, own: dict[str, dict[str, Any]], error: str) -> dict[str, dict[str, Any]]:
        """All ranks' files and checksums, after each rank has found its own on the disk as it wrote them."""
        try:
            for name, facts in own.items():
                if checksum(folder / name, self._get_on, from_disk=True) != facts:
                    error = f"{name} is not what was written: the disk is failing"
        except OSError as problem:
            error = one_line(str(problem))
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (error, own), group=self._group)
        _raise_first([error for error, _ in gathered])
        return {name: facts for _, files in gathered for name, facts in files.items()}


def on_first_rank(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T | None:
    """Rank 0's result, and None elsewhere; what the user or the file system refuses there is raised on every rank.

    Collective. Raises UserError.
    """
    result, told = None, [""]
    if dist.get_rank() == 0:
        try:
            result = action()
        except (UserError, OSError) as error:
            told = [one_line(str(error))]
    dist.broadcast_object_list(told, src=0, group=group)
    _raise_first(told)
    return result


def delink(path: Path, recipe: Recipe, get_on: Callable[[], object]) -> None:
    """Put a checkpoint of layers with their own weights in the place of one that shares them, all ranks a share of it.

    `recipe`: that of the training so far. `get_on` is called after each piece that is written. Collective. Raises
    RestartableError.
    """
    try:
        _delink(path, recipe, get_on)
    except UserError as problem:
        raise RestartableError(f"{path}: not delinked ({problem}); it is whole: mend that, then --resume") from None


def _delink(path: Path, recipe: Recipe, get_on: Callable[[], object]) -> None:
    planned = delinking.plan(path, read_manifest(path), recipe.delinked(), recipe.delink.moments)
    on_first_rank(lambda: delinking.begin(planned, path.parent))
    partial = delinking.partial_of(planned, path.parent)
    own: dict[str, dict[str, Any]] = {}
    error = ""
    try:
        names = sorted(planned.files)[dist.get_rank() :: dist.get_world_size()]
        own = delinking.write_files(planned, partial, names, lambda _: get_on())
    except (OSError, UserError) as problem:
        error = one_line(str(problem))
    gathered = _gather((error, own))
    _raise_first([error for error, _ in gathered])
    files = {name: facts for _, part in gathered for name, facts in part.items()}
    on_first_rank(lambda: delinking.finish(planned, partial, files))


def _raise_first(errors: list[str]) -> None:
    for error in errors:
        if error:
            raise UserError(error)


def newest(folder: Path, get_on: Callable[[], object] = lambda: None) -> Found | None:
    """The newest checkpoint that verifies, its files checked by all ranks together; None where there is none at all.

    `get_on` is called after each piece that is read. Collective. Raises UserError if there are checkpoints, and none
    verifies, or one is a newer version's.
    """
    candidates: list[Any] = [steps(folder)]
    dist.broadcast_object_list(candidates, src=0)
    refused: list[str] = []
    for step in reversed(candidates[0]):
        path = folder / f"step-{step}"
        try:
            manifest = read_manifest(path)
            problem = _damage_of_share(path, manifest["files"], get_on)
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


def _damage_of_share(path: Path, files: dict[str, dict[str, Any]], get_on: Callable[[], object]) -> str:
    own = sorted(files)[dist.get_rank() :: dist.get_world_size()]
    return next(filter(None, (damage(path, name, files[name], get_on) for name in own)), "")


def _gather(value: T) -> list[T]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def load(
    engine: Engine,
    path: Path,
    manifest: dict[str, Any],
    blank_step: Callable[[], None],
    get_on: Callable[[], object] = lambda: None,
) -> None:
    """Read a checkpoint into an engine, new or in use, whatever layout wrote it. Collective.

    Raises UserError for another model's.

    `blank_step()` takes one optimizer step of zero gradients at learning rate 0. After the masters are set it
    brings DeepSpeed's own machinery to create the optimizer state and to renew the 16-bit working copies, on
    whichever tier they live. `get_on` is called after each piece that is read.
    """
    reader, adam_step = SliceReader(str(path)), manifest.get("adam_step")
    if type(adam_step) is not int or not 0 <= adam_step <= manifest["step"]:
        raise UserError(f"{path}: adam_step {shown(adam_step)} is none of its {manifest['step']} steps")
    with reading(path):
        _check_model(engine, path, saved_slices(path, manifest["files"]))
        _read(engine, reader, (states.MASTER,), path, get_on)
        blank_step()
        if adam_step:
            _read(engine, reader, states.MOMENTS, path, get_on)
        else:
            states.clear_moments(engine)
    states.set_adam_step(engine, adam_step)


def begin(engine: Engine, parent: Parent, get_on: Callable[[], object] = lambda: None) -> None:
    """Set a new engine's weights to those of another run's checkpoint, whatever layout wrote it. Collective.

    Adapters of the checkpoint are merged into the weights beside them; the engine's own, and its optimizer, stay as
    they were made. `get_on` is called after each piece that is read. Raises UserError if a file is damaged.
    """
    path, files = parent.path, parent.manifest["files"]
    with reading(path):
        _raise_first(_gather(_damage_of_share(path, files, get_on)))
        saved = SavedWeights(path, files, parent.recipe.model_shape())
        own = set(saved.names)
        for parts in states.resident(engine, (states.MASTER,)):
            for part, view in parts:
                name = part.key.removesuffix(f".{states.MASTER}")
                for first in range(0, part.numel, CHUNK) if name in own else ():
                    values = view[first : first + CHUNK]
                    values.copy_(saved.read(name, part.offset + first, values.numel()))
                    get_on()


def _check_model(engine: Engine, path: Path, saved: dict[str, list[SavedSlice]]) -> None:
    own, suffix = states.lengths(engine), f".{states.MASTER}"
    there = {key.removesuffix(suffix): sum(p.numel for p in saved[key]) for key in saved if key.endswith(suffix)}
    for name in sorted(own.keys() | there.keys()):
        if own.get(name) != there.get(name):
            counts = f"{there.get(name, 0):,} values there, {own.get(name, 0):,} here"
            raise UserError(f"{path}: it is of another model ({shown(name)} has {counts})")


def _read(
    engine: Engine, reader: SliceReader, kinds: tuple[str, ...], path: Path, get_on: Callable[[], object]
) -> None:
    for parts in states.resident(engine, kinds):
        slices: dict[str, Any] = {part.key: Slice.of(part, view) for part, view in parts}
        try:
            dcp.load(slices, storage_reader=reader, no_dist=True)
        except (CheckpointException, ValueError, RuntimeError) as error:
            raise RestartableError(f"{path}: cannot be read ({one_line(str(error))[:200]})") from None
        get_on()
