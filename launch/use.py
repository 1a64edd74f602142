"""The verbs that put a trained run to work: caption, ask, write, draw, edit, search."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training.data.images import read_picture
from training.errors import UserError
from training.painting import Hand
from training.run import CHECKPOINTS, FOLDER
from training.search import Index, contact_sheet
from training.trained import M6
from training.writing import Style

DRAWN = 256  # px a side of a drawing's file at the least


def load(run: str | None, data: Path | None = None) -> M6:
    """The model of a run, or, None given, of the run that saved last, which is then named. Raises UserError."""
    return M6.load(chosen(run), data=data)


def chosen(run: str | None) -> str:
    """The run that is meant: if none is named, that which saved last, which is then told. Raises UserError."""
    if run is None:
        run = _newest()
        print(f"using run {run}", file=sys.stderr, flush=True)
    return run


def _newest() -> str:
    saved = [(path.stat().st_mtime, path.parent.parent.name) for path in FOLDER.glob(f"*/{CHECKPOINTS}/latest")]
    if not saved:
        raise UserError(f"no run under {FOLDER}/ has a checkpoint: train one (m6 train …), or name one by --run")
    return max(saved)[1]


def caption(run: str | None, data: Path | None, images: Sequence[Path], kind: str, as_json: bool) -> None:
    """Print what each picture shows."""
    run = chosen(run)
    pictures = [read_picture(image) for image in images]  # before a model is loaded for nothing
    said = load(run, data).captions(pictures, kind)
    if as_json:
        rows = [{"image": str(image), "caption": text} for image, text in zip(images, said, strict=True)]
        print(json.dumps(rows, ensure_ascii=False, indent=1))
        return
    for image, text in zip(images, said, strict=True):
        print(text if len(images) == 1 else f"{image}\t{text}")


def ask(run: str | None, data: Path | None, image: Path | None, question: str, choices: Sequence[str]) -> None:
    """Print the answer to a question."""
    print(load(run, data).ask(question, image, choices))


def write(run: str | None, data: Path | None, prompt: str, examples: Sequence[tuple[str, str]], style: Style) -> None:
    """Print a text as it is written."""
    load(run, data).write(prompt, style, lambda text: print(text, end="", flush=True), examples)
    print()


def draw(run: str | None, data: Path | None, text: str, reference: Path | None, hand: Hand, target: Path) -> None:
    """Draw pictures for a text, write them as one file or as NAME-1, NAME-2 …, best first, and name them."""
    pictures = load(run, data).draw(text, hand, reference)
    _write([_at_least(DRAWN, picture) for picture in pictures], target)


def edit(
    run: str | None,
    data: Path | None,
    image: Path,
    text: str,
    region: tuple[int, int, int, int] | Path,
    reference: Path | None,
    hand: Hand,
    target: Path,
) -> None:
    """Redraw a region of a picture, write what came of it as `draw` does, in the picture's own size."""
    _write(load(run, data).edit(image, text, region, reference, hand), target)


def _at_least(side: int, square: Image.Image) -> Image.Image:
    return square if square.width >= side else square.resize((side, side), Image.Resampling.BICUBIC)


def _write(pictures: Sequence[Image.Image], target: Path) -> None:
    for place, picture in enumerate(pictures, 1):
        path = target if len(pictures) == 1 else target.with_stem(f"{target.stem}-{place}")
        try:
            picture.save(path)
        except (OSError, ValueError) as error:
            raise UserError(f"--to {path}: cannot be written ({error})") from None
        print(path)


def _keep(index: Index, place: Path) -> None:
    try:
        index.save(place)
    except OSError as error:
        print(f"m6: the index is not kept: {place}: {error.strerror}", file=sys.stderr)


def search(
    run: str | None, data: Path | None, query: str, folder: Path, most: int, sheet: Path | None, as_json: bool
) -> None:
    """Print the pictures of a folder that fit a query best, and draw them on a contact sheet."""
    m = load(run, data)
    m.embed_texts([query])  # a bad query is told before a folder is read
    place = FOLDER / ".indexes" / hashlib.sha256(f"{folder.resolve()} {m.identity}".encode()).hexdigest()[:16]
    index = Index.open(place, folder, m.identity)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("reading pictures", total=None)
        changed = index.update(
            m, lambda done, of: bars.update(bar, completed=done, total=of), lambda: _keep(index, place)
        )
    if changed:
        _keep(index, place)
    for problem in index.skipped:
        print(f"m6: passed over {problem}", file=sys.stderr)
    hits = index.search(m, query, most)
    if sheet:
        picture = contact_sheet(hits)
        try:
            picture.save(sheet)
        except (OSError, ValueError) as error:
            raise UserError(f"--sheet {sheet}: cannot be written ({error})") from None
    if as_json:
        rows = [{"image": str(hit.path), "score": round(hit.score, 4), "details": hit.details} for hit in hits]
        print(json.dumps(rows, ensure_ascii=False, indent=1))
        return
    for hit in hits:
        print(f"{hit.score:.3f}  {hit.path}  {hit.details}")
