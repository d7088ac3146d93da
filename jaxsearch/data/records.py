"""The four records that everything else is made of, and what makes one valid.

`Query`, `Document`, `Judgment` and `Impression` are the same whether they come from a TFDS builder or from a user's own files. A record
is plain data; `validate()` raises `RecordError`, which names the field, the value and the fix.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, TypeVar

from jaxsearch.errors import InputError

Vertical = Literal["jobs", "people"]
VERTICALS: tuple[Vertical, ...] = ("jobs", "people")
ACTIONS: dict[str, tuple[str, ...]] = {
    "jobs": ("click", "apply", "dismiss", "bad_fit", "shortlist"),
    "people": ("long_dwell", "connect", "follow", "message"),
}
"""Engagement tasks per vertical (paper section 4)."""
BUCKETS = ("title", "title_company", "title_skill", "title_location", "name", "need")
"""Kinds of searches that figures are told apart by: an exact title, a title with company, skill or place, a person's name, and a need told
in a sentence. Users may name others."""
GRADES = (0, 1, 2, 3, 4)
MAX_ID_LENGTH = 256
MAX_QUERY_CHARACTERS = 2_000
MAX_FIELD_CHARACTERS = 200_000


class RecordError(InputError):
    """A record breaks its schema; the message names record, field, value and fix."""


def _fail(record: str, name: str, value: object, fix: str) -> None:
    raise RecordError(f"{record}.{_short(name)} is {_short(repr(value))}: {fix}")


def _short(text: str) -> str:
    return text if len(text) <= 120 else text[:120] + "..."


def _check_characters(record: str, name: str, text: str) -> None:
    """JSON can spell half a character (a lone surrogate), which no tokenizer takes and no file holds."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        _fail(record, name, text[error.start : error.end], "this is half a character; remove it")


def _check_id(record: str, name: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        _fail(record, name, value, "give a non-empty string")
    elif len(value) > MAX_ID_LENGTH:
        _fail(record, name, value, f"use at most {MAX_ID_LENGTH} characters (this has {len(value)})")
    else:
        _check_characters(record, name, value)


def _check_vertical(record: str, value: object) -> None:
    if value not in VERTICALS:
        _fail(record, "vertical", value, f"use one of {', '.join(VERTICALS)}")


def _check_texts(record: str, name: str, value: object, limit: int = MAX_FIELD_CHARACTERS) -> None:
    if not isinstance(value, Mapping):
        _fail(record, name, value, "give a mapping from field name to text")
        return
    for key, text in value.items():
        if not isinstance(key, str) or not key:
            _fail(record, name, key, "field names are non-empty strings")
        _check_characters(record, name, key)
        if not isinstance(text, str):
            _fail(record, f"{name}[{key!r}]", text, "give a string")
        elif len(text) > limit:
            _fail(
                record, f"{name}[{key!r}]", text, f"use at most {limit:,} characters (this has {len(text):,})"
            )
        else:
            _check_characters(record, f"{name}[{key!r}]", text)


@dataclass(frozen=True)
class Query:
    """A search: what was typed, by whom, and the filters that were set beside the text."""

    id: str
    text: str
    vertical: Vertical = "jobs"
    searcher: Mapping[str, str] = field(default_factory=dict)
    """Named text fields of the searcher (headline, location, ...)."""
    filters: Mapping[str, str] = field(default_factory=dict)
    """Attribute name -> required value, applied to `Document.attributes`."""
    bucket: str = ""
    """The kind of search, such as one of `BUCKETS`; empty: not known. Never shown to a model."""

    def validate(self) -> None:
        """Raise `RecordError` unless every field is usable."""
        _check_id("Query", "id", self.id)
        if not isinstance(self.text, str) or not self.text.strip():
            _fail("Query", "text", self.text, "an empty query cannot be ranked; give at least one word")
        if len(self.text) > MAX_QUERY_CHARACTERS:
            _fail("Query", "text", self.text, f"use at most {MAX_QUERY_CHARACTERS:,} characters")
        _check_characters("Query", "text", self.text)
        _check_vertical("Query", self.vertical)
        _check_texts("Query", "searcher", self.searcher)
        _check_texts("Query", "filters", self.filters)
        if not isinstance(self.bucket, str) or len(self.bucket) > MAX_ID_LENGTH:
            _fail("Query", "bucket", self.bucket, f"give a string of at most {MAX_ID_LENGTH} characters")
        _check_characters("Query", "bucket", self.bucket)


@dataclass(frozen=True)
class Document:
    """A posting or a profile: named text fields, attributes one can filter on, numbers."""

    id: str
    fields: Mapping[str, str]
    """Named text fields in reading order."""
    vertical: Vertical = "jobs"
    attributes: Mapping[str, str] = field(default_factory=dict)
    numeric: Mapping[str, float] = field(default_factory=dict)

    def validate(self) -> None:
        """Raise `RecordError` unless every field is usable."""
        _check_id("Document", "id", self.id)
        _check_vertical("Document", self.vertical)
        _check_texts("Document", "fields", self.fields)
        if not any(text.strip() for text in self.fields.values()):
            _fail("Document", "fields", dict(self.fields), "give at least one field with text")
        _check_texts("Document", "attributes", self.attributes)
        if not isinstance(self.numeric, Mapping):
            _fail("Document", "numeric", self.numeric, "give a mapping from name to number")
        for key, value in self.numeric.items():
            if not isinstance(key, str) or not key:
                _fail("Document", "numeric", key, "names are non-empty strings")
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if (
                not number or not abs(value) <= sys.float_info.max
            ):  # neither NaN nor infinite nor a huge integer
                _fail("Document", f"numeric[{key!r}]", value, "give a finite number")


@dataclass(frozen=True)
class Judgment:
    """A grade for one (query, document) pair, with the reason where one was given."""

    query_id: str
    document_id: str
    grade: int
    rationale: str = ""

    def validate(self) -> None:
        """Raise `RecordError` unless every field is usable."""
        _check_id("Judgment", "query_id", self.query_id)
        _check_id("Judgment", "document_id", self.document_id)
        if isinstance(self.grade, bool) or not isinstance(self.grade, int) or self.grade not in GRADES:
            _fail("Judgment", "grade", self.grade, "grades are the whole numbers 0 to 4")
        if not isinstance(self.rationale, str):
            _fail("Judgment", "rationale", self.rationale, "give a string (empty when there is none)")
        _check_characters("Judgment", "rationale", self.rationale)


@dataclass(frozen=True)
class Impression:
    """One document shown at one position of one search, and what the searcher did with it."""

    query_id: str
    document_id: str
    position: int
    """1 is the top of the page."""
    actions: Mapping[str, bool | None]
    """Action name -> done, not done, or None where the action was not possible (not eligible)."""
    shown_at: str = ""
    """ISO 8601 time, UTC."""
    vertical: Vertical = "jobs"

    def validate(self) -> None:
        """Raise `RecordError` unless every field is usable."""
        _check_id("Impression", "query_id", self.query_id)
        _check_id("Impression", "document_id", self.document_id)
        _check_vertical("Impression", self.vertical)
        if isinstance(self.position, bool) or not isinstance(self.position, int) or self.position < 1:
            _fail("Impression", "position", self.position, "positions are whole numbers from 1 (the top)")
        if not isinstance(self.actions, Mapping):
            _fail(
                "Impression",
                "actions",
                self.actions,
                "give a mapping from action name to true, false or null",
            )
        known = ACTIONS[self.vertical]
        for key, value in self.actions.items():
            if key not in known:
                _fail("Impression", "actions", key, f"actions of {self.vertical} are {', '.join(known)}")
            if value is not None and not isinstance(value, bool):
                _fail("Impression", f"actions[{key!r}]", value, "use true, false, or null for not eligible")
        if not isinstance(self.shown_at, str) or (self.shown_at and not _is_time(self.shown_at)):
            _fail(
                "Impression", "shown_at", self.shown_at, "give an ISO 8601 time such as 2026-06-01T12:00:00Z"
            )


def _is_time(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


Record = Query | Document | Judgment | Impression
R = TypeVar("R", Query, Document, Judgment, Impression)


def to_dict(record: Record) -> dict[str, Any]:
    """The record as plain JSON values."""
    return {
        f.name: dict(value) if isinstance(value := getattr(record, f.name), Mapping) else value
        for f in dataclasses.fields(record)
    }


def from_dict(kind: type[R], values: Mapping[str, Any]) -> R:
    """A validated record of `kind` from plain JSON values.

    Raises:
      RecordError: a field is unknown, missing, or has a bad value.
    """
    if not isinstance(values, Mapping):
        raise RecordError(f"{kind.__name__} is {str(values)[:80]!r}: give a JSON object")
    known = {f.name: f for f in dataclasses.fields(kind)}
    for name in values:
        if name not in known:
            _fail(kind.__name__, str(name), values[name], f"unknown field; known are {', '.join(known)}")
    for name, spec in known.items():
        no_default = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if no_default and name not in values:
            _fail(kind.__name__, name, None, "this field is required")
    record = kind(**values)
    record.validate()
    return record


def content_hash(document: Document) -> bytes:
    """16 bytes that change whenever the document's text does (its numbers and attributes are no part of an embedding or a summary)."""
    text = json.dumps(list(document.fields.items()), ensure_ascii=False)
    return hashlib.sha256(text.encode()).digest()[:16]


def unique_ids(records: Sequence[Query | Document]) -> None:
    """Raise `RecordError` where two records share an id."""
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            _fail(type(record).__name__, "id", record.id, "ids must be unique; this one occurs twice")
        seen.add(record.id)
