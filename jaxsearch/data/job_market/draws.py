"""What the generated markets draw with. Of `random.Random` only `random()` is used, whose stream Python promises to keep."""

import math
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """One item."""
    return items[int(rng.random() * len(items))]


def sample(rng: random.Random, items: Sequence[T], count: int) -> list[T]:
    """`count` different items (or all), in random order."""
    return [item for _, _, item in sorted((rng.random(), i, item) for i, item in enumerate(items))[:count]]


def weighted(rng: random.Random, weights: Sequence[float]) -> int:
    """A place, as often as its weight says."""
    threshold = rng.random() * sum(weights)
    for index, weight in enumerate(weights):
        threshold -= weight
        if threshold < 0:
            return index
    return len(weights) - 1


def normal(rng: random.Random) -> float:
    """A standard normal number."""
    return math.sqrt(-2 * math.log(1 - rng.random())) * math.cos(2 * math.pi * rng.random())


def sigmoid(x: float) -> float:
    """A probability from log-odds."""
    return 1 / (1 + math.exp(-x))


def moment(rng: random.Random) -> str:
    """A minute of June 2026, ISO 8601."""
    day = 1 + int(rng.random() * 28)
    return f"2026-06-{day:02d}T{int(rng.random() * 24):02d}:{int(rng.random() * 60):02d}:00Z"


def split_of(beyond: int, precedents: int, draw: float) -> str:
    """The split of a search.

    Args:
      beyond: its number less that of ordinary searches: from 0 on it is a precedent.
      precedents: how many of these there are; two fifths are for calibration.
      draw: from 0 to 1, for ordinary searches: train 80%, dev 6%, test 14%.
    """
    if beyond >= 0:
        return "calibration" if beyond < 0.4 * precedents else "golden"
    return "train" if draw < 0.8 else "dev" if draw < 0.86 else "test"


def exchange(
    rng: random.Random,
    answers: np.ndarray,
    vary: Callable[[], np.ndarray],
    *,
    good: int,
    enough: int,
    tries: int,
) -> list[int]:
    """Rows worth a grade, two bad answers for each good one, in random order; neither a row nor the search alone says which is which.

    A good answer is drawn from those of the search that do not answer a variation of it, a bad one from those of a variation that do not
    answer the search. Where the way back from a variation is as likely as the way there, the two can change places: what is a good answer
    of the one is a bad answer of the other just as often.

    Args:
      answers: bool [M], the good answers of the search.
      vary: the good answers of a variation of it, drawn anew at each call.
      good: most good answers.
      enough: good answers that a search of the market has at least.
      tries: most variations.
    """
    count = min(good, int(answers.sum()))
    right: dict[int, None] = {}
    wrong: dict[int, None] = {}
    for _ in range(tries):
        if len(right) == count and len(wrong) == 2 * count:
            break
        others = vary()
        lost, won = np.flatnonzero(answers & ~others).tolist(), np.flatnonzero(others & ~answers).tolist()
        # What would not do for a search would not do for its variation either, or the two could not change places.
        if others.sum() < enough or not lost or not won:
            continue
        if len(right) < count:
            right[pick(rng, lost)] = None
        if len(wrong) < 2 * count:
            wrong[pick(rng, won)] = None
    pairs = min(len(right), len(wrong) // 2)
    return sample(rng, [*list(right)[:pairs], *list(wrong)[: 2 * pairs]], 3 * pairs)
