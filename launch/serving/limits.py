"""What a server takes from strangers, and what it makes of more."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Times are in seconds."""

    rows: int = 32  # that go through the model together
    queue: int = 128  # rows that wait for it; more are refused at once
    seconds: float = 60.0  # a request may take, from when it was read
    company: float = 0.008  # that a request waits for others of its kind
    clients: int = 256  # requests at once, those still being read among them
    connections: int = 1024
    head: float = 10.0  # until a request's head must have come
    body: float = 20.0  # and its body
    sending: float = 60.0  # that a client may leave an answer unread
    idle: int = 15  # that a connection is kept without a request
    heads: int = 16_384  # characters of a request's head
    bytes: int = 16 * MIB  # of a request
    held: int = 256 * MIB  # of all requests that are being read
    fields: int = 64  # of a form
    commas: int = 20_000  # of JSON: so many values are read, or found fault with, while others wait
    text: int = 4096  # characters of any text
    pictures: int = 16  # of a request
    pixels: int = 24_000_000  # of a picture
    edited: int = 4_200_000  # px of one that is edited, whose answer has as many
    decoders: int = 2  # pictures that are unpacked and looked at at once
    collections: int = 64
    collected: int = 5000  # pictures of a collection
