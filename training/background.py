"""What finding goes by beside the weights: how rare words are among training captions, and how training pictures look.

Shape suffixes: N pictures, P image patches, C channels of a patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from training.own_data import own_corpus
from training.parent import Parent
from training.recipe import Recipe
from training.run import BACKGROUND, home_of

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

    def after(self, parent: Background) -> Background:
        """Of a run that was fine-tuned on these captions and pictures, after it had learned those of another.

        Words keep the rarity that they were learned with.
        """
        patches_NPC = np.concatenate((parent.patches_NPC, self.patches_NPC))
        return Background({**self.rarity, **parent.rarity}, patches_NPC)

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
            way = "export anew a run that was trained with task `contrast`, or bring back the run's folder as it was"
            raise UserError(f"{path}: {why}; {way}") from None

    def save(self, path: Path) -> None:
        """Raises OSError."""
        pieces, rarity = np.array(list(self.rarity), np.int64), np.array(list(self.rarity.values()))
        replace(path, save({"pieces": pieces, "rarity": rarity, "patches": self.patches_NPC}))

    @property
    def digest(self) -> str:
        return xxhash.xxh3_128(repr(sorted(self.rarity.items())).encode() + self.patches_NPC.tobytes()).hexdigest()


def background_of(path: Path, manifest: Mapping[str, Any], recipe: Recipe, corpus: Corpus) -> Background:
    """What the run of the checkpoint `path` finds by. `corpus`: one that it is used with, perhaps its own.

    Raises UserError if what it takes is no longer there.
    """
    if recipe.start:
        return Background.read(home_of(path) / BACKGROUND)
    own = corpus if corpus.fingerprint == manifest["data"] else own_corpus(path, manifest, recipe)
    return Background.of(own, recipe.model_shape())


def background_for(folder: Path, parent: Parent | None, recipe: Recipe, corpus: Corpus) -> Background | None:
    """What a training in the run's folder goes by that begins with a parent, or that (None) began with one before.

    None where neither learns to find. Raises UserError if what it takes is no longer there.
    """
    if not (recipe.start and "contrast" in recipe.learned):
        return None
    if parent is None:
        return Background.read(folder / BACKGROUND)
    own = Background.of(corpus, recipe.model_shape()) if len(corpus.picture_rows("train")) else None
    if "contrast" not in parent.recipe.learned:
        return own
    known = background_of(parent.path, parent.manifest, parent.recipe, corpus)
    return own.after(known) if own else known


def usual_rows(corpus: Corpus) -> list[int]:
    """Training pictures that stand for all: PICTURES of them, evenly spaced."""
    rows = corpus.picture_rows("train")
    places = np.linspace(0, len(rows) - 1, min(PICTURES, len(rows)))
    return rows[places.round().astype(int)].tolist()
