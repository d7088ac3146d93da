"""The TFDS builder: one config per variant and table, such as `job_market/tiny_v1_documents`; no TensorFlow, no download.

`load_tables` builds what is missing. (The `tfds build` command would need TensorFlow, this Python interface does not.)
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from jaxsearch.data.job_market.generator import VARIANTS, VERSION, JobMarket
from jaxsearch.data.records import ACTIONS, Document, Impression, Judgment, Query

TABLES = ("documents", "queries", "judgments", "impressions")
SPLITS = ("train", "dev", "test")
DOCUMENT_SPLIT = "corpus"
DOCUMENT_FIELDS = ("location", "title", "skills", "company", "pay", "description")
ATTRIBUTES = ("company", "city", "workplace", "seniority")
NUMERIC = ("salary", "age_days", "company_ctr")
SEARCHER = ("headline", "location", "wanted_salary")
NOT_ELIGIBLE = -1
"""Stored value of an action that was not possible; 0 is not done, 1 is done."""
Row = dict[str, Any]


@lru_cache(maxsize=1)
def _market(variant: str) -> JobMarket:
    """The four tables of a variant are built one after the other from one market."""
    return JobMarket(variant)


def _features(table: str) -> tfds.features.FeaturesDict:
    text, each = tfds.features.Text, tfds.features.Sequence
    if table == "documents":
        return tfds.features.FeaturesDict(
            {"id": text()}
            | {name: text() for name in DOCUMENT_FIELDS}
            | {f"attribute_{name}": text() for name in ATTRIBUTES}
            | dict.fromkeys(NUMERIC, np.float32)
        )
    if table == "queries":
        return tfds.features.FeaturesDict(
            {"id": text(), "text": text()} | {f"searcher_{name}": text() for name in SEARCHER}
        )
    pairs = {"query_id": text(), "document_ids": each(text())}
    if table == "judgments":
        return tfds.features.FeaturesDict(pairs | {"grades": each(np.int32), "rationales": each(text())})
    actions = {name: each(np.int32) for name in ACTIONS["jobs"]}
    return tfds.features.FeaturesDict(pairs | {"positions": each(np.int32), "shown_at": text()} | actions)


class Builder(tfds.core.GeneratorBasedBuilder):
    """A generated job market: postings, searches, policy grades, and impressions with actions.

    A judgment row holds the graded postings of one search: a sample for training, all above grade 0 for dev and test, where anything not
    listed is grade 0. An impression row holds one page of results.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": f"Generator {VERSION}."}
    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        tfds.core.BuilderConfig(
            name=f"{variant}_{VERSION}_{table}", description=f"The {table} of variant {variant}."
        )
        for variant in VARIANTS
        for table in TABLES
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=_features(self.builder_config.name.split("_")[-1]),
            license="Apache-2.0; facts from the O*NET database (USDOL/ETA), CC BY 4.0",
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[str, Row]]]:
        variant, _, table = self.builder_config.name.split("_")
        market = _market(variant)
        if table == "documents":
            return {DOCUMENT_SPLIT: self._generate_examples(map(_document_row, market.documents))}
        if table == "queries":
            return {
                split: self._generate_examples(map(_query_row, market.queries[split])) for split in SPLITS
            }
        if table == "judgments":
            return {
                split: self._generate_examples(map(_judgments_row, market.judgments(split).items()))
                for split in SPLITS
            }
        return {
            split: self._generate_examples(map(_page_row, market.impressions(split).items()))
            for split in SPLITS
        }

    def _generate_examples(self, rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
        for row in rows:
            yield row.get("id") or row["query_id"], row


def _document_row(item: Document) -> Row:
    return (
        {"id": item.id}
        | {name: item.fields.get(name, "") for name in DOCUMENT_FIELDS}
        | {f"attribute_{name}": item.attributes[name] for name in ATTRIBUTES}
        | {name: item.numeric[name] for name in NUMERIC}
    )


def _query_row(item: Query) -> Row:
    return {"id": item.id, "text": item.text} | {f"searcher_{name}": item.searcher[name] for name in SEARCHER}


def _judgments_row(item: tuple[str, list[Judgment]]) -> Row:
    query_id, judgments = item
    return {
        "query_id": query_id,
        "document_ids": [judgment.document_id for judgment in judgments],
        "grades": [judgment.grade for judgment in judgments],
        "rationales": [judgment.rationale for judgment in judgments],
    }


def _page_row(item: tuple[str, list[Impression]]) -> Row:
    query_id, page = item
    return {
        "query_id": query_id,
        "document_ids": [shown.document_id for shown in page],
        "positions": [shown.position for shown in page],
        "shown_at": page[0].shown_at,
    } | {
        name: [
            NOT_ELIGIBLE if shown.actions[name] is None else int(bool(shown.actions[name])) for shown in page
        ]
        for name in ACTIONS["jobs"]
    }
