"""The engine's losses do not depend on where states live or how ranks divide the work."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.marks import NVME
from tests.ranks import run_ranks
from tests.training import engine_ranks as ranks
from training.data.corpus import Corpus

# fp32: summation order alone differs, seen up to 3e-8. bf16: see benchmarks/parity.md.
TOLERANCE = 1e-5
NARROW = ranks.MODEL | {"ffn": 256}  # the wide ones are for the disk
STEPS = 8  # `benchmarks.parity` has more

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def trained(sample_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Losses and norms of steps by (world, tier, ep), each trained once, of narrow experts unless `wide`."""
    known: dict[Any, list[tuple[float, float]]] = {}

    def train(
        world: int, tier: dict[str, Any], parallel: int, wide: bool = False, steps: int = STEPS, **block: Any
    ) -> list[tuple[float, float]]:
        key = (world, str(tier), parallel, wide, steps, str(block))
        if key not in known:
            swap = tmp_path_factory.mktemp("swap")
            ds = ranks.settings(tier, parallel, **block)
            changes = {"model": ranks.MODEL if wide else NARROW}
            results = run_ranks(world, ranks.train, sample_corpus.folder.parent, swap, ds, changes, steps)
            assert all(result == results[0] for result in results), "ranks disagree on the global loss"
            known[key] = results[0]
        return known[key]

    return train


def agree(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> bool:
    pairs = zip(itertools.chain(*a), itertools.chain(*b), strict=True)
    return all(abs(x - y) <= TOLERANCE * abs(x) for x, y in pairs)


def test_losses_fall_and_clipping_is_active(trained: Any) -> None:
    results = trained(2, ranks.CPU, 2, steps=ranks.RECIPE["steps"])
    losses, norms = zip(*results, strict=True)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert min(norms) > ranks.RECIPE["optimizer"]["clip"]


@NVME
def test_cpu_and_nvme_agree_to_the_bit(trained: Any) -> None:
    assert trained(2, ranks.CPU, 2, wide=True) == trained(2, ranks.NVME, 2, wide=True)


def test_offload_changes_nothing_but_rounding(trained: Any) -> None:
    assert agree(trained(2, ranks.CPU, 2), trained(2, ranks.NONE, 2))


def test_expert_parallelism_changes_nothing_but_rounding(trained: Any) -> None:
    assert agree(trained(2, ranks.CPU, 2), trained(2, ranks.CPU, 1))


@pytest.mark.parametrize(("world", "parallel"), [(1, 1), (4, 2)])
def test_the_number_of_ranks_changes_nothing_but_rounding(trained: Any, world: int, parallel: int) -> None:
    # 4 ranks in pairs: each expert lives on two ranks, which share its gradient and its optimizer state.
    assert agree(trained(2, ranks.CPU, 2), trained(world, ranks.CPU, parallel))


def test_the_same_recipe_twice_gives_equal_bits(trained: Any) -> None:
    # The default factor, said: the same recipe under another key, so that it is trained anew.
    first = trained(2, ranks.CPU, 2)
    assert first == trained(2, ranks.CPU, 2, capacity_factor=1.25)
    assert agree(first, trained(2, ranks.CPU, 2, recompute=True))


def test_mixed_tiers_train(trained: Any) -> None:
    optimizer_only = {"offload_optimizer": {"device": "cpu"}}
    assert trained(2, optimizer_only, 2) == trained(2, ranks.CPU, 2)


def test_shared_layers_train_under_the_engine(sample_corpus: Corpus, tmp_path: Path) -> None:
    """Pseudo stage: one physical layer called L times, with and without recomputation, ep 1 and ep 2."""
    changes = {"model": NARROW | {"share_layers": True}}
    results = []
    for parallel, recompute in ((2, False), (2, True), (1, False)):
        ds = ranks.settings(ranks.CPU, parallel, recompute=recompute)
        results.append(run_ranks(2, ranks.train, sample_corpus.folder.parent, tmp_path, ds, changes, STEPS)[0])
    assert agree(results[0], results[1]) and agree(results[0], results[2])


def test_contrastive_groups_do_not_depend_on_the_layout(sample_corpus: Corpus, tmp_path: Path) -> None:
    """Fewer steps: a sharp softmax over cosines multiplies rounding."""
    mixture = {"tasks": {"contrast": 2, "caption": 1, "match": 1, "ask": 1}, "contrast_pairs": 2}
    changes, data = {"model": NARROW | {"bag_width": 32}, **mixture}, sample_corpus.folder.parent
    results = [
        run_ranks(world, ranks.train, data, tmp_path, ranks.settings(ranks.CPU, parallel), changes, 4)[0]
        for world, parallel in ((2, 2), (1, 1))
    ]
    assert agree(*results)
