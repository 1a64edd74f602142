"""What is spared in DeepSpeed's ZeRO-3 changes no bit."""

from pathlib import Path
from typing import Any

import pytest

from tests.marks import NVME
from tests.ranks import run_ranks
from tests.training import engine_ranks as ranks
from training.data.corpus import Corpus


@pytest.mark.parametrize(
    ("tier", "pairs"),
    [
        (ranks.CPU, {"gradients", "weights"}),
        # Only the sub-groups that are too small for the disk.
        pytest.param(ranks.NVME, {"gradients"}, marks=NVME),
    ],
    ids=["cpu", "nvme"],
)
def test_states_kept_once_train_to_the_same_bits(
    sample_corpus: Corpus, tmp_path: Path, tier: dict[str, Any], pairs: set[str]
) -> None:
    ds = ranks.settings(tier, 2) | {"gradient_accumulation_steps": 2}
    once, twice = (
        run_ranks(2, ranks.states_kept, sample_corpus.folder.parent, tmp_path, ds, kept_once)
        for kept_once in (True, False)
    )
    for mine, theirs in zip(once, twice, strict=True):
        assert mine["pairs"] == pairs and not theirs["pairs"]
        assert mine["losses"] == theirs["losses"] and mine["digests"] == theirs["digests"]
