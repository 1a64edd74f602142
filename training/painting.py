"""How a trained model draws and edits: by its first stage, one code after another, or by its second, mask-predict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from model.decoding import Decoding, generate
from model.image_tokens import ImageTokenizer
from model.mask_predict import Filled, MaskPredict, fill_grid
from training.canvas import Canvas, region_of
from training.data.features import as_picture
from training.data.images import opaque, read_image, read_original
from training.data.tasks import Row
from training.data.tasks.draw import draw_prompt, filled_up
from training.errors import UserError, told_as_mistake
from training.prompts import Picture, Whole, as_seen, whole

if TYPE_CHECKING:
    from training.trained import M6

MOST_SIDE = 1024  # px of a drawing
Region = tuple[int, int, int, int] | Whole  # left, top, width and height in px, or a mask


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


class Painting:
    """A model with an image tokenizer at work."""

    def __init__(self, m: M6):
        self.m = m

    def draw(self, text: str, hand: Hand, reference: Picture | None) -> list[Image.Image]:
        """See `M6.draw`."""
        if hand.size is not None:
            painter = self._painter("inpaint")
            side = _cells(painter, hand.size)
            drafts = self.draw(text, replace(hand, size=None), reference)
            as_trained = side == painter.config.grid
            return drafts if as_trained else [self._enlarged(painter, draft, side, hand) for draft in drafts]
        second = self.m.learned("inpaint") and not self.m.learned("draw")
        if hand.steps is None and reference is None and not second:
            return self._draw_in_order(text, hand)
        painter = self._painter("inpaint")
        blank_hw = torch.full((painter.config.grid, painter.config.grid), self.m.tokenizer.mask_id)
        return self._paint(painter, blank_hw, text, reference, hand)

    def edit(
        self, picture: Whole, text: str, region: Region, hand: Hand, reference: Picture | None
    ) -> list[Image.Image]:
        """See `M6.edit`."""
        painter = self._painter("inpaint")
        with told_as_mistake():
            original = opaque(whole(picture, read_original))
        within = region_of(original.size, region if isinstance(region, tuple) else whole(region, read_image))
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
        return (codes_hw + self.m.shape.text_vocab).masked_fill(hidden_hw, self.m.tokenizer.mask_id)

    def _draw_in_order(self, text: str, hand: Hand) -> list[Image.Image]:
        painter = self._painter("draw")
        cells = painter.config.grid**2
        room = self.m.text_positions - cells
        row, twin = (
            Row(filled_up(self._drawn(words, room), room, self.m.tokenizer), [self.m.tokenizer.eos_id])
            for words in (text, "")
        )
        settings = Decoding(
            cells, self._codes(painter), None, answers=hand.tries, temperature=hand.temperature, top_k=hand.top_k,
            guidance=hand.guidance,
        )  # fmt: skip
        batch, other = next(self.m.batches([row])), next(self.m.batches([twin]))
        generator = torch.Generator().manual_seed(hand.seed)
        with told_as_mistake():
            [answers] = generate(
                self.m.network, batch, settings, twin=other, generator=generator, between=self.m.between
            )
        codes_BP = torch.tensor([answer.tokens for answer in answers]) - self.m.shape.text_vocab
        pictures = [as_picture(pixels) for pixels in painter.decode(codes_BP)]
        likely = [math.exp(answer.score / cells) for answer in answers]
        return self._ranked(pictures, text, likely)[: hand.pictures]

    def _paint(
        self, painter: ImageTokenizer, grid_hw: Tensor, text: str, reference: Picture | None, hand: Hand
    ) -> list[Image.Image]:
        """Squares of a grid whose masks are filled, the best first."""
        filled = self._fill(painter, grid_hw, text, reference, hand)
        codes_BP, shape = filled.tokens.flatten(1) - self.m.shape.text_vocab, (len(grid_hw), len(grid_hw[0]))
        # One after the other, since a large one takes as much memory as all that the model does.
        squares = [as_picture(painter.decode_windowed(codes_P[None], shape)[0]) for codes_P in codes_BP]
        likely = (filled.score_B / (grid_hw == self.m.tokenizer.mask_id).sum()).exp().tolist()
        return self._ranked(squares, text, likely)[: hand.pictures]

    def _ranked(self, squares: Sequence[Image.Image], text: str, likely: Sequence[float]) -> list[Image.Image]:
        """The best first: by how near search finds them to the text; or else, without task `contrast`, by `likely`,
        times the probability of matching the text, if that was learned.

        `likely`: the geometric mean of each one's codes' probabilities. These stand in for M6-UFC's estimators of
        relevance and fidelity (arXiv 2105.14211), which it trains.
        """
        merits = list(likely)
        if text.strip() and self.m.learned("contrast"):
            merits = self.m.embed_images(squares).similarity(self.m.embed_texts([text]))[:, 0].tolist()
        elif text.strip() and self.m.learned("match"):
            matches = self.m.matches([(square, text) for square in squares])
            merits = [one * other for one, other in zip(merits, matches, strict=True)]
        order = sorted(range(len(squares)), key=lambda place: -merits[place])
        return [squares[place] for place in order]

    def _fill(
        self, painter: ImageTokenizer, grid_hw: Tensor, text: str, reference: Picture | None, hand: Hand
    ) -> Filled:
        """`hand.tries` grids without masks, guided by what is said and shown, if anything is."""
        guided = bool(text.strip() or reference is not None)
        batch, twin = (
            {name: value.repeat_interleave(hand.tries, 0) for name, value in next(self.m.batches([row])).items()}
            for row in (self._controlled(painter, text, reference), self._controlled(painter, "", None))
        )
        generator = torch.Generator().manual_seed(hand.seed)
        with told_as_mistake():
            settings = MaskPredict(
                self._codes(painter), self.m.tokenizer.mask_id, hand.steps or MaskPredict.steps,
                temperature=hand.temperature, top_k=hand.top_k, guidance=hand.guidance if guided else 1.0,
            )  # fmt: skip
            grid_Bhw, side = grid_hw.expand(hand.tries, -1, -1), painter.config.grid
            unguided = twin if guided else None
            return fill_grid(self.m.network, batch, grid_Bhw, side, settings, generator, unguided, self.m.between)

    def _controlled(self, painter: ImageTokenizer, text: str, reference: Picture | None) -> Row:
        """A row of task `inpaint` whose codes are all masked."""
        grid = [self.m.tokenizer.mask_id] * painter.config.grid**2
        seen = None if reference is None else as_seen(reference)
        return Row([*grid, *self._drawn(text, self.m.text_positions - 1 - len(grid))], [], seen)

    def _drawn(self, text: str, room: int) -> list[int]:
        """The prompt for a drawing."""
        prompt = self.m.prompts.tokens(draw_prompt(text), fine=True)
        if len(prompt) > room:
            raise UserError(f"the text has {len(prompt)} tokens, and beside a drawing's codes there is room for {room}")
        return prompt

    def _codes(self, painter: ImageTokenizer) -> range:
        """The vocabulary's entries of its codes."""
        return range(self.m.shape.text_vocab, self.m.shape.text_vocab + painter.config.codes)

    def _painter(self, task: str) -> ImageTokenizer:
        self.m.needs(task)
        return self.m.image_tokenizer


def _cells(painter: ImageTokenizer, size: int | None) -> int:
    """Codes a side of a square of `size` px; as in training if None."""
    side, cell = painter.config.side, painter.config.cell
    if size is None:
        return painter.config.grid
    if size % cell or not side <= size <= MOST_SIDE:
        raise UserError(f"size={size}: must be from {side} to {MOST_SIDE} px, in steps of {cell}")
    return size // cell
