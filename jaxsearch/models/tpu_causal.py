"""Causal attention with gradients on TPU: JAX's splash attention, which never writes scores to memory, on every device's share.

The same as `jaxsearch.models.attention.Causal` up to rounding (the scale goes into the queries, in their dtype). Blocks of keys that no
query sees are skipped; key/value heads are never repeated. Axes: B rows, T queries, C keys, N query heads, K key/value heads, H head size.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

BLOCK = 512
"""Most queries and keys per step. Not tuned on a TPU yet."""
_LANES = 128


def attend_causal(
    q: Array, k: Array, v: Array, where: Array | None = None, *, block: int = BLOCK, interpret: bool = False
) -> Array:
    """Each query's mix of the keys up to its own: the last query sees all C keys, the one before it all but the last, and so on.

    Within `jax.sharding.use_abstract_mesh` rows are split over `data` and `fsdp` and heads over `tensor`, where they divide them.

    Args:
        q: rotated queries [B, T, N, H].
        k: rotated keys [B, C, K, H], C >= T.
        v: values [B, C, K, H].
        where: bool [B, C], the keys that exist; each query must see one of them. Default: all.
        block: most queries, and keys, per step; a multiple of 128.
        interpret: run the kernel's arithmetic as ordinary operations, on any device.

    Returns:
        [B, T, N, H] in q's dtype.
    """
    rows = () if where is None else (where,)
    return _split(lambda q, k, v, w=None: _attend(q, k, v, w, block, interpret), q, k, v, *rows)


def _split(attend: Any, q: Array, k: Array, v: Array, *rows: Array) -> Array:
    """Call it on each device's share of rows and heads; a Pallas kernel is not partitioned by the compiler."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend(q, k, v, *rows)
    sizes = dict(mesh.shape)
    axes = tuple(axis for axis in ("data", "fsdp") if axis in sizes)
    batch = axes if q.shape[0] % math.prod(sizes[axis] for axis in axes) == 0 else None
    heads = "tensor" if "tensor" in sizes and k.shape[2] % sizes["tensor"] == 0 else None
    spec = PartitionSpec(batch, None, heads, None)
    return jax.shard_map(
        attend,
        in_specs=(spec, spec, spec, *[PartitionSpec(batch)] * len(rows)),
        out_specs=spec,
        check_vma=False,
    )(q, k, v, *rows)


def _attend(q: Array, k: Array, v: Array, where: Array | None, block: int, interpret: bool) -> Array:
    """As `attend_causal`, on one device."""
    length, keys, (heads, size) = q.shape[1], k.shape[1], q.shape[2:]
    own, theirs = _block(length, block), _block(keys, block)
    scaled = (q.astype(jnp.float32) * size**-0.5).astype(q.dtype)
    queries, k, v = (
        _padded(jnp.swapaxes(x, 1, 2), 2, by) for x, by in ((scaled, own), (k, theirs), (v, theirs))
    )
    mask = splash.CausalMask((queries.shape[2], k.shape[2]), offset=keys - length)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=own, block_kv=theirs, block_q_dkv=own, block_kv_dkv=theirs, block_q_dq=own, block_kv_dq=theirs
        ),
        interpret=interpret,
    )  # fmt: skip
    if where is None:
        mixed = jax.vmap(lambda q, k, v: kernel(q, k, v))(queries, k, v)
    else:
        seen = _padded(where.astype(jnp.int32), 1, theirs)
        everyone = jnp.ones((len(q), queries.shape[2]), jnp.int32)
        mixed = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=ids))(
            queries, k, v, splash.SegmentIds(everyone, seen)
        )
    return jnp.swapaxes(mixed[:, :, :length], 1, 2).astype(q.dtype)


def _block(length: int, most: int) -> int:
    """The size of even blocks, a multiple of 128."""
    return -(-length // (_LANES * -(-length // most))) * _LANES


def _padded(x: Array, axis: int, block: int) -> Array:
    """Zeros behind, up to a multiple of the block."""
    behind = -x.shape[axis] % block
    return jnp.pad(x, [(0, behind if i == axis else 0) for i in range(x.ndim)])
