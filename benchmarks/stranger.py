"""Pictures of the corpus as a stranger's folder, to be imported again: what a run makes of data it never saw.

    python -m benchmarks.stranger --to /tmp/shop [--data data] [--split validation --split test] [--pictures 300]
    m6 data import /tmp/shop/rows.jsonl --to /tmp/imported --split-by family

A row has image (path), zh, en, tags, group, subgroup, style, family, source, licence and mirrorable. With --form it is
written as CSV, Parquet, a WebDataset tar, or a folder with metadata or with captions alone. Flags, whose names nothing
in the picture says, are left out. With --pictures, whole families are drawn by lot. Whoever measures forgetting on the
test split takes the validation split alone.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import datasets

from training.data.corpus import Corpus
from training.data.order import shuffled
from training.data.rows import Picture
from training.errors import UserError
from training.rivals.ridge import nameable_rows

COLUMNS = ("zh", "en", "tags", "group", "subgroup", "style", "family", "source", "licence", "mirrorable")
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, required=True, help="a new folder")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--split", action="append", choices=("train", "validation", "test"))
    parser.add_argument("--pictures", type=int, help="about as many; all if not given")
    parser.add_argument("--form", default="lines", choices=FORMS)
    arguments = parser.parse_args()
    try:
        corpus = Corpus.open(arguments.data)
    except UserError as error:
        sys.exit(str(error))
    arguments.to.mkdir(parents=True)
    pictures = chosen(corpus, arguments.split or ["validation", "test"], arguments.pictures)
    FORMS[arguments.form](pictures, arguments.to)
    print(f"{len(pictures)} pictures of {len({picture.family for picture in pictures})} families: {arguments.to}")


def chosen(corpus: Corpus, splits: list[str], count: int | None) -> list[Picture]:
    """The pictures of whole families of these splits, at least `count` of them, if there are as many."""
    families: dict[str, list[Picture]] = {}
    for row in (row for split in splits for row in nameable_rows(corpus, split)):
        picture = corpus.picture(row)
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


def write_files(pictures: list[Picture], folder: Path) -> list[dict[str, Any]]:
    """pictures/00000.png and so on; rows that name them."""
    (folder / "pictures").mkdir()
    rows = []
    for number, picture in enumerate(pictures):
        name = f"pictures/{number:05}.png"
        (folder / name).write_bytes(picture.image)
        rows.append({"image": name, **row_of(picture)})
    return rows


def write_lines(pictures: list[Picture], folder: Path) -> None:
    (folder / "rows.jsonl").write_text(_lines(write_files(pictures, folder)), encoding="utf-8")


def write_csv(pictures: list[Picture], folder: Path) -> None:
    rows = [{**row, "tags": "、".join(row["tags"])} for row in write_files(pictures, folder)]
    with (folder / "rows.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_metadata(pictures: list[Picture], folder: Path) -> None:
    rows = [{"file_name": row.pop("image"), **row} for row in write_files(pictures, folder)]
    (folder / "metadata.jsonl").write_text(_lines(rows), encoding="utf-8")


def write_captions(pictures: list[Picture], folder: Path) -> None:
    for row in write_files(pictures, folder):
        (folder / row["image"]).with_suffix(".txt").write_text(row["zh"], encoding="utf-8")


def write_tar(pictures: list[Picture], folder: Path) -> None:
    with tarfile.open(folder / "shard-00000.tar", "w") as tar:
        for number, picture in enumerate(pictures):
            about = json.dumps(row_of(picture), ensure_ascii=False).encode()
            for ending, content in (("png", picture.image), ("json", about)):
                member = tarfile.TarInfo(f"{number:05}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_parquet(pictures: list[Picture], folder: Path) -> None:
    rows = [{"image": {"bytes": picture.image, "path": None}, **row_of(picture)} for picture in pictures]
    features = datasets.Features({**datasets.Dataset.from_list(rows).features, "image": datasets.Image()})
    datasets.Dataset.from_list(rows, features).to_parquet(folder / "rows.parquet")


FORMS = {
    "lines": write_lines,
    "csv": write_csv,
    "metadata": write_metadata,
    "captions": write_captions,
    "tar": write_tar,
    "parquet": write_parquet,
}


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    main()
