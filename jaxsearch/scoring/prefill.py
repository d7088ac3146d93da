"""Scoring by prefill: the query's prefix once, its items packed beside it, fp32 label logits out.

An item's score is the same alone, batched, packed in any order and with any padding (fp32: log-odds within
1e-4 of the plain causal pass over prefix + item). Training, evaluation and serving all call this.

Axes: B queries, P prefix tokens, R rows per query, T tokens per row, L items per query, D width, C labels.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from jaxsearch.errors import InputError
from jaxsearch.models.attention import Causal, PrefixPacked, check_backend
from jaxsearch.models.decoder import Decoder, DecoderConfig
from jaxsearch.scoring.buckets import Buckets, Call, Shape, Unit, plan, steps
from jaxsearch.scoring.packing import Array, EmbeddedItem, Item, PackedItems, count_embeddings, place_items

__all__ = [
    "Buckets",
    "PrefillScorer",
    "Prefix",
    "Scorer",
    "answer_hidden",
    "pad_prefixes",
    "read_labels",
    "score",
    "steps",
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


def answer_hidden(
    decoder: Decoder,
    prefix_tokens: Array,
    prefix_where: Array,
    items: PackedItems,
    back: Array | None = None,
    *,
    backend: str = "xla",
) -> jax.Array:
    """The hidden state at each item's last token, where its answer is read; differentiable.

    Args:
        decoder: the decoder.
        prefix_tokens: int [B, P], at least one token per query that has items.
        prefix_where: bool [B, P], the tokens that exist, left-aligned.
        items: of B queries.
        back: int [B, L, J], read J places of each item instead, each so many tokens before its last one.
        backend: of the items' attention, see `jaxsearch.models.attention.PrefixPacked`.

    Returns:
        [B, L, D] or [B, L, J, D] in the compute dtype, after the final norm; 0 where there is no item.
    """
    where, segments = jnp.asarray(prefix_where), jnp.asarray(items.segments)
    positions = jnp.broadcast_to(jnp.arange(where.shape[1])[None], where.shape)
    x = decoder.embed(jnp.asarray(prefix_tokens))
    _, state = decoder(x, positions, Causal(where, keep_kv=True))

    x = embed_items(decoder, items)
    positions = jnp.sum(where, axis=1)[:, None, None] + items.offsets
    hidden, _ = decoder(x, positions, PrefixPacked(where, segments, backend), state)
    batch = jnp.arange(where.shape[0])[:, None]
    row, column, exists = items.last[..., 0], items.last[..., 1], jnp.asarray(items.where)
    if back is None:
        return jnp.where(exists[..., None], hidden[batch, row, column], 0)
    answers = hidden[batch[..., None], row[..., None], column[..., None] - back]
    return jnp.where(exists[..., None, None], answers, 0)


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
    scorer: Scorer, prefix_tokens: Array, prefix_where: Array, items: PackedItems, *, backend: str = "xla"
) -> jax.Array:
    """Label logits of every item, fp32 [B, L, C]; 0 where there is no item. Arguments as `answer_hidden`."""
    hidden = answer_hidden(scorer.decoder, prefix_tokens, prefix_where, items, backend=backend)
    return read_labels(scorer, hidden)


def read_labels(scorer: Scorer, hidden: jax.Array) -> jax.Array:
    """Label logits fp32 [..., C] of hidden states [..., D]: the label rows alone, never the vocabulary."""
    return jnp.einsum("...D,CD->...C", hidden.astype(jnp.float32), scorer.label_matrix(), precision="highest")


class PrefillScorer:
    """Scores lists of any lengths through a closed set of compiled shapes.

    Items go one per row, or several per row where that costs the model less; more candidates than fit are
    split; several queries share a call (`jaxsearch.scoring.buckets.plan`). Scores depend on none of it.
    """

    def __init__(self, scorer: Scorer, *, buckets: Buckets | None = None, backend: str = "xla"):
        """Hold the scorer's weights as they are now; `update` brings later ones.

        Args:
            scorer: what scores.
            buckets: the closed set of shapes.
            backend: of the items' attention, one of `jaxsearch.models.attention.BACKENDS`.

        Raises:
            InputError: the backend is unknown.
        """
        check_backend(backend)
        self.buckets = Buckets() if buckets is None else buckets
        self.config: DecoderConfig = scorer.decoder.config
        graphdef, state = nnx.split(scorer)
        self._state = _snapshot(state)
        labels = jax.eval_shape(lambda state: nnx.merge(graphdef, state).label_matrix(), self._state)
        self.labels: int = labels.shape[0]
        self._compiled: list[Shape] = []
        self._settled: tuple[Shape, ...] | None = None

        def run(state: Any, prefix: Prefix, items: PackedItems) -> jax.Array:
            # Python runs this once per compilation, not once per call: the counter of what was compiled.
            queries, rows, row_length = items.tokens.shape
            table = 0 if items.embeddings is None else items.embeddings.shape[1]
            self._compiled.append(Shape(queries, prefix.tokens.shape[1], rows, row_length, table))
            return score(nnx.merge(graphdef, state), prefix.tokens, prefix.where, items, backend=backend)

        self._run = jax.jit(run)

    @property
    def compiled_shapes(self) -> tuple[Shape, ...]:
        """Every compilation so far, in order; each is in `buckets` and none occurs twice."""
        return tuple(self._compiled)

    def update(self, scorer: Scorer) -> None:
        """Take over the weights of a scorer of the same architecture, such as a later step's; no compilation.

        Raises:
            ValueError: parameters differ in name, shape or dtype.
        """
        state = _snapshot(nnx.state(scorer))
        old, new = (jax.tree.map(lambda x: (x.shape, x.dtype), s) for s in (self._state, state))
        if old != new:
            raise ValueError(
                "scorer has other parameters than the one compiled for: build a new PrefillScorer"
            )
        self._state = state

    def settle(self, prefixes: Sequence[Sequence[int]], items: Sequence[Sequence[Item]]) -> None:
        """Choose the shapes for lists like these, and from now on plan as if exactly these were compiled.

        The same lists then give the same bits, whatever was scored before them and in whichever process: what a
        resumable job needs. Without it shapes that happen to be compiled are preferred.

        Args:
            prefixes: as in `score_lists`.
            items: as in `score_lists`.
        """
        self._settled = tuple(dict.fromkeys(call.shape for call in self._plan(prefixes, items, ())))

    def _plan(
        self,
        prefixes: Sequence[Sequence[int]],
        items: Sequence[Sequence[Item]],
        compiled: Sequence[Shape],
    ) -> list[Call]:
        embeddings = list(map(count_embeddings, items))
        return plan(
            list(map(len, prefixes)),
            [list(map(len, candidates)) for candidates in items],
            buckets=self.buckets,
            config=self.config,
            compiled=compiled,
            embeddings=embeddings if any(map(any, embeddings)) else None,
        )

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
        calls = self._plan(prefixes, items, self._compiled if self._settled is None else self._settled)
        found = [np.zeros((len(candidates), self.labels), np.float32) for candidates in items]
        running: deque[tuple[list[Unit], jax.Array]] = deque()
        for call in calls:
            running.append((call.units, self._run(self._state, *self._arrays(call, prefixes, items))))
            if len(running) > 1:  # one call runs while the next is packed
                _collect(*running.popleft(), found)
        for units, logits in running:
            _collect(units, logits, found)
        return found

    def _check_widths(self, items: Sequence[Sequence[Item]]) -> None:
        for query, candidates in enumerate(items):
            for number, item in enumerate(candidates):
                if isinstance(item, EmbeddedItem) and item.embeddings.shape[1] != self.config.width:
                    raise InputError(
                        f"query {query}, item {number} has embeddings of width {item.embeddings.shape[1]}: "
                        f"give {self.config.width}, the decoder's"
                    )

    def _arrays(
        self, call: Call, prefixes: Sequence[Sequence[int]], items: Sequence[Sequence[Item]]
    ) -> tuple[Prefix, PackedItems]:
        """The arrays of one call, padded to its shape."""
        shape, units = call
        empty = shape.queries - len(units)
        nowhere = np.zeros(0, np.int64)
        packed = place_items(
            [[items[unit.query][i] for i in unit.items] for unit in units] + [[]] * empty,
            [(unit.rows, unit.columns) for unit in units] + [(nowhere, nowhere)] * empty,
            row_length=shape.row_length,
            rows=shape.rows,
            slots=shape.rows * self.buckets.per_row(shape.row_length),
            embeddings=shape.embeddings,
            width=self.config.width,
            dtype=self.config.dtype,
        )
        prefix = pad_prefixes(
            [prefixes[unit.query] for unit in units], length=shape.prefix, queries=shape.queries
        )
        for tokens in (prefix.tokens, packed.tokens):
            bad = np.argwhere((tokens < 0) | (tokens >= self.config.vocab_size))
            if bad.size:
                raise ValueError(
                    f"query {units[bad[0][0]].query} has token id {tokens[tuple(bad[0])]}: "
                    f"the vocabulary ends at {self.config.vocab_size - 1}"
                )
        return prefix, packed


def _snapshot(state: nnx.State) -> nnx.State:
    """The same arrays in variables of their own: training the module on does not change them."""
    return jax.tree.map(lambda x: x, state)


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
