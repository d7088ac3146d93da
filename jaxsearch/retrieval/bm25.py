"""BM25 over whole documents or one of their fields, on bm25s.

Two promises beyond the library's: a document that shares no word with the query is never returned, and equal
scores are ordered by document position.
"""

import dataclasses
import json
import logging
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import Stemmer

from jaxsearch.data.records import Document
from jaxsearch.retrieval.common import ABSENT, check_candidates, check_k, new_folder

if TYPE_CHECKING:
    import bm25s

_FORMAT = 1
# c++, c#, f# are skills; everywhere else punctuation separates words.
_WORD = re.compile(r"\b[a-z](?:\+\+|#)|\w+")


def _bm25s() -> ModuleType:
    """Imported late: its import runs JAX, after which neither devices nor processes can be set up any more."""
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it asks for DEBUG
    return bm25s


def words(text: str) -> list[str]:
    """The lower-case words of `text`, unstemmed, in order.

    >>> words("Senior C++ Engineer (Node.js), Zürich")
    ['senior', 'c++', 'engineer', 'node', 'js', 'zürich']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def document_text(document: Document) -> str:
    """All text fields of a document, in their order: what BM25 searches."""
    return "\n".join(document.fields.values())


@dataclass(frozen=True)
class Bm25Params:
    """BM25 in Lucene's form, whose scores are positive for every document that shares a word with the
    query."""

    k1: float = 1.2
    b: float = 0.75
    stemmer: str | None = "english"
    """A Snowball algorithm by name, or None for words as they stand."""

    def __post_init__(self) -> None:
        if self.k1 < 0:
            raise ValueError(f"Bm25Params.k1 is {self.k1}: use a number >= 0")
        if not 0 <= self.b <= 1:
            raise ValueError(f"Bm25Params.b is {self.b}: use a number from 0 to 1")
        if self.stemmer is not None and self.stemmer not in Stemmer.algorithms():
            known = ", ".join(Stemmer.algorithms())
            raise ValueError(f"Bm25Params.stemmer is {self.stemmer!r}: use None or one of {known}")


class Bm25:
    """A BM25 index over M texts. Build it with `build` or `load`; queries are plain strings."""

    def __init__(self, params: Bm25Params, index: "bm25s.BM25") -> None:
        self.params = params
        self._index = index
        # How many different words each document has.
        self._distinct = np.bincount(index.scores["indices"], minlength=len(self))

    def __len__(self) -> int:
        return int(self._index.scores["num_docs"])

    @classmethod
    def build(cls, texts: Sequence[str], params: Bm25Params = Bm25Params()) -> "Bm25":
        """Index `texts`; their order gives the document positions.

        Raises:
          ValueError: there is no text, or no text holds a word.
        """
        tokens = _tokenise(texts, params)
        # Sorted, so that the saved index is the same in every process (sets of strings are not).
        vocabulary = {word: i for i, word in enumerate(sorted(set().union(*tokens)))} if tokens else {}
        if not vocabulary:
            raise ValueError(f"none of the {len(texts)} texts holds a word: there is nothing to search")
        index = _bm25s().BM25(k1=params.k1, b=params.b, method="lucene", backend="numpy")
        ids = [[vocabulary[word] for word in text] for text in tokens]
        index.index((ids, vocabulary), create_empty_token=False, show_progress=False)
        return cls(params, index)

    def search(
        self, queries: Sequence[str], k: int, *, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best k documents of each query.

        Args:
          queries: Q texts. One without a known word gets an empty row.
          k: results per query, at least 1; may exceed the number of documents.
          mask: bool [Q, M], False for documents that must not be returned.

        Returns:
          ids int32 [Q, k] and scores fp32 [Q, k], best first, equal scores by document position; -1 and -inf
          where fewer match.
        """
        ids = np.full((len(queries), check_k(k)), ABSENT, np.int32)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        if mask is not None and np.shape(mask) != (len(queries), len(self)):
            raise ValueError(f"mask has shape {np.shape(mask)}: give [{len(queries)}, {len(self)}]")
        for row, tokens in enumerate(self._known(queries)):
            every = self._index.get_scores_from_ids(tokens)
            found = np.flatnonzero(every if mask is None else every * mask[row])
            found = found[np.argsort(-every[found], kind="stable")[:k]]
            ids[row, : len(found)] = found
            scores[row, : len(found)] = every[found]
        return ids, scores

    def score(self, queries: Sequence[str], candidates: np.ndarray) -> np.ndarray:
        """BM25 of each candidate.

        Args:
          queries: B texts.
          candidates: int [B, L], -1 for an empty place.

        Returns:
          fp32 [B, L]: 0 where no word is shared, -inf where the place is empty.
        """
        candidates = check_candidates(candidates, len(queries), len(self))
        scores = np.empty(candidates.shape, np.float32)
        for row, tokens in enumerate(self._known(queries)):
            scores[row] = self._index.get_scores_from_ids(tokens)[candidates[row]]
        scores[candidates == ABSENT] = -np.inf
        return scores

    def overlap(self, queries: Sequence[str], candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How much of the query's words the document has, and how much of the document's words the query has.

        Args:
          queries: B texts.
          candidates: int [B, L], -1 for an empty place.

        Returns:
          two fp32 [B, L] of shares from 0 to 1 over different words (0 for a text without words, -inf where
          the place is empty).
        """
        candidates = check_candidates(candidates, len(queries), len(self))
        of_query, of_document = np.empty((2, *candidates.shape), np.float32)
        starts, postings = self._index.scores["indptr"], self._index.scores["indices"]
        sizes = [len(set(tokens)) for tokens in _tokenise(queries, self.params)]
        for row, tokens in enumerate(self._known(queries)):
            shared = np.zeros(len(self), np.float32)
            for token in set(tokens):
                shared[postings[starts[token] : starts[token + 1]]] += 1
            ids = candidates[row]
            of_query[row] = shared[ids] / max(1, sizes[row])
            of_document[row] = shared[ids] / np.maximum(1, self._distinct[ids])
        of_query[candidates == ABSENT] = of_document[candidates == ABSENT] = -np.inf
        return of_query, of_document

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the index (JSON and npy files) to `folder`, whole or not at all."""
        with new_folder(folder) as new:
            self._index.save(new, show_progress=False)
            settings = {"format": _FORMAT, "params": dataclasses.asdict(self.params)}
            (new / "bm25.json").write_text(json.dumps(settings, indent=1))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Bm25":
        """The index that `save` wrote.

        Raises:
          FileNotFoundError: there is no index in `folder`.
          ValueError: it is of another format, or its arrays do not fit together.
        """
        settings = json.loads((Path(folder) / "bm25.json").read_text())
        if settings.get("format") != _FORMAT:
            raise ValueError(f"{folder}: format {settings.get('format')!r}; this version reads {_FORMAT}")
        index = _bm25s().BM25.load(folder, allow_pickle=False, show_progress=False)
        data, postings, starts = (index.scores[name] for name in ("data", "indices", "indptr"))
        documents, vocabulary = index.scores["num_docs"], index.vocab_dict
        fits = (
            len(data) == len(postings) == starts[-1]
            and sorted(vocabulary.values()) == list(range(len(starts) - 1))
            and (np.diff(starts) >= 0).all()
            and ((postings >= 0) & (postings < documents)).all()
        )
        if not fits:
            raise ValueError(f"{folder}: the arrays of the index do not fit together; build it again")
        return cls(Bm25Params(**settings["params"]), index)

    def _known(self, queries: Sequence[str]) -> list[list[int]]:
        return [self._index.get_tokens_ids(tokens) for tokens in _tokenise(queries, self.params)]


def _tokenise(texts: Sequence[str], params: Bm25Params) -> list[list[str]]:
    if isinstance(texts, str):
        raise TypeError("texts is one string: give a list of strings")
    if params.stemmer is None:
        return [words(text) for text in texts]
    stemmer = Stemmer.Stemmer(params.stemmer)  # made anew for each call: one must not be shared by threads
    return [stemmer.stemWords(words(text)) for text in texts]
