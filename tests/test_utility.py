"""The final order: sums by hand, the floor, ties, and what is refused."""

import json
import math
from typing import Any

import numpy as np
import pytest
from scipy.special import expit

from jaxsearch.errors import InputError
from jaxsearch.scoring.utility import UtilityConfig, order, parse_weights, utility

PROBABILITIES = {
    "relevance": np.array([0.9, 0.5, 0.1, 0.2]),
    "click": np.array([0.1, 0.6, 0.9, 0.8]),
    "dismiss": np.array([0.5, 0.0, 0.0, 0.1]),
}
ROWS = np.arange(4)


def ranked(config: UtilityConfig, found: dict[str, np.ndarray] = PROBABILITIES) -> list[int]:
    log_odds = np.log(found["relevance"]) - np.log1p(-found["relevance"])
    return order(config, utility(config, found), log_odds, ROWS).tolist()


def test_sums_by_hand() -> None:
    config = UtilityConfig({"relevance": 1, "click": 0.5, "dismiss": -2})
    # .9 + .05 - 1, .5 + .3, .1 + .45, .2 + .4 - .2
    np.testing.assert_allclose(utility(config, PROBABILITIES), [-0.05, 0.8, 0.55, 0.4])
    assert ranked(config) == [1, 2, 3, 0]
    assert ranked(UtilityConfig({"click": 1})) == [2, 3, 1, 0]
    assert ranked(UtilityConfig()) == [0, 1, 3, 2]


def test_below_the_floor_comes_last_by_relevance() -> None:
    for weights in ({"click": 1.0}, {"click": 1.0, "relevance": -3.0}, {"click": 1e6, "dismiss": -1e6}):
        config = UtilityConfig(weights, floor=0.3)
        assert ranked(config)[2:] == [3, 2]
        assert sorted(ranked(config)[:2]) == [0, 1]
        scores = utility(config, PROBABILITIES)
        assert np.all(np.diff(scores[ranked(config)]) < 0)  # what is written is what is ordered by
    np.testing.assert_allclose(
        utility(UtilityConfig({"click": 1, "dismiss": -2}, 0.3), PROBABILITIES), [-0.9, 0.6, -2.9, -2.8]
    )


def test_the_floor_itself_is_not_below() -> None:
    assert ranked(UtilityConfig({"click": 1}, 0.2)) == [3, 1, 0, 2]
    assert ranked(UtilityConfig({"click": 1}, math.nextafter(0.2, 1))) == [1, 0, 3, 2]
    assert ranked(UtilityConfig({"click": 1}, 1)) == [0, 1, 3, 2]


def test_ties_by_log_odds_then_by_row() -> None:
    flat = {"relevance": np.full(4, 0.5), "click": np.array([0.5, 0.5, 0.5, 0.6])}
    config = UtilityConfig({"relevance": 1, "click": 1})
    found = order(config, utility(config, flat), np.array([1.0, 2.0, 1.0, 0.0]), np.array([7, 9, 4, 1]))
    assert found.tolist() == [3, 1, 2, 0]


def test_relevance_alone_is_the_order_of_log_odds_whatever_rounding_does() -> None:
    log_odds = np.random.default_rng(0).permutation(np.linspace(-60, 60, 2000).astype(np.float32))
    for config in (UtilityConfig(), UtilityConfig({"relevance": 3.0, "click": 0.0}, 0.25)):
        found = {"relevance": expit(log_odds.astype(np.float64)), "click": np.zeros(2000)}
        assert len(np.unique(found["relevance"])) < 2000
        rows = np.arange(2000)
        np.testing.assert_array_equal(
            order(config, utility(config, found), log_odds, rows), np.argsort(-log_odds)
        )


def test_nothing_to_order() -> None:
    none = {"relevance": np.zeros(0)}
    assert (
        order(UtilityConfig(), utility(UtilityConfig(), none), np.zeros(0), np.zeros(0, int)).tolist() == []
    )


@pytest.mark.parametrize(
    ("weights", "floor", "words"),
    [
        ({}, 0, "no weight differs from 0"),
        ({"relevance": 0.0, "click": 0}, 0, "no weight differs from 0"),
        ({"click": math.nan}, 0, "the weight of 'click' is nan"),
        ({"click": -math.inf}, 0, "the weight of 'click' is -inf"),
        ({"click": 1.1e6}, 0, "the weight of 'click' is 1100000.0: give a number of at most 1,000,000"),
        ({"click": 10**400}, 0, "the weight of 'click' is 1000"),
        ({"click": "1"}, 0, "the weight of 'click' is '1'"),
        ({"click": True}, 0, "the weight of 'click' is True"),
        ({"relevance": 1}, -0.1, "the floor is -0.1: give a probability from 0 to 1"),
        ({"relevance": 1}, 1.1, "the floor is 1.1"),
        ({"relevance": 1}, math.nan, "the floor is nan"),
        ({"relevance": 1}, "0", "the floor is '0'"),
    ],
)
def test_refused(weights: Any, floor: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        UtilityConfig(weights, floor)
    assert words in str(caught.value)


def test_actions_are_the_rankers() -> None:
    UtilityConfig({"relevance": 1, "click": -1}).check(["click"])
    with pytest.raises(InputError, match="'clik' is not scored by this ranker: use relevance, click, apply"):
        UtilityConfig({"clik": 1}).check(["click", "apply"])


def test_json() -> None:
    config = UtilityConfig({"relevance": 0.1, "dismiss": -1 / 3}, 0.2)
    assert UtilityConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for values in (None, [], {}, {"weights": {"click": 1}}, {**config.to_dict(), "x": 1}):
        with pytest.raises(InputError, match="give an object of weights and floor"):
            UtilityConfig.from_dict(values)
    with pytest.raises(InputError, match=r"utility\.weights is '\[\]': give an object of numbers"):
        UtilityConfig.from_dict({"weights": [], "floor": 0})


def test_weights_in_words() -> None:
    assert parse_weights("relevance=1, click=0.2,dismiss = -5e-1") == {
        "relevance": 1,
        "click": 0.2,
        "dismiss": -0.5,
    }
    for text in ("click", "click=", "=1", "click=one", "click=nan", "click=1,", "click=1=2", "click=inf"):
        with pytest.raises(InputError, match="is no weight: write it as relevance=1"):
            parse_weights(text)
    with pytest.raises(InputError, match="'click' has two weights"):
        parse_weights("click=1,click=2")
