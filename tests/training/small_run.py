"""A small model that has truly learned to find the sample corpus' pictures: plain torch, seconds."""

from __future__ import annotations

from pathlib import Path

import torch

from model.config import ModelConfig
from model.m6 import M6 as Network
from training.background import Background
from training.data.batches import Collator
from training.data.corpus import Corpus
from training.data.features import PatchFeatures
from training.data.order import GlobalOrder
from training.data.tasks import TASKS
from training.trained import M6

WEIGHTS = {"contrast": 1}
BATCH, POSITIONS, STEPS = 64, 64, 60


def train_small(corpus: Corpus) -> M6:
    torch.manual_seed(0)
    shape = ModelConfig(
        layers=2, hidden=64, ffn=128, heads=4, text_vocab=corpus.tokenizer.vocab_size, image_codes=0,
        max_positions=POSITIONS, image_channels=1280, bag_width=64,
    )  # fmt: skip
    network, collate = Network(shape, seed=1), Collator(corpus, shape, BATCH)
    order = GlobalOrder([TASKS[name](corpus, "train") for name in WEIGHTS], WEIGHTS, BATCH, POSITIONS, 1, BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.01)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 10) * (1 - step / STEPS)
        batch = collate([order.row(step * BATCH + place) for place in range(BATCH)], POSITIONS)
        out = network(batch)
        (out["loss_B"].sum() / out["targets_B"].sum()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    features = PatchFeatures(corpus.feature_network)
    trained = network.eval().requires_grad_(False)
    return M6(trained, corpus.tokenizer, features, POSITIONS, STEPS, background=lambda: Background.of(corpus, shape))


def write_pictures(corpus: Corpus, rows: list[int], folder: Path) -> list[Path]:
    """As files, named by their row numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{row}.png" for row in rows]
    for row, path in zip(rows, paths, strict=True):
        path.write_bytes(corpus.picture(row).image)
    return paths
