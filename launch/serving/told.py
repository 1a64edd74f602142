"""What requests are answered, as JSON."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field, WithJsonSchema

PngText = Annotated[
    str, WithJsonSchema({"type": "string", "contentEncoding": "base64", "contentMediaType": "image/png"})
]


class Captions(BaseModel):
    captions: list[str] = Field(description="Of each picture, in the order that they came.")


class Answer(BaseModel):
    answer: str


class Match(BaseModel):
    probability: float = Field(description="That the text belongs to the picture, from 0 to 1.")


class Written(BaseModel):
    text: str
    tokens: int


class Drawn(BaseModel):
    pictures: list[PngText] = Field(description="PNG files in base64, the best first.")


class Collection(BaseModel):
    name: str
    pictures: int
    indexed: int = Field(description="Of these, that can be found.")


class Collections(BaseModel):
    collections: list[Collection]


class Added(Collection):
    ids: list[str] = Field(description="Of the pictures that were sent, in their order; equal ones have one.")


class Listed(Collection):
    ids: list[str]


class Hit(BaseModel):
    id: str
    score: float = Field(description="A weighted mean of cosines.")
    details: str = Field(description="What the model says of the picture.")
    href: str


class Hits(BaseModel):
    hits: list[Hit] = Field(description="The best first.")
    indexed: int = Field(description="Pictures that were looked through.")


class Health(BaseModel):
    status: str
    model: str
    step: int


class Ability(BaseModel):
    able: bool
    why: str = Field(description="Why not, in a line.")


class Model(BaseModel):
    model: str
    step: int
    parameters: int
    tasks: dict[str, Ability]
    limits: dict[str, float] = Field(description="Of a request: bytes, pictures, pixels, characters, seconds.")
