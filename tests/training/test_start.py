"""What a rank starts with, and what it leaves behind."""

import os
import sys
from pathlib import Path

from tests.ranks import run_ranks
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
