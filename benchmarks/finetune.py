"""What fine-tuning gives on data that a run never saw, and what it costs elsewhere.

    python -m benchmarks.finetune --from emoji-1 --to /tmp/shop [--data data] [--only goods-adapters] [key=value …]

The validation split of the corpus, which the run never trained on, becomes a stranger's folder, twice: `goods`, whose
3-D and stamp pictures are imported to train on, while Noto's pictures of the same things are held out (a shop
photographs its goods again); and `things`, of which 30 % of the families are held out in all styles (new things). On
each, all weights are trained, or adapters alone. A run is measured by `m6 eval` on what was held out, and on the test
split of the corpus, which is not among its data: both beside the checkpoint that it started from.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.stranger import chosen, write_lines
from training.data.corpus import Corpus
from training.data.rows import Picture
from training.evaluation import MEASURES
from training.records import read_lines
from training.report import spans
from training.run import FOLDER

RECIPE = "launch/recipes/finetune.yaml"
HELD_OUT = 0.3  # of the families of `things`
AGAIN = "noto"  # the style in which the goods are seen again
WAYS = {"all": [], "adapters": ["tune.adapter_rank=8", "optimizer.lr=2e-3"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="start", required=True, help="the run to start from")
    parser.add_argument("--to", type=Path, required=True, help="a folder for data; runs are named by it")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--only", action="append", help="goods-all, goods-adapters, things-all or things-adapters")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    if not arguments.to.exists():
        make_data(Corpus.open(arguments.data), arguments.to, arguments.data)
    for data in ("goods", "things"):
        for way, own in WAYS.items():
            if not arguments.only or f"{data}-{way}" in arguments.only:
                name = f"{arguments.to.name}-{data}-{way}"
                tune(arguments.start, name, arguments.to / data, [*own, *arguments.overrides])
                show(name, measure(name, arguments.to / f"{data}-held-out" / "rows.jsonl"))


def make_data(corpus: Corpus, home: Path, base: Path) -> None:
    """Import what is trained on; write what is held out as pairs of files."""
    pictures = chosen(corpus, ["validation"], None)
    goods = [picture for picture in pictures if picture.style != AGAIN]
    known = {picture.family for picture in goods}
    again = [picture for picture in pictures if picture.style == AGAIN and picture.family in known]
    _import(goods, home / "goods", base, 0)
    _import(pictures, home / "things", base, HELD_OUT)
    imported = Corpus.open(home / "things")
    rows = [int(row) for split in ("validation", "test") for row in imported.picture_rows(split)]
    for name, held_out in (("goods", again), ("things", [imported.picture(row) for row in rows])):
        _write(held_out, home / f"{name}-held-out")


def _write(pictures: Iterable[Picture], folder: Path) -> None:
    folder.mkdir(parents=True)
    write_lines(list(pictures), folder)


def _import(pictures: list[Picture], home: Path, base: Path, held_out: float) -> None:
    _write(pictures, home / "source")
    rows, share = home / "source" / "rows.jsonl", str(held_out)
    _m6(
        "data", "import", str(rows), "--to", str(home), "--base", str(base), "--split-by", "family", "--held-out", share
    )


def tune(start: str, name: str, data: Path, overrides: list[str]) -> None:
    """By a new run, unless it is there."""
    if not (FOLDER / name).exists():
        began = time.perf_counter()
        _m6("train", "--from", start, "--recipe", RECIPE, "--name", name, f"data={data}", *overrides)
        (FOLDER / name / "seconds").write_text(f"{time.perf_counter() - began:.0f}")


def measure(name: str, pairs: Path) -> dict[str, Any]:
    target = FOLDER / name / "held-out.json"
    if not target.exists():
        _m6("eval", "--run", name, "--pairs", str(pairs), "--json", str(target))
    return json.loads(target.read_text())


def _m6(*words: str) -> None:
    subprocess.run([sys.executable, "-c", "from launch.cli import main; main()", *words], check=True)


def show(name: str, figures: dict[str, Any]) -> None:
    facts = json.loads((FOLDER / name / "run.json").read_text())["facts"]
    steps = [line for line in read_lines(FOLDER / name / "metrics.jsonl") if "loss" in line]
    inside = sum(line["step_seconds"] * count for line, count in spans(steps, "step"))
    trained, whole = facts["parameters/trained"], facts["parameters/total"]
    print(f"\n{name}: {trained:,} of {whole:,} parameters ({trained / whole:.2%}), {facts['ranks']} ranks, "
          f"{inside:.0f} s of steps, {(FOLDER / name / 'seconds').read_text()} s in all")  # fmt: skip
    print("\n| | before | after | difference | not better |\n|---|---|---|---|---|")
    for part in ("own", "elsewhere"):
        found = figures["before_after"][part]
        for key, (title, digits) in MEASURES.items():
            if one := found.get(key):
                before, after, difference, low, high = (
                    f"{one[name]:{sign}.{digits}f}"
                    for name, sign in (("before", ""), ("after", ""), ("difference", "+"), ("low", "+"), ("high", "+"))
                )
                worse = "" if "texts" in one else f"{one['not_better']:.3f}"  # of bits fewer are better
                print(f"| {part}: {title} | {before} | {after} | {difference} ({low} to {high}) | {worse} |")


if __name__ == "__main__":
    main()
