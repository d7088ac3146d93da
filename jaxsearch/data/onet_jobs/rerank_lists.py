"""Fixed candidate lists to rerank: for each dev and test query the union of what two frozen retrievers found,
nothing injected.

A list is a set of rows of `Tables.documents`. All lists of a split are one bit matrix [queries, documents],
packed, in `lists.npz`; `lists.json` beside it says how they were made, what they can reach at best, and the
hashes of queries, documents and lists. `benchmarks/make_rerank_lists.py` makes both files.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxsearch.data.onet_jobs.selection import SPLITS
from jaxsearch.data.onet_jobs.tables import Tables
from jaxsearch.data.records import Document, Query
from jaxsearch.errors import InputError

FOLDER = Path(__file__).with_name("rerank")
RERANK_SPLITS = SPLITS[1:]
"""All splits but `train`."""


class RerankListError(InputError):
    """The lists do not belong to these tables, or are damaged; the message names what differs."""


def documents_hash(documents: Iterable[Document]) -> str:
    """SHA-256 over ids and texts of the documents in their order."""
    return _hash([document.id, *document.fields.items()] for document in documents)


def queries_hash(queries: Iterable[Query]) -> str:
    """SHA-256 over ids and texts of the queries in their order."""
    return _hash([query.id, query.text] for query in queries)


def save_rerank_lists(
    folder: str | Path,
    tables: Tables,
    lists: Mapping[str, np.ndarray],
    about: Mapping[str, Any],
    figures: Mapping[str, Any],
) -> None:
    """Writes `lists.npz` and `lists.json`.

    Args:
      lists: for each of `RERANK_SPLITS`, bool [queries of the split, documents]: is this document in this
        query's list?
      about: how the lists were made; goes into the JSON as it is.
      figures: per split, what the lists hold and reach; goes into the JSON as it is.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    packed: dict[str, Any] = {split: np.packbits(lists[split], axis=1) for split in RERANK_SPLITS}
    for split in RERANK_SPLITS:
        expected = (len(tables.queries[split]), len(tables.documents))
        if lists[split].shape != expected:
            raise RerankListError(
                f"lists of {split} have shape {lists[split].shape}; these tables need {expected}"
            )
    report = {
        "about": dict(about),
        "documents": {"count": len(tables.documents), "sha256": documents_hash(tables.documents)},
        "splits": {
            split: {
                "queries": len(tables.queries[split]),
                "queries_sha256": queries_hash(tables.queries[split]),
                "lists_sha256": hashlib.sha256(packed[split].tobytes()).hexdigest(),
                **figures[split],
            }
            for split in RERANK_SPLITS
        },
    }
    temporary = root / "lists.tmp"
    with open(temporary, "wb") as file:
        np.savez_compressed(file, **packed)
    os.replace(temporary, root / "lists.npz")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, root / "lists.json")


def load_rerank_lists(tables: Tables, folder: str | Path = FOLDER) -> dict[str, np.ndarray]:
    """The list of every dev and test query.

    Returns:
      Query id -> int32 [L], rows of `tables.documents`, ascending (the order carries no information).

    Raises:
      RerankListError: files are missing or damaged, or the lists were made for other documents or queries.
    """
    root = Path(folder)
    try:
        report = json.loads((root / "lists.json").read_text())
        with np.load(root / "lists.npz", allow_pickle=False) as file:
            packed = {split: file[split] for split in RERANK_SPLITS}
        differing = _differences(tables, report, packed)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise RerankListError(f"{root}: lists.npz and lists.json cannot be read ({error!r})") from error
    if differing:
        raise RerankListError(
            f"the rerank lists of {root} do not fit these tables: {'; '.join(differing)}. They belong "
            "to one O*NET release; for another, run benchmarks/make_rerank_lists.py and name its output"
        )
    return {
        query.id: np.flatnonzero(row).astype(np.int32)
        for split in RERANK_SPLITS
        for query, row in zip(tables.queries[split], np.unpackbits(packed[split], axis=1), strict=True)
    }


def _differences(tables: Tables, report: Mapping[str, Any], packed: Mapping[str, np.ndarray]) -> list[str]:
    checks = [
        ("number of documents", report["documents"]["count"], len(tables.documents)),
        ("documents' hash", report["documents"]["sha256"], documents_hash(tables.documents)),
    ]
    for split in RERANK_SPLITS:
        stated, queries = report["splits"][split], tables.queries[split]
        checks += [
            (f"number of {split} queries", stated["queries"], len(queries)),
            (f"{split} queries' hash", stated["queries_sha256"], queries_hash(queries)),
            (
                f"{split} lists' hash",
                stated["lists_sha256"],
                hashlib.sha256(packed[split].tobytes()).hexdigest(),
            ),
        ]
    return [
        f"{name} is {_short(here)}, the lists say {_short(stated)}"
        for name, stated, here in checks
        if stated != here
    ]


def _short(value: object) -> str:
    return str(value)[:12]


def _hash(rows: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
