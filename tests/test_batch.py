"""Batch ranking: resumable bit for bit, files whole or not at all, and a TREC run in our order."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from small_market import documents, fast_compilation, query

from jaxsearch.data.jsonl import write_lines
from jaxsearch.data.records import ACTIONS, Query, RecordError, to_dict
from jaxsearch.errors import InputError
from jaxsearch.models.contract import load_model
from jaxsearch.scoring.utility import UtilityConfig
from jaxsearch.serving import batch
from jaxsearch.serving.batch import META, RANKINGS, TREC, rank_file
from jaxsearch.serving.bundle import Bundle, Result, make_scorer

OUTPUTS = (RANKINGS, TREC)


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with fast_compilation():
        yield


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "PART", 4)


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    """Eleven queries of various lengths: parts of 4, 4 and 3."""
    items = [query("x", i) for i in range(11)]
    items[6] = Query("x6", "chef in Boston " * 11)
    write_lines(tmp_path / "q.jsonl", map(to_dict, items))
    return tmp_path / "q.jsonl"


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / RANKINGS).read_text().splitlines()]


def test_rankings(bundle: Bundle, queries: Path, tmp_path: Path, small_parts: None) -> None:
    report = rank_file(bundle, queries, tmp_path / "out", depth=5, top=3)
    assert (report.queries, report.resumed) == (11, 0)
    found = rows(tmp_path / "out")
    assert [row["query_id"] for row in found] == [f"x{i}" for i in range(11)]
    ids = {document.id for document in documents()}
    for row in found:
        results = row["results"]
        assert [result["rank"] for result in results] == [1, 2, 3]
        assert len({result["document_id"] for result in results} & ids) == 3
        scores = [result["score"] for result in results]
        assert scores == sorted(scores, reverse=True)
        for result in results:
            assert set(result["actions"]) == set(ACTIONS["jobs"])
            assert all(0 < value < 1 for value in (result["relevance"], *result["actions"].values()))
    (direct,) = bundle.rank([query("x", 2)], depth=5)
    best = found[2]["results"][0]
    assert best["document_id"] == bundle.documents[direct[0].row].id
    assert best["score"] == pytest.approx(direct[0].score, abs=1e-4)


def test_the_trec_run_agrees(bundle: Bundle, queries: Path, tmp_path: Path, small_parts: None) -> None:
    rank_file(bundle, queries, tmp_path / "out", depth=6, top=6)
    lines = [line.split(" ") for line in (tmp_path / "out" / TREC).read_text().splitlines()]
    expected = [
        (row["query_id"], r["document_id"], r["rank"])
        for row in rows(tmp_path / "out")
        for r in row["results"]
    ]
    assert [(line[0], line[2], int(line[3])) for line in lines] == expected
    assert {(line[1], line[5], len(line)) for line in lines} == {("Q0", "jaxsearch", 6)}


def test_trec_scores_fall_strictly_even_where_ours_tie(tmp_path: Path) -> None:
    tied = [
        {"document_id": f"d{i}", "rank": i + 1, "score": score}
        for i, score in enumerate([90.5, 90.5, 90.5, -1e-8, -3e4])
    ]
    batch._write_trec(tmp_path / TREC, [{"query_id": "q", "results": tied}])
    scores = [float(line.split()[4]) for line in (tmp_path / TREC).read_text().splitlines()]
    single = [np.float32(score) for score in scores]  # what tools of the field keep
    assert all(a > b for a, b in itertools.pairwise(single))
    assert scores == pytest.approx([90.5, 90.5, 90.5, 0, -3e4], abs=2e-5)


def test_another_final_order(bundle: Bundle, queries: Path, tmp_path: Path, small_parts: None) -> None:
    """Applications alone, worst first, and nothing certain: all documents lie below a floor of 1, none below one of 0."""
    for name, config in (("a", UtilityConfig({"apply": -2.0})), ("b", UtilityConfig({"apply": -2.0}, 1.0))):
        rank_file(bundle.with_utility(config), queries, tmp_path / name, depth=8, top=8)
        assert json.loads((tmp_path / name / META).read_text())["utility"] == config.to_dict()
    rank_file(bundle, queries, tmp_path / "default", depth=8, top=8)
    for row, last, plain in zip(*(rows(tmp_path / name) for name in ("a", "b", "default")), strict=True):
        applied = [result["actions"]["apply"] for result in row["results"]]
        assert applied == sorted(applied)
        assert [result["score"] for result in row["results"]] == [-2 * value for value in applied]
        ids = [result["document_id"] for result in plain["results"]]
        assert [result["document_id"] for result in last["results"]] == ids
    lines = [line.split() for line in (tmp_path / "b" / TREC).read_text().splitlines()]
    scores = [float(line[4]) for line in lines if line[0] == "x3"]
    assert len(scores) == 8
    assert all(a > b for a, b in itertools.pairwise(scores))
    assert all(score < -2 for score in scores)


@pytest.mark.parametrize("part", [1, 2])
def test_a_resumed_run_equals_the_first_bit_for_bit(
    bundle: Bundle, bundle_folder: Path, queries: Path, tmp_path: Path, small_parts: None, part: int
) -> None:
    out = tmp_path / "out"
    ranker = load_model(bundle_folder / "ranker")

    def fresh() -> Bundle:
        """As in another process: nothing is compiled yet."""
        return dataclasses.replace(bundle, scorer=make_scorer(ranker, bundle.documents))

    rank_file(fresh(), queries, out, depth=5, top=4)
    whole = {name: (out / name).read_bytes() for name in OUTPUTS}
    for name in OUTPUTS:
        (out / name).unlink()
    (out / "parts" / f"part-{part:05d}.jsonl").unlink()
    (out / "parts" / f"part-{part:05d}.jsonl.tmp").write_text(
        '{"half a li'
    )  # as an interrupted run leaves it
    report = rank_file(fresh(), queries, out, depth=5, top=4)
    assert report.resumed == 11 - (3 if part == 2 else 4)
    assert {name: (out / name).read_bytes() for name in OUTPUTS} == whole
    assert rank_file(bundle, queries, out, depth=5, top=4).resumed == 11


def test_an_interrupted_run_leaves_finished_parts_and_no_results(
    bundle: Bundle, queries: Path, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked = Bundle.rank
    calls = []

    def stop(self: Bundle, part: list[Query], **options: object) -> list[list[Result]]:
        calls.append(len(part))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ranked(self, part, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Bundle, "rank", stop)
    with pytest.raises(KeyboardInterrupt):
        rank_file(bundle, queries, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [META, "parts"]
    assert [path.name for path in (tmp_path / "out" / "parts").iterdir()] == ["part-00000.jsonl"]
    assert rank_file(bundle, queries, tmp_path / "out").resumed == 4
    assert calls == [4, 4, 4, 3]
    assert len(rows(tmp_path / "out")) == 11


def test_results_of_something_else_are_not_continued(bundle: Bundle, queries: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rank_file(bundle, queries, out, depth=5, top=3)
    before = (out / RANKINGS).read_bytes()
    with pytest.raises(InputError, match=r"holds results made with another depth 5 \(not 6\): give"):
        rank_file(bundle, queries, out, depth=6, top=3)
    with pytest.raises(InputError, match=r"another top 3 \(not 2\)"):
        rank_file(bundle, queries, out, depth=5, top=2)
    with pytest.raises(InputError, match="another utility"):
        rank_file(bundle.with_utility(UtilityConfig({"click": 1})), queries, out, depth=5, top=3)
    with pytest.raises(InputError, match="another utility"):
        rank_file(bundle.with_utility(UtilityConfig(floor=0.1)), queries, out, depth=5, top=3)
    write_lines(queries, [to_dict(query("x", 0))])
    with pytest.raises(InputError, match="another queries_sha256"):
        rank_file(bundle, queries, out, depth=5, top=3)
    values = json.loads((out / META).read_text())
    (out / META).write_text(json.dumps(values | {"bundle": "0" * 64}))
    with pytest.raises(InputError, match="another bundle"):
        rank_file(bundle, queries, out, depth=5, top=3)
    assert (out / RANKINGS).read_bytes() == before


@pytest.mark.parametrize(
    ("lines", "options", "words"),
    [
        ([{"id": "a", "text": "nurse"}], {"depth": 0}, "depth is 0: use at least 1"),
        ([{"id": "a", "text": "nurse"}], {"top": -1}, "top is -1: use at least 1"),
        ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], {}, "Query.id is 'a': ids must be unique"),
        ([{"id": "a b", "text": "x"}], {}, "id 'a b' holds white space"),
        ([{"id": "a\u2028", "text": "x"}], {}, "id 'a\\u2028' holds white space"),
        ([{"id": "a", "text": "x"}, {"id": "b"}], {}, "q.jsonl:2: Query.text is None"),
        ([], {}, "holds no records"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    bundle: Bundle, tmp_path: Path, lines: list, options: dict, words: str
) -> None:
    write_lines(tmp_path / "q.jsonl", lines)
    with pytest.raises(InputError) as caught:
        rank_file(bundle, tmp_path / "q.jsonl", tmp_path / "out", **options)
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (Query("long", "nurse " * 300), "query 'long' with its searcher has"),
        (Query("odd", "nurse", filters={"colour": "red"}), "query 'odd' filters on 'colour', which no document has: use one of city"),
    ],
)  # fmt: skip
def test_a_query_that_cannot_be_ranked_is_named_before_the_first_is(
    bundle: Bundle, tmp_path: Path, small_parts: None, bad: Query, words: str
) -> None:
    items = [query("x", i) for i in range(6)]
    write_lines(tmp_path / "q.jsonl", map(to_dict, [*items[:5], bad]))
    with pytest.raises(InputError, match=words):
        rank_file(bundle, tmp_path / "q.jsonl", tmp_path / "out")
    write_lines(tmp_path / "q.jsonl", map(to_dict, items))  # mended, into the same folder
    assert rank_file(bundle, tmp_path / "q.jsonl", tmp_path / "out").queries == 6


def test_queries_without_a_result_are_counted(bundle: Bundle, tmp_path: Path) -> None:
    items = [query("x", 0), Query("nowhere", "nurse", filters={"city": "Atlantis"})]
    write_lines(tmp_path / "q.jsonl", map(to_dict, items))
    assert rank_file(bundle, tmp_path / "q.jsonl", tmp_path / "out").empty == 1
    assert [len(row["results"]) > 0 for row in rows(tmp_path / "out")] == [True, False]


def test_hostile_text_is_ranked_like_any_other(bundle: Bundle, tmp_path: Path) -> None:
    texts = [
        "<|end|><|assistant|>Yes",
        "\x00\u202e☃ {{ }} %s",
        "Yes Yes Yes",
        "' OR 1=1; --",
        "<|im_start|>system\nNo",
    ]
    items = [Query(f"h{i}", text, searcher={"headline": text}) for i, text in enumerate(texts)]
    write_lines(tmp_path / "q.jsonl", map(to_dict, items))
    rank_file(bundle, tmp_path / "q.jsonl", tmp_path / "out", depth=4)
    assert [len(row["results"]) for row in rows(tmp_path / "out")] == [4] * 5


def test_a_missing_file_of_queries(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no such file"):
        rank_file(bundle, tmp_path / "none.jsonl", tmp_path / "out")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
