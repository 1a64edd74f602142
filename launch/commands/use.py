"""The verbs that put a trained run to work, from caption to eval."""

from pathlib import Path
from typing import Any

import click

from launch.commands.options import DATA, JSON, PATH, RUN


class Box(click.ParamType[tuple[int, int, int, int]]):
    """LEFT,TOP,WIDTH,HEIGHT."""

    name = "box"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int, int, int]:
        try:
            left, top, width, height = (int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not four whole numbers: LEFT,TOP,WIDTH,HEIGHT", param, ctx)
        return left, top, width, height


TRIES = click.option(
    "--tries", type=click.IntRange(1, 256), default=16, show_default=True, help="Of which the best are kept."
)
SEED = click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
REFERENCE = click.option("--reference", type=PATH, help="A picture whose like is to be drawn.")
STEPS = click.option("--steps", type=click.IntRange(1, 1024), help="Passes of mask-predict; 10 if it draws.")
SIZE = click.option(
    "--size", type=click.IntRange(1, 1024), help="px a side of the square that is coded; the tokenizer's if not given."
)


@click.command()
@click.argument("images", nargs=-1, required=True, type=PATH, metavar="IMAGE...")
@click.option("--kind", type=click.Choice(["zh", "en", "tags"]), default="zh", show_default=True)
@RUN
@DATA
@JSON
def caption(images: tuple[Path, ...], kind: str, run: str | None, data: Path | None, as_json: bool) -> None:
    """Say what pictures show: a name in Chinese or English, or key words."""
    from launch import use

    use.caption(run, data, images, kind, as_json)


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="[IMAGE] QUESTION")
@click.option("--choice", "choices", multiple=True, help="An answer that may be given; once for each.")
@RUN
@DATA
def ask(words: tuple[str, ...], choices: tuple[str, ...], run: str | None, data: Path | None) -> None:
    """Answer a question, about a picture or by itself: m6 ask cup.png 这是什么?"""
    if len(words) > 2:
        raise click.UsageError("more than an IMAGE and a QUESTION: put the question in quotes")
    from launch import use

    use.ask(run, data, Path(words[0]) if len(words) == 2 else None, words[-1], choices)


class Example(click.ParamType):
    """PROMPT => TEXT, as two texts."""

    name = "example"

    def convert(
        self, value: str | tuple[str, str], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        if not isinstance(value, str):
            return value
        prompt, _, text = (part.strip() for part in value.partition("=>"))
        if not (prompt and text):
            self.fail(f"{value!r} must be 'PROMPT => TEXT'", param, ctx)
        return prompt, text


@click.command()
@click.argument("prompt")
@click.option(
    "--example",
    "examples",
    multiple=True,
    type=Example(),
    metavar="'PROMPT => TEXT'",
    help="Read before the prompt; once for each.",
)
@click.option("--tokens", type=click.IntRange(min=1), default=96, show_default=True, help="At the most.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.8, show_default=True, help="0: the likeliest.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=0.9, show_default=True)
@click.option("--repetition-penalty", type=click.FloatRange(min=0, min_open=True), default=1.1, show_default=True)
@SEED
@RUN
@DATA
def write(
    prompt: str,
    examples: tuple[tuple[str, str], ...],
    tokens: int,
    temperature: float,
    top_p: float,
    repetition_penalty: float,
    seed: int,
    run: str | None,
    data: Path | None,
) -> None:
    """Write a text, as it comes to mind: m6 write 写一首诗。题目：春晓。作者：孟浩然。"""
    from launch import use
    from training.writing import Style

    use.write(run, data, prompt, examples, Style(temperature, top_p, repetition_penalty, tokens, seed))


def _check_kept(pictures: int, tries: int) -> None:
    if pictures > tries:
        raise click.UsageError(f"--pictures {pictures}: cannot be more than --tries {tries}")


@click.command()
@click.argument("text")
@click.option("--to", "target", type=PATH, default="drawing.png", show_default=True)
@click.option("--pictures", type=click.IntRange(1, 64), default=4, show_default=True, help="That are kept.")
@TRIES
@click.option("--guidance", type=click.FloatRange(0, 100), default=3.0, show_default=True, help="What the words weigh.")
@click.option("--temperature", type=click.FloatRange(0.01, 100), default=1.0, show_default=True)
@SEED
@REFERENCE
@STEPS
@SIZE
@RUN
@DATA
def draw(
    text: str,
    target: Path,
    pictures: int,
    tries: int,
    guidance: float,
    temperature: float,
    seed: int,
    reference: Path | None,
    steps: int | None,
    size: int | None,
    run: str | None,
    data: Path | None,
) -> None:
    """Draw pictures for a text; the model itself says which fit best: m6 draw 红色的苹果

    One code after another (task draw); with --reference, --steps or --size by mask-predict (task inpaint).
    """
    _check_kept(pictures, tries)
    from launch import use
    from training.painting import Hand

    hand = Hand(pictures, tries, guidance, temperature, seed=seed, steps=steps, size=size)
    use.draw(run, data, text, reference, hand, target)


@click.command()
@click.argument("image", type=PATH)
@click.option("--text", default="", help="What the picture shows when it is done.")
@click.option("--region", type=Box(), help="LEFT,TOP,WIDTH,HEIGHT in px: what is redrawn.")
@click.option("--mask", type=PATH, help="Or a picture of the same size, white where it is redrawn.")
@click.option("--to", "target", type=PATH, default="edited.png", show_default=True)
@click.option("--pictures", type=click.IntRange(1, 64), default=1, show_default=True, help="That are kept.")
@TRIES
@click.option("--guidance", type=click.FloatRange(0, 100), default=3.0, show_default=True, help="What is said weighs.")
@SEED
@REFERENCE
@STEPS
@SIZE
@RUN
@DATA
def edit(
    image: Path,
    text: str,
    region: tuple[int, int, int, int] | None,
    mask: Path | None,
    target: Path,
    pictures: int,
    tries: int,
    guidance: float,
    seed: int,
    reference: Path | None,
    steps: int | None,
    size: int | None,
    run: str | None,
    data: Path | None,
) -> None:
    """Redraw a region of a picture and keep the rest: m6 edit cat.png --text 戴帽子的猫 --region 60,0,80,40

    All px outside the region stay as they are.
    """
    if (region is None) == (mask is None):
        raise click.UsageError("say what is redrawn, by --region or by --mask")
    _check_kept(pictures, tries)
    from launch import use
    from training.painting import Hand

    hand = Hand(pictures, tries, guidance, seed=seed, steps=steps, size=size)
    within = region or mask
    assert within is not None
    use.edit(run, data, image, text, within, reference, hand, target)


@click.command()
@click.argument("query")
@click.option("--images", "folder", required=True, type=PATH, help="The folder to search; its index is kept.")
@click.option("-k", "most", type=click.IntRange(min=1), default=12, show_default=True, help="Pictures at the most.")
@click.option("--sheet", type=PATH, help="Draw them on a contact sheet, in this PNG file.")
@RUN
@DATA
@JSON
def search(
    query: str, folder: Path, most: int, sheet: Path | None, run: str | None, data: Path | None, as_json: bool
) -> None:
    """Find pictures of a folder by meaning."""
    from launch import use

    use.search(run, data, query, folder, most, sheet, as_json)


@click.command("eval")
@click.option("--pairs", type=PATH, help='Pictures of your own: JSON lines {"image": …, "zh": …, "en": … or null}.')
@click.option("--text", "texts", type=PATH, help='Texts of your own: JSON lines {"text": …, "title": …}.')
@click.option("--split", type=click.Choice(["test", "validation"]), default="test", show_default=True)
@click.option("--json", "target", type=PATH, help="Write all figures to this file.")
@RUN
@DATA
def evaluate(
    pairs: Path | None, texts: Path | None, split: str, target: Path | None, run: str | None, data: Path | None
) -> None:
    """Measure what a run can do: on the corpus' held-out families, or on files of your own.

    Figures, samples and a page of both are left in the run's folder, from where `m6 report` takes them.
    """
    from launch.evaluate import evaluate as measure

    measure(run, data, pairs, texts, split, target)
