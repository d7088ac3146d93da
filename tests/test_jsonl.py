"""JSON lines of records: every bad line named, files whole or not at all."""

import json
from pathlib import Path

import pytest

from jaxsearch.data import jsonl
from jaxsearch.data.jsonl import read_records, write_lines
from jaxsearch.data.records import Document, Query, RecordError, to_dict


def test_round_trip(tmp_path: Path) -> None:
    records = [
        Document(f"d{i}", {"title": 'Zürich\u2028 "C++"\n☃'}, numeric={"pay": i / 3}) for i in range(3)
    ]
    write_lines(tmp_path / "d.jsonl", map(to_dict, records))
    assert read_records(tmp_path / "d.jsonl", Document) == records
    assert len((tmp_path / "d.jsonl").read_bytes().split(b"\n")) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["d.jsonl"]


def test_blank_lines_and_line_ends_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(b'\n{"id": "a", "text": "x"}\r\n  \n{"id": "b", "text": "y"}')
    assert [query.id for query in read_records(tmp_path / "q.jsonl", Query)] == ["a", "b"]


GOOD = b'{"id": "a", "text": "x"}'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"id": "a"', "Expecting"),
        (b'{"id": "a", "text": ""}', "Query.text is ''"),
        (b'{"id": "a", "text": "x", "grade": 1}', "Query.grade"),
        (b"[1]", "give a JSON object"),
        (b'\xff{"id": "a"}', "not UTF-8"),
        (b"[" * 100_000, "recursion"),
        (b'{"id": "a", "text": "\\ud800"}', "half a character"),
        (b'{"id": "a", "text": "x", "searcher": {"n": ' + b"9" * 5_000 + b"}}", "digits"),
        (b'{"id": "a", "text": "x", "searcher": NaN}', "Query.searcher is nan"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, words: str) -> None:
    (tmp_path / "q.jsonl").write_bytes(GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    with pytest.raises(RecordError, match=r"1 bad line.*\n  q\.jsonl:2: ") as caught:
        read_records(tmp_path / "q.jsonl", Query)
    assert words in str(caught.value)


def test_at_most_ten_bad_lines_are_shown_and_all_counted(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(b"nope\n" * 25)
    with pytest.raises(RecordError, match="has 25 bad lines") as caught:
        read_records(tmp_path / "q.jsonl", Query)
    assert len(str(caught.value).splitlines()) == 11


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 100)
    (tmp_path / "q.jsonl").write_bytes(GOOD.ljust(99) + b"\n" + b"x" * 1000 + b"\n" + b"nope\n")
    with pytest.raises(RecordError, match=r"q\.jsonl:2: longer than 100 bytes$"):
        read_records(tmp_path / "q.jsonl", Query)


@pytest.mark.parametrize(
    ("content", "words"), [(None, "no such file"), (b"", "no records"), (b"\n\n", "no records")]
)
def test_missing_and_empty_files(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "q.jsonl").write_bytes(content)
    with pytest.raises(RecordError, match=words):
        read_records(tmp_path / "q.jsonl", Query)


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_lines(path, [{"a": 1}])

    def rows():  # type: ignore[no-untyped-def]
        yield {"a": 2}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_lines(path, rows())
    with pytest.raises(ValueError, match="JSON compliant"):
        write_lines(path, [{"a": float("nan")}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": 1}]
