"""Questions: about a picture (what is it, of which kind, is there an X), and plain ones about what it shows.

M6 (arXiv 2103.00823) answers questions about pictures and without; these are out of the pictures' own words.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from training.data.rows import Picture
from training.data.tasks.base import Random, Row, Task

YES, NO = "有", "没有"
WHAT, KIND = "这是什么?", "属于哪一类?"
PLAIN = 0.3  # how often a question is asked without the picture


class Question(NamedTuple):
    kind: str  # what, kind, whether; of plain ones: kind, english, chinese
    text: str
    answer: str


class Ask(Task):
    name = "ask"
    positions = 48

    def items(self) -> np.ndarray:
        return self.corpus.picture_rows(self.split)

    def row(self, item: int, limit: int, random: Random) -> Row:
        picture = self.corpus.picture(item)
        plain = plain_questions(picture) if random.random() < PLAIN else []
        asked = plain or self.questions(picture, random)
        chosen = asked[random.integers(len(asked))]
        view = None if plain else self.view(item, random)
        return self.fit(self.tokenizer.encode_finely(chosen.text), self.tokenizer.encode(chosen.answer), limit, view)

    def questions(self, picture: Picture, random: Random) -> list[Question]:
        """Those that can be asked about a picture; whether there is an X: as often as not there is none."""
        found = [Question("what", WHAT, picture.zh)]
        if picture.group:
            found.append(Question("kind", KIND, picture.group))
        if picture.tags:
            own = picture.tags[random.integers(len(picture.tags))]
            other = self._strange_tag(picture, random) if random.random() < 0.5 else None
            found.append(Question("whether", f"图里有没有{other or own}?", NO if other else YES))
        return found

    def _strange_tag(self, picture: Picture, random: Random) -> str | None:
        """A key word of another picture that this one does not have, if a few draws find one."""
        for _ in range(5):
            other = self.corpus.picture(int(self.pool[random.integers(len(self.pool))]))
            strange = [tag for tag in other.tags if tag not in picture.tags and tag not in picture.zh]
            if strange:
                return strange[random.integers(len(strange))]
        return None


def plain_questions(picture: Picture) -> list[Question]:
    """Those that can be asked of a picture's name alone."""
    found = []
    if picture.group:
        found.append(Question("kind", f"“{picture.zh}”{KIND}", picture.group))
    if picture.en:
        found.append(Question("english", f"“{picture.zh}”的英文是什么?", picture.en))
        found.append(Question("chinese", f"“{picture.en}”的中文是什么?", picture.zh))
    return found
