"""Samples of long documents: which tokens are drawn, and that batches hold them where they stand in the whole."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_market import fast_compilation, filled, small_world
from test_tasks import build, rngs, write_store

from jaxsearch.config import ConfigError
from jaxsearch.data.records import ACTIONS
from jaxsearch.data.sampling import RUN, sample_places
from jaxsearch.models.attention import Causal
from jaxsearch.models.decoder import Decoder
from jaxsearch.scoring.records import RANKER_LABELS

ROOM = 8


@given(st.integers(1, 400), st.integers(0, 300), st.integers(0, 2**32 - 1))
def test_samples_fill_their_room_in_order(length: int, room: int, seed: int) -> None:
    places = sample_places(length, room, np.random.default_rng(seed))
    assert len(places) == (min(length, room) if room else length)
    assert (np.diff(places) > 0).all()
    assert places[0] >= 0
    assert places[-1] < length
    kept = room // 4 if 0 < room < length else length
    np.testing.assert_array_equal(places[:kept], np.arange(kept))
    np.testing.assert_array_equal(places[len(places) - kept :], np.arange(length - kept, length))


def test_every_part_of_the_middle_is_read_as_often() -> None:
    rng, counts = np.random.default_rng(0), np.zeros(1000)
    for _ in range(2000):
        counts[sample_places(1000, 160, rng)] += 1
    middle = counts[40 + RUN : -40 - RUN]
    assert abs(middle.mean() / (2000 * 80 / 920) - 1) < 0.05
    assert middle.min() > 0.7 * middle.mean()
    assert middle.max() < 1.3 * middle.mean()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`tasks("ranker", sample)`: the task whose documents are longer than `ROOM` tokens."""
    columns = (*RANKER_LABELS, *ACTIONS["jobs"])
    with fast_compilation(), small_world() as world:
        store = write_store(
            tmp_path_factory.mktemp("scores") / "s",
            world,
            "ranker",
            columns,
            lambda q, row: (row / 4,) * len(columns),
        )

        def make(name: str, sample: int) -> Any:
            more = ["--task.relevance-teachers", store, "--task.candidates", "3"]
            if name == "mixlm":
                more += ["--task.engagement-teachers", store, "--task.tokens", "2"]
            return build(name, *more, "--task.document-sample", str(sample))

        yield make


def test_a_batch_of_samples_reads_tokens_where_they_stand(tasks: Any) -> None:
    whole, sampled = tasks("ranker", 0), tasks("ranker", ROOM)
    indices = np.arange(4)
    full, batch = (task.batch(indices, rngs(0, 4))["items"] for task in (whole, sampled))
    np.testing.assert_array_equal(batch.where, full.where)
    assert batch.tokens.shape[2] < full.tokens.shape[2]
    gaps = 0
    for q, slot in zip(*np.nonzero(batch.where), strict=True):
        n, every = batch.last[q, slot, 1] + 1, full.last[q, slot, 1] + 1
        offsets = batch.offsets[q, slot, :n]
        np.testing.assert_array_equal(batch.tokens[q, slot, :n], full.tokens[q, slot][offsets])
        document = every - n + min(ROOM, every)  # what was left out came from the document alone
        np.testing.assert_array_equal(offsets[ROOM:], np.arange(document, every))
        gaps += int((np.diff(offsets) > 1).any())
    assert gaps > 3
    again = sampled.batch(indices, rngs(1, 4))["items"]
    assert (again.offsets != batch.offsets).any()


def test_room_for_every_document_is_no_sample(tasks: Any) -> None:
    for name in ("ranker", "mixlm"):
        whole, wide = (tasks(name, sample).batch(np.arange(3), rngs(0, 3)) for sample in (0, 500))
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(wide), strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_encoder_reads_samples_and_serves_whole_documents(tasks: Any) -> None:
    task = tasks("mixlm", ROOM)
    batch = task.batch(np.arange(4), rngs(0, 4))
    documents = batch["documents"]
    assert documents.tokens.shape[1] == ROOM
    there = documents.where.any(axis=1)
    for tokens, positions in zip(documents.tokens[there], documents.positions[there], strict=True):
        assert any(
            len(text) > positions[-1] and [text[p] for p in positions] == tokens.tolist()
            for text in task._texts
        )
    assert (np.diff(documents.positions, axis=1) > 1).any()
    shapes = task.batch_shape(4)
    assert [x.shape for x in jax.tree.leaves(batch)] == [x.shape for x in jax.tree.leaves(shapes)]
    assert all(part.truncated == 0 for part in task.encoder_room.documents(task.data.documents))


def plain(decoder: Decoder, tokens: list[int], positions: list[int]) -> np.ndarray:
    """Hidden states [T, D] of one causal pass over these tokens at these positions."""
    x, where = decoder.embed(jnp.array([tokens])), jnp.ones((1, len(tokens)), bool)
    return np.asarray(decoder(x, jnp.array([positions]), Causal(where))[0])[0]


def test_samples_are_read_as_by_a_plain_pass_at_their_places(tasks: Any) -> None:
    task = tasks("mixlm", ROOM)
    pair, batch = filled(task.init, 3), task.batch(np.arange(2), rngs(0, 2))
    prefix, items, documents = batch["prefix"], batch["items"], batch["documents"]
    logits = np.asarray(task.logits(pair.ranker, batch))
    for q, slot in zip(*np.nonzero(items.where), strict=True):
        n, start = items.last[q, slot, 1] + 1, prefix.where[q].sum()
        tokens = [*prefix.tokens[q, :start], *items.tokens[q, slot, :n]]
        hidden = plain(pair.ranker.decoder, tokens, [*range(start), *(start + items.offsets[q, slot, :n])])
        np.testing.assert_allclose(
            logits[q, slot], hidden[-1] @ np.asarray(pair.ranker.label_matrix()).T, atol=1e-4
        )
    found = np.asarray(pair.encoder(*map(jnp.asarray, documents)))
    for m in np.flatnonzero(documents.where.any(axis=1)):
        hidden = plain(pair.encoder.decoder, documents.tokens[m].tolist(), documents.positions[m].tolist())
        np.testing.assert_allclose(found[m], hidden[-2:], atol=1e-5)
    close = np.asarray(pair.encoder(*map(jnp.asarray, documents[:2])))
    assert np.abs(close - found).max() > 1e-3


def test_a_negative_sample_is_refused(tasks: Any) -> None:
    config = tasks("ranker", 0).config
    with pytest.raises(ConfigError, match=r"task\.document_sample is -1: give a number of tokens, or 0"):
        dataclasses.replace(config, document_sample=-1)


def test_a_sample_holds_what_the_encoder_keeps(tasks: Any) -> None:
    config = tasks("mixlm", ROOM).config
    with pytest.raises(
        ConfigError, match=r"document_sample is 8: its last quarter .* 3 tokens .* at least 12"
    ):
        dataclasses.replace(config, tokens=3)
