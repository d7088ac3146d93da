"""How a run ends that is not done: preempted, stalled, or left alone by the other processes."""

import faulthandler
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

import jax
from jax.experimental import multihost_utils

EXIT_PREEMPTED = 75
"""Stopped by SIGTERM after a checkpoint: start it again."""
EXIT_STALLED = 76
"""No step finished in time: stacks are on standard error."""
EXIT_LOST = 77
"""Another process of the job is gone: start all of them again."""
PATIENCE = 10
"""The first step (it compiles), evaluations and checkpoints may take so many times `faults.watchdog_seconds`."""


class Preempted(Exception):
    """The run was asked to stop, and its checkpoint is written."""


class StopRequest:
    """Turns SIGTERM into a question that the loop asks between steps; the signal's old handler returns at the end.

    In a job of several processes JAX's own preemption notice finds a step that all of them reach.
    """

    def __init__(self) -> None:
        self._asked = False
        self._old: Any = None
        self._handles = threading.current_thread() is threading.main_thread() and jax.process_count() == 1

    def __enter__(self) -> Self:
        if self._handles:
            self._old = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handles:
            signal.signal(signal.SIGTERM, self._old)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def due(self, step: int) -> bool:
        """Whether to save and end after this step; the same answer in every process."""
        if jax.process_count() == 1:
            return self._asked
        return bool(multihost_utils.reached_preemption_sync_point(step))


class Watchdog:
    """Ends the process with `EXIT_STALLED` and the stacks of all threads when no sign of life comes in time.

    Args:
        seconds: how long a step may take; 0 watches nothing.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline = float("inf")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._seconds:
            self.alive(PATIENCE)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._seconds:
            self._thread.join()

    def alive(self, patience: float = 1) -> None:
        """Something finished; what comes now may take `patience` times `seconds`."""
        self._deadline = time.monotonic() + patience * self._seconds

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() > self._deadline:
                faulthandler.dump_traceback(all_threads=True)
                _leave(
                    f"no step finished within faults.watchdog_seconds = {self._seconds:g}: the stacks of all threads stand above. "
                    "Start it again, it goes on from the last checkpoint; raise the limit if steps take that long",
                    EXIT_STALLED,
                )


def leave_lost(error: Exception) -> NoReturn:
    """End this process because it cannot go on with the others; waiting for them would take minutes and save nothing."""
    _leave(
        f"process {jax.process_index()} of {jax.process_count()} cannot go on with the others, one of them may be gone "
        f"({str(error).splitlines()[0][:300]}): start all of them again, they go on from the last checkpoint",
        EXIT_LOST,
    )


def _leave(message: str, status: int) -> NoReturn:
    print(f"train.py: {message}", file=sys.stderr, flush=True)
    os._exit(status)
