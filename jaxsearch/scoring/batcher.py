"""Dynamic batching: requests of many callers, put together into few calls of the scorer.

Two threads: one makes tokens of the requests that wait (one tokenizer call for all), the other has the device score those
that are ready, so that the next requests are tokenised while the device works. Neither is the caller's event loop.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from jaxsearch.errors import InputError

Request = TypeVar("Request")
Tokens = TypeVar("Tokens")
Result = TypeVar("Result")


class QueueFullError(RuntimeError):
    """More requests wait than the batcher takes; the caller may try again later."""


@dataclass(frozen=True, eq=False)
class _Waiting(Generic[Request, Result]):
    request: Request
    future: Future[Result]


class Batcher(Generic[Request, Tokens, Result]):
    """Collects requests and scores them together.

    A request's error reaches its own caller alone: when a batch fails, its requests are tried one by one. A caller who
    cancels before the work begins costs nothing, and later nobody but the device. Use it in a `with` block, or `close` it.

    Args:
      prepare: requests to tokens, one per request, in one tokenizer call.
      score: tokens to results, one per request.
      wait_ms: how long the first request of a batch waits for others; 0: only for those that are there already.
      most: requests per batch.
      room: requests that may wait; a further one is refused.

    Raises:
      InputError: a number is out of range.
    """

    def __init__(
        self,
        prepare: Callable[[Sequence[Request]], Sequence[Tokens]],
        score: Callable[[Sequence[Tokens]], Sequence[Result]],
        *,
        wait_ms: float = 2.0,
        most: int = 32,
        room: int = 256,
    ):
        for name, value, least in (("wait_ms", wait_ms, 0), ("most", most, 1), ("room", room, 1)):
            if not value >= least:
                raise InputError(f"{name} is {value}: use at least {least}")
        self._prepare, self._score, self._wait, self._most = prepare, score, wait_ms / 1e3, most
        self._waiting: queue.Queue[_Waiting | None] = queue.Queue(room)
        # One batch ready while another is on the device; more would only make the newest requests wait in here.
        self._ready: queue.Queue[list[tuple[_Waiting, Tokens]] | None] = queue.Queue(1)
        self._lock, self._closed = threading.Lock(), False
        self._threads = [
            threading.Thread(target=target, name=f"batcher-{target.__name__}", daemon=True)
            for target in (self._tokenise, self._run)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, request: Request) -> Future[Result]:
        """Hand in a request; its future holds the result or the error.

        Raises:
          QueueFullError: too many wait.
          RuntimeError: the batcher is closed.
        """
        waiting: _Waiting[Request, Result] = _Waiting(request, Future())
        with self._lock:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            try:
                self._waiting.put_nowait(waiting)
            except queue.Full:
                raise QueueFullError(
                    f"{self._waiting.maxsize} requests wait already: try again later, or give more room"
                ) from None
        return waiting.future

    async def result(self, request: Request) -> Result:
        """As `submit`, for an event loop; cancelling the task cancels the request."""
        return await asyncio.wrap_future(self.submit(request))

    def close(self) -> None:
        """Finish what waits, take nothing new, and stop."""
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> "Batcher[Request, Tokens, Result]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _collect(self) -> tuple[list[_Waiting], bool]:
        """The next batch, and whether it is the last."""
        first = self._waiting.get()
        if first is None:
            return [], True
        batch, until = [first], time.monotonic() + self._wait
        while len(batch) < self._most:
            try:
                left = until - time.monotonic()
                one = self._waiting.get(timeout=left) if left > 0 else self._waiting.get_nowait()
            except queue.Empty:
                break
            if one is None:
                return batch, True
            batch.append(one)
        return batch, False

    def _tokenise(self) -> None:
        last = False
        while not last:
            batch, last = self._collect()
            batch = [one for one in batch if one.future.set_running_or_notify_cancel()]
            tokens: list[tuple[_Waiting, Tokens]] = _one_by_one(
                self._prepare, [(one, one.request) for one in batch]
            )
            if tokens:
                self._ready.put(tokens)
        self._ready.put(None)

    def _run(self) -> None:
        while (batch := self._ready.get()) is not None:
            scored: list[tuple[_Waiting, Result]] = _one_by_one(self._score, batch)
            for waiting, result in scored:
                waiting.future.set_result(result)


def _one_by_one(work: Callable, batch: list[tuple[_Waiting, Any]]) -> list[tuple[_Waiting, Any]]:
    """What the work makes of a batch; if it fails, of each request alone: the futures of those that fail get the error."""
    if not batch:
        return []
    try:
        results = work([given for _, given in batch])
        return [(waiting, result) for (waiting, _), result in zip(batch, results, strict=True)]
    except BaseException as error:
        if len(batch) == 1:
            failed = error if isinstance(error, Exception) else CancelledError()
            batch[0][0].future.set_exception(failed)
            return []
    return [found for one in batch for found in _one_by_one(work, [one])]
