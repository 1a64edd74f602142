"""Build the corpus folder from pictures and texts: columns, tokenizer, patch features, manifest."""

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save

from training.data import corpus
from training.data.features import (
    AUGMENTATIONS,
    CHANNELS,
    PATCHES,
    EfficientNetLite0,
    PatchFeatures,
    augmented,
)
from training.data.progress import bar, phase, working
from training.data.rows import Log, Picture, Text
from training.data.tokenizer import VOCAB_SIZE, train_tokenizer

# Lines of verse the tokenizer learns from; more would crowd out modern words, and take minutes.
_TOKENIZER_VERSES = 60_000
# Captions are few and are what the model is asked about: counted so often, their words become pieces.
_CAPTION_WEIGHT = 10
_FEATURE_BATCH = 16
_LEAST_DEVIATION = 1e-3  # of channels that never fire


def build_corpus(
    folder: Path,
    pictures: Sequence[Picture],
    texts: Sequence[Text],
    network: EfficientNetLite0,
    sources: dict[str, Any],
    log: Log,
    vocab_size: int = VOCAB_SIZE,
) -> dict[str, float]:
    """Write a whole corpus into the empty `folder`; equal inputs give an equal fingerprint.

    `sources` goes into the manifest as it is. Returns the wall seconds of each phase.
    """
    network = copy.deepcopy(network)  # which is given the features' means
    seconds: dict[str, float] = {}
    with phase("columns", seconds):
        _write_rows(folder / corpus.PICTURES, pictures, Picture)
        _write_rows(folder / corpus.TEXTS, texts, Text)
        _write_skipped(folder / corpus.SKIPPED, log)
    with phase("tokenizer", seconds), working("tokenizer"):
        train_tokenizer(_tokenizer_lines(pictures, texts), folder / corpus.TOKENIZER, vocab_size)
    with phase("features", seconds):
        _write_network(folder, network)
        raw = _write_features(folder, pictures)
        _standardise(raw, network, np.array([picture.split == "train" for picture in pictures]))
        _write_network(folder, network)
    with phase("checksums", seconds):
        _write_manifest(folder, pictures, texts, sources, network, log)
    return seconds


def _write_rows(folder: Path, rows: Sequence[Any], kind: type) -> None:
    columns = {field.name: [getattr(row, field.name) for row in rows] for field in fields(kind)}
    datasets.disable_progress_bars()
    datasets.Dataset(pa.table(columns)).save_to_disk(folder, num_shards=1)
    datasets.enable_progress_bars()


def _write_skipped(path: Path, log: Log) -> None:
    path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in log.skipped), encoding="utf-8")


def _tokenizer_lines(pictures: Sequence[Picture], texts: Sequence[Text]) -> Iterator[str]:
    """Training-split lines: all captions and reviews, and poems taken evenly from the whole of them."""
    for picture in pictures:
        if picture.split == "train":
            words = {picture.zh, *picture.tags, picture.en, picture.group, picture.subgroup} - {""}
            yield from sorted(words) * _CAPTION_WEIGHT
    poems = [text for text in texts if text.split == "train" and text.kind == "poem"]
    verses = sum(text.text.count("\n") + 1 for text in poems)
    for text in poems[:: max(1, verses // _TOKENIZER_VERSES)]:
        yield from (text.title, text.author, *text.text.split("\n"))
    for text in texts:
        if text.split == "train" and text.kind == "review":
            yield from (text.text, text.topic, text.polarity)


def _write_network(folder: Path, network: EfficientNetLite0) -> None:
    # Not by `save_file`, whose files are for their owner alone.
    (folder / corpus.FEATURE_NETWORK).write_bytes(save(network.state_dict()))


def _standardise(features: np.memmap, network: EfficientNetLite0, training: np.ndarray) -> None:
    """Give the network each channel's mean and deviation over the `training` pictures, and take them out of all."""
    own = np.flatnonzero(training)
    count = len(own) * features[0, ..., 0].size
    mean = sum(features[row].sum((0, 1), dtype=np.float64) for row in own) / count
    deviation = np.sqrt(sum(((features[row] - mean) ** 2).sum((0, 1)) for row in own) / count) + _LEAST_DEVIATION
    network.mean.copy_(torch.from_numpy(mean))
    network.deviation.copy_(torch.from_numpy(deviation))
    for row in features:
        row[:] = (row - mean) / deviation
    features.flush()


def _write_features(folder: Path, pictures: Sequence[Picture]) -> np.memmap:
    """features.npy: float16 [pictures, K, P, C], as the network in the folder has them."""
    network = PatchFeatures(folder / corpus.FEATURE_NETWORK)
    views = len(AUGMENTATIONS)
    shape = (len(pictures), views, PATCHES, CHANNELS)
    out = np.lib.format.open_memmap(folder / corpus.FEATURES, "w+", np.float16, shape)
    step = _FEATURE_BATCH // views

    def compute(start: int) -> None:
        # Most layers are too small to share: two batches with a thread each beat one batch with two.
        torch.set_num_threads(1)
        batch = pictures[start : start + step]
        squares = [augmented(picture.pil(), k, picture.mirrorable) for picture in batch for k in range(views)]
        values = network.of_squares(squares).numpy().astype(np.float16)
        out[start : start + len(batch)] = values.reshape(len(batch), *shape[1:])

    starts = range(0, len(pictures), step)
    pool = ThreadPoolExecutor(max_workers=2)
    try:
        for _ in bar(pool.map(compute, starts), "picture features", len(starts)):
            pass
    finally:
        # An interruption must not wait for the batches that are still queued.
        pool.shutdown(cancel_futures=True)
    return out


def _write_manifest(
    folder: Path,
    pictures: Sequence[Picture],
    texts: Sequence[Text],
    sources: dict[str, Any],
    network: EfficientNetLite0,
    log: Log,
) -> None:
    files = {
        path.relative_to(folder).as_posix(): {"sha256": corpus.sha256_of(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {
        "format": corpus.FORMAT,
        "fingerprint": _fingerprint(files, network),
        "sources": sources,
        "pictures": _count(pictures),
        "texts": _count(texts),
        "skipped": log.skipped_by_source(),
        "dropped": dict(sorted(log.dropped.items())),
        "tokenizer_sha256": files[corpus.TOKENIZER]["sha256"],
        "feature_network_sha256": files[corpus.FEATURE_NETWORK]["sha256"],
        "augmentations": [asdict(view) for view in AUGMENTATIONS],
        "files": files,
    }
    text = json.dumps(manifest, ensure_ascii=False, indent=1)
    (folder / corpus.MANIFEST).write_text(text + "\n", encoding="utf-8")


def _fingerprint(files: dict[str, dict[str, Any]], network: EfficientNetLite0) -> str:
    """SHA-256 over the hashes of what defines the data.

    The features are represented by their network, without the means that came of them, and by their views: their last
    bits differ between processors, which does not make them other data.
    """
    published = {name: value for name, value in network.state_dict().items() if name not in ("mean", "deviation")}
    # The datasets library writes notes of its own beside the rows.
    defining = sorted(
        f"{name} {entry['sha256']}\n"
        for name, entry in files.items()
        if name.endswith(".arrow") or name == corpus.TOKENIZER
    )
    defining += [f"format {corpus.FORMAT}, network {hashlib.sha256(save(published)).hexdigest()}\n"]
    views = json.dumps([asdict(view) for view in AUGMENTATIONS])
    return hashlib.sha256(("".join(defining) + views).encode()).hexdigest()


def _count(rows: Sequence[Picture] | Sequence[Text]) -> dict[str, dict[str, int]]:
    """Rows by source and split."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row.source, Counter())[row.split] += 1
    return {source: dict(sorted(splits.items())) for source, splits in sorted(counts.items())}
