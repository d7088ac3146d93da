"""A trained summariser at work: the likeliest short text for each document, by greedy generation (paper section 5).

Axes: B documents, T prompt tokens, M new tokens, V vocabulary.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsearch.data.prompts import PromptRoom
from jaxsearch.data.records import Document
from jaxsearch.models.attention import Causal
from jaxsearch.models.contract import ContractError, Model
from jaxsearch.models.decoder import Decoder
from jaxsearch.models.generate import allowed_tokens, continue_texts
from jaxsearch.models.scorer import Scorer
from jaxsearch.scoring.records import length_groups


class SummaryWriter:
    """Lets a summariser write.

    Args:
      decoder: of the summariser.
      room: its prompt.
      digest: contract hash.
      tokens: about how many prompt tokens one call holds.
    """

    method = "model"

    def __init__(self, decoder: Decoder, room: PromptRoom, digest: str = "", *, tokens: int = 8192):
        self._graphdef, state = nnx.split(decoder)
        # Variables of its own, like PrefillScorer: training the decoder on does not change this one.
        self._state = jax.tree.map(lambda x: x, state)
        self._room, self._tokens, self.hash = room, tokens, digest
        self._first, self._may = text_masks(room, decoder.config.vocab_size)

    def __call__(self, documents: Sequence[Document]) -> list[str]:
        """One summary per document; "" where it wrote nothing but white space."""
        texts = [""] * len(documents)
        ends = jnp.asarray([self._room.end_id], jnp.int32)
        for group, tokens, lengths in self._prompts(documents):
            written, counts = continue_texts(
                self._graphdef, self._state, tokens, lengths, ends, self._first, self._may, None,
                max_new_tokens=self._room.config.max_answer_tokens,
            )  # fmt: skip
            for i, ids, count in zip(group, np.asarray(written), np.asarray(counts), strict=False):
                texts[i] = self._room.tokenizer.decode(ids[:count].tolist()).strip()
        return texts

    def first_log_probs(self, documents: Sequence[Document]) -> np.ndarray:
        """fp32 [B, 1], the log-probability of the first token of each summary: what its contract's golden scores are."""
        found = np.zeros((len(documents), 1), np.float32)
        for group, tokens, lengths in self._prompts(documents):
            values = _first_log_prob(self._graphdef, self._state, tokens, lengths, self._first)
            found[group, 0] = np.asarray(values)[: len(group)]
        return found

    def _prompts(self, documents: Sequence[Document]) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """Places of documents, their prompts int32 [B, T], and how long each is int32 [B]."""
        for group, tokens, where in length_groups(self._room.summary_prompts(documents), self._tokens):
            # Rows of padding have one token.
            yield group, tokens, np.maximum(where.sum(axis=1), 1).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _first_log_prob(
    graphdef: nnx.GraphDef, state: nnx.State, tokens: jax.Array, lengths: jax.Array, first: jax.Array
) -> jax.Array:
    """fp32 [B]."""
    decoder: Decoder = nnx.merge(graphdef, state)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    hidden, _ = decoder(decoder.embed(tokens), positions, Causal(positions < lengths[:, None]))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    logits = jnp.where(first[None], decoder.logits(last), -jnp.inf)
    return jnp.max(jax.nn.log_softmax(logits, axis=-1), axis=-1)


def text_masks(room: PromptRoom, vocabulary: int) -> tuple[jax.Array, jax.Array]:
    """What a summary may begin with, and what may stand in it or end it, bool [V] both.

    No control token but the end, which does not stand first; no id that the tokenizer does not know.
    """
    known = room.tokenizer.vocab_size
    may = allowed_tokens(vocabulary, [*room.tokenizer.control_ids, *range(known, vocabulary)])
    return may.at[room.end_id].set(False), may.at[room.end_id].set(True)


def make_summary_writer(model: Model) -> SummaryWriter:
    """The summariser with the prompt of its contract.

    Raises:
      ContractError: another kind of model.
    """
    if model.contract.kind != "summariser" or not isinstance(model.module, Scorer):
        raise ContractError(
            f"a {model.contract.kind} writes no summaries: give the model folder of a summariser"
        )
    room = PromptRoom(model.tokenizer, model.contract.prompts["summary"])
    return SummaryWriter(model.module.decoder, room, model.hash)
