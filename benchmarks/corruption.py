"""Whether damage to a checkpoint is noticed: single flipped bits and truncations of a copy of a real one.

    python -m benchmarks.corruption RUN [--flips 1000] [--loads 1000]

Flips one random bit at a time over all files of the newest checkpoint of `runs/RUN`, weighted by file so that small
files get their share; truncates each file at many lengths; and verifies the whole one again and again. Prints what was
missed, and exits with 1 if anything was.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

from rich.progress import track

from training import checkpoint_files
from training.run import CHECKPOINTS, FOLDER

CUTS = (0.0, 0.001, 0.25, 0.5, 0.75, 0.999)  # of a file's length, besides its first and last byte


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--loads", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    source = FOLDER / arguments.run / CHECKPOINTS
    path = source / f"step-{checkpoint_files.steps(source)[-1]}"
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        copy = Path(shutil.copytree(path, Path(folder) / path.name))
        missed_flips = sum(not noticed(copy, *flip) for flip in track(flips(copy, arguments), "flipped bits"))
        cuts = [(name, length) for name in files(copy) for length in lengths(copy / name)]
        missed_cuts = sum(not noticed_cut(copy, *cut) for cut in track(cuts, "truncations"))
        alarms = sum(bool(checkpoint_files.problems(copy)) for _ in track(range(arguments.loads), "whole ones"))
    size = sum((path / name).stat().st_size for name in files(path))
    print(f"{path}: {len(files(path))} files, {size / 1e6:.1f} MB")
    print(f"flipped bits:  {arguments.flips} tried, {missed_flips} missed")
    print(f"truncations:   {len(cuts)} tried, {missed_cuts} missed")
    print(f"whole ones:    verified {arguments.loads} times, as before each load, {alarms} false alarms")
    sys.exit(bool(missed_flips or missed_cuts or alarms))


def files(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def flips(path: Path, arguments: argparse.Namespace) -> list[tuple[str, int]]:
    """(file, bit): every file equally often."""
    chance, names = random.Random(arguments.seed), files(path)
    chosen = [names[n % len(names)] for n in range(arguments.flips)]
    return [(name, chance.randrange(8 * (path / name).stat().st_size)) for name in chosen]


def lengths(file: Path) -> list[int]:
    size = file.stat().st_size
    return sorted({0, 1, size - 1, *(int(cut * size) for cut in CUTS)})


def noticed(path: Path, name: str, bit: int) -> bool:
    """Whether the flipped bit is noticed, and the file named; flips it back."""
    _flip(path / name, bit)
    found = checkpoint_files.problems(path)
    _flip(path / name, bit)
    return any(name.removesuffix(".xxh3") in problem for problem in found)


def noticed_cut(path: Path, name: str, length: int) -> bool:
    with (path / name).open("rb") as file:
        file.seek(length)
        rest = file.read()
    os.truncate(path / name, length)
    found = checkpoint_files.problems(path)
    with (path / name).open("ab") as file:
        file.write(rest)
    return any(name.removesuffix(".xxh3") in problem for problem in found)


def _flip(file: Path, bit: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(bit // 8)
        (value,) = opened.read(1)
        opened.seek(bit // 8)
        opened.write(bytes([value ^ 1 << bit % 8]))


if __name__ == "__main__":
    main()
