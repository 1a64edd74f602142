"""A trained image tokenizer on the disk: its weights, what they are, and the codes of a corpus' pictures."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch.utils.data import DataLoader

from model.config import ModelConfig
from model.image_tokens import ImageTokenizer
from training.data.corpus import Corpus, sha256_of
from training.data.features import AUGMENTATIONS
from training.data.progress import bars
from training.data.views import FixedViews
from training.errors import UserError
from training.files import replace
from training.image_recipe import ImageTokenizerRecipe
from training.recipe import Recipe, one_line

CODED_AT_ONCE = 16  # views
WEIGHTS, DESCRIPTION, CODES = "image_tokenizer.safetensors", "image_tokenizer.json", "codes.npy"


class Description(BaseModel):
    """`image_tokenizer.json`, written last: where it is, all is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: ImageTokenizerRecipe  # and in it the model's shape
    data: str  # fingerprint of the corpus
    feature_network: str | None  # SHA-256 of the perceptual loss' network; None without that loss
    measures: dict[str, dict[str, float]]  # of each style, and of all, on pictures of the recipe's `split`
    weights: str  # SHA-256 of the file
    codes: str  # likewise


def save_image_tokenizer(
    folder: Path,
    model: ImageTokenizer,
    codes: np.ndarray,
    recipe: ImageTokenizerRecipe,
    corpus: Corpus,
    feature_network: str | None,
    measures: dict[str, dict[str, float]],
) -> None:
    """Write the weights, the corpus' codes (uint16 [pictures, K, P]), and what they are: each file whole or not."""
    weights, stored = save({name: value.contiguous() for name, value in model.state_dict().items()}), io.BytesIO()
    np.save(stored, codes, allow_pickle=False)
    description = Description(
        recipe=recipe,
        data=corpus.fingerprint,
        feature_network=feature_network,
        measures=measures,
        weights=hashlib.sha256(weights).hexdigest(),
        codes=hashlib.sha256(stored.getvalue()).hexdigest(),
    )
    replace(folder / WEIGHTS, weights)
    replace(folder / CODES, stored.getvalue())
    replace(folder / DESCRIPTION, description.model_dump_json(indent=1) + "\n")


def read_description(folder: Path) -> Description:
    """What a folder's tokenizer is. Raises UserError."""
    path = folder / DESCRIPTION
    try:
        return Description.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{folder}: no image tokenizer there; `m6 image-tokenizer` trains one") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise UserError(f"{path}: {place or 'it'}: {one_line(problem['msg'])[:200]}") from None


def load_image_tokenizer(folder: Path) -> ImageTokenizer:
    """The tokenizer of a folder, on the CPU, ready for use. Raises UserError for files that are not what it says."""
    description, path = read_description(folder), folder / WEIGHTS
    with torch.device("meta"):
        model = ImageTokenizer(description.recipe.model)
    try:
        weights = path.read_bytes()
        if hashlib.sha256(weights).hexdigest() != description.weights:
            raise UserError(f"{path}: damaged: it is not the file that {DESCRIPTION} names")
        tensors = load(weights)
        if odd := sorted(name for name, tensor in tensors.items() if tensor.dtype != torch.float32):
            raise UserError(f"{path}: {odd[0]} is {tensors[odd[0]].dtype}, not float32")
        model.load_state_dict(tensors, strict=True, assign=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{path}: not the weights that {DESCRIPTION} describes ({one_line(str(error))[:200]})"
        ) from None
    return model.eval().requires_grad_(False)


def load_image_codes(folder: Path, corpus: Corpus) -> np.ndarray:
    """uint16 [pictures, K, P], memory-mapped: codes of the corpus' pictures, in its order and its views, row by row.

    Raises UserError if they are of another corpus, or the file is not what the folder's description says.
    """
    description, path = read_description(folder), folder / CODES
    if description.data != corpus.fingerprint:
        raise UserError(f"{path}: of another corpus than {corpus.folder}; train the tokenizer on it")
    try:
        if sha256_of(path) != description.codes:
            raise UserError(f"{path}: damaged: it is not the file that {DESCRIPTION} names")
        codes = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not an array of codes ({one_line(str(error))[:200]})") from None
    return _checked(codes, path, corpus, description)


def _checked(codes: np.ndarray, path: Path, corpus: Corpus, description: Description) -> np.ndarray:
    shape = description.recipe.model
    wanted = (len(corpus.pictures), len(AUGMENTATIONS), shape.grid**2)
    if codes.shape != wanted or codes.dtype != np.uint16 or codes.max(initial=0) >= shape.codes:
        raise UserError(f"{path}: {codes.dtype} {list(codes.shape)}, not uint16 {list(wanted)} of {shape.codes} codes")
    return codes


@torch.inference_mode()
def code_pictures(
    model: ImageTokenizer, corpus: Corpus, tell: Callable[[int, int], object], workers: int = 0
) -> np.ndarray:
    """uint16 [pictures, K, P]: the codes of all pictures of a corpus, in its order and its views.

    `tell` is told how many views are done, and of how many. `workers`: processes that read pictures; 0: this one.
    """
    views = FixedViews(corpus, np.arange(len(corpus.pictures)), model.config.side)
    codes, done = np.empty((len(views), model.config.grid**2), np.uint16), 0
    device = next(model.parameters()).device
    for image_BcHW in DataLoader(views, CODED_AT_ONCE, num_workers=workers):
        start, done = done, done + len(image_BcHW)
        codes[start:done] = model.encode(image_BcHW.to(device)).cpu().numpy()
        tell(done, len(views))
    return codes.reshape(len(corpus.pictures), len(AUGMENTATIONS), -1)


def image_codes(folder: Path, corpus: Corpus) -> np.ndarray:
    """As `load_image_codes`, but of any corpus: those of one that the tokenizer was not trained on are made the first
    time, under a bar, and kept beside the corpus. Raises UserError.
    """
    description = read_description(folder)
    if description.data == corpus.fingerprint:
        return load_image_codes(folder, corpus)
    path = corpus.folder.parent / "cache" / f"codes-{corpus.fingerprint[:16]}-{description.weights[:16]}.npy"
    try:
        if not path.exists():
            with bars() as shown:
                bar, stored = shown.add_task("picture codes"), io.BytesIO()
                model = load_image_tokenizer(folder)
                codes = code_pictures(model, corpus, lambda done, of: shown.update(bar, completed=done, total=of))
                np.save(stored, codes, allow_pickle=False)
            path.parent.mkdir(parents=True, exist_ok=True)
            replace(path, stored.getvalue())
        return _checked(np.load(path, mmap_mode="r", allow_pickle=False), path, corpus, description)
    except OSError as error:
        raise UserError(f"{path}: cannot be kept there ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not an array of codes ({one_line(str(error))[:200]}); remove it") from None


def open_corpus(recipe: Recipe, model: ModelConfig) -> Corpus:
    """A recipe's corpus, with the codes of its image tokenizer, if it names one. Raises UserError."""
    corpus = Corpus.open(recipe.data)
    if recipe.image_tokenizer is not None:
        entries = read_description(Path(recipe.image_tokenizer)).recipe.model.codes
        if model.image_codes < entries:
            raise UserError(
                f"model.image_codes={model.image_codes} is less than the {entries} codes of {recipe.image_tokenizer}"
            )
        corpus.codes = image_codes(Path(recipe.image_tokenizer), corpus)
    return corpus
