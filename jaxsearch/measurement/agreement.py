"""Agreement of a judge with precedents: kappas with intervals, overall and per bucket, confusion, worst disagreements.

Precedents are pairs that were graded by the written policy, set aside in splits of their own ("calibration", "golden"): a judge is measured
on them and never trained. The figure to compare with is the linear-weighted kappa of the paper (section 1).
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxsearch.data.datasets import Dataset, Pairs
from jaxsearch.data.records import Document, Query, to_dict
from jaxsearch.measurement.files import ReportError, read_json, write_json, write_text
from jaxsearch.measurement.judging import READINGS, Explain, Judge, Reading, check_judge, draw, read_grades
from jaxsearch.metrics import (
    MIN_CLUSTERS,
    Floats,
    Interval,
    bootstrap_tables,
    grade_tables,
    table_agreement,
    table_kappa,
)
from jaxsearch.models.contract import Model

FORMAT = 1
FILE, PAGE = "agreement.json", "agreement.html"
NO_BUCKET = "not known"
"""Stands for queries without a bucket."""
_SHOWN_CHARACTERS = 2_000


@dataclass(frozen=True)
class Agreement:
    """How far judge and precedent agree on some pairs. Intervals are 95%, by a bootstrap over queries; NaN: cannot be said."""

    pairs: int
    queries: int
    linear_kappa: Interval
    quadratic_kappa: Interval
    exact: Interval
    """Share of equal grades."""
    within_one: Interval
    """Share of grades at most one apart."""
    confusion: tuple[tuple[int, ...], ...]
    """[5, 5] pairs, rows the precedent's grade, columns the judge's."""
    note: str
    """Why figures are missing; empty where none is."""


@dataclass(frozen=True)
class Disagreement:
    """One pair that judge and precedent grade differently, with both readings of it."""

    query_id: str
    query: str
    document_id: str
    document: str
    bucket: str
    precedent_grade: int
    precedent_rationale: str
    judge_grade: int
    probabilities: tuple[float, ...]
    """Of the grades 0 to 4."""
    written_grade: int
    """That the judge wrote; -1 where it wrote none."""
    judge_rationale: str
    """That it wrote with it; empty where there is none."""


@dataclass(frozen=True)
class ReadingAgreement:
    """The agreement of one way to read a judge's grade."""

    overall: Agreement
    buckets: dict[str, Agreement]


@dataclass(frozen=True)
class AgreementReport:
    """One judge measured on one split of precedents."""

    format: int
    model: str
    """`Model.hash` of the judge."""
    dataset: str
    split: str
    limit: int
    """Queries drawn of the split; 0: all."""
    fingerprint: str
    """Of the precedents (`fingerprint`)."""
    samples: int
    seed: int
    readings: dict[str, ReadingAgreement]
    """By `READINGS`."""
    worst: tuple[Disagreement, ...]
    """Of the argmax reading: largest difference first, then the judge's surest."""


# --- arrays ----------------------------------------------------------------------------------------------------------


def agreement(
    precedent: np.ndarray,
    judge: np.ndarray,
    queries: np.ndarray,
    *,
    samples: int = 1000,
    seed: int = 0,
) -> Agreement:
    """All figures of some pairs.

    Args:
      precedent: int [n], grades 0 to 4.
      judge: int [n].
      queries: [n], the query that each pair belongs to; resampling draws whole queries.
      samples: of the bootstrap.
      seed: of the bootstrap.

    Raises:
      ValueError: a grade that is none, or shapes disagree.
    """
    tables = grade_tables(precedent, judge, queries)

    def figure(statistic: Callable[[np.ndarray], Floats]) -> Interval:
        return bootstrap_tables(tables, statistic, samples=samples, seed=seed)

    confusion = tables.sum(0)
    return Agreement(
        pairs=int(confusion.sum()),
        queries=len(tables),
        linear_kappa=figure(table_kappa),
        quadratic_kappa=figure(lambda found: table_kappa(found, "quadratic")),
        exact=figure(table_agreement),
        within_one=figure(lambda found: table_agreement(found, 1)),
        confusion=tuple(tuple(map(int, row)) for row in confusion),
        note=_note(confusion, len(tables)),
    )


def _note(confusion: np.ndarray, queries: int) -> str:
    notes = []
    if not queries:
        return "no pairs"
    if np.count_nonzero(confusion.sum(0) + confusion.sum(1)) == 1:
        notes.append("only one grade occurs: kappa is not defined")
    if queries < MIN_CLUSTERS:
        notes.append(f"too few queries for intervals: {queries} of at least {MIN_CLUSTERS}")
    return "; ".join(notes)


def agreement_by_bucket(
    precedent: np.ndarray,
    judge: np.ndarray,
    queries: np.ndarray,
    buckets: np.ndarray,
    *,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, Agreement]:
    """`agreement` of each bucket that occurs, by name (buckets: str [n]; "" is shown as "not known")."""
    return {
        str(bucket) or NO_BUCKET: agreement(
            precedent[chosen], judge[chosen], queries[chosen], samples=samples, seed=seed
        )
        for bucket in np.unique(buckets)
        for chosen in [buckets == bucket]
    }


def worst_rows(precedent: np.ndarray, probabilities: np.ndarray, limit: int) -> np.ndarray:
    """int [at most limit], the pairs whose grades differ most; among equals those that the judge is surest of, then in order.

    Args:
      precedent: int [n].
      probabilities: [n, 5], the judge's.
      limit: how many at most.
    """
    judge = read_grades(probabilities, "argmax")
    apart = np.abs(precedent - judge)
    order = np.lexsort((-probabilities.max(axis=-1, initial=0.0), -apart))
    return order[apart[order] > 0][:limit]


# --- a judge on precedents -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Precedents:
    """Graded pairs of one split, by query."""

    queries: list[Query]
    documents: list[np.ndarray]
    """int32 [L] rows per query."""
    grades: list[np.ndarray]
    """int64 [L] per query."""
    rationales: list[str]
    """[n], of all pairs in order; empty where nobody said why."""


def precedents(data: Dataset, split: str, limit: int = 0) -> Precedents:
    """The graded pairs of a split, of all its queries or of `limit` drawn by their ids.

    A split that the data set does not keep as precedents will do too: its graded documents are taken, without reasons.

    Raises:
      ReportError: there is no such split, or it holds no graded pair.
    """
    if split not in data.queries:
        raise ReportError(f"split is {split!r}: {data.name} has {', '.join(data.queries)}")
    if limit < 0:
        raise ReportError(f"limit is {limit}: use 0 for all queries, or at least 1")
    found = {data.queries[split][pairs.query].id: pairs for pairs in _graded_pairs(data, split)}
    queries = [query for query in data.queries[split] if query.id in found]
    if not queries:
        raise ReportError(f"{data.name} has no graded pair in split {split!r}: a judge cannot be measured")
    chosen = draw(queries, limit) if limit else queries
    parts = [found[query.id] for query in chosen]
    return Precedents(
        chosen,
        [pairs.documents for pairs in parts],
        [pairs.grades.astype(np.int64) for pairs in parts],
        [reason for pairs in parts for reason in pairs.rationales or [""] * len(pairs.documents)],
    )


def _graded_pairs(data: Dataset, split: str) -> Sequence[Pairs]:
    if split in data.precedent_pairs:
        return data.precedents(split)
    known = [data.graded.get(query.id, {}) for query in data.queries[split]]
    return [
        Pairs(i, np.array(list(grades), np.int32), np.array(list(grades.values()), np.int32))
        for i, grades in enumerate(known)
        if grades
    ]


def fingerprint(data: Dataset, split: str, limit: int = 0) -> str:
    """SHA-256 over the texts and grades of the precedents: what a report belongs to."""
    chosen = precedents(data, split, limit)
    digest = hashlib.sha256(f"{data.name}/{split}".encode())
    for query, rows, grades in zip(chosen.queries, chosen.documents, chosen.grades, strict=True):
        digest.update(json.dumps(to_dict(query), sort_keys=True).encode())
        for row, grade in zip(rows, grades, strict=True):
            digest.update(json.dumps([to_dict(data.documents[row]), int(grade)], sort_keys=True).encode())
    return digest.hexdigest()


def measure_judge(
    model: Model,
    data: Dataset,
    split: str = "golden",
    *,
    limit: int = 0,
    worst: int = 30,
    explain: Explain | None = None,
    samples: int = 1000,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> AgreementReport:
    """Grade the precedents of a split with a judge, by prefill alone, and compare.

    Args:
      model: the judge.
      data: whose precedents.
      split: "golden" or "calibration"; any split with graded pairs will do.
      limit: queries drawn of the split; 0 for all.
      worst: how many of the worst disagreements are kept.
      explain: the judge's second reading, grade and rationale in its own words (`answer_writer`); for the worst disagreements alone.
      samples: of the bootstrap.
      seed: of the bootstrap.
      progress: called with the number of queries done since the last call.

    Raises:
      ContractError: the model is no judge.
      ReportError: no such split, or nothing graded in it.
    """
    check_judge(model)
    chosen = precedents(data, split, limit)
    judge = Judge(model, data.documents, chosen.documents)
    probabilities = np.concatenate(judge(chosen.queries, chosen.documents, progress))
    precedent = np.concatenate(chosen.grades)
    query = np.repeat(np.arange(len(chosen.queries)), [len(rows) for rows in chosen.documents])
    buckets = np.array([query.bucket for query in chosen.queries])[query]

    def agree(reading: Reading) -> ReadingAgreement:
        grades = read_grades(probabilities, reading)
        return ReadingAgreement(
            agreement(precedent, grades, query, samples=samples, seed=seed),
            agreement_by_bucket(precedent, grades, query, buckets, samples=samples, seed=seed),
        )

    rows = np.concatenate(chosen.documents)
    pairs = [(i, chosen.queries[query[i]], int(rows[i])) for i in worst_rows(precedent, probabilities, worst)]
    written: Sequence[tuple[int, str]] = [(-1, "")] * len(pairs)
    if explain is not None and pairs:
        written = explain([found for _, found, _ in pairs], [data.documents[row] for *_, row in pairs])
    return AgreementReport(
        format=FORMAT,
        model=model.hash,
        dataset=data.name,
        split=split,
        limit=limit,
        fingerprint=fingerprint(data, split, limit),
        samples=samples,
        seed=seed,
        readings={reading: agree(reading) for reading in READINGS},
        worst=tuple(
            Disagreement(
                query_id=found.id,
                query=found.text,
                document_id=data.documents[row].id,
                document=document_text(data.documents[row]),
                bucket=found.bucket or NO_BUCKET,
                precedent_grade=int(precedent[i]),
                precedent_rationale=chosen.rationales[i],
                judge_grade=int(read_grades(probabilities[i], "argmax")),
                probabilities=tuple(float(p) for p in probabilities[i]),
                written_grade=answer[0],
                judge_rationale=answer[1],
            )
            for (i, found, row), answer in zip(pairs, written, strict=True)
        ),
    )


def document_text(document: Document) -> str:
    """Its fields, one a line, as far as a reader of a report wants to see them."""
    text = "\n".join(f"{name}: {value}" for name, value in document.fields.items())
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " ..."


# --- files -----------------------------------------------------------------------------------------------------------


def write_report(report: AgreementReport, folder: str | os.PathLike[str]) -> None:
    """Write `agreement.json` and `agreement.html`. In a judge's model folder they are what a gate reads."""
    from jaxsearch.measurement.report import agreement_page

    write_text(Path(folder) / PAGE, agreement_page(report))
    write_json(Path(folder) / FILE, report)


def read_report(folder: str | os.PathLike[str]) -> AgreementReport:
    """The report in a folder.

    Raises:
      ReportError: there is none, or it is damaged or of another format.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise ReportError(
            f"{folder} holds no {FILE}: measure the judge with "
            f"`python -m jaxsearch.measurement agreement --judge {folder} --dataset NAME --split golden`"
        )
    report = read_json(path, AgreementReport)
    if report.format != FORMAT or set(report.readings) != set(READINGS):
        raise ReportError(f"{path}: format is {report.format}, this version reads {FORMAT}: measure anew")
    return report
