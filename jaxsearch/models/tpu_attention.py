"""Attention of packed items on TPU: a Pallas kernel that computes only the blocks of keys that somebody sees.

One softmax over a query's prefix and the item, as in `jaxsearch.models.attention.PrefixPacked`, of which this is
another way to compute the same; running maximum, sums and result stay in fp32. Forward only: training uses the
reference. Axes: B queries, R rows of packed items, T tokens, P prefix tokens, N query heads, K key/value heads,
G = N/K, H head size.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

BLOCK = 256
"""Queries and keys per step: every step has a fixed cost. Not tuned on a TPU yet."""
_LANES = 128
_MASKED = -1e30


def attend_packed(
    q: Array,
    k: Array,
    v: Array,
    prefix_k: Array,
    prefix_v: Array,
    prefix_where: Array,
    segments: Array,
    *,
    block: int = BLOCK,
    interpret: bool = False,
) -> Array:
    """Each token's mix of its query's prefix and, causally, of its own item; 0 for padding.

    Args:
        q: rotated queries [B, R, T, N, H].
        k: rotated keys [B, R, T, K, H].
        v: values [B, R, T, K, H].
        prefix_k: [B, P, K, H].
        prefix_v: [B, P, K, H].
        prefix_where: bool [B, P], the prefix tokens that exist.
        segments: int32 [B, R, T], each token's item within its row, 0 for padding; the tokens of an item stand
            together.
        block: how many queries and keys meet at a time; on TPU a multiple of 128.
        interpret: run the kernel's arithmetic as ordinary operations, on any device.

    Returns:
        [B, R, T, N, H] in q's dtype.
    """
    b, r, t, n, h = q.shape
    kv, group = k.shape[3], n // k.shape[3]
    own, own_count = _split(t, block)
    head, head_count = _split(prefix_k.shape[1], block)
    segments = _pad(segments, 2, own * own_count)
    prefix_where = _pad(prefix_where.astype(jnp.int32), 1, head * head_count)
    queries = _pad(jnp.moveaxis(q.reshape(b, r, t, kv, group, h), 2, 4), 4, own * own_count)
    keys, values = (_pad(jnp.moveaxis(x, 2, 3), 3, own * own_count) for x in (k, v))
    prefix_keys, prefix_values = (
        _pad(jnp.moveaxis(x, 1, 2), 2, head * head_count) for x in (prefix_k, prefix_v)
    )
    first, last = _own_blocks(segments, own)
    prefix_blocks = _blocks_in_use(prefix_where, head)

    def own_block(b: Any, r: Any, i: Any, j: Any, first: Any, last: Any) -> Any:
        return jnp.clip(first[b, r, i] + j - head_count, first[b, r, i], last[b, r, i])

    def prefix_block(b: Any, j: Any, blocks: Any) -> Any:
        return jnp.clip(j, 0, jnp.maximum(blocks[b] - 1, 0))

    # An index that does not change is not fetched again: a skipped block costs neither arithmetic nor memory traffic.
    spec = pl.BlockSpec
    query_spec = spec((1, 1, 1, group, own, h), lambda b, r, m, i, j, *_: (b, r, m, 0, i, 0))
    own_spec = spec(
        (1, 1, 1, own, h),
        lambda b, r, m, i, j, first, last, _: (b, r, m, own_block(b, r, i, j, first, last), 0),
    )
    prefix_spec = spec(
        (1, 1, head, h), lambda b, r, m, i, j, first, last, blocks: (b, m, prefix_block(b, j, blocks), 0)
    )
    mixed = pl.pallas_call(
        functools.partial(_kernel, head_count=head_count, scale=h**-0.5),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(b, r, kv, own_count, head_count + own_count),
            in_specs=[
                query_spec,
                own_spec,
                own_spec,
                prefix_spec,
                prefix_spec,
                spec((1, 1, own, 1), lambda b, r, m, i, j, *_: (b, r, i, 0)),
                spec(
                    (1, 1, 1, own),
                    lambda b, r, m, i, j, first, last, _: (b, r, 0, own_block(b, r, i, j, first, last)),
                ),
                spec(
                    (1, 1, head),
                    lambda b, r, m, i, j, first, last, blocks: (b, 0, prefix_block(b, j, blocks)),
                ),
            ],
            out_specs=query_spec,
            scratch_shapes=[
                pltpu.VMEM((group * own, _LANES), jnp.float32),
                pltpu.VMEM((group * own, _LANES), jnp.float32),
                pltpu.VMEM((group * own, h), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(queries.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 4 + ("arbitrary",)),
        interpret=interpret,
    )(
        first,
        last,
        prefix_blocks,
        queries,
        keys,
        values,
        prefix_keys,
        prefix_values,
        segments[..., None],
        segments[:, :, None],
        prefix_where[:, None],
    )
    return jnp.moveaxis(mixed[..., :t, :], 4, 2).reshape(q.shape)


def _kernel(
    first: Any,
    last: Any,
    prefix_blocks: Any,
    q: Any,
    k: Any,
    v: Any,
    prefix_k: Any,
    prefix_v: Any,
    query_segments: Any,
    key_segments: Any,
    prefix_where: Any,
    out: Any,
    top: Any,
    total: Any,
    mixed: Any,
    *,
    head_count: int,
    scale: float,
) -> None:
    """One block of queries (all G of a key/value head) against one block of keys; the last axis of the grid goes over the keys."""
    b, r, i, j = (pl.program_id(axis) for axis in (0, 1, 3, 4))
    group, length = q.shape[3], q.shape[4]
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    busy = last[b, r, i] >= first[b, r, i]

    @pl.when(j == 0)
    def _() -> None:
        top[...] = jnp.full_like(top, _MASKED / 2)
        total[...] = jnp.zeros_like(total)
        mixed[...] = jnp.zeros_like(mixed)

    def meet(keys: Array, values: Array, seen: Array) -> None:
        """Add keys and values [C, H] where seen (bool [T, C])."""
        queries = q[0, 0, 0].reshape(group * length, -1)
        scores = jax.lax.dot_general(
            queries, keys, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )
        hidden = jnp.where(seen, 0.0, _MASKED)[None]
        scores = (scores.reshape(group, length, -1) * scale + hidden).reshape(scores.shape)
        before = top[:, :1]
        now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        weights, kept = jnp.exp(scores - now), jnp.exp(before - now)
        added = jax.lax.dot_general(
            weights.astype(values.dtype), values, (((1,), (0,)), ((), ())),
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
        top[...] = jnp.broadcast_to(now, top.shape)
        summed = kept * total[:, :1] + jnp.sum(weights, axis=1, keepdims=True)
        total[...] = jnp.broadcast_to(summed, total.shape)
        mixed[...] = kept * mixed[...] + added

    @pl.when(busy & (j < prefix_blocks[b]))
    def _() -> None:
        seen = (query_segments[0, 0] > 0) & (prefix_where[0] > 0)
        meet(prefix_k[0, 0], prefix_v[0, 0], seen)

    block = first[b, r, i] + j - head_count

    @pl.when((j >= head_count) & (block <= last[b, r, i]))
    def _() -> None:
        mine, theirs = query_segments[0, 0], key_segments[0, 0]
        shape = (length, theirs.shape[1])
        row = i * length + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        column = block * theirs.shape[1] + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        meet(k[0, 0, 0], v[0, 0, 0], (mine == theirs) & (mine > 0) & (row >= column))

    @pl.when(j == pl.num_programs(4) - 1)
    def _() -> None:
        summed = total[:, :1]
        result = mixed[...] / jnp.where(summed > 0, summed, 1.0)
        out[0, 0, 0] = result.reshape(group, length, -1).astype(out.dtype)


def _split(length: int, block: int) -> tuple[int, int]:
    """A block's size and how many of them hold so many tokens."""
    if length <= block:
        return -(-length // 16) * 16, 1
    return block, -(-length // block)


def _pad(x: Array, axis: int, size: int) -> Array:
    """Zeros behind, up to `size`."""
    return jnp.pad(x, [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])


def _own_blocks(segments: Array, block: int) -> tuple[Array, Array]:
    """First and last block of keys that each block of queries sees, int32 [B, R, blocks]; last < first where it is all padding."""
    b, r, t = segments.shape
    place = jnp.arange(t, dtype=jnp.int32)[None, None]
    begins = jnp.pad(segments[..., 1:] != segments[..., :-1], ((0, 0), (0, 0), (1, 0)))
    start = jax.lax.cummax(jnp.where(begins, place, 0), axis=2)
    first = start.reshape(b, r, -1, block)[..., 0] // block
    busy = (segments > 0).reshape(b, r, -1, block).any(axis=-1)
    diagonal = jnp.broadcast_to(jnp.arange(t // block, dtype=jnp.int32), first.shape)
    return first, jnp.where(busy, diagonal, first - 1)


def _blocks_in_use(where: Array, block: int) -> Array:
    """How many blocks of the prefix hold anything, int32 [B] (where int32 [B, P])."""
    used = (where > 0).reshape(where.shape[0], -1, block).any(axis=-1)
    return jnp.max(jnp.where(used, jnp.arange(1, used.shape[1] + 1, dtype=jnp.int32)[None], 0), axis=1)
