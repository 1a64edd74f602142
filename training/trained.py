"""A trained run at work, in plain torch without process groups.

from training import M6
m = M6.load("quickstart")
m.caption("cup.png")
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
from model.mask_predict import Filled, MaskPredict, fill_grid
from model.trie import Trie
from training.background import Background, background_of
from training.canvas import Canvas, region_of
from training.data.batches import Batch, Batcher, picture_side, pixel_patches
from training.data.corpus import FEATURE_NETWORK, TOKENIZER, Corpus
from training.data.features import PatchFeatures, as_array, as_picture, augmented
from training.data.images import opaque, read_file, read_image, read_original, read_picture
from training.data.rows import clean, clean_lines
from training.data.tasks import Row
from training.data.tasks.caption import ASK_ENGLISH, ASK_NAME, ASK_TAGS
from training.data.tasks.contrast import Contrast
from training.data.tasks.draw import draw_prompt, filled_up
from training.data.tasks.match import NO, YES, match_question
from training.data.tokenizer import Tokenizer
from training.embedding import Embeddings, standard_scores
from training.errors import UserError
from training.export import CONFIG, load_checkpoint, load_exported, read_description
from training.image_folder import load_image_tokenizer
from training.own_data import check_usable
from training.recipe import Recipe
from training.run import BACKGROUND, checkpoints_of, chosen_checkpoints

ASK = {"zh": ASK_NAME, "en": ASK_ENGLISH, "tags": ASK_TAGS}
ROWS = 32  # of a batch
MOST_SIDE = 1024  # px of a drawing
CAPTION_TOKENS, ANSWER_TOKENS, CAPTION_BEAMS = 24, 24, 4

Picture = str | Path | bytes | Image.Image


@contextlib.contextmanager
def _told_as_mistake() -> Iterator[None]:
    """What decoding refuses is the user's to mend."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None


def _cells(painter: ImageTokenizer, size: int | None) -> int:
    """Codes a side of a square of `size` px; as in training if None."""
    side, cell = painter.config.side, painter.config.cell
    if size is None:
        return painter.config.grid
    if size % cell or not side <= size <= MOST_SIDE:
        raise UserError(f"size={size}: must be from {side} to {MOST_SIDE} px, in steps of {cell}")
    return size // cell


@dataclass(frozen=True)
class Style:
    """How to write: drawn by lot unless `temperature` is 0."""

    temperature: float = 0.8
    top_p: float = 0.9
    repetition_penalty: float = 1.1
    tokens: int = 96  # at the most
    seed: int = 0


@dataclass(frozen=True)
class Hand:
    """How to draw: of `tries` the best `pictures` are kept. `guidance`: what the words weigh; 1 is as in training.

    `steps`: passes of mask-predict, where that draws. `size`: px a side of the square that is coded, None: as trained.
    """

    pictures: int = 4
    tries: int = 16
    guidance: float = 3.0
    temperature: float = 1.0
    top_k: int | None = 256
    seed: int = 0
    steps: int | None = None
    size: int | None = None


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
    ):
        """`features`: None for a model that takes pixels. `text_positions`: what rows had in training at the most.

        `recipe`: that of the run; an export has none. `background`: gives what finding goes by beside the weights.
        """
        self.network, self.tokenizer, self.features, self.text_positions = network, tokenizer, features, text_positions
        self.step, self.recipe, self._background = step, recipe, background
        self.batch_of = Batcher(tokenizer, self.shape, self._look)

    @classmethod
    def load(cls, run: str | Path, step: int | None = None, data: str | Path | None = None) -> M6:
        """From a run (a name under runs/, or its folder), one of its checkpoints' folders, or an export.

        `step`: the checkpoint of this step, else the newest; `data`: the home of a corpus, for its tokenizer and
        feature network, which must be those of the run's own; else that of the run's recipe. Adapters are merged.
        Raises UserError.
        """
        folder = Path(run)
        if (folder / CONFIG).is_file():
            return cls._of_export(folder)
        place = chosen_checkpoints(checkpoints_of(run), step)[-1]
        network, recipe, manifest = load_checkpoint(place)
        corpus = Corpus.open(data or recipe.data)
        check_usable(corpus, place, manifest, recipe)
        features = PatchFeatures(corpus.feature_network) if recipe.model_shape().image_input == "features" else None
        background = partial(background_of, place, manifest, recipe, corpus)
        return cls(network, corpus.tokenizer, features, recipe.text_positions, manifest["step"], recipe, background)

    @classmethod
    def _of_export(cls, folder: Path) -> M6:
        described = read_description(folder)
        tokenizer = Tokenizer(folder / TOKENIZER)
        features = PatchFeatures(folder / FEATURE_NETWORK) if described.feature_network else None
        if (tokenizer.sha256, features and features.sha256) != (described.tokenizer, described.feature_network):
            raise UserError(f"{folder}: its tokenizer or its feature network is not the one that {CONFIG} names")
        device: int | str = 0 if torch.cuda.is_available() else "cpu"
        network = load_exported(folder, {"": device})
        background = partial(Background.read, folder / BACKGROUND)
        return cls(network, tokenizer, features, described.text_positions, described.step, background=background)

    @property
    def shape(self) -> ModelConfig:
        return self.network.config

    @cached_property
    def background(self) -> Background:
        assert self._background
        return self._background()

    @property
    def identity(self) -> str:
        """Equal for models that see the same in a picture and a text: weights, feature network, and background."""
        digest = xxhash.xxh3_128(repr((self.features and self.features.sha256, self.background.digest)).encode())
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
        self._needs("caption")
        settings = self._settings(CAPTION_TOKENS, beams=CAPTION_BEAMS)
        return self._answers([self._question(ASK[kind], image) for image in images], settings, heeding=True)

    def ask(self, question: str, image: Picture | None = None, choices: Sequence[str] = ()) -> str:
        """The answer to a question, about a picture or not; one of `choices`, if there are any."""
        self._needs("ask")
        trie = None
        if choices:
            encoded = [self.tokenizer.encode(clean(choice)) for choice in choices]
            if not all(encoded):
                raise UserError("a choice is empty: leave it out")
            trie = Trie(encoded, self.tokenizer.eos_id)
        tokens = max(ANSWER_TOKENS, trie.depth if trie else 0)
        beams = max(len(choices), CAPTION_BEAMS)
        return self._answers([self._question(question, image, fine=True)], self._settings(tokens, beams=beams), trie)[0]

    def answers(self, questions: Sequence[tuple[str, Picture | None]]) -> list[str]:
        """`ask` of many, without choices; the likeliest words."""
        self._needs("ask")
        rows = [self._question(question, image, fine=True) for question, image in questions]
        return self._answers(rows, self._settings(ANSWER_TOKENS))

    def match(self, image: Picture, text: str) -> float:
        """How likely the model finds it that the text belongs to the picture, from 0 to 1."""
        return self.matches([(image, text)])[0]

    def matches(self, pairs: Sequence[tuple[Picture, str]]) -> list[float]:
        """`match` of many."""
        self._needs("match")
        yes, no = (self.tokenizer.encode(word)[0] for word in (YES, NO))
        found = []
        for batch in self._batches([self._question(match_question(text), image, fine=True) for image, text in pairs]):
            with _told_as_mistake():
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
        style = style or Style()
        before = [self._cleaned(part) for example in examples for part in example]
        what = "the prompt with its examples" if examples else "the prompt"
        row = Row(self._prompt("\n".join([*before, self._cleaned(prompt)]), what=what), [self.tokenizer.eos_id])
        settings = self._settings(
            min(style.tokens, self.shape.max_positions - len(row.source)),
            temperature=style.temperature,
            top_p=style.top_p if style.temperature else 1.0,
            repetition_penalty=style.repetition_penalty,
        )
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
        batch = next(self._batches([row]))
        with _told_as_mistake():
            [[answer]] = generate(self.network, batch, settings, generator=generator, on_token=on_token)
        return self.tokenizer.decode(answer.tokens)

    def bits(self, texts: Sequence[tuple[str, str]]) -> np.ndarray:
        """float64 [n]: bits that each text, with its end, costs after its prompt ("": none).

        Longer texts than the model was trained on are read in stretches of that length, each for itself.
        """
        rows, owner = [], []
        for number, (prompt, text) in enumerate(texts):
            target = [*self.tokenizer.encode(self._cleaned(text)), self.tokenizer.eos_id]
            # As `Task.fit` has it: a prompt keeps half of the positions if need be.
            kept = max(self.text_positions - len(target), self.text_positions // 2)
            source = self.tokenizer.encode(self._cleaned(prompt))[:kept] if prompt else []
            room = self.text_positions - len(source)
            for start in range(0, len(target), room):
                rows.append(Row(source, target[start : start + room]))
                owner.append(number)
        found = [-score(self.network, batch) for batch in self._batches(rows, labels=True)]
        nats = torch.cat(found).double().cpu().numpy()
        return np.bincount(owner, nats, minlength=len(texts)) / np.log(2)

    # ---- drawing

    def draw(self, text: str, hand: Hand | None = None, reference: Picture | None = None) -> list[Image.Image]:
        """Pictures for a text, the best first. Raises UserError.

        By the first stage (task `draw`), one code after another. By the second (task `inpaint`) with `hand.steps`, with
        a `reference`, whose like is drawn, or without the first. With a `hand.size` the drafts that this gives are
        enlarged, which takes task `inpaint`.
        """
        hand = hand or Hand()
        if hand.size is not None:
            painter = self._painter("inpaint")
            side = _cells(painter, hand.size)
            drafts = self.draw(text, replace(hand, size=None), reference)
            as_trained = side == painter.config.grid
            return drafts if as_trained else [self._enlarged(painter, draft, side, hand) for draft in drafts]
        second = self.learned("inpaint") and not self.learned("draw")
        if hand.steps is None and reference is None and not second:
            return self._draw_in_order(text, hand)
        painter = self._painter("inpaint")
        blank_hw = torch.full((painter.config.grid, painter.config.grid), self.tokenizer.mask_id)
        return self._paint(painter, blank_hw, text, reference, hand)

    def edit(
        self,
        picture: Picture,
        text: str,
        region: tuple[int, int, int, int] | Picture,
        reference: Picture | None = None,
        hand: Hand | None = None,
    ) -> list[Image.Image]:
        """The picture with a region redrawn, the best first. `text` says what it then shows ("": nothing is said).

        `region`: left, top, width and height in px, or a picture of the same size, white where it is to be redrawn. The
        picture is coded as a white square of `hand.size` px. The codes of all cells that the region touches are drawn
        anew, and of what they show the region's px are taken: all others stay as they are, to the bit.

        Raises UserError, also for a picture that moves or is transparent.
        """
        hand = hand or Hand()
        painter = self._painter("inpaint")
        with _told_as_mistake():
            original = opaque(self._whole(picture, read_original))
        within = region_of(original.size, region if isinstance(region, tuple) else self._whole(region, read_image))
        cell = painter.config.cell
        canvas = Canvas(original, _cells(painter, hand.size) * cell, cell)
        grid_hw = self._masked(painter, canvas, torch.from_numpy(canvas.cells(within)))
        return [canvas.redrawn(square, within) for square in self._paint(painter, grid_hw, text, reference, hand)]

    def _enlarged(self, painter: ImageTokenizer, draft: Image.Image, side: int, hand: Hand) -> Image.Image:
        """A draft at side x side codes: every second code, as on a chessboard, is that of the draft, scaled up; the
        others are drawn window by window. Without words, which are of the whole and not of what a window shows.
        """
        canvas = Canvas(draft, side * painter.config.cell, painter.config.cell)
        place = torch.arange(side)
        hidden_hw = (place[:, None] + place) % 2 == 1
        return self._paint(painter, self._masked(painter, canvas, hidden_hw), "", None, replace(hand, tries=1))[0]

    def _masked(self, painter: ImageTokenizer, canvas: Canvas, hidden_hw: Tensor) -> Tensor:
        """The codes of a canvas, as entries of the vocabulary, with masks where they are to be drawn."""
        codes_hw = painter.encode(torch.from_numpy(canvas.pixels())[None]).view(hidden_hw.shape)
        return (codes_hw + self.shape.text_vocab).masked_fill(hidden_hw, self.tokenizer.mask_id)

    def _draw_in_order(self, text: str, hand: Hand) -> list[Image.Image]:
        painter = self._painter("draw")
        cells = painter.config.grid**2
        room = self.text_positions - cells
        row, twin = (
            Row(filled_up(self._drawn(words, room), room, self.tokenizer), [self.tokenizer.eos_id])
            for words in (text, "")
        )
        settings = Decoding(
            cells, self._codes(painter), None, answers=hand.tries, temperature=hand.temperature, top_k=hand.top_k,
            guidance=hand.guidance,
        )  # fmt: skip
        batch, other = next(self._batches([row])), next(self._batches([twin]))
        generator = torch.Generator().manual_seed(hand.seed)
        with _told_as_mistake():
            [answers] = generate(self.network, batch, settings, twin=other, generator=generator)
        codes_BP = torch.tensor([answer.tokens for answer in answers]) - self.shape.text_vocab
        pictures = [as_picture(pixels) for pixels in painter.decode(codes_BP)]
        likely = [math.exp(answer.score / cells) for answer in answers]
        return self._ranked(pictures, text, likely)[: hand.pictures]

    def _paint(
        self, painter: ImageTokenizer, grid_hw: Tensor, text: str, reference: Picture | None, hand: Hand
    ) -> list[Image.Image]:
        """Squares of a grid whose masks are filled, the best first."""
        filled = self._fill(painter, grid_hw, text, reference, hand)
        codes_BP, shape = filled.tokens.flatten(1) - self.shape.text_vocab, (len(grid_hw), len(grid_hw[0]))
        # One after the other, since a large one takes as much memory as all that the model does.
        squares = [as_picture(painter.decode_windowed(codes_P[None], shape)[0]) for codes_P in codes_BP]
        likely = (filled.score_B / (grid_hw == self.tokenizer.mask_id).sum()).exp().tolist()
        return self._ranked(squares, text, likely)[: hand.pictures]

    def _ranked(self, squares: Sequence[Image.Image], text: str, likely: Sequence[float]) -> list[Image.Image]:
        """The best first: by how near search finds them to the text; or else, without task `contrast`, by `likely`,
        times the probability of matching the text, if that was learned.

        `likely`: the geometric mean of each one's codes' probabilities. These stand in for M6-UFC's estimators of
        relevance and fidelity (arXiv 2105.14211), which it trains.
        """
        merits = list(likely)
        if text.strip() and self.learned("contrast"):
            merits = self.embed_images(squares).similarity(self.embed_texts([text]))[:, 0].tolist()
        elif text.strip() and self.learned("match"):
            matches = self.matches([(square, text) for square in squares])
            merits = [one * other for one, other in zip(merits, matches, strict=True)]
        order = sorted(range(len(squares)), key=lambda place: -merits[place])
        return [squares[place] for place in order]

    def _fill(
        self, painter: ImageTokenizer, grid_hw: Tensor, text: str, reference: Picture | None, hand: Hand
    ) -> Filled:
        """`hand.tries` grids without masks, guided by what is said and shown, if anything is."""
        guided = bool(text.strip() or reference is not None)
        batch, twin = (
            {name: value.repeat_interleave(hand.tries, 0) for name, value in next(self._batches([row])).items()}
            for row in (self._controlled(painter, text, reference), self._controlled(painter, "", None))
        )
        generator = torch.Generator().manual_seed(hand.seed)
        with _told_as_mistake():
            settings = MaskPredict(
                self._codes(painter), self.tokenizer.mask_id, hand.steps or MaskPredict.steps,
                temperature=hand.temperature, top_k=hand.top_k, guidance=hand.guidance if guided else 1.0,
            )  # fmt: skip
            grid_Bhw, side = grid_hw.expand(hand.tries, -1, -1), painter.config.grid
            return fill_grid(self.network, batch, grid_Bhw, side, settings, generator, twin if guided else None)

    def _controlled(self, painter: ImageTokenizer, text: str, reference: Picture | None) -> Row:
        """A row of task `inpaint` whose codes are all masked."""
        grid = [self.tokenizer.mask_id] * painter.config.grid**2
        seen = None if reference is None else self._picture(reference)
        return Row([*grid, *self._drawn(text, self.text_positions - 1 - len(grid))], [], seen)

    def _drawn(self, text: str, room: int) -> list[int]:
        """The prompt for a drawing."""
        prompt = self._prompt(draw_prompt(text), fine=True)
        if len(prompt) > room:
            raise UserError(f"the text has {len(prompt)} tokens, and beside a drawing's codes there is room for {room}")
        return prompt

    def _codes(self, painter: ImageTokenizer) -> range:
        """The vocabulary's entries of its codes."""
        return range(self.shape.text_vocab, self.shape.text_vocab + painter.config.codes)

    def _painter(self, task: str) -> ImageTokenizer:
        self._needs(task)
        if self.recipe is None or self.recipe.image_tokenizer is None:
            raise UserError("an export has no image tokenizer: draw with its run")
        return load_image_tokenizer(Path(self.recipe.image_tokenizer))

    # ---- search

    def embed_images(self, images: Sequence[Picture]) -> Embeddings:
        """What pictures are found by: `m.embed_images(images).similarity(m.embed_texts(texts))`."""
        return self._embed([Row([], [], self._picture(image), 0) for image in images], calling=True)

    def embed_texts(self, texts: Sequence[str]) -> Embeddings:
        """What texts are found by. What is longer than texts were in training is cut to that."""
        most = min(Contrast.positions, self.text_positions) - 1
        cleaned = [self._cleaned(text) for text in texts]
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
        self._needs("contrast")
        self.network.eval()
        parts = []
        for batch in self._batches(rows):
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

    def _needs(self, task: str) -> None:
        if not self.learned(task):
            codes = f"m6 train … image_tokenizer=runs/NAME tasks.{task}=2"
            way = codes if task in ("draw", "inpaint") else "launch/recipes/emoji.yaml has it"
            raise UserError(f"this model was trained without task `{task}` ({way})")

    def _settings(self, tokens: int, **how: Any) -> Decoding:
        tokenizer = self.tokenizer
        with _told_as_mistake():
            return Decoding(tokens, range(tokenizer.eos_id, tokenizer.vocab_size), tokenizer.eos_id, **how)

    def _answers(
        self, rows: Sequence[Row], settings: Decoding, trie: Trie | None = None, heeding: bool = False
    ) -> list[str]:
        """`heeding`: the words that the pictures call for by their bags, if there are bags, are likelier by as much."""
        said: list[str] = []
        for batch in self._batches(rows):
            with _told_as_mistake():
                called_BV = self._called_for(batch, settings.vocabulary) if heeding else None
                found = generate(self.network, batch, settings, trie=trie, called_BV=called_BV)
            said += [self.tokenizer.decode(answers[0].tokens).strip() for answers in found]
        return said

    @torch.no_grad()
    def _called_for(self, batch: Batch, vocabulary: range) -> Tensor | None:
        bags = self.network.bags
        if bags is None:
            return None
        x_BS = bags(*(batch[name] for name in ("tokens_BT", "source_B", "image_BPC", "has_image_B")))
        return bags.gains(x_BS)[:, vocabulary.start : vocabulary.stop]

    def _question(self, text: str, image: Picture | None, fine: bool = False) -> Row:
        return Row(self._prompt(text, fine), [self.tokenizer.eos_id], None if image is None else self._picture(image))

    def _prompt(self, text: str, fine: bool = False, what: str = "the text") -> list[int]:
        cleaned = self._cleaned(text)
        tokens = self.tokenizer.encode_finely(cleaned) if fine else self.tokenizer.encode(cleaned)
        if len(tokens) >= self.text_positions:
            raise UserError(
                f"{what} has {len(tokens)} tokens, and the model was trained on rows of {self.text_positions} with "
                "the answer: shorten it"
            )
        return tokens

    def _cleaned(self, text: str) -> str:
        cleaned = clean_lines(text.splitlines())
        if not cleaned:
            raise UserError("the text is empty: say something")
        if any("\ud800" <= character <= "\udfff" for character in cleaned):
            raise UserError("the text holds half of a character (a lone surrogate): mend its encoding")
        return cleaned

    def _batches(self, rows: Sequence[Row], labels: bool = False) -> Iterator[Batch]:
        device = self.network.vocabulary.weight.device
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS]
            batch = self.batch_of(part, max(len(row.source) + max(len(row.target), 1) for row in part))
            if not labels:
                del batch["labels_BT"]
            yield {name: tensor.to(device) for name, tensor in batch.items()}

    def _picture(self, picture: Picture) -> Image.Image:
        return read_picture(Path(picture)) if isinstance(picture, str | Path) else self._whole(picture, read_image)

    def _whole(self, picture: Picture, read: Callable[[bytes], Image.Image]) -> Image.Image:
        """In its own size."""
        if isinstance(picture, Image.Image):
            return picture
        if not isinstance(picture, bytes):
            return read_file(Path(picture), read)
        try:
            return read(picture)
        except ValueError as error:
            raise UserError(f"the picture: {error}") from None

    def _look(self, picture: Image.Image | np.ndarray) -> np.ndarray:
        """Patches of a picture, or these themselves."""
        if isinstance(picture, np.ndarray):
            return picture
        if self.features:
            return self.features([picture])[0].numpy()
        return pixel_patches(as_array(augmented(picture, 0, square_side=picture_side(self.shape))), self.shape)
