"""Scores of a judge or teacher on disk: written once per pair by a resumable job, read by the training of students.

A store is a folder: `store.json` (whose scores, on which data) and one `.npz` per range of training queries, each written whole or not at
all. Reading refuses a store that is unfinished, or that belongs to other data than is being trained on.
"""

import json
import os
import uuid
import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from jaxsearch.data.store_kinds import other_kind
from jaxsearch.errors import InputError, differences

META = "store.json"


class StoreError(InputError):
    """A score store that cannot be used; the message names what differs and what to do."""


@dataclass(frozen=True)
class StoreMeta:
    """Whose scores a store holds, and on what."""

    model: str
    """Contract hash of the model that scored."""
    kind: str
    """"judge" or "ranker"."""
    dataset: str
    fingerprint: str
    """`Dataset.fingerprint`."""
    columns: tuple[str, ...]
    """Names of the scores: labels, then actions."""
    queries: int
    """Training queries in all."""
    per_query: int
    """Pairs scored of each query (0: all)."""
    shard: int = 256
    """Queries per file."""
    source: str = ""
    """Where the pairs come from, if they are not the data set's own."""

    @property
    def shards(self) -> int:
        """Files of a finished store."""
        return -(-self.queries // self.shard)


class ScoreStore:
    """One store, new or existing.

    Args:
      folder: of the store; made if need be, or empty.
      meta: what is to be written. An existing store must say the same.

    Raises:
      StoreError: the folder holds a store of something else, or other files.
    """

    def __init__(self, folder: str | os.PathLike[str], meta: StoreMeta):
        self.folder, self.meta = Path(folder), meta
        if self.folder.exists() and not self.folder.is_dir():
            raise StoreError(f"{folder} is a file: give a new folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        # Looked at before `store.json` is: another process of this job may be writing it right now.
        others = sorted(path.name for path in self.folder.iterdir() if not path.name.startswith(META))
        if (self.folder / META).is_file():
            _refuse_difference(self.folder, _read_meta(self.folder), meta)
        elif others:
            shown = ", ".join([*others[:3], *(["..."] if len(others) > 3 else [])])
            raise StoreError(f"{folder} holds other files ({shown}): give a new folder")
        else:
            # A name of its own: several processes begin one store together.
            temporary = self.folder / f"{META}.{uuid.uuid4().hex}.tmp"
            temporary.write_text(json.dumps(asdict(meta), indent=1) + "\n")
            os.replace(temporary, self.folder / META)

    def missing(self) -> list[int]:
        """Shards that are not there yet."""
        return [shard for shard in range(self.meta.shards) if not _shard_file(self.folder, shard).is_file()]

    def write(self, shard: int, query: np.ndarray, document: np.ndarray, scores: np.ndarray) -> None:
        """Write one shard.

        Args:
          shard: its number.
          query: int32 [n], rows of training queries.
          document: int32 [n], rows of documents.
          scores: fp32 [n, C], finite.

        Raises:
          StoreError: scores of the wrong width, or not finite.
        """
        if scores.shape != (len(query), len(self.meta.columns)) or not np.isfinite(scores).all():
            raise StoreError(
                f"scores of shard {shard} have shape {scores.shape} or are not finite: expected [n, {len(self.meta.columns)}]"
            )
        target = _shard_file(self.folder, shard)
        temporary = target.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            np.savez(
                file,
                query=query.astype(np.int32),
                document=document.astype(np.int32),
                scores=scores.astype(np.float32),
            )
        os.replace(temporary, target)


def read_scores(
    folder: str | os.PathLike[str], fingerprint: str
) -> tuple[StoreMeta, dict[tuple[int, int], np.ndarray]]:
    """All scores of a finished store.

    Args:
      folder: of the store.
      fingerprint: of the data set in use.

    Returns:
      What the store says of itself, and (query row, document row) -> fp32 [C].

    Raises:
      StoreError: no store there, unfinished, damaged, or of other data.
    """
    root = Path(folder)
    meta = _read_meta(root)
    if meta.fingerprint != fingerprint:
        raise StoreError(
            f"{root} holds scores for data {meta.dataset} with fingerprint {meta.fingerprint[:12]}, training uses {fingerprint[:12]}: "
            "the store is stale, run the labelling job anew"
        )
    found: dict[tuple[int, int], np.ndarray] = {}
    for shard in range(meta.shards):
        path = _shard_file(root, shard)
        if not path.is_file():
            raise StoreError(
                f"{root} is unfinished (shard {shard} of {meta.shards} is missing): run the same labelling job again, it resumes"
            )
        try:
            with np.load(path, allow_pickle=False) as part:
                query, document, scores = part["query"], part["document"], part["scores"]
            _check_shard(meta, query, document, scores)
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise StoreError(
                f"{path} is damaged ({error}): delete it and run the labelling job again"
            ) from error
        found.update(zip(zip(query.tolist(), document.tolist(), strict=True), scores, strict=True))
    return meta, found


def _check_shard(meta: StoreMeta, query: np.ndarray, document: np.ndarray, scores: np.ndarray) -> None:
    if query.ndim != 1 or query.shape != document.shape or scores.shape != (len(query), len(meta.columns)):
        raise ValueError(f"shapes are {query.shape}, {document.shape}, {scores.shape}")
    if not np.issubdtype(scores.dtype, np.floating) or not np.isfinite(scores).all():
        raise ValueError("scores are not finite numbers")


def _shard_file(folder: Path, shard: int) -> Path:
    return folder / f"scores-{shard:05d}.npz"


def _read_meta(folder: Path) -> StoreMeta:
    path = folder / META
    if not path.is_file():
        raise StoreError(f"{folder} holds no score store ({META}): make it with `serve.py label`")
    try:
        values = json.loads(path.read_text())
        if other := other_kind(folder, values, "scores"):
            raise StoreError(other)
        meta = StoreMeta(**{**values, "columns": tuple(values["columns"])})
        if meta.shard < 1 or meta.queries < 0:
            raise ValueError(f"shard is {meta.shard}, queries {meta.queries}")
    except StoreError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise StoreError(
            f"{path} is damaged ({error}): delete the folder and run the labelling job again"
        ) from error
    return meta


def _refuse_difference(folder: Path, there: StoreMeta, wanted: StoreMeta) -> None:
    if differing := differences(asdict(there), asdict(wanted)):
        raise StoreError(
            f"{folder} already holds scores with {', '.join(differing)}: give another folder, or delete this one"
        )
