"""Pages: one HTML file each, which needs nothing else, out of the templates beside this file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from training.charts import nats, three_digits


def render(template: str, **values: Any) -> str:
    """The page of a template; what is put into it stays text, whatever it holds."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"three_digits": three_digits, "nats": nats}
    return environment.get_template(template).render(values)
