"""Shape buckets: which closed set of shapes may be compiled, and which of them a workload should use.

A shape costs time once, to compile, and padding every time it is used. `plan` weighs the two in FLOPs: lists
of many lengths share a few shapes when the job is small, and get shapes of their own when it is large.
"""

import bisect
import functools
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxsearch.errors import InputError
from jaxsearch.models.decoder import DecoderConfig
from jaxsearch.scoring.packing import assign_rows

Lengths = Sequence[int]
_SAMPLE = 32
_CALL = 3e8
"""FLOPs in the time that any call takes on a CPU, however small (about 1 ms)."""


class Shape(NamedTuple):
    """The sizes of one compiled call."""

    queries: int
    prefix: int
    rows: int
    """Per query."""
    row_length: int
    embeddings: int = 0
    """Per query; 0: token items only."""
    shared: bool = True
    """Whether several items may share a row."""
    kept: bool = False
    """Whether the prefix's keys and values are given, and only the items computed; with no rows: the prefix, computed to be kept."""


def steps(low: int, high: int) -> tuple[int, ...]:
    """Powers of two and the halves between them, from `low` to `high`: rounding up adds at most half.

    >>> steps(16, 100)
    (16, 24, 32, 48, 64, 96)
    """
    powers = (1 << i for i in range(high.bit_length()))
    sizes = {size for power in powers for size in (power, power * 3 // 2)}
    return tuple(sorted(size for size in sizes if low <= size <= high))


def _best_sizes(lengths: Lengths, most: int) -> tuple[int, ...]:
    """At most so many sizes such that rounding each length up adds least; the longest is one of them.

    >>> _best_sizes([3, 3, 4, 10, 11, 11, 11, 30], 3)
    (4, 11, 30)
    """
    values, counts = np.unique(np.asarray(lengths), return_counts=True)
    if len(values) > 256:  # quantiles are as good, and the sums below stay small
        places = np.linspace(0, len(values) - 1, 256).round().astype(int)
        counts = np.diff(np.cumsum(counts)[places], prepend=0)
        values = values[places]
    below = np.cumsum(counts)
    # cost[j]: rounding all up to values[j] and less, with values[j] the largest size so far.
    cost, chosen = (values * below).astype(float), [(int(value),) for value in values]
    best = (cost[-1], chosen[-1])
    for _ in range(most - 1):
        step = cost[:, None] + values[None, :] * (below[None, :] - below[:, None])
        step = np.where(np.tri(len(values), k=-1, dtype=bool).T, step, np.inf)
        before = step.argmin(axis=0)
        chosen = [(*chosen[i], int(value)) for i, value in zip(before, values, strict=True)]
        cost = step.min(axis=0)
        if cost[-1] < best[0]:
            best = (cost[-1], chosen[-1])
    return best[1]


@dataclass(frozen=True)
class Buckets:
    """The closed set: every size is rounded up to one listed here, and nothing else is ever compiled.

    A query with more rows than the largest of `rows` is split over several calls. `tokens` bounds queries x
    (prefix + rows x row_length) of a call, unless one query alone exceeds it; the default keeps a small
    model's activations in a CPU's cache, accelerators want more. A row of T tokens holds at most T /
    `item_length` items. `compile_flops` is the work that one more compilation is worth, by default about a
    second of a CPU; 0 pads as little as possible at any number of compilations.

    Raises:
        ValueError: sizes are empty, below 1 or not ascending, or a bound is out of range.
    """

    prefix: tuple[int, ...] = steps(16, 8192)
    rows: tuple[int, ...] = steps(1, 64)
    row_length: tuple[int, ...] = steps(8, 8192)
    tokens: int = 4096
    item_length: int = 2
    compile_flops: float = 3e11

    def __post_init__(self) -> None:
        for name in ("prefix", "rows", "row_length"):
            sizes = getattr(self, name)
            if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
                raise ValueError(f"Buckets.{name} is {sizes}: give ascending sizes of at least 1")
        for name, least in (("tokens", 1), ("item_length", 1), ("compile_flops", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"Buckets.{name} is {getattr(self, name)}: give at least {least}")

    def __contains__(self, shape: Shape) -> bool:
        """Whether a shape can ever be compiled."""
        if shape.kept and not shape.rows:
            return shape.prefix in self.prefix and shape == prefix_alone(shape.prefix)
        return (
            shape.prefix in self.prefix
            and shape.rows in self.rows
            and shape.row_length in self.row_length
            and shape.embeddings == self.table(shape.embeddings)
            and shape.queries in self.queries(shape)
        )

    def table(self, embeddings: int) -> int:
        """Room for so many embeddings per query: none, or a power of two."""
        return 1 << max(4, (embeddings - 1).bit_length()) if embeddings else 0

    @classmethod
    def fit(
        cls, prefixes: Lengths, items: Sequence[Lengths], *, sizes: int = 4, tokens: int = 4096, **fields: Any
    ) -> "Buckets":
        """Sizes that pad lists like these least: at most so many per axis, the longest always among them.

        Args:
            prefixes: each query's number of prefix tokens.
            items: each query's numbers of tokens per item.
            sizes: how many prefix lengths, row lengths and numbers of items to tell apart.
            tokens: of a call.
            fields: other fields of `Buckets`.

        Raises:
            ValueError: there is no query with items, or a length is 0.
        """
        counts = [len(lengths) for lengths in items if lengths]
        if not counts:
            raise InputError("items has no lists to fit the buckets to: give at least one with an item")
        rows = _best_sizes(counts, sizes)
        lengths = _best_sizes([length for one in items for length in one], sizes)
        # Lists that are cut into even parts, each about as large as a call may be.
        parts = (-(-count // n) for count in rows for n in range(1, count * lengths[-1] // tokens + 2))
        # Rows that several items share, where all are short: whole multiples of the commonest length.
        middle = int(np.median([length for one in items for length in one]))
        shared = (middle * n for n in (2, 4, 8, 16, 32) if middle * n <= 256)
        return cls(
            prefix=_best_sizes(prefixes, sizes),
            rows=tuple(sorted({1, *rows, *parts, *steps(1, rows[-1])})),
            row_length=tuple(sorted({*lengths, *shared})),
            tokens=tokens,
            item_length=min(2, lengths[0]),
            **fields,
        )

    def only(self, shapes: Collection[Shape]) -> "Buckets":
        """No size but those of these shapes, and no compilation that one of them can replace."""
        return replace(
            self,
            prefix=tuple(sorted({shape.prefix for shape in shapes})),
            rows=tuple(sorted({shape.rows for shape in shapes})),
            row_length=tuple(sorted({shape.row_length for shape in shapes})),
            compile_flops=1e18,
        )

    def per_row(self, row_length: int) -> int:
        """How many items a row may hold."""
        return max(1, row_length // self.item_length)

    def slots(self, shape: Shape) -> int:
        """Room for so many items per query."""
        return shape.rows * (self.per_row(shape.row_length) if shape.shared else 1)

    def queries(self, shape: Shape) -> tuple[int, ...]:
        """How many queries a call may hold whose other sizes are those of this shape."""
        return steps(1, max(1, self.tokens // (shape.prefix + shape.rows * shape.row_length)))


class Unit(NamedTuple):
    """Some items of one query, which go through one call together with its prefix."""

    query: int
    items: NDArray
    """int [n], places in the query's list."""
    rows: NDArray
    """int [n], each item's row in the call."""
    columns: NDArray
    """int [n], where in its row each item starts."""
    shape: Shape
    """What these items need; `queries` is 1."""


class Call(NamedTuple):
    """One run of a compiled shape, with at most `shape.queries` units."""

    shape: Shape
    units: list[Unit]


@dataclass(frozen=True)
class Cost:
    """What a decoder's calls cost in FLOPs; masked tokens and keys count, since they are computed too."""

    config: DecoderConfig
    tokens: int
    """`Buckets.tokens`."""
    kept: bool = False
    """Whether prefixes are computed already: a call then only reads their keys and values."""

    def prefix(self, length: int) -> float:
        """A prefix of so many tokens."""
        return 0.0 if self.kept else length * self.token(length)

    def token(self, keys: int) -> float:
        """One token that is compared with so many keys."""
        c = self.config
        linear = 4 * c.width * (c.heads + c.kv_heads) * c.head_dim + 6 * c.width * c.mlp_width
        # Measured on a CPU, the softmax of one score takes the time of some 400 FLOPs of matmul.
        return c.layers * (linear + keys * c.heads * (4 * c.head_dim + 400))

    def tokens_of_query(self, shape: Shape) -> float:
        """One query of a call: its prefix and its rows."""
        rows = shape.rows * shape.row_length * self.token(shape.prefix + shape.row_length)
        return self.prefix(shape.prefix) + rows

    def query(self, shape: Shape) -> float:
        """One query of a call, and its share of what a call costs that is full."""
        share = min(1, (shape.prefix + shape.rows * shape.row_length) / self.tokens)
        return self.tokens_of_query(shape) + _CALL * share


def plan(
    prefixes: Lengths,
    items: Sequence[Lengths],
    *,
    buckets: Buckets,
    config: DecoderConfig,
    compiled: Collection[Shape] = (),
    embeddings: Sequence[Lengths] | None = None,
    kept: Collection[int] = (),
    choices: Collection[tuple[int, "Choice"]] = (),
) -> list[Call]:
    """The calls that score these queries at the least cost, compilation included.

    Args:
        prefixes: each query's number of prefix tokens.
        items: each query's numbers of tokens per item; a query without items needs no call.
        buckets: the closed set.
        config: of the decoder.
        compiled: shapes that cost nothing more to compile.
        embeddings: how many of each item's tokens are embeddings; default: none.
        kept: sizes of `buckets.prefix` for which the prefix's keys and values are given. Calls whose prefixes have one of
            these sizes hold no other size: what is kept is never padded again.
        choices: of `choose`, if they are made already.

    Raises:
        ValueError: a length is 0 or beyond the largest bucket; the message names query and item.
    """
    calls, made = [], dict(choices)
    for size, busy in _by_prefix(prefixes, items, buckets, kept).items():
        known = _known(size, compiled)
        alike, cost = _alike(size, buckets, config)
        choice = made.get(size) or _choose_for(busy, prefixes, items, alike, cost, known)
        found = _plan_alike(busy, prefixes, items, alike, cost, known, embeddings, choice)
        calls += [call._replace(shape=call.shape._replace(kept=cost.kept)) for call in found]
    return calls


class Choice(NamedTuple):
    """How the items of queries are laid out."""

    row_length: int | None
    """What items are packed into; None: one item per row."""
    rows: int
    """The most rows of a query in one call."""


def choose(
    prefixes: Lengths,
    items: Sequence[Lengths],
    *,
    buckets: Buckets,
    config: DecoderConfig,
    compiled: Collection[Shape] = (),
    kept: Collection[int] = (),
) -> tuple[tuple[int, Choice], ...]:
    """For each size of kept prefixes, and 0 for all other queries, what suits lists like these; arguments as for `plan`.

    Making these choices takes most of a plan's time.
    """
    return tuple(
        (size, _choose_for(busy, prefixes, items, *_alike(size, buckets, config), _known(size, compiled)))
        for size, busy in _by_prefix(prefixes, items, buckets, kept).items()
    )


def prefix_sizes(
    prefixes: Lengths, items: Sequence[Lengths], buckets: Buckets, kept: Collection[int]
) -> tuple[int, ...]:
    """For which sizes `choose` makes a choice, ascending; arguments and errors as for `plan`."""
    return tuple(sorted(_by_prefix(prefixes, items, buckets, kept)))


def _known(size: int, compiled: Collection[Shape]) -> set[Shape]:
    """The compiled shapes of calls behind kept prefixes of this size, or (0) of those that compute their prefixes."""
    return {
        shape._replace(kept=False)
        for shape in compiled
        if shape.rows and shape.kept == (size > 0) and size in (0, shape.prefix)
    }


def _by_prefix(
    prefixes: Lengths, items: Sequence[Lengths], buckets: Buckets, kept: Collection[int]
) -> dict[int, list[int]]:
    """Queries that have items, by the size of their prefix where it is kept, 0 for all others.

    Raises:
        ValueError: as `plan`.
    """
    for query, (prefix, lengths) in enumerate(zip(prefixes, items, strict=True)):
        check_length(f"query {query}: its prefix", prefix, buckets.prefix[-1])
        for item, length in enumerate(lengths):
            check_length(f"query {query}, item {item}", length, buckets.row_length[-1])
    groups: dict[int, list[int]] = defaultdict(list)
    for query, lengths in enumerate(items):
        if lengths:
            size = round_up(prefixes[query], buckets.prefix)
            groups[size if size in kept else 0].append(query)
    return groups


def _alike(size: int, buckets: Buckets, config: DecoderConfig) -> tuple[Buckets, Cost]:
    """Buckets and costs of queries whose prefixes are all kept and have this size, or (0) are all computed."""
    return replace(buckets, prefix=(size,)) if size else buckets, Cost(config, buckets.tokens, size > 0)


def _choose_for(
    busy: list[int],
    prefixes: Lengths,
    items: Sequence[Lengths],
    buckets: Buckets,
    cost: Cost,
    compiled: Collection[Shape],
) -> Choice:
    """What suits some of the queries, by a sample of them."""
    sample = busy[:: math.ceil(len(busy) / _SAMPLE)]
    return _choose(
        [prefixes[query] for query in sample],
        [items[query] for query in sample],
        len(busy) / len(sample),
        buckets,
        cost,
        compiled,
    )


def _plan_alike(
    busy: list[int],
    prefixes: Lengths,
    items: Sequence[Lengths],
    buckets: Buckets,
    cost: Cost,
    compiled: Collection[Shape],
    embeddings: Sequence[Lengths] | None,
    choice: Choice,
) -> list[Call]:
    """The calls for some of the queries, whose prefixes are all kept or all computed."""
    most = min(choice.rows, buckets.rows[-1])
    units = [
        unit
        for q in busy
        for unit in _units(
            q,
            prefixes[q],
            _place(items[q], choice.row_length, buckets, None if embeddings is None else embeddings[q]),
            most,
            buckets,
        )
    ]
    return _calls(units, buckets, cost, compiled)


def _choose(
    prefixes: Lengths,
    items: Sequence[Lengths],
    factor: float,
    buckets: Buckets,
    cost: Cost,
    compiled: Collection[Shape],
) -> Choice:
    """What costs a sample of queries least; `factor` is how many there are for each of the sample."""
    known = {shape._replace(queries=1) for shape in compiled}
    tokens, heads, price = sum(map(sum, items)), sum(map(cost.prefix, prefixes)), functools.cache(cost.query)
    best, chosen = math.inf, Choice(None, 1)
    for row_length in (None, *buckets.row_length):
        least = min(prefixes) + (row_length or min(map(min, items)))  # keys that a token meets
        if row_length and factor * (heads + tokens * cost.token(least)) >= best:
            break  # not even without padding, and in longer rows a token meets more keys
        placed = [_place(lengths, row_length, buckets) for lengths in items]
        # Lists of short items are often alike but for what rounding takes away.
        alike = Counter(
            (round_up(prefix, buckets.prefix), tuple(placement.longest), placement.shared)
            for prefix, placement in zip(prefixes, placed, strict=True)
        )
        longest = round_up(min(max(len(p.longest) for p in placed), buckets.rows[-1]), buckets.rows)
        for most in (rows for rows in reversed(buckets.rows) if rows <= longest):
            cut = sum(
                math.ceil(len(rows) / most) * cost.prefix(prefix) * n
                for (prefix, rows, _), n in alike.items()
            )
            if factor * (cut + tokens * cost.token(least)) >= best:
                break  # fewer rows a call compute the prefixes more often still
            counts: dict[Shape, int] = defaultdict(int)
            for (prefix, lengths, shared), queries in alike.items():
                for shape in _shapes(prefix, lengths, None, shared, most, buckets):
                    counts[shape] += queries
            one = functools.reduce(join, counts)
            for shapes in (counts, {one: sum(counts.values())}):
                total = sum(
                    factor * count * price(shape) + buckets.compile_flops * (shape not in known)
                    for shape, count in shapes.items()
                )
                if total < best:
                    # Where no list here was cut, none that is longer need be.
                    best, chosen = total, Choice(row_length, buckets.rows[-1] if most == longest else most)
    return chosen


class _Placement(NamedTuple):
    """A query's items in order of their rows."""

    order: NDArray
    """int [L], places in the query's list."""
    rows: NDArray
    """int [L], ascending."""
    columns: NDArray
    """int [L]."""
    longest: list[int]
    """The length that each row needs, rounded up; ascending."""
    embeddings: NDArray
    """int [rows], how many stand in each row."""
    shared: bool
    """Whether items may share a row."""

    def shapes(self, prefix: int, most: int, buckets: Buckets) -> list[Shape]:
        """What calls of at most `most` rows need, one shape per call, behind a prefix of one of the sizes."""
        return _shapes(prefix, self.longest, self.embeddings, self.shared, most, buckets)


def _shapes(
    prefix: int, longest: Lengths, embeddings: NDArray | None, shared: bool, most: int, buckets: Buckets
) -> list[Shape]:
    """As `_Placement.shapes`; without embeddings if they are None."""
    ends = [*range(most, len(longest), most), len(longest)]
    return [
        Shape(
            1,
            prefix,
            round_up(end - start, buckets.rows),
            longest[end - 1],
            0 if embeddings is None else buckets.table(int(embeddings[start:end].sum())),
            shared,
        )
        for start, end in zip([0, *ends], ends, strict=False)
    ]


def _place(
    lengths: Lengths, row_length: int | None, buckets: Buckets, embeddings: Lengths | None = None
) -> _Placement:
    """Items packed into rows (of the next longer kind where an item needs it), or one per row."""
    sizes = np.asarray(lengths)
    if row_length is None:
        order = np.argsort(sizes, kind="stable")
        rows, columns = np.arange(len(sizes)), np.zeros_like(sizes)
        longest = [round_up(size, buckets.row_length) for size in sizes[order].tolist()]
    else:
        row_length = round_up(max(row_length, *lengths), buckets.row_length)
        found, starts = assign_rows(sizes, row_length, most=buckets.per_row(row_length))
        order = np.argsort(found, kind="stable")
        rows, columns = found[order], starts[order]
        longest = [row_length] * (int(rows[-1]) + 1)
    held = np.zeros(len(longest), np.int64)
    if embeddings is not None:
        np.add.at(held, rows, np.asarray(embeddings)[order])
    return _Placement(order, rows, columns, longest, held, row_length is not None)


def _units(query: int, prefix: int, placement: _Placement, most: int, buckets: Buckets) -> list[Unit]:
    """A query's items, placed and cut into calls of at most so many rows."""
    units = []
    for call, shape in enumerate(placement.shapes(round_up(prefix, buckets.prefix), most, buckets)):
        inside = placement.rows // most == call
        rows = placement.rows[inside] - call * most
        units.append(Unit(query, placement.order[inside], rows, placement.columns[inside], shape))
    return units


def _calls(units: list[Unit], buckets: Buckets, cost: Cost, compiled: Collection[Shape]) -> list[Call]:
    """Units put together into calls of as few shapes as pays off."""
    groups: dict[Shape, list[Unit]] = defaultdict(list)
    for unit in units:
        groups[unit.shape].append(unit)
    known = {shape._replace(queries=1) for shape in compiled}
    for shape in known:
        groups.setdefault(shape, [])

    price = functools.cache(cost.query)

    def total(shape: Shape, count: int) -> float:
        return count * price(shape) + buckets.compile_flops * (count > 0 and shape not in known)

    def gain(one: Shape, two: Shape) -> float:
        n, m = len(groups[one]), len(groups[two])
        return total(one, n) + total(two, m) - total(join(one, two), n + m)

    # As long as it pays, the two groups that gain most share the smallest shape that holds both.
    gains = {(a, b): gain(a, b) for a, b in itertools.combinations(groups, 2) if groups[a] or groups[b]}
    while gains and gains[pair := max(gains, key=lambda p: gains[p])] > 0:
        shape = join(*pair)
        changed = {*pair, shape}
        members = [unit for one in changed for unit in groups.pop(one, [])]
        gains = {p: g for p, g in gains.items() if changed.isdisjoint(p)}
        others = list(groups)
        groups[shape] = members
        gains |= {(shape, other): gain(shape, other) for other in others}

    calls = []
    for shape, members in groups.items():
        if members:
            queries = _queries(shape, len(members), buckets, cost, compiled)
            for start in range(0, len(members), queries):
                calls.append(Call(shape._replace(queries=queries), members[start : start + queries]))
    return calls


def _queries(shape: Shape, count: int, buckets: Buckets, cost: Cost, compiled: Collection[Shape]) -> int:
    """How many queries each call should hold, so that `count` of them cost least."""

    def total(queries: int) -> float:
        new = shape._replace(queries=queries) not in compiled
        call = queries * cost.tokens_of_query(shape) + _CALL
        return math.ceil(count / queries) * call + new * buckets.compile_flops

    return min(reversed(buckets.queries(shape)), key=total)


def join(one: Shape, two: Shape) -> Shape:
    """The smallest shape that holds what either holds."""
    queries, prefix, rows, row_length, embeddings = map(max, one[:5], two[:5])
    return Shape(
        queries, prefix, rows, row_length, embeddings, one.shared or two.shared, one.kept or two.kept
    )


def prefix_alone(length: int) -> Shape:
    """The shape of the call that computes one prefix to be kept."""
    return Shape(1, length, 0, 0, kept=True)


def round_up(size: int, sizes: tuple[int, ...]) -> int:
    """The smallest of the ascending sizes that is large enough."""
    return sizes[bisect.bisect_left(sizes, size)]


def check_length(what: str, length: int, limit: int) -> None:
    if not 1 <= length <= limit:
        raise ValueError(f"{what} has {length} tokens: give 1 to {limit}, the largest of the Buckets")
