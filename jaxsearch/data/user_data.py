"""A user's own documents, queries, judgments and impressions: files in, checked records out, every bad record named.

`load_folder` reads a folder into memory; `read_files` passes each good record to a function and keeps only ids. docs/data.md describes
the files.
"""

import hashlib
import os
import re
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxsearch.data import jsonl, parquet
from jaxsearch.data.jsonl import BadRow, printable
from jaxsearch.data.records import (
    MAX_ID_LENGTH,
    Document,
    Impression,
    Judgment,
    Query,
    Record,
    RecordError,
    from_dict,
)
from jaxsearch.errors import InputError

if TYPE_CHECKING:
    from jaxsearch.data.datasets import Dataset

KINDS: dict[str, type[Record]] = {
    "documents": Document,
    "queries": Query,
    "judgments": Judgment,
    "impressions": Impression,
}
"""Kinds of files, in the order in which they are read: what is referred to comes first."""
REQUIRED = ("documents", "queries")
SPLITS = ("train", "dev", "test", "calibration", "golden")
"""The last two hold precedents: a judge is measured by their judgments and never learns from them."""
MAX_KEPT = 1_000
"""Problems kept with their place; all are counted."""
_SUFFIXES = (".jsonl", ".parquet")
_SHOWN = 10


class UserDataError(InputError):
    """A folder cannot be used; `report` tells of every file."""

    def __init__(self, message: str, report: "Report") -> None:
        super().__init__(message)
        self.report = report


class Problem(NamedTuple):
    """One bad record, or a file that cannot be read (line 0)."""

    file: str
    line: int
    """Line of a JSONL file, row of a Parquet file, from 1."""
    bad: BadRow

    def __str__(self) -> str:
        return f"{self.file}{f':{self.line}' if self.line else ''}: {self.bad}"


@dataclass
class Report:
    """What a run of the importer read, and what it refused."""

    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    """File -> records accepted, records refused."""
    accepted: Counter[str] = field(default_factory=Counter)
    """By kind ("documents", ...)."""
    rejected: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    """Refused records by reason and field, such as "bad value: Judgment.grade"."""
    problems: list[Problem] = field(default_factory=list)
    """Refused records, the first `MAX_KEPT`."""
    unreadable: list[Problem] = field(default_factory=list)
    """Files that cannot be read to their end; nobody knows how many records they hold."""
    broken: set[str] = field(default_factory=set)
    """Kinds of which a file is missing or cannot be read: what refers to them is not checked."""
    not_read: list[str] = field(default_factory=list)
    """Files in the folder that are none of ours."""
    repeated_judgments: int = 0
    """Judgments that say again, with the same grade, what another said; they are accepted."""

    def worst_share(self) -> float:
        """The largest share of refused records among the kinds."""
        return max((n / (n + self.accepted[kind]) for kind, n in self.rejected.items()), default=0.0)

    def check(self, max_bad_share: float) -> None:
        """Raise `UserDataError` where a file cannot be read, or a kind has more than this share of bad records."""
        if not 0 <= max_bad_share < 1:
            raise InputError(f"max_bad_share is {max_bad_share}: use at least 0 and less than 1")
        if not self.unreadable and self.worst_share() <= max_bad_share:
            return
        found = [*self.unreadable, *self.problems]
        bad = self.rejected.total()
        head = f"{len(self.unreadable)} unreadable files, {bad} bad records (mend or remove them)"
        more = len(self.unreadable) + bad - _SHOWN
        lines = [head, *map(str, found[:_SHOWN]), *([f"and {more} more"] if more > 0 else [])]
        raise UserDataError("\n  ".join(lines), self)


@dataclass(frozen=True)
class UserData:
    """The records of a folder, each kind in the order of its files."""

    documents: Sequence[Document]
    queries: Mapping[str, Sequence[Query]]
    """By split of `SPLITS`; a split may be empty."""
    judgments: Sequence[Judgment]
    impressions: Sequence[Impression]
    report: Report


Sink = Callable[[Record, str], None]
"""Takes each accepted record, with its split where it is a query (else "")."""


def load_folder(folder: str | os.PathLike[str], max_bad_share: float = 0.0) -> UserData:
    """Read and check a folder of `documents`, `queries` and, optionally, `judgments` and `impressions`.

    All files are read before anything is refused, so that one run names every bad record.

    Args:
      max_bad_share: bad records that are left out instead of stopping the run, as a share of each kind, 0 <= share < 1.

    Raises:
      UserDataError: no such folder, documents or queries missing, a file that cannot be read, or too many bad records.
    """
    documents: list[Document] = []
    queries: dict[str, list[Query]] = {split: [] for split in SPLITS}
    judgments: list[Judgment] = []
    impressions: list[Impression] = []

    def keep(record: Record, split: str) -> None:
        match record:
            case Document():
                documents.append(record)
            case Query():
                queries[split].append(record)
            case Judgment():
                judgments.append(record)
            case Impression():
                impressions.append(record)

    report = read_files(*find_files(folder), keep, Path(folder))
    report.check(max_bad_share)
    return UserData(documents, queries, judgments, impressions, report)


def to_dataset(data: UserData, name: str, vertical: str = "") -> "Dataset":
    """The data as what training reads. Candidates of a training query: its judged documents, then those that it was shown.

    Args:
      vertical: "jobs" or "people"; needed where the data holds both, as a model serves one.

    Raises:
      InputError: the data holds both verticals and none is chosen, or it has no documents or queries of the one chosen.
    """
    from jaxsearch.data.datasets import Dataset, Pairs, reasoned_pairs  # `datasets` imports this module

    present = sorted({document.vertical for document in data.documents})
    if not vertical and len(present) > 1:
        raise InputError(f"{name} holds {' and '.join(present)}: choose one, such as {name}:{present[0]}")
    vertical = vertical or present[0]
    documents = [document for document in data.documents if document.vertical == vertical]
    queries = {
        split: [query for query in found if query.vertical == vertical]
        for split, found in data.queries.items()
    }
    if not documents or not any(queries.values()):
        raise InputError(f"{name} has no documents or no queries of vertical {vertical!r}: use {present[0]}")
    row = {document.id: i for i, document in enumerate(documents)}
    every = chain(*queries.values())
    judged: dict[str, dict[int, Judgment]] = {query.id: {} for query in every}
    for judgment in data.judgments:
        if judgment.query_id in judged:
            judged[judgment.query_id][row[judgment.document_id]] = judgment
    pages: dict[str, list[Impression]] = {}
    for shown in data.impressions:
        if shown.query_id in judged:
            pages.setdefault(shown.query_id, []).append(shown)

    def pairs(split: str, pages: Mapping[str, Sequence[Impression]]) -> list[Pairs]:
        found = (
            reasoned_pairs(i, judged[query.id], [row[shown.document_id] for shown in pages.get(query.id, ())])
            for i, query in enumerate(queries[split])
        )
        return [part for part in found if len(part.documents)]

    precedents = {split: pairs(split, {}) for split in ("calibration", "golden")}
    return Dataset(
        name,
        documents,
        queries,
        {query: {n: judgment.grade for n, judgment in known.items()} for query, known in judged.items()},
        pairs("train", pages),
        pages,
        precedent_pairs={split: found for split, found in precedents.items() if found},
    )


def split_of(query_id: str) -> str:
    """The split of a query that names none: 80% train, 6% dev, 14% test, decided by its id alone."""
    place = int.from_bytes(hashlib.sha256(query_id.encode()).digest()[:8]) % 100
    return "train" if place < 80 else "dev" if place < 86 else "test"


def find_files(folder: str | os.PathLike[str]) -> tuple[dict[str, list[Path]], Report]:
    """The files of a folder by kind, in order of their names, and a report that knows of those that cannot be used.

    `documents.jsonl`, `documents-00000.jsonl`, ... and all files of a subfolder `documents/` belong together; so do `.parquet` files.
    Links that lead out of the folder are refused.
    """
    root, report = Path(folder), Report()
    found: dict[str, list[Path]] = {kind: [] for kind in KINDS}
    if not root.is_dir():
        _unreadable(
            report, "", str(folder), "no such folder; give one that holds documents.jsonl and queries.jsonl"
        )
        return found, report
    for path in _listed(root, report):
        kind = kind_of(path)
        if kind:
            _take(kind, path, root, found[kind], report)
        elif path.name in KINDS and path.is_dir():
            if not path.resolve().is_relative_to(root.resolve()):
                _unreadable(
                    report, path.name, f"{path.name}/", "this link leads out of the folder; copy the files"
                )
                continue
            for part in _listed(path, report):
                if part.suffix in _SUFFIXES:
                    _take(path.name, part, root, found[path.name], report)
                else:
                    report.not_read.append(printable(str(part.relative_to(root))))
        else:
            report.not_read.append(printable(path.name))
    for kind in REQUIRED:
        if not found[kind] and kind not in report.broken:
            _unreadable(
                report, kind, kind, f"no such file; give {kind}.jsonl, {kind}.parquet or a folder {kind}/"
            )
    return found, report


def kind_of(path: Path) -> str:
    """What a file holds by its name: `documents.jsonl`, `documents-00001.parquet`; empty where the name does not tell."""
    match = re.fullmatch(rf"({'|'.join(KINDS)})(-.*)?\.(jsonl|parquet)", path.name, re.DOTALL)
    return match[1] if match else ""


def _listed(folder: Path, report: Report) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        _unreadable(report, "", str(folder), f"cannot be listed ({error.strerror})")
        return []


def _take(kind: str, path: Path, root: Path, files: list[Path], report: Report) -> None:
    name = str(path.relative_to(root))
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a circle of links, before Python 3.13
        _unreadable(report, kind, name, "this link leads nowhere")
        return
    if not real.is_relative_to(root.resolve()):
        _unreadable(report, kind, name, "this link leads out of the folder; copy the file")
    elif not real.is_file():
        _unreadable(report, kind, name, "no regular file; give a file of this name")
    else:
        files.append(path)


def _unreadable(report: Report, kind: str, file: str, reason: str) -> None:
    report.broken.add(kind)
    report.unreadable.append(Problem(printable(file), 0, BadRow("unreadable", reason)))


def read_files(
    files: Mapping[str, Sequence[Path]], report: Report, sink: Sink, root: Path | None = None
) -> Report:
    """Read files by kind and pass every good record on; memory holds ids and pairs, not texts.

    Args:
      files: kind -> files, such as `find_files` returns. References to a kind without files are not checked.
      report: is added to, and returned.
      root: the folder that the report's names of files are relative to.
    """
    importer = _Importer({kind for kind in KINDS if files.get(kind)}, report, sink)
    for kind in KINDS:
        for path in files.get(kind, ()):
            importer.read(kind, path, printable(str(path.relative_to(root) if root else path)))
        seen = report.accepted[kind] + report.rejected[kind]
        if kind in REQUIRED and files.get(kind) and not seen and kind not in report.broken:
            _unreadable(report, kind, kind, "no records in any file; give at least one")
    return report


class _Known(NamedTuple):
    """A document or query that was read: its number, its vertical, its place."""

    row: int
    vertical: str
    place: tuple[int, int]
    """Number of the file, line."""


class _Importer:
    """Checks records one by one against those before them."""

    def __init__(self, kinds: set[str], report: Report, sink: Sink) -> None:
        self._kinds, self._report, self._sink = kinds, report, sink
        self._files: list[str] = []
        self._known: dict[str, dict[str, _Known]] = {kind: {} for kind in REQUIRED}
        self._refused: dict[str, dict[str, tuple[int, int]]] = {kind: {} for kind in REQUIRED}
        self._judged: dict[tuple[str, str], tuple[int, tuple[int, int]]] = {}
        self._shown: dict[tuple[str, str, int], tuple[int, int]] = {}

    def read(self, kind: str, path: Path, name: str) -> None:
        """Read one file to its end; `name` is what the report calls it."""
        report = self._report
        self._files.append(name)
        before = report.accepted[kind], report.rejected[kind]
        try:
            for line, row in _rows(kind, path):
                place = (len(self._files) - 1, line)
                bad = row if isinstance(row, BadRow) else self._accept(kind, row, place)
                if bad is None:
                    report.accepted[kind] += 1
                else:
                    self._reject(kind, name, line, row, bad)
        except OSError as error:
            _unreadable(report, kind, name, f"cannot be read ({error.strerror})")
        except parquet.ParquetError as error:
            _unreadable(report, kind, name, str(error))
        after = report.accepted[kind], report.rejected[kind]
        report.files[name] = (after[0] - before[0], after[1] - before[1])

    def _reject(self, kind: str, name: str, line: int, row: object, bad: BadRow) -> None:
        report = self._report
        report.rejected[kind] += 1
        field = (
            re.sub(r"\[.*", "", bad.field, flags=re.DOTALL) if bad.code in _BY_FIELD else KINDS[kind].__name__
        )
        report.reasons[f"{bad.code}: {field}"] += 1
        if len(report.problems) < MAX_KEPT:
            report.problems.append(Problem(name, line, bad))
        record_id = row.get("id") if kind in REQUIRED and isinstance(row, dict) else None
        if (
            isinstance(record_id, str)
            and len(record_id) <= MAX_ID_LENGTH
            and len(self._refused[kind]) < MAX_KEPT
        ):
            self._refused[kind].setdefault(record_id, (len(self._files) - 1, line))

    def _accept(self, kind: str, row: Any, place: tuple[int, int]) -> BadRow | None:
        """Why a record is refused, or None once it was passed on."""
        split = ""
        if kind == "queries" and isinstance(row, Mapping) and "split" in row:
            row = dict(row)
            split = row.pop("split")
            if split not in SPLITS:
                reason = f"use one of {', '.join(SPLITS)}, or leave it out"
                return BadRow("bad value", reason, "Query.split", _show(split))
        try:
            record: Record = from_dict(KINDS[kind], row)  # type: ignore[type-var]
        except RecordError as error:
            return explain(error)
        except RecursionError:
            return BadRow("nested too deeply", "nested too deeply")
        if isinstance(record, (Document, Query)):
            bad = self._add(kind, record, place)
        else:
            bad = self._refer(record) or self._compare(record, place)
        if bad is None:
            self._sink(record, split or (split_of(record.id) if isinstance(record, Query) else ""))
        return bad

    def _add(self, kind: str, record: Document | Query, place: tuple[int, int]) -> BadRow | None:
        known = self._known[kind]
        if (first := known.get(record.id)) is not None:
            reason = f"this id is taken by {self._place(first.place)}; ids must be unique"
            return BadRow("duplicate id", reason, f"{type(record).__name__}.id", _show(record.id))
        known[record.id] = _Known(len(known), record.vertical, place)
        return None

    def _refer(self, record: Judgment | Impression) -> BadRow | None:
        """Check that query and document are there, and of one vertical."""
        name, verticals = type(record).__name__, {}
        for kind, key, value in (("queries", "query_id", record.query_id), ("documents", "document_id", record.document_id)):  # fmt: skip
            if kind not in self._kinds:
                continue
            found = self._known[kind].get(value)
            if found is None and kind in self._report.broken:
                continue
            if found is None:
                refused = self._refused[kind].get(value)
                reason = f"refused at {self._place(refused)}" if refused else f"no such id in {kind}"
                code = "reference to a refused record" if refused else "dangling reference"
                return BadRow(code, reason, f"{name}.{key}", _show(value))
            verticals[f"its {KINDS[kind].__name__.lower()}"] = found.vertical
        if isinstance(record, Impression):
            verticals["it"] = record.vertical
        if len(set(verticals.values())) > 1:
            reason = ", ".join(f"{who} is of {vertical}" for who, vertical in verticals.items())
            value = _show(f"{record.query_id}, {record.document_id}")
            return BadRow("verticals differ", f"{reason}; use one vertical", f"{name}.query_id and document_id", value)  # fmt: skip
        return None

    def _compare(self, record: Judgment | Impression, place: tuple[int, int]) -> BadRow | None:
        """Check a judgment against those of the same pair, an impression against those of the same page."""
        if isinstance(record, Judgment):
            grade, first = self._judged.setdefault(
                (record.query_id, record.document_id), (record.grade, place)
            )
            if first != place and grade != record.grade:
                reason = f"{self._place(first)} gives this pair grade {grade}; keep one"
                return BadRow("judged twice", reason, "Judgment.grade", str(record.grade))
            self._report.repeated_judgments += first != place
            return None
        key = (record.query_id, record.shown_at, record.position)
        if (first := self._shown.setdefault(key, place)) != place:
            reason = f"{self._place(first)} has this position on the same page; `shown_at` tells pages of one query apart"
            return BadRow("position taken", reason, "Impression.position", str(record.position))
        return None

    def _place(self, place: tuple[int, int]) -> str:
        return f"{self._files[place[0]]}:{place[1]}"


_BY_FIELD = (
    "bad value",
    "missing field",
    "duplicate id",
    "dangling reference",
    "reference to a refused record",
)


def _show(value: object) -> str:
    return printable(repr(value), 120)


def explain(error: RecordError) -> BadRow:
    """A record's refusal ("Kind.field is value: fix") in its parts."""
    told, _, fix = str(error).rpartition(": ")
    name, _, value = told.partition(" is ")
    code = {"this field is required": "missing field"}.get(fix, "bad value")
    if fix.startswith("unknown field"):
        code = "unknown field"
    if "." not in name:
        return BadRow("no record", fix, value=printable(value))
    return BadRow(code, fix, printable(name), "" if code == "missing field" else printable(value))


def _rows(kind: str, path: Path) -> Iterator[tuple[int, Any]]:
    if path.suffix == ".parquet":
        return parquet.read_rows(path, columns(kind))
    return jsonl.read_rows(path)


_LEAVES = {str: "text", int: "whole number", float: "number", bool | None: "true or false"}


def columns(kind: str) -> dict[str, parquet.Column]:
    """What the fields of a kind may be in Parquet."""
    record = KINDS[kind]
    hints = typing.get_type_hints(record)
    found = {}
    for spec in fields(record):
        hint, mapping = hints[spec.name], typing.get_origin(hints[spec.name]) is Mapping
        leaf = typing.get_args(hint)[1] if mapping else hint
        required = spec.default is MISSING and spec.default_factory is MISSING
        # A vertical is one of a few texts, hence `get`.
        found[spec.name] = parquet.Column(
            _LEAVES.get(leaf, "text"), mapping, required, time=spec.name == "shown_at"
        )
    if kind == "queries":
        found["split"] = parquet.Column("text")
    return found
