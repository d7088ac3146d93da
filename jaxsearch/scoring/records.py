"""From records to scores: prompts, tokens and the prefill function behind one call. Evaluation, labelling and serving use it."""

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.special import logsumexp

from jaxsearch.data.prompts import PromptConfig, PromptRoom
from jaxsearch.data.records import Document, Query
from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.models.scorer import BiEncoder, Scorer
from jaxsearch.scoring.packing import Item
from jaxsearch.scoring.prefill import Buckets, PrefillScorer, PrefixCacheConfig, steps

JUDGE_LABELS = ("0", "1", "2", "3", "4")
RANKER_LABELS = ("Yes", "No")
PREFIXES = 10_000
"""How many queries' tokens are kept."""
CHUNK = 256
"""Queries whose tokens are made at a time."""
LENGTHS = steps(8, 8192)
"""Lengths that texts are padded to."""
Scores = TypeVar("Scores", np.ndarray, jax.Array)


class RecordScorer:
    """Scores documents of one corpus for queries.

    Args:
      scorer: judge, teacher or ranker.
      tokenizer: its tokenizer.
      prompt: its template.
      documents: the corpus; their tokens are made once.
      buckets: as in `PrefillScorer`.
      prefix_cache: as in `PrefillScorer`.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Tokenizer,
        prompt: PromptConfig,
        documents: Sequence[Document],
        *,
        buckets: Buckets | None = None,
        prefix_cache: PrefixCacheConfig | None = None,
    ):
        self.room = PromptRoom(tokenizer, prompt)
        self.documents = documents
        parts = self.room.documents(documents)
        self.truncated = np.array([part.truncated for part in parts])
        """int [M], tokens cut off each document's end."""
        self._document_tokens = [part.ids for part in parts]
        self._prefixes: OrderedDict[tuple, list[int]] = OrderedDict()
        self.prefill = PrefillScorer(scorer, buckets=buckets, prefix_cache=prefix_cache)

    def items(
        self, query: Query, rows: np.ndarray, positions: Sequence[int] | None = None
    ) -> list[list[int]]:
        """Token ids of the items (document + pair + suffix) for one query."""
        texts = [
            self.room.pair_text(query, self.documents[row], None if positions is None else positions[i])
            for i, row in enumerate(rows)
        ]
        pairs = self.room.pairs(texts)
        return [
            self._document_tokens[row] + pair + self.room.suffix
            for row, pair in zip(rows, pairs, strict=True)
        ]

    def prefixes(self, queries: Sequence[Query]) -> list[list[int]]:
        """Token ids of each query's prefix; those of the last `PREFIXES` queries are kept.

        Raises:
          InputError: a query is empty or too long; names it.
        """
        keys = [
            (q.vertical, q.text, tuple(sorted(q.searcher.items())), tuple(sorted(q.filters.items())))
            for q in queries
        ]
        new = {key: query for key, query in zip(keys, queries, strict=True) if key not in self._prefixes}
        made = dict(zip(new, self.room.prefixes(list(new.values())), strict=True)) if new else {}
        found = [made[key] if key in made else self._prefixes[key] for key in keys]
        for key, ids in zip(keys, found, strict=True):
            self._prefixes[key] = ids
            self._prefixes.move_to_end(key)
        while len(self._prefixes) > PREFIXES:
            self._prefixes.popitem(last=False)
        return found

    def tokens(
        self, queries: Sequence[Query], candidates: Sequence[np.ndarray]
    ) -> tuple[list[list[int]], list[list[Item]]]:
        """Prefixes and items of these queries, what `PrefillScorer.score_lists` takes; documents' tokens are there already.

        Args:
          queries: B queries.
          candidates: for each query, rows of its documents.
        """
        pairs = zip(queries, candidates, strict=True)
        # All pair parts in one tokenizer call; `items` then finds them.
        self.room.pairs([self.room.pair_text(q, self.documents[row]) for q, rows in pairs for row in rows])
        lists: list[list[Item]] = [
            [*self.items(query, rows)] for query, rows in zip(queries, candidates, strict=True)
        ]
        return self.prefixes(queries), lists

    def settle(self, queries: Sequence[Query], candidates: Sequence[np.ndarray]) -> None:
        """Choose the shapes for queries like these and keep to them (see `PrefillScorer.settle`)."""
        self.prefill.settle(*self.tokens(queries, candidates))

    def __call__(
        self,
        queries: Sequence[Query],
        candidates: Sequence[np.ndarray],
        progress: Callable[[int], None] | None = None,
    ) -> list[np.ndarray]:
        """Label logits, one fp32 [L, C] per query.

        Args:
          queries: B queries.
          candidates: for each query, rows of its documents.
          progress: called with the number of queries done since the last call.
        """
        results: list[np.ndarray] = []
        chunks = [slice(start, start + CHUNK) for start in range(0, len(queries), CHUNK)]
        with ThreadPoolExecutor(1) as pool:  # tokens of the next chunk are made while the device scores
            made = [pool.submit(self.tokens, queries[chunk], candidates[chunk]) for chunk in chunks[:1]]
            for i, chunk in enumerate(chunks):
                prefixes, lists = made.pop().result()
                for following in chunks[i + 1 : i + 2]:
                    made.append(pool.submit(self.tokens, queries[following], candidates[following]))
                results += self.prefill.score_lists(prefixes, lists)
                if progress is not None:
                    progress(len(queries[chunk]))
        return results


def relevance_log_odds(logits: Scores) -> Scores:
    """A ranker's log p(Yes) - log p(No), fp32 [L] (logits [L, 2 + A])."""
    return logits[..., 0] - logits[..., 1]


def graded_log_odds(logits: Scores) -> Scores:
    """A judge's mean grade / 4 as log-odds, fp32 [L] (logits [L, 5]): what a Yes/No student can learn from.

    The ratio of the expected grades from below and from above, sum_g p_g g to sum_g p_g (4 - g), as a difference of logarithms, which
    stays exact where the judge is sure.
    """
    steps = np.arange(len(JUDGE_LABELS), dtype=np.float32).reshape(*[1] * (logits.ndim - 1), -1)
    with np.errstate(divide="ignore"):
        up, down = np.log(steps), np.log(steps[..., ::-1])
    if isinstance(logits, np.ndarray):
        return logsumexp(logits + up, axis=-1) - logsumexp(logits + down, axis=-1)
    return jax.nn.logsumexp(logits + up, axis=-1) - jax.nn.logsumexp(logits + down, axis=-1)


def action_log_odds(logits: Scores) -> Scores:
    """A ranker's log-odds per action, fp32 [L, A] (logits [L, 2 + A])."""
    return logits[..., len(RANKER_LABELS) :]


def grade_probabilities(logits: np.ndarray) -> np.ndarray:
    """A judge's probabilities of the grades 0 to 4, fp32 [L, 5]."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def expected_grade(logits: np.ndarray) -> np.ndarray:
    """A judge's mean grade, fp32 [L] in [0, 4] (logits [L, 5])."""
    return grade_probabilities(logits) @ np.arange(5, dtype=np.float32)


class Embedder:
    """Embeds texts with a bi-encoder through a closed set of shapes.

    Args:
      encoder: both towers.
      tokenizer: its tokenizer.
      query_prompt: template of the query tower.
      document_prompt: template of the document tower.
      tokens: about how many tokens one call holds.
    """

    def __init__(
        self,
        encoder: BiEncoder,
        tokenizer: Tokenizer,
        query_prompt: PromptConfig,
        document_prompt: PromptConfig,
        *,
        tokens: int = 8192,
    ):
        self._query_room = PromptRoom(tokenizer, query_prompt)
        self._document_room = PromptRoom(tokenizer, document_prompt)
        self._graphdef, state = nnx.split(encoder)
        # Variables of its own, like PrefillScorer: training the encoder on does not change this one.
        self._state = jax.tree.map(lambda x: x, state)
        self._tokens = tokens
        self._width = encoder.decoder.config.width

    def check(self, queries: Sequence[Query]) -> None:
        """Raise `InputError` unless every query can be encoded."""
        self._query_room.prefixes(queries)

    def queries(self, queries: Sequence[Query]) -> np.ndarray:
        """fp32 [B, D], rows of length 1."""
        return self._embed(self._query_room.prefixes(queries))

    def documents(self, documents: Sequence[Document]) -> np.ndarray:
        """fp32 [M, D], rows of length 1."""
        return self._embed([part.ids for part in self._document_room.documents(documents)])

    def _embed(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        result = np.zeros((len(texts), self._width), np.float32)
        for group, tokens, where in length_groups(texts, self._tokens):
            found = _embed(self._graphdef, self._state, jnp.asarray(tokens), jnp.asarray(where))
            result[group] = np.asarray(found)[: len(group)]
        return result


def length_groups(
    texts: Sequence[Sequence[int]], tokens: int
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Texts of like length together, in a closed set of shapes of about so many tokens.

    Yields:
      Places of the texts int [n]; their tokens int32 [N, T] with N at least n, and where they are, bool [N, T].
    """
    order = np.argsort([len(ids) for ids in texts], kind="stable")
    start = 0
    while start < len(order):
        # Sorted by length: the last text of a group decides its shape, the first one is not much shorter.
        least = len(texts[order[start]])
        length = next((size for size in LENGTHS if size >= least), least)
        rows = max(tokens // length, 1)
        group = [int(i) for i in order[start : start + rows] if len(texts[i]) <= length]
        ids, where = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
        for row, i in enumerate(group):
            ids[row, : len(texts[i])] = texts[i]
            where[row, : len(texts[i])] = True
        yield group, ids, where
        start += len(group)


@functools.partial(jax.jit, static_argnums=0)
def _embed(graphdef: nnx.GraphDef, state: nnx.State, tokens: jax.Array, where: jax.Array) -> jax.Array:
    """Compiled once for all embedders of one architecture."""
    return nnx.merge(graphdef, state)(tokens, where)
