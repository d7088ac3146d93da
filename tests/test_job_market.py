"""The generated job market: the policy in words and in code, determinism, the click model, and the way through TFDS."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from probes import alone, digest, worked_examples

from jaxsearch.data import job_market
from jaxsearch.data.job_market import draws, generator, job_market_dataset_builder, policy, templates
from jaxsearch.data.job_market.generator import PAGE, VARIANTS, VERSION, JobMarket
from jaxsearch.data.job_market.searches import SPLITS
from jaxsearch.data.records import BUCKETS, Impression, Judgment, Query, unique_ids
from jaxsearch.data.tokenizer import train

PINNED = {
    "documents": "63801387dd69c4238f7de728b96a82ae7fbb657b8f12fd7493d408b32e9e3054",
    "queries": "91c8c2d3e149c25e525243d3aaf266d425f909295150750f1ed39634c338d012",
    "judgments": "37a6613502499edc363f61ed89942d08d3bbec096bf173e974885426d27d4d5a",
    "impressions": "201f17d600c7f74bb40ac30fe227463fa692e5b0cc274ca9ab2052c9010e67e9",
}
"""SHA-256 of the tables of `tiny` (training judgments and impressions: the first 100 searches). Where these change, so must
`generator.VERSION`: models and figures made on one version say nothing of another."""
SAMPLE = 100


LIVE = ("train", "dev", "test")
PRECEDENTS = ("calibration", "golden")


@dataclass(frozen=True)
class Tiny:
    """The whole tiny market, except that only some training searches are graded and shown, which takes time."""

    market: JobMarket
    queries: dict[str, list[Query]]
    judgments: dict[str, dict[str, list[Judgment]]]
    impressions: dict[str, dict[str, list[Impression]]]


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    market = JobMarket("tiny")
    queries = dict(market.queries)
    market.queries["train"] = queries["train"][:SAMPLE]
    return Tiny(
        market,
        queries,
        {split: market.judgments(split) for split in SPLITS},
        {split: market.impressions(split) for split in LIVE},
    )


def test_unseen_postings_are_the_next_ones_and_graded_by_the_policy(tiny: Tiny) -> None:
    market = tiny.market
    documents, graded = market.unseen(40)
    assert [document.id for document in documents] == [f"p{i:05d}" for i in range(1200, 1240)]
    assert len(market.documents) == 1200  # the market itself stays as it is
    assert market.unseen(10)[0] == documents[:10]
    assert list(graded) == [query.id for query in market.queries["test"]]
    checked = 0
    for query, grades in graded.items():
        need = market._search(int(query[1:])).need
        for place, grade in grades.items():
            if grade == 4 and need.city is not None:
                assert documents[place].attributes["city"] == market.cities[need.city]
                checked += 1
    assert checked > 10
    assert {grade for grades in graded.values() for grade in grades.values()} == {1, 2, 3, 4}


def test_tiny_is_the_one_that_was_frozen(tiny: Tiny) -> None:
    tables = {
        "documents": tiny.market.documents,
        "queries": tiny.queries,
        "judgments": tiny.judgments,
        "impressions": tiny.impressions,
    }
    found = {name: digest(rows) for name, rows in tables.items()}
    assert found == PINNED, "the generator makes other data: give it a new VERSION and pin these"


def test_any_order_of_use_gives_the_same_market(tiny: Tiny) -> None:
    other = JobMarket("tiny")
    other.queries["train"] = other.queries["train"][:3]
    pages = other.impressions("train")
    assert len(pages) == 3
    assert pages == {key: page for key, page in tiny.impressions["train"].items() if key in pages}
    assert other.documents[17] == tiny.market.documents[17]


def test_variants_and_seeds_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(VARIANTS["tiny"], postings=40, searches=20)
    monkeypatch.setitem(VARIANTS, "tiny", small)
    first = JobMarket("tiny")
    monkeypatch.setitem(VARIANTS, "tiny", dataclasses.replace(small, seed=1))
    assert JobMarket("tiny").documents != first.documents
    with pytest.raises(ValueError, match="variant is 'huge': use one of tiny, default, long"):
        JobMarket("huge")


# --- the policy ----------------------------------------------------------------------------------------------------

POLICY = resources.files("jaxsearch.data.job_market").joinpath("policy_jobs.md").read_text("utf-8")
JOBS = {"nurse practitioner": 0, "web developer": 1, "accountant": 2, "pastry chef": 3}
COMPANIES = ("Alder Works", "Delta Labs", "Cobalt Union")
TIERS = 4 * np.eye(4, dtype=np.int64)


def parse_search(text: str) -> policy.Need:
    def find(options: tuple[str, ...]) -> int | None:
        return next((i for i, option in enumerate(options) if option.lower() in text.lower().split()), None)

    occupation = next(i for name, i in JOBS.items() if name in text.lower())
    skill, company = re.search(r"with (\w+)", text), re.search(r"at (\w+ \w+)", text)
    return policy.Need(
        occupation,
        find(policy.LEVELS),
        find(templates.CITIES),
        find(policy.WORKPLACES),
        skill[1] if skill else None,
        COMPANIES.index(company[1]) if company else None,
    )


def parse_posting(text: str) -> policy.Postings:
    title, city, workplace, *rest = text.split(", ")
    level = next(i for i, name in enumerate(policy.LEVELS) if title.lower().startswith(name))
    named = dict(item.split(": ") for item in rest)
    return policy.Postings(
        np.array([next(i for name, i in JOBS.items() if name in title.lower())]),
        np.array([level]),
        np.array([templates.CITIES.index(city)]),
        np.array([policy.WORKPLACES.index(workplace)]),
        (frozenset([named.get("skills", "")]),),
        np.array([COMPANIES.index(named.get("company", "Cobalt Union"))]),
    )


@pytest.mark.parametrize(("search", "posting", "grade", "why"), worked_examples(POLICY))
def test_worked_examples_of_the_written_policy(search: str, posting: str, grade: int, why: str) -> None:
    need = parse_search(search)
    parts = policy.components(need, parse_posting(posting), TIERS)
    assert policy.grades(parts).tolist() == [grade]
    assert policy.rationale(need, {name: int(part[0]) for name, part in parts.items()}) == why


def test_there_are_worked_examples_and_both_texts_name_the_same_words() -> None:
    assert len(worked_examples(POLICY)) == 10
    for words in (policy.LEVELS, policy.WORKPLACES):
        assert f"({', '.join(words)})" in POLICY
    assert "version 2" in POLICY


def postings(**columns: list[int]) -> policy.Postings:
    rows = len(next(iter(columns.values())))
    values = {
        name: np.zeros(rows, np.int64) for name in ("occupation", "level", "city", "workplace", "company")
    }
    values |= {name: np.array(column) for name, column in columns.items()}
    return policy.Postings(**values, skills=(frozenset({"SAP"}),) * rows)  # type: ignore[arg-type]


def test_policy_by_hand() -> None:
    tiers = np.array([[4, 3, 2, 1, 0]] * 5)
    work = postings(occupation=[0, 1, 2, 3, 4])

    def grades(offers: policy.Postings, **asked: object) -> list[int]:
        return policy.grades(policy.components(policy.Need(0, **asked), offers, tiers)).tolist()  # type: ignore[arg-type]

    assert grades(work) == [4, 3, 2, 1, 0]
    assert grades(work, skill="SAP") == [4, 3, 2, 1, 0]
    assert grades(work, skill="Excel") == [3, 2, 1, 0, 0]
    assert grades(work, level=0) == [4, 3, 2, 1, 0]
    assert grades(work, level=1) == [3, 2, 1, 0, 0]
    assert grades(work, level=3) == [2, 1, 0, 0, 0]  # three steps take off 2, as two do
    assert grades(work, city=1) == [1, 1, 1, 1, 0]
    assert grades(work, workplace=2, skill="Excel", level=3) == [1, 0, 0, 0, 0]
    assert grades(postings(company=[2, 1, 1], level=[0, 0, 2]), company=1, level=0) == [2, 4, 2]
    assert grades(postings(company=[2, 1], city=[0, 0]), company=1, city=1) == [1, 1]
    assert grades(postings(level=[0, 1, 2, 3]), level=1) == [3, 4, 3, 2]
    assert grades(postings(city=[0, 1, 1], workplace=[1, 0, 1]), city=1, workplace=1) == [1, 1, 4]


# --- the market ----------------------------------------------------------------------------------------------------


def test_records_are_valid_and_ids_unique(tiny: Tiny) -> None:
    every = [query for split in LIVE for query in tiny.queries[split]]
    documents = tiny.market.documents
    assert (len(documents), len(every)) == (1_200, 5_600)
    for record in (*documents, *every):
        record.validate()
    unique_ids(documents)
    unique_ids([query for split in SPLITS for query in tiny.queries[split]])
    assert {split: len(tiny.queries[split]) for split in PRECEDENTS} == {"calibration": 160, "golden": 240}
    shares = [len(tiny.queries["dev"]) / 5_600, len(tiny.queries["test"]) / 5_600]
    np.testing.assert_allclose(shares, [0.06, 0.14], atol=0.015)


def test_tiny_documents_have_at_most_96_tokens(tiny: Tiny) -> None:
    texts = ["; ".join(document.fields.values()) for document in tiny.market.documents]
    assert max(map(len, train(texts, 2048).encode(texts))) <= 96


@pytest.mark.parametrize(("variant", "least", "most"), [("default", 90, 760), ("long", 900, 1_300)])
def test_descriptions_have_realistic_lengths(
    monkeypatch: pytest.MonkeyPatch, variant: str, least: int, most: int
) -> None:
    monkeypatch.setitem(VARIANTS, variant, dataclasses.replace(VARIANTS[variant], postings=40))
    words = [len(re.findall(r"\w+|[.,:]", d.fields["description"])) for d in JobMarket(variant).documents]
    assert least <= min(words) <= max(words) <= most
    assert max(words) > min(words) + 100


def test_every_tier_and_every_grade_occurs(tiny: Tiny) -> None:
    tiers = tiny.market.tiers
    assert set(np.unique(tiers)) == {0, 1, 2, 3, 4}
    assert (np.diag(tiers) == 4).all()
    assert ((tiers == 4).sum(axis=1) == 1).all()
    seen = {judgment.grade for judged in tiny.judgments["test"].values() for judgment in judged}
    assert seen == {1, 2, 3, 4}


def test_judgments_follow_the_policy(tiny: Tiny) -> None:
    for split in ("train", "dev", *PRECEDENTS):
        for query, judged in list(tiny.judgments[split].items())[:40]:
            row = tiny.market.grade_row(int(query[1:]))
            rows = [int(judgment.document_id[1:]) for judgment in judged]
            assert [judgment.grade for judgment in judged] == row[rows].tolist()
            assert len(set(rows)) == len(rows)
            if split == "dev":
                assert rows == np.flatnonzero(row).tolist()  # complete above 0
            else:
                good = (row[rows] > 2).sum()  # one to two others: a search does not tell how many there are
                assert len(rows) == 3 * good
                assert 0 < good <= tiny.market.market.good
            for judgment in judged:
                judgment.validate()
                assert judgment.rationale.endswith(".")


def test_a_document_or_a_query_alone_predicts_nothing() -> None:
    market = JobMarket("tiny")
    for found in alone(market.documents, market.queries["train"], market.judgments("train")).values():
        assert abs(found - 0.5) < 0.02  # about four standard errors


def test_a_variation_can_be_varied_back(tiny: Tiny) -> None:
    market, rng = tiny.market, generator.random.Random(0)
    need = policy.Need(3, level=1, city=2, skill=market.technologies[3][0])
    count = Counter(market._variation(rng, need) for _ in range(6_000))
    assert all(
        (other.level is None, other.city is None, other.skill is None) == (False,) * 3 for other in count
    )
    assert all(other.workplace is other.company is None for other in count)
    # The way back is as likely as the way there, here for another city and for another occupation.
    near = dataclasses.replace(need, city=5)
    far = next(other for other in count if other.occupation == market._near[3][0] and other.city == 2)
    for other, tolerance in ((near, 0.3), (far, 0.6)):
        back = Counter(market._variation(rng, other) for _ in range(6_000))[need]
        assert back > 0
        assert abs(count[other] - back) < tolerance * max(count[other], back) + 10


def test_searches_say_what_they_need(tiny: Tiny) -> None:
    market = tiny.market
    for query in tiny.queries["dev"][:100]:
        search = market._search(int(query.id[1:]))
        need, text = search.need, query.text.lower()
        assert any(title.lower() in text for title in market.titles[need.occupation])
        for value, names in (
            (need.level, policy.LEVELS),
            (need.city, market.cities),
            (need.workplace, policy.WORKPLACES),
        ):
            assert value is None or names[value].lower() in text
        assert need.skill is None or need.skill.lower() in text
        assert need.company is None or market.companies[need.company].lower() in text
        assert query.searcher["location"] == market.cities[search.home]


# --- the click model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(tiny: Tiny) -> list[tuple[Impression, int, float]]:
    """Every impression of dev and test with its grade and the popularity of its company."""
    rows = []
    for split in ("dev", "test"):
        for query, page in tiny.impressions[split].items():
            grades = tiny.market.grade_row(int(query[1:]))
            for item in page:
                row = int(item.document_id[1:])
                rows.append(
                    (item, int(grades[row]), tiny.market._popularity[tiny.market._postings[row].company])
                )
    return rows


def rate(rows: list[tuple[Impression, int, float]], action: str = "click") -> float:
    values = [item.actions[action] for item, _, _ in rows if item.actions[action] is not None]
    assert len(values) > 100
    return float(np.mean([bool(value) for value in values]))


def test_pages_are_pages(tiny: Tiny, shown: list[tuple[Impression, int, float]]) -> None:
    pages = tiny.impressions["dev"]
    assert list(pages) == [query.id for query in tiny.queries["dev"]]
    for query, page in pages.items():
        assert [item.position for item in page] == list(range(1, PAGE + 1))
        assert len({item.document_id for item in page}) == PAGE
        assert {item.query_id for item in page} == {query}
    for item, _, _ in shown:
        item.validate()


def test_actions_make_sense(shown: list[tuple[Impression, int, float]]) -> None:
    for item, _, _ in shown:
        click, apply, dismiss, bad_fit, shortlist = item.actions.values()
        assert list(item.actions) == ["click", "apply", "dismiss", "bad_fit", "shortlist"]
        assert not (apply or shortlist) or click
        assert not (dismiss and click)
        assert (bad_fit is None) == (not click)  # possible on opened postings alone


def test_clicks_follow_grade_position_and_what_grades_do_not_know(
    shown: list[tuple[Impression, int, float]],
) -> None:
    by_grade = [rate([row for row in shown if row[1] == grade]) for grade in range(5)]
    assert by_grade[0] < by_grade[2] < by_grade[4]
    assert by_grade[4] > 2 * by_grade[0]
    assert 0.1 < rate(shown) < 0.5
    good = [row for row in shown if row[1] >= 3]
    assert rate([row for row in good if row[0].position <= 2]) > 1.3 * rate(
        [row for row in good if row[0].position >= 8]
    )
    # Two teachers can disagree only where likes are no copy of grades.
    assert rate([row for row in good if row[2] > 0.5]) > 1.2 * rate([row for row in good if row[2] < -0.5])
    assert rate([row for row in shown if row[1] == 0], "bad_fit") > rate(good, "bad_fit")
    assert rate([row for row in shown if row[1] == 0], "dismiss") > 2 * rate(good, "dismiss")


def test_the_observed_click_rate_tells_of_popularity(tiny: Tiny) -> None:
    assert np.corrcoef(tiny.market._popularity, tiny.market._company_ctr)[0, 1] > 0.9
    assert all(0 < value < 1 for value in tiny.market._company_ctr)


# --- TFDS ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_generator(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobMarket]:
    monkeypatch.setitem(VARIANTS, "tiny", dataclasses.replace(VARIANTS["tiny"], postings=60, searches=30))
    kept = job_market_dataset_builder._market
    kept.cache_clear()
    yield JobMarket("tiny")
    kept.cache_clear()


def test_read_through_tfds_equals_generated(
    small_generator: JobMarket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = job_market.load_tables("tiny", tmp_path)
    assert tables.documents == small_generator.documents
    assert tables.queries == small_generator.queries
    for found, table in (
        (tables.judgments, small_generator.judgments),
        (tables.impressions, small_generator.impressions),
    ):
        splits = SPLITS if table == small_generator.judgments else LIVE
        assert found == {key: rows for split in splits for key, rows in table(split).items()}
    assert f"tiny_{VERSION}_documents" in {
        path.name for path in tmp_path.rglob("*")
    }  # the version is in the name

    # The second time nothing is generated, and what is missing is made anew.
    monkeypatch.setattr(job_market_dataset_builder, "_market", lambda variant: pytest.fail("generated again"))
    assert job_market.load_tables("tiny", tmp_path) == tables
    with pytest.raises(ValueError, match="huge"):
        job_market.load_tables("huge", tmp_path)


def test_templates() -> None:
    draws = iter([0.9, 0.9, 0.9, 0.9])
    text = templates.search_text(
        "Web Developer",
        level="senior",
        city="Austin",
        workplace="remote",
        skill="SAP",
        company=None,
        draw=lambda: next(draws),
    )
    assert text == "senior Web Developer SAP Austin remote"
    nothing = {"level": None, "city": None, "workplace": None, "skill": None}
    written = templates.search_text("Web Developer", **nothing, company="Delta Labs", draw=lambda: 0.1)
    assert written == "web developer at delta labs"
    told = templates.need_text("Web Developer", **nothing, company="Delta Labs", draw=lambda: 0.1)
    assert told == "I am looking for work as Web Developer at Delta Labs"
    told = templates.need_text(
        "Nurse", level="lead", city="Austin", workplace="onsite", skill="SAP", company=None, draw=lambda: 0.9
    )
    assert told == "my next job should be lead Nurse in Austin, onsite, I know SAP"
    assert templates.with_level("Nurse", "mid-level") == "Mid-level Nurse"
    assert templates.description(0, lambda: 0.5, {"skills": []}) == ""
    facts = {"title": "Nurse", "company": "A", "city": "B", "skills": ("Excel",)}
    long = templates.description(600, lambda: 0.5, facts)
    assert 600 <= len(re.findall(r"\w+|[.,:]", long)) < 650
    assert "{" not in long
    unskilled = templates.description(600, lambda: 0.5, {**facts, "skills": ()})
    assert 600 <= len(re.findall(r"\w+|[.,:]", unskilled)) < 650
    assert "{" not in unskilled
    names = templates.company_names(200, iter(np.linspace(0, 1, 200)).__next__)
    assert len(set(names)) == 200
    with pytest.raises(ValueError, match="companies is 201: at most 200"):
        templates.company_names(201, lambda: 0.0)


def test_draws() -> None:
    rng = generator.random.Random(0)
    assert sorted(draws.sample(rng, range(5), 9)) == [0, 1, 2, 3, 4]
    assert draws.sample(rng, [], 3) == []
    picks = [draws.weighted(rng, (0, 3, 1)) for _ in range(400)]
    assert 0 not in picks
    assert 250 < picks.count(1) < 350
    normal = np.array([draws.normal(rng) for _ in range(4_000)])
    assert abs(normal.mean()) < 0.06
    assert abs(normal.std() - 1) < 0.05
    assert 0.03 < (np.abs(normal) > 2).mean() < 0.06


def test_buckets(tiny: Tiny) -> None:
    every = [query for split in SPLITS for query in tiny.queries[split]]
    count = Counter(query.bucket for query in every)
    assert set(count) == set(BUCKETS) - {"name"}
    assert all(share > 0.07 * len(every) for share in count.values())
    for query in every[:200]:
        need = tiny.market._search(int(query.id[1:])).need
        assert (query.bucket == "title_company") <= (need.company is not None)
        assert (query.bucket == "title_skill") <= (need.skill is not None)
        if query.bucket == "title":
            assert {need.company, need.skill, need.city, need.workplace} == {None}
    # Whoever asks for a company of the work's own finds one that is hiring.
    for number in range(len(every)):
        need = tiny.market._search(number).need
        if need.company is not None:
            assert need.company in tiny.market._hiring[need.occupation]
