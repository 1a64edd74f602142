"""The one checkpoint mechanism: torch.distributed.checkpoint over flat slices, in safetensors.

Every parameter's fp32 master and Adam moments are saved as one flat global tensor, of which each rank writes its
ZeRO partition as a 1-D slice; experts of one layer form one tensor over all expert-parallel ranks. So a checkpoint
loads on any number of ranks, any expert-parallel size and any offload tier, and nothing in it is a pickle.

A checkpoint is written to a temporary folder, checksummed into its manifest, flushed, renamed, and only then does
`latest` point at it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from deepspeed.utils import (
    groups,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from training.data.corpus import sha256_of
from training.engine import Engine
from training.errors import UserError

FORMAT = 1
MOMENTS = ("exp_avg", "exp_avg_sq")
MANIFEST, LATEST = "manifest.json", "latest"


class Slice(Tensor):
    """A 1-D part [offset, offset + n) of a flat global tensor, as torch.distributed.checkpoint wants to see it."""

    local: Tensor
    offset: int
    length: int

    @staticmethod
    def of(local: Tensor, offset: int, length: int) -> Slice:
        made = Tensor._make_subclass(Slice, local)
        made.local, made.offset, made.length = local, offset, length
        return made

    def size(self, dim: int | None = None) -> Any:
        """The global size: the load planner compares it with what was saved."""
        return torch.Size([self.length]) if dim is None else self.length

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.offset]), torch.Size([self.local.numel()]))

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        data = TensorWriteData(self._chunk(), TensorProperties.create_from_tensor(self.local), self.size())
        return [WriteItem(MetadataIndex(fqn, torch.Size([self.offset])), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]

    def __get_tensor_shard__(self, _: MetadataIndex) -> Tensor:
        return self.local


def save(engine: Engine, folder: Path, step: int, facts: dict[str, Any], keep: int) -> Path:
    """Write checkpoint `step-<step>` into `folder`, point `latest` at it, keep the newest `keep`. Collective.

    `facts` go into the manifest as they are (JSON): data position, recipe, tokenizer hash, wandb id …
    """
    final, partial = folder / f"step-{step}", folder / f".step-{step}.partial"
    try:
        _write_all(engine, partial)
        _finish(engine, partial, final, step, facts, keep)
    except (OSError, CheckpointException) as error:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{final}: cannot be written ({_reason(error)}); the checkpoints before it are whole") from None
    return final


def _reason(error: BaseException) -> str:
    """The words of the first failing rank, in one line."""
    for failure in getattr(error, "failures", {}).values():
        return _reason(failure[0])
    return " ".join(str(error).split())


def _write_all(engine: Engine, partial: Path) -> None:
    if dist.get_rank() == 0:
        for left in partial.parent.glob(".step-*.partial"):  # of a save that was cut off
            shutil.rmtree(left)
        partial.mkdir(parents=True)
    dist.barrier()
    state = {key: Slice.of(value, *place) for key, value, place in _states(engine)}
    dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True))
    dist.barrier()


def _finish(engine: Engine, partial: Path, final: Path, step: int, facts: dict[str, Any], keep: int) -> None:
    """Checksums, manifest, rename, and then `latest`."""
    folder = final.parent
    if dist.get_rank() == 0:
        files = {path.name: sha256_of(path) for path in sorted(partial.iterdir())}
        manifest = {"format": FORMAT, "step": step, "adam_step": _adam_step(engine), "files": files, **facts}
        _write(partial / MANIFEST, json.dumps(manifest, ensure_ascii=False, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(folder)
        _write(folder / f"{LATEST}.partial", final.name)
        (folder / f"{LATEST}.partial").rename(folder / LATEST)
        _sync(folder)
        _prune(folder, step, keep)
    dist.barrier()


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint; None for a run that was stopped before its first. Raises UserError for a damaged one."""
    return read_manifest(folder) if (folder / LATEST).exists() else None


def read_manifest(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that `latest` names, and its manifest, its files verified. Raises UserError."""
    try:
        path = folder / (folder / LATEST).read_text(encoding="utf-8").strip()
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no checkpoint there; start the run without --resume") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: its newest checkpoint cannot be read ({error})") from None
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path}: checkpoint format {manifest.get('format')}, this program reads {FORMAT}")
    for name, digest in manifest["files"].items():
        if not (path / name).is_file() or sha256_of(path / name) != digest:
            raise UserError(f"{path / name}: missing or damaged (its SHA-256 differs from the manifest's)")
    return path, manifest


def load(engine: Engine, path: Path, manifest: dict[str, Any], blank_step: Any) -> None:
    """Read a checkpoint into a new engine, whatever layout wrote it. Collective.

    `blank_step()` takes one optimizer step of zero gradients at learning rate 0. After the masters are set it
    brings DeepSpeed's own machinery to create the optimizer state and to renew the 16-bit working copies, on
    whichever tier they live.
    """
    state = {key: Slice.of(torch.zeros_like(value), *place) for key, value, place in _states(engine, moments=False)}
    _read(state, path)
    for name, parameter, _ in _partitions(engine.model):
        _put(safe_set_local_fp32_param, parameter, state[f"{name}.master"])
    blank_step()
    del state
    state = {key: Slice.of(torch.zeros_like(value), *place) for key, value, place in _states(engine, master=False)}
    _read(state, path)
    for name, parameter, _ in _partitions(engine.model):
        for moment in MOMENTS:
            _put(safe_set_local_optimizer_state, parameter, state[f"{name}.{moment}"], moment)
    _set_adam_step(engine, manifest["adam_step"])


def _read(state: dict[str, Slice], path: Path) -> None:
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(path)))


def _partitions(model: nn.Module) -> Iterator[tuple[str, Any, tuple[int, int, int]]]:
    """Name, parameter and (real elements, offset, global length) of each ZeRO partition that holds any here."""
    parameter: Any  # under ZeRO-3, with attributes that torch does not know
    for name, parameter in model.named_parameters():
        share = parameter.ds_tensor.ds_numel
        start = parameter.ds_zero_partition_rank * share
        real = min(share, parameter.ds_numel - start)  # the last partition is padded
        if real > 0:
            experts, rank = _expert_parallel(parameter)
            yield name, parameter, (real, rank * parameter.ds_numel + start, experts * parameter.ds_numel)


def _expert_parallel(parameter: Any) -> tuple[int, int]:
    if getattr(parameter, "ds_zero_placement_family", None) != "autoep_expert":
        return 1, 0
    name = parameter.ds_zero_partition_group_name
    return groups._get_expert_parallel_world_size(name), groups._get_expert_parallel_rank(name)


def _states(engine: Engine, master: bool = True, moments: bool = True) -> Iterator[tuple[str, Tensor, tuple[int, int]]]:
    """Key, local value (without padding) and (offset, global length) of each state of each partition."""
    for name, parameter, (real, offset, length) in _partitions(engine.model):
        if master:
            # Cloned: what comes from NVMe lies in a buffer that the next read uses again.
            yield f"{name}.master", safe_get_local_fp32_param(parameter)[:real].detach().clone(), (offset, length)
        for moment in MOMENTS if moments else ():
            value = safe_get_local_optimizer_state(parameter, moment)[:real].clone()
            yield f"{name}.{moment}", value, (offset, length)


def _put(setter: Any, parameter: Any, part: Slice, *key: str) -> None:
    whole = part.local.new_zeros(parameter.ds_tensor.ds_numel)
    whole[: part.local.numel()] = part.local
    setter(parameter, whole, *key)


def _adam_states(engine: Engine) -> list[dict[str, Any]]:
    return [state for state in engine.deepspeed.optimizer.optimizer.state.values() if "step" in state]


def _adam_step(engine: Engine) -> int:
    return int(_adam_states(engine)[0]["step"])


def _set_adam_step(engine: Engine, step: int) -> None:
    for state in _adam_states(engine):
        state["step"] = torch.full_like(state["step"], step) if isinstance(state["step"], Tensor) else step
    adam = engine.deepspeed.optimizer.optimizer
    if not hasattr(adam, "ds_opt_adam"):
        return
    # DeepSpeed's CPU Adam keeps beta^t as a running product; only the same multiplications give the same bits.
    one, group = torch.zeros(1), adam.param_groups[0]
    for past in range(1, step + 1):
        adam.ds_opt_adam.adam_update(
            adam.opt_id,
            past,
            0.0,
            *group["betas"],
            group["eps"],
            0.0,
            True,
            one,
            one.clone(),
            one.clone(),
            one.clone(),
        )


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make renames in `folder`, and the files of its checkpoints, last through a power cut."""
    for path in (folder, *(p for p in folder.glob("step-*/*.safetensors"))):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _prune(folder: Path, step: int, keep: int) -> None:
    """Keep the newest `keep` checkpoints up to `step`; later ones are left alone."""
    steps = sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))
    for old in [number for number in steps if number <= step][:-keep]:
        shutil.rmtree(folder / f"step-{old}")
