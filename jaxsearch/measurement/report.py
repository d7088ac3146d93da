"""Reports as HTML pages that stand alone: no script, nothing from elsewhere, every text escaped."""

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from jaxsearch.data.records import Document
from jaxsearch.measurement.agreement import Agreement, AgreementReport, document_text
from jaxsearch.measurement.continuous import MeasurementReport, Ranked, query_metrics
from jaxsearch.metrics import Interval

if TYPE_CHECKING:
    from collections.abc import Iterator

WORST = 30
"""Queries that a page shows with their results."""
_LEFT, _WIDTH, _ROW = 200, 460, 26
"""Of the plot, in pixels: room for names, the axis, height of a row."""
# Line breaks and tabs stay; other control characters have no place in a page.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class Bar(NamedTuple):
    """One row of a plot, in pixels."""

    name: str
    value: Interval
    y: int
    x: float | None
    """Of the value; None where there is none."""
    low: float | None
    high: float | None


class Plot(NamedTuple):
    """Values with intervals, one row each."""

    bars: list[Bar]
    ticks: list[tuple[float, str]]
    """Place and text."""
    width: int
    height: int


def plot(values: Mapping[str, Interval]) -> Plot:
    """Places of values in [-1, 1]; the axis begins at 0, or at -1 where something is negative."""
    numbers = [x for value in values.values() for x in value if not math.isnan(x)]
    start = -1.0 if min(numbers, default=0.0) < 0 else 0.0

    def place(x: float) -> float | None:
        return None if math.isnan(x) else round(_LEFT + _WIDTH * (x - start) / (1 - start), 1)

    bars = [
        Bar(name, value, 20 + _ROW * i, *map(place, value)) for i, (name, value) in enumerate(values.items())
    ]
    ticks = [(place(float(x)) or 0.0, f"{x:.1f}") for x in np.linspace(start, 1, 6 if start == 0 else 5)]
    return Plot(bars, ticks, _LEFT + _WIDTH + 150, 20 + _ROW * len(bars) + 20)


def number(value: float, digits: int = 3) -> str:
    """With fixed digits; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def interval(value: Interval, digits: int = 3) -> str:
    """value (low to high), as far as they are known."""
    if math.isnan(value.low):
        return number(value.value, digits)
    return f"{number(value.value, digits)} ({number(value.low, digits)} to {number(value.high, digits)})"


def shares(confusion: Sequence[Sequence[int]]) -> list[list[float]]:
    """Each row's shares [5][5], what its cells are coloured by; 0 for an empty row."""
    return [[round(count / max(sum(row), 1), 3) for count in row] for row in confusion]


def _readable(value: object) -> object:
    return _CONTROL.sub("\ufffd", value) if type(value) is str else value


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("jaxsearch.measurement"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_readable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, interval=interval, shares=shares)
    return environment


def agreement_page(report: AgreementReport) -> str:
    """The page of an agreement report."""

    def groups(reading: str) -> dict[str, Agreement]:
        found = report.readings[reading]
        return {"overall": found.overall, **found.buckets}

    return (
        _environment()
        .get_template("agreement.html")
        .render(
            report=report,
            readings={reading: groups(reading) for reading in report.readings},
            plots={
                reading: plot({name: found.linear_kappa for name, found in groups(reading).items()})
                for reading in report.readings
            },
        )
    )


def measurement_page(report: MeasurementReport, documents: Sequence[Document]) -> str:
    """The page of a measurement; of the documents only the texts of the shown queries' results are used."""
    row = {document.id: i for i, document in enumerate(documents)}
    worst = list(_worst(report.ranked))
    texts = {
        name: document_text(documents[row[name]]) for item, _ in worst for name in item.results if name in row
    }
    groups = {"overall": report.overall, **report.buckets}
    return (
        _environment()
        .get_template("measurement.html")
        .render(
            report=report,
            groups=groups,
            plot=plot({name: found.ndcg for name, found in groups.items()}),
            worst=worst,
            texts=texts,
        )
    )


def _worst(ranked: Sequence[Ranked]) -> "Iterator[tuple[Ranked, float]]":
    """The queries with the lowest NDCG, which is given beside them."""
    values = query_metrics(ranked)["ndcg"]
    order = np.argsort(values, kind="stable")
    for i in order[~np.isnan(values[order])][:WORST]:
        yield ranked[i], float(values[i])
