"""What a run can do, of all that can be asked of a server, and why not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from launch.serving.refusals import Refusal
from training.errors import UserError
from training.trained import M6


class Abilities:
    def __init__(self, m: M6):
        """Looks up what each task needs beside the weights."""
        self.why_not = {
            **{task: _why_not(partial(m.needs, task)) for task in ("caption", "ask", "match")},
            "write": "",
            "draw": _why_not(lambda: _paints(m, "inpaint" if m.learned("inpaint") else "draw")),
            "edit": _why_not(lambda: _paints(m, "inpaint")),
            "search": _why_not(lambda: _finds(m)),
        }

    def check(self, task: str) -> None:
        """Raises Refusal for what the run cannot do."""
        if why := self.why_not[task]:
            raise Refusal(422, "not_learned", why)


def _paints(m: M6, task: str) -> object:
    m.needs(task)
    return m.image_tokenizer


def _finds(m: M6) -> object:
    m.needs("contrast")
    return m.identity


def _why_not(try_it: Callable[[], object]) -> str:
    """In a line; "" if it can."""
    try:
        try_it()
    except UserError as error:
        return str(error)
    return ""
