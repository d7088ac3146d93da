"""Packing: the items of a query into rows of a fixed length, on the host.

Several items may share a row; segments keep them apart, so that an item's score does not depend on its
neighbours, its row or its place (`jaxsearch.models.attention.PrefixPacked`). One item per row is the special
case that suits items of like length: nothing is gained by sharing there, and each token meets fewer keys.

An item is token ids, or embeddings followed by token ids (MixLM, paper section 6): `EmbeddedItem`.

Axes: B queries, R rows per query, T tokens per row, L items per query, E embeddings per query, S per item, D width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike, NDArray

from jaxsearch.errors import InputError

Array: TypeAlias = NDArray | jax.Array  # numpy as packed, jax once inside a jitted function


@dataclass(frozen=True, eq=False)
class EmbeddedItem:
    """An item that begins with embeddings in place of its document's tokens; its length counts both.

    Raises:
        InputError: the embeddings are no float [S, D], or the item is empty.
    """

    embeddings: NDArray
    """float [S, D], what stands in for the outputs of the decoder's embedding table."""
    tokens: Sequence[int] = ()

    def __post_init__(self) -> None:
        shape, kind = np.shape(self.embeddings), np.asarray(self.embeddings).dtype
        # NumPy's own kinds of floats are told apart sooner than those that it does not know.
        if len(shape) != 2 or not (kind.kind == "f" or jnp.issubdtype(kind, jnp.floating)):
            raise InputError(f"embeddings are {kind} {shape}: give floats [S, D]")

    def __len__(self) -> int:
        return len(self.embeddings) + len(self.tokens)


Item: TypeAlias = Sequence[int] | EmbeddedItem


class PackedItems(NamedTuple):
    """Packed items, a pytree of arrays; without embeddings the last two are None, which are no arrays."""

    tokens: Array
    """int32 [B, R, T], 0 where padded."""
    segments: Array
    """int32 [B, R, T], 1, 2, ... for the items of a row in order, 0 for padding."""
    offsets: Array
    """int32 [B, R, T], the token's place inside its item."""
    last: Array
    """int32 [B, L, 2], row and column of each item's last token; (0, 0) where there is no item."""
    where: Array
    """bool [B, L], the items that exist."""
    embeddings: Array | None = None
    """float [B, E, D], the embeddings of each query's items."""
    embedded: Array | None = None
    """int32 [B, R, T], which embedding of its query stands here, -1 for a token."""


def count_embeddings(items: Iterable[Item]) -> list[int]:
    """How many embeddings each item has."""
    return [len(item.embeddings) if isinstance(item, EmbeddedItem) else 0 for item in items]


def packed_shape(queries: int, rows: int, row_length: int, slots: int) -> PackedItems:
    """`jax.ShapeDtypeStruct`s of packed items [B, R, T] with room for L items."""
    tokens: Any = jax.ShapeDtypeStruct((queries, rows, row_length), np.int32)
    last: Any = jax.ShapeDtypeStruct((queries, slots, 2), np.int32)
    where: Any = jax.ShapeDtypeStruct((queries, slots), np.bool_)
    return PackedItems(tokens, tokens, tokens, last, where)


def assign_rows(
    lengths: Sequence[int] | NDArray, row_length: int, *, most: int | None = None, one_per_row: bool = False
) -> tuple[NDArray, NDArray]:
    """Each item's row and first column: first fit, longest items first (equal ones in order).

    First-fit decreasing needs at most 11/9 of the best number of rows, plus one (Dosa, "The Tight Bound of
    First Fit Decreasing Bin-Packing Algorithm", 2007). The items of any subset of its rows, packed again
    alone, fill the same number of rows: a query can be split by rows.

    Args:
        lengths: int [L], none above `row_length`.
        row_length: T.
        most: how many items a row may hold; default: no limit.
        one_per_row: give each item a row of its own, in the order given.

    Returns:
        Two int arrays [L].
    """
    if one_per_row:
        return np.arange(len(lengths)), np.zeros(len(lengths), np.int64)
    sizes = np.asarray(lengths).tolist()
    rows, columns = [0] * len(sizes), [0] * len(sizes)
    used: list[int] = []
    held: list[int] = []
    full, smallest = 0, min(sizes, default=0)  # so many rows at the front hold nothing more
    for item in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        row, free = full, row_length - sizes[item]
        while row < len(used) and used[row] > free:
            row += 1
        if row == len(used):
            used.append(0)
            held.append(0)
        rows[item], columns[item] = row, used[row]
        held[row] += 1
        used[row] = row_length if held[row] == most else used[row] + sizes[item]
        while full < len(used) and used[full] + smallest > row_length:
            full += 1
    return np.array(rows, np.int64), np.array(columns, np.int64)


def pack_items(
    items: Sequence[Sequence[Item]],
    *,
    row_length: int,
    rows: int | None = None,
    slots: int | None = None,
    one_per_row: bool = False,
) -> PackedItems:
    """Pack each query's items into rows.

    Args:
        items: items[query][item] is a sequence of at least one token id, or an `EmbeddedItem`. A query may have
            no items. There is a table of embeddings only where an item has some.
        row_length: T.
        rows: R; default: what the fullest query needs, at least 1.
        slots: L, room for items; default: what the longest list needs, at least 1.
        one_per_row: give each item a row of its own.

    Raises:
        ValueError: an item is empty or longer than a row, the rows or slots do not suffice, or embeddings
            differ in width; the message names query, item and sizes.
    """
    sizes = [np.fromiter(map(len, query), np.int64, len(query)) for query in items]
    for index, sizes_of_query in enumerate(sizes):
        bad = np.flatnonzero((sizes_of_query > row_length) | (sizes_of_query == 0))
        if bad.size:
            what = f"query {index}, item {bad[0]} has {sizes_of_query[bad[0]]} tokens: "
            raise ValueError(what + f"items need 1 to row_length={row_length}; shorten it or use longer rows")
    places = [assign_rows(lengths, row_length, one_per_row=one_per_row) for lengths in sizes]
    needed_rows = max((int(row.max()) + 1 for row, _ in places if row.size), default=1)
    needed_slots = max([1, *map(len, items)])
    for name, given, needed in (("rows", rows, needed_rows), ("slots", slots, needed_slots)):
        if given is not None and given < needed:
            raise ValueError(f"{name} is {given}: these items need {needed}; give more or split the query")
    return place_items(
        items,
        places,
        row_length=row_length,
        rows=rows or needed_rows,
        slots=slots or needed_slots,
        embeddings=max((sum(count_embeddings(query)) for query in items), default=0),
    )


def place_items(
    items: Sequence[Sequence[Item]],
    places: Sequence[tuple[NDArray, NDArray]],
    *,
    row_length: int,
    rows: int,
    slots: int,
    embeddings: int = 0,
    width: int | None = None,
    dtype: DTypeLike = np.float32,
) -> PackedItems:
    """Write items to the rows and first columns given for each query (int [L] both), which must hold them.

    `embeddings` is E; with 0 there is no table. `width` is D, by default that of the first embedding.

    Raises:
        ValueError: an embedding has another width; names query and item.
    """
    b, r, t = len(items), rows, row_length
    packed = PackedItems(
        tokens=np.zeros((b, r, t), np.int32),
        segments=np.zeros((b, r, t), np.int32),
        offsets=np.zeros((b, r, t), np.int32),
        last=np.zeros((b, slots, 2), np.int32),
        where=np.zeros((b, slots), bool),
    )
    if embeddings:
        table = _table(items, embeddings, width, dtype)
        packed = packed._replace(embeddings=table, embedded=np.full((b, r, t), -1, np.int32))
    counts = [len(query) for query in items]
    if not sum(counts):
        return packed
    lengths = np.fromiter((len(item) for query in items for item in query), np.int64, sum(counts))
    query = np.repeat(np.arange(b), counts)
    slot = np.concatenate([np.arange(count) for count in counts])
    row = np.concatenate([row for row, _ in places])
    column = np.concatenate([column for _, column in places])

    # Where each token goes, one entry per token.
    offset = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    place = np.repeat((query * r + row) * t + column, lengths) + offset
    flat = chain.from_iterable(_tokens(item) for query in items for item in query)
    packed.tokens.reshape(-1)[place] = np.fromiter(flat, np.int32, len(place))
    packed.offsets.reshape(-1)[place] = offset
    packed.segments.reshape(-1)[place] = np.repeat(_rank_in_row(query * r + row, column), lengths)
    packed.last[query, slot] = np.stack([row, column + lengths - 1], axis=1)
    packed.where[query, slot] = True
    if packed.embedded is not None:
        sizes = np.fromiter(chain.from_iterable(map(count_embeddings, items)), np.int64, len(lengths))
        inside = offset < np.repeat(sizes, lengths)
        before = np.cumsum(sizes) - sizes  # in all queries: less those of the queries before this one
        first = before - before[np.searchsorted(query, query)]
        packed.embedded.reshape(-1)[place[inside]] = (np.repeat(first, lengths) + offset)[inside]
    return packed


def _tokens(item: Item) -> Sequence[int]:
    """An item's token ids, 0 where an embedding stands."""
    return [0] * len(item.embeddings) + list(item.tokens) if isinstance(item, EmbeddedItem) else item


def _table(items: Sequence[Sequence[Item]], size: int, width: int | None, dtype: DTypeLike) -> NDArray:
    """Each query's embeddings one after another, [B, size, D]."""
    found = [[item for item in query if isinstance(item, EmbeddedItem)] for query in items]
    if width is None:
        width = next(item.embeddings.shape[1] for query in found for item in query)
    table = np.zeros((len(items), size, width), dtype)
    for q, query in enumerate(found):
        for item in query:
            if item.embeddings.shape[1] != width:
                where = next(i for i, other in enumerate(items[q]) if other is item)
                raise InputError(
                    f"query {q}, item {where} has embeddings of width {item.embeddings.shape[1]}: give {width}"
                )
        if query:
            rows = np.concatenate([item.embeddings for item in query])
            table[q, : len(rows)] = rows
    return table


def _rank_in_row(row: NDArray, column: NDArray) -> NDArray:
    """1, 2, ... for the items of each row by column (row and column int [items])."""
    order = np.lexsort((column, row))
    ordered = row[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    rank = np.empty(len(row), np.int64)
    rank[order] = 1 + np.arange(len(row)) - np.repeat(starts, np.diff(np.r_[starts, len(row)]))
    return rank
