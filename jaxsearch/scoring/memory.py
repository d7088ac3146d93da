"""How many tokens a call may hold: planned before the first request, by what the compiler says that programs need."""

import os
from dataclasses import replace

import jax

from jaxsearch.errors import InputError
from jaxsearch.scoring.buckets import Shape, prefix_alone, steps
from jaxsearch.scoring.prefill import PrefillScorer

SHARE = 0.9
"""Of the free memory: the rest is for transfers and for what the allocator cannot use."""


def free_bytes(device: jax.Device | None = None) -> int:
    """What a device still has: its own figure, or the free memory of this machine where it gives none (CPU)."""
    stats = (device or jax.devices()[0]).memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def program_bytes(program: jax.stages.Compiled) -> int:
    """What a call takes beside the weights, which are there already."""
    needs = program.memory_analysis()
    assert needs is not None  # CPU, GPU and TPU all tell
    return needs.temp_size_in_bytes + needs.output_size_in_bytes


def fit_memory(
    prefill: PrefillScorer,
    prefix: int,
    row_length: int,
    *,
    limit: int | None = None,
    most: int = 1 << 17,
) -> int:
    """Let calls be as large as the device allows, and return `Buckets.tokens`, the number of tokens in one.

    Two small programs give the memory per row; the number of rows that follows is compiled and taken if it fits in
    `SHARE` of the limit, else the next smaller one is tried. Kept prefixes (`PrefixCacheConfig.max_bytes`) take their memory
    first, with two calls' worth of those that lose their place while calls still read them. Call it before `warm_up`. On a
    CPU memory is not what bounds a call: small ones stay in its cache, and the default is faster.

    Args:
        prefill: whose weights and buckets; its buckets change.
        prefix: tokens of the longest prefix.
        row_length: tokens of the longest row.
        limit: bytes; default: what the device has free.
        most: tokens beyond which larger calls gain nothing.

    Raises:
        InputError: not even one row fits.
    """
    cache = prefill.prefix_cache
    kept = cache.keeps(prefix)
    room = SHARE * (free_bytes() if limit is None else limit) - (cache.config.max_bytes - cache.bytes)

    alone = program_bytes(prefill.compile(prefix_alone(prefix))) if kept else 0

    def needed(rows: int) -> int:
        program = program_bytes(prefill.compile(Shape(1, prefix, rows, row_length, kept=kept)))
        reading = 2 * (prefix + rows * row_length) * cache.bytes_per_token if kept else 0
        return reading + max(program, alone)

    few, some = needed(1), needed(3)
    if few > room:
        raise InputError(
            f"one row of {row_length} tokens behind a prefix of {prefix} needs {few} bytes, there are {int(room)}: "
            "use a smaller model, bf16, int8 weights, fewer bytes for kept prefixes, or more devices"
        )
    per_row = max(1, (some - few) // 2)
    bound = max(1, min(int((room - few) // per_row) + 1, (most - prefix) // row_length))
    rows = next(rows for rows in reversed(steps(1, bound)) if rows == 1 or needed(rows) <= room)
    tokens = prefix + rows * row_length
    old = prefill.buckets
    prefill.buckets = replace(
        old,
        prefix=_up_to(old.prefix, prefix),
        rows=_up_to(old.rows, rows),
        row_length=_up_to(old.row_length, row_length),
        tokens=tokens,
    )
    return tokens


def _up_to(sizes: tuple[int, ...], largest: int) -> tuple[int, ...]:
    return (*(size for size in sizes if size < largest), largest)
