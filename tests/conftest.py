"""Fixtures that several test folders share."""

import pytest

from tests.data_sample import build_sample
from training.data.corpus import Corpus
from training.extensions import prepare_extensions

# Ranks that tests start inherit it.
prepare_extensions()


@pytest.fixture(scope="session")
def sample_corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A small corpus that the real build made; its `folder.parent` is the data folder. Not to be changed."""
    return build_sample(tmp_path_factory.mktemp("data"))
