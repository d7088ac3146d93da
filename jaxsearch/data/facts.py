"""A compact table of job-market facts: occupations, their titles, technologies and relatedness tiers.

The table (`occupations.jsonl.gz`, one occupation a line) holds facts only: codes, names and tiers taken from the O*NET database text
release, no descriptions and no task sentences. It is what lets `job_market` be generated on a machine that has nothing but this package.

This product includes information from the O*NET Database by the U.S. Department of Labor, Employment and Training Administration
(USDOL/ETA). Used under the CC BY 4.0 license. O*NET is a trademark of USDOL/ETA. The information was selected and abridged.

Rebuild from a release: `python -m jaxsearch.data.facts RELEASE_DIR`.
"""

import csv
import gzip
import hashlib
import json
import os
import re
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("occupations.jsonl.gz")
MAX_TITLES = 20
MAX_TECHNOLOGIES = 16
TIERS = ("Primary-Short", "Primary-Long", "Supplemental")
_PLAIN_TITLE = re.compile(r"[A-Za-z][A-Za-z0-9+#./& '-]{2,39}")


@dataclass(frozen=True)
class Occupation:
    """One occupation: its code, its titles, the technologies it uses, and what it is related to."""

    code: str
    title: str
    alternate_titles: tuple[str, ...]
    """Titles that belong to this occupation alone."""
    technologies: tuple[str, ...]
    related: tuple[tuple[str, ...], ...]
    """Codes of related occupations in three tiers, nearest first (O*NET: Primary-Short, Primary-Long, Supplemental)."""


@cache
def occupations() -> tuple[Occupation, ...]:
    """Every occupation of the table, by code."""
    with gzip.open(TABLE, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return tuple(
        Occupation(
            code=row["code"],
            title=row["title"],
            alternate_titles=tuple(row["alternate_titles"]),
            technologies=tuple(row["technologies"]),
            related=tuple(tuple(tier) for tier in row["related"]),
        )
        for row in rows
    )


def _read(folder: Path, name: str) -> list[dict[str, str]]:
    with open(folder / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def _by_hash(names: set[str]) -> list[str]:
    """A fixed sample order that does not depend on the alphabet."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def _extract(folder: Path) -> list[Occupation]:
    code, alternate = "O*NET-SOC Code", "Alternate Title"
    described = {row[code] for row in _read(folder, "Task Statements.txt")}
    titles = {
        row[code]: row["Title"] for row in _read(folder, "Occupation Data.txt") if row[code] in described
    }
    taken = {title.lower() for title in titles.values()}
    owners: dict[str, set[str]] = defaultdict(set)
    alternates: dict[str, set[str]] = defaultdict(set)
    for row in _read(folder, "Alternate Titles.txt"):
        owners[row[alternate].lower()].add(row[code])
        alternates[row[code]].add(row[alternate])
    technologies: dict[str, list[tuple[bool, str]]] = defaultdict(list)
    for row in _read(folder, "Technology Skills.txt"):
        technologies[row[code]].append((row["Hot Technology"] != "Y", row["Example"]))
    related: dict[str, list[list[str]]] = defaultdict(lambda: [[], [], []])
    for row in _read(folder, "Related Occupations.txt"):
        if row["Related O*NET-SOC Code"] in titles:
            related[row[code]][TIERS.index(row["Relatedness Tier"])].append(row["Related O*NET-SOC Code"])
    result = []
    for key, title in sorted(titles.items()):
        own = {
            name
            for name in alternates[key]
            if len(owners[name.lower()]) == 1 and name.lower() not in taken and _PLAIN_TITLE.fullmatch(name)
        }
        names = [name for _, name in sorted(technologies[key]) if len(name) <= 32]
        result.append(
            Occupation(
                key,
                title,
                tuple(sorted(_by_hash(own)[:MAX_TITLES])),
                tuple(names[:MAX_TECHNOLOGIES]),
                tuple(tuple(tier) for tier in related[key]),
            )
        )
    return result


def main(folder: str) -> None:
    """Write the table from the text files of an O*NET release in `folder`."""
    lines = "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in _extract(Path(folder)))
    temporary = TABLE.with_suffix(".tmp")
    temporary.write_bytes(gzip.compress(lines.encode(), mtime=0))
    os.replace(temporary, TABLE)
    print(f"{TABLE}: {lines.count(chr(10))} occupations, {TABLE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
