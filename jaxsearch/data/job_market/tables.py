"""`job_market` in memory: builds the tables where they are missing, reads them through TFDS, checks every record."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxsearch.data.builder import download_config
from jaxsearch.data.job_market.job_market_dataset_builder import (
    DOCUMENT_SPLIT,
    NOT_ELIGIBLE,
    SCHEMAS,
    SHOWN,
    TABLES,
    VERSIONS,
    Builder,
    vertical_of,
)
from jaxsearch.data.job_market.searches import SPLITS
from jaxsearch.data.records import ACTIONS, Document, Impression, Judgment, Query, Vertical, unique_ids


@dataclass(frozen=True)
class Tables:
    """The whole data set as plain records."""

    documents: list[Document]
    """By id."""
    queries: Mapping[str, list[Query]]
    """By split (train, dev, test, calibration, golden), each by id."""
    judgments: Mapping[str, list[Judgment]]
    """Query id -> graded documents: all above grade 0 for dev and test queries, a sample for the others."""
    impressions: Mapping[str, list[Impression]]
    """Query id -> one page of results, for queries of train, dev and test."""


def prepare(
    variant: str, data_dir: str | Path | None = None, beam: Sequence[str] | None = None
) -> dict[str, Builder]:
    """Builders by table, after building in `data_dir` (default: TFDS's own) what is missing.

    Args:
      beam: pipeline options of Apache Beam, whose workers then make the rows; None to make them here.

    Raises:
      ValueError: no such variant.
      InputError: Apache Beam is asked for and not installed.
    """
    if variant not in VERSIONS:
        raise ValueError(f"job_market variant is {variant!r}: use one of {', '.join(VERSIONS)}")
    config = f"{variant}_{VERSIONS[variant]}"
    builders = {
        table: Builder(config=f"{config}_{table}", data_dir=data_dir, file_format="array_record")
        for table in TABLES
    }
    for builder in builders.values():
        if not builder.is_prepared():
            builder.download_and_prepare(download_config=download_config(beam))
    return builders


def load_tables(variant: str, data_dir: str | Path | None = None) -> Tables:
    """Reads `job_market` from `data_dir` (default: TFDS's own), after building there what is missing.

    Raises:
      ValueError: no such variant.
    """
    vertical = vertical_of(variant)
    read = {table: builder.as_data_source() for table, builder in prepare(variant, data_dir).items()}
    documents = sorted(
        (_document(row, vertical) for row in read["documents"][DOCUMENT_SPLIT]), key=lambda item: item.id
    )
    queries = {
        split: sorted((_query(row, vertical) for row in read["queries"][split]), key=lambda item: item.id)
        for split in SPLITS
    }
    judgments = {
        row["query_id"].decode(): _judgments(row) for split in SPLITS for row in read["judgments"][split]
    }
    pages = {
        row["query_id"].decode(): _page(row, vertical)
        for split in SHOWN
        for row in read["impressions"][split]
    }
    every_query = [query for split in SPLITS for query in queries[split]]
    records: tuple[Document | Query, ...] = (*documents, *every_query)
    for record in records:
        record.validate()
    unique_ids(documents)
    unique_ids(every_query)
    return Tables(documents, queries, judgments, pages)


def _texts(row: Mapping[str, Any], names: tuple[str, ...], prefix: str = "") -> dict[str, str]:
    return {name: text for name in names if (text := row[prefix + name].decode())}


def _document(row: Mapping[str, Any], vertical: Vertical) -> Document:
    schema = SCHEMAS[vertical]
    return Document(
        row["id"].decode(),
        _texts(row, schema.fields),
        vertical,
        attributes=_texts(row, schema.attributes, "attribute_"),
        numeric={name: round(float(row[name]), 4) for name in schema.numeric},
    )


def _query(row: Mapping[str, Any], vertical: Vertical) -> Query:
    return Query(
        row["id"].decode(),
        row["text"].decode(),
        vertical,
        searcher=_texts(row, SCHEMAS[vertical].searcher, "searcher_"),
        bucket=row["bucket"].decode(),
    )


def _judgments(row: Mapping[str, Any]) -> list[Judgment]:
    query_id = row["query_id"].decode()
    return [
        Judgment(query_id, document.decode(), int(grade), reason.decode())
        for document, grade, reason in zip(row["document_ids"], row["grades"], row["rationales"], strict=True)
    ]


def _page(row: Mapping[str, Any], vertical: Vertical) -> list[Impression]:
    query_id, shown_at = row["query_id"].decode(), row["shown_at"].decode()
    stored = {name: row[name] for name in ACTIONS[vertical]}
    return [
        Impression(
            query_id,
            document.decode(),
            int(position),
            {name: None if values[i] == NOT_ELIGIBLE else bool(values[i]) for name, values in stored.items()},
            shown_at,
            vertical,
        )
        for i, (document, position) in enumerate(zip(row["document_ids"], row["positions"], strict=True))
    ]
