"""The TFDS builder: one config per variant and table, such as `job_market/tiny_v2_documents`; no TensorFlow, no download.

`load_tables` builds what is missing. (The `tfds build` command would need TensorFlow, this Python interface does not.)
Every row follows from its number alone, once a worker has made the market's postings or members: Apache Beam makes them in any order.
"""

from functools import lru_cache, partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from jaxsearch.data.builder import ChunkedBuilder, Row
from jaxsearch.data.job_market import generator, people
from jaxsearch.data.job_market.generator import JobMarket
from jaxsearch.data.job_market.people import PeopleMarket
from jaxsearch.data.job_market.searches import SPLITS, query_id
from jaxsearch.data.records import ACTIONS, Document, Impression, Judgment, Query, Vertical

TABLES = ("documents", "queries", "judgments", "impressions")
PRECEDENTS = ("calibration", "golden")
"""Splits of graded pairs that judges are measured by; nobody was shown anything there."""
SHOWN = tuple(split for split in SPLITS if split not in PRECEDENTS)
"""Splits with impressions."""
DOCUMENT_SPLIT = "corpus"
NOT_ELIGIBLE = -1
"""Stored value of an action that was not possible; 0 is not done, 1 is done."""
_PEOPLE = "_people"
"""How the variants of people search end."""
VERSIONS = dict.fromkeys(generator.VARIANTS, generator.VERSION) | {
    variant + _PEOPLE: people.VERSION for variant in people.VARIANTS
}
"""The version of each variant's generator."""


class Schema(NamedTuple):
    """Names of what the records of a vertical hold."""

    fields: tuple[str, ...]
    attributes: tuple[str, ...]
    numeric: tuple[str, ...]
    searcher: tuple[str, ...]


SCHEMAS: dict[Vertical, Schema] = {
    "jobs": Schema(
        ("location", "title", "skills", "company", "pay", "description"),
        ("company", "city", "workplace", "seniority"),
        ("salary", "age_days", "company_ctr"),
        ("headline", "location", "wanted_salary"),
    ),
    "people": Schema(
        ("location", "headline", "positions", "skills", "education", "name"),
        ("city", "company", "school", "connections"),
        ("connect_rate", "active_days", "experience_years"),
        ("headline", "location", "company", "connections"),
    ),
}


def vertical_of(variant: str) -> Vertical:
    """Whether a variant is of job search or of people search."""
    return "people" if variant.endswith(_PEOPLE) else "jobs"


@lru_cache(maxsize=1)
def _market(variant: str) -> JobMarket | PeopleMarket:
    """The four tables of a variant are built one after the other from one market; each worker of Beam makes it for itself."""
    if vertical_of(variant) == "people":
        return PeopleMarket(variant.removesuffix(_PEOPLE))
    return JobMarket(variant)


def _features(table: str, vertical: Vertical) -> tfds.features.FeaturesDict:
    text, each, schema = tfds.features.Text, tfds.features.Sequence, SCHEMAS[vertical]
    if table == "documents":
        return tfds.features.FeaturesDict(
            {"id": text()}
            | {name: text() for name in schema.fields}
            | {f"attribute_{name}": text() for name in schema.attributes}
            | dict.fromkeys(schema.numeric, np.float32)
        )
    if table == "queries":
        return tfds.features.FeaturesDict(
            {"id": text(), "text": text(), "bucket": text()}
            | {f"searcher_{name}": text() for name in schema.searcher}
        )
    pairs = {"query_id": text(), "document_ids": each(text())}
    if table == "judgments":
        return tfds.features.FeaturesDict(pairs | {"grades": each(np.int32), "rationales": each(text())})
    actions = {name: each(np.int32) for name in ACTIONS[vertical]}
    return tfds.features.FeaturesDict(pairs | {"positions": each(np.int32), "shown_at": text()} | actions)


class Builder(ChunkedBuilder):
    """A generated job market: postings or member profiles, searches, policy grades, and impressions with actions.

    A judgment row holds the graded documents of one search: all above grade 0 for dev and test, where anything not listed is grade 0; a
    sample for training and for precedents (calibration, golden). An impression row holds one page of results.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {
        "1.0.0": f"Generators: jobs {generator.VERSION}, people {people.VERSION}."
    }
    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        tfds.core.BuilderConfig(
            name=f"{variant}_{version}_{table}", description=f"The {table} of variant {variant}."
        )
        for variant, version in VERSIONS.items()
        for table in TABLES
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        variant, table = self._variant_and_table()
        return self.dataset_info_from_configs(
            features=_features(table, vertical_of(variant)),
            license="Apache-2.0; facts from the O*NET database (USDOL/ETA), CC BY 4.0",
        )

    def _variant_and_table(self) -> tuple[str, str]:
        variant, _, table = self.builder_config.name.rsplit("_", 2)
        return variant, table

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        variant, table = self._variant_and_table()
        market, make = _market(variant), partial(_row, variant, table)
        if table == "documents":
            return {DOCUMENT_SPLIT: self._generate_examples(make, range(market.size))}
        splits = SHOWN if table == "impressions" else SPLITS
        return {split: self._generate_examples(make, market.numbers[split]) for split in splits}


def _row(variant: str, table: str, number: int) -> Row:
    """Document or search of this number, or what belongs to the search."""
    market, schema = _market(variant), SCHEMAS[vertical_of(variant)]
    if table == "documents":
        return _document_row(market.document(number), schema)
    if table == "queries":
        return _query_row(market.query(number), schema)
    if table == "judgments":
        return _judgments_row(query_id(number), market.judged(number))
    return _page_row(query_id(number), market.page(number))


def _document_row(item: Document, schema: Schema) -> Row:
    return (
        {"id": item.id}
        | {name: item.fields.get(name, "") for name in schema.fields}
        | {f"attribute_{name}": item.attributes[name] for name in schema.attributes}
        | {name: item.numeric[name] for name in schema.numeric}
    )


def _query_row(item: Query, schema: Schema) -> Row:
    return {"id": item.id, "text": item.text, "bucket": item.bucket} | {
        f"searcher_{name}": item.searcher[name] for name in schema.searcher
    }


def _judgments_row(query_id: str, judgments: list[Judgment]) -> Row:
    return {
        "query_id": query_id,
        "document_ids": [judgment.document_id for judgment in judgments],
        "grades": [judgment.grade for judgment in judgments],
        "rationales": [judgment.rationale for judgment in judgments],
    }


def _page_row(query_id: str, page: list[Impression]) -> Row:
    return {
        "query_id": query_id,
        "document_ids": [shown.document_id for shown in page],
        "positions": [shown.position for shown in page],
        "shown_at": page[0].shown_at,
    } | {
        name: [
            NOT_ELIGIBLE if shown.actions[name] is None else int(bool(shown.actions[name])) for shown in page
        ]
        for name in page[0].actions
    }
