"""Training M6, and the trained model at work: `from training import M6`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.trained import M6

__all__ = ["M6"]


def __getattr__(name: str) -> Any:
    """The model is imported when it is asked for: reading a recipe needs no torch."""
    if name == "M6":
        from training.trained import M6

        return M6
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
