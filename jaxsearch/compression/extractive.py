"""Summaries of documents without a model (paper section 5): whole units chosen by TF-IDF, and plain truncation to compare with.

Both are query-independent, keep to a budget of tokens, and give the same summary for the same document (the selection: as long as the
corpus that it counts words in is the same). What a model writes instead: `scoring.summaries`.
"""

import hashlib
import json
import re
from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from jaxsearch.data.records import Document
from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.errors import InputError

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\s*\n+\s*")
_ENTRY = re.compile(r"\s*[,;]\s*")
_WORD = r"(?u)\b\w+\b"
_POSITION = 0.5
"""Weight of standing early, beside that of being about what the document is about."""
_UNITS = 2_000
"""Of a document that are looked at, from its start: time grows with their square."""
SEPARATOR = "; "
"""Between fields, and between the units of a summary."""


def plain_text(document: Document) -> str:
    """All text fields in reading order, without their names."""
    return SEPARATOR.join(document.fields.values())


def split_units(document: Document) -> list[str]:
    """The units of a document in reading order: sentences of running text, entries of a list."""
    units: list[str] = []
    for text in document.fields.values():
        sentences = [part.strip() for part in _SENTENCE.split(text) if part.strip()]
        for sentence in sentences:
            running = len(sentences) > 1 or sentence[-1] in ".!?"
            units += [sentence] if running else [part for part in _ENTRY.split(sentence) if part]
    return list(dict.fromkeys(units))


def settings_hash(method: str, tokenizer: Tokenizer, **settings: float) -> str:
    """What stands for the contract hash of a summariser that has no weights."""
    values = {"method": method, **settings, "tokenizer": tokenizer.inner.to_str()}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _check_budget(tokens: int) -> None:
    if tokens < 1:
        raise InputError(f"tokens is {tokens}: give at least 1")


class Truncation:
    """The start of the text, the control that any summary has to beat.

    Args:
      tokenizer: counts the tokens; the ranker's own.
      tokens: most of a summary.
    """

    method = "truncate"

    def __init__(self, tokenizer: Tokenizer, tokens: int):
        _check_budget(tokens)
        self._tokenizer, self._tokens = tokenizer, tokens

    @property
    def hash(self) -> str:
        """Of the settings."""
        return settings_hash(self.method, self._tokenizer, tokens=self._tokens)

    def __call__(self, documents: Sequence[Document]) -> list[str]:
        """One summary per document."""
        return [self._tokenizer.cut(plain_text(document), self._tokens) for document in documents]


class Extractive:
    r"""Whole units of the document, chosen one after another: what the document is about, said early, and not said yet.

    .. math::
        \arg\max_u \frac{\lambda (c_u + p_u) - (1 - \lambda) \max_{s \in S} \cos(u, s)}{|u|^{1/2}},
        \quad c_u = \cos(u, d), \quad p_u = \frac{n - i_u + 1}{2 n} \max_v c_v

    over the units that still fit, with TF-IDF vectors: centroid and position value of MEAD (Radev et al., "Centroid-based Summarization
    of Multiple Documents", 2004; there the position weighs twice as much), novelty by maximal marginal relevance (Carbonell & Goldstein,
    SIGIR 1998), the cost in tokens below as in Lin & Bilmes ("Multi-document Summarization via Budgeted Maximization of Submodular
    Functions", NAACL 2010). Chosen units keep the document's order. Where none fits, the best one is cut.

    Args:
      tokenizer: counts the tokens; the ranker's own.
      tokens: most of a summary.
      corpus: what words are counted in.
      balance: lambda; 1 looks at relevance alone.
    """

    method = "extractive"

    def __init__(
        self, tokenizer: Tokenizer, tokens: int, corpus: Sequence[Document], *, balance: float = 0.7
    ):
        _check_budget(tokens)
        if not 0 <= balance <= 1:
            raise InputError(f"balance is {balance}: give a share from 0 to 1")
        if not corpus:
            raise InputError("corpus is empty: give at least one document to count words in")
        self._tokenizer, self._tokens, self._balance = tokenizer, tokens, balance
        self._vectors = TfidfVectorizer(token_pattern=_WORD)
        try:
            self._vectors.fit([plain_text(document) for document in corpus])
        except ValueError as error:
            raise InputError(f"corpus holds no words ({error}): give documents with text") from error

    @property
    def hash(self) -> str:
        """Of the settings; the corpus is no part of them, or a new document would make every summary stale."""
        return settings_hash(self.method, self._tokenizer, tokens=self._tokens, balance=self._balance)

    def __call__(self, documents: Sequence[Document]) -> list[str]:
        """One summary per document."""
        return [self._summary(split_units(document)) for document in documents]

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode([text])[0])

    def _summary(self, units: list[str]) -> str:
        if not units:
            return ""
        units = units[:_UNITS]
        vectors = self._vectors.transform(units)  # [U, words], rows of length 1 or 0
        centroid = np.asarray(self._vectors.transform([" ".join(units)]).todense()).ravel()
        relevance = vectors @ centroid
        relevance = relevance + _POSITION * (1 - np.arange(len(units)) / len(units)) * relevance.max()
        novelty_lost = np.zeros(len(units))  # the greatest likeness to a chosen one
        costs = np.array([len(ids) for ids in self._tokenizer.encode(units)])
        chosen: list[int] = []
        left = [i for i in range(len(units)) if costs[i] <= self._tokens]
        while left:
            gain = self._balance * relevance[left] - (1 - self._balance) * novelty_lost[left]
            best = left.pop(int(np.argmax(gain / np.sqrt(np.maximum(costs[left], 1)))))
            if self._count(self._join(units, [*chosen, best])) <= self._tokens:
                chosen.append(best)
                alike = np.asarray((vectors @ vectors[best].T).todense()).ravel()
                novelty_lost = np.maximum(novelty_lost, alike)
        if not chosen:
            best = int(np.argmax(relevance))
            return self._tokenizer.cut(units[best], self._tokens)
        return self._join(units, chosen)

    @staticmethod
    def _join(units: Sequence[str], chosen: Sequence[int]) -> str:
        return SEPARATOR.join(units[i] for i in sorted(chosen))
