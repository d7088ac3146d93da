"""JSON lines of records: every bad line named, files whole or not at all."""

import json
import tracemalloc
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
        (b"[" * 100_000, "nested too deeply"),
        (b'{"id": "a", "text": "\\ud800"}', "half a character"),
        (b'{"id": "a", "text": "x", "searcher": {"n": ' + b"9" * 5_000 + b"}}", "digits"),
        (b'{"id": "a", "text": "x", "searcher": NaN}', "Query.searcher is nan"),
        (b'{"id": "a", "text": "x", "id": "b"}', "id: this key occurs twice"),
        (b'{"id": "a", "text": "x", "\\ud800\\u001b": 1}', r"Query.\ud800\x1b is 1"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, words: str) -> None:
    (tmp_path / "q.jsonl").write_bytes(GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    with pytest.raises(RecordError, match=r"1 bad line.*\n  q\.jsonl:2: ") as caught:
        read_records(tmp_path / "q.jsonl", Query)
    assert words in str(caught.value)


def test_at_most_ten_bad_lines_are_shown_and_all_counted(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(b"nope\n" * 25)
    with pytest.raises(
        RecordError, match=r"has 25 bad lines, mend or remove them \(the first 10 are shown\)"
    ) as caught:
        read_records(tmp_path / "q.jsonl", Query)
    assert len(str(caught.value).splitlines()) == 11


def test_a_line_that_is_too_long_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 100)
    (tmp_path / "q.jsonl").write_bytes(GOOD.ljust(99) + b"\n" + b"x" * 1000 + b"\n" + b"nope\n")
    with pytest.raises(RecordError, match="2 bad lines") as caught:
        read_records(tmp_path / "q.jsonl", Query)
    _, second, third = str(caught.value).splitlines()
    assert "q.jsonl:2: the line has 1,001 bytes: longer than 100 bytes: xxx" in second
    assert "q.jsonl:3: not JSON" in third


@pytest.mark.parametrize("size", [99, 100, 101, 199, 200, 201, 1000])
def test_lines_of_every_length_end_where_they_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Sizes without the line end; limit and pieces fall on, before and after it."""
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(jsonl, "_SKIP_BYTES", 50)
    (tmp_path / "q.jsonl").write_bytes(GOOD.ljust(size) + b"\n" + GOOD)
    rows = list(jsonl.read_rows(tmp_path / "q.jsonl"))
    assert [number for number, _ in rows] == [1, 2]
    assert isinstance(rows[0][1], jsonl.BadRow) == (size >= 100)
    assert rows[1][1] == json.loads(GOOD)


def test_a_long_line_is_not_held(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(b"x" * 20_000_000 + b"\n" + GOOD)
    tracemalloc.start()
    rows = list(jsonl.read_rows(tmp_path / "q.jsonl"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * jsonl.MAX_LINE_BYTES
    assert rows[1] == (2, json.loads(GOOD))


def test_byte_order_mark_and_truncation(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD[:-3])
    (_, first), (number, last) = jsonl.read_rows(tmp_path / "q.jsonl")
    assert first == json.loads(GOOD)
    assert (number, last.code) == (2, "cut off")
    assert "the file ends within this line" in last.reason


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
