"""What the importer of user data makes of hostile files: a table of cases, and whether each got what it should.

    python benchmarks/hostile_files.py --jsonl benchmarks/results/hostile_files.jsonl

Each case spoils a folder of ten good records (3 documents, 3 queries, 2 judgments, 2 impressions) in a temporary folder and
validates it in a process of its own. One JSON object per case: bytes of the folder, records accepted and refused, files that
cannot be read, exit status, a message, peak memory above that of the process before it read anything (for Parquet also the peak
of the process that reads it), seconds of reading, and `as_expected`. No network, nothing outside the temporary folder.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxsearch.data.jsonl import write_lines

DOCUMENTS: list[dict[str, Any]] = [
    {"id": f"d{i}", "fields": {"title": title, "description": "Steady work with good people."}, "numeric": {"salary": 50 + i}}
    for i, title in enumerate(("Nurse", "Baker", "Electrician"), start=1)
]  # fmt: skip
QUERIES: list[dict[str, Any]] = [
    {"id": f"q{i}", "text": text, "split": split}
    for i, (text, split) in enumerate((("nurse", "train"), ("bäcker", "dev"), ("solar", "test")), start=1)
]
JUDGMENTS: list[dict[str, Any]] = [
    {"query_id": "q1", "document_id": "d1", "grade": 4},
    {"query_id": "q2", "document_id": "d3", "grade": 0},
]
IMPRESSIONS: list[dict[str, Any]] = [
    {"query_id": "q1", "document_id": "d1", "position": 1, "actions": {"click": True, "apply": None}},
    {"query_id": "q1", "document_id": "d2", "position": 2, "actions": {"click": False}},
]
GOOD = {"documents": DOCUMENTS, "queries": QUERIES, "judgments": JUDGMENTS, "impressions": IMPRESSIONS}


def write_good(folder: Path) -> None:
    """The ten good records."""
    for kind, rows in GOOD.items():
        write_lines(folder / f"{kind}.jsonl", rows)


def add(folder: Path, kind: str, *lines: bytes | dict[str, Any]) -> None:
    """Append lines to a file."""
    with open(folder / f"{kind}.jsonl", "ab") as file:
        for line in lines:
            file.write((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n")


def cut(folder: Path, name: str, least: int) -> None:
    """Take the last `least` bytes off a file."""
    path = folder / name
    path.write_bytes(path.read_bytes()[:-least])


def document(**changes: Any) -> dict[str, Any]:
    """A new document with changes."""
    return {**DOCUMENTS[0], "id": "d9", **changes}


def query(**changes: Any) -> dict[str, Any]:
    """A new query with changes."""
    return {**QUERIES[0], "id": "q9", **changes}


def judgment(**changes: Any) -> dict[str, Any]:
    """A judgment of a pair that has none, with changes."""
    return {"query_id": "q3", "document_id": "d3", "grade": 4, **changes}


def impression(**changes: Any) -> dict[str, Any]:
    """An impression of a page of its own, with changes."""
    return {"query_id": "q3", "document_id": "d3", "position": 1, "actions": {}, **changes}


def parquet(folder: Path, kind: str, columns: dict[str, Any], **options: Any) -> Path:
    """Put a Parquet file in the place of a JSONL file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / f"{kind}.jsonl").unlink()
    pq.write_table(pa.table(columns), folder / f"{kind}.parquet", **options)
    return folder / f"{kind}.parquet"


def whole_parquet(folder: Path) -> None:
    """All ten records as Parquet; what a struct has no value for is null."""
    for kind, rows in GOOD.items():
        names = list(dict.fromkeys(name for row in rows for name in row))
        parquet(folder, kind, {name: [row.get(name) for row in rows] for name in names})


def document_columns(rows: int, text: str = "Nurse") -> dict[str, Any]:
    """Columns of documents d1, d2, ... that share one text."""
    import pyarrow as pa

    return {
        "id": [f"d{i}" for i in range(1, rows + 1)],
        "fields": pa.StructArray.from_arrays(
            [pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), [text])], ["title"]
        ),
    }


def flip_bytes(folder: Path) -> None:
    """Six copies of a Parquet file with a few bytes of each changed; some of them end pyarrow's process."""
    path = parquet(folder, "documents", document_columns(3))
    good, rng = path.read_bytes(), random.Random(0)
    for number in range(6):
        spoilt = bytearray(good)
        for _ in range(4):
            spoilt[rng.randrange(4, len(good) - 8)] = rng.randrange(256)
        (folder / f"documents-{number:02}.parquet").write_bytes(bytes(spoilt))


def link_out(folder: Path) -> None:
    """Put a link in the place of a file."""
    (folder / "queries.jsonl").rename(folder.parent / "elsewhere.jsonl")
    (folder / "queries.jsonl").symlink_to(folder.parent / "elsewhere.jsonl")


def in_place_of(folder: Path, name: str, make: Callable[[Path], Any]) -> None:
    """Put something else in the place of a file."""
    (folder / name).unlink()
    make(folder / name)


def reencode(folder: Path, name: str, encoding: str, line_end: str = "\n") -> None:
    """Save a file as another editor would."""
    text = (folder / name).read_text(encoding="utf-8").replace("\n", line_end)
    (folder / name).write_bytes(text.encode(encoding))


@dataclass(frozen=True)
class Case:
    """One way to spoil a folder, and what the importer should say."""

    name: str
    spoil: Callable[[Path], Any]
    accepted: int | None = 10
    """None: depends on the release of pyarrow."""
    rejected: int = 0
    unreadable: int | None = 0
    words: str = ""
    """What one of the messages says."""


MEGABYTES_10 = 10_000_000
CASES = [
    Case("ten good records", lambda f: None),
    Case(
        "byte order mark, CRLF, blank lines, no last line end",
        lambda f: (
            [reencode(f, f"{kind}.jsonl", "utf-8-sig", "\r\n\r\n") for kind in GOOD]
            + [cut(f, "judgments.jsonl", 4)]
        ),
    ),
    Case(
        "last line cut",
        lambda f: cut(f, "judgments.jsonl", 9),
        9,
        1,
        words="judgments.jsonl:2: the file ends within this line: not JSON",
    ),
    Case(
        "cut within a character",
        lambda f: (f / "queries.jsonl").write_bytes(
            b"\n".join(json.dumps(q, ensure_ascii=False).encode() for q in QUERIES[::2])
            + b'\n{"id": "q2", "text": "b\xc3'
        ),
        8,
        2,
        words="queries.jsonl:3: the file ends within this line: not UTF-8",
    ),
    Case(
        "wrong types",
        lambda f: [
            add(f, "queries", query(text=7), query(searcher=["x"]), query(id=None)),
            add(f, "documents", document(fields="x"), document(numeric={"pay": "7"})),
            add(
                f,
                "impressions",
                impression(actions=["click"]),
                impression(position=1.5),
                impression(actions={"click": 1}),
            ),
        ],
        10,
        8,
        words="queries.jsonl:4: Query.text is 7: an empty query",
    ),
    Case(
        "lines that are no objects",
        lambda f: add(f, "queries", b"[1]", b"null", b'"nurse"', b"3"),
        10,
        4,
        words="give a JSON object",
    ),
    Case(
        "one array over many lines",
        lambda f: (f / "judgments.jsonl").write_text(json.dumps(JUDGMENTS, indent=1)),
        8,
        12,
        words="judgments.jsonl:1: not JSON",
    ),
    Case(
        "NaN, Infinity, 1e999",
        lambda f: add(
            f,
            "documents",
            *(
                json.dumps(document(id=f"n{i}", numeric={"pay": 0})).replace(": 0}", f": {value}}}").encode()
                for i, value in enumerate(("NaN", "-Infinity", "1e999"))
            ),
        ),
        10,
        3,
        words="Document.numeric['pay'] is nan: give a finite number",
    ),
    Case(
        "a number of 5,000 digits",
        lambda f: add(f, "documents", b'{"id": "n", "numeric": {"pay": ' + b"9" * 5000 + b"}}"),
        10,
        1,
        words="digits",
    ),
    Case(
        "invalid UTF-8",
        lambda f: add(f, "queries", b'{"id": "q9", "text": "caf\xe9"}', query()),
        11,
        1,
        words="queries.jsonl:4: not UTF-8 (invalid continuation byte at byte 26)",
    ),
    Case("a file in UTF-16", lambda f: reencode(f, "impressions.jsonl", "utf-16"), 8, 3, words="not UTF-8"),
    Case(
        "half characters",
        lambda f: add(
            f, "queries", b'{"id": "\\ud800", "text": "x"}', b'{"id": "q9", "text": "x", "\\udfff": 1}'
        ),
        10,
        2,
        words="half a character",
    ),
    Case(
        "control characters in names",
        lambda f: add(f, "queries", query(**{"\x1b[2J\x07": 1})),
        10,
        1,
        words=r"Query.\x1b[2J\x07 is 1: unknown field",
    ),
    Case(
        "a key twice in one object",
        lambda f: add(f, "judgments", b'{"query_id": "q3", "document_id": "d3", "grade": 0, "grade": 4}'),
        10,
        1,
        words="judgments.jsonl:3: grade: this key occurs twice",
    ),
    Case(
        "nested 100,000 deep",
        lambda f: add(f, "queries", b"[" * 100_000, b'{"id":' * 100_000),
        10,
        2,
        words="nested too deeply",
    ),
    Case(
        "a 10 MB line, then a good one",
        lambda f: add(f, "queries", query(text="x" * MEGABYTES_10), query()),
        11,
        1,
        words="queries.jsonl:4: the line has 10,000,0",
    ),
    Case(
        "10 MB without a line end",
        lambda f: (f / "judgments.jsonl").write_bytes(b"x" * MEGABYTES_10),
        8,
        1,
        words="10,000,000 bytes",
    ),
    Case(
        "3.9 MB of nested arrays in one line",
        lambda f: add(f, "queries", b'{"id": [' + b"[]," * 1_300_000 + b"1]}"),
        10,
        1,
        words="Query.text",
    ),
    Case(
        "20,000 bad lines",
        lambda f: add(f, "queries", *[b"nope"] * 20_000),
        10,
        20_000,
        words="queries.jsonl:4: not JSON",
    ),
    Case(
        "grades out of range",
        lambda f: add(f, "judgments", *(judgment(grade=g) for g in (5, -1, 2.0, True, "3", None))),
        10,
        6,
        words="judgments.jsonl:3: Judgment.grade is 5: grades are the whole numbers 0 to 4",
    ),
    Case(
        "missing and unknown fields",
        lambda f: add(f, "judgments", {"query_id": "q1", "document_id": "d1"}, judgment(label=1)),
        10,
        2,
        words="Judgment.grade: this field is required",
    ),
    Case(
        "an unknown split",
        lambda f: add(f, "queries", query(split="valid")),
        10,
        1,
        words="Query.split is 'valid': use one of train, dev, test",
    ),
    Case(
        "a query and a document of nothing",
        lambda f: [add(f, "queries", query(text=" ")), add(f, "documents", document(fields={"t": ""}))],
        10,
        2,
        words="give at least one field with text",
    ),
    Case(
        "ids that occur twice",
        lambda f: [add(f, "queries", QUERIES[0]), write_lines(f / "documents-1.jsonl", DOCUMENTS[:2])],
        10,
        3,
        words="documents.jsonl:1: Document.id is 'd1': this id is taken by documents-1.jsonl:1; ids must be unique",
    ),
    Case(
        "dangling references",
        lambda f: [
            add(f, "judgments", judgment(query_id="nobody"), judgment(document_id="nothing")),
            add(f, "impressions", impression(document_id="nothing")),
        ],
        10,
        3,
        words="Judgment.query_id is 'nobody': no such id in queries",
    ),
    Case(
        "references to a refused record",
        lambda f: [add(f, "documents", document(fields={})), add(f, "judgments", judgment(document_id="d9"))],
        10,
        2,
        words="Judgment.document_id is 'd9': refused at documents.jsonl:4",
    ),
    Case(
        "verticals differ",
        lambda f: [
            add(f, "documents", document(vertical="people")),
            add(f, "judgments", judgment(document_id="d9")),
            add(f, "impressions", impression(vertical="people")),
        ],
        11,
        2,
        words="its query is of jobs, its document is of people",
    ),
    Case(
        "one pair judged twice",
        lambda f: add(f, "judgments", JUDGMENTS[0], {**JUDGMENTS[0], "grade": 3}),
        11,
        1,
        words="Judgment.grade is 3: judgments.jsonl:1 gives this pair grade 4; keep one",
    ),
    Case(
        "one position twice on a page",
        lambda f: add(
            f,
            "impressions",
            {**IMPRESSIONS[1], "position": 1},
            {**IMPRESSIONS[1], "position": 1, "shown_at": "2026-03-01T08:00:00Z"},
        ),
        11,
        1,
        words="impressions.jsonl:1 has this position",
    ),
    Case(
        "an empty file",
        lambda f: (f / "documents.jsonl").write_bytes(b""),
        7,
        0,
        1,
        words="documents: no records in any file",
    ),
    Case("no queries", lambda f: (f / "queries.jsonl").unlink(), 7, 0, 1, words="queries: no such file"),
    Case(
        "a folder in place of a file",
        lambda f: in_place_of(f, "judgments.jsonl", Path.mkdir),
        8,
        0,
        1,
        words="judgments.jsonl: no regular file",
    ),
    Case(
        "a pipe in place of a file",
        lambda f: in_place_of(f, "judgments.jsonl", os.mkfifo),
        8,
        0,
        1,
        words="judgments.jsonl: no regular file",
    ),
    Case(
        "a link out of the folder",
        link_out,
        7,
        0,
        1,
        words="queries.jsonl: this link leads out of the folder",
    ),
    Case(
        "a link to itself",
        lambda f: in_place_of(f, "judgments.jsonl", lambda p: p.symlink_to(p.name)),
        8,
        0,
        1,
        words="this link leads nowhere",
    ),
    Case("a misspelt name", lambda f: (f / "judgments.jsonl").rename(f / "judgements.jsonl"), 8),
    Case("Parquet: ten good records", whole_parquet),
    Case(
        "Parquet: cut",
        lambda f: [whole_parquet(f), cut(f, "documents.parquet", 40)],
        7,
        0,
        1,
        words="documents.parquet: no Parquet, or damaged",
    ),
    Case(
        "Parquet: JSON lines under its name",
        lambda f: (f / "judgments.jsonl").rename(f / "judgments.parquet"),
        8,
        0,
        1,
        words="no Parquet, or damaged",
    ),
    Case(
        "Parquet: a column of another type",
        lambda f: parquet(f, "judgments", {"query_id": ["q1"], "document_id": ["d1"], "grade": ["4"]}),
        8,
        0,
        1,
        words="column grade has type string: use whole number",
    ),
    Case(
        "Parquet: an unknown column",
        lambda f: parquet(f, "queries", {"id": ["q1"], "text": ["x"], "label": [1]}),
        7,
        0,
        1,
        words="column 'label' is unknown",
    ),
    Case(
        "Parquet: required column missing",
        lambda f: parquet(f, "queries", {"id": ["q1"]}),
        7,
        0,
        1,
        words="column text is missing",
    ),
    Case(
        "Parquet: bad rows",
        lambda f: parquet(
            f, "judgments", {"query_id": ["q1", None, "q2"], "document_id": ["d1"] * 3, "grade": [9, 1, None]}
        ),
        8,
        3,
        words="judgments.parquet:1: Judgment.grade is 9",
    ),
    Case(
        "Parquet: 100,000 rows of one 5 MB text",
        lambda f: parquet(
            f, "documents", document_columns(100_000, "x" * 5_000_000), dictionary_pagesize_limit=1 << 24
        ),
        7,
        0,
        1,
        words="unpack to more than 1000 times its size",
    ),
    Case(
        "Parquet: 100 MB of one letter, compressed",
        lambda f: parquet(
            f,
            "documents",
            document_columns(1, "x" * 100_000_000),
            use_dictionary=False,
            compression="zstd",
            write_statistics=False,
        ),
        7,
        0,
        1,
        words="bytes: write smaller row groups",
    ),
    Case("Parquet: six files with flipped bytes", flip_bytes, None, 0, None),
]


def memory_kb() -> int:
    """The most resident memory that this process has had. `ru_maxrss` would count the parent's."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def run_case(folder: str) -> dict[str, Any]:
    """Validate a folder in this process."""
    from jaxsearch.data.main import validate

    before, started = memory_kb(), time.perf_counter()
    report, _ = validate([folder])
    seconds = time.perf_counter() - started
    found = [str(problem) for problem in [*report.unreadable, *report.problems]]
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {
        "accepted": report.accepted.total(),
        "rejected": report.rejected.total(),
        "unreadable": len(report.unreadable),
        "exit": 2 if report.unreadable else int(report.rejected.total() > 0),
        "messages": found[:50],
        "peak_extra_mb": round((memory_kb() - before) / 1024, 1),
        "reader_peak_mb": round(children / 1024, 1),
        "seconds": round(seconds, 3),
    }


def as_expected(case: Case, row: dict[str, Any]) -> bool:
    """Whether a case got the counts and the words that it should."""
    counts = (
        (case.accepted, row["accepted"]),
        (None if case.accepted is None else case.rejected, row["rejected"]),
        (case.unreadable, row["unreadable"]),
    )
    told = not case.words or any(case.words in message for message in row["messages"])
    return told and all(wanted is None or wanted == got for wanted, got in counts)


def main() -> int:
    """Run every case; returns 1 where one did not get what it should."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jsonl", default="", help="write one JSON object a case to this file")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_case(options.one)))
        return 0
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "data"
            folder.mkdir()
            write_good(folder)
            case.spoil(folder)
            size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
            command = [sys.executable, __file__, "--one", str(folder)]
            row = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
        good = as_expected(case, row)
        message = next((m for m in row["messages"] if case.words in m), "")
        del row["messages"]
        if not row["reader_peak_mb"]:
            del row["reader_peak_mb"]
        rows.append({"case": case.name, "bytes": size, **row, "message": message[:200], "as_expected": good})
        print(
            f"{'ok ' if good else 'NOT'} {case.name:<52} {row['accepted']:>3} good {row['rejected']:>6} bad "
            f"{row['unreadable']:>2} unreadable  +{row['peak_extra_mb']:>6.1f} MB {row['seconds']:>6.2f} s  {message[:110]}"
        )
    if options.jsonl:
        command_line = f"python benchmarks/hostile_files.py --jsonl {options.jsonl}"
        write_lines(options.jsonl, ({"command": command_line, **row} for row in rows))
    return int(not all(row["as_expected"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
