"""From records to scores: prompts and tokens in the right order, embeddings in the right rows, weights as they were."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import softmax
from small_market import STUDENT, dataset, fast_compilation, filled, small_tokenizer

from jaxsearch.data.datasets import Dataset
from jaxsearch.data.prompts import PromptConfig
from jaxsearch.data.records import Document, Query
from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.errors import InputError
from jaxsearch.models.scorer import BiEncoder, Scorer
from jaxsearch.scoring import records as records_module
from jaxsearch.scoring.batcher import Batcher
from jaxsearch.scoring.prefill import PrefillScorer
from jaxsearch.scoring.records import (
    JUDGE_LABELS,
    RANKER_LABELS,
    Embedder,
    RecordScorer,
    action_log_odds,
    expected_grade,
    grade_probabilities,
    relevance_log_odds,
)

PAIR = PromptConfig(
    "ranker", style="short", chat="tiny", features=("company_ctr", "near", "position"), max_document_tokens=9
)
QUERY, DOCUMENT = (PromptConfig(kind, style="short", chat="tiny") for kind in ("query", "document"))


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with fast_compilation():
        yield


@pytest.fixture(scope="module")
def data() -> Dataset:
    return dataset()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(scope="module")
def scorer(tokenizer: Tokenizer) -> Scorer:
    labels = [tokenizer.label(name) for name in RANKER_LABELS]
    return filled(lambda rngs: Scorer(STUDENT, label_ids=labels, actions=2, rngs=rngs), 0)


@pytest.fixture(scope="module")
def encoder() -> BiEncoder:
    return filled(lambda rngs: BiEncoder(STUDENT, rngs=rngs), 1)


def test_items_are_document_then_pair_then_suffix(
    data: Dataset, tokenizer: Tokenizer, scorer: Scorer
) -> None:
    records = RecordScorer(scorer, tokenizer, PAIR, data.documents)
    rows = np.array([3, 0])
    texts = ["Senior welder; Works 1; Boston", "Senior nurse; Works 0; Austin"]
    pairs = [" rate0.20 near False position7", " rate0.10 near True position1"]
    expected = [
        tokenizer.encode([text])[0][:9] + tokenizer.encode([pair])[0] + records.room.suffix
        for text, pair in zip(texts, pairs, strict=True)
    ]
    assert records.items(data.queries["dev"][0], rows, [7, 1]) == expected
    assert records.items(data.queries["dev"][0], rows)[1] == expected[1]
    lengths = [len(ids) for ids in tokenizer.encode([records.room.document_text(d) for d in data.documents])]
    assert records.truncated.tolist() == [max(length - 9, 0) for length in lengths]
    assert records.truncated.max() > 0


def test_scores_are_the_prefills(data: Dataset, tokenizer: Tokenizer, scorer: Scorer) -> None:
    records = RecordScorer(scorer, tokenizer, PAIR, data.documents)
    queries = list(data.queries["train"][:5])
    candidates = [np.array(rows, np.int64) for rows in ([0, 1, 2], [], [7], [3, 3], [5, 0])]
    done: list[int] = []
    found = records(queries, candidates, done.append)
    prefixes = records.room.prefixes(queries)
    items = [records.items(query, rows) for query, rows in zip(queries, candidates, strict=True)]
    expected = PrefillScorer(scorer).score_lists(prefixes, items)
    assert [scores.shape for scores in found] == [(3, 4), (0, 4), (1, 4), (2, 4), (2, 4)]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_array_equal(found[3][0], found[3][1])
    assert np.ptp(np.concatenate(found)[:, 0]) > 0.01
    assert sum(done) == 5
    with pytest.raises(ValueError, match="zip"):
        records(queries, candidates[:2])


def test_scorers_and_embedders_keep_the_weights_they_were_given(data: Dataset, tokenizer: Tokenizer) -> None:
    """A module that is trained on does not change what was made from it, nor the other way round."""
    labels = [tokenizer.label(name) for name in RANKER_LABELS]
    scorer = filled(lambda rngs: Scorer(STUDENT, label_ids=labels, actions=0, rngs=rngs), 2)
    encoder = filled(lambda rngs: BiEncoder(STUDENT, rngs=rngs), 2)
    records = RecordScorer(scorer, tokenizer, PAIR, data.documents)
    embedder = Embedder(encoder, tokenizer, QUERY, DOCUMENT, tokens=64)

    def use() -> tuple[np.ndarray, np.ndarray]:
        return records(data.queries["dev"][:1], [np.array([0, 1])])[0], embedder.documents(data.documents[:2])

    before = use()
    for module in (scorer, encoder):
        module.decoder.embedding.set_value(module.decoder.embedding[...] * -2 + 0.1)
    for new, old in zip(use(), before, strict=True):
        np.testing.assert_array_equal(new, old)
    changed = Embedder(encoder, tokenizer, QUERY, DOCUMENT, tokens=64).documents(data.documents[:2])
    assert np.abs(changed - before[1]).max() > 0.01


def test_embeddings_stand_in_the_rows_of_their_texts(
    data: Dataset, tokenizer: Tokenizer, encoder: BiEncoder
) -> None:
    embedder = Embedder(
        encoder, tokenizer, QUERY, DOCUMENT, tokens=96
    )  # several groups, some of them not full
    lengths = [1, 30, 3, 9, 30, 2, 60, 5, 1]
    documents = [Document(f"d{i}", {"t": "nurse " * n + str(i)}) for i, n in enumerate(lengths)]
    found = embedder.documents(documents)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    parts = embedder._document_room.documents(documents)
    width = max(len(part.ids) for part in parts)
    tokens = np.stack([np.pad(part.ids, (0, width - len(part.ids))) for part in parts])
    where = np.arange(width)[None] < np.array([len(part.ids) for part in parts])[:, None]
    direct = jax.jit(lambda t, w: encoder(t, w))(jnp.asarray(tokens), jnp.asarray(where))
    np.testing.assert_allclose(found, direct, atol=1e-5)
    order = np.random.default_rng(0).permutation(len(documents))
    np.testing.assert_allclose(embedder.documents([documents[i] for i in order]), found[order], atol=1e-5)
    assert np.abs(found[0] - found[8]).max() > 1e-3  # their last words differ
    assert embedder.documents([]).shape == (0, STUDENT.width)
    assert embedder.queries(data.queries["dev"]).shape == (4, STUDENT.width)


def test_a_text_longer_than_any_bucket_is_embedded_whole(tokenizer: Tokenizer, encoder: BiEncoder) -> None:
    embedder = Embedder(encoder, tokenizer, QUERY, DOCUMENT, tokens=16)
    embedder._lengths = (8, 16)
    one, other = (Document("d", {"t": "nurse " * 30 + end}) for end in ("welder", "chef"))
    a, b = embedder.documents([one, other])
    assert np.abs(a - b).max() > 1e-3


def test_embedders_of_one_architecture_share_what_is_compiled(
    data: Dataset, tokenizer: Tokenizer, encoder: BiEncoder
) -> None:
    from jaxsearch.scoring.records import _embed

    first = Embedder(encoder, tokenizer, QUERY, DOCUMENT, tokens=64).documents(data.documents)
    size = _embed._cache_size()
    graph, state = nnx.split(encoder)
    twin = nnx.merge(graph, jax.tree.map(lambda x: x + 0, state))
    again = Embedder(twin, tokenizer, QUERY, DOCUMENT, tokens=64).documents(data.documents)
    np.testing.assert_array_equal(first, again)
    assert _embed._cache_size() == size


def test_reading_logits_by_hand() -> None:
    ranker = np.array([[2.0, -1.0, 0.5, -3.0], [0.0, 0.25, 9.0, 1.0]], np.float32)
    assert relevance_log_odds(ranker).tolist() == [3.0, -0.25]
    assert action_log_odds(ranker).tolist() == [[0.5, -3.0], [9.0, 1.0]]
    judge = np.array([[0, 0, 0, 0, 0], [-1000, 0, 0, -1000, 1000], [5, 1, 2, 3, 4]], np.float32)
    np.testing.assert_allclose(grade_probabilities(judge), softmax(judge, axis=-1), rtol=1e-6)
    assert expected_grade(judge)[:2].tolist() == pytest.approx([2.0, 4.0])
    assert expected_grade(judge).dtype == np.float32
    assert (len(JUDGE_LABELS), RANKER_LABELS) == (5, ("Yes", "No"))


def test_features_reach_the_score(data: Dataset, tokenizer: Tokenizer, scorer: Scorer) -> None:
    """Two postings that differ in a pair feature alone score differently, and equal ones equally."""
    posting = data.documents[0]
    twin = dataclasses.replace(posting, id="twin")
    liked = dataclasses.replace(posting, id="liked", numeric={"company_ctr": 0.9})
    records = RecordScorer(scorer, tokenizer, PAIR, [posting, twin, liked])
    (scores,) = records(data.queries["dev"][:1], [np.arange(3)])
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-6)
    assert np.abs(scores[0] - scores[2]).max() > 1e-3


def test_settled_scorers_give_the_same_bits_whatever_came_before(
    data: Dataset, tokenizer: Tokenizer, scorer: Scorer
) -> None:
    typical = list(data.queries["train"][:6]), [np.arange(4)] * 6
    odd = list(data.queries["train"][6:9]), [np.arange(8), np.arange(1), np.arange(7)]
    found = []
    for history in ([typical, odd], [odd]):
        records = RecordScorer(scorer, tokenizer, PAIR, data.documents)
        records.settle(*typical)
        assert records.prefill.compiled_shapes == ()  # nothing is run for it
        found.append([records(*lists) for lists in history][-1])
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_tokens_of_a_query_are_kept_and_bounded(
    data: Dataset, tokenizer: Tokenizer, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = RecordScorer(scorer, tokenizer, PAIR, data.documents)
    asked: list[int] = []
    real = records.room.prefixes
    monkeypatch.setattr(
        records.room, "prefixes", lambda queries: (asked.append(len(queries)), real(queries))[1]
    )
    monkeypatch.setattr(records_module, "PREFIXES", 3)
    queries = list(data.queries["train"][:4])
    other = dataclasses.replace(queries[0], id="another id, the same words")
    assert records.prefixes([queries[0], queries[1], other]) == real([queries[0], queries[1], other])
    assert records.prefixes([queries[1], queries[0]]) == real([queries[1], queries[0]])
    assert asked == [2]
    near = dataclasses.replace(queries[0], filters={"remote": "yes"})
    records.prefixes([near])
    assert records.prefixes(queries) == real(queries)
    assert asked == [2, 1, 2]
    assert len(records._prefixes) == 3


def test_concurrent_requests_share_calls(data: Dataset, tokenizer: Tokenizer, scorer: Scorer) -> None:
    records = RecordScorer(scorer, tokenizer, PAIR, data.documents)
    queries = list(data.queries["train"][:6])
    rows = [np.arange(i + 1) for i in range(6)]
    expected = records(queries, rows)

    def prepare(requests: Sequence[tuple[Query, np.ndarray]]) -> list[tuple]:
        return list(zip(*records.tokens(*zip(*requests, strict=True)), strict=True))

    def score(tokens: Sequence[tuple]) -> list[np.ndarray]:
        return records.prefill.score_lists(*zip(*tokens, strict=True))

    calls = records.prefill.usage.calls
    with Batcher(prepare, score, wait_ms=5_000, most=7) as batcher:
        futures = [batcher.submit(request) for request in zip(queries, rows, strict=True)]
        empty = batcher.submit((dataclasses.replace(queries[0], text=" "), rows[0]))
        for future, wanted in zip(futures, expected, strict=True):
            np.testing.assert_allclose(future.result(60), wanted, atol=1e-5)
        with pytest.raises(InputError, match="is empty"):
            empty.result(60)
    assert records.prefill.usage.calls > calls
