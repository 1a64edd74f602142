"""What a trained run does with held-out pictures and prompts, gathered to be looked at. One seed: always the same ones.

Sizes: N training pictures, D features.
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
from training.evaluation import Drawing, Hit, Saying, Search, picture_uri
from training.image_folder import load_image_tokenizer
from training.quality import SEED, Pair
from training.rivals.ridge import PooledFeatures
from training.trained import M6, Hand, Style

CAPTIONS, QUESTIONS, TEXTS = 24, 12, 4
ASKED = 48  # pictures, out of whose questions QUESTIONS are chosen
CHINESE, ENGLISH, HITS = 5, 3, 6  # queries, and pictures for each
DRAWINGS, OF_TRAINING = 12, 4  # words to draw, and how many of them are a training picture's
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
    """Poems or reviews to prompts of held-out ones."""
    prompts = [quality.prompted(text) for text in quality.corpus_texts(corpus, split, kind)[:TEXTS]]
    written = [m.write(prompt, Style(seed=place)) for place, prompt in enumerate(prompts)]
    return [Saying(task=kind, prompt=prompt, output=text) for prompt, text in zip(prompts, written, strict=True)]


def searches(m: M6, pairs: Sequence[Pair]) -> list[Search]:
    """Among all these pictures, by the names of some of them."""
    order = some(len(pairs), len(pairs), "search")
    english = [n for n in order if pairs[n].en][:ENGLISH]
    wanted = [n for n in order if n not in english][:CHINESE]
    queries = [(n, pairs[n].name) for n in wanted] + [(n, pairs[n].en) for n in english]
    similarity = m.embed_images([pair.image for pair in pairs]) @ m.embed_texts([query for _, query in queries]).T
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


def drawings(m: M6, corpus: Corpus, split: str, features: np.ndarray) -> dict[str, Any]:
    """Drawings of held-out and of some trained words, given the corpus' `pooled_features`: fields of `Samples`.

    Likeness is the cosine of what the corpus' frozen network sees, each feature standardised. What it is without
    copying, and of a copy, is told by held-out and by training pictures that passed through the same image tokenizer.
    """
    nearest = Nearest(corpus, features)
    held_out, trained = (quality.picture_rows(corpus, one) for one in (split, "train"))
    chosen = [(held_out[n], False) for n in some(DRAWINGS - OF_TRAINING, len(held_out), "draw")]
    chosen += [(trained[n], True) for n in some(OF_TRAINING, len(trained), "draw")]
    found = []
    for row, is_trained in chosen:
        words = corpus.picture(row).zh
        [picture] = m.draw(words, Hand(pictures=1, tries=TRIES))
        [(place, likeness)] = nearest([picture])
        twin = corpus.picture(place)
        drawing = Drawing(
            words=words,
            trained=is_trained,
            picture=picture_uri(picture),
            nearest=picture_uri(twin.pil()),
            nearest_words=twin.zh,
            likeness=likeness,
        )
        found.append(drawing)
    scale = {}
    for kind, rows in (("held_out", held_out), ("trained", trained)):
        pictures = [corpus.picture(rows[n]).pil() for n in some(ASKED, len(rows), "likeness")]
        scale[f"likeness_{kind}"] = float(np.median([likeness for _, likeness in nearest(given_back(m, pictures))]))
    return {"drawings": found, **scale}


@torch.inference_mode()
def given_back(m: M6, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Pictures as codes and back, by the run's image tokenizer."""
    assert m.recipe and m.recipe.image_tokenizer
    painter = load_image_tokenizer(Path(m.recipe.image_tokenizer))
    squares = [augmented(picture, 0, square_side=painter.config.side) for picture in pictures]
    pixels = torch.from_numpy(np.stack([as_array(square) for square in squares]))
    return [as_picture(picture) for picture in painter.decode(painter.encode(pixels))]


class Nearest:
    """Finds the training picture that is most like another."""

    def __init__(self, corpus: Corpus, features: np.ndarray):
        """`features`: the corpus' `pooled_features`."""
        self.see = PooledFeatures(corpus.feature_network)
        self.rows = corpus.picture_rows("train")
        self.mean_D, self.deviation_D = features[self.rows].mean(0), features[self.rows].std(0) + 1e-6
        self.vectors_ND = self._unit(features[self.rows])

    def __call__(self, pictures: Sequence[Image.Image]) -> list[tuple[int, float]]:
        """The row of each picture's nearest, and the cosine with it."""
        cosines_XN = self._unit(self.see(pictures)) @ self.vectors_ND.T
        return [(int(self.rows[cosines_N.argmax()]), float(cosines_N.max())) for cosines_N in cosines_XN]

    def _unit(self, features_XD: np.ndarray) -> np.ndarray:
        standard_XD = (features_XD - self.mean_D) / self.deviation_D
        return standard_XD / np.maximum(np.linalg.norm(standard_XD, axis=1, keepdims=True), 1e-9)
