"""The decoder that every model of the funnel is made of (Qwen3 and Llama families), one scanned NNX module.

Judge, teachers, ranker, both towers and the MixLM encoder differ in size, in head and in the attention that
they hand in, never in the block. Axes: B queries, T tokens, D width, N query heads, K key/value heads, H
head size, F MLP width, V vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxsearch.errors import InputError
from jaxsearch.models.attention import BACKENDS, Attention, Causal, training_backend
from jaxsearch.numerics import wide

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}
BATCH_AXES = ("data", "fsdp")
"""Mesh axes that the first axis of activations is split over."""
TENSOR_LETTERS = "NFV"
"""Axes of matrices that the mesh axis `tensor` splits: heads, MLP width and vocabulary."""
KEPT = "kept"
"""Name of what "lean" keeps of a layer beside its input: queries, keys and values as projected, what the heads mixed, the residual stream
behind the attention, gate and up."""
# Inside a scan nothing can be merged across iterations, so the costly barriers of prevent_cse are not needed.
_checkpoint = functools.partial(jax.checkpoint, prevent_cse=False)
REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda block: block,
    "full": _checkpoint,
    "lean": functools.partial(_checkpoint, policy=jax.checkpoint_policies.save_only_these_names(KEPT)),
    "dots": functools.partial(_checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants of a decoder. What a checkpoint decides has no default that could shadow its value.

    `compute_dtype` is "float32" or "bfloat16" (or, with `jax_enable_x64`, "float64"); parameters are stored in fp32, and
    softmax, norms and rotary embedding always run in fp32 (`numerics.wide`).
    `remat` says what one layer keeps for the backward pass: "none" keeps all,
    "dots" the outputs of the projections, "lean" what it takes to do no projection again (`KEPT`), "full" its input only.
    On a CPU "full" is also the fastest at small widths (less to write), "lean" at SmolLM2's.
    `attention` names the backend of a training step's causal attention (`attention.training_backend`); it is no part of a checkpoint.

    Raises:
        InputError: a field is out of range; the message names it, its value and the fix.
    """

    vocab_size: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float
    rms_eps: float
    qk_norm: bool
    tied: bool
    compute_dtype: str = "float32"
    remat: str = "lean"
    attention: str = ""

    def __post_init__(self) -> None:
        def refuse(name: str, fix: str) -> None:
            raise InputError(f"DecoderConfig.{name} is {getattr(self, name)!r}: {fix}")

        for name in ("vocab_size", "layers", "width", "heads", "kv_heads", "head_dim", "mlp_width"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                refuse(name, "give an integer of at least 1")
        for name in ("rope_theta", "rms_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                refuse(name, "give a positive number")
        for name in ("qk_norm", "tied"):
            if not isinstance(getattr(self, name), bool):
                refuse(name, "give True or False")
        if self.heads % self.kv_heads:
            refuse("kv_heads", f"it must divide heads ({self.heads})")
        if self.head_dim % 2:
            refuse("head_dim", "rotary embedding needs an even size")
        if self.compute_dtype not in DTYPES:
            refuse("compute_dtype", f"use one of {', '.join(DTYPES)}")
        if self.remat not in REMAT:
            refuse("remat", f"use one of {', '.join(REMAT)}")
        if self.attention not in ("", *BACKENDS):
            refuse("attention", f"leave it empty or use one of {', '.join(BACKENDS)}")

    @property
    def dtype(self) -> Any:
        """The dtype of matmul inputs and of the residual stream."""
        return DTYPES[self.compute_dtype]

    @property
    def parameters(self) -> int:
        """How many numbers the decoder holds."""
        return sum(math.prod(spec.shape) for spec in (outer_table(self) | layer_table(self)).values())


class ParameterSpec(NamedTuple):
    """A parameter's shape, the logical names of its axes, and the deviation of its init (None: ones)."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    std: float | None

    def create(self, rngs: nnx.Rngs) -> nnx.Param:
        """An fp32 parameter that carries its logical axis names as the metadata `axes`."""
        value = (
            jnp.ones(self.shape, jnp.float32)
            if self.std is None
            else self.std * jax.random.normal(rngs.params(), self.shape, jnp.float32)
        )
        return nnx.Param(value, axes=self.axes)


def outer_table(c: DecoderConfig) -> dict[str, ParameterSpec]:
    """The parameters outside the layers; `unembedding` only where the output is untied."""
    rows = ParameterSpec((c.vocab_size, c.width), ("vocab", "embed"), c.width**-0.5)
    table = {"embedding": rows, "final_norm": ParameterSpec((c.width,), ("embed",), None)}
    return table if c.tied else table | {"unembedding": rows}


def layer_table(c: DecoderConfig) -> dict[str, ParameterSpec]:
    """The parameters of the block, stacked over layers.

    Outputs into the residual stream start smaller, by sqrt(2 layers), so that its scale does not grow with
    depth.
    """
    fan_in, out = c.width**-0.5, (2 * c.layers) ** -0.5
    d, n, k, h, f = c.width, c.heads, c.kv_heads, c.head_dim, c.mlp_width
    table = {
        "attention_norm": ParameterSpec((d,), ("embed",), None),
        "q": ParameterSpec((d, n, h), ("embed", "heads", "head_dim"), fan_in),
        "k": ParameterSpec((d, k, h), ("embed", "kv_heads", "head_dim"), fan_in),
        "v": ParameterSpec((d, k, h), ("embed", "kv_heads", "head_dim"), fan_in),
        "o": ParameterSpec((n, h, d), ("heads", "head_dim", "embed"), (n * h) ** -0.5 * out),
        "mlp_norm": ParameterSpec((d,), ("embed",), None),
        "gate": ParameterSpec((d, f), ("embed", "mlp"), fan_in),
        "up": ParameterSpec((d, f), ("embed", "mlp"), fan_in),
        "down": ParameterSpec((f, d), ("mlp", "embed"), f**-0.5 * out),
    }
    if c.qk_norm:
        table["q_norm"] = table["k_norm"] = ParameterSpec((h,), ("head_dim",), None)
    return {
        name: ParameterSpec((c.layers, *spec.shape), ("layer", *spec.axes), spec.std)
        for name, spec in table.items()
    }


def _letters(equation: str, x: Array) -> tuple[str, str, str]:
    """The three terms of the equation, with a letter for each axis that T stands for."""
    inputs, rest = equation.split(",")
    weights, outputs = rest.split("->")
    leading = ascii_lowercase[: x.ndim - len(inputs) + 1]
    return inputs.replace("T", leading), weights, outputs.replace("T", leading)


def _gathered(w: Array, letters: str, dtype: Any) -> Array:
    """A matrix in the compute dtype, whole along the model width: on a mesh it is the matrix that is gathered, never the activations."""
    w, size = w.astype(dtype), dict(jax.sharding.get_abstract_mesh().shape).get("tensor")
    if size is None:
        return w
    split = [
        "tensor" if letter in TENSOR_LETTERS and n % size == 0 else None
        for letter, n in zip(letters, w.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(w, PartitionSpec(*split))


def _project(equation: str, summed_wide: bool, x: Array, w: Any) -> Array:
    inputs, weights, outputs = _letters(equation, x)
    dtype = wide() if summed_wide else x.dtype
    if not hasattr(w, "qvalue"):
        return jnp.einsum(
            f"{inputs},{weights}->{outputs}", x, _gathered(w, weights, x.dtype), preferred_element_type=dtype
        )
    # int8 weights with a scale per output channel (`jaxsearch.models.int8`): scaled once, after the sum.
    summed = jnp.einsum(
        f"{inputs},{weights}->{outputs}",
        x,
        _gathered(w.qvalue, weights, x.dtype),
        preferred_element_type=wide(),
    )
    scale = w.scale.reshape(
        [size for size, letter in zip(w.scale.shape, weights, strict=True) if letter in outputs]
    )
    return (summed * jnp.expand_dims(scale, tuple(range(summed.ndim - scale.ndim)))).astype(dtype)


def project(equation: str, x: Array, w: Array, *, summed_wide: bool = False) -> Array:
    """A projection by an einsum such as "TD,DNH->TNH", in which T stands for all leading axes of x.

    The weights are cast to x's dtype; their gradient is summed in fp32, whatever the compute dtype. The result has x's dtype, or with
    `summed_wide` is fp32 as well.
    """
    return _differentiable(equation, summed_wide, x, w)


_differentiable = jax.custom_vjp(_project, nondiff_argnums=(0, 1))


def _project_forward(
    equation: str, summed_wide: bool, x: Array, w: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _project(equation, summed_wide, x, w), (x, w)


def _project_backward(
    equation: str, summed_wide: bool, saved: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    x, w = saved
    inputs, weights, outputs = _letters(equation, x)
    dx = jnp.einsum(f"{outputs},{weights}->{inputs}", g, _gathered(w, weights, x.dtype)).astype(x.dtype)
    plain = functools.partial(jnp.einsum, f"{inputs},{outputs}->{weights}", preferred_element_type=wide())
    x_first = math.prod(x.shape) <= math.prod(g.shape)
    narrow, broad = (inputs, outputs) if x_first else (outputs, inputs)
    turned = "".join(sorted(weights, key=lambda letter: letter not in narrow))
    if x_first and turned == weights:
        return dx, plain(x, g).astype(w.dtype)

    def narrow_first(x: Array, g: Array) -> Array:
        terms = (x, g) if x_first else (g, x)
        dw = jnp.einsum(f"{narrow},{broad}->{turned}", *terms, preferred_element_type=wide())
        return jnp.einsum(f"{turned}->{weights}", jax.lax.optimization_barrier(dw))

    # XLA on a CPU transposes the first operand, together with the elementwise work before it and on one core (JAX's own rule, the cotangent
    # first, took a quarter of a step there): the narrower one stands first, and the small result is turned, held apart by the barrier.
    return dx, jax.lax.platform_dependent(x, g, cpu=narrow_first, default=plain).astype(w.dtype)


_differentiable.defvjp(_project_forward, _project_backward)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Root-mean-square norm over the last axis, computed and returned in fp32 (x [..., D], scale [D])."""
    x = x.astype(wide())
    normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return normed * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))


def rotary_angles(
    positions: Array, head_dim: int, theta: float, *, below: int | None = None
) -> tuple[Array, Array]:
    """Cosine and sine of the rotary angles (positions int [..., T]; both fp32 [..., T, 1, H/2]).

    With `below`, which every position must be, they are read from a table that is made while tracing: where layers are not
    scanned, XLA computes cosines anew for every head of every layer, which takes ten times as long as the rotation.
    """

    def frequencies() -> Array:
        return theta ** (-jnp.arange(0, head_dim, 2, dtype=wide()) / head_dim)

    if below is not None:
        with jax.ensure_compile_time_eval():
            angles = jnp.arange(below, dtype=wide())[:, None] * frequencies()[None]
            table = [np.asarray(f(angles)) for f in (jnp.cos, jnp.sin)]
        cos, sin = (jnp.take(jnp.asarray(x), positions, axis=0, mode="clip") for x in table)
        return cos[..., None, :], sin[..., None, :]
    angles = positions.astype(wide())[..., None] * frequencies()[(None,) * positions.ndim]
    return jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]


def rotate(x: Array, angles: tuple[Array, Array]) -> Array:
    """Rotary embedding in fp32, first half paired with second as in Hugging Face (x [..., T, N, H])."""
    cos, sin = angles
    first, second = jnp.split(x.astype(wide()), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def split_batch(x: Array) -> Array:
    """The same activations [B, ...], held to be split over their first axis by the mesh axes `data` and `fsdp`.

    Left to itself the compiler takes over the split of the embedding's width, and then sums activations across devices in every layer,
    where gathering the parameters moves far less. Outside of a mesh, or where the devices do not divide B, nothing changes.
    """
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    axes = tuple(axis for axis in BATCH_AXES if axis in sizes)
    if not axes or x.shape[0] % math.prod(sizes[axis] for axis in axes):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *[None] * (x.ndim - 1)))


def head_outputs(
    x: Array,
    w: dict[str, Array],
    angles: tuple[Array, Array],
    attention: Attention,
    state: Any,
    c: DecoderConfig,
) -> tuple[Array, Any]:
    """What each head mixed [..., T, N, H], the input of the projection `o`, and the attention's new state (arguments as `block`)."""
    y = rms_norm(x, w["attention_norm"], c.rms_eps).astype(c.dtype)
    q, k, v = _rotated(y, w, "q", angles, c), _rotated(y, w, "k", angles, c), _projected(y, w, "v")
    mixed, state = attention(q, k, v, state)
    return checkpoint_name(mixed, KEPT), state


def _projected(y: Array, w: dict[str, Array], name: str) -> Array:
    """Queries ("q"), keys ("k") or values ("v") of normed activations y [..., T, D]."""
    return checkpoint_name(project("TD,DNH->TNH", y, w[name]), KEPT)


def _rotated(
    y: Array, w: dict[str, Array], name: str, angles: tuple[Array, Array], c: DecoderConfig
) -> Array:
    """As `_projected`, normed where the model does so, and rotated: ready for the attention."""
    x = _projected(y, w, name)
    x = rms_norm(x, w[f"{name}_norm"], c.rms_eps) if c.qk_norm else x
    return rotate(x, angles).astype(c.dtype)


def neurons(x: Array, w: dict[str, Array], c: DecoderConfig) -> Array:
    """What each neuron of the SwiGLU says [..., T, F], the inputs of the projection `down` (x after the attention)."""
    y = rms_norm(x, w["mlp_norm"], c.rms_eps).astype(c.dtype)
    gate, up = (checkpoint_name(project("TD,DF->TF", y, w[name]), KEPT) for name in ("gate", "up"))
    return jax.nn.silu(gate) * up


def block(
    x: Array,
    w: dict[str, Array],
    angles: tuple[Array, Array],
    attention: Attention,
    state: Any,
    c: DecoderConfig,
) -> tuple[Array, Any]:
    """One layer: attention, then SwiGLU, each after a norm and added to the residual stream.

    Args:
        x: residual stream [..., T, D] in the compute dtype.
        w: one layer's slice of the parameters in `layer_table`.
        angles: from `rotary_angles`.
        attention: mixes tokens; see `jaxsearch.models.attention`.
        state: what the attention keeps for this layer, or None.
        c: the decoder's config.
    """
    mixed, state = head_outputs(x, w, angles, attention, state, c)
    return _finish(x, mixed, w, c), state


def _finish(x: Array, mixed: Array, w: dict[str, Array], c: DecoderConfig) -> Array:
    """The residual stream [..., T, D] behind a layer whose heads have mixed [..., T, N, H]."""
    x = checkpoint_name(x + project("TNH,NHD->TD", mixed, w["o"]), KEPT)
    return x + project("TF,FD->TD", neurons(x, w, c), w["down"])


def block_at(
    x: Array,
    w: dict[str, Array],
    angles: tuple[Array, Array],
    attention: Attention,
    tokens: Array,
    c: DecoderConfig,
    state: Any = None,
) -> Array:
    """As `block`, for a few tokens alone: all tell their keys and values, these are asked (x [B, T, D], tokens int [B, J])."""
    y = rms_norm(x, w["attention_norm"], c.rms_eps).astype(c.dtype)
    k, v = _rotated(y, w, "k", angles, c), _projected(y, w, "v")
    rows = jnp.arange(x.shape[0])[:, None]
    q = _rotated(y[rows, tokens], w, "q", (angles[0][rows, tokens], angles[1][rows, tokens]), c)
    mixed, _ = attention(q, k, v, state)
    return _finish(x[rows, tokens], mixed, w, c)


def _unrolled(step: Callable, x: Array, layers: tuple[dict[str, tuple], Any]) -> tuple[Array, Any]:
    """As `jax.lax.scan`, one copy of the step per layer; states come and go as tuples over layers."""
    weights, states = layers
    kept, inputs = [], []
    for layer in range(len(weights["q"])):
        own = {name: value[layer] for name, value in weights.items()}
        x, (new, before) = step(x, (own, None if states is None else states[layer]))
        kept.append(new)
        inputs.append(before)
    return x, (tuple(kept), None if inputs[0] is None else jnp.stack(inputs))


class Layers(nnx.Module):
    """The stacked parameters of all layers, one attribute per name of `layer_table`."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        for name, spec in layer_table(config).items():
            setattr(self, name, spec.create(rngs))

    def arrays(self) -> dict[str, Any]:
        """Parameter name -> array [layers, ...], or after `unstack` a tuple of one array per layer."""
        return {name: value.get_value() for name, value in vars(self).items() if isinstance(value, nnx.Param)}


def unstack(state: nnx.State) -> nnx.State:
    """A decoder's state with each layer's parameters in arrays of their own, for inference on a CPU.

    A scan copies a layer's parameters before it uses them, which short calls notice: 60 + 100 tokens through six layers of
    SmolLM2-135M's sizes took a quarter less CPU time without, seen once. Compilation then grows with the layers.
    """

    def split(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        if "layers" not in path:
            return variable
        value = variable.get_value()
        layers = jax.tree.leaves(value)[0].shape[0]
        return variable.replace(tuple(jax.tree.map(lambda x, i=i: x[i], value) for i in range(layers)))

    return nnx.from_flat_state([(path, split(path, value)) for path, value in nnx.to_flat_state(state)])


class Decoder(nnx.Module):
    """The body of a language model: embeddings in, hidden states out; heads and attention are the caller's.

    Parameters: `embedding` [V, D], `final_norm` [D], `unembedding` [V, D] (None where the output is tied),
    and `layers`, see `layer_table`.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        table = outer_table(config)
        self.config = config
        self.embedding = table["embedding"].create(rngs)
        self.layers = Layers(config, rngs=rngs)
        self.final_norm = table["final_norm"].create(rngs)
        self.unembedding = None if config.tied else table["unembedding"].create(rngs)

    def embed(self, tokens: Array) -> Array:
        """Token embeddings [..., T, D] in the compute dtype (tokens int [..., T]).

        An id beyond the vocabulary gives NaN, so that it cannot pass unseen.
        """
        rows = jnp.take(self.embedding[...], tokens, axis=0, mode="fill").astype(self.config.dtype)
        return split_batch(rows)

    def causal(self, where: Array, *, keep_kv: bool = False) -> Causal:
        """Causal attention as this decoder is configured to compute it (where bool [..., T], left-aligned)."""
        return Causal(where, keep_kv, self.training_backend(where.shape[-1]))

    def training_backend(self, length: int) -> str:
        """Of a training step's attention over rows of so many queries; outside of one, the reference."""
        return training_backend(self.config.attention, length, self.config.dtype)

    @overload
    def __call__(
        self,
        x: Array,
        positions: Array,
        attention: Attention,
        state: Any = None,
        *,
        return_layers: Literal[False] = False,
        below: int | None = None,
    ) -> tuple[Array, Any]: ...

    @overload
    def __call__(
        self,
        x: Array,
        positions: Array,
        attention: Attention,
        state: Any = None,
        *,
        return_layers: Literal[True],
        below: int | None = None,
    ) -> tuple[Array, Any, Array]: ...

    def __call__(
        self,
        x: Array,
        positions: Array,
        attention: Attention,
        state: Any = None,
        *,
        return_layers: bool = False,
        below: int | None = None,
    ) -> tuple[Array, Any] | tuple[Array, Any, Array]:
        """Run all layers and the final norm.

        Args:
            x: embeddings [..., T, D], of tokens (`embed`) or of anything else.
            positions: int [..., T], for the rotary embedding alone: the attention knows who sees whom.
            attention: see `jaxsearch.models.attention`.
            state: pytree with a leading layer axis, such as a prefix's keys and values (a tuple over layers where the
                parameters are unstacked).
            return_layers: also return the residual stream [layers + 1, ..., T, D]: the input of every
                layer, then the last layer's output *before* the final norm (the last of Hugging Face's
                `hidden_states` is after it).
            below: larger than every position, for a table of rotary angles (see `rotary_angles`).

        Returns:
            The hidden states [..., T, D] after the final norm in the compute dtype, the new state stacked
            over layers, and the residual stream if asked for.

        Raises:
            InputError: the shapes of x and positions do not fit each other or the config.
        """
        c = self.config
        if x.shape[-1] != c.width or positions.shape != x.shape[:-1]:
            raise InputError(
                f"x has shape {x.shape}, positions {positions.shape}: "
                f"give x [..., T, {c.width}] and positions [..., T]"
            )
        angles = rotary_angles(positions, c.head_dim, c.rope_theta, below=below)

        def step(x: Array, layer: tuple[dict[str, Array], Any]) -> tuple[Array, tuple[Any, Array | None]]:
            y, new_state = block(split_batch(x), layer[0], angles, attention, layer[1], c)
            return split_batch(y), (new_state, x if return_layers else None)

        weights = self.layers.arrays()
        loop = _unrolled if isinstance(weights["q"], tuple) else jax.lax.scan
        x, (state, inputs) = loop(REMAT[c.remat](step), x.astype(c.dtype), (weights, state))
        hidden = rms_norm(x, self.final_norm[...], c.rms_eps).astype(c.dtype)
        return (hidden, state, jnp.concatenate([inputs, x[None]])) if return_layers else (hidden, state)

    def hidden_at(
        self,
        x: Array,
        positions: Array,
        attention: Attention,
        tokens: Array,
        last: Attention,
        *,
        below: int,
        state: Any = None,
    ) -> Array:
        """Hidden states of a few tokens alone [B, J, D], after the final norm in the compute dtype; for inference.

        In the last layer all tokens give keys and values, and only these are asked: a scored item is read at one token.

        Args:
            x: embeddings [B, T, D].
            positions: int [B, T].
            attention: of all layers but the last.
            tokens: int [B, J], which tokens.
            last: the attention of the last layer, called with q [B, J, N, H] and the k and v of all tokens.
            below: larger than every position.
            state: of the attentions, such as a prefix's keys and values: as in `__call__`.
        """
        c, weights = self.config, self.layers.arrays()
        angles = rotary_angles(positions, c.head_dim, c.rope_theta, below=below)

        def layer(x: Array, own: tuple[dict[str, Any], Any]) -> Array:
            return block(x, own[0], angles, attention, own[1], c)[0]

        def slice_of(i: Any) -> tuple[dict[str, Any], Any]:
            return jax.tree.map(lambda x: x[i], (weights, state))

        x = x.astype(c.dtype)
        if isinstance(weights["q"], tuple):  # see `unstack`
            owns = [
                ({name: value[i] for name, value in weights.items()}, None if state is None else state[i])
                for i in range(c.layers)
            ]
            x, own = functools.reduce(layer, owns[:-1], x), owns[-1]
        else:
            # By number: a slice of all layers but one would copy them.
            x, _ = jax.lax.scan(lambda x, i: (layer(x, slice_of(i)), None), x, jnp.arange(c.layers - 1))
            own = slice_of(-1)
        x = block_at(x, own[0], angles, last, tokens, c, own[1])
        return rms_norm(x, self.final_norm[...], c.rms_eps).astype(c.dtype)

    def _output(self) -> Array:
        """The output matrix [V, D]: the embedding where the output is tied."""
        return (self.embedding if self.unembedding is None else self.unembedding)[...]

    def logits(self, hidden: Array) -> Array:
        """Next-token logits, fp32 [..., V] (hidden [..., D])."""
        return project("TD,VD->TV", hidden.astype(self.config.dtype), self._output(), summed_wide=True)

    def label_rows(self, ids: Sequence[int] | Array) -> Array:
        """The rows of the output matrix that belong to these token ids, fp32 [len(ids), D].

        Raises:
            InputError: an id given as a Python integer lies outside the vocabulary.
        """
        if not isinstance(ids, jax.Array):
            for i in ids:
                if not 0 <= int(i) < self.config.vocab_size:
                    raise InputError(
                        f"ids contains {i}: use token ids from 0 to {self.config.vocab_size - 1}"
                    )
        return jnp.take(self._output(), jnp.asarray(ids, jnp.int32), axis=0, mode="fill")


def with_config(decoder: Decoder, **changes: Any) -> Decoder:
    """The same parameters (shared, not copied) under other settings of the computation, such as its dtype.

    Raises:
        InputError: a change would alter what the checkpoint decides.
    """
    for name in changes:
        if name not in ("compute_dtype", "remat", "attention"):
            raise InputError(f"changes contains {name!r}: only compute_dtype, remat and attention can change")
    changed = nnx.merge(*nnx.split(decoder))
    changed.config = dataclasses.replace(decoder.config, **changes)
    return changed
