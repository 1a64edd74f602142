"""The training program: one recipe, on however many ranks the launcher started.

deepspeed --num_accelerators 2 --no_local_rank --module training.train --recipe R --name N [key=value …]
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import time
import warnings

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from training.errors import LEFT, LOST_PEER, MISTAKE, RESTARTABLE, RestartableError, UserError
from training.extensions import prepare_extensions
from training.files import NO_ROOM
from training.heartbeat import Heartbeat
from training.loop import Training
from training.parent import load_recipe
from training.run import run_folder
from training.start import init_distributed, leave
from training.stopping import StopRequested, answer

LAUNCHER_SECONDS = 5  # that a launcher may take to see that one of its ranks ended, and to end the others


def main() -> None:
    """Train on this rank. Ends with an exit code of `training.errors`, or 1, and says so in its heartbeat too."""
    arguments, heartbeat = _arguments(), Heartbeat()
    warnings.simplefilter("ignore", FutureWarning)  # of torch, at DeepSpeed's calls, once a call
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each rank reads what it needs by itself
    try:
        code = _train(arguments, heartbeat)
    except StopRequested:
        _say_once("stopped on request while it started; nothing was changed")
        code = LEFT
    except Exception as error:
        heartbeat.error = f"{type(error).__name__}: {error}"
        heartbeat.end(1)
        raise
    if code != RESTARTABLE:  # that one has told what it was
        heartbeat.end(code)
    leave(code)


def _train(arguments: argparse.Namespace, heartbeat: Heartbeat) -> int:
    training = None
    try:
        overrides = arguments.overrides + ([f"data={arguments.data}"] if arguments.data else [])
        resumed = run_folder(arguments.name) if arguments.resume else None
        recipe = load_recipe(arguments.recipe, overrides, resumed)
        prepare_extensions()
        init_distributed()
        get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", 0)))
        training = Training(recipe, arguments.name, arguments.resume, arguments.allow_change, heartbeat)
        code = training.run()
        while training.delinks and code == 0:
            before, training = training.delink(), None
            gc.collect()  # what the shared layer's engine held
            training = Training(recipe, arguments.name, True, arguments.allow_change, heartbeat, before)
            code = training.run()
        training.close()
        dist.barrier()  # whoever ends first ends the others: a launcher sees to it
        answer(signal.SIG_IGN)
        if code == LEFT:
            _say_once(f"stopped on request at step {training.step}, saved; go on with --resume")
        return code
    except UserError as error:
        return _refused(error, heartbeat)
    except OSError as error:
        if os.environ.get("M6_DEBUG") or error.errno not in NO_ROOM:
            raise
        return _refused(RestartableError(f"{error.filename}: {error.strerror}; make room, then --resume"), heartbeat)
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            port = os.environ.get("MASTER_PORT")
            return _refused(
                RestartableError(f"port {port} is taken by another program: choose --master-port"), heartbeat
            )
        if os.environ.get("M6_DEBUG") or not _lost_peer(error):
            raise
        answer(signal.SIG_DFL)
        if not (training and training.stop.heard):  # or a launcher has just asked, which knows the rank that failed
            _tell_lost_peer(training.step if training else 0)
        return LOST_PEER


def _refused(error: UserError, heartbeat: Heartbeat) -> int:
    """Tell it, and the exit code for it."""
    answer(signal.SIG_DFL)
    code = RESTARTABLE if isinstance(error, RestartableError) else MISTAKE
    heartbeat.error = str(error)
    if code == RESTARTABLE:
        heartbeat.end(code)  # a supervisor need not wait for us to tell it
    _tell(error, int(os.environ.get("RANK", 0)))
    return code


def _say_once(text: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"m6: {text}", file=sys.stderr, flush=True)


def _tell(error: UserError, rank: int) -> None:
    """One line, once: a mistake that all ranks see is told by rank 0, which ends the others while they wait."""
    if int(os.environ.get("LOCAL_RANK", rank)):  # on several machines each tells it
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


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="training.train", description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--name", required=True, help="of the run: runs/<name>")
    parser.add_argument("--data", help="folder of the corpus, instead of the recipe's")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY", help="of the recipe, on resume")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args()


if __name__ == "__main__":
    main()
