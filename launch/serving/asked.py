"""What a request may say, as JSON (pictures in base64) or as a form (pictures as files, fields of the same names)."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema, model_validator

from launch.serving.limits import Limits
from training.painting import MOST_SIDE, Hand
from training.writing import Style


def _unpacked(given: Any) -> Any:
    """The bytes of a picture that is base64, of a data URI or alone."""
    if not isinstance(given, str):
        return given
    try:
        return base64.b64decode(given.partition(",")[2] if given.startswith("data:") else given, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("must be a picture's bytes in base64") from None


def _several(given: Any) -> Any:
    return given if isinstance(given, list) else [given]


def _box(given: Any) -> Any:
    """LEFT,TOP,WIDTH,HEIGHT of a form."""
    return given.split(",") if isinstance(given, str) else given


PICTURE = WithJsonSchema({"type": "string", "contentEncoding": "base64", "contentMediaType": "image/*"})
PictureFile = Annotated[bytes, BeforeValidator(_unpacked), PICTURE]
Pictures = Annotated[
    list[PictureFile], BeforeValidator(_several), Field(min_length=1, max_length=Limits.pictures)
]  # fmt: skip
Words = Annotated[str, StringConstraints(max_length=Limits.text)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Guidance = Annotated[float, Field(ge=0, le=100)]


class Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, ser_json_bytes="base64")

    several: ClassVar[frozenset[str]] = frozenset()  # fields that a form may have more than once


class ForCaption(Asked):
    several = frozenset({"images"})

    images: Pictures
    kind: Literal["zh", "en", "tags"] = "zh"


class ForAnswer(Asked):
    several = frozenset({"choices"})

    question: Words
    image: PictureFile | None = None
    choices: Annotated[list[Words], BeforeValidator(_several), Field(max_length=16)] = []


class ForMatch(Asked):
    image: PictureFile
    text: Words


class ForText(Asked):
    prompt: Words
    examples: Annotated[list[tuple[Words, Words]], Field(max_length=8)] = []
    temperature: Annotated[float, Field(ge=0, le=10)] = Style.temperature
    top_p: Annotated[float, Field(gt=0, le=1)] = Style.top_p
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] = Style.repetition_penalty
    tokens: Annotated[int, Field(ge=1, le=1024)] = Style.tokens
    seed: Seed = Style.seed
    stream: bool = False

    @property
    def style(self) -> Style:
        return Style(self.temperature, self.top_p, self.repetition_penalty, self.tokens, self.seed)


class _ForPictures(Asked):
    pictures: Annotated[int, Field(ge=1, le=16)] = 4
    tries: Annotated[int, Field(ge=1, le=32)] = 16
    guidance: Guidance = 3.0
    seed: Seed = 0
    steps: Annotated[int, Field(ge=1, le=64)] | None = None
    size: Annotated[int, Field(ge=1, le=MOST_SIDE)] | None = None
    reference: PictureFile | None = None

    @model_validator(mode="after")
    def _check_kept(self) -> _ForPictures:
        if self.pictures > self.tries:
            raise ValueError(f"pictures={self.pictures}: cannot be more than tries={self.tries}")
        return self

    @property
    def hand(self) -> Hand:
        return Hand(self.pictures, self.tries, self.guidance, seed=self.seed, steps=self.steps, size=self.size)


class ForDrawing(_ForPictures):
    text: Words


class ForEdit(_ForPictures):
    image: PictureFile
    text: Words = ""
    region: Annotated[tuple[int, int, int, int], BeforeValidator(_box)] | None = None
    mask: PictureFile | None = None
    pictures: Annotated[int, Field(ge=1, le=16)] = 1

    @model_validator(mode="after")
    def _check_region(self) -> ForEdit:
        if (self.region is None) == (self.mask is None):
            raise ValueError("say what is redrawn, by region or by mask")
        return self


class ForCollection(Asked):
    several = frozenset({"images"})

    images: Pictures


class ForSearch(Asked):
    query: Words
    k: Annotated[int, Field(ge=1, le=100)] = 12
