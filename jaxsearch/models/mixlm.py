"""MixLM: a document is read once by an encoder, whose last hidden states stand for it in the ranker's input (paper section 6).

Axes: M documents, T tokens, S embeddings per document, W width of the ranker, D width of the encoder, B queries, R rows.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxsearch.models.decoder import Decoder, DecoderConfig
from jaxsearch.models.scorer import Scorer


class DocumentEncoder(nnx.Module):
    """A decoder that keeps the hidden states of a document's last tokens, and a projection where the ranker is of another width.

    Args:
      config: of the decoder.
      tokens: T_S, how many hidden states are kept; a shorter document keeps all of its own.
      width: W, of the ranker that reads them.
      rngs: of the initial parameters.
    """

    def __init__(self, config: DecoderConfig, *, tokens: int, width: int, rngs: nnx.Rngs):
        self.decoder = Decoder(config, rngs=rngs)
        self.tokens, self.width = tokens, width
        self.projection = (
            None
            if width == config.width
            else nnx.Param(
                jax.random.normal(rngs.params(), (config.width, width), jnp.float32) * config.width**-0.5,
                axes=("embed", None),
            )
        )

    def __call__(self, tokens: Array, where: Array, positions: Array | None = None) -> Array:
        """Embeddings [M, S, W] in the compute dtype, in the order of the text; 0 behind the last one of a short document.

        Args:
          tokens: int [M, T], documents with their tail.
          where: bool [M, T], left-aligned.
          positions: int [M, T], rising; of samples of documents, where the tokens stand in the whole. None: 0, 1, ...
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        hidden, _ = self.decoder(self.decoder.embed(tokens), positions, self.decoder.causal(where))
        length = jnp.sum(where, axis=1)[:, None]
        slots = jnp.arange(self.tokens)[None]
        places = jnp.minimum(jnp.maximum(length - self.tokens, 0) + slots, tokens.shape[1] - 1)
        kept = jnp.take_along_axis(hidden, places[..., None], axis=1)
        if self.projection is not None:
            kept = jnp.einsum("MSD,DW->MSW", kept, self.projection[...].astype(kept.dtype))
        return jnp.where((slots < length)[..., None], kept, 0)

    def fit_scale(self, embedding: Array) -> None:
        """Scale the final norm so that the embeddings are as large as those of a ranker's own tokens (embedding [V, W]).

        A norm's output is many times larger than a row of an embedding table: it would drown what the ranker's first layers add to it.
        """
        norm = self.decoder.final_norm
        norm.set_value(norm[...] * (_rms(embedding) / _rms(norm[...])))

    def take_projection(self, other: "DocumentEncoder") -> None:
        """Go on with the projection of another encoder of the same widths, where there is one."""
        if self.projection is not None and other.projection is not None:
            self.projection.set_value(other.projection[...])


class MixLM(nnx.Module):
    """Ranker and encoder, which train together."""

    def __init__(self, ranker: Scorer, encoder: DocumentEncoder):
        self.ranker = ranker
        self.encoder = encoder


def _rms(x: Array) -> Array:
    return jnp.sqrt(jnp.mean(x * x))
