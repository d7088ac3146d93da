"""Greedy and sampled generation with a key/value cache (judge rationales, summaries).

Axes: B prompts, T prompt tokens, M new tokens, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from jaxsearch.errors import InputError
from jaxsearch.models.attention import Cached, Causal
from jaxsearch.models.decoder import Decoder


def generate(
    decoder: Decoder,
    tokens: ArrayLike,
    lengths: ArrayLike,
    *,
    max_new_tokens: int,
    eos_id: int | Sequence[int] | None,
    first_ids: Sequence[int] | None = None,
    avoid_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Array | None = None,
) -> tuple[Array, Array]:
    """Continue each prompt until an end token or `max_new_tokens`.

    One compilation serves all calls with the same B, T, `max_new_tokens`, `top_k` and kind (greedy, sampled,
    with top_p).

    Args:
        decoder: the model.
        tokens: prompts, int [B, T], padded on the right with anything.
        lengths: how many tokens of each prompt exist, int [B], each at least 1.
        max_new_tokens: M, at least 1.
        eos_id: the token (or tokens) that end a text; None: none does.
        first_ids: what a text may begin with, such as a judge's grades; None: anything.
        avoid_ids: what stands nowhere in a text, such as control tokens that end none.
        temperature: 0 takes the likeliest token; above, logits are divided by it and sampled.
        top_k: sample among the k likeliest tokens only.
        top_p: sample among the likeliest tokens that together reach this probability (at least one).
        key: randomness; required where the temperature is above 0.

    Returns:
        New tokens int32 [B, M], 0 after a text's end, and the count of each text's tokens int32 [B], its end
        token included.

    Raises:
        InputError: an argument is out of range; the message names it, its value and the fix.
    """
    tokens, lengths = np.asarray(tokens, np.int32), np.asarray(lengths, np.int32)
    if tokens.ndim != 2 or lengths.shape != tokens.shape[:1]:
        raise InputError(f"tokens has shape {tokens.shape}, lengths {lengths.shape}: give [B, T] and [B]")
    if lengths.size and not (lengths.min() >= 1 and lengths.max() <= tokens.shape[1]):
        raise InputError(f"lengths is {lengths}: each must lie between 1 and T = {tokens.shape[1]}")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}: give at least 1")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature is {temperature}: give 0 (greedy) or a positive number")
    if temperature > 0 and key is None:
        raise InputError("key is None: sampling needs one, such as jax.random.key(0)")
    if top_k is not None and not 1 <= top_k <= decoder.config.vocab_size:
        raise InputError(f"top_k is {top_k}: give 1 to {decoder.config.vocab_size} (the vocabulary)")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}: give a probability above 0, at most 1")
    if first_ids is not None and not len(first_ids):
        raise InputError(f"first_ids is {first_ids}: give at least one id, or None")
    for name, ids in (("first_ids", first_ids or ()), ("avoid_ids", avoid_ids)):
        if not all(0 <= i < decoder.config.vocab_size for i in ids):
            raise InputError(f"{name} is {ids}: give ids from 0 to {decoder.config.vocab_size - 1}")
    ends = [] if eos_id is None else [eos_id] if isinstance(eos_id, int) else list(eos_id)
    graph, state = nnx.split(decoder)
    probability = None if top_p is None else jnp.float32(top_p)
    may = allowed_tokens(decoder.config.vocab_size, avoid_ids)
    return continue_texts(
        graph,
        state,
        tokens,
        lengths,
        jnp.asarray(ends, jnp.int32),
        may if first_ids is None else may & jnp.zeros_like(may).at[jnp.asarray(first_ids)].set(True),
        may,
        None if key is None or temperature == 0 else (key, jnp.float32(temperature), probability),
        max_new_tokens=max_new_tokens,
        top_k=top_k if temperature > 0 else None,
    )


def allowed_tokens(vocabulary: int, avoid_ids: Sequence[int]) -> Array:
    """bool [V], every token but these."""
    ids = np.asarray(avoid_ids, np.int32)
    return jnp.ones(vocabulary, bool).at[ids].set(False)


@partial(jax.jit, static_argnums=(0,), static_argnames=("max_new_tokens", "top_k", "samples"))
def continue_texts(
    graph: Any,
    state: Any,
    tokens: Array,
    lengths: Array,
    ends: Array,
    first: Array,
    may: Array,
    sampling: tuple[Array, Array, Array | None] | None,
    *,
    max_new_tokens: int,
    top_k: int | None = None,
    samples: int = 1,
) -> tuple[Array, Array]:
    """What `generate` computes, for callers that are traced themselves.

    Args:
        graph: of `nnx.split(decoder)`.
        state: likewise.
        tokens: int [B, T].
        lengths: int [B].
        ends: int [E], tokens that end a text.
        first: bool [V], what a text may begin with.
        may: bool [V], what may stand anywhere else.
        sampling: key, temperature and top_p (or None); None: greedy.
        max_new_tokens: M.
        top_k: as in `generate`.
        samples: texts of each prompt, one after another; the prompt is read once for all of them.

    Returns:
        As `generate`, [B * samples, M] and [B * samples].
    """
    decoder: Decoder = nnx.merge(graph, state)
    rows, length = tokens.shape[0] * samples, tokens.shape[1]

    def choose(hidden: Array, step: Array | int, may: Array) -> Array:
        logits = jnp.where(may[None], decoder.logits(hidden), -jnp.inf)
        if sampling is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        key, temperature, top_p = sampling
        drawn = sample(logits, jax.random.fold_in(key, step), temperature, top_p, top_k=top_k)
        return drawn.astype(jnp.int32)

    positions = jnp.broadcast_to(jnp.arange(length)[None], tokens.shape)
    where = positions < lengths[:, None]
    # Padding may be any number: id 0 exists in every vocabulary.
    x = decoder.embed(jnp.where(where, tokens, 0))
    hidden, prompt = decoder(x, positions, Causal(where, keep_kv=True))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    # A slot per prompt token and new token, but for the last, which is never fed back.
    room = [(0, 0), (0, 0), (0, max_new_tokens - 1), (0, 0), (0, 0)]
    cache = jax.tree.map(lambda x: jnp.pad(x, room), prompt)
    if samples > 1:
        last, lengths = (jnp.repeat(x, samples, axis=0) for x in (last, lengths))
        cache = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=1), cache)

    def record(
        step: Any, token: Array, done: Array, counts: Array, out: Array, cache: Any
    ) -> tuple[Any, ...]:
        token = jnp.where(done, 0, token)
        out = out.at[:, step].set(token)
        counts = counts + ~done
        done = done | jnp.any(token[:, None] == ends[None], axis=-1)
        return jnp.asarray(step + 1), token, done, counts, out, cache

    def going(carry: tuple[Any, ...]) -> Array:
        step, _, done, *_ = carry
        return (step < max_new_tokens) & ~jnp.all(done)

    def advance(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, token, done, counts, out, cache = carry
        slots = (lengths + step - 1)[:, None]
        hidden, cache = decoder(decoder.embed(token[:, None]), slots, Cached(slots), cache)
        return record(step, choose(hidden[:, 0], step, may), done, counts, out, cache)

    done, counts = jnp.zeros(rows, bool), jnp.zeros(rows, jnp.int32)
    out = jnp.zeros((rows, max_new_tokens), jnp.int32)
    begun = record(0, choose(last, 0, first), done, counts, out, cache)
    *_, counts, out, _ = jax.lax.while_loop(going, advance, begun)
    return out, counts


def sample(
    logits: Array, key: Array, temperature: Array, top_p: Array | None = None, *, top_k: int | None = None
) -> Array:
    """Draw one token per row (logits fp32 [B, V]; int [B] out), within top_k first and then top_p of what is
    left.
    """
    logits = logits / temperature
    if top_k is not None:
        floor = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    if top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        chances = jax.nn.softmax(ordered, axis=-1)
        # A token stays if the likelier ones have not reached top_p yet.
        stays = jnp.cumsum(chances, axis=-1) - chances < top_p
        floor = jnp.min(jnp.where(stays, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1)
