"""The labelling job: every pair once, resumable, and never over somebody else's scores."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from small_market import Funnel, fast_compilation

from jaxsearch.data.datasets import Pairs
from jaxsearch.data.score_store import ScoreStore, StoreError, read_scores
from jaxsearch.errors import InputError
from jaxsearch.models.contract import ContractError, Model, load_model
from jaxsearch.retrieval.bm25 import Bm25, document_text
from jaxsearch.scoring.label import chosen_pairs, label
from jaxsearch.serving.bundle import make_embedder, make_scorer
from jaxsearch.serving.first_stage import FirstStage


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with fast_compilation():
        yield


@pytest.fixture(scope="module")
def judge(funnel: Funnel) -> Model:
    return load_model(funnel.model("judge"))


def test_every_pair_is_scored_once_by_the_model(funnel: Funnel, judge: Model) -> None:
    meta, found = read_scores(funnel.store("judge"), funnel.data.fingerprint)
    assert (meta.model, meta.kind, meta.dataset) == (judge.hash, "judge", "small")
    assert meta.columns == ("0", "1", "2", "3", "4")
    assert (meta.queries, meta.shards) == (12, 2)
    pairs = {(p.query, int(row)) for p in funnel.data.pairs for row in p.documents}
    assert set(found) == pairs
    query = funnel.data.queries["train"][3]
    rows = funnel.data.pairs[3].documents
    (direct,) = make_scorer(judge, funnel.data.documents)([query], [rows])
    np.testing.assert_allclose(np.stack([found[3, int(row)] for row in rows]), direct, atol=1e-5)


def test_actions_are_columns_too(funnel: Funnel) -> None:
    meta, found = read_scores(funnel.store("engagement_teacher"), funnel.data.fingerprint)
    assert meta.columns == ("Yes", "No", "click", "apply", "dismiss", "bad_fit", "shortlist")
    assert {scores.shape for scores in found.values()} == {(7,)}


def test_a_second_run_makes_only_what_is_missing(funnel: Funnel, judge: Model, tmp_path: Path) -> None:
    first = label(judge, funnel.data, tmp_path, shard=5)
    assert first.pairs == sum(len(p.documents) for p in funnel.data.pairs)
    files = sorted(tmp_path.glob("*.npz"))
    assert len(files) == 3
    whole = read_scores(tmp_path, funnel.data.fingerprint)[1]
    kept = files[0].stat().st_mtime_ns
    files[1].unlink()
    (tmp_path / "scores-00002.tmp").write_bytes(b"half a file")
    again = label(judge, funnel.data, tmp_path, shard=5)
    assert again.pairs == sum(len(p.documents) for p in funnel.data.pairs[5:10])
    assert files[0].stat().st_mtime_ns == kept
    resumed = read_scores(tmp_path, funnel.data.fingerprint)[1]
    assert resumed.keys() == whole.keys()
    for pair, scores in whole.items():
        np.testing.assert_array_equal(resumed[pair], scores)
    assert label(judge, funnel.data, tmp_path, shard=5).pairs == 0


def test_processes_share_the_files(
    funnel: Funnel, judge: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process, expected in ((1, ["00001"]), (0, ["00000", "00001", "00002"])):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        label(judge, funnel.data, tmp_path, per_query=2, shard=4)
        assert sorted(path.stem[-5:] for path in tmp_path.glob("*.npz")) == expected
    found = read_scores(tmp_path, funnel.data.fingerprint)[1]
    assert len(found) == 24


def test_other_models_and_data_are_refused(funnel: Funnel, judge: Model, tmp_path: Path) -> None:
    label(judge, funnel.data, tmp_path, per_query=1)
    other = dataclasses.replace(funnel.data, documents=funnel.data.documents[::-1])
    for model, data, limit, words in (
        (dataclasses.replace(judge, hash="0" * 64), funnel.data, 1, "model"),
        (judge, other, 1, "fingerprint"),
        (judge, funnel.data, 2, "per_query 1 .not 2."),
    ):
        with pytest.raises(StoreError, match=f"already holds scores with .*{words}"):
            label(model, data, tmp_path, per_query=limit)
    with pytest.raises(StoreError, match="the store is stale"):
        read_scores(tmp_path, other.fingerprint)


def test_what_cannot_label(funnel: Funnel, judge: Model, tmp_path: Path) -> None:
    for stage, kind in (("retriever", "bi_encoder"), ("base", "base")):
        with pytest.raises(
            ContractError, match=f"a {kind} gives no scores per pair: label with a judge or ranker"
        ):
            label(load_model(funnel.model(stage)), funnel.data, tmp_path)
    with pytest.raises(InputError, match="per_query is -1: use at least 0"):
        label(judge, funnel.data, tmp_path, per_query=-1)
    with pytest.raises(InputError, match="shard is 0: use at least 1"):
        label(judge, funnel.data, tmp_path, shard=0)
    assert not list(tmp_path.iterdir())


def test_chosen_pairs() -> None:
    pairs = Pairs(7, np.array([9, 3, 5, 1], np.int32), np.zeros(4, np.int32))
    assert chosen_pairs(pairs, 0).tolist() == chosen_pairs(pairs, 4).tolist() == [9, 3, 5, 1]
    two = chosen_pairs(pairs, 2)
    assert two.tolist() == chosen_pairs(pairs, 2).tolist()
    assert len(two) == 2
    assert [row for row in [9, 3, 5, 1] if row in two] == two.tolist()
    drawn = {tuple(chosen_pairs(dataclasses.replace(pairs, query=q), 2).tolist()) for q in range(40)}
    assert len(drawn) == 6  # every pair of places


def test_what_the_first_stages_find_is_scored(funnel: Funnel, judge: Model, tmp_path: Path) -> None:
    retriever = load_model(funnel.model("retriever"))
    first, data = FirstStage(retriever, 3), funnel.data
    pairs = first.pairs(data)
    embedder = make_embedder(retriever)
    similarity = embedder.queries(data.queries["train"]) @ embedder.documents(data.documents).T
    own = {p.query: p.documents for p in data.pairs}
    assert [p.query for p in pairs] == list(range(len(data.queries["train"])))
    for found in pairs:
        nearest = np.argsort(-similarity[found.query])[:3]
        assert set(nearest) | set(own.get(found.query, [])) <= set(found.documents.tolist())
        assert len(found.documents) <= 6 + len(own.get(found.query, []))
    assert any(len(p.documents) > len(own.get(p.query, [])) for p in pairs)
    report = label(judge, data, tmp_path, pairs=pairs, source=first.source)
    assert report.pairs == sum(len(p.documents) for p in pairs)
    _, scores = read_scores(tmp_path, data.fingerprint)
    (direct,) = make_scorer(judge, data.documents)([data.queries["train"][2]], [pairs[2].documents])
    np.testing.assert_allclose(
        np.stack([scores[2, int(row)] for row in pairs[2].documents]), direct, atol=1e-5
    )
    lexical = Bm25.build([document_text(document) for document in data.documents])
    rows = lexical.search([query.text for query in data.queries["train"]], 3)[0]
    for found, some in zip(FirstStage(None, 3).pairs(data), rows, strict=True):
        assert set(found.documents.tolist()) == set(some[some >= 0]) | set(own.get(found.query, []))

    def beyond(some: list[Pairs]) -> set[int]:
        return {row for p in some for row in set(p.documents.tolist()) - set(own.get(p.query, []))}

    hidden = dataclasses.replace(data, held_out=np.array(sorted(beyond(pairs))[:2], np.int32))
    assert len(hidden.held_out) == 2
    assert not beyond(first.pairs(hidden)) & set(hidden.held_out.tolist())
    assert FirstStage(None, 3).source != first.source
    other = FirstStage(retriever, 4).source
    with pytest.raises(StoreError, match=rf"source '{first.source}' \(not '{other}'\)"):
        label(judge, data, tmp_path, pairs=pairs, source=other)
    with pytest.raises(InputError, match="depth is 0: use at least 1"):
        FirstStage(retriever, 0)


def test_an_unfinished_store_is_not_read(funnel: Funnel, judge: Model, tmp_path: Path) -> None:
    label(judge, funnel.data, tmp_path, per_query=1, shard=4)
    (tmp_path / "scores-00001.npz").unlink()
    with pytest.raises(StoreError, match="unfinished"):
        read_scores(tmp_path, funnel.data.fingerprint)
    assert ScoreStore(tmp_path, read_scores_meta(tmp_path)).missing() == [1]


def read_scores_meta(folder: Path):  # type: ignore[no-untyped-def]
    from jaxsearch.data.score_store import _read_meta

    return _read_meta(folder)
