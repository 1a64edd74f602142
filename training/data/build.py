"""Build the corpus folder from pictures and texts: columns, tokenizer, patch features, manifest.

`build_corpus` does all of it; an import, which has its tokenizer and network from another corpus, takes the parts.
"""

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

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
FEATURE_THREADS = 2
_LEAST_DEVIATION = 1e-3  # of channels that never fire

Files = dict[str, dict[str, Any]]  # by name in the corpus' folder: sha256, bytes


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
        save_rows(folder / corpus.PICTURES, _table(pictures, Picture))
        save_rows(folder / corpus.TEXTS, _table(texts, Text))
        _write_skipped(folder / corpus.SKIPPED, log)
    with phase("tokenizer", seconds), working("tokenizer"):
        train_tokenizer(_tokenizer_lines(pictures, texts), folder / corpus.TOKENIZER, vocab_size)
    with phase("features", seconds):
        _write_network(folder, network)
        raw = write_features(folder, len(pictures), pictures.__getitem__)
        _standardise(raw, network, np.array([picture.split == "train" for picture in pictures]))
        _write_network(folder, network)
    with phase("checksums", seconds):
        files = checksums(folder)
        told = {
            "sources": sources,
            "pictures": count((picture.source, picture.split) for picture in pictures),
            "texts": count((text.source, text.split) for text in texts),
            "skipped": log.skipped_by_source(),
            "dropped": dict(sorted(log.dropped.items())),
        }
        write_manifest(folder, files, fingerprint(files, _published(network)), told)
    return seconds


def schema_of(kind: type) -> pa.Schema:
    """The columns of `Picture` or `Text`."""
    types = {str: pa.string(), list[str]: pa.list_(pa.string()), bool: pa.bool_(), bytes: pa.binary()}
    own = get_type_hints(kind)
    return pa.schema([(field.name, types.get(own[field.name], pa.string())) for field in fields(kind)])


def save_rows(folder: Path, table: pa.Table) -> None:
    """Write a table as `Corpus` reads it, some rows at a time."""
    datasets.disable_progress_bars()
    # A fingerprint of its own making would be a hash of all rows, copied in memory.
    datasets.Dataset(table, fingerprint=folder.name).save_to_disk(folder, num_shards=1)
    datasets.enable_progress_bars()


def _table(rows: Sequence[Any], kind: type) -> pa.Table:
    columns = {field.name: [getattr(row, field.name) for row in rows] for field in fields(kind)}
    return pa.table(columns, schema_of(kind))


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


def write_features(
    folder: Path, size: int, picture: Callable[[int], Picture], rows: Sequence[int] | None = None
) -> np.memmap:
    """features.npy: float16 [pictures, K, P, C], as the network in the folder has them.

    `size`: of the corpus, in pictures; those of `rows`, all if None, are computed, and the others left empty.
    """
    network = PatchFeatures(folder / corpus.FEATURE_NETWORK)
    views = len(AUGMENTATIONS)
    shape = (size, views, PATCHES, CHANNELS)
    out = np.lib.format.open_memmap(folder / corpus.FEATURES, "w+", np.float16, shape)
    rows = range(size) if rows is None else rows
    step = _FEATURE_BATCH // views

    def compute(start: int) -> None:
        # Most layers are too small to share: two batches with a thread each beat one batch with two.
        torch.set_num_threads(1)
        own = rows[start : start + step]
        batch = [picture(row) for row in own]
        squares = [augmented(one.pil(), k, one.mirrorable) for one in batch for k in range(views)]
        values = network.of_squares(squares).numpy().astype(np.float16).reshape(len(batch), *shape[1:])
        for row, described in zip(own, values, strict=True):
            out[row] = described

    starts = range(0, len(rows), step)
    pool = ThreadPoolExecutor(max_workers=FEATURE_THREADS)
    try:
        for _ in bar(pool.map(compute, starts), "picture features", len(starts)) if starts else ():
            pass
    finally:
        # An interruption must not wait for the batches that are still queued.
        pool.shutdown(cancel_futures=True)
    return out


def checksums(folder: Path) -> Files:
    """Of all files of a folder."""
    return {path.relative_to(folder).as_posix(): checksum(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def checksum(path: Path) -> dict[str, Any]:
    return {"sha256": corpus.sha256_of(path), "bytes": path.stat().st_size}


def write_manifest(folder: Path, files: Files, identity: str, told: dict[str, Any]) -> None:
    """What makes the folder a corpus. `told`: what else the manifest says."""
    manifest = {
        "format": corpus.FORMAT,
        "fingerprint": identity,
        **told,
        "tokenizer_sha256": files[corpus.TOKENIZER]["sha256"],
        "feature_network_sha256": files[corpus.FEATURE_NETWORK]["sha256"],
        "augmentations": [asdict(view) for view in AUGMENTATIONS],
        "files": files,
    }
    text = json.dumps(manifest, ensure_ascii=False, indent=1)
    (folder / corpus.MANIFEST).write_text(text + "\n", encoding="utf-8")


def fingerprint(files: Files, origin: str) -> str:
    """SHA-256 over the hashes of what defines the data.

    The features are represented by what they come of, `origin`, and by their views: their last bits differ between
    processors, which does not make them other data.
    """
    # The datasets library writes notes of its own beside the rows.
    defining = sorted(
        f"{name} {entry['sha256']}\n"
        for name, entry in files.items()
        if name.endswith(".arrow") or name == corpus.TOKENIZER
    )
    defining += [f"format {corpus.FORMAT}, {origin}\n"]
    views = json.dumps([asdict(view) for view in AUGMENTATIONS])
    return hashlib.sha256(("".join(defining) + views).encode()).hexdigest()


def _published(network: EfficientNetLite0) -> str:
    """The network without the means that came of the features."""
    values = {name: value for name, value in network.state_dict().items() if name not in ("mean", "deviation")}
    return f"network {hashlib.sha256(save(values)).hexdigest()}"


def count(rows: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Rows by source and split."""
    counts: dict[str, Counter[str]] = {}
    for source, split in rows:
        counts.setdefault(source, Counter())[split] += 1
    return {source: dict(sorted(splits.items())) for source, splits in sorted(counts.items())}
