"""What a person gives a trained model, texts and pictures, as rows and batches of the tasks that it was trained on.

Every refusal is a UserError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from model.config import ModelConfig
from training.data.batches import Batch, Batcher, picture_side, pixel_patches
from training.data.features import PatchFeatures, as_array, augmented
from training.data.images import read_file, read_image, read_picture
from training.data.rows import clean_lines
from training.data.tasks import Row
from training.data.tokenizer import Tokenizer
from training.errors import UserError

ROWS = 32  # of a batch

Whole = str | Path | bytes | Image.Image
Picture = Whole | np.ndarray  # the last: its patches, as `Prompts.patches` gives them


class Prompts:
    """Makes rows of at most `text_positions` tokens; `features`: None for a model that takes pixels."""

    def __init__(self, tokenizer: Tokenizer, shape: ModelConfig, features: PatchFeatures | None, text_positions: int):
        self.tokenizer, self.shape, self.features, self.text_positions = tokenizer, shape, features, text_positions
        self.batch_of = Batcher(tokenizer, shape, look=lambda patches: patches)

    def question(self, text: str, image: Picture | None, fine: bool = False) -> Row:
        """What is asked about a picture, or without one."""
        return Row(self.tokens(text, fine), [self.tokenizer.eos_id], None if image is None else as_seen(image))

    def tokens(self, text: str, fine: bool = False, what: str = "the text") -> list[int]:
        """Of a text that leaves room for an answer; `fine`: each Chinese character by itself."""
        cleaned = cleaned_text(text)
        tokens = self.tokenizer.encode_finely(cleaned) if fine else self.tokenizer.encode(cleaned)
        if len(tokens) >= self.text_positions:
            raise UserError(
                f"{what} has {len(tokens)} tokens, and the model was trained on rows of {self.text_positions} with "
                "the answer: shorten it"
            )
        return tokens

    def batches(self, rows: Sequence[Row], device: torch.device, labels: bool = False) -> Iterator[Batch]:
        """Of ROWS rows each, on a device."""
        for start in range(0, len(rows), ROWS):
            part = self._looked_at(rows[start : start + ROWS])
            batch = self.batch_of(part, max(len(row.source) + max(len(row.target), 1) for row in part))
            if not labels:
                del batch["labels_BT"]
            yield {name: tensor.to(device) for name, tensor in batch.items()}

    def patches(self, pictures: Sequence[Image.Image]) -> list[np.ndarray]:
        """What the model sees of each, float32 [P, C]."""
        if self.features and pictures:
            return list(self.features(list(pictures)).numpy())
        return [
            pixel_patches(as_array(augmented(picture, 0, square_side=picture_side(self.shape))), self.shape)
            for picture in pictures
        ]

    def _looked_at(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with patches for pictures, which are looked at together."""
        unseen = [place for place, row in enumerate(rows) if isinstance(row.picture, Image.Image)]
        found = dict(zip(unseen, self.patches([rows[place].picture for place in unseen]), strict=True))
        return [replace(row, picture=found.get(place, row.picture)) for place, row in enumerate(rows)]


def cleaned_text(text: str) -> str:
    """Its lines, without what prints nothing."""
    cleaned = clean_lines(text.splitlines())
    if not cleaned:
        raise UserError("the text is empty: say something")
    if any("\ud800" <= character <= "\udfff" for character in cleaned):
        raise UserError("the text holds half of a character (a lone surrogate): mend its encoding")
    return cleaned


def as_seen(given: Picture) -> Image.Image | np.ndarray:
    """As large as it is looked at, if it is a file's."""
    if isinstance(given, np.ndarray):
        return given
    return read_picture(Path(given)) if isinstance(given, str | Path) else whole(given, read_image)


def whole(given: Whole, read: Callable[[bytes], Image.Image]) -> Image.Image:
    """In its own size."""
    if isinstance(given, Image.Image):
        return given
    if not isinstance(given, bytes):
        return read_file(Path(given), read)
    try:
        return read(given)
    except ValueError as error:
        raise UserError(f"the picture: {error}") from None
