"""Pruned maps against direct solutions, Gram matrices against a plain forward, and a pruned model that does all that a model does."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_market import dataset, fast_compilation, filled, small_tokenizer, small_world

import jaxsearch.data.datasets
from jaxsearch.compression import osscar
from jaxsearch.compression.calibration import Batch, Walk, choose_queries, make_batches
from jaxsearch.compression.main import main
from jaxsearch.compression.osscar import METHODS, Kept, best_weights, damped, reduce_map, relative_error
from jaxsearch.compression.pruning import (
    Pruning,
    cut_heads,
    layer_changes,
    prune_decoder,
    prune_model,
    steps,
)
from jaxsearch.config import MeshConfig, load_config
from jaxsearch.data.prompts import PromptConfig
from jaxsearch.data.records import ACTIONS
from jaxsearch.data.tokenizer import LABELS
from jaxsearch.errors import InputError
from jaxsearch.models.attention import Causal
from jaxsearch.models.contract import (
    Contract,
    Golden,
    MixLMPart,
    Model,
    check_output,
    load_model,
    make_module,
    save_model,
)
from jaxsearch.models.decoder import Decoder, DecoderConfig
from jaxsearch.models.presets import preset
from jaxsearch.models.scorer import Scorer
from jaxsearch.models.weights import huggingface
from jaxsearch.scoring.label import chosen_pairs, label
from jaxsearch.scoring.records import RecordScorer
from jaxsearch.serving.bundle import golden_error
from jaxsearch.training.loop import run
from jaxsearch.training.sharding import make_mesh

CONFIG = DecoderConfig(
    vocab_size=300, layers=3, width=24, heads=6, kv_heads=3, head_dim=4, mlp_width=16,
    rope_theta=1e4, rms_eps=1e-6, qk_norm=True, tied=True,
)  # fmt: skip
DATA = dataset()


# --- maps ----------------------------------------------------------------------------------------------------------


def correlated(units: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Activations of neurons that share causes, and weights."""
    rng = np.random.default_rng(seed)
    causes = rng.normal(size=(400, units // 3)) @ rng.normal(size=(units // 3, units))
    scales = np.exp(0.3 * rng.normal(size=units))
    return scales * np.maximum(causes + rng.normal(size=causes.shape), 0), rng.normal(size=(units, width))


def loss(x: np.ndarray, weights: np.ndarray, kept: Kept, size: int = 1) -> float:
    """||X W - X_S V||^2 / ||X W||^2 from the activations themselves."""
    whole = x @ weights
    return float(
        np.sum((whole - x[:, osscar.columns(kept.units, size)] @ kept.weights) ** 2) / np.sum(whole**2)
    )


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("seed", [0, 1])
def test_osscar_beats_every_baseline(share: float, seed: int) -> None:
    x, weights = correlated(48, 12, seed)
    keep = round(48 * (1 - share))
    errors = {
        (method, refit): loss(x, weights, reduce_map(x.T @ x, weights, keep, method=method, refit=refit))
        for method in METHODS
        for refit in (False, True)
    }
    best = errors.pop(("osscar", False))
    assert errors.pop(("osscar", True)) == best
    assert best < min(errors.values())
    for method in ("random", "magnitude", "activation"):
        assert errors[method, True] < errors[method, False]


def test_relative_error_is_that_of_the_activations() -> None:
    x, weights = correlated(12, 5)
    for method in METHODS:
        kept = reduce_map(x.T @ x, weights, 6, method=method)
        assert relative_error(x.T @ x, weights, kept) == pytest.approx(loss(x, weights, kept), rel=1e-9)


def test_redundant_neurons_cost_nothing() -> None:
    x, weights = correlated(12, 5)
    x = np.concatenate([x, 2 * x[:, :8], np.zeros((len(x), 4))], axis=1)  # copies, and dead ones
    weights = np.concatenate([weights, np.random.default_rng(3).normal(size=(12, 5))])
    kept = reduce_map(x.T @ x, weights, 12, damping=1e-9)
    assert loss(x, weights, kept) < 1e-12
    assert {unit - 12 if unit >= 12 else unit for unit in kept.units.tolist()} == set(range(12))
    for method in ("random", "magnitude"):
        assert loss(x, weights, reduce_map(x.T @ x, weights, 12, method=method)) > 1e-2
    silent = reduce_map(np.zeros((4, 4)), weights[:4], 2)
    assert relative_error(np.zeros((4, 4)), weights[:4], silent) == 0


def test_baselines_keep_what_their_score_says() -> None:
    gram, weights = np.diag([1.0, 4.0, 10.0, 0.1]), np.array([[3.0], [2.0], [1.0], [5.0]])
    assert reduce_map(gram, weights, 2, method="magnitude").units.tolist() == [0, 3]  # 9, 4, 1, 25
    assert reduce_map(gram, weights, 2, method="activation").units.tolist() == [1, 2]  # 9, 16, 10, 2.5
    assert reduce_map(gram, weights, 1, size=2, method="magnitude").units.tolist() == [1]  # 13, 26
    np.testing.assert_array_equal(reduce_map(gram, weights, 2, method="magnitude").weights, [[3], [5]])
    random = [reduce_map(np.eye(40), np.ones((40, 1)), 20, method="random", seed=s).units for s in (0, 0, 1)]
    assert random[0].tolist() == random[1].tolist() != random[2].tolist()


@pytest.mark.parametrize("size", [1, 3])
def test_updates_equal_direct_solutions(size: int) -> None:
    x, weights = correlated(24, 4)
    hessian = damped(x.T @ x, 1e-3)

    def check(state: osscar._State) -> None:
        inside = osscar.columns(state.units, size)
        np.testing.assert_allclose(
            state.inverse @ hessian[np.ix_(inside, inside)], np.eye(len(inside)), atol=1e-8
        )
        best = best_weights(hessian, weights, state.units, size)
        np.testing.assert_allclose(state.weights, best, atol=1e-8)

    def error(units: list[int]) -> float:
        difference = weights.copy()
        difference[osscar.columns(np.array(units), size)] -= best_weights(
            hessian, weights, np.array(units), size
        )
        return float(np.vdot(difference, hessian @ difference))

    state = osscar._State.whole(hessian, weights, size)
    check(state)
    for _ in range(3):  # the cheapest removal is the one that a direct solution of each finds
        errors = {u: error([v for v in state.units.tolist() if v != u]) for u in state.units.tolist()}
        place = state.cheapest(1)
        assert errors[int(state.units[place[0]])] == pytest.approx(min(errors.values()))
        state = state.without(place)
    block = state.cheapest(2)
    state = state.without(block)
    check(state)
    removed, before = state.removed().tolist(), error(state.units.tolist())
    for unit, gain in zip(removed, state.gains(), strict=True):
        assert before - error([*state.units.tolist(), unit]) == pytest.approx(gain)
    state = state.with_units(np.array(removed[1:4]))
    check(state)
    assert np.vdot(weights, hessian @ weights) - state.explained() == pytest.approx(
        error(state.units.tolist())
    )


def test_a_block_is_chosen_as_one_by_one() -> None:
    x, weights = correlated(36, 6)
    state = osscar._State.whole(damped(x.T @ x, 1e-3), weights, 1)
    at_once = state.units[state.cheapest(10)].tolist()
    for _ in range(10):
        state = state.without(state.cheapest(1))
    assert sorted(at_once) == state.removed().tolist()


def test_swaps_never_raise_the_error() -> None:
    better = 0
    for seed in range(6):
        x, weights = correlated(30, 3, seed)
        state = osscar._State.whole(damped(x.T @ x, 1e-3), weights, 1)
        start = state.without(np.random.default_rng(seed).permutation(30)[:15])
        explained = [osscar._swap(start, rounds).explained() for rounds in range(6)]
        assert explained[0] == start.explained()
        assert explained == sorted(explained)
        assert len(osscar._swap(start, 6).units) == 15
        better += explained[-1] > explained[0]
    assert better == 6


@pytest.mark.parametrize(
    ("units", "width", "keep"), [(1, 1, 1), (2, 1, 1), (5, 1, 4), (7, 30, 1), (150, 2, 5)]
)
def test_unusual_shapes(units: int, width: int, keep: int) -> None:
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(9, units)), rng.normal(size=(units, width))
    for method in METHODS:
        kept = reduce_map(x.T @ x, weights, keep, method=method)
        assert kept.weights.shape == (keep, width)
        assert len(set(kept.units.tolist())) == keep
        assert np.isfinite(kept.weights).all()
        assert relative_error(x.T @ x, weights, kept) < (1e-12 if keep == units else 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 0}, "keep is 0: give 1 to 4"),
        ({"keep": 5}, "keep is 5"),
        ({"size": 3}, "size is 3: give a divisor of the 4"),
        ({"method": "best"}, "method is 'best': use one of osscar, random, magnitude, activation"),
        ({"damping": 0.0}, "damping is 0.0"),
        ({"swaps": -1}, "swaps is -1"),
        ({"gram": np.eye(3)}, r"gram has shape \(3, 3\), weights \(4, 2\)"),
        ({"gram": np.full((4, 4), np.nan)}, "NaN or infinite"),
    ],
)
def test_maps_that_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"gram": np.eye(4), "weights": np.ones((4, 2)), "keep": 2} | changes
    with pytest.raises(InputError, match=message):
        reduce_map(**arguments)


# --- models --------------------------------------------------------------------------------------------------------


def make_model(
    folder: Path, config: DecoderConfig = CONFIG, change: Callable[[Decoder], None] | None = None
) -> Model:
    """A ranker of jobs that was never trained, with one golden pair."""
    tokenizer = small_tokenizer()
    labels = {name: tokenizer.label(name) for name in LABELS[:2]}
    prompts = {"pair": PromptConfig("ranker", "short", "tiny")}
    contract = Contract("ranker", config, prompts, labels, ACTIONS["jobs"], training={"name": "parent"})
    module = filled(lambda rngs: make_module(contract, rngs), 0)
    assert isinstance(module, Scorer)
    if change is not None:
        change(module.decoder)
    query, document = DATA.queries["dev"][0], DATA.documents[0]
    scores = RecordScorer(module, tokenizer, prompts["pair"], [document])([query], [np.array([0], np.int32)])
    golden = (Golden(query, document, tuple(float(x) for x in scores[0][0])),)
    save_model(folder, module, replace(contract, golden=golden, calibrators={}), tokenizer)
    return load_model(folder)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    """An untrained ranker and its folder; read only."""
    folder = tmp_path_factory.mktemp("dense") / "model"
    with fast_compilation():
        return folder, make_model(folder)


def batches_of(model: Model, queries: int = 3, multiple: int = 1) -> list[Batch]:
    return make_batches(model, DATA, choose_queries(DATA, queries), candidates=3, multiple=multiple)


def decoder_of(model: Model) -> Decoder:
    assert isinstance(model.module, Scorer)
    return model.module.decoder


def scores_of(module: Any, model: Model) -> np.ndarray:
    scorer = RecordScorer(module, model.tokenizer, model.contract.prompts["pair"], DATA.documents)
    return np.concatenate(scorer(DATA.queries["test"], [np.arange(8, dtype=np.int32)] * 4))


def plain_layer(x: np.ndarray, w: dict[str, np.ndarray], c: DecoderConfig) -> list[np.ndarray]:
    """Mixed heads, neurons and output of one layer for one text [T, D], in fp64."""

    def norm(y: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return y / np.sqrt(np.mean(y * y, axis=-1, keepdims=True) + c.rms_eps) * scale

    y = norm(x, w["attention_norm"])
    q, k, v = (np.einsum("td,dnh->tnh", y, w[name]) for name in "qkv")
    angle = np.arange(len(x))[:, None] * c.rope_theta ** (-np.arange(0, c.head_dim, 2) / c.head_dim)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def turn(y: np.ndarray, scale: np.ndarray) -> np.ndarray:
        a, b = np.split(norm(y, scale), 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    q, k = turn(q, w["q_norm"]), turn(k, w["k_norm"])
    k, v = (np.repeat(y, c.heads // c.kv_heads, axis=1) for y in (k, v))
    scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(c.head_dim)
    scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
    share = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = np.einsum("nts,snh->tnh", share / share.sum(axis=-1, keepdims=True), v)
    x = x + np.einsum("tnh,nhd->td", mixed, w["o"])
    y = norm(x, w["mlp_norm"])
    gate = y @ w["gate"]
    spoken = gate / (1 + np.exp(-gate)) * (y @ w["up"])
    return [mixed.reshape(len(x), -1), spoken, x + spoken @ w["down"]]


def test_gram_matrices_are_those_of_a_plain_forward(dense: tuple[Path, Model]) -> None:
    model = dense[1]
    decoder = decoder_of(model)
    walk = Walk(decoder, batches_of(model))
    pairs = choose_queries(DATA, 3)
    records = RecordScorer(
        model.module,
        model.tokenizer,
        model.contract.prompts["pair"],
        DATA.documents,  # type: ignore[arg-type]
    )
    prefixes, items = records.tokens(
        [DATA.queries["train"][p.query] for p in pairs], [chosen_pairs(p, 3) for p in pairs]
    )
    table = np.asarray(decoder.embedding[...], np.float64)
    texts = [
        (table[prefix + item], 0 if i == 0 else len(prefix))  # each prefix counts once
        for prefix, candidates in zip(prefixes, items, strict=True)
        for i, item in enumerate(candidates)
    ]
    for layer in range(2):
        w = walk.weights(layer)
        plain = [plain_layer(x, w, CONFIG) for x, _ in texts]
        heads, spoken = (
            np.concatenate([found[i][start:] for found, (_, start) in zip(plain, texts, strict=True)])
            for i in (0, 1)
        )
        np.testing.assert_allclose(
            walk.heads_gram(w), heads.T @ heads, rtol=2e-4, atol=2e-4 * np.ptp(heads) ** 2
        )
        walk.pass_heads(w)
        np.testing.assert_allclose(
            walk.mlp_gram(w), spoken.T @ spoken, rtol=2e-4, atol=2e-4 * np.ptp(spoken) ** 2
        )
        walk.pass_mlp(w)
        texts = [(found[2], start) for found, (_, start) in zip(plain, texts, strict=True)]


def test_gram_matrices_on_a_mesh(dense: tuple[Path, Model]) -> None:
    model = dense[1]
    batches = batches_of(model, multiple=4)
    alone = Walk(decoder_of(model), batches)
    spread = Walk(decoder_of(model), batches, make_mesh(MeshConfig(2, 2, 2)))
    w = alone.weights(0)
    with fast_compilation():
        np.testing.assert_allclose(spread.heads_gram(w), alone.heads_gram(w), rtol=1e-4, atol=1e-3)
        for walk in (alone, spread):
            walk.pass_heads(w)
        np.testing.assert_allclose(spread.mlp_gram(w), alone.mlp_gram(w), rtol=1e-4, atol=1e-3)


def with_nothing_in_it(decoder: Decoder) -> None:
    """Neurons 3 and 7 to 13 of every layer are dead, key/value head 1 adds nothing, and neither does all of layer 1."""
    arrays = {name: np.array(value) for name, value in decoder.layers.arrays().items()}
    arrays["gate"][:, :, [3, *range(7, 14)]] = 0
    arrays["v"][:, :, 1] = 0
    arrays["o"][1], arrays["down"][1] = 0, 0
    for name, value in arrays.items():
        getattr(decoder.layers, name).set_value(jnp.asarray(value))


@pytest.fixture(scope="module")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The ranker of `with_nothing_in_it`."""
    with fast_compilation():
        return make_model(tmp_path_factory.mktemp("hollow"), change=with_nothing_in_it)


def test_what_does_nothing_is_not_missed(hollow: Model) -> None:
    plan = Pruning(mlp=0.5, heads=1 / 3, layers=1, which="least")
    with fast_compilation():
        pruned = prune_model(hollow, DATA, plan, queries=3, candidates=3)
        found, wanted = (scores_of(module, hollow) for module in (pruned.module, hollow.module))
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    sizes = pruned.contract.architecture
    assert (sizes.mlp_width, sizes.kv_heads, sizes.heads) == (8, 2, 4)
    assert [report.layer for report in pruned.layers] == [0, 2]
    assert all(report.mlp_error < 1e-9 and report.heads_error < 1e-9 for report in pruned.layers)


def test_layers_that_go(dense: tuple[Path, Model], hollow: Model) -> None:
    batches = batches_of(hollow, 1)
    with fast_compilation():
        changes = layer_changes(decoder_of(hollow), batches)
        assert abs(changes[1]) < 1e-6 < min(changes[0], changes[2])
        before = decoder_of(dense[1])
        told: list[int] = []
        decoder, reports = prune_decoder(before, [], Pruning(layers=2), progress=told.append)
    assert len(told) == steps(CONFIG, Pruning(layers=2)) == 1
    assert [report.layer for report in reports] == [0]
    for name, value in decoder.layers.arrays().items():
        np.testing.assert_array_equal(value, before.layers.arrays()[name][:1])
    np.testing.assert_array_equal(decoder.embedding[...], before.embedding[...])
    # The output of the one layer is what the dense decoder hands to its second one.
    x, places = before.embed(jnp.arange(5)[None]), jnp.arange(5)[None]
    causal = Causal(jnp.ones((1, 5), bool))
    *_, whole = before(x, places, causal, return_layers=True)
    *_, short = decoder(x, places, causal, return_layers=True)
    np.testing.assert_allclose(short[1], whole[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "groups", "keep"), [(4, 4, 1), (8, 4, 3), (6, 2, 1), (3, 1, 1)])
def test_query_heads_stay_with_their_key_head(heads: int, groups: int, keep: int) -> None:
    rng, h, width = np.random.default_rng(0), 2, 5
    w = {name: rng.normal(size=(width, n, h)) for name, n in (("q", heads), ("k", groups), ("v", groups))}
    w["o"] = rng.normal(size=(heads, h, width)).astype(np.float32)
    x = rng.normal(size=(60, heads * h))
    loud = np.arange(groups) >= groups - keep  # the last groups say much more
    x *= np.repeat(np.where(loud, 10, 0.1), heads // groups * h)
    new, error = cut_heads(w, x.T @ x, keep, Pruning(heads=0.5))
    each = heads // groups
    np.testing.assert_array_equal(new["q"], w["q"][:, (groups - keep) * each :])
    for name in "kv":
        np.testing.assert_array_equal(new[name], w[name][:, groups - keep :])
    assert new["o"].shape == (keep * each, h, width)
    assert error < 1e-2


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({}, "mlp, heads and layers are all 0"),
        ({"mlp": 1.0}, "mlp is 1.0: give a share"),
        ({"heads": -0.1}, "heads is -0.1"),
        ({"layers": -1}, "layers is -1"),
        ({"layers": 1, "which": "first"}, "which is 'first': use one of last, least"),
        ({"mlp": 0.5, "method": "wanda"}, "method is 'wanda'"),
        ({"mlp": 0.5, "damping": -1.0}, "damping is -1.0"),
        ({"layers": 3}, r"layers \(--layers-drop\) is 3: the model has 3, and one must stay"),
        ({"mlp": 0.01}, "mlp is 0.01, 0 of 16 neurons"),
        ({"heads": 0.99}, "heads is 0.99, 3 of 3 key/value heads"),
    ],
)
def test_plans_that_are_refused(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Pruning(**plan).apply(CONFIG)


def test_sizes_of_presets() -> None:
    small = Pruning(mlp=0.5, heads=0.25, layers=8).apply(preset("smollm2_135m"))
    assert (small.layers, small.mlp_width, small.heads, small.kv_heads) == (22, 768, 6, 2)
    large = Pruning(mlp=0.5, heads=0.25, layers=8).apply(preset("qwen3_0_6b"))
    assert (large.layers, large.mlp_width, large.heads, large.kv_heads) == (20, 1536, 12, 6)
    # Transformers' Llama wants a width that the heads divide: said before any work is done.
    eight = replace(preset("smollm2_135m"), heads=8, kv_heads=8)
    with pytest.raises(InputError, match=r"heads is 0\.125, and heads is 7: .* choose another share"):
        Pruning(heads=0.125).apply(eight)


def test_data_and_models_that_are_refused(dense: tuple[Path, Model]) -> None:
    model = dense[1]
    for count in (0, 13):
        with pytest.raises(InputError, match=f"queries is {count}: small has 12"):
            choose_queries(DATA, count)
    assert [p.query for p in choose_queries(DATA, 3)] == [0, 5, 11]
    with pytest.raises(InputError, match="candidates is 0"):
        make_batches(model, DATA, choose_queries(DATA, 1), candidates=0)
    base = replace(model, contract=replace(model.contract, kind="base", prompts={}))
    with pytest.raises(InputError, match="the model is a base: give the model folder of a ranker or a judge"):
        make_batches(base, DATA, choose_queries(DATA, 1))
    reads = replace(model, contract=replace(model.contract, mixlm=MixLMPart(1, 64)))
    with pytest.raises(
        InputError, match=r"the model reads MixLM's embeddings.* prune the ranker of full text"
    ):
        prune_model(reads, DATA, Pruning(mlp=0.5), queries=1)


def test_command_writes_a_model_that_does_all_a_model_does(
    dense: tuple[Path, Model],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, model = dense
    monkeypatch.setattr(jaxsearch.data.datasets, "load_dataset", lambda name, where: DATA)
    output = tmp_path / "small"
    command = ["prune", "--model", str(folder), "--dataset", "x", "--queries", "4", "--candidates", "3"]
    sizes = ["--mlp", "0.5", "--heads", "0.3", "--layers-drop", "1"]
    assert main([*command, *sizes, "--output", str(folder)]) == 2
    assert "which holds the model itself" in capsys.readouterr().err
    part = replace(model.contract, mixlm=MixLMPart(1, model.contract.architecture.width, "e" * 64))
    save_model(tmp_path / "mixlm", model.module, part, model.tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(jaxsearch.data.datasets, "load_dataset", lambda *_: pytest.fail("data was loaded"))
        other = [*command[:2], str(tmp_path / "mixlm"), *command[3:]]
        assert main([*other, *sizes, "--output", str(output)]) == 2
    assert "the model reads MixLM's embeddings" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    assert main([*command, *sizes, "--output", str(tmp_path / "full")]) == 2
    assert "is not empty and holds no model" in capsys.readouterr().err
    assert main([*command, "--output", str(output)]) == 2
    assert main([*command, *sizes, "--queries", "99", "--output", str(output)]) == 2
    assert "queries is 99: small has 12" in capsys.readouterr().err
    assert not output.exists()

    with fast_compilation():
        assert main([*command, *sizes, "--output", str(output)]) == 0
        small = load_model(output)
        assert golden_error(small) < 1e-4
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "full",
        "mixlm",
        "small",
    ]  # nothing half-made beside it
    c = small.contract.architecture
    assert (c.layers, c.mlp_width, c.heads, c.kv_heads, c.head_dim) == (2, 8, 4, 2, 4)
    assert small.contract.golden[0].scores != model.contract.golden[0].scores
    told = json.loads((output / "contract.json").read_text())["training"]
    assert told["name"] == "parent"
    assert told["pruning"]["parent"] == model.hash
    assert told["pruning"]["plan"]["mlp"] == 0.5
    assert told["pruning"]["calibration"]["fingerprint"] == DATA.fingerprint
    assert [layer["layer"] for layer in told["pruning"]["layers"]] == [0, 1]
    assert check_output(output, folder) == output  # a model may be replaced

    decoder = decoder_of(small)
    huggingface.save_decoder(decoder, tmp_path / "hf")
    back = huggingface.load_decoder(tmp_path / "hf")
    for name, value in decoder.layers.arrays().items():
        np.testing.assert_array_equal(back.layers.arrays()[name], value)

    # Recovery: the ranker's task from the pruned folder, the dense model as its teacher.
    with small_world():
        label(model, DATA, tmp_path / "scores")
        options = ["--steps", "2", "--batch-size", "4", "--optimizer.warmup-steps", "1"]
        options += [
            "--task.model.init-from",
            str(output),
            "--task.relevance-teachers",
            str(tmp_path / "scores"),
        ]
        options += ["--task.engagement-teachers", str(tmp_path / "scores")]
        config = load_config("configs/ranker.py:tiny", options)
        start: Any = config.task.build(config).init(nnx.Rngs(0))  # type: ignore[attr-defined]
        np.testing.assert_array_equal(start.action_head[...], small.module.action_head[...])  # type: ignore[union-attr]
        np.testing.assert_array_equal(start.decoder.layers.down[...], decoder.layers.down[...])
        run(config, tmp_path / "recovered")
    recovered = load_model(tmp_path / "recovered" / "model")
    assert recovered.contract.architecture == replace(c, remat=recovered.contract.architecture.remat)
    moved = decoder_of(recovered).layers.arrays()["down"] - decoder.layers.arrays()["down"]
    assert 0 < float(jnp.abs(moved).max()) < 1
