"""The written product policy of people search as a function: (search, member) -> grade 0-4 and the reason.

`policy_people.md` beside this file says the same in words; `tests/test_people_market.py` checks its worked examples against this code.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

NOBODY = -1
"""Stands for an earlier occupation or company where a member has had one position only."""
_WORK = (
    "Unrelated work",
    "Loosely related work",
    "Related work",
    "Closely related work",
    "The work asked for",
)
_NAME = ("Another name", "First name fits", "Last name fits", "", "First and last name fit")
_COMPANY = ("company fits", "company left", "never at the company")


@dataclass(frozen=True)
class Need:
    """What a search asks for: a name, or work with more or less beside it. None: not asked."""

    occupation: int | None = None
    company: int | None = None
    skill: str | None = None
    city: int | None = None
    name: tuple[int, int] | None = None
    """First name, surname."""


@dataclass(frozen=True)
class Members:
    """The columns of all members that the policy looks at; one row a member."""

    occupation: np.ndarray
    earlier_occupation: np.ndarray
    company: np.ndarray
    earlier_company: np.ndarray
    city: np.ndarray
    first: np.ndarray
    surname: np.ndarray
    skills: tuple[frozenset[str], ...]


def components(need: Need, members: Members, tiers: np.ndarray) -> dict[str, np.ndarray]:
    """What each criterion says of every member.

    Args:
      need: the search.
      members: M members.
      tiers: int [O, O], `tiers[asked, done]` is the grade 0-4 of work.

    Returns:
      start: int [M] the grade of the name or of the work; past: bool [M], whether that is earlier work; skill: int [M] points lost;
      company: int [M] 0 there now (or none asked), 1 left, 2 never there; place: bool [M], whether it is the one asked for.
    """
    rows = members.city.shape[0]
    start, past = np.zeros(rows, np.int64), np.zeros(rows, bool)
    if need.name is not None:
        start = np.array([0, 1, 2, 4])[
            (members.first == need.name[0]) + 2 * (members.surname == need.name[1])
        ]
    if need.occupation is not None:
        now = tiers[need.occupation, members.occupation]
        had = members.earlier_occupation != NOBODY
        then = np.where(had, tiers[need.occupation, members.earlier_occupation] - 1, 0)
        start, past = np.maximum(now, then), then > now
    skill, company, place = np.zeros(rows, np.int64), np.zeros(rows, np.int64), np.ones(rows, bool)
    if need.skill is not None:
        skill = 2 * np.array([need.skill not in known for known in members.skills], np.int64)
    if need.company is not None:
        left = np.where(members.earlier_company == need.company, 1, 2)
        company = np.where(members.company == need.company, 0, left)
    if need.city is not None:
        place = members.city == need.city
    return {"start": start, "past": past, "skill": skill, "company": company, "place": place}


def grades(parts: dict[str, Any]) -> Any:
    """The grade 0-4 that follows from `components` (arrays or single numbers)."""
    limit = np.where(parts["company"] == 2, 1, np.where(parts["place"], 4, 2))
    left = np.minimum(parts["start"] - parts["skill"] - (parts["company"] == 1), limit)
    return np.where(parts["start"] == 0, 0, np.clip(left, 0, 4))


def rationale(need: Need, parts: dict[str, int]) -> str:
    """One short clause a criterion, in the order in which the policy applies them."""
    if need.name is not None:
        reasons = [_NAME[parts["start"]]]
    else:
        past = bool(parts["past"])
        reasons = [_WORK[parts["start"] + past] + (" in the past" if past else "")]
    if need.company is not None:
        reasons.append(_COMPANY[parts["company"]])
    if need.skill is not None:
        reasons.append("skill missing" if parts["skill"] else "skill named")
    if need.city is not None:
        reasons.append("place fits" if parts["place"] else "elsewhere")
    return ", ".join(reasons) + "."
