"""A trained run at work, in plain torch without process groups.

from training import M6
m = M6.load("quickstart")
m.caption("cup.png")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from PIL import Image

from model.config import ModelConfig
from model.contrast import embed
from model.decoding import Decoding, generate
from model.m6 import M6 as Network
from model.trie import Trie
from training.data.batches import Batch, Batcher, picture_side, pixel_patches
from training.data.features import PatchFeatures, as_array, augmented
from training.data.images import read_image
from training.data.rows import clean, clean_lines
from training.data.tasks import Row
from training.data.tasks.caption import ASK_ENGLISH, ASK_NAME, ASK_TAGS
from training.data.tasks.match import NO, YES, match_question
from training.data.tokenizer import Tokenizer
from training.errors import UserError
from training.export import CONFIG, load_checkpoint, load_exported, read_description
from training.run import checkpoints_of, chosen_checkpoints

ASK = {"zh": ASK_NAME, "en": ASK_ENGLISH, "tags": ASK_TAGS}
ROWS = 32  # of a batch
CAPTION_TOKENS, ANSWER_TOKENS, CAPTION_BEAMS = 24, 24, 4

Picture = str | Path | bytes | Image.Image


@dataclass(frozen=True)
class Style:
    """How to write: drawn by lot unless `temperature` is 0."""

    temperature: float = 0.8
    top_p: float = 0.9
    repetition_penalty: float = 1.1
    tokens: int = 96  # at the most
    seed: int = 0


class M6:
    """The trained model, its tokenizer, and what describes pictures to it. `load` makes one."""

    def __init__(self, network: Network, tokenizer: Tokenizer, features: PatchFeatures | None, text_positions: int):
        """`features`: None for a model that takes pixels. `text_positions`: what rows had in training at the most."""
        self.network, self.tokenizer, self.features, self.text_positions = network, tokenizer, features, text_positions
        self.batch_of = Batcher(tokenizer, self.shape, self._look)

    @classmethod
    def load(cls, run: str | Path, step: int | None = None, data: str | Path | None = None) -> M6:
        """From a run (a name under runs/, or its folder), one of its checkpoints' folders, or an export.

        `step`: the checkpoint of this step, else the newest; `data`: the corpus' home, for its tokenizer and feature
        network, else that of the run's recipe. Raises UserError.
        """
        folder = Path(run)
        if (folder / CONFIG).is_file():
            described = read_description(folder)
            network, home, positions = load_exported(folder), folder, described.text_positions
        else:
            network, recipe = load_checkpoint(chosen_checkpoints(checkpoints_of(run), step)[-1])
            home, positions = Path(data or recipe.data) / "corpus", recipe.text_positions
        takes_features = network.config.image_input == "features"
        features = PatchFeatures(home / "feature_network.safetensors") if takes_features else None
        return cls(network, Tokenizer(home / "tokenizer.model"), features, positions)

    @property
    def shape(self) -> ModelConfig:
        return self.network.config

    @property
    def identity(self) -> str:
        """Equal for equal weights."""
        digest = xxhash.xxh3_128()
        for weight in self.network.state_dict().values():
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    # ---- pictures into words

    def caption(self, image: Picture, kind: str = "zh") -> str:
        """What a picture shows: its name in Chinese ("zh") or English ("en"), or key words ("tags")."""
        return self.captions([image], kind)[0]

    def captions(self, images: Sequence[Picture], kind: str = "zh") -> list[str]:
        """`caption` of many. Raises UserError for what is no picture, or a kind that is unknown."""
        if kind not in ASK:
            raise UserError(f"caption of kind {kind!r}: must be one of {', '.join(ASK)}")
        settings = self._settings(CAPTION_TOKENS, beams=CAPTION_BEAMS)
        return self._answers([(ASK[kind], image) for image in images], settings)

    def ask(self, question: str, image: Picture | None = None, choices: Sequence[str] = ()) -> str:
        """The answer to a question, about a picture or not; one of `choices`, if there are any."""
        trie = None
        if choices:
            encoded = [self.tokenizer.encode(clean(choice)) for choice in choices]
            if not all(encoded):
                raise UserError("a choice is empty: leave it out")
            trie = Trie(encoded, self.tokenizer.eos_id)
        tokens = max(ANSWER_TOKENS, trie.depth if trie else 0)
        beams = max(len(choices), CAPTION_BEAMS)
        return self._answers([(question, image)], self._settings(tokens, beams=beams), trie)[0]

    def match(self, image: Picture, text: str) -> float:
        """How likely the model finds it that the text belongs to the picture, from 0 to 1."""
        return self.matches([(image, text)])[0]

    def matches(self, pairs: Sequence[tuple[Picture, str]]) -> list[float]:
        """`match` of many."""
        yes, no = (self.tokenizer.encode(word)[0] for word in (YES, NO))
        found = []
        for batch in self._batches([self._question(match_question(text), image, fine=True) for image, text in pairs]):
            logits_BV, _ = self.network.prefill(batch, room=1)
            found += logits_BV[:, [no, yes]].float().softmax(-1)[:, 1].tolist()
        return found

    # ---- words

    def write(self, prompt: str, style: Style | None = None, tell: Callable[[str], object] | None = None) -> str:
        """A text for a prompt, such as 写一首诗。题目：春晓。作者：孟浩然。

        `tell` is handed each piece of it as it is written.
        """
        style = style or Style()
        settings = self._settings(
            style.tokens, temperature=style.temperature, top_p=style.top_p if style.temperature else 1.0,
            repetition_penalty=style.repetition_penalty,
        )  # fmt: skip
        said: list[int] = []
        told = ""

        def on_token(_: int, token: int) -> None:
            nonlocal told
            said.append(token)
            text = self.tokenizer.decode(said)
            if tell and not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character's bytes may still be to come
                tell(text[len(told) :])
                told = text

        generator = torch.Generator().manual_seed(style.seed)
        batch = next(self._batches([self._question(prompt, None)]))
        [[answer]] = generate(self.network, batch, settings, generator=generator, on_token=on_token)
        return self.tokenizer.decode(answer.tokens)

    # ---- search

    def embed_images(self, images: Sequence[Picture]) -> np.ndarray:
        """fp32 [n, D], of length one: products with those of `embed_texts` are cosines."""
        return self._embed([Row([], [], self._picture(image), 0) for image in images])

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """fp32 [n, D], of length one."""
        return self._embed([Row(self._prompt(text, fine=True), [], None, 0) for text in texts])

    @torch.no_grad()
    def _embed(self, rows: Sequence[Row]) -> np.ndarray:
        self.network.eval()
        found = [embed(self.network.summaries(batch)).cpu().numpy() for batch in self._batches(rows)]
        return np.concatenate(found) if found else np.zeros((0, self.shape.hidden), np.float32)

    # ---- below: rows and batches

    def _settings(self, tokens: int, **how: Any) -> Decoding:
        tokenizer = self.tokenizer
        return Decoding(tokens, range(tokenizer.eos_id, tokenizer.vocab_size), tokenizer.eos_id, **how)

    def _answers(
        self, questions: Sequence[tuple[str, Picture | None]], settings: Decoding, trie: Trie | None = None
    ) -> list[str]:
        said: list[str] = []
        for batch in self._batches([self._question(question, image) for question, image in questions]):
            found = generate(self.network, batch, settings, trie=trie)
            said += [self.tokenizer.decode(answers[0].tokens) for answers in found]
        return said

    def _question(self, text: str, image: Picture | None, fine: bool = False) -> Row:
        return Row(self._prompt(text, fine), [self.tokenizer.eos_id], None if image is None else self._picture(image))

    def _prompt(self, text: str, fine: bool = False) -> list[int]:
        cleaned = clean_lines(text.splitlines())
        if not cleaned:
            raise UserError("the text is empty: say something")
        tokens = self.tokenizer.encode_finely(cleaned) if fine else self.tokenizer.encode(cleaned)
        if len(tokens) >= self.text_positions:
            raise UserError(
                f"the text has {len(tokens)} tokens, and the model was trained on rows of {self.text_positions} with "
                "the answer: shorten it"
            )
        return tokens

    def _batches(self, rows: Sequence[Row]) -> Iterator[Batch]:
        device = self.network.vocabulary.weight.device
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS]
            batch = self.batch_of(part, max(len(row.source) + 1 for row in part))
            del batch["labels_BT"]
            yield {name: tensor.to(device) for name, tensor in batch.items()}

    def _picture(self, picture: Picture) -> Image.Image:
        if isinstance(picture, Image.Image):
            return picture
        try:
            return read_image(picture if isinstance(picture, bytes) else Path(picture).read_bytes())
        except (OSError, ValueError) as error:
            name = "the picture" if isinstance(picture, bytes) else str(picture)
            raise UserError(f"{name}: {getattr(error, 'strerror', None) or error}") from None

    def _look(self, picture: Image.Image) -> np.ndarray:
        if self.features:
            return self.features([picture])[0].numpy()
        return pixel_patches(as_array(augmented(picture, 0, square_side=picture_side(self.shape))), self.shape)
