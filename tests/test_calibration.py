"""Calibration: maps by hand, positions, what a contract may hold, and probabilities that come true on pairs that were not fitted on."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit
from small_market import STUDENT, dataset, fast_compilation, filled, small_tokenizer

from jaxsearch.data.prompts import PromptConfig
from jaxsearch.data.records import ACTIONS
from jaxsearch.errors import InputError
from jaxsearch.metrics import ece
from jaxsearch.models.contract import (
    CONTRACT_FILE,
    MAX_KNOTS,
    Contract,
    ContractError,
    Model,
    load_model,
    make_module,
    save_model,
)
from jaxsearch.scoring.calibration import (
    Calibrator,
    Knots,
    Observations,
    calibrate,
    compare,
    draw_reliability,
    fit,
    load_calibrators,
    objective_log_odds,
    observe,
    position_buckets,
    probabilities,
    reliability,
)
from jaxsearch.scoring.records import RecordScorer


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with fast_compilation():
        yield


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A ranker that was never trained."""
    folder, tokenizer = tmp_path_factory.mktemp("ranker"), small_tokenizer()
    labels = {label: tokenizer.label(label) for label in ("Yes", "No")}
    prompts = {"pair": PromptConfig("ranker", "short", "tiny", features=("near",))}
    contract = Contract("ranker", STUDENT, prompts, labels, ACTIONS["jobs"])
    save_model(folder, filled(lambda rngs: make_module(contract, rngs), 3), contract, tokenizer)
    return load_model(folder)


# --- maps ------------------------------------------------------------------------------------------------------------


def test_a_map_by_hand() -> None:
    """With one positive imagined at -1 and one negative at 1: rates 1/2, 0, 1/2 of 2, 1 and 2; the first two are pooled to 1/3."""
    found = fit([-1, 0, 1], [0, 0, 1])
    assert found.positions == ()
    np.testing.assert_allclose(found.maps[0].log_odds, [-2 / 3, 1])
    np.testing.assert_allclose(found.maps[0].probability, [1 / 3, 1 / 2])
    np.testing.assert_allclose(found([[-9, -1, 1 / 6], [1, 9, np.inf]]), [[1 / 3, 1 / 3, 5 / 12], [0.5] * 3])


@pytest.mark.parametrize(
    ("log_odds", "outcomes", "expected"),
    [
        ([-1] * 4 + [1] * 4, [0] * 4 + [1] * 4, [0.2] * 4 + [0.8] * 4),  # Laplace's rule at both ends
        (range(8), [0] * 8, [0.1] * 8),
        (range(8), [1] * 8, [0.9] * 8),
        ([5], [1], [2 / 3]),
        ([0] * 3, [0, 1, 1], [3 / 5] * 3),
        ([3, 2, 1, 0], [0, 0, 1, 1], [1 / 2] * 4),  # upside down: nothing but the mean is left
    ],
)
def test_probabilities_by_hand(log_odds: Any, outcomes: list[int], expected: list[float]) -> None:
    np.testing.assert_allclose(fit(log_odds, outcomes)(log_odds), expected)


def test_never_descending_and_never_certain() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(0, 5, 5000).astype(np.float32)
    found = fit(x, rng.random(5000) < expit(2 * x - 1))
    grid = np.concatenate([[-1e30], np.sort(np.concatenate([x, rng.uniform(-30, 30, 5000)])), [1e30]])
    values = found(grid)
    assert (np.diff(values) >= 0).all()
    assert np.isfinite(np.log(values) - np.log1p(-values)).all()
    assert len(np.unique(values)) > 1000  # steps would leave as many values as there are steps


def test_neighbouring_numbers_keep_their_order() -> None:
    """Rounding of centres and slopes may not turn anything around."""
    x = [1.0]
    for _ in range(5):
        x.append(math.nextafter(x[-1], 2))
    found = fit(x, [0, 0, 0, 1, 1, 1])
    assert np.all(np.diff(found.maps[0].log_odds) > 0)
    assert np.all(np.diff(found(x)) >= 0)
    assert found(x)[0] == pytest.approx(1 / 4)


def test_many_steps_are_thinned() -> None:
    x = np.repeat(np.arange(600.0), 601)
    y = np.tile(np.arange(601), 600) < x  # a step of its own for each value
    (knots,) = fit(x, y).maps
    assert len(knots.log_odds) == MAX_KNOTS
    assert (knots.log_odds[0], knots.log_odds[-1]) == (0, 599)
    np.testing.assert_allclose(
        Calibrator((), (knots,))(np.arange(1.0, 600)), np.arange(1, 600) / 601, atol=5e-3
    )


@pytest.mark.parametrize(
    ("log_odds", "outcomes"), [([], []), ([1.0], [1, 0]), ([float("nan")], [1]), ([float("inf")], [1]), ([[1.0]], [[1]])]
)  # fmt: skip
def test_what_cannot_be_fitted(log_odds: list, outcomes: list) -> None:
    with pytest.raises(ValueError, match="give as many finite numbers as outcomes"):
        fit(log_odds, outcomes)


# --- positions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("least", "ends"),
    [(1, (1, 3, 4, 9)), (2, (1, 4, 9)), (3, (1, 9)), (4, (9,)), (6, (9,)), (100, (9,))],
)
def test_buckets_are_contiguous_and_hold_enough_positives(least: int, ends: tuple[int, ...]) -> None:
    """Positives at positions 1, 2, 3, 4, 9: 3, 0, 1, 1, 2."""
    positions = [1, 1, 1, 1, 2, 2, 3, 3, 4, 9, 9, 9]
    outcomes = [1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0]
    assert position_buckets(positions, outcomes, least) == ends
    order = np.random.default_rng(0).permutation(12)
    assert position_buckets(np.array(positions)[order], np.array(outcomes)[order], least) == ends


def test_each_bucket_has_its_own_map() -> None:
    """Eight at positions 1 and 2 of which six come true, eight at 5 of which two do, all with one score."""
    y = [1, 1, 1, 0] * 2 + [1, 0, 0, 0] * 2
    found = fit(np.zeros(16), y, [1] * 4 + [2] * 4 + [5] * 8, least=2)
    assert found.positions == (1, 2, 5)
    np.testing.assert_allclose(found(np.zeros(5), [1, 2, 3, 5, 99]), [4 / 6, 4 / 6, 3 / 10, 3 / 10, 3 / 10])
    np.testing.assert_allclose(found([[7.0, -7.0]], 2), [[4 / 6, 4 / 6]])
    with pytest.raises(ValueError, match="positions is None: this calibrator has 3 buckets"):
        found(np.zeros(2))
    with pytest.raises(ValueError, match=r"positions has shape \(2,\)"):
        fit(np.zeros(3), [0, 0, 1], [1, 2])


def test_a_rare_action_has_one_map() -> None:
    x = np.linspace(-3, 3, 200)
    rare = fit(x, np.arange(200) % 50 == 49, np.arange(200) % 10 + 1)
    assert (rare.positions, len(rare.maps)) == ((10,), 1)
    np.testing.assert_array_equal(rare(x, 1), rare(x))


def biased(seed: int, count: int = 20_000) -> Observations:
    """Clicks that fall with the position, and a model that knows nothing of it and is too sure of itself."""
    rng = np.random.default_rng(seed)
    liking, positions = rng.normal(0, 1.2, count), rng.integers(1, 11, count)
    outcomes = rng.random(count) < expit(liking - 0.5) * positions**-0.7
    return Observations((2 * liking + 1).astype(np.float64), outcomes, positions)


def test_calibration_holds_on_pairs_that_were_not_fitted_on() -> None:
    dev, test = biased(0), biased(1)
    found = compare(fit(*dev), test)
    assert (found.pairs, found.positives) == (20_000, test.outcomes.sum())
    assert found.ece_before > 0.25
    assert found.ece_after < 0.02
    assert found.auroc_after > found.auroc_before + 0.02
    without = compare(fit(dev.log_odds, dev.outcomes), test)
    assert without.ece_after < 0.02
    assert without.auroc_after == pytest.approx(without.auroc_before, abs=1e-3)
    one = Observations(test.log_odds[:1], test.outcomes[:1], test.positions[:1])  # type: ignore[index]
    assert np.isnan(compare(fit(*dev), one).auroc_after)


# --- diagrams --------------------------------------------------------------------------------------------------------


def test_reliability_by_hand() -> None:
    p, y = np.array([0.1, 0.3, 0.6, 1.0, 0.9]), np.array([0, 1, 0, 1, 0])
    where = np.array([True, True, True, True, False])
    found = reliability(p, y, where=where, bins=4)
    np.testing.assert_allclose(found.predicted, [0.1, 0.3, 0.6, 1.0])
    np.testing.assert_allclose(found.observed, [0, 1, 0, 1])
    np.testing.assert_array_equal(found.pairs, [1, 1, 1, 1])
    gap = np.abs(found.observed - found.predicted) @ found.pairs / 4
    assert gap == pytest.approx(ece(p, y, where=where, bins=4)) == pytest.approx(0.35)
    empty = reliability([0.5, 0.6], [0, 1], where=[True, True], bins=3)
    np.testing.assert_allclose(empty.predicted, [np.nan, 0.55, np.nan])
    np.testing.assert_array_equal(empty.pairs, [0, 2, 0])


def test_a_drawing(tmp_path: Path) -> None:
    found = compare(fit(*biased(0, 500)), biased(1, 500))
    draw_reliability(tmp_path / "r.png", {"click": found, "<b>": found, "a": found, "b": found})
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["r.png"]


# --- a model on a data set -------------------------------------------------------------------------------------------


def test_observations_are_all_that_was_possible(ranker: Model) -> None:
    data = dataset()
    seen = observe(ranker, data, "dev")
    assert tuple(seen) == ("relevance", *ACTIONS["jobs"])
    sizes = {name: (len(item.log_odds), int(item.outcomes.sum())) for name, item in seen.items()}
    # Four queries: four judged documents, two of them good; five impressions, the first clicked; bad_fit possible on clicked ones.
    assert sizes == {"relevance": (16, 8), **dict.fromkeys(ACTIONS["jobs"], (20, 4)), "bad_fit": (4, 4)}
    assert seen["relevance"].positions is None
    np.testing.assert_array_equal(seen["click"].positions, [1, 2, 3, 4, 5] * 4)
    np.testing.assert_array_equal(seen["bad_fit"].positions, [1] * 4)
    scorer = RecordScorer(ranker.module, ranker.tokenizer, ranker.contract.prompts["pair"], data.documents)  # type: ignore[arg-type]
    query = data.queries["dev"][2]
    rows = np.array([data.document_row[item.document_id] for item in data.impressions[query.id]])
    alone = objective_log_odds(scorer([query], [rows])[0], ACTIONS["jobs"])
    for name in ("click", "shortlist"):
        np.testing.assert_allclose(seen[name].log_odds[10:15], alone[name], atol=1e-4)
    judged = np.array(sorted(data.graded[query.id]))
    alone = objective_log_odds(scorer([query], [judged])[0], ACTIONS["jobs"])
    np.testing.assert_allclose(seen["relevance"].log_odds[8:12], alone["relevance"], atol=1e-4)
    np.testing.assert_array_equal(seen["relevance"].outcomes[8:12], data.grades(query, judged) > 2)


def test_judged_pairs_of_a_query_are_drawn_alike(ranker: Model) -> None:
    some, again = (observe(ranker, dataset(), "dev", per_query=3)["relevance"] for _ in range(2))
    assert len(some.log_odds) == 12
    np.testing.assert_array_equal(some.log_odds, again.log_odds)


def test_fixed_lists_count_as_judged(ranker: Model) -> None:
    data = dataset()
    data = type(data)(
        **{**vars(data), "rerank": {"dev0": np.array([1, 2, 3, 4], np.int32)}, "impressions": {}}
    )
    seen = observe(ranker, data, "dev")
    assert list(seen) == ["relevance"]
    assert (len(seen["relevance"].outcomes), seen["relevance"].outcomes.sum()) == (17, 8)  # 0 to 3, and 4


def test_calibrate(ranker: Model) -> None:
    data = dataset()
    found = calibrate(ranker, data, least=2)
    assert list(found) == ["relevance", *ACTIONS["jobs"]]
    assert found["relevance"].positions == ()
    assert found["click"].positions == (5,)  # positions 2 to 5 hold no positive
    seen = observe(ranker, data, "dev")
    np.testing.assert_allclose(found["bad_fit"](seen["bad_fit"].log_odds, 1), 5 / 6)  # four of four
    assert found["click"] == fit(*seen["click"], least=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "train"}, "split is 'train', which the model has learned from"),
        ({"split": "mars"}, "split is 'mars': small has train, dev, test"),
        ({"least": 0}, "least is 0: use at least 1"),
        ({"per_query": -1}, "per_query is -1: use at least 0"),
    ],
)
def test_calibration_refused(ranker: Model, options: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        calibrate(ranker, dataset(), **options)


def test_nothing_to_calibrate_on(ranker: Model, judge: Model) -> None:
    data = dataset()
    with pytest.raises(
        ContractError, match="a judge cannot be calibrated: give the model folder of a ranker"
    ):
        calibrate(judge, data)
    for change in ({"graded": {}, "impressions": {}}, {"queries": {**data.queries, "dev": []}}):
        with pytest.raises(InputError, match="split 'dev' of small has neither judged pairs nor impressions"):
            calibrate(ranker, type(data)(**{**vars(data), **change}))


def test_what_has_no_calibrator_is_a_sigmoid() -> None:
    logits = np.array([[2.0, 1.0, 0.5], [0.0, 3.0, -1.0]], np.float32)
    log_odds = objective_log_odds(logits, ["click"])
    np.testing.assert_array_equal(log_odds["relevance"], [1, -3])
    by_place = Calibrator((1, 2), (Knots((0.0,), (0.75,)), Knots((-1.0, 1.0), (0.25, 0.5))))
    found = probabilities(log_odds, {"click": by_place}, 1)
    np.testing.assert_allclose(found["relevance"], expit([1, -3]))
    np.testing.assert_allclose(found["click"], [0.75, 0.75])
    np.testing.assert_allclose(probabilities(log_odds, {"click": by_place}, 7)["click"], [0.4375, 0.25])


# --- in a contract ---------------------------------------------------------------------------------------------------


def test_bits_survive_a_contract(ranker: Model, tmp_path: Path) -> None:
    found = {"relevance": fit(*biased(2)[:2]), "click": fit(*biased(3))}
    assert len(found["click"].maps) == 10
    for calibrator in found.values():
        assert Calibrator.from_dict(json.loads(json.dumps(calibrator.to_dict()))) == calibrator
    values = {name: calibrator.to_dict() for name, calibrator in found.items()}
    contract = Contract(**{**vars(ranker.contract), "calibrators": values})
    digest = save_model(tmp_path, ranker.module, contract, ranker.tokenizer)
    model = load_model(tmp_path)
    assert model.hash == digest != ranker.hash
    loaded = load_calibrators(model.contract)
    assert loaded == found
    x, positions = biased(4).log_odds, biased(4).positions
    np.testing.assert_array_equal(loaded["click"](x, positions), found["click"](x, positions))
    assert load_calibrators(ranker.contract) == {}


def good(**changes: Any) -> dict[str, Any]:
    return {"positions": [2, 5], "maps": [one(), one()]} | changes


def one(**changes: Any) -> dict[str, Any]:
    return {"log_odds": [-1.0, 0, 2.5], "probability": [0.25, 0.25, 0.5]} | changes


HOSTILE: list[tuple[Any, str]] = [
    (None, "is no object of positions and maps"),
    ([], "is no object of positions and maps"),
    ({"positions": []}, "is no object of positions and maps"),
    (good(x=1), "is no object of positions and maps"),
    (good(positions=None), ".positions is no list of whole numbers"),
    (good(positions=[1, 2.5]), ".positions is no list of whole numbers"),
    (good(positions=[0, 1]), ".positions is no list of whole numbers"),
    (good(positions=[True, 2]), ".positions is no list of whole numbers"),
    (good(positions=[1, 10**400]), ".positions is no list of whole numbers"),
    (good(positions=[5, 2]), ".positions do not ascend"),
    (good(positions=[2, 2]), ".positions do not ascend"),
    (good(positions=[1]), ".maps is no list of one map per position bucket"),
    (good(positions=[]), ".maps is no list of one map per position bucket"),
    (good(maps={}), ".maps is no list of one map per position bucket"),
    ({"positions": [], "maps": []}, ".maps is no list of one map per position bucket"),
    (good(maps=[one(), 3]), ".maps[1] is no object of log_odds and probability"),
    (good(maps=[one(x=1), one()]), ".maps[0] is no object of log_odds and probability"),
    (good(maps=[one(log_odds="abc"), one()]), ".maps[0].log_odds is no list of finite numbers"),
    (good(maps=[one(log_odds=[-1, 0, None]), one()]), ".maps[0].log_odds is no list of finite numbers"),
    (good(maps=[one(log_odds=[-1, 0, True]), one()]), ".maps[0].log_odds is no list of finite numbers"),
    (good(maps=[one(log_odds=[-1, 0, float("inf")]), one()]), ".maps[0].log_odds is no list of finite"),
    (good(maps=[one(log_odds=[-1, 0, float("nan")]), one()]), ".maps[0].log_odds is no list of finite"),
    (good(maps=[one(log_odds=[-1, 0, 10**400]), one()]), ".maps[0].log_odds is no list of finite numbers"),
    (good(maps=[one(log_odds=[-1, 0, 0]), one()]), ".maps[0].log_odds do not ascend"),
    (good(maps=[one(log_odds=[0, 2**53, 2**53 + 1]), one()]), ".maps[0].log_odds do not ascend"),
    (good(maps=[one(log_odds=[0.0]), one()]), "has 1 log_odds and 3 probability"),
    (good(maps=[one(log_odds=[], probability=[]), one()]), "has 0 log_odds and 0 probability"),
    (
        good(maps=[one(log_odds=list(range(257)), probability=[0.5] * 257), one()]),
        "has 257 log_odds and 257 probability, not as many of each, 1 to 256",
    ),
    (good(maps=[one(), one(probability=[0.25, 0.5, 0.4])]), ".maps[1].probability descends"),
    (good(maps=[one(), one(probability=[0, 0.5, 0.6])]), ".maps[1].probability is not between 0 and 1"),
    (good(maps=[one(), one(probability=[0.1, 0.5, 1.0])]), ".maps[1].probability is not between 0 and 1"),
    (good(maps=[one(), one(probability=[0.1, 0.5, 7])]), ".maps[1].probability is not between 0 and 1"),
    (good(maps=[one(), one(probability=[-1, 0.5, 0.6])]), ".maps[1].probability is not between 0 and 1"),
]


@pytest.mark.parametrize(("values", "words"), HOSTILE)
def test_hostile_calibrators(values: Any, words: str) -> None:
    with pytest.raises(ContractError) as caught:
        Calibrator.from_dict(values, "calibrators.click")
    assert str(caught.value).startswith("calibrators.click")
    assert words in str(caught.value)


def test_extreme_numbers_stay_in_order() -> None:
    edge = {"log_odds": [-1.7e308, -1e-310, 0.0, 1.7e308], "probability": [1e-300, 0.25, 0.5, 0.75]}
    values = Calibrator.from_dict({"positions": [], "maps": [edge]})(
        [-np.inf, -1.7e308, -1.0, -1e-310, -5e-311, 0.0, 5e-324, 1.0, 1.7e308, np.inf]
    )
    assert np.isfinite(values).all()
    assert (np.diff(values) >= 0).all()


@pytest.mark.parametrize(
    ("calibrators", "words"),
    [
        ({"click": good(maps=[])}, "calibrators.click.maps is no list of one map"),
        ({"connect": good()}, "calibrators.connect is for none of relevance, click, apply"),
        ({"click": good(), "x": good()}, "calibrators.x is for none of"),
        ({"relevance": good()}, "calibrators.relevance.positions is [2, 5]: relevance knows no position"),
    ],
)
def test_contracts_with_hostile_calibrators(
    ranker: Model, tmp_path: Path, calibrators: dict, words: str
) -> None:
    save_model(tmp_path, ranker.module, ranker.contract, ranker.tokenizer)
    values = json.loads((tmp_path / CONTRACT_FILE).read_text())
    (tmp_path / CONTRACT_FILE).write_text(json.dumps(values | {"calibrators": {"click": good()}}))
    assert load_model(tmp_path).contract.calibrators == {"click": good()}
    (tmp_path / CONTRACT_FILE).write_text(json.dumps(values | {"calibrators": calibrators}))
    with pytest.raises(ContractError, match=r"contract\.json cannot be used") as caught:
        load_model(tmp_path)
    assert words in str(caught.value)


def test_a_judge_has_no_calibrators(judge_folder: Path, tmp_path: Path) -> None:
    values = json.loads((judge_folder / CONTRACT_FILE).read_text())
    (tmp_path / CONTRACT_FILE).write_text(json.dumps(values | {"calibrators": {"relevance": good()}}))
    with pytest.raises(ContractError, match=r"calibrators\.relevance is for none of nothing"):
        load_model(tmp_path)
