"""The rivals in retrieval: ridge regression from frozen image features to TF-IDF of a caption's characters.

It sees the same pictures and words as a trained model, takes seconds, and finds more than half of unseen concepts
among ten: a model that does not beat it is not worth showing. Sizes: N pictures, D features, V n-grams of characters.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from training.background import usual_rows
from training.data.corpus import Corpus
from training.data.features import PatchFeatures, augmented, pixels
from training.data.images import on_white
from training.data.splits import Split
from training.data.tasks.contrast import picture_words
from training.embedding import standard_scores

SIDE = 144  # pixels
RIDGE = 3000.0
AT_ONCE = 32  # pictures
Similarities = dict[str, np.ndarray]  # [images, texts] of each rival
# Flags are named by their country, which nothing in the picture says.
FLAGS = "旗帜"


class RidgeRetriever:
    """Fitted to the pooled features [N, D] of pictures and their captions; ranks captions it has not seen.

    Features are standardised, so that `ridge` weighs against N; words are the caption's characters and pairs of
    neighbours, weighted by how rare they are among the fitted captions.
    """

    def __init__(self, features_ND: np.ndarray, captions: Sequence[str], ridge: float = RIDGE):
        self.vocabulary, self.rarity_V = _rarity(captions)
        self.mean_D, self.deviation_D = features_ND.mean(0), features_ND.std(0) + 1e-6
        x_ND = self._standard(features_ND).astype(np.float64)
        inverse_DN = np.linalg.solve(x_ND.T @ x_ND + ridge * np.eye(x_ND.shape[1]), x_ND.T)
        self.weights_DV = inverse_DN.astype(np.float32) @ self.text_vectors(captions)

    def similarity(self, features_ID: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """float32 [images, captions] cosines of what the pictures are predicted to be called with the captions."""
        predicted_IV = _unit(self._standard(features_ID) @ self.weights_DV)
        return predicted_IV @ self.text_vectors(captions).T

    def text_vectors(self, captions: Sequence[str]) -> np.ndarray:
        """float32 [captions, V] of length 1, or 0 where no n-gram is known."""
        vectors_NV = np.zeros((len(captions), len(self.vocabulary)), np.float32)
        for row, caption in enumerate(captions):
            for gram, count in Counter(_grams(caption)).items():
                if gram in self.vocabulary:
                    vectors_NV[row, self.vocabulary[gram]] = 1 + np.log(count)
        return _unit(vectors_NV * self.rarity_V)

    def _standard(self, features_ND: np.ndarray) -> np.ndarray:
        return (features_ND - self.mean_D) / self.deviation_D


def fit(corpus: Corpus, features_ND: np.ndarray, splits: Sequence[Split]) -> RidgeRetriever:
    """The retriever of all pictures of these splits that can be named, given `pooled_features` of the corpus."""
    rows = [row for split in splits for row in nameable_rows(corpus, split)]
    return RidgeRetriever(features_ND[rows], [picture_words(corpus.picture(row)) for row in rows])


def nameable_rows(corpus: Corpus, split: str) -> list[int]:
    """Of a split all pictures, but of a fetched corpus no flags."""
    rows = corpus.picture_rows(split).tolist()
    return rows if corpus.imported else [row for row in rows if corpus.picture(row).group != FLAGS]


def stored_features(corpus: Corpus) -> np.ndarray:
    """float32 [pictures of the corpus, channels]: the mean patch of what models of this corpus are given."""
    return np.stack([patches.astype(np.float32).mean(0) for patches in corpus.features[:, 0]])


def rivals(corpus: Corpus, cache: Path | str, split: str, texts: Sequence[str], rows: Sequence[int]) -> Similarities:
    """What each rival makes of these pictures of a split, and texts.

    `ridge`: of 144 px. `ridge_stored`: of what models are given, by standard scores as theirs are. Trained on the
    training split, and for the test split on the validation split, too; there are none if the training split has no
    pictures. `cache` and errors as of `pooled_features`.
    """
    if not len(corpus.picture_rows("train")):
        return {}
    known: list[Split] = ["train", "validation"] if split == "test" else ["train"]
    features = {"ridge": pooled_features(corpus, cache), "ridge_stored": stored_features(corpus)}
    fitted = {name: fit(corpus, of_ND, known) for name, of_ND in features.items()}
    found = {name: fitted[name].similarity(of_ND[rows], texts) for name, of_ND in features.items()}
    usual = fitted["ridge_stored"].similarity(features["ridge_stored"][usual_rows(corpus)], texts)
    return found | {"ridge_stored": standard_scores(found["ridge_stored"], usual)}


class PooledFeatures:
    """The corpus' frozen network at 144 pixels, averaged over the picture."""

    def __init__(self, path: Path | str):
        """`path` as of `PatchFeatures`, which also says what is raised."""
        self.patches = PatchFeatures(path)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Images of any size and mode -> float32 [images, 1280]."""
        squares = [augmented(on_white(image), 0, square_side=SIDE) for image in images]
        return self.patches.network.features(pixels(squares)).mean((2, 3)).numpy()


def pooled_features(corpus: Corpus, cache: Path | str) -> np.ndarray:
    """float32 [pictures of the corpus, 1280], in its order: about a minute, or read from the folder `cache`.

    The file there is named by the corpus' fingerprint and the network's hash.
    """
    network = PooledFeatures(corpus.feature_network)
    path = Path(cache) / f"pooled-{SIDE}-{corpus.fingerprint[:16]}-{network.patches.sha256[:16]}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(path, np.concatenate(list(_batches(corpus, network))))
    return np.load(path, allow_pickle=False)


def _batches(corpus: Corpus, network: PooledFeatures) -> Iterator[np.ndarray]:
    count = len(corpus.pictures)
    for start in range(0, count, AT_ONCE):
        yield network([corpus.picture(row).pil() for row in range(start, min(start + AT_ONCE, count))])


def _save(path: Path, array: np.ndarray) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    np.save(temporary, array)
    temporary.replace(path)


def _rarity(captions: Sequence[str]) -> tuple[dict[str, int], np.ndarray]:
    """Columns of the n-grams of all captions, and ln((1 + N) / (1 + captions with it)) + 1 of each."""
    seen = Counter(gram for text in captions for gram in set(_grams(text)))
    vocabulary = {gram: column for column, gram in enumerate(sorted(seen))}
    counts_V = np.array([seen[gram] for gram in vocabulary], np.float32)
    return vocabulary, np.log((1 + len(captions)) / (1 + counts_V)) + 1


def _grams(caption: str) -> list[str]:
    """Characters and pairs of neighbours; Latin letters in lower case."""
    text = caption.lower()
    return [*text, *(text[i : i + 2] for i in range(len(text) - 1))]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
