"""People search in the same generated world: members, searches for them, policy grades and impressions.

Occupations, titles, technologies, cities and companies are those of `generator.JobMarket`. Everything follows from (both versions, variant,
seed). No name belongs to anybody: see `people_templates`.

A member or a search by itself must say nothing about a grade: graded pairs are drawn by `draws.exchange`, where a variation of a search
asks for another city, company, skill, occupation or name.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from jaxsearch.data.job_market import people_templates as templates
from jaxsearch.data.job_market import policy_people as policy
from jaxsearch.data.job_market.draws import (
    exchange,
    moment,
    normal,
    pick,
    sample,
    sigmoid,
    weighted,
)
from jaxsearch.data.job_market.generator import PAGE, JobMarket
from jaxsearch.data.job_market.searches import Searches, query_id
from jaxsearch.data.network import CONNECTIONS
from jaxsearch.data.records import BUCKETS, Document, Impression, Judgment, Query

VERSION = "v1"
_BUCKET_ODDS = {
    "title": 0.2,
    "title_company": 0.16,
    "title_skill": 0.16,
    "title_location": 0.2,
    "name": 0.12,
    "need": 0.16,
}
_ASKED_BESIDE = (("company",), ("skill",), ("city",), ("skill", "city"), ("company", "skill"))
"""What a need told in a sentence asks for beside the work."""
_DRAWS = 10_000
"""Attempts to find a search that enough members answer."""
_TRIES = 64
"""Variations of a search that its pairs are drawn from, at most."""


@dataclass(frozen=True)
class Network:
    """The size of one variant."""

    members: int
    searches: int
    first_names: int
    surnames: int
    employers: int
    """Companies that employ an occupation."""
    schools: int
    named: int
    """Skills that a profile names."""
    enough: int
    """Good answers that each search has at least."""
    known: int = 16
    """Connections of a searcher, and of a member on average."""
    good: int = 5
    """Good answers graded per training search, at most; twice as many bad ones."""
    precedents: int = 400
    """As in `generator.Market`."""
    seed: int = 0


VARIANTS = {
    "tiny": Network(1_200, 5_600, 12, 20, employers=8, schools=24, named=2, enough=5),
    "default": Network(4_000, 8_000, 25, 32, employers=3, schools=32, named=4, enough=2),
}


@dataclass(frozen=True)
class _Member:
    occupation: int
    company: int
    years: int
    earlier_occupation: int
    earlier_company: int
    earlier_years: int
    city: int
    first: int
    surname: int
    school: int
    skills: tuple[str, ...]
    active_days: int
    """Days since the member was last seen."""
    liked: float
    """Standard normal: what searchers like about a member that no grade knows."""
    connect_rate: float
    """Share of earlier views that ended in a request to connect: what can be observed of `liked`."""


@dataclass(frozen=True)
class _Search:
    need: policy.Need
    bucket: str
    occupation: int
    """The searcher's own, like all below."""
    company: int
    home: int
    known: tuple[int, ...]
    """Connections, rows of members."""


class PeopleMarket(Searches[_Search]):
    """One generated network of members. Tables are made on first use and kept.

    Args:
      variant: of `VARIANTS`; the world is `JobMarket`'s of the same name.

    Raises:
      ValueError: no such variant.
    """

    def __init__(self, variant: str):
        if variant not in VARIANTS:
            raise ValueError(f"people variant is {variant!r}: use one of {', '.join(VARIANTS)}")
        self.variant = variant
        self.network = VARIANTS[variant]
        super().__init__(self.network.searches, self.network.precedents)
        self.world = JobMarket(variant)
        rng = self._rng("names", 0)
        self.first_names = templates.first_names(self.network.first_names, rng.random)
        self.surnames = templates.surnames(self.network.surnames, rng.random)
        self.schools = templates.schools(self.network.schools, rng.random)
        self._good: dict[policy.Need, np.ndarray] = {}

    def _rng(self, kind: str, index: int) -> random.Random:
        return random.Random(f"people {VERSION}/{self.variant}/{self.network.seed}/{kind}/{index}")

    # --- members -------------------------------------------------------------------------------------------------

    @cached_property
    def employers(self) -> list[list[int]]:
        """Companies that employ each occupation."""
        companies = range(len(self.world.companies))
        return [
            sample(self._rng("employers", i), companies, self.network.employers)
            for i in range(len(self.world.occupations))
        ]

    @cached_property
    def _members(self) -> list[_Member]:
        count = self.network.members
        work, named = (sample(self._rng(kind, 0), range(count), count) for kind in ("work", "named"))
        return [self._make_member(i, work[i], named[i]) for i in range(count)]

    def _make_member(self, index: int, work: int, named: int) -> _Member:
        """Occupations and names are dealt out evenly by `work` and `named`, two shuffled numbers."""
        rng, network = self._rng("member", index), self.network
        occupation = work % len(self.world.occupations)
        name = named % (network.first_names * network.surnames)
        before = policy.NOBODY
        if rng.random() < 0.6:
            before = occupation if rng.random() < 0.5 else self.world.neighbour(rng, occupation)
        company = pick(rng, self.employers[occupation])
        known = before != policy.NOBODY
        liked, shown = normal(rng), 60 + int(rng.random() * 240)
        asked = sum(rng.random() < sigmoid(-1.4 + 0.8 * liked) for _ in range(shown))
        return _Member(
            occupation=occupation,
            company=company,
            years=1 + int(10 * rng.random() ** 2),
            earlier_occupation=before,
            earlier_company=pick(rng, self.employers[before]) if known else policy.NOBODY,
            earlier_years=1 + int(8 * rng.random() ** 2),
            city=int(rng.random() * len(self.world.cities)),
            first=name % network.first_names,
            surname=name // network.first_names,
            school=int(rng.random() * network.schools),
            skills=tuple(sample(rng, self.world.technologies[occupation], network.named)),
            active_days=int(30 * rng.random() ** 2),
            liked=liked,
            connect_rate=(asked + 4) / (shown + 20),
        )

    @cached_property
    def _columns(self) -> policy.Members:
        members = self._members
        numbers = (
            "occupation",
            "earlier_occupation",
            "company",
            "earlier_company",
            "city",
            "first",
            "surname",
        )
        return policy.Members(
            **{name: np.array([getattr(member, name) for member in members]) for name in numbers},
            skills=tuple(frozenset(member.skills) for member in members),
        )

    def _acquaintances(self, rng: random.Random, count: int, occupation: int, company: int) -> list[int]:
        """Members known from the company, from the occupation and from anywhere, in equal parts."""
        columns = self._columns
        circles = (
            np.flatnonzero(columns.company == company).tolist(),
            np.flatnonzero(columns.occupation == occupation).tolist(),
            range(self.network.members),
        )
        return [pick(rng, circles[i % 3] or circles[2]) for i in range(count)]

    @cached_property
    def _connections(self) -> list[set[int]]:
        """Rows of the members that each member is connected with; mutual."""
        result: list[set[int]] = [set() for _ in self._members]
        for i, member in enumerate(self._members):
            rng = self._rng("connections", i)
            for other in self._acquaintances(rng, self.network.known // 2, member.occupation, member.company):
                if other != i:
                    result[i].add(other)
                    result[other].add(i)
        return result

    @cached_property
    def documents(self) -> list[Document]:
        """Every member's profile."""
        return [self.document(i) for i in range(self.size)]

    @property
    def size(self) -> int:
        """Number of members."""
        return self.network.members

    def document(self, index: int) -> Document:
        """One member's profile.

        The place stands first and the name last: what a language model knows by heart from an earlier field, it does not learn to copy from
        the search.
        """
        rng, world, member = self._rng("text", index), self.world, self._members[index]
        titles, companies = world.titles, world.companies
        held = [(member.occupation, member.company, member.years)]
        if member.earlier_occupation != policy.NOBODY:
            held.append((member.earlier_occupation, member.earlier_company, member.earlier_years))
        positions = [templates.position(pick(rng, titles[o]), companies[c], years) for o, c, years in held]
        city, company, school = (
            world.cities[member.city],
            companies[member.company],
            self.schools[member.school],
        )
        return Document(
            id=_member_id(index),
            vertical="people",
            fields={
                "location": city,
                "headline": pick(rng, titles[member.occupation]),
                "positions": ", earlier ".join(positions),
                "skills": ", ".join(member.skills),
                "education": school,
                "name": f"{self.first_names[member.first]} {self.surnames[member.surname]}",
            },
            attributes={
                "city": city,
                "company": company,
                "school": school,
                CONNECTIONS: _ids(self._connections[index]),
            },
            numeric={
                "connect_rate": round(member.connect_rate, 4),
                "active_days": float(member.active_days),
                "experience_years": float(sum(years for _, _, years in held)),
            },
        )

    # --- searches ------------------------------------------------------------------------------------------------

    def _make_search(self, index: int) -> _Search:
        rng = self._rng("search", index)
        bucket = BUCKETS[weighted(rng, [_BUCKET_ODDS[name] for name in BUCKETS])]
        need = self._need(rng, bucket)
        own = int(rng.random() * len(self.world.occupations))
        if need.occupation is not None and rng.random() < 0.5:
            own = need.occupation
        home = int(rng.random() * len(self.world.cities))
        if need.city is not None and rng.random() < 0.5:
            home = need.city
        company = pick(rng, self.employers[own])
        known = dict.fromkeys(self._acquaintances(rng, self.network.known, own, company))
        return _Search(need, bucket, own, company, home, tuple(known))

    def _need(self, rng: random.Random, bucket: str) -> policy.Need:
        """A need of this kind, drawn again until enough members answer it."""
        for _ in range(_DRAWS):
            need = self._draw_need(rng, bucket)
            if self._answers(need).sum() >= self.network.enough:
                return need
        raise ValueError(
            f"no search of bucket {bucket!r} is answered by {self.network.enough} of {self.network.members} members: lower `enough`"
        )

    def _draw_need(self, rng: random.Random, bucket: str) -> policy.Need:
        network, world = self.network, self.world
        if bucket == "name":
            return policy.Need(
                name=(int(rng.random() * network.first_names), int(rng.random() * network.surnames))
            )
        occupation = int(rng.random() * len(world.occupations))
        beside = {"title": (), "title_company": ("company",), "title_skill": ("skill",)}.get(
            bucket, ("city",)
        )
        if bucket == "need":
            beside = pick(rng, _ASKED_BESIDE)
        skills = world.technologies[occupation] or ("",)
        return policy.Need(
            occupation=occupation,
            company=pick(rng, self.employers[occupation]) if "company" in beside else None,
            skill=pick(rng, skills) if "skill" in beside else None,
            city=int(rng.random() * len(world.cities)) if "city" in beside else None,
        )

    def _variation(self, rng: random.Random, need: policy.Need, bucket: str) -> policy.Need:
        """A like search: mostly one thing asked for is another, otherwise everything."""
        if rng.random() < 0.4:
            return self._draw_need(rng, bucket)
        if need.name is not None:
            other = self._draw_need(rng, bucket).name
            assert other is not None
            return replace(need, name=(need.name[0], other[1]) if rng.random() < 0.5 else (other[0], need.name[1]))  # fmt: skip
        assert need.occupation is not None
        asked = [name for name in ("company", "skill", "city") if getattr(need, name) is not None]
        place = int(rng.random() * (1 + len(asked)))
        if place == len(asked):
            return replace(need, occupation=self.world.neighbour(rng, need.occupation))
        if asked[place] == "company":
            return replace(need, company=pick(rng, self.employers[need.occupation]))
        if asked[place] == "skill":
            return replace(need, skill=pick(rng, self.world.technologies[need.occupation]))
        return replace(need, city=int(rng.random() * len(self.world.cities)))

    def query(self, index: int) -> Query:
        """One search."""
        rng, search, world = self._rng("query", index), self._search(index), self.world
        need = search.need
        if need.name is not None:
            text = templates.name_text(
                self.first_names[need.name[0]], self.surnames[need.name[1]], rng.random
            )
        else:
            assert need.occupation is not None
            write = templates.need_text if search.bucket == "need" else templates.search_text
            text = write(
                pick(rng, world.titles[need.occupation]),
                company=None if need.company is None else world.companies[need.company],
                skill=need.skill,
                city=None if need.city is None else world.cities[need.city],
                draw=rng.random,
            )
        return Query(
            id=query_id(index),
            text=text,
            vertical="people",
            bucket=search.bucket,
            searcher={
                "headline": pick(rng, world.titles[search.occupation]),
                "location": world.cities[search.home],
                "company": world.companies[search.company],
                CONNECTIONS: _ids(search.known),
            },
        )

    # --- grades --------------------------------------------------------------------------------------------------

    def _parts(self, need: policy.Need) -> dict[str, np.ndarray]:
        return policy.components(need, self._columns, self.world.tiers)

    def _answers(self, need: policy.Need) -> np.ndarray:
        """bool [M], the members graded above 2."""
        if need not in self._good:
            self._good[need] = policy.grades(self._parts(need)) > 2
        return self._good[need]

    def grade_row(self, index: int) -> np.ndarray:
        """int [M]: the policy grade of every member for search `index`."""
        return policy.grades(self._parts(self._search(index).need))

    def judged(self, index: int) -> list[Judgment]:
        """The graded pairs of one search."""
        need = self._search(index).need
        parts = self._parts(need)
        row = policy.grades(parts)
        every = self._split(index) in ("dev", "test")
        return [
            Judgment(
                query_id(index),
                _member_id(m),
                int(row[m]),
                policy.rationale(need, {name: int(part[m]) for name, part in parts.items()}),
            )
            for m in (np.flatnonzero(row).tolist() if every else self._sampled(index))
        ]

    def _sampled(self, index: int) -> list[int]:
        """Members worth a grade (see `draws.exchange`)."""
        rng, search = self._rng("judged", index), self._search(index)
        return exchange(
            rng,
            self._answers(search.need),
            lambda: self._answers(self._variation(rng, search.need, search.bucket)),
            good=self.network.good,
            enough=self.network.enough,
            tries=_TRIES,
        )

    # --- impressions ---------------------------------------------------------------------------------------------

    def _distance(self, search: _Search, m: int) -> int:
        """1, 2 or 3, as `network.distance` finds it in the records."""
        if m in search.known:
            return 1
        return 3 if self._connections[m].isdisjoint(search.known) else 2

    def page(self, index: int) -> list[Impression]:
        """A page as an older ranker would have filled it: on the right track, noisy, fond of near and popular members."""
        rng = self._rng("page", index)
        row, search = self.grade_row(index), self._search(index)
        right, some = np.flatnonzero(row > 2).tolist(), np.flatnonzero((row > 0) & (row <= 2)).tolist()
        pool = sample(rng, right, 16) + sample(rng, some, 24)
        pool += [m for m in search.known if row[m] > 0 and m not in pool]
        pool += [m for m in sample(rng, range(len(row)), 20) if row[m] == 0]

        def logged(m: int) -> float:
            near = (0.6, 0.4, 0.0)[self._distance(search, m) - 1]
            return 0.35 * row[m] + 0.3 * self._members[m].liked + near + 0.8 * normal(rng)

        page = [m for _, m in sorted(((logged(m), m) for m in pool), reverse=True)[:PAGE]]
        stamp = moment(rng)
        return [
            Impression(
                query_id(index),
                _member_id(m),
                position,
                self._actions(rng, search, m, int(row[m]), position),
                stamp,
                vertical="people",
            )
            for position, m in enumerate(page, start=1)
        ]

    def _actions(
        self, rng: random.Random, search: _Search, m: int, grade: int, position: int
    ) -> dict[str, bool | None]:
        """Position-biased click model: looked at, then read (grade, network, popularity), then acted on.

        Whom one is connected with one cannot connect with nor follow again; strangers one cannot message.
        """
        member, degree = self._members[m], self._distance(search, m)
        liked, recent = member.liked, math.exp(-member.active_days / 7)
        looked = rng.random() < position**-0.4
        read = looked and rng.random() < sigmoid(
            -2.7 + 0.7 * grade + 0.9 * liked + (0.9, 0.5, 0.0)[degree - 1] + 0.4 * recent
        )
        connect = read and rng.random() < sigmoid(-2.2 + 0.4 * grade + 0.5 * liked + 1.1 * (degree == 2))
        follow = read and rng.random() < sigmoid(-5.4 + 0.2 * grade + 1.2 * liked)
        message = read and rng.random() < sigmoid(-6.0 + 0.5 * grade + 1.4 * recent + 0.7 * (degree == 1))
        return {
            "long_dwell": read,
            "connect": None if degree == 1 else connect,
            "follow": None if degree == 1 else follow,
            "message": None if degree == 3 else message,
        }


def _member_id(row: int) -> str:
    return f"m{row:05d}"


def _ids(rows: Sequence[int] | set[int]) -> str:
    return " ".join(map(_member_id, sorted(rows)))
