"""The written product policy of job search as a function: (search, posting) -> grade 0-4 and the reason.

`policy_jobs.md` beside this file says the same in words; `tests/test_job_market.py` checks its worked examples against this code.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

LEVELS = ("junior", "mid-level", "senior", "lead")
WORKPLACES = ("onsite", "hybrid", "remote")
TITLE_GRADES = (4, 3, 2, 1, 0)
"""Grade of a posting whose occupation is the one asked for, nearest relations, nearer ones, supplemental ones, none."""


@dataclass(frozen=True)
class Need:
    """What a search asks for. None: not asked."""

    occupation: int
    level: int | None = None
    city: int | None = None
    workplace: int | None = None
    skill: str | None = None
    company: int | None = None


@dataclass(frozen=True)
class Postings:
    """The columns of all postings that the policy looks at; one row a posting."""

    occupation: np.ndarray
    level: np.ndarray
    city: np.ndarray
    workplace: np.ndarray
    skills: tuple[frozenset[str], ...]
    company: np.ndarray

    @cached_property
    def _named(self) -> dict[str, np.ndarray]:
        return {}

    def named(self, skill: str) -> np.ndarray:
        """int [M], 1 where a posting names the skill; kept, since the same few are asked for again and again."""
        if skill not in self._named:
            self._named[skill] = np.array([skill in held for held in self.skills], np.int64)
        return self._named[skill]


def components(need: Need, postings: Postings, tiers: np.ndarray) -> dict[str, np.ndarray]:
    """What each criterion says of every posting.

    Args:
      need: the search.
      postings: M postings.
      tiers: int [O, O], `tiers[asked, offered]` is the title grade 0-4.

    Returns:
      title: int [M] the title grade; level, skill: int [M] points lost; place, company: bool [M], whether it is the one asked for.
    """
    rows = postings.occupation.shape[0]
    title = tiers[need.occupation, postings.occupation]
    level = np.zeros(rows, np.int64)
    if need.level is not None:
        level = np.minimum(np.abs(postings.level - need.level), 2)
    place, company = np.ones(rows, bool), np.ones(rows, bool)
    if need.city is not None:
        place &= postings.city == need.city
    if need.workplace is not None:
        place &= postings.workplace == need.workplace
    if need.company is not None:
        company = postings.company == need.company
    skill = np.zeros(rows, np.int64)
    if need.skill is not None:
        skill = 1 - postings.named(need.skill)
    return {"title": title, "level": level, "skill": skill, "place": place, "company": company}


def grades(parts: dict[str, Any]) -> Any:
    """The grade 0-4 that follows from `components` (arrays or single numbers)."""
    limit = np.where(parts["place"], np.where(parts["company"], 4, 2), 1)
    left = np.minimum(parts["title"] - parts["level"] - parts["skill"], limit)
    return np.where(parts["title"] == 0, 0, np.clip(left, 0, 4))


def rationale(need: Need, parts: dict[str, int]) -> str:
    """One short sentence a criterion, in the order in which the policy applies them."""
    title = (
        "Unrelated work",
        "Loosely related work",
        "Related work",
        "Closely related work",
        "The job asked for",
    )
    reasons = [title[parts["title"]]]
    if need.level is not None:
        reasons.append(("seniority fits", "seniority one step off", "seniority far off")[parts["level"]])
    if need.city is not None or need.workplace is not None:
        reasons.append("place fits" if parts["place"] else "wrong place")
    if need.company is not None:
        reasons.append("company fits" if parts["company"] else "other company")
    if need.skill is not None:
        reasons.append("skill missing" if parts["skill"] else "skill named")
    return ", ".join(reasons) + "."
