"""What is planned, out of its real inputs: a preset or recipe, a cluster, and the ds_config that will run."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from launch.planner.cluster import Cluster
from launch.planner.job import Job, Layout, Shape, Shares
from model.config import MOST_SCORES, PRESETS, ModelConfig
from training.ds_config import FOLDER, DSConfig, default_path, resolve
from training.errors import UserError
from training.parent import load_recipe
from training.placement import OPTIMIZER, PARAMETERS, Tiers
from training.recipe import Recipe, leaves, nearest, parse_recipe, read_mapping

# Of a preset without a recipe: the rows of a device as M6-T trained and, with 16 patches, 128 positions, as recalled.
ROWS, TEXT_POSITIONS, TOKENS = 8, 112, 10**9

PROBABILITY_BYTES = 2.0  # a score, of 16 bits: all that our attention keeps of it, where it keeps any (CPUs)

KEPT, BUCKET = 1e9, 5e8  # elements: DeepSpeed's defaults of stage3_max_live_parameters and reduce_bucket_size


def typed(key: str, value: Any) -> str:
    """A setting as it is typed."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


class Fill(NamedTuple):
    """How full rows are. What is empty is left out of all work but attention's."""

    held: float = 1.0  # share of a row's positions that hold something
    targets: float | None = None  # share of those that are predicted; None: all text
    width: float = 1.0  # positions of a batch's rows, of those that a row may have
    uneven: float = 1.0  # of a micro-batch: the fullest rank's positions over the average rank's


FULL = Fill()


@dataclass(frozen=True)
class Work:
    """A training on a cluster."""

    recipe: Recipe
    config: DSConfig
    cluster: Cluster
    tokens: float  # positions to be trained on
    fill: Fill = FULL
    delinked: bool = False  # the recipe is that of the training after its layers were delinked

    @property
    def ds_key(self) -> str:
        """The key under which the recipe, as it was given, changes the ds_config."""
        return "delink.then.ds" if self.delinked else "ds"

    @property
    def ignored(self) -> list[str]:
        """Settings of the ds_config that no term stands for, and that are others than in our own ds_configs."""
        path = default_path(self.cluster.gpus_per_node) if self.recipe.ds_config == "auto" else self.recipe.ds_config
        asked = dict(leaves(read_mapping(path))) | dict(leaves(self.recipe.ds))
        return [
            typed(key, value)
            for key, value in asked.items()
            if value is not None and not _is_modelled(key) and value not in _own_settings().get(key, ())
        ]

    def changed(self, overrides: list[str]) -> Work:
        """The same with overrides of its recipe. Raises UserError."""
        recipe = parse_recipe(self.recipe.model_dump(mode="json"), overrides, "the recipe")
        found = resolved(recipe, self.cluster, self.tokens)
        # Sums of more rows differ less.
        uneven = 1 + (self.fill.uneven - 1) * (self.config.micro_batch / found.config.micro_batch) ** 0.5
        return replace(found, fill=self.fill._replace(uneven=uneven), delinked=self.delinked)

    @property
    def job(self) -> Job:
        """With full rows, for which there has to be memory."""
        return self._job(FULL)

    @property
    def usual(self) -> Job:
        """With rows as they are, which take the time."""
        return self._job(self.fill)

    def _job(self, fill: Fill) -> Job:
        return Job(_shape(self.recipe, self.config, self.cluster, fill), _layout(self.config, self.cluster))


# What a plan reads, or what costs nothing; all of the block m6 besides.
MODELLED = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping", "gradient_accumulation_steps",
    "bf16.enabled", "expert_parallel.enabled", "expert_parallel.autoep_size", "data_types.grad_accum_dtype",
    *(f"zero_optimization.{name}" for name in (
        "stage", "contiguous_gradients", "reduce_bucket_size", "stage3_max_live_parameters",
        "offload_param.device", "offload_param.nvme_path", "offload_optimizer.device", "offload_optimizer.nvme_path",
    )),
}  # fmt: skip


def _is_modelled(key: str) -> bool:
    return key in MODELLED or key.split(".")[0] == "m6"


@functools.cache
def _own_settings() -> dict[str, list[Any]]:
    """By key, what our own ds_configs hold."""
    found: dict[str, list[Any]] = {}
    for path in FOLDER.glob("*.json"):
        for key, value in leaves(read_mapping(path)):
            found.setdefault(key, []).append(value)
    return found


def load_work(
    model: str,
    cluster: Cluster,
    ds_config: str | None,
    tokens: float | None,
    overrides: Sequence[str],
    delinked: bool,
    fill: Fill = FULL,
) -> Work:
    """`model`: a preset's name or a recipe's path. Raises UserError."""
    changes = [*([f"ds_config={ds_config}"] if ds_config else []), *overrides]
    if is_recipe(model):
        recipe = load_recipe(model, changes)
        steps: int | None = recipe.steps
    else:
        recipe, steps = _plain(model, cluster, changes), None
    if delinked:
        if not recipe.delink.wanted:
            raise UserError("--delinked: the recipe has no delink.after or delink.flat; leave it out")
        recipe = recipe.delinked()
    work = replace(resolved(recipe, cluster, tokens or TOKENS), fill=fill, delinked=delinked)
    if steps and not tokens:
        return replace(work, tokens=steps * work.usual.tokens)
    return work


def is_recipe(model: str) -> bool:
    return Path(model).suffix in (".yaml", ".yml")


def _plain(model: str, cluster: Cluster, changes: list[str]) -> Recipe:
    if any(change.startswith("steps=") for change in changes):
        raise UserError("steps=…: a preset has no steps; say --tokens, or plan a recipe")
    if model not in PRESETS:
        raise UserError(f"--model {model}: is no preset and no recipe (.yaml){nearest(model, PRESETS)}")
    plain = {
        "model": model, "global_batch": ROWS * cluster.devices, "text_positions": TEXT_POSITIONS,
        "tasks": {"caption": 1}, "steps": 1,
    }  # fmt: skip
    return parse_recipe(plain, changes, f"--model {model}")


MOST_LAYERS, MOST = 10**4, 10**9  # every layer is placed by itself; of all other sizes of a model


def _check_sizes(model: ModelConfig) -> None:
    for name, size in asdict(model).items():
        most = MOST_LAYERS if name == "layers" else MOST
        if isinstance(size, int | float) and size > most:
            raise UserError(f"model.{name}={size}: is too much to plan; take at most {most}")


def resolved(recipe: Recipe, cluster: Cluster, tokens: float) -> Work:
    """Raises UserError where the ds_config does not fit the recipe or the cluster's devices."""
    _check_sizes(recipe.model_shape())
    config = resolve(
        recipe, cluster.devices, cluster.gpus_per_node, Path("swap"), here=False,
        multiplies="bf16" in cluster.device.peak_flops,
    )  # fmt: skip
    return Work(recipe, config, cluster, tokens)


def _shape(recipe: Recipe, config: DSConfig, cluster: Cluster, fill: Fill) -> Shape:
    model = config.model
    counts, layers = model.parameter_counts(), 1 if model.share_layers else model.layers
    positions = model.image_patches + recipe.text_positions
    seq = positions * fill.held
    outside = counts.embeddings + counts.image + counts.bags
    common = counts.attention + counts.norms + counts.routers
    return Shape(
        layers=model.layers, hidden=model.hidden, ffn=model.ffn, heads=model.heads, seq=seq, vocab=model.vocab,
        common=(common + (0 if model.experts else counts.experts)) / layers, outside=outside,
        head=model.vocab * model.hidden, experts=model.experts,
        expert=model.expert_parameters if model.experts else 0.0, expert_layers=model.layers if model.experts else 0,
        rows=expert_rows(model, config.micro_batch * seq),
        fused_attention=cluster.gpus_per_node > 0, padded=fill.width / fill.held, uneven=fill.uneven,
        score_bytes=PROBABILITY_BYTES if config.micro_batch * model.heads * positions**2 <= MOST_SCORES else 0.0,
        targets=recipe.text_positions / positions if fill.targets is None else fill.targets, shared=model.share_layers,
    )  # fmt: skip


def expert_rows(model: ModelConfig, tokens: float) -> float:
    """Rows through experts a token and layer: k of them, or as many as there are places.

    Places are counted a rank and micro-batch (`model/moe.py`), at least one an expert: with more experts than tokens
    that is more than the capacity factor says.
    """
    if not model.experts:
        return 0.0
    if model.capacity == "none":
        return float(model.k)
    share = tokens * (model.k if model.capacity == "kx" else 1) / model.experts
    places = model.experts * math.ceil(model.capacity_factor * share)
    return min(float(model.k), places / tokens)


def _layout(config: DSConfig, cluster: Cluster) -> Layout:
    sizes, zero = config.sizes, config.values["zero_optimization"]
    return Layout(
        devices=cluster.devices, dp=cluster.devices, ep=config.expert_parallel, zero=3, micro_batch=config.micro_batch,
        micro_batches=config.accumulation, recompute="full" if config.recompute else "none",
        precision="bf16" if sizes.weight == 2 else "fp32",
        parameters=_shares(config.placement.of(PARAMETERS), tuple(config.elements)),
        optimizer=_shares(config.placement.of(OPTIMIZER), config.elements.learning),
        weight_bytes=sizes.weight, gradient_bytes=sizes.gradient, state_bytes=sizes.master + sizes.moments,
        kept=zero.get("stage3_max_live_parameters", KEPT),
        bucket=zero.get("reduce_bucket_size", BUCKET), contiguous=zero.get("contiguous_gradients", True),
    )  # fmt: skip


def _shares(tiers: Tiers, counts: Sequence[int]) -> Shares:
    found = dict.fromkeys(("device", "cpu", "nvme"), 0)
    for tier, count in zip(tiers, counts, strict=True):
        found[tier] += count
    total = sum(found.values())
    return Shares(**{tier: count / total for tier, count in found.items()})
