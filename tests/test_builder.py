"""Data sets made by Apache Beam equal those made without it."""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from jaxsearch.data import builder, job_market, onet_jobs
from jaxsearch.data.builder import download_config
from jaxsearch.data.job_market import generator, job_market_dataset_builder, people
from jaxsearch.data.main import main
from jaxsearch.errors import InputError

DUMMY = Path(__file__).parents[1] / "jaxsearch/data/onet_jobs/dummy_data"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small markets in small chunks, none of them kept from another test."""
    jobs = dataclasses.replace(generator.VARIANTS["tiny"], postings=60, searches=30, precedents=5)
    members = dataclasses.replace(people.VARIANTS["tiny"], members=480, searches=30, precedents=5, enough=2)
    monkeypatch.setitem(generator.VARIANTS, "tiny", jobs)
    monkeypatch.setitem(people.VARIANTS, "tiny", members)
    monkeypatch.setattr(builder, "CHUNK", 7)
    job_market_dataset_builder._market.cache_clear()
    yield
    job_market_dataset_builder._market.cache_clear()


def rows(builders: Mapping[str, tfds.core.DatasetBuilder]) -> dict[str, list[dict[str, Any]]]:
    """Every record as it is read, in the order of the files."""
    return {
        f"{table}/{split}": [{name: np.asarray(x).tolist() for name, x in row.items()} for row in source]
        for table, builder in builders.items()
        for split, source in builder.as_data_source().items()
    }


@pytest.mark.parametrize("variant", ["tiny", "tiny_people"])
def test_beam_makes_the_same_market(variant: str, tmp_path: Path) -> None:
    pytest.importorskip("apache_beam")
    plain = rows(job_market.prepare(variant, tmp_path / "plain"))
    job_market_dataset_builder._market.cache_clear()
    made = rows(job_market.prepare(variant, tmp_path / "beam", ["--runner=DirectRunner"]))
    assert len(plain) == 14  # one of documents, five of queries and of judgments, three of impressions
    assert made == plain


def test_beam_makes_the_same_occupations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("apache_beam")
    monkeypatch.delenv("ONET_DIR", raising=False)
    plain = rows(onet_jobs.prepare(tmp_path / "plain", DUMMY))
    made = rows(onet_jobs.prepare(tmp_path / "beam", DUMMY, ["--runner=DirectRunner"]))
    assert len(plain) == 11  # one of documents, five of queries and of judgments
    assert made == plain


def test_beam_is_imported_only_where_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("apache_beam", "apache_beam.options.pipeline_options"):
        monkeypatch.setitem(sys.modules, name, None)  # its import fails from here on
    job_market.load_tables("tiny", tmp_path)
    with pytest.raises(
        InputError, match=r"--runner=DirectRunner.*Apache Beam cannot be imported.*jaxsearch\[beam\]"
    ):
        download_config(["--runner=DirectRunner"])


def test_the_command_prepares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "job_market:tiny", "--data-dir", str(tmp_path)]) == 0
    assert "documents    60 (corpus 60)" in capsys.readouterr().out
    assert list(tmp_path.rglob("*.array_record*"))
    assert main(["prepare", "job_market:huge", "--data-dir", str(tmp_path)]) == 2
    assert "job_market:huge" in capsys.readouterr().err
