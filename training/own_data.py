"""The corpus that a run was trained on, and what another one must share with it, to be used by that run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.data.corpus import Corpus
from training.errors import UserError
from training.recipe import Recipe


def own_corpus(path: Path, manifest: Mapping[str, Any], recipe: Recipe) -> Corpus:
    """That of the checkpoint `path`, where its recipe has it. Raises UserError if it is no longer there."""
    try:
        corpus = Corpus.open(recipe.data)
    except UserError as error:
        raise UserError(f"{path}: the data that it was trained on is needed ({error})") from None
    if corpus.fingerprint != manifest["data"]:
        raise UserError(
            f"{path}: the data that it was trained on is needed, and what is in {corpus.folder} is other data"
        )
    return corpus


def check_usable(corpus: Corpus, path: Path, manifest: Mapping[str, Any], recipe: Recipe) -> None:
    """Refuse a corpus whose texts and pictures the checkpoint `path` would not see as those it learned from.

    Raises UserError. Equal are to be the tokenizer, and the network that describes pictures.
    """
    if corpus.tokenizer.sha256 == manifest["tokenizer"]:
        if corpus.fingerprint == manifest["data"] or recipe.model_shape().image_input == "pixels":
            return
        network = manifest.get("feature_network")  # which older checkpoints do not tell
        if (network or own_corpus(path, manifest, recipe).feature_network_sha256) == corpus.feature_network_sha256:
            return
    way = f"give data that was imported for it (m6 data import … --base {recipe.data})"
    raise UserError(f"{path}: it was trained with another tokenizer or feature network than {corpus.folder} has; {way}")
