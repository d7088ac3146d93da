"""DCN-v2: a cross layer by hand, what it learns that a line cannot, and files that come back."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsearch.errors import InputError
from jaxsearch.metrics import auroc, ndcg
from jaxsearch.retrieval.bm25 import Bm25Params
from jaxsearch.retrieval.dcn import CrossLayer, Dcn, DcnConfig, DcnModel, Scaling, train_dcn
from jaxsearch.retrieval.traditional import FeatureMatrix, FeatureSpec

SPEC = FeatureSpec((), (), (), (), ("x", "y"), (), similarity=False, bm25=Bm25Params())
SMALL = DcnConfig(cross_layers=1, deep=(), epochs=15, batch_queries=32, learning_rate=2e-2)


def lists(queries, seed, length=8):
    """Two columns at random; grades by the rank of their product within the list; action 1 likely where it is positive."""
    rng = np.random.default_rng(seed)
    values = np.zeros((queries, length, 4), np.float32)
    values[..., 2:] = rng.normal(size=(queries, length, 2))
    product = values[..., 2] * values[..., 3]
    grades = product.argsort(axis=1).argsort(axis=1) // 2 * 4 // 3
    actions = np.stack([rng.random(product.shape) < 0.5, product > 0], axis=-1).astype(np.float32)
    return FeatureMatrix(values, np.ones((queries, length), bool), SPEC.names), grades, actions


TRAIN, VALID, TEST = lists(256, 0), lists(64, 1), lists(64, 2)


def fit(config=SMALL, train=TRAIN, actions=False):
    if not actions:
        return train_dcn(SPEC, train[:2], VALID[:2], config=config)
    return train_dcn(
        SPEC, train[:2], VALID[:2], train[::2], VALID[::2], config, action_names=("coin", "sign")
    )


@pytest.fixture(scope="module")
def model():
    return fit(actions=True)


def test_a_cross_layer_by_hand():
    layer = CrossLayer(2, 0, rngs=nnx.Rngs(0))
    layer.up.kernel[...] = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    layer.up.bias[...] = jnp.array([0.5, -1.0])
    # W x = [1 * 5 + 3 * 6, 2 * 5 + 4 * 6] = [23, 34]; with b [23.5, 33]; times x_0 [47, -99]; plus x.
    found = layer(jnp.array([[2.0, -3.0]]), jnp.array([[5.0, 6.0]]))
    np.testing.assert_allclose(found, [[52.0, -93.0]], rtol=1e-6)


def test_a_low_rank_cross_layer_by_hand():
    layer = CrossLayer(2, 1, rngs=nnx.Rngs(0))
    layer.down.kernel[...] = jnp.array([[1.0], [2.0]])
    layer.up.kernel[...] = jnp.array([[10.0, 100.0]])
    layer.up.bias[...] = jnp.array([1.0, 0.0])
    # V x = 5 + 12 = 17; U 17 + b = [171, 1700]; times x_0 [342, -5100]; plus x.
    found = layer(jnp.array([[2.0, -3.0]]), jnp.array([[5.0, 6.0]]))
    np.testing.assert_allclose(found, [[347.0, -5094.0]], rtol=1e-6)


def test_parameters_and_flops_are_counted():
    config = DcnConfig(cross_layers=2, rank=3, deep=(7, 5))
    scaling = Scaling(
        np.zeros(4, np.float32), np.ones(4, np.float32), np.zeros(4, bool), np.zeros(0, np.int32)
    )
    network = Dcn(4, 2, config, rngs=nnx.Rngs(0))
    found = DcnModel(SPEC, ("a", "b"), config, scaling, network)
    matrices = 2 * (4 * 3 + 3 * 4) + 4 * 7 + 7 * 5 + (4 + 5) * 3
    assert found.parameters == matrices + 2 * 4 + 7 + 5 + 3
    assert found.flops == 2 * matrices + 3 * 4 * 2


def test_scaling_by_hand():
    values = np.array(
        [[1, 0, np.nan, 5], [3, 0, 7, 5], [5, 0, 9, 5], [7, 1e4, 8, 5]] + [[4, 0, 8, 5]] * 5, np.float32
    )
    scaling = Scaling.fit(values)
    np.testing.assert_array_equal(scaling.log, [False, True, False, False])  # one of nine is 10,000
    np.testing.assert_array_equal(scaling.indicators, [2])
    inputs = scaling(np.array([[4, 0, np.nan, 6], [1e9, 1e4, 8, np.nan]], np.float32))
    deviation = np.sqrt(20 / 9)  # of 1, 3, 5, 7 and five times 4
    logs = np.log1p(np.array([0] * 8 + [1e4]))
    np.testing.assert_allclose(inputs[0], [0, -logs.mean() / logs.std(), 0, 1, 1], rtol=1e-5)
    # An outlier ends at 10; the mean of 7, 8, 9 and five 8s is 8; the last feature was never missing in training.
    np.testing.assert_allclose(inputs[1], [10, (logs[-1] - logs.mean()) / logs.std(), 0, 0, 0], rtol=1e-5)
    assert scaling(np.array([[4 + deviation, 0, 8, 5]], np.float32))[0, 0] == pytest.approx(1, rel=1e-5)


def test_it_learns_a_product_that_a_linear_model_cannot(model):
    features, grades, actions = TEST

    def quality(found):
        return ndcg(found.score(features), grades, where=features.where, k=3).mean()

    chance = ndcg(np.zeros(grades.shape) + features.values[..., 2], grades, where=features.where, k=3).mean()
    linear = fit(dataclasses.replace(SMALL, cross_layers=0))
    assert quality(linear) < chance + 0.15
    assert quality(fit()) > 0.97
    assert quality(model) > 0.97  # together with the actions
    log_odds = model.actions(features)
    assert log_odds.shape == (64, 8, 2)
    assert auroc(log_odds[..., 1], actions[..., 1], where=features.where) > 0.97
    assert auroc(log_odds[..., 0], actions[..., 0], where=features.where) == pytest.approx(0.5, abs=0.1)


def test_the_deep_tower_and_low_rank_learn_it_too():
    features, grades, _ = TEST
    for config in (
        dataclasses.replace(SMALL, rank=2),
        dataclasses.replace(SMALL, cross_layers=0, deep=(32,)),
    ):
        assert ndcg(fit(config).score(features), grades, where=features.where, k=3).mean() > 0.9


def with_masked(part, junk):
    """The same lists with a place in front where no candidate stands, and junk there."""
    features, grades, actions = part
    pad = ((0, 0), (1, 0))
    values = np.pad(features.values, (*pad, (0, 0)), constant_values=junk)
    return (
        FeatureMatrix(values, np.pad(features.where, pad), SPEC.names),
        np.pad(grades, pad, constant_values=99),
        np.pad(actions, (*pad, (0, 0)), constant_values=junk),
    )


def test_masked_candidates_change_nothing(model):
    features = with_masked(TEST, np.inf)[0]
    found = model(features)
    assert np.isneginf(found[:, 0]).all()
    np.testing.assert_array_equal(found[:, 1:], model(TEST[0]))
    one, other = (fit(train=with_masked(TRAIN, junk), actions=True) for junk in (np.inf, 7))
    np.testing.assert_array_equal(one(TEST[0]), other(TEST[0]))
    np.testing.assert_array_equal(one.scaling.mean, model.scaling.mean)
    np.testing.assert_array_equal(one.scaling.log, model.scaling.log)
    # Longer lists are added up in another order: the last bits differ. A constant is free under the listwise loss.
    change = one(TEST[0]) - model(TEST[0])
    np.testing.assert_allclose(change - change.mean(axis=(0, 1)), 0, atol=1e-3)


def test_an_action_that_was_not_eligible_teaches_nothing(model):
    features, _, actions = TRAIN
    blank = np.where(np.arange(2) == 0, np.nan, actions).astype(np.float32)
    other = train_dcn(
        SPEC, TRAIN[:2], VALID[:2], (features, blank), VALID[::2], SMALL, action_names=("coin", "sign")
    )
    start = Dcn(4, 2, SMALL, rngs=nnx.Rngs(SMALL.seed)).heads.kernel[...][:, 1]
    steps = 8 * SMALL.epochs
    # Weight decay alone has touched the head: its column is the initial one, a little shorter.
    ratio = np.asarray(other.network.heads.kernel[...][:, 1] / start)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
    assert (1 - SMALL.learning_rate * SMALL.weight_decay) ** steps - 1e-4 < ratio[0] <= 1


def test_a_missing_feature_is_no_zero():
    """The grade is high where the feature is missing: only the indicator can know."""
    rng = np.random.default_rng(0)

    def part(count):
        grades = rng.integers(0, 2, (count, 6)) * 4
        values = np.zeros((count, 6, 4), np.float32)
        values[..., 2] = np.where(grades == 4, np.nan, rng.normal(size=grades.shape))
        return FeatureMatrix(values, np.ones(grades.shape, bool), SPEC.names), grades

    train, valid, (features, grades) = part(128), part(32), part(32)
    found = train_dcn(SPEC, train, valid, config=dataclasses.replace(SMALL, cross_layers=0))
    assert auroc(found.score(features), grades == 4, where=features.where) > 0.99


def test_the_same_seed_gives_the_same_model_and_another_one_another(model):
    again = fit(actions=True)
    np.testing.assert_array_equal(again(TEST[0]), model(TEST[0]))
    other = fit(dataclasses.replace(SMALL, seed=1), actions=True)
    assert abs(other(TEST[0]) - model(TEST[0])).max() > 1e-3


def test_lists_of_any_size_and_none(model):
    features, *_ = lists(700, 3)  # 5,600 items: one full call and a padded rest
    whole = model(features)
    few = model(FeatureMatrix(features.values[:3], features.where[:3], SPEC.names))
    np.testing.assert_allclose(whole[:3], few, rtol=1e-4, atol=1e-5)
    nothing = model(FeatureMatrix(features.values[:2], np.zeros((2, 8), bool), SPEC.names))
    assert nothing.shape == (2, 8, 3)
    assert np.isneginf(nothing).all()


def test_save_and_load_give_the_same_bits(model, tmp_path):
    model.save(tmp_path / "dcn")
    assert sorted(path.name for path in (tmp_path / "dcn").iterdir()) == ["dcn.json", "model.safetensors"]
    loaded = DcnModel.load(tmp_path / "dcn")
    np.testing.assert_array_equal(loaded(TEST[0]), model(TEST[0]))
    assert (loaded.spec, loaded.config, loaded.action_names) == (SPEC, SMALL, ("coin", "sign"))


def test_features_of_other_names_are_refused(model):
    features = TEST[0]._replace(names=("query_words", "bm25", "number:x", "number:z"))
    with pytest.raises(ValueError, match=r"missing \['number:y'\], unknown \['number:z'\]"):
        model.score(features)
    with pytest.raises(ValueError, match="number:z"):
        train_dcn(SPEC, (features, TEST[1]), VALID[:2])


def test_files_that_do_not_fit_are_refused(model, tmp_path):
    model.save(tmp_path / "dcn")
    path = tmp_path / "dcn/dcn.json"
    text = path.read_text()

    def refused(match, **changes):
        path.write_text(json.dumps(json.loads(text) | changes))
        with pytest.raises(ValueError, match=match):
            DcnModel.load(tmp_path / "dcn")

    refused("format 2", format=2)
    refused("the same in another order", features=list(SPEC.names[::-1]))
    refused("heads.bias", actions=["coin"])
    refused("network|cross", config=json.loads(text)["config"] | {"cross_layers": 2})
    refused("cross_layers is -1", config=json.loads(text)["config"] | {"cross_layers": -1})
    refused("cannot be used", config={"colour": 1})
    path.write_text(text)
    (tmp_path / "dcn/model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="damaged"):
        DcnModel.load(tmp_path / "dcn")
    with pytest.raises(FileNotFoundError):
        DcnModel.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ranked_train": (TRAIN[0], TRAIN[1] + 1)}, "label 5"),
        ({"ranked_valid": (VALID[0], VALID[1][:, 1:])}, "shape"),
        ({"actions_train": None}, "action_names"),
        ({"action_names": ()}, "action_names"),
        ({"action_names": ("one",)}, r"\(256, 8, 1\)"),
        ({"actions_train": (TRAIN[0], TRAIN[2] * 2)}, "action 2.0"),
        (
            {"ranked_train": (TRAIN[0]._replace(values=TRAIN[0].values + np.inf), TRAIN[1])},
            "'query_words' is infinite",
        ),
    ],
)
def test_labels_that_are_none_are_refused(change, match):
    given = {
        "ranked_train": TRAIN[:2],
        "ranked_valid": VALID[:2],
        "actions_train": TRAIN[::2],
        "actions_valid": VALID[::2],
        "action_names": ("coin", "sign"),
    }
    with pytest.raises(ValueError, match=match):
        train_dcn(SPEC, config=SMALL, **{**given, **change})


@pytest.mark.parametrize(
    ("field", "value"), [("deep", (0,)), ("epochs", 0), ("learning_rate", 0.0), ("rank", -1), ("seed", -1)]
)
def test_a_config_out_of_range_is_refused(field, value):
    with pytest.raises(InputError, match=f"DcnConfig.{field} is"):
        DcnConfig(**{field: value})
