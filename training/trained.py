"""A trained run at work, in plain torch without process groups.

from training import M6
m = M6.load("quickstart")
m.caption("cup.png")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from PIL import Image
from torch import Tensor

from model.config import ModelConfig
from model.decoding import Decoding, generate, score
from model.image_tokens import ImageTokenizer
from model.m6 import M6 as Network
from model.trie import Trie
from training.background import Background, background_of
from training.data.batches import Batch
from training.data.corpus import FEATURE_NETWORK, TOKENIZER, Corpus
from training.data.features import PatchFeatures
from training.data.rows import clean
from training.data.tasks import Row
from training.data.tasks.caption import ASK_ENGLISH, ASK_NAME, ASK_TAGS
from training.data.tasks.contrast import Contrast
from training.data.tasks.match import NO, YES, match_question
from training.data.tokenizer import Tokenizer
from training.embedding import Embeddings, standard_scores
from training.errors import UserError, told_as_mistake
from training.export import CONFIG, fits, load_checkpoint, load_exported, read_description, weights_of
from training.image_folder import load_image_tokenizer
from training.own_data import check_usable
from training.painting import Hand, Painting, Region
from training.prompts import Picture, Prompts, Whole, as_seen, cleaned_text
from training.recipe import Recipe
from training.run import BACKGROUND, checkpoints_of, chosen_checkpoints
from training.writing import Style, Writing, prompted

ASK = {"zh": ASK_NAME, "en": ASK_ENGLISH, "tags": ASK_TAGS}
CAPTION_TOKENS, ANSWER_TOKENS, CAPTION_BEAMS = 24, 24, 4


class M6:
    """The trained model, its tokenizer, and what describes pictures to it. `load` makes one."""

    def __init__(
        self,
        network: Network,
        tokenizer: Tokenizer,
        features: PatchFeatures | None,
        text_positions: int,
        step: int,
        recipe: Recipe | None = None,
        background: Callable[[], Background] | None = None,
        trained_on: str = "",
    ):
        """`features`: None for a model that takes pixels. `text_positions`: what rows had in training at the most.

        `recipe`: that of the run; an export has none. `background`: gives what finding goes by beside the weights.
        `trained_on`: the fingerprint of the corpus that it learned from.
        """
        self.network, self.tokenizer, self.features, self.text_positions = network, tokenizer, features, text_positions
        self.step, self.recipe, self._background, self._trained_on = step, recipe, background, trained_on
        self.prompts = Prompts(tokenizer, self.shape, features, text_positions)
        self.between: Callable[[], object] = lambda: None  # called between tokens: what it raises ends the work

    @classmethod
    def load(
        cls,
        run: str | Path,
        step: int | None = None,
        data: str | Path | None = None,
        max_memory: Mapping[int | str, str] | None = None,
    ) -> M6:
        """From a run (a name under runs/, or its folder), one of its checkpoints' folders, or an export.

        `step`: the checkpoint of this step, else the newest; `data`: the home of a corpus, for its tokenizer and
        feature network, which must be those of the run's own; else that of the run's recipe. Adapters are merged.
        `max_memory`: what an export may take, as for `load_exported`: the rest stays on the disk, as does what does not
        fit if it is not given. Raises UserError.
        """
        folder = Path(run)
        if (folder / CONFIG).is_file():
            return cls._of_export(folder, max_memory)
        if max_memory:
            raise UserError(f"{run}: the memory of a run cannot be bounded, only of an export: m6 export")
        place = chosen_checkpoints(checkpoints_of(run), step)[-1]
        network, recipe, manifest = load_checkpoint(place)
        try:
            corpus = Corpus.open(data or recipe.data)
        except UserError as error:
            way = "or give data of the same tokenizer and feature network by --data, or use an export, which has both"
            raise UserError(f"{error}; {way}") from None
        check_usable(corpus, place, manifest, recipe)
        features = PatchFeatures(corpus.feature_network) if recipe.model_shape().image_input == "features" else None
        background = partial(background_of, place, manifest, recipe, corpus)
        return cls(
            network, corpus.tokenizer, features, recipe.text_positions, manifest["step"], recipe, background,
            manifest["data"],
        )  # fmt: skip

    @classmethod
    def _of_export(cls, folder: Path, max_memory: Mapping[int | str, str] | None) -> M6:
        described = read_description(folder)
        tokenizer = Tokenizer(folder / TOKENIZER)
        features = PatchFeatures(folder / FEATURE_NETWORK) if described.feature_network else None
        if (tokenizer.sha256, features and features.sha256) != (described.tokenizer, described.feature_network):
            raise UserError(f"{folder}: its tokenizer or its feature network is not the one that {CONFIG} names")
        device: int | str = 0 if torch.cuda.is_available() else "cpu"
        whole = max_memory is None and fits(folder)
        network = load_exported(folder, {"": device} if whole else "auto", max_memory)
        background = partial(Background.read, folder / BACKGROUND)
        return cls(
            network, tokenizer, features, described.text_positions, described.step, background=background,
            trained_on=described.data,
        )  # fmt: skip

    @property
    def shape(self) -> ModelConfig:
        return self.network.config

    def is_own(self, corpus: Corpus) -> bool:
        """Whether the model learned from this corpus."""
        return self._trained_on == corpus.fingerprint

    @cached_property
    def background(self) -> Background:
        assert self._background
        return self._background()

    @property
    def identity(self) -> str:
        """Equal for models that see the same in a picture and a text: weights, feature network, and background."""
        digest = xxhash.xxh3_128(repr((self.features and self.features.sha256, self.background.digest)).encode())
        for weight in weights_of(self.network):
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    # ---- pictures into words

    def caption(self, image: Picture, kind: str = "zh") -> str:
        """What a picture shows: its name in Chinese ("zh") or English ("en"), or key words ("tags")."""
        return self.captions([image], kind)[0]

    def captions(self, images: Sequence[Picture], kind: str = "zh") -> list[str]:
        """`caption` of many. Raises UserError for what is no picture, or a kind that is unknown."""
        if kind not in ASK:
            raise UserError(f"caption of kind {kind!r}: must be one of {', '.join(ASK)}")
        self.needs("caption")
        settings = self._settings(CAPTION_TOKENS, beams=CAPTION_BEAMS)
        return self._answers([self.prompts.question(ASK[kind], image) for image in images], settings, heeding=True)

    def ask(self, question: str, image: Picture | None = None, choices: Sequence[str] = ()) -> str:
        """The answer to a question, about a picture or not; one of `choices`, if there are any."""
        return self.asks([(question, image)], choices)[0]

    def asks(self, questions: Sequence[tuple[str, Picture | None]], choices: Sequence[str] = ()) -> list[str]:
        """`ask` of many, with the same choices."""
        self.needs("ask")
        trie = self.among(choices) if choices else None
        tokens = max(ANSWER_TOKENS, trie.depth if trie else 0)
        settings = self._settings(tokens, beams=max(len(choices), CAPTION_BEAMS))
        rows = [self.prompts.question(question, image, fine=True) for question, image in questions]
        return self._answers(rows, settings, trie)

    def among(self, choices: Sequence[str]) -> Trie:
        """The only answers there are. Raises UserError."""
        encoded = [self.tokenizer.encode(clean(choice)) for choice in choices]
        if not all(encoded):
            raise UserError("a choice is empty: leave it out")
        return Trie(encoded, self.tokenizer.eos_id)

    def answers(self, questions: Sequence[tuple[str, Picture | None]]) -> list[str]:
        """What is asked of many, without choices, by the likeliest words: sooner said than by the beams of `asks`."""
        self.needs("ask")
        rows = [self.prompts.question(question, image, fine=True) for question, image in questions]
        return self._answers(rows, self._settings(ANSWER_TOKENS))

    def match(self, image: Picture, text: str) -> float:
        """How likely the model finds it that the text belongs to the picture, from 0 to 1."""
        return self.matches([(image, text)])[0]

    def matches(self, pairs: Sequence[tuple[Picture, str]]) -> list[float]:
        """`match` of many."""
        self.needs("match")
        yes, no = (self.tokenizer.encode(word)[0] for word in (YES, NO))
        found = []
        for batch in self.batches(
            [self.prompts.question(match_question(text), image, fine=True) for image, text in pairs]
        ):
            with told_as_mistake():
                logits_BV, _ = self.network.prefill(batch, room=0)
            found += logits_BV[:, [no, yes]].float().softmax(-1)[:, 1].tolist()
        return found

    # ---- words

    def write(
        self,
        prompt: str,
        style: Style | None = None,
        tell: Callable[[str], object] | None = None,
        examples: Sequence[tuple[str, str]] = (),
    ) -> str:
        """A text for a prompt, such as 写一首诗。题目：春晓。作者：孟浩然。

        `tell` is handed each piece of it as it is written. `examples` of (prompt, text) are read before the prompt, in
        the source (few-shot prompting). Raises UserError for what is empty or longer than the model's rows.
        """
        writing = Writing(self)
        [text] = writing.begin([prompted(self, prompt, style or Style(), examples)])
        while text.going:
            self.between()
            for _, piece in writing.go_on():
                if tell and piece:
                    tell(piece)
        return str(text)

    def writes(self, prompts: Sequence[str], styles: Sequence[Style]) -> list[str]:
        """`write` of many, side by side, each in its own style."""
        writing = Writing(self)
        texts = writing.begin([prompted(self, prompt, style) for prompt, style in zip(prompts, styles, strict=True)])
        while writing.texts:
            self.between()
            writing.go_on()
        return [str(text) for text in texts]

    def bits(self, texts: Sequence[tuple[str, str]]) -> np.ndarray:
        """float64 [n]: bits that each text, with its end, costs after its prompt ("": none).

        Longer texts than the model was trained on are read in stretches of that length, each for itself.
        """
        rows, owner = [], []
        for number, (prompt, text) in enumerate(texts):
            target = [*self.tokenizer.encode(cleaned_text(text)), self.tokenizer.eos_id]
            # As `Task.fit` has it: a prompt keeps half of the positions if need be.
            kept = max(self.text_positions - len(target), self.text_positions // 2)
            source = self.tokenizer.encode(cleaned_text(prompt))[:kept] if prompt else []
            room = self.text_positions - len(source)
            for start in range(0, len(target), room):
                rows.append(Row(source, target[start : start + room]))
                owner.append(number)
        found = [-score(self.network, batch) for batch in self.batches(rows, labels=True)]
        nats = torch.cat(found).double().cpu().numpy()
        return np.bincount(owner, nats, minlength=len(texts)) / np.log(2)

    # ---- drawing

    def draw(self, text: str, hand: Hand | None = None, reference: Picture | None = None) -> list[Image.Image]:
        """Pictures for a text, the best first. Raises UserError.

        By the first stage (task `draw`), one code after another. By the second (task `inpaint`) with `hand.steps`, with
        a `reference`, whose like is drawn, or without the first. With a `hand.size` the drafts that this gives are
        enlarged, which takes task `inpaint`.
        """
        return Painting(self).draw(text, hand or Hand(), reference)

    def edit(
        self, picture: Whole, text: str, region: Region, reference: Picture | None = None, hand: Hand | None = None
    ) -> list[Image.Image]:
        """The picture with a region redrawn, the best first. `text` says what it then shows ("": nothing is said).

        `region`: left, top, width and height in px, or a picture of the same size, white where it is to be redrawn. The
        picture is coded as a white square of `hand.size` px. The codes of all cells that the region touches are drawn
        anew, and of what they show the region's px are taken: all others stay as they are, to the bit.

        Raises UserError, also for a picture that moves or is transparent.
        """
        return Painting(self).edit(picture, text, region, hand or Hand(), reference)

    @cached_property
    def image_tokenizer(self) -> ImageTokenizer:
        """Of the run. Raises UserError if there is none."""
        if self.recipe is None or self.recipe.image_tokenizer is None:
            raise UserError("an export has no image tokenizer: draw with its run")
        return load_image_tokenizer(Path(self.recipe.image_tokenizer))

    # ---- search

    def embed_images(self, images: Sequence[Picture]) -> Embeddings:
        """What pictures are found by: `m.embed_images(images).similarity(m.embed_texts(texts))`."""
        return self._embed([Row([], [], as_seen(image), 0) for image in images], calling=True)

    def embed_texts(self, texts: Sequence[str]) -> Embeddings:
        """What texts are found by. What is longer than texts were in training is cut to that."""
        most = min(Contrast.positions, self.text_positions) - 1
        cleaned = [cleaned_text(text) for text in texts]
        found = self._embed([Row(self.tokenizer.encode_finely(text)[:most], [], None, 0) for text in cleaned])
        return found.saying(cleaned, self.tokenizer, self.background.rarity) if self.network.bags else found

    def compare(self, images: Sequence[Picture], texts: Sequence[str]) -> np.ndarray:
        """How well each text fits each picture, float32 [images, texts]; see `standard_scores`."""
        said = self.embed_texts(texts)
        return standard_scores(self.embed_images(images).similarity(said), self._usual.similarity(said))

    @cached_property
    def _usual(self) -> Embeddings:
        """Of the background's pictures."""
        return self._embed([Row([], [], patches, 0) for patches in self.background.patches_NPC], calling=True)

    @torch.no_grad()
    def _embed(self, rows: Sequence[Row], calling: bool = False) -> Embeddings:
        """`calling`: with the words that the rows' pictures call for."""
        self.needs("contrast")
        self.network.eval()
        parts = []
        for batch in self.batches(rows):
            trunk_BD, bag_BS = self.network.summaries(batch)
            part = Embeddings.of(trunk_BD, bag_BS)
            if calling and bag_BS is not None and self.network.bags:
                bags = self.network.bags
                part = part.calling(bags.called_for(bag_BS), bags.asked_for(batch["image_BPC"]))
            parts.append(part)
        return Embeddings.joined(parts)

    # ---- below: rows and batches

    def learned(self, task: str) -> bool:
        """Whether it is known to have been trained on a task, or may have been: an export does not say."""
        return self.recipe is None or task in self.recipe.learned

    def needs(self, task: str) -> None:
        if not self.learned(task):
            codes = f"m6 train … image_tokenizer=runs/NAME tasks.{task}=2"
            way = codes if task in ("draw", "inpaint") else "launch/recipes/emoji.yaml has it"
            raise UserError(f"this model was trained without task `{task}` ({way})")

    def _settings(self, tokens: int, **how: Any) -> Decoding:
        tokenizer = self.tokenizer
        with told_as_mistake():
            return Decoding(tokens, range(tokenizer.eos_id, tokenizer.vocab_size), tokenizer.eos_id, **how)

    def _answers(
        self, rows: Sequence[Row], settings: Decoding, trie: Trie | None = None, heeding: bool = False
    ) -> list[str]:
        """`heeding`: the words that the pictures call for by their bags, if there are bags, are likelier by as much."""
        said: list[str] = []
        for batch in self.batches(rows):
            with told_as_mistake():
                called_BV = self._called_for(batch, settings.vocabulary) if heeding else None
                found = generate(self.network, batch, settings, trie=trie, called_BV=called_BV, between=self.between)
            said += [self.tokenizer.decode(answers[0].tokens).strip() for answers in found]
        return said

    @torch.no_grad()
    def _called_for(self, batch: Batch, vocabulary: range) -> Tensor | None:
        bags = self.network.bags
        if bags is None:
            return None
        x_BS = bags(*(batch[name] for name in ("tokens_BT", "source_B", "image_BPC", "has_image_B")))
        return bags.gains(x_BS)[:, vocabulary.start : vocabulary.stop]

    def batches(self, rows: Sequence[Row], labels: bool = False) -> Iterator[Batch]:
        return self.prompts.batches(rows, self.network.vocabulary.weight.device, labels)
