"""Image-text matching: does a text belong to the picture? (OFA, arXiv 2202.03052, asks it so.)"""

from __future__ import annotations

import numpy as np

from training.data.rows import Picture
from training.data.tasks.base import Random, Row, Task

YES, NO = "是", "否"


class Match(Task):
    """Half of the pictures stand beside another one's words, of the same subgroup where there is one."""

    name = "match"
    positions = 48

    def items(self) -> np.ndarray:
        rows = self.corpus.picture_rows(self.split)
        self.alike: dict[str, list[int]] = {}
        for row in rows.tolist():
            self.alike.setdefault(self.corpus.picture(row).subgroup, []).append(row)
        return rows

    def row(self, item: int, limit: int, random: Random) -> Row:
        picture = self.corpus.picture(item)
        other = self.another(picture, random) if random.random() < 0.5 else None
        question = self.tokenizer.encode_finely(match_question((other or picture).zh))
        return self.fit(question, self.tokenizer.encode(NO if other else YES), limit, self.view(item, random))

    def another(self, picture: Picture, random: Random) -> Picture | None:
        """A picture of another name, if a few draws find one: of the same subgroup first, then of any."""
        for pool in (self.alike[picture.subgroup], self.pool):
            for _ in range(3):
                other = self.corpus.picture(int(pool[random.integers(len(pool))]))
                if other.zh != picture.zh:
                    return other
        return None


def match_question(words: str) -> str:
    return f"图片描述的是“{words}”吗?"
