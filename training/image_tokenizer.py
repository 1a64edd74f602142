"""Trains an image tokenizer on a corpus' pictures, measures it on held-out ones, and codes them all.

Shape suffixes: B pictures, c colours (3), H height and W width in px, P codes of a picture.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from model.image_tokens import ImageTokenizer
from training.data.corpus import Corpus
from training.data.views import FixedViews, RandomViews
from training.errors import UserError
from training.files import replace
from training.image_folder import code_pictures, save_image_tokenizer
from training.image_recipe import ImageTokenizerRecipe
from training.measures.images import psnr, ssim
from training.perceptual import PerceptualLoss
from training.schedule import learning_rate

METRICS, SHEET = "metrics.jsonl", "held_out.png"
SHEET_COLUMNS = 16  # pictures of a style on the sheet

# Told what is being done, how much of it is, of how much, and figures of it.
Report = Callable[[str, int, int, dict[str, float]], object]
Measures = dict[str, dict[str, float]]


def train_image_tokenizer(recipe: ImageTokenizerRecipe, folder: Path, report: Report) -> Measures:
    """Train, measure, and write everything into `folder`, which exists; the tokenizer's own files at the end.

    Returns the measures of each style, and of all, on the recipe's `split`. Raises UserError.
    """
    corpus = Corpus.open(recipe.data)
    if not len(corpus.picture_rows(recipe.split)):
        raise UserError(f"split={recipe.split}: {corpus.folder} has no such pictures; choose the other split")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = ImageTokenizer(recipe.model, recipe.seed).to(device)
    objective = Objective(recipe, corpus, device)
    with (folder / METRICS).open("w", encoding="utf-8", buffering=1) as metrics:
        for record in _fit(model, objective, RandomViews(corpus, recipe), recipe):
            metrics.write(json.dumps(record) + "\n")
            report("training", int(record["step"]), recipe.steps, record)
    model.eval().requires_grad_(False)
    measures = _measure(model, corpus, recipe)
    codes = code_pictures(model, corpus, lambda done, of: report("coding pictures", done, of, {}), recipe.workers)
    replace(folder / SHEET, _sheet(model, corpus, recipe))
    save_image_tokenizer(folder, model.cpu(), codes, recipe, corpus, objective.feature_network, measures)
    return measures


class Objective:
    """The loss: absolute and squared error of pixels, and the distance to a frozen network's eyes."""

    def __init__(self, recipe: ImageTokenizerRecipe, corpus: Corpus, device: torch.device):
        self.weights = recipe.loss.model_dump()
        self.perceptual = PerceptualLoss(corpus.feature_network).to(device) if recipe.loss.perceptual else None
        self.feature_network = self.perceptual.sha256 if self.perceptual else None

    def __call__(self, decoded_BcHW: Tensor, image_BcHW: Tensor) -> dict[str, Tensor]:
        """The parts, and their weighted sum as `loss`."""
        error_BcHW = decoded_BcHW.float() - image_BcHW
        parts = {"l1": error_BcHW.abs().mean(), "l2": error_BcHW.square().mean()}
        if self.perceptual:
            parts["perceptual"] = self.perceptual(decoded_BcHW.float(), image_BcHW)
        return {"loss": torch.stack([self.weights[name] * part for name, part in parts.items()]).sum(), **parts}


def _fit(
    model: ImageTokenizer, objective: Objective, views: RandomViews, recipe: ImageTokenizerRecipe
) -> Iterator[dict[str, float]]:
    """Train the model; every `log_every` steps, and at the last, the means since the record before."""
    device, optimizer = _device(model), _optimizer(model, recipe)
    seen: list[dict[str, Tensor]] = []
    start = time.perf_counter()
    for step, image_BcHW in enumerate(_batches(views, recipe, device), start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step - 1)
        with _autocast(device):
            losses = objective(model(image_BcHW), image_BcHW)
        optimizer.zero_grad()
        losses["loss"].backward()
        if recipe.optimizer.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip)
        optimizer.step()
        seen.append({name: value.detach() for name, value in losses.items()})
        if step % recipe.log_every == 0 or step == recipe.steps:
            means = {name: torch.stack([record[name] for record in seen]).mean().item() for name in losses}
            if not math.isfinite(means["loss"]):
                raise UserError(f"the loss is not finite at step {step}: lower optimizer.lr")
            seconds = time.perf_counter() - start
            yield {"step": step, **means, "lr": group["lr"], "pictures_per_second": step * recipe.batch / seconds}
            seen.clear()


def _optimizer(model: ImageTokenizer, recipe: ImageTokenizerRecipe) -> torch.optim.Optimizer:
    settings = recipe.optimizer
    kernels = [weight for weight in model.parameters() if weight.dim() > 1]
    biases = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": kernels, "weight_decay": settings.weight_decay}, {"params": biases, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, settings.lr, settings.betas, settings.eps)


def _autocast(device: torch.device) -> torch.autocast:
    """bf16 where the GPU multiplies it; quantisation, losses and weights stay fp32."""
    multiplies = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=multiplies)


def _device(model: ImageTokenizer) -> torch.device:
    return next(model.parameters()).device


def _batches(views: Dataset[Tensor], recipe: ImageTokenizerRecipe, device: torch.device) -> Iterator[Tensor]:
    """In order, on the device."""
    loader = DataLoader(views, recipe.batch, num_workers=recipe.workers, pin_memory=device.type == "cuda")
    for image_BcHW in loader:
        yield image_BcHW.to(device, non_blocking=True)


@torch.inference_mode()
def _measure(model: ImageTokenizer, corpus: Corpus, recipe: ImageTokenizerRecipe) -> Measures:
    """Of each style and of all, on the plain view of the recipe's split."""
    rows = corpus.picture_rows(recipe.split)
    sources = np.array([corpus.picture(int(row)).source for row in rows])
    quality: list[np.ndarray] = []
    codes: list[np.ndarray] = []
    for image_BcHW in _batches(FixedViews(corpus, rows, recipe.model.side, views=1), recipe, _device(model)):
        codes_BP = model.encode(image_BcHW)
        pair = (model.decode(codes_BP) + 1) / 2, (image_BcHW + 1) / 2
        quality.append(torch.stack([psnr(*pair), ssim(*pair)]).cpu().numpy())
        codes.append(codes_BP.cpu().numpy())
    styles = {str(source): sources == source for source in np.unique(sources)} | {"all": np.full(len(rows), True)}
    return {
        style: {"pictures": int(chosen.sum())}
        | dict(zip(("psnr", "ssim"), np.concatenate(quality, 1)[:, chosen].mean(1).tolist(), strict=True))
        | _codebook_use(np.concatenate(codes)[chosen], model.config.codes)
        for style, chosen in styles.items()
    }


def _codebook_use(codes: np.ndarray, entries: int) -> dict[str, float]:
    """Share of the entries that occur, and the perplexity: as many entries, equally often, would say as much."""
    counts = np.bincount(codes.ravel(), minlength=entries)
    shares = counts[counts > 0] / counts.sum()
    return {"codes_used": len(shares) / entries, "code_perplexity": float(np.exp(-(shares * np.log(shares)).sum()))}


@torch.inference_mode()
def _sheet(model: ImageTokenizer, corpus: Corpus, recipe: ImageTokenizerRecipe) -> bytes:
    """PNG of held-out pictures, in pairs of rows: originals over their reconstructions, a pair a style."""
    lines = []
    for source in sorted(corpus.manifest["pictures"]):
        rows = corpus.picture_rows(recipe.split, source=source)
        if len(rows):
            chosen = rows[np.linspace(0, len(rows) - 1, SHEET_COLUMNS).astype(int)]
            views = FixedViews(corpus, chosen, recipe.model.side, views=1)
            originals = torch.stack([views[place] for place in range(len(views))])
            decoded = model.decode(model.encode(originals.to(_device(model)))).cpu()
            lines += [torch.cat(list(pictures), dim=2) for pictures in (originals, decoded)]
    values = torch.cat(lines, dim=1).add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()
    png = io.BytesIO()
    Image.fromarray(values).save(png, format="PNG")
    return png.getvalue()
