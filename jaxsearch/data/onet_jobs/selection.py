"""Which titles become queries, which split each belongs to, and what its documents are worth.

A pure function of the release, without a seed: splits hang on hashes of the normalised title and of the
occupation code alone, so a title keeps its split from release to release.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxsearch.data.onet_jobs.release import Occupation, Release

MAX_TECHNOLOGIES = 20
SPLITS = ("train", "dev", "test_seen", "dev_unseen", "test_unseen")
TEST_UNSEEN_SHARE, DEV_UNSEEN_SHARE = 0.10, 0.03
"""Shares of the occupations that are held out of training altogether."""
OCCUPATION_SALT = "occupation5"
"""Chosen before anything was trained: the first number under which no single occupation gives more than a
tenth of the queries of `test_unseen` or an eighth of those of `dev_unseen` (one has 792 titles), and
`test_unseen` holds at least a tenth of the documents.
"""
TRAIN_SHARE, DEV_SHARE = 0.80, 0.10
"""Shares of the remaining occupations' titles; what is left is `test_seen`."""
_WORD = re.compile(r"[^\W_]+[+#]*")
_PARENTHESES = re.compile(r"\(([^()]*)\)")


@dataclass(frozen=True)
class TitleQuery:
    """A title that is asked as a query: its text as O*NET writes it, and the one occupation it belongs to."""

    id: str
    text: str
    occupation: str
    split: str


@dataclass(frozen=True)
class Selection:
    """The queries by id, and how many titles became none, by reason."""

    queries: tuple[TitleQuery, ...]
    left_out: Mapping[str, int]


def normalise(text: str) -> str:
    """Folds case, punctuation and plural endings; C++ and C# stay themselves.

    >>> normalise("Tax Preparers' Clerk (C++)")
    'tax preparer clerk c++'
    """
    return " ".join(_singular(word) for word in _WORD.findall(text.casefold().replace("'", "")))


def _singular(word: str) -> str:
    if len(word) <= 3:
        return word
    for ending, replacement in (
        ("ies", "y"),
        ("men", "man"),
        ("ches", "ch"),
        ("shes", "sh"),
        ("sses", "ss"),
        ("xes", "x"),
    ):
        if word.endswith(ending):
            return word[: -len(ending)] + replacement
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def title_key(title: str) -> str:
    """The normalised title without what stands in parentheses: "General Manager (GM)" and "General Managers"
    are one title.
    """
    return normalise(_PARENTHESES.sub(" ", title)) or normalise(title)


def readings(title: str) -> set[str]:
    """The normalised ways to read a title: as a whole, without its parentheses, and what stands in them."""
    found = {
        normalise(title),
        title_key(title),
        *(normalise(inside) for inside in _PARENTHESES.findall(title)),
    }
    return found - {""}


def technologies_shown(occupation: Occupation) -> tuple[str, ...]:
    """The first 20 distinct technologies in the order of the release."""
    return tuple(dict.fromkeys(occupation.technologies))[:MAX_TECHNOLOGIES]


def held_out_split(code: str) -> str | None:
    """`test_unseen` or `dev_unseen` for an occupation that never occurs in training, else None."""
    share = _fraction(OCCUPATION_SALT, code)
    if share < TEST_UNSEEN_SHARE:
        return "test_unseen"
    return "dev_unseen" if share < TEST_UNSEEN_SHARE + DEV_UNSEEN_SHARE else None


def select_queries(release: Release) -> Selection:
    """Queries from the alternate titles.

    A title is left out, and counted under the first reason that holds, when it belongs to several
    occupations, equals an occupation's title, belongs to an occupation without tasks (no document), or stands
    as a phrase in its own document in any of its readings. Of several spellings of one title the first is
    kept.
    """
    owners: dict[str, set[str]] = defaultdict(set)
    for code, title in release.alternate_titles:
        owners[title_key(title)].add(code)
    documents = {item.code: _searchable(item) for item in release.occupations if item.tasks}
    occupation_titles = {title_key(item.title) for item in release.occupations}
    queries: dict[str, TitleQuery] = {}
    left_out: Counter[str] = Counter(
        several_occupations=0, occupation_title=0, no_document=0, stands_in_document=0, other_spelling=0
    )
    for code, title in release.alternate_titles:
        key = title_key(title)
        if len(owners[key]) > 1:
            left_out["several_occupations"] += 1
        elif key in occupation_titles:
            left_out["occupation_title"] += 1
        elif code not in documents:
            left_out["no_document"] += 1
        elif any(f" {reading} " in documents[code] for reading in readings(title)):
            left_out["stands_in_document"] += 1
        elif key in queries:
            left_out["other_spelling"] += 1
        else:
            split = held_out_split(code) or _title_split(key)
            queries[key] = TitleQuery("t" + _digest("query", key).hex()[:15], title, code, split)
    return Selection(tuple(sorted(queries.values(), key=lambda query: query.id)), dict(left_out))


def query_grades(query: TitleQuery, occupations: Mapping[str, Occupation]) -> dict[str, int]:
    """Document -> grade for every document that is not grade 0: 4 for the title's own occupation, then its
    relatives' 3, 2 and 1.

    Training queries list no held-out document: those are no candidates in training, hence neither relevant
    nor irrelevant there.

    Args:
      occupations: the documents, by code.
    """
    grades = {query.occupation: 4}
    grades.update(
        (code, grade) for code, grade in occupations[query.occupation].related.items() if code in occupations
    )
    if query.split == "train":
        grades = {code: grade for code, grade in grades.items() if held_out_split(code) is None}
    return grades


def _searchable(occupation: Occupation) -> str:
    """The document's normalised texts, fenced so that no phrase runs across two of them."""
    parts: Sequence[str] = (
        occupation.title,
        occupation.description,
        *occupation.tasks,
        *technologies_shown(occupation),
    )
    return "|".join(f" {normalise(part)} " for part in parts)


def _title_split(key: str) -> str:
    share = _fraction("title", key)
    if share < TRAIN_SHARE:
        return "train"
    return "dev" if share < TRAIN_SHARE + DEV_SHARE else "test_seen"


def _fraction(purpose: str, text: str) -> float:
    """A number in [0, 1) from the text alone."""
    return int.from_bytes(_digest(purpose, text)[:6], "big") / 2**48


def _digest(purpose: str, text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16, person=purpose.encode()).digest()
