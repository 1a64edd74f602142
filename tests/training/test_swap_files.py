"""NVMe offload's swap files, when one of them is lost under a run."""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.marks import NVME
from tests.ranks import run_ranks
from tests.training.test_train import ROOT, SMALL
from training.data.corpus import Corpus
from training.errors import UserError
from training.start import init_distributed

pytestmark = NVME

# Experts are wide enough for DeepSpeed to swap their weights: it leaves what is under 1 MiB on a rank in memory.
SETTINGS = [
    *SMALL, "model.ffn=2048", "steps=20", "save_every=2", "evaluation.every=20", "evaluation.rows=1",
    "evaluation.samples=0", f"ds_config={ROOT}/ds_configs/nvme.json", "tracking.wandb=disabled",
]  # fmt: skip
LOST_AT = 2  # steps


def lose(folder: Path, data: Path, pattern: str, keep: float, within: bool) -> str:
    """Train until swap files are lost, or cut to a share `keep` of their size, in a step or between; what is said."""
    from training.loop import Training
    from training.recipe import load_recipe

    os.chdir(folder)
    init_distributed()
    recipe = load_recipe(ROOT / "launch/recipes/quickstart.yaml", [*SETTINGS, f"data={data}"])
    training = Training(recipe, "run", resume=False)
    step = training.engine.step

    def losing(*args: Any) -> Any:
        if within and training.step == LOST_AT:
            spoil(training.folder / "swap", pattern, keep)
        result = step(*args)
        if not within and training.step == LOST_AT:
            spoil(training.folder / "swap", pattern, keep)
        return result

    training.engine.step = losing
    try:
        training.run()
    except UserError as error:
        return str(error)
    raise AssertionError("nothing was said")


def spoil(folder: Path, pattern: str, keep: float) -> None:
    files = list(folder.rglob(pattern))
    assert files
    for file in files:
        if keep:
            os.truncate(file, int(keep * file.stat().st_size))
        else:
            file.unlink()


@pytest.mark.parametrize(
    ("pattern", "keep", "within", "said"),
    [
        ("*_param.tensor.swp", 0, True, "missing"),
        ("*optimizer*/**/*.swp", 0.5, False, r"[\d,]+ bytes of [\d,]+"),
    ],
)
def test_a_lost_swap_file_is_one_line(
    sample_corpus: Corpus, tmp_path: Path, pattern: str, keep: float, within: bool, said: str
) -> None:
    expected = rf"runs/run/swap/.*\.swp: {said}: NVMe offload needs it; go on from the last save by --resume"
    with pytest.raises(UserError, match=expected):
        raise UserError(run_ranks(1, lose, tmp_path, sample_corpus.folder.parent, pattern, keep, within)[0])
