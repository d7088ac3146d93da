"""Continuous measurement: figures by hand, TREC files with hostile lines, remembered grades, honest comparisons."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from small_market import documents, fast_compilation, query
from small_models import small_bundle

from jaxsearch.data.jsonl import write_lines
from jaxsearch.data.records import Document, Query, RecordError, to_dict
from jaxsearch.errors import InputError
from jaxsearch.measurement import continuous, main
from jaxsearch.measurement.continuous import (
    FILE,
    PAGE,
    MeasurementReport,
    Ranked,
    compare,
    figures,
    measure,
    query_metrics,
    rank_with_bundle,
    read_report,
    sample_queries,
    write_report,
)
from jaxsearch.measurement.files import ReportError
from jaxsearch.measurement.grade_cache import CacheError, GradeCache, document_key, query_key
from jaxsearch.measurement.judging import Judge, read_grades
from jaxsearch.measurement.trec import RunError, read_trec
from jaxsearch.models.contract import ContractError, Model
from jaxsearch.serving.batch import TREC, rank_file
from jaxsearch.serving.bundle import Bundle

IDS = [document.id for document in documents()]


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with fast_compilation():
        yield


@pytest.fixture(scope="module")
def bundle_at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def queries() -> list[Query]:
    """Fifteen: three of them needs, the rest titles."""
    return [dataclasses.replace(query("x", i), bucket="title" if i % 5 else "need") for i in range(15)]


def run(
    judge: Model,
    queries: list[Query],
    rankings: dict[str, list[str]],
    folder: Path,
    **options: object,
) -> MeasurementReport:
    given = {"documents": documents(), "system": "s", "per_bucket": 50, "population": {"title": 12}}
    return measure(judge, queries, rankings=rankings, grades=folder, **(given | options))  # type: ignore[arg-type]


# --- figures ---------------------------------------------------------------------------------------------------------


def test_figures_by_hand() -> None:
    ranked = [
        Ranked("a", "a", "title", ("d1", "d2", "d3"), {"d1": 1, "d2": 4, "d3": 0, "d4": 3}),
        Ranked("b", "b", "title", (), {"d1": 2}),
        Ranked("c", "c", "title", ("d1",), {"d1": 0}),
        Ranked("d", "d", "title", (), {}),
    ]
    found = query_metrics(ranked)
    gained = 1 + 15 / np.log2(3)
    ideal = 15 + 7 / np.log2(3) + 1 / np.log2(4)
    np.testing.assert_allclose(found["ndcg"], [gained / ideal, 0, np.nan, np.nan])
    np.testing.assert_allclose(found["precision"], [0.1, 0, 0, 0])
    np.testing.assert_allclose(found["poor_match"], [2 / 3, np.nan, 1, np.nan])
    whole = figures(ranked)
    assert (whole.queries, whole.without_results) == (4, 2)
    assert whole.ndcg.value == pytest.approx(gained / ideal / 2)
    assert math.isnan(whole.ndcg.low)
    assert whole.note == (
        "too few queries for intervals: 4 of at least 10; 2 without NDCG: no document graded above 0 is known"
    )


def test_only_ten_places_count() -> None:
    pool = {f"d{i}": 0 for i in range(10)} | {"d10": 4, "d11": 4}
    (late,) = query_metrics([Ranked("a", "a", "", tuple(pool), pool)])["ndcg"]
    assert late == 0
    pool |= {f"e{i}": 4 for i in range(20)}
    full = Ranked("a", "a", "", tuple(f"e{i}" for i in range(20)), pool)
    found = query_metrics([full])
    assert found["ndcg"] == found["precision"] == pytest.approx(1)


def test_samples_are_drawn_per_bucket(queries: list[Query]) -> None:
    chosen = sample_queries(queries, 2, seed=3)
    assert sorted(item.bucket for item in chosen) == ["need", "need", "title", "title"]
    assert [item.id for item in chosen] == [item.id for item in queries if item in chosen]
    assert chosen == sample_queries(queries[::-1], 2, seed=3)[::-1]
    assert any(sample_queries(queries, 2, seed) != chosen for seed in range(4))
    assert sample_queries(queries, 100) == queries
    with pytest.raises(ReportError, match="per_bucket is 0"):
        sample_queries(queries, 0)
    with pytest.raises(RecordError, match="ids must be unique"):
        sample_queries([queries[0], queries[0]], 1)


# --- TREC ------------------------------------------------------------------------------------------------------------


def test_a_run_is_ordered_by_score(tmp_path: Path) -> None:
    lines = [
        "q1 Q0 p3 2 0.5 tag",
        "q1\t0   p1 1 1e1 tag",
        "",
        "q2 Q0 p2 0 -.5 x",
        "q1 Q0 p2 3 -7. tag",
        "q2 Q0 p5 0 -.5 x",
    ]
    (tmp_path / "run").write_text("\n".join(lines))
    assert read_trec(tmp_path / "run", {"q1", "q2"}, IDS) == {"q1": ["p1", "p3", "p2"], "q2": ["p2", "p5"]}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"q1 Q0 p1 1 0.5", "run:2: 5 columns, not query_id Q0 doc_id rank score tag"),
        (b"q1 Q0 p1 1 0.5 tag more", "run:2: 7 columns"),
        (b"q1 Q0 p1 1 nan tag", "run:2: score is 'nan': give a finite number"),
        (b"q1 Q0 p1 1 inf tag", "score is 'inf'"),
        (b"q1 Q0 p1 1 1e999 tag", "score is '1e999'"),
        (b"q1 Q0 p1 1 1_0 tag", "score is '1_0'"),
        (b"q1 Q0 p1 1 0x1p3 tag", "score is '0x1p3'"),
        (b"q1 Q0 p1 one 0.5 tag", "rank is 'one': give a whole number from 0"),
        (b"q1 Q0 p1 -1 0.5 tag", "rank is '-1'"),
        ("q1 Q0 p1 \u0661 0.5 tag".encode(), "rank is '\u0661'"),
        (b"q1 Q0 p1 " + b"9" * 5000 + b" 0.5 tag", "run:2: longer than 4,096 bytes"),
        (b"q9 Q0 p1 1 0.5 tag", "query 'q9' is unknown"),
        (b"q1 Q0 p99 1 0.5 tag", "document 'p99' is unknown"),
        (b"q1 Q0 p0 1 0.5 tag", "document 'p0' occurs twice for query 'q1'"),
        (b"q1 Q0 p\xff 1 0.5 tag", "run:2: not UTF-8"),
        (b"q1 Q0 <script> 1 0.5 tag", "document '<script>' is unknown"),
        (b"\x00", "run:2: 1 columns"),
        (b"q1 Q0 p1 8 5 tag", "query 'q1': rank 8 has a higher score than rank 7"),
    ],
)
def test_hostile_lines_are_named(tmp_path: Path, line: bytes, words: str) -> None:
    (tmp_path / "run").write_bytes(b"q1 Q0 p0 7 1.5 tag\n" + line + b"\n")
    with pytest.raises(RunError) as caught:
        read_trec(tmp_path / "run", {"q1"}, IDS)
    assert words in str(caught.value)
    assert "has 1 problems" in str(caught.value)


def test_many_bad_lines_are_counted(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("bad\n" * 500)
    with pytest.raises(RunError) as caught:
        read_trec(tmp_path / "run", {"q1"}, IDS)
    assert "has 500 problems" in str(caught.value)
    assert str(caught.value).count("run:") == 10
    (tmp_path / "run").write_text("\n \n")
    with pytest.raises(RunError, match="holds no results"):
        read_trec(tmp_path / "run", {"q1"}, IDS)
    with pytest.raises(RunError, match="no such file"):
        read_trec(tmp_path, {"q1"}, IDS)


# --- grades that are remembered --------------------------------------------------------------------------------------


def test_grades_are_remembered_by_judge_query_and_document(tmp_path: Path) -> None:
    p = np.array([0.1, 0.2, 0.3, 0.4, 0], np.float32)
    GradeCache(tmp_path, "a" * 64).add([("q", "d", p)])
    np.testing.assert_array_equal(GradeCache(tmp_path, "a" * 64).known("q")["d"], p)
    assert GradeCache(tmp_path, "a" * 64).known("other") == {}
    assert GradeCache(tmp_path, "b" * 64).known("q") == {}
    assert GradeCache(tmp_path, "a" * 16 + "b" * 48).known("q") == {}  # the file name alone does not decide
    one = documents()[0]
    assert document_key(one) != document_key(dataclasses.replace(one, numeric={"salary": 1.0}))
    asked = query("x", 1)
    assert query_key(asked) == query_key(dataclasses.replace(asked, bucket="need"))  # no judge sees it
    assert query_key(asked) != query_key(dataclasses.replace(asked, searcher={}))


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"judge": "J", "query": "q", "document": "d", "probabilities": [1, 0, 0, 0]}',
        '{"judge": "J", "query": "q", "document": "d", "probabilities": [NaN, 0, 0, 0, 1]}',
        '{"judge": "J", "query": "q", "document": "d", "probabilities": [0.5, 0, 0, 0, 0]}',
        '{"judge": "J", "query": 7, "document": "d", "probabilities": [1, 0, 0, 0, 0]}',
    ],
)
def test_damaged_grades_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / f"{'J' * 16}-x.jsonl").write_text(line)
    with pytest.raises(CacheError, match="delete it, its pairs are graded anew"):
        GradeCache(tmp_path, "J" * 64)


def test_only_new_pairs_are_graded(
    judge: Model, queries: list[Query], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuous, "PART", 4)
    done: list[int] = []
    first = run(judge, queries, {q.id: IDS[:3] for q in queries}, tmp_path, progress=done.append)
    assert (first.graded, first.remembered, sum(done)) == (45, 0, 15)
    assert len(list(tmp_path.glob("*.jsonl"))) == 4  # parts of 4, 4, 4 and 3 queries
    again = run(judge, queries, {q.id: IDS[:3] for q in queries}, tmp_path)
    assert (again.graded, again.remembered) == (0, 45)
    assert repr(again.ranked) == repr(first.ranked)
    more = run(judge, queries, {q.id: IDS[2:5] for q in queries}, tmp_path)
    assert (more.graded, more.remembered) == (30, 15)
    assert all(sorted(item.pool) == IDS[:5] for item in more.ranked)
    rows = [np.arange(5, dtype=np.int32)] * len(queries)
    direct = Judge(judge, documents(), rows)(queries, rows)
    assert [list(item.pool.values()) for item in more.ranked] == [
        read_grades(p, "argmax").tolist() for p in direct
    ]
    # A document that was edited since is graded anew, and its old grade is no part of the pool.
    edited = [Document("p0", {"title": "Chef"}), *documents()[1:]]
    changed = run(judge, queries[:1], {"x0": ["p0", "p1"]}, tmp_path, documents=edited)
    assert (changed.graded, changed.remembered) == (1, 1)
    assert sorted(changed.ranked[0].pool) == IDS[:5]


def test_an_interrupted_run_keeps_what_it_graded(
    judge: Model, queries: list[Query], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuous, "PART", 5)
    seen: list[int] = []

    def stop(count: int) -> None:
        seen.append(count)
        if len(seen) == 2:
            raise KeyboardInterrupt

    rankings = {q.id: IDS[:2] for q in queries}
    with pytest.raises(KeyboardInterrupt):
        run(judge, queries, rankings, tmp_path, progress=stop)
    assert run(judge, queries, rankings, tmp_path).remembered == 10


# --- comparing -------------------------------------------------------------------------------------------------------


def sorted_by_grade(judge: Model, queries: list[Query], best_first: bool) -> dict[str, list[str]]:
    rows = [np.arange(8, dtype=np.int32)] * len(queries)
    found = {}
    for item, p in zip(queries, Judge(judge, documents(), rows)(queries, rows), strict=True):
        grade = read_grades(p, "argmax")
        found[item.id] = [IDS[i] for i in np.argsort(-grade if best_first else grade, kind="stable")]
    return found


def test_a_better_system_is_found_better(judge: Model, queries: list[Query], tmp_path: Path) -> None:
    bad = run(judge, queries, sorted_by_grade(judge, queries, False), tmp_path, system="bad")
    good = run(judge, queries, sorted_by_grade(judge, queries, True), tmp_path, system="good", previous=bad)
    assert good.comparison is not None
    assert good.comparison.system == "bad"
    change = good.comparison.changes["overall"]["ndcg"]
    assert change.now == pytest.approx(1)
    assert change.before == pytest.approx(bad.overall.ndcg.value)
    assert change.difference.value == pytest.approx(change.now - change.before)
    assert 0 < change.difference.low < change.difference.value < change.difference.high
    assert change.p < 0.01
    same = good.comparison.changes["overall"]["precision"]
    assert (same.difference, same.p) == ((0, 0, 0), 1)  # the same eight documents in another order
    few = good.comparison.changes["need"]["ndcg"]
    assert few.queries <= 3
    assert math.isnan(few.p)
    assert math.isnan(few.difference.low)


def test_both_runs_are_compared_by_one_pool() -> None:
    """The earlier run knew one document of grade 1 and looked perfect; since then a grade 4 was found."""
    old = [Ranked(f"q{i}", "", "t", ("d1",), {"d1": 1}) for i in range(12)]
    new = [Ranked(f"q{i}", "", "t", ("d2",), {"d2": 4}) for i in range(12)]
    assert figures(old).ndcg.value == figures(new).ndcg.value == 1
    change = compare(new, fake_report(old)).changes["overall"]["ndcg"]
    ideal = 15 + 1 / np.log2(3)
    assert (change.before, change.now) == pytest.approx((1 / ideal, 15 / ideal))


def test_queries_without_results_count_against_a_system() -> None:
    old = [Ranked(f"q{i}", "", "t", ("d1",), {"d1": 4}) for i in range(12)]
    new = [dataclasses.replace(item, results=()) for item in old]
    changes = compare(new, fake_report(old)).changes["overall"]
    assert (changes["ndcg"].now, changes["precision"].now) == (0, 0)
    assert changes["poor_match"].queries == 0
    assert math.isnan(changes["poor_match"].difference.value)


def fake_report(ranked: list[Ranked]) -> MeasurementReport:
    whole = figures(ranked)
    return MeasurementReport(1, "s", "j", "argmax", "q", "d", 9, 0, {}, 0, 0, whole, {}, tuple(ranked), None)


def test_runs_of_something_else_are_not_compared(judge: Model, queries: list[Query], tmp_path: Path) -> None:
    rankings = {q.id: IDS[:2] for q in queries}
    previous = run(judge, queries, rankings, tmp_path / "a")
    other = dataclasses.replace(judge, hash="f" * 64)
    for words, model, asked, options in (
        ("judge", other, queries, {}),
        ("queries", judge, queries[1:], {}),
        ("documents", judge, queries, {"documents": [*documents(), Document("new", {"title": "x"})]}),
        ("reading", judge, queries, {"reading": "expected"}),
    ):
        with pytest.raises(ReportError, match=f"the earlier run differs in {words}: only runs of one judge"):
            run(model, asked, rankings, tmp_path / "b", previous=previous, **options)
    assert not (tmp_path / "b").exists()  # refused before anything is graded
    shuffled = run(judge, queries, rankings, tmp_path / "a", previous=previous, documents=documents()[::-1])
    assert shuffled.comparison is not None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top": 9}, "top is 9: use at least 10"),
        ({"queries": []}, "there are no queries"),
        ({"reading": "mode"}, "reading is 'mode'"),
        ({"documents": [documents()[0]] * 2}, "ids must be unique"),
    ],
)
def test_bad_numbers(judge: Model, queries: list[Query], tmp_path: Path, options: dict, words: str) -> None:
    asked = options.pop("queries", queries)
    with pytest.raises(InputError, match=words):
        run(judge, asked, {}, tmp_path, **options)
    ranker = dataclasses.replace(judge, contract=dataclasses.replace(judge.contract, kind="ranker"))
    with pytest.raises(ContractError, match="the model is a ranker"):
        run(ranker, queries, {}, tmp_path)


# --- files and pages -------------------------------------------------------------------------------------------------


def test_a_report_comes_back_as_it_was(judge: Model, queries: list[Query], tmp_path: Path) -> None:
    first = run(judge, queries, {q.id: IDS[:4] for q in queries}, tmp_path / "grades")
    report = run(judge, queries, {q.id: IDS[4:] for q in queries}, tmp_path / "grades", previous=first)
    write_report(report, documents(), tmp_path)
    assert repr(read_report(tmp_path)) == repr(report)
    values = json.loads((tmp_path / FILE).read_text())
    for change, words in (
        ({"format": 2}, "format is 2"),
        ({"ranked": [values["ranked"][0] | {"pool": {}}]}, "the grades of query 'x0' are damaged"),
        ({"ranked": [values["ranked"][0] | {"pool": dict.fromkeys(IDS, 9)}]}, "are damaged"),
        ({"overall": None}, "report.overall is 'None'"),
    ):
        (tmp_path / FILE).write_text(json.dumps(values | change))
        with pytest.raises(ReportError, match=words):
            read_report(tmp_path)
    (tmp_path / FILE).unlink()
    with pytest.raises(ReportError, match="no such file"):
        read_report(tmp_path)


def test_the_page_escapes_everything(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>\x00</pre>"
    ranked = [Ranked(f"q{i}", bad, bad, (bad,), {bad: 1, "z": 4}) for i in range(12)]
    report = fake_report(ranked)
    report = dataclasses.replace(
        report,
        system=bad,
        judge=bad,
        population={bad: 12},
        buckets={bad: report.overall},
        comparison=compare(ranked, report),
    )
    write_report(report, [Document(bad, {bad: bad})], tmp_path)
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "\x00" not in page
    assert page.count("</pre>") == 12
    assert page.count("<details>") == 12
    assert "http" not in page.replace("http-equiv", "")


# --- commands --------------------------------------------------------------------------------------------------------


def test_the_bundle_and_its_trec_run_give_the_same_figures(
    judge_folder: Path, bundle_at: Path, queries: list[Query], tmp_path: Path, capsys
) -> None:
    write_lines(tmp_path / "q.jsonl", map(to_dict, queries))
    write_lines(tmp_path / "d.jsonl", map(to_dict, documents()))
    common = ["run", "--queries", str(tmp_path / "q.jsonl"), "--judge", str(judge_folder)]
    common += ["--grades", str(tmp_path / "grades"), "--per-bucket", "11"]
    assert main.main([*common, "--bundle", str(bundle_at), "--output", str(tmp_path / "a")]) == 0
    assert "overall: 14 queries, ndcg@10 " in capsys.readouterr().out
    rank_file(Bundle.open(bundle_at), tmp_path / "q.jsonl", tmp_path / "batch")
    trec = ["--trec", str(tmp_path / "batch" / TREC), "--documents", str(tmp_path / "d.jsonl")]
    again = [*common, *trec, "--output", str(tmp_path / "b"), "--previous", str(tmp_path / "a")]
    assert main.main(again) == 0
    out = capsys.readouterr().out
    assert "ndcg@10 now - before: 0.000 (0.000 to 0.000), p 1.0000" in out
    assert "0 pairs graded, 112 known before" in out  # 14 queries, 8 documents
    a, b = read_report(tmp_path / "a"), read_report(tmp_path / "b")
    assert (a.overall, a.ranked, a.documents) == (b.overall, b.ranked, b.documents)
    assert a.system != b.system
    assert a.population == {"need": 3, "title": 12}
    assert {name: group.queries for name, group in a.buckets.items()} == {"need": 3, "title": 11}
    assert (tmp_path / "b" / PAGE).read_text().count("<svg") == 1
    # Another sample is another set of queries.
    assert main.main([*again, "--per-bucket", "2"]) == 2
    assert "the earlier run differs in queries" in capsys.readouterr().err


def test_results_of_a_bundle_are_cut(bundle_at: Path, queries: list[Query]) -> None:
    opened = Bundle.open(bundle_at)
    found = rank_with_bundle(opened, queries[:2], depth=5, top=3)
    assert [len(names) for names in found.values()] == [3, 3]
    ranked = opened.rank(queries[:1], depth=5)[0]
    assert found["x0"] == [opened.documents[result.row].id for result in ranked[:3]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trec", "none", "--queries", "q.jsonl"], "a TREC run has ids alone: give --documents FILE, too"),
        (["--bundle", "b", "--queries", "q.jsonl", "--documents", "d.jsonl"], "--documents goes with --trec"),
        (["--bundle", "b"], "give either --queries FILE or --dataset NAME"),
        (["--bundle", "b", "--queries", "q.jsonl", "--dataset", "x"], "give either --queries"),
        (["--bundle", "b", "--queries", "q.jsonl", "--depth", "0"], "depth is 0"),
        (["--bundle", "b", "--queries", "q.jsonl", "--per-bucket", "0"], "per_bucket is 0"),
        (["--bundle", "b", "--dataset", "job_market:huge"], "data set is 'job_market:huge'"),
        (["--bundle", "b", "--queries", "q.jsonl"], "holds no bundle.json"),
        (["--bundle", "b", "--queries", "q.jsonl", "--previous", "nowhere"], "no such file; measure first"),
    ],
)
def test_commands_that_cannot_run(
    judge_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
    options: list[str],
    words: str,
) -> None:
    write_lines(tmp_path / "q.jsonl", [to_dict(query("x", 0))])
    monkeypatch.chdir(tmp_path)
    assert main.main(["run", "--judge", str(judge_folder), "--output", "out", *options]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
