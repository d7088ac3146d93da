"""The exhaustive search equals brute force in numpy, with filters, ties and every awkward size."""

import numpy as np
import pytest

from jaxsearch.data.records import Document, Query
from jaxsearch.retrieval.exhaustive import ExhaustiveIndex, filter_mask


def brute_force(documents, queries, k, mask):
    """Best first, equal scores by position; -1 and -inf where fewer are allowed."""
    dots = np.where(mask, queries @ documents.T, -np.inf)
    order = np.argsort(-dots, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(dots, order, axis=1)
    pad = ((0, 0), (0, k - order.shape[1]))
    ids = np.where(scores == -np.inf, -1, order)
    return np.pad(ids, pad, constant_values=-1), np.pad(scores, pad, constant_values=-np.inf)


@pytest.mark.parametrize(
    ("documents", "queries", "k", "block", "query_block"),
    [(1, 1, 1, 8, 8), (7, 3, 20, 4, 2), (100, 5, 10, 100, 8), (257, 9, 40, 64, 4), (300, 2, 7, 5, 16)],
)
def test_equals_brute_force(documents, queries, k, block, query_block):
    # Small whole numbers: dot products are exact and full of ties, so ids must agree to the last one.
    rng = np.random.default_rng(documents)
    rows = rng.integers(-2, 3, (documents, 4)).astype(np.float32)
    asked = rng.integers(-2, 3, (queries, 4)).astype(np.float32)
    index = ExhaustiveIndex(rows, block=block, query_block=query_block)
    for mask in (None, rng.random((queries, documents)) < 0.3, rng.random(documents) < 0.5):
        found = index.search(asked, k, mask=mask)
        wanted = brute_force(rows, asked, k, True if mask is None else mask)
        np.testing.assert_array_equal(found[0], wanted[0])
        np.testing.assert_array_equal(found[1], wanted[1])
        assert found[0].dtype == np.int32
        assert found[1].dtype == np.float32


def test_scores_are_exact_for_unit_vectors():
    rng = np.random.default_rng(0)
    rows, asked = rng.normal(size=(500, 64)), rng.normal(size=(20, 64))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    ids, scores = ExhaustiveIndex(rows, block=128).search(asked, 50)
    wanted_ids, wanted = brute_force(rows, asked, 50, True)
    np.testing.assert_allclose(scores, wanted, atol=1e-6)
    np.testing.assert_array_equal(ids, wanted_ids)


def test_a_mask_that_allows_nothing_finds_nothing():
    ids, scores = ExhaustiveIndex(np.eye(3)).search(np.eye(3), 2, mask=np.zeros((3, 3), bool))
    assert (ids == -1).all()
    assert (scores == -np.inf).all()


def test_allowed_documents_with_negative_scores_are_found():
    rows = np.array([[1.0, 0], [-1, 0]])
    ids, scores = ExhaustiveIndex(rows).search(np.array([[1.0, 0]]), 2, mask=np.array([False, True]))
    assert ids.tolist() == [[1, -1]]
    assert scores.tolist() == [[-1, -np.inf]]


def test_no_queries_give_no_rows():
    ids, scores = ExhaustiveIndex(np.eye(3)).search(np.zeros((0, 3)), 2)
    assert ids.shape == scores.shape == (0, 2)


def test_bad_arguments_are_named():
    index = ExhaustiveIndex(np.eye(3))
    with pytest.raises(ValueError, match="document embeddings are empty"):
        ExhaustiveIndex(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="document embeddings: row 1 holds NaN"):
        ExhaustiveIndex(np.array([[1, 0], [np.nan, 1]]))
    with pytest.raises(ValueError, match=r"query embeddings have shape \(2,\): give \[rows, 3\]"):
        index.search(np.zeros(2), 1)
    with pytest.raises(ValueError, match="query embeddings: row 0 holds NaN or infinite"):
        index.search(np.full((1, 3), np.inf), 1)
    with pytest.raises(ValueError, match=r"mask has shape \(2,\): give \(1, 3\) or \(3,\)"):
        index.search(np.eye(3)[:1], 1, mask=np.ones(2, bool))
    with pytest.raises(ValueError, match="k is 0"):
        index.search(np.eye(3), 0)


def posting(number, **attributes):
    return Document(f"d{number}", {"title": "Nurse"}, attributes=attributes)


def test_filter_mask_requires_every_filter():
    documents = [
        posting(0, workplace="remote", city="Reno"),
        posting(1, workplace="onsite", city="Reno"),
        posting(2, workplace="remote"),
    ]
    queries = [
        Query("a", "nurse"),
        Query("b", "nurse", filters={"workplace": "remote"}),
        Query("c", "nurse", filters={"workplace": "remote", "city": "Reno"}),
        Query("d", "nurse", filters={"workplace": "on the moon"}),
    ]
    wanted = [[True, True, True], [True, False, True], [True, False, False], [False, False, False]]
    assert filter_mask(queries, documents).tolist() == wanted


def test_a_filter_on_an_unknown_attribute_is_refused():
    with pytest.raises(ValueError, match=r"Query.filters\['town'\].*known are \['city'\]"):
        filter_mask([Query("a", "nurse", filters={"town": "Reno"})], [posting(0, city="Reno")])
