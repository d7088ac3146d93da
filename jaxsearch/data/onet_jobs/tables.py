"""`onet_jobs` in memory: builds the tables that are missing, reads them through TFDS, checks every record."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxsearch.data.builder import download_config
from jaxsearch.data.onet_jobs.onet_jobs_dataset_builder import DOCUMENT_SPLIT, TABLES, Builder
from jaxsearch.data.onet_jobs.release import ReleaseError, file_hashes
from jaxsearch.data.onet_jobs.selection import SPLITS
from jaxsearch.data.records import Document, Query, unique_ids


@dataclass(frozen=True)
class Tables:
    """The whole data set as plain records."""

    documents: list[Document]
    """By id. A rerank list names documents by their place in this list."""
    queries: Mapping[str, list[Query]]
    """By split (`train`, `dev`, `test_seen`, `dev_unseen`, `test_unseen`), each by id."""
    grades: Mapping[str, Mapping[str, int]]
    """Query id -> document id -> grade 1 to 4. Anything not listed is grade 0. Training queries list no
    held-out document.
    """
    held_out: frozenset[str]
    """Documents that must never occur in training: as a target, as a negative, or as the target of a
    relation.
    """
    metadata: Mapping[str, Any]
    """Hashes of the release files, query counts by split, and titles left out by reason."""

    @cached_property
    def training_documents(self) -> list[Document]:
        """All that training may see: the documents that are not held out."""
        return [document for document in self.documents if document.id not in self.held_out]

    def occupation(self, query_id: str) -> str:
        """The document that the query's title belongs to (its only grade 4): the group of an occupation-macro
        average.
        """
        return next(document for document, grade in self.grades[query_id].items() if grade == 4)


def prepare(
    data_dir: str | Path | None = None,
    manual_dir: str | Path | None = None,
    beam: Sequence[str] | None = None,
) -> dict[str, Builder]:
    """Builders by table, after building in `data_dir` what is missing.

    Args:
      data_dir: TFDS's folder of prepared data (its default: `~/tensorflow_datasets`).
      manual_dir: folder of the release's text files (default: the environment variable ONET_DIR). Not needed
        once the tables are built; where it is given, the tables must have been built from these very files.
      beam: pipeline options of Apache Beam, whose workers then make the rows; None to make them here.

    Raises:
      ReleaseError: the release files are missing or bad, or the tables in `data_dir` come from other files.
      InputError: Apache Beam is asked for and not installed.
    """
    source = manual_dir or os.environ.get("ONET_DIR")
    builders = {
        table: Builder(config=table, data_dir=data_dir, file_format="array_record") for table in TABLES
    }
    for builder in builders.values():
        if not builder.is_prepared():
            _build(builder, source, beam)
    _same_source(builders, source)
    return builders


def load_tables(data_dir: str | Path | None = None, manual_dir: str | Path | None = None) -> Tables:
    """Reads `onet_jobs` from `data_dir`, after building there what is missing (arguments as `prepare`).

    Raises:
      ReleaseError: the release files are missing or bad, or the tables in `data_dir` come from other files.
    """
    builders = prepare(data_dir, manual_dir)
    read = {table: builder.as_data_source() for table, builder in builders.items()}
    rows = list(read["documents"][DOCUMENT_SPLIT])
    documents = sorted((_document(row) for row in rows), key=lambda document: document.id)
    queries = {
        split: sorted(map(_query, read["queries"][split]), key=lambda query: query.id) for split in SPLITS
    }
    every_query = [query for split in SPLITS for query in queries[split]]
    records: list[Document | Query] = [*documents, *every_query]
    for record in records:
        record.validate()
    unique_ids(records)
    grades = {
        row["query_id"].decode(): {
            document.decode(): int(grade)
            for document, grade in zip(row["document_ids"], row["grades"], strict=True)
        }
        for split in SPLITS
        for row in read["judgments"][split]
    }
    held_out = frozenset(row["id"].decode() for row in rows if row["held_out"])
    return Tables(documents, queries, grades, held_out, dict(builders["documents"].info.metadata))


def _build(builder: Builder, source: str | Path | None, beam: Sequence[str] | None) -> None:
    if source is None:
        raise ReleaseError(
            f"{builder.data_dir} is not built yet and no release is named. "
            f"{builder.MANUAL_DOWNLOAD_INSTRUCTIONS}"
        )
    file_hashes(source)  # names what is missing before TFDS starts to write
    config = download_config(beam, manual_dir=source, try_download_gcs=False)
    builder.download_and_prepare(download_config=config)


def _same_source(builders: Mapping[str, Builder], source: str | Path | None) -> None:
    """Refuses tables that were built from different files than each other or than `source`."""
    wanted = file_hashes(source) if source is not None else dict(builders["documents"].info.metadata["files"])
    for table, builder in builders.items():
        built = builder.info.metadata["files"]
        differing = [name for name in wanted if built.get(name) != wanted[name]]
        if differing:
            raise ReleaseError(
                f"{builder.data_dir} ({table}) was built from another {', '.join(differing)} than "
                f"{source or 'the documents beside it'}: "
                "give another data_dir, or delete that folder to build anew"
            )


def _document(row: Mapping[str, Any]) -> Document:
    fields = {
        "title": row["title"].decode(),
        "description": row["description"].decode(),
        "tasks": " ".join(task.decode() for task in row["tasks"]),
        "technologies": ", ".join(name.decode() for name in row["technologies"]),
    }
    zone = int(row["job_zone"])
    return Document(
        row["id"].decode(),
        {name: text for name, text in fields.items() if text},
        attributes={"major_group": row["major_group"].decode()},
        numeric={"job_zone": float(zone)} if zone else {},
    )


def _query(row: Mapping[str, Any]) -> Query:
    return Query(row["id"].decode(), row["text"].decode())
