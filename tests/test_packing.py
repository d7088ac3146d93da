import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsearch.scoring.packing import assign_rows, pack_items

T = 9
ITEMS = st.lists(
    st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=T), max_size=7), min_size=1, max_size=4
)


def unpack(packed):
    """The items read back: (query, row, segment) -> tokens in order of their offsets."""
    found = {}
    for query, row, column in np.argwhere(packed.segments > 0):
        item = found.setdefault((query, row, packed.segments[query, row, column]), {})
        item[packed.offsets[query, row, column]] = packed.tokens[query, row, column]
    return {key: [int(item[i]) for i in range(len(item))] for key, item in found.items()}


@settings(max_examples=100, deadline=None)
@given(ITEMS, st.booleans())
def test_every_item_is_there_once_and_whole(items, one_per_row):
    packed = pack_items(items, row_length=T, one_per_row=one_per_row)
    found = unpack(packed)
    assert packed.where.sum() == len(found) == sum(map(len, items))
    for q, query in enumerate(items):
        for slot, tokens in enumerate(query):
            assert packed.where[q, slot]
            row, column = packed.last[q, slot]
            segment = packed.segments[q, row, column]
            assert found[q, row, segment] == tokens
            assert packed.offsets[q, row, column] == len(tokens) - 1
            assert not one_per_row or (row, segment) == (slot, 1)
    assert all(a.dtype == np.int32 for a in packed[:4])
    assert packed.where.dtype == bool
    # An item's tokens stand together, in order.
    step = np.diff(packed.offsets, axis=2)
    inside = (np.diff(packed.segments, axis=2) == 0) & (packed.segments[:, :, 1:] > 0)
    assert np.all(step[inside] == 1)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, T), min_size=1, max_size=30), st.data())
def test_rows_hold_their_items_and_split_cleanly(lengths, data):
    rows, columns = assign_rows(lengths, T)
    sizes = np.array(lengths)
    for row in range(rows.max() + 1):
        inside = np.flatnonzero(rows == row)
        order = inside[np.argsort(columns[inside])]
        assert np.array_equal(columns[order], np.cumsum(sizes[order]) - sizes[order])
        assert sizes[inside].sum() <= T
    chosen = data.draw(st.sets(st.integers(0, int(rows.max())), min_size=1))
    alone, _ = assign_rows(sizes[np.isin(rows, list(chosen))], T)
    assert alone.max() + 1 == len(chosen)


def test_first_fit_decreasing_by_hand():
    packed = pack_items([[[1, 1], [2] * 5, [3] * 3, [4] * 6]], row_length=8)
    np.testing.assert_array_equal(packed.tokens[0], [[4, 4, 4, 4, 4, 4, 1, 1], [2, 2, 2, 2, 2, 3, 3, 3]])
    np.testing.assert_array_equal(packed.segments[0], [[1, 1, 1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 1, 2, 2, 2]])
    np.testing.assert_array_equal(packed.last[0], [[0, 7], [1, 4], [1, 7], [0, 5]])


def test_given_sizes_pad_and_padding_is_empty():
    packed = pack_items([[[5, 6]], []], row_length=3, rows=2, slots=4)
    assert packed.tokens.shape == (2, 2, 3)
    np.testing.assert_array_equal(packed.where, [[True, False, False, False], [False] * 4])
    np.testing.assert_array_equal(packed.tokens.sum(axis=(1, 2)), [11, 0])
    np.testing.assert_array_equal(packed.segments.sum(axis=(1, 2)), [2, 0])
    assert pack_items([[]], row_length=3).tokens.shape == (1, 1, 3)


def test_arrays_are_as_good_as_lists():
    items = [[[1, 2, 3], [4]], [[5, 6]]]
    arrays = [[np.array(item, np.int64) for item in query] for query in items]
    for one, two in zip(pack_items(items, row_length=4), pack_items(arrays, row_length=4), strict=True):
        np.testing.assert_array_equal(one, two)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"query 1, item 2 has 5 tokens.*row_length=4"):
        pack_items([[[1]], [[1], [1], [1] * 5]], row_length=4)
    with pytest.raises(ValueError, match="query 0, item 1 has 0 tokens"):
        pack_items([[[1], []]], row_length=4)
    with pytest.raises(ValueError, match="rows is 1: these items need 2"):
        pack_items([[[1] * 3, [1] * 3]], row_length=4, rows=1)
    with pytest.raises(ValueError, match="slots is 1: these items need 2"):
        pack_items([[[1], [1]]], row_length=4, slots=1)
