"""`m6 models`: the presets, counted, beside what was published."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from model.config import PRESETS, Preset


def show_models() -> None:
    """A line a preset: shape, parameters by our count, total as published (M6, M6-T, M6-10T) and the difference."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for heading in ("preset", "layers", "hidden", "ffn", "experts", "k"):
        table.add_column(heading, justify="left" if heading == "preset" else "right", no_wrap=True)
    for heading in ("total", "active", "paper", "off by"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, preset in PRESETS.items():
        table.add_row(name, *_row(preset))
    Console().print(table)


def _row(preset: Preset) -> list[str]:
    config, counts = preset.config, preset.config.parameter_counts()
    shape = [
        config.layers,
        config.hidden,
        config.ffn,
        config.experts or "dense",
        config.k if config.experts else "",
    ]
    difference = f"{counts.total / preset.published - 1:+.2%}" if preset.published else ""
    published = _short(preset.published) if preset.published else ""
    return [*map(str, shape), _short(counts.total), _short(counts.active), published, difference]


def _short(count: float) -> str:
    """1386000000 -> 1.39 B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:,.0f}"
