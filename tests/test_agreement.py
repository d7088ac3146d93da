"""Agreement of a judge with precedents: figures by hand, reports that fit one judge and one data set, the gate."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from small_market import dataset, fast_compilation, grades, query

from jaxsearch.data.datasets import Dataset, _known_pairs
from jaxsearch.data.records import Document
from jaxsearch.errors import InputError
from jaxsearch.measurement import judging, main
from jaxsearch.measurement.agreement import (
    FILE,
    PAGE,
    AgreementReport,
    agreement,
    agreement_by_bucket,
    measure_judge,
    precedents,
    read_report,
    worst_rows,
    write_report,
)
from jaxsearch.measurement.files import ReportError
from jaxsearch.measurement.gate import AgreementGate, GateError, StaleReportError, check, require_agreement
from jaxsearch.measurement.judging import draw, read_grades
from jaxsearch.metrics import kappa
from jaxsearch.models.contract import ContractError, Model

HOSTILE = "<script>alert('x')</script> & \"quoted\" {{ 7*7 }} \x00\x1b\u202e</pre>"


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with fast_compilation():
        yield


def with_precedents(data: Dataset, count: int = 12) -> Dataset:
    """The small data set with golden searches in two buckets, four graded pairs each; one without grades."""
    found = [
        dataclasses.replace(query("golden", i), bucket="need" if i % 3 == 0 else "title")
        for i in range(count)
    ]
    pairs = [_known_pairs(i, grades(i), []) for i in range(count)]
    return dataclasses.replace(
        data,
        queries={**data.queries, "golden": [*found, query("bare", 0)], "empty": []},
        graded={**data.graded, **{item.id: grades(i) for i, item in enumerate(found)}},
        precedent_pairs={
            "golden": [dataclasses.replace(p, rationales=("by the policy",) * 4) for p in pairs],
            "empty": [],
        },
    )


@pytest.fixture(scope="module")
def data() -> Dataset:
    return with_precedents(dataset())


@pytest.fixture(scope="module")
def report(judge: Model, data: Dataset) -> AgreementReport:
    return measure_judge(judge, data, samples=50)


# --- arrays ----------------------------------------------------------------------------------------------------------


def test_agreement_by_hand() -> None:
    precedent, judged = np.array([0, 4, 4, 2]), np.array([0, 4, 3, 0])
    found = agreement(precedent, judged, np.arange(4))
    chance = np.mean([abs(i - j) for i in precedent for j in judged])
    squares = np.mean([(i - j) ** 2 for i in precedent for j in judged])
    assert found.linear_kappa.value == pytest.approx(1 - (3 / 4) / chance)
    assert found.quadratic_kappa.value == pytest.approx(1 - (5 / 4) / squares)
    assert (found.exact.value, found.within_one.value) == (0.5, 0.75)
    assert np.argwhere(found.confusion).tolist() == [[0, 0], [2, 0], [4, 3], [4, 4]]
    assert (found.pairs, found.queries) == (4, 4)
    assert math.isnan(found.exact.low)
    assert found.note == "too few queries for intervals: 4 of at least 10"


def test_intervals_draw_queries() -> None:
    precedent = np.tile(np.arange(5), 40)
    judged = np.where(np.arange(200) < 100, precedent, 4 - precedent)
    one_pair_each = agreement(precedent, judged, np.arange(200))
    ten_pairs_each = agreement(precedent, judged, np.repeat(np.arange(20), 10))
    assert one_pair_each.linear_kappa.value == ten_pairs_each.linear_kappa.value
    for name in ("linear_kappa", "quadratic_kappa", "exact", "within_one"):
        narrow, wide = getattr(one_pair_each, name), getattr(ten_pairs_each, name)
        assert narrow.low < narrow.value < narrow.high
        assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_degenerate_cases_say_so() -> None:
    nothing = np.zeros(0, int)
    empty = agreement(nothing, nothing, nothing)
    assert empty.note == "no pairs"
    assert math.isnan(empty.linear_kappa.value)
    assert math.isnan(empty.exact.value)
    same = agreement(np.full(20, 3), np.full(20, 3), np.arange(20))
    assert same.note == "only one grade occurs: kappa is not defined"
    assert math.isnan(same.linear_kappa.value)
    assert same.exact == (1, 1, 1)
    buckets = np.array(["a"] * 30 + ["b"] * 2 + [""])
    found = agreement_by_bucket(np.arange(33) % 5, np.arange(33) // 7, np.arange(33), buckets)
    assert {name: group.queries for name, group in found.items()} == {"a": 30, "b": 2, "not known": 1}
    assert found["a"].linear_kappa.low < found["a"].linear_kappa.high
    assert found["b"].note.startswith("too few queries")
    assert math.isnan(found["b"].linear_kappa.high)


def test_the_worst_come_first() -> None:
    probabilities = np.array(
        [[0.9, 0, 0, 0, 0.1], [0, 0, 0, 0.4, 0.6], [0, 0, 0, 0.1, 0.9], [0, 0, 1, 0, 0], [0, 1, 0, 0, 0]]
    )
    # Differences: 0, 4, 4 (surer), 1, 1 (as sure, later).
    precedent = np.array([0, 0, 0, 3, 0])
    assert worst_rows(precedent, probabilities, 10).tolist() == [2, 1, 3, 4]
    assert worst_rows(precedent, probabilities, 1).tolist() == [2]
    assert worst_rows(np.zeros(0, int), np.zeros((0, 5)), 3).tolist() == []


def test_readings() -> None:
    probabilities = np.array([[0.4, 0, 0, 0.3, 0.3], [0, 0.5, 0.5, 0, 0], [0, 0, 0, 0, 1], [1, 0, 0, 0, 0]])
    assert read_grades(probabilities, "argmax").tolist() == [0, 1, 4, 0]
    assert read_grades(probabilities, "expected").tolist() == [2, 2, 4, 0]  # means 2.1, 1.5, 4, 0
    with pytest.raises(InputError, match="reading is 'mean': use argmax or expected"):
        read_grades(probabilities, "mean")  # type: ignore[arg-type]


def test_draws_of_a_growing_file_overlap() -> None:
    queries = [query("x", i) for i in range(200)]
    first = draw(queries[:100], 20, seed=1)
    later = draw(queries, 20, seed=1)
    assert len(first) == len(later) == 20
    assert [q.id for q in first] == [q.id for q in queries if q in first]
    assert {q.id for q in later} & {q.id for q in queries[:100]} <= {q.id for q in first}
    assert draw(queries, 20, seed=2) != later
    assert draw(queries[:3], 20) == queries[:3]


# --- a judge on precedents -------------------------------------------------------------------------------------------


def test_a_judge_is_measured(judge: Model, data: Dataset, report: AgreementReport) -> None:
    queries = data.queries["golden"][:12]
    rows = [np.array(list(data.graded[item.id])) for item in queries]
    scorer = judging.Judge(judge, data.documents, rows)
    probabilities = np.concatenate(scorer(queries, rows))
    assert probabilities.shape == (48, 5)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    precedent = np.concatenate([list(data.graded[item.id].values()) for item in queries])
    everything = np.ones(48, bool)
    for reading in judging.READINGS:
        found = report.readings[reading]
        judged = read_grades(probabilities, reading)
        expected = kappa(precedent, judged, where=everything)
        np.testing.assert_allclose(found.overall.linear_kappa.value, expected, atol=1e-9)
        assert found.overall.exact.value == pytest.approx(np.mean(precedent == judged))
        assert (found.overall.queries, found.overall.pairs) == (12, 48)
        assert {name: group.queries for name, group in found.buckets.items()} == {"need": 4, "title": 8}
    assert (report.model, report.dataset, report.split) == (judge.hash, "small", "golden")
    for pair in report.worst:
        assert data.graded[pair.query_id][data.document_row[pair.document_id]] == pair.precedent_grade
        assert pair.judge_grade == np.argmax(pair.probabilities) != pair.precedent_grade
    apart = [abs(pair.precedent_grade - pair.judge_grade) for pair in report.worst]
    assert apart == sorted(apart, reverse=True)
    assert apart[0] > 1


def test_both_readings_of_a_disagreement_are_shown(judge: Model, data: Dataset) -> None:
    asked: list[tuple[str, str]] = []

    def explain(queries, documents):
        asked.extend((q.id, d.id) for q, d in zip(queries, documents, strict=True))
        return [(2, f"because {d.id}") for d in documents]

    found = measure_judge(judge, data, worst=3, explain=explain, samples=10)
    assert asked == [(pair.query_id, pair.document_id) for pair in found.worst]
    assert len(found.worst) == 3
    for pair in found.worst:
        assert (pair.written_grade, pair.judge_rationale) == (2, f"because {pair.document_id}")
        assert pair.precedent_rationale == "by the policy"


def test_a_split_without_precedents_gives_its_grades(judge: Model, data: Dataset) -> None:
    found = precedents(data, "test")
    assert [query.id for query in found.queries] == [f"test{i}" for i in range(4, 8)]
    assert [
        dict(zip(d.tolist(), g.tolist(), strict=True))
        for d, g in zip(found.documents, found.grades, strict=True)
    ] == [grades(i) for i in range(4, 8)]
    assert found.rationales == [""] * 16


def test_limit_draws_queries(judge: Model, data: Dataset, report: AgreementReport) -> None:
    some = measure_judge(judge, data, limit=5, samples=10)
    assert some.readings["argmax"].overall.queries == 5
    assert some.fingerprint != report.fingerprint


@pytest.mark.parametrize(
    ("split", "options", "words"),
    [
        ("gold", {}, "split is 'gold': small has train, dev, test, golden, empty"),
        ("empty", {}, "no graded pair in split 'empty'"),
        ("golden", {"limit": -1}, "limit is -1"),
    ],
)
def test_what_cannot_be_measured(judge: Model, data: Dataset, split: str, options: dict, words: str) -> None:
    with pytest.raises(ReportError, match=words):
        measure_judge(judge, data, split, **options)


def test_only_judges_are_measured(judge: Model, data: Dataset) -> None:
    ranker = dataclasses.replace(judge, contract=dataclasses.replace(judge.contract, kind="ranker"))
    with pytest.raises(ContractError, match="the model is a ranker: give the model folder of a judge"):
        measure_judge(ranker, data)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_report_comes_back_as_it_was(report: AgreementReport, tmp_path: Path) -> None:
    write_report(report, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [PAGE, FILE]
    text = (tmp_path / "new" / FILE).read_text()
    assert "NaN" not in text  # the small bucket has no intervals
    assert '"low": null' in text
    assert repr(read_report(tmp_path / "new")) == repr(report)  # NaN is not equal to itself


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v | {"format": 9}, "format is 9, this version reads 1"),
        (lambda v: v | {"readings": {}}, "measure anew"),
        (lambda v: v | {"extra": 1}, "report: fields extra are missing or unknown"),
        (lambda v: {k: x for k, x in v.items() if k != "model"}, "report: fields model are missing"),
        (lambda v: v | {"model": 7}, r"report.model is '7'"),
        (lambda v: v | {"worst": [{}]}, r"report.worst\[0\]: fields"),
        (lambda v: v | {"limit": True}, "report.limit is 'True'"),
        (lambda v: [], r"report is '\[\]'"),
    ],
)
def test_damaged_reports_are_refused(report: AgreementReport, tmp_path: Path, change, words: str) -> None:
    write_report(report, tmp_path)
    values = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(change(values)))
    with pytest.raises(ReportError, match=words):
        read_report(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff", '{"format": NaN}'])
def test_files_that_are_no_report(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text, encoding="latin-1")
    with pytest.raises(ReportError, match="cannot be used"):
        read_report(tmp_path)


def test_a_missing_report_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"holds no agreement.json: measure the judge with `python -m"):
        read_report(tmp_path)


def test_the_page_escapes_everything(report: AgreementReport, tmp_path: Path) -> None:
    texts = {
        field.name: HOSTILE
        for field in dataclasses.fields(report.worst[0])
        if isinstance(getattr(report.worst[0], field.name), str)
    }
    reading = report.readings["argmax"]
    bad = dataclasses.replace(
        report,
        dataset=HOSTILE,
        split=HOSTILE,
        worst=(dataclasses.replace(report.worst[0], **texts),),
        readings=dict.fromkeys(
            report.readings, dataclasses.replace(reading, buckets={HOSTILE: reading.overall})
        ),
    )
    write_report(bad, tmp_path)
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &#34;quoted&#34; {{ 7*7 }}" in page
    assert page.count("</pre>") == 1
    assert not {"\x00", "\x1b"} & set(page)
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("<svg") == 2
    # The coloured table: five rows for each of the two readings.
    assert page.count("background: rgba(") == 50


# --- the gate --------------------------------------------------------------------------------------------------------


def with_kappa(report: AgreementReport, precedent: list[int], judged: list[int]) -> AgreementReport:
    found = agreement(np.array(precedent), np.array(judged), np.arange(len(judged)), samples=50)
    reading = dataclasses.replace(report.readings["argmax"], overall=found)
    return dataclasses.replace(report, readings={"argmax": reading, "expected": reading})


def test_the_gate(report: AgreementReport) -> None:
    # 20 pairs over 0 and 4, two wrong: seen .1 against .5 by chance, kappa .8.
    report = with_kappa(report, [0] * 10 + [4] * 10, [0] * 9 + [4] * 10 + [0])
    passed = check(report, AgreementGate(0.79))
    assert passed.value == pytest.approx(0.8)
    assert check(report, AgreementGate(0.8 - 1e-9, weights="quadratic")).value == pytest.approx(0.8)
    with pytest.raises(GateError) as caught:
        check(report, AgreementGate(0.81))
    assert f"linear-weighted kappa 0.800 (95% interval {passed.low:.3f} to {passed.high:.3f})" in str(
        caught.value
    )
    assert "does not reach the gate's minimum of 0.810" in str(caught.value)
    assert "on 20 queries of golden" in str(caught.value)
    with pytest.raises(StaleReportError, match="of split 'golden', the gate asks for 'calibration'"):
        check(report, AgreementGate(0.1, split="calibration"))
    with pytest.raises(GateError, match="at least 21 queries are needed"):
        check(report, AgreementGate(0.1, minimum_queries=21))


def test_a_kappa_that_is_not_defined_does_not_pass(report: AgreementReport) -> None:
    with pytest.raises(GateError, match="kappa nan"):
        check(with_kappa(report, [3] * 12, [3] * 12), AgreementGate(-1))


@pytest.mark.parametrize(
    "bad",
    [
        {"minimum_kappa": 1.1},
        {"minimum_kappa": math.nan},
        {"minimum_kappa": 0.5, "weights": "cubic"},
        {"minimum_kappa": 0.5, "reading": "mean"},
        {"minimum_kappa": 0.5, "minimum_queries": 0},
    ],
)
def test_gates_that_cannot_be(bad: dict) -> None:
    with pytest.raises(InputError, match=f"{list(bad)[-1]} is"):
        AgreementGate(**bad)


def test_reports_of_something_else_are_stale(
    report: AgreementReport, judge: Model, data: Dataset, tmp_path: Path
) -> None:
    gate = AgreementGate(-1)
    good = with_kappa(report, [0, 4] * 6, [0, 4] * 6)
    write_report(good, tmp_path)
    assert require_agreement(tmp_path, judge, data, gate).value == 1
    with pytest.raises(StaleReportError, match="is of judge"):
        require_agreement(tmp_path, dataclasses.replace(judge, hash="0" * 64), data, gate)
    with pytest.raises(StaleReportError, match="of data set 'small', this is 'other'"):
        require_agreement(tmp_path, judge, dataclasses.replace(data, name="other"), gate)
    document = Document("p0", {"title": "Senior nurse!"})
    texts = dataclasses.replace(data, documents=[document, *data.documents[1:]])
    first, *rest = data.precedent_pairs["golden"]
    lower = dataclasses.replace(first, grades=np.array([1, 1, 0, 0], np.int32))
    graded = dataclasses.replace(data, precedent_pairs={"golden": [lower, *rest]})
    for changed in (texts, graded, with_precedents(data, 11)):
        with pytest.raises(StaleReportError, match="split 'golden', changed since the judge was measured"):
            require_agreement(tmp_path, judge, changed, gate)
    with pytest.raises(ReportError, match="holds no"):
        require_agreement(tmp_path / "nowhere", judge, data, gate)


# --- command ---------------------------------------------------------------------------------------------------------


def test_the_command(
    judge_folder: Path, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("jaxsearch.data.datasets.load_dataset", lambda name, folder: data)
    command = ["agreement", "--judge", str(judge_folder), "--dataset", "small"]
    assert main.main([*command, "--output", str(tmp_path / "out"), "--worst", "2"]) == 0
    out = capsys.readouterr().out
    assert "argmax overall: kappa " in out
    assert "expected need: kappa " in out
    assert "too few queries for intervals: 4" in out
    found = read_report(tmp_path / "out")
    assert len(found.worst) == 2
    assert main.main([*command, "--split", "nothing"]) == 2
    assert "split is 'nothing'" in capsys.readouterr().err
    assert main.main([*command, "--worst", "-1"]) == 2
