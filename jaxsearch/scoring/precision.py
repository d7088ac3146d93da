"""Weights of eight bits, and what a change of precision does to rankings.

Only the matrices of the layers become int8, one scale per output channel (symmetric, by the largest weight); embeddings,
norms and label rows stay as they are, and activations are never rounded. What is saved is memory and its traffic, which bounds short calls.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from jaxsearch.errors import InputError
from jaxsearch.metrics import ndcg

INPUT_AXES = {"q": (1,), "k": (1,), "v": (1,), "o": (1, 2), "gate": (1,), "up": (1,), "down": (1,)}
"""Matrix -> the axes [layer, ...] that are summed over, and share a scale."""


def int8_weights(state: nnx.State) -> nnx.State:
    """A decoder's or scorer's state with the layers' matrices as `qwix.QArray` (int8 values, fp32 scales).

    Raises:
        InputError: qwix is not installed.
    """
    try:
        import qwix
    except ImportError as error:
        raise InputError("int8 weights need the package qwix: pip install 'jaxsearch[int8]'") from error

    def convert(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        if "layers" not in path or path[-1] not in INPUT_AXES:
            return variable
        array = variable.get_value()
        apart = [axis for axis in range(array.ndim) if axis not in INPUT_AXES[path[-1]]]
        return variable.replace(qwix.quantize(array, "int8", channelwise_axes=apart))

    return nnx.from_flat_state([(path, convert(path, value)) for path, value in nnx.to_flat_state(state)])


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
