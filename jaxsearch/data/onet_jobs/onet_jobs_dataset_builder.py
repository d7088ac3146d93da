"""The TFDS builder, one config a table: `onet_jobs/documents`, `onet_jobs/queries`, `onet_jobs/judgments`.

`load_tables` builds what is missing. By hand, after importing this module:
`tfds.builder("onet_jobs/queries", file_format="array_record").download_and_prepare(download_config=...)` with
`manual_dir` in the config. Neither needs TensorFlow (the command `tfds build` does, as of TFDS 4.9.10).
"""

import os
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from jaxsearch.data.builder import ChunkedBuilder, Row
from jaxsearch.data.onet_jobs.release import Occupation, read_release
from jaxsearch.data.onet_jobs.selection import (
    SPLITS,
    TitleQuery,
    held_out_split,
    query_grades,
    select_queries,
    technologies_shown,
)

TABLES = ("documents", "queries", "judgments")
DOCUMENT_SPLIT = "corpus"


def _features(table: str) -> tfds.features.FeaturesDict:
    text = tfds.features.Text
    if table == "documents":
        return tfds.features.FeaturesDict(
            {
                "id": text(),
                "title": text(),
                "description": text(),
                "tasks": tfds.features.Sequence(text()),
                "technologies": tfds.features.Sequence(text()),
                "major_group": text(),
                "job_zone": np.int32,
                "held_out": np.bool_,
            }
        )
    if table == "queries":
        return tfds.features.FeaturesDict({"id": text(), "text": text()})
    return tfds.features.FeaturesDict(
        {
            "query_id": text(),
            "document_ids": tfds.features.Sequence(text()),
            "grades": tfds.features.Sequence(np.int32),
        }
    )


class Builder(ChunkedBuilder):
    """Occupations as documents, alternate titles as queries, graded 4/3/2/1/0 by O*NET's own relations.

    A judgment row lists the documents of one query whose grade is not 0: anything not listed is grade 0.
    `info.metadata` holds the hashes of the release files and how many titles were left out for which reason.
    """

    VERSION = tfds.core.Version("1.0.0")  # raise it with any change to selection.py: built tables are reused
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Download the text release of the O*NET database from its resource centre, unpack it, and pass the "
        "folder that holds 'Occupation Data.txt' as manual_dir, or set ONET_DIR to it."
    )
    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        tfds.core.BuilderConfig(
            name="documents", description="Occupations that have tasks; one split, `corpus`."
        ),
        tfds.core.BuilderConfig(name="queries", description="Alternate titles, by split."),
        tfds.core.BuilderConfig(
            name="judgments", description="The documents of each query that are not grade 0, by split."
        ),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=_features(self.builder_config.name),
            homepage="https://www.onetcenter.org/database.html",
            license="CC BY 4.0, attribution required",
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        """Which titles are queries hangs on all titles together and is found out here; rows may then be made by workers of Beam."""
        release = read_release(_release_folder(dl_manager))
        selection = select_queries(release)
        documents = {item.code: item for item in release.occupations if item.tasks}
        self.info.metadata.update(
            files=dict(release.sha256),
            documents=len(documents),
            titles=len(release.alternate_titles),
            queries={split: sum(query.split == split for query in selection.queries) for split in SPLITS},
            left_out=dict(selection.left_out),
        )
        table = self.builder_config.name
        if table == "documents":
            return {DOCUMENT_SPLIT: self._generate_examples(_document_row, list(documents.values()))}
        row = _query_row if table == "queries" else partial(_judgment_row, documents=documents)
        return {
            split: self._generate_examples(
                row, [query for query in selection.queries if query.split == split]
            )
            for split in SPLITS
        }


def _release_folder(dl_manager: tfds.download.DownloadManager) -> Any:
    """The manual_dir that was given, else `ONET_DIR`, else TFDS's own complaint with the instructions."""
    try:
        return dl_manager.manual_dir
    except AssertionError:
        if folder := os.environ.get("ONET_DIR"):
            return folder
        raise


def _document_row(item: Occupation) -> Row:
    return {
        "id": item.code,
        "title": item.title,
        "description": item.description,
        "tasks": item.tasks,
        "technologies": technologies_shown(item),
        "major_group": item.code[:2],
        "job_zone": item.job_zone,
        "held_out": held_out_split(item.code) is not None,
    }


def _query_row(query: TitleQuery) -> Row:
    return {"id": query.id, "text": query.text}


def _judgment_row(query: TitleQuery, documents: Mapping[str, Occupation]) -> Row:
    grades = query_grades(query, documents)
    return {"query_id": query.id, "document_ids": list(grades), "grades": list(grades.values())}
