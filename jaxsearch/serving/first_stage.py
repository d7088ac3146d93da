"""What a ranker will be asked about: the documents that the first stages return for training queries, to be scored by a teacher."""

from dataclasses import dataclass

import numpy as np

from jaxsearch.data.datasets import Dataset, Pairs
from jaxsearch.errors import InputError
from jaxsearch.models.contract import Model
from jaxsearch.retrieval.bm25 import Bm25, document_text
from jaxsearch.retrieval.exhaustive import ExhaustiveIndex
from jaxsearch.serving.bundle import make_embedder


@dataclass(frozen=True)
class FirstStage:
    """BM25 and a retriever (None: BM25 alone), each of which finds so many documents."""

    retriever: Model | None
    depth: int

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise InputError(f"depth is {self.depth}: use at least 1")

    @property
    def source(self) -> str:
        """Where its pairs come from, in words that tell two first stages apart."""
        return f"first {self.depth} of BM25" + (f" and {self.retriever.hash}" if self.retriever else "")

    def pairs(self, data: Dataset) -> list[Pairs]:
        """For each training query, what they find and the documents of its own pairs; nobody graded them. What is held out is not found.

        A data set's own pairs are drawn by grade or by what was shown; lists to rank are of another kind, most of their documents nearly
        fit.

        Raises:
          ContractError: the retriever is another kind of model.
        """
        queries = list(data.queries["train"])
        allowed = np.setdiff1d(np.arange(len(data.documents), dtype=np.int32), data.held_out)
        documents = [data.documents[row] for row in allowed]
        depth = min(self.depth, len(documents))
        bm25 = Bm25.build([document_text(document) for document in documents])
        lists = [bm25.search([query.text for query in queries], depth)[0]]
        if self.retriever is not None:
            embedder = make_embedder(self.retriever)
            index = ExhaustiveIndex(embedder.documents(documents))
            lists.append(index.search(embedder.queries(queries), depth)[0])
        own = {pairs.query: pairs.documents for pairs in data.pairs}
        found = []
        for query, some in enumerate(np.concatenate(lists, axis=1)):
            every = np.concatenate([allowed[some[some >= 0]], own.get(query, np.zeros(0, np.int32))])
            rows = np.unique(every).astype(np.int32)
            found.append(Pairs(query, rows, np.full(len(rows), -1, np.int32)))
        return found
