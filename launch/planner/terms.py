"""Numbers that know where they come from: a plan is made of terms, each with its formula, inputs and source."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import CodeType

# What formulas may call besides arithmetic.
FUNCTIONS = {"__builtins__": {}, "max": max, "min": min, "ceil": math.ceil, "exp": math.exp}


@dataclass(frozen=True)
class Term:
    """`value` in `unit`, which is what `formula` gives of `inputs`."""

    key: str
    value: float
    unit: str
    formula: str
    inputs: Mapping[str, float | Term] = field(default_factory=dict)
    source: str = ""

    def __float__(self) -> float:
        return float(self.value)


class Terms(dict[str, Term]):
    """The terms of one plan by key, in the order of their making."""

    def add(self, key: str, formula: str, unit: str, source: str = "", **inputs: float | Term) -> Term:
        """Work a term out of its formula, so that what is explained is what was computed. Raises ArithmeticError."""
        numbers = {name: value.value if isinstance(value, Term) else value for name, value in inputs.items()}
        value = eval(_compiled(formula), FUNCTIONS, numbers)
        if not math.isfinite(value):
            raise OverflowError(f"{key} is {value}")
        self[key] = Term(key, value, unit, formula, inputs, source)
        return self[key]

    def total(self, key: str, unit: str, parts: list[Term]) -> Term:
        """The sum of terms, named by the last part of their keys."""
        named = {part.key.rpartition(".")[2]: part for part in parts}
        return self.add(key, " + ".join(named) or "0", unit, "", **named)

    def under(self, prefix: str) -> dict[str, Term]:
        """Terms right under a prefix, by the last part of their keys."""
        found = {key.removeprefix(f"{prefix}."): term for key, term in self.items() if key.startswith(f"{prefix}.")}
        return {name: term for name, term in found.items() if "." not in name}


@functools.cache
def _compiled(formula: str) -> CodeType:
    return compile(formula, "<formula>", "eval")
