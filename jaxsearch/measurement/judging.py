"""A judge at work: probabilities of the five grades for pairs of records, and the grade that is read from them."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from jaxsearch.data.records import Document, Query
from jaxsearch.errors import InputError
from jaxsearch.models.contract import ContractError, Model
from jaxsearch.models.scorer import Scorer
from jaxsearch.scoring.records import RecordScorer, grade_probabilities

Reading = Literal["argmax", "expected"]
READINGS: tuple[Reading, ...] = ("argmax", "expected")
"""The likeliest grade, or the mean grade rounded (halves go up)."""
Explain = Callable[[Sequence[Query], Sequence[Document]], Sequence[tuple[int, str]]]
"""What a judge writes about pairs [n]: grade (-1 where there is none) and rationale."""


def read_grades(probabilities: np.ndarray, reading: Reading) -> np.ndarray:
    """int64 [n] in 0 to 4 (probabilities [n, 5])."""
    check_reading(reading)
    if reading == "argmax":
        return np.argmax(probabilities, axis=-1)
    mean = probabilities.astype(np.float64) @ np.arange(5)
    return np.clip(np.floor(mean + 0.5), 0, 4).astype(np.int64)


def check_reading(reading: str) -> None:
    """Raise `InputError` unless it is one of `READINGS`."""
    if reading not in READINGS:
        raise InputError(f"reading is {reading!r}: use {' or '.join(READINGS)}")


def check_judge(model: Model) -> None:
    """Raise `ContractError` unless the model is a judge."""
    if model.contract.kind != "judge":
        raise ContractError(f"the model is a {model.contract.kind}: give the model folder of a judge")


class Judge:
    """Grades documents of one corpus.

    Args:
      model: a judge.
      documents: the corpus.
      rows: those of its documents that will be graded; the others are never tokenised.

    Raises:
      ContractError: the model is no judge.
    """

    def __init__(self, model: Model, documents: Sequence[Document], rows: Sequence[np.ndarray]):
        check_judge(model)
        assert isinstance(model.module, Scorer)
        used = np.unique(np.concatenate([np.zeros(0, np.int32), *rows])).astype(np.int64)
        self._place = {int(row): place for place, row in enumerate(used)}
        chosen = [documents[row] for row in used]
        self._scorer = RecordScorer(model.module, model.tokenizer, model.contract.prompts["pair"], chosen)

    def __call__(
        self,
        queries: Sequence[Query],
        candidates: Sequence[np.ndarray],
        progress: Callable[[int], None] | None = None,
    ) -> list[np.ndarray]:
        """Probabilities of the grades 0 to 4, one fp32 [L, 5] per query.

        Args:
          queries: B queries.
          candidates: for each query, rows of its documents.
          progress: called with the number of queries done since the last call.
        """
        places = [np.array([self._place[int(row)] for row in rows], np.int32) for rows in candidates]
        return [grade_probabilities(logits) for logits in self._scorer(queries, places, progress)]


def answer_writer(model: Model) -> Explain | None:
    """Lets a judge write grade and rationale; None where it has learned to give the grade alone."""
    from jaxsearch.scoring.answers import AnswerWriter

    check_judge(model)
    if model.contract.prompts["pair"].answer == "grade":
        return None

    def explain(queries: Sequence[Query], documents: Sequence[Document]) -> list[tuple[int, str]]:
        rows = [np.array([i], np.int32) for i in range(len(documents))]
        return [
            (answer.grade, answer.rationale) for (answer,) in AnswerWriter(model, documents)(queries, rows)
        ]

    return explain


def draw(queries: Sequence[Query], count: int, seed: int = 0) -> list[Query]:
    """`count` queries (all if there are fewer) in their order, drawn by a hash of seed and id.

    Whether a query is drawn depends little on which others there are: samples of a growing file overlap.
    """
    hashes = [hashlib.sha256(f"{seed}:{query.id}".encode()).digest() for query in queries]
    return [queries[i] for i in sorted(sorted(range(len(queries)), key=hashes.__getitem__)[:count])]
