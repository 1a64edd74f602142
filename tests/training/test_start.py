"""What a rank starts with, and what it leaves behind."""

import sys
from pathlib import Path

from tests.ranks import run_ranks
from training.start import init_distributed

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
