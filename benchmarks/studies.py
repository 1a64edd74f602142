"""Studies of M6's methods on the real data: several seeds, one budget, differences that are paired by seed.

    python -m benchmarks.studies rate routing balance dense pseudo [--seeds 1 2 3] [--steps 120] [--folder FOLDER]

Each run is one of `m6 train` on one rank and one core: `benchmarks/studies.yaml` with changes. Runs that have ended are
passed over, others go on from their last save, so it can be stopped at any time. Then the tables of each study are
printed, and its plots are written (`--plots`).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.study_results import Panel, Result, drawn, tables
from launch.checkpoints import delink_run
from training.recipe import load_recipe
from training.records import read_json, read_lines
from training.run import CHECKPOINTS, FOLDER, RECIPE

ROOT = Path(__file__).resolve().parent.parent
COMMON = Path(__file__).with_suffix(".yaml")
PARTS = 4  # of a run, at whose ends it is evaluated and may be delinked
M6_COMMAND = (sys.executable, "-P", "-c", "from launch.cli import main; main()")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "DS_ACCELERATOR": "cpu"}


@dataclass(frozen=True)
class Contender:
    """A way to train, by what it changes of the common recipe; or one that goes on where PSEUDO was at a share of its
    steps, with layers that have their own weights from then on."""

    name: str
    changes: tuple[str, ...] = ()
    delinked_at: float = 0.0
    moments: str = "clone"  # Adam's, when its layers are delinked


@dataclass(frozen=True)
class Study:
    contenders: tuple[Contender, ...]
    comparisons: tuple[tuple[str, str], ...]  # names: the loss of the first minus that of the second
    panels: tuple[Panel, ...] = ()


def _routed(k: int, routing: str, capacity: str) -> Contender:
    name = f"{routing.replace('-', '')}{k}-{capacity}"
    return Contender(name, (f"model.k={k}", f"model.routing={routing}", f"ds.m6.capacity={capacity}"))


def _changed(base: Contender, name: str, *changes: str) -> Contender:
    return Contender(f"{base.name}-{name}" if name else base.name, (*base.changes, *changes))


TOP1 = Contender("top1-1x", ("model.k=1",))
TOP1_DROPLESS = Contender("top1-none", ("model.k=1", "ds.m6.capacity=none"))
PROTOTYPES, TOPK = ({(k, c): _routed(k, r, c) for k in (2, 4) for c in ("1x", "kx")} for r in ("prototype", "top-k"))
REAL = PROTOTYPES[2, "1x"]
PSEUDO = _changed(REAL, "pseudo", "model.share_layers=true")
BALANCED = "model.balance_loss=0.01"  # Switch's weight
UNBALANCED = (TOP1, REAL, TOP1_DROPLESS)
DENSE, DENSE_TWICE = (Contender(f"dense-{n}x", ("model.experts=0", f"model.ffn={512 * n}")) for n in (1, 2))
DELINKED = tuple(
    Contender(f"delinked-{share:.0%}-{moments}", delinked_at=share, moments=moments)
    for share, moments in ((0.25, "clone"), (0.5, "clone"), (0.75, "clone"), (0.5, "reset"), (0.5, "scale"))
)


def _routing() -> Study:
    routed = (*PROTOTYPES.values(), *TOPK.values())
    pairs = [(one.name, TOP1.name) for one in routed]
    pairs += [(PROTOTYPES[key].name, TOPK[key].name) for key in PROTOTYPES]
    panels = tuple(
        Panel(f"validation loss less top-1's, capacity {c}", "step", "difference",
              (TOP1.name, *(kind[k, c].name for kind in (PROTOTYPES, TOPK) for k in (2, 4))))
        for c in ("1x", "kx")
    )  # fmt: skip
    return Study((TOP1, *routed), tuple(pairs), panels)


def _balance() -> Study:
    balanced = tuple(_changed(one, "balanced", BALANCED) for one in UNBALANCED)
    pairs = tuple((a.name, b.name) for a, b in zip(balanced, UNBALANCED, strict=True))
    names = tuple(name for pair in pairs for name in reversed(pair))
    panels = (
        Panel("load variation (cv)", "step", "load_cv", names),
        Panel("dropped assignments", "step", "drop_rate", names[:4]),
    )
    return Study(tuple(one for pair in zip(UNBALANCED, balanced, strict=True) for one in pair), pairs, panels)


def _dense() -> Study:
    twice = PROTOTYPES[2, "kx"]
    once = (TOP1, REAL, TOP1_DROPLESS)
    pairs = (*((one.name, DENSE.name) for one in once), (twice.name, DENSE_TWICE.name))
    contenders = (DENSE, *once, DENSE_TWICE, twice)
    names = tuple(one.name for one in contenders)
    panel = Panel("validation loss less the dense model's", "step", "difference", names)
    return Study(contenders, pairs, (panel,))


def _pseudo() -> Study:
    contenders = (REAL, PSEUDO, *DELINKED)
    cloned = "delinked-50%-clone"
    pairs = [(one.name, REAL.name) for one in contenders[1:]]
    pairs += [(f"delinked-50%-{moments}", cloned) for moments in ("reset", "scale")]
    names = tuple(one.name for one in contenders)
    swept = tuple(name for name in names if not name.endswith(("reset", "scale")))
    panels = (
        Panel("validation loss less Real's, against steps", "step", "difference", names),
        Panel("validation loss, against updates of parameters", "updates", "loss", swept),
    )
    return Study(contenders, tuple(pairs), panels)


def _rate() -> Study:
    others = tuple(_changed(REAL, f"lr-{rate:g}", f"optimizer.lr={rate}") for rate in (1e-3, 4e-3))
    return Study((REAL, *others), tuple((one.name, REAL.name) for one in others))


STUDIES: dict[str, Study] = {
    "rate": _rate(),
    "routing": _routing(),
    "balance": _balance(),
    "dense": _dense(),
    "pseudo": _pseudo(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="+", choices=STUDIES, metavar="STUDY", help=", ".join(STUDIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=load_recipe(COMMON).steps)
    parser.add_argument("--folder", type=Path, default=FOLDER / "studies", help="of all runs")
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--plots", type=Path, default=ROOT / "benchmarks" / "studies")
    arguments = parser.parse_args()
    if arguments.steps % PARTS:
        parser.error(f"--steps {arguments.steps}: must be divisible by {PARTS}")
    laboratory = Laboratory(arguments.folder.absolute(), arguments.data.absolute(), arguments.steps)
    for seed in arguments.seeds:
        for name in arguments.studies:
            for contender in STUDIES[name].contenders:
                laboratory.train(contender, seed)
    for name in arguments.studies:
        report(name, laboratory, arguments.seeds, arguments.plots)


def report(name: str, laboratory: Laboratory, seeds: list[int], plots: Path) -> None:
    study = STUDIES[name]
    results = {one.name: [laboratory.result(one, seed) for seed in seeds] for one in study.contenders}
    print(f"\n## {name}: {laboratory.steps} steps, seeds {' '.join(map(str, seeds))}")
    print(tables(results, study.comparisons))
    if study.panels:
        plots.mkdir(exist_ok=True)
        (plots / f"{name}.svg").write_text(drawn(study.panels, results), encoding="utf-8")


class Laboratory:
    """The runs of one folder, all of `steps` steps."""

    def __init__(self, folder: Path, data: Path, steps: int):
        self.folder, self.data, self.steps = folder, data, steps

    def run(self, contender: Contender, seed: int) -> Path:
        return self.folder / FOLDER / f"{contender.name.replace('%', '')}-{self.steps}-{seed}"

    def ended(self, contender: Contender, seed: int) -> bool:
        about = read_json(self.run(contender, seed) / "run.json", {})
        return about.get("summary", {}).get("steps") == self.steps

    def train(self, contender: Contender, seed: int) -> None:
        """Train a run to its end, if it is not there yet; one line tells of it. Raises SystemExit if it fails."""
        if self.ended(contender, seed):
            return
        if contender.delinked_at:
            self.train(PSEUDO, seed)
        start, busy, run = time.monotonic(), _processor_seconds(), self.run(contender, seed)
        run.parent.mkdir(parents=True, exist_ok=True)
        begun = (run / RECIPE).exists()
        if contender.delinked_at and not begun:
            self._delink(contender, seed)
            begun = True
        command = [*M6_COMMAND, "train", *self._arguments(contender, seed), *(["--resume"] if begun else [])]
        log = run.with_name(f"{run.name}.log")  # beside it: a run has its folder to itself
        with log.open("a") as output:
            code = subprocess.run(command, cwd=self.folder, env=ENVIRONMENT, stdout=output, stderr=output).returncode
        if code:
            sys.exit(f"{run.name}: m6 train ended with {code}; see {log}")
        if contender is not PSEUDO:  # which others go on from
            shutil.rmtree(run / CHECKPOINTS)
        seconds = f"{time.monotonic() - start:.0f} s, {_processor_seconds() - busy:.0f} s of a processor"
        loss = self.result(contender, seed).loss
        print(f"{run.name}: {seconds}, validation loss {loss:.4f}", file=sys.stderr, flush=True)

    def result(self, contender: Contender, seed: int) -> Result:
        run = self.run(contender, seed)
        shape = load_recipe(run / RECIPE).model_shape()
        return Result(read_lines(run / "metrics.jsonl"), shape, int(contender.delinked_at * self.steps))

    def _arguments(self, contender: Contender, seed: int) -> list[str]:
        run = self.run(contender, seed)
        common = ["--name", run.name, "--data", str(self.data), "--ranks", "1"]
        if contender.delinked_at:
            return [*common, "--recipe", str(run / RECIPE)]
        part = self.steps // PARTS
        save = [f"save_every={part}", f"keep_every={part}"] if contender is PSEUDO else [f"save_every={self.steps}"]
        length = [f"steps={self.steps}", f"evaluation.every={part}", f"schedule.warmup={part // 2}"]
        return [*common, "--recipe", str(COMMON), f"seed={seed}", *length, *save, *contender.changes]

    def _delink(self, contender: Contender, seed: int) -> None:
        """The beginning of the contender's run: PSEUDO's checkpoint of the step, its layers with a copy each."""
        source, step = self.run(PSEUDO, seed), int(contender.delinked_at * self.steps)
        quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        with contextlib.chdir(self.folder), quiet[0], quiet[1]:
            delink_run(source.name, (), self.run(contender, seed).name, step, contender.moments)


def _processor_seconds() -> float:
    """Of all processes that were waited for: where other work takes its turns, a better clock than the time of day."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
