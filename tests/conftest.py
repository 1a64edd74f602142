"""Fixtures that several test folders share."""

import pytest

from tests.data_sample import build_sample
from training.build_locks import clear_stale_locks
from training.data.corpus import Corpus


@pytest.fixture(scope="session", autouse=True)
def _no_stale_locks() -> None:
    clear_stale_locks()


@pytest.fixture(scope="session")
def sample_corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A small corpus that the real build made; its `folder.parent` is the data folder. Not to be changed."""
    return build_sample(tmp_path_factory.mktemp("data"))
