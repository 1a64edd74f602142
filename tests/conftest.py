"""Fixtures that several test folders share."""

import pytest

from tests.data_sample import build_sample
from tests.training.small_run import train_small
from training.data.corpus import Corpus
from training.extensions import prepare_extensions
from training.trained import M6

# Ranks that tests start inherit it.
prepare_extensions()


@pytest.fixture(scope="session")
def small_run(sample_corpus: Corpus) -> M6:
    """A small model that has learned to find the sample corpus' pictures."""
    return train_small(sample_corpus)


@pytest.fixture(scope="session")
def sample_corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A small corpus that the real build made; its `folder.parent` is the data folder. Not to be changed."""
    return build_sample(tmp_path_factory.mktemp("data"))
