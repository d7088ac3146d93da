"""A seeded, deterministic job market: postings, searches, policy grades and impressions, generated from facts and templates.

A posting or a search by itself must say nothing about a grade: graded pairs are drawn by `draws.exchange`, where a variation of a search
asks for another place, level, skill, company or occupation.

Everything follows from (`VERSION`, variant, seed): two machines make the same bytes. A change to what is generated needs a new
`VERSION`, which is part of every data set's name, because models and figures made on one version say nothing of another.
"""

import dataclasses
import math
import random
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jaxsearch.data.facts import Occupation, occupations
from jaxsearch.data.job_market import policy, templates
from jaxsearch.data.job_market.draws import (
    exchange,
    moment,
    normal,
    pick,
    sample,
    sigmoid,
    weighted,
)
from jaxsearch.data.job_market.searches import Searches, query_id, query_number
from jaxsearch.data.records import Document, Impression, Judgment, Query

VERSION = "v2"
PAGE = 10
"""Results on one search page, all of which become impressions."""
_ENOUGH = 2
"""Good answers that a search must have; one with fewer is drawn again."""
_TRIES = 200
"""Attempts to find a search with enough answers, and variations of one."""
_ASKED_LEVELS = (2, 1, 1, 2)
"""Odds of the seniority asked for. With the policy's deductions every level of a posting then loses the same on average, and with cities
and workplace types asked for evenly a posting by itself says nothing about its grade."""
_ASKED = ("level", "city", "workplace", "skill", "company")
"""What a search may ask for beside the work, fields of `policy.Need`."""


@dataclass(frozen=True)
class Market:
    """The size of one variant."""

    occupations: int
    titles: int
    """Titles in use per occupation."""
    postings: int
    searches: int
    cities: int
    companies: int
    skills: int
    """Technologies in use per occupation; a posting names `named` of them."""
    named: int
    description: tuple[int, int]
    """Fewest and most words (punctuation counts as words) of a description; (0, 0) for none."""
    good: int = 5
    """Most good answers (above grade 2) among the graded postings of a training search or precedent; there are two bad ones for each."""
    precedents: int = 400
    """Searches whose graded postings are set aside to measure judges by: two fifths for calibration, the rest golden."""
    seed: int = 0


VARIANTS = {
    "tiny": Market(32, 5, 1_200, 5_600, 8, 40, skills=4, named=2, description=(0, 0)),
    "default": Market(300, 16, 4_000, 8_000, 24, 200, skills=8, named=4, description=(90, 700)),
    "long": Market(120, 12, 1_500, 4_000, 16, 100, skills=8, named=4, description=(900, 1_200)),
}


def _length(name: str) -> tuple[bool, int]:
    """Names of more than two words last."""
    return len(name.split()) > 2, len(name.split())


@dataclass(frozen=True)
class _Posting:
    occupation: int
    level: int
    city: int
    workplace: int
    company: int
    skills: tuple[str, ...]
    salary: int
    """Yearly pay offered, in thousands."""
    age_days: int


@dataclass(frozen=True)
class _Search:
    need: policy.Need
    wanted_salary: int
    headline: str
    home: int
    told: bool
    """Told in a sentence."""

    @property
    def bucket(self) -> str:
        """One of `records.BUCKETS`."""
        if self.told:
            return "need"
        if self.need.company is not None:
            return "title_company"
        if self.need.skill is not None:
            return "title_skill"
        placed = self.need.city is not None or self.need.workplace is not None
        return "title_location" if placed else "title"


class JobMarket(Searches[_Search]):
    """One generated market. Tables are made on first use and kept."""

    def __init__(self, variant: str):
        if variant not in VARIANTS:
            raise ValueError(f"job_market variant is {variant!r}: use one of {', '.join(VARIANTS)}")
        self.variant = variant
        self.market = VARIANTS[variant]
        super().__init__(self.market.searches, self.market.precedents)
        self.cities = templates.CITIES[: self.market.cities]
        rng = self._rng("companies", 0)
        self.companies = templates.company_names(self.market.companies, rng.random)
        self._popularity = [normal(rng) for _ in self.companies]
        """Standard normal a company: what searchers like about it that no grade knows."""
        self._company_ctr = []
        for liked in self._popularity:
            shown = 60 + int(rng.random() * 240)
            clicked = sum(rng.random() < sigmoid(-1.4 + 0.8 * liked) for _ in range(shown))
            self._company_ctr.append((clicked + 4) / (shown + 20))

    def _rng(self, kind: str, index: int) -> random.Random:
        return random.Random(f"{VERSION}/{self.variant}/{self.market.seed}/{kind}/{index}")

    # --- the world -----------------------------------------------------------------------------------------------

    @cached_property
    def occupations(self) -> tuple[Occupation, ...]:
        """Occupations in use: some far apart, each with its nearest relations, so that every tier occurs."""
        known = {o.code: o for o in occupations() if len(o.alternate_titles) >= self.market.titles}
        codes = sorted(known)
        seeds = max(self.market.occupations // 9, 1)
        chosen = dict.fromkeys(codes[(2 * i + 1) * len(codes) // (2 * seeds)] for i in range(seeds))
        for tier in range(3):
            for code in list(chosen):
                for near in known[code].related[tier]:
                    if near in known and len(chosen) < self.market.occupations:
                        chosen[near] = None
        return tuple(known[code] for code in chosen)

    @cached_property
    def titles(self) -> tuple[tuple[str, ...], ...]:
        """Titles in use for each occupation."""
        return tuple(
            tuple(sample(self._rng("titles", i), occupation.alternate_titles, self.market.titles))
            for i, occupation in enumerate(self.occupations)
        )

    @cached_property
    def technologies(self) -> tuple[tuple[str, ...], ...]:
        """Technologies in use for each occupation, short names first."""
        return tuple(
            tuple(sorted(occupation.technologies, key=_length)[: self.market.skills])
            for occupation in self.occupations
        )

    @cached_property
    def tiers(self) -> np.ndarray:
        """int [O, O]: `tiers[asked, offered]` is the policy's title grade."""
        index = {occupation.code: i for i, occupation in enumerate(self.occupations)}
        result = np.zeros((len(index), len(index)), np.int64)
        for i, occupation in enumerate(self.occupations):
            for tier, codes in reversed(list(enumerate(occupation.related))):
                for code in codes:
                    if code in index:
                        result[i, index[code]] = policy.TITLE_GRADES[tier + 1]
            result[i, i] = policy.TITLE_GRADES[0]
        return result

    @cached_property
    def _postings(self) -> list[_Posting]:
        return [self._make_posting(i) for i in range(self.market.postings)]

    def _make_posting(self, index: int) -> _Posting:
        rng = self._rng("posting", index)
        occupation = index % len(self.occupations)
        level = weighted(rng, (0.25, 0.25, 0.25, 0.25))
        base = 40 + 60 * self._rng("pay", occupation).random()
        return _Posting(
            occupation=occupation,
            level=level,
            city=int(rng.random() * len(self.cities)),
            workplace=weighted(rng, (1, 1, 1)),
            company=int(rng.random() * len(self.companies)),
            skills=tuple(sample(rng, self.technologies[occupation], self.market.named)),
            salary=int(base * (0.75, 1.0, 1.3, 1.6)[level] * (0.85 + 0.3 * rng.random())),
            age_days=int(30 * rng.random() ** 2),
        )

    @cached_property
    def _columns(self) -> policy.Postings:
        return policy.Postings(
            occupation=np.array([p.occupation for p in self._postings]),
            level=np.array([p.level for p in self._postings]),
            city=np.array([p.city for p in self._postings]),
            workplace=np.array([p.workplace for p in self._postings]),
            skills=tuple(frozenset(p.skills) for p in self._postings),
            company=np.array([p.company for p in self._postings]),
        )

    @cached_property
    def _hiring(self) -> list[list[int]]:
        """Companies with a posting of each occupation. One is asked for as often as another, so that a posting by itself says nothing."""
        found: list[set[int]] = [set() for _ in self.occupations]
        for posting in self._postings:
            found[posting.occupation].add(posting.company)
        return [sorted(companies) for companies in found]

    # --- documents -----------------------------------------------------------------------------------------------

    @cached_property
    def documents(self) -> list[Document]:
        """Every posting."""
        return [self.document(i) for i in range(self.size)]

    @property
    def size(self) -> int:
        """Number of postings."""
        return self.market.postings

    def document(self, index: int) -> Document:
        """One posting."""
        rng, posting = self._rng("text", index), self._postings[index]
        level, workplace = policy.LEVELS[posting.level], policy.WORKPLACES[posting.workplace]
        name = pick(rng, self.titles[posting.occupation])
        city, company = self.cities[posting.city], self.companies[posting.company]
        fewest, most = self.market.description
        fields = {
            "location": f"{city}, {workplace}",
            "title": templates.with_level(name, level),
            "skills": ", ".join(posting.skills),
            "company": company,
        }
        description = templates.description(
            fewest + int(rng.random() * (most - fewest)),
            rng.random,
            {"title": name, "company": company, "city": city, "skills": posting.skills},
        )
        if description:
            fields |= {"pay": f"{posting.salary}k", "description": description}
        return Document(
            id=f"p{index:05d}",
            fields=fields,
            attributes={"company": company, "city": city, "workplace": workplace, "seniority": level},
            numeric={
                "salary": float(posting.salary),
                "age_days": float(posting.age_days),
                "company_ctr": round(self._company_ctr[posting.company], 4),
            },
        )

    # --- searches ------------------------------------------------------------------------------------------------

    def _make_search(self, index: int) -> _Search:
        rng = self._rng("search", index)
        place = weighted(rng, (0.24, 0.33, 0.33, 0.1))
        asked = {
            name
            for name, chosen in (
                ("level", rng.random() < 0.4),
                ("city", place == 1),
                ("workplace", place == 2),
                ("skill", rng.random() < 0.25),
                ("company", place == 3),
            )
            if chosen
        }
        for _ in range(_TRIES):
            need = self._draw_need(rng, asked)
            if self._answers(need).sum() >= _ENOUGH:
                break
        target = need.occupation
        home = int(rng.random() * len(self.cities)) if need.city is None else need.city
        base = 40 + 60 * self._rng("pay", target).random()
        wanted = int(base * (0.7 + 0.6 * rng.random()) * (1.3 if need.level in (2, 3) else 1.0))
        related = np.flatnonzero(self.tiers[target] >= 2).tolist()
        held = target if rng.random() < 0.5 else pick(rng, related)
        return _Search(need, wanted, pick(rng, self.titles[held]), home, told=rng.random() < 0.15)

    def _draw_need(self, rng: random.Random, asked: Collection[str]) -> policy.Need:
        """Any need that asks for these things."""
        need = policy.Need(int(rng.random() * len(self.occupations)))
        return dataclasses.replace(
            need, **{name: self._draw(rng, name, need.occupation) for name in _ASKED if name in asked}
        )

    def _draw(self, rng: random.Random, name: str, occupation: int) -> Any:
        """What somebody who looks for this work may ask for."""
        if name == "level":
            return weighted(rng, _ASKED_LEVELS)
        if name == "city":
            return int(rng.random() * len(self.cities))
        if name == "workplace":
            return weighted(rng, (1, 1, 1))
        if name == "skill":
            return pick(rng, self.technologies[occupation]) if self.technologies[occupation] else None
        return pick(rng, self._hiring[occupation]) if self._hiring[occupation] else None

    def _variation(self, rng: random.Random, need: policy.Need) -> policy.Need:
        """A like search: mostly one thing asked for is another, otherwise everything. The way back is as likely as the way there."""
        asked = [name for name in _ASKED if getattr(need, name) is not None]
        if rng.random() < 0.4:
            return self._draw_need(rng, asked)
        place = int(rng.random() * (1 + len(asked)))
        if place < len(asked):
            return dataclasses.replace(need, **{asked[place]: self._draw(rng, asked[place], need.occupation)})
        other = self.neighbour(rng, need.occupation)
        bound = {name: self._draw(rng, name, other) for name in ("skill", "company") if name in asked}
        return dataclasses.replace(need, occupation=other, **bound)

    def neighbour(self, rng: random.Random, occupation: int) -> int:
        """Another occupation, half of the time a related one.

        Every occupation has the same number of places for related ones, empty ones included, so that the way back is as likely.
        """
        if rng.random() < 0.5:
            place = int(rng.random() * max(map(len, self._near)))
            if place < len(self._near[occupation]):
                return self._near[occupation][place]
        other = int(rng.random() * (len(self._near) - 1))
        return other + (other >= occupation)

    @cached_property
    def _near(self) -> list[list[int]]:
        """Occupations that are related either way."""
        related = (self.tiers > 0) | (self.tiers.T > 0)
        np.fill_diagonal(related, False)
        return [np.flatnonzero(row).tolist() for row in related]

    def _answers(self, need: policy.Need) -> np.ndarray:
        """bool [M], the postings above grade 2."""
        return policy.grades(policy.components(need, self._columns, self.tiers)) > 2

    def query(self, index: int) -> Query:
        """One search."""
        rng, search = self._rng("query", index), self._search(index)
        need = search.need
        write = templates.need_text if search.told else templates.search_text
        text = write(
            pick(rng, self.titles[need.occupation]),
            level=None if need.level is None else policy.LEVELS[need.level],
            city=None if need.city is None else self.cities[need.city],
            workplace=None if need.workplace is None else policy.WORKPLACES[need.workplace],
            skill=need.skill,
            company=None if need.company is None else self.companies[need.company],
            draw=rng.random,
        )
        return Query(
            id=query_id(index),
            text=text,
            bucket=search.bucket,
            searcher={
                "headline": search.headline,
                "location": self.cities[search.home],
                "wanted_salary": str(search.wanted_salary),
            },
        )

    # --- grades --------------------------------------------------------------------------------------------------

    def grade_row(self, index: int) -> np.ndarray:
        """int [M]: the policy grade of every posting for search `index`."""
        return policy.grades(policy.components(self._search(index).need, self._columns, self.tiers))

    def judged(self, index: int) -> list[Judgment]:
        """The graded pairs of one search."""
        need = self._search(index).need
        parts = policy.components(need, self._columns, self.tiers)
        row = policy.grades(parts)
        every = self._split(index) in ("dev", "test")
        return [
            Judgment(
                query_id(index),
                f"p{m:05d}",
                int(row[m]),
                policy.rationale(need, {name: int(part[m]) for name, part in parts.items()}),
            )
            for m in (np.flatnonzero(row).tolist() if every else self._sampled(index, row))
        ]

    def _sampled(self, index: int, row: np.ndarray) -> list[int]:
        """Postings worth a grade (see `draws.exchange`)."""
        rng, need = self._rng("judged", index), self._search(index).need
        return exchange(
            rng,
            row > 2,
            lambda: self._answers(self._variation(rng, need)),
            good=self.market.good,
            enough=_ENOUGH,
            tries=_TRIES,
        )

    def unseen(self, count: int) -> tuple[list[Document], dict[str, dict[int, int]]]:
        """So many more postings of this market, which no data set holds, and their grades above 0 by test search and place."""
        held, more = self.market.postings, JobMarket(self.variant)
        more.market = dataclasses.replace(self.market, postings=held + count)
        graded = {}
        for query in self.queries["test"]:
            need = self._search(query_number(query.id)).need
            row = policy.grades(policy.components(need, more._columns, more.tiers))[held:]
            graded[query.id] = {int(place): int(row[place]) for place in np.flatnonzero(row)}
        return more.documents[held:], graded

    # --- impressions ---------------------------------------------------------------------------------------------

    def page(self, index: int) -> list[Impression]:
        """A page as an older ranker would have filled it: on the right track, noisy, fond of popular companies."""
        rng = self._rng("page", index)
        row, search = self.grade_row(index), self._search(index)
        title = self.tiers[search.need.occupation, self._columns.occupation]
        pool = sample(rng, np.flatnonzero(title > 0).tolist(), 40)
        pool += [m for m in sample(rng, range(len(row)), 20) if title[m] == 0]

        def logged(m: int) -> float:
            return 0.35 * row[m] + 0.3 * self._popularity[self._postings[m].company] + 0.8 * normal(rng)

        page = [m for _, m in sorted(((logged(m), m) for m in pool), reverse=True)[:PAGE]]
        stamp = moment(rng)
        return [
            Impression(
                query_id(index),
                f"p{m:05d}",
                position,
                self._actions(rng, search, m, int(row[m]), position),
                stamp,
            )
            for position, m in enumerate(page, start=1)
        ]

    def _actions(
        self, rng: random.Random, search: _Search, m: int, grade: int, position: int
    ) -> dict[str, bool | None]:
        """Position-biased click model: looked at, then liked (grade and what grades do not know), then acted on."""
        posting = self._postings[m]
        liked = self._popularity[posting.company]
        pays = posting.salary >= search.wanted_salary
        fresh = math.exp(-posting.age_days / 7)
        looked = rng.random() < position**-0.4
        click = looked and rng.random() < sigmoid(-2.9 + 0.7 * grade + 1.1 * liked + 0.9 * pays + 0.9 * fresh)
        apply = click and rng.random() < sigmoid(-2.6 + 0.5 * grade + 1.4 * pays + 0.4 * liked)
        shortlist = click and rng.random() < sigmoid(-2.6 + 0.4 * grade + 0.6 * liked)
        dismiss = looked and not click and rng.random() < sigmoid(-1.2 - 0.8 * grade - 0.4 * liked)
        bad_fit = (rng.random() < sigmoid(0.2 - 0.9 * grade - 0.8 * pays)) if click else None
        return {
            "click": click,
            "apply": apply,
            "dismiss": dismiss,
            "bad_fit": bad_fit,
            "shortlist": shortlist,
        }
