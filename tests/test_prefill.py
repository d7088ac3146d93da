import dataclasses
import doctest
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsearch.config import MeshConfig
from jaxsearch.errors import InputError
from jaxsearch.models import attention as attention_module
from jaxsearch.models.attention import Causal
from jaxsearch.models.decoder import Decoder, DecoderConfig
from jaxsearch.models.presets import preset
from jaxsearch.scoring import buckets as buckets_module
from jaxsearch.scoring.buckets import Buckets, Choice, Shape, choose, plan, steps
from jaxsearch.scoring.packing import EmbeddedItem, PackedItems, pack_items
from jaxsearch.scoring.prefill import (
    PrefillScorer,
    answer_hidden,
    answer_hidden_at_once,
    pad_prefixes,
    score,
)
from jaxsearch.training.sharding import make_mesh

VOCABULARY = 29
CONFIGS = {  # layers, width, heads, kv_heads, head_dim, qk_norm, tied
    "every head its own": (2, 12, 2, 2, 6, False, True),
    "grouped, wide heads": (2, 8, 6, 2, 10, True, False),
    "one kv head, odd count": (1, 10, 3, 1, 2, True, True),
    "four heads": (2, 8, 4, 4, 4, True, True),
}
P, T, R, L, N = 6, 8, 7, 7, 14  # prefix, row, rows and slots per query; sequences of the plain path


class LabelScorer(nnx.Module):
    def __init__(self, decoder: Decoder, rngs: nnx.Rngs):
        self.decoder = decoder
        self.actions = nnx.Param(jax.random.normal(rngs.params(), (2, decoder.config.width)))

    def label_matrix(self):
        return jnp.concatenate([self.decoder.label_rows([3, 5]), self.actions[...]])


@functools.cache
def scorer(name="grouped, wide heads"):
    layers, width, heads, kv_heads, head_dim, qk_norm, tied = CONFIGS[name]
    config = DecoderConfig(
        vocab_size=VOCABULARY, layers=layers, width=width, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        mlp_width=14, rope_theta=500.0, rms_eps=1e-5, qk_norm=qk_norm, tied=tied,
    )  # fmt: skip

    def make():
        rngs = nnx.Rngs(0)
        return LabelScorer(Decoder(config, rngs=rngs), rngs)

    # Filled by numpy: several seconds faster than the init, and no norm's scale is 1.
    graphdef, abstract = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(7)
    return nnx.merge(
        graphdef,
        jax.tree.map(lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape, np.float32)), abstract),
    )


def plain_hidden(decoder, x, where):
    """Last hidden state [N, D] of whole sequences [N, S, D], each alone through the plain causal pass."""
    positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], where.shape)
    hidden, _ = decoder(x, positions, Causal(where))
    return hidden[jnp.arange(len(x)), jnp.maximum(jnp.sum(where, axis=1) - 1, 0)]


@functools.cache
def compiled(name):
    """Plain and packed scores of one decoder, compiled once for all examples."""
    graphdef, state = nnx.split(scorer(name))

    @jax.jit
    def plain(tokens, where, own, embeddings):
        made = nnx.merge(graphdef, state)
        x = jnp.where(own[..., None], embeddings, made.decoder.embed(tokens))
        return plain_hidden(made.decoder, x, where) @ made.label_matrix().T

    @jax.jit
    def packed(prefix, items):
        return score(nnx.merge(graphdef, state), prefix.tokens, prefix.where, items)

    return plain, packed


def expected_scores(name, prefixes, items):
    """Every item's label logits through the plain path, one [L, C] per query."""
    plain, _ = compiled(name)
    pairs = [(prefix, item) for prefix, query in zip(prefixes, items, strict=True) for item in query]
    width = CONFIGS[name][1]
    rows = []
    for start in range(0, len(pairs), N):
        chunk = pairs[start : start + N]
        own, embeddings = np.zeros((N, P + 2 * T), bool), np.zeros((N, P + 2 * T, width), np.float32)
        texts = []
        for row, (prefix, item) in enumerate(chunk):
            if isinstance(item, EmbeddedItem):
                inside = slice(len(prefix), len(prefix) + len(item.embeddings))
                own[row, inside], embeddings[row, inside] = True, item.embeddings
                item = [0] * len(item.embeddings) + list(item.tokens)
            texts.append(prefix + item)
        whole = pad_prefixes(texts, length=P + 2 * T, queries=N)
        rows += list(np.asarray(plain(whole.tokens, whole.where, own, embeddings))[: len(chunk)])
    ends = np.cumsum([0, *map(len, items)])
    return [np.array(rows[a:b]).reshape(-1, 4) for a, b in itertools.pairwise(ends)]


def log_odds(logits):
    """Yes against no, and each action."""
    return np.concatenate([logits[..., :1] - logits[..., 1:2], logits[..., 2:]], axis=-1)


def assert_same(found, expected):
    np.testing.assert_allclose(log_odds(found), log_odds(expected), atol=1e-4, rtol=0)


TOKEN = st.integers(0, VOCABULARY - 1)
LISTS = st.lists(st.lists(TOKEN, min_size=1, max_size=T), max_size=L)
PREFIX = st.lists(TOKEN, min_size=1, max_size=P)


@pytest.mark.parametrize("name", list(CONFIGS)[:3])
@settings(max_examples=25, deadline=None)
@given(
    prefixes=st.tuples(PREFIX, PREFIX),
    items=st.tuples(LISTS, LISTS),
    one_per_row=st.booleans(),
    junk=TOKEN,
    data=st.data(),
)
def test_packed_scores_equal_scores_alone(name, prefixes, items, one_per_row, junk, data):
    expected = expected_scores(name, prefixes, items)
    orders = [data.draw(st.permutations(range(len(query)))) for query in items]
    shuffled = [[query[i] for i in order] for query, order in zip(items, orders, strict=True)]
    packed = pack_items(shuffled, row_length=T, rows=R, slots=L, one_per_row=one_per_row)
    packed = packed._replace(tokens=np.where(packed.segments > 0, packed.tokens, junk))
    prefix = pad_prefixes(prefixes, length=P)
    prefix = prefix._replace(tokens=np.where(prefix.where, prefix.tokens, junk))
    found = np.asarray(compiled(name)[1](prefix, packed))
    assert found.dtype == np.float32
    for query, order in enumerate(orders):
        assert_same(found[query, : len(order)], expected[query][order])
    np.testing.assert_array_equal(found[~packed.where], 0)


@functools.cache
def at_once(name, alone, block):
    """Scores of one decoder by a single pass over prefix and items, in blocks of so many queries."""
    graphdef, state = nnx.split(scorer(name))

    @jax.jit
    def run(prefix, items):
        made = nnx.merge(graphdef, state)
        return answer_hidden_at_once(made.decoder, prefix, items, alone=alone) @ made.label_matrix().T

    return run


@pytest.mark.parametrize("block", [3, 256])
@pytest.mark.parametrize("name", list(CONFIGS)[:3])
@settings(max_examples=12, deadline=None)
@given(prefixes=st.tuples(PREFIX, PREFIX), items=st.tuples(LISTS, LISTS), alone=st.booleans(), junk=TOKEN)
def test_one_pass_over_prefix_and_items_equals_scores_alone(name, block, prefixes, items, alone, junk):
    expected = expected_scores(name, prefixes, items)
    packed = pack_items(items, row_length=T, rows=R, slots=L, one_per_row=alone)
    packed = packed._replace(tokens=np.where(packed.segments > 0, packed.tokens, junk))
    prefix = pad_prefixes(prefixes, length=P)
    prefix = prefix._replace(tokens=np.where(prefix.where, prefix.tokens, junk))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "LARGEST_BLOCK", block)  # read while tracing, once per block
        found = np.asarray(at_once(name, alone, block)(prefix, packed))
    for query, wanted in enumerate(expected):
        assert_same(found[query, : len(wanted)], wanted)
    np.testing.assert_array_equal(found[~packed.where], 0)


def test_the_last_layer_computes_the_answers_alone():
    """30 items of 20 tokens in one layer: what is left of its queries, its output and its MLP is a twentieth."""
    c = dataclasses.replace(scorer().decoder.config, layers=1, width=256)
    decoder = nnx.eval_shape(lambda: Decoder(c, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(decoder)
    items = pack_items([[[1] * 20] * 30], row_length=20, one_per_row=True)
    prefix = pad_prefixes([[1] * 4])

    def flops(alone):
        def run(state, prefix, items):
            return answer_hidden_at_once(nnx.merge(graphdef, state), prefix, items, alone=alone)

        return jax.jit(run).lower(state, prefix, items).compile().cost_analysis()["flops"]

    saved = 574 * 2 * c.width * (2 * c.heads * c.head_dim + 3 * c.mlp_width)  # 604 tokens, 30 of them answers
    assert flops(False) - flops(True) > 0.95 * saved


def test_scores_differ_between_items_and_prefixes():
    """The parity above would hold for a decoder that ignores its input: this one does not."""
    items = [[[1, 2, 3], [3, 2, 1], [3]]]
    one, two = (expected_scores("grouped, wide heads", [prefix], items)[0] for prefix in ([4, 9], [9, 4]))
    assert np.ptp(log_odds(one), axis=0).min() > 0.01
    assert np.abs(log_odds(one) - log_odds(two)).min() > 1e-3


def test_gradient_equals_the_plain_path_with_a_padding_query_beside():
    graphdef, state = nnx.split(scorer().decoder)
    prefixes, items = [[1, 2, 3], [4]], [[[5, 6], [7], [8, 9, 10, 11]], [[12, 13, 14]]]
    weights = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    whole = pad_prefixes([p + item for p, query in zip(prefixes, items, strict=True) for item in query])
    prefix, packed = pad_prefixes(prefixes, queries=3), pack_items([*items, []], row_length=5, rows=3)

    @jax.jit
    @jax.grad
    def plain(state):
        decoder = nnx.merge(graphdef, state)
        return jnp.sum(plain_hidden(decoder, decoder.embed(whole.tokens), whole.where) * weights)

    @jax.jit
    @jax.grad
    def shared(state):
        hidden = answer_hidden(nnx.merge(graphdef, state), prefix.tokens, prefix.where, packed)
        return jnp.sum(hidden[packed.where] * weights)

    expected, found = plain(state), shared(state)
    for (path, one), (_, two) in zip(nnx.to_flat_state(expected), nnx.to_flat_state(found), strict=True):
        a, b = np.asarray(one[...]), np.asarray(two[...])
        size = np.abs(a).max()
        assert size > 0 or "unembedding" in path
        np.testing.assert_allclose(b, a, atol=1e-5 * max(1.0, size), err_msg=str(path))


def with_embeddings(rng, item, name="grouped, wide heads"):
    """The item with embeddings in place of its first tokens."""
    count = int(rng.integers(0, len(item) + 1))
    return EmbeddedItem(rng.standard_normal((count, CONFIGS[name][1])).astype(np.float32), item[count:])


@pytest.mark.parametrize("name", list(CONFIGS)[:3])
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([0.0, 0.5, 1.0]))
def test_embedding_items_equal_embeddings_in_the_plain_pass(name, seed, one_per_row, share):
    rng = np.random.default_rng(seed)
    prefixes, items = random_lists(rng, 2, L)
    items = [
        [with_embeddings(rng, item, name) if rng.random() < share else item for item in q] for q in items
    ]
    packed = pack_items(items, row_length=T, rows=R, slots=L, one_per_row=one_per_row)
    if (
        packed.embeddings is not None
    ):  # one shape for all examples, and what is no item's embedding is never read
        more = L * T - packed.embeddings.shape[1]
        table = np.pad(packed.embeddings, ((0, 0), (0, more), (0, 0)))
        used = [sum(len(i.embeddings) for i in q if isinstance(i, EmbeddedItem)) for q in items]
        for query, count in enumerate(used):
            table[query, count:] = np.nan
        packed = packed._replace(embeddings=table)
        assert (packed.embedded >= 0).sum() == sum(used)
    found = np.asarray(compiled(name)[1](pad_prefixes(prefixes, length=P), packed))
    for query, expected in enumerate(expected_scores(name, prefixes, items)):
        assert_same(found[query, : len(expected)], expected)


def test_gradients_reach_the_embeddings_of_items():
    graphdef, state = nnx.split(scorer().decoder)
    rng = np.random.default_rng(0)
    items = [[EmbeddedItem(rng.standard_normal((2, 8)).astype(np.float32), [5]), [6, 7]]]
    prefix, packed = pad_prefixes([[1, 2]]), pack_items(items, row_length=3)

    @jax.jit
    @jax.grad
    def gradient(table):
        hidden = answer_hidden(
            nnx.merge(graphdef, state), prefix.tokens, prefix.where, packed._replace(embeddings=table)
        )
        return jnp.sum(hidden**3)

    found = np.asarray(gradient(packed.embeddings))
    assert found.shape == (1, 2, 8)
    assert np.isfinite(found).all()
    assert np.abs(found).max(axis=-1).min() > 1e-4


SMALL = Buckets(prefix=(P,), rows=(1, 3), row_length=(T, 2 * T), tokens=64, item_length=2)


def random_lists(rng, queries, most, longest=T):
    prefixes = [rng.integers(0, VOCABULARY, rng.integers(1, P + 1)).tolist() for _ in range(queries)]
    items = [
        [rng.integers(0, VOCABULARY, rng.integers(1, longest + 1)).tolist() for _ in range(count)]
        for count in rng.integers(0, most + 1, queries)
    ]
    return prefixes, items


@functools.cache
def shared_prefill():
    return PrefillScorer(scorer(), buckets=SMALL)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 9), st.integers(0, 12), st.integers(0, 10_000))
def test_score_lists_equals_scores_alone(queries, most, seed):
    prefixes, items = random_lists(np.random.default_rng(seed), queries, most)
    found = shared_prefill().score_lists(prefixes, items)
    expected = expected_scores("grouped, wide heads", prefixes, items)
    assert [f.shape for f in found] == [(len(query), 4) for query in items]
    for one, two in zip(found, expected, strict=True):
        assert_same(one, two)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(0, 12), st.integers(0, 10_000))
def test_score_lists_mixes_token_and_embedding_items(queries, most, seed):
    rng = np.random.default_rng(seed)
    prefixes, items = random_lists(rng, queries, most)
    items = [[with_embeddings(rng, item) if rng.random() < 0.5 else item for item in q] for q in items]
    found = shared_prefill().score_lists(prefixes, items)
    for one, two in zip(found, expected_scores("grouped, wide heads", prefixes, items), strict=True):
        assert_same(one, two)
    assert all(shape in SMALL for shape in shared_prefill().compiled_shapes)


def test_a_thousand_items_of_an_embedding_and_a_token():
    rng = np.random.default_rng(4)
    items = [EmbeddedItem(rng.standard_normal((1, 8)).astype(np.float32), [3]) for _ in range(1000)]
    found = shared_prefill().score_lists([[1, 2, 3]], [items])
    assert_same(found[0], expected_scores("grouped, wide heads", [[1, 2, 3]], [items])[0])
    assert np.ptp(log_odds(found[0]), axis=0).min() > 0.1


@pytest.mark.parametrize("backend", ["fused", "pallas_interpret"])
def test_every_backend_gives_the_scores(backend):
    rng = np.random.default_rng(5)
    prefixes, items = random_lists(rng, 3, 6, longest=2 * T)
    items[1] = [with_embeddings(rng, item) for item in items[1]]
    prefill = PrefillScorer(scorer(), buckets=Buckets((P,), (8,), (2 * T,), tokens=500), backend=backend)
    found = prefill.score_lists(prefixes, items)
    for one, two in zip(found, expected_scores("grouped, wide heads", prefixes, items), strict=True):
        assert_same(one, two)
    with pytest.raises(InputError, match="backend 'gpu' is unknown"):
        PrefillScorer(scorer(), backend="gpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": 8}, "mesh is 8: give a mesh with the axes data, fsdp, tensor"),
        ({"mesh": jax.make_mesh((1,), ("x",))}, r"mesh is Mesh.*'x'.*: give a mesh with the axes"),
        ({"prefix_cache": 1 << 30}, "prefix_cache is 1073741824: give a PrefixCacheConfig"),
    ],
)
def test_settings_of_another_kind_are_named(options, message):
    with pytest.raises(InputError, match=message):
        PrefillScorer(scorer(), **options)


def test_bad_embeddings_are_named():
    with pytest.raises(InputError, match=r"int64 \(2, 3\): give floats \[S, D\]"):
        EmbeddedItem(np.zeros((2, 3), np.int64))
    with pytest.raises(InputError, match=r"float64 \(3,\): give floats"):
        EmbeddedItem(np.zeros(3))
    good, wrong, none = (
        EmbeddedItem(np.zeros((s, d)), t) for s, d, t in ((1, 8, [1]), (1, 7, []), (0, 8, []))
    )
    with pytest.raises(InputError, match="query 1, item 1 has embeddings of width 7: give 8"):
        shared_prefill().score_lists([[1], [2]], [[[1]], [good, wrong]])
    with pytest.raises(InputError, match="query 0, item 1 has embeddings of width 7: give 8"):
        pack_items([[good, wrong]], row_length=4)
    with pytest.raises(ValueError, match="query 0, item 0 has 0 tokens"):
        shared_prefill().score_lists([[1]], [[none]])


def test_one_item_many_items_and_long_items_in_one_call():
    rng = np.random.default_rng(1)
    prefixes, items = random_lists(rng, 3, 0)
    items[0] = [[7]]
    items[1] = [rng.integers(0, VOCABULARY, 1 + i % T).tolist() for i in range(200)]
    items[2] = [rng.integers(0, VOCABULARY, 2 * T).tolist(), [1]]
    found = shared_prefill().score_lists(prefixes, items)
    for one, two in zip(found, expected_scores("grouped, wide heads", prefixes, items), strict=True):
        assert_same(one, two)


def test_no_recompilation_within_the_closed_set():
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compilations.append(event) if "backend_compile" in event else None
    )
    closed = Buckets(prefix=(P,), rows=(3,), row_length=(T,), tokens=1)
    prefill = PrefillScorer(scorer(), buckets=closed)
    rng = np.random.default_rng(2)
    prefill.score_lists(*random_lists(rng, 2, 4))
    assert prefill.compiled_shapes == (Shape(queries=1, prefix=P, rows=3, row_length=T, shared=False),)
    assert compilations
    compilations.clear()
    for queries, most in ((1, 1), (7, 5), (3, 40)):
        prefill.score_lists(*random_lists(rng, queries, most))
    prefill.update(scorer())
    prefill.score_lists(*random_lists(rng, 2, 2))
    assert len(prefill.compiled_shapes) == 1
    assert compilations == []


def test_after_warming_up_nothing_is_compiled():
    rng = np.random.default_rng(6)
    prefill = PrefillScorer(scorer(), buckets=Buckets(tokens=64))
    prefixes, items = random_lists(rng, 4, 9)
    items[0] = [[1] * T] * 9
    items[1] = [with_embeddings(rng, [1] * T) for _ in range(3)]
    prefixes[2] = [1] * P
    shapes = prefill.warm_up(prefixes, items)
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compilations.append(event) if "backend_compile" in event else None
    )
    for queries, most in ((1, 1), (7, 5), (3, 40), (2, 0)):
        prefixes, items = random_lists(rng, queries, most)
        items = [[with_embeddings(rng, i) if rng.random() < 0.3 else i for i in q] for q in items]
        found = prefill.score_lists(prefixes, items)
        for one, two in zip(found, expected_scores("grouped, wide heads", prefixes, items), strict=True):
            assert_same(one, two)
    assert prefill.compiled_shapes == shapes
    assert (
        not [event for event in compilations if event] or prefill.usage.calls
    )  # other functions of the test compile
    with pytest.raises(ValueError, match="has 99 tokens: give 1 to"):
        prefill.score_lists([[1]], [[[1] * 99]])
    with pytest.raises(InputError, match="nothing to warm up with"):
        prefill.warm_up([[1]], [[]])


def test_fitted_buckets_pad_less():
    rng = np.random.default_rng(7)
    prefixes = [[1] * 6] * 3
    items = [[rng.integers(0, VOCABULARY, 5).tolist() for _ in range(50)] for _ in range(3)]
    lengths = list(map(len, prefixes)), [list(map(len, query)) for query in items]
    padding = []
    for buckets in (Buckets(compile_flops=0), Buckets.fit(*lengths, compile_flops=0)):
        prefill = PrefillScorer(scorer(), buckets=buckets)
        prefill.score_lists(prefixes, items)
        assert prefill.usage.tokens == 3 * (6 + 250)
        padding.append(prefill.usage.padding)
    assert padding[1] == 0
    assert 0 < padding[0] < 0.5
    with pytest.raises(InputError, match="no lists to fit"):
        Buckets.fit([1], [[]])


def test_unrolled_layers_give_the_scores_and_take_new_weights():
    rng = np.random.default_rng(9)
    prefixes, items = random_lists(rng, 3, 6)
    prefill = PrefillScorer(scorer(), buckets=SMALL, unrolled=True)
    for one, two in zip(
        prefill.score_lists(prefixes, items),
        expected_scores("grouped, wide heads", prefixes, items),
        strict=True,
    ):
        assert_same(one, two)
    compiled = prefill.compiled_shapes
    made = nnx.clone(scorer())
    made.actions[...] = made.actions[...] + 1.0
    made.decoder.layers.q[...] = 2 * made.decoder.layers.q[...]
    prefill.update(made)
    expected = PrefillScorer(made, buckets=SMALL).score_lists(prefixes, items)
    for one, two in zip(prefill.score_lists(prefixes, items), expected, strict=True):
        assert_same(one, two)
    assert prefill.compiled_shapes == compiled
    with pytest.raises(ValueError, match="other parameters"):
        prefill.update(scorer("four heads"))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 1, 4), (1, 1, 2), (4, 2, 1)])
def test_scores_on_a_mesh_are_the_same(sizes):
    mesh = make_mesh(MeshConfig(*sizes))
    rng = np.random.default_rng(8)
    prefixes, items = random_lists(rng, 3, 12)
    items[0] = [with_embeddings(rng, item) for item in items[0]]
    buckets = Buckets(prefix=(P,), rows=(8,), row_length=(T,), tokens=500, item_length=1)
    one = PrefillScorer(scorer("four heads"), buckets=buckets).score_lists(prefixes, items)
    prefill = PrefillScorer(scorer("four heads"), buckets=buckets, mesh=mesh)
    assert len(prefill._state["decoder"]["layers"]["q"].get_value().devices()) == math.prod(sizes)
    for alone, split in zip(one, prefill.score_lists(prefixes, items), strict=True):
        np.testing.assert_allclose(split, alone, atol=2e-5)
    prefill.update(scorer("four heads"))
    with pytest.raises(InputError, match="runs on one device"):
        PrefillScorer(scorer(), backend="pallas", mesh=mesh)


def test_every_compiled_shape_is_in_the_buckets_and_compiled_once():
    prefill = shared_prefill()
    rng = np.random.default_rng(3)
    for queries, most in ((1, 1), (6, 3), (2, 30)):
        prefill.score_lists(*random_lists(rng, queries, most, longest=2 * T))
    shapes = prefill.compiled_shapes
    assert len(set(shapes)) == len(shapes)
    assert all(shape in SMALL for shape in shapes)
    assert Shape(1, P, 2, T) not in SMALL
    assert Shape(99, P, 1, T) not in SMALL


@settings(max_examples=60, deadline=None)
@given(
    queries=st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(1, 50), max_size=40)), max_size=8),
    compile_flops=st.sampled_from([0.0, 1e7, 1e12]),
)
def test_a_plan_covers_every_item_once_and_fits(queries, compile_flops):
    config = scorer().decoder.config
    buckets = Buckets(
        prefix=steps(8, 64),
        rows=steps(1, 8),
        row_length=steps(8, 64),
        tokens=256,
        compile_flops=compile_flops,
    )
    prefixes, items = [p for p, _ in queries], [lengths for _, lengths in queries]
    calls = plan(prefixes, items, buckets=buckets, config=config)
    seen = sorted((unit.query, int(i)) for call in calls for unit in call.units for i in unit.items)
    assert seen == [(q, i) for q, lengths in enumerate(items) for i in range(len(lengths))]
    for shape, units in calls:
        assert shape in buckets
        assert 1 <= len(units) <= shape.queries
        for unit in units:
            sizes = np.array(items[unit.query])[unit.items]
            assert prefixes[unit.query] <= shape.prefix
            assert unit.rows.max() < shape.rows
            assert np.bincount(unit.rows).max() <= buckets.per_row(shape.row_length)
            assert (unit.columns + sizes).max() <= shape.row_length
    # Planned again with these shapes compiled, nothing new is compiled.
    again = plan(prefixes, items, buckets=buckets, config=config, compiled={call.shape for call in calls})
    assert compile_flops < 1e12 or {call.shape for call in again} <= {call.shape for call in calls}


def test_a_plan_weighs_padding_against_compilation():
    config = scorer().decoder.config
    alike = plan([10] * 8, [[16] * 4] * 8, buckets=Buckets(), config=config)
    assert [call.shape for call in alike] == [
        Shape(queries=8, prefix=16, rows=4, row_length=16, shared=False)
    ]
    lists = [[5] * 10, [60] * 3, [17, 30] * 9]
    few = plan([10, 50, 200], lists, buckets=Buckets(compile_flops=1e15), config=config)
    many = plan([10, 50, 200], lists, buckets=Buckets(compile_flops=0), config=config)
    assert len({call.shape for call in few}) == 1
    assert len({call.shape for call in many}) > 1


def test_choices_made_before_give_the_plan_that_makes_them_itself():
    rng = np.random.default_rng(8)
    config = preset("tiny_student", vocab_size=4096)
    prefixes = rng.integers(5, 60, 40).tolist()  # more than a plan looks at
    items = [rng.integers(5, 60, count).tolist() for count in rng.integers(0, 30, 40)]
    sizes = {"buckets": Buckets(tokens=1024), "config": config, "kept": (48, 64)}
    whole = plan(prefixes, items, **sizes)
    choices = choose(prefixes, items, **sizes)
    assert sorted(size for size, _ in choices) == [0, 48, 64]
    again = plan(prefixes, items, **sizes, choices=choices)

    def told(calls):
        return [
            (call.shape, [(u.query, *(x.tolist() for x in u[1:4]), u.shape) for u in call.units])
            for call in calls
        ]

    assert told(again) == told(whole)
    # Of other lists they leave nothing out either, whatever those look like.
    for lists in ([[60] * 50] * 40, [[5]] * 40):
        calls = plan(prefixes, lists, **sizes, choices=[(0, Choice(96, 3)), (48, Choice(None, 2))])
        seen = sorted((unit.query, int(i)) for call in calls for unit in call.units for i in unit.items)
        assert seen == [(q, i) for q, some in enumerate(lists) for i in range(len(some))]
        most = {call.shape.rows for call in calls if call.shape.prefix == 48 and call.shape.kept}
        assert most == {min(2, len(lists[0]))}
    # Lists that were not cut do not say that longer ones should be.
    ((_, choice),) = choose([300] * 4, [[20] * 2] * 4, buckets=Buckets(), config=config)
    assert choice.rows == Buckets().rows[-1]
    with pytest.raises(ValueError, match="query 1, item 0 has 9000 tokens"):
        choose([5, 5], [[5], [9000]], buckets=Buckets(), config=config)


def test_a_scorer_compiles_what_pays_off_for_as_many_requests_as_it_has_had():
    """A first request of one item leaves a shape of one row; lists of forty go through it, until a shape of their own is worth it."""
    rng = np.random.default_rng(9)
    prefix, item = rng.integers(0, VOCABULARY, P).tolist(), rng.integers(0, VOCABULARY, T).tolist()
    items = [rng.integers(0, VOCABULARY, T).tolist() for _ in range(40)]
    sizes = dataclasses.replace(SMALL, rows=(1, 40), tokens=1024, compile_flops=4e10)

    def calls_of(prefill, some):
        before = prefill.usage.calls
        (found,) = prefill.score_lists([prefix], [some])
        assert_same(found, expected_scores("grouped, wide heads", [prefix], [some])[0])
        return prefill.usage.calls - before

    learning = PrefillScorer(scorer(), buckets=sizes)
    assert calls_of(learning, [item]) == 1
    calls = [calls_of(learning, items) for _ in range(8)]
    assert calls[0] == 40
    assert calls[-1] == 1
    assert calls == sorted(calls, reverse=True)
    assert len(learning.compiled_shapes) == 2
    expecting = PrefillScorer(scorer(), buckets=sizes, requests=1000)
    assert [calls_of(expecting, some) for some in ([item], items)] == [1, 1]
    # Settled for one request, an item alone is padded to forty.
    for requests, shapes in ((1, 1), (1000, 2)):
        settled = PrefillScorer(scorer(), buckets=sizes, requests=requests)
        settled.settle([prefix] * 2, [[item], items])
        assert [calls_of(settled, some) for some in ([item], items)] == [1, 1]
        assert len(settled.compiled_shapes) == shapes
    # Bits of settled scorers do not depend on what came before.
    histories = []
    for before in ([], [[item], items, items[:7]]):
        settled = PrefillScorer(scorer(), buckets=sizes)
        for some in before:
            settled.score_lists([prefix], [some])
        settled.settle([prefix] * 2, [items[:9], items[:2]])
        histories.append(settled.score_lists([prefix], [items[:5]])[0])
    assert np.array_equal(*histories)
    for refused in (expecting.settle, expecting.warm_up, expecting.score_lists):
        with pytest.raises(ValueError, match="query 0, item 1 has 99 tokens: give 1 to"):
            refused([prefix], [[[1], [1] * 99]])
    assert expecting.score_lists([prefix], [[]])[0].shape == (0, expecting.labels)
    assert expecting.score_lists([], []) == []
    with pytest.raises(InputError, match="requests is 0"):
        PrefillScorer(scorer(), requests=0)


def test_short_lists_are_put_together_since_every_call_costs_something():
    """Two queries a call would pad nothing of 34, in 17 calls; three calls of twelve pad two."""
    config = preset("tiny_student", vocab_size=4096)
    buckets = Buckets(prefix=(10,), rows=(8,), row_length=(25,), compile_flops=0)
    calls = plan([10] * 34, [[25] * 8] * 34, buckets=buckets, config=config)
    assert [(call.shape.queries, len(call.units)) for call in calls] == [(12, 12), (12, 12), (12, 10)]
    assert len(plan([10] * 2, [[25] * 8] * 2, buckets=buckets, config=config)) == 1


def test_bad_inputs_are_named():
    prefill = shared_prefill()
    good = [[1, 2]]
    with pytest.raises(ValueError, match="query 1: its prefix has 0 tokens"):
        prefill.score_lists([[1], []], [good, good])
    with pytest.raises(ValueError, match=rf"query 0: its prefix has {P + 1} tokens: give 1 to {P}"):
        prefill.score_lists([[1] * (P + 1)], [good])
    with pytest.raises(ValueError, match="query 1, item 2 has 17 tokens: give 1 to 16"):
        prefill.score_lists([[1], [1]], [good, [[1], [1], [1] * 17]])
    with pytest.raises(ValueError, match="query 0, item 1 has 0 tokens"):
        prefill.score_lists([[1]], [[[1], []]])
    with pytest.raises(ValueError, match=f"query 1 has token id {VOCABULARY}: the vocabulary ends at 28"):
        prefill.score_lists([[1], [1]], [good, [[VOCABULARY]]])
    with pytest.raises(ValueError, match="query 0 has token id -1"):
        prefill.score_lists([[-1]], [good])
    with pytest.raises(ValueError, match="items has 1 lists: prefixes has 2"):
        prefill.score_lists([[1], [1]], [good])
    with pytest.raises(ValueError, match="prefix of query 1 has 0 tokens"):
        pad_prefixes([[1], []])
    with pytest.raises(ValueError, match=r"Buckets\.rows is \(3, 2\)"):
        Buckets(rows=(3, 2))
    with pytest.raises(ValueError, match=r"Buckets\.tokens is 0"):
        Buckets(tokens=0)
    with pytest.raises(ValueError, match="other parameters"):
        prefill.update(scorer("one kv head, odd count"))


def test_nan_scores_are_refused_with_the_query_named():
    made = nnx.clone(scorer())
    parameters = nnx.to_flat_state(nnx.state(made.decoder))
    embedding = next(value for path, value in parameters if path[-1] == "embedding")
    embedding[...] = embedding[...].at[20].set(jnp.nan)
    prefill = shared_prefill()
    prefill.update(made)
    try:
        with pytest.raises(FloatingPointError, match="query 1, item"):
            prefill.score_lists([[1], [2]], [[[1]], [[2], [3, 20], [4]]])
        prefill.score_lists([[1], [2]], [[[1]], [[2]]])  # the row is not used
    finally:
        prefill.update(scorer())


def test_update_takes_over_new_weights():
    made = nnx.clone(scorer())
    made.actions[...] = made.actions[...] + 1.0
    prefill = shared_prefill()
    before = prefill.score_lists([[1]], [[[2]]])[0]
    prefill.update(made)
    after = prefill.score_lists([[1]], [[[2]]])[0]
    made.actions[...] = made.actions[...] + 1.0  # trained on: not seen before the next update
    np.testing.assert_array_equal(prefill.score_lists([[1]], [[[2]]])[0], after)
    prefill.update(scorer())
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert np.abs(before[:, 2:] - after[:, 2:]).min() > 1e-3


def test_items_are_a_pytree_of_arrays():
    packed = pack_items([[[1, 2]]], row_length=3)
    assert isinstance(jax.tree.map(jnp.asarray, packed), PackedItems)
    assert len(jax.tree.leaves(packed)) == 5


def test_doctests():
    assert doctest.testmod(buckets_module).failed == 0
