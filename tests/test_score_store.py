"""Stores of scores: what is written is read; stale, unfinished and damaged ones are refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jaxsearch.data.score_store import META, ScoreStore, StoreError, StoreMeta, read_scores

WHO = StoreMeta(
    model="m" * 64, kind="ranker", dataset="small", fingerprint="f" * 64,
    columns=("Yes", "No"), queries=5, per_query=0, shard=2,
)  # fmt: skip


def fill(folder: Path, shards: list[int]) -> ScoreStore:
    """Query q has document 10 + q, scored q and q / 2."""
    store = ScoreStore(folder, WHO)
    for shard in shards:
        query = np.arange(2 * shard, min(2 * shard + 2, 5))
        store.write(shard, query, 10 + query, np.stack([query, query / 2], axis=1))
    return store


def test_written_scores_are_read(tmp_path: Path) -> None:
    store = fill(tmp_path / "a" / "b", [0, 2])
    assert WHO.shards == 3
    assert store.missing() == [1]
    fill(tmp_path / "a" / "b", [1])
    assert ScoreStore(tmp_path / "a" / "b", WHO).missing() == []
    meta, found = read_scores(tmp_path / "a" / "b", WHO.fingerprint)
    assert meta == WHO
    assert sorted(found) == [(q, 10 + q) for q in range(5)]
    assert all(found[q, 10 + q].tolist() == [q, q / 2] for q in range(5))
    assert {value.dtype for value in found.values()} == {np.dtype(np.float32)}
    assert not list(tmp_path.rglob("*.tmp"))


def test_unfinished(tmp_path: Path) -> None:
    fill(tmp_path, [0, 2])
    (tmp_path / "scores-00001.tmp").write_bytes(b"half")  # of a job that was stopped
    with pytest.raises(
        StoreError, match=r"unfinished \(shard 1 of 3 is missing\): run the same labelling job again"
    ):
        read_scores(tmp_path, WHO.fingerprint)
    with pytest.raises(
        StoreError, match=r"holds no score store \(store\.json\): make it with `serve.py label`"
    ):
        read_scores(tmp_path / "nowhere", WHO.fingerprint)


def test_stale(tmp_path: Path) -> None:
    fill(tmp_path, [0, 1, 2])
    with pytest.raises(
        StoreError, match=r"fingerprint ffffffffffff, training uses 000000000000: the store is stale"
    ):
        read_scores(tmp_path, "0" * 64)


@pytest.mark.parametrize(
    ("field", "value"),
    [("model", "n"), ("kind", "judge"), ("fingerprint", "g"), ("columns", ("No", "Yes")), ("queries", 6),
     ("per_query", 3), ("shard", 4), ("dataset", "large")],
)  # fmt: skip
def test_a_store_of_something_else_is_not_continued(tmp_path: Path, field: str, value: object) -> None:
    fill(tmp_path, [0])
    with pytest.raises(
        StoreError, match=rf"already holds scores with {field} .* \(not .*\): give another folder"
    ):
        ScoreStore(tmp_path, dataclasses.replace(WHO, **{field: value}))
    assert ScoreStore(tmp_path, WHO).missing() == [1, 2]


@pytest.mark.parametrize(
    "scores",
    [np.zeros((2, 3)), np.zeros((3, 2)), np.zeros(2), np.full((2, 2), np.nan), np.full((2, 2), np.inf)],
)
def test_bad_scores_are_not_written(tmp_path: Path, scores: np.ndarray) -> None:
    store = ScoreStore(tmp_path, WHO)
    with pytest.raises(StoreError, match=r"shard 0 .*expected \[n, 2\]"):
        store.write(0, np.arange(2), np.arange(2), scores)
    assert store.missing() == [0, 1, 2]


@pytest.mark.parametrize(
    "damage", ["cut", "empty", "text", "pickle", "names", "width", "lengths", "nan", "strings"]
)
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    fill(tmp_path, [0, 1, 2])
    path = tmp_path / "scores-00001.npz"
    good = dict(np.load(path))
    bad = {
        "pickle": good | {"scores": np.array([{}, {}], object)},
        "names": {"query": good["query"]},
        "width": good | {"scores": good["scores"][:, :1]},
        "lengths": good | {"query": good["query"][:1]},
        "nan": good | {"scores": good["scores"] * np.float32(np.nan)},
        "strings": good | {"scores": good["scores"].astype(str)},
    }
    if damage in bad:
        np.savez(path, **bad[damage])
    else:
        whole = path.read_bytes()
        path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"scores"}[damage])
    with pytest.raises(
        StoreError, match=r"scores-00001\.npz is damaged .*: delete it and run the labelling job"
    ):
        read_scores(tmp_path, WHO.fingerprint)


@pytest.mark.parametrize("change", [{"shard": 0}, {"queries": -1}, {"columns": None}, {"extra": 1}, None])
def test_damaged_meta(tmp_path: Path, change: dict | None) -> None:
    fill(tmp_path, [0, 1, 2])
    values = json.loads((tmp_path / META).read_text())
    (tmp_path / META).write_text("{" if change is None else json.dumps(values | change))
    for use in (lambda: read_scores(tmp_path, WHO.fingerprint), lambda: ScoreStore(tmp_path, WHO)):
        with pytest.raises(StoreError, match=r"store\.json is damaged"):
            use()


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    for name in ("bundle.json", "a", "b", "c"):
        (tmp_path / name).write_text(name)
    with pytest.raises(
        StoreError, match=r"holds other files \(a, b, bundle\.json, \.\.\.\): give a new folder"
    ):
        ScoreStore(tmp_path, WHO)
    with pytest.raises(StoreError, match=r"bundle\.json is a file: give a new folder"):
        ScoreStore(tmp_path / "bundle.json", WHO)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "bundle.json", "c"]


def test_what_a_stopped_job_left_is_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "store.json.1234.tmp").write_text("{")
    assert ScoreStore(tmp_path, WHO).missing() == [0, 1, 2]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"summariser": "a", "method": "m", "format": 1}, "summaries"),
        ({"encoder": "a", "width": 4}, "embeddings"),
    ],
)
def test_stores_of_another_kind_are_not_damaged(tmp_path: Path, values: dict, kind: str) -> None:
    (tmp_path / META).write_text(json.dumps(values))
    for use in (lambda: read_scores(tmp_path, WHO.fingerprint), lambda: ScoreStore(tmp_path, WHO)):
        with pytest.raises(StoreError, match=rf"is a store of {kind}: give one of `serve\.py label`"):
            use()
