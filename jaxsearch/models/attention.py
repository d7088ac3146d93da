"""Who sees whom: the attentions that are handed into the decoder's block.

Each is a small pytree of masks or positions, called once per layer with rotated queries and keys. All share
one arithmetic: fp32 scores scaled by H**-0.5, softmax in fp32 with the division after the sum over values
(fewer numbers to divide), key/value heads never repeated in memory. Axes: B queries, R rows of packed
items, T tokens, P prefix tokens, C keys or cache slots, N query heads, K key/value heads, G = N/K, H head
size.
"""

import functools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxsearch.errors import InputError
from jaxsearch.models.tpu_attention import attend_packed
from jaxsearch.models.tpu_causal import attend_causal
from jaxsearch.numerics import wide

# So many queries at a time meet the keys up to the last of them: what is masked beyond is never computed. On a CPU three
# blocks of a row of 150 tokens save a tenth of its time; blocks below these are slower for what they save.
LARGEST_BLOCK, SMALLEST_BLOCK = 256, 48

BACKENDS = ("xla", "fused", "pallas", "pallas_interpret")

WORTH_A_KERNEL = 96
"""Queries of a row, which the kernel pads to a multiple of 128."""

# Far below any score, yet finite: a row of masked scores alone then has no NaN in it, nor in its gradient.
MASKED = -1e30


def check_backend(name: str) -> None:
    """Raise InputError unless the name is one of `BACKENDS`."""
    if name not in BACKENDS:
        raise InputError(f"attention backend {name!r} is unknown: use one of {', '.join(BACKENDS)}")


def training_backend(name: str, length: int, dtype: DTypeLike) -> str:
    """The backend of a training step's attention.

    A training step is what runs within `jax.sharding.use_abstract_mesh`. Elsewhere nobody says how a kernel is split over devices, and the
    reference is used.

    Args:
        name: one of `BACKENDS`, or "" for the kernel of the mesh's devices where there is one and it is not mostly padding: "pallas" on
            TPU for `WORTH_A_KERNEL` queries or more.
        length: T, the queries of a row.
        dtype: of queries, keys and values.

    Raises:
        InputError: the kernel does not run on the mesh's devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return "xla"
    device = mesh.abstract_device  # None where the mesh is not of real devices
    platform = jax.default_backend() if device is None else device.platform
    if name == "pallas" and platform != "tpu":
        raise InputError(f"model.attention is 'pallas', a kernel for TPUs, and the mesh is of {platform} devices: use 'xla'")  # fmt: skip
    if name:
        return name
    fits = length >= WORTH_A_KERNEL and dtype != jnp.float64
    return "pallas" if platform == "tpu" and fits else "xla"


class Attention(Protocol):
    """Mixes tokens within one layer."""

    def __call__(self, q: Array, k: Array, v: Array, state: Any) -> tuple[Array, Any]:
        """Attend.

        Args:
            q: rotated queries [..., T, N, H].
            k: rotated keys [..., T, K, H].
            v: values [..., T, K, H].
            state: what this layer keeps between calls (None where nothing is kept).

        Returns:
            The mixed values [..., T, N, H] in q's dtype, and the layer's new state.
        """


def _group(q: Array, k: Array) -> Array:
    """Query heads beside the key/value head they share: [..., T, N, H] -> [..., T, K, G, H]."""
    return q.reshape(*q.shape[:-2], k.shape[-2], q.shape[-2] // k.shape[-2], q.shape[-1])


def _scores(equation: str, q: Array, k: Array, mask: Array) -> Array:
    """Scaled fp32 scores by the einsum equation, `MASKED` where the broadcastable mask is False."""
    scores = jnp.einsum(equation, q, k, preferred_element_type=wide())
    return jnp.where(mask, scores * q.shape[-1] ** -0.5, MASKED)


def _top(scores: Array) -> Array:
    """The largest score over the last axis, a constant for the gradient.

    Its floor of MASKED / 2 makes exp(MASKED - top) exactly 0 where everything is masked.
    """
    return jnp.maximum(jnp.max(jax.lax.stop_gradient(scores), axis=-1), MASKED / 2)


def _swap(x: Array) -> Array:
    """[B, K, R, ...] <-> [B, R, K, ...]."""
    return jnp.swapaxes(x, 1, 2)


def _sum_values(equation: str, weights: Array, v: Array) -> Array:
    """Values summed with fp32 weights, by the einsum equation; fp32 out."""
    return jnp.einsum(equation, weights.astype(v.dtype), v, preferred_element_type=wide())


def _divisor(total: Array) -> Array:
    """The sum of the weights, or 1 where nothing was seen: value and gradient are 0 there."""
    return jnp.where(total > 0, total, 1.0)[..., None]


def _attend(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Masked attention (q [..., T, N, H], k and v [..., C, K, H], mask [..., T, C]) -> [..., T, N, H]."""
    grouped = _group(q, k)
    scores = _scores("...TKGH,...CKH->...KTGC", grouped, k, mask[..., None, :, None, :])
    weights = jnp.exp(scores - _top(scores)[..., None])
    mixed = _sum_values("...KTGC,...CKH->...KTGH", weights, v) / _divisor(weights.sum(axis=-1))
    return jnp.moveaxis(mixed, -4, -3).reshape(q.shape).astype(q.dtype)


def _library(q: Array, k: Array, v: Array, **options: Any) -> Array:
    """The library's attention of q [B, T, N, H], k and v [B, C, K, H]; on GPUs in half precision cuDNN's."""
    cudnn = jax.default_backend() == "gpu" and q.dtype != jnp.float32
    implementation: Any = "cudnn" if cudnn else "xla"
    return jax.nn.dot_product_attention(q, k, v, implementation=implementation, **options)


def _blocks(length: int) -> list[slice]:
    """The queries in even blocks: three of a short row, as many as it takes of a long one."""
    parts = max(1, min(3, length // SMALLEST_BLOCK), math.ceil(length / LARGEST_BLOCK))
    size = max(1, math.ceil(length / parts))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


@partial(jax.tree_util.register_dataclass, data_fields=["where"], meta_fields=["keep_kv", "backend"])
@dataclass(frozen=True)
class Causal:
    """Each token sees itself and what stands before it, padding left out.

    `where` is bool [..., T], True for tokens that exist. With `keep_kv` the new state is (k, v): this is
    how a prefix is prefilled. A token that sees nothing (padding before the first token) mixes to zero.

    `backend` is one of `BACKENDS`. All but "xla" need padding to stand behind the tokens, so that order alone decides who sees whom;
    padding then mixes to anything finite. All have gradients.

    Raises:
        InputError: the backend is unknown.
    """

    where: Array
    keep_kv: bool = False
    backend: str = "xla"

    def __post_init__(self) -> None:
        check_backend(self.backend)

    def __call__(self, q: Array, k: Array, v: Array, state: Any) -> tuple[Array, Any]:
        kept = (k, v) if self.keep_kv else None
        if self.backend != "xla":
            flat = [x.reshape(-1, *x.shape[-3:]) for x in (q, k, v)]
            if self.backend == "fused":
                mixed = _library(*flat, is_causal=True)
            else:
                mixed = attend_causal(*flat, interpret=self.backend == "pallas_interpret")
            return mixed.reshape(q.shape), kept
        return self._reference(q, k, v), kept

    def _reference(self, q: Array, k: Array, v: Array) -> Array:
        length = q.shape[-3]
        order = jnp.tri(length, dtype=bool)[(None,) * (self.where.ndim - 1)]
        mixed = [
            _attend(
                q[..., block, :, :],
                k[..., : block.stop, :, :],
                v[..., : block.stop, :, :],
                self.where[..., None, : block.stop] & order[..., block, : block.stop],
            )
            for block in _blocks(length)
        ]
        return jnp.concatenate(mixed, axis=-3)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["prefix_where", "segments"],
    meta_fields=["backend", "alone"],
)
@dataclass(frozen=True)
class PrefixPacked:
    """Packed items: each token sees its query's prefix and, causally, the item that it belongs to.

    `prefix_where` is bool [B, P]; `segments` int32 [B, R, T] holds each token's item slot within its row, 0
    for padding. The state is (k, v) of the prefix, both [B, P, K, H] per layer, shared by the query's R
    rows; the new state is None. One softmax runs over prefix and item together. Padding mixes to zero.

    `backend` is one of `BACKENDS`: "xla", the reference, for any device and for training; "fused", for GPUs; "pallas",
    for TPUs, and "pallas_interpret", the same arithmetic anywhere. The last two need each item's tokens to stand
    together, which packing sees to, and have no gradients, unless the items are `alone`: each row then holds one item, from its
    first column on, as in training, and padding mixes to anything finite.

    Raises:
        InputError: the backend is unknown.
    """

    prefix_where: Array
    segments: Array
    backend: str = "xla"
    alone: bool = False

    def __post_init__(self) -> None:
        check_backend(self.backend)

    def __call__(self, q: Array, k: Array, v: Array, state: tuple[Array, Array]) -> tuple[Array, Any]:
        if self.backend == "fused":
            return self._fused(q, k, v, state), None
        if self.backend.startswith("pallas"):
            interpret = self.backend == "pallas_interpret"
            if self.alone:
                return self._alone(q, k, v, state, interpret), None
            where, segments = jnp.asarray(self.prefix_where), jnp.asarray(self.segments)
            return attend_packed(q, k, v, *state, where, segments, interpret=interpret), None
        mixed = [
            self._block(q[:, :, block], k[:, :, : block.stop], v[:, :, : block.stop], state)
            for block in _blocks(q.shape[2])
        ]
        return jnp.concatenate(mixed, axis=2), None

    def _fused(self, q: Array, k: Array, v: Array, state: tuple[Array, Array]) -> Array:
        """One call of the library's attention, each row with a copy of its prefix.

        Its log-sum-exp is not fp32 and it knows no segments: no merging of partials, and a mask for each row.
        """
        b, r, t, n, h = q.shape
        keys, values = self._with_prefix(k, v, state)
        exists = jnp.asarray(self.segments) > 0
        order = jnp.tri(t, dtype=bool)[None, None]
        own = (self.segments[..., :, None] == self.segments[..., None, :]) & exists[..., None] & order
        seen = self.prefix_where[:, None, None, :] & exists[..., None]
        mask = jnp.concatenate([seen, own], axis=-1).reshape(b * r, 1, t, -1)
        mixed = _library(q.reshape(b * r, t, n, h), keys, values, mask=mask)
        return jnp.where(exists[..., None, None], mixed.reshape(q.shape), 0)

    def _alone(self, q: Array, k: Array, v: Array, state: tuple[Array, Array], interpret: bool) -> Array:
        """Behind the prefix each row is in order: the causal kernel, without the prefix's padding."""
        (b, r, t), p = q.shape[:3], self.prefix_where.shape[1]
        where = jnp.pad(jnp.asarray(self.prefix_where), ((0, 0), (0, t)), constant_values=True)
        where = jnp.broadcast_to(where[:, None], (b, r, p + t)).reshape(b * r, p + t)
        keys, values = self._with_prefix(k, v, state)
        mixed = attend_causal(q.reshape(b * r, *q.shape[2:]), keys, values, where, interpret=interpret)
        return mixed.reshape(q.shape)

    def _with_prefix(self, k: Array, v: Array, state: tuple[Array, Array]) -> list[Array]:
        """Keys and values of each row behind a copy of its prefix's, [B R, P + T, K, H] each."""
        b, r = k.shape[:2]
        return [
            jnp.concatenate([jnp.broadcast_to(old[:, None], (b, r, *old.shape[1:])), new], axis=2).reshape(
                b * r, -1, *new.shape[3:]
            )
            for old, new in zip(state, (k, v), strict=True)
        ]

    def _block(self, q: Array, k: Array, v: Array, state: tuple[Array, Array]) -> Array:
        """The last queries [B, R, T', N, H] of rows that are known up to them."""
        prefix_k, prefix_v = state
        end, length = k.shape[2], q.shape[2]
        segments, theirs = self.segments[:, :, end - length : end], self.segments[:, :, :end]
        exists = segments > 0
        order = jnp.tri(length, end, end - length, dtype=bool)[None, None]
        own = (segments[..., :, None] == theirs[..., None, :]) & exists[..., None] & order
        prefix = self.prefix_where[:, None, None, None, None, :] & exists[:, None, :, :, None, None]

        # The prefix part has R after its batch axes B and K, the item part before K: swap small sums only.
        grouped = _group(q, k)
        own_scores = _scores("BRTKGH,BRCKH->BRKTGC", grouped, k, own[:, :, None, :, None, :])
        prefix_scores = _scores("BRTKGH,BPKH->BKRTGP", grouped, prefix_k, prefix)
        top = jnp.maximum(_top(own_scores), _swap(_top(prefix_scores)))
        own_weights = jnp.exp(own_scores - top[..., None])
        prefix_weights = jnp.exp(prefix_scores - _swap(top)[..., None])
        total = own_weights.sum(axis=-1) + _swap(prefix_weights.sum(axis=-1))
        mixed = _sum_values("BRKTGC,BRCKH->BRKTGH", own_weights, v)
        mixed = mixed + _swap(_sum_values("BKRTGP,BPKH->BKRTGH", prefix_weights, prefix_v))
        return jnp.moveaxis(mixed / _divisor(total), 2, 3).reshape(q.shape).astype(q.dtype)


@partial(jax.tree_util.register_dataclass, data_fields=["slots"], meta_fields=[])
@dataclass(frozen=True)
class Cached:
    """Decoding with a cache: new keys and values go into their slots; a token sees all slots up to its own.

    `slots` is int32 [B, T] (T is 1 when one token is decoded at a time). The state is (k, v), both [B, C,
    K, H] per layer. Slots beyond a row's own may hold anything finite: they are overwritten before they are
    seen. A slot of C or more is not written.
    """

    slots: Array

    def __call__(self, q: Array, k: Array, v: Array, state: tuple[Array, Array]) -> tuple[Array, Any]:
        rows = jnp.arange(self.slots.shape[0])[:, None]
        cache_k, cache_v = (
            cache.at[rows, self.slots].set(new.astype(cache.dtype), mode="drop")
            for cache, new in zip(state, (k, v), strict=True)
        )
        mask = jnp.arange(cache_k.shape[1])[None, None, :] <= self.slots[..., None]
        return _attend(q, cache_k, cache_v, mask), (cache_k, cache_v)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["prefix_where", "segments"],
    meta_fields=["rows", "backend"],
)
@dataclass(frozen=True)
class OnePass:
    """A query's prefix and its packed items side by side: each layer reads its matrices once for both. For inference.

    Tokens are [B, P + R x T], the prefix first. Prefix tokens attend as in `Causal`, items as in `PrefixPacked`; the new state is
    None. Where the prefix's keys and values are given as the state, both [B, P, K, H] per layer, tokens are [B, R x T]: the items
    alone. `segments` is None where each row holds one item from its first column on: order alone then says who sees whom, no
    mask is needed but for each block's own triangle, and padding behind an item mixes to anything finite.
    """

    prefix_where: Array
    segments: Array | None
    rows: int
    backend: str = "xla"

    def __call__(self, q: Array, k: Array, v: Array, state: Any) -> tuple[Array, Any]:
        prefix, width = _prefix(k, v, state, self.prefix_where)
        first = [prefill(q[:, :width], *prefix, None)[0]] if width else []
        q, k, v = (_rows(x, width, self.rows) for x in (q, k, v))
        if self.segments is None:
            mixed = _in_order(q, k, v, prefix, self.prefix_where)
        else:
            mixed, _ = PrefixPacked(self.prefix_where, self.segments, self.backend)(q, k, v, prefix)
        return jnp.concatenate([*first, mixed.reshape(q.shape[0], -1, *q.shape[3:])], axis=1), None


@partial(jax.tree_util.register_dataclass, data_fields=["prefix_where", "columns"], meta_fields=[])
@dataclass(frozen=True)
class LastOfRows:
    """The last token of each row's one item, as in `OnePass`: q is [B, R, N, H], k and v are [B, P + R x T, K, H], or
    [B, R x T, K, H] behind a prefix that is given as the state.

    `columns` int [B, R] says where in its row each of these tokens stands.
    """

    prefix_where: Array
    columns: Array

    def __call__(self, q: Array, k: Array, v: Array, state: Any) -> tuple[Array, Any]:
        prefix, width = _prefix(k, v, state, self.prefix_where)
        k, v = (_rows(x, width, q.shape[1]) for x in (k, v))
        seen = jnp.arange(k.shape[2])[None, None] <= self.columns[..., None]
        mixed = _mix(q[:, :, None], [(k, v, seen[:, :, None])], prefix, self.prefix_where)
        return mixed[:, :, 0], None


def prefill(q: Array, k: Array, v: Array, state: Any) -> tuple[Array, tuple[Array, Array]]:
    """The attention of prefixes [B, P, ...], left-aligned, whose keys and values are kept: the new state. For inference.

    As `Causal`, but padding, which no token sees from before it, mixes to anything finite.
    """
    return _in_order(q[:, None], k[:, None], v[:, None])[:, 0], (k, v)


def _prefix(k: Array, v: Array, state: Any, where: Array) -> tuple[tuple[Array, Array], int]:
    """Keys and values of the prefix [B, P, K, H], and how many of the tokens are its own: none where it is the state."""
    if state is not None:
        return state, 0
    width = where.shape[1]
    return (k[:, :width], v[:, :width]), width


def _rows(x: Array, width: int, rows: int) -> Array:
    """What stands behind the prefix, by row: [B, P + R x T, ...] -> [B, R, T, ...]."""
    return x[:, width:].reshape(x.shape[0], rows, -1, *x.shape[2:])


Part = tuple[Array, Array, Array | None]
"""Keys and values [B, R, C, K, H], and who sees them: a mask [B, R, T, C], broadcastable, or None for everyone."""


def _in_order(
    q: Array, k: Array, v: Array, prefix: tuple[Array, Array] | None = None, prefix_where: Array | None = None
) -> Array:
    """Rows of tokens [B, R, T, ...], each of which sees the prefix and what stands before it in its row. In blocks: every
    key before a block is seen by all of it, so that only its own triangle needs a mask."""

    def mixed(block: slice) -> Array:
        before, order = slice(0, block.start), jnp.tri(block.stop - block.start, dtype=bool)[None, None]
        parts: list[Part] = [(k[:, :, block], v[:, :, block], order)]
        if block.start:
            parts.append((k[:, :, before], v[:, :, before], None))
        return _mix(q[:, :, block], parts, prefix, prefix_where)

    return jnp.concatenate([mixed(block) for block in _blocks(q.shape[2])], axis=2)


def _mix(
    q: Array,
    parts: list[Part],
    prefix: tuple[Array, Array] | None = None,
    prefix_where: Array | None = None,
) -> Array:
    """One softmax over some keys of each row and over those of a prefix; every token must see one of them at least.

    The scale is applied inside the exponential, where it costs no pass over the scores of its own.

    Args:
        q: [B, R, T, N, H].
        parts: keys of the rows.
        prefix: keys and values [B, P, K, H], shared by the query's rows.
        prefix_where: bool [B, P].
    """
    grouped, scale = _group(q, parts[0][0]), q.shape[-1] ** -0.5
    # The prefix has R after its batch axes B and K, the rows' own keys before K: small sums alone are swapped.
    own, shared = ("BRTKGH", "BRCKH", "BRKTGC"), ("BRTKGH", "BCKH", "BKRTGC")
    seen: list[tuple[Array, Array, tuple[str, str, str]]] = []
    for keys, values, mask in parts:
        wide_mask = None if mask is None else mask[:, :, None, :, None]
        seen.append((_raw_scores(grouped, keys, own, wide_mask), values, own))
    if prefix is not None:
        wide_mask = None if prefix_where is None else prefix_where[:, None, None, None, None]
        seen.append((_raw_scores(grouped, prefix[0], shared, wide_mask), prefix[1], shared))

    def turn(x: Array, terms: tuple[str, str, str]) -> Array:
        return _swap(x) if terms is shared else x

    top = functools.reduce(jnp.maximum, (turn(_top(scores), terms) for scores, _, terms in seen))
    total: Any = 0.0
    mixed: Any = 0.0
    for scores, values, terms in seen:
        weights = jnp.exp((scores - turn(top, terms)[..., None]) * scale)
        summed = _sum_values(f"{terms[2]},{terms[1]}->{terms[2][:-1]}H", weights, values)
        total, mixed = total + turn(weights.sum(axis=-1), terms), mixed + turn(summed, terms)
    return jnp.moveaxis(mixed / total[..., None], 2, 3).reshape(q.shape).astype(q.dtype)


def _raw_scores(grouped: Array, keys: Array, terms: tuple[str, str, str], mask: Array | None) -> Array:
    """fp32 scores, not scaled, `MASKED` where a mask is False."""
    scores = jnp.einsum(f"{terms[0]},{terms[1]}->{terms[2]}", grouped, keys, preferred_element_type=wide())
    return scores if mask is None else jnp.where(mask, scores, MASKED)
