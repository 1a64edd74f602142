"""The short form of `benchmarks.kills`."""

from pathlib import Path

import pytest

from benchmarks import kills
from training.data.corpus import Corpus


@pytest.mark.timeout(600)
def test_kills_at_random_moments_change_no_bit(sample_corpus: Corpus, tmp_path: Path) -> None:
    result = kills.measure(tmp_path, sample_corpus.folder.parent, kills=1, seed=1)
    assert len(result.kills) == 1
    assert (result.code, result.differences) == (0, [])
    assert kills.steps_lost(result.kills, saving=False) <= kills.SAVE_EVERY
    # Of a save that never ended, what the one before it would have lost too.
    assert kills.steps_lost(result.kills, saving=True) <= 2 * kills.SAVE_EVERY
    assert max(result.noticed) < 10
    assert max(kill.new_processes or 0.0 for kill in result.kills) < 10
    assert max(kill.next_step or 0.0 for kill in result.kills) < 60
