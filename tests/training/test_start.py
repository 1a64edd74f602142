"""What a rank starts with, and what it leaves behind."""

import os
import subprocess
import sys
from pathlib import Path

from tests.ranks import ENVIRONMENT, run_ranks
from training.errors import UserError
from training.start import check_alike, init_distributed

SHARED_MEMORY = Path("/dev/shm")


def start() -> tuple[set[str], bool]:
    init_distributed()
    return shared_memory(), "torch._inductor" in sys.modules


def shared_memory() -> set[str]:
    """DeepSpeed's, by name."""
    return {file.name for file in SHARED_MEMORY.glob("deepspeed*")}


def test_ranks_take_no_shared_memory_and_load_no_compiler():
    before = shared_memory()
    for taken, compiler in run_ranks(2, start):
        assert taken <= before, "nobody frees it: it would stay taken after the ranks' end"
        assert not compiler
    assert shared_memory() <= before


def unlike() -> str:
    init_distributed()
    own = {"bf16": {"enabled": os.environ["RANK"] == "0"}, "zero_optimization": {"stage": 3}}
    check_alike({"zero_optimization": {"stage": 3}})
    try:
        check_alike(own)
    except UserError as error:
        return str(error)
    return ""


def test_a_rank_whose_settings_are_not_the_first_ones_says_which():
    first, second = run_ranks(2, unlike)
    assert first == "" and "the ds_config comes to bf16.enabled=False (rank 0: True): say in the recipe's ds" in second


LEAVE = """
import atexit, sys, threading, time
from training.start import init_distributed, leave
init_distributed()
atexit.register(print, "at the end")
threading.Thread(target=lambda: (time.sleep(1), print("written"))).start()
print("said")
print("told", file=sys.stderr)
leave(7)
"""


def test_a_rank_leaves_with_its_code_and_all_that_it_said() -> None:
    """And without Python's own end, in which a thread of gloo may abort it."""
    environment = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    done = subprocess.run(
        [sys.executable, "-c", LEAVE], env=environment | ENVIRONMENT, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout) == (7, "said\nwritten\n") and "told" in done.stderr
