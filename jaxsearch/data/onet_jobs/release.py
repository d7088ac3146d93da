"""Reads the tab-separated text files of an O*NET database release, and reports what is wrong with them.

Columns are found by name, so later releases, which add columns at the end, are read too. Nothing is skipped
silently: every bad row is an error that gives file and line.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxsearch.errors import InputError

CODE = "O*NET-SOC Code"
COLUMNS: dict[str, tuple[str, ...]] = {
    "Occupation Data.txt": (CODE, "Title", "Description"),
    "Task Statements.txt": (CODE, "Task"),
    "Technology Skills.txt": (CODE, "Example"),
    "Job Zones.txt": (CODE, "Job Zone"),
    "Related Occupations.txt": (CODE, "Related O*NET-SOC Code", "Relatedness Tier"),
    "Alternate Titles.txt": (CODE, "Alternate Title"),
}
"""The files that are read, and the columns needed of each."""
TIER_GRADES = {"Primary-Short": 3, "Primary-Long": 2, "Supplemental": 1}
"""Grades of the occupations related to the one a title belongs to; that one itself is grade 4."""
_CODE = re.compile(r"\d\d-\d{4}\.\d\d")
_SHOWN_PROBLEMS = 10


class ReleaseError(InputError):
    """The release folder cannot be used; the message names files, lines or columns."""


@dataclass(frozen=True)
class Occupation:
    """One occupation with all that its files say of it, in file order."""

    code: str
    title: str
    description: str
    tasks: tuple[str, ...]
    technologies: tuple[str, ...]
    job_zone: int
    """1 (little preparation) to 5 (extensive); 0 where the release gives none."""
    related: Mapping[str, int]
    """Code of a related occupation -> grade 3, 2 or 1 by its tier."""


@dataclass(frozen=True)
class Release:
    """The part of a release that `onet_jobs` uses."""

    occupations: tuple[Occupation, ...]
    """All occupations by code, also those without tasks (which are no documents)."""
    alternate_titles: tuple[tuple[str, str], ...]
    """(code, title) in file order."""
    sha256: Mapping[str, str]
    """Hash of each file as read."""


def file_hashes(folder: str | Path) -> dict[str, str]:
    """SHA-256 of every file that is read.

    Raises:
      ReleaseError: files are missing; all of them are named.
    """
    root = Path(folder)
    missing = [name for name in COLUMNS if not (root / name).is_file()]
    if missing:
        raise ReleaseError(
            f"{root} lacks {', '.join(missing)}: "
            "point it at the folder that holds the unpacked text files of an O*NET release"
        )
    return {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in COLUMNS}


def read_release(folder: str | Path) -> Release:
    """Reads and checks the release files in `folder`.

    Raises:
      ReleaseError: a file or a column is missing (all are named), or rows are bad (the first ten with file,
        line and reason).
    """
    root = Path(folder)
    hashes = file_hashes(root)
    problems: list[str] = []
    rows = {name: list(_rows(root / name, columns, problems)) for name, columns in COLUMNS.items()}
    _refuse(root, problems)
    titles = {}
    descriptions = {}
    for place, (code, title, description) in rows["Occupation Data.txt"]:
        if code in titles:
            problems.append(f"{place}: occupation {code} occurs twice")
        titles[code], descriptions[code] = title, description

    def known(name: str) -> Iterator[tuple[str, list[str]]]:
        for place, cells in rows[name]:
            if cells[0] in titles:
                yield place, cells
            else:
                problems.append(f"{place}: occupation {cells[0]} is not in Occupation Data.txt")

    tasks, technologies = defaultdict(list), defaultdict(list)
    for _, (code, task) in known("Task Statements.txt"):
        tasks[code].append(task)
    for _, (code, example) in known("Technology Skills.txt"):
        technologies[code].append(example)
    zones: dict[str, int] = {}
    for place, (code, zone) in known("Job Zones.txt"):
        if zone not in ("1", "2", "3", "4", "5"):
            problems.append(f"{place}: Job Zone is {zone!r}, not 1 to 5")
        else:
            zones[code] = int(zone)
    related: dict[str, dict[str, int]] = defaultdict(dict)
    for place, (code, other, tier) in known("Related Occupations.txt"):
        if other not in titles or other == code:
            problems.append(
                f"{place}: related occupation {other!r} is not another one of Occupation Data.txt"
            )
        elif tier not in TIER_GRADES:
            problems.append(f"{place}: Relatedness Tier is {tier!r}, not one of {', '.join(TIER_GRADES)}")
        elif other in related[code]:
            problems.append(f"{place}: the relation of {code} to {other} occurs twice")
        else:
            related[code][other] = TIER_GRADES[tier]
    alternate_titles = tuple((code, title) for _, (code, title) in known("Alternate Titles.txt"))
    _refuse(root, problems)
    occupations = tuple(
        Occupation(
            code,
            titles[code],
            descriptions[code],
            tuple(tasks[code]),
            tuple(technologies[code]),
            zones.get(code, 0),
            related[code],
        )
        for code in sorted(titles)
    )
    return Release(occupations, alternate_titles, hashes)


def _refuse(root: Path, problems: list[str]) -> None:
    if problems:
        counts = Counter(problem.split(":")[0] for problem in problems)
        per_file = ", ".join(f"{count} in {name}" for name, count in counts.items())
        shown = "\n  ".join(problems[:_SHOWN_PROBLEMS])
        raise ReleaseError(f"{root} has {len(problems)} problems ({per_file}):\n  {shown}")


def _rows(path: Path, columns: tuple[str, ...], problems: list[str]) -> Iterator[tuple[str, list[str]]]:
    """("file:line", cells of `columns`) of every sound row; what is unsound goes to `problems`."""
    raw = path.read_bytes()
    try:
        lines = raw.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        number = raw[: error.start].count(b"\n") + 1
        problems.append(f"{path.name}:{number}: not UTF-8 text ({error.reason})")
        return
    header = lines[0].rstrip("\r").split("\t")
    missing = [column for column in columns if column not in header]
    if missing:
        problems.append(
            f"{path.name}:1: column {', '.join(missing)} is missing; there are {', '.join(header)}"
        )
        return
    places = [header.index(column) for column in columns]
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines[1:], start=2):
        cells = line.rstrip("\r").split("\t")
        if len(cells) != len(header):
            problems.append(f"{path.name}:{number}: {len(cells)} cells where the header has {len(header)}")
            continue
        values = [cells[place].strip() for place in places]
        empty = [column for column, value in zip(columns, values, strict=True) if not value]
        if empty:
            problems.append(f"{path.name}:{number}: {', '.join(empty)} is empty")
        elif not _CODE.fullmatch(values[0]):
            problems.append(f"{path.name}:{number}: {CODE} is {values[0]!r}, not like 15-1252.00")
        else:
            yield f"{path.name}:{number}", values
