"""The second stage of drawing from end to end: task, batches, loss, mask-predict."""

import numpy as np
import torch

from model.config import ModelConfig
from model.m6 import M6
from model.mask_predict import MaskPredict, fill
from training.data.batches import Collator
from training.data.corpus import Corpus
from training.data.order import random_at
from training.data.tasks import TASKS, Row

CODES, LIMIT, PICTURES, ROWS, STEPS = 50, 48, 4, 16, 80


def test_pictures_that_were_learned_by_heart_are_given_back_for_their_words(sample_corpus: Corpus) -> None:
    """Their codes are lots: nothing but the words tells one from the others."""
    torch.manual_seed(0)
    corpus = Corpus.open(sample_corpus.folder.parent)
    corpus.codes = np.random.default_rng(0).integers(0, CODES, (len(corpus.pictures), 4, 16)).astype(np.uint16)
    vocab, task = corpus.tokenizer.vocab_size, TASKS["inpaint"](corpus, "validation")
    shape = ModelConfig(
        layers=2, hidden=64, ffn=128, heads=4, text_vocab=vocab, image_codes=CODES, max_positions=LIMIT,
        image_channels=1280, init_std=0.1,
    )  # fmt: skip
    model, collate = M6(shape, seed=1), Collator(corpus, shape)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(STEPS):
        places = range(step * ROWS, (step + 1) * ROWS)
        out = model(collate([task.row(int(task.pool[n % PICTURES]), LIMIT, random_at(1, n)) for n in places], LIMIT))
        (out["loss_B"].sum() / out["targets_B"].sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    mask, items = task.tokenizer.mask_id, task.pool[:PICTURES].tolist()
    rows = [Row([mask] * 16 + task.prompt(corpus.picture(item), random_at(0, 0)), []) for item in items]
    settings = MaskPredict(range(vocab, vocab + CODES), mask, steps=4, temperature=0, noise=0)
    found = fill(model, collate(rows, LIMIT), settings, torch.Generator()).tokens[:, :16]
    assert (found - vocab == torch.from_numpy(corpus.codes[items, 0].astype(np.int64))).float().mean() > 0.95
