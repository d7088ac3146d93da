"""What stands on a decoder: answers read at label tokens and action heads (`Scorer`), or one vector per text (`BiEncoder`)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxsearch.models.decoder import Decoder, DecoderConfig
from jaxsearch.numerics import wide


class Scorer(nnx.Module):
    """Judge, teachers and ranker: logits of a few label tokens and of one binary head per action, at the answer position.

    Args:
      config: of the decoder.
      label_ids: token ids of the answers: Yes and No for a ranker, the five grades for a judge; may be empty.
      actions: how many action heads.
      rngs: of the initial parameters.
    """

    def __init__(self, config: DecoderConfig, *, label_ids: Sequence[int], actions: int, rngs: nnx.Rngs):
        self.decoder = Decoder(config, rngs=rngs)
        self.label_ids = tuple(int(i) for i in label_ids)
        self.actions = actions
        if actions:
            self.action_head = nnx.Param(
                0.02 * jax.random.normal(rngs.params(), (actions, config.width), jnp.float32),
                axes=("actions", "embed"),
            )

    def label_matrix(self) -> Array:
        """fp32 [C, D]: the label tokens' rows of the unembedding, then one row per action."""
        rows = [self.decoder.label_rows(self.label_ids)] if self.label_ids else []
        return jnp.concatenate([*rows, self.action_head[...]] if self.actions else rows)


class BiEncoder(nnx.Module):
    """Both towers of the retriever: one decoder, the last token's hidden state, length 1 (paper section 3)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.decoder = Decoder(config, rngs=rngs)

    def __call__(self, tokens: Array, where: Array) -> Array:
        """Embeddings fp32 [B, D] of length 1 (tokens int [B, T], where bool [B, T], left-aligned, at least one token each)."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        hidden, _ = self.decoder(self.decoder.embed(tokens), positions, self.decoder.causal(where))
        last = jnp.maximum(jnp.sum(where, axis=1) - 1, 0)[:, None, None]
        pooled = jnp.take_along_axis(hidden, last, axis=1)[:, 0].astype(wide())
        return pooled * jax.lax.rsqrt(jnp.maximum(jnp.sum(pooled * pooled, axis=-1, keepdims=True), 1e-12))
