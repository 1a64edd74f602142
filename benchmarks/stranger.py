"""Pictures of the corpus as a stranger's folder, to be imported again: what a run makes of data it never saw.

    python -m benchmarks.stranger --to /tmp/shop [--data data] [--split validation --split test] [--pictures 300]
    m6 data import /tmp/shop/rows.jsonl --to /tmp/imported --split-by family

Each picture is a file; its row has image (path), zh, en, tags, group, subgroup, style, family, source, licence and
mirrorable. Flags, whose names nothing in the picture says, are left out. With --pictures, whole families are drawn by
lot. Whoever measures forgetting on the test split takes the validation split alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from training.data.corpus import Corpus
from training.data.order import shuffled
from training.data.rows import Picture
from training.errors import UserError
from training.rivals.ridge import FLAGS

COLUMNS = ("zh", "en", "tags", "group", "subgroup", "style", "family", "source", "licence", "mirrorable")
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, required=True, help="a new folder")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--split", action="append", choices=("train", "validation", "test"))
    parser.add_argument("--pictures", type=int, help="about as many; all if not given")
    arguments = parser.parse_args()
    try:
        corpus = Corpus.open(arguments.data)
    except UserError as error:
        sys.exit(str(error))
    arguments.to.mkdir(parents=True)
    pictures = chosen(corpus, arguments.split or ["validation", "test"], arguments.pictures)
    write_lines(pictures, arguments.to)
    print(f"{len(pictures)} pictures of {len({picture.family for picture in pictures})} families: {arguments.to}")


def chosen(corpus: Corpus, splits: list[str], count: int | None) -> list[Picture]:
    """The pictures of whole families of these splits, at least `count` of them, if there are as many."""
    families: dict[str, list[Picture]] = {}
    for row in (int(row) for split in splits for row in corpus.picture_rows(split)):
        picture = corpus.picture(row)
        if picture.group != FLAGS:
            families.setdefault(picture.family, []).append(picture)
    names, pictures = sorted(families), list[Picture]()
    for place in range(len(names)):
        if count is not None and len(pictures) >= count:
            break
        pictures += families[names[shuffled(place, len(names), (SEED, "stranger"))]]
    return pictures


def row_of(picture: Picture) -> dict[str, Any]:
    """All but the picture itself."""
    return {name: getattr(picture, name) for name in COLUMNS}


def write_lines(pictures: list[Picture], folder: Path) -> None:
    """pictures/00000.png and so on, and rows.jsonl."""
    (folder / "pictures").mkdir()
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number, picture in enumerate(pictures):
            name = f"pictures/{number:05}.png"
            (folder / name).write_bytes(picture.image)
            file.write(json.dumps({"image": name, **row_of(picture)}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
