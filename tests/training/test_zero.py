"""What is spared in DeepSpeed's ZeRO-3 changes no bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.marks import NVME
from tests.ranks import run_ranks
from tests.training import engine_ranks as ranks
from training.data.corpus import Corpus
from training.zero import NORM_PIECE, norm


@pytest.mark.parametrize(
    ("tier", "pairs", "clip"),
    [
        (ranks.CPU, {"gradients", "weights"}, 0.3),
        # Only the sub-groups that are too small for the disk. No gradient is as long as that.
        pytest.param(ranks.NVME, {"gradients"}, 1e9, marks=NVME),
    ],
    ids=["cpu", "nvme"],
)
def test_states_kept_once_train_to_the_same_bits(
    sample_corpus: Corpus, tmp_path: Path, tier: dict[str, Any], pairs: set[str], clip: float
) -> None:
    ds = ranks.settings(tier, 2) | {"gradient_accumulation_steps": 2}
    once, twice = (
        run_ranks(2, ranks.states_kept, sample_corpus.folder.parent, tmp_path, ds, clip, kept_once)
        for kept_once in (True, False)
    )
    for mine, theirs in zip(once, twice, strict=True):
        assert mine["pairs"] == pairs and not theirs["pairs"]
        assert mine["losses"] == theirs["losses"] and mine["digests"] == theirs["digests"]


@pytest.mark.parametrize("shape", [(1,), (NORM_PIECE,), (3, NORM_PIECE // 2 + 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_norm_is_that_of_fp64(shape: tuple[int, ...], dtype: torch.dtype, size: float) -> None:
    """Sizes whose squares fp32 cannot hold among them."""
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * size).to(dtype)
    torch.testing.assert_close(norm(x), x.double().norm(), rtol=1e-12, atol=0)


def test_norm_of_what_is_not_finite_is_not_finite() -> None:
    for value in (float("inf"), float("nan")):
        x = torch.ones(2 * NORM_PIECE)
        x[-1] = value
        assert not norm(x).isfinite()
