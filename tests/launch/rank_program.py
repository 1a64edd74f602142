"""Stands where `training.train` would under the real launcher: says what it was given, then does as told.

Arguments, after those of a run: FOLDER for a file a rank, and one of done, mistake, fails, killed, soon, wait.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from training.errors import LEFT
from training.heartbeat import Heartbeat

KEPT = ("RANK", "WORLD_SIZE", "DS_ACCELERATOR", "OMP_NUM_THREADS", "GLIBC_TUNABLES", "PYTHONUNBUFFERED")


def main() -> None:
    time.sleep(1)  # a real rank takes longer to import torch
    folder, ending = Path(sys.argv[-2]), sys.argv[-1]
    rank = os.environ["RANK"]
    facts = {
        "pid": os.getpid(),
        "arguments": sys.argv[1:-2],
        "environment": {key: os.environ[key] for key in KEPT},
    }
    (folder / f"{rank}.json").write_text(json.dumps(facts))
    if ending == "mistake":
        sys.exit(2)
    if ending == "killed" and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if ending == "fails" and rank == "1":
        time.sleep(2)  # until the other has ended
        sys.exit(7)
    if ending == "soon":
        time.sleep(2)
    if ending in ("killed", "wait"):
        heartbeat = Heartbeat()
        heartbeat.open(folder / "beats", int(rank))

        def save(*_: object) -> None:
            time.sleep(0.5)
            (folder / f"{rank}.saved").touch()
            heartbeat.end(LEFT)
            sys.exit(LEFT)

        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, save)
        time.sleep(60)


if __name__ == "__main__":
    main()
