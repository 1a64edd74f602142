"""A run that knows every task, with first weights, to be served."""

import io
from pathlib import Path

import pytest

from tests.training.made_checkpoint import make_checkpoints, make_image_tokenizer, make_recipe
from training.data.corpus import Corpus
from training.recipe import TASK_NAMES
from training.trained import M6


@pytest.fixture(scope="session")
def served_run(sample_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("served")
    tokenizer = make_image_tokenizer(sample_corpus, home / "tokenizer")
    every = {"tasks": dict.fromkeys(TASK_NAMES, 1.0), "image_tokenizer": str(tokenizer)}
    recipe = make_recipe(sample_corpus, bag_width=16).model_copy(update=every)
    make_checkpoints(home / "run" / "checkpoints", recipe, sample_corpus, 2)
    return home / "run"


@pytest.fixture(scope="session")
def m(served_run: Path) -> M6:
    return M6.load(served_run)


@pytest.fixture(scope="session")
def pictures(sample_corpus: Corpus) -> list[bytes]:
    """PNG files."""
    return [sample_corpus.picture(row).image for row in range(24)]


def encoded(image, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, **options)
    return out.getvalue()
