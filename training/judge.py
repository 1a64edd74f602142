"""Who tells what a drawing shows: a small CNN, trained here on the training split's pictures and words alone.

It shares no weights with what the image tokenizer's loss looks through (`training/perceptual.py`), so a drawing cannot
please it by pleasing that. Pixels of three thousand pictures teach little: what it makes of real pictures is the bar.

Shape suffixes: N pictures, c colours (3), V text pieces, W pieces of a picture's words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from model.bags import ABSENT, words_loss
from training.data.corpus import Corpus
from training.data.features import as_array, augmented
from training.data.tasks.contrast import picture_words, rare_words
from training.data.tokenizer import Tokenizer
from training.files import replace
from training.rivals.ridge import nameable_rows

SIDE = 64  # px
CHANNELS = (32, 64, 128, 256)
EPOCHS, BATCH, RATE, DECAY = 16, 64, 4e-3, 0.05
SHIFT = 4  # px that a picture is moved by at the most, beside its stored views
SEED = 0
VERSION = 1  # of all that decides a judge's weights but the corpus

Advance = Callable[[int, int], object]  # steps done, of how many


class Judge(nn.Module):
    """Pictures -> how likely each piece stands in their words."""

    def __init__(self, vocab: int):
        super().__init__()
        self.trunk = nn.Sequential(*(stage for sizes in pairwise((3, *CHANNELS)) for stage in _stage(*sizes)))
        self.words = nn.Linear(2 * CHANNELS[-1], vocab)

    def forward(self, image_NcHH: Tensor) -> Tensor:
        """[N, 3, 64, 64] in [-1, 1] -> logarithms of probabilities [N, V]."""
        maps = self.trunk(image_NcHH)
        pooled = torch.cat((maps.mean((2, 3)), maps.amax((2, 3))), 1)
        return self.words(F.dropout(pooled, 0.2, self.training)).log_softmax(-1)

    @torch.inference_mode()
    def similarity(
        self, pictures: Sequence[Image.Image], texts: Sequence[str], tokenizer: Tokenizer, rarity: dict[int, float]
    ) -> np.ndarray:
        """float32 [pictures, texts]: cosines of the square roots of probabilities with the texts' words, by rarity."""
        squares = [torch.from_numpy(as_array(augmented(picture, 0, square_side=SIDE))) for picture in pictures]
        roots_NV = (self(torch.stack(squares)) / 2).exp()
        texts_MV = torch.zeros(len(texts), roots_NV.shape[1])
        for row_V, text in zip(texts_MV, texts, strict=True):
            words, weights = rare_words(text, tokenizer, rarity)
            row_V[words] = torch.from_numpy(weights)
        return (roots_NV @ texts_MV.T).numpy()


def _stage(inputs: int, outputs: int) -> list[nn.Module]:
    """Half the side."""
    return [
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, groups=outputs, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
    ]  # fmt: skip


def judge_of(corpus: Corpus, cache: Path, advance: Advance = lambda done, of: None) -> Judge:
    """The judge of a corpus, from the folder `cache` or trained now and kept there. Raises OSError."""
    path = cache / f"judge-{VERSION}-{corpus.fingerprint[:16]}.safetensors"
    judge = Judge(corpus.tokenizer.vocab_size)
    try:
        judge.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError):
        judge = train_judge(corpus, advance)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, save(judge.state_dict()))
    return judge.eval().requires_grad_(False)


def train_judge(corpus: Corpus, advance: Advance = lambda done, of: None) -> Judge:
    """Minutes of one core."""
    random = np.random.default_rng(SEED)
    torch.manual_seed(SEED)
    rows = nameable_rows(corpus, "train")
    views, words_NW = _views(corpus, rows), _words(corpus, rows)
    judge = Judge(corpus.tokenizer.vocab_size).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=RATE, weight_decay=DECAY)
    steps = math.ceil(len(rows) / BATCH) * EPOCHS
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    order: list[int] = []
    for step in range(steps):
        order = order or random.permutation(len(rows)).tolist()
        chosen, order = order[:BATCH], order[BATCH:]
        picked = views[chosen, random.integers(views.shape[1], size=len(chosen))]
        loss = words_loss(judge(_moved(picked, random)), words_NW[chosen]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        advance(step + 1, steps)
    return judge


def _views(corpus: Corpus, rows: Sequence[int]) -> Tensor:
    """uint8 [pictures, views, 3, side, side]."""
    count = corpus.features.shape[1]
    views = []
    for row in rows:
        picture = corpus.picture(row)
        squares = [augmented(picture.pil(), view, picture.mirrorable, SIDE) for view in range(count)]
        views.append(np.stack([np.asarray(square).transpose(2, 0, 1) for square in squares]))
    return torch.from_numpy(np.stack(views))


def _words(corpus: Corpus, rows: Sequence[int]) -> Tensor:
    """int64 [pictures, W]."""
    words = [torch.tensor(corpus.tokenizer.words(picture_words(corpus.picture(row)))) for row in rows]
    return nn.utils.rnn.pad_sequence(words, batch_first=True, padding_value=ABSENT)


def _moved(picked: Tensor, random: np.random.Generator) -> Tensor:
    """Pixels in [-1, 1] of a batch, moved together, white where nothing was."""
    right, down = random.integers(2 * SHIFT + 1, size=2)
    padded = F.pad(picked.float() / 127.5 - 1, (SHIFT, SHIFT, SHIFT, SHIFT), value=1.0)
    return padded[..., down : down + SIDE, right : right + SIDE]
