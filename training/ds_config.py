"""The ds_config: DeepSpeed's JSON with parallelism, offload and precision, and our `m6` block in it.

What DeepSpeed 0.19.8 would crash on, hang on, get silently wrong or ignore is refused here, before anything is
built. Imports no torch, so that a plan and a check are instant.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from model.config import Capacity, ModelConfig
from training.errors import UserError
from training.machine import multiplies_bf16
from training.recipe import Recipe, read_mapping

FOLDER = Path(__file__).resolve().parent.parent / "ds_configs"
TIERS = ("none", "cpu", "nvme")

# Bytes of one parameter's states on NVMe: fp32 master, two Adam moments and the gradient; 16-bit working copy.
NVME_OPTIMIZER_BYTES, NVME_PARAMETER_BYTES = 16, 2

TOP_LEVEL = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "bf16", "zero_optimization", "expert_parallel", "data_types", "communication_data_type", "aio",
    "comms_logger", "flops_profiler", "wall_clock_breakdown", "m6",
}  # fmt: skip
M6_BLOCK = {"capacity", "capacity_factor", "recompute"}

_REMOVED = "DeepSpeed 0.19.8 has removed it: take it out"
_OURS = "the run tracks itself (recipe: tracking): take it out"
REFUSED = {
    "optimizer": "the optimizer is in the recipe (optimizer.lr …): take it out",
    "scheduler": "the schedule is in the recipe (schedule.warmup …): take it out",
    "fp16": "only bf16 with fp32 masters is supported: use bf16",
    "activation_checkpointing": "it is the reentrant form, which loses gradients of shared layers: use m6.recompute",
    "checkpoint": "checkpoints are the program's own: take it out",
    "load_universal_checkpoint": "checkpoints are the program's own: take it out",
    "sequence_parallel_size": "DeepSpeed refuses it with expert parallelism under ZeRO-3: take it out",
    "tensor_parallel": "DeepSpeed refuses it with offload: take it out",
    "zenflow": "it fails on three-dimensional expert weights: take it out",
    "compile": "DeepSpeed refuses it with expert parallelism under ZeRO-3: take it out",
    "use_data_before_expert_parallel": "expert groups are consecutive ranks: take it out",
    **dict.fromkeys(("wandb", "tensorboard", "csv_monitor", "comet"), _OURS),
    **dict.fromkeys(
        ("elasticity", "nebula", "compression_training", "amp", "quantize_training", "sparse_gradients", "eigenvalue",
         "sparse_attention", "graph_harvesting", "curriculum_learning", "progressive_layer_drop"),
        _REMOVED,
    ),
}  # fmt: skip
REFUSED_ZERO = {
    "zero_hpz_partition_size": "DeepSpeed refuses it with expert parallelism",
    "zero_quantized_gradients": "DeepSpeed refuses it with expert parallelism",
    "zero_quantized_weights": "it would change the losses silently",
    "zenflow": "it fails on three-dimensional expert weights",
    "mics_shard_size": _REMOVED,
    "mics_hierarchical_params_gather": _REMOVED,
    "zeropp_loco_param": _REMOVED,
    "offload_states": "use offload_param and offload_optimizer",
}
REFUSED_OFFLOAD = {
    "ratio": "DeepSpeed would not apply the learning-rate schedule to the part that stays on the device",
    "super_offload": "it needs CUDA superchips and steps outside the engine's order",
}


@dataclass(frozen=True)
class DSConfig:
    """A checked ds_config, resolved for one recipe and one number of ranks."""

    values: dict[str, Any]  # what deepspeed.initialize gets
    expert_parallel: int
    model: ModelConfig  # the recipe's, with this file's capacity
    recompute: bool
    micro_batch: int
    accumulation: int
    parameter_tier: str
    optimizer_tier: str

    @property
    def precision(self) -> str:
        return "bf16, fp32 masters" if self.values["bf16"]["enabled"] else "fp32"


def default_path(gpus: int) -> Path:
    """The file that `ds_config: auto` means on a machine with so many GPUs in the job's node."""
    return FOLDER / ("cpu-offload.json" if not gpus else "gpu-1.json" if gpus == 1 else "gpu-8.json")


def resolve(recipe: Recipe, world: int, gpus: int, swap: Path) -> DSConfig:
    """Read the recipe's ds_config, check it against the recipe and `world` ranks, fill in what is derived.

    `gpus`: GPUs of this node (0: CPU only); `swap`: folder for `nvme_path: auto`. Raises UserError.
    """
    path = default_path(gpus) if recipe.ds_config == "auto" else Path(recipe.ds_config)
    values = _merge(read_mapping(path), recipe.ds)
    try:
        return _resolve(values, recipe, world, gpus, swap)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _resolve(values: dict[str, Any], recipe: Recipe, world: int, gpus: int, swap: Path) -> DSConfig:
    _check_keys(values)
    bf16 = _bf16(values.get("bf16", {}), gpus)
    zero = values.get("zero_optimization", {})
    _check_zero(zero)
    block = values.get("m6", {})
    model = _with_capacity(recipe.model_shape(), block)
    parallel = _expert_parallel(values, model, world)
    micro, accumulation = _batch(values, recipe, world)
    offload = {name: dict(zero.get(name) or {}) for name in ("offload_param", "offload_optimizer")}
    tiers = {name: _tier(name, settings) for name, settings in offload.items()}
    zero = zero | {name: settings for name, settings in offload.items() if tiers[name] != "none"}
    _resolve_nvme(zero, tiers, model, parallel, world, swap)
    values = values | {
        "train_batch_size": recipe.global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": recipe.optimizer.clip,
        "bf16": bf16,
        "zero_optimization": zero,
        "optimizer": _optimizer(recipe, tiers["offload_optimizer"]),
        "steps_per_print": 2**31,
    }
    recompute = block.get("recompute", False)
    return DSConfig(
        values,
        parallel,
        model,
        recompute,
        micro,
        accumulation,
        tiers["offload_param"],
        tiers["offload_optimizer"],
    )


def _check_keys(values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if key in REFUSED:
            raise UserError(f"{key}: {REFUSED[key]}")
        _check_known(key, TOP_LEVEL, "")
        if key in ("bf16", "zero_optimization", "expert_parallel", "m6", "aio", "data_types"):
            _check_mapping(key, value)
    for key in values.get("m6", {}):
        _check_known(key, M6_BLOCK, "m6.")
    if not isinstance(values.get("m6", {}).get("recompute", False), bool):
        raise UserError("m6.recompute: must be true or false")
    if values.get("bf16", {}).get("bf16_master_weights_and_grads"):
        raise UserError("bf16.bf16_master_weights_and_grads: masters are fp32 (16-bit ones lose small updates)")


def _bf16(block: Mapping[str, Any], gpus: int) -> dict[str, Any]:
    """`enabled: auto` is bf16 (with fp32 masters) where the hardware multiplies it, else plain fp32."""
    enabled = block.get("enabled", "auto")
    if enabled not in (True, False, "auto"):
        raise UserError(f"bf16.enabled={enabled!r}: must be true, false or auto")
    return {**block, "enabled": (gpus > 0 or multiplies_bf16()) if enabled == "auto" else enabled}


def _check_zero(zero: Mapping[str, Any]) -> None:
    if zero.get("stage") != 3:
        raise UserError(f"zero_optimization.stage={zero.get('stage')}: only 3 is supported (experts, offload, saving)")
    for key, reason in REFUSED_ZERO.items():
        if key in zero and zero[key] not in (False, 1, None):
            raise UserError(f"zero_optimization.{key}={zero[key]}: {reason}")


def _with_capacity(model: ModelConfig, block: Mapping[str, Any]) -> ModelConfig:
    if "capacity" in block and block["capacity"] not in get_args(Capacity):
        raise UserError(f"m6.capacity={block['capacity']!r}: must be one of {', '.join(get_args(Capacity))}")
    try:
        return dataclasses.replace(model, **{key: block[key] for key in block.keys() & {"capacity", "capacity_factor"}})
    except (ValueError, TypeError) as error:
        raise UserError(f"m6.{error}") from None


def _expert_parallel(values: Mapping[str, Any], model: ModelConfig, world: int) -> int:
    block = values.get("expert_parallel", {})
    if block.get("enabled"):
        raise UserError(
            "expert_parallel.enabled=true: DeepSpeed would gather a whole layer's experts on every rank; "
            "set it to false, the model shards its own (autoep_size counts)"
        )
    parallel = block.get("autoep_size", 1)
    key = f"expert_parallel.autoep_size={parallel}"
    if not isinstance(parallel, int) or parallel < 1:
        raise UserError(f"{key}: must be a whole number from 1")
    if world % parallel:
        raise UserError(f"{key} does not divide the {world} rank(s) of this job; set ds.expert_parallel.autoep_size")
    if model.experts % parallel:
        raise UserError(f"{key} does not divide the model's {model.experts} experts")
    if parallel > 1 and not model.experts:
        raise UserError(f"{key}: the model has no experts; set it to 1")
    return parallel


def _batch(values: Mapping[str, Any], recipe: Recipe, world: int) -> tuple[int, int]:
    micro = values.get("train_micro_batch_size_per_gpu")
    if not isinstance(micro, int) or micro < 1:
        raise UserError(f"train_micro_batch_size_per_gpu={micro}: must be a whole number from 1")
    if recipe.global_batch % (micro * world):
        raise UserError(
            f"train_micro_batch_size_per_gpu={micro} times {world} rank(s) does not divide the recipe's "
            f"global_batch={recipe.global_batch}"
        )
    accumulation = recipe.global_batch // (micro * world)
    derived = {
        "train_batch_size": recipe.global_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": recipe.optimizer.clip,
    }
    for key, value in derived.items():
        if values.get(key, "auto") not in ("auto", value):
            raise UserError(f"{key}={values[key]} disagrees with the recipe, which makes it {value}: take it out")
    return micro, accumulation


def _tier(name: str, settings: Mapping[str, Any]) -> str:
    tier = settings.get("device", "none")
    if tier not in TIERS:
        raise UserError(f"zero_optimization.{name}.device={tier!r}: must be one of {', '.join(TIERS)}")
    for key, reason in REFUSED_OFFLOAD.items():
        if settings.get(key) not in (None, False, 1, 1.0):
            raise UserError(f"zero_optimization.{name}.{key}={settings[key]}: {reason}")
    return tier


def _optimizer(recipe: Recipe, tier: str) -> dict[str, Any]:
    settings = recipe.optimizer
    params: dict[str, Any] = {
        "lr": settings.lr, "betas": list(settings.betas), "eps": settings.eps, "weight_decay": settings.weight_decay
    }  # fmt: skip
    if tier == "none":
        # torch's own AdamW: DeepSpeed's fused one would be compiled with the CUDA toolkit at the first step.
        params["torch_adam"] = True
    return {"type": "AdamW", "params": params}


def _resolve_nvme(
    zero: dict[str, Any], tiers: Mapping[str, str], model: ModelConfig, parallel: int, world: int, swap: Path
) -> None:
    """Fill in `auto` paths and buffers, and refuse what cannot hold the job."""
    needed = 0
    held = model.parameter_counts().total / world * _ranks_here(world)
    for name, size in (("offload_param", NVME_PARAMETER_BYTES), ("offload_optimizer", NVME_OPTIMIZER_BYTES)):
        if tiers[name] != "nvme":
            continue
        needed += int(held * size)
        if zero[name].get("nvme_path", "auto") == "auto":
            zero[name]["nvme_path"] = str(swap)
        _check_folder(name, Path(zero[name]["nvme_path"]), needed)
    if tiers["offload_param"] == "nvme":
        _resolve_buffers(zero["offload_param"], model, parallel, world)


def _resolve_buffers(settings: dict[str, Any], model: ModelConfig, parallel: int, world: int) -> None:
    largest = largest_partition(model, parallel, world)
    if settings.get("buffer_size", "auto") == "auto":
        settings["buffer_size"] = largest
    if settings["buffer_size"] < largest:
        raise UserError(
            f"zero_optimization.offload_param.buffer_size={settings['buffer_size']} is less than the largest "
            f"partition of a weight, {largest} elements: raise it, or say auto"
        )


def _check_folder(name: str, folder: Path, needed: int) -> None:
    key = f"zero_optimization.{name}.nvme_path={folder}"
    parent = folder
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{key}: cannot be written to")
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(f"{key}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed on this node")


def largest_partition(model: ModelConfig, parallel: int, world: int) -> int:
    """Elements of the largest ZeRO-3 partition of one weight on one rank."""
    inner = model.ffn * (2 if model.gated_experts else 1)
    replicated = max(
        model.vocab * model.hidden,
        3 * model.hidden**2,
        model.image_channels * model.hidden,
        0 if model.experts else model.hidden * inner,
    )
    experts = model.experts // parallel * model.hidden * inner
    return max(math.ceil(replicated / world), math.ceil(experts / (world // parallel)))


def _ranks_here(world: int) -> int:
    return min(world, int(os.environ.get("LOCAL_WORLD_SIZE", world)))


def _check_known(key: str, known: set[str], prefix: str) -> None:
    if key not in known:
        close = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(sorted(known))}"
        raise UserError(f"{prefix}{key} is unknown; {hint}")


def _check_mapping(key: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise UserError(f"{key}={value!r}: must be a block of settings")


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(base)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else copy.deepcopy(value)
    return merged
