"""The encoder's first lesson: a document's words in the ranker's token embeddings."""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from small_market import STUDENT, TEACHER, fast_compilation, filled, small_tokenizer, small_world
from test_tasks import build, configured, rngs

from jaxsearch.config import ConfigError
from jaxsearch.data.prompts import PromptConfig
from jaxsearch.data.tokenizer import LABELS
from jaxsearch.models.contract import Contract, load_model, save_model
from jaxsearch.models.scorer import BiEncoder, Scorer
from jaxsearch.scoring.mixed import make_document_embedder
from jaxsearch.serving.bundle import golden_error
from jaxsearch.tasks.encoder import EncoderTask, idf, sums, trained_encoder


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with fast_compilation():
        yield


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of another width than the encoder, so that there is a projection."""
    folder, tokenizer = tmp_path_factory.mktemp("ranker"), small_tokenizer()
    labels = {name: tokenizer.label(name) for name in LABELS[:2]}
    model = filled(lambda r: Scorer(TEACHER, label_ids=list(labels.values()), actions=0, rngs=r), 2)
    prompt = PromptConfig("ranker", "short", "tiny")
    save_model(folder, model, Contract("ranker", TEACHER, {"pair": prompt}, labels=labels), tokenizer)
    return folder


@pytest.fixture(scope="module")
def task(ranker: Path) -> EncoderTask:
    with small_world():
        return build("encoder", "--task.ranker", str(ranker), "--task.tokens", "2")


def test_weights_by_hand() -> None:
    texts = [np.array([0, 1, 1]), np.array([0, 2]), np.array([0, 1]), np.array([0, 3])]
    np.testing.assert_allclose(idf(texts, 5), np.log([1, 2, 4, 4, 1]), rtol=1e-6)


def test_parts_by_hand() -> None:
    table = np.array([[1.0, 0], [0, 1], [2, 2]], np.float32)
    weights = np.array([1.0, 10, 0.5], np.float32)
    words = np.array([0, 1, 2, 0, 0])
    np.testing.assert_array_equal(sums(words, 1, weights, table), [[4, 11]])
    np.testing.assert_array_equal(sums(words, 2, weights, table), [[2, 11], [2, 0]])  # three tokens, then two
    # As many parts as tokens: each its own; behind them nothing.
    np.testing.assert_array_equal(
        sums(words, 7, weights, table), [[1, 0], [0, 10], [1, 1], [1, 0], [1, 0], [0, 0], [0, 0]]
    )
    np.testing.assert_array_equal(sums(words, 2, np.array([0, 0, 1.0]), table), [[2, 2], [0, 0]])


def test_a_batch_holds_the_words_of_its_documents(task: EncoderTask, ranker: Path) -> None:
    batch, rows = task.batch(np.arange(3), rngs(0, 3)), task._train[:3]
    table = np.asarray(load_model(ranker).module.decoder.embedding[...])
    assert batch["targets"].shape == (3, 2, table.shape[1])
    for target, where, row in zip(batch["targets"], batch["where"], rows, strict=True):
        words = task._words[row]
        for s, part in enumerate(np.array_split(words, 2)):
            wanted = (task._idf[part][:, None] * table[part]).sum(0)
            np.testing.assert_allclose(target[s], wanted, atol=1e-5)
            assert where[s] == bool(np.any(wanted))
    assert task.num_examples == len(task._train)
    assert not set(task._train) & set(task._dev)


def test_more_embeddings_than_tokens(task: EncoderTask, ranker: Path) -> None:
    with small_world():
        long = build("encoder", "--task.ranker", str(ranker), "--task.tokens", "400")
    batch, longest = long.batch(np.arange(2), rngs(0, 2)), max(map(len, long._texts))
    for target, where, row in zip(batch["targets"], batch["where"], long._train, strict=False):
        words = long._words[row]
        assert len(words) < longest < 400
        wanted = long._idf[words][:, None] * long._table[words]  # each token its own
        np.testing.assert_allclose(target[: len(words)], wanted, atol=1e-5)
        assert not where[len(words) :].any()


def test_shapes_without_data_are_real_ones(task: EncoderTask) -> None:
    real, shapes = task.batch(np.arange(3), rngs(0, 3)), task.batch_shape(3)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), real) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    config = configured("encoder", "--task.tokens", "2")
    abstract = config.task.build_abstract()
    losses = jax.eval_shape(
        lambda batch: abstract.loss(abstract.init(nnx.Rngs(0)), batch, jax.random.key(0)).value(),
        abstract.batch_shape(3),
    )
    assert losses.shape == ()


def test_held_out_documents_and_a_set_without_dev_queries(
    task: EncoderTask, ranker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_world() as world:
        hidden = np.array([0, 3])
        queries = {"train": world.queries["train"], "dev": ()}
        monkeypatch.setattr(
            "jaxsearch.tasks.encoder.open_data",
            lambda config: dataclasses.replace(world, held_out=hidden, queries=queries),
        )
        some = build("encoder", "--task.ranker", str(ranker))
        assert not {0, 3} & {*some._train, *some._dev}
        assert len(some._train) + len(some._dev) == len(world.documents) - 2
        some.export(filled(some.init, 3), tmp_path / "model", configured("encoder"))
        assert golden_error(load_model(tmp_path / "model")) < 1e-4
        same = dataclasses.replace(world, documents=[world.documents[0]] * 4)
        monkeypatch.setattr("jaxsearch.tasks.encoder.open_data", lambda config: same)
        with pytest.raises(ConfigError, match="3 documents to learn from and no word that some of them lack"):
            build("encoder", "--task.ranker", str(ranker))


def test_it_learns_the_words_and_is_exported(
    task: EncoderTask, ranker: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task, model = copy.copy(task), task.init(nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    batch, optimizer = task.batch(np.arange(min(task.num_examples, 8)), rngs(0, 8)), optax.adam(1e-2)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        def value(some: Any) -> Any:
            return task.loss(nnx.merge(graphdef, some), batch, jax.random.key(0)).value()

        loss, grads = jax.value_and_grad(value)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for _ in range(60):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[0] > 0.5  # random directions stand at 1
    assert losses[-1] < 0.1
    trained = nnx.merge(graphdef, params)
    with small_world():
        assert -1 <= task.evaluate(trained)["dev/cosine"] <= 1
        task._dev = task._train[:8]  # what it has learned by heart; each document's cosine, not each batch's
        assert task.evaluate(trained)["dev/cosine"] > 0.9
        # The loss does not see how large embeddings are, here because a projection grew.
        trained.projection.set_value(7 * trained.projection[...])
        task.export(trained, tmp_path / "model", configured("encoder", "--task.ranker", str(ranker)))
        encoder = load_model(tmp_path / "model")
        assert encoder.contract.kind == "encoder"
        assert golden_error(encoder) < 1e-4
        # As large as the ranker's own embeddings: MixLM goes on from it as it is.
        norm, table = encoder.module.decoder.final_norm[...], load_model(ranker).module.decoder.embedding[...]
        given = np.concatenate(
            make_document_embedder(encoder)([task.data.documents[row] for row in task._train])
        )
        np.testing.assert_allclose(np.mean(given**2) / np.mean(np.asarray(table) ** 2), 1, rtol=0.05)
        mixed = build(
            "mixlm", "--task.model.init-from", str(ranker), "--task.encoder.init-from", str(tmp_path / "model"),
            "--task.distill-weight", "0", "--task.tokens", "2",
        )  # fmt: skip
        pair = mixed.init(nnx.Rngs(1))
        for name in ("q", "down"):
            kept = getattr(encoder.module.decoder.layers, name)[...]
            np.testing.assert_array_equal(getattr(pair.encoder.decoder.layers, name)[...], kept)
        np.testing.assert_array_equal(pair.encoder.projection[...], encoder.module.projection[...])
        np.testing.assert_array_equal(pair.encoder.decoder.final_norm[...], norm)
        again = build(
            "encoder", "--task.ranker", str(ranker), "--task.model.init-from", str(tmp_path / "model"), "--task.tokens", "3",
        )  # fmt: skip
        assert "has learned 2 embeddings per document, task.tokens is 3" in caplog.text
        onward = again.init(nnx.Rngs(2))
        np.testing.assert_array_equal(onward.projection[...], encoder.module.projection[...])
        np.testing.assert_array_equal(onward.decoder.final_norm[...], norm)
        with pytest.raises(
            ConfigError, match=r"task\.encoder\.init_from is .* embeddings are \d+ wide, the ranker"
        ):
            build(
                "mixlm", "--task.encoder.init-from", str(tmp_path / "model"), "--task.distill-weight", "0",
                "--task.model.preset", "tiny_student", "--task.tokens", "2",
            )  # fmt: skip
        # An encoder of which only some layers are taken is no trained one, whatever its embeddings were.
        other = dataclasses.replace(again.start.architecture, layers=again.start.architecture.layers + 1)
        start = dataclasses.replace(again.start, architecture=other)
        assert trained_encoder(str(tmp_path / "model"), start, 2, TEACHER.width + 1, "task.encoder") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "task.ranker is empty: give the model folder of what MixLM's ranker"),
        (("--task.tokens", "0"), "task.tokens is 0: use at least 1"),
        (("--task.prompt.kind", "query"), "task.prompt.kind is 'query': this task needs 'document'"),
    ],
)
def test_settings_that_cannot_be(ranker: Path, options: tuple[str, ...], message: str) -> None:
    with small_world(), pytest.raises(ConfigError, match=message):
        build("encoder", *options, *(("--task.ranker", str(ranker)) if "kind" in message else ()))


def test_only_what_reads_pairs_has_words_to_learn(tmp_path: Path) -> None:
    model = filled(lambda r: BiEncoder(STUDENT, rngs=r), 2)
    prompts = {kind: PromptConfig(kind, "short", "tiny") for kind in ("query", "document")}
    save_model(tmp_path, model, Contract("bi_encoder", STUDENT, prompts), small_tokenizer())
    with (
        small_world(),
        pytest.raises(ConfigError, match="a bi_encoder: give the model folder of a ranker, judge or base"),
    ):
        build("encoder", "--task.ranker", str(tmp_path))
    with small_world(), pytest.raises(ConfigError, match=r"task\.ranker: .*nowhere holds no contract.json"):
        build("encoder", "--task.ranker", str(tmp_path / "nowhere"))
