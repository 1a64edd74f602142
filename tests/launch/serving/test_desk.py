"""Requests of one task go through the model together, and tasks take turns."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from launch.serving.desk import Baton, Busy, Desk, Lane
from launch.serving.limits import Limits
from launch.serving.metrics import Metrics


def at_desk(limits: Limits, lanes: Callable[[Desk], list[Lane]], visit: Callable[[Desk], Awaitable[None]]) -> None:
    async def whole() -> None:
        desk = Desk(limits, Metrics())
        desk.open(*lanes(desk))
        try:
            await asyncio.wait_for(visit(desk), 20)
        finally:
            await asyncio.to_thread(desk.close)

    asyncio.run(whole())


def echoing(batches: list[list[Any]]) -> Callable[[list[Any]], Sequence[Any]]:
    def work(asked: list[Any]) -> list[Any]:
        batches.append(asked)
        return [f"<{one}>" for one in asked]

    return work


def test_what_waits_goes_together_by_kind_up_to_the_rows() -> None:
    batches: list[list[Any]] = []

    async def visit(desk: Desk) -> None:
        with desk.baton:  # nobody computes until all wait
            jobs = [desk.submit("a", f"{key}{n}", key=key) for n in range(4) for key in "xy"]
            jobs.append(desk.submit("a", "large", rows=9, key="z"))
            await asyncio.sleep(0.1)
        assert [await job.answer for job in jobs] == [f"<{key}{n}>" for n in range(4) for key in "xy"] + ["<large>"]
        assert desk.waiting == 0

    at_desk(Limits(rows=3, company=0), lambda desk: [Lane(desk, "a", echoing(batches), 3)], visit)
    assert batches == [["x0", "x1", "x2"], ["y0", "y1", "y2"], ["x3"], ["y3"], ["large"]]


def test_a_request_waits_some_moments_for_company() -> None:
    batches: list[list[Any]] = []

    async def visit(desk: Desk) -> None:
        first = desk.submit("a", 1)
        await asyncio.sleep(0.1)
        second = desk.submit("a", 2)
        assert await first.answer == "<1>" and await second.answer == "<2>"
        start = time.monotonic()
        full = [desk.submit("a", n) for n in range(4)]  # as many as go together: nobody is waited for
        await asyncio.gather(*(job.answer for job in full))
        assert time.monotonic() - start < 0.5

    at_desk(Limits(company=1), lambda desk: [Lane(desk, "a", echoing(batches), 4)], visit)
    assert batches == [[1, 2], [0, 1, 2, 3]]


def test_more_than_may_wait_is_refused_at_once() -> None:
    async def visit(desk: Desk) -> None:
        with desk.baton:
            jobs = [desk.submit("a", n, rows=2) for n in range(2)]
            with pytest.raises(Busy):
                desk.submit("a", 9, rows=2)
            jobs.append(desk.submit("a", 2))
        await asyncio.gather(*(job.answer for job in jobs))
        desk.submit("a", 9, rows=5)

    at_desk(Limits(queue=5, company=0), lambda desk: [Lane(desk, "a", echoing([]), 4)], visit)


def test_one_that_fails_does_not_fail_those_beside_it() -> None:
    def work(asked: list[Any]) -> list[Any]:
        if "bad" in asked:
            raise ValueError("bad")
        return asked

    async def visit(desk: Desk) -> None:
        with desk.baton:
            jobs = [desk.submit("a", one) for one in ("x", "bad", "y")]
        with pytest.raises(ValueError, match="bad"):
            await jobs[1].answer
        assert [await jobs[0].answer, await jobs[2].answer] == ["x", "y"]

    at_desk(Limits(company=0), lambda desk: [Lane(desk, "a", work, 4)], visit)


def test_a_long_work_gives_way_at_each_token_and_is_given_up_when_nobody_waits() -> None:
    ended, said = threading.Event(), 0

    def long(asked: list[Any]) -> list[Any]:
        nonlocal said
        try:
            while True:
                said += 1
                time.sleep(0.02)
                desks[0].between()
        finally:
            ended.set()

    desks: list[Desk] = []

    def lanes(desk: Desk) -> list[Lane]:
        desks.append(desk)
        return [Lane(desk, "long", long, 1), Lane(desk, "short", echoing([]), 4)]

    async def visit(desk: Desk) -> None:
        job = desk.submit("long", 0)
        while not said:
            await asyncio.sleep(0.01)
        before = said
        assert await desk.submit("short", 1).answer == "<1>"
        assert said - before <= 2 and not ended.is_set()
        job.gone = True
        await asyncio.to_thread(ended.wait, 5)
        assert ended.is_set() and not job.answer.done()
        assert await desk.submit("short", 2).answer == "<2>"

    at_desk(Limits(company=0), lanes, visit)


def test_a_job_whose_client_left_is_not_begun() -> None:
    batches: list[list[Any]] = []

    async def visit(desk: Desk) -> None:
        with desk.baton:
            gone, stays = desk.submit("a", "gone"), desk.submit("a", "stays")
            gone.gone = True
        assert await stays.answer == "<stays>"

    at_desk(Limits(company=0), lambda desk: [Lane(desk, "a", echoing(batches), 4)], visit)
    assert batches == [["stays"]]


def test_the_baton_goes_to_whoever_has_waited_longest() -> None:
    baton, order = Baton(), []

    def wait(name: int) -> None:
        with baton:
            order.append(name)

    with baton:
        threads = [threading.Thread(target=wait, args=(name,)) for name in range(5)]
        for thread in threads:
            thread.start()
            time.sleep(0.02)
        order.append("first")
        baton.pass_on()
        order.append("again")
    for thread in threads:
        thread.join()
    assert order == ["first", 0, 1, 2, 3, 4, "again"]
