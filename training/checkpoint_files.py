"""A checkpoint as a folder: files under a sealed manifest of their checksums, and what is wrong with them.

A folder named `step-N` was whole when it got its name; what happened to it later, the checksums tell. Imports neither
torch nor DeepSpeed, so that looking at checkpoints is quick.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from training.errors import UserError
from training.files import flush, replace
from training.recipe import one_line
from training.tensor_files import size_of

FORMAT = 2
MANIFEST, LATEST = "manifest.json", "latest"
SEAL = f"{MANIFEST}.xxh3"  # the manifest's own checksum
FILE_NAME = re.compile(r"rank-[0-9]{5,}\.safetensors")
NAME = re.compile(r"step-(0|[1-9][0-9]*)", re.ASCII)
PIECE = 16 * 2**20  # bytes that are read and hashed at once


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `newest`, and those of every `every`-th step (0: none)."""

    newest: int
    every: int = 0


class NewerFormat(UserError):
    """A checkpoint that only a newer version can read; passing over it would lose it."""


def make_room(partial: Path) -> None:
    """Make the folder in which a checkpoint will grow, and take away the remains of saves and removals cut off."""
    for left in (*partial.parent.glob(".step-*.partial"), *partial.parent.glob(".step-*.removed")):
        shutil.rmtree(left, ignore_errors=True)  # another's may be held by who reads it
    partial.mkdir(parents=True)


def commit(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Seal the files in `partial`, which are on the disk, as the checkpoint `final`, in place of one that is there."""
    text = json.dumps(manifest, ensure_ascii=False, indent=1)
    replace(partial / SEAL, xxhash.xxh3_128_hexdigest(text.encode()), durable=True)
    replace(partial / MANIFEST, text, durable=True)
    if final.exists():
        shutil.rmtree(aside(final), ignore_errors=True)
        final.rename(aside(final))
    partial.rename(final)
    flush(final.parent)


def aside(path: Path) -> Path:
    """Where the checkpoint `path` is hidden."""
    return path.with_name(f".{path.name}.aside")


def take_back(folder: Path) -> None:
    """Bring back the latest checkpoint, if it was hidden and what was to take its place never got its name."""
    try:
        path = folder / (folder / LATEST).read_text(encoding="utf-8").split()[0]
    except (OSError, ValueError, IndexError):
        return
    if NAME.fullmatch(path.name) and not path.exists() and aside(path).exists():
        aside(path).rename(path)
        flush(folder)


def point_at(path: Path) -> None:
    """Let `latest` name the checkpoint `path`."""
    seal = (path / SEAL).read_text(encoding="utf-8")
    replace(path.parent / LATEST, f"{path.name} {seal}", durable=True)


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, ascending; whole ones, though perhaps damaged since."""
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*") if NAME.fullmatch(path.name))


def prune(folder: Path, retention: Retention) -> None:
    """Remove what need not stay, except what is being read."""
    found = steps(folder)
    for step in found[: -retention.newest]:
        if not (retention.every and step % retention.every == 0):
            _remove(folder / f"step-{step}")
    for path in folder.glob(".step-*.aside"):
        if found and int(path.name.split("-")[1].removesuffix(".aside")) <= found[-1]:
            shutil.rmtree(path)


def _remove(path: Path) -> None:
    """First out of sight in one move, so that no half of it is ever taken for a checkpoint."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        hidden = path.with_name(f".{path.name}.removed")
        path.rename(hidden)
        hidden.unlink() if hidden.is_symlink() else shutil.rmtree(hidden)
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


def set_aside_after(folder: Path, step: int) -> None:
    """Hide the checkpoints after `step`, from which training goes on: refused, or of a future that was given up.

    Rank 0 alone. They stay on the disk until training has come as far again: perhaps only reading one has failed.
    """
    given_up = [number for number in steps(folder) if number > step]
    if given_up:
        point_at(folder / f"step-{step}")
    for later in given_up:
        path = folder / f"step-{later}"
        shutil.rmtree(aside(path), ignore_errors=True)
        path.rename(aside(path))


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
        raise UserError(f"{path / MANIFEST}: cannot be read ({one_line(str(error))})") from None
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


def damage(path: Path, name: str, facts: dict[str, Any], get_on: Callable[[], object] = lambda: None) -> str:
    """What is wrong with a file of the checkpoint `path`; "" if it is what its manifest says.

    `get_on` is called after each piece that is read.
    """
    file = path / name
    try:
        size = size_of(file)
        if size != facts["bytes"]:
            return f"{file}: {size:,} bytes instead of {facts['bytes']:,}"
        return "" if checksum(file, get_on) == facts else f"{file}: damaged (its checksum is not the manifest's)"
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


def checksum(path: Path, get_on: Callable[[], object] = lambda: None, from_disk: bool = False) -> dict[str, Any]:
    """Size and XXH3 (128 bits) of a file; `from_disk`: as the disk holds it, not as memory remembers it."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        if from_disk:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while data := file.read(PIECE):
            digest.update(data)
            size += len(data)
            get_on()
    return {"bytes": size, "xxh3": digest.hexdigest()}
