"""What calibration examples make a decoder's layers say: Gram matrices of the inputs of `o` and `down`, layer by layer.

The examples go through the scoring forward (prefix once, one item per row), one layer at a time over all batches. Only one residual stream
per batch is kept, on the host, and only one layer's weights and Gram matrix are in use: an 8B model never has its activations at once.
A layer that was changed hands its changed output to the next one. Axes: B queries, P prefix tokens, R rows, T tokens, D width, F neurons.
"""

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding

from jaxsearch.data.datasets import Dataset, Pairs
from jaxsearch.errors import InputError
from jaxsearch.models.attention import Causal, PrefixPacked
from jaxsearch.models.contract import Model
from jaxsearch.models.decoder import (
    Decoder,
    DecoderConfig,
    head_outputs,
    layer_table,
    neurons,
    project,
    rotary_angles,
)
from jaxsearch.models.scorer import Scorer
from jaxsearch.scoring.label import chosen_pairs
from jaxsearch.scoring.packing import PackedItems, pack_items
from jaxsearch.scoring.prefill import Prefix, embed_items, pad_prefixes
from jaxsearch.scoring.records import RecordScorer
from jaxsearch.training.sharding import BATCH, parameter_spec

TOKENS = 8192
"""About how many tokens a batch holds; at least one query with all of its items."""

Weights = dict[str, Any]
"""One layer's parameters by the names of `layer_table`, without the layer axis."""


class Batch(NamedTuple):
    """Tokens of some queries with their items."""

    prefix: Prefix
    items: PackedItems


class Stream(NamedTuple):
    """One batch between two layers."""

    prefix: Any
    """Residual stream [B, P, D] in the compute dtype."""
    items: Any
    """Residual stream [B, R, T, D]."""
    where: Any
    """bool [B, P], the prefix tokens that exist."""
    segments: Any
    """int32 [B, R, T], 0 for padding."""
    offsets: Any
    """int32 [B, R, T], places inside the items."""


def choose_queries(data: Dataset, count: int) -> list[Pairs]:
    """`count` training queries with their candidates, evenly from the first to the last.

    Raises:
        InputError: the data has fewer.
    """
    known = [pairs for pairs in data.pairs if len(pairs.documents)]
    if not 1 <= count <= len(known):
        raise InputError(
            f"queries is {count}: {data.name} has {len(known)} training queries; give 1 to {len(known)}"
        )
    return [known[i] for i in np.linspace(0, len(known) - 1, count).astype(int)]


def check_model(model: Model) -> None:
    """Raise `InputError` unless the model is a ranker or judge of texts."""
    if not isinstance(model.module, Scorer) or "pair" not in model.contract.prompts:
        raise InputError(
            f"the model is a {model.contract.kind}: give the model folder of a ranker or a judge"
        )
    if model.contract.mixlm is not None:
        raise InputError(
            "the model reads MixLM's embeddings, which calibration knows nothing of: prune the ranker of full text that it began as"
        )


def make_batches(
    model: Model, data: Dataset, pairs: Sequence[Pairs], *, candidates: int = 16, multiple: int = 1
) -> list[Batch]:
    """Calibration examples as the model reads them, all batches of one shape.

    Args:
        model: a ranker or judge.
        data: whose training queries and documents.
        pairs: from `choose_queries`.
        candidates: documents of each query, at most.
        multiple: queries of a batch are a multiple of this (devices over which a mesh splits them).

    Raises:
        InputError: the model is none that `check_model` takes, or candidates is below 1.
    """
    check_model(model)
    assert isinstance(model.module, Scorer)
    if candidates < 1:
        raise InputError(f"candidates is {candidates}: give 1 or more")
    chosen = [chosen_pairs(p, candidates) for p in pairs]
    used = np.unique(np.concatenate(chosen))
    records = RecordScorer(
        model.module,
        model.tokenizer,
        model.contract.prompts["pair"],
        [data.documents[row] for row in used],
    )
    queries = [data.queries["train"][p.query] for p in pairs]
    prefixes, items = records.tokens(queries, [np.searchsorted(used, rows) for rows in chosen])
    longest = max(map(len, prefixes))
    length = max(len(item) for candidate in items for item in candidate)
    rows = max(map(len, items))
    size = max(TOKENS // (longest + rows * length), 1)
    size = -(-min(size, len(queries)) // multiple) * multiple
    batches = []
    for start in range(0, len(queries), size):
        part = items[start : start + size]
        part += [[]] * (size - len(part))
        prefix = pad_prefixes(prefixes[start : start + size], length=longest, queries=size)
        packed = pack_items(part, row_length=length, rows=rows, slots=rows, one_per_row=True)
        batches.append(Batch(prefix, packed))
    return batches


class Walk:
    """Calibration examples on their way through a decoder.

    Args:
        decoder: whose layers; `weights` gives the dense ones, any other of the same width may be applied in their place.
        batches: from `make_batches`.
        mesh: devices with the axes of training: weights and queries are split over them as in training. One process only.
    """

    def __init__(self, decoder: Decoder, batches: Sequence[Batch], mesh: Mesh | None = None):
        self.config, self.mesh = decoder.config, mesh
        self._layers = decoder.layers.arrays()
        self.streams = [
            Stream(
                np.asarray(decoder.embed(jnp.asarray(prefix.tokens))),
                np.asarray(embed_items(decoder, items)),
                np.asarray(prefix.where),
                np.asarray(items.segments),
                np.asarray(items.offsets),
            )
            for prefix, items in batches
        ]

    def weights(self, layer: int) -> Weights:
        """A layer's parameters as fp32 arrays on the host."""
        return {name: np.asarray(value[layer]) for name, value in self._layers.items()}

    def heads_gram(self, w: Weights) -> np.ndarray:
        """fp64 [N H, N H], of the inputs of `o` over all tokens that exist."""
        return self._sum(_heads_gram, w)

    def mlp_gram(self, w: Weights) -> np.ndarray:
        """fp64 [F, F], of the inputs of `down`; call it after `pass_heads`."""
        return self._sum(_mlp_gram, w)

    def pass_heads(self, w: Weights) -> None:
        """Apply the attention's half of a layer."""
        self._apply(_pass_heads, w)

    def pass_mlp(self, w: Weights) -> None:
        """Apply the other half."""
        self._apply(_pass_mlp, w)

    def pass_layer(self, w: Weights) -> float:
        """Apply a whole layer; returns how much it changes: the mean cosine distance of its output from its input."""
        placed, total, count = self._place(w), 0.0, 0
        for number, stream in enumerate(self.streams):
            with self._on_mesh():
                new, distance, tokens = _pass_layer(self.config, placed, self._put(stream))
            self.streams[number] = jax.tree.map(np.asarray, new)
            total, count = total + float(distance), count + int(tokens)
        return total / max(count, 1)

    def _sum(self, function: Any, w: Weights) -> np.ndarray:
        placed, total = self._place(w), np.zeros((), np.float64)
        for stream in self.streams:
            with self._on_mesh():
                total = total + np.asarray(function(self.config, placed, self._put(stream)), np.float64)
        return total

    def _apply(self, function: Any, w: Weights) -> None:
        placed = self._place(w)
        for number, stream in enumerate(self.streams):
            with self._on_mesh():
                new = function(self.config, placed, self._put(stream))
            self.streams[number] = jax.tree.map(np.asarray, new)

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        if self.mesh is None:
            return contextlib.nullcontext()
        return jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)

    def _place(self, w: Weights) -> Weights:
        """The weights on the device, or split over the mesh as in training."""
        if self.mesh is None:
            return jax.device_put(w)
        axes = {name: spec.axes[1:] for name, spec in layer_table(self.config).items()}
        return {
            name: jax.device_put(
                value,
                NamedSharding(self.mesh, parameter_spec(name, value.shape, axes[name], self.mesh)),
            )
            for name, value in w.items()
        }

    def _put(self, stream: Stream) -> Stream:
        if self.mesh is None:
            return stream
        sharding = NamedSharding(self.mesh, BATCH)
        return jax.tree.map(lambda x: jax.device_put(x, sharding), stream)


def _mixed(c: DecoderConfig, w: Weights, s: Stream) -> tuple[Array, Array]:
    """What the heads say, of prefix [B, P, N, H] and items [B, R, T, N, H]."""
    where = jnp.asarray(s.where)
    places = jnp.broadcast_to(jnp.arange(where.shape[1])[None], where.shape)
    angles = rotary_angles(places, c.head_dim, c.rope_theta)
    prefix, state = head_outputs(s.prefix, w, angles, Causal(where, keep_kv=True), None, c)
    angles = rotary_angles(
        jnp.sum(where, axis=1)[:, None, None] + jnp.asarray(s.offsets), c.head_dim, c.rope_theta
    )
    items, _ = head_outputs(s.items, w, angles, PrefixPacked(where, jnp.asarray(s.segments)), state, c)
    return prefix, items


def _gram(s: Stream, prefix: Array, items: Array) -> Array:
    """fp32 [F, F] over the tokens that exist (prefix [B, P, F], items [B, R, T, F])."""
    prefix = jnp.where(s.where[..., None], prefix.astype(jnp.float32), 0)
    items = jnp.where(s.segments[..., None] > 0, items.astype(jnp.float32), 0)
    return jnp.einsum("BPF,BPG->FG", prefix, prefix, precision="highest") + jnp.einsum(
        "BRTF,BRTG->FG", items, items, precision="highest"
    )


def _after_heads(c: DecoderConfig, w: Weights, s: Stream) -> Stream:
    prefix, items = (project("TNH,NHD->TD", x, w["o"]) for x in _mixed(c, w, s))
    return s._replace(prefix=s.prefix + prefix, items=s.items + items)


def _after_mlp(c: DecoderConfig, w: Weights, s: Stream) -> Stream:
    prefix, items = (x + project("TF,FD->TD", neurons(x, w, c), w["down"]) for x in (s.prefix, s.items))
    return s._replace(prefix=prefix, items=items)


_pass_heads = partial(jax.jit, static_argnums=0)(_after_heads)
_pass_mlp = partial(jax.jit, static_argnums=0)(_after_mlp)


@partial(jax.jit, static_argnums=0)
def _heads_gram(c: DecoderConfig, w: Weights, s: Stream) -> Array:
    prefix, items = (x.reshape(*x.shape[:-2], -1) for x in _mixed(c, w, s))
    return _gram(s, prefix, items)


@partial(jax.jit, static_argnums=0)
def _mlp_gram(c: DecoderConfig, w: Weights, s: Stream) -> Array:
    return _gram(s, neurons(s.prefix, w, c), neurons(s.items, w, c))


@partial(jax.jit, static_argnums=0)
def _pass_layer(c: DecoderConfig, w: Weights, s: Stream) -> tuple[Stream, Array, Array]:
    """The stream after the layer, the sum of cosine distances, and of how many tokens."""
    new = _after_mlp(c, w, _after_heads(c, w, s))
    total, count = jnp.zeros(()), jnp.zeros((), jnp.int32)
    for before, after, exists in (
        (s.prefix, new.prefix, jnp.asarray(s.where)),
        (s.items, new.items, jnp.asarray(s.segments) > 0),
    ):
        x, y = before.astype(jnp.float32), after.astype(jnp.float32)
        norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
        distance = 1 - jnp.sum(x * y, axis=-1) / jnp.maximum(norms, 1e-30)
        total, count = total + jnp.sum(jnp.where(exists, distance, 0)), count + jnp.sum(exists)
    return new, total, count
