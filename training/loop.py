"""A run: everything that it needs, and its loop of steps, evaluations and saves."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from typing import IO, Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from training import checkpoint, checkpoint_files, ds_config, states
from training.background import background_for
from training.data.batches import Collator, StepBatches
from training.data.order import GlobalOrder, training_order
from training.delink import Plateau, is_delinked
from training.engine import Engine, StepResult
from training.errors import LEFT, RestartableError, UserError
from training.evaluate import Validation
from training.heartbeat import Heartbeat
from training.image_folder import open_corpus
from training.meter import Meter, host_bytes
from training.own_data import check_usable
from training.parent import Parent
from training.peak import matmul_flops
from training.recipe import Recipe, parse_recipe
from training.run import (
    BACKGROUND,
    CHECKPOINTS,
    RANKS,
    SWAP,
    check_nothing_lost,
    check_unchanged,
    lock_run,
    open_run,
    read_plan,
    record_settings,
    tell_changes,
)
from training.safeguard import Safeguard, not_finite
from training.schedule import learning_rate
from training.start import check_alike
from training.stopping import StopRequest, StopRequested
from training.tracking import Tracker


class Before(NamedTuple):
    """What goes on when a run begins again with delinked layers."""

    stop: StopRequest
    lock: IO[str] | None


class Training:
    """A run in progress on this rank. Construction checks everything before the first step. Collective."""

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        resume: bool,
        allowed: Sequence[str] = (),
        heartbeat: Heartbeat | None = None,
        before: Before | None = None,
    ):
        """`allowed`: keys of the recipe that a resumed run may change though it should not.

        `before`: what is taken over from the same run in the same processes, before its layers were delinked.
        """
        self.whole, self.allowed = recipe, allowed
        self.heartbeat = heartbeat or Heartbeat()
        self.stop = before.stop if before else StopRequest()
        self.rank, world = dist.get_rank(), dist.get_world_size()
        self.folder = open_run(name, recipe, resume, allowed)
        dist.barrier()  # every rank has looked before the first makes the folder
        self.lock = before.lock if before else None
        if resume and not before:
            self._hold()  # what is there may be mended
        found = self._found() if resume else None
        self.recipe = recipe = recipe.delinked() if self._is_delinked(found) else recipe
        self.config = ds_config.resolve(recipe, world, torch.cuda.device_count(), self.folder / SWAP)
        check_alike(self.config.values)
        if recipe.delink.wanted:
            self._check_later(recipe.delinked(), world)
        parent = Parent.to_begin(recipe) if recipe.start and not found else None
        checkpoint.on_first_rank(lambda: open_corpus(recipe, self.config.model))  # which may have codes to make
        self.corpus = open_corpus(recipe, self.config.model)
        if parent:
            check_usable(self.corpus, parent.path, parent.manifest, parent.recipe)
        background = background_for(self.folder, parent, recipe, self.corpus)
        self.corpus.rarity = background.rarity if background else None
        collate = Collator(self.corpus, self.config.model, recipe.block)
        order = training_order(self.corpus, recipe)
        self.batches = StepBatches(order, collate, self.config.micro_batch, self.rank, world)
        self.validation = Validation(self.corpus, recipe, collate)
        if not resume:
            self._hold()
        self._empty_swap()  # of what a killed run left
        checkpoint.on_first_rank(self.corpus.verify)
        if found:
            self._check(found)
        elif resume:
            checkpoint.on_first_rank(lambda: check_nothing_lost(self.folder))
        dist.barrier()  # every rank has checked before one of them writes
        if self.rank == 0:
            tell_changes(self.folder, self.config)
            if parent and background:
                background.save(self.folder / BACKGROUND)
            record_settings(self.folder, self.whole, self.config)
        self.host_bytes_before = host_bytes()
        self.engine = Engine(self.config, recipe.seed)
        dtype = next(self.engine.model.parameters()).dtype
        self.peak = matmul_flops(self.engine.device, dtype)
        retention = checkpoint_files.Retention(recipe.keep, recipe.keep_every)
        self.saver = checkpoint.Saver(self.folder / CHECKPOINTS, retention, recipe.save_buffer, self.heartbeat.get_on)
        self.saved_step: int | None = None  # that of the newest checkpoint, once it is whole
        if parent:
            checkpoint.begin(self.engine, parent, self.heartbeat.get_on)
        self.step, manifest = self._restore(found) if found else (0, {})
        self.evaluation_due = manifest.get("evaluation_due", not found)
        self.guard = Safeguard(**manifest.get("safeguard", {}))
        self.plateau = Plateau(manifest.get("plateau", []))
        self.delinks = False  # whether the run has come to where its layers get their own weights
        plan = read_plan(self.folder, delinked=self._is_delinked(found))
        self.meter = Meter(self.engine, list(order.counts), self.peak, manifest.get("counters"), plan.get("watts"))
        self.tracker = (
            Tracker(self.folder, recipe, self._facts(order), self.step, manifest.get("tracker"), plan.get("metrics"))
            if self.rank == 0
            else None
        )
        if found:
            self._tell_refused(found)
            left = max(recipe.steps - self.step, 0)
            rest = f"{left:,} steps are left" if left else "nothing is left to do, unless steps is raised"
            self._tell("resumed", f"{rest}, from {found.path}")
        if parent:
            counts = self.config.model.parameter_counts()
            trained = f"{counts.of(self.config.trained):,} of {counts.total:,} parameters are trained"
            self._tell("begun", f"with the weights of {parent.path}; {trained}")
        if before or (self._is_delinked(found) and self.tracker and not self.tracker.has_told("delinked")):
            self._tell("delinked", f"each of {self.config.model.layers} layers has its own weights from now on")
        self.stop.begin()
        self.engine.before_batch = self._before_batch
        self.heartbeat.begin(self.step)

    def _hold(self) -> None:
        """Make the folder this run's own, and tell there how far it is."""
        self.lock = checkpoint.on_first_rank(lambda: lock_run(self.folder))
        self.heartbeat.open(self.folder / RANKS, self.rank)

    def _found(self) -> checkpoint.Found | None:
        """The newest whole checkpoint."""
        checkpoint.on_first_rank(lambda: checkpoint_files.take_back(self.folder / CHECKPOINTS))
        return checkpoint.newest(self.folder / CHECKPOINTS, self.heartbeat.get_on)

    def _is_delinked(self, found: checkpoint.Found | None) -> bool:
        return bool(found and self.whole.delink.wanted and is_delinked(found.manifest))

    def _check_later(self, later: Recipe, world: int) -> None:
        """Refuse now what could not go on after delinking. Raises UserError."""
        config = ds_config.resolve(later, world, torch.cuda.device_count(), self.folder / SWAP)
        training_order(open_corpus(later, config.model), later)

    def run(self) -> int:
        """Train to the end, to where `delinks` is set, or until all ranks agree to leave; returns the exit code."""
        with self.tracker or contextlib.nullcontext():
            try:
                self._run()
            except StopRequested:
                self._leave()
                return LEFT
            except (AssertionError, OSError):
                self._check_swap()
                raise
        return 0

    def _check_swap(self) -> None:
        if damage := states.swap_damage(self.engine):
            raise RestartableError(f"{damage}: NVMe offload needs it; go on from the last save by --resume")

    def _before_batch(self) -> None:
        self.heartbeat.beat(self.step)
        self.stop.check()

    def _leave(self) -> None:
        """Save the state after the last whole step, if it is not saved: a step under way has changed nothing yet."""
        self.heartbeat.enter("ending")
        self._tell_saved(self.saver.wait())
        if self.saved_step != self.step:
            self.save()
            self._finish_saving()
        self._tell("stopped", "on request")

    def _run(self) -> None:
        recipe = self.recipe
        if self.evaluation_due:
            self.evaluate()  # where learning starts from, or what an earlier run could not end
        unsaved = False
        self.delinks = self._delink_due()  # or one that was stopped just then would train on
        while self.step < recipe.steps and not self.delinks:
            if not self._advance():
                continue
            done = self.step == recipe.steps
            due = self._delink_due()
            if self.step % recipe.evaluation.every == 0 or done:
                self.evaluate()
            unsaved = unsaved or self.step % recipe.save_every == 0
            # Not while steps are being skipped: weights that have gone wrong must not replace good checkpoints.
            if done or ((unsaved or due) and not self.guard.skipped_in_a_row):
                self.save()
                unsaved, self.delinks = False, due
            self._tell_saved(self.saver.poll())
        self.heartbeat.enter("ending")
        self._finish_saving()
        counters = self.meter.counters()
        if self.tracker and not self.delinks:
            self.tracker.close({"steps": self.step, **counters})

    def _delink_due(self) -> bool:
        recipe = self.recipe
        return 0 < self.step < recipe.steps and self.plateau.reached(self.step, recipe.delink)

    def _finish_saving(self) -> None:
        self._tell_saved(last := self.saver.wait())
        if last and last.error:
            raise RestartableError(f"{last.error}; --resume goes on from step {self.saved_step or 0}")

    def _advance(self) -> bool:
        """Take one step; False if its loss was such that the run went back to a checkpoint instead."""
        recipe, place = self.recipe, self.guard.place(self.step)
        lr = learning_rate(recipe, self.step)
        self._check_swap()
        result = self.engine.step(self.batches.take(place), lr)
        self.step += 1
        if result.skipped:
            self.guard.skip()
        record = self.meter.record(result, self.batches.tasks(place), (place + 1) * recipe.global_batch, lr)
        if self.tracker:
            self.tracker.step({"step": self.step, **record, "skipped_steps": self.guard.skipped})
        if result.skipped:
            self._tell_skipped(result, place)
        elif self.guard.spikes(self.step, result.loss, recipe.spike):
            return not self._go_back(result.loss)
        else:
            self.guard.accept(result.loss, recipe.spike)
            self.plateau.add(result.loss, recipe.delink)
        return True

    def _tell_skipped(self, result: StepResult, place: int) -> None:
        first = place * self.recipe.global_batch
        bad = not_finite(self.engine, result)
        self._tell("skipped step", f"{bad}, not finite; positions {first} to {first + self.recipe.global_batch - 1}")
        if self.guard.skipped_in_a_row >= self.recipe.skips:
            self._give_up(f"the loss or the gradient was not finite in {self.recipe.skips} steps in a row ({bad})")

    def _go_back(self, loss: float) -> bool:
        """Go back to the last checkpoint, past the positions seen since; False where there is none yet. Collective."""
        rule, spike = self.recipe.spike, self.step
        words = f"loss {loss:.3f} at step {spike}, over {rule.factor:g} times the usual {self.guard.usual_loss():.3f}"
        if self.guard.rollbacks >= rule.rollbacks:
            self._give_up(f"{words}, after {rule.rollbacks} rollbacks (spike.rollbacks)")
        with self.heartbeat.during("loading"):
            self._tell_saved(self.saver.wait())
            found = checkpoint.newest(self.folder / CHECKPOINTS, self.heartbeat.get_on)
        if found is None:
            self._tell("loss spike", f"{words}; there is no checkpoint to go back to")
            self.guard.accept(loss, rule)
            return False
        self.step, manifest = self._restore(found)
        first = self.guard.place(self.step)
        self.plateau = Plateau(manifest.get("plateau", []))
        self.guard = self.guard.back_to(manifest.get("safeguard", {}), spike - self.step)
        self.meter.go_back(manifest["counters"])
        if self.tracker:
            self.tracker.go_back(self.step, manifest["tracker"])
        self._tell_refused(found)
        batch, then = self.recipe.global_batch, self.guard.place(self.step)
        passed = f"positions {first * batch} to {then * batch - 1} are passed over"
        self._tell("rolled back", f"{words}; {passed}; rollback {self.guard.rollbacks} of {rule.rollbacks}")
        return True

    def _give_up(self, reason: str) -> NoReturn:
        """Stop a run that does not mend itself. Collective."""
        with self.heartbeat.during("saving"):
            self._tell_saved(self.saver.wait())
        saved = checkpoint_files.steps(self.folder / CHECKPOINTS)
        way = "nothing was saved before; start again with a lower optimizer.lr"
        if saved:
            last = self.folder / CHECKPOINTS / f"step-{saved[-1]}"
            way = f"go on from {last} with a lower optimizer.lr (--resume --allow-change optimizer.lr)"
        raise UserError(f"step {self.step}: {reason}; {way}")

    def _tell_refused(self, found: checkpoint.Found) -> None:
        for line in found.refused:
            self._tell("refused a checkpoint", f"{line}; it is kept aside until training has come as far again")

    def _tell(self, kind: str, text: str) -> None:
        if self.tracker:
            self.tracker.event(self.step, kind, text)

    def delink(self) -> Before:
        """Give each layer its own weights, in the last checkpoint; the run is over here, and to begin again from that.

        Collective. Raises RestartableError.
        """
        with self.heartbeat.during("saving"):
            self.engine.close()
            self._empty_swap()
            path = self.folder / CHECKPOINTS / f"step-{self.step}"
            checkpoint.delink(path, self.recipe, self.heartbeat.get_on)
        return Before(self.stop, self.lock)

    def close(self) -> None:
        self.engine.close()
        self._empty_swap()

    def _empty_swap(self) -> None:
        """On each node, whose disk may be its own."""
        if int(os.environ.get("LOCAL_RANK", 0)):
            return
        for folder in self.config.swap_folders:
            shutil.rmtree(folder, ignore_errors=True)

    def evaluate(self) -> None:
        self.evaluation_due = True
        if self.tracker:
            self.tracker.evaluating()
        with self.heartbeat.during("evaluating"):
            losses = self.validation.losses(self.engine)
            samples = self.validation.samples(self.engine)
        self.evaluation_due = False
        routing = self.meter.routing()
        if self.tracker:
            self.tracker.evaluation(self.step, losses)
            self.tracker.samples(self.step, samples)
            if routing:
                self.tracker.routing(self.step, routing)
        self.meter.restart_clock()

    def save(self) -> None:
        facts: dict[str, Any] = {
            "adam_step": states.adam_step(self.engine),
            "position": self.guard.place(self.step) * self.recipe.global_batch,
            "safeguard": self.guard.state(),
            "plateau": self.plateau.losses,
            "recipe": self.recipe.model_dump(mode="json"),
            "recipe_sha256": self.recipe.sha256(),
            "counters": self.meter.counters(),
            "tokenizer": self.corpus.tokenizer.sha256,
            "data": self.corpus.fingerprint,
            "feature_network": self.corpus.feature_network_sha256,
            "tracker": self.tracker.state() if self.tracker else None,
            "evaluation_due": self.evaluation_due,
        }
        with self.heartbeat.during("saving"):
            self._tell_saved(self.saver.save(states.parts(self.engine), self.step, facts))
        self.meter.restart_clock()

    def _tell_saved(self, outcome: checkpoint.Outcome | None) -> None:
        if outcome and not outcome.error:
            self.saved_step = outcome.step
        if outcome and self.tracker:
            self.tracker.saved(outcome)

    def _check(self, found: checkpoint.Found) -> None:
        """Refuse a checkpoint of another run. Raises UserError."""
        path, manifest = found.path, found.manifest
        for thing, was, own in (
            ("tokenizer", manifest["tokenizer"], self.corpus.tokenizer.sha256),
            ("data set", manifest["data"], self.corpus.fingerprint),
        ):
            if was != own:
                raise UserError(f"{path}: it was trained on another {thing}; give the --data that it was started with")
        check_unchanged(parse_recipe(manifest["recipe"], [], str(path)), self.recipe, self.allowed, str(path))

    def _restore(self, found: checkpoint.Found) -> tuple[int, dict[str, Any]]:
        path, manifest = found.path, found.manifest
        with self.heartbeat.during("loading"):
            checkpoint.load(self.engine, path, manifest, self._blank_step, self.heartbeat.get_on)
        checkpoint.on_first_rank(lambda: checkpoint_files.set_aside_after(path.parent, manifest["step"]))
        self.saved_step = manifest["step"]
        return manifest["step"], manifest

    def _blank_step(self) -> None:
        empty = self.batches.collate([], self.recipe.text_positions, self.config.micro_batch)
        before, self.engine.before_batch = self.engine.before_batch, lambda: None  # no leaving with half a state
        self.engine.step([empty] * self.config.accumulation, lr=0.0)
        self.engine.before_batch = before

    def _facts(self, order: GlobalOrder) -> dict[str, Any]:
        counts = self.config.model.parameter_counts()
        return {
            "parameters/total": counts.total,
            "parameters/trained": counts.of(self.config.trained),
            "parameters/active": counts.active,
            "device": get_accelerator().device_name(),
            "ranks": dist.get_world_size(),
            "expert_parallel": self.config.expert_parallel,
            "parameters_on": str(self.config.placement.parameters),
            "optimizer_on": str(self.config.placement.optimizer),
            "precision": self.config.precision,
            "micro_batch": self.config.micro_batch,
            "accumulation": self.config.accumulation,
            "matmul_peak_flops/rank": self.peak,
            "host_bytes/before_model": self.host_bytes_before,
            **{f"rows_a_step/{task}": count for task, count in order.counts.items()},
        }
