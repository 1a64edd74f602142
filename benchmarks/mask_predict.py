"""Seconds and memory of filling a grid of codes by mask-predict, window by window, and of decoding it to a picture.

    python -m benchmarks.mask_predict [--preset m6-tiny] [--sizes 64 128 256 512 1024] [--steps 2]

One picture with words of 16 tokens, all of its codes masked, without guidance; the time of filling goes with the steps,
of which drawing takes 10 by default. Each size has a process of its own, whose peak of resident memory stands beside
what it had before. The weights are not trained: they do not change the work.
"""

from __future__ import annotations

import argparse
import resource
import time
from multiprocessing import get_context

import torch

from model.config import PRESETS, ImageTokenizerConfig
from model.image_tokens import ImageTokenizer
from model.m6 import M6
from model.mask_predict import MaskPredict, fill_grid, windows

MASK, WORDS = 4, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="m6-tiny")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--steps", type=int, default=2)
    arguments = parser.parse_args()
    print("| size, px | codes | windows | filling, s | s a window | decoding, s | memory before, MB | peak, MB |")
    print("|---|---|---|---|---|---|---|---|")
    for size in arguments.sizes:
        with get_context("spawn").Pool(1) as pool:
            print(pool.apply(measure, (arguments.preset, size, arguments.steps)), flush=True)


def measure(preset: str, size: int, steps: int) -> str:
    """A line of the table."""
    shape = ImageTokenizerConfig()
    model, painter = M6(PRESETS[preset].config).eval(), ImageTokenizer(shape).eval()
    vocab, side, cells = model.config.text_vocab, size // shape.cell, shape.grid**2
    settings = MaskPredict(range(vocab, vocab + shape.codes), MASK, steps)
    batch = {
        "tokens_BT": torch.full((1, cells + WORDS + 1), 100),
        "source_B": torch.tensor([cells + WORDS]),
        "length_B": torch.tensor([cells + WORDS + 1]),
        "image_BPC": torch.zeros(1, model.config.image_patches, model.config.image_channels),
        "has_image_B": torch.tensor([False]),
    }
    before, start = peak(), time.perf_counter()
    filled = fill_grid(
        model, batch, torch.full((1, side, side), MASK), shape.grid, settings, torch.Generator().manual_seed(0)
    )
    filling, start = time.perf_counter() - start, time.perf_counter()
    with torch.no_grad():
        painter.decode_windowed(filled.tokens.flatten(1) - vocab)
    decoding, count = time.perf_counter() - start, len(list(windows(side, side, shape.grid)))
    return (
        f"| {size} | {side} x {side} | {count} | {filling:.1f} | {filling / count:.3f} | {decoding:.2f} "
        f"| {before / 1e6:.0f} | {peak() / 1e6:.0f} |"
    )


def peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
