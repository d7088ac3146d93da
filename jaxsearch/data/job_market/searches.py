"""What both generated markets do with their searches: split them, draw each once, and tell what belongs to a split."""

import random
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Generic, TypeVar

from jaxsearch.data.job_market.draws import split_of
from jaxsearch.data.records import Impression, Judgment, Query

SPLITS = ("train", "dev", "test", "calibration", "golden")
"""The last two are the precedents: judges are measured by them and never learn from them."""

Search = TypeVar("Search")


def query_id(index: int) -> str:
    """The id of a search, of jobs or of people."""
    return f"s{index:05d}"


def query_number(name: str) -> int:
    """The search of an id."""
    return int(name[1:])


class Searches(ABC, Generic[Search]):
    """Searches by number, drawn on first use and kept.

    Args:
      searches: how many train, develop and test.
      precedents: how many stand behind them, to measure judges by.
    """

    def __init__(self, searches: int, precedents: int):
        self._sizes = searches, precedents
        self._searches: dict[int, Search] = {}

    @abstractmethod
    def _rng(self, kind: str, index: int) -> random.Random:
        """Draws that belong to this thing alone."""

    @abstractmethod
    def _make_search(self, index: int) -> Search: ...

    @abstractmethod
    def query(self, index: int) -> Query:
        """One search."""

    @abstractmethod
    def judged(self, index: int) -> list[Judgment]:
        """The graded pairs of one search."""

    @abstractmethod
    def page(self, index: int) -> list[Impression]:
        """One page of results, with what the searcher did."""

    def _search(self, index: int) -> Search:
        if index not in self._searches:
            self._searches[index] = self._make_search(index)
        return self._searches[index]

    def _split(self, index: int) -> str:
        searches, precedents = self._sizes
        return split_of(index - searches, precedents, self._rng("split", index).random())

    @cached_property
    def numbers(self) -> dict[str, list[int]]:
        """The searches of each split: train 80%, dev 6%, test 14% by a hash of the number, and the precedents beside them."""
        result: dict[str, list[int]] = {split: [] for split in SPLITS}
        for index in range(sum(self._sizes)):
            result[self._split(index)].append(index)
        return result

    @cached_property
    def queries(self) -> dict[str, list[Query]]:
        """Searches by split."""
        return {split: [self.query(i) for i in numbers] for split, numbers in self.numbers.items()}

    def judgments(self, split: str) -> dict[str, list[Judgment]]:
        """Graded pairs with reasons, by search. Dev and test: everything above grade 0. Else good and bad answers, one to two."""
        return {query.id: self.judged(query_number(query.id)) for query in self.queries[split]}

    def impressions(self, split: str) -> dict[str, list[Impression]]:
        """One page of results per search, with what the searcher did."""
        return {query.id: self.page(query_number(query.id)) for query in self.queries[split]}
