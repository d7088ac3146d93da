"""People search: the policy in words and in code, honest pairs, the network, rare actions, and the way through TFDS."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from probes import alone, digest, worked_examples

from jaxsearch.data import job_market, network
from jaxsearch.data.job_market import generator, job_market_dataset_builder, people
from jaxsearch.data.job_market import people_templates as templates
from jaxsearch.data.job_market import policy_people as policy
from jaxsearch.data.job_market.generator import PAGE
from jaxsearch.data.job_market.people import VARIANTS, VERSION, PeopleMarket
from jaxsearch.data.job_market.searches import SPLITS
from jaxsearch.data.records import (
    ACTIONS,
    BUCKETS,
    Document,
    Impression,
    Judgment,
    Query,
    unique_ids,
)
from jaxsearch.data.tokenizer import train

PINNED = {
    "documents": "28c81da49e8ea1153d10b4590913d73a5c3b7cdddf77fb7f77ba1883c339cbd2",
    "queries": "01815009b08ee12a73dbac9c49adcfe750670e80b180ccdf0b425730a1f36ac0",
    "judgments": "35f9169d2bf5f9f2a1130ac1632ddc50e57a7792364c786b25b6a41df2838e02",
    "impressions": "35b41fe669249ce69cf88cf0b9ae56d6016023022a0481b85005fb8fbcbf46e0",
}
"""SHA-256 of the tables of `tiny` (judgments and impressions: the first 100 searches of each split). Where these change, so must
`people.VERSION`: models and figures made on one version say nothing of another. The world is that of `generator.VERSION`."""
SAMPLE = 100
PRECEDENTS = ("calibration", "golden")


@dataclass(frozen=True)
class Tiny:
    """The whole tiny network: all training searches are graded, the others in part; pages of train and dev."""

    market: PeopleMarket
    queries: dict[str, list[Query]]
    judgments: dict[str, dict[str, list[Judgment]]]
    impressions: dict[str, dict[str, list[Impression]]]


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    market = PeopleMarket("tiny")
    queries = dict(market.queries)
    for split in ("dev", "test"):
        market.queries[split] = queries[split][:SAMPLE]
    judgments = {split: market.judgments(split) for split in SPLITS}
    return Tiny(market, queries, judgments, {split: market.impressions(split) for split in ("train", "dev")})


def test_tiny_is_the_one_that_was_frozen(tiny: Tiny) -> None:
    def first(table: dict[str, dict[str, list]]) -> dict[str, list]:
        return {split: list(rows.values())[:SAMPLE] for split, rows in table.items()}

    tables = {
        "documents": tiny.market.documents,
        "queries": tiny.queries,
        "judgments": first(tiny.judgments),
        "impressions": first(tiny.impressions),
    }
    found = {name: digest(rows) for name, rows in tables.items()}
    assert found == PINNED, "the generator makes other data: give it a new VERSION and pin these"


def test_any_order_of_use_gives_the_same_network(tiny: Tiny) -> None:
    other = PeopleMarket("tiny")
    other.queries["train"] = other.queries["train"][:3]
    pages, judged = other.impressions("train"), other.judgments("train")
    assert len(pages) == len(judged) == 3
    assert pages == {key: page for key, page in tiny.impressions["train"].items() if key in pages}
    assert judged == {key: rows for key, rows in tiny.judgments["train"].items() if key in judged}
    assert other.documents[17] == tiny.market.documents[17]


def test_variants_and_seeds_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(VARIANTS["tiny"], members=240, searches=5, precedents=0)
    monkeypatch.setitem(VARIANTS, "tiny", small)
    first = PeopleMarket("tiny")
    monkeypatch.setitem(VARIANTS, "tiny", dataclasses.replace(small, seed=1))
    assert PeopleMarket("tiny").documents != first.documents
    with pytest.raises(ValueError, match="variant is 'long': use one of tiny, default"):
        PeopleMarket("long")


# --- the policy ----------------------------------------------------------------------------------------------------

POLICY = resources.files("jaxsearch.data.job_market").joinpath("policy_people.md").read_text("utf-8")
WORK = ("nurse practitioner", "web developer", "accountant", "pastry chef")
COMPANIES, CITIES, SKILLS = ("Alder Works", "Delta Labs"), ("Austin", "Boston", "Miami"), ("SAP", "Excel")
FIRST, SURNAME = ("Nolta", "Brelia"), ("Threskel", "Ulvambi")
TIERS = 4 * np.eye(4, dtype=np.int64)


def find(options: tuple[str, ...], text: str) -> int | None:
    return next((i for i, option in enumerate(options) if option.lower() in text.lower()), None)


def parse_search(text: str) -> policy.Need:
    first, surname, skill = find(FIRST, text), find(SURNAME, text), find(SKILLS, text)
    if first is not None and surname is not None:
        return policy.Need(name=(first, surname))
    return policy.Need(
        find(WORK, text), find(COMPANIES, text), None if skill is None else SKILLS[skill], find(CITIES, text)
    )


def parse_profile(text: str) -> policy.Members:
    now, _, earlier = text.partition(", earlier ")
    numbers = {
        "occupation": find(WORK, now),
        "earlier_occupation": find(WORK, earlier),
        "company": find(COMPANIES, now),
        "earlier_company": find(COMPANIES, earlier),
        "city": find(CITIES, text),
        "first": find(FIRST, text),
        "surname": find(SURNAME, text),
    }
    known = frozenset(text.partition("skills: ")[2].split(", "))
    columns = {name: np.array([policy.NOBODY if x is None else x]) for name, x in numbers.items()}
    return policy.Members(**columns, skills=(known,))


@pytest.mark.parametrize(("search", "profile", "grade", "why"), worked_examples(POLICY))
def test_worked_examples_of_the_written_policy(search: str, profile: str, grade: int, why: str) -> None:
    need = parse_search(search)
    parts = policy.components(need, parse_profile(profile), TIERS)
    assert policy.grades(parts).tolist() == [grade]
    assert policy.rationale(need, {name: int(part[0]) for name, part in parts.items()}) == why


def test_there_are_worked_examples() -> None:
    assert len(worked_examples(POLICY)) == 11
    assert {grade for _, _, grade, _ in worked_examples(POLICY)} == {0, 1, 2, 3, 4}
    assert "version 1" in POLICY


def members(**columns: list[int]) -> policy.Members:
    rows = len(next(iter(columns.values())))
    values = {
        name: np.zeros(rows, np.int64) for name in ("occupation", "company", "city", "first", "surname")
    }
    values |= {f"earlier_{name}": np.full(rows, policy.NOBODY) for name in ("occupation", "company")}
    values |= {name: np.array(column) for name, column in columns.items()}
    return policy.Members(**values, skills=(frozenset({"SAP"}),) * rows)


def test_policy_by_hand() -> None:
    tiers = np.array([[4, 3, 2, 1, 0]] * 5)
    work = members(occupation=[0, 1, 2, 3, 4])

    def grades(who: policy.Members, **asked: object) -> list[int]:
        need = policy.Need(**({"occupation": 0} | asked))  # type: ignore[arg-type]
        return policy.grades(policy.components(need, who, tiers)).tolist()

    assert grades(work) == [4, 3, 2, 1, 0]
    assert grades(work, skill="SAP") == [4, 3, 2, 1, 0]
    assert grades(work, skill="Excel") == [2, 1, 0, 0, 0]
    assert grades(work, city=1) == [2, 2, 2, 1, 0]
    assert grades(work, company=1) == [1, 1, 1, 1, 0]
    assert grades(work, company=1, city=1) == [1, 1, 1, 1, 0]
    assert grades(members(company=[0, 1, 1], earlier_company=[1, 0, 1]), company=1) == [3, 4, 4]
    # Earlier work counts one less, and never against the present.
    past = members(occupation=[4, 4, 2, 0, 4], earlier_occupation=[0, 1, 0, 4, 3])
    assert grades(past) == [3, 2, 3, 4, 0]
    assert grades(past, skill="Excel") == [1, 0, 1, 2, 0]
    named = members(first=[1, 0, 1, 0], surname=[2, 2, 0, 0])
    assert grades(named, occupation=None, name=(1, 2)) == [4, 2, 1, 0]
    need = policy.Need(0, city=1)
    parts = policy.components(need, past, tiers)
    said = [policy.rationale(need, {k: int(v[i]) for k, v in parts.items()}) for i in range(5)]
    assert said[0] == "The work asked for in the past, elsewhere."
    assert said[1] == "Closely related work in the past, elsewhere."
    assert said[4] == "Unrelated work, elsewhere."


# --- members and searches ------------------------------------------------------------------------------------------


def test_records_are_valid_and_ids_unique(tiny: Tiny) -> None:
    every = [query for split in SPLITS for query in tiny.queries[split]]
    documents = tiny.market.documents
    assert (len(documents), len(every)) == (1_200, 6_000)
    for record in (*documents, *every):
        record.validate()
        assert record.vertical == "people"
    unique_ids(documents)
    unique_ids(every)
    assert {split: len(tiny.queries[split]) for split in PRECEDENTS} == {"calibration": 160, "golden": 240}
    shares = [len(tiny.queries["dev"]) / 5_600, len(tiny.queries["test"]) / 5_600]
    np.testing.assert_allclose(shares, [0.06, 0.14], atol=0.015)


def test_profiles_are_short_and_in_reading_order(tiny: Tiny) -> None:
    order = ["location", "headline", "positions", "skills", "education", "name"]
    assert all(list(document.fields) == order for document in tiny.market.documents)
    texts = ["; ".join(document.fields.values()) for document in tiny.market.documents]
    assert max(map(len, train(texts, 2048).encode(texts))) <= 96


def test_names_are_dealt_out_evenly(tiny: Tiny) -> None:
    names = Counter(document.fields["name"] for document in tiny.market.documents)
    assert len(names) == 12 * 20
    assert set(names.values()) == {5}
    work = Counter(member.occupation for member in tiny.market._members)
    assert max(work.values()) - min(work.values()) <= 1


def test_every_bucket_occurs_in_every_split(tiny: Tiny) -> None:
    for split in SPLITS:
        share = Counter(query.bucket for query in tiny.queries[split])
        assert set(share) == set(BUCKETS)
        assert min(share.values()) > 0.05 * len(tiny.queries[split])


def test_searches_say_what_they_need(tiny: Tiny) -> None:
    market, world = tiny.market, tiny.market.world
    for query in tiny.queries["golden"]:
        search = market._search(int(query.id[1:]))
        need, text = search.need, query.text.lower()
        assert set(query.searcher) == {"headline", "location", "company", "connections"}
        if query.bucket == "name":
            assert need.name is not None
            first, surname = market.first_names[need.name[0]], market.surnames[need.name[1]]
            assert sorted(text.split()) == sorted([first.lower(), surname.lower()])
            continue
        assert any(title.lower() in text for title in world.titles[need.occupation])
        for value, names in ((need.company, world.companies), (need.city, world.cities)):
            assert value is None or names[value].lower() in text
        assert need.skill is None or need.skill.lower() in text
        beside = [need.company is not None, need.skill is not None, need.city is not None]
        order = {"title_company": [1, 0, 0], "title_skill": [0, 1, 0], "title_location": [0, 0, 1]}
        if query.bucket == "need":
            assert sum(beside) >= 1
            assert text[-1] in ".?"
        else:
            assert beside == order.get(query.bucket, [0, 0, 0])


def test_templates() -> None:
    asked = {"company": "Alder Works", "skill": "SAP", "city": "Austin"}
    written = templates.search_text("Web Developer", **asked, draw=lambda: 0.9)
    assert written == "Web Developer Alder Works SAP Austin"
    nothing = dict.fromkeys(asked)
    assert (
        templates.search_text("Nurse", **nothing | {"city": "Austin"}, draw=lambda: 0.1) == "nurse in austin"
    )
    assert templates.need_text("Nurse", **asked, draw=lambda: 0.1) == (
        "Who works as Nurse, has been at Alder Works, knows SAP and lives in Austin?"
    )
    assert templates.need_text("Nurse", **nothing | {"skill": "SAP"}, draw=lambda: 0.9) == (
        "We need advice from a colleague who works as Nurse and knows SAP."
    )
    assert templates.name_text("Nolta", "Ulvel", lambda: 0.9) == "Ulvel Nolta"
    assert templates.position("Nurse", "Delta Labs", 1) == "Nurse at Delta Labs, 1 year"
    with pytest.raises(ValueError, match="surnames is 73: at most 72"):
        templates.surnames(73, lambda: 0.0)


# --- honest pairs --------------------------------------------------------------------------------------------------


def test_judgments_follow_the_policy(tiny: Tiny) -> None:
    for split in ("train", "dev", *PRECEDENTS):
        for query, judged in list(tiny.judgments[split].items())[:40]:
            row = tiny.market.grade_row(int(query[1:]))
            rows = [int(judgment.document_id[1:]) for judgment in judged]
            assert [judgment.grade for judgment in judged] == row[rows].tolist()
            assert len(set(rows)) == len(rows)
            if split == "dev":
                assert rows == np.flatnonzero(row).tolist()  # complete above 0
            for judgment in judged:
                judgment.validate()
                assert judgment.rationale.endswith(".")


def test_every_search_has_five_good_answers_and_ten_bad_ones_in_no_order(tiny: Tiny) -> None:
    pairs = [rows for split in ("train", *PRECEDENTS) for rows in tiny.judgments[split].values()]
    good = np.array([[judgment.grade > 2 for judgment in rows] for rows in pairs])
    assert good.shape[1] == 15
    assert (good.sum(axis=1) == 5).all()
    np.testing.assert_allclose(good.mean(axis=0), 1 / 3, atol=0.03)  # no place in the list tells
    grades = Counter(judgment.grade for rows in pairs for judgment in rows)
    assert set(grades) == {0, 1, 2, 3, 4}
    assert min(grades.values()) > 0.08 * sum(grades.values())


def test_a_document_or_a_query_alone_predicts_nothing(tiny: Tiny) -> None:
    for found in alone(tiny.market.documents, tiny.queries["train"], tiny.judgments["train"]).values():
        assert abs(found - 0.5) < 0.02  # about four standard errors


# --- the network and the actions -----------------------------------------------------------------------------------


def test_distance_by_hand() -> None:
    searcher = Query("q", "nurse", "people", searcher={"connections": "m1 m2"})

    def member(name: str, known: str) -> Document:
        return Document(name, {"name": "x"}, "people", attributes={"connections": known})

    assert network.distance(searcher, member("m1", "m9")) == 1
    assert network.distance(searcher, member("m7", "m8 m2 m1")) == 2
    assert network.distance(searcher, member("m7", "m11 m8")) == 3  # m1 is not part of m11
    assert network.distance(searcher, member("m7", "")) == 3
    assert network.mutual(searcher, member("m7", "m8 m2 m1")) == 2
    assert network.mutual(searcher, member("m7", "")) == 0
    stranger = Query("q", "nurse", "people")
    assert network.distance(stranger, member("m7", "m1")) is None
    assert network.distance(searcher, Document("m7", {"name": "x"}, "people")) is None


def test_connections_are_mutual(tiny: Tiny) -> None:
    known = tiny.market._connections
    assert all(i in known[j] and i != j for i, others in enumerate(known) for j in others)
    assert 10 < np.mean([len(others) for others in known]) < 20


@dataclass(frozen=True)
class Shown:
    """One impression with everything that its actions may depend on."""

    item: Impression
    grade: int
    distance: int
    liked: float
    active_days: float


@pytest.fixture(scope="module")
def shown(tiny: Tiny) -> list[Shown]:
    market, rows = tiny.market, []
    for query in tiny.queries["train"]:
        grades = market.grade_row(int(query.id[1:]))
        search = market._search(int(query.id[1:]))
        for item in tiny.impressions["train"][query.id]:
            m = int(item.document_id[1:])
            member = market._members[m]
            distance = market._distance(search, m)
            rows.append(Shown(item, int(grades[m]), distance, member.liked, member.active_days))
    return rows


def rate(rows: list[Shown], action: str) -> float:
    values = [row.item.actions[action] for row in rows if row.item.actions[action] is not None]
    assert len(values) > 500
    return float(np.mean([bool(value) for value in values]))


def test_distance_is_the_one_in_the_records(tiny: Tiny, shown: list[Shown]) -> None:
    queries = {query.id: query for query in tiny.queries["train"]}
    for row in shown[:3000]:
        document = tiny.market.documents[int(row.item.document_id[1:])]
        assert network.distance(queries[row.item.query_id], document) == row.distance
    share = Counter(row.distance for row in shown)
    assert min(share[degree] for degree in (1, 2, 3)) > 0.1 * len(shown)


def test_pages_are_pages(tiny: Tiny) -> None:
    for query, page in tiny.impressions["dev"].items():
        assert [item.position for item in page] == list(range(1, PAGE + 1))
        assert len({item.document_id for item in page}) == PAGE
        assert {item.query_id for item in page} == {query}
        for item in page:
            item.validate()


def test_what_is_not_possible_is_not_eligible(shown: list[Shown]) -> None:
    for row in shown:
        actions = row.item.actions
        assert tuple(actions) == ACTIONS["people"]
        assert [actions["connect"] is None, actions["follow"] is None] == [row.distance == 1] * 2
        assert (actions["message"] is None) == (row.distance == 3)
        assert actions["long_dwell"] or not any(actions.values())  # nobody acts on what was not read


def test_follow_and_message_are_rare_but_not_absent(shown: list[Shown]) -> None:
    done = {name: sum(bool(row.item.actions[name]) for row in shown) for name in ACTIONS["people"]}
    assert 200 < done["follow"] < 0.01 * len(shown)
    assert 200 < done["message"] < 0.01 * len(shown)
    assert 0.2 < done["long_dwell"] / len(shown) < 0.4
    assert 0.05 < done["connect"] / len(shown) < 0.2


def test_actions_follow_grade_position_and_what_grades_do_not_know(shown: list[Shown]) -> None:
    by_grade = [rate([row for row in shown if row.grade == grade], "long_dwell") for grade in range(5)]
    assert all(low < high for low, high in pairwise(by_grade))
    assert by_grade[4] > 3 * by_grade[0]
    good = [row for row in shown if row.grade >= 3]

    def more(first: list[Shown], second: list[Shown], action: str, times: float) -> None:
        assert rate(first, action) > times * rate(second, action)

    top, low = ([row for row in good if row.item.position in places] for places in ((1, 2), (8, 9, 10)))
    more(top, low, "long_dwell", 1.3)
    popular, unpopular = [r for r in good if r.liked > 0.5], [r for r in good if r.liked < -0.5]
    more(popular, unpopular, "long_dwell", 1.3)
    more(popular, unpopular, "follow", 3)
    near, far = [r for r in good if r.distance == 2], [r for r in good if r.distance == 3]
    more(near, far, "long_dwell", 1.1)
    more(near, far, "connect", 1.5)
    active, away = [r for r in shown if r.active_days <= 2], [r for r in shown if r.active_days >= 14]
    more(active, away, "message", 1.5)


def test_the_observed_rate_tells_of_popularity(tiny: Tiny) -> None:
    pairs = [(member.liked, member.connect_rate) for member in tiny.market._members]
    assert np.corrcoef(np.array(pairs).T)[0, 1] > 0.85


# --- TFDS ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[PeopleMarket]:
    smaller = dataclasses.replace(VARIANTS["tiny"], members=480, searches=30, precedents=5, enough=2)
    monkeypatch.setitem(VARIANTS, "tiny", smaller)
    kept = job_market_dataset_builder._market
    kept.cache_clear()
    yield PeopleMarket("tiny")
    kept.cache_clear()


def test_read_through_tfds_equals_generated(
    small_network: PeopleMarket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = job_market.load_tables("tiny_people", tmp_path)
    assert tables.documents == small_network.documents
    assert tables.queries == small_network.queries
    assert {split: len(tables.queries[split]) for split in PRECEDENTS} == {"calibration": 2, "golden": 3}
    judged = {key: rows for split in SPLITS for key, rows in small_network.judgments(split).items()}
    assert tables.judgments == judged
    live = ("train", "dev", "test")
    shown = {key: rows for split in live for key, rows in small_network.impressions(split).items()}
    assert tables.impressions == shown
    assert f"tiny_people_{VERSION}_documents" in {path.name for path in tmp_path.rglob("*")}

    # The second time nothing is generated.
    monkeypatch.setattr(job_market_dataset_builder, "_market", lambda variant: pytest.fail("generated again"))
    assert job_market.load_tables("tiny_people", tmp_path) == tables
    with pytest.raises(
        ValueError, match=r"variant is 'long_people': use one of tiny, default, long, tiny_people"
    ):
        job_market.load_tables("long_people", tmp_path)


def test_small_searches_are_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where few members answer, fewer pairs are graded, still one to two."""
    small = dataclasses.replace(VARIANTS["tiny"], members=300, searches=60, enough=1, precedents=0)
    monkeypatch.setitem(VARIANTS, "tiny", small)
    market = people.PeopleMarket("tiny")
    for rows in market.judgments("train").values():
        good = sum(judgment.grade > 2 for judgment in rows)
        assert 1 <= good <= 5
        assert len(rows) == 3 * good
    assert {len(page) for page in market.impressions("train").values()}.pop() == generator.PAGE
