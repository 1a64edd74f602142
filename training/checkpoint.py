"""The one checkpoint mechanism: flat slices in safetensors, written behind the training's back, verified, atomic.

A checkpoint loads on any number of ranks, any expert-parallel size and any offload tier (`training/states.py`), and
nothing in it is a pickle. It is written to a temporary folder, each file is flushed and read back against its checksum,
the manifest of checksums is added, the folder renamed, and only then does `latest` point at it. So a folder named
`step-N` is always whole; what happens to it later, the checksums tell.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint.api import CheckpointException

from training import states
from training.engine import Engine
from training.errors import UserError
from training.recipe import shown
from training.slices import Slice, SliceReader, SliceWriter, checksum
from training.snapshot import Snapshot
from training.tensor_files import SavedSlice, saved_slices, size_of

T = TypeVar("T")

FORMAT = 2
MANIFEST, LATEST = "manifest.json", "latest"
SEAL = f"{MANIFEST}.xxh3"  # the manifest's own checksum
FILE_NAME = re.compile(r"rank-[0-9]{5,}\.safetensors")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `newest`, and those of every `every`-th step (0: none)."""

    newest: int
    every: int = 0


@dataclass(frozen=True)
class Outcome:
    """What became of a save. `error` is empty if it is on the disk."""

    step: int
    error: str
    stall_seconds: float  # for which the training stood still
    write_seconds: float  # until it was on the disk, the stall included
    bytes: int  # of all ranks' files


@dataclass(frozen=True)
class Found:
    """A verified checkpoint, and newer ones that were refused: a line each."""

    path: Path
    manifest: dict[str, Any]
    refused: list[str]


class NewerFormat(UserError):
    """A checkpoint that only a newer version can read; passing over it would lose it."""


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
            raise UserError(f"the state cannot be read: {_one_line(error)}; resume from the last checkpoint") from None
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
        size, error = 0, ""
        try:
            size = self._write(slices, snapshot, manifest)
        except UserError as problem:
            error = str(problem)
        except BaseException as failure:
            self._failure = failure
        finally:
            snapshot.close()
        seconds = time.perf_counter() - started
        self._outcome = Outcome(manifest["step"], error, stall[0] if stall else seconds, seconds, size)

    def _write(self, slices: dict[str, Slice], snapshot: Snapshot, manifest: dict[str, Any]) -> int:
        final = self.folder / f"step-{manifest['step']}"
        partial = self.folder / f".{final.name}.partial"
        try:
            self._on_first(lambda: _make_room(partial))
            writer = SliceWriter(partial, snapshot)
            with _as_user_error():
                dcp.save(slices, storage_writer=writer, process_group=self._group)
            files = self._read_back(partial, writer.written)
            self._on_first(lambda: _commit(partial, final, manifest | {"files": files}))
            self._on_first(lambda: prune(self.folder, self.retention))
        except UserError as error:
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"{final}: not saved ({error}); the checkpoints before it are whole") from None
        return sum(facts["bytes"] for facts in files.values())

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
                told = [_one_line(error)]
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
            raise UserError(_one_line(causes[0])) from None
        raise


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _raise_first(errors: list[str]) -> None:
    for error in errors:
        if error:
            raise UserError(error)


def _make_room(partial: Path) -> None:
    for left in partial.parent.glob(".step-*"):  # of a save or a removal that was cut off
        shutil.rmtree(left)
    partial.mkdir(parents=True)


def _commit(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    text = json.dumps(manifest, ensure_ascii=False, indent=1)
    seal = xxhash.xxh3_128_hexdigest(text.encode())
    _write_file(partial / MANIFEST, text)
    _write_file(partial / SEAL, seal)
    _sync(partial)
    partial.rename(final)
    _sync(final.parent)
    _point_at(final, seal)


def _point_at(path: Path, seal: str) -> None:
    """Let `latest` name the checkpoint `path`."""
    temporary = path.parent / f".{LATEST}.partial"
    _write_file(temporary, f"{path.name} {seal}")
    temporary.rename(path.parent / LATEST)
    _sync(path.parent)


def _write_file(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make what was created and renamed in `folder` last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, ascending; whole ones, though perhaps damaged since."""
    names = (path.name.removeprefix("step-") for path in folder.glob("step-*"))
    return sorted(int(name) for name in names if name.isdecimal())


def prune(folder: Path, retention: Retention) -> None:
    """Remove what need not stay, except what is being read."""
    for step in steps(folder)[: -retention.newest]:
        if not (retention.every and step % retention.every == 0):
            _remove(folder / f"step-{step}")


def _remove(path: Path) -> None:
    """First out of sight in one move, so that no half of it is ever taken for a checkpoint."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        hidden = path.with_name(f".{path.name}.removed")
        path.rename(hidden)
        shutil.rmtree(hidden)
    except BlockingIOError:
        return  # somebody reads it: its turn comes at a later save
    finally:
        os.close(handle)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Hold a checkpoint so that no pruning takes it away."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint `path`, checked against its seal. Raises UserError."""
    try:
        text = (path / MANIFEST).read_bytes()
        seal = (path / SEAL).read_text(encoding="utf-8")
        if xxhash.xxh3_128_hexdigest(text) != seal:
            raise UserError(f"{path / MANIFEST}: damaged (its checksum is not the one in {SEAL})")
        manifest = json.loads(text)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path / MANIFEST}: cannot be read ({_one_line(error)})") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if isinstance(found, int) and found > FORMAT:
        raise NewerFormat(f"{path}: checkpoint format {found}, this program reads {FORMAT}; use the newer one")
    if found != FORMAT:
        raise UserError(f"{path}: checkpoint format {found}, this program reads {FORMAT}")
    if fault := _fault(path, manifest):
        raise UserError(f"{path / MANIFEST}: {fault}")
    return manifest


def _fault(path: Path, manifest: dict[str, Any]) -> str:
    """Why a manifest is none though its seal is right, which anyone can make; "" if it is one."""
    files = manifest.get("files")
    if not isinstance(files, dict) or not isinstance(manifest.get("step"), int):
        return "it is no checkpoint's"
    for name, facts in files.items():
        if not FILE_NAME.fullmatch(name):
            return f"{name[:80]!r} is no name of a checkpoint's file"
        if not isinstance(facts, dict) or [type(facts.get(key)) for key in ("bytes", "xxh3")] != [int, str]:
            return f"{name} is listed without its size and checksum"
    strangers = {file.name for file in path.glob("*.safetensors")} - files.keys()
    return f"{min(strangers)} is not listed, and would be read" if strangers else ""


def damage(path: Path, name: str, facts: dict[str, Any]) -> str:
    """What is wrong with a file of the checkpoint `path`; "" if it is what its manifest says."""
    file = path / name
    try:
        size = size_of(file)
        if size != facts["bytes"]:
            return f"{file}: {size:,} bytes instead of {facts['bytes']:,}"
        return "" if checksum(file) == facts else f"{file}: damaged (its checksum is not the manifest's)"
    except OSError as error:
        return f"{file}: {error.strerror}"


def problems(path: Path, advance: Callable[[int], object] = lambda size: None) -> list[str]:
    """What is wrong with the checkpoint `path`, a line a file; [] if it is whole. All files are read.

    `advance` is told the size of each file when it has been checked.
    """
    try:
        files = read_manifest(path)["files"]
    except UserError as error:
        return [str(error)]
    found = []
    for name in sorted(files):
        found.append(damage(path, name, files[name]))
        advance(files[name]["bytes"])
    return list(filter(None, found))


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


def set_aside_after(folder: Path, step: int) -> None:
    """Hide the checkpoints after `step`, from which training goes on: refused, or of a future that was given up.

    Rank 0 alone. They stay on the disk until the next save.
    """
    given_up = [number for number in steps(folder) if number > step]
    if given_up:
        last = folder / f"step-{step}"
        _point_at(last, (last / SEAL).read_text(encoding="utf-8"))
    for later in given_up:
        path = folder / f"step-{later}"
        path.rename(path.with_name(f".{path.name}.aside"))


def load(engine: Engine, path: Path, manifest: dict[str, Any], blank_step: Callable[[], None]) -> None:
    """Read a checkpoint into an engine, new or in use, whatever layout wrote it. Collective.

    Raises UserError for another model's.

    `blank_step()` takes one optimizer step of zero gradients at learning rate 0. After the masters are set it
    brings DeepSpeed's own machinery to create the optimizer state and to renew the 16-bit working copies, on
    whichever tier they live.
    """
    reader = SliceReader(str(path))
    with reading(path):
        _check_model(engine, path, saved_slices(path, manifest["files"]))
        _read(engine, reader, (states.MASTER,), path)
        blank_step()
        if manifest["adam_step"]:
            _read(engine, reader, states.MOMENTS, path)
        else:
            states.clear_moments(engine)
    states.set_adam_step(engine, manifest["adam_step"])


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
            raise UserError(f"{path}: it is of another model ({_one_line(error)[:200]})") from None
