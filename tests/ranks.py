"""Real ranks for tests: a function run in several fresh processes that can form a process group.

They are forked from one that has imported what takes seconds, and has done nothing else.
"""

import functools
import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

TIMEOUT = 120.0  # seconds, of all ranks together
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """What `function(*args)` returned on each of `world` new processes, in the order of ranks.

    `function` must be importable (at module level), arguments and results picklable. It forms the process
    group itself if it needs one; the environment for that is set. The first exception of a rank is raised
    here, with the rank's traceback as a note, and the other ranks are ended. Raises TimeoutError after `timeout`
    seconds.
    """
    context = _forks()
    port = _free_port()
    # Pickled here, so that a rank imports the function's module only after its environment is set.
    work = pickle.dumps((function, args))
    processes, pipes = [], []
    try:
        for rank in range(world):
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(send, _environment(rank, world, port), work))
            process.start()
            send.close()  # ours: with the rank's end alone open, its death ends the pipe
            processes.append(process)
            pipes.append(receive)
        return _collect(pipes, timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()


@functools.cache
def _forks() -> multiprocessing.context.ForkServerContext:
    """What ranks are forked from. Torch and DeepSpeed read their environment as they are imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _environment(rank: int, world: int, port: int) -> dict[str, str]:
    return {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        **ENVIRONMENT,
    }


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[Connection, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for pipe in pipes if pipe not in results]
        ready = wait(waiting, timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            ranks = [pipes.index(pipe) for pipe in waiting]
            raise TimeoutError(f"no result of ranks {ranks} within {timeout:.0f} s")
        for pipe in ready:
            try:
                error, result = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {pipes.index(pipe)} died without a word") from None
            if error is not None:
                raise error
            results[pipe] = result
    return [results[pipe] for pipe in pipes]


def _rank(send: Connection, environment: dict[str, str], work: bytes) -> None:
    os.environ.clear()
    os.environ.update(environment)
    try:
        function, args = pickle.loads(work)
        answer = pickle.dumps((None, function(*args)))
    except BaseException as error:
        error.add_note(f"on rank {environment['RANK']}:\n{traceback.format_exc()}")
        answer = _pickle_error(error)
    send.send_bytes(answer)
    _leave_process_group()


def _pickle_error(error: BaseException) -> bytes:
    try:
        answer = pickle.dumps((error, None))
        pickle.loads(answer)  # many an exception can be pickled, and then not be built again
        return answer
    except Exception:
        return pickle.dumps((RuntimeError("\n".join(error.__notes__)), None))


def _leave_process_group() -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
