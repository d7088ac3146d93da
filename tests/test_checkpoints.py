"""Stopped and resumed equals uninterrupted, bit for bit; another experiment is not resumed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from toy_task import ToyConfig, ToyData, ToyTask, toy_config

from jaxsearch.config import CheckpointConfig, ConfigError, MeshConfig, OptimizerConfig, TrainConfig, to_dict
from jaxsearch.training.checkpoints import Checkpoints, config_differences
from jaxsearch.training.loop import Trainer, run
from jaxsearch.training.sharding import make_mesh
from jaxsearch.training.writers import TIMING


def rows(workdir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMING} for row in lines]


def restored(config: TrainConfig, workdir: Path) -> Any:
    """Return the latest saved state of a run."""
    task = ToyTask(config.task)  # type: ignore[arg-type]
    trainer = Trainer(config, task, make_mesh(config.mesh))
    trainer.compile(task.batch(np.arange(config.batch_size), [np.random.default_rng(0)] * config.batch_size))
    checkpoints = Checkpoints(workdir, config.checkpoint)
    latest = checkpoints.latest()
    assert latest is not None
    state = checkpoints.restore(latest, trainer.state)
    checkpoints.close()
    return state


def assert_same(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("stop", [3, 5])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path: Path, stop: int) -> None:
    config = toy_config(
        task=ToyConfig(noise_scale=0.1), eval_every=4, optimizer=OptimizerConfig(warmup_steps=2)
    )
    whole = run(config, tmp_path / "whole")
    assert run(config, tmp_path / "parts", stop_at=stop) == {}
    assert not (tmp_path / "parts" / "model").exists()
    assert run(config, tmp_path / "parts") == whole
    assert_same(restored(config, tmp_path / "whole"), restored(config, tmp_path / "parts"))
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


def test_a_longer_run_goes_on_where_the_shorter_ended(tmp_path: Path) -> None:
    """The rows that the shorter run wrote at its end are no part of the longer one."""
    long = toy_config(optimizer=OptimizerConfig(decay_steps=10), log_every=4)
    whole = run(long, tmp_path / "whole")
    run(dataclasses.replace(long, steps=6), tmp_path / "parts")
    assert [(row["kind"], row["step"]) for row in rows(tmp_path / "parts")][-2:] == [
        ("train", 6),
        ("final", 6),
    ]
    assert run(long, tmp_path / "parts") == whole
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


def test_a_killed_run_repeats_what_was_not_saved(tmp_path: Path) -> None:
    config = toy_config(checkpoint=CheckpointConfig(every=4), log_every=2)
    whole = run(config, tmp_path / "whole")

    class Killed(ToyTask):
        def batch(self, indices: np.ndarray, rngs: Any) -> dict[str, Any]:
            if len(self.built) == 8:
                raise InterruptedError
            return super().batch(indices, rngs)

    with pytest.raises(InterruptedError):
        run(config, tmp_path / "parts", task=Killed(ToyConfig()))
    assert [row["step"] for row in rows(tmp_path / "parts")] == [2, 4, 6]
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "kind')  # half a line
    assert run(config, tmp_path / "parts") == whole
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert_same(restored(config, tmp_path / "whole"), restored(config, tmp_path / "parts"))


def test_half_written_checkpoints_are_ignored_and_old_ones_removed(tmp_path: Path) -> None:
    config = toy_config(checkpoint=CheckpointConfig(every=2, keep=2))
    run(config, tmp_path, stop_at=6)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir() if path.name.isdigit()) == ["4", "6"]
    (folder / "8.orbax-checkpoint-tmp-1").mkdir()
    (folder / "8.orbax-checkpoint-tmp-1" / "default").mkdir()
    checkpoints = Checkpoints(tmp_path, config.checkpoint)
    assert checkpoints.latest() == 6
    checkpoints.close()


def test_restores_onto_another_mesh(tmp_path: Path) -> None:
    config = toy_config(task=ToyConfig(noise_scale=0.1))
    whole = run(config, tmp_path / "whole")
    run(config, tmp_path / "parts", stop_at=5)
    moved = dataclasses.replace(config, mesh=MeshConfig(2, 2, 2))
    before, after = restored(config, tmp_path / "parts"), restored(moved, tmp_path / "parts")
    assert_same(before, after)
    assert len(after.params["inner"].sharding.device_set) == 8
    assert after.params["inner"].addressable_shards[0].data.shape == (2, 4)
    assert run(moved, tmp_path / "parts")["norm"] == pytest.approx(whole["norm"], rel=1e-5)


def test_another_experiment_is_refused(tmp_path: Path) -> None:
    config = toy_config()
    run(config, tmp_path, stop_at=2)
    changed = dataclasses.replace(
        config, seed=1, task=ToyConfig(data=ToyData(30)), optimizer=OptimizerConfig(learning_rate=0.5)
    )
    with pytest.raises(ConfigError) as error:
        run(changed, tmp_path)
    message = str(error.value)
    for part in ("seed: 0 -> 1", "task.data.examples: 24 -> 30", "optimizer.learning_rate: 0.001 -> 0.5"):
        assert part in message
    assert "batch_size" not in message
    assert json.loads((tmp_path / "config.json").read_text()) == to_dict(config)
    allowed = dataclasses.replace(
        config,
        steps=12,
        log_every=3,
        eval_every=6,
        checkpoint=CheckpointConfig(1, 1),
        mesh=MeshConfig(data=2),
    )
    run(allowed, tmp_path)
    with pytest.raises(ConfigError, match=r"steps is 10, but .* holds a checkpoint after 12"):
        run(config, tmp_path)


def test_settings_that_came_later_do_not_stop_a_run(tmp_path: Path) -> None:
    """A run of an older version goes on where the new settings are at their defaults, and only there."""
    config = toy_config()
    run(config, tmp_path, stop_at=2)
    saved = to_dict(config)
    del saved["task"]["data"]["examples"], saved["seed"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    changed = dataclasses.replace(config, task=ToyConfig(data=ToyData(30)))
    with pytest.raises(ConfigError, match=r"task.data.examples: 24 -> 30\): "):
        run(changed, tmp_path)
    run(config, tmp_path, stop_at=4)
    assert json.loads((tmp_path / "config.json").read_text()) == to_dict(config)


def test_differences_name_absent_fields() -> None:
    old = {"steps": 1, "task": {"class": "A", "x": 1}}
    new = {"steps": 2, "task": {"class": "B", "y": [1]}}
    assert config_differences(old, new) == [
        "task.class: 'A' -> 'B'",
        "task.x: 1 -> '(absent)'",
        "task.y: '(absent)' -> [1]",
    ]
