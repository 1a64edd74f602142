"""The ds_config: DeepSpeed's JSON with parallelism, offload and precision, and our `m6` block in it.

What DeepSpeed 0.19.8 would crash on, hang on, get silently wrong or ignore is refused here, before anything is
built. Imports no torch, so that a plan and a check are instant.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from model.config import Capacity, ModelConfig
from training import placement
from training.errors import UserError
from training.machine import has_libaio, multiplies_bf16
from training.placement import CPU, DEVICE, NVME, OPTIMIZER, PARAMETERS, Elements, Placement, Sizes
from training.recipe import Recipe, one_line, read_mapping, shown

FOLDER = Path(__file__).resolve().parent.parent / "ds_configs"
TIERS = ("none", "cpu", "nvme")
BLOCKS = {PARAMETERS: "offload_param", OPTIMIZER: "offload_optimizer"}  # DeepSpeed's, by kind of state
COMPACT = "8-bit"
OPTIMIZER_STATES = ("fp32", COMPACT)

BYTES_OF_A_MASTER = 4
BUFFERS_WITH_ADAPTERS = 9  # of a layer's experts and their adapters, and one that is still held
MOST_ROWS = 32  # of a micro-batch by default: more are no faster on CPU, and take more memory
LEAST_SWAPPED = 2**20  # bytes of a tensor, or aio.block_size if that is more: DeepSpeed keeps smaller ones in memory

# What a setting may hold, in the words of the message that refuses anything else.
FLAG, COUNT, SIZE = "true or false", "a whole number from 0 to 1e12", "a whole number from 1 to 1e12"
BUFFERS, DEPTH = "a whole number from 4 to 4096", "a whole number from 1 to 4096"
BYTES = "a whole number from 1 to 2^30"
LAYERS = f"layers such as 0-5,8 or {placement.OUTSIDE}"
NUMBER, TEXT, BLOCK = "a number from 0", "text", "a block of settings"
DTYPE, TIER, CAPACITY = "fp32 or bf16", ", ".join(TIERS), ", ".join(get_args(Capacity))
STATES = " or ".join(OPTIMIZER_STATES)
AUTO = " or auto"
FITS: dict[str, Callable[[Any], bool]] = {
    FLAG: lambda value: isinstance(value, bool),
    COUNT: lambda value: _is_whole(value, 0, 10**12),
    SIZE: lambda value: _is_whole(value, 1, 10**12),
    # Four buffers hold a layer's expert tensors, or one tensor's master, gradient and moments: fewer are a crash.
    BUFFERS: lambda value: _is_whole(value, 4, 4096),
    BYTES: lambda value: _is_whole(value, 1, 2**30),
    DEPTH: lambda value: _is_whole(value, 1, 4096),  # buffers of a block are made for each
    NUMBER: lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf,
    TEXT: lambda value: isinstance(value, str) and value != "" and "\0" not in value,
    BLOCK: lambda value: isinstance(value, Mapping),
    DTYPE: lambda value: value in ("fp32", "bf16"),
    TIER: lambda value: value in TIERS,
    CAPACITY: lambda value: value in get_args(Capacity),
    LAYERS: lambda value: isinstance(value, str | int) and not isinstance(value, bool),
    STATES: lambda value: value in OPTIMIZER_STATES,
}

# Every setting that is known to work under ZeRO-3; blocks that are not listed are left to DeepSpeed.
SETTINGS: dict[str, dict[str, str]] = {
    "": {
        "train_batch_size": SIZE + AUTO, "train_micro_batch_size_per_gpu": SIZE + AUTO,
        "gradient_clipping": NUMBER + AUTO,
        "gradient_accumulation_steps": SIZE + AUTO, "bf16": BLOCK, "zero_optimization": BLOCK,
        "expert_parallel": BLOCK, "data_types": BLOCK, "communication_data_type": DTYPE, "aio": BLOCK,
        "comms_logger": BLOCK, "flops_profiler": BLOCK, "wall_clock_breakdown": FLAG, "m6": BLOCK,
    },
    "bf16.": {"enabled": FLAG + AUTO, "check_grad_overflow": FLAG},
    "zero_optimization.": {
        "stage": SIZE, "offload_param": BLOCK, "offload_optimizer": BLOCK, "overlap_comm": FLAG,
        "contiguous_gradients": FLAG, "reduce_scatter": FLAG, "reduce_bucket_size": SIZE, "sub_group_size": COUNT,
        "stage3_prefetch_bucket_size": COUNT, "stage3_param_persistence_threshold": COUNT,
        "stage3_model_persistence_threshold": COUNT, "stage3_max_live_parameters": COUNT,
        "stage3_max_reuse_distance": COUNT,
    },
    "zero_optimization.offload_param.": {
        "device": TIER, "nvme_path": TEXT + AUTO, "buffer_count": BUFFERS, "buffer_size": SIZE + AUTO,
        "max_in_cpu": COUNT, "pin_memory": FLAG,
    },
    "zero_optimization.offload_optimizer.": {
        "device": TIER, "nvme_path": TEXT + AUTO, "buffer_count": BUFFERS, "pin_memory": FLAG, "fast_init": FLAG,
    },
    "expert_parallel.": {"enabled": FLAG, "autoep_size": SIZE + AUTO},
    "data_types.": {"grad_accum_dtype": DTYPE + AUTO},
    "aio.": {
        "block_size": BYTES, "queue_depth": DEPTH, "intra_op_parallelism": DEPTH, "single_submit": FLAG,
        "overlap_events": FLAG,
    },
    "m6.": {
        "capacity": CAPACITY, "capacity_factor": NUMBER, "recompute": FLAG, "offload": BLOCK,
        "optimizer_states": STATES,
    },
    "m6.offload.": {"device_bytes": NUMBER, **dict.fromkeys(placement.KINDS, BLOCK)},
    **{f"m6.offload.{kind}.": {"device": LAYERS + AUTO, "cpu": LAYERS, "nvme": LAYERS} for kind in placement.KINDS},
}  # fmt: skip

_REMOVED = "DeepSpeed 0.19.8 has removed it: take it out"
_OURS = "the run tracks itself (recipe: tracking): take it out"
_CHECKPOINTS = "checkpoints are the program's own: take it out"
_WITH_EXPERTS = "DeepSpeed refuses it with expert parallelism under ZeRO-3: take it out"
_ZENFLOW = "it fails on three-dimensional expert weights: take it out"
_PLAIN_SWAPPER = "only the plain swapper, with nothing in flight, can be saved: take it out"
_OFFLOAD = "it is deprecated: use offload_param and offload_optimizer"
REFUSED = {
    "optimizer": "the optimizer is in the recipe (optimizer.lr …): take it out",
    "scheduler": "the schedule is in the recipe (schedule.warmup …): take it out",
    "fp16": "only bf16 with fp32 masters is supported: use bf16",
    "activation_checkpointing": "it is the reentrant form, which loses gradients of shared layers: use m6.recompute",
    "checkpoint": _CHECKPOINTS,
    "load_universal_checkpoint": _CHECKPOINTS,
    "sequence_parallel_size": _WITH_EXPERTS,
    "tensor_parallel": "DeepSpeed refuses it with offload: take it out",
    "zenflow": _ZENFLOW,
    "compile": _WITH_EXPERTS,
    "use_data_before_expert_parallel": "expert groups are consecutive ranks: take it out",
    **dict.fromkeys(("wandb", "tensorboard", "csv_monitor", "comet"), _OURS),
    **dict.fromkeys(
        ("elasticity", "nebula", "compression_training", "amp", "quantize_training", "sparse_gradients", "eigenvalue",
         "sparse_attention", "graph_harvesting", "curriculum_learning", "progressive_layer_drop"),
        _REMOVED,
    ),
    "expert_parallel.enabled": (
        "DeepSpeed would gather a whole layer's experts on every rank; set it to false, the model shards its own "
        "(autoep_size counts)"
    ),
    "bf16.bf16_master_weights_and_grads": "16-bit masters lose small updates: use m6.optimizer_states=8-bit",
    "bf16.bf16_optimizer_states": "it needs 16-bit masters, which lose small updates: use m6.optimizer_states=8-bit",
    "aio.use_gds": "it needs CUDA's cuFile, and its states cannot be saved: take it out",
    **{f"zero_optimization.{key}": reason for key, reason in {
        "zero_hpz_partition_size": _WITH_EXPERTS,
        "zero_quantized_gradients": _WITH_EXPERTS,
        "zero_quantized_weights": "it would change the losses silently: take it out",
        "zero_quantized_nontrainable_weights": "it would change the losses silently: take it out",
        "zenflow": _ZENFLOW,
        **dict.fromkeys(("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"), _REMOVED),
        **dict.fromkeys(("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory", "offload_states"), _OFFLOAD),
        "elastic_checkpoint": _CHECKPOINTS,
        "leaf_module": "expert layers are gathered by their own groups: take it out",
        "offload_optimizer.ratio": (
            "DeepSpeed would not apply the learning-rate schedule to the part that stays on the device: take it out"
        ),
        "offload_optimizer.super_offload": "it needs CUDA superchips and steps outside the engine's order: take it out",
        "offload_optimizer.pipeline_read": _PLAIN_SWAPPER,
        "offload_optimizer.pipeline_write": _PLAIN_SWAPPER,
    }.items()},
}  # fmt: skip
OFF_AT_ONE = {
    "sequence_parallel_size", "zero_optimization.zero_hpz_partition_size", "zero_optimization.offload_optimizer.ratio"
}  # fmt: skip


@dataclass(frozen=True)
class DSConfig:
    """A checked ds_config, resolved for one recipe and one number of ranks."""

    values: dict[str, Any]  # what deepspeed.initialize gets
    expert_parallel: int
    model: ModelConfig  # the recipe's, with this file's capacity
    trained: frozenset[str]  # parts of the model
    recompute: bool
    micro_batch: int
    accumulation: int
    placement: Placement
    elements: Elements  # of a rank
    sizes: Sizes
    optimizer_states: str

    @property
    def swap_folders(self) -> set[Path]:
        """Where NVMe offload keeps what is this run's alone, and worthless after it."""
        zero = self.values["zero_optimization"]
        blocks = [zero.get(name, {}) for name in BLOCKS.values()]
        return {Path(block["nvme_path"]) for block in blocks if block.get("device") == "nvme"}

    @property
    def precision(self) -> str:
        masters = "24-bit masters, 8-bit moments" if self.optimizer_states == COMPACT else "fp32 masters"
        return f"bf16, {masters}" if self.values["bf16"]["enabled"] else "fp32"


def default_path(gpus: int) -> Path:
    """The file that `ds_config: auto` means on a machine with so many GPUs in the job's node."""
    return FOLDER / ("cpu-offload.json" if not gpus else "gpu-1.json" if gpus == 1 else "gpu-8.json")


def resolve(
    recipe: Recipe, world: int, gpus: int, swap: Path, here: bool = True, multiplies: bool | None = None
) -> DSConfig:
    """Read the recipe's ds_config, check it against the recipe and `world` ranks, fill in what is derived.

    `gpus`: GPUs of a node (0: CPU only); `swap`: folder for `nvme_path: auto`; `here`: the job is to run on this
    machine, whose tools and disks are checked, too; `multiplies`: whether the job's devices multiply bf16, which this
    machine is asked if None. Raises UserError.
    """
    path = default_path(gpus) if recipe.ds_config == "auto" else Path(recipe.ds_config)
    values = _merge(read_mapping(path), recipe.ds)
    try:
        return _resolve(values, recipe, world, gpus, swap, here, multiplies)
    except UserError as error:
        source = f"{path} with the changes of ds" if recipe.ds else path
        raise UserError(f"{source}: {one_line(str(error))}") from None


def _resolve(
    values: dict[str, Any], recipe: Recipe, world: int, gpus: int, swap: Path, here: bool, multiplies: bool | None
) -> DSConfig:
    values = _checked(values)
    zero = values.get("zero_optimization", {})
    if zero.get("stage") != 3:
        raise UserError(f"zero_optimization.stage={zero.get('stage')}: only 3 is supported (experts, offload, saving)")
    block = values.get("m6", {})
    model = _with_capacity(recipe.model_shape(), block)
    if not model.image_patches:
        raise UserError("model.image_patches=0: DeepSpeed cannot shard a weight without elements: use at least 1")
    parallel = _expert_parallel(values, model, world)
    micro, accumulation = _batch(values, recipe, world)
    bf16 = _bf16(values.get("bf16", {}), gpus, multiplies)
    states = block.get("optimizer_states", "fp32")
    sums = _sums(values.get("data_types", {}), states)
    sizes = Sizes.of(bf16["enabled"], sums, compact=states == COMPACT)
    elements = Elements.of(model, parallel, world, recipe.trained)
    placed = _placement(zero, block.get("offload", {}), model, elements, sizes, gpus)
    tiers = {name: zero.get(name, {}).get("device", "none") for name in BLOCKS.values()}
    if here:
        _check_tools(tiers, gpus)
    _resolve_nvme(zero, placed.bytes(elements, sizes)[NVME], model, parallel, world, swap, here)
    if tiers["offload_optimizer"] != "none":
        # Swap buffers are as large as the largest sub-group, which else would be a rank's whole share. A sub-group ends
        # as soon as it is large enough to be swapped at all: with one weight, or several small ones. In CPU memory too,
        # because the gradient's norm is summed by sub-groups, and both tiers are to agree to the bit.
        least = max(LEAST_SWAPPED, values.get("aio", {}).get("block_size", 0))
        zero.setdefault("sub_group_size", least // BYTES_OF_A_MASTER)
    if states == COMPACT:
        _check_compact(placed, bf16)
        # DeepSpeed then keeps no fp32 masters: its bf16 ones are the working copies, to which the optimizer adds bits.
        bf16 |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    values = values | {
        "train_batch_size": recipe.global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": recipe.optimizer.clip,
        "bf16": bf16,
        "expert_parallel": {"enabled": False, "autoep_size": parallel},
        "data_types": {"grad_accum_dtype": sums},
        "optimizer": _optimizer(recipe, tiers["offload_optimizer"]),
        "steps_per_print": 2**31,
    }
    return DSConfig(
        values,
        parallel,
        model,
        recipe.trained,
        block.get("recompute", False),
        micro,
        accumulation,
        placed,
        elements,
        sizes,
        states,
    )


def _placement(
    zero: dict[str, Any], block: Mapping[str, Any], model: ModelConfig, elements: Elements, sizes: Sizes, gpus: int
) -> Placement:
    """Which layer's states live where. DeepSpeed's own blocks get the coldest tier (`training/granular.py`)."""
    rest = {kind: zero.get(name, {}).get("device", "none").replace("none", DEVICE) for kind, name in BLOCKS.items()}
    placed = placement.resolve(block, rest, model, elements, sizes)
    for kind, name in BLOCKS.items():
        tiers = placed.of(kind)
        if tiers.coldest != DEVICE:
            zero.setdefault(name, {"pin_memory": gpus > 0})["device"] = tiers.coldest
        if kind in block and "max_in_cpu" in zero.get(name, {}):
            raise UserError(f"zero_optimization.{name}.max_in_cpu: m6.offload.{kind} says what is where: take one out")
        if tiers.coldest == DEVICE:
            zero.pop(name, None)
    return placed


def _sums(block: Mapping[str, Any], states: str) -> str:
    """The type of gradient sums; DeepSpeed's own default is that of the weights."""
    automatic = "bf16" if states == COMPACT else "fp32"
    return block.get("grad_accum_dtype", "auto").replace("auto", automatic)


def _check_compact(placed: Placement, bf16: Mapping[str, Any]) -> None:
    key = f"m6.optimizer_states={COMPACT}"
    if set(placed.optimizer) != {CPU}:
        mixed = len(set(placed.optimizer)) > 1
        way = "take out m6.offload.optimizer" if mixed else "set zero_optimization.offload_optimizer.device=cpu"
        raise UserError(f"{key}: with the optimizer on {placed.optimizer}: {way}, or use fp32")
    if not bf16["enabled"]:
        raise UserError(f"{key}: its weights are bf16, which is off here: set bf16.enabled=true, or use fp32")


def _checked(block: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A copy of the block without what says nothing (null, a refused key that is off). Raises UserError."""
    kept = {}
    for key, value in block.items():
        name = f"{prefix}{key}"
        if value is None or (name in REFUSED and _is_off(name, value)):
            continue
        if name in REFUSED:
            raise UserError(f"{name}={shown(value)}: {REFUSED[name]}")
        wanted = _kind(str(key), prefix)
        kind = wanted.removesuffix(AUTO)
        if not (kind != wanted if value == "auto" else FITS[kind](value)):
            raise UserError(f"{name}={shown(value)}: must be {wanted}")
        if f"{name}." in SETTINGS:
            value = _checked(value, f"{name}.")
        elif isinstance(value, float) and kind != NUMBER:
            value = int(value)  # 1e6 is a whole number too, but not to DeepSpeed's compiled code
        kept[key] = value
    return kept


def _kind(key: str, prefix: str) -> str:
    known = SETTINGS[prefix]
    if key not in known:
        close = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(sorted(known))}"
        raise UserError(f"{prefix}{key} is unknown or untried; {hint}")
    return known[key]


def _is_off(name: str, value: Any) -> bool:
    return value is False or value == {"enabled": False} or (name in OFF_AT_ONE and value is not True and value == 1)


def _is_whole(value: Any, least: int, most: int) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and least <= value <= most and value % 1 == 0


def _bf16(block: Mapping[str, Any], gpus: int, multiplies: bool | None) -> dict[str, Any]:
    """`enabled: auto` is bf16 (with fp32 masters) where the hardware multiplies it, else plain fp32."""
    enabled = block.get("enabled", "auto")
    if enabled == "auto":
        enabled = gpus > 0 or (multiplies_bf16() if multiplies is None else multiplies)
    return {**block, "enabled": enabled}


def _with_capacity(model: ModelConfig, block: Mapping[str, Any]) -> ModelConfig:
    try:
        return dataclasses.replace(model, **{key: block[key] for key in block.keys() & {"capacity", "capacity_factor"}})
    except ValueError as error:
        raise UserError(f"m6.{error}") from None


def _expert_parallel(values: Mapping[str, Any], model: ModelConfig, world: int) -> int:
    block = values.get("expert_parallel", {})
    parallel = block.get("autoep_size", "auto")
    if parallel == "auto":  # the fewest copies of each expert
        return math.gcd(world, model.experts) if model.experts else 1
    key = f"expert_parallel.autoep_size={parallel}"
    if world % parallel:
        raise UserError(f"{key} does not divide the {world} rank(s) of this job; set ds.expert_parallel.autoep_size")
    if model.experts % parallel:
        raise UserError(f"{key} does not divide the model's {model.experts} experts")
    if parallel > 1 and not model.experts:
        raise UserError(f"{key}: the model has no experts; set it to 1")
    return parallel


def _batch(values: Mapping[str, Any], recipe: Recipe, world: int) -> tuple[int, int]:
    micro = values.get("train_micro_batch_size_per_gpu")
    if micro is None:
        raise UserError("train_micro_batch_size_per_gpu is missing: set it to auto, or to a rank's rows")
    if micro == "auto":
        if recipe.global_batch % world:
            raise UserError(f"the recipe's global_batch={recipe.global_batch} does not divide among {world} ranks")
        share, block = recipe.global_batch // world, recipe.block
        if share % block:
            raise UserError(
                f"a rank's share of {share} rows (global_batch={recipe.global_batch} on {world} ranks) is no whole "
                f"number of contrastive groups of {block}: change contrast_pairs={recipe.contrast_pairs}, global_batch "
                "or --ranks"
            )
        fitting = range(block, max(MOST_ROWS, block) + 1, block)
        micro = max(rows for rows in fitting if share % rows == 0)
    if micro % recipe.block:
        raise UserError(
            f"train_micro_batch_size_per_gpu={micro} is not divisible by the {recipe.block} rows of a contrastive "
            "group: say auto, or change the recipe's contrast_pairs"
        )
    if recipe.global_batch % (micro * world):
        raise UserError(
            f"train_micro_batch_size_per_gpu={micro} times {world} rank(s) does not divide the recipe's "
            f"global_batch={recipe.global_batch}; say auto"
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


def _check_tools(tiers: Mapping[str, str], gpus: int) -> None:
    """DeepSpeed compiles its CPU optimizer and its asynchronous file access where they are used."""
    key = "zero_optimization.{}.device={}"
    for name, tier in tiers.items():
        if tier == "nvme" and not has_libaio():
            raise UserError(f"{key.format(name, tier)}: g++ or libaio's headers are missing: install them, or use cpu")
    tier = tiers["offload_optimizer"]
    if tier != "none" and not shutil.which("g++"):
        raise UserError(f"{key.format('offload_optimizer', tier)}: g++ is missing: install it, or use none")
    if tier != "none" and gpus and not (shutil.which("nvcc") or os.environ.get("CUDA_HOME")):
        raise UserError(f"{key.format('offload_optimizer', tier)}: nvcc is missing: set CUDA_HOME, or use none")


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
    zero: dict[str, Any],
    needed: Mapping[str, int],
    model: ModelConfig,
    parallel: int,
    world: int,
    swap: Path,
    here: bool,
) -> None:
    """Fill in `auto` paths and buffers, and refuse what cannot hold the job. `needed`: bytes of a rank by kind."""
    total = 0
    for kind, name in BLOCKS.items():
        if zero.get(name, {}).get("device") != "nvme":
            continue
        total += needed[kind] * _ranks_here(world)
        if zero[name].setdefault("nvme_path", "auto") == "auto":
            zero[name]["nvme_path"] = str(swap)
        else:
            zero[name]["nvme_path"] = str(Path(zero[name]["nvme_path"]) / _own_folder(swap))
        if here:
            _check_folder(name, Path(zero[name]["nvme_path"]), total)
    if zero.get("offload_param", {}).get("device") == "nvme":
        if world == 1 and (model.layers == 1 or model.share_layers):
            # "already assigned swap buffer": the next layer's prefetch is the layer itself.
            raise UserError(
                "zero_optimization.offload_param.device=nvme: DeepSpeed cannot swap one physical layer on one rank: "
                "use 2 ranks, or cpu"
            )
        zero["offload_param"].setdefault("max_in_cpu", 0)  # or a billion weights would stay in memory
        for key in ("stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance"):
            zero.setdefault(key, 0)  # or weights would be kept until no buffer is left to read the next one into
        _resolve_buffers(zero["offload_param"], model, parallel, world)


def _own_folder(swap: Path) -> str:
    """A folder's name of this run alone: DeepSpeed's files have the same names in all runs."""
    place = swap.absolute()
    return f"m6-{place.parent.name}-{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"


def _resolve_buffers(settings: dict[str, Any], model: ModelConfig, parallel: int, world: int) -> None:
    if model.adapter_rank:  # a layer's experts have four tensors more; DeepSpeed's default would be 5
        count = settings.setdefault("buffer_count", BUFFERS_WITH_ADAPTERS)
        if count < BUFFERS_WITH_ADAPTERS:
            raise UserError(
                f"zero_optimization.offload_param.buffer_count={count}: a layer's experts with their adapters take "
                f"{BUFFERS_WITH_ADAPTERS}: raise it, or leave it out"
            )
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
    try:
        while not parent.exists():
            parent = parent.parent
        # DeepSpeed reads and writes past the page cache, which not every file system allows.
        with tempfile.NamedTemporaryFile(dir=parent) as probe:
            os.close(os.open(probe.name, os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        raise UserError(f"{key}: cannot be used for swapping ({error.strerror}): give a folder on a disk") from None
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"{key}: {free / 1e9:.3g} GB free, {needed / 1e9:.3g} GB needed on this node: free some, or give another"
        )


def largest_partition(model: ModelConfig, parallel: int, world: int) -> int:
    """Elements of the largest ZeRO-3 partition of one weight on one rank."""
    inner = model.ffn * (2 if model.gated_experts else 1)
    replicated = max(
        model.vocab * model.hidden,
        max(model.max_positions, model.image_patches, model.experts, 3 * model.hidden) * model.hidden,
        model.image_channels * model.hidden,
        0 if model.experts else model.hidden * inner,
    )
    experts = model.experts // parallel * model.hidden * inner
    return max(math.ceil(replicated / world), math.ceil(experts / (world // parallel)))


def _ranks_here(world: int) -> int:
    return min(world, int(os.environ.get("LOCAL_WORLD_SIZE", world)))


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(base)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else copy.deepcopy(value)
    return merged
