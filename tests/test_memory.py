import numpy as np
import pytest
from small_market import STUDENT, filled

from jaxsearch.errors import InputError
from jaxsearch.models.scorer import Scorer
from jaxsearch.scoring.buckets import Buckets, Shape
from jaxsearch.scoring.memory import SHARE, fit_memory, free_bytes, program_bytes
from jaxsearch.scoring.prefill import PrefillScorer


@pytest.fixture(scope="module")
def scorer():
    return filled(lambda rngs: Scorer(STUDENT, label_ids=[1, 2], actions=0, rngs=rngs), 0)


def test_calls_are_as_large_as_memory_allows(scorer):
    prefill = PrefillScorer(scorer, buckets=Buckets())
    row = program_bytes(prefill.compile(Shape(1, 8, 1, 16)))
    tokens = fit_memory(prefill, 8, 16, limit=8 * row)
    rows = (tokens - 8) // 16
    assert rows > 1
    assert program_bytes(prefill.compile(Shape(1, 8, rows, 16))) <= SHARE * 8 * row
    assert program_bytes(prefill.compile(Shape(1, 8, 2 * rows, 16))) > SHARE * 8 * row
    assert prefill.buckets.tokens == tokens
    assert prefill.buckets.rows[-1] == rows
    assert prefill.compiled_shapes == ()
    # More candidates than fit are split without anyone noticing.
    items = [[[1 + i % 5] * (1 + i % 16) for i in range(3 * rows)]]
    found = prefill.score_lists([[1, 2]], items)[0]
    assert prefill.usage.calls > 1
    np.testing.assert_allclose(
        found[:40], PrefillScorer(scorer).score_lists([[1, 2]], [items[0][:40]])[0], atol=1e-4
    )


def test_too_little_memory_is_named(scorer):
    with pytest.raises(InputError, match="one row of 16 tokens behind a prefix of 8 needs"):
        fit_memory(PrefillScorer(scorer), 8, 16, limit=1000)


def test_free_memory_is_known_on_any_device():
    assert free_bytes() > 1 << 20
