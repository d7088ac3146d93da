"""Exact search over all documents on the accelerator, with filters applied before scoring.

It is the oracle of the approximate index and the path for filtered queries: an approximate index that is
filtered afterwards loses documents under selective filters (paper section 3).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsearch.data.records import Document, Query
from jaxsearch.retrieval.common import ABSENT, check_embeddings, check_k


def filter_mask(queries: Sequence[Query], documents: Sequence[Document]) -> np.ndarray:
    """bool [Q, M]: the document has exactly the attribute values that the query's filters require.

    Raises:
      ValueError: a query filters on an attribute that no document has.
    """
    mask = np.ones((len(queries), len(documents)), bool)
    for name in sorted({name for query in queries for name in query.filters}):
        values = np.array([document.attributes.get(name) for document in documents], object)
        if all(value is None for value in values):
            known = sorted({known for document in documents for known in document.attributes})
            raise ValueError(f"Query.filters[{name!r}]: no document has this attribute; known are {known}")
        allowed = {query.filters.get(name) for query in queries} - {None}
        having = {value: values == value for value in allowed}
        for row, query in enumerate(queries):
            if name in query.filters:
                mask[row] &= having[query.filters[name]]
    return mask


class ExhaustiveIndex:
    """All M document embeddings on the device, searched in blocks so that scores never take more than [Q,
    block] of memory."""

    def __init__(self, embeddings: np.ndarray, *, block: int = 8192, query_block: int = 256) -> None:
        """Put the embeddings [M, D] on the device.

        Args:
          embeddings: fp32 [M, D]; scores are plain dot products, so normalise the rows if you want cosines.
          block: documents per step.
          query_block: queries per call; more are searched in turn.

        Raises:
          ValueError: the embeddings are empty, not two-dimensional or not finite.
        """
        rows = check_embeddings(embeddings, "document embeddings")
        self.documents, self.dims = rows.shape
        self.query_block = query_block
        block = min(block, self.documents)
        padded = np.zeros((-(-self.documents // block) * block, self.dims), np.float32)
        padded[: self.documents] = rows
        self._blocks = jnp.asarray(padded.reshape(-1, block, self.dims))

    def search(
        self, queries: np.ndarray, k: int, *, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k documents with the largest dot product, exactly.

        Args:
          queries: fp32 [Q, D].
          k: results per query, at least 1; may exceed the number of documents.
          mask: bool [Q, M] or [M], False for documents that must not be returned.

        Returns:
          ids int32 [Q, k] and scores fp32 [Q, k], best first, equal scores by document position; -1 and -inf
          where fewer are allowed.
        """
        queries = check_embeddings(queries, "query embeddings", dims=self.dims, empty_ok=True)
        if mask is not None:
            shapes = [(len(queries), self.documents), (self.documents,)]
            if np.shape(mask) not in shapes:
                raise ValueError(f"mask has shape {np.shape(mask)}: give {shapes[0]} or {shapes[1]}")
            mask = np.atleast_2d(np.asarray(mask, bool))
        ids = np.full((len(queries), check_k(k)), ABSENT, np.int32)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        wide = min(k, self.documents)
        for start in range(0, len(queries), self.query_block):
            part = slice(start, start + self.query_block)
            # Few shapes, few compilations: the queries are padded to a power of two.
            size = 1 << (len(queries[part]) - 1).bit_length()
            rows = mask if mask is None or len(mask) == 1 else _padded(mask[part], size)
            found = _top_k(_padded(queries[part], size), self._blocks, self._allowed(rows), k=wide)
            ids[part, :wide], scores[part, :wide] = (np.asarray(x)[: len(queries[part])] for x in found)
        return ids, scores

    def _allowed(self, mask: np.ndarray | None) -> np.ndarray:
        """bool [blocks, 1 or Q, block]: `mask`, and never the rows that pad the last block."""
        blocks, block, _ = self._blocks.shape
        allowed = np.zeros((1 if mask is None else len(mask), blocks * block), bool)
        allowed[:, : self.documents] = True if mask is None else mask
        return allowed.reshape(-1, blocks, block).swapaxes(0, 1)


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    return np.pad(rows, ((0, size - len(rows)), (0, 0)))


@functools.partial(jax.jit, static_argnames="k")
def _top_k(queries: Array, blocks: Array, allowed: Array, *, k: int) -> tuple[Array, Array]:
    """Top k of queries [Q, D] over blocks [N, block, D] where allowed [N, 1 or Q, block]: ids and scores [Q,
    k]."""

    def step(best: tuple[Array, Array], part: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        scores, ids = best
        documents, where, first = part
        # HIGHEST: this is the oracle, so no TF32 or bf16 products.
        new = jnp.einsum("qd,md->qm", queries, documents, precision=jax.lax.Precision.HIGHEST)
        new = jnp.where(where, new, -jnp.inf)
        new_ids = jnp.broadcast_to((first + jnp.arange(new.shape[1], dtype=jnp.int32))[None], new.shape)
        # lax.top_k prefers the earlier column among equals, and earlier columns are earlier documents.
        scores, columns = jax.lax.top_k(jnp.concatenate([scores, new], axis=1), k)
        ids = jnp.take_along_axis(jnp.concatenate([ids, new_ids], axis=1), columns, axis=1)
        return (scores, ids), None

    start = (
        jnp.full((len(queries), k), -jnp.inf, jnp.float32),
        jnp.full((len(queries), k), ABSENT, jnp.int32),
    )
    firsts = jnp.arange(blocks.shape[0], dtype=jnp.int32) * blocks.shape[1]
    (scores, ids), _ = jax.lax.scan(step, start, (blocks, allowed, firsts))
    return jnp.where(scores == -jnp.inf, ABSENT, ids), scores
