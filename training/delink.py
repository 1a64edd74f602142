"""Delinking: layers that shared one set of weights go on with a set each (M6-10T, arXiv 2110.03888: Pseudo-to-Real).

From a checkpoint of the run that shares to the first checkpoint of one that does not. The shared layer's slices are
copied once for every layer, a piece at a time, so that no part of the model is ever held; all others are copied once.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from model.config import ModelConfig
from training.checkpoint_files import commit, make_room, point_at
from training.errors import UserError
from training.files import replace
from training.recipe import Recipe, parse_recipe
from training.run import CHECKPOINTS, RECIPE
from training.tensor_files import ELEMENT, HashedFile, SavedSlice, saved_slices, slices_head

PIECE = 16 * 2**20  # bytes that are copied at once
SHARED, MASTER = "layers.0.", ".master"
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Delinking:
    """What is to be written, settled before anything is."""

    recipe: Recipe  # of the run that goes on
    manifest: dict[str, Any]  # of its first checkpoint, but for its files
    files: dict[str, list[tuple[str, SavedSlice]]]  # keys, and where the values of each are to be had

    @property
    def bytes(self) -> int:
        return sum(piece.numel * ELEMENT for own in self.files.values() for _, piece in own)


def plan(path: Path, manifest: dict[str, Any], overrides: list[str], reset: bool) -> Delinking:
    """How to delink the checkpoint `path`; `overrides` are of the recipe with which training goes on.

    `reset`: Adam's moments begin anew; else each layer has those of the shared one. Raises UserError if layers are not
    shared, or the overrides are of another model.
    """
    earlier = parse_recipe(manifest.get("recipe", {}), [], str(path))
    was = earlier.model_shape()
    if not was.share_layers:
        raise UserError(f"{path}: its {was.layers} layers have their own weights already: there is nothing to delink")
    recipe = parse_recipe(manifest["recipe"], ["model.share_layers=false", *overrides], str(path))
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
        "adam_step": 0 if reset else manifest["adam_step"],
        "position": position,
        "safeguard": manifest.get("safeguard", {}) | {"passed_over": _passed(position, manifest["step"], recipe)},
        "tracker": None,  # the new run has a page of its own
        "evaluation_due": True,  # which shows that nothing has changed yet
        "delinked_from": str(path),
    }
    return Delinking(recipe, {key: value for key, value in (manifest | settled).items() if key != "files"}, files)


def write(plan: Delinking, source: Path, run: Path, advance: Callable[[int], object]) -> Path:
    """Carry out a plan for the run of folder `source`, in the new folder `run`; returns the checkpoint.

    `advance` is told of bytes as they are written. Raises UserError.
    """
    home, final = run / CHECKPOINTS, f"step-{plan.manifest['step']}"
    partial = home / f".{final}.partial"
    try:
        make_room(partial)
        free = shutil.disk_usage(home).free
        if free < plan.bytes:
            raise UserError(f"{run}: it takes {plan.bytes / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free there")
        files = {name: _write_file(partial / name, own, advance) for name, own in plan.files.items()}
        if (source / METRICS).exists():
            shutil.copyfile(source / METRICS, run / METRICS)
        commit(partial, home / final, plan.manifest | {"files": files})
        point_at(home / final)
        text = yaml.safe_dump(plan.recipe.model_dump(mode="json"), allow_unicode=True, sort_keys=False)
        replace(run / RECIPE, text, durable=True)  # last: with it the run has begun
    except OSError as error:
        raise UserError(f"{error.filename or run}: cannot be written ({error.strerror})") from None
    finally:
        if not (run / RECIPE).exists():
            shutil.rmtree(run, ignore_errors=True)
    return home / final


def _copies(key: str, layers: int) -> Iterator[str]:
    """Under which keys the values of a key go on."""
    if not key.startswith(SHARED):
        yield key
        return
    for layer in range(layers):
        yield f"layers.{layer}.{key.removeprefix(SHARED)}"


def _check_shape(was: ModelConfig, now: ModelConfig) -> None:
    for field in dataclasses.fields(ModelConfig):
        before, after = getattr(dataclasses.replace(was, share_layers=False), field.name), getattr(now, field.name)
        if before != after:
            why = "the one layer was called as many times" if field.name == "layers" else "delinking keeps the model"
            raise UserError(f"model.{field.name}={after}: it was {before}, and {why}")


def _passed(position: int, step: int, recipe: Recipe) -> int:
    """Steps' worth of positions that the order is ahead of the steps, if nothing is to be seen twice."""
    return -(-position // recipe.global_batch) - step


def _write_file(path: Path, own: list[tuple[str, SavedSlice]], advance: Callable[[int], object]) -> dict[str, Any]:
    """Size and checksum of the file."""
    with HashedFile(path) as file:
        file.write(slices_head((key, piece.offset, piece.numel) for key, piece in own))
        for _, piece in own:
            for data in _values(piece):
                file.write(data)
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
