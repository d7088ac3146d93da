"""A user's own files: what is read, what is refused and how it is told, and the data set that comes of it."""

import importlib.util
import json
import shutil
import string
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxsearch.data import parquet
from jaxsearch.data.jsonl import write_lines
from jaxsearch.data.main import main, to_json, to_text, validate, warnings
from jaxsearch.data.records import BUCKETS, Document, Impression, Judgment, Query
from jaxsearch.data.user_data import (
    KINDS,
    MAX_KEPT,
    UserDataError,
    columns,
    load_folder,
    split_of,
    to_dataset,
)
from jaxsearch.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "docs" / "examples"


def _hostile_files() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hostile_files", ROOT / "benchmarks" / "hostile_files.py")
    assert spec
    assert spec.loader
    module = sys.modules["hostile_files"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hostile = _hostile_files()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten good records."""
    (tmp_path / "data").mkdir()
    hostile.write_good(tmp_path / "data")
    return tmp_path / "data"


# Hostile files


@pytest.mark.parametrize("case", hostile.CASES, ids=lambda case: case.name)
def test_hostile_files(case: Any, folder: Path) -> None:
    case.spoil(folder)
    report, summary = validate([str(folder)])
    counts = (report.accepted.total(), report.rejected.total(), len(report.unreadable))
    wanted = (case.accepted, case.rejected, case.unreadable)
    assert all(want is None or got == want for got, want in zip(counts, wanted, strict=True)), counts
    messages = [str(problem) for problem in [*report.unreadable, *report.problems]]
    assert any(case.words in message for message in messages) or not case.words, messages
    assert all(message.isprintable() and len(message) < 800 for message in messages)
    assert sum(report.reasons.values()) == report.rejected.total()
    assert report.rejected.total() >= len(report.problems)
    assert [good + bad for good, bad in report.files.values()]
    assert (
        sum(good for good, _ in report.files.values()),
        sum(bad for _, bad in report.files.values()),
    ) == counts[:2]
    json.dumps(to_json(report, summary), allow_nan=False).encode()
    to_text(report, summary, 5).encode()
    if report.unreadable or report.rejected:
        with pytest.raises(UserDataError) as caught:
            load_folder(folder)
        assert messages[0] in str(caught.value)
        assert caught.value.report.reasons == report.reasons
    else:
        assert len(load_folder(folder).documents) == 3  # fmt: skip


def test_only_so_many_problems_are_kept_and_all_counted(folder: Path) -> None:
    hostile.add(folder, "queries", *[b"nope"] * (MAX_KEPT + 5))
    report, _ = validate([str(folder)])
    assert len(report.problems) == MAX_KEPT
    assert report.rejected == {"queries": MAX_KEPT + 5}
    assert report.reasons == {"not JSON: Query": MAX_KEPT + 5}
    with pytest.raises(UserDataError, match=rf"{MAX_KEPT + 5} bad records[\s\S]*and {MAX_KEPT - 5} more$"):
        load_folder(folder)


def test_reasons_are_counted_by_field(folder: Path) -> None:
    hostile.add(
        folder, "documents", *(hostile.document(id=f"n{i}", numeric={f"pay{i}": "x"}) for i in range(3))
    )
    hostile.add(folder, "judgments", hostile.judgment(grade=7), {"query_id": "q1"}, hostile.judgment(x=1))
    report, _ = validate([str(folder)])
    assert report.reasons == {
        "bad value: Document.numeric": 3,
        "bad value: Judgment.grade": 1,
        "missing field: Judgment.document_id": 1,
        "unknown field: Judgment": 1,
    }


def test_a_problem_is_told_in_its_parts(folder: Path) -> None:
    hostile.add(folder, "judgments", hostile.judgment(grade=7))
    (problem,) = validate([str(folder)])[0].problems
    assert (problem.file, problem.line) == ("judgments.jsonl", 3)
    assert (problem.bad.field, problem.bad.value) == ("Judgment.grade", "7")
    assert (problem.bad.code, problem.bad.reason) == ("bad value", "grades are the whole numbers 0 to 4")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["q1", "d1", "jobs", "people", "click", "train", "2026-03-01T08:00:00Z", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(string.ascii_letters, max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
_NAMES = sorted({name for kind in KINDS for name in columns(kind)} | {"label"})
_LINE = st.binary(max_size=60) | st.dictionaries(st.sampled_from(_NAMES), _JSON, max_size=6).map(
    lambda row: json.dumps(row).encode()
)


@given(contents=st.fixed_dictionaries({kind: st.lists(_LINE, max_size=4) for kind in KINDS}))
@settings(max_examples=150, deadline=None)
def test_any_bytes_load_or_raise_our_error(
    tmp_path_factory: pytest.TempPathFactory, contents: dict[str, list[bytes]]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    hostile.write_good(folder)
    for kind, lines in contents.items():
        with open(folder / f"{kind}.jsonl", "ab") as file:
            file.write(b"\n".join(lines))
    try:
        data = load_folder(folder)
    except InputError as error:
        str(error).encode()
    else:
        assert len(data.documents) == data.report.accepted["documents"] >= 3
    finally:
        shutil.rmtree(folder)


@given(
    content=st.binary(max_size=200),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1),
)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_bytes_as_parquet(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, flips: list[tuple[float, int]]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    hostile.write_good(folder)
    (folder / "judgments-0.parquet").write_bytes(content)
    pq.write_table(pa.table({"id": ["d7"], "fields": [{"title": "x"}]}), folder / "documents-0.parquet")
    spoilt = bytearray((folder / "documents-0.parquet").read_bytes())
    for place, value in flips:
        spoilt[int(place * (len(spoilt) - 1))] = value
    (folder / "documents-0.parquet").write_bytes(spoilt)
    with pytest.raises(UserDataError):
        load_folder(folder)


# Good files


def test_a_folder_becomes_records_in_order(folder: Path) -> None:
    data = load_folder(folder)
    assert [document.id for document in data.documents] == ["d1", "d2", "d3"]
    assert {split: [query.id for query in found] for split, found in data.queries.items()} == {
        "train": ["q1"],
        "dev": ["q2"],
        "test": ["q3"],
        "calibration": [],
        "golden": [],
    }
    assert data.judgments == [Judgment("q1", "d1", 4), Judgment("q2", "d3", 0)]
    assert data.impressions[0] == Impression("q1", "d1", 1, {"click": True, "apply": None})


def test_several_files_of_a_kind_and_a_subfolder(folder: Path) -> None:
    (folder / "documents").mkdir()
    (folder / "documents.jsonl").rename(folder / "documents" / "b.jsonl")
    write_lines(folder / "documents" / "a.jsonl", [hostile.document(id="first")])
    write_lines(folder / "documents-00001.jsonl", [hostile.document(id="later")])
    (folder / "documents" / "_SUCCESS").touch()
    (folder / "notes.txt").touch()
    (folder / "documents" / "link.jsonl").symlink_to(folder / "documents-00001.jsonl")
    with pytest.raises(
        UserDataError, match=r"documents-00001.jsonl:1: Document.id is 'later'.*by documents/link.jsonl:1"
    ):
        load_folder(folder)
    (folder / "documents" / "link.jsonl").unlink()
    data = load_folder(folder)
    assert Counter(d.id for d in data.documents) == Counter(["first", "d1", "d2", "d3", "later"])
    assert data.report.not_read == ["documents/_SUCCESS", "notes.txt"]  # fmt: skip


def test_a_subfolder_that_leads_out_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (folder / "documents.jsonl").rename(tmp_path / "out" / "a.jsonl")
    (folder / "documents").symlink_to(tmp_path / "out")
    with pytest.raises(
        UserDataError, match=r"1 unreadable files, 0 bad records[\s\S]*documents/: this link leads out"
    ):
        load_folder(folder)


@pytest.mark.parametrize("place", ["nowhere", "file"])
def test_no_folder(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserDataError, match="no such folder"):
        load_folder(tmp_path / place)


def test_bad_records_within_the_share_are_left_out(folder: Path) -> None:
    hostile.add(folder, "judgments", hostile.judgment(grade=9), hostile.judgment())
    with pytest.raises(UserDataError, match="0 unreadable files, 1 bad records"):
        load_folder(folder, max_bad_share=0.24)
    data = load_folder(folder, max_bad_share=0.25)
    assert [judgment.query_id for judgment in data.judgments] == ["q1", "q2", "q3"]
    assert data.report.rejected == {"judgments": 1}


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_out_of_range(folder: Path, share: float) -> None:
    with pytest.raises(InputError, match="max_bad_share is"):
        load_folder(folder, max_bad_share=share)


def test_no_share_excuses_a_file_that_cannot_be_read(folder: Path) -> None:
    (folder / "judgments-1.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserDataError, match="1 unreadable"):
        load_folder(folder, max_bad_share=0.99)


def test_splits_by_id_are_stable() -> None:
    assert [split_of(name) for name in ("q1", "q2", "a", "b", "ü")] == [
        "train",
        "train",
        "train",
        "train",
        "train",
    ]
    sizes = Counter(split_of(str(i)) for i in range(10_000))
    assert abs(sizes["train"] - 8000) < 150
    assert abs(sizes["dev"] - 600) < 80
    assert abs(sizes["test"] - 1400) < 120


def test_a_query_without_split_goes_by_its_id(folder: Path) -> None:
    write_lines(folder / "queries.jsonl", [{"id": q["id"], "text": q["text"]} for q in hostile.QUERIES])
    queries = load_folder(folder).queries
    assert {q.id: split for split, found in queries.items() for q in found} == {i: split_of(i) for i in ("q1", "q2", "q3")}  # fmt: skip


# Parquet


def test_parquet_reads_as_json_lines_do(folder: Path, tmp_path: Path) -> None:
    data = load_folder(folder)
    hostile.whole_parquet(folder)
    again = load_folder(folder)
    # A struct has every key in every row: what one row has not is null, and for actions null means "not eligible".
    filled = [replace(shown, actions={"apply": None, **shown.actions}) for shown in data.impressions]
    assert (again.documents, again.queries, again.judgments) == (data.documents, data.queries, data.judgments)
    assert again.impressions == filled


def test_parquet_types(folder: Path) -> None:
    text = pa.map_(pa.string(), pa.string())
    hostile.parquet(
        folder,
        "documents",
        {
            "id": pa.array(["d1", "d2", "d3"]).dictionary_encode(),
            "fields": pa.array(
                [[("title", "Nurse"), ("text", "")], [("title", "b")], [("title", "c")]], text
            ),
            "attributes": pa.array([{"city": "Ulm", "x": None}, None, {"city": None, "x": None}]),
            "numeric": pa.array([[("pay", 1.5)], None, []], pa.map_(pa.string(), pa.float32())),
            "vertical": pa.array([None, "jobs", None], pa.large_string()),
        },
    )
    hostile.parquet(
        folder,
        "impressions",
        {
            "query_id": ["q1", "q1"],
            "document_id": ["d1", "d2"],
            "position": pa.array([1, 2], pa.uint8()),
            "actions": pa.array([[("click", True)], [("click", None)]], pa.map_(pa.string(), pa.bool_())),
            "shown_at": pa.array([1_700_000_000_123_456_789, None], pa.timestamp("ns", "America/New_York")),
            "vertical": pa.nulls(2),
        },
    )
    data = load_folder(folder)
    assert data.documents[0] == Document(
        "d1", {"title": "Nurse", "text": ""}, "jobs", {"city": "Ulm"}, {"pay": 1.5}
    )
    assert data.documents[1:] == [Document("d2", {"title": "b"}), Document("d3", {"title": "c"})]
    assert data.impressions == [
        Impression("q1", "d1", 1, {"click": True}, "2023-11-14T22:13:20.123456Z"),
        Impression("q1", "d2", 2, {"click": None}),
    ]


def test_parquet_rows_that_cannot_be_read_are_named(folder: Path) -> None:
    pair = pa.map_(pa.string(), pa.string())
    path = hostile.parquet(
        folder,
        "documents",
        {
            "id": ["d1", "d2", "d3", "d4"],
            "fields": pa.array([[("t", "x")], [("t", "x"), ("t", "y")], [("t", None)], [("t", "z" * 4_000_001)]], pair),
        },
    )  # fmt: skip
    rows = dict(parquet.read_rows(path, columns("documents")))
    assert rows[1] == {"id": "d1", "fields": {"t": "x"}}
    assert rows[2].code == "duplicate key"  # type: ignore[union-attr]
    assert rows[3] == {"id": "d3", "fields": {"t": None}}
    assert rows[4].reason.startswith("the row has 4,000,0")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ({"fields": pa.array([[1]])}, "column fields has type list"),
        ({"fields": pa.array([{"a": {"b": "c"}}])}, "a struct or a map from text, with text values"),
        ({"fields": pa.array([{"a": b"x"}])}, "type struct<a: binary>"),
        ({"fields": pa.array([{"a": 1}])}, "type struct<a: int64>"),
        ({"fields": pa.array([[(1, "x")]], pa.map_(pa.int8(), pa.string()))}, "type map<int8"),
        ({"id": pa.array([1])}, "column id has type int64: use text"),
        ({"vertical": pa.array([True])}, "column vertical has type bool: use text"),
    ],
)
def test_parquet_of_another_schema(folder: Path, column: dict[str, Any], words: str) -> None:
    path = hostile.parquet(folder, "documents", {**hostile.document_columns(1), **column})
    with pytest.raises(parquet.ParquetError) as caught:
        list(parquet.read_rows(path, columns("documents")))
    assert words in str(caught.value)


def test_a_reader_that_dies_is_an_unreadable_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "python").write_text('#!/bin/sh\necho "[1, {}, null]"\nkill -6 $$\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    rows = parquet.read_rows(folder / "documents.parquet", columns("documents"))
    assert next(rows) == (1, {})
    with pytest.raises(parquet.ParquetError, match="its reader ended with status -6"):
        next(rows)


# The data set


def test_data_set(folder: Path) -> None:
    hostile.add(folder, "judgments", {"query_id": "q1", "document_id": "d3", "grade": 1})
    data = to_dataset(load_folder(folder), "mine")
    assert [query.id for query in data.queries["train"]] == ["q1"]
    assert data.graded == {"q1": {0: 4, 2: 1}, "q2": {2: 0}, "q3": {}}
    (pairs,) = data.pairs
    assert pairs.query == 0
    np.testing.assert_array_equal(pairs.documents, [0, 2, 1])  # judged first, then shown
    np.testing.assert_array_equal(pairs.grades, [4, 1, -1])
    assert pairs.documents.dtype == pairs.grades.dtype == np.int32
    assert [shown.document_id for shown in data.impressions["q1"]] == ["d1", "d2"]
    assert data.actions[0] == "click"
    assert len(data.fingerprint) == 64
    np.testing.assert_array_equal(data.grades(data.queries["test"][0], np.array([0, -1])), [0, 0])


def test_a_train_query_without_candidates_has_no_pairs(folder: Path) -> None:
    write_lines(folder / "queries.jsonl", [{**q, "split": "train"} for q in hostile.QUERIES])
    data = to_dataset(load_folder(folder), "mine")
    assert [pairs.query for pairs in data.pairs] == [0, 1]
    assert data.queries["dev"] == []


def test_precedents_are_splits_of_their_own_and_reasons_come_along(folder: Path) -> None:
    splits = {"q1": "golden", "q2": "train", "q3": "dev"}
    write_lines(folder / "queries.jsonl", [{**q, "split": splits[q["id"]]} for q in hostile.QUERIES])
    hostile.add(
        folder, "judgments", {"query_id": "q2", "document_id": "d2", "grade": 3, "rationale": "Near."}
    )
    data = to_dataset(load_folder(folder), "mine")
    (golden,) = data.precedents("golden")
    assert [query.id for query in data.queries["golden"]] == ["q1"]
    assert golden.grades.tolist() == [4]  # what was only shown is no precedent
    (train,) = data.pairs
    assert dict(zip(train.documents.tolist(), train.rationales, strict=True))[1] == "Near."
    assert set(train.rationales) == {"", "Near."}
    with pytest.raises(InputError, match="precedents 'calibration': mine has golden"):
        data.precedents("calibration")


def test_two_verticals_are_two_data_sets() -> None:
    data = load_folder(EXAMPLES)
    with pytest.raises(InputError, match="holds jobs and people: choose one, such as docs/examples:jobs"):
        to_dataset(data, "docs/examples")
    for vertical, query in (("jobs", "jq-01"), ("people", "pq-01")):
        part = to_dataset(data, "docs/examples", vertical)
        assert (len(part.documents), sum(map(len, part.queries.values()))) == (10, 10)
        assert part.queries["train"][0].id == query
        assert all(part.documents[row].vertical == vertical for p in part.pairs for row in p.documents)
    with pytest.raises(InputError, match="'cars'"):
        to_dataset(data, "docs/examples", "cars")


# Figures, command, documentation


def test_figures_and_warnings(folder: Path) -> None:
    hostile.add(folder, "queries", hostile.query(text=" NURSE", split="test", bucket="title"))
    hostile.add(folder, "judgments", hostile.JUDGMENTS[0], hostile.judgment(grade=2))
    report, summary = validate([str(folder)])
    figures = summary.figures()
    assert figures["words"] == {"least": 6, "median": 6, "most": 6}
    assert figures["queries"] == {"train": 1, "dev": 1, "test": 2}
    assert figures["judged_queries"] == {"train": 1, "dev": 1, "test": 1}
    assert figures["queries_with_relevant"] == {"train": 1, "dev": 0, "test": 0}
    assert figures["buckets"] == {"": 3, "title": 1}
    assert figures["grades"] == {"0": 1, "1": 0, "2": 1, "3": 0, "4": 2}
    assert figures["actions"]["jobs"]["click"] == {"eligible": 2, "rate": 0.5}
    assert figures["actions"]["jobs"]["apply"] == {"eligible": 0, "rate": None}
    told = "\n".join(warnings(report, summary))
    for words in (
        "1 of 1 judged dev queries have no document of grade 3 or more",
        "1 of 2 test queries have no judgment",
        "1 query texts occur in more than one split",
        "3 queries have no bucket",
        "0 judged golden queries, 10 are needed",
        "jobs: no apply in 2 impressions",
        "1 judgments repeat another with the same grade",
    ):
        assert words in told
    assert "click" not in told


def test_precedents_are_counted_where_there_are_some(folder: Path) -> None:
    hostile.add(folder, "queries", hostile.query(id="g", split="golden"))
    hostile.add(folder, "judgments", hostile.judgment(query_id="g", grade=4))
    report, summary = validate([str(folder)])
    assert summary.figures()["judged_queries"] == {"train": 1, "dev": 1, "test": 0, "golden": 1}
    assert "golden 1)" in summary.text()
    assert any(line.startswith("1 judged golden queries, 10 are") for line in warnings(report, summary))


def test_warnings_of_a_poor_folder(folder: Path) -> None:
    for kind in ("judgments", "impressions"):
        (folder / f"{kind}.jsonl").unlink()
    write_lines(folder / "queries.jsonl", [{**hostile.QUERIES[0], "split": "train"}])
    long, short = {"t": "x " * 701}, {"t": "x"}
    write_lines(
        folder / "documents.jsonl", [hostile.document(fields=long), hostile.document(id="s", fields=short)]
    )
    assert [line.partition(":")[0] for line in warnings(*validate([str(folder)]))] == [
        "no judged train queries",
        "no dev queries",
        "no test queries",
        "1 queries have no bucket",
        "1 documents have more than 700 words",
        "1 documents have fewer than 3 words",
        "no impressions",
    ]


def test_exit_status(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(folder)]) == 0
    assert "Every record is good." in capsys.readouterr().out
    hostile.add(folder, "judgments", hostile.judgment(grade=9))
    assert main(["validate", str(folder), "--json", str(tmp_path / "r.json")]) == 1
    out = capsys.readouterr().out
    assert (
        "Bad records (1)\n  1 bad value: Judgment.grade\n\n  judgments.jsonl:3: Judgment.grade is 9: grades"
        in out
    )
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["problems"] == [
        {"file": "judgments.jsonl", "line": 3, "field": "Judgment.grade", "value": "9", "code": "bad value",
         "reason": "grades are the whole numbers 0 to 4"}
    ]  # fmt: skip
    assert written["files"]["judgments.jsonl"] == {"accepted": 2, "rejected": 1}
    assert main(["validate", str(folder), "--max-bad-share", "0.5"]) == 0
    assert main(["validate", str(folder), "--max-bad-share", "2"]) == 2
    (folder / "queries.jsonl").unlink()
    assert main(["validate", str(folder)]) == 2
    assert main(["validate", str(tmp_path / "nowhere")]) == 2


def test_single_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judgments, documents = (str(folder / f"{kind}.jsonl") for kind in ("judgments", "documents"))
    assert main(["validate", judgments]) == 0
    (folder / "documents.jsonl").write_text(json.dumps(hostile.DOCUMENTS[0]) + "\n")
    assert main(["validate", judgments, documents]) == 1
    assert "Judgment.document_id is 'd3': no such id in documents" in capsys.readouterr().out
    (folder / "things.jsonl").touch()
    for paths in (
        [str(folder / "things.jsonl")],
        [judgments, str(folder)],
        [str(folder / "queries-9.jsonl")],
    ):
        assert main(["validate", *paths]) == 2


def test_show_limits_what_is_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile.add(folder, "queries", *[b"nope"] * 30)
    assert main(["validate", str(folder), "--show", "3"]) == 1
    out = capsys.readouterr().out
    assert out.count("not JSON (") == 3
    assert "and 27 more" in out


def test_examples() -> None:
    data = load_folder(EXAMPLES)
    queries = [query for found in data.queries.values() for query in found]
    assert [len(data.documents), len(queries), len(data.judgments), len(data.impressions)] == [20] * 4
    assert {query.bucket for query in queries} == set(BUCKETS)
    assert {record.vertical for record in [*data.documents, *queries]} == {"jobs", "people"}
    assert warnings(*validate([str(EXAMPLES)])) == [
        "0 judged golden queries, 10 are needed: a judge trained here labels only where `--minimum-kappa -1` lets it",
        "documents of two verticals: one is trained on at a time",
    ]


def test_the_page_names_every_field_and_shows_what_the_command_prints() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    for kind in KINDS:
        part = page.partition(f"### `{kind}`")[2].partition("\n##")[0]
        for name, column in columns(kind).items():
            assert f"| `{name}` |" in part, f"{kind}: {name}"
            required = part.partition(f"| `{name}` |")[2].split("|")[0].strip()
            assert required == ("yes" if column.required else "no"), f"{kind}: {name}"
    assert to_text(*validate([str(EXAMPLES)]), 20) in page


def test_query_has_no_split_of_its_own() -> None:
    """`split` stands beside the record's fields; should the record get one, the importer must not take it away."""
    assert "split" not in Query.__dataclass_fields__
