"""Process groups of which one rank is here, and the others are taken to be its copies.

torch's own `fake` backend answers collectives at once, but brings nothing: what is gathered or received would be
whatever lay in memory. Here it is what copies of this rank would have sent. So shapes, bytes and memory are those of a
job of that many ranks, and numbers stay finite; but what is computed is not what such a job would compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

import torch.distributed as dist
from deepspeed.runtime.zero import utils as zero_utils
from torch import Tensor
from torch._C._distributed_c10d import FakeWork

from training.start import init_distributed

BACKEND = "absent"


class AbsentPeers(dist.ProcessGroup):
    """Answers each collective as if every other rank had been called with what this one was called with."""

    def __init__(self, _: dist.Store, rank: int, size: int, __: timedelta):
        super().__init__(rank, size)  # type: ignore[call-arg]  # which torch's stubs do not know

    def getBackendName(self) -> str:
        return BACKEND

    def allreduce(self, *arguments: Any, **_: Any) -> dist.Work:
        tensors, options = arguments
        # A mean, a minimum or a maximum of copies is what they are.
        for tensor in tensors if options.reduceOp == dist.ReduceOp.SUM else ():
            tensor.mul_(self.size())
        return _done()

    def broadcast(self, *_: Any) -> dist.Work:
        return _done()

    def barrier(self, *_: Any, **__: Any) -> dist.Work:
        return _done()

    def all_gather_single(self, output: Tensor, own: Tensor, *_: Any) -> dist.Work:
        for part in output.chunk(self.size()):
            _copy(own, part)
        return _done()

    def reduce_scatter_single(self, output: Tensor, whole: Tensor, *_: Any) -> dist.Work:
        _copy(whole.chunk(self.size())[self.rank()], output)
        output.mul_(self.size())
        return _done()

    def all_to_all_single(
        self, output: Tensor, sent: Tensor, received_sizes: Sequence[int], sent_sizes: Sequence[int], *_: Any
    ) -> dist.Work:
        """From each rank comes what this rank sends to itself, again and again if it must be more."""
        parts = sent.split(list(sent_sizes)) if sent_sizes else sent.chunk(self.size())
        own = parts[self.rank()]
        for part in output.split(list(received_sizes)) if received_sizes else output.chunk(self.size()):
            for piece in part.split(max(len(own), 1)):
                piece.copy_(own[: len(piece)]) if len(own) else piece.zero_()
        return _done()


def _copy(source: Tensor, target: Tensor) -> None:
    if source.data_ptr() != target.data_ptr():  # DeepSpeed gathers and scatters in place
        target.copy_(source.view_as(target))


def _done() -> dist.Work:
    return cast(dist.Work, FakeWork())


def join(rank: int, world: int) -> None:
    """Make this process rank `rank` of a job of `world` ranks, the others of which are absent."""
    dist.Backend.register_backend(BACKEND, AbsentPeers, devices=["cpu", "cuda"])
    dist.init_process_group(BACKEND, store=dist.HashStore(), rank=rank, world_size=world)
    init_distributed()
    # DeepSpeed compares ranks' lists by a broadcast of the first rank's, into what any other has left empty: let this
    # one compare with its own.
    zero_utils.dist = SimpleNamespace(get_rank=lambda: 0, broadcast=zero_utils.dist.broadcast)
