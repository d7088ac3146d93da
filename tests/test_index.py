"""The ScaNN index: recall against the exhaustive search, the same index every time, and a folder that can be
moved."""

import json

import numpy as np
import pytest

from jaxsearch.retrieval.exhaustive import ExhaustiveIndex
from jaxsearch.retrieval.index import IndexParams, ScannIndex, recall

BRUTE = IndexParams("brute_force")
TREE = IndexParams.for_corpus(3000, "tree_ah")


def clustered(rows, seed):
    """Unit vectors [rows, 32] around 30 centres of 12 latent dimensions."""
    centres = np.random.default_rng(0).normal(size=(30, 12))
    spread = np.random.default_rng(1).normal(size=(12, 32))
    rng = np.random.default_rng(seed)
    vectors = (centres[rng.integers(0, 30, rows)] + 0.7 * rng.normal(size=(rows, 12))) @ spread
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def documents():
    return clustered(3000, 2)


@pytest.fixture(scope="module")
def queries():
    return clustered(100, 3)


def test_the_layout_follows_from_the_size():
    assert IndexParams.for_corpus(9_999) == BRUTE
    assert IndexParams.for_corpus(10_000) == IndexParams("tree_ah", leaves=100, leaves_to_search=20)
    assert IndexParams.for_corpus(4_000, "tree_ah") == IndexParams("tree_ah", leaves=63, leaves_to_search=13)
    assert IndexParams.for_corpus(1, "tree_ah").leaves == 1


def test_brute_force_equals_the_exhaustive_search(documents, queries):
    found = ScannIndex.build(documents).search(queries, 50)
    truth = ExhaustiveIndex(documents).search(queries, 50)
    np.testing.assert_allclose(found[1], truth[1], atol=1e-5)
    assert recall(found[0], truth[0]) > 0.999


@pytest.mark.parametrize(("k", "least"), [(10, 0.97), (100, 0.94)])
def test_the_tree_reaches_its_recall(documents, queries, k, least):
    ids, scores = ScannIndex.build(documents, TREE).search(queries, k)
    truth = ExhaustiveIndex(documents).search(queries, k)
    assert recall(ids, truth[0]) >= least
    # Scores are exact (reordered), best first.
    np.testing.assert_allclose(scores, (documents[ids] @ queries[:, :, None])[..., 0], atol=1e-5)
    assert (np.diff(scores, axis=1) <= 0).all()


def test_searching_more_leaves_finds_more(documents, queries):
    truth, _ = ExhaustiveIndex(documents).search(queries, 20)
    few, all_ = (
        recall(ScannIndex.build(documents, IndexParams("tree_ah", 55, n)).search(queries, 20)[0], truth)
        for n in (1, 55)
    )
    assert few < 0.9 < 0.99 < all_


@pytest.mark.parametrize("params", [BRUTE, TREE])
def test_the_same_embeddings_give_the_same_index(documents, queries, params):
    first, *others = (ScannIndex.build(documents, params, threads=n).search(queries, 40) for n in (1, 1, 2))
    for other in others:
        np.testing.assert_array_equal(first[0], other[0])
        np.testing.assert_array_equal(first[1], other[1])


@pytest.mark.parametrize(
    ("size", "params"),
    [(1, BRUTE), (5, BRUTE), (16, IndexParams("tree_ah", 1, 1)), (40, IndexParams("tree_ah", 9, 1))],
)
def test_asking_for_more_than_there_is_leaves_empty_places(documents, queries, params, size):
    ids, scores = ScannIndex.build(documents[:size], params).search(queries[:4], 60)
    assert ids.shape == scores.shape == (4, 60)
    assert (ids[:, size:] == -1).all()
    np.testing.assert_array_equal(ids == -1, scores == -np.inf)
    for row in ids:
        found = row[row >= 0]
        assert len(set(found)) == len(found) >= 1
        assert found.max() < size


def test_a_large_k_searches_enough_leaves(documents, queries):
    ids, _ = ScannIndex.build(documents, IndexParams("tree_ah", 55, 1)).search(queries, 1000)
    assert (ids >= 0).mean() > 0.99


def test_equal_scores_keep_the_order_of_the_documents():
    rows = np.repeat(np.eye(4, dtype=np.float32), 5, axis=0)
    ids, _ = ScannIndex.build(rows).search(np.eye(4, dtype=np.float32), 5)
    assert ids.tolist() == np.arange(20).reshape(4, 5).tolist()


@pytest.mark.parametrize("params", [BRUTE, TREE])
def test_a_saved_index_may_be_moved(documents, queries, params, tmp_path, monkeypatch):
    index = ScannIndex.build(documents, params)
    index.save(tmp_path / "a" / "index")
    index.save(tmp_path / "a" / "index")  # replaces
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    loaded = ScannIndex.load("b/index")
    assert (loaded.params, len(loaded), loaded.dims) == (params, 3000, 32)
    for mine, theirs in zip(index.search(queries, 30), loaded.search(queries, 30), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    named = b"".join(path.read_bytes() for path in (tmp_path / "b" / "index").iterdir())
    assert str(tmp_path).encode() not in named


@pytest.fixture
def saved(documents, tmp_path):
    ScannIndex.build(documents[:200]).save(tmp_path / "index")
    return tmp_path / "index"


def test_damaged_folders_are_refused(saved):
    dataset = saved / "dataset.npy"
    whole = dataset.read_bytes()
    dataset.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"dataset.npy: \d+ bytes where the index has"):
        ScannIndex.load(saved)
    dataset.unlink()
    with pytest.raises(ValueError, match=r"dataset\.npy: no bytes where"):
        ScannIndex.load(saved)


def test_pickles_are_never_read(saved):
    (saved / "scann_docids.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ValueError, match=r"scann_docids\.pkl"):
        ScannIndex.load(saved)
    settings = json.loads((saved / "index.json").read_text())
    settings["files"]["scann_docids.pkl"] = (saved / "scann_docids.pkl").stat().st_size
    (saved / "index.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"scann_docids\.pkl"):
        ScannIndex.load(saved)


def test_files_outside_the_folder_are_never_read(saved):
    assets = saved / "scann_assets.pbtxt"
    assets.write_text(assets.read_text().replace("dataset.npy", "/dev/zero.."))
    with pytest.raises(ValueError, match=r"refers to '/dev/zero\.\.'"):
        ScannIndex.load(saved)


def test_no_queries_give_no_rows(documents):
    ids, scores = ScannIndex.build(documents[:10]).search(np.zeros((0, 32), np.float32), 3)
    assert ids.shape == scores.shape == (0, 3)


def test_bad_embeddings_are_named(documents, queries):
    broken = documents[:10].copy()
    broken[7, 3] = np.nan
    with pytest.raises(ValueError, match="document embeddings: row 7 holds NaN"):
        ScannIndex.build(broken)
    with pytest.raises(ValueError, match="document embeddings: row 0 has length 2; divide"):
        ScannIndex.build(documents[:10] * 2)
    with pytest.raises(ValueError, match="document embeddings are empty"):
        ScannIndex.build(documents[:0])
    with pytest.raises(ValueError, match="document embeddings: row 0 has length 0"):
        ScannIndex.build(np.zeros((3, 4)))
    index = ScannIndex.build(documents[:10])
    with pytest.raises(ValueError, match="query embeddings: row 1 has length 3"):
        index.search(queries[:2] * [[1], [3]], 1)
    with pytest.raises(ValueError, match=r"query embeddings have shape \(1, 16\): give \[rows, 32\]"):
        index.search(queries[:1, :16], 1)


def test_bad_layouts_are_named(documents):
    with pytest.raises(ValueError, match=r"IndexParams\.kind is 'hnsw'"):
        IndexParams("hnsw")
    with pytest.raises(ValueError, match="leaves_to_search is 5"):
        IndexParams("tree_ah", 4, 5)
    with pytest.raises(ValueError, match="leaves is 55: use at most the 20 documents"):
        ScannIndex.build(documents[:20], TREE)
    with pytest.raises(ValueError, match="kind is 'tree_ah': it needs at least 16 documents, not 15"):
        ScannIndex.build(documents[:15], IndexParams("tree_ah", 1, 1))


def test_recall_counts_only_what_is_there():
    truth = np.array([[1, 2, 3], [4, -1, -1], [-1, -1, -1]])
    found = np.array([[3, 9, 1], [-1, 5, 4], [7, -1, -1]])
    assert recall(found, truth) == pytest.approx((2 / 3 + 1) / 2)
    assert np.isnan(recall(found[2:], truth[2:]))
    with pytest.raises(ValueError, match="found has 2 rows and truth 3"):
        recall(found[:2], truth)
