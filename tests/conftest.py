"""Fixtures that several test folders share."""

from pathlib import Path

import pytest

from tests.data_sample import build_sample
from tests.training.small_run import train_small
from training.data.corpus import Corpus
from training.extensions import prepare_extensions
from training.trained import M6

# Ranks that tests start inherit it.
prepare_extensions()

# They take minutes each, and begin first: of several workers none is then left alone with one of them.
LONGEST = ("test_multi_node", "test_kills", "test_safeguard", "test_delink", "test_engine", "test_train")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may be logged in at wandb; the tests never are."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def small_run(sample_corpus: Corpus) -> M6:
    """A small model that has learned to find the sample corpus' pictures."""
    return train_small(sample_corpus)


@pytest.fixture(scope="session")
def sample_corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A small corpus that the real build made; its `folder.parent` is the data folder. Not to be changed."""
    return build_sample(tmp_path_factory.mktemp("data"))
