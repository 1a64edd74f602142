"""What a rank's collectives move, counted where torch hands them to a process group."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Traffic:
    """Calls and bytes of this rank's collectives, by kind and group.

    Bytes are those of the whole message, as nccl-tests counts sizes: of an all-gather what every rank ends with, of a
    reduce-scatter what every rank begins with, of an all-reduce or a broadcast the tensor, of an all-to-all what this
    rank sends (its own part among it). A group of one rank moves nothing, and is not counted.
    """

    calls: Counter[tuple[str, dist.ProcessGroup]] = field(default_factory=Counter)
    bytes: Counter[tuple[str, dist.ProcessGroup]] = field(default_factory=Counter)
    seconds: float = 0.0  # spent in the calls; of one that goes on by itself, in starting it

    def clear(self) -> None:
        self.calls.clear()
        self.bytes.clear()
        self.seconds = 0.0

    def by_kind(self, names: Mapping[dist.ProcessGroup, str]) -> dict[str, dict[str, Any]]:
        """Kind -> its calls, bytes and groups, each with its ranks, calls and bytes. Groups of one name are added."""
        kinds: dict[str, dict[str, Any]] = {}
        for (kind, group), calls in sorted(self.calls.items(), key=lambda item: item[0][0]):
            size = self.bytes[kind, group]
            whole = kinds.setdefault(kind, {"calls": 0, "bytes": 0, "groups": {}})
            name = names.get(group, "other")
            part = whole["groups"].setdefault(name, {"ranks": group.size(), "calls": 0, "bytes": 0})
            for counts in (whole, part):
                counts["calls"] += calls
                counts["bytes"] += size
        return kinds


@contextlib.contextmanager
def counted(groups: type[dist.ProcessGroup]) -> Iterator[Traffic]:
    """Count the collectives of all process groups of this class while the context lasts."""
    traffic = Traffic()
    before = {name: getattr(groups, name) for name in _MESSAGES}
    for name, (kind, message) in _MESSAGES.items():
        setattr(groups, name, _counting(before[name], kind, message, traffic))
    try:
        yield traffic
    finally:
        for name, method in before.items():
            setattr(groups, name, method)


def _counting(collective: Callable[..., Any], kind: str, message: Callable[..., Any], traffic: Traffic) -> Any:
    @functools.wraps(collective)
    def call(group: dist.ProcessGroup, *arguments: Any, **options: Any) -> Any:
        if group.size() > 1:
            traffic.calls[kind, group] += 1
            traffic.bytes[kind, group] += _bytes(message(*arguments))
        start = time.perf_counter()
        try:
            return collective(group, *arguments, **options)
        finally:
            traffic.seconds += time.perf_counter() - start

    return call


def _bytes(message: Tensor | Iterable[Any]) -> int:
    return message.nbytes if isinstance(message, torch.Tensor) else sum(map(_bytes, message))


# Methods of a process group: the collective's kind, and which of its arguments is the message.
_MESSAGES: dict[str, tuple[str, Callable[..., Any]]] = {
    "allreduce": ("all_reduce", lambda tensors, *_: tensors),
    "broadcast": ("broadcast", lambda tensors, *_: tensors),
    "all_gather_single": ("all_gather", lambda output, *_: output),
    "reduce_scatter_single": ("reduce_scatter", lambda _, whole, *__: whole),
    "all_to_all_single": ("all_to_all", lambda _, sent, *__: sent),
    "barrier": ("barrier", lambda *_, **__: ()),
}
