"""A judge's second reading: the answer it writes, grade and rationale, by greedy generation.

The first reading (`scoring.records`) takes the probabilities of the five grade tokens from one prefill. This one costs a decoder pass per
token; it is for people who want to know why, and for measuring that the two readings agree.

Axes: B queries, L items per query.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxsearch.data.records import Document, Query
from jaxsearch.models.contract import ContractError, Model
from jaxsearch.models.generate import generate
from jaxsearch.models.scorer import Scorer
from jaxsearch.scoring.buckets import steps
from jaxsearch.scoring.records import RecordScorer

ROWS = 64
"""Prompts in one call."""


class Answer(NamedTuple):
    """What a judge wrote about one pair."""

    grade: int
    """0 to 4. A text that begins with its grade always has one; where the grade comes last, -1 if it is missing."""
    rationale: str
    tokens: int
    """Tokens written, the end token included."""


class AnswerWriter:
    """Lets a judge write its answers.

    Args:
      judge: a model of kind "judge" that has learned to end its answers (a prompt whose `answer` is "grade" has not).
      documents: the corpus.

    Raises:
      ContractError: the model is no such judge.
    """

    def __init__(self, judge: Model, documents: Sequence[Document]):
        contract = judge.contract
        if contract.kind != "judge" or not isinstance(judge.module, Scorer):
            raise ContractError(f"a {contract.kind} writes no grades: give a judge")
        self.config = contract.prompts["pair"]
        if self.config.answer == "grade":
            raise ContractError(
                "this judge learned the grade alone: train one with prompt.answer grade_rationale or rationale_grade"
            )
        self._judge, self._decoder = judge, judge.module.decoder
        self._records = RecordScorer(judge.module, judge.tokenizer, self.config, documents)
        self._grades = {token: int(label) for label, token in contract.labels.items()}

    def __call__(self, queries: Sequence[Query], candidates: Sequence[np.ndarray]) -> list[list[Answer]]:
        """One answer per candidate.

        Args:
          queries: B queries.
          candidates: for each query, rows of its documents.
        """
        prefixes = self._records.room.prefixes(queries)
        prompts = [
            prefix + item
            for prefix, query, rows in zip(prefixes, queries, candidates, strict=True)
            for item in self._records.items(query, rows)
        ]
        written = iter(self._write(prompts))
        return [[next(written) for _ in rows] for rows in candidates]

    def _write(self, prompts: Sequence[Sequence[int]]) -> list[Answer]:
        """The answers to prompts of any lengths, like lengths together, so that few shapes are compiled."""
        answers: list[Answer | None] = [None] * len(prompts)
        order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
        for start in range(0, len(order), ROWS):
            group = order[start : start + ROWS]
            longest = len(prompts[group[-1]])
            width = next((size for size in steps(16, 1 << 16) if size >= longest), longest)
            tokens, lengths = np.zeros((ROWS, width), np.int32), np.ones(ROWS, np.int32)
            for row, i in enumerate(group):
                lengths[row] = len(prompts[i])
                tokens[row, : lengths[row]] = prompts[i]
            texts, counts = generate(
                self._decoder,
                tokens,
                lengths,
                max_new_tokens=self.config.max_answer_tokens,
                eos_id=self._records.room.end_id,
                first_ids=list(self._grades) if self.config.answer == "grade_rationale" else None,
            )
            for i, ids, count in zip(group, np.asarray(texts), np.asarray(counts), strict=False):
                answers[i] = self._read(ids[:count].tolist())
        return [answer for answer in answers if answer is not None]

    def _read(self, ids: list[int]) -> Answer:
        """Grade and rationale of a written answer."""
        said = [token for token in ids if token != self._records.room.end_id]
        place = 0 if self.config.answer == "grade_rationale" else len(said) - 1
        grade = self._grades.get(said[place], -1) if said else -1
        if grade >= 0:
            del said[place]
        return Answer(grade, self._judge.tokenizer.decode(said).strip(), len(ids))
