"""Batch ranking: a file of queries in, rankings out as JSON lines and as a TREC run; resumable, each file whole or not at all."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jaxsearch.data.jsonl import read_records, write_lines
from jaxsearch.data.records import Query, unique_ids
from jaxsearch.errors import InputError, differences
from jaxsearch.serving.bundle import Bundle

META, RANKINGS, TREC = "batch.json", "rankings.jsonl", "run.trec"
PART = 256
"""Queries per part file: what an interruption costs at most."""


@dataclass(frozen=True)
class BatchReport:
    """What one run did."""

    queries: int
    resumed: int
    """Queries that an earlier run had ranked."""
    empty: int = 0
    """Queries without any result: no document passes their filters."""


def rank_file(
    bundle: Bundle, queries_file: str | Path, output: str | Path, *, depth: int = 50, top: int = 10
) -> BatchReport:
    """Rank every query of a JSONL file.

    Args:
      bundle: an opened bundle; its utility belongs to the job, so that results of another one are not continued.
      queries_file: one `Query` a line.
      output: folder for `rankings.jsonl` and `run.trec`.
      depth: candidates retrieved and ranked per query.
      top: results written per query.

    Raises:
      InputError: bad queries, numbers below 1, or an output folder that holds results of something else.
    """
    for name, value in (("depth", depth), ("top", top)):
        if value < 1:
            raise InputError(f"{name} is {value}: use at least 1")
    queries = read_records(queries_file, Query)
    unique_ids(queries)
    for name in (record.id for records in (queries, bundle.documents) for record in records):
        if name.split() != [name]:
            raise InputError(f"id {name!r} holds white space, which a TREC run cannot: use ids without")
    bundle.check(queries)
    folder = Path(output)
    parts = folder / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(Path(queries_file).read_bytes()).hexdigest()
    job = {"bundle": bundle.hash, "queries_sha256": digest, "depth": depth, "top": top}
    _same_job(folder, {**job, "utility": bundle.utility.to_dict()})
    bundle.settle(queries[:PART], depth=depth)  # so that a resumed run gives the bits of an uninterrupted one
    resumed = 0
    files = []
    with tqdm(total=len(queries), desc="ranking", unit="query") as bar:
        for number in range(-(-len(queries) // PART)):
            part = queries[number * PART : (number + 1) * PART]
            files.append(parts / f"part-{number:05d}.jsonl")
            if files[-1].is_file():
                resumed += len(part)
                bar.update(len(part))
                continue
            ranked = bundle.rank(part, depth=depth, progress=bar.update)
            write_lines(
                files[-1],
                (_row(bundle, query, results[:top]) for query, results in zip(part, ranked, strict=True)),
            )
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    write_lines(folder / RANKINGS, rows)
    _write_trec(folder / TREC, rows)
    return BatchReport(len(queries), resumed, sum(not row["results"] for row in rows))


def _row(bundle: Bundle, query: Query, results: list) -> dict:
    return {
        "query_id": query.id,
        "results": [
            {
                "document_id": bundle.documents[result.row].id,
                "rank": rank,
                "score": result.score,
                "relevance": result.relevance,
                "actions": result.actions,
            }
            for rank, result in enumerate(results, start=1)
        ],
    }


def _write_trec(path: Path, rows: list[dict]) -> None:
    """`query Q0 document rank score tag`; the score falls strictly even in fp32, so that tools which sort by it keep our order of ties."""
    lines = []
    for row in rows:
        before = np.float32(np.inf)
        for result in row["results"]:
            before = min(np.float32(result["score"]), np.nextafter(before, np.float32(-np.inf)))
            lines.append(
                f"{row['query_id']} Q0 {result['document_id']} {result['rank']} {before:.9g} jaxsearch\n"
            )
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, path)


def _same_job(folder: Path, job: dict[str, object]) -> None:
    path = folder / META
    if path.is_file():
        there = json.loads(path.read_text())
        if differing := differences(there, job):
            raise InputError(
                f"{folder} holds results made with another {', '.join(differing)}: give another --output, or delete it"
            )
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(job, indent=1) + "\n")
    os.replace(temporary, path)
