"""MixLM at work: documents to embeddings, and a scorer that reads them in place of text (paper section 6).

A document without an embedding is read as text, in the same call and by the same ranker.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from jaxsearch.data.prompts import PromptConfig, PromptRoom
from jaxsearch.data.records import Document, Query
from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.models.contract import GOLDEN_NUMBERS, ContractError, MixLMPart, Model
from jaxsearch.models.mixlm import DocumentEncoder
from jaxsearch.models.scorer import Scorer
from jaxsearch.scoring.packing import EmbeddedItem, Item
from jaxsearch.scoring.prefill import Buckets
from jaxsearch.scoring.records import RecordScorer, length_groups

Fetch: TypeAlias = Callable[[NDArray], list[NDArray | None]]
"""Rows of documents int [n] -> the embeddings [<= S, W] of each, None where there is no fresh one."""


class DocumentEmbedder:
    """Encodes documents through a closed set of shapes.

    Args:
      encoder: of MixLM.
      tokenizer: its tokenizer.
      prompt: its template, of kind "document".
      tokens: about how many tokens one call holds.
    """

    def __init__(
        self, encoder: DocumentEncoder, tokenizer: Tokenizer, prompt: PromptConfig, *, tokens: int = 8192
    ):
        self.room, self._kept, self._tokens = PromptRoom(tokenizer, prompt), encoder.tokens, tokens
        self.update(encoder)

    def update(self, encoder: DocumentEncoder) -> None:
        """Take over the weights of an encoder of the same architecture."""
        self._graphdef, state = nnx.split(encoder)
        # Variables of its own, like PrefillScorer: training the encoder on does not change this one.
        self._state = jax.tree.map(lambda x: x, state)

    def holds(self, encoder: DocumentEncoder) -> bool:
        """Whether these are the very arrays that it works with."""
        pairs = zip(jax.tree.leaves(self._state), jax.tree.leaves(nnx.state(encoder)), strict=True)
        return all(mine is other for mine, other in pairs)

    def __call__(self, documents: Sequence[Document]) -> list[NDArray]:
        """The embeddings [<= S, W] of each document, in the compute dtype."""
        texts = [part.ids for part in self.room.documents(documents)]
        found: list[NDArray] = [np.zeros(0)] * len(texts)
        for group, tokens, where in length_groups(texts, self._tokens):
            values = np.asarray(_encode(self._graphdef, self._state, jnp.asarray(tokens), jnp.asarray(where)))
            for row, i in enumerate(group):
                found[i] = values[row, : min(self._kept, len(texts[i]))]
        return found


@functools.partial(jax.jit, static_argnums=0)
def _encode(graphdef: nnx.GraphDef, state: nnx.State, tokens: jax.Array, where: jax.Array) -> jax.Array:
    """Compiled once for all embedders of one architecture."""
    return nnx.merge(graphdef, state)(tokens, where)


class OnDemand:
    """A `Fetch` that encodes what it is first asked for, and keeps it."""

    def __init__(self, embedder: DocumentEmbedder, documents: Sequence[Document]):
        self._embedder, self._documents = embedder, documents
        self._kept: dict[int, NDArray] = {}

    def update(self, encoder: DocumentEncoder) -> None:
        """Take over an encoder's weights; what others gave is forgotten."""
        if not self._embedder.holds(encoder):
            self._embedder.update(encoder)
            self._kept = {}

    def __call__(self, rows: NDArray) -> list[NDArray | None]:
        """The embeddings of these documents; none is missing."""
        if missing := list(dict.fromkeys(row for row in rows.tolist() if row not in self._kept)):
            made = self._embedder([self._documents[row] for row in missing])
            self._kept.update(zip(missing, made, strict=True))
        return [self._kept[row] for row in rows.tolist()]


def no_embeddings(rows: NDArray) -> list[NDArray | None]:
    """A `Fetch` that has none: every document is read as text."""
    return [None] * len(rows)


def shuffled(fetch: Fetch, rows: NDArray, seed: int = 0) -> Fetch:
    """Each document (rows int [n], all different) with the embeddings of another one: a ranker that reads them falls to chance.

    Rows that are not among them, such as padding, stay as they are.
    """
    order = np.random.default_rng(seed).permutation(len(rows))
    # Along one cycle, so that none keeps its own.
    other = dict(zip(rows[order].tolist(), rows[np.roll(order, 1)].tolist(), strict=True))
    return lambda wanted: fetch(np.array([other.get(row, row) for row in wanted.tolist()]))


def keep_fields(documents: Sequence[Document], names: Sequence[str]) -> list[Document]:
    """The documents with no text fields but these."""
    return [
        dataclasses.replace(d, fields={name: d.fields[name] for name in names if name in d.fields})
        for d in documents
    ]


class MixedScorer(RecordScorer):
    """Scores documents of one corpus by their embeddings, and as text those that have none.

    An item is [embeddings; fields that stay text; pair; suffix], or as text [document; pair; suffix].

    Args:
      scorer: a MixLM ranker.
      tokenizer: its tokenizer.
      prompt: its template.
      documents: the corpus.
      fetch: the embeddings; called once for all candidate lists of a chunk of queries.
      text_fields: fields that stay text beside the embeddings.
      buckets: as in `PrefillScorer`.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Tokenizer,
        prompt: PromptConfig,
        documents: Sequence[Document],
        fetch: Fetch,
        *,
        text_fields: Sequence[str] = (),
        buckets: Buckets | None = None,
    ):
        super().__init__(scorer, tokenizer, prompt, documents, buckets=buckets)
        self.fetch = fetch
        self.field_tokens: list[list[int]] = [[]] * len(documents)
        """Of each document's fields that stay text."""
        if text_fields:
            self.field_tokens = [
                part.ids for part in self.room.documents(keep_fields(documents, text_fields))
            ]
        self.embedded = self.as_text = 0
        """Items scored so far by embeddings, and as text."""

    def tokens(
        self, queries: Sequence[Query], candidates: Sequence[np.ndarray]
    ) -> tuple[list[list[int]], list[list[Item]]]:
        """Prefixes and items of these queries."""
        rows = np.unique(np.concatenate([*candidates, np.zeros(0, np.int64)]).astype(np.int64))
        found = dict(zip(rows.tolist(), self.fetch(rows), strict=True)) if rows.size else {}
        pairs = [
            (q, self.documents[row]) for q, some in zip(queries, candidates, strict=True) for row in some
        ]
        texts = iter(self.room.pairs([self.room.pair_text(*pair) for pair in pairs]))
        lists = [[self._item(row, found[row], next(texts)) for row in some.tolist()] for some in candidates]
        return self.prefixes(queries), lists

    def _item(self, row: int, embeddings: NDArray | None, pair: list[int]) -> Item:
        if embeddings is None:
            self.as_text += 1
            return self._document_tokens[row] + pair + self.room.suffix
        self.embedded += 1
        return EmbeddedItem(embeddings, self.field_tokens[row] + pair + self.room.suffix)


def make_document_embedder(encoder: Model) -> DocumentEmbedder:
    """The encoder with the prompt of its contract.

    Raises:
      ContractError: another kind of model.
    """
    if not isinstance(encoder.module, DocumentEncoder):
        raise ContractError(
            f"a {encoder.contract.kind} encodes no documents: give the model folder of an encoder, such as model/encoder of a MixLM ranker"
        )
    return DocumentEmbedder(encoder.module, encoder.tokenizer, encoder.contract.prompts["document"])


def make_mixed_scorer(ranker: Model, documents: Sequence[Document], fetch: Fetch) -> MixedScorer:
    """A MixLM ranker with the prompt and text fields of its contract.

    Raises:
      ContractError: a ranker that reads no embeddings.
    """
    part = mixlm_part(ranker)
    assert isinstance(ranker.module, Scorer)  # `mixlm_part` refuses anything else
    return MixedScorer(
        ranker.module,
        ranker.tokenizer,
        ranker.contract.prompts["pair"],
        documents,
        fetch,
        text_fields=part.text_fields,
    )


def mixlm_part(ranker: Model) -> MixLMPart:
    """What a ranker's contract says of the embeddings that it reads.

    Raises:
      ContractError: it reads none.
    """
    contract = ranker.contract
    if contract.kind != "ranker" or contract.mixlm is None or not isinstance(ranker.module, Scorer):
        raise ContractError(
            f"this {contract.kind} reads no embeddings: give the model folder of a MixLM ranker, or no embeddings"
        )
    return contract.mixlm


def check_pair(ranker: Model, encoder: Model) -> None:
    """Refuse an encoder that is not the one the ranker was trained with.

    Raises:
      ContractError: another encoder, or models that are no such pair.
    """
    make_document_embedder(encoder)
    wanted = mixlm_part(ranker).encoder
    if wanted != encoder.hash:
        raise ContractError(
            f"the ranker reads embeddings of encoder {wanted[:12]}, this is {encoder.hash[:12]}: "
            "give the encoder that was exported with it"
        )


def encoder_golden_error(encoder: Model) -> float:
    """Largest deviation from a golden embedding, as a share of that embedding's length (its first numbers alone); 0 where there are none.

    Raises:
      ContractError: another kind of model.
    """
    golden = encoder.contract.golden
    if not golden:
        return 0.0
    found = np.array(golden_numbers(make_document_embedder(encoder)([g.document for g in golden])))
    kept = np.array([g.scores for g in golden])
    lengths = np.maximum(np.linalg.norm(kept, axis=1), np.finfo(np.float32).tiny)
    return float((np.linalg.norm(found - kept, axis=1) / lengths).max())


def mixed_golden_error(ranker: Model, encoder: Model) -> float:
    """Largest deviation from the golden scores that the pair gave when it was exported; 0 where there are none.

    Raises:
      ContractError: models that do not belong together.
    """
    check_pair(ranker, encoder)
    part, golden = ranker.contract.mixlm, ranker.contract.golden
    if part is None or not golden or not part.golden:
        return 0.0
    documents = [g.document for g in golden]
    scorer = make_mixed_scorer(ranker, documents, OnDemand(make_document_embedder(encoder), documents))
    rows = [np.array([i], np.int32) for i in range(len(golden))]
    found = np.concatenate(scorer([g.query for g in golden], rows))
    return float(np.abs(found - np.array(part.golden)).max())


def golden_numbers(embeddings: Sequence[NDArray]) -> list[tuple[float, ...]]:
    """What an encoder's contract keeps of each document's embeddings [S, W]: the first numbers of the last one."""
    return [tuple(float(x) for x in values[-1, :GOLDEN_NUMBERS]) for values in embeddings]
