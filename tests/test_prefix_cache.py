import functools
import threading

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prefill import (
    CONFIGS,
    VOCABULARY,
    P,
    T,
    assert_same,
    expected_scores,
    log_odds,
    random_lists,
    scorer,
    with_embeddings,
)

from jaxsearch.config import MeshConfig
from jaxsearch.errors import InputError
from jaxsearch.scoring.buckets import Buckets, plan, prefix_alone
from jaxsearch.scoring.memory import fit_memory
from jaxsearch.scoring.prefill import PrefillScorer
from jaxsearch.scoring.prefix_cache import PrefixCache, PrefixCacheConfig
from jaxsearch.training.sharding import make_mesh

NAME = "grouped, wide heads"
SHORT = 3
"""Prefixes of so many tokens and fewer are not kept here: the buckets have this size and P."""
BUCKETS = Buckets(prefix=(SHORT, P), rows=(1, 3), row_length=(T, 2 * T), tokens=64, item_length=2)


def bytes_of(prefixes, name=NAME):
    """Of so many prefixes, padded to P tokens: keys and values in fp32."""
    layers, _, _, kv_heads, head_dim, *_ = CONFIGS[name]
    return prefixes * P * 2 * layers * kv_heads * head_dim * 4


def keeping(prefixes, name=NAME, buckets=BUCKETS, **options):
    cache = PrefixCacheConfig(max_bytes=bytes_of(prefixes, name), min_tokens=SHORT + 1)
    return PrefillScorer(scorer(name), buckets=buckets, prefix_cache=cache, **options)


def counts(prefill):
    return prefill.usage.prefix_hits, prefill.usage.prefix_misses


def assert_plain(prefill, prefixes, items, name=NAME):
    found = prefill.score_lists(prefixes, items)
    for one, two in zip(found, expected_scores(name, prefixes, items), strict=True):
        assert_same(one, two)


@functools.cache
def shared(name, unrolled):
    """Room for two prefixes, kept over all examples of a test: hits, misses and evictions come mixed."""
    return keeping(2, name, unrolled=unrolled)


@pytest.mark.parametrize(("name", "unrolled"), list(zip(CONFIGS, (True, False, True), strict=False)))
@settings(max_examples=12, deadline=None)
@given(queries=st.integers(1, 5), most=st.integers(0, 9), seed=st.integers(0, 10_000))
def test_scores_behind_kept_prefixes_equal_scores_alone(name, unrolled, queries, most, seed):
    rng = np.random.default_rng(seed)
    prefill = shared(name, unrolled)
    _, items = random_lists(rng, queries, most, longest=2 * T)
    items = [[with_embeddings(rng, i, name) if rng.random() < 0.4 else i for i in q] for q in items]
    # Four prefixes that are kept, some of the same tokens but for the last, and two that are too short.
    known = [[1, 2, 3, 4], [1, 2, 3, 4, 0], [4, 3, 2, 1, 5, 6], [1, 2, 3, 5], [1, 2, 3], [7]]
    assert_plain(prefill, [known[i] for i in rng.integers(0, len(known), queries)], items, name)
    cache = prefill.prefix_cache
    assert cache.bytes == bytes_of(len(cache), name) <= bytes_of(2, name)


def test_a_kept_prefix_is_not_computed_again():
    prefill = keeping(2)
    long, other, short = [1, 2, 3, 4, 5], [5, 4, 3, 2, 1], [1, 2]
    items = [[[7, 8], [9] * T, [3]]]
    assert_plain(prefill, [long], items)
    assert counts(prefill) == (0, 1)
    first = prefill.usage.computed
    assert_plain(prefill, [long], items)
    assert counts(prefill) == (1, 1)
    assert prefill.usage.computed - first == first - P  # its tokens, padded, are all that is saved
    assert prefill.usage.tokens == len(long) + 2 * (3 + T)
    assert 0 <= prefill.usage.padding < 1
    assert_plain(prefill, [short, long, other], items * 3)
    assert counts(prefill) == (2, 2)
    assert_plain(prefill, [short], items)
    assert_plain(prefill, [long], [[]])
    assert counts(prefill) == (2, 2)
    # Fewer FLOPs than with the prefix, by more than its matmuls in one layer.
    shapes = [shape for shape in prefill.compiled_shapes if shape.kept and shape.rows]
    behind, whole = (
        prefill.compile(shapes[0]._replace(kept=kept)).cost_analysis()["flops"] for kept in (True, False)
    )
    c = prefill.config
    assert whole - behind > P * 2 * c.width * (2 * (c.heads + c.kv_heads) * c.head_dim + 3 * c.mlp_width)


def test_prefixes_that_are_padded_alike_are_told_apart():
    """Padding is token 0, which a prefix may also end with."""
    prefill = keeping(4)
    prefixes, items = [[1, 2, 3, 4], [1, 2, 3, 4, 0], [1, 2, 3, 4, 5], [0, 1, 2, 3, 4]], [[[7, 8], [9]]] * 4
    for _ in range(2):
        assert_plain(prefill, prefixes, items)
    assert counts(prefill) == (4, 4)


@pytest.mark.parametrize("unrolled", [False, True])
def test_what_is_kept_is_what_is_used(unrolled):
    """The parity above would hold for a scorer that keeps prefixes and never looks at them."""
    prefill = keeping(1, unrolled=unrolled)
    prefix, items = [1, 2, 3, 4], [[[7, 8], [9]]]
    before = prefill.score_lists([prefix], items)[0]
    state = prefill.prefix_cache.get(prefix, P)
    prefill.prefix_cache.clear()
    prefill.prefix_cache.put(prefix, P, jax.tree.map(lambda x: -x, state))
    assert np.abs(log_odds(prefill.score_lists([prefix], items)[0]) - log_odds(before)).min() > 1e-3


def test_the_prefix_used_longest_ago_makes_room():
    cache = PrefixCache(PrefixCacheConfig(bytes_of(2), 1), scorer().decoder.config)
    one, two, three = (1,), (2,), (1, 0)
    cache.put(one, P, "one")
    cache.put(two, P, "two")
    assert cache.get([1], P) == "one"
    cache.put(three, P, "three")  # `two` goes
    assert [cache.get(key, P) for key in (one, two, three)] == ["one", None, "three"]
    assert cache.get(one, P - 1) is None  # of another padding: of another shape
    cache.put(two, 2 * P, "large")
    assert [cache.get(key, P) for key in (one, three)] == [None, None]
    assert (cache.get(two, 2 * P), cache.bytes, len(cache)) == ("large", bytes_of(2), 1)
    cache.clear()
    assert (cache.bytes, len(cache)) == (0, 0)
    assert cache.keeps(2 * P)
    assert not cache.keeps(2 * P + 1)  # it would never fit


def test_a_list_of_several_calls_survives_evictions():
    rng = np.random.default_rng(1)
    prefill = keeping(1)
    prefixes = [rng.integers(0, VOCABULARY, P).tolist() for _ in range(4)]
    items = [[rng.integers(0, VOCABULARY, 1 + i % T).tolist() for i in range(20)] for _ in prefixes]
    for _ in range(2):
        assert_plain(prefill, prefixes, items)
    assert prefill.usage.prefix_misses > 4
    assert len(prefill.prefix_cache) == 1


def test_new_weights_forget_the_prefixes():
    made = nnx.clone(scorer())
    made.decoder.layers.v[...] = 2 * made.decoder.layers.v[...]
    prefixes, items = [[1, 2, 3, 4]], [[[5], [6, 7]]]
    prefill = keeping(3)
    before = prefill.score_lists(prefixes, items)[0]
    shapes = prefill.compiled_shapes
    prefill.update(made)
    assert len(prefill.prefix_cache) == 0
    after = prefill.score_lists(prefixes, items)[0]
    np.testing.assert_allclose(
        after, PrefillScorer(made, buckets=BUCKETS).score_lists(prefixes, items)[0], atol=2e-5
    )
    assert np.abs(log_odds(after) - log_odds(before)).max() > 1e-2
    assert prefill.compiled_shapes == shapes


def test_a_prefix_is_prefilled_ahead_of_its_items():
    prefill = keeping(3)
    prefix, items = [1, 2, 3, 4, 5], [[[7, 8], [9] * T]]
    prefill.prefill_prefix(prefix)
    prefill.prefill_prefix(prefix)
    assert prefill.compiled_shapes == (prefix_alone(P),)
    assert (prefill.usage.tokens, prefill.usage.computed) == (5, P)
    assert_plain(prefill, [prefix], items)
    assert counts(prefill) == (1, 0)
    prefill.prefill_prefix([1, 2])  # too short to be kept
    assert len(prefill.prefix_cache) == 1
    off = PrefillScorer(scorer(), buckets=BUCKETS)
    with pytest.raises(InputError, match=r"keeps no prefixes: give it prefix_cache=PrefixCacheConfig"):
        off.prefill_prefix(prefix)
    assert (len(off.prefix_cache), off.compiled_shapes) == (0, ())
    with pytest.raises(ValueError, match="the prefix has 0 tokens: give 1 to 6"):
        prefill.prefill_prefix([])
    with pytest.raises(ValueError, match=f"the prefix has token id {VOCABULARY}: the vocabulary ends at 28"):
        prefill.prefill_prefix([1, 2, 3, VOCABULARY])
    with pytest.raises(ValueError, match="query 1 has token id -1"):
        prefill.score_lists([[1], [1, 2, 3, -1]], [[[1]], [[1]]])
    assert len(prefill.prefix_cache) == 1


def test_prefixes_come_from_many_threads():
    rng = np.random.default_rng(2)
    prefill = keeping(2)
    prefixes = [rng.integers(0, VOCABULARY, P).tolist() for _ in range(6)]
    items = [[[i], [i, i]] for i in range(6)]
    prefill.warm_up(prefixes, items)
    threads = [threading.Thread(target=prefill.prefill_prefix, args=(prefix,)) for prefix in prefixes]
    for thread in threads:
        thread.start()
    assert_plain(prefill, prefixes, items)
    for thread in threads:
        thread.join()
    assert prefill.prefix_cache.bytes == bytes_of(2)


def test_after_warming_up_nothing_is_compiled():
    rng = np.random.default_rng(6)
    prefill = keeping(2, buckets=Buckets((SHORT, P), (3,), (T,), tokens=64, item_length=2))
    prefixes, items = [[1] * P, [1]], [[[1] * T] * 9, [with_embeddings(rng, [1] * T) for _ in range(3)]]
    shapes = prefill.warm_up(prefixes, items)
    assert prefix_alone(P) in shapes
    assert all(shape in prefill.buckets for shape in shapes)
    lists = []
    for queries, most in ((1, 1), (7, 5), (3, 40), (2, 0)):
        prefixes, items = random_lists(rng, queries, most)
        lists.append(
            (prefixes, [[with_embeddings(rng, i) if rng.random() < 0.3 else i for i in q] for q in items])
        )
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compilations.append(event) if "backend_compile" in event else None
    )
    found = [prefill.score_lists(*one) for one in lists]
    prefill.prefill_prefix([2] * P)
    prefill.update(scorer())
    assert compilations == []
    assert prefill.compiled_shapes == shapes
    assert min(counts(prefill)) > 0
    for (prefixes, items), scores in zip(lists, found, strict=True):
        for one, two in zip(scores, expected_scores(NAME, prefixes, items), strict=True):
            assert_same(one, two)


def test_settled_shapes_give_the_same_bits_kept_or_not():
    rng = np.random.default_rng(8)
    prefill = keeping(6)
    prefixes, items = random_lists(rng, 6, 9)
    prefill.settle(prefixes, items)
    first = prefill.score_lists(prefixes, items)
    misses = prefill.usage.prefix_misses
    assert misses > 0
    for _ in range(2):
        for one, two in zip(first, prefill.score_lists(prefixes, items), strict=True):
            np.testing.assert_array_equal(one, two)
        assert prefill.usage.prefix_hits > 0
        prefill.prefix_cache.clear()
        prefill.prefill_prefix(prefixes[-1])
    assert prefill.usage.prefix_misses > misses


@pytest.mark.parametrize("backend", ["fused", "pallas_interpret"])
def test_every_backend_reads_kept_prefixes(backend):
    rng = np.random.default_rng(5)
    prefixes, items = [[1, 2, 3, 4], [5, 4, 3, 2, 1]], random_lists(rng, 2, 6)[1]
    prefill = keeping(2, buckets=Buckets((P,), (8,), (T,), tokens=500), backend=backend)
    for _ in range(2):
        assert_plain(prefill, prefixes, items)
    assert counts(prefill)[0] > 0


@settings(max_examples=40, deadline=None)
@given(
    queries=st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(1, 50), max_size=40)), max_size=8),
    compile_flops=st.sampled_from([0.0, 1e7, 1e12]),
)
def test_a_plan_keeps_kept_prefixes_apart(queries, compile_flops):
    buckets = Buckets(
        (8, 16, 40), (1, 2, 8), (8, 16, 64), tokens=256, compile_flops=compile_flops, item_length=1
    )
    prefixes, items = [p for p, _ in queries], [lengths for _, lengths in queries]
    config = scorer().decoder.config
    calls = plan(prefixes, items, buckets=buckets, config=config, kept=[16, 40])
    seen = sorted((unit.query, int(i)) for call in calls for unit in call.units for i in unit.items)
    assert seen == [(q, i) for q, lengths in enumerate(items) for i in range(len(lengths))]
    for shape, units in calls:
        assert shape in buckets
        for unit in units:
            size = min(size for size in buckets.prefix if size >= prefixes[unit.query])
            assert (shape.prefix, shape.kept) == ((size, True) if size > 8 else (shape.prefix, False))
    again = plan(
        prefixes, items, buckets=buckets, config=config, kept=[16, 40], compiled={c.shape for c in calls}
    )
    assert compile_flops < 1e12 or {call.shape for call in again} <= {call.shape for call in calls}


def test_kept_prefixes_are_part_of_the_memory_plan():
    name, limit, tokens = "one kv head, odd count", 1_000_000, []  # one layer compiles fastest
    for kept in (0, 1, limit // 2):  # one byte is too little to keep a prefix
        cache = PrefixCacheConfig(max_bytes=kept, min_tokens=1)
        tokens.append(fit_memory(PrefillScorer(scorer(name), prefix_cache=cache), P, T, limit=limit))
    assert tokens[0] == tokens[1] > tokens[2]
    with pytest.raises(InputError, match="fewer bytes for kept prefixes"):
        fit_memory(keeping(limit // bytes_of(1, name), name), P, T, limit=limit)


def test_bad_settings_are_named():
    with pytest.raises(InputError, match=r"PrefixCacheConfig\.max_bytes is -1: give at least 0"):
        PrefixCacheConfig(max_bytes=-1)
    with pytest.raises(InputError, match=r"PrefixCacheConfig\.min_tokens is 0: give at least 1"):
        PrefixCacheConfig(min_tokens=0)
    with pytest.raises(InputError, match="prefix_cache is 8 with a mesh: this runs on one device"):
        PrefillScorer(
            scorer("four heads"),
            mesh=make_mesh(MeshConfig(2, 1, 1)),
            prefix_cache=PrefixCacheConfig(max_bytes=8),
        )
