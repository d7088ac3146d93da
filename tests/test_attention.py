"""The attentions against a plain loop, on shapes with grouped heads, packing, padding and caches."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxsearch.errors import InputError
from jaxsearch.models import attention as attention_module
from jaxsearch.models import tpu_attention, tpu_causal
from jaxsearch.models.attention import Cached, Causal, PrefixPacked, training_backend

HEADS, KV_HEADS, SIZE = 4, 2, 6


@jax.jit
def attend(attention, q, k, v, state=None):
    """The attention is a pytree argument, which also shows that it can be one."""
    return attention(q, k, v, state)


def tensors(seed: int, *shape: int):
    """Random q [..., N, H], k and v [..., K, H]."""
    random = np.random.default_rng(seed)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return [2 * random.standard_normal((*shape, n, SIZE), np.float32) for n in heads]


def by_hand(q, k, v):
    """One token's attention over the keys it sees, in float64 (q [N, H], k and v [C, K, H])."""
    k, v = k.astype(np.float64), v.astype(np.float64)
    out = np.zeros((HEADS, SIZE))
    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        scores = k[:, group] @ q[head] / SIZE**0.5
        weights = np.exp(scores - scores.max())
        out[head] = weights @ v[:, group] / weights.sum()
    return out


def test_causal_equals_a_plain_loop_and_skips_padding():
    q, k, v = tensors(0, 2, 5)
    where = np.array([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1]], bool)
    out, state = jax.device_get(attend(Causal(where), q, k, v))
    assert state is None
    for b, t in np.ndindex(where.shape):
        seen = [s for s in range(t + 1) if where[b, s]]
        expected = by_hand(q[b, t], k[b, seen], v[b, seen]) if seen else np.zeros((HEADS, SIZE))
        np.testing.assert_allclose(out[b, t], expected, atol=1e-5)


def test_causal_takes_any_leading_axes():
    q, k, v = tensors(1, 2, 3, 4)
    where = np.ones((2, 3, 4), bool)
    out = attend(Causal(where), q, k, v)[0]
    one = attend(Causal(where[1, 2]), q[1, 2], k[1, 2], v[1, 2])[0]
    np.testing.assert_allclose(np.asarray(out)[1, 2], one, atol=1e-6)


def test_causal_keeps_keys_and_values():
    q, k, v = tensors(2, 1, 3)
    kept = attend(Causal(np.ones((1, 3), bool), keep_kv=True), q, k, v)[1]
    np.testing.assert_array_equal(kept[0], k)
    np.testing.assert_array_equal(kept[1], v)


def test_packed_items_see_their_prefix_and_themselves():
    q, k, v = tensors(3, 2, 2, 6)
    _, prefix_k, prefix_v = tensors(4, 2, 4)
    prefix_where = np.array([[1, 1, 1, 1], [0, 1, 1, 0]], bool)
    segments = np.array([[[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]], [[3, 0, 3, 1, 1, 2], [0] * 6]], np.int32)
    out, state = jax.device_get(attend(PrefixPacked(prefix_where, segments), q, k, v, (prefix_k, prefix_v)))
    assert state is None
    for b, r, t in np.ndindex(segments.shape):
        if segments[b, r, t] == 0:
            np.testing.assert_array_equal(out[b, r, t], 0)
            continue
        own = [s for s in range(t + 1) if segments[b, r, s] == segments[b, r, t]]
        keys = np.concatenate([prefix_k[b, prefix_where[b]], k[b, r, own]])
        values = np.concatenate([prefix_v[b, prefix_where[b]], v[b, r, own]])
        np.testing.assert_allclose(out[b, r, t], by_hand(q[b, r, t], keys, values), atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_padding_has_zero_values_and_finite_gradients(scale):
    q, k, v = (scale * x for x in tensors(5, 1, 2, 3))
    segments = np.array([[[0, 0, 0], [0, 1, 1]]], np.int32)

    @jax.jit
    @jax.grad
    def gradient(arrays):
        q, k, v, prefix = arrays
        packed, _ = PrefixPacked(jnp.zeros((1, 2), bool), jnp.asarray(segments))(q, k, v, prefix)
        causal, _ = Causal(jnp.asarray(segments[0] > 0))(q[0], k[0], v[0], None)
        return jnp.sum(packed**2) + jnp.sum(causal**2)

    gradients = jax.device_get(gradient((q, k, v, tuple(tensors(6, 1, 2)[1:]))))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    np.testing.assert_array_equal(gradients[2][0, 0], 0)
    assert np.abs(gradients[2][0, 1, 1:]).max() > 0


def test_gradient_of_one_visible_token_is_that_of_a_copy():
    where = np.ones((1, 1), bool)
    gradient = jax.jit(jax.grad(lambda a: jnp.sum(Causal(where)(*a, None)[0] ** 2)))
    arrays = tensors(7, 1, 1)
    q, k, v = gradient(arrays)
    np.testing.assert_allclose(q, 0, atol=1e-4)
    np.testing.assert_allclose(k, 0, atol=1e-4)
    np.testing.assert_allclose(v, 2 * (HEADS // KV_HEADS) * arrays[2], rtol=1e-5)


def test_cache_decodes_what_causal_attention_computes():
    q, k, v = tensors(8, 2, 5)
    expected = np.asarray(attend(Causal(np.ones((2, 5), bool)), q, k, v)[0])
    # What lies beyond a row's own slot is arbitrary.
    cache = (
        np.full((2, 7, KV_HEADS, SIZE), 9.0, np.float32),
        np.full((2, 7, KV_HEADS, SIZE), -9.0, np.float32),
    )
    for t in range(5):
        now = slice(t, t + 1)
        out, cache = attend(Cached(np.full((2, 1), t)), q[:, now], k[:, now], v[:, now], cache)
        np.testing.assert_allclose(out, expected[:, now], atol=1e-5)
    np.testing.assert_array_equal(np.asarray(cache[0])[:, :5], k)
    np.testing.assert_array_equal(np.asarray(cache[1])[:, 5:], -9.0)


def test_cache_takes_several_tokens_and_a_slot_of_its_own_per_row():
    q, k, v = tensors(9, 2, 2)
    _, old_k, old_v = tensors(10, 2, 6)
    slots = np.array([[1, 2], [4, 5]])
    out, (cache_k, _) = jax.device_get(attend(Cached(slots), q, k, v, (old_k, old_v)))
    for b, t in np.ndindex(2, 2):
        n = slots[b, 0]
        keys = np.concatenate([old_k[b, :n], k[b, : t + 1]])
        values = np.concatenate([old_v[b, :n], v[b, : t + 1]])
        np.testing.assert_allclose(out[b, t], by_hand(q[b, t], keys, values), atol=1e-5)
    np.testing.assert_array_equal(cache_k[0, 3:], old_k[0, 3:])


def test_bfloat16_keeps_its_softmax_in_float32():
    where = np.ones((1, 64), bool)
    half = [x.astype(ml_dtypes.bfloat16) for x in tensors(11, 1, 64)]
    out = attend(Causal(where), *half)[0]
    exact = attend(Causal(where), *(x.astype(np.float32) for x in half))[0]
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=0.03)


@pytest.mark.parametrize("block", [1, 3, 7])
def test_blocks_of_queries_change_nothing(block, monkeypatch):
    q, k, v = tensors(12, 2, 2, 7)
    _, prefix_k, prefix_v = tensors(13, 2, 3)
    random = np.random.default_rng(14)
    where, prefix_where = random.random((2, 2, 7)) < 0.8, random.random((2, 3)) < 0.8
    segments = np.array([[[1, 1, 1, 1, 2, 2, 0], [1] * 7], [[1, 2, 2, 3, 3, 3, 3], [0] * 7]], np.int32)
    packed, causal = PrefixPacked(prefix_where, segments), Causal(where)
    whole = packed(q, k, v, (prefix_k, prefix_v))[0], causal(q, k, v, None)[0]
    monkeypatch.setattr(attention_module, "LARGEST_BLOCK", block)
    blocked = packed(q, k, v, (prefix_k, prefix_v))[0], causal(q, k, v, None)[0]
    for one, two in zip(whole, blocked, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_masked_keys_are_not_computed(monkeypatch):
    """Scores of 1,024 tokens in blocks of 256 take (1 + 2 + 3 + 4) / 16 of the work."""
    q, k, v = tensors(15, 1, 1024)

    def flops():
        lowered = jax.jit(lambda q, k, v: Causal(np.ones((1, 1024), bool))(q, k, v, None)[0]).lower(q, k, v)
        return lowered.compile().cost_analysis()["flops"]

    blocked = flops()
    for name in ("LARGEST_BLOCK", "SMALLEST_BLOCK"):
        monkeypatch.setattr(attention_module, name, 1024)
    assert blocked < 0.75 * flops()  # the masks cost some, too


def packed_case(seed, b, r, t, p, heads, kv_heads, size, dtype=np.float32):
    """Random tensors, and rows of items with padding between and behind."""
    random = np.random.default_rng(seed)
    tensor = lambda *shape: 2 * random.standard_normal(shape, np.float32)  # noqa: E731
    arrays = [tensor(b, r, t, n, size) for n in (heads, kv_heads, kv_heads)]
    arrays += [tensor(b, p, kv_heads, size) for _ in range(2)]
    segments = np.zeros((b, r, t), np.int32)
    for row in segments.reshape(-1, t):
        column = item = 0
        while column < t and random.random() < 0.95:
            length = int(random.integers(1, t + 1))
            item += 1
            row[column : column + length] = item
            column += length + int(random.integers(0, 2))
    where = np.arange(p)[None] < random.integers(1, p + 1, (b, 1))
    where[0] = random.random(p) < 0.5
    return [x.astype(dtype) for x in arrays], where, segments


@pytest.mark.parametrize("backend", ["fused", "pallas_interpret"])
@pytest.mark.parametrize(
    ("shape", "heads", "block"),
    [
        ((2, 2, 37, 21), (4, 2, 64), 16),
        ((1, 3, 5, 1), (3, 1, 128), 16),
        ((1, 1, 70, 40), (9, 3, 64), 32),
        ((3, 1, 2, 50), (2, 2, 128), 256),
    ],
)
def test_backends_equal_the_reference(backend, shape, heads, block, monkeypatch):
    monkeypatch.setitem(tpu_attention.attend_packed.__kwdefaults__, "block", block)
    for seed in range(2):
        (q, k, v, *state), where, segments = packed_case(seed, *shape, *heads)
        expected = attend(PrefixPacked(where, segments), q, k, v, tuple(state))[0]
        found = PrefixPacked(where, segments, backend)(q, k, v, tuple(state))[0]
        np.testing.assert_allclose(found, expected, atol=2e-5)
        np.testing.assert_array_equal(np.asarray(found)[segments == 0], 0)


def test_the_kernel_skips_blocks_that_nobody_sees():
    segments = np.zeros((1, 2, 64), np.int32)
    segments[0, 0, :20], segments[0, 0, 20:40] = 1, 2
    first, last = tpu_attention._own_blocks(jnp.asarray(segments), 16)
    # Row 0: queries 0-15 see block 0; 16-31 also item 1; 32-47 item 2 alone, from block 1 on; the rest is padding.
    np.testing.assert_array_equal(first[0, 0, :3], [0, 0, 1])
    np.testing.assert_array_equal(last[0, 0, :3], [0, 1, 2])
    assert last[0, 0, 3] < first[0, 0, 3]
    assert (last[0, 1] < first[0, 1]).all()
    where = np.array([[1] * 17 + [0] * 31, [0] * 48], np.int32)
    np.testing.assert_array_equal(tpu_attention._blocks_in_use(jnp.asarray(where), 16), [2, 0])


def test_the_kernel_in_bfloat16_is_as_close_as_the_reference():
    (q, k, v, *state), where, segments = packed_case(5, 1, 2, 40, 24, 4, 2, 64, ml_dtypes.bfloat16)
    exact = [x.astype(np.float32) for x in (q, k, v, *state)]
    expected = PrefixPacked(where, segments)(*exact[:3], tuple(exact[3:]))[0]
    found = PrefixPacked(where, segments, "pallas_interpret")(q, k, v, tuple(state))[0]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=0.06)


def causal_case(seed, b, t, n, k, h):
    """q, k, v, which tokens exist (left-aligned, one row whole), and weights that are 0 on padding."""
    random = np.random.default_rng(seed)
    arrays = [random.standard_normal((b, t, heads, h), np.float32) for heads in (n, k, k)]
    where = np.arange(t)[None] < np.append(random.integers(1, t + 1, b - 1), t)[:, None]
    weights = random.standard_normal((b, t, n, h), np.float32) * where[..., None, None]
    return arrays, where, weights


def assert_equal_with_gradients(value, backend, arrays, where, *, atol, gradients):
    """`value(backend name, *arrays)` -> (loss, what was mixed): the same by `backend` as by the reference, where tokens are."""

    def run(name):
        step = jax.value_and_grad(functools.partial(value, name), tuple(range(len(arrays))), has_aux=True)
        return jax.jit(step)(*arrays)

    (_, expected), wanted = run("xla")
    (_, found), given = run(backend)
    np.testing.assert_allclose(found[where], expected[where], atol=atol)
    assert np.isfinite(found).all()
    for x, y in zip(given, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=gradients)


@pytest.mark.parametrize("backend", ["fused", "pallas_interpret"])
@pytest.mark.parametrize(
    ("b", "t", "n", "k", "h", "block"),
    [(2, 40, 4, 2, 16, 512), (3, 300, 2, 1, 128, 128), (1, 130, 3, 3, 64, 512)],
)
def test_causal_backends_equal_the_reference_with_gradients(backend, b, t, n, k, h, block, monkeypatch):
    monkeypatch.setitem(tpu_causal.attend_causal.__kwdefaults__, "block", block)
    arrays, where, weights = causal_case(t, b, t, n, k, h)

    def value(name, *arrays):
        mixed = Causal(where, backend=name)(*arrays, None)[0]
        return jnp.sum(mixed * weights), mixed

    assert_equal_with_gradients(value, backend, arrays, where, atol=2e-6, gradients=1e-5)


def test_the_causal_kernel_leaves_out_keys_that_do_not_exist():
    """Queries behind other keys, some of which are no tokens: what an item with a prefix is."""
    (q, k, v), where, _ = causal_case(0, 3, 200, 4, 2, 16)
    q, where = q[:, 90:], where | (np.arange(200) >= 90)[None]  # keys from 90 on exist in every row
    found = tpu_causal.attend_causal(q, k, v, where, block=128, interpret=True)
    seen = where[:, None] & np.tri(110, 200, 90, dtype=bool)[None]
    expected = attention_module._attend(q, k, v, seen)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("backend", ["fused", "pallas_interpret"])
def test_items_alone_equal_the_reference_with_gradients(backend):
    (q, k, v, *state), where, _ = packed_case(7, 2, 3, 40, 21, 4, 2, 16)
    random = np.random.default_rng(7)
    exists = np.arange(40)[None, None] < random.integers(0, 41, (2, 3, 1))
    segments, weights = exists.astype(np.int32), random.standard_normal(q.shape) * exists[..., None, None]

    def value(name, q, k, v, prefix_k, prefix_v):
        mixed = PrefixPacked(where, segments, name, alone=True)(q, k, v, (prefix_k, prefix_v))[0]
        return jnp.sum(mixed * weights), mixed

    assert_equal_with_gradients(value, backend, (q, k, v, *state), exists, atol=5e-6, gradients=5e-5)


def test_blocks_of_the_causal_kernel_are_even():
    found = [tpu_causal._block(length, 512) for length in (1, 128, 129, 512, 513, 1025, 1408)]
    assert found == [128, 128, 256, 512, 384, 384, 512]


def test_only_a_training_step_chooses_a_kernel():
    def mesh(platform):
        device = jax.sharding.AbstractDevice(device_kind="some", num_cores=1, platform=platform)
        made = jax.sharding.AbstractMesh((2, 1, 1), ("data", "fsdp", "tensor"), abstract_device=device)
        return jax.sharding.use_abstract_mesh(made)

    assert training_backend("", 200, jnp.bfloat16) == training_backend("pallas", 200, jnp.bfloat16) == "xla"
    with mesh("tpu"):
        assert training_backend("", 200, jnp.bfloat16) == "pallas"
        assert training_backend("", 60, jnp.bfloat16) == "xla"  # mostly padding
        assert training_backend("", 200, jnp.float64) == training_backend("xla", 200, jnp.bfloat16) == "xla"
    with mesh("gpu"):
        assert training_backend("", 200, jnp.bfloat16) == "xla"
        assert training_backend("fused", 200, jnp.bfloat16) == "fused"
        with pytest.raises(InputError, match=r"model.attention is 'pallas', .* mesh is of gpu devices"):
            training_backend("pallas", 200, jnp.bfloat16)


def test_an_unknown_backend_is_named():
    with pytest.raises(InputError, match="backend 'cuda' is unknown: use one of xla, fused, pallas"):
        Causal(np.ones((1, 1), bool), backend="cuda")
    with pytest.raises(InputError, match="backend 'cuda' is unknown: use one of xla, fused, pallas"):
        PrefixPacked(np.ones((1, 1), bool), np.ones((1, 1, 1), np.int32), "cuda")
