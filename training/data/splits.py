"""Which split an item belongs to: a pure function of its concept, never of its image.

Pictures of one concept family (the same person in another gender or skin tone, the same object in another
drawing style) share a split, or a model could score on the test split by having seen the twin.
"""

import hashlib
from typing import Literal

Split = Literal["train", "validation", "test", "unused"]

_HELD_OUT: dict[int, Split] = {0: "test", 1: "validation"}
_MODIFIERS = {"200d", "2640", "2642", "1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
_PERSON_BASES = {"1f468", "1f469", "1f9d1", "1f466", "1f467", "1f9d2"}


def emoji_key(hexcode: str) -> str:
    """The join key of a code-point sequence such as `2764-FE0F`: lower case, without `fe0f`."""
    return "-".join(code for code in hexcode.lower().split("-") if code != "fe0f")


def emoji_family(key: str) -> str:
    """The concept family of a join key: joiners, gender signs and skin tones off, person bases made one."""
    codes = [code for code in key.split("-") if code not in _MODIFIERS]
    if len(codes) > 1:
        codes = ["P" if code in _PERSON_BASES else code for code in codes]
    return "-".join(codes)


def split_of(text: str) -> Split:
    """Hash of `text` modulo 10: 0 is test, 1 is validation, the rest trains."""
    return _HELD_OUT.get(_hash(text) % 10, "train")


def shared_split(text: str, held_out: float) -> Split:
    """By hash of `text`: the share `held_out` is held out, half of it each for test and validation.

    By the hash's first digits, where `split_of` goes by the last: of what that holds out, too, most trains here.
    """
    place = _hash(text) / 2**160
    return "test" if place < held_out / 2 else "validation" if place < held_out else "train"


def _hash(text: str) -> int:
    return int(hashlib.sha1(text.encode()).hexdigest(), 16)
