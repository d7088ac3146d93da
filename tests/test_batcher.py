import asyncio
import threading
from concurrent.futures import wait

import pytest

from jaxsearch.errors import InputError
from jaxsearch.scoring.batcher import Batcher, QueueFullError


class Work:
    """Doubles numbers, notes the batches, refuses odd things by name, and can be held up."""

    def __init__(self):
        self.prepared, self.scored = [], []
        self.gate, self.reached = threading.Event(), threading.Event()
        self.gate.set()

    def prepare(self, requests):
        self.prepared.append(list(requests))
        for request in requests:
            if request == "no text":
                raise InputError("query 'no text' is empty")
        return [str(request) for request in requests]

    def score(self, tokens):
        self.reached.set()
        self.gate.wait(20)
        self.scored.append(list(tokens))
        if "13" in tokens:
            raise FloatingPointError("13 is NaN")
        return [2 * int(token) for token in tokens]


@pytest.fixture
def work():
    return Work()


def held(work, batcher):
    """A first request occupies the device: whatever comes now has to wait."""
    work.gate.clear()
    first = batcher.submit(0)
    assert work.reached.wait(20)
    return first


def test_requests_that_wait_are_scored_together_and_answered_apart(work):
    with Batcher(work.prepare, work.score, wait_ms=10_000, most=5) as batcher:
        futures = [batcher.submit(i) for i in range(10)]
        assert [future.result(20) for future in futures] == [2 * i for i in range(10)]
    assert work.scored == [["0", "1", "2", "3", "4"], ["5", "6", "7", "8", "9"]]
    assert work.prepared == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_errors_reach_their_own_callers(work):
    with Batcher(work.prepare, work.score, wait_ms=10_000, most=5) as batcher:
        futures = [batcher.submit(request) for request in (1, "no text", 13, 4, 5)]
        with pytest.raises(InputError, match="'no text' is empty"):
            futures[1].result(20)
        with pytest.raises(FloatingPointError, match="13 is NaN"):
            futures[2].result(20)
        assert [futures[i].result(20) for i in (0, 3, 4)] == [2, 8, 10]
        more = [batcher.submit(i) for i in range(6, 11)]  # the threads live on
        assert [future.result(20) for future in more] == [12, 14, 16, 18, 20]


def test_the_next_requests_are_tokenised_while_the_device_works(work):
    with Batcher(work.prepare, work.score, wait_ms=0, most=1) as batcher:
        held(work, batcher)
        second = batcher.submit(1)
        while len(work.prepared) < 2:
            threading.Event().wait(0.001)
        assert work.scored == []
        work.gate.set()
        assert second.result(20) == 2


def test_the_queue_is_bounded(work):
    with Batcher(work.prepare, work.score, wait_ms=0, most=1, room=2) as batcher:
        futures = [held(work, batcher)]
        with pytest.raises(QueueFullError, match="2 requests wait already"):
            futures.extend(map(batcher.submit, range(1, 9)))  # a few more are taken on by the threads
        assert 3 <= len(futures) <= 6
        work.gate.set()
        assert [future.result(20) for future in futures] == [2 * i for i in range(len(futures))]


def test_cancelled_callers_do_not_stall_the_others(work):
    with Batcher(work.prepare, work.score, wait_ms=0, most=1) as batcher:
        held(work, batcher)
        futures = [batcher.submit(i) for i in range(1, 9)]
        cancelled = [future.cancel() for future in futures[4:7]]
        work.gate.set()
        assert futures[7].result(20) == 16
        wait(futures, 20)
    assert all(cancelled)
    assert not {"5", "6", "7"} & {token for batch in work.scored for token in batch}


def test_asyncio_callers(work):
    async def main():
        with Batcher(work.prepare, work.score, wait_ms=20) as batcher:
            given_up = asyncio.create_task(batcher.result(99))
            tasks = [asyncio.create_task(batcher.result(i)) for i in range(50)]
            await asyncio.sleep(0)
            given_up.cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(main())
    assert [type(x) for i, x in enumerate(found) if i == 13] == [FloatingPointError]
    assert [x for i, x in enumerate(found) if i != 13] == [2 * i for i in range(50) if i != 13]


def test_closing_finishes_what_waits(work):
    batcher = Batcher(work.prepare, work.score, wait_ms=10_000, most=100)
    futures = [batcher.submit(i) for i in range(7)]
    batcher.close()
    batcher.close()
    assert [future.result(0) for future in futures] == [2 * i for i in range(7)]
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(1)


@pytest.mark.parametrize(
    ("name", "value"), [("wait_ms", -1), ("wait_ms", float("nan")), ("most", 0), ("room", 0)]
)
def test_bad_numbers_are_named(work, name, value):
    with pytest.raises(InputError, match=f"{name} is {value}"):
        Batcher(work.prepare, work.score, **{name: value})
