"""Profiler traces on demand: of the steps that the configuration names, or after SIGUSR1."""

import logging
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import jax

log = logging.getLogger(__name__)
ASKED = 5
"""Steps that are traced after SIGUSR1."""


class Profiler:
    """Writes traces for XProf and TensorBoard to `folder`.

    Args:
        folder: where traces go.
        steps: the first step to trace and how many; None: none until SIGUSR1 comes.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None) -> None:
        self._folder, self._steps = folder, steps
        self._until, self._asked, self._old = 0, False, None
        self._handles = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        if self._handles:
            self._old = signal.signal(signal.SIGUSR1, self._ask)  # type: ignore[assignment]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handles:
            signal.signal(signal.SIGUSR1, self._old)
        self._stop()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def before(self, step: int, state: Any) -> None:
        """Start or end a trace before this step; `state` is what the steps before it give."""
        if self._until and step >= self._until:
            jax.block_until_ready(state)
            self._stop()
        first, count = self._steps or (0, 0)
        if not self._until and (step == first or self._asked):
            self._until = step + (count if step == first else ASKED)
            self._asked = False
            jax.profiler.start_trace(str(self._folder))

    def _stop(self) -> None:
        if self._until:
            self._until = 0
            jax.profiler.stop_trace()
            log.info("a trace is in %s", self._folder)
