"""What papers tell of models and trainings that rows name: their configuration, each with its source.

For what the rows have no column for, and for cells that are empty.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

Found = TypeVar("Found")


@dataclass(frozen=True)
class Architecture:
    """Of models whose heads do not just share out the hidden size, or that predict more than the next token."""

    query: int  # width of a head's queries and keys
    value: int
    further: int = 0  # layers that predict further tokens, each with a pass of the head

    @property
    def head_width(self) -> float:
        return (self.query + self.value) / 2


# By what a model's name starts with, in small letters and without punctuation.
ARCHITECTURES = {
    "deepseekv2": Architecture(192, 128),  # arXiv 2405.04434, section 3.1.2
    "deepseekv3": Architecture(192, 128, further=1),  # arXiv 2412.19437, section 4.2
    "kimik2": Architecture(192, 128),  # arXiv 2507.20534, section 2.3: as DeepSeek-V3's
    "qwen3": Architecture(128, 128),  # arXiv 2505.09388, and its models' configurations
    "gptoss": Architecture(64, 64),  # arXiv 2508.10925, section 2.2
}

# Of whole trainings by their makers: columns, and what stands in notes.
TRAININGS: Mapping[str, Mapping[str, str]] = {
    # arXiv 2412.19437, sections 3.2.1 (DualPipe), 3.3 and 4.2 (15,360 rows)
    "deepseekv3": {"global_batch_tokens": "62914560", "precision": "fp8", "notes": "1F1B overlap"},
    # arXiv 2211.05100, table 3 and section 3.4; micro-batches: bigscience, train/tr11-176B-ml
    "bloom176b": {
        "layers": "70", "hidden": "14336", "ffn": "57344", "heads": "112", "seq": "2048", "vocab": "250880",
        "params_total": "1.76e11", "gpus": "384", "tp": "4", "pp": "12", "dp": "8", "zero": "1", "micro_batch": "2",
        "global_batch_tokens": "4194304", "notes": "366B tokens; 4 Omni-Path/node",
    },
    # arXiv 2407.21783, tables 3 and 4, section 3.3.2 (gradients and optimizer states are sharded)
    "llama3405b": {
        "layers": "126", "hidden": "16384", "ffn": "53248", "heads": "128", "seq": "8192", "vocab": "128256",
        "params_total": "4.05e11", "gpus": "16384", "tp": "8", "pp": "16", "dp": "128", "zero": "2",
        "global_batch_tokens": "16777216", "precision": "bf16",
    },
}  # fmt: skip


def architecture(model: str) -> Architecture:
    """By a model's name, such as `Qwen3-235B-A22B`."""
    return _named(model, ARCHITECTURES) or Architecture(0, 0)


def training(model: str) -> Mapping[str, str]:
    return _named(model, TRAININGS) or {}


def _named(model: str, table: Mapping[str, Found]) -> Found | None:
    name = re.sub(r"[^a-z0-9]", "", model.lower().replace("3.1", "3"))
    return next((found for start, found in table.items() if name.startswith(start)), None)
