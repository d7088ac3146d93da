"""Runs that are stopped, stall or meet bad steps: what is saved, what is skipped, and how they end."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from toy_task import ToyConfig, ToyModel, ToyTask, toy_config

from jaxsearch.config import CheckpointConfig, ConfigError, FaultsConfig
from jaxsearch.training.checkpoints import CheckpointError
from jaxsearch.training.health import MEMORY, choose, examine, first_health
from jaxsearch.training.interruption import EXIT_STALLED, Preempted
from jaxsearch.training.loop import run
from jaxsearch.training.step import Batch

TESTS = Path(__file__).parent


class Stopped(ToyTask):
    """Asks its own process to end while it builds a batch."""

    def batch(self, indices: np.ndarray, rngs: Sequence[np.random.Generator]) -> Batch:
        if len(self.built) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().batch(indices, rngs)


def weights(workdir: Path) -> np.ndarray:
    return np.load(workdir / "model" / "weights.npz")["inner"]


def rows(workdir: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in lines if row["kind"] == kind]


def test_sigterm_saves_and_the_resumed_run_ends_the_same(tmp_path: Path) -> None:
    config = toy_config(task=ToyConfig(noise_scale=0.1), steps=20)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match=r"saved after step \d+, start it again"):
        run(config, tmp_path / "parts", task=Stopped(config.task))  # type: ignore[arg-type]
    assert signal.getsignal(signal.SIGTERM) is before
    saved = [int(folder.name) for folder in (tmp_path / "parts" / "checkpoints").iterdir()]
    assert 1 <= max(saved) < 20
    assert not (tmp_path / "parts" / "model").exists()
    assert run(config, tmp_path / "parts") == run(config, tmp_path / "whole")
    np.testing.assert_array_equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_a_bad_step_is_skipped_and_counted(tmp_path: Path) -> None:
    """Example 7 is in one of three steps of 8 out of 24; the others learn."""
    task = ToyConfig(poison=7)
    with pytest.raises(FloatingPointError, match=r"set faults.on_bad_step to skip"):
        run(toy_config(task=task, steps=6, log_every=3), tmp_path / "stop")
    skip = FaultsConfig(on_bad_step="skip")
    run(toy_config(task=task, steps=6, log_every=3, faults=skip), tmp_path / "skip")
    assert [row["skipped"] for row in rows(tmp_path / "skip", "train")] == pytest.approx([1 / 3, 1 / 3])
    assert all(np.isfinite(row["loss"]) for row in rows(tmp_path / "skip", "train"))
    assert np.isfinite(weights(tmp_path / "skip")).all()


def test_too_many_bad_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    config = toy_config(
        task=ToyConfig(poison=7), batch_size=24, faults=FaultsConfig(on_bad_step="skip", skip_limit=2)
    )
    with pytest.raises(FloatingPointError, match=r"faults.skip_limit = 2 steps in a row, the last at step 3"):
        run(config, tmp_path)


@pytest.mark.parametrize(("loss", "good"), [(2.9, True), (3.1, False), (float("nan"), False)])
def test_a_spike_is_a_loss_above_the_running_mean(loss: float, good: bool) -> None:
    config = FaultsConfig(spike_factor=3.0, on_bad_step="skip")
    health = first_health()
    for _ in range(MEMORY):
        found, health, stop = examine(config, health, jnp.float32(1), jnp.float32(1))
        assert bool(found)
    found, after, stop = examine(config, health, jnp.float32(loss), jnp.float32(1))
    assert (bool(found), bool(stop)) == (good, False)
    assert int(after["skipped"]) == (0 if good else 1)
    assert float(after["loss"]) == pytest.approx(1 + (loss - 1) / MEMORY if good else 1)


def test_a_first_loss_is_no_spike_and_stop_stops_at_once() -> None:
    config = FaultsConfig(spike_factor=2.0)
    found, health, stop = examine(config, first_health(), jnp.float32(100), jnp.float32(1))
    assert (bool(found), bool(stop), float(health["loss"])) == (True, False, 100)
    assert bool(examine(config, health, jnp.float32(1), jnp.float32(np.inf))[2])


def test_choose_keeps_the_old_values_after_a_bad_step() -> None:
    new, old = {"a": jnp.array([np.nan, 2.0])}, {"a": jnp.array([3.0, 4.0])}
    np.testing.assert_array_equal(choose(jnp.array(False), new, old)["a"], [3, 4])
    np.testing.assert_array_equal(choose(jnp.array(True), new, old)["a"], [np.nan, 2])


@dataclass(frozen=True)
class PeakConfig(ToyConfig):
    """An evaluation that is best in the middle."""


class Peak(ToyTask):
    """Says .1, .9, .5, .3, .3 ..."""

    figures = (0.1, 0.9, 0.5, 0.3)
    asked = 0

    def evaluate(self, model: ToyModel) -> dict[str, float]:
        self.asked += 1
        return {"quality": self.figures[min(self.asked, 4) - 1]} | super().evaluate(model)


def test_the_best_state_is_kept_and_exported(tmp_path: Path) -> None:
    best = CheckpointConfig(best="quality")
    config = toy_config(steps=12, eval_every=3, checkpoint=best)
    run(config, tmp_path / "best", task=Peak(PeakConfig()))
    assert [folder.name for folder in (tmp_path / "best" / "best").iterdir()] == ["6"]
    plain = toy_config(steps=12, checkpoint=CheckpointConfig(every=6, keep=2))
    run(plain, tmp_path / "six", stop_at=6)
    figures = run(toy_config(steps=12, eval_every=3), tmp_path / "last")
    norms = {row["step"]: row["norm"] for row in rows(tmp_path / "last", "eval")}
    assert np.linalg.norm(weights(tmp_path / "best")) == pytest.approx(norms[6], rel=1e-6)
    assert norms[6] != pytest.approx(figures["norm"], rel=1e-4)


def test_a_metric_that_is_not_evaluated_is_named(tmp_path: Path) -> None:
    config = toy_config(eval_every=2, checkpoint=CheckpointConfig(best="dev/ndcg@10"))
    with pytest.raises(ConfigError, match=r"checkpoint.best is 'dev/ndcg@10', the evaluation has norm"):
        run(config, tmp_path)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    config = toy_config(steps=6, checkpoint=CheckpointConfig(every=3, keep=2))
    run(config, tmp_path, stop_at=4)
    for file in (tmp_path / "checkpoints" / "4").rglob("*"):
        if file.is_file() and file.stat().st_size:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"checkpoints/4 cannot be read .*Delete that folder"):
        run(config, tmp_path)


def test_a_step_that_never_ends_ends_the_process_with_its_stacks(tmp_path: Path) -> None:
    program = f"""
import sys, threading
sys.path.insert(0, {str(TESTS)!r})
from toy_task import ToyTask, toy_config
from jaxsearch.config import FaultsConfig
from jaxsearch.training.loop import run

class Stuck(ToyTask):
    def batch(self, indices, rngs):
        if len(self.built) == 5:
            threading.Event().wait()
        return super().batch(indices, rngs)

config = toy_config(faults=FaultsConfig(watchdog_seconds=1.0), steps=200)
run(config, {str(tmp_path)!r}, task=Stuck(config.task))
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == EXIT_STALLED
    assert "faults.watchdog_seconds = 1" in done.stderr
    assert "in batch" in done.stderr


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"on_bad_step": "ignore"}, "faults.on_bad_step is 'ignore': expected stop or skip"),
        ({"spike_factor": 0.5}, "faults.spike_factor is 0.5"),
        ({"skip_limit": -1}, "faults.skip_limit is -1"),
        ({"watchdog_seconds": float("inf")}, "faults.watchdog_seconds is inf"),
    ],
)
def test_faults_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FaultsConfig(**values)
