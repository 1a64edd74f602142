"""Stands where DeepSpeed's launcher and its ranks would: two ranks with real heartbeats and no training.

python -m tests.launch.stub_run FOLDER ENDING [--resume]: the launcher. Each attempt adds a line to FOLDER/attempts.
At step 3 rank 1 does as ENDING says: in the first attempt (crash, hang, stop, error) or in each (always, mistake);
early ends before that, wait and deaf go on until they are asked to leave. All else ends well at step 6.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from training import heartbeat
from training.errors import LEFT, LOST_PEER, MISTAKE
from training.run import RANKS, RECIPE

STEPS, BAD_STEP = 6, 3
ONCE = ("crash", "hang", "stop", "error")


def launcher(folder: Path, arguments: list[str]) -> int:
    with (folder / "attempts").open("a") as file:
        file.write(" ".join(arguments) + "\n")
    command = [sys.executable, "-m", "tests.launch.stub_run", str(folder), *arguments]
    ranks = [subprocess.Popen(command, env=os.environ | {"RANK": str(rank)}) for rank in range(2)]
    while any(rank.poll() is None for rank in ranks):  # DeepSpeed's looks once a second
        time.sleep(0.5)
    return max((rank.returncode for rank in ranks), key=abs) % 256


def rank(folder: Path, ending: str, number: int) -> int:
    heartbeat.BEAT_SECONDS = 0.0
    own = heartbeat.Heartbeat()
    first_attempt = len((folder / "attempts").read_text().splitlines()) == 1
    if ending == "early":
        return 1
    own.open(folder / RANKS, number)
    (folder / RECIPE).touch()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(own.end(LEFT) or LEFT) if ending != "deaf" else None)
    own.begin(0)
    misbehaves = number == 1 and (first_attempt or ending not in ONCE)
    step = 0
    while step < STEPS or ending in ("wait", "deaf"):
        time.sleep(0.05)
        if number == 0 and step == BAD_STEP and (first_attempt or ending == "always"):
            if ending == "hang":
                stuck_in_a_collective()
            if ending in ("crash", "always"):
                return lost_peer(own)
        if misbehaves and step == BAD_STEP:
            misbehave(own, ending)
        step += 1
        own.beat(step)
    own.end(0)
    return 0


def misbehave(own: heartbeat.Heartbeat, ending: str) -> None:
    if ending in ("crash", "always"):
        os.kill(os.getpid(), signal.SIGKILL)
    if ending == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if ending == "hang":
        stuck_in_a_collective()
    if ending == "error":
        own.error = "ValueError: seven"
        own.end(1)
        sys.exit(1)
    if ending == "mistake":
        own.end(MISTAKE)
        sys.exit(MISTAKE)


def lost_peer(own: heartbeat.Heartbeat) -> int:
    time.sleep(2)
    own.end(LOST_PEER)
    return LOST_PEER


def stuck_in_a_collective() -> None:
    time.sleep(600)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    sys.exit(
        rank(place, sys.argv[2], int(os.environ["RANK"])) if "RANK" in os.environ else launcher(place, sys.argv[2:])
    )
