"""The words of the generated market: places, companies, and sentences for postings and searches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Draw = Callable[[], float]

CITIES = (
    "Austin", "Boston", "Chicago", "Denver", "Houston", "Miami", "Phoenix", "Seattle",
    "Atlanta", "Baltimore", "Charlotte", "Columbus", "Dallas", "Detroit", "Memphis", "Nashville",
    "Omaha", "Orlando", "Portland", "Raleigh", "Richmond", "Sacramento", "Tampa", "Tucson",
)  # fmt: skip
_FIRST = (
    "Alder", "Birch", "Cobalt", "Delta", "Ember", "Falcon", "Granite", "Harbor", "Indigo", "Juniper", "Keystone",
    "Lumen", "Meridian", "Northwind", "Orchard", "Pioneer", "Quarry", "Ridge", "Summit", "Tidal",
)  # fmt: skip
_SECOND = (
    "Works",
    "Group",
    "Partners",
    "Labs",
    "Services",
    "Systems",
    "Supply",
    "Collective",
    "Holdings",
    "Union",
)

_SENTENCES = (
    "{company} is hiring a {title} for its {city} office.",
    "You will use {skill} every day.",
    "The team is small and works closely with customers.",
    "We look for people who finish what they start.",
    "As a {title} you plan your own week and report to the head of the department.",
    "Experience with {skill} helps you to get going quickly.",
    "Our {city} site is close to public transport.",
    "You keep records in {skill} and share them with the next shift.",
    "{company} pays for training and gives you time for it.",
    "You explain your decisions in plain words, in writing and in meetings.",
    "The work changes with the seasons, and so do the hours.",
    "Good judgement matters more to us than a long list of certificates.",
    "A {title} at {company} is trusted with real responsibility from the first month.",
    "You check quality, note what went wrong and suggest how to mend it.",
    "We offer health cover, a pension plan and twenty-five days of leave.",
    "You will help to replace an older process with one built around {skill}.",
    "Safety comes first: nobody is ever asked to cut a corner.",
    "You will meet suppliers, compare their offers and keep costs in view.",
    "The position is open because the team is growing.",
    "Please send a short letter that tells us what you did last and what you want to do next.",
    "We answer every application within two weeks.",
    "Some evenings and weekends are part of the job and are paid extra.",
    "You work with colleagues in {city} and with others whom you will mostly meet on a screen.",
    "Knowing {skill} well is an advantage, not a condition.",
    "{company} has done this kind of work for more than thirty years.",
    "You prepare reports for the management and answer its questions.",
    "New colleagues are paired with an experienced {title} for the first weeks.",
    "The ideal candidate stays calm when plans change at noon.",
    "You will train others as soon as you feel at home in the role.",
    "Our customers come back because somebody listens to them.",
)


def company_names(count: int, draw: Draw) -> list[str]:
    """`count` different company names, in random order."""
    names = [f"{first} {second}" for first in _FIRST for second in _SECOND]
    if count > len(names):
        raise ValueError(f"companies is {count}: at most {len(names)} names can be made")
    return [name for _, name in sorted((draw(), name) for name in names)[:count]]


def with_level(title: str, level: str) -> str:
    """The title as a posting carries it."""
    return f"{level.capitalize()} {title}"


def description(words: int, draw: Draw, facts: Mapping[str, Any]) -> str:
    """Sentences from the templates until at least `words` words and punctuation marks are reached ("" for 0).

    Sentences that name a skill are left out where `facts["skills"]` is empty: some occupations list no software.
    Whole rounds of shuffled sentences, so that a long text repeats a sentence only with other facts.
    """
    if words <= 4:
        return ""
    skills: Sequence[str] = facts["skills"]
    chosen: list[str] = []
    length = 0
    while length < words:
        for _, sentence in sorted((draw(), sentence) for sentence in _SENTENCES):
            if not skills and "{skill}" in sentence:
                continue
            skill = skills[int(draw() * len(skills))] if skills else ""
            filled = sentence.format(**{**facts, "skill": skill})
            chosen.append(filled)
            length += len(filled.split()) + sum(filled.count(mark) for mark in ".,:")
            if length >= words:
                break
    return " ".join(chosen)


_OPENINGS = (
    "I am looking for work as",
    "find me a job as",
    "I would like to be hired as",
    "is anybody hiring for the job of",
    "my next job should be",
)


def search_text(
    title: str,
    *,
    level: str | None,
    city: str | None,
    workplace: str | None,
    skill: str | None,
    company: str | None,
    draw: Draw,
) -> str:
    """What somebody types: keywords in one of several orders."""
    words = title if level is None else f"{level} {title}"
    if skill is not None:
        words += f" {'with ' if draw() < 0.5 else ''}{skill}"
    if city is not None:
        words += f" {'in ' if draw() < 0.5 else ''}{city}"
    if company is not None:
        words += f" {'at ' if draw() < 0.5 else ''}{company}"
    if workplace is not None:
        words = f"{workplace} {words}" if draw() < 0.5 else f"{words} {workplace}"
    return words.lower() if draw() < 0.5 else words


def need_text(
    title: str,
    *,
    level: str | None,
    city: str | None,
    workplace: str | None,
    skill: str | None,
    company: str | None,
    draw: Draw,
) -> str:
    """The same need told in a sentence."""
    words = f"{_OPENINGS[int(draw() * len(_OPENINGS))]} {title if level is None else f'{level} {title}'}"
    if company is not None:
        words += f" at {company}"
    if city is not None:
        words += f"{' near my home' if draw() < 0.5 else ''} in {city}"
    if workplace is not None:
        words += f", {workplace}{' only' if draw() < 0.5 else ''}"
    if skill is not None:
        words += f", {'where I can use' if draw() < 0.5 else 'I know'} {skill}"
    return words
