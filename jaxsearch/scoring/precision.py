"""What a change of precision does to rankings."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxsearch.errors import InputError
from jaxsearch.metrics import ndcg


class PrecisionReport(NamedTuple):
    """Rankings by scores of a lower precision, against those by reference scores."""

    queries: int
    max_abs_diff: float
    """Of a score."""
    top1_flips: float
    """Share of queries whose first document is another one."""
    top10_changes: float
    """Share of queries whose first ten documents are not the same ten."""
    ndcg1_flips: float
    """Share of queries whose NDCG@1 changed."""
    ndcg10: float
    """Of the reference, the mean of queries that have one."""
    ndcg10_change: float


def compare_rankings(
    reference: Sequence[np.ndarray], scores: Sequence[np.ndarray], grades: Sequence[np.ndarray]
) -> PrecisionReport:
    """What another precision does to the order of candidates; ties go to the earlier one.

    Args:
      reference: scores of each query's candidates, fp32 [L].
      scores: the same candidates in the other precision.
      grades: their grades, [L].

    Raises:
      InputError: no query has a candidate.
    """
    lists = [one for one in zip(reference, scores, grades, strict=True) if len(one[0])]
    if not lists:
        raise InputError("reference has no candidates: give at least one query with some")
    orders = [(np.argsort(-a, kind="stable"), np.argsort(-b, kind="stable")) for a, b, _ in lists]

    def quality(k: int, which: int) -> np.ndarray:
        return np.array(
            [
                float(ndcg(x[which][None], x[2][None], where=np.ones((1, len(x[2])), bool), k=k)[0])
                for x in lists
            ]
        )

    before, after = quality(10, 0), quality(10, 1)
    return PrecisionReport(
        queries=len(lists),
        max_abs_diff=float(max(np.abs(a - b).max() for a, b, _ in lists)),
        top1_flips=float(np.mean([a[0] != b[0] for a, b in orders])),
        top10_changes=float(np.mean([set(a[:10]) != set(b[:10]) for a, b in orders])),
        ndcg1_flips=float(np.mean(~np.isclose(quality(1, 0), quality(1, 1), equal_nan=True))),
        ndcg10=float(np.nanmean(before)),
        ndcg10_change=float(np.nanmean(after) - np.nanmean(before)),
    )
