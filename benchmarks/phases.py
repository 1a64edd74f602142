"""Where the time of a training step goes: wall time by phase, adding up to the whole.

Phases nest as calls do, and each second counts once, for the innermost phase: the clock of the outer one stands still
meanwhile. For CPU ranks, whose work is done when a call returns.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

OTHER = "other"


class PhaseClock:
    """Seconds by phase since the last `restart`; `install` makes the training engine's parts tell theirs."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._stack = [OTHER]
        self._undo: list[Callable[[], None]] = []
        self._last = time.perf_counter()

    def restart(self) -> None:
        self._charge()
        self.seconds.clear()

    def read(self) -> dict[str, float]:
        """Seconds of each phase up to now."""
        self._charge()
        return dict(self.seconds)

    def _charge(self) -> None:
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._last
        self._last = now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def time(self, owner: Any, attribute: str, name: str) -> None:
        """Count every call of `owner.attribute` as the phase `name`, until `remove`."""
        plain = vars(owner)[attribute]
        function = plain.__func__ if isinstance(plain, staticmethod) else plain

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        setattr(owner, attribute, staticmethod(timed) if isinstance(plain, staticmethod) else timed)
        self._undo.append(lambda: setattr(owner, attribute, plain))

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()

    def install(self) -> None:
        """Time the parts of our model, of our engine and of DeepSpeed's ZeRO-3, in this process."""
        for owner, attribute, name in _parts():
            self.time(owner, attribute, name)


def _parts() -> Iterator[tuple[Any, str, str]]:
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Zero

    from model import grouped, moe, routing, rows
    from model.experts import LocalExperts
    from model.m6 import M6
    from training.engine import Engine

    yield Engine, "step", "bookkeeping"
    yield DeepSpeedEngine, "forward", "forward"
    yield M6, "_cross_entropy", "head"
    yield routing.Router, "forward", "router"
    yield moe.MoELayer, "forward", "dispatch"
    yield rows.MoveRows, "backward", "dispatch"
    yield rows.SumRows, "backward", "dispatch"
    yield LocalExperts, "forward", "experts"
    yield grouped._ExpertByExpert, "backward", "experts"
    yield moe, "_exchange", "all-to-all"
    yield moe.MoELayer, "_exchange_counts", "all-to-all"
    yield DeepSpeedEngine, "backward", "backward"
    for gather in ("fetch_sub_module", "release_sub_module"):
        yield PartitionedParameterCoordinator, gather, "gather"
    for reduce in ("reduce_ready_partitions_and_remove_grads", "independent_gradient_partition_epilogue"):
        yield Zero, reduce, "reduce"
    yield Zero, "partition_grads", "host copies"
    for read in ("swap_in", "synchronize_reads"):
        yield AsyncPartitionedParameterSwapper, read, "disk, weights in"
    for write in ("swap_out_and_release", "synchronize_writes", "swap_out_partitioned_params"):
        yield AsyncPartitionedParameterSwapper, write, "disk, weights out"
    yield Zero, "_swap_out_offload_fp32_gradients", "disk, gradients out"
    yield Zero, "_optimizer_states_and_gradient_swap_in", "disk, optimizer in"
    yield Zero, "_optimizer_states_and_gradient_swap_out", "disk, optimizer out"
    yield DeepSpeedEngine, "step", "optimizer"
    for copy in ("_prepare_fp32_grad_for_sub_group", "_reassign_or_swap_out_partitioned_parameters"):
        yield Zero, copy, "host copies"
