"""A checkpoint's weights as files for inference, and the model out of them.

An export is a folder in the manner of Hugging Face: whole, named weights in safetensors (with an index where they are
several files), `config.json`, and what turns text and pictures into the model's input: the tokenizer, and the network
that describes pictures. Neither way needs a process group, or memory for the whole model.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import align_module_device, get_balanced_memory, set_module_tensor_to_device
from huggingface_hub import split_torch_state_dict_into_shards
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.config import ModelConfig
from model.m6 import M6, Layer
from model.vision import PatchEmbedding
from training import checkpoint_files
from training.errors import UserError
from training.files import flush
from training.recipe import Recipe, one_line, parse_recipe, shown
from training.run import BACKGROUND
from training.tensor_files import head
from training.weights import SavedWeights, without_values

if TYPE_CHECKING:  # its import takes seconds, and loading does without
    from training.background import Background
    from training.data.corpus import Corpus

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
FILE_NAME = re.compile(r"model(-[0-9]+-of-[0-9]+)?\.safetensors")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CODES = {"fp32": "F32", "bf16": "BF16"}  # as safetensors has it
FITS = 0.8  # of what is free may be weights

Placement = dict[str, int | str]


class Description(BaseModel):
    """`config.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_type: Literal["m6"] = "m6"
    dtype: Literal["fp32", "bf16"]
    model: ModelConfig
    text_positions: int  # source and target tokens of a row in training, at the most
    step: int
    data: str  # fingerprint of the corpus
    tokenizer: str  # SHA-256 of its file
    feature_network: str | None  # likewise; None where patches are pixels


@dataclass(frozen=True)
class Plan:
    """An export, settled before anything is written."""

    description: Description
    weights: dict[str, Tensor]  # without values
    values: SavedWeights
    files: dict[str, list[str]]  # names of the weights in each file
    companions: list[Path]  # copied as they are
    background: Background | None  # of a model that can find

    @property
    def bytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights.values())


def plan(path: Path, manifest: dict[str, Any], recipe: Recipe, corpus: Corpus, dtype: str, shard_size: str) -> Plan:
    """How to export the checkpoint `path` in `dtype` (fp32, bf16), to files of `shard_size` (5GB) at the most.

    A weight larger than that has a file of its own. Raises UserError if the checkpoint is not of this corpus, or is not
    what its recipe says.
    """
    from training.background import background_of  # its import takes seconds, and loading does without

    for key, own in (("tokenizer", corpus.tokenizer.sha256), ("data", corpus.fingerprint)):
        if manifest.get(key) != own:
            raise UserError(f"{path}: it was trained on another {key} than {corpus.folder}; give its own with --data")
    values = SavedWeights(path, manifest["files"], recipe.model_shape())
    shape = replace(recipe.model_shape(), adapter_rank=0)  # they are merged
    weights: dict[str, Tensor] = dict(without_values(shape).to(DTYPES[dtype]).named_parameters())
    try:
        split = split_torch_state_dict_into_shards(weights, max_shard_size=shard_size)
    except ValueError:
        raise UserError(f"--shard-size {shard_size}: must be a size such as 5GB or 500MB") from None
    network = corpus.feature_network if shape.image_input == "features" else None
    description = Description(
        dtype=dtype,
        model=shape,
        text_positions=recipe.text_positions,
        step=manifest["step"],
        data=corpus.fingerprint,
        tokenizer=corpus.tokenizer.sha256,
        feature_network=corpus.feature_network_sha256 if network else None,
    )
    companions = [corpus.tokenizer.path, *([network] if network else [])]
    background = background_of(path, manifest, recipe, corpus) if "contrast" in recipe.learned else None
    return Plan(description, weights, values, split.filename_to_tensors, companions, background)


def write(plan: Plan, target: Path, advance: Callable[[int], object]) -> None:
    """Carry out a plan; `advance` is told of bytes of weights as they are written. Raises UserError."""
    with _new_folder(target) as folder:
        for name, weights in plan.files.items():
            _write_weights(folder / name, plan, weights, advance)
        if len(plan.files) > 1:
            where = {weight: name for name, weights in plan.files.items() for weight in weights}
            index = {"metadata": {"total_size": plan.bytes}, "weight_map": dict(sorted(where.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
        (folder / CONFIG).write_text(plan.description.model_dump_json(indent=1), encoding="utf-8")
        if plan.background:
            plan.background.save(folder / BACKGROUND)
        for file in plan.companions:
            shutil.copyfile(file, folder / file.name)


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder that has its name only once everything in it is on the disk, and else is gone."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was cut off
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.iterdir(), partial):
            flush(path)
        partial.rename(target)
        flush(target.parent)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({one_line(str(error))})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_weights(path: Path, plan: Plan, names: list[str], advance: Callable[[int], object]) -> None:
    dtype = plan.description.dtype
    tensors = [(name, CODES[dtype], plan.weights[name].shape, plan.weights[name].nbytes) for name in names]
    with path.open("wb") as file:
        file.write(head(tensors, {"format": "pt"}))
        for name in names:
            for values in plan.values.all(name):
                rounded = values.to(DTYPES[dtype]).view(torch.uint8)
                file.write(rounded.numpy().data)
                advance(rounded.nbytes)


def load_exported(
    folder: Path,
    device_map: Literal["auto"] | Placement = "auto",
    max_memory: Mapping[int | str, int | str] | None = None,
) -> M6:
    """The model of an export, ready for inference, on the devices that there are.

    `device_map` places modules by name on a GPU's number, "cpu" or "disk"; "auto" fills GPUs, then memory, within
    `max_memory` (by GPU number and "cpu", in bytes or as "10GB"; else what is free), and leaves the rest on the disk.
    That rest stays in the export's own files, which must remain there, and is read whenever it is used, a layer's
    experts at once. Raises UserError for a folder that is no export, or whose files are not what it says.
    """
    gpus = torch.cuda.device_count()
    if away := [device for device in max_memory or () if isinstance(device, int) and device >= gpus]:
        raise UserError(f"max_memory: there is no GPU {away[0]} here, but {gpus}; leave it out")
    description = read_description(folder)
    model = without_values(description.model).to(DTYPES[description.dtype])
    weights: dict[str, Tensor] = dict(model.named_parameters())
    placement = _place(model, max_memory) if device_map == "auto" else device_map
    on_disk: dict[str, Any] = {}
    for path, names in _files(folder, weights).items():
        with _opened(path) as file:
            _check(path, file, names, weights, CODES[description.dtype])
            for name in names:
                device = _device(name, placement)
                if device == "disk":
                    on_disk[name] = {"safetensors_file": str(path), "weight_name": name}
                else:
                    set_module_tensor_to_device(model, name, device, value=file.get_tensor(name))
    dispatch_model(model, placement, offload_index=on_disk or None)
    for part in (*model.children(), *model.layers):
        # Each part answers on the device that it was called from, since what is between parts is on one device.
        if hook := getattr(part, "_hf_hook", None):
            hook.io_same_device = True
    return model


def fits(folder: Path) -> bool:
    """Whether an export's weights fit what is free on the first GPU, or else in memory."""
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    return sum(path.stat().st_size for path in folder.glob("model*.safetensors")) < FITS * free


def weights_of(model: M6) -> Iterator[Tensor]:
    """All weights, in the order of their names in the model, wherever they are kept, a module's own at once."""
    for module in model.modules():
        with align_module_device(module):
            yield from module.parameters(recurse=False)


def load_checkpoint(path: Path) -> tuple[M6, Recipe, dict[str, Any]]:
    """A checkpoint's fp32 model, ready for inference on the first GPU or the CPU; its training's recipe; its manifest.

    Adapters are merged. Raises UserError if it is damaged.
    """
    with checkpoint_files.reading(path):
        if problems := checkpoint_files.problems(path):
            raise UserError(f"{problems[0]}; `m6 verify` shows which --step is whole")
        manifest = checkpoint_files.read_manifest(path)
        recipe = parse_recipe(manifest.get("recipe", {}), [], str(path / checkpoint_files.MANIFEST))
        saved = SavedWeights(path, manifest["files"], recipe.model_shape())
        model = without_values(replace(recipe.model_shape(), adapter_rank=0))
        for name, weight in dict(model.named_parameters()).items():
            device = 0 if torch.cuda.is_available() else "cpu"
            values = torch.cat(list(saved.all(name)))
            set_module_tensor_to_device(model, name, device, value=values.view(weight.shape))
    return model, recipe, manifest


def _place(model: M6, max_memory: Mapping[int | str, int | str] | None) -> Placement:
    whole = [Layer.__name__, PatchEmbedding.__name__]
    room = get_balanced_memory(model, max_memory=max_memory and dict(max_memory), no_split_module_classes=whole)
    return infer_auto_device_map(model, max_memory=room, no_split_module_classes=whole)


def _device(name: str, placement: Placement) -> int | str:
    """Of the smallest module that is placed and has the weight."""
    while name not in placement:
        assert name, "the device map leaves a weight out"
        name = name.rpartition(".")[0]
    return placement[name]


def read_description(folder: Path) -> Description:
    """Of an export. Raises UserError."""
    try:
        return Description.model_validate_json((folder / CONFIG).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{folder}: no export there ({CONFIG} is missing); `m6 export` makes one") from None
    except OSError as error:
        raise UserError(f"{folder / CONFIG}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise UserError(f"{folder / CONFIG}: {place or 'it'}: {one_line(problem['msg'])}") from None


def _files(folder: Path, weights: dict[str, Tensor]) -> dict[Path, list[str]]:
    """The files of an export, and which weights its index has in each."""
    where: Any = dict.fromkeys(weights, WEIGHTS)
    if (folder / INDEX).exists():
        try:
            where = json.loads((folder / INDEX).read_bytes())["weight_map"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            where = None
    if not isinstance(where, dict) or where.keys() != weights.keys():
        raise UserError(f"{folder / INDEX}: does not list the weights of the model that {CONFIG} describes")
    files: dict[Path, list[str]] = {}
    for weight, name in where.items():
        if not FILE_NAME.fullmatch(str(name)):
            raise UserError(f"{folder / INDEX}: {shown(name)} is no name of an export's file")
        files.setdefault(folder / name, []).append(weight)
    return files


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(str(error))})") from None


def _check(path: Path, file: Any, names: list[str], weights: dict[str, Tensor], dtype: str) -> None:
    """Raise UserError unless a file holds just the weights `names`, each as the model wants it."""
    if odd := sorted(set(names) ^ set(file.keys())):
        raise UserError(f"{path}: {shown(odd[0])} is {'missing' if odd[0] in names else 'not listed there'}")
    for name in names:
        entry, wanted = file.get_slice(name), list(weights[name].shape)
        if (entry.get_dtype(), entry.get_shape()) != (dtype, wanted):
            raise UserError(f"{path}: {name} is {entry.get_dtype()} {entry.get_shape()}, not {dtype} {wanted}")
