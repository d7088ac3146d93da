"""Data sets in memory: rows, pairs, grades, fingerprints, and names that do not exist."""

import dataclasses

import numpy as np
import pytest
from small_market import dataset, grades

from jaxsearch.data import datasets
from jaxsearch.data.datasets import PAIRS_PER_QUERY, Dataset, Pairs, _draw_pairs, _known_pairs, load_dataset
from jaxsearch.data.job_market import Tables
from jaxsearch.data.job_market.generator import JobMarket
from jaxsearch.data.records import ACTIONS, Impression, Judgment, Query
from jaxsearch.errors import InputError


@pytest.fixture
def data() -> Dataset:
    return dataset()


@pytest.mark.parametrize(
    "name", ["", "job_market:huge", "jobs", "onet_jobs:tiny", "job_market:tiny:x", "onet_jobs:"]
)
def test_names_that_do_not_exist(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "_onet_jobs", lambda folder: "onet")
    if name == "onet_jobs:":
        assert load_dataset(name) == load_dataset("onet_jobs") == "onet"
        return
    with pytest.raises(
        InputError,
        match=r"use one of job_market:tiny, job_market:default, job_market:long, job_market:tiny_people, "
        r"job_market:default_people, onet_jobs",
    ) as caught:
        load_dataset(name)
    assert repr(name) in str(caught.value)


def test_job_market_by_row(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    judgments = {
        f"{split}{i}": [Judgment(f"{split}{i}", f"p{row}", grade) for row, grade in grades(i).items()]
        for split, queries in data.queries.items()
        for i in range(4 if split == "test" else 0, 4 + len(queries))
    }
    queries = {split: list(items) for split, items in data.queries.items()}
    queries |= {"calibration": [Query("c0", "nurse", bucket="title")], "golden": []}
    judgments["c0"] = [Judgment("c0", "p3", 2, "Related work."), Judgment("c0", "p1", 4)]
    judgments["train3"][0] = dataclasses.replace(judgments["train3"][0], rationale="Because.")
    tables = Tables(list(data.documents), queries, judgments, data.impressions)  # type: ignore[arg-type]
    monkeypatch.setattr(datasets.job_market, "load_tables", lambda variant, folder: tables)
    found = load_dataset("job_market")
    assert found.name == f"job_market:default_{datasets.job_market.VERSIONS['default']}"
    assert found.graded["train3"] == grades(3)
    for ours, theirs in zip(found.pairs, data.pairs, strict=True):
        assert ours.query == theirs.query
        np.testing.assert_array_equal(ours.documents, theirs.documents)
        np.testing.assert_array_equal(ours.grades, theirs.grades)
    assert found.test_splits == ["test"]
    assert found.actions == ACTIONS["jobs"]
    # Reasons stand beside the pairs, also where there are none.
    reasoned = found.pairs[3]
    assert reasoned.rationales == ("Because.", *[""] * (len(reasoned.documents) - 1))
    (precedent,) = found.precedents("calibration")
    assert (precedent.query, precedent.documents.tolist(), precedent.grades.tolist()) == (0, [3, 1], [2, 4])
    assert precedent.rationales == ("Related work.", "")
    assert found.precedents("golden") == []
    with pytest.raises(InputError, match=r"precedents 'gold': job_market:.* has calibration, golden"):
        found.precedents("gold")
    with pytest.raises(InputError, match="precedents 'golden': small has none"):
        data.precedents("golden")
    assert len(found.held_out) == 0


def test_people_by_row(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [dataclasses.replace(document, vertical="people") for document in data.documents]
    queries = {split: [] for split in ("train", "dev", "test", "calibration", "golden")}
    asked: list[str] = []

    def load(variant: str, folder: None) -> Tables:
        asked.append(variant)
        return Tables(members, queries, {}, {"q": []})

    monkeypatch.setattr(datasets.job_market, "load_tables", load)
    found = load_dataset("job_market:tiny_people")
    assert asked == ["tiny_people"]
    assert found.name == f"job_market:tiny_people_{datasets.job_market.VERSIONS['tiny_people']}"
    assert found.actions == ACTIONS["people"]


def test_known_pairs_are_graded_ones_then_shown_ones() -> None:
    pairs = _known_pairs(3, {7: 4, 2: 0, 9: 1}, [2, 5, 7, 1, 5])
    assert pairs.query == 3
    assert pairs.documents.tolist() == [7, 2, 9, 5, 1]
    assert pairs.grades.tolist() == [4, 0, 1, -1, -1]  # nobody graded the last two
    assert pairs.documents.dtype == pairs.grades.dtype == np.int32
    assert _known_pairs(0, {}, []).documents.shape == (0,)


def test_drawn_pairs_hold_the_target_relations_and_strangers() -> None:
    known = {50: 4} | dict.fromkeys(range(10), 3) | {60 + row: 1 for row in range(4)}
    allowed = np.setdiff1d(np.arange(100, dtype=np.int32), [98, 99])
    pairs = _draw_pairs(5, Query("q5", "x"), known, allowed)
    assert len(pairs.documents) == len(set(pairs.documents.tolist())) == PAIRS_PER_QUERY == 16
    assert pairs.documents[0] == 50
    assert pairs.grades.tolist()[:8].count(0) == 0
    assert pairs.grades.tolist()[8:] == [0] * 8
    assert set(pairs.documents[8:].tolist()) <= set(allowed.tolist()) - set(known)
    assert [known.get(row, 0) for row in pairs.documents.tolist()] == pairs.grades.tolist()
    again = _draw_pairs(5, Query("q5", "other text"), known, allowed)
    np.testing.assert_array_equal(pairs.documents, again.documents)  # drawn by the id
    assert _draw_pairs(5, Query("q6", "x"), known, allowed).documents.tolist() != pairs.documents.tolist()
    lonely = _draw_pairs(0, Query("q", "x"), {1: 4}, np.arange(5, dtype=np.int32))
    assert sorted(lonely.documents.tolist()) == [0, 1, 2, 3, 4]


def test_grades_of_dev_and_test_queries(data: Dataset) -> None:
    query = data.queries["dev"][0]
    assert data.grades(query, np.array([0, 1, 2, 7, -1])).tolist() == [4, 3, 0, 0, 0]
    assert data.document_row["p5"] == 5


def test_properties_without_impressions(data: Dataset) -> None:
    bare = dataclasses.replace(
        data, impressions={}, queries={"train": [], "dev": [], "test_seen": [], "test_unseen": []}
    )
    assert bare.actions == ()
    assert bare.test_splits == ["test_seen", "test_unseen"]


def test_the_fingerprint_is_of_names_texts_and_pairs(data: Dataset) -> None:
    assert dataset().fingerprint == data.fingerprint
    first, *rest = data.documents
    query, *others = data.queries["train"]
    pair, *pairs = data.pairs
    changed = [
        dataclasses.replace(data, name="other"),
        dataclasses.replace(data, documents=[dataclasses.replace(first, fields={"title": "x"}), *rest]),
        dataclasses.replace(data, documents=[dataclasses.replace(first, numeric={"salary": 51.0}), *rest]),
        dataclasses.replace(data, documents=[*rest, first]),
        dataclasses.replace(
            data, queries={**data.queries, "train": [dataclasses.replace(query, text="x"), *others]}
        ),
        dataclasses.replace(data, pairs=[Pairs(pair.query, pair.documents[::-1], pair.grades), *pairs]),
        dataclasses.replace(data, pairs=pairs),
    ]
    assert len({item.fingerprint for item in changed} | {data.fingerprint}) == 8
    # What a model scores does not depend on dev queries nor on anybody's grades.
    same = [
        dataclasses.replace(data, queries={**data.queries, "dev": []}),
        dataclasses.replace(data, graded={}),
        dataclasses.replace(data, pairs=[Pairs(p.query, p.documents, p.grades * 0) for p in data.pairs]),
        dataclasses.replace(data, pairs=[dataclasses.replace(p, rationales=("x",)) for p in data.pairs]),
        dataclasses.replace(
            data,
            queries={**data.queries, "train": [dataclasses.replace(query, bucket="title"), *others]},
        ),
    ]
    assert {item.fingerprint for item in same} == {data.fingerprint}


def test_a_page_of_the_generator_becomes_pairs() -> None:
    market = JobMarket("tiny")
    market.queries["train"] = market.queries["train"][:2]
    judged, shown = market.judgments("train"), market.impressions("train")
    (query, judgments), *_ = judged.items()
    row = {document.id: i for i, document in enumerate(market.documents)}
    graded = {row[judgment.document_id]: judgment.grade for judgment in judgments}
    page: list[Impression] = shown[query]
    pairs = _known_pairs(0, graded, [row[item.document_id] for item in page])
    assert len(pairs.documents) == len({*graded, *(row[item.document_id] for item in page)})
    assert (pairs.grades >= 0).sum() == len(judgments) == 15
