"""What `m6 eval` leaves in a run's folder: figures, samples to look at, and a page of both.

It imports no torch: a report lays out what was gathered here without the model.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from training.errors import UserError
from training.files import replace
from training.pages import render

# On the data that the run was trained with, on other data, on a person's own files.
FOLDER, OF_OTHER, OF_FILES = "evaluation", "evaluation-of-other-data", "evaluation-of-files"
FIGURES, SAMPLES, PAGE = "figures.json", "samples.json", "index.html"
SIDE = 128  # px of a sample's picture at the most

Figures = dict[str, Any]
Picture = Annotated[str, Field(pattern=r"^(data:image/png;base64,[A-Za-z0-9+/]+=*)?$")]  # "": none


class Part(BaseModel):
    """What is read from the disk may be anything."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Saying(Part):
    """Words that the model gave: `reference` is empty where no answer is the right one."""

    task: str
    prompt: str = ""
    reference: str = ""
    output: str
    picture: Picture = ""

    @property
    def right(self) -> bool:
        return bool(self.reference) and self.output == self.reference


class Hit(Part):
    picture: Picture
    words: str
    right: bool


class Search(Part):
    """The first pictures for a query; `picture`, the right one, has `rank` (from 1) `of` so many."""

    query: str
    picture: Picture
    hits: list[Hit]
    rank: int
    of: int


class Drawing(Part):
    """A drawing and the training picture that is nearest; `trained`: the words are a training picture's."""

    words: str
    trained: bool
    picture: Picture
    nearest: Picture
    nearest_words: str
    distance: float


class Samples(Part):
    """`counts`: of each task's sayings, how many were right, of how many, before some were chosen to be shown.

    `distance_…`: to the nearest training picture, by the median, of held-out pictures and of copies.
    """

    sayings: list[Saying] = []
    counts: dict[str, tuple[int, int]] = {}
    searches: list[Search] = []
    drawings: list[Drawing] = []
    distance_held_out: float | None = None
    distance_copied: float | None = None


def picture_uri(image: Image.Image) -> Picture:
    """A picture for a page, at most SIDE px a side."""
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def write_evaluation(folder: Path, name: str, figures: Figures, samples: Samples) -> Path:
    """Write both files and their page, and return the page's path. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / SAMPLES, samples.model_dump_json())
    replace(folder / FIGURES, json.dumps(figures, ensure_ascii=False, indent=1))
    path = folder / PAGE
    replace(path, render("evaluation.html.jinja", name=name, evaluation=Evaluation.of(figures, samples)))
    return path


def read_evaluation(run: Path) -> Evaluation | None:
    """The evaluation in a run's folder, on the corpus; None if there is none. Raises UserError if it is damaged."""
    folder = run / FOLDER
    if not (folder / FIGURES).is_file():
        return None
    try:
        figures = json.loads((folder / FIGURES).read_text(encoding="utf-8"))
        return Evaluation.of(figures, Samples.model_validate_json((folder / SAMPLES).read_bytes()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{folder}: not an evaluation that this program wrote; run `m6 eval` again") from None


class Cell(NamedTuple):
    value: str
    interval: str = ""


class Table(NamedTuple):
    title: str
    note: str
    head: list[str]
    rows: list[list[Cell]]


class Evaluation(NamedTuple):
    """What a page shows."""

    heading: str
    tables: list[Table]
    samples: Samples

    @classmethod
    def of(cls, figures: Figures, samples: Samples) -> Evaluation:
        on = f"the {figures['split']} split, which it never trained on" if "split" in figures else "files of one's own"
        return cls(f"Step {figures['step']:,}, on {on}", tables(figures), samples)

    def sayings(self, task: str) -> list[Saying]:
        return [saying for saying in self.samples.sayings if saying.task == task]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(saying.task for saying in self.samples.sayings))


def tables(figures: Figures) -> list[Table]:
    """What was measured, each figure beside its trivial rivals, with 95 % intervals."""
    found = [
        *_before_after(figures.get("before_after", {})),
        *(_finding(figures, way) for way in figures.get("retrieval", {})),
        _naming(figures.get("caption")),
        _answering(figures.get("answers")),
        _drawing(figures.get("drawing")),
        _writing(figures),
    ]
    return [table for table in found if table.rows]


MEASURES = {  # of what fine-tuning changed: names, and digits
    **{
        f"{way} r{k}": (f"finding, {way.replace('_to_', ' → ')}, R@{k}", 3)
        for way in ("image_to_text", "text_to_image")
        for k in (1, 5, 10)
    },
    "caption chrf": ("captions, chrF", 1),
    "caption cider": ("captions, CIDEr-D", 2),
    "caption exact": ("captions, exactly the name", 3),
    "text poem": ("poems, bits a character", 3),
    "text review": ("reviews, bits a character", 3),
}


def _before_after(found: Figures) -> Iterator[Table]:
    """Of a fine-tuned run: on its own data, and what it forgot elsewhere."""
    where = {
        "own": ("on what is measured here", "Larger is better."),
        "elsewhere": ("where its parent had learned", "What it forgot. Larger is better, but of bits, smaller."),
    }
    for part, (title, note) in where.items():
        own = found.get(part, {})
        rows = [
            [
                Cell(name),
                _cell(own[key]["before"], (), digits),
                _cell(own[key]["after"], (), digits),
                _difference(own[key], digits),
                Cell(f"{own[key].get('texts', own['n']):,}"),
            ]
            for key, (name, digits) in MEASURES.items()
            if key in own
        ]
        note = f"{note} Before: {found.get('checkpoint')}; the same rows, paired."
        yield Table(f"Before and after, {title}", note, ["", "before", "after", "difference", "of"], rows)


def _finding(figures: Figures, way: str) -> Table:
    rows = []
    whose = {"this run": "", "ridge, 144 px": "_ridge", "ridge, same features and scores": "_ridge_stored"}
    for who, key in whose.items():
        one = figures.get(f"retrieval{key}", {}).get(way)
        if one:
            cells = [_cell(one[f"r{k}"], one["intervals"][f"r{k}"]) for k in (1, 5, 10)]
            rows.append([Cell(who), *cells, Cell(f"{one['n']:,}")])
        above = figures.get(f"retrieval_above{key}", {}).get(way)
        if above:
            rows.append([Cell("run above it"), *(_difference(above[f"r{k}"]) for k in (1, 5, 10)), Cell("")])
    note = (
        "Share of queries whose counterpart is among the first 1, 5 or 10. The ridge retrievers are linear maps of "
        "pictures' frozen features: of a smaller view, the rival of old, and of what this run sees, with standard "
        "scores as this run has them."
    )
    return Table(f"Finding: {way.replace('_to_', ' → ')}", note, ["", "R@1", "R@5", "R@10", "of"], rows)


def _naming(caption: Figures | None) -> Table:
    rows = []
    if caption:
        marks = {"exact": 3, "chrf": 1, "cider": 2}  # digits
        blank, above = caption["blank_image"], caption["above_blank_image"]
        own = [_cell(caption[key], caption["intervals"][key], digits) for key, digits in marks.items()]
        rows = [
            [Cell("this run"), *own, Cell(f"{caption['n']:,}")],
            [Cell("a blank image"), *(_cell(blank[key], (), digits) for key, digits in marks.items()), Cell("")],
            [Cell("difference"), *(_difference(above[key], digits) for key, digits in marks.items()), Cell("")],
        ]
    note = "Captions by the same model for a blank image tell what the picture adds."
    return Table("Naming", note, ["", "exact", "chrF", "CIDEr-D", "of"], rows)


def _answering(answers: Figures | None) -> Table:
    rows = [
        [
            Cell(kind),
            _cell(one["accuracy"], one["interval"]),
            _cell(one["majority"]),
            _cell(one.get("blank_image")),
            Cell(f"{one['n']:,}"),
        ]
        for kind, one in (answers or {}).items()
    ]
    note = "Share of questions answered exactly; plain ones are asked without a picture."
    return Table("Answering", note, ["question", "this run", "commonest answer", "a blank image", "of"], rows)


def _drawing(drawing: Figures | None) -> Table:
    rows = []
    if drawing:
        names = {"drawn": "this run's drawings", "shuffled": "the same, with others' words"}
        names |= {"real_pictures": "real pictures", "own_codes": "real pictures, from their own codes"}
        rows = [
            [Cell(name), _cell(drawing[who]["right"], drawing[who]["interval"]), Cell(f"{drawing['n']:,}")]
            for who, name in names.items()
        ]
        rows.append([Cell("drawings above others' words"), _difference(drawing["above_shuffled"]), Cell("")])
    note = (
        "Share of pictures whose words a judge tells from nine others'. It is a small network, trained on training "
        "pictures' pixels and words alone."
    )
    return Table("Drawing", note, ["", "told right", "of"], rows)


def _writing(figures: Figures) -> Table:
    kinds = {"texts": {"this run": figures["text"]}} if "text" in figures else {}
    kinds |= {kind: figures[f"text_{kind}"] for kind in ("poem", "review") if f"text_{kind}" in figures}
    rows = [
        [
            Cell(kind),
            Cell(f"this run, {who}" if who in ("prompted", "unprompted") else who),
            _cell(one["bits_per_character"], one["interval"]),
            _difference(one["above_run"]) if "above_run" in one else Cell(""),
        ]
        for kind, of in kinds.items()
        for who, one in of.items()
    ]
    note = (
        "Fewer bits are better. The 5-grams of characters learned all training text, or only the texts that this run "
        "had seen; they stand beside the run without prompts."
    )
    return Table("Writing", note, ["", "", "bits a character", "more than this run"], rows)


def _cell(value: float | None, interval: Sequence[float | None] = (), digits: int = 3, sign: str = "") -> Cell:
    """`value`: None where it was not measured or is not finite."""
    shown, *ends = ("–" if one is None else f"{one:{sign}.{digits}f}" for one in (value, *interval))
    return Cell(shown, " to ".join(ends))


def _difference(paired: Figures, digits: int = 3) -> Cell:
    return _cell(paired["difference"], (paired["low"], paired["high"]), digits, "+")
