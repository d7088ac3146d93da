"""Data sets by name, in memory: documents, queries by split, graded pairs, impressions, fixed rerank lists.

`load_dataset("job_market:tiny")` (jobs) and `load_dataset("job_market:tiny_people")` generate what is missing;
`load_dataset("onet_jobs")` reads an O*NET release (`ONET_DIR`).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from jaxsearch.data import job_market, onet_jobs
from jaxsearch.data.records import ACTIONS, VERTICALS, Document, Impression, Judgment, Query, to_dict
from jaxsearch.data.user_data import load_folder, to_dataset
from jaxsearch.errors import InputError

PRECEDENT_QUERIES = 200
"""Queries of each split of precedents where the data set brings no precedents of its own."""
PAIRS_PER_QUERY = 16
"""Candidates that a training query is given where the data set brings none."""


@dataclass(frozen=True)
class Pairs:
    """One query with its candidates: of a training query, what judge and teachers label and students learn on; or of a precedent."""

    query: int
    """Row of the query in `Dataset.queries[split]`, of the split that the pairs are of."""
    documents: np.ndarray
    """int32 [L], rows of `Dataset.documents`."""
    grades: np.ndarray
    """int32 [L], 0 to 4; -1 where nobody graded the pair."""
    rationales: tuple[str, ...] = ()
    """[L], why the grade is what it is, "" where nobody said; empty where the data set has no reasons at all."""


@dataclass(frozen=True)
class Dataset:
    """A data set in memory. Documents and queries are spoken of by their row."""

    name: str
    documents: Sequence[Document]
    queries: Mapping[str, Sequence[Query]]
    """By split: "train", "dev", one or more test splits, and the splits of precedents where there are some."""
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
    precedent_pairs: Mapping[str, Sequence[Pairs]] = field(default_factory=dict)
    """Split ("calibration", "golden") -> graded pairs that judges are measured by and never learn from. See `precedents`."""

    @property
    def test_splits(self) -> list[str]:
        """The splits that results are shown on."""
        return [split for split in self.queries if split.startswith("test")]

    @property
    def actions(self) -> tuple[str, ...]:
        """Actions that the impressions tell of; none without impressions."""
        return ACTIONS[self.documents[0].vertical] if self.impressions else ()

    def precedents(self, split: str) -> Sequence[Pairs]:
        """The precedents of a split: every pair graded, with its rationale.

        Raises:
          InputError: the data set has no such precedents.
        """
        if split not in self.precedent_pairs:
            known = ", ".join(self.precedent_pairs) or "none"
            raise InputError(f"precedents {split!r}: {self.name} has {known}")
        return self.precedent_pairs[split]

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
            values = to_dict(record)
            values.pop("bucket", None)  # no model sees it
            digest.update(json.dumps(values, sort_keys=True).encode())
        for pairs in self.pairs:
            digest.update(np.int32(pairs.query).tobytes() + pairs.documents.tobytes())
        return digest.hexdigest()

    def grades(self, query: Query, rows: np.ndarray) -> np.ndarray:
        """int32 [L]: the grades of documents (rows, -1 for none) for a dev or test query."""
        known = self.graded[query.id]
        return np.array([known.get(int(row), 0) for row in rows], np.int32)


def load_dataset(name: str, data_dir: str | Path | None = None) -> Dataset:
    """A data set by name: `job_market:tiny`, `job_market:default`, `job_market:long`, `job_market:tiny_people`,
    `job_market:default_people`, or `onet_jobs`.

    Args:
      data_dir: TFDS's folder of prepared data (its default: `~/tensorflow_datasets`).

    Raises:
      InputError: no such data set or variant.
    """
    family, _, variant = name.partition(":")
    if family == "job_market" and (variant or "default") in job_market.VERSIONS:
        return _job_market(variant or "default", data_dir)
    if family == "onet_jobs" and not variant:
        return _onet_jobs(data_dir)
    folder, _, vertical = (
        name.rpartition(":") if name.endswith(tuple(f":{v}" for v in VERTICALS)) else (name, "", "")
    )
    if folder and Path(folder).is_dir():
        # Its own name, however it was reached: stores and reports made of it stay good after a move.
        own = Path(folder).resolve().name
        data = to_dataset(load_folder(folder), name, vertical)
        return replace(data, name=f"{own}:{vertical}" if vertical else own)
    raise InputError(f"data set is {name!r}: use one of {', '.join(_known())}, or a folder of your own")


def prepare_dataset(
    name: str, data_dir: str | Path | None = None, beam: Sequence[str] | None = None
) -> dict[str, dict[str, int]]:
    """Build the tables of `job_market` or `onet_jobs` that are missing, without reading them.

    Args:
      name: as in `load_dataset`.
      data_dir: as in `load_dataset`; with Beam, a folder that all workers reach.
      beam: pipeline options of Apache Beam, whose workers then make the rows; None to make them here.

    Returns:
      Table -> split -> rows.

    Raises:
      InputError: no such data set, or Apache Beam is asked for and not installed.
    """
    family, _, variant = name.partition(":")
    if family == "job_market" and (variant or "default") in job_market.VERSIONS:
        builders = job_market.prepare(variant or "default", data_dir, beam)
    elif name == "onet_jobs":
        builders = onet_jobs.prepare(data_dir, beam=beam)
    else:
        raise InputError(f"data set is {name!r}: use one of {', '.join(_known())}")
    return {
        table: {split: info.num_examples for split, info in builder.info.splits.items()}
        for table, builder in builders.items()
    }


def _known() -> list[str]:
    """Names of the data sets that are built."""
    return [*(f"job_market:{variant}" for variant in job_market.VERSIONS), "onet_jobs"]


def _job_market(variant: str, data_dir: str | Path | None) -> Dataset:
    tables = job_market.load_tables(variant, data_dir)
    row = {document.id: i for i, document in enumerate(tables.documents)}
    judged = {
        query_id: {row[judgment.document_id]: judgment for judgment in judgments}
        for query_id, judgments in tables.judgments.items()
    }
    pages = tables.impressions
    return Dataset(
        f"job_market:{variant}_{job_market.VERSIONS[variant]}",
        tables.documents,
        tables.queries,
        {query: {m: judgment.grade for m, judgment in known.items()} for query, known in judged.items()},
        [
            reasoned_pairs(i, judged[query.id], [row[shown.document_id] for shown in pages[query.id]])
            for i, query in enumerate(tables.queries["train"])
        ],
        pages,
        precedent_pairs={
            split: [reasoned_pairs(i, judged[query.id], []) for i, query in enumerate(tables.queries[split])]
            for split in job_market.PRECEDENTS
        },
    )


def reasoned_pairs(query: int, judged: Mapping[int, Judgment], shown: Sequence[int]) -> Pairs:
    """The judged documents (row -> judgment) with their reasons, then those that were shown without being judged."""
    pairs = _known_pairs(query, {row: judgment.grade for row, judgment in judged.items()}, shown)
    reasons = tuple(judged[row].rationale if row in judged else "" for row in pairs.documents.tolist())
    return replace(pairs, rationales=reasons if any(reasons) else ())


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
    every = np.arange(len(tables.documents), dtype=np.int32)
    allowed = np.setdiff1d(every, held_out)
    queries = dict(tables.queries)
    precedents: dict[str, list[Pairs]] = {}
    for split, (source, documents) in {
        "calibration": ("dev", allowed),
        "golden": ("test_seen", allowed),
        "golden_unseen": ("test_unseen", every),
    }.items():
        # Titles that people assigned are the precedents: drawn from queries that no model learns from, all of them or the first by hash.
        queries[split] = sorted(queries[source], key=lambda query: _hash(query.id))[:PRECEDENT_QUERIES]
        precedents[split] = [
            _draw_pairs(i, query, graded[query.id], documents) for i, query in enumerate(queries[split])
        ]
    return Dataset(
        "onet_jobs",
        tables.documents,
        queries,
        graded,
        [_draw_pairs(i, query, graded[query.id], allowed) for i, query in enumerate(queries["train"])],
        held_out=held_out,
        rerank=onet_jobs.load_rerank_lists(tables),
        precedent_pairs=precedents,
    )


def _hash(query_id: str) -> bytes:
    return hashlib.sha256(query_id.encode()).digest()


def _draw_pairs(row: int, query: Query, known: Mapping[int, int], allowed: np.ndarray) -> Pairs:
    """Its own occupation, related ones of every tier up to half of the list, and documents drawn at random, all of them allowed."""
    rng = np.random.default_rng(list(_hash(query.id)[:8]))
    may = set(allowed.tolist())
    own = [document for document, grade in known.items() if grade == 4]
    related = [document for document, grade in known.items() if grade < 4 and document in may]
    near = own + [related[i] for i in rng.permutation(len(related))[: PAIRS_PER_QUERY // 2 - len(own)]]
    other = rng.permutation(np.setdiff1d(allowed, np.array(list(known), np.int32)))[
        : PAIRS_PER_QUERY - len(near)
    ]
    documents = np.concatenate([np.array(near, np.int32), other.astype(np.int32)])
    return Pairs(row, documents, np.array([known.get(int(document), 0) for document in documents], np.int32))
