"""A checkpoint's weights, read a stretch at a time: fp32 masters, and in them the shares of adapters beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from model.adapters import merge, names_beside
from model.config import ModelConfig
from model.m6 import M6
from model.parts import ADAPTERS, part_of
from training.errors import UserError
from training.recipe import shown
from training.tensor_files import ELEMENT, SavedSlice, saved_slices

MASTER = ".master"
CHUNK = 2**22  # elements that are read at once


def without_values(shape: ModelConfig) -> M6:
    """A model on the meta device, for inference."""
    with torch.device("meta"):
        return M6(shape).eval().requires_grad_(False)


class SavedWeights:
    """Those of the checkpoint `path`. Experts of one layer are one weight, in the order of their numbers."""

    def __init__(self, path: Path, files: Iterable[str], shape: ModelConfig):
        """`files`: names of the checkpoint's; `shape`: its model's. Raises UserError if they are of another model."""
        self._shapes = {name: weight.shape for name, weight in without_values(shape).named_parameters()}
        self._slices = self._masters(path, saved_slices(path, files))
        self._rank = shape.adapter_rank
        self.names = [name for name in self._shapes if part_of(name) != ADAPTERS]

    def _masters(self, path: Path, slices: dict[str, list[SavedSlice]]) -> dict[str, list[SavedSlice]]:
        masters = {key.removesuffix(MASTER): found for key, found in slices.items() if key.endswith(MASTER)}
        if odd := sorted(self._shapes.keys() ^ masters.keys()):
            there = "not " * (odd[0] in self._shapes)
            raise UserError(f"{path}: it is of another model ({shown(odd[0])} is {there}in it)")
        for name, shape in self._shapes.items():
            numel = sum(piece.numel for piece in masters[name])
            if numel != shape.numel():
                raise UserError(f"{path}: it is of another model ({name} has {numel:,} values, not {shape.numel():,})")
        return masters

    def read(self, name: str, first: int, count: int) -> Tensor:
        """Elements [first, first + count) of a flat weight, fp32. Raises UserError where a file was cut off."""
        values = self._stored(name, first, count)
        beside = names_beside(name)
        if beside[0] in self._slices:
            merge(values, first, self._shapes[name], self._rank, *(partial(self._stored, one) for one in beside))
        return values

    def all(self, name: str) -> Iterator[Tensor]:
        """The whole of a flat weight in pieces, in order."""
        numel = self._shapes[name].numel()
        for first in range(0, numel, CHUNK):
            yield self.read(name, first, min(CHUNK, numel - first))

    def _stored(self, name: str, first: int, count: int) -> Tensor:
        values = torch.empty(count, dtype=torch.float32)
        for piece in self._slices[name]:
            start, end = max(first, piece.offset), min(first + count, piece.offset + piece.numel)
            if start < end:
                _read(piece, start - piece.offset, values[start - first : end - first])
        return values


def _read(piece: SavedSlice, first: int, values: Tensor) -> None:
    """Read, not mapped: pages of a mapped file would count as this process' memory until all of it is there."""
    with piece.file.open("rb") as file:
        file.seek(piece.start + first * ELEMENT)
        if file.readinto(values.view(torch.uint8).numpy().data) != values.nbytes:
            raise UserError(f"{piece.file}: it was cut off while it was read")
