"""The decoder: its parameters, a plain reimplementation in NumPy, its gradients, dtypes and refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsearch.models.attention import Causal
from jaxsearch.models.decoder import (
    Decoder,
    DecoderConfig,
    layer_table,
    outer_table,
    project,
    rotary_angles,
    with_config,
)
from jaxsearch.models.presets import PRESETS, preset
from jaxsearch.training.flops import count_flops

CONFIG = DecoderConfig(
    vocab_size=31, layers=3, width=16, heads=4, kv_heads=2, head_dim=6, mlp_width=20,
    rope_theta=500.0, rms_eps=1e-3, qk_norm=True, tied=False,
)  # fmt: skip
VARIANTS = {
    "qwen": CONFIG,
    "llama": dataclasses.replace(CONFIG, qk_norm=False, tied=True, kv_heads=1, head_dim=4),
}
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 7), np.int32)
POSITIONS = np.broadcast_to(np.arange(7), (2, 7))


@functools.cache
def make(config: DecoderConfig) -> Decoder:
    """A random decoder whose norms are not all ones, drawn by NumPy (quicker than compiling its init)."""
    random = np.random.default_rng(0)
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    specs = outer_table(config) | layer_table(config)
    flat = nnx.to_flat_state(nnx.state(decoder, nnx.Param))
    for path, parameter in flat:
        std, noise = specs[path[-1]].std, random.standard_normal(parameter.shape, np.float32)
        parameter.set_value(jnp.asarray(1 + 0.2 * noise if std is None else 1.2 * std * noise))
    nnx.update(decoder, nnx.from_flat_state(flat))
    return decoder


@nnx.jit(static_argnames="return_layers")
def forward(decoder, tokens, positions, return_layers=False):
    where = jnp.ones(tokens.shape, bool)
    return decoder(decoder.embed(tokens), positions, Causal(where), return_layers=return_layers)


def by_hand(decoder: Decoder, tokens, positions):
    """The residual stream per layer and the final hidden states of one text, with loops and float64."""
    c = decoder.config
    w = {name: np.asarray(a, np.float64) for name, a in decoder.layers.arrays().items()}

    def norm(x, scale):
        return x / np.sqrt((x * x).mean() + c.rms_eps) * scale

    def rotated(x, position):
        half = c.head_dim // 2
        out = np.zeros_like(x)
        for i in range(half):
            angle = position * c.rope_theta ** (-2 * i / c.head_dim)
            out[:, i] = x[:, i] * np.cos(angle) - x[:, i + half] * np.sin(angle)
            out[:, i + half] = x[:, i + half] * np.cos(angle) + x[:, i] * np.sin(angle)
        return out

    x = np.asarray(decoder.embedding[...], np.float64)[tokens]
    stream = [x]
    for layer in range(c.layers):
        y = np.stack([norm(row, w["attention_norm"][layer]) for row in x])
        q, k, v = (np.einsum("td,dnh->tnh", y, w[name][layer]) for name in "qkv")
        if c.qk_norm:
            q = np.stack([[norm(head, w["q_norm"][layer]) for head in row] for row in q])
            k = np.stack([[norm(head, w["k_norm"][layer]) for head in row] for row in k])
        q, k = (np.stack([rotated(row, p) for row, p in zip(a, positions, strict=True)]) for a in (q, k))
        mixed = np.zeros_like(q)
        for t, n in np.ndindex(q.shape[:2]):
            group = n // (c.heads // c.kv_heads)
            scores = np.exp(k[: t + 1, group] @ q[t, n] / np.sqrt(c.head_dim))
            mixed[t, n] = scores / scores.sum() @ v[: t + 1, group]
        x = x + np.einsum("tnh,nhd->td", mixed, w["o"][layer])
        y = np.stack([norm(row, w["mlp_norm"][layer]) for row in x])
        gate = y @ w["gate"][layer]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["up"][layer])) @ w["down"][layer]
        stream.append(x)
    return np.stack(stream), np.stack([norm(row, np.asarray(decoder.final_norm[...])) for row in x])


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_plain_loops(name):
    decoder = make(VARIANTS[name])
    positions = np.stack([np.arange(7), np.array([3, 4, 5, 11, 12, 13, 40])])
    hidden, state, stream = jax.device_get(forward(decoder, TOKENS, positions, return_layers=True))
    assert state is None
    assert stream.shape == (CONFIG.layers + 1, 2, 7, CONFIG.width)
    for b in range(2):
        expected_stream, expected = by_hand(decoder, TOKENS[b], positions[b])
        np.testing.assert_allclose(stream[:, b], expected_stream, atol=2e-5)
        np.testing.assert_allclose(hidden[b], expected, atol=2e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_label_rows_read_the_right_matrix(name):
    decoder = make(VARIANTS[name])
    matrix = np.asarray((decoder.embedding if VARIANTS[name].tied else decoder.unembedding)[...])
    hidden = np.random.default_rng(1).standard_normal((3, CONFIG.width), np.float32)
    np.testing.assert_allclose(decoder.logits(jnp.asarray(hidden)), hidden @ matrix.T, atol=1e-5)
    np.testing.assert_array_equal(decoder.label_rows([4, 30, 4]), matrix[[4, 30, 4]])
    with pytest.raises(ValueError, match="ids contains 31"):
        decoder.label_rows([0, 31])


def test_init_has_the_declared_spread():
    decoder = Decoder(preset("tiny", vocab_size=500, layers=2), rngs=nnx.Rngs(0))
    specs = outer_table(decoder.config) | layer_table(decoder.config)
    for path, value in nnx.to_flat_state(nnx.state(decoder, nnx.Param)):
        std = specs[path[-1]].std
        assert float(jnp.std(value[...])) == pytest.approx(std or 0, rel=0.02)
        assert float(jnp.mean(value[...])) == pytest.approx(float(std is None), abs=0.01)
    assert float(jnp.abs(decoder.layers.q[0] - decoder.layers.q[1]).max()) > 0.1


def test_leading_axes_are_free():
    decoder = make(CONFIG)
    flat, _ = forward(decoder, TOKENS, POSITIONS)
    shaped, _ = forward(decoder, TOKENS[:, None], POSITIONS[:, None])
    np.testing.assert_allclose(shaped[:, 0], flat, atol=1e-5)


def test_an_unknown_token_gives_nan():
    assert bool(jnp.isnan(make(CONFIG).embed(jnp.array([[31]]))).all())


def test_state_is_scanned_along_with_the_layers():
    where = jnp.ones((2, 7), bool)
    keep = nnx.jit(lambda d, x: d(x, jnp.asarray(POSITIONS), Causal(where, keep_kv=True))[1])
    keys, values = jax.device_get(keep(make(CONFIG), np.ones((2, 7, CONFIG.width), np.float32)))
    assert keys.shape == values.shape == (CONFIG.layers, 2, 7, CONFIG.kv_heads, CONFIG.head_dim)
    assert np.abs(keys[0] - keys[1]).max() > 0.1


def loss(decoder):
    hidden, _ = decoder(decoder.embed(TOKENS), jnp.asarray(POSITIONS), Causal(jnp.ones((2, 7), bool)))
    return jnp.mean(jax.nn.logsumexp(decoder.logits(hidden), axis=-1) ** 2)


@functools.cache
def gradients(**changes):
    decoder = with_config(make(CONFIG), **changes)
    return jax.tree.leaves(jax.device_get(nnx.jit(nnx.grad(loss))(decoder)))


@pytest.mark.parametrize("remat", ["full", "dots", "lean"])
def test_rematerialisation_changes_no_gradient(remat):
    plain = gradients(remat="none")
    assert all(np.abs(g).max() > 0 for g in plain)
    for a, b in zip(plain, gradients(remat=remat), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_lean_keeps_less_than_everything_and_does_no_projection_again():
    def step(remat):
        graph, state = nnx.split(with_config(make(CONFIG), remat=remat))
        return jax.jit(jax.grad(lambda state: loss(nnx.merge(graph, state)))).trace(state)

    steps = {remat: step(remat) for remat in ("none", "lean", "full")}
    memory = {remat: s.lower().compile().memory_analysis().temp_size_in_bytes for remat, s in steps.items()}
    assert memory["full"] < memory["lean"] < memory["none"]
    # What is done again is the attention alone: two matmuls of 2 N H T for each of B T tokens (T = 7 is one block), and the sums again.
    c, flops = CONFIG, {remat: count_flops(s.jaxpr) for remat, s in steps.items()}
    attention = c.layers * 2 * (2 * 2 * 7 * c.heads * c.head_dim * 7)
    assert 0 < flops["lean"] - flops["none"] <= attention
    assert flops["full"] - flops["none"] > attention


def test_gradients_equal_finite_differences():
    decoder = make(CONFIG)
    graph, state = nnx.split(decoder)
    value = jax.jit(lambda state: loss(nnx.merge(graph, state)))
    random = np.random.default_rng(2)
    along = jax.tree.map(lambda x: random.standard_normal(x.shape, np.float32), state)
    step = jax.jit(lambda size: value(jax.tree.map(lambda x, d: x + size * d, state, along)))
    slope = (float(step(2e-4)) - float(step(-2e-4))) / 4e-4
    gradient = jax.grad(value)(state)
    dot = sum(float(np.vdot(g, d)) for g, d in zip(*map(jax.tree.leaves, (gradient, along)), strict=True))
    assert slope == pytest.approx(dot, rel=2e-2)


@pytest.mark.parametrize(
    ("equation", "x", "w"),
    [
        ("TD,DNH->TNH", (2, 3, 4), (4, 5, 6)),
        ("TNH,NHD->TD", (3, 5, 6), (5, 6, 4)),
        ("TF,FD->TD", (3, 5), (5, 7)),
        # An output matrix: the narrow operand first is not the weights' own order.
        ("TD,VD->TV", (3, 5), (7, 5)),
        ("TD,VD->TV", (3, 7), (5, 7)),
    ],
)
def test_projection_has_the_gradient_of_its_einsum(equation, x, w):
    random = np.random.default_rng(3)
    x, w = (random.standard_normal(shape, np.float32) for shape in (x, w))
    plain = "..." + equation.replace("T", "").replace("->", "->...")
    expected = jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.einsum(plain, x, w) ** 2), (0, 1)))(x, w)
    actual = jax.jit(jax.grad(lambda x, w: jnp.sum(project(equation, x, w) ** 2), (0, 1)))(x, w)
    for a, b in zip(expected, actual, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_close_and_keeps_float32_gradients_and_logits():
    decoder = make(CONFIG)
    half = with_config(decoder, compute_dtype="bfloat16")
    exact, _ = forward(decoder, TOKENS, POSITIONS)
    hidden, _ = forward(half, TOKENS, POSITIONS)
    assert hidden.dtype == jnp.bfloat16
    assert half.logits(hidden).dtype == jnp.float32
    difference = np.abs(np.asarray(hidden, np.float32) - exact)
    assert 0 < difference.max() < 0.15
    assert all(g.dtype == np.float32 and np.isfinite(g).all() for g in gradients(compute_dtype="bfloat16"))
    assert decoder.config.compute_dtype == "float32"


def test_every_parameter_carries_its_logical_axes():
    decoder = make(CONFIG)
    known = {"layer", "vocab", "embed", "heads", "kv_heads", "head_dim", "mlp"}
    parameters = jax.tree.leaves(nnx.state(decoder, nnx.Param), is_leaf=lambda x: isinstance(x, nnx.Variable))
    assert len(parameters) == 3 + len(layer_table(CONFIG))
    for parameter in parameters:
        assert len(parameter.axes) == parameter.ndim
        assert set(parameter.axes) <= known
    assert decoder.layers.q.axes == ("layer", "embed", "heads", "head_dim")


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_count(name):
    decoder = make(VARIANTS[name])
    sizes = [x.size for x in jax.tree.leaves(nnx.state(decoder, nnx.Param))]
    assert sum(sizes) == VARIANTS[name].parameters


# Published: SmolLM2 135M; Qwen3 0.6B and 1.7B without the embeddings 0.44B and 1.4B; Qwen3 8B 8.2B.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("smollm2_135m", 134_515_008),
        ("qwen3_0_6b", 596_049_920),
        ("qwen3_1_7b", 1_720_574_976),
        ("qwen3_8b", 8_190_735_360),
    ],
)
def test_presets_have_the_published_size(name, parameters):
    assert PRESETS[name].parameters == parameters


def test_tiny_presets_divide_by_tensor_axes():
    for name in ("tiny", "tiny_student"):
        assert PRESETS[name].heads % 4 == PRESETS[name].kv_heads % 4 == 0
    assert preset("tiny", vocab_size=99).vocab_size == 99
    with pytest.raises(ValueError, match=r"'huge' is unknown: use one of tiny"):
        preset("huge")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0), ("layers", 2.0), ("width", True), ("kv_heads", 3), ("head_dim", 5),
        ("rope_theta", 0.0), ("rope_theta", float("nan")), ("rms_eps", float("inf")), ("qk_norm", 1),
        ("compute_dtype", "float16"), ("remat", "some"),
    ],
)  # fmt: skip
def test_bad_config_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"DecoderConfig\.{field} is {value!r}"):
        dataclasses.replace(CONFIG, **{field: value})


def test_what_a_checkpoint_decides_has_no_default():
    optional = {f.name for f in dataclasses.fields(DecoderConfig) if f.default is not dataclasses.MISSING}
    assert optional == {"compute_dtype", "remat", "attention"}
    with pytest.raises(ValueError, match="'width'"):
        with_config(make(CONFIG), width=8)


def test_wrong_shapes_are_refused():
    decoder = make(CONFIG)
    with pytest.raises(ValueError, match=r"x has shape \(2, 7, 15\)"):
        decoder(jnp.zeros((2, 7, 15)), jnp.asarray(POSITIONS), Causal(jnp.ones((2, 7), bool)))
    with pytest.raises(ValueError, match=r"positions \(7,\)"):
        decoder(jnp.zeros((2, 7, 16)), jnp.arange(7), Causal(jnp.ones((2, 7), bool)))


@pytest.mark.parametrize("theta", [500.0, 1e6])
def test_a_table_of_rotary_angles_holds_the_angles(theta):
    """To the last bits: 3,000 positions in, an angle that is off by a rounding of its frequency would be seen."""
    positions = np.random.default_rng(0).integers(0, 3000, (2, 50))
    computed = rotary_angles(jnp.asarray(positions), 64, theta)
    tabled = jax.jit(lambda x: rotary_angles(x, 64, theta, below=3000))(positions)
    for one, two in zip(computed, tabled, strict=True):
        np.testing.assert_allclose(one, two, atol=2e-6)
