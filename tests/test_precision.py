import jax
import numpy as np
import pytest
from flax import nnx
from small_market import STUDENT, filled

from jaxsearch.errors import InputError
from jaxsearch.models.int8 import INPUT_AXES, int8_weights
from jaxsearch.models.scorer import Scorer
from jaxsearch.scoring.precision import compare_rankings
from jaxsearch.scoring.prefill import PrefillScorer


@pytest.fixture(scope="module")
def scorer():
    return filled(lambda rngs: Scorer(STUDENT, label_ids=[1, 2], actions=1, rngs=rngs), 0)


def test_rankings_are_compared_by_hand():
    grades = [np.array([4, 0, 1]), np.array([0, 4]), np.array([2, 2])]
    reference = [np.array([3.0, 2.0, 1.0]), np.array([0.0, 1.0]), np.array([1.0, 0.0])]
    lower = [np.array([2.5, 2.0, 1.0]), np.array([1.0, 0.5]), np.array([0.0, 1.0])]
    report = compare_rankings([*reference, np.zeros(0)], [*lower, np.zeros(0)], [*grades, np.zeros(0)])
    assert report.queries == 3
    assert report.max_abs_diff == 1.0
    assert report.top1_flips == pytest.approx(2 / 3)  # the third query's two documents are equally good
    assert report.ndcg1_flips == pytest.approx(1 / 3)
    assert report.top10_changes == 0
    assert report.ndcg10_change == pytest.approx((1 / np.log2(3) - 1) / 3)
    with pytest.raises(InputError, match="no candidates"):
        compare_rankings([np.zeros(0)], [np.zeros(0)], [np.zeros(0)])


def test_int8_scores_are_those_of_the_rounded_weights(scorer):
    pytest.importorskip("qwix")
    state = nnx.state(scorer)
    rounded = nnx.clone(scorer)
    for path, value in nnx.to_flat_state(int8_weights(state)):
        array = value.get_value()
        if path[-1] not in INPUT_AXES:
            assert not hasattr(array, "qvalue")
            continue
        assert array.qvalue.dtype == np.int8
        weights = np.asarray(getattr(rounded.decoder.layers, path[-1])[...])
        largest = np.abs(weights).max(axis=INPUT_AXES[path[-1]], keepdims=True)
        np.testing.assert_allclose(array.scale, largest / 127, rtol=0.01)
        back = np.asarray(array.qvalue) * np.asarray(array.scale)
        assert np.abs(back - weights).max() <= 0.51 * np.asarray(array.scale).max()
        getattr(rounded.decoder.layers, path[-1])[...] = jax.numpy.asarray(back)
    random = np.random.default_rng(0)
    items = [[random.integers(0, 50, random.integers(1, 9)).tolist() for _ in range(20)]]
    full = PrefillScorer(scorer).score_lists([[1, 2, 3]], items)[0]
    expected = PrefillScorer(rounded).score_lists([[1, 2, 3]], items)[0]
    for unrolled in (False, True):
        found = PrefillScorer(scorer, int8=True, unrolled=unrolled).score_lists([[1, 2, 3]], items)[0]
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert 1e-4 < np.abs(found - full).max() < 1


def test_a_missing_package_is_named(scorer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "qwix", None)
    with pytest.raises(InputError, match=r"pip install 'jaxsearch\[int8\]'"):
        PrefillScorer(scorer, int8=True)
