"""Data sets by name, in memory: documents, queries by split, graded pairs, impressions, fixed rerank lists.

`load_dataset("job_market:tiny")` generates what is missing; `load_dataset("onet_jobs")` reads an O*NET release (`ONET_DIR`).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from jaxsearch.data import job_market, onet_jobs
from jaxsearch.data.job_market.generator import VARIANTS, VERSION
from jaxsearch.data.records import ACTIONS, Document, Impression, Query, to_dict
from jaxsearch.errors import InputError

PAIRS_PER_QUERY = 16
"""Candidates that a training query is given where the data set brings none."""


@dataclass(frozen=True)
class Pairs:
    """One training query with its candidates: what judge and teachers label and students learn on."""

    query: int
    """Row of the query in `Dataset.queries[split]`."""
    documents: np.ndarray
    """int32 [L], rows of `Dataset.documents`."""
    grades: np.ndarray
    """int32 [L], 0 to 4; -1 where nobody graded the pair."""


@dataclass(frozen=True)
class Dataset:
    """A data set in memory. Documents and queries are spoken of by their row."""

    name: str
    documents: Sequence[Document]
    queries: Mapping[str, Sequence[Query]]
    """By split: "train", "dev", and one or more test splits."""
    graded: Mapping[str, Mapping[int, int]]
    """Query id -> document row -> grade. For dev and test anything not listed is grade 0."""
    pairs: Sequence[Pairs]
    """Training queries with candidates."""
    impressions: Mapping[str, Sequence[Impression]] = field(default_factory=dict)
    """Query id -> one page of results; empty where the data set has none."""
    held_out: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """Rows of documents that training must not see."""
    rerank: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Query id -> fixed candidates (rows); empty where lists are made by the run itself."""

    @property
    def test_splits(self) -> list[str]:
        """The splits that results are shown on."""
        return [split for split in self.queries if split.startswith("test")]

    @property
    def actions(self) -> tuple[str, ...]:
        """Actions that the impressions tell of; none without impressions."""
        return ACTIONS[self.documents[0].vertical] if self.impressions else ()

    @cached_property
    def document_row(self) -> dict[str, int]:
        """Document id -> row."""
        return {document.id: row for row, document in enumerate(self.documents)}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the texts and training pairs; a store of teacher scores belongs to one fingerprint."""
        digest = hashlib.sha256(self.name.encode())
        records: tuple[Document | Query, ...] = (*self.documents, *self.queries["train"])
        for record in records:
            digest.update(json.dumps(to_dict(record), sort_keys=True).encode())
        for pairs in self.pairs:
            digest.update(np.int32(pairs.query).tobytes() + pairs.documents.tobytes())
        return digest.hexdigest()

    def grades(self, query: Query, rows: np.ndarray) -> np.ndarray:
        """int32 [L]: the grades of documents (rows, -1 for none) for a dev or test query."""
        known = self.graded[query.id]
        return np.array([known.get(int(row), 0) for row in rows], np.int32)


def load_dataset(name: str, data_dir: str | Path | None = None) -> Dataset:
    """A data set by name: `job_market:tiny`, `job_market:default`, `job_market:long`, or `onet_jobs`.

    Args:
      data_dir: TFDS's folder of prepared data (its default: `~/tensorflow_datasets`).

    Raises:
      InputError: no such data set or variant.
    """
    family, _, variant = name.partition(":")
    if family == "job_market" and (variant or "default") in VARIANTS:
        return _job_market(variant or "default", data_dir)
    if family == "onet_jobs" and not variant:
        return _onet_jobs(data_dir)
    known = ", ".join([*(f"job_market:{variant}" for variant in VARIANTS), "onet_jobs"])
    raise InputError(f"data set is {name!r}: use one of {known}")


def _job_market(variant: str, data_dir: str | Path | None) -> Dataset:
    tables = job_market.load_tables(variant, data_dir)
    row = {document.id: i for i, document in enumerate(tables.documents)}
    graded = {
        query_id: {row[judgment.document_id]: judgment.grade for judgment in judgments}
        for query_id, judgments in tables.judgments.items()
    }
    pairs = [
        _known_pairs(i, graded[query.id], [row[shown.document_id] for shown in tables.impressions[query.id]])
        for i, query in enumerate(tables.queries["train"])
    ]
    return Dataset(
        f"job_market:{variant}_{VERSION}", tables.documents, tables.queries, graded, pairs, tables.impressions
    )


def _known_pairs(query: int, graded: Mapping[int, int], shown: Sequence[int]) -> Pairs:
    """The graded documents, then those that were shown without being graded."""
    documents = list(dict.fromkeys([*graded, *shown]))
    return Pairs(
        query, np.array(documents, np.int32), np.array([graded.get(row, -1) for row in documents], np.int32)
    )


def _onet_jobs(data_dir: str | Path | None) -> Dataset:
    tables = onet_jobs.load_tables(data_dir)
    row = {document.id: i for i, document in enumerate(tables.documents)}
    graded = {
        query_id: {row[document]: grade for document, grade in known.items()}
        for query_id, known in tables.grades.items()
    }
    held_out = np.array(sorted(row[document] for document in tables.held_out), np.int32)
    allowed = np.setdiff1d(np.arange(len(tables.documents), dtype=np.int32), held_out)
    pairs = [
        _draw_pairs(i, query, graded[query.id], allowed) for i, query in enumerate(tables.queries["train"])
    ]
    return Dataset(
        "onet_jobs",
        tables.documents,
        tables.queries,
        graded,
        pairs,
        held_out=held_out,
        rerank=onet_jobs.load_rerank_lists(tables),
    )


def _draw_pairs(row: int, query: Query, known: Mapping[int, int], allowed: np.ndarray) -> Pairs:
    """Its own occupation, related ones of every tier up to half of the list, and documents drawn at random."""
    rng = np.random.default_rng(list(hashlib.sha256(query.id.encode()).digest()[:8]))
    own = [document for document, grade in known.items() if grade == 4]
    related = [document for document, grade in known.items() if grade < 4]
    near = own + [related[i] for i in rng.permutation(len(related))[: PAIRS_PER_QUERY // 2 - len(own)]]
    other = rng.permutation(np.setdiff1d(allowed, np.array(list(known), np.int32)))[
        : PAIRS_PER_QUERY - len(near)
    ]
    documents = np.concatenate([np.array(near, np.int32), other.astype(np.int32)])
    return Pairs(row, documents, np.array([known.get(int(document), 0) for document in documents], np.int32))
