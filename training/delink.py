"""Delinking: layers that shared one set of weights go on with a set each (M6-10T, arXiv 2110.03888: Pseudo-to-Real).

From a checkpoint of layers that share to one of layers that do not, of the same run or of a new one. The shared layer's
slices are copied once for every layer, a piece at a time, so that no part of the model is ever held; all others once.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import yaml
from rich.filesize import decimal

from model.config import ModelConfig
from training.checkpoint_files import commit, make_room, point_at
from training.errors import UserError
from training.files import replace
from training.recipe import Delink, Recipe, parse_recipe
from training.run import BACKGROUND, CHECKPOINTS, RECIPE
from training.tensor_files import ELEMENT, HashedFile, SavedSlice, saved_slices, slices_head

PIECE = 16 * 2**20  # bytes that are copied at once
LAYERS, SHARED, MASTER = "layers.", "layers.0.", ".master"
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Delinking:
    """What is to be written, settled before anything is."""

    recipe: Recipe  # with which training goes on
    manifest: dict[str, Any]  # of the new checkpoint, but for its files
    files: dict[str, list[tuple[str, SavedSlice]]]  # keys, and where the values of each are to be had
    scales: dict[str, float]  # of the layers' states, by kind: what they are multiplied by

    @property
    def bytes(self) -> int:
        return sum(piece.numel * ELEMENT for own in self.files.values() for _, piece in own)


@dataclass
class Plateau:
    """The last losses of a run, by which it is seen whether the loss falls no more."""

    losses: list[float] = field(default_factory=list)

    def add(self, loss: float, rule: Delink) -> None:
        self.losses = [*self.losses, loss][-2 * rule.window :]

    def reached(self, step: int, rule: Delink) -> bool:
        """Whether, after `step` steps, the layers are to get their own weights."""
        if rule.after and step >= rule.after:
            return True
        if not rule.flat or len(self.losses) < 2 * rule.window:
            return False
        before, last = fmean(self.losses[: rule.window]), fmean(self.losses[rule.window :])
        return last > (1 - rule.flat) * before


def is_delinked(manifest: dict[str, Any]) -> bool:
    """Whether a checkpoint's layers have their own weights. Raises UserError."""
    return not parse_recipe(manifest.get("recipe", {}), [], "the manifest").model_shape().share_layers


def plan(path: Path, manifest: dict[str, Any], recipe: Recipe, moments: str) -> Delinking:
    """How to delink the checkpoint `path`; `recipe` is that with which training goes on.

    `moments`: Adam's begin anew (reset), are those of the shared layer (clone), or those scaled to one layer's gradient
    (scale), where the shared layer's was the sum over its L uses: the first over L, the second over L squared. Raises
    UserError if layers are not shared, or the recipe is of another model.
    """
    reset = moments == "reset"
    earlier = parse_recipe(manifest.get("recipe", {}), [], str(path))
    was = earlier.model_shape()
    if not was.share_layers:
        raise UserError(f"{path}: its {was.layers} layers have their own weights already: there is nothing to delink")
    _check_shape(was, recipe.model_shape())
    slices = saved_slices(path, manifest["files"])
    files: dict[str, list[tuple[str, SavedSlice]]] = {name: [] for name in sorted(manifest["files"])}
    for key, pieces in slices.items():
        if reset and not key.endswith(MASTER):
            continue
        for piece in pieces:
            files[piece.file.name] += [(copy, piece) for copy in _copies(key, was.layers)]
    position = manifest.get("position", manifest["step"] * earlier.global_batch)
    settled = {
        "recipe": recipe.model_dump(mode="json"),
        "recipe_sha256": recipe.sha256(),
        "adam_step": 0 if reset else manifest.get("adam_step"),
        "position": position,
        "safeguard": manifest.get("safeguard", {}) | {"passed_over": _passed(position, manifest["step"], recipe)},
        "evaluation_due": True,  # which shows that nothing has changed yet
    }
    scales = {"exp_avg": 1 / was.layers, "exp_avg_sq": 1 / was.layers**2} if moments == "scale" else {}
    kept = {key: value for key, value in (manifest | settled).items() if key != "files"}
    return Delinking(recipe, kept, files, scales)


def partial_of(plan: Delinking, checkpoints: Path) -> Path:
    """The folder in which the delinked checkpoint grows."""
    return checkpoints / f".step-{plan.manifest['step']}.partial"


def begin(plan: Delinking, checkpoints: Path) -> None:
    """Make room for the delinked checkpoint. Raises UserError, OSError."""
    make_room(partial_of(plan, checkpoints))
    free = shutil.disk_usage(checkpoints).free
    if free < plan.bytes:
        needed = f"delinked weights take {decimal(plan.bytes)}, and {decimal(free)} are free there"
        raise UserError(f"{checkpoints}: {needed}")


def write_files(
    plan: Delinking, partial: Path, names: Sequence[str], advance: Callable[[int], object]
) -> dict[str, dict[str, Any]]:
    """Write some of the plan's files: their sizes and checksums. `advance` is told of bytes. Raises OSError."""
    return {name: _write_file(partial / name, plan.files[name], plan.scales, advance) for name in names}


def finish(plan: Delinking, partial: Path, files: dict[str, dict[str, Any]]) -> Path:
    """Seal the checkpoint, in place of that of the shared layers if it has the same name. Raises OSError."""
    final = partial.with_name(f"step-{plan.manifest['step']}")
    commit(partial, final, plan.manifest | {"files": files})
    point_at(final)
    return final


def write_run(plan: Delinking, source: Path, run: Path, advance: Callable[[int], object]) -> Path:
    """Carry out a plan for the run of folder `source`, as the beginning of one in the new folder `run`.

    Returns the checkpoint; `advance` is told of bytes as they are written. Raises UserError.
    """
    own = dataclasses.replace(plan, manifest=plan.manifest | {"tracker": None})  # it has a page of its own
    try:
        partial = partial_of(own, run / CHECKPOINTS)
        begin(own, run / CHECKPOINTS)
        files = write_files(own, partial, list(own.files), advance)
        for name in (METRICS, BACKGROUND):
            if (source / name).exists():
                shutil.copyfile(source / name, run / name)
        final = finish(own, partial, files)
        text = yaml.safe_dump(own.recipe.model_dump(mode="json"), allow_unicode=True, sort_keys=False)
        replace(run / RECIPE, text, durable=True)  # last: with it the run has begun
    except OSError as error:
        raise UserError(f"{error.filename or run}: cannot be written ({error.strerror})") from None
    finally:
        if not (run / RECIPE).exists():
            shutil.rmtree(run, ignore_errors=True)
    return final


def _copies(key: str, layers: int) -> Iterator[str]:
    """Under which keys the values of a key go on."""
    if not key.startswith(SHARED):
        yield key
        return
    for layer in range(layers):
        yield f"layers.{layer}.{key.removeprefix(SHARED)}"


def _check_shape(was: ModelConfig, now: ModelConfig) -> None:
    wanted, found = dataclasses.asdict(was) | {"share_layers": False}, dataclasses.asdict(now)
    for name, before in wanted.items():
        if found[name] != before:
            why = "the one layer was called as many times" if name == "layers" else "delinking keeps the model"
            raise UserError(f"model.{name}={found[name]}: it was {before}, and {why}")


def _passed(position: int, step: int, recipe: Recipe) -> int:
    """Steps' worth of positions that the order is ahead of the steps, so that as many are behind as were trained on.

    Each task draws by the step and its own share of it, so where shares round otherwise some rows come again.
    """
    return -(-position // recipe.global_batch) - step


def _write_file(
    path: Path, own: list[tuple[str, SavedSlice]], scales: dict[str, float], advance: Callable[[int], object]
) -> dict[str, Any]:
    """Size and checksum of the file."""
    with HashedFile(path) as file:
        file.write(slices_head((key, piece.offset, piece.numel) for key, piece in own))
        for key, piece in own:
            scale = scales.get(key.rpartition(".")[2]) if key.startswith(LAYERS) else None
            for data in _values(piece):
                file.write((np.frombuffer(data, "<f4") * np.float32(scale)).tobytes() if scale else data)
                advance(len(data))
    return file.facts()


def _values(piece: SavedSlice) -> Iterator[bytes]:
    with piece.file.open("rb", buffering=0) as file:
        file.seek(piece.start)
        left = piece.numel * ELEMENT
        while left:
            data = file.read(min(PIECE, left))
            if not data:
                raise UserError(f"{piece.file}: ends {left:,} bytes too early")
            yield data
            left -= len(data)
