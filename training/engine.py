"""The model under DeepSpeed: groups, zero.Init, engine, and one optimisation step.

DeepSpeed's ZeRO-3 accepts expert-parallel layers only of its own class, and its own conversion gathers a whole
layer's experts on every rank. So the model builds its local experts itself, tagged for ZeRO-3
(`model/experts.py`), and its layers are then given DeepSpeed's class, with none of its code.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from torch import Tensor

from model.experts import ExpertParallel
from model.m6 import IGNORE, M6, target_counts
from model.moe import MoELayer
from model.parts import part_of
from training.compact_adam import CompactAdamW
from training.ds_config import COMPACT, DSConfig
from training.granular import granular, parameter_groups
from training.placement import DEVICE
from training.states import partitions_by_group
from training.zero import keep_once, spare_passes

Batch = dict[str, Tensor]


class EngineMoELayer(MoELayer, AutoEPMoELayer):
    """Our layer, by a class that DeepSpeed's engine knows as expert-parallel."""

    def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
        """Nothing: the groups exist before the model does."""


@dataclass
class StepResult:
    """What one step did, summed over all ranks (the losses, counts) or of the global step (norm)."""

    loss: float  # nats a target
    skipped: bool  # the loss or a gradient was not finite on some rank, and no state has changed on any
    said: int  # targets that are tokens
    tokens: int  # valid positions through the trunk
    grad_norm: float
    rows_loss: Tensor  # of this rank's rows, in order: summed loss
    rows_targets: Tensor  # and number of targets
    routing: Tensor  # counts [L, M, 2, E], over all ranks


def expert_parallel_groups(size: int) -> ExpertParallel:
    """Create DeepSpeed's expert groups, which must exist before the model. Collective."""
    groups._create_expert_and_data_parallel(expert_parallel_size_=size)
    name = f"ep_size_{size}"
    group = groups._get_expert_parallel_group(name)
    return ExpertParallel(size, dist.get_rank(group), group, groups._get_expert_data_parallel_group(name))


class Engine:
    """The model, its optimizer and their DeepSpeed engine on this rank. Construction is collective."""

    def __init__(self, config: DSConfig, seed: int):
        self.config = config
        self.parallel = expert_parallel_groups(config.expert_parallel)
        tier = config.placement.parameters.coldest
        with deepspeed.zero.Init(config_dict_or_path=config.values, remote_device=None if tier == DEVICE else tier):
            model = M6(config.model, seed, self.parallel)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part_of(name) in config.trained)
        model.recompute = config.recompute
        for module in model.modules():
            if isinstance(module, MoELayer):
                module.__class__ = EngineMoELayer
        decay = config.values["optimizer"]["params"]["weight_decay"]
        with granular():
            self.deepspeed, *_ = deepspeed.initialize(
                model=model, model_parameters=parameter_groups(model, config.placement, decay), config=config.values
            )
        keep_once(self.deepspeed.optimizer)
        spare_passes(self.deepspeed.optimizer)
        self.model = model
        if config.optimizer_states == COMPACT:
            self._compact(seed)
        self.device = torch.device(get_accelerator().current_device_name())
        self.before_batch: Callable[[], None] = lambda: None  # collective; may give up the step under way by raising
        gc.collect()  # the fp32 initial weights that zero.Init's closures still hold

    def _compact(self, seed: int) -> None:
        """Put the optimizer of 8-bit states in the place of DeepSpeed's, which has made no state yet."""
        zero = self.deepspeed.optimizer
        flats, groups = zero.fp32_partitioned_groups_flat, zero.optimizer.param_groups
        zero.optimizer = CompactAdamW(groups, flats, partitions_by_group(self), seed)

    @property
    def world(self) -> int:
        return dist.get_world_size()

    def step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """One optimizer step over this rank's micro-batches, at learning rate `lr`. Collective.

        The loss of a step is the summed target loss over the step's global number of targets, so it does not
        depend on how the rows fall to ranks and micro-batches.

        A step whose loss or gradient is not finite on any rank is skipped on all: weights, moments, Adam's step and
        its beta products stay as they are, to the bit.
        """
        assert len(batches) == self.config.accumulation
        batches = [{key: value.to(self.device, non_blocking=True) for key, value in b.items()} for b in batches]
        targets, said, tokens = self._global_counts(batches)
        # DeepSpeed averages over ranks and micro-batches; our loss is a sum over them.
        shares = self.world * len(batches)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        self.deepspeed.train()
        losses, counts = [], []
        for batch in batches:
            self.before_batch()
            out = self.deepspeed(batch)
            losses.append(out["loss_B"].detach())
            counts.append(out["counts"])
            loss = out["loss_B"].sum() / max(targets, 1) + out["auxiliary"] / max(tokens, 1)
            if len(losses) == len(batches):
                total = self._total(losses)
                # DeepSpeed skips a step whose gradient norm, which all ranks share, is not finite. A loss that is not
                # finite need not show in the gradient, so it is made to.
                loss = loss * torch.where(total.isfinite(), 1.0, math.nan).to(loss)
            self.deepspeed.backward(loss * shares)
            self.deepspeed.step()
        if not self.deepspeed.was_step_applied():
            self._flush_gradients()
        return self._result(batches, losses, counts, total.item() / max(targets, 1), said, tokens)

    def _flush_gradients(self) -> None:
        """Let the gradients of a skipped step be written out to NVMe, if they live there.

        They wait in buffers until the update would read them. Left there, they and the next step's could be written
        to the same files at once, in either order.
        """
        optimizer = self.deepspeed.optimizer
        if optimizer.swap_optimizer:
            optimizer.optimizer_swapper.flush_gradients()

    def _global_counts(self, batches: Iterable[Batch]) -> tuple[int, int, int]:
        """Targets, those of them that are tokens, and valid positions."""
        patches, own = self.config.model.image_patches, []
        for batch in batches:
            tokens_B = batch["length_B"] + patches * batch["has_image_B"]
            said_BT = batch["labels_BT"] != IGNORE
            own.append(torch.stack((target_counts(batch).sum(), said_BT.sum(), tokens_B.sum())))
        counts = torch.stack(own).sum(0)
        dist.all_reduce(counts)
        targets, said, tokens = counts.tolist()
        return targets, said, tokens

    def _total(self, losses: list[Tensor]) -> Tensor:
        """The summed loss of all ranks' rows, fp64."""
        total = torch.cat(losses).sum(dtype=torch.float64)
        dist.all_reduce(total)
        return total

    def _result(
        self,
        batches: Sequence[Batch],
        losses: list[Tensor],
        counts: list[Tensor],
        loss: float,
        said: int,
        tokens: int,
    ) -> StepResult:
        routing = torch.stack(counts).sum(0)
        dist.all_reduce(routing)
        rows_targets = torch.cat([target_counts(b) for b in batches])
        norm = self.deepspeed.get_global_grad_norm()
        return StepResult(
            loss=loss,
            skipped=not self.deepspeed.was_step_applied(),
            said=said,
            tokens=tokens,
            grad_norm=float(norm) if norm is not None else float("nan"),
            rows_loss=torch.cat(losses).cpu(),
            rows_targets=rows_targets.cpu(),
            routing=routing.cpu(),
        )

    @torch.no_grad()
    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed loss and number of targets of each row, nothing dropped. Collective: equal shapes on all ranks."""
        self.before_batch()
        self.deepspeed.eval()
        out = self.deepspeed({key: value.to(self.device) for key, value in batch.items()})
        return out["loss_B"].cpu(), out["targets_B"].cpu()

    @torch.no_grad()
    def next_logits(self, batch: Batch) -> Tensor:
        """Logits [B, V] after each row's last position, on the CPU. Collective, as `losses`."""
        self.before_batch()
        self.deepspeed.eval()
        return self.deepspeed({key: value.to(self.device) for key, value in batch.items()})["logits_BV"].cpu()

    def close(self) -> None:
        self.deepspeed.destroy()
