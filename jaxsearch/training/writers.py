"""Metrics as JSON lines and TensorBoard events, and a progress bar."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX import SummaryWriter
from tqdm import tqdm

TIMING = (
    "examples_per_s", "tokens_per_s", "step_seconds", "data_wait", "batches_ahead", "seconds", "mfu", "memory_gib",
)  # fmt: skip
"""Keys of a row that tell how fast, not what: they differ between two runs of one experiment."""


def _keep(row: Mapping[str, object], step: int, log_every: int) -> bool:
    """Return whether an uninterrupted run would have written this row by `step`."""
    number = row["step"]
    assert isinstance(number, int)
    if number < step:
        return True
    # The run that stopped here may have written its last rows out of turn.
    return number == step and (row["kind"] == "eval" or (row["kind"] == "train" and step % log_every == 0))


class MetricsWriter:
    """Rows of `metrics.jsonl`, mirrored to TensorBoard; does nothing on other processes than the first.

    A row holds `step` (completed steps), `kind` (train, eval or final) and numbers; a number that is not
    finite becomes null.

    Args:
        workdir: folder of the run.
        step: step the run starts at; rows from beyond it are removed.
        log_every: the run's logging cadence.
        enabled: whether this process writes.
    """

    def __init__(self, workdir: Path, *, step: int, log_every: int, enabled: bool = True) -> None:
        self._path = workdir / "metrics.jsonl"
        self._enabled = enabled
        self._tensorboard: SummaryWriter | None = None
        if not enabled:
            return
        rows = []
        if self._path.exists():
            lines = self._path.read_text().splitlines()
            # A killed run can leave half a line at the end.
            rows = [line for line in lines if line.endswith("}") and _keep(json.loads(line), step, log_every)]
        temporary = self._path.with_name(self._path.name + ".tmp")
        temporary.write_text("".join(f"{row}\n" for row in rows if step > 0))
        os.replace(temporary, self._path)
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Append one row."""
        if not self._enabled:
            return
        assert self._tensorboard is not None
        numbers = {name: float(value) for name, value in values.items()}
        row = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, "kind": kind, **row}, allow_nan=False) + "\n")
        for name, value in numbers.items():
            self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Write out what TensorBoard still holds."""
        if self._tensorboard is not None:
            self._tensorboard.close()


class Progress:
    """A progress bar on a terminal, a line for each row of metrics elsewhere; measures throughput.

    Args:
        name: shown in front.
        start: completed steps.
        steps: steps in all.
        batch_size: examples in a step.
        enabled: whether this process prints.
    """

    def __init__(self, name: str, start: int, steps: int, batch_size: int, enabled: bool = True) -> None:
        self._name, self._steps, self._batch_size = name, steps, batch_size
        self._bar = tqdm(
            total=steps, initial=start, desc=name, unit="step", disable=not (enabled and sys.stderr.isatty())
        )
        self._print = enabled and self._bar.disable
        self._began = time.perf_counter()
        self.restart()

    def restart(self) -> None:
        """Start a new measurement: after a row, after compilation, after an evaluation."""
        self._since = time.perf_counter()
        self._count = 0
        self._waited = 0.0
        self._ahead = 0
        self._tokens = 0

    def advance(self, waited: float, ahead: int = 0, tokens: int = 0) -> None:
        """Count a step.

        Args:
            waited: seconds it waited for its batch.
            ahead: batches that were ready behind it.
            tokens: how many its batch has, padding left out.
        """
        self._count += 1
        self._tokens += tokens
        self._waited += waited
        self._ahead += ahead
        self._bar.update()

    def timing(self) -> dict[str, float]:
        """Return throughput since the last restart, the share of time spent waiting for data, and how many batches were ready."""
        now = time.perf_counter()
        elapsed = max(now - self._since, 1e-9)
        return {
            "examples_per_s": self._count * self._batch_size / elapsed,
            "tokens_per_s": self._tokens / elapsed,
            "step_seconds": elapsed / max(self._count, 1),
            "data_wait": self._waited / elapsed,
            "batches_ahead": self._ahead / max(self._count, 1),
            "seconds": now - self._began,
        }

    def show(self, step: int, row: Mapping[str, float]) -> None:
        """Show the loss and the speed of a row."""
        self._bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
        if self._print:
            rate = row["examples_per_s"] / self._batch_size
            left = tqdm.format_interval((self._steps - step) / rate) if rate else "?"
            print(
                f"{self._name} {step}/{self._steps} loss {row['loss']:.4f}, "
                f"{row['examples_per_s']:.1f} examples/s, waiting for data {row['data_wait']:.0%}, "
                f"{left} left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
