"""Scoring by prefill: the query's prefix once, its items packed beside it, fp32 label logits out.

An item's score is the same alone, batched, packed in any order and with any padding (fp32: log-odds within
1e-4 of the plain causal pass over prefix + item). Training, evaluation and serving all call this.

Axes: B queries, P prefix tokens, R rows per query, T tokens per row, L items per query, D width, C labels.
"""

import functools
import itertools
import math
import os
import threading
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import DTypeLike, NDArray

from jaxsearch.errors import InputError
from jaxsearch.models.attention import LastOfRows, OnePass, PrefixPacked, check_backend, prefill
from jaxsearch.models.decoder import Decoder, DecoderConfig, unstack
from jaxsearch.models.int8 import int8_weights
from jaxsearch.numerics import wide
from jaxsearch.scoring.buckets import (
    Buckets,
    Call,
    Choice,
    Shape,
    Unit,
    check_length,
    choose,
    join,
    plan,
    prefix_alone,
    prefix_sizes,
    round_up,
    steps,
)
from jaxsearch.scoring.packing import Array, EmbeddedItem, Item, PackedItems, count_embeddings, place_items
from jaxsearch.scoring.prefix_cache import PrefixCache, PrefixCacheConfig
from jaxsearch.training.sharding import AXES, parameter_shardings, replicated

__all__ = [
    "Buckets",
    "PrefillScorer",
    "Prefix",
    "PrefixCacheConfig",
    "Scorer",
    "answer_hidden",
    "answer_hidden_at_once",
    "answer_hidden_behind",
    "pad_prefixes",
    "prefix_state",
    "read_labels",
    "score",
    "score_at_once",
    "steps",
    "use_compilation_cache",
]


class Scorer(Protocol):
    """What can be scored with: a decoder and the rows its last hidden state is multiplied by."""

    decoder: Decoder

    def label_matrix(self) -> jax.Array:
        """fp32 [C, D]: label tokens' rows of the unembedding, then one row per action."""


class Prefix(NamedTuple):
    """The prefixes of several queries, left-aligned."""

    tokens: Array
    """int32 [B, P], 0 where padded."""
    where: Array
    """bool [B, P], the tokens that exist."""


def pad_prefixes(
    prefixes: Sequence[Sequence[int]], *, length: int | None = None, queries: int | None = None
) -> Prefix:
    """Prefixes side by side, padded to `length` tokens (default: the longest) and `queries` rows.

    Raises:
        ValueError: a prefix is empty or longer than `length`; the message names the query.
    """
    sizes = [len(prefix) for prefix in prefixes]
    width = max(sizes, default=1) if length is None else length
    for query, size in enumerate(sizes):
        if not 1 <= size <= width:
            raise ValueError(f"prefix of query {query} has {size} tokens: give 1 to {width}")
    tokens = np.zeros((len(prefixes) if queries is None else queries, width), np.int32)
    where = np.zeros(tokens.shape, bool)
    for query, prefix in enumerate(prefixes):
        tokens[query, : len(prefix)] = prefix
        where[query, : len(prefix)] = True
    return Prefix(tokens, where)


def prefix_shape(queries: int, length: int) -> Prefix:
    """`jax.ShapeDtypeStruct`s of prefixes [B, P]."""
    shapes: list[Any] = [jax.ShapeDtypeStruct((queries, length), dtype) for dtype in (np.int32, np.bool_)]
    return Prefix(*shapes)


def answer_hidden(
    decoder: Decoder,
    prefix_tokens: Array,
    prefix_where: Array,
    items: PackedItems,
    back: Array | None = None,
    *,
    backend: str = "xla",
    alone: bool = False,
) -> jax.Array:
    """The hidden state at each item's last token, where its answer is read; differentiable.

    Args:
        decoder: the decoder.
        prefix_tokens: int [B, P], at least one token per query that has items.
        prefix_where: bool [B, P], the tokens that exist, left-aligned.
        items: of B queries.
        back: int [B, L, J], read J places of each item instead, each so many tokens before its last one.
        backend: of the items' attention, see `jaxsearch.models.attention.PrefixPacked`.
        alone: each row holds one item, from its first column on; a training step then uses the decoder's backend.

    Returns:
        [B, L, D] or [B, L, J, D] in the compute dtype, after the final norm; 0 where there is no item.
    """
    where, segments = jnp.asarray(prefix_where), jnp.asarray(items.segments)
    positions = jnp.broadcast_to(jnp.arange(where.shape[1])[None], where.shape)
    x = decoder.embed(jnp.asarray(prefix_tokens))
    _, state = decoder(x, positions, decoder.causal(where, keep_kv=True))

    x = embed_items(decoder, items)
    positions = jnp.sum(where, axis=1)[:, None, None] + items.offsets
    backend = decoder.training_backend(segments.shape[-1]) if alone and backend == "xla" else backend
    hidden, _ = decoder(x, positions, PrefixPacked(where, segments, backend, alone), state)
    batch = jnp.arange(where.shape[0])[:, None]
    row, column, exists = items.last[..., 0], items.last[..., 1], jnp.asarray(items.where)
    if back is None:
        return jnp.where(exists[..., None], hidden[batch, row, column], 0)
    answers = hidden[batch[..., None], row[..., None], column[..., None] - back]
    return jnp.where(exists[..., None, None], answers, 0)


def answer_hidden_at_once(
    decoder: Decoder, prefix: Prefix, items: PackedItems, *, alone: bool, backend: str = "xla"
) -> jax.Array:
    """As `answer_hidden`, prefix and items in one pass over the layers: for inference on one device.

    Args:
        decoder: the decoder.
        prefix: of B queries.
        items: of B queries.
        alone: item l has row l to itself, from its first column on (L is R). The last layer is then computed for the answers
            alone, and no segment is compared with another.
        backend: of the items' attention.
    """
    return _answers(decoder, prefix.where, items, prefix.tokens, None, alone, backend)


def answer_hidden_behind(
    decoder: Decoder, state: Any, where: Array, items: PackedItems, *, alone: bool, backend: str = "xla"
) -> jax.Array:
    """As `answer_hidden_at_once`, behind prefixes that are computed already: only the items pass through the layers.

    Args:
        decoder: the decoder.
        state: of the prefixes, from `prefix_state`.
        where: bool [B, P], the prefix tokens that exist, left-aligned.
        items: of B queries.
        alone: as in `answer_hidden_at_once`.
        backend: of the items' attention.
    """
    return _answers(decoder, where, items, None, state, alone, backend)


def _answers(
    decoder: Decoder,
    where: Array,
    items: PackedItems,
    prefix_tokens: Array | None,
    state: Any,
    alone: bool,
    backend: str,
) -> jax.Array:
    """Prefixes by their tokens int [B, P] or by their state, and items, to hidden states [B, L, D]."""
    where, last = jnp.asarray(where), jnp.asarray(items.last)
    queries, width = where.shape
    rows, length = items.tokens.shape[1:]
    x = embed_items(decoder, items).reshape(queries, rows * length, -1)
    positions = (jnp.sum(where, axis=1)[:, None, None] + items.offsets).reshape(queries, -1)
    tokens, below = last[..., 0] * length + last[..., 1], width + length
    if prefix_tokens is not None:
        x = jnp.concatenate([decoder.embed(jnp.asarray(prefix_tokens)), x], axis=1)
        ahead = jnp.broadcast_to(jnp.arange(width)[None], where.shape)
        positions, tokens = jnp.concatenate([ahead, positions], axis=1), tokens + width
    segments = None if alone and backend == "xla" else jnp.asarray(items.segments)
    together = OnePass(where, segments, rows, backend)
    if alone:
        answers = LastOfRows(where, last[..., 1])
        hidden = decoder.hidden_at(x, positions, together, tokens, answers, below=below, state=state)
    else:
        hidden, _ = decoder(x, positions, together, state, below=below)
        hidden = hidden[jnp.arange(queries)[:, None], tokens]
    return jnp.where(jnp.asarray(items.where)[..., None], hidden, 0)


def prefix_state(decoder: Decoder, tokens: Array) -> Any:
    """Keys and values [layers, B, P, K, H] of prefixes int [B, P], left-aligned, in the compute dtype; for inference.

    Where the parameters are unstacked, a tuple over layers of [B, P, K, H].
    """
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    return decoder(decoder.embed(tokens), positions, prefill, below=tokens.shape[1])[1]


def embed_items(decoder: Decoder, items: PackedItems) -> jax.Array:
    """Token embeddings [B, R, T, D], and in place of some of them the items' own."""
    x = decoder.embed(jnp.asarray(items.tokens))
    if items.embeddings is None or items.embedded is None:
        return x
    table, index = jnp.asarray(items.embeddings), jnp.asarray(items.embedded)
    batch = jnp.arange(index.shape[0])[:, None, None]
    own = table[batch, jnp.maximum(index, 0)].astype(x.dtype)
    return jnp.where((index >= 0)[..., None], own, x)


def score(
    scorer: Scorer,
    prefix_tokens: Array,
    prefix_where: Array,
    items: PackedItems,
    *,
    backend: str = "xla",
    alone: bool = False,
) -> jax.Array:
    """Label logits of every item, fp32 [B, L, C]; 0 where there is no item. Arguments as `answer_hidden`."""
    hidden = answer_hidden(scorer.decoder, prefix_tokens, prefix_where, items, backend=backend, alone=alone)
    return read_labels(scorer, hidden)


def score_at_once(
    scorer: Scorer, prefix: Prefix, items: PackedItems, *, alone: bool, backend: str = "xla"
) -> jax.Array:
    """As `score`, prefix and items in one pass over the layers. Arguments as `answer_hidden_at_once`."""
    hidden = answer_hidden_at_once(scorer.decoder, prefix, items, alone=alone, backend=backend)
    return read_labels(scorer, hidden)


def read_labels(scorer: Scorer, hidden: jax.Array) -> jax.Array:
    """Label logits fp32 [..., C] of hidden states [..., D]: the label rows alone, never the vocabulary."""
    return jnp.einsum("...D,CD->...C", hidden.astype(wide()), scorer.label_matrix(), precision="highest")


Choices = tuple[tuple[int, Choice], ...]
"""Of `jaxsearch.scoring.buckets.choose`."""
_Arrays = TypeVar("_Arrays", Prefix, PackedItems)
# Requests of MixLM are alike but for their numbers: planning 250 items takes longer than looking the plan up.
_plan = functools.lru_cache(maxsize=32)(plan)
MOST_REPEATS = 1024
"""A scorer that is not settled expects about as many requests of a size as it has had, up to so many, and compiles what pays off then."""


class PrefillScorer:
    """Scores lists of any lengths through a closed set of compiled shapes.

    Items go one per row, or several per row where that costs the model less; more candidates than fit are
    split; several queries share a call (`jaxsearch.scoring.buckets.plan`). Scores depend on none of it, nor on whether a
    prefix was kept from an earlier call (`PrefixCacheConfig`).
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        buckets: Buckets | None = None,
        backend: str = "xla",
        mesh: Mesh | None = None,
        unrolled: bool = False,
        int8: bool = False,
        prefix_cache: PrefixCacheConfig | None = None,
        requests: int = 1,
    ):
        """Hold the scorer's weights as they are now; `update` brings later ones.

        Args:
            scorer: what scores.
            buckets: the closed set of shapes.
            backend: of the items' attention, one of `jaxsearch.models.attention.BACKENDS`.
            mesh: devices with axes `data`, `fsdp` and `tensor`: queries, or the rows of a query where `data` does
                not divide the queries, are split over `data`, weights as in training. Needs the backend "xla".
                Default: one device.
            unrolled: compile each layer on its own: faster calls on a CPU, slower compilation (see
                `jaxsearch.models.decoder.unstack`).
            int8: hold the layers' matrices in eight bits (see `jaxsearch.models.int8`); needs the package qwix.
            prefix_cache: which prefixes are kept from call to call, and how many; not with a mesh. Default: none.
            requests: how many like each are expected at least. The more there are, the sooner a shape of their own is worth
                compiling. Unless `settle` or `warm_up` chose the shapes, about as many of a size as came are expected again, up to
                `MOST_REPEATS`.

        Raises:
            InputError: `requests` is below 1, the backend is unknown, or cannot be split over a mesh, which has other axes;
                `prefix_cache` is something else.
        """
        check_backend(backend)
        if requests < 1:
            raise InputError(f"requests is {requests}: give at least 1")
        if mesh is not None and (not isinstance(mesh, Mesh) or set(mesh.axis_names) != set(AXES)):
            raise InputError(
                f"mesh is {mesh!r}: give a mesh with the axes {', '.join(AXES)}, as of `make_mesh`"
            )
        if prefix_cache is not None and not isinstance(prefix_cache, PrefixCacheConfig):
            raise InputError(
                f"prefix_cache is {prefix_cache!r}: give a PrefixCacheConfig, such as PrefixCacheConfig(max_bytes=1 << 30)"
            )
        if mesh is not None and backend != "xla":
            raise InputError(f"backend {backend!r} runs on one device: use 'xla' with a mesh")
        cache_config = PrefixCacheConfig() if prefix_cache is None else prefix_cache
        # Prefixes kept on a mesh would need their keys and values split as each shape splits its queries or rows.
        for name, value in (("unrolled", unrolled), ("int8", int8), ("prefix_cache", cache_config.max_bytes)):
            if mesh is not None and value:
                raise InputError(f"{name} is {value} with a mesh: this runs on one device")
        self.buckets = Buckets() if buckets is None else buckets
        self.config: DecoderConfig = scorer.decoder.config
        self.backend, self.usage, self._mesh = backend, Usage(), mesh
        self.prefix_cache = PrefixCache(cache_config, self.config)
        self._unrolled, self._int8 = unrolled, int8
        # Held while prefixes are looked up and used: `update` must not come between the weights and what they made.
        self._lock = threading.Lock()
        self._graphdef, state = nnx.split(scorer)
        self._signature = _signature(state)
        self._state = self._place(_snapshot(state))
        labels = jax.eval_shape(lambda state: nnx.merge(self._graphdef, state).label_matrix(), self._state)
        self.labels: int = labels.shape[0]
        self._programs: dict[Shape, jax.stages.Compiled] = {}
        self._settled: tuple[tuple[Shape, ...], Choices] | None = None
        self._warm: tuple[Shape, ...] = ()
        self._expected = requests
        self._seen: Counter[tuple[int, ...]] = Counter()
        self._choices: dict[tuple[int, ...], tuple[int, Choices]] = {}

    def _place(self, state: nnx.State) -> nnx.State:
        """The weights on the mesh, or where they are."""
        state = int8_weights(state) if self._int8 else state
        if self._mesh is None:
            return unstack(state) if self._unrolled else state
        shardings = parameter_shardings(state, self._mesh)
        pure = jax.device_put(nnx.to_pure_dict(state), shardings)
        nnx.replace_by_pure_dict(state, pure)
        return state

    def program(self, shape: Shape) -> jax.stages.Compiled:
        """The compiled call of a shape: weights, one int32 buffer and one of embeddings in, logits [B, L, C] out.

        Behind kept prefixes the states of B prefixes are a further argument; the prefix alone takes weights and a buffer,
        and gives its state.
        """
        if shape not in self._programs:
            self._programs[shape] = self.compile(shape)
        return self._programs[shape]

    def compile(self, shape: Shape) -> jax.stages.Compiled:
        """As `program`, but neither kept nor counted."""
        if shape.kept and not shape.rows:
            tokens = jax.ShapeDtypeStruct((shape.queries, shape.prefix), np.int32)
            return jax.jit(self._prefix_state).lower(self._state, tokens).compile()
        layout = _layout(shape, self.buckets.slots(shape))

        def run(state: nnx.State, buffer: jax.Array, table: jax.Array | None, *kept: Any) -> jax.Array:
            prefix, items = _unflatten(buffer, layout)
            if table is not None:
                items = items._replace(embeddings=table)
            prefix, items = self._split(prefix), self._split(items)
            scorer = nnx.merge(self._graphdef, state)
            if kept:
                prefixes = jax.tree.map(lambda *x: jnp.concatenate(x, axis=-4), *kept)
                hidden = answer_hidden_behind(
                    scorer.decoder,
                    prefixes,
                    prefix.where,
                    items,
                    alone=not shape.shared,
                    backend=self.backend,
                )
                return read_labels(scorer, hidden)
            if self._mesh is not None:
                return score(scorer, prefix.tokens, prefix.where, items, backend=self.backend)
            return score_at_once(scorer, prefix, items, alone=not shape.shared, backend=self.backend)

        def spec(size: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(size, dtype, sharding=self._everywhere())

        buffer = spec((sum(math.prod(size) for _, size in layout),), np.int32)
        table = (shape.queries, shape.embeddings, self.config.width)
        embeddings = spec(table, self.config.dtype) if shape.embeddings else None
        kept = []
        if shape.kept:
            tokens = jax.ShapeDtypeStruct((1, shape.prefix), np.int32)
            kept = [jax.eval_shape(self._prefix_state, self._state, tokens)] * shape.queries
        jitted = jax.jit(run, out_shardings=self._everywhere())
        return jitted.lower(self._state, buffer, embeddings, *kept).compile()

    def _prefix_state(self, state: nnx.State, tokens: jax.Array) -> Any:
        return prefix_state(nnx.merge(self._graphdef, state).decoder, tokens)

    def _everywhere(self) -> NamedSharding | None:
        return None if self._mesh is None else replicated(self._mesh)

    def _split(self, arrays: _Arrays) -> _Arrays:
        """Arrays of queries, split over the mesh's data axis by query or, of one query's rows, by row."""
        mesh = self._mesh
        if mesh is None:
            return arrays
        size = mesh.shape["data"]

        def split(x: jax.Array, name: str) -> jax.Array:
            by_row = name in ("tokens", "segments", "offsets", "embedded") and x.ndim == 3
            if x.shape[0] % size == 0:
                spec = PartitionSpec("data")
            else:
                spec = PartitionSpec(None, "data") if by_row and x.shape[1] % size == 0 else PartitionSpec()
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

        named = {name: x for name, x in arrays._asdict().items() if x is not None}
        return arrays._replace(**{name: split(jnp.asarray(x), name) for name, x in named.items()})

    def warm_up(
        self, prefixes: Sequence[Sequence[int]], items: Sequence[Sequence[Item]]
    ) -> tuple[Shape, ...]:
        """Compile what lists like these need, and nothing else from then on: before the first request.

        The shapes are those of each list alone and of all together, laid out alike, and one that holds the longest prefix with the
        most rows of the longest items; of prefixes that are kept, one for each length that they are padded to, and one
        that computes them. Whatever is longer is refused from then on.

        Args:
            prefixes: as in `score_lists`.
            items: as in `score_lists`; with embeddings only if some item has them here.

        Returns:
            The shapes; `compiled_shapes` stays the same afterwards.
        """
        lists = list(zip(prefixes, items, strict=True))
        worth = self._worth(self._expected)
        choices = self._choose(prefixes, items, (), worth)
        calls = self._plan(prefixes, items, (), choices, worth)
        for prefix, candidates in lists:
            calls += self._plan([prefix], [candidates], [call.shape for call in calls], choices, worth)
        if not calls:
            raise InputError("there is nothing to warm up with: give at least one list with an item")
        shapes = list(dict.fromkeys(call.shape for call in calls))
        largest = functools.reduce(join, shapes)._replace(queries=1, embeddings=0)
        sizes = sorted({shape.prefix for shape in shapes if shape.kept})
        ends = [largest._replace(prefix=size, kept=True) for size in sizes]
        if plain := [shape.prefix for shape in shapes if not shape.kept]:
            ends.append(largest._replace(prefix=max(plain), kept=False))
        wanted = list(map(prefix_alone, sizes))
        if not all(shape.embeddings for shape in shapes):
            wanted += ends
        if any(shape.embeddings for shape in shapes):
            room = self.buckets.table(largest.rows * largest.row_length)
            wanted += [end._replace(embeddings=room) for end in ends]
        shapes = list(dict.fromkeys([*shapes, *wanted]))
        for shape in shapes:
            self.program(shape)
        self.buckets = self.buckets.only([shape for shape in shapes if shape.rows])
        self._warm = tuple(shapes)
        self._settled = self._warm, choices
        return self.compiled_shapes

    @property
    def compiled_shapes(self) -> tuple[Shape, ...]:
        """Every compilation so far, in order; each is in `buckets` and none occurs twice."""
        return tuple(self._programs)

    def update(self, scorer: Scorer) -> None:
        """Take over the weights of a scorer of the same architecture, such as a later step's; no compilation. Kept prefixes go.

        Raises:
            ValueError: parameters differ in name, shape or dtype.
        """
        state = _snapshot(nnx.state(scorer))
        if _signature(state) != self._signature:
            raise ValueError(
                "scorer has other parameters than the one compiled for: build a new PrefillScorer"
            )
        placed = self._place(state)
        with self._lock:
            self._state = placed
            self.prefix_cache.clear()

    def prefill_prefix(self, tokens: Sequence[int]) -> None:
        """Compute and keep a prefix ahead of its items, such as while their candidates are still being searched for.

        Returns at once, while the device works. Nothing happens where the prefix is kept already, or is too short to be
        kept (`PrefixCacheConfig.min_tokens`). Any thread may call it.

        Args:
            tokens: token ids of the prefix, as in `score_lists`.

        Raises:
            ValueError: the prefix is empty or longer than the largest bucket, or a token id lies outside the vocabulary.
            InputError: this scorer keeps no prefixes.
        """
        if not self.prefix_cache.config.max_bytes:
            raise InputError(
                "this scorer keeps no prefixes: give it prefix_cache=PrefixCacheConfig(max_bytes=...)"
            )
        check_length("the prefix", len(tokens), self.buckets.prefix[-1])
        length = round_up(len(tokens), self.buckets.prefix)
        if self.prefix_cache.keeps(length):
            with self._lock:
                if self.prefix_cache.get(tokens, length) is None:
                    self._keep(tokens, length)

    def _keep(self, tokens: Sequence[int], length: int) -> Any:
        """Compute and keep a prefix, padded to `length`; its state."""
        padded = pad_prefixes([tokens], length=length).tokens
        self._check_tokens(padded, ["the prefix"])
        state = self.program(prefix_alone(length))(self._state, jax.device_put(padded))
        self.prefix_cache.put(tokens, length, state)
        self.usage.add_prefix(len(tokens), length)
        return state

    def settle(self, prefixes: Sequence[Sequence[int]], items: Sequence[Sequence[Item]]) -> None:
        """Choose the shapes for lists like these and how items are laid out, and from now on plan as if exactly these were compiled.

        The same lists then give the same bits, whatever was scored before them and in whichever process: what a
        resumable job needs. Without it shapes that happen to be compiled are preferred.

        Args:
            prefixes: as in `score_lists`.
            items: as in `score_lists`.
        """
        worth = self._worth(self._expected)
        choices = self._choose(prefixes, items, self._warm, worth)
        calls = self._plan(prefixes, items, self._warm, choices, worth)
        self._settled = tuple(dict.fromkeys([*self._warm, *(call.shape for call in calls)])), choices

    def _plan(
        self,
        prefixes: Sequence[Sequence[int]],
        items: Sequence[Sequence[Item]],
        compiled: Sequence[Shape],
        choices: Choices,
        buckets: Buckets,
    ) -> list[Call]:
        embeddings = tuple(tuple(count_embeddings(candidates)) for candidates in items)
        found = _plan(
            *_lengths(prefixes, items),
            buckets=buckets,
            config=self.config,
            compiled=tuple(compiled),
            embeddings=embeddings if any(map(any, embeddings)) else None,
            kept=self._kept_sizes(),
            choices=choices,
        )
        return list(found)

    def _worth(self, requests: int) -> Buckets:
        """The closed set, where so many requests share the price of a compilation."""
        return replace(self.buckets, compile_flops=self.buckets.compile_flops / requests)

    def _kept_sizes(self) -> tuple[int, ...]:
        return tuple(filter(self.prefix_cache.keeps, self.buckets.prefix))

    def _choose(
        self,
        prefixes: Sequence[Sequence[int]],
        items: Sequence[Sequence[Item]],
        compiled: Sequence[Shape],
        buckets: Buckets,
    ) -> Choices:
        return choose(
            *_lengths(prefixes, items),
            buckets=buckets,
            config=self.config,
            compiled=compiled,
            kept=self._kept_sizes(),
        )

    def _plan_request(self, prefixes: Sequence[Sequence[int]], items: Sequence[Sequence[Item]]) -> list[Call]:
        """The calls of a request: by what is settled, or else by what requests have been so far.

        Were each request planned as if it were the last, a shape that suits the first one would never pay off to be compiled for
        the thousands that follow, though all of them were padded to another.
        """
        if self._settled is not None:
            shapes, choices = self._settled
            return self._plan(prefixes, items, shapes, choices, self.buckets)
        heads, lengths = _lengths(prefixes, items)
        groups = prefix_sizes(heads, lengths, self.buckets, self._kept_sizes())
        if not groups:
            return []
        # Requests of about one size share their choices, which are made again whenever a compilation has become worth more.
        sizes = (
            len(items),
            max(map(len, lengths)),
            max(map(max, filter(None, lengths))),
            sum(map(sum, lengths)),
        )
        key = (*groups, *(size.bit_length() for size in (*sizes, max(heads))))
        repeats = max(self._expected, min(1 << self._seen[key].bit_length(), MOST_REPEATS))
        self._seen[key] += 1
        worth, shapes = self._worth(repeats), self.compiled_shapes
        known = self._choices.get(key)
        if known is None or known[0] != repeats:
            known = self._choices[key] = repeats, self._choose(prefixes, items, shapes, worth)
        return self._plan(prefixes, items, shapes, known[1], worth)

    def score_lists(
        self, prefixes: Sequence[Sequence[int]], items: Sequence[Sequence[Item]]
    ) -> list[NDArray[np.float32]]:
        """Label logits of every query's items.

        Args:
            prefixes: prefixes[query] is a sequence of at least one token id.
            items: items[query][item] is a sequence of at least one token id, or an `EmbeddedItem`; a query may
                have no items.

        Returns:
            One fp32 array [L of the query, C] per query.

        Raises:
            ValueError: a prefix or an item is empty or longer than the largest bucket, a token id lies outside
                the vocabulary, or an embedding has another width than the decoder; the message names the query.
            FloatingPointError: a score is NaN or infinite; the message names the query and the first such
                item (a NaN spreads to the items that share its row, never to another query).
        """
        if len(prefixes) != len(items):
            raise ValueError(
                f"items has {len(items)} lists: prefixes has {len(prefixes)}, give one per query"
            )
        self._check_widths(items)
        calls = self._plan_request(prefixes, items)
        found = [np.zeros((len(candidates), self.labels), np.float32) for candidates in items]
        running: deque[tuple[list[Unit], jax.Array]] = deque()
        for call in calls:
            program = self.program(call.shape)
            buffers = jax.device_put(self._buffers(call, prefixes, items), self._everywhere())
            with self._lock:
                states = self._states(call, prefixes) if call.shape.kept else []
                running.append((call.units, program(self._state, *buffers, *states)))
            if len(running) > 1:  # one call runs while the next is packed
                _collect(*running.popleft(), found)
        for units, logits in running:
            _collect(units, logits, found)
        self.usage.add(prefixes, items, calls)
        return found

    def _states(self, call: Call, prefixes: Sequence[Sequence[int]]) -> list[Any]:
        """The state of each query's prefix in a call behind kept prefixes, computed where it is not kept yet."""
        found: dict[int, Any] = {}
        for query in dict.fromkeys(unit.query for unit in call.units):
            state = self.prefix_cache.get(prefixes[query], call.shape.prefix)
            self.usage.prefix_hits += state is not None
            self.usage.prefix_misses += state is None
            if state is None:
                state = self._keep(prefixes[query], call.shape.prefix)
            found[query] = state
        states = [found[unit.query] for unit in call.units]
        return states + states[:1] * (call.shape.queries - len(states))

    def _check_tokens(self, tokens: Array, names: Sequence[str]) -> None:
        """Token ids int [B, ...] of the queries so named lie in the vocabulary."""
        bad = np.argwhere((tokens < 0) | (tokens >= self.config.vocab_size))
        if bad.size:
            raise ValueError(
                f"{names[bad[0][0]]} has token id {tokens[tuple(bad[0])]}: "
                f"the vocabulary ends at {self.config.vocab_size - 1}"
            )

    def _check_widths(self, items: Sequence[Sequence[Item]]) -> None:
        for query, candidates in enumerate(items):
            for number, item in enumerate(candidates):
                if isinstance(item, EmbeddedItem) and item.embeddings.shape[1] != self.config.width:
                    raise InputError(
                        f"query {query}, item {number} has embeddings of width {item.embeddings.shape[1]}: "
                        f"give {self.config.width}, the decoder's"
                    )

    def _buffers(
        self, call: Call, prefixes: Sequence[Sequence[int]], items: Sequence[Sequence[Item]]
    ) -> tuple[NDArray, NDArray | None]:
        """One call's numbers, padded to its shape: all integers in one buffer, which is one transfer."""
        shape, units = call
        empty = shape.queries - len(units)
        nowhere = np.zeros(0, np.int64)
        packed = place_items(
            [[items[unit.query][i] for i in unit.items] for unit in units] + [[]] * empty,
            [(unit.rows, unit.columns) for unit in units] + [(nowhere, nowhere)] * empty,
            row_length=shape.row_length,
            rows=shape.rows,
            slots=self.buckets.slots(shape),
            embeddings=shape.embeddings,
            width=self.config.width,
            dtype=self.config.dtype,
        )
        prefix = pad_prefixes(
            [prefixes[unit.query] for unit in units], length=shape.prefix, queries=shape.queries
        )
        names = [f"query {unit.query}" for unit in units]
        for tokens in (prefix.tokens, packed.tokens):
            self._check_tokens(tokens, names)
        named = prefix._asdict() | {f"items.{name}": x for name, x in packed._asdict().items()}
        parts = [named[name].reshape(-1) for name, _ in _layout(shape, self.buckets.slots(shape))]
        table = None if packed.embeddings is None else np.asarray(packed.embeddings)
        return np.concatenate(parts, dtype=np.int32), table


@dataclass
class Usage:
    """What was scored, and what was computed for it."""

    calls: int = 0
    tokens: int = 0
    """Tokens of prefixes, each once, and of items. Of prefixes that are kept, once each time that they are computed."""
    computed: int = 0
    """With padding, and with prefixes that were computed again because their items did not fit one call."""
    prefix_hits: int = 0
    """How often a call found a prefix among those kept."""
    prefix_misses: int = 0
    """How often it had to be computed then, of those long enough to be kept."""

    def add(
        self, prefixes: Sequence[Sequence[int]], items: Sequence[Sequence[Item]], calls: Sequence[Call]
    ) -> None:
        """Count one request."""
        self.calls += len(calls)
        kept = {unit.query for shape, units in calls if shape.kept for unit in units}
        for query, (prefix, candidates) in enumerate(zip(prefixes, items, strict=True)):
            own = len(prefix) if query not in kept else 0
            self.tokens += (own + sum(map(len, candidates))) if candidates else 0
        for shape, _ in calls:
            head = 0 if shape.kept else shape.prefix
            self.computed += shape.queries * (head + shape.rows * shape.row_length)

    def add_prefix(self, tokens: int, computed: int) -> None:
        """Count a prefix that was computed to be kept."""
        self.tokens += tokens
        self.computed += computed

    @property
    def padding(self) -> float:
        """Share of the computed tokens that nobody asked for."""
        return 1 - self.tokens / self.computed if self.computed else 0.0


def _lengths(
    prefixes: Sequence[Sequence[int]], items: Sequence[Sequence[Item]]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Each query's number of prefix tokens, and of tokens per item."""
    return tuple(map(len, prefixes)), tuple(tuple(map(len, candidates)) for candidates in items)


def use_compilation_cache(folder: str | os.PathLike[str]) -> None:
    """Keep compiled programs in a folder, for this process and later ones: a restart then warms up in seconds."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _layout(shape: Shape, slots: int) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of each array in a call's buffer, in order."""
    prefix, rows = (shape.queries, shape.prefix), (shape.queries, shape.rows, shape.row_length)
    layout = [("tokens", prefix), ("where", prefix), ("items.tokens", rows), ("items.segments", rows)]
    layout += [("items.offsets", rows), ("items.last", (shape.queries, slots, 2))]
    layout += [("items.where", (shape.queries, slots))]
    return [*layout, ("items.embedded", rows)] if shape.embeddings else layout


def _unflatten(
    buffer: jax.Array, layout: Sequence[tuple[str, tuple[int, ...]]]
) -> tuple[Prefix, PackedItems]:
    """The arrays of a buffer."""
    ends = list(itertools.accumulate(math.prod(size) for _, size in layout))
    parts = zip(layout, [0, *ends], ends, strict=False)
    arrays = {name: buffer[start:end].reshape(size) for (name, size), start, end in parts}
    arrays |= {name: x > 0 for name, x in arrays.items() if name.endswith("where")}
    inner = {name.removeprefix("items."): x for name, x in arrays.items() if name.startswith("items.")}
    return Prefix(arrays["tokens"], arrays["where"]), PackedItems(**inner)


def _snapshot(state: nnx.State) -> nnx.State:
    """The same arrays in variables of their own: training the module on does not change them."""
    return jax.tree.map(lambda x: x, state)


def _signature(state: nnx.State) -> dict[tuple, tuple]:
    """Shape and dtype of every parameter."""
    return {path: (value.shape, value.dtype) for path, value in nnx.to_flat_state(state)}


def _collect(units: list[Unit], logits: jax.Array, found: list[NDArray[np.float32]]) -> None:
    """Write one call's logits [B, L, C] to their places.

    Raises:
        FloatingPointError: one of them is NaN or infinite.
    """
    for unit, values in zip(units, np.asarray(logits), strict=False):
        values = values[: len(unit.items)]
        if not np.isfinite(values).all():
            item, label = np.argwhere(~np.isfinite(values))[0]
            raise FloatingPointError(
                f"query {unit.query}, item {unit.items[item]}: the logit of label {label} is "
                f"{values[item, label]}; look for NaN in the weights"
            )
        found[unit.query][unit.items] = values
