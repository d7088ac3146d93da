"""TREC runs: `query_id Q0 doc_id rank score tag` a line, what most search engines and tools can write."""

import itertools
import math
import os
import re
from collections.abc import Collection
from pathlib import Path

from jaxsearch.errors import InputError

MAX_LINE_BYTES = 4_096
_SHOWN_PROBLEMS = 10
_RANK = re.compile(r"\d{1,9}", re.ASCII)
_SCORE = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,4})?", re.ASCII)


class RunError(InputError):
    """A TREC run that cannot be used; bad lines are named."""


def read_trec(
    path: str | os.PathLike[str], queries: Collection[str], documents: Collection[str]
) -> dict[str, list[str]]:
    """Document ids per query id, best first: by falling score, ties by rank, then by place in the file.

    The second and the last column are not looked at.

    Args:
      path: the file.
      queries: ids that may occur; the run need not have all of them.
      documents: ids that may occur.

    Raises:
      RunError: the file is missing, empty, or has bad lines: other columns than six, a rank or score that is no finite number, an
        unknown id, a document twice for one query, ranks and scores that contradict each other. The first ten are named.
    """
    file = Path(path)
    if not file.is_file():
        raise RunError(f"{file}: no such file; give a TREC run")
    found: dict[str, dict[str, tuple[float, int]]] = {}
    problems: list[str] = []
    with open(file, "rb") as lines:
        for number, raw in enumerate(iter(lambda: lines.readline(MAX_LINE_BYTES + 1), b""), start=1):
            if len(raw) > MAX_LINE_BYTES:
                problems.append(f"{file.name}:{number}: longer than {MAX_LINE_BYTES:,} bytes")
                break
            if raw.strip():
                try:
                    query, document, rank, score = _parse(raw)
                    _check_ids(query, document, queries, documents, found)
                    found.setdefault(query, {})[document] = (-score, rank)
                except ValueError as error:
                    problems.append(f"{file.name}:{number}: {error}")
    problems += [problem for query, ranked in found.items() if (problem := _contradiction(query, ranked))]
    if problems:
        shown = "\n  ".join(problems[:_SHOWN_PROBLEMS])
        raise RunError(f"{file} has {len(problems)} problems, mend them:\n  {shown}")
    if not found:
        raise RunError(f"{file} holds no results: give at least one line")
    return {query: sorted(ranked, key=ranked.__getitem__) for query, ranked in found.items()}


def _parse(raw: bytes) -> tuple[str, str, int, float]:
    """Query, document, rank and score of one line."""
    try:
        columns = raw.decode("utf-8").split()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason})") from error
    if len(columns) != 6:
        raise ValueError(f"{len(columns)} columns, not query_id Q0 doc_id rank score tag")
    query, _, document, rank, score, _ = columns
    if not _RANK.fullmatch(rank):
        raise ValueError(f"rank is {rank[:40]!r}: give a whole number from 0")
    if not _SCORE.fullmatch(score) or not math.isfinite(float(score)):
        raise ValueError(f"score is {score[:40]!r}: give a finite number")
    return query, document, int(rank), float(score)


def _check_ids(
    query: str,
    document: str,
    queries: Collection[str],
    documents: Collection[str],
    found: dict[str, dict[str, tuple[float, int]]],
) -> None:
    if query not in queries:
        raise ValueError(f"query {query[:80]!r} is unknown: is this the run of these queries?")
    if document not in documents:
        raise ValueError(f"document {document[:80]!r} is unknown: is this the run of these documents?")
    if document in found.get(query, {}):
        raise ValueError(f"document {document[:80]!r} occurs twice for query {query[:80]!r}")


def _contradiction(query: str, ranked: dict[str, tuple[float, int]]) -> str:
    """What is wrong where a better rank has a lower score; empty where nothing is."""
    by_rank = sorted(ranked, key=lambda document: ranked[document][::-1])
    for better, worse in itertools.pairwise(by_rank):
        if ranked[better][1] < ranked[worse][1] and ranked[better][0] > ranked[worse][0]:
            return (
                f"query {query[:80]!r}: rank {ranked[worse][1]} has a higher score than rank {ranked[better][1]}: "
                "which of the two orders is meant?"
            )
    return ""
