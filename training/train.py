"""The training program: one recipe, on however many ranks the launcher started.

deepspeed --num_accelerators 2 --no_local_rank --module training.train --recipe R --name N [key=value …]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from training import checkpoint, ds_config
from training.data.batches import Collator, StepBatches
from training.data.corpus import Corpus
from training.data.order import GlobalOrder
from training.data.tasks import TASKS
from training.engine import Engine
from training.errors import UserError
from training.evaluate import Validation
from training.extensions import prepare_extensions
from training.meter import Meter, host_bytes
from training.peak import matmul_flops
from training.recipe import Recipe, load_recipe
from training.run import CHECKPOINTS, SWAP, lock_run, open_run, record_settings, tell_changes
from training.schedule import learning_rate
from training.tracking import Tracker

T = TypeVar("T")

LOST_PEER = 3
LAUNCHER_SECONDS = 5  # that a launcher may take to see that one of its ranks ended, and to end the others


class Training:
    """A run in progress on this rank. Construction checks everything before the first step. Collective."""

    def __init__(self, recipe: Recipe, name: str, resume: bool):
        self.recipe = recipe
        self.rank, world = dist.get_rank(), dist.get_world_size()
        self.folder = open_run(name, recipe, resume)
        dist.barrier()  # every rank has looked before the first makes the folder
        self.config = ds_config.resolve(recipe, world, torch.cuda.device_count(), self.folder / SWAP)
        self.corpus = Corpus.open(recipe.data)
        collate = Collator(self.corpus, self.config.model)
        order = GlobalOrder(
            [TASKS[task](self.corpus, "train") for task in recipe.tasks],
            recipe.tasks, recipe.global_batch, recipe.text_positions, recipe.seed,
        )  # fmt: skip
        self.batches = StepBatches(order, collate, self.config.micro_batch, self.rank, world)
        self.validation = Validation(self.corpus, recipe, collate)
        self.lock = _on_first_rank(lambda: lock_run(self.folder))
        _on_first_rank(self.corpus.verify)
        found = checkpoint.newest(self.folder / CHECKPOINTS) if resume else None
        dist.barrier()  # every rank has checked before one of them writes
        if self.rank == 0:
            tell_changes(self.folder, self.config)
            record_settings(self.folder, recipe, self.config)
        self.host_bytes_before = host_bytes()
        self.engine = Engine(self.config, recipe.seed)
        dtype = next(self.engine.model.parameters()).dtype
        self.peak = matmul_flops(self.engine.device, dtype)
        self.step, manifest = self._restore(found) if found else (0, {})
        self.meter = Meter(self.engine, list(order.counts), self.peak, manifest.get("counters"))
        self.tracker = (
            Tracker(self.folder, recipe, self._facts(order), self.step, state=manifest.get("tracker"))
            if self.rank == 0
            else None
        )

    def run(self) -> None:
        with self.tracker or contextlib.nullcontext():
            self._run()

    def _run(self) -> None:
        recipe = self.recipe
        if not self.step:
            self.evaluate()  # where learning starts from
        for batches in self.batches.from_step(self.step):
            if self.step >= recipe.steps:
                break
            lr = learning_rate(recipe, self.step)
            result = self.engine.step(batches, lr)
            tasks = self.batches.tasks(self.step)
            self.step += 1
            record = self.meter.record(result, tasks, self.step * recipe.global_batch, lr)
            if self.tracker:
                self.tracker.step({"step": self.step, **record})
            self._check_finite(result.loss)
            if self.step % recipe.evaluation.every == 0 or self.step == recipe.steps:
                self.evaluate()
            if self.step % recipe.save_every == 0 or self.step == recipe.steps:
                self.save()
        counters = self.meter.counters()
        if self.tracker:
            self.tracker.close({"steps": self.step, **counters})

    def _check_finite(self, loss: float) -> None:
        """Stop before the weights of a diverged run take the place of good checkpoints."""
        if not math.isfinite(loss):
            raise UserError(
                f"step {self.step}: the loss is not finite; the last good weights are in {self.folder / CHECKPOINTS}: "
                "start again with a lower optimizer.lr"
            )

    def close(self) -> None:
        self.engine.close()
        if self.rank == 0:
            for folder in self.config.swap_folders:
                shutil.rmtree(folder, ignore_errors=True)

    def evaluate(self) -> None:
        losses = self.validation.losses(self.engine)
        samples = self.validation.samples(self.engine)
        routing = self.meter.routing()
        if self.tracker:
            self.tracker.evaluation(self.step, losses)
            self.tracker.samples(self.step, samples)
            if routing:
                self.tracker.routing(self.step, routing)
        self.meter.restart_clock()

    def save(self) -> None:
        facts: dict[str, Any] = {
            "position": self.step * self.recipe.global_batch,
            "counters": self.meter.counters(),
            "tokenizer": self.corpus.tokenizer.sha256,
            "data": self.corpus.fingerprint,
            "tracker": self.tracker.state() if self.tracker else None,
        }
        started = time.perf_counter()
        checkpoint.save(self.engine, self.folder / CHECKPOINTS, self.step, facts, self.recipe.keep)
        if self.tracker:
            self.tracker.event(self.step, "saved", f"checkpoint in {time.perf_counter() - started:.1f} s")
        self.meter.restart_clock()

    def _restore(self, found: tuple[Path, dict[str, Any]]) -> tuple[int, dict[str, Any]]:
        path, manifest = found
        for key, own in (("tokenizer", self.corpus.tokenizer.sha256), ("data", self.corpus.fingerprint)):
            if manifest[key] != own:
                raise UserError(f"{path}: it was trained on another {key}; give the --data that it was started with")
        checkpoint.load(self.engine, path, manifest, self._blank_step)
        return manifest["step"], manifest

    def _blank_step(self) -> None:
        empty = self.batches.collate([], self.recipe.text_positions, self.config.micro_batch)
        self.engine.step([empty] * self.config.accumulation, lr=0.0)

    def _facts(self, order: GlobalOrder) -> dict[str, Any]:
        counts = self.config.model.parameter_counts()
        return {
            "parameters/total": counts.total,
            "parameters/active": counts.active,
            "device": get_accelerator().device_name(),
            "ranks": dist.get_world_size(),
            "expert_parallel": self.config.expert_parallel,
            "parameters_on": self.config.parameter_tier,
            "optimizer_on": self.config.optimizer_tier,
            "precision": self.config.precision,
            "micro_batch": self.config.micro_batch,
            "accumulation": self.config.accumulation,
            "matmul_peak_flops/rank": self.peak,
            "host_bytes/before_model": self.host_bytes_before,
            **{f"rows_a_step/{task}": count for task, count in order.counts.items()},
        }


def _on_first_rank(action: Callable[[], T]) -> T | None:
    """Rank 0's result, and None elsewhere; a UserError there is raised on every rank. Collective."""
    result, told = None, [""]
    if dist.get_rank() == 0:
        try:
            result = action()
        except UserError as error:
            told = [str(error)]
    dist.broadcast_object_list(told, src=0)
    if told[0]:
        raise UserError(told[0])
    return result


def main() -> None:
    """Train on this rank. Exit codes: 2 for a mistake that the user can mend, LOST_PEER where another rank ended."""
    arguments = _arguments()
    training = None
    warnings.simplefilter("ignore", FutureWarning)  # of torch, at DeepSpeed's calls, once a call
    try:
        overrides = arguments.overrides + ([f"data={arguments.data}"] if arguments.data else [])
        recipe = load_recipe(arguments.recipe, overrides)
        prepare_extensions()
        with _quiet():
            deepspeed.init_distributed()
        get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", 0)))
        training = Training(recipe, arguments.name, arguments.resume)
        training.run()
        training.close()
    except UserError as error:
        _tell(error, int(os.environ.get("RANK", 0)))
        sys.exit(2)
    except RuntimeError as error:
        if os.environ.get("M6_DEBUG") or not _lost_peer(error):
            raise
        _tell_lost_peer(training.step if training else 0)
        sys.exit(LOST_PEER)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _tell(error: UserError, rank: int) -> None:
    """One line, once: a mistake that all ranks see is told by rank 0, which ends the others while they wait."""
    if rank:
        time.sleep(LAUNCHER_SECONDS)
    print(f"m6: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr, flush=True)


def _lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is no longer there.

    Gloo raises plain RuntimeErrors, which begin with the place in its sources; NCCL's say which of its codes it was.
    """
    return isinstance(error, dist.DistNetworkError) or any(
        mark in str(error) for mark in ("gloo/transport/", "ncclRemoteError")
    )


def _tell_lost_peer(step: int) -> None:
    """Told only where nobody knows more: a launcher that sees the failed rank itself ends this one meanwhile."""
    time.sleep(LAUNCHER_SECONDS)
    rank = os.environ.get("RANK", 0)
    print(f"m6: rank {rank}: another rank went away at step {step}; see what it said", file=sys.stderr, flush=True)


def _quiet() -> contextlib.AbstractContextManager[Any]:
    """DeepSpeed prints a line a rank about its operators: only for those who ask."""
    wanted = bool(os.environ.get("M6_DEBUG"))
    return contextlib.nullcontext() if wanted else contextlib.redirect_stdout(io.StringIO())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="training.train", description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--name", required=True, help="of the run: runs/<name>")
    parser.add_argument("--data", help="folder of the corpus, instead of the recipe's")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args()


if __name__ == "__main__":
    main()
