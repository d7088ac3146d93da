"""The final order: a weighted sum of calibrated probabilities, with a floor under relevance.

    U = w_relevance p(relevant) + sum over actions a of w_a p(a)

A document whose probability of being relevant lies below the floor comes after all others, however much it is clicked; such documents are
ordered by relevance among themselves. A weight says what one sure event is worth: with relevance=1, apply=0.5, dismiss=-0.5, two
applications are worth one relevant document, and a dismissal takes away what an application gives. Relevance alone is the default.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxsearch.errors import InputError
from jaxsearch.models.contract import RELEVANCE

LARGEST = 1e6
"""No weight is larger: scores have to fit into the fp32 of a TREC run."""


@dataclass(frozen=True)
class UtilityConfig:
    """What the final order is made of.

    Raises:
      InputError: a weight is not finite, beyond a million, or all are zero; or the floor is no probability.
    """

    weights: Mapping[str, float] = field(default_factory=lambda: {RELEVANCE: 1.0})
    """Objective ("relevance" or an action) -> weight; what is not named weighs nothing. Negative ones push down (dismiss, bad_fit)."""
    floor: float = 0.0
    """Least probability of relevance, 0 to 1; what lies below comes last. 0: no floor."""

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if not _is_number(weight) or not abs(weight) <= LARGEST:
                raise InputError(
                    f"utility: the weight of {name!r} is {weight!r}: give a number of at most {LARGEST:,.0f}"
                )
        if not any(self.weights.values()):
            raise InputError("utility: no weight differs from 0: give at least one, such as relevance=1")
        if not _is_number(self.floor) or not 0 <= self.floor <= 1:
            raise InputError(f"utility: the floor is {self.floor!r}: give a probability from 0 to 1")

    def check(self, actions: Sequence[str]) -> None:
        """Raise `InputError` where a weight is for something that a ranker with these actions does not score."""
        known = (RELEVANCE, *actions)
        for name in self.weights:
            if name not in known:
                raise InputError(f"utility: {name!r} is not scored by this ranker: use {', '.join(known)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"weights": dict(self.weights), "floor": self.floor}

    @classmethod
    def from_dict(cls, values: Any) -> "UtilityConfig":
        """From plain JSON values.

        Raises:
          InputError: they are not those of a utility.
        """
        if not isinstance(values, Mapping) or set(values) != {"weights", "floor"}:
            raise InputError(f"utility is {str(values)[:80]!r}: give an object of weights and floor")
        if not isinstance(values["weights"], Mapping):
            raise InputError(f"utility.weights is {str(values['weights'])[:80]!r}: give an object of numbers")
        return cls(dict(values["weights"]), values["floor"])


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def parse_weights(text: str) -> dict[str, float]:
    """Weights as they are written on a command line, such as "relevance=1,click=0.2".

    Raises:
      InputError: no such form, or a name twice.
    """
    weights: dict[str, float] = {}
    for item in text.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if not name or not equals or not math.isfinite(weight):
            raise InputError(f"utility: {item!r} is no weight: write it as relevance=1,click=0.2")
        if name in weights:
            raise InputError(f"utility: {name!r} has two weights: give one")
        weights[name] = weight
    return weights


def utility(config: UtilityConfig, probabilities: Mapping[str, NDArray]) -> NDArray[np.float64]:
    """What results are ordered by, float64 [L]: U, and for a document below the floor a number below every U that there could be.

    Args:
      config: checked against the ranker's actions.
      probabilities: objective -> calibrated probabilities [L].
    """
    relevance = np.asarray(probabilities[RELEVANCE], np.float64)
    total = np.zeros(relevance.shape)
    for name, weight in config.weights.items():
        total += weight * np.asarray(probabilities[name], np.float64)
    least = sum(min(weight, 0.0) for weight in config.weights.values())
    return np.where(relevance < config.floor, least - 1 + relevance, total)


def order(
    config: UtilityConfig, scores: NDArray[np.float64], log_odds: NDArray, rows: NDArray
) -> NDArray[np.intp]:
    """Places of the items of one query, best first: by `utility`, ties by relevance log-odds, then by document row; int [L].

    A calibrator makes many ties, and a sigmoid makes some; neither may change an order by relevance.

    Args:
      config: what the scores were made with.
      scores: float64 [L] of `utility`.
      log_odds: [L], of relevance.
      rows: int [L], document rows.
    """
    others = any(weight for name, weight in config.weights.items() if name != RELEVANCE)
    if not others and config.weights[RELEVANCE] > 0:  # however probabilities were rounded
        return np.lexsort((rows, -log_odds))
    return np.lexsort((rows, -log_odds, -scores))
