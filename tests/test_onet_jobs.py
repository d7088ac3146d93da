"""The data set `onet_jobs` on invented files in O*NET's format, and on the release that ONET_DIR names."""

import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from jaxsearch.data.onet_jobs import ReleaseError, RerankListError, load_rerank_lists, load_tables
from jaxsearch.data.onet_jobs.release import COLUMNS, read_release
from jaxsearch.data.onet_jobs.rerank_lists import RERANK_SPLITS, save_rerank_lists
from jaxsearch.data.onet_jobs.selection import (
    SPLITS,
    held_out_split,
    normalise,
    readings,
    select_queries,
    title_key,
)
from jaxsearch.data.onet_jobs.tables import Tables

DUMMY = Path(__file__).parents[1] / "jaxsearch/data/onet_jobs/dummy_data"
HELD_OUT = {"90-1667.00": "test_unseen", "90-2888.00": "test_unseen", "91-1334.00": "dev_unseen"}
COUNTS = {"train": 60, "dev": 8, "test_seen": 9, "dev_unseen": 8, "test_unseen": 17}


@pytest.fixture(scope="module", autouse=True)
def _no_release_from_outside():
    """What the environment names must not leak into the tests on invented data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ONET_DIR", raising=False)
        yield


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="module")
def tables(data_dir) -> Tables:
    return load_tables(data_dir, DUMMY)


@pytest.fixture
def release(tmp_path) -> Path:
    """A copy of the invented release, to be damaged."""
    return Path(shutil.copytree(DUMMY, tmp_path / "release"))


def edit(folder: Path, name: str, change) -> None:
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


def query_id(tables: Tables, text: str) -> str:
    return next(query.id for queries in tables.queries.values() for query in queries if query.text == text)


# Titles


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("Load-Out Supervisor", "Load Out Supervisors"),
        ("General Manager (GM)", "general managers"),
        ("Driver's Helper", "Drivers Helper"),
        ("Secretaries", "Secretary"),
        ("Salesmen", "Salesman"),
        ("Dispatches", "Dispatch"),
    ],
)
def test_spellings_of_one_title_share_a_key(left, right):
    assert title_key(left) == title_key(right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("C++ Developer", "C Developer"),
        ("C# Developer", "C++ Developer"),
        ("Boss", "Bos"),
        ("Gas Fitter", "Gasket"),
    ],
)
def test_different_titles_keep_different_keys(left, right):
    assert title_key(left) != title_key(right)


def test_readings_of_a_title_with_an_acronym():
    assert readings("Chief Honey Officer (CHO)") == {"chief honey officer cho", "chief honey officer", "cho"}
    assert title_key("(Retired)") == "retired"
    assert normalise("Policies & Buses: Ladies' Gas") == "policy & buse lady gas".replace("& ", "")


def test_left_out_titles_are_counted_by_reason():
    found = select_queries(read_release(DUMMY))
    assert found.left_out == {
        "several_occupations": 2,  # Apprentice, Apprentices
        "occupation_title": 2,  # Cloud Gardener; Lantern Keepers under another occupation
        "no_document": 1,  # Daydream Consultant
        "stands_in_document": 1,  # Wick Trimmer, which is in a task
        "other_spelling": 2,  # Sky-Hedge Trimmer, Gorge Mail Flyer (GMF)
    }
    texts = {query.text for query in found.queries}
    assert not texts & {
        "Apprentice",
        "Cloud Gardener",
        "Lantern Keepers",
        "Daydream Consultant",
        "Wick Trimmer",
    }
    assert "Chief Honey Officer (CHO)" in texts
    assert len({"Sky Hedge Trimmer", "Sky-Hedge Trimmer"} & texts) == 1


def test_a_reading_in_the_document_is_enough_to_leave_a_title_out(release):
    edit(
        release,
        "Alternate Titles.txt",
        lambda raw: raw + b"90-1112.00\tWick Trimmers (Flame Carer)\tn/a\t08\n",
    )
    assert select_queries(read_release(release)).left_out["stands_in_document"] == 2


def test_a_phrase_does_not_run_from_one_sentence_into_the_next(release):
    # "...on a fixed round." is followed by "Polish the glass...".
    edit(release, "Alternate Titles.txt", lambda raw: raw + b"90-1112.00\tRound Polish\tn/a\t08\n")
    assert select_queries(read_release(release)).left_out["stands_in_document"] == 1


# Tables through TFDS


def test_every_title_is_a_query_or_counted(tables):
    counts = {split: len(queries) for split, queries in tables.queries.items()}
    assert counts == COUNTS == tables.metadata["queries"]
    assert (
        tables.metadata["titles"] == sum(counts.values()) + sum(tables.metadata["left_out"].values()) == 110
    )


def test_documents_are_the_occupations_with_tasks(tables):
    documents = {document.id: document for document in tables.documents}
    assert len(documents) == 12
    assert "90-2999.00" not in documents
    assert [document.id for document in tables.documents] == sorted(documents)
    gardeners = documents["90-1001.00"]
    assert list(gardeners.fields) == ["title", "description", "tasks", "technologies"]
    assert gardeners.fields["title"] == "Cloud Gardeners"
    assert gardeners.fields["tasks"].count(".") == 3
    assert gardeners.fields["technologies"] == "Rainbook planting planner, Trellis Three, HedgeCAD"
    assert gardeners.attributes == {"major_group": "90"}
    assert gardeners.numeric == {"job_zone": 2.0}


def test_grades_follow_the_tiers(tables):
    # Keepers (90-1112.00) are row 1 of the ring of twelve: relatives 1, 3, 5, 7 and 8 places on.
    grades = tables.grades[query_id(tables, "Jigsaw Tester")]  # 90-1667.00, place 6
    assert grades == {
        "90-1667.00": 4,
        "90-1778.00": 3,
        "90-2000.00": 2,
        "90-2888.00": 2,
        "90-1112.00": 1,
        "90-1223.00": 1,
    }
    assert tables.occupation(query_id(tables, "Jigsaw Tester")) == "90-1667.00"


def test_held_out_occupations_never_occur_in_training(tables):
    assert tables.held_out == set(HELD_OUT)
    assert {document.id for document in tables.training_documents} == {d.id for d in tables.documents} - set(
        HELD_OUT
    )
    for query in tables.queries["train"]:
        assert not tables.held_out & tables.grades[query.id].keys()
    for split in SPLITS:
        owners = {tables.occupation(query.id) for query in tables.queries[split]}
        expected = {code for code, held in HELD_OUT.items() if held == split}
        assert owners == expected if expected else not owners & tables.held_out


def test_evaluation_queries_keep_held_out_relatives(tables):
    listed = {code for query in tables.queries["test_seen"] for code in tables.grades[query.id]}
    assert listed & tables.held_out


def test_no_title_is_in_two_splits(tables):
    keys = Counter(title_key(query.text) for queries in tables.queries.values() for query in queries)
    assert max(keys.values()) == 1


def test_the_order_of_rows_does_not_move_a_query(tables, release):
    edit(
        release,
        "Alternate Titles.txt",
        lambda raw: b"\n".join([(lines := raw.split(b"\n"))[0], *lines[-2:0:-1], b""]),
    )
    splits = {query.id: query.split for query in select_queries(read_release(release)).queries}
    assert splits == {query.id: split for split, queries in tables.queries.items() for query in queries}


def test_tfds_finds_the_builder_by_name_and_reads_bytes(tables, data_dir):
    builder = tfds.builder("onet_jobs/judgments", data_dir=data_dir, file_format="array_record")
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == COUNTS
    assert "Anything not listed".lower() in builder.info.description.lower()
    assert "USDOL/ETA" in builder.info.description
    assert "CC BY 4.0" in builder.info.citation
    row = builder.as_data_source("dev")[0]
    assert isinstance(row["query_id"], bytes)
    assert max(row["grades"]) == 4
    assert min(row["grades"]) >= 1
    corpus = tfds.builder("onet_jobs/documents", data_dir=data_dir, file_format="array_record")
    assert len(corpus.as_data_source("corpus")) == 12


def test_built_tables_need_no_release(tables, data_dir):
    again = load_tables(data_dir)
    assert again.documents == tables.documents
    assert again.grades == tables.grades


def test_release_from_the_environment(tmp_path, monkeypatch, tables):
    monkeypatch.setenv("ONET_DIR", str(DUMMY))
    assert load_tables(tmp_path).queries == tables.queries
    builder = tfds.builder("onet_jobs/queries", data_dir=tmp_path / "bare", file_format="array_record")
    builder.download_and_prepare()
    assert builder.info.splits["train"].num_examples == COUNTS["train"]


def test_without_a_release_the_way_to_get_one_is_named(tmp_path):
    with pytest.raises(ReleaseError, match="ONET_DIR"):
        load_tables(tmp_path)
    builder = tfds.builder("onet_jobs/queries", data_dir=tmp_path, file_format="array_record")
    with pytest.raises(AssertionError, match=r"Occupation Data\.txt"):
        builder.download_and_prepare()


def test_tables_of_another_release_are_refused(data_dir, tables, release):
    edit(release, "Job Zones.txt", lambda raw: raw.replace(b"\t5\t", b"\t4\t"))
    with pytest.raises(ReleaseError, match=r"another Job Zones\.txt than .*delete"):
        load_tables(data_dir, release)


# Reading the release


def test_missing_files_are_all_named(release):
    (release / "Job Zones.txt").unlink()
    (release / "Task Statements.txt").unlink()
    with pytest.raises(ReleaseError, match=r"lacks Task Statements\.txt, Job Zones\.txt"):
        load_tables(release / "out", release)


def test_missing_columns_are_named(release):
    edit(release, "Task Statements.txt", lambda raw: raw.replace(b"\tTask\t", b"\tDuty\t", 1))
    edit(release, "Job Zones.txt", lambda raw: raw.replace(b"O*NET-SOC Code\tJob Zone", b"Code\tZone", 1))
    with pytest.raises(ReleaseError) as error:
        read_release(release)
    assert "Task Statements.txt:1: column Task is missing; there are O*NET-SOC Code, Task ID, Duty" in str(
        error.value
    )
    assert "Job Zones.txt:1: column O*NET-SOC Code, Job Zone is missing" in str(error.value)
    assert "2 problems" in str(error.value)


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_added_at_the_end_carriage_returns_and_a_mark_are_accepted(release, name):
    def later(raw: bytes) -> bytes:
        header, *rows = raw.rstrip(b"\n").split(b"\n")
        return b"\xef\xbb\xbf" + b"".join(
            line + b"\r\n" for line in [header + b"\tNew", *(row + b"\tx" for row in rows)]
        )

    edit(release, name, later)
    assert read_release(release).occupations == read_release(DUMMY).occupations


def test_quotes_are_plain_characters(release):
    edit(release, "Task Statements.txt", lambda raw: raw.replace(b"Scare off storm", b'"Scare" off "storm'))
    tasks = read_release(release).occupations[0].tasks
    assert tasks[2].startswith('"Scare" off "storm')
    assert len(tasks) == 3


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (
            "Job Zones.txt",
            b"90-1112.00\t1\t",
            b"90-1112.00\t7\t",
            r"Job Zones\.txt:3: Job Zone is '7', not 1 to 5",
        ),
        (
            "Alternate Titles.txt",
            b"\tApprentice\t",
            b"\t \t",
            r"Alternate Titles\.txt:\d+: Alternate Title is empty",
        ),
        (
            "Task Statements.txt",
            b"90-1001.00\t1\t",
            b"90-1001\t1\t",
            r"Statements\.txt:2: .* not like 15-1252\.00",
        ),
        (
            "Task Statements.txt",
            b"90-1001.00\t1\t",
            b"99-0000.00\t1\t",
            r":2: occupation 99-0000\.00 is not in Occ",
        ),
        (
            "Technology Skills.txt",
            b"90-1001.00\tTrellis",
            b"90-1001.00 Trellis",
            r":3: 5 cells where the header has 6",
        ),
        (
            "Related Occupations.txt",
            b"Primary-Long",
            b"Primary-Wide",
            r":3: Relatedness Tier is 'Primary-Wide'",
        ),
        (
            "Related Occupations.txt",
            b"90-1001.00\t90-1112",
            b"90-1001.00\t90-9999",
            r":2: related occupation '90-9999",
        ),
        (
            "Related Occupations.txt",
            b"90-1001.00\t90-1334",
            b"90-1001.00\t90-1112",
            r":3: the relation .* occurs twice",
        ),
        (
            "Occupation Data.txt",
            b"90-1112.00",
            b"90-1001.00",
            r"Occupation Data\.txt:3: occupation 90-1001\.00 .*twice",
        ),
        (
            "Occupation Data.txt",
            b"Keep the street",
            b"Keep \xff street",
            r"Occupation Data\.txt:3: not UTF-8",
        ),
        (
            "Occupation Data.txt",
            b"O*NET-SOC",
            b"\nO*NET-SOC",
            r"Occupation Data\.txt:1: column .* is missing",
        ),
    ],
)
def test_bad_rows_are_reported_by_file_and_line(release, tmp_path, name, old, new, message):
    edit(release, name, lambda raw: raw.replace(old, new, 1))
    with pytest.raises(ReleaseError, match=message):
        load_tables(tmp_path / "out", release)
    with pytest.raises(ReleaseError, match="no release is named"):
        load_tables(tmp_path / "out")  # nothing half-built was left behind


def test_many_bad_rows_are_counted_and_ten_are_shown(release):
    edit(release, "Job Zones.txt", lambda raw: raw.replace(b"01/2020", b"01/2020\tmore"))
    with pytest.raises(ReleaseError, match=r"12 problems \(12 in Job Zones\.txt\)") as error:
        read_release(release)
    assert str(error.value).count("cells where") == 10


# Rerank lists


@pytest.fixture
def lists(tables, tmp_path) -> Path:
    rng = np.random.default_rng(0)
    made = {split: rng.random((len(tables.queries[split]), 12)) < 0.5 for split in RERANK_SPLITS}
    made["dev"][0] = [True] + 10 * [False] + [True]
    save_rerank_lists(
        tmp_path / "lists", tables, made, {"rule": "random"}, {split: {"ceiling": 1.0} for split in made}
    )
    return tmp_path / "lists"


def test_rerank_lists_come_back(tables, lists):
    loaded = load_rerank_lists(tables, lists)
    assert len(loaded) == sum(COUNTS.values()) - COUNTS["train"]
    assert loaded[tables.queries["dev"][0].id].tolist() == [0, 11]
    assert all(rows.dtype == np.int32 and rows.max(initial=0) < 12 for rows in loaded.values())
    assert sorted(file.name for file in lists.iterdir()) == ["lists.json", "lists.npz"]


def test_lists_of_another_shape_are_not_saved(tables, tmp_path):
    made = {split: np.zeros((len(tables.queries[split]), 11), bool) for split in RERANK_SPLITS}
    with pytest.raises(RerankListError, match=r"dev have shape \(8, 11\); these tables need \(8, 12\)"):
        save_rerank_lists(tmp_path, tables, made, {}, {split: {} for split in made})


def test_lists_refuse_other_documents_and_queries_by_name(lists, release, tmp_path):
    edit(release, "Occupation Data.txt", lambda raw: raw.replace(b"old harbours", b"new harbours"))
    edit(release, "Alternate Titles.txt", lambda raw: raw.replace(b"Jigsaw Tester", b"Jigsaw Taster"))
    with pytest.raises(RerankListError) as error:
        load_rerank_lists(load_tables(tmp_path / "out", release), lists)
    message = str(error.value)
    assert "documents' hash is" in message
    assert "test_unseen queries' hash is" in message
    assert "number of" not in message
    assert "dev queries" not in message
    assert "lists' hash" not in message


def test_damaged_lists_are_refused(tables, lists, tmp_path):
    report = json.loads((lists / "lists.json").read_text())
    report["splits"]["dev"]["lists_sha256"] = 64 * "0"
    (lists / "lists.json").write_text(json.dumps(report))
    with pytest.raises(RerankListError, match=r"dev lists' hash is .*, the lists say 000000000000"):
        load_rerank_lists(tables, lists)
    del report["splits"]["dev"]
    (lists / "lists.json").write_text(json.dumps(report))
    with pytest.raises(RerankListError, match=r"cannot be read.*dev"):
        load_rerank_lists(tables, lists)
    (lists / "lists.npz").write_bytes((lists / "lists.npz").read_bytes()[:100])
    with pytest.raises(RerankListError, match="cannot be read"):
        load_rerank_lists(tables, lists)
    with pytest.raises(RerankListError, match="cannot be read"):
        load_rerank_lists(tables, tmp_path / "nowhere")


def test_the_lists_of_the_project_belong_to_no_invented_release(tables):
    with pytest.raises(RerankListError, match=r"number of documents is 12, the lists say 923"):
        load_rerank_lists(tables)


# The real release

REAL = os.environ.get("ONET_DIR")


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Tables:
    if not REAL:
        pytest.skip("ONET_DIR is not set")
    return load_tables(tmp_path_factory.mktemp("real"), REAL)


def test_real_release(real):
    assert len(real.documents) == 923
    assert len(real.held_out) / 923 == pytest.approx(0.13, abs=0.03)
    kept = sum(len(queries) for queries in real.queries.values())
    assert kept == real.metadata["titles"] - sum(real.metadata["left_out"].values())
    assert all(held_out_split(code) for code in real.held_out)
    held = [real.held_out & real.grades[query.id].keys() for query in real.queries["train"]]
    assert not any(held)
    for split in ("dev_unseen", "test_unseen"):
        owners = Counter(real.occupation(query.id) for query in real.queries[split])
        assert owners.keys() <= real.held_out
        assert max(owners.values()) < 0.125 * sum(owners.values())


def test_real_titles_do_not_stand_in_their_documents(real):
    texts = {document.id: "\n".join(document.fields.values()) for document in real.documents}
    for queries in real.queries.values():
        for query in queries:
            text = texts[real.occupation(query.id)]
            assert not re.search(rf"(?<!\w){re.escape(query.text)}(?!\w)", text, re.IGNORECASE), query


def test_real_rerank_lists(real):
    lists = load_rerank_lists(real)
    assert lists.keys() == {query.id for split in RERANK_SPLITS for query in real.queries[split]}
    lengths = [len(rows) for rows in lists.values()]
    assert min(lengths) >= 50
    assert max(lengths) <= 100
