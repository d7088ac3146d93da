"""The records: what is valid, what is refused and how the refusal reads."""

import json
import math
from typing import Any

import pytest

from jaxsearch.data.records import (
    ACTIONS,
    MAX_FIELD_CHARACTERS,
    MAX_ID_LENGTH,
    MAX_QUERY_CHARACTERS,
    Document,
    Impression,
    Judgment,
    Query,
    RecordError,
    from_dict,
    to_dict,
    unique_ids,
)
from jaxsearch.errors import InputError

QUERY = {"id": "q", "text": "nurse"}
DOCUMENT = {"id": "d", "fields": {"title": "Nurse"}}
JUDGMENT = {"query_id": "q", "document_id": "d", "grade": 3}
IMPRESSION = {"query_id": "q", "document_id": "d", "position": 1, "actions": {"click": True}}
HALF = "\ud83d"
"""JSON may spell one half of an emoji."""


@pytest.mark.parametrize(
    "record",
    [
        Query("q", "nurse", "people", {"headline": "RN"}, {"city": "Austin"}),
        Document(
            "d", {"title": "Nurse", "about": ""}, "people", {"city": "Austin"}, {"salary": 7, "ctr": 0.25}
        ),
        Judgment("q", "d", 4, "The job asked for."),
        Impression("q", "d", 3, {"click": True, "bad_fit": None}, "2026-06-01T12:00:00Z"),
        Impression("q", "d", 1, {"connect": False}, vertical="people"),
    ],
)
def test_records_survive_json(record: Any) -> None:
    record.validate()
    assert from_dict(type(record), json.loads(json.dumps(to_dict(record)))) == record


def test_defaults() -> None:
    query = from_dict(Query, QUERY)
    assert (query.vertical, query.searcher, query.filters) == ("jobs", {}, {})
    assert from_dict(Judgment, JUDGMENT).rationale == ""
    assert issubclass(RecordError, InputError)
    assert ACTIONS["jobs"][0] == "click"


@pytest.mark.parametrize(
    ("kind", "base", "change", "words"),
    [
        (Query, QUERY, {"id": ""}, ["Query.id is ''", "non-empty"]),
        (Query, QUERY, {"id": " \n"}, ["Query.id"]),
        (Query, QUERY, {"id": 7}, ["Query.id is 7"]),
        (Query, QUERY, {"id": "x" * (MAX_ID_LENGTH + 1)}, ["256 characters (this has 257)"]),
        (Query, QUERY, {"id": HALF}, [r"Query.id is '\ud83d'", "half a character"]),
        (Query, QUERY, {"text": "\t "}, ["Query.text", "empty query"]),
        (Query, QUERY, {"text": None}, ["Query.text is None"]),
        (Query, QUERY, {"text": "x" * (MAX_QUERY_CHARACTERS + 1)}, ["at most 2,000"]),
        (Query, QUERY, {"text": f"nurse {HALF} in"}, [r"Query.text is '\ud83d'"]),
        (Query, QUERY, {"vertical": "cars"}, ["Query.vertical is 'cars'", "jobs, people"]),
        (Query, QUERY, {"vertical": ["jobs"]}, ["Query.vertical"]),
        (Query, QUERY, {"searcher": "RN"}, ["Query.searcher is 'RN'", "mapping"]),
        (Query, QUERY, {"searcher": {"headline": 3}}, ["Query.searcher['headline'] is 3", "string"]),
        (Query, QUERY, {"filters": {"": "x"}}, ["Query.filters is ''", "non-empty"]),
        (Query, QUERY, {"filters": {HALF: "x"}}, ["Query.filters", "half"]),
        (Query, QUERY, {"wanted": 1}, ["Query.wanted is 1", "unknown field", "id, text, vertical"]),
        (Document, DOCUMENT, {"fields": {}}, ["Document.fields is {}", "at least one field"]),
        (Document, DOCUMENT, {"fields": {"title": "  "}}, ["at least one field with text"]),
        (Document, DOCUMENT, {"fields": {"title": None}}, ["Document.fields['title'] is None"]),
        (Document, DOCUMENT, {"fields": {"t": "x" * (MAX_FIELD_CHARACTERS + 1)}}, ["200,000", "200,001"]),
        (Document, DOCUMENT, {"fields": {"t": HALF}}, ["Document.fields['t']", "half"]),
        (Document, DOCUMENT, {"attributes": {"city": 3}}, ["Document.attributes['city'] is 3"]),
        (Document, DOCUMENT, {"numeric": [1]}, ["Document.numeric", "mapping"]),
        (Document, DOCUMENT, {"numeric": {"pay": "7"}}, ["Document.numeric['pay'] is '7'", "finite"]),
        (Document, DOCUMENT, {"numeric": {"pay": True}}, ["numeric['pay'] is True"]),
        (Document, DOCUMENT, {"numeric": {"pay": math.nan}}, ["numeric['pay'] is nan"]),
        (Document, DOCUMENT, {"numeric": {"pay": -math.inf}}, ["numeric['pay'] is -inf"]),
        (Document, DOCUMENT, {"numeric": {"pay": 10**400}}, ["numeric['pay']", "finite"]),
        (Document, DOCUMENT, {"numeric": {"": 1}}, ["Document.numeric is ''"]),
        (Judgment, JUDGMENT, {"grade": 5}, ["Judgment.grade is 5", "0 to 4"]),
        (Judgment, JUDGMENT, {"grade": -1}, ["Judgment.grade is -1"]),
        (Judgment, JUDGMENT, {"grade": 2.0}, ["Judgment.grade is 2.0"]),
        (Judgment, JUDGMENT, {"grade": True}, ["Judgment.grade is True"]),
        (Judgment, JUDGMENT, {"rationale": None}, ["Judgment.rationale is None"]),
        (Judgment, JUDGMENT, {"document_id": []}, ["Judgment.document_id is []"]),
        (Impression, IMPRESSION, {"position": 0}, ["Impression.position is 0", "from 1"]),
        (Impression, IMPRESSION, {"position": 1.5}, ["Impression.position is 1.5"]),
        (Impression, IMPRESSION, {"actions": {"connect": True}}, ["is 'connect'", "actions of jobs are click"]),
        (Impression, IMPRESSION, {"actions": {"click": 1}}, ["actions['click'] is 1", "true, false, or null"]),
        (Impression, IMPRESSION, {"actions": ["click"]}, ["Impression.actions"]),
        (Impression, IMPRESSION, {"shown_at": 5}, ["Impression.shown_at is 5", "ISO 8601"]),
        (Impression, IMPRESSION, {"shown_at": "yesterday"}, ["shown_at is 'yesterday'"]),
    ],
)  # fmt: skip
def test_refused_by_name_value_and_fix(kind: Any, base: dict, change: dict, words: list[str]) -> None:
    from_dict(kind, base)
    with pytest.raises(RecordError) as caught:
        from_dict(kind, base | change)
    message = str(caught.value)
    assert all(word in message for word in words), message
    message.encode()  # can be printed


@pytest.mark.parametrize("name", ["id", "text"])
def test_missing_fields(name: str) -> None:
    with pytest.raises(RecordError, match=rf"Query\.{name} is None: this field is required"):
        from_dict(Query, {key: value for key, value in QUERY.items() if key != name})


@pytest.mark.parametrize("values", [None, 3, "q", ["id"]])
def test_only_objects_are_records(values: Any) -> None:
    with pytest.raises(RecordError, match="give a JSON object"):
        from_dict(Query, values)


def test_messages_stay_short() -> None:
    for change in ({"x" * 100_000: 1}, {"searcher": {"x" * 100_000: 1}}, {"text": ["x" * 100_000]}):
        with pytest.raises(RecordError) as caught:
            from_dict(Query, QUERY | change)
        assert len(str(caught.value)) < 500


def test_limits_are_inclusive() -> None:
    Query("x" * MAX_ID_LENGTH, "x" * MAX_QUERY_CHARACTERS).validate()
    Document("d", {"t": "x" * MAX_FIELD_CHARACTERS}, numeric={"pay": 1.7e308, "low": -5}).validate()


def test_ids_are_unique() -> None:
    unique_ids([Query("a", "x"), Query("b", "x")])
    with pytest.raises(RecordError, match=r"Query\.id is 'a': ids must be unique"):
        unique_ids([Query("a", "x"), Query("b", "x"), Query("a", "y")])
