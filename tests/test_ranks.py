"""The helper that runs real ranks."""

import os
import time

import pytest

from tests.ranks import run_ranks
from training.errors import UserError


class Unpicklable(Exception):
    def __init__(self, name: str, value: int):
        super().__init__(name)


def environment() -> dict[str, str]:
    return dict(os.environ)


def rank_one_fails(how: str) -> None:
    if os.environ["RANK"] == "1":
        if how == "mistake":
            raise UserError("experts=3: not divisible")
        if how == "unpicklable":
            raise Unpicklable("name", 1)
        if how == "dies":
            os._exit(3)
    time.sleep(60)


def test_ranks_answer_in_order_with_their_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("M6_OF_THIS_TEST", "seen")
    monkeypatch.delenv("HOME")
    answers = run_ranks(2, environment)
    assert [answer["RANK"] for answer in answers] == ["0", "1"]
    for answer in answers:
        assert answer["M6_OF_THIS_TEST"] == "seen" and "HOME" not in answer
        assert (answer["WORLD_SIZE"], answer["OMP_NUM_THREADS"], answer["DS_ACCELERATOR"]) == (
            "2",
            "1",
            "cpu",
        )
        assert answer["LOCAL_RANK"] == answer["RANK"]
    assert answers[0]["MASTER_PORT"] == answers[1]["MASTER_PORT"]


def test_a_ranks_mistake_is_raised_here_with_its_traceback_and_ends_the_others():
    start = time.monotonic()
    with pytest.raises(UserError, match="experts=3") as caught:
        run_ranks(2, rank_one_fails, "mistake")
    assert "on rank 1" in caught.value.__notes__[0]
    assert "in rank_one_fails" in caught.value.__notes__[0]
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(("how", "says"), [("unpicklable", "Unpicklable: name"), ("dies", "rank 1 died")])
def test_failures_that_cannot_be_sent_are_told(how: str, says: str):
    with pytest.raises(RuntimeError, match=says):
        run_ranks(2, rank_one_fails, how)


def test_ranks_that_hang_are_named():
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] within 2 s"):
        run_ranks(2, rank_one_fails, "hangs", timeout=2.0)
