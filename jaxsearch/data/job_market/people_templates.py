"""The words of the generated members: names, schools, positions and searches.

Names and schools are put together from invented syllables. They belong to nobody; any likeness to a person or a school is chance.
"""

from collections.abc import Callable, Sequence

Draw = Callable[[], float]

_FIRST = (
    ("Zwil", "Quor", "Brel", "Dwin", "Frax", "Glim", "Havr", "Jask", "Krel", "Lumb", "Mavr", "Nolt", "Ostr", "Plen", "Skav"),
    ("ia", "o", "en", "a", "is"),
)  # fmt: skip
_SURNAME = (
    ("Ulv", "Brax", "Ondr", "Skel", "Thresk", "Varg", "Wolm", "Yond", "Zarr", "Klov", "Drimm", "Flent"),
    ("ambi", "ettle", "isk", "orro", "unda", "el"),
)
_SCHOOL = (
    ("Alderbrook", "Westmere", "Northolm", "Eastfen", "Southmoor", "Lakeridge", "Stonehaugh", "Ferncliff"),
    ("College", "Institute", "Polytechnic", "Academy"),
)
_OPENINGS = (
    "Who works as {title}",
    "I am looking for somebody who works as {title}",
    "Do I know a person who works as {title}",
    "We need advice from a colleague who works as {title}",
)


def _made(parts: tuple[Sequence[str], Sequence[str]], between: str, what: str, count: int, draw: Draw) -> list[str]:  # fmt: skip
    names = [f"{begin}{between}{end}" for begin in parts[0] for end in parts[1]]
    if count > len(names):
        raise ValueError(f"{what} is {count}: at most {len(names)} can be made")
    return [name for _, name in sorted((draw(), name) for name in names)[:count]]


def first_names(count: int, draw: Draw) -> list[str]:
    """`count` different invented first names, in random order."""
    return _made(_FIRST, "", "first_names", count, draw)


def surnames(count: int, draw: Draw) -> list[str]:
    """`count` different invented surnames, in random order."""
    return _made(_SURNAME, "", "surnames", count, draw)


def schools(count: int, draw: Draw) -> list[str]:
    """`count` different invented schools, in random order."""
    return _made(_SCHOOL, " ", "schools", count, draw)


def position(title: str, company: str, years: int) -> str:
    """One position of a profile."""
    return f"{title} at {company}, {years} year{'' if years == 1 else 's'}"


def name_text(first: str, surname: str, draw: Draw) -> str:
    """A name as somebody types it."""
    words = f"{first} {surname}" if draw() < 0.8 else f"{surname} {first}"
    return words.lower() if draw() < 0.5 else words


def search_text(title: str, *, company: str | None, skill: str | None, city: str | None, draw: Draw) -> str:
    """What somebody types: keywords, with or without the small words between them."""
    words = title
    for small, value in (("at", company), ("with", skill), ("in", city)):
        if value is not None:
            words += f" {small + ' ' if draw() < 0.5 else ''}{value}"
    return words.lower() if draw() < 0.5 else words


def need_text(title: str, *, company: str | None, skill: str | None, city: str | None, draw: Draw) -> str:
    """The same told in a sentence."""
    clauses = [_OPENINGS[int(draw() * len(_OPENINGS))].format(title=title)]
    for start, value in (("has been at", company), ("knows", skill), ("lives in", city)):
        if value is not None:
            clauses.append(f"{start} {value}")
    mark = "." if clauses[0].startswith(("I ", "We ")) else "?"
    return (", ".join(clauses[:-1]) + " and " if len(clauses) > 1 else "") + clauses[-1] + mark
