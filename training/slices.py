"""Flat slices to and from safetensors, by torch.distributed.checkpoint.

Its planning says who writes and who reads what. Its own writer of safetensors would serialise a whole rank's state in
memory; this one streams the slices into the file and hashes what it writes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from training.snapshot import Snapshot
from training.states import ELEMENT, Part
from training.tensor_files import HashedFile, slices_head


class Slice(Tensor):
    """A 1-D part of a flat global tensor, as torch.distributed.checkpoint wants to see it."""

    part: Part
    local: Tensor | None

    @staticmethod
    def of(part: Part, local: Tensor | None = None) -> Slice:
        """`local`: what is read into; to be written, a slice needs none, since the snapshot brings its values."""
        made = Tensor._make_subclass(Slice, torch.empty(0))
        made.part, made.local = part, local
        return made

    def size(self, dim: int | None = None) -> Any:
        """The global size: the load planner compares it with what was saved."""
        return torch.Size([self.part.length]) if dim is None else self.part.length

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.part.offset]), torch.Size([self.part.numel]))

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        data = TensorWriteData(self._chunk(), TensorProperties(torch.float32), self.size())
        return [WriteItem(MetadataIndex(fqn, torch.Size([self.part.offset])), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]

    def __get_tensor_shard__(self, _: MetadataIndex) -> Tensor:
        assert self.local is not None
        return self.local


class SliceWriter(dcp.HuggingFaceStorageWriter):
    """Writes one file a rank, from a snapshot that is filled in the order of the slices."""

    def __init__(self, folder: Path, snapshot: Snapshot, keys: list[str], get_on: Callable[[], object]):
        """`keys`: the slices' in order; `get_on` is called after each piece that is written."""
        super().__init__(str(folder), save_distributed=True)
        self._snapshot, self._keys, self._get_on = snapshot, keys, get_on
        self.written: dict[str, dict[str, Any]] = {}  # this rank's files: name -> size in bytes and checksum

    def write_data(self, plan: SavePlan, _: Any) -> Future[list[WriteResult]]:
        name = f"rank-{dist.get_rank():05}.safetensors"
        assert [item.index.fqn for item in plan.items] == self._keys, "the snapshot's pieces have no names"
        with HashedFile(Path(self.path) / name) as sink:
            sink.write(slices_head(map(_place, plan.items)))
            for item in plan.items:
                for chunk in self._snapshot.take(_bytes(item)):
                    sink.write(chunk.view(torch.uint8).numpy().data)
                    self._get_on()
        self.written[name] = sink.facts()
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(item.index, _bytes(item), None) for item in plan.items])
        return done


class SliceReader(dcp.HuggingFaceStorageReader):
    """Reads the headers once, however many times it is read from."""

    _metadata: Metadata | None = None

    def read_metadata(self) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata()
        return self._metadata


def _bytes(item: WriteItem) -> int:
    return _chunk_of(item).sizes[0] * ELEMENT


def _chunk_of(item: WriteItem) -> ChunkStorageMetadata:
    assert item.tensor_data is not None  # it is no blob
    return item.tensor_data.chunk


def _place(item: WriteItem) -> tuple[str, int, int]:
    """Key, offset and number of elements."""
    chunk = _chunk_of(item)
    return item.index.fqn, chunk.offsets[0], chunk.sizes[0]
