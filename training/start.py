"""Start DeepSpeed on this rank, without what costs seconds or memory and serves nothing here."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import io
import os
import platform
import resource
import socket
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NoReturn

import cpuinfo
import torch.distributed as dist

from training import machine
from training.errors import UserError
from training.recipe import leaves

PATIENCE = timedelta(hours=1)  # of a rank whose peers read or write; who supervises a run notices a hang much sooner


def init_distributed() -> None:
    """Form the group of all ranks, as the launcher's environment says: over NCCL on GPUs, over gloo on CPUs."""
    spare_slow_starts()
    # Gloo connects every rank with every other one, once a group: 512 ranks would meet the usual limit.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    deepspeed: Any = importlib.import_module("deepspeed")
    with _quiet():
        deepspeed.init_distributed(verbose=False, timeout=PATIENCE)


def leave(code: int) -> NoReturn:
    """End this rank: its process groups, its threads, and then the process without the rest of Python's own end.

    In that a thread of gloo which still lets go of a tensor would ask for Python, and abort (pytorch issue 190489).
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    atexit.register(_end, code)  # it runs first, but after threads that still write were waited for
    sys.exit(code)


def _end(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def check_alike(settings: Mapping[str, Any]) -> None:
    """Raise UserError on a rank whose settings are not the first one's. Collective.

    `auto` may mean one thing on one machine and another on the next; such ranks would wait for one another for ever.
    """
    mine = dict(leaves(settings))
    told: list[Any] = [mine]
    dist.broadcast_object_list(told, 0)
    first = told[0]
    other = [key for key in {**mine, **first} if mine.get(key) != first.get(key)]
    if other:
        differences = ", ".join(f"{key}={mine.get(key)} (rank 0: {first.get(key)})" for key in other)
        raise UserError(f"on {socket.gethostname()} the ds_config comes to {differences}: say in the recipe's ds which")


def spare_slow_starts() -> None:
    """Leave out what DeepSpeed would do at each start.

    ZeRO-3 imports the Muon optimizer, which at once asks torch to compile three functions: that imports the whole
    compiler. CPU Adam asks py-cpuinfo three times, which takes a second each time. And each CPU rank loads an
    operator for all-reduce in tensor-parallel inference, with 69 MB of shared memory that nobody frees: it stays
    taken after the rank's end, until the machine starts anew.
    """
    cpuinfo.get_cpu_info = functools.cache(_cpu_info if platform.machine() == "x86_64" else cpuinfo.get_cpu_info)
    compiler: Any = importlib.import_module("deepspeed.runtime.compiler")
    compile_whole, compiler.compile = compiler.compile, lambda: lambda function: function
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    compiler.compile = compile_whole
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None


def _cpu_info() -> dict[str, Any]:
    """Of what py-cpuinfo finds in a second, what DeepSpeed asks for."""
    flags, vendor = machine.cpu_flags(), machine.cpu_field("vendor_id")
    return {"arch": "X86_64", "flags": sorted(flags), "vendor_id_raw": vendor}


def _quiet() -> contextlib.AbstractContextManager[Any]:
    """DeepSpeed prints a line a rank about its operators: only for those who ask."""
    wanted = bool(os.environ.get("M6_DEBUG"))
    return contextlib.nullcontext() if wanted else contextlib.redirect_stdout(io.StringIO())
