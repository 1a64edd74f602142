"""Which part of the model a parameter belongs to, by its name: some may be all that is trained. Imports no torch."""

from __future__ import annotations

ADAPTERS = "adapters"  # `model/adapters.py`
# Components of `ParameterCounts`: words in a parameter's name, the first that fits.
_WORDS = {
    "_lora_": ADAPTERS, "bags.": "bags", "image.": "image", "norm.": "norms", "router.": "routers",
    "experts.": "experts", "feed_forward.": "experts", "attention.": "attention",
}  # fmt: skip
PARTS = ("embeddings", "image", "attention", "norms", "routers", "experts", "bags")
WHOLE = frozenset((*PARTS, ADAPTERS))


def part_of(parameter: str) -> str:
    """By the parameter's name in the model. The dense feed-forward layer counts as experts."""
    return next((part for word, part in _WORDS.items() if word in parameter), "embeddings")
