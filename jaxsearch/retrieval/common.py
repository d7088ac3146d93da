"""What the retrieval modules share: candidate arrays, checks of embeddings, and folders that appear whole or
not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

ABSENT = -1
"""The id of an empty place in a candidate array; its score is -inf."""
UNIT_TOLERANCE = 1e-3


def pad_candidates(lists: Sequence[Sequence[int]]) -> np.ndarray:
    """Ragged candidate lists as int32 [B, L], padded with `ABSENT` to the longest list (L >= 1)."""
    ids = np.full((len(lists), max([1, *map(len, lists)])), ABSENT, np.int32)
    for row, items in zip(ids, lists, strict=True):
        row[: len(items)] = items
    return ids


def check_candidates(candidates: np.ndarray, queries: int, documents: int) -> np.ndarray:
    """`candidates` as an integer array [B, L], or a ValueError that says what is wrong with it."""
    ids = np.asarray(candidates)
    if ids.ndim != 2 or len(ids) != queries or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"candidates are {ids.dtype} of shape {ids.shape}: give document positions as integers "
            f"[{queries}, L], one row per query (pad_candidates makes them from lists)"
        )
    bad = ids[(ids < ABSENT) | (ids >= documents)]
    if bad.size:
        raise ValueError(
            f"candidate {bad[0]} is not a document: use positions 0 to {documents - 1}, "
            f"and {ABSENT} for an empty place"
        )
    return ids


def check_k(k: int) -> int:
    """`k`, or a ValueError when it is below 1."""
    if k < 1:
        raise ValueError(f"k is {k}: ask for at least 1 result")
    return k


def check_embeddings(
    embeddings: np.ndarray, name: str, *, dims: int | None = None, unit: bool = False, empty_ok: bool = False
) -> np.ndarray:
    """`embeddings` as contiguous fp32 [rows, D].

    Args:
      name: what to call the array in an error.
      dims: the D it must have.
      unit: require rows of length 1 (within 1e-3).
      empty_ok: accept zero rows.

    Raises:
      ValueError: the shape, a NaN or infinite value, or a row's length is not as asked; names the first bad
        row.
    """
    array = np.asarray(embeddings)
    if array.ndim != 2 or not array.shape[1] or (dims is not None and array.shape[1] != dims):
        raise ValueError(f"{name} have shape {array.shape}: give [rows, {dims or 'D'}]")
    if not len(array) and not empty_ok:
        raise ValueError(f"{name} are empty: give at least one row")
    array = np.ascontiguousarray(array, np.float32)
    norms = np.linalg.norm(array, axis=1)
    if not np.isfinite(norms).all():
        row = int(np.flatnonzero(~np.isfinite(norms))[0])
        raise ValueError(f"{name}: row {row} holds NaN or infinite values; the model that made it is broken")
    if unit and (np.abs(norms - 1) > UNIT_TOLERANCE).any():
        row = int(np.flatnonzero(np.abs(norms - 1) > UNIT_TOLERANCE)[0])
        raise ValueError(f"{name}: row {row} has length {norms[row]:.4g}; divide each row by its length")
    return array


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into that becomes `path` when the block ends well, and vanishes when it does not.

    A folder that is already at `path` is replaced: readers see the old one, for an instant none, then the new
    one; never a mixture.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    new, old = work / "new", work / "old"
    try:
        new.mkdir()
        yield new
        if target.exists():
            os.replace(target, old)  # a folder cannot be renamed onto one that holds files
        try:
            os.replace(new, target)
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
