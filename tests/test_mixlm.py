"""MixLM: the encoder, the stage III loss term by term, its curriculum, and what is exported."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_market import (
    STUDENT,
    TEACHER,
    documents,
    fast_compilation,
    filled,
    query,
    small_tokenizer,
    small_world,
)
from test_tasks import build, configured, rngs, write_store

from jaxsearch.config import ConfigError
from jaxsearch.data.prompts import PromptConfig
from jaxsearch.data.records import ACTIONS
from jaxsearch.data.tokenizer import LABELS
from jaxsearch.losses import cosine_distance
from jaxsearch.models.attention import Causal
from jaxsearch.models.contract import Contract, ContractError, load_model, make_module, save_model
from jaxsearch.models.mixlm import DocumentEncoder, MixLM
from jaxsearch.models.scorer import Scorer
from jaxsearch.scoring.mixed import (
    MixedScorer,
    OnDemand,
    keep_fields,
    make_document_embedder,
    make_mixed_scorer,
    mixed_golden_error,
    no_embeddings,
    shuffled,
)
from jaxsearch.scoring.records import JUDGE_LABELS, RecordScorer
from jaxsearch.serving.bundle import golden_error
from jaxsearch.tasks.mixlm import MixLMTask
from jaxsearch.training.health import first_health
from jaxsearch.training.step import Tools

SCORES = (*LABELS[:2], *ACTIONS["jobs"])
MIXED = PromptConfig("ranker", "short", "tiny", features=("company_ctr",))


def make_encoder(tokens: int = 3, seed: int = 1) -> DocumentEncoder:
    """One of another width than the ranker, so that there is a projection."""
    return filled(lambda r: DocumentEncoder(STUDENT, tokens=tokens, width=TEACHER.width, rngs=r), seed)


def make_ranker() -> Scorer:
    ids = [small_tokenizer().label(name) for name in LABELS[:2]]
    return filled(lambda r: Scorer(TEACHER, label_ids=ids, actions=1, rngs=r), 2)


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with fast_compilation():
        yield


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """On stored scores of relevance and all actions; trained by nobody yet."""
    with small_world() as world:
        folder = tmp_path_factory.mktemp("scores")

        def teacher(q: int, row: int) -> tuple[float, ...]:
            return (row / 4, 0.5, *np.sin(row + np.arange(len(ACTIONS["jobs"]))))

        store = write_store(folder / "ranker", world, "ranker", SCORES, teacher)
        judge = write_store(folder / "judge", world, "judge", JUDGE_LABELS, lambda q, row: np.eye(5)[row % 5])
        yield build(
            "mixlm", "--task.relevance-teachers", store, "--task.engagement-teachers", store, "--task.labels", judge,
            "--task.candidates", "3", "--task.tokens", "2", "--task.text-weight", "0.5", "--task.curriculum", "0.5",
            "--task.encoder.vocab-size", "300", "--task.encoder.preset", "tiny",
        )  # fmt: skip


@pytest.fixture(scope="module")
def pair(task: MixLMTask) -> MixLM:
    """Random parameters, which cost no compilation."""
    return filled(task.init, 3)


def changed(task: MixLMTask, **settings: Any) -> MixLMTask:
    """The task with another loss."""
    other = object.__new__(MixLMTask)
    vars(other).update(vars(task), config=dataclasses.replace(task.config, **settings))
    return other


# --- the encoder -----------------------------------------------------------------------------------------------------


def test_the_last_hidden_states_are_kept() -> None:
    encoder = make_encoder(tokens=3)
    ids = np.arange(1, 6)[None] + np.array([0, 20, 40])[:, None]
    where = np.arange(5)[None] < np.array([5, 2, 0])[:, None]
    found = np.asarray(encoder(jnp.asarray(ids), jnp.asarray(where)))
    assert found.shape == (3, 3, TEACHER.width)
    for row, length in enumerate((5, 2)):
        alone = jnp.asarray(ids[row : row + 1, :length])
        places = jnp.arange(length)[None]
        hidden, _ = encoder.decoder(encoder.decoder.embed(alone), places, Causal(jnp.ones((1, length), bool)))
        expected = (np.asarray(hidden)[0] @ np.asarray(encoder.projection[...]))[-3:]
        np.testing.assert_allclose(found[row, : len(expected)], expected, atol=1e-5)
    assert not found[1, 2:].any()  # shorter than T_S
    assert not found[2].any()  # padding of a batch


def test_no_projection_where_widths_agree_and_the_scale_of_tokens() -> None:
    encoder = filled(lambda r: DocumentEncoder(STUDENT, tokens=1, width=STUDENT.width, rngs=r), 0)
    assert encoder.projection is None
    encoder.fit_scale(0.01 * jnp.ones((4, STUDENT.width)))
    found = np.asarray(encoder(jnp.arange(40).reshape(8, 5), jnp.ones((8, 5), bool)))
    assert 0.005 < np.sqrt((found**2).mean()) < 0.02


# --- scoring ---------------------------------------------------------------------------------------------------------


def test_mixed_scores_are_those_of_a_plain_forward_pass() -> None:
    ranker, encoder, tokenizer = make_ranker(), make_encoder(), small_tokenizer()
    embedder = make_embedder(encoder)
    made = OnDemand(embedder, documents())
    scorer = MixedScorer(ranker, tokenizer, MIXED, documents(), made, text_fields=("company",))
    queries, rows = [query("a", 0), query("b", 5)], [np.array([0, 3, 6]), np.array([3])]
    prefixes, lists = scorer.tokens(queries, rows)
    found = scorer(queries, rows)
    assert scorer.embedded == 8
    fields = [part.ids for part in scorer.room.documents(keep_fields(documents(), ["company"]))]
    assert all(fields)
    for q, some in enumerate(rows):
        for place, row in enumerate(some):
            (embeddings,) = embedder([documents()[row]])
            pair = scorer.room.pairs([scorer.room.pair_text(queries[q], documents()[row])])[0]
            assert pair
            tail = fields[row] + pair + scorer.room.suffix
            assert list(lists[q][place].tokens) == tail
            embed = ranker.decoder.embed
            x = jnp.concatenate([embed(jnp.array(prefixes[q])), embeddings, embed(jnp.array(tail))])[None]
            positions = jnp.arange(x.shape[1])[None]
            hidden, _ = ranker.decoder(x, positions, Causal(jnp.ones(positions.shape, bool)))
            expected = np.asarray(hidden)[0, -1] @ np.asarray(ranker.label_matrix()).T
            np.testing.assert_allclose(found[q][place], expected, atol=1e-4)


def make_embedder(encoder: DocumentEncoder) -> Any:
    from jaxsearch.scoring.mixed import DocumentEmbedder

    return DocumentEmbedder(encoder, small_tokenizer(), PromptConfig("document", "short", "tiny"), tokens=64)


def test_documents_without_an_embedding_are_read_as_text() -> None:
    ranker, made = make_ranker(), OnDemand(make_embedder(make_encoder()), documents())
    queries, rows = [query("a", 0)], [np.array([0, 1, 2, 3])]

    def some(wanted: np.ndarray) -> list:
        return [values if row % 2 else None for row, values in zip(wanted, made(wanted), strict=True)]

    def scores(fetch: Any) -> np.ndarray:
        return MixedScorer(ranker, small_tokenizer(), MIXED, documents(), fetch)(queries, rows)[0]

    text = RecordScorer(ranker, small_tokenizer(), MIXED, documents())(queries, rows)[0]
    mixed, embedded = scores(some), scores(made)
    np.testing.assert_allclose(mixed[::2], text[::2], atol=1e-4)
    np.testing.assert_allclose(mixed[1::2], embedded[1::2], atol=1e-4)
    np.testing.assert_allclose(scores(no_embeddings), text, atol=1e-4)
    assert np.abs(embedded - text).max() > 0.01
    other = scores(shuffled(made, rows[0]))
    assert (np.abs(other - embedded).max(axis=1) > 0.01).all()


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_document_is_encoded_once_and_reaches_every_query(task: MixLMTask, pair: MixLM) -> None:
    batch = task.batch(np.arange(6), rngs(0, 6))
    lengths = batch["documents"].where.sum(axis=1)
    assert len(lengths) == 12  # eight documents for six queries: two per query
    assert (lengths > 0).sum() == len({bytes(t) for t in batch["documents"].tokens[lengths > 0]}) <= 8
    assert batch["items"].where.sum() == batch["mixed"].where.sum() == 18
    jitted = jax.jit(lambda encoder, tokens, where: encoder(tokens, where))
    table = np.asarray(nnx.jit(task.embedded)(pair, batch).embeddings)
    for i, index in enumerate(range(6)):
        example = task.examples[index]
        chosen = task.choose(example, 3, rngs(0, 6)[i])
        for slot, row in enumerate(example.documents[chosen]):
            ids = task._texts[row]
            tokens, where = np.zeros((1, 32), np.int32), np.arange(32)[None] < len(ids)
            tokens[0, : len(ids)] = ids
            alone = np.asarray(jitted(pair.encoder, tokens, where))[0]
            np.testing.assert_allclose(table[i, 2 * slot : 2 * slot + 2], alone, atol=1e-5)


def test_candidates_without_room_are_left_out(task: MixLMTask) -> None:
    tight = changed(task, unique_documents=1)
    batch = tight.batch(np.arange(4), rngs(0, 4))
    assert batch["documents"].tokens.shape[0] == 4
    where = batch["mixed"].where
    np.testing.assert_array_equal(where, batch["items"].where)
    assert 4 <= where.sum() < 12
    for name in ("relevance_0", "engagement_0", "labels"):
        np.testing.assert_array_equal(np.isfinite(batch[name]).all(axis=-1), where)
    assert batch["gather"].max() < 8


def test_shapes_without_data_are_real_ones(task: MixLMTask) -> None:
    real = task.batch(np.arange(4), rngs(0, 4))
    abstract = task.config.build_abstract()
    shapes = abstract.batch_shape(4)
    assert jax.tree.structure(real) == jax.tree.structure(shapes)
    for a, b in zip(jax.tree.leaves(real), jax.tree.leaves(shapes), strict=True):
        assert a.dtype == b.dtype
        assert all(x <= y for x, y in zip(a.shape, b.shape, strict=True))
    nnx.eval_shape(lambda: abstract.init(nnx.Rngs(0)))


# --- the loss --------------------------------------------------------------------------------------------------------

OFF = {"sft_weight": 0.0, "distill_weight": 0.0, "align_weight": 0.0, "text_weight": 0.0}
TERMS = {
    "sft": ({"sft_weight": 1.0}, {"sft_kl", "sft_listwise"}),
    "distill": ({"distill_weight": 1.0}, {"kl", "listwise", "engagement"}),
    "pred": ({"align_weight": 1.0, "hidden_weight": 0.0}, {"pred_kl", "pred_listwise", "pred_engagement"}),
    "hidden": ({"align_weight": 1.0, "pred_weight": 0.0}, {"hidden"}),
}


def gradient(task: MixLMTask, pair: MixLM, batch: Any) -> tuple[set[str], Any]:
    """The names of the terms, and the gradient of their sum."""
    graphdef, state = nnx.split(pair)

    def value(state: Any) -> Any:
        losses = task.loss(nnx.merge(graphdef, state), batch, jax.random.key(0))
        return losses.value(), losses.terms()

    grads, terms = jax.jit(jax.grad(value, has_aux=True))(state)
    return set(terms), nnx.to_pure_dict(grads)


def test_a_term_that_is_off_leaves_its_gradient_out(task: MixLMTask, pair: MixLM) -> None:
    batch = task.batch(np.arange(4), rngs(0, 4))

    def names(task: MixLMTask) -> set[str]:
        return set(nnx.eval_shape(lambda pair: task.loss(pair, batch, jax.random.key(0)).terms(), pair))

    for settings, expected in TERMS.values():
        assert names(changed(task, **OFF | settings)) == expected
    whole = changed(task, text_weight=0.0)
    left, mine = gradient(changed(whole, distill_weight=0.0, hidden_weight=0.0), pair, batch)
    right, theirs = gradient(changed(whole, sft_weight=0.0, pred_weight=0.0), pair, batch)
    found, grads = gradient(whole, pair, batch)
    assert left == TERMS["sft"][1] | TERMS["pred"][1]
    assert right == TERMS["distill"][1] | TERMS["hidden"][1]
    assert found == left | right
    for total, a, b in zip(*map(jax.tree.leaves, (grads, mine, theirs)), strict=True):
        np.testing.assert_allclose(total, a + b, rtol=1e-3, atol=1e-5)
    for one in (mine, theirs):
        for model in ("encoder", "ranker"):
            assert max(np.abs(x).max() for x in jax.tree.leaves(one[model])) > 1e-3


def test_the_alignment_moves_the_encoder_alone(task: MixLMTask, pair: MixLM) -> None:
    batch = task.batch(np.arange(4), rngs(0, 4))
    found, grads = gradient(changed(task, **OFF | {"align_weight": 1.0}), pair, batch)
    assert found == TERMS["pred"][1] | TERMS["hidden"][1]
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(grads["ranker"]))
    assert min(np.abs(x).max() for x in jax.tree.leaves(grads["encoder"])) > 0


def test_the_full_text_learns_by_text_weight(task: MixLMTask, pair: MixLM) -> None:
    batch = task.batch(np.arange(4), rngs(0, 4))
    # Tokens that stand in documents alone are read by the full-text pass only.
    read = {int(t) for part in (batch["prefix"].tokens, batch["mixed"].tokens) for t in part.ravel()}
    labels = set(task.labels.values())
    words = sorted({int(t) for t in batch["items"].tokens.ravel()} - read - labels)
    assert len(words) >= 4
    for weight, names in ((0.0, ("",)), (1.0, ("", "text_"))):
        settings = OFF | {"distill_weight": 1.0, "text_weight": weight}
        found, grads = gradient(changed(task, **settings), pair, batch)
        assert found == {f"{a}{b}" for a in names for b in ("kl", "listwise", "engagement")}
        moved = np.abs(np.asarray(grads["ranker"]["decoder"]["embedding"])[words]).max(axis=1)
        assert moved.min() > 0 if weight else not moved.any()


def test_cosine_distance_by_hand() -> None:
    x = jnp.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [jnp.nan, 1.0]])
    y = jnp.array([[4.0, 3.0], [-2.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    where = jnp.array([True, True, True, False])
    found = cosine_distance(x, y, where=where, reduction="none")
    np.testing.assert_allclose(found, [1 - 24 / 25, 2, 1, 0], atol=1e-6)
    grads = jax.grad(lambda x, y: cosine_distance(x, y, where=where), (0, 1))(x, y)
    assert np.isfinite(grads[0]).all()
    assert not np.asarray(grads[0])[3].any()
    assert not np.asarray(grads[1]).any()


def test_curriculum(task: MixLMTask) -> None:
    assert task.first_phase == 2  # half of three steps, rounded
    other = changed(task, align_after=0.25)
    for step, task_share, align in ((0, 0, 1), (1, 0, 1), (2, 1, 0.25), (9, 1, 0.25)):
        assert [float(x) for x in other.shares(step)] == [task_share, align]
    assert changed(task, align_weight=0.0).first_phase == 0
    assert changed(task, curriculum=0.0).first_phase == 0


def test_the_step_learns_and_the_first_phase_aligns_alone(task: MixLMTask, pair: MixLM) -> None:
    import optax

    from jaxsearch.training.step import TrainState, split_model

    quick = changed(task, text_weight=0.0, curriculum=0.5)
    quick._steps = 40
    batch = quick.batch(np.arange(6), rngs(0, 6))
    graphdef, params, frozen, rest = split_model(pair, nnx.Param)
    optimizer = optax.adam(3e-3)
    tools = Tools(graphdef, nnx.Param, nnx.to_pure_dict(frozen), optimizer)
    params = nnx.to_pure_dict(params)
    state = TrainState(
        jnp.int32(0),
        params,
        optimizer.init(params),
        nnx.to_pure_dict(rest),
        jnp.float32(0),
        {},
        jnp.int32(0),
        first_health(),
    )

    @jax.jit
    def step(state: TrainState) -> Any:
        new, losses = quick.step(state, batch, jax.random.key(0), tools)
        return dataclasses.replace(new, step=state.step + 1), {
            name: total / n for name, (total, n) in losses.terms().items()
        }

    rows = []
    for _ in range(40):
        state, terms = step(state)
        rows.append({name: float(value) for name, value in terms.items()})
    assert all(row["kl"] == row["sft_kl"] == row["engagement"] == 0 for row in rows[:20])
    assert rows[0]["hidden"] > 0.05
    assert rows[19]["hidden"] < 0.7 * rows[0]["hidden"]
    assert rows[39]["kl"] + rows[39]["listwise"] < 0.8 * (rows[20]["kl"] + rows[20]["listwise"])


# --- starts, evaluation and export ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(task: MixLMTask, pair: MixLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixlm") / "model"
    task.export(pair, folder, configured("mixlm"))
    return folder


def test_exported_models_reproduce_their_golden_scores(exported: Path, pair: MixLM) -> None:
    ranker, encoder = load_model(exported), load_model(exported / "encoder")
    assert ranker.contract.mixlm is not None
    assert ranker.contract.mixlm.encoder == encoder.hash
    assert (ranker.contract.mixlm.tokens, ranker.contract.mixlm.width) == (2, TEACHER.width - 8)
    assert ranker.contract.actions == ACTIONS["jobs"]
    assert golden_error(ranker) <= 1e-4  # as text
    assert golden_error(encoder) <= 1e-4
    assert mixed_golden_error(ranker, encoder) <= 1e-4
    broken = np.asarray(encoder.module.decoder.final_norm[...])[::-1]
    encoder.module.decoder.final_norm.set_value(jnp.asarray(broken))
    assert mixed_golden_error(ranker, encoder) > 1e-3
    assert golden_error(encoder) > 1e-3


def test_a_foreign_encoder_is_refused(exported: Path, tmp_path: Path) -> None:
    ranker, encoder = load_model(exported), load_model(exported / "encoder")
    save_model(tmp_path, make_module(encoder.contract, nnx.Rngs(5)), encoder.contract, encoder.tokenizer)
    with pytest.raises(
        ContractError, match=r"the ranker reads embeddings of encoder .* this is .*: give the enc"
    ):
        mixed_golden_error(ranker, load_model(tmp_path))
    with pytest.raises(ContractError, match="a ranker encodes no documents"):
        make_document_embedder(ranker)
    with pytest.raises(ContractError, match="this encoder reads no embeddings"):
        make_mixed_scorer(encoder, [], no_embeddings)
    contract = dataclasses.replace(ranker.contract, mixlm=None)
    save_model(tmp_path, ranker.module, contract, ranker.tokenizer)
    assert load_model(tmp_path).contract.mixlm is None
    with pytest.raises(ContractError, match="this ranker reads no embeddings"):
        make_mixed_scorer(load_model(tmp_path), [], no_embeddings)
    bad = Contract("base", contract.architecture, {}, mixlm=ranker.contract.mixlm)
    save_model(tmp_path, make_module(bad, nnx.Rngs(0)), bad, ranker.tokenizer)
    with pytest.raises(ContractError, match="an encoder has one, a ranker may"):
        load_model(tmp_path)


def test_stage_three_starts_from_stage_two_and_a_retriever(exported: Path, tmp_path: Path) -> None:
    with small_world():
        later = build(
            "mixlm", "--task.model.init-from", str(exported), "--task.encoder.init-from", str(exported / "encoder"),
            "--task.distill-weight", "0", "--task.text-fields", "company",
        )  # fmt: skip
        assert later.actions == ACTIONS["jobs"]  # the ranker has their heads, though no store teaches them
        model = later.init(nnx.Rngs(0))
        before = load_model(exported).module
        assert isinstance(before, Scorer)
        np.testing.assert_array_equal(model.ranker.action_head[...], before.action_head[...])
        np.testing.assert_array_equal(model.ranker.decoder.layers.q[...], before.decoder.layers.q[...])
        encoder = load_model(exported / "encoder").module.decoder
        np.testing.assert_array_equal(model.encoder.decoder.layers.q[...], encoder.layers.q[...])
        # A trained encoder goes on as it is: its scale is not fitted again.
        np.testing.assert_array_equal(model.encoder.decoder.final_norm[...], encoder.final_norm[...])
        trained = load_model(exported / "encoder").module.projection
        assert (model.encoder.projection is None) == (trained is None)
        if trained is not None:
            np.testing.assert_array_equal(model.encoder.projection[...], trained[...])
        labels = later.examples[0].targets["labels"][:, 0]  # grades 4, 3, 0, 0 and one that nobody graded
        graded = labels[np.isfinite(labels)]
        np.testing.assert_allclose(np.sort(graded), np.log([1 / 49, 1 / 49, 3, 49]), rtol=1e-4)
        assert np.isnan(later._label(later.examples[0], {})).all()  # a query in a store that nobody judged
        for options, message in (
            (["--task.tokens", "0"], "task.tokens is 0: use at least 1"),
            (["--task.teachers", "online"], "MixLM learns from stores"),
            (
                ["--task.text-fields", "rating"],
                "task.text_fields has 'rating': documents have company, location, title",
            ),
            ([], "task.relevance_teachers is empty"),
            (["--task.curriculum", "1"], "task.curriculum is 1"),
            (["--task.encoder.init-from", "nowhere"], "encoder.init_from is 'nowhere': give a model folder"),
        ):
            alone = ["--task.distill-weight", "0"] if "fields" in message or "nowhere" in message else []
            with pytest.raises(ConfigError, match=message):
                build("mixlm", *options, *alone)


def test_evaluation_tells_embeddings_text_and_chance_apart(task: MixLMTask, pair: MixLM) -> None:
    with small_world():
        figures = task.evaluate(pair)
    for name in ("ndcg@10", "poor_match@10", "mrr"):
        assert {f"dev/{way}{name}" for way in ("", "text/", "shuffled/")} <= figures.keys()
    assert {f"dev/auroc/{name}" for name in ACTIONS["jobs"]} <= figures.keys()
    assert len({round(figures[f"dev/{way}ndcg@10"], 6) for way in ("", "text/", "shuffled/")}) > 1


def test_queries_that_are_read_as_text_are_shared_by_all_devices(task: MixLMTask, pair: MixLM) -> None:
    some, batch = changed(task, text_weight=0.5, text_every=2), task.batch(np.arange(4), rngs(0, 4))

    def losses(task: MixLMTask) -> Any:
        return nnx.eval_shape(lambda pair: task.loss(pair, batch, jax.random.key(0)).value(), pair)

    losses(some)  # one device
    mesh = jax.sharding.AbstractMesh((2, 1, 1), ("data", "fsdp", "tensor"))
    with jax.sharding.use_abstract_mesh(mesh):
        losses(some)
    with (
        jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2, 2, 1), ("data", "fsdp", "tensor"))),
        pytest.raises(ConfigError, match=r"text_every is 2: batch_size 4 must be a multiple .* = 8"),
    ):
        losses(some)


def test_text_of_a_part_of_a_batch(task: MixLMTask, pair: MixLM) -> None:
    """Each second query is read as text: the text terms are those of a batch of these queries alone."""
    settings = OFF | {"distill_weight": 1.0, "text_weight": 1.0}
    batch = task.batch(np.arange(4), rngs(0, 4))
    half = {k: jax.tree.map(lambda x: x[::2], v) if k != "documents" else v for k, v in batch.items()}
    key = jax.random.key(0)
    found = changed(task, **settings, text_every=2).loss(pair, batch, key).terms()
    whole = changed(task, **settings, text_every=1).loss(pair, batch, key).terms()
    alone = changed(task, **settings, text_every=1).loss(pair, half, key).terms()
    for name in ("text_kl", "text_listwise", "text_engagement"):
        np.testing.assert_allclose(found[name], alone[name], rtol=1e-5)
        assert float(whole[name][1]) > float(found[name][1])
    np.testing.assert_allclose(found["kl"], whole["kl"], rtol=1e-5)
