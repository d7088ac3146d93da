"""Batches are a pure function of (seed, step), whatever the number of processes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsearch.data.pipeline import Pipeline


class Numbers:
    """Examples 0, ..., n - 1 with a random number each."""

    def __init__(self, count: int, broken: int = -1) -> None:
        self.num_examples = count
        self.broken = broken

    def batch(self, indices: np.ndarray, rngs: Sequence[np.random.Generator]) -> dict[str, Any]:
        if self.broken in indices:
            raise KeyError(f"example {self.broken}")
        return {"index": np.array(indices), "random": np.array([rng.random() for rng in rngs])}


def make(count: int = 22, batch_size: int = 4, seed: int = 0, process: tuple[int, int] = (0, 1)) -> Pipeline:
    return Pipeline(Numbers(count), batch_size=batch_size, seed=seed, process=process)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


def test_batches_resume_anywhere() -> None:
    whole = list(make().batches(0, 13))
    assert len(whole) == 13
    for start in (0, 1, 5, 12):
        resumed = list(make().batches(start, 13))
        assert len(resumed) == 13 - start
        assert all(same(a, b) for a, b in zip(whole[start:], resumed, strict=True))
    assert same(whole[7], make().batch(7))


@settings(max_examples=20, deadline=None)
@given(st.integers(8, 40), st.sampled_from([2, 4, 8]), st.integers(0, 30), st.integers(0, 2**32 - 1))
def test_processes_share_the_batch(count: int, processes: int, step: int, seed: int) -> None:
    one = make(count, 8, seed).batch(step)
    parts = [make(count, 8, seed, (index, processes)).batch(step) for index in range(processes)]
    assert same(one, {name: np.concatenate([part[name] for part in parts]) for name in one})


def test_an_epoch_holds_an_example_at_most_once() -> None:
    pipeline = make(22, 4)
    epochs = [np.concatenate([pipeline.indices(5 * epoch + i) for i in range(5)]) for epoch in range(3)]
    assert all(len(set(epoch.tolist())) == 20 for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3
    assert set(np.concatenate([pipeline.indices(i) for i in range(100)]).tolist()) == set(range(22))


def test_seed_and_step_decide() -> None:
    assert make(seed=1).indices(0).tolist() != make(seed=2).indices(0).tolist()
    assert make(seed=0).indices(5).tolist() != make(seed=1).indices(0).tolist()  # another epoch, another seed
    first = make(4, 4)
    assert sorted(first.indices(0)) == sorted(first.indices(1))
    # An example's randomness changes from epoch to epoch.
    assert set(first.batch(0)["random"]).isdisjoint(first.batch(1)["random"])
    assert len({*make().batch(0)["random"]}) == 4


def test_misfits_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size 5 exceeds the 4 training examples"):
        make(4, 5)
    with pytest.raises(ValueError, match="batch_size 4 is not a multiple of the 3 processes"):
        make(8, 4, process=(0, 3))


def test_an_error_in_the_thread_is_raised() -> None:
    pipeline = Pipeline(Numbers(8, broken=3), batch_size=8, seed=0)
    with pytest.raises(KeyError, match="example 3"):
        next(pipeline.batches(0, 1))
