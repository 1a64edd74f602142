"""The built corpus, opened for reading: pictures, texts, patch features and tokenizer, memory-mapped."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, load_from_disk

from training.data.features import as_array, augmented
from training.data.rows import Picture, Text
from training.data.tokenizer import Tokenizer
from training.errors import UserError

# Raised whenever the layout changes, or the same packages would give another corpus.
FORMAT = 3
FOLDER = "corpus"
PICTURES, TEXTS = "pictures", "texts"
TOKENIZER, FEATURES, FEATURE_NETWORK = "tokenizer.model", "features.npy", "feature_network.safetensors"
SKIPPED, MANIFEST = "skipped.jsonl", "manifest.json"
TRAINED = "trained.bin"  # of an import: marks of what its base trains on, and the bases of that


class Corpus:
    """What `m6 data fetch` built.

    `pictures` and `texts` are `datasets.Dataset`s with the columns of `rows.Picture` and `rows.Text`.
    `features` is a float16 memory map [pictures, K, P, C] in the order of `pictures`: K views (see
    `features.AUGMENTATIONS`), P patches row by row, C channels.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder = folder
        self.manifest = manifest
        try:
            self.pictures = _load(folder / PICTURES)
            self.texts = _load(folder / TEXTS)
            self.features = np.load(folder / FEATURES, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, pa.ArrowException):
            raise UserError(f"{folder}: damaged; {_remedy(manifest)}") from None
        self.tokenizer = Tokenizer(folder / TOKENIZER)
        self.codes: np.ndarray | None = None  # [pictures, K, P], if an image tokenizer's are used
        self.rarity: Mapping[int, float] | None = None  # of words, if they were not first met in this corpus' captions

    @classmethod
    def open(cls, data_dir: Path | str) -> "Corpus":
        """The corpus under `data_dir`, checked by the manifest and the files' sizes.

        Raises UserError if it is missing, of another format, or not what its manifest says.
        """
        folder = Path(data_dir) / FOLDER
        manifest = _read_manifest(folder)
        for name, entry in manifest["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise UserError(f"{path}: missing or of the wrong size; {_remedy(manifest)}")
        return cls(folder, manifest)

    @property
    def fingerprint(self) -> str:
        """Identity of the data: equal for equal pictures, texts, tokenizer and feature network."""
        return self.manifest["fingerprint"]

    @property
    def imported(self) -> bool:
        """Whether `m6 data import` made it, with the tokenizer and the feature network of another corpus."""
        return _imported(self.manifest)

    @property
    def feature_network(self) -> Path:
        """The file that `features.PatchFeatures` opens to see new images as the corpus' own were seen."""
        return self.folder / FEATURE_NETWORK

    @property
    def feature_network_sha256(self) -> str:
        return self.manifest["files"][FEATURE_NETWORK]["sha256"]

    def verify(self) -> None:
        """Check every file against its SHA-256; raises UserError that names the first that differs."""
        for name, entry in self.manifest["files"].items():
            if sha256_of(self.folder / name) != entry["sha256"]:
                raise UserError(f"{self.folder / name}: damaged; {_remedy(self.manifest)}")

    def picture(self, row: int) -> Picture:
        return Picture(**{name: column[row].as_py() for name, column in self._picture_columns.items()})

    def text(self, row: int) -> Text:
        return Text(**{name: column[row].as_py() for name, column in self._text_columns.items()})

    def pixels(self, row: int, augmentation: int, side: int) -> np.ndarray:
        """float32 [3, side, side] in [-1, 1]: the view of a picture that `features[row, augmentation]` describes."""
        picture = self.picture(row)
        square = augmented(picture.pil(), augmentation, picture.mirrorable, side)
        return as_array(square)

    def picture_rows(self, split: str, **equals: Any) -> np.ndarray:
        """int64 row numbers of the pictures of a split whose columns equal the given values."""
        return _rows(self._picture_columns, {"split": split, **equals})

    def text_rows(self, split: str, kind: str | None = None) -> np.ndarray:
        """int64 row numbers of the texts of a split, of one kind (poem, review) or of all."""
        return _rows(self._text_columns, {"split": split} | ({"kind": kind} if kind else {}))

    @cached_property
    def _picture_columns(self) -> dict[str, pa.ChunkedArray]:
        # Straight to Arrow: about 20 microseconds a row, a tenth of what indexing a Dataset takes.
        return {field.name: self.pictures.data.column(field.name) for field in fields(Picture)}

    @cached_property
    def _text_columns(self) -> dict[str, pa.ChunkedArray]:
        return {field.name: self.texts.data.column(field.name) for field in fields(Text)}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def builder(folder: Path) -> str | None:
    """What built the corpus there, "fetch" or "import", by its manifest, be it damaged or of another format.

    None if that shows neither.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        kinds = {"format": int, "fingerprint": str, "files": dict}
        known = all(isinstance(manifest[key], kind) for key, kind in kinds.items())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return ("import" if _imported(manifest) else "fetch") if known else None


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"]
        if found == FORMAT:
            _check_manifest(manifest)
    except FileNotFoundError as error:
        if (folder.parent / MANIFEST).is_file():
            raise UserError(f"{folder}: no corpus there; do you mean {folder.parent.parent}?") from error
        remedy = f"run `m6 data fetch --dir {folder.parent}`, or make one of your own by `m6 data import`"
        raise UserError(f"{folder}: no corpus there; {remedy}") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        remedy = f"delete {folder}, then run `m6 data fetch --dir {folder.parent}`"
        raise UserError(f"{path}: damaged ({error}); {remedy}") from error
    if found != FORMAT:
        raise UserError(f"{folder}: corpus of format {found}, this program reads {FORMAT}; {_remedy(manifest)}")
    return manifest


def _imported(manifest: dict[str, Any]) -> bool:
    return "base" in manifest


def _remedy(manifest: dict[str, Any]) -> str:
    return f"run `m6 data {'import' if _imported(manifest) else 'fetch'}` to build the corpus anew"


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError for one that does not say what is relied on."""
    if not isinstance(manifest["fingerprint"], str):
        raise TypeError("fingerprint")
    entries = manifest["files"]
    for name in (TOKENIZER, FEATURES, FEATURE_NETWORK):
        entries[name]
    for name, entry in entries.items():
        if not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str):
            raise TypeError(name)


def _load(folder: Path) -> Dataset:
    dataset = load_from_disk(folder)
    assert isinstance(dataset, Dataset)
    return dataset


def _rows(columns: dict[str, pa.ChunkedArray], equals: dict[str, Any]) -> np.ndarray:
    unknown = equals.keys() - columns.keys()
    assert not unknown, f"no such column: {unknown}"
    masks = [pc.equal(columns[name], value).to_numpy() for name, value in equals.items()]
    return np.flatnonzero(np.logical_and.reduce(masks)).astype(np.int64)
