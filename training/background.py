"""What finding goes by beside the weights: how rare words are among training captions, and how training pictures look.

Shape suffixes: N pictures, P image patches, C channels of a patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from model.config import ModelConfig
from training.data.batches import Collator
from training.data.corpus import Corpus
from training.data.tasks import View
from training.data.tasks.contrast import word_rarity
from training.errors import UserError
from training.files import replace

PICTURES = 400  # enough to tell how near a text is to a usual picture (docs/LOG.md, 38)


@dataclass(frozen=True)
class Background:
    """Of the training split: `rarity` of pieces among captions, and the patches of some pictures, for comparison."""

    rarity: Mapping[int, float]
    patches_NPC: np.ndarray  # float16

    @classmethod
    def of(cls, corpus: Corpus, shape: ModelConfig) -> Background:
        look = Collator(corpus, shape).look
        patches = [look(View(row, 0)) for row in usual_rows(corpus)]
        return cls(word_rarity(corpus), np.stack(patches).astype(np.float16))

    @classmethod
    def read(cls, path: Path) -> Background:
        """Raises UserError."""
        try:
            arrays = load_file(path)
            pieces, rarity, patches = (arrays[name] for name in ("pieces", "rarity", "patches"))
            if (pieces.ndim, rarity.ndim, patches.ndim) != (1, 1, 3) or not (rarity > 0).all() or not len(patches):
                raise ValueError
            return cls(dict(zip(pieces.tolist(), rarity.tolist(), strict=True)), patches)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            why = f"cannot be read ({type(error).__name__})"
            raise UserError(f"{path}: {why}; export anew a run that was trained with task `contrast`") from None

    def save(self, path: Path) -> None:
        """Raises OSError."""
        pieces, rarity = np.array(list(self.rarity), np.int64), np.array(list(self.rarity.values()))
        replace(path, save({"pieces": pieces, "rarity": rarity, "patches": self.patches_NPC}))

    @property
    def digest(self) -> str:
        return xxhash.xxh3_128(repr(sorted(self.rarity.items())).encode() + self.patches_NPC.tobytes()).hexdigest()


def usual_rows(corpus: Corpus) -> list[int]:
    """Training pictures that stand for all: PICTURES of them, evenly spaced."""
    rows = corpus.picture_rows("train")
    places = np.linspace(0, len(rows) - 1, min(PICTURES, len(rows)))
    return rows[places.round().astype(int)].tolist()
