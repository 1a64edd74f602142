"""Layers on tiers of their own train as all on one do, and their bytes lie where they were said to."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.marks import NVME
from tests.ranks import run_ranks
from tests.training import engine_ranks as ranks
from training.data.corpus import Corpus

TOLERANCE = 1e-5  # relative: the gradient's norm is summed in another order
THREE = {"model": ranks.MODEL | {"layers": 3}}
MIXED = {
    "back to the device": (ranks.CPU, {"parameters": {"device": "0"}, "optimizer": {"device": "outside,1-2"}}),
    "off the device": (ranks.NONE, {"parameters": {"cpu": "0-1"}, "optimizer": {"cpu": "2"}}),
    "every tier": (
        {"offload_param": {"device": "nvme"}, "offload_optimizer": {"device": "nvme"}},
        {"parameters": {"device": "0", "cpu": "1,outside"}, "optimizer": {"device": "1,outside", "cpu": "2"}},
    ),
}

TWO_LAYERS = (
    (ranks.CPU, {"parameters": {"device": "0"}, "optimizer": {"device": "0,outside"}}),
    (ranks.NONE, {"parameters": {"cpu": "0,outside"}, "optimizer": {"cpu": "1"}}),
)


@pytest.fixture(scope="module")
def plain(sample_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Losses and norms with everything on the device."""
    ds = ranks.settings(ranks.NONE, 2)
    return run_ranks(2, ranks.train, sample_corpus.folder.parent, tmp_path_factory.mktemp("s"), ds, THREE, 8)[0]


@pytest.mark.parametrize("name", [pytest.param(name, marks=NVME if name == "every tier" else ()) for name in MIXED])
def test_tiers_change_nothing_but_rounding_and_hold_what_was_said(
    plain: Any, sample_corpus: Corpus, tmp_path: Path, name: str
) -> None:
    tiers, offload = MIXED[name]
    ds = ranks.settings(tiers, 2, offload=offload)
    results, found, expected = run_ranks(2, ranks.train_on_tiers, sample_corpus.folder.parent, tmp_path, ds, THREE, 8)[
        0
    ]
    for mine, theirs in zip(itertools.chain(*results), itertools.chain(*plain), strict=True):
        assert abs(mine - theirs) <= TOLERANCE * abs(theirs)
    for tier, kinds in expected.items():
        for kind, size in kinds.items():
            assert abs(found[tier][kind] - size) <= 0.1 * size, (tier, kind)


def test_a_run_goes_on_with_its_layers_on_other_tiers(sample_corpus: Corpus, tmp_path: Path) -> None:
    data = sample_corpus.folder.parent
    before, after = (ranks.settings(tiers, 2, offload=offload) for tiers, offload in TWO_LAYERS)
    saved = run_ranks(2, ranks.save_at, data, tmp_path / "a", before, tmp_path / "checkpoints", 3, 6)[0]
    resumed = run_ranks(2, ranks.load_and_train, data, tmp_path / "b", after, tmp_path / "checkpoints", 3, 6)[0]
    assert resumed["digests"] == saved["digests"]
    for mine, theirs in zip(itertools.chain(*resumed["losses"]), itertools.chain(*saved["losses"]), strict=True):
        assert abs(mine - theirs) <= TOLERANCE * abs(theirs)
