"""What a trained run does with held-out pictures and prompts, gathered to be looked at. One seed: always the same ones.

Sizes: B pictures, P codes of each, N views of training pictures, D quantised channels at all places.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from training import quality
from training.data.corpus import Corpus
from training.data.features import as_array, as_picture, augmented
from training.data.order import random_at, shuffled
from training.data.tasks.ask import Ask
from training.data.tasks.contrast import word_rarity
from training.evaluation import Drawing, Hit, Saying, Search, picture_uri
from training.image_folder import image_codes, load_image_tokenizer
from training.judge import Judge
from training.painting import Hand
from training.quality import SEED, Pair
from training.trained import M6
from training.writing import Style

CAPTIONS, QUESTIONS, TEXTS = 24, 12, 4
ASKED = 48  # pictures, out of whose questions QUESTIONS are chosen
CHINESE, ENGLISH, HITS = 5, 3, 6  # queries, and pictures for each
DRAWINGS, OF_TRAINING = 12, 4  # drawings to show, and how many of them are of a training picture's words
JUDGED = 64  # words of held-out pictures that are drawn for the figures, the shown ones among them
TRIES = 8  # of a drawing, of which the best is shown

Counted = tuple[list[Saying], tuple[int, int]]  # chosen ones; how many of all are right, and of how many


def some(count: int, of: int, key: str) -> list[int]:
    """`count` of the numbers below `of`, or all, in an order drawn by lot."""
    return [shuffled(place, of, (SEED, key)) for place in range(min(count, of))]


def some_of_both(right: Sequence[bool], count: int, key: str) -> list[int]:
    """Half right ones and half wrong ones, drawn by lot, right ones first; fewer of a kind if there are no more."""
    order = some(len(right), len(right), key)
    good, bad = ([place for place in order if right[place] is kind] for kind in (True, False))
    first = good[: max(count // 2, count - len(bad))]
    return first + bad[: count - len(first)]


def captions(pairs: Sequence[Pair], said: Sequence[str]) -> Counted:
    """Of what a run said of all pictures."""
    right = [text == pair.name for pair, text in zip(pairs, said, strict=True)]
    sayings = [
        Saying(task="caption", reference=pairs[n].name, output=said[n], picture=picture_uri(pairs[n].image))
        for n in some_of_both(right, CAPTIONS, "caption")
    ]
    return sayings, (sum(right), len(right))


def questions(m: M6, corpus: Corpus, split: str) -> Counted:
    """As many of each kind, about held-out pictures."""
    task, rows = Ask(corpus, split), quality.picture_rows(corpus, split)
    pictures = [corpus.picture(rows[n]) for n in some(ASKED, len(rows), "ask")]
    asked = [(p, q) for place, p in enumerate(pictures) for q in task.questions(p, random_at(SEED, place))]
    said = m.answers([(question.text, picture.pil()) for picture, question in asked])
    right = [text == question.answer for text, (_, question) in zip(said, asked, strict=True)]
    kinds = list(dict.fromkeys(question.kind for _, question in asked))
    chosen = []
    for kind in kinds:
        of_kind = [place for place, (_, question) in enumerate(asked) if question.kind == kind]
        picked = some_of_both([right[place] for place in of_kind], QUESTIONS // len(kinds), kind)
        chosen += [of_kind[place] for place in picked]
    sayings = [
        Saying(task="ask", prompt=q.text, reference=q.answer, output=said[place], picture=picture_uri(p.pil()))
        for place in chosen
        for p, q in [asked[place]]
    ]
    return sayings, (sum(right), len(right))


def texts(m: M6, corpus: Corpus, split: str, kind: str) -> list[Saying]:
    """Poems or reviews to prompts of held-out ones, which leave half of a row to the text."""
    prompts = [quality.prompted(text) for text in quality.corpus_texts(corpus, split, kind)]
    prompts = [prompt for prompt in prompts if len(m.tokenizer.encode(prompt)) <= m.text_positions // 2][:TEXTS]
    written = [m.write(prompt, Style(seed=place)) for place, prompt in enumerate(prompts)]
    return [Saying(task=kind, prompt=prompt, output=text) for prompt, text in zip(prompts, written, strict=True)]


def searches(m: M6, pairs: Sequence[Pair]) -> list[Search]:
    """Among all these pictures, by the names of some of them."""
    order = some(len(pairs), len(pairs), "search")
    english = [n for n in order if pairs[n].en][:ENGLISH]
    wanted = [n for n in order if n not in english][:CHINESE]
    queries = [(n, pairs[n].name) for n in wanted] + [(n, pairs[n].en) for n in english]
    pictures = m.embed_images([pair.image for pair in pairs])
    similarity = pictures.similarity(m.embed_texts([query for _, query in queries]))
    return [_search(pairs, n, query, similarity[:, place]) for place, (n, query) in enumerate(queries)]


def _search(pairs: Sequence[Pair], wanted: int, query: str, similarity: np.ndarray) -> Search:
    """Whatever has the wanted picture's name is right."""
    order = np.argsort(-similarity, kind="stable").tolist()
    right = [pairs[n].name == pairs[wanted].name for n in order]
    hits = [
        Hit(picture=picture_uri(pairs[n].image), words=pairs[n].name, right=fits)
        for n, fits in zip(order[:HITS], right, strict=False)
    ]
    found = picture_uri(pairs[wanted].image)
    return Search(query=query, picture=found, hits=hits, rank=right.index(True) + 1, of=len(pairs))


def drawings(m: M6, corpus: Corpus, split: str, folder: Path, judge: Judge) -> tuple[dict[str, Any], quality.Report]:
    """Drawings of held-out and of some trained words, given the image tokenizer's folder: fields of `Samples`, figures.

    Beside each the training picture that is nearest. How near a copy is, and what was not copied, is told by training
    and by held-out pictures that were drawn from their own codes. Raises UserError for a tokenizer that is not whole.
    """
    nearest = Nearest(corpus, folder)
    held_out, trained = (quality.picture_rows(corpus, one) for one in (split, "train"))
    judged = [held_out[n] for n in some(JUDGED, len(held_out), "draw")]
    shown = [trained[n] for n in some(OF_TRAINING, len(trained), "draw")]
    drawn = {row: m.draw(corpus.picture(row).zh, Hand(pictures=1, tries=TRIES))[0] for row in judged + shown}
    rarity = word_rarity(corpus)
    figures = quality.measure_drawings(
        lambda pictures, texts: judge.similarity(pictures, texts, corpus.tokenizer, rarity),
        [drawn[row] for row in judged],
        nearest.drawn(judged),
        [quality.pair_of(corpus.picture(row)) for row in judged],
    )
    found = []
    for row in judged[: DRAWINGS - OF_TRAINING] + shown:
        words, picture = corpus.picture(row).zh, drawn[row]
        [(place, distance)] = nearest([picture])
        twin = corpus.picture(place)
        drawing = Drawing(
            words=words,
            trained=row in shown,
            picture=picture_uri(picture),
            nearest=picture_uri(twin.pil()),
            nearest_words=twin.zh,
            distance=distance,
        )
        found.append(drawing)
    usual = {}
    for kind, rows in (("held_out", held_out), ("copied", trained)):
        again = nearest.drawn([rows[n] for n in some(ASKED, len(rows), "distance")])
        usual[f"distance_{kind}"] = float(np.median([distance for _, distance in nearest(again)]))
    return {"drawings": found, **usual}, figures


class Nearest:
    """Finds the training picture, of all its views, that is nearest to another one in an image tokenizer's own space.

    That space has a copy far nearer than what is not copied; a frozen network's features, which tell what a picture
    shows, do not, since they see the tokenizer's blur (`docs/LOG.md`).
    """

    def __init__(self, corpus: Corpus, folder: Path):
        """`folder`: of the image tokenizer. Raises UserError if it is not whole."""
        self.painter, self.codes = load_image_tokenizer(folder), image_codes(folder, corpus)
        self.rows = corpus.picture_rows("train")
        self.vectors_ND = self._vectors(_int64(self.codes[self.rows]).flatten(0, 1))

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image]) -> list[tuple[int, float]]:
        """The row of each picture's nearest, and the distance: root mean square over the quantised channels."""
        squares = [augmented(picture, 0, square_side=self.painter.config.side) for picture in pictures]
        codes = self.painter.encode(torch.from_numpy(np.stack([as_array(square) for square in squares])))
        nearest = (torch.cdist(self._vectors(codes), self.vectors_ND) / self.vectors_ND.shape[1] ** 0.5).min(1)
        views = self.codes.shape[1]
        rows = [int(self.rows[place // views]) for place in nearest.indices.tolist()]
        return list(zip(rows, nearest.values.tolist(), strict=True))

    def drawn(self, rows: Sequence[int]) -> list[Image.Image]:
        """The corpus' pictures of these rows, drawn from their codes."""
        return [as_picture(picture) for picture in self.painter.decode(_int64(self.codes[rows, 0]))]

    def _vectors(self, codes_BP: torch.Tensor) -> torch.Tensor:
        grid = self.painter.config.grid
        return self.painter.quantise.vectors(codes_BP.view(-1, grid, grid)).flatten(1)


def _int64(codes: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(codes.astype(np.int64))
