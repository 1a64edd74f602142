"""Which rows must share a split: those of one key, and of all keys that have a picture in common."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from training.data.splits import Split, shared_split


def families(keys: Sequence[str], marks: Sequence[bytes]) -> list[str]:
    """Of each row its family: the first by the alphabet of the keys that are joined to its own by equal marks."""
    parents = {key: key for key in keys}

    def root(key: str) -> str:
        while parents[key] != key:
            parents[key] = key = parents[parents[key]]
        return key

    first: dict[bytes, str] = {}
    for key, mark in zip(keys, marks, strict=True):
        one, other = sorted((root(key), root(first.setdefault(mark, key))))
        parents[other] = one
    return [root(key) for key in keys]


def splits(found: Sequence[str], marks: Sequence[bytes], trained: Collection[bytes], held_out: float) -> list[Split]:
    """Of each row, given its family. A family of which a mark was `trained` on elsewhere is held out from nothing."""
    known = {family for family, mark in zip(found, marks, strict=True) if mark in trained}
    return ["train" if family in known else shared_split(family, held_out) for family in found]
