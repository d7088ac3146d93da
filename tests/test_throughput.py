"""Tokens that are no padding, the peak of the devices, and traces on demand."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from toy_task import ToyConfig, toy_config

from jaxsearch.config import ConfigError
from jaxsearch.scoring.packing import assign_rows, place_items
from jaxsearch.scoring.prefill import Prefix
from jaxsearch.training.flops import count_flops
from jaxsearch.training.loop import Trainer, run
from jaxsearch.training.sharding import make_mesh, put_batch
from jaxsearch.training.throughput import count_tokens, total_peak


def test_tokens_of_prefixes_and_packed_items_are_counted_without_padding() -> None:
    prefix = Prefix(np.zeros((2, 8), np.int32), np.arange(8)[None] < np.array([[3], [5]]))
    items: list[list[Any]] = [[[1, 2, 3], [4]], [[5, 6]]]
    rows = [assign_rows([len(item) for item in some], 4) for some in items]
    packed = place_items(items, rows, row_length=4, rows=2, slots=2)
    assert count_tokens({"prefix": prefix, "items": packed, "labels": np.ones((2, 2))}) == 8 + 6
    assert count_tokens({"tokens": np.zeros((2, 4)), "where": np.eye(2, 4, dtype=bool)}) == 2
    assert count_tokens({"x": np.ones((2, 4)), "where": np.ones(2, bool)}) == 0


def test_utilisation_is_the_steps_flops_over_the_peak(tmp_path: Path) -> None:
    """The devices' number times one device's peak; rows of a run agree with the traced step."""
    assert total_peak(2e9) == 2e9 * len(jax.devices())
    assert total_peak(0) == 0  # nothing is published of these CPUs
    config = toy_config(task=ToyConfig(), steps=10, peak_flops=1e6)
    run(config, tmp_path)
    task = config.task.build(config)
    trainer = Trainer(config, task, make_mesh(config.mesh))
    batch = task.batch(np.arange(8), [np.random.default_rng(0)] * 8)
    trainer.compile(batch)
    flops = count_flops(trainer.trace(put_batch(batch, trainer.mesh)).jaxpr)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for row in lines:
        if row["kind"] == "train":
            assert row["mfu"] * row["step_seconds"] == pytest.approx(flops / total_peak(1e6))
    assert flops >= 2 * 3 * 8 * 4 * 8 * 2 / 3  # x W forward, and its gradient


def test_the_steps_that_are_asked_for_are_traced(tmp_path: Path) -> None:
    run(toy_config(profile="3:2"), tmp_path / "a")
    assert list((tmp_path / "a" / "profile").rglob("*.xplane.pb"))
    run(toy_config(), tmp_path / "b")
    assert not (tmp_path / "b" / "profile").exists()


@pytest.mark.parametrize("value", ["5", "0:3", "a:b", "3:"])
def test_steps_that_are_no_range_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="expected FIRST:COUNT"):
        toy_config(profile=value)
