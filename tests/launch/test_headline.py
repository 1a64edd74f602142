"""docs/headline.md does its sums right, and its files fit together."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model.config import PRESETS
from training.ds_config import DSConfig, resolve
from training.placement import CPU, DEVICE, NVME
from training.rank_share import needed
from training.recipe import load_recipe, read_mapping

RECIPES = Path("launch/recipes")
CLUSTERS = sorted(Path("launch/clusters").glob("*.yaml"))
TIERS = "delink.then.ds.zero_optimization"
FP32_STATES = ["delink.then.ds.m6.optimizer_states=fp32", "delink.then.ds.data_types.grad_accum_dtype=fp32"]
ON_NVME = [f"{TIERS}.{block}.device=nvme" for block in ("offload_param", "offload_optimizer")]
# Ranks, recipe, its changes, whether its layers are delinked; GB a rank on the device, in host memory, on NVMe.
LAYOUTS: list[tuple[int, str, list[str], bool, tuple[float, float, float]]] = [
    (480, "m6-1t", [], False, (4.18, 33.4, 0)),
    (480, "m6-1t", ["ds.bf16.enabled=false"], False, (8.36, 33.4, 0)),
    (480, "m6-1t", ["ds.zero_optimization.offload_optimizer.device=none"], False, (37.6, 0, 0)),
    (
        480,
        "m6-1t",
        ["ds.bf16.enabled=false", "ds.zero_optimization.offload_optimizer.device=none"],
        False,
        (33.4, 0, 0),
    ),
    (512, "m6-10t", [], False, (7.37, 0, 0)),
    (512, "m6-10t", ["ds.bf16.enabled=false"], False, (6.55, 0, 0)),
    (512, "m6-10t", [], True, (0, 137.5, 0)),
    (512, "m6-10t", [*FP32_STATES, f"{TIERS}.offload_optimizer.device=nvme"], True, (0, 117.8, 314.3)),
    (512, "m6-10t", FP32_STATES, True, (0, 353.5, 0)),
    (512, "m6-10t", ["ds.bf16.enabled=false", *FP32_STATES, *ON_NVME], True, (0, 78.6, 392.8)),
]


@pytest.fixture
def text() -> str:
    return Path("docs/headline.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def none_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rank of the job is on this machine, whose disk need not hold one."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")


def resolved(world: int, name: str, changes: list[str], delinked: bool, swap: Path) -> DSConfig:
    # These are for GPUs that multiply bf16; this machine may not.
    recipe = load_recipe(RECIPES / f"{name}.yaml", ["ds.bf16.enabled=true", *changes])
    return resolve(recipe.delinked() if delinked else recipe, world, 0, swap)


@pytest.mark.parametrize(("world", "name", "changes", "delinked", "told"), LAYOUTS)
def test_states_of_a_rank(
    text: str, tmp_path: Path, world: int, name: str, changes: list[str], delinked: bool, told: tuple[float, ...]
) -> None:
    config = resolved(world, name, changes, delinked, tmp_path)
    assert config.expert_parallel == world and config.micro_batch == 8
    tiers = config.placement.bytes(config.elements, config.sizes)
    held = [sum(tiers[tier].values()) / 1e9 for tier in (DEVICE, CPU, NVME)]
    assert held == pytest.approx(told, rel=2e-3)
    assert all(f"{size:g}" in text for size in told if size)
    assert needed(config)[DEVICE] < 80e9


def numbers() -> Iterator[Any]:
    one, ten = PRESETS["m6-1t"].config, PRESETS["m6-10t"].config
    for model in (one.parameter_counts(), ten.parameter_counts()):
        yield from (f"{size:,}" for size in (model.experts, model.attention, model.routers, model.norms, model.total))
    yield f"{one.expert_parameters:,}"
    # A node's, of 8 and of 16 ranks.
    yield from (f"{8 * 33.44:.0f}", f"{16 * 33.44:.0f}", f"{8 * 137.49:,.0f} GB", f"{8 * 353.54:,.0f} GB")
    yield from (f"{16 * 78.565:,.0f} GB", f"{16 * (78.565 + 78.565):,.0f} GB")
    yield from (f"{8 * 117.85:.0f} GB", f"{8 * 314.26 / 1e3:.2f} TB", f"{16 * 392.83 / 1e3:.2f} TB")
    yield from (f"{12 * model.parameter_counts().total / 1e12:.1f} TB" for model in (one, ten))
    rows = -(-1024 * 125 // (100 * ten.experts)) * ten.experts  # places, all taken
    yield from (f"{rows:,} rows", f"{ten.training_flops(1024, 896, rows * ten.layers) / 1024 / 1e9:.1f} GFLOP")
    yield f"instead of {ten.training_flops(1024, 896) / 1024 / 1e9:.1f}"


def test_figures(text: str) -> None:
    assert [number for number in numbers() if number not in text] == []


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_clusters(path: Path) -> None:
    cluster = read_mapping(path)
    assert cluster["nodes"] * cluster["devices_per_node"] == int(path.stem.rpartition("-x")[2])
    reference = read_mapping(CLUSTERS[0])
    assert {key: set(value) for key, value in cluster.items() if isinstance(value, dict)} == {
        key: set(value) for key, value in reference.items() if isinstance(value, dict)
    }
    assert cluster["power"]["node_watts"] > cluster["devices_per_node"] * cluster["power"]["device_watts"]
    assert cluster["device"]["memory_bytes"] in (32e9, 80e9)
