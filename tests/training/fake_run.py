"""A believable run's folder, written through the tracker itself: for tests, and for looking at the page."""

import contextlib
import io
import json
import math
import os
import random
from pathlib import Path

import yaml
from PIL import Image, ImageDraw

from training.recipe import Recipe
from training.records import Sample
from training.tracking import Tracker

TASKS = {"caption": 2.0, "denoise": 1.0, "image_denoise": 1.0, "poem": 1.0, "review": 1.0}
FACTS = {
    "model": "m6-tiny",
    "parameters/total": 45_600_123,
    "parameters/active": 8_123_456,
    "device": "cpu, 2 cores",
    "ranks": 2,
    "expert parallel": 2,
    "offload": "parameters none, optimizer cpu",
    "rows/caption": 8_120,
    "rows/poem": 21_034,
}


def make_recipe(**changes) -> Recipe:
    values = {
        "model": "m6-tiny",
        "steps": 400,
        "global_batch": 32,
        "tasks": TASKS,
        "evaluation": {"every": 50},
        "tracking": {"wandb": "disabled"},
    }
    return Recipe(**values | changes)


def make_record(step: int, random_: random.Random | None = None) -> dict:
    """A step's record as the loop would give it: noisy with a random source, else a function of the step."""
    noise = random_.gauss(0, 1) if random_ else 0.0
    loss = 2.2 + 7 * math.exp(-step / 90)
    record = {
        "step": step,
        "position": 32 * step,
        "tokens": 2_400 * step,
        "loss": loss + 0.15 * noise,
        "lr": 1e-3 * min(1.0, step / 40, 1.1 - step / 400),
        "grad_norm": 0.8 + 3 * math.exp(-step / 30) + 0.1 * abs(noise),
        "step_seconds": 1.1 + 0.05 * noise,
        "tokens_per_second": 2_400 / (1.1 + 0.05 * noise),
        "flops_utilization": 0.31 - 0.01 * noise,
        "moe/load_cv": 0.3 + 0.5 * math.exp(-step / 100),
        "moe/drop_rate": 0.02 + 0.15 * math.exp(-step / 60),
        "memory/device_bytes": 1_900_000_000,
        "memory/host_bytes": 3_400_000_000 + 1_000 * step,
        "energy/joules_per_token": None,
        "energy/source": "unavailable",
    }
    record |= {f"loss/{task}": loss + 0.4 * i + 0.25 * noise for i, task in enumerate(TASKS)}
    for modality, more in (("image", 1.2), ("text", 0.9)):
        record |= {f"moe/{key}/{modality}": more * record[f"moe/{key}"] for key in ("load_cv", "drop_rate")}
    return record


def validation_losses(step: int) -> dict[str, float]:
    loss = 2.5 + 7 * math.exp(-step / 90)
    return {f"loss/validation/{task}": loss + 0.4 * i for i, task in enumerate(TASKS)}


def learn(tracker: Tracker, first: int, last: int) -> None:
    """Steps `first` to `last`, and an evaluation each 20."""
    for step in range(first, last + 1):
        tracker.step(make_record(step))
        if step % 20 == 0:
            tracker.evaluation(step, {"loss/validation/caption": 5 - step / 40})


def written(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def rest_of(terminal: int) -> bytes:
    """What is shown on a pseudo-terminal until its other side is closed, which Linux tells by an error."""
    shown = b""
    with contextlib.suppress(OSError):
        while piece := os.read(terminal, 65536):
            shown += piece
    return shown


def picture(colour: str) -> bytes:
    """A PNG of a ball."""
    image = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(image).ellipse((12, 12, 84, 84), fill=colour)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def make_samples() -> list[Sample]:
    captions = [
        ("red", "红色的球", "红色的球"),
        ("blue", "蓝色的球", "蓝色的球"),
        ("gold", "金色的球", "黄色的月亮"),
    ]
    captions += [
        ("green", "绿色的球", "绿色的球"),
        ("purple", "一个紫色的球", "紫色"),
        ("gray", "灰色的球", ""),
    ]
    samples = [Sample(picture(name), "caption", "", right, output) for name, right, output in captions]
    poem = "白日依山尽\n黄河入海流\n欲穷千里目\n更上一层楼"
    samples.append(Sample(None, "poem", "登鹳雀楼", "", poem))
    samples.append(Sample(None, "review", "好评 酒店", "", "房间很干净，服务也好，下次还会再来住。"))
    return samples


def make_load(layers: int = 4, experts: int = 16, seed: int = 3) -> dict:
    random_ = random.Random(seed)
    wanted = [
        [[round(400 * math.exp(random_.gauss(0, 0.7))) for _ in range(experts)] for _ in range(2)]
        for _ in range(layers)
    ]
    kept = [[[min(n, 700) for n in counts] for counts in layer] for layer in wanted]
    return {"wanted": wanted, "kept": kept}


def make_run(run: Path, recipe: Recipe, load: dict | None, samples: list[Sample]) -> Path:
    """A whole run: steps, evaluations from step 0, events, and (if given) routing and samples."""
    random_ = random.Random(1)
    run.mkdir(parents=True)
    text = yaml.safe_dump(recipe.model_dump(mode="json"), allow_unicode=True, sort_keys=False)
    (run / "recipe.yaml").write_text(text)
    with Tracker(run, recipe, FACTS) as tracker:
        for step in range(recipe.steps + 1):
            if step:
                tracker.step(make_record(step, random_))
            if step % recipe.evaluation.every == 0:
                losses = {f"loss/validation/{t}": 2.5 + 0.4 * i + 7 * math.exp(-step / 90) for i, t in enumerate(TASKS)}
                tracker.evaluation(step, losses)
        if load:
            tracker.routing(recipe.steps, load)
        if samples:
            tracker.samples(recipe.steps, samples)
        tracker.event(recipe.steps, "saved", "checkpoints/step-400")
        tracker.close({"loss": 2.3})
    return run
