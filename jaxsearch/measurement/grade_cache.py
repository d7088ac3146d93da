"""Grades that a judge gave before, by (judge, query, document): a repeated measurement grades only what is new.

A folder of JSONL files, each written once, whole or not at all, so that an interrupted run loses at most one part. Queries and documents
are known by their content: an edited document is graded anew.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from jaxsearch.data.jsonl import write_lines
from jaxsearch.data.records import Document, Query, to_dict
from jaxsearch.errors import InputError

_FIELDS = {"judge", "query", "document", "probabilities"}


class CacheError(InputError):
    """A file of grades that cannot be used; the message says which."""


def query_key(query: Query) -> str:
    """Short hash of all that a judge could see of a query, and its id."""
    return _key({name: value for name, value in to_dict(query).items() if name != "bucket"})


def document_key(document: Document) -> str:
    """Short hash of a document and its id."""
    return _key(to_dict(document))


def _key(values: Mapping[str, object]) -> str:
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class GradeCache:
    """The grades of one judge.

    Args:
      folder: where they lie; made if need be.
      judge: contract hash of the judge.

    Raises:
      CacheError: a file there is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], judge: str):
        self._folder, self._judge = Path(folder), judge
        self._folder.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, dict[str, np.ndarray]] = {}
        for path in sorted(self._folder.glob(f"{judge[:16]}-*.jsonl")):
            self._read(path)

    def known(self, query: str) -> Mapping[str, np.ndarray]:
        """Document key -> probabilities of the grades, fp32 [5], of everything graded for a query (its key)."""
        return self._known.get(query, {})

    def add(self, found: Iterable[tuple[str, str, np.ndarray]]) -> None:
        """Write (query key, document key, fp32 [5]) as one file; nothing for no pairs."""
        rows = [
            {"judge": self._judge, "query": query, "document": document, "probabilities": list(map(float, p))}
            for query, document, p in found
        ]
        if not rows:
            return
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
        write_lines(self._folder / f"{self._judge[:16]}-{digest}.jsonl", rows)
        for row in rows:
            self._take(row)

    def _take(self, row: Mapping) -> None:
        self._known.setdefault(row["query"], {})[row["document"]] = np.array(row["probabilities"], np.float32)

    def _read(self, path: Path) -> None:
        try:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                row = json.loads(line)
                if not _is_row(row):
                    raise ValueError(f"line {number} is no grade")
                if row["judge"] == self._judge:
                    self._take(row)
        except (ValueError, RecursionError) as error:
            raise CacheError(f"{path} is damaged ({error}): delete it, its pairs are graded anew") from error


def _is_row(row: object) -> bool:
    if not isinstance(row, dict) or set(row) != _FIELDS:
        return False
    p = row["probabilities"]
    return (
        all(isinstance(row[name], str) for name in _FIELDS - {"probabilities"})
        and isinstance(p, list)
        and len(p) == 5
        and all(isinstance(x, float | int) and 0 <= x <= 1 for x in p)
        and math.isclose(sum(p), 1, abs_tol=1e-3)
    )
