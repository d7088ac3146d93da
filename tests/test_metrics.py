import doctest
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import ndcg_score

from jaxsearch import metrics

LISTS = st.tuples(st.integers(1, 4), st.integers(2, 12))


@st.composite
def rankings(draw):
    """Distinct scores, grades and a mask, each [Q, L]."""
    shape = draw(LISTS)
    order = draw(st.permutations(range(shape[0] * shape[1])))
    scores = np.reshape(order, shape) / 7.0 - 3.0
    grades = draw(hnp.arrays(np.int64, shape, elements=st.integers(0, 4)))
    where = draw(hnp.arrays(np.bool_, shape))
    return scores, grades, where


@settings(max_examples=100, deadline=None)
@given(rankings(), st.integers(1, 14))
def test_linear_ndcg_equals_scikit_learn(ranking, k):
    scores, grades, where = ranking
    ours = metrics.ndcg(scores, grades, where=where, k=k, gain="linear")
    for value, s, g, w in zip(ours, scores, grades, where, strict=True):
        if not g[w].any():
            assert np.isnan(value)
        elif w.sum() == 1:  # scikit-learn refuses a single document
            assert value == 1
        else:
            assert value == pytest.approx(ndcg_score([g[w]], [s[w]], k=k), abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(rankings(), st.integers(1, 14))
def test_exponential_ndcg_is_linear_ndcg_of_the_gains(ranking, k):
    scores, grades, where = ranking
    np.testing.assert_allclose(
        metrics.ndcg(scores, grades, where=where, k=k, gain="exponential"),
        metrics.ndcg(scores, 2.0**grades - 1, where=where, k=k, gain="linear"),
        atol=1e-12,
    )


METRICS = {
    "ndcg": lambda s, g, w: metrics.ndcg(s, g, where=w, k=3),
    "precision": lambda s, g, w: metrics.precision_at_k(s, g, where=w, k=3),
    "poor": lambda s, g, w: metrics.poor_match_rate_at_k(s, g, where=w, k=3),
    "mrr": lambda s, g, w: metrics.mrr(s, g, where=w),
}


@pytest.mark.parametrize("name", METRICS)
@settings(max_examples=40, deadline=None)
@given(ranking=rankings(), junk=st.sampled_from([0.0, 1e30, math.nan, math.inf, -math.inf]))
def test_padding_changes_nothing(name, ranking, junk):
    scores, grades, where = ranking
    clean = METRICS[name](scores, grades, where)
    dirty = np.where(where, scores, junk), np.where(where, grades, junk), where
    np.testing.assert_array_equal(METRICS[name](*dirty), clean)
    wider = [
        np.pad(a, ((0, 0), (1, 2)), constant_values=v) for a, v in zip(dirty, (junk, 4, False), strict=True)
    ]
    np.testing.assert_allclose(METRICS[name](*wider), clean, atol=1e-12)


@pytest.mark.parametrize("name", METRICS)
@settings(max_examples=40, deadline=None)
@given(ranking=rankings(), seed=st.integers(0, 99))
def test_order_of_the_items_changes_nothing(name, ranking, seed):
    order = np.random.default_rng(seed).permutation(ranking[0].shape[1])
    shuffled = METRICS[name](*(a[:, order] for a in ranking))
    np.testing.assert_allclose(shuffled, METRICS[name](*ranking), atol=1e-12)


def test_exponential_ndcg_by_hand():
    # Ranked 1, 4, 0, 3; cut at 3. Gains 1, 15, 0, 7.
    found = 1 + 15 / math.log2(3)
    best = 15 + 7 / math.log2(3) + 1 / 2
    value = metrics.ndcg([[9.0, 7.0, 8.0, 6.0]], [[1, 0, 4, 3]], where=np.ones((1, 4), bool), k=3)
    np.testing.assert_allclose(value, [found / best], rtol=1e-12)


def test_ndcg_against_all_judged_documents_has_a_ceiling():
    where = np.array([[True, True, False]])
    scores, grades = [[2.0, 1.0, np.nan]], [[3, 0, 4]]
    value = metrics.ndcg(
        scores,
        grades,
        where=where,
        k=2,
        ideal_grades=[[3, 0, 4, 2, 99]],
        ideal_where=[[True, True, True, True, False]],
    )
    np.testing.assert_allclose(value, [7 / (15 + 7 / math.log2(3))], rtol=1e-12)
    assert metrics.ndcg(scores, grades, where=where, k=2) == [1.0]


def test_ties_break_by_place():
    where = np.ones((1, 3), bool)
    for grades, value in (([[4, 0, 0]], 1.0), ([[0, 4, 0]], 1 / math.log2(3)), ([[0, 0, 4]], 0.0)):
        np.testing.assert_allclose(metrics.ndcg(np.zeros((1, 3)), grades, where=where, k=2), [value])
    # Padding is never ranked above an item, not even one scored minus infinity.
    hidden = metrics.mrr([[0.0, -np.inf]], [[0, 4]], where=[[False, True]])
    np.testing.assert_array_equal(hidden, [1.0])


def test_precision_poor_match_and_mrr_by_hand():
    scores = np.array([[5.0, 4.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0], [0.0] * 4])
    grades = np.array([[1, 3, 4, 4], [4, 0, 0, 2], [4, 4, 4, 4]])
    where = np.array([[True] * 4, [True, True, False, False], [False] * 4])
    # Query 0 ranks 1, 3, 4; query 1 shows two, ranked 0, 4; query 2 is padding.
    np.testing.assert_allclose(
        metrics.precision_at_k(scores, grades, where=where, k=3), [2 / 3, 1 / 3, np.nan]
    )
    np.testing.assert_allclose(
        metrics.poor_match_rate_at_k(scores, grades, where=where, k=3), [1 / 3, 1 / 2, np.nan]
    )
    np.testing.assert_allclose(metrics.mrr(scores, grades, where=where), [1 / 3, 1 / 2, np.nan])
    np.testing.assert_allclose(metrics.mrr(scores[:1], grades[:1], where=where[:1], threshold=3), [1 / 2])
    np.testing.assert_array_equal(metrics.mrr(scores[:1], [[0, 1, 2, 3]], where=where[:1]), [0.0])


def test_recall_by_hand():
    retrieved = np.array([[7, 3, 9, -1], [1, 2, 3, 4], [5, 6, 7, 8]])
    relevant = np.array([[9, 7, 0], [4, 8, 0], [0, 0, 0]])
    where = np.array([[True, True, False], [True, True, False], [False] * 3])
    np.testing.assert_allclose(
        metrics.recall_at_k(retrieved, relevant, where=where, k=2), [1 / 2, 0.0, np.nan]
    )
    np.testing.assert_allclose(
        metrics.recall_at_k(retrieved, relevant, where=where, k=9), [1.0, 1 / 2, np.nan]
    )
    names = metrics.recall_at_k([["a", "b"]], [["b", "c"]], where=[[True, True]], k=2)
    np.testing.assert_allclose(names, [0.5])


def test_auroc_by_hand():
    where = np.array([True, True, True, True, False])
    scores, labels = [0.1, 0.4, 0.35, 0.4, np.nan], [0, 0, 1, 1, 1]
    # Pairs: 0.35 over 0.1, under 0.4; 0.4 over 0.1, tied with 0.4.
    assert metrics.auroc(scores, labels, where=where) == pytest.approx(2.5 / 4)
    assert math.isnan(metrics.auroc(scores, np.ones(5), where=where))
    assert math.isnan(metrics.auroc(scores, labels, where=np.zeros(5, bool)))


def test_ece_by_hand():
    probabilities = np.array([0.1, 0.15, 0.9, 1.0, 0.5])
    labels = np.array([0, 1, 1, 1, 0])
    where = np.array([True, True, True, True, False])
    # Two bins: {0.1, 0.15} with mean label 0.5, {0.9, 1.0} with mean label 1.
    expected = 0.5 * abs(0.5 - 0.125) + 0.5 * abs(1 - 0.95)
    assert metrics.ece(probabilities, labels, where=where, bins=2) == pytest.approx(expected)
    assert math.isnan(metrics.ece(probabilities, labels, where=np.zeros(5, bool)))
    rng = np.random.default_rng(0)
    fair = rng.random(100_000)
    assert metrics.ece(fair, rng.random(100_000) < fair, where=np.ones(100_000, bool)) < 0.01
    with pytest.raises(ValueError, match=r"probabilities contains 1\.5"):
        metrics.ece([1.5], [1], where=[True])


def test_kappa_by_hand():
    first, second = np.array([0, 4, 4, 2, 9]), np.array([0, 4, 3, 0, 9])
    where = np.array([True, True, True, True, False])
    # Linear weights: disagreement |i - j|. Seen: 0 + 0 + 1 + 2. By chance: mean over all pairings of the two.
    seen = 3 / 4
    chance = np.mean([abs(i - j) for i in (0, 4, 4, 2) for j in (0, 4, 3, 0)])
    assert metrics.kappa(first, second, where=where) == pytest.approx(1 - seen / chance)
    assert metrics.kappa(first, first, where=where) == pytest.approx(1)
    assert math.isnan(metrics.kappa([3, 3], [3, 3], where=[True, True]))
    assert math.isnan(metrics.kappa([3], [3], where=[False]))
    assert metrics.kappa([3, 3], [1, 1], where=[True, True]) == pytest.approx(0)
    with pytest.raises(ValueError, match=r"second contains 9\.0"):
        metrics.kappa([1], [9], where=[True])


def graded_clusters(seed=0, queries=30):
    """Two raters' grades, often one apart, and the query of each pair: 1 to 6 pairs a query."""
    rng = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(queries), rng.integers(1, 7, queries))
    first = rng.integers(0, 5, len(clusters))
    second = np.clip(first + rng.integers(-1, 2, len(clusters)), 0, 4)
    return first, second, clusters


def test_table_kappa_by_hand():
    # Rows sum to 3 and 3, columns to 2 and 4: seen 1/6, by chance (3*4 + 3*2)/36 = 1/2.
    table = np.array([[2, 1], [0, 3]])
    assert metrics.table_kappa(table, None) == pytest.approx(1 - (1 / 6) / (1 / 2))
    # Of 4 pairs one is 2 apart (cost 2; squared 4). Chance: rows 2, 0, 2 against columns 1, 0, 3, cost 2 off the diagonal.
    wide = np.array([[1, 0, 1], [0, 0, 0], [0, 0, 2]])
    assert metrics.table_kappa(wide) == pytest.approx(1 - (2 / 4) / (2 * (2 * 3 + 2 * 1) / 16))
    assert metrics.table_kappa(wide, "quadratic") == pytest.approx(1 - (4 / 4) / (4 * (2 * 3 + 2 * 1) / 16))
    assert metrics.table_agreement(wide) == 0.75
    assert metrics.table_agreement(wide, 2) == 1
    single, none = np.diag([0, 9, 0]), np.zeros((3, 3))
    np.testing.assert_array_equal(metrics.table_kappa([single, none]), [np.nan, np.nan])
    np.testing.assert_array_equal(metrics.table_agreement([single, none]), [1, np.nan])
    assert metrics.table_kappa([[0, 5], [0, 0]]) == 0


def test_grade_tables_by_hand():
    tables = metrics.grade_tables([0, 4, 4, 2], [0, 3, 4, 0], ["b", "a", "b", "b"])
    assert tables.shape == (2, 5, 5)
    expected = np.zeros((2, 5, 5), int)
    for cluster, i, j in ((1, 0, 0), (0, 4, 3), (1, 4, 4), (1, 2, 0)):
        expected[cluster, i, j] += 1
    np.testing.assert_array_equal(tables, expected)
    assert metrics.grade_tables([], [], []).shape == (0, 5, 5)
    with pytest.raises(ValueError, match="second contains 5"):
        metrics.grade_tables([1], [5], [0])
    with pytest.raises(ValueError, match=r"clusters has shape \(1,\)"):
        metrics.grade_tables([1, 1], [2, 2], [0])


@pytest.mark.parametrize("weights", ["linear", "quadratic", None])
def test_the_bootstrap_of_tables_is_kappa_of_the_resampled_pairs(weights):
    first, second, clusters = graded_clusters()
    tables = metrics.grade_tables(first, second, clusters)
    drawn = metrics.resamples(len(tables), 40, seed=3)
    np.testing.assert_array_equal(drawn.sum(1), len(tables))
    expected = []
    for times in drawn:
        pairs = np.repeat(np.arange(len(first)), times[clusters])
        one, two = first[pairs], second[pairs]
        expected.append(metrics.kappa(one, two, where=np.ones(len(pairs), bool), weights=weights))
    found = metrics.table_kappa(np.einsum("sc,cij->sij", drawn, tables), weights)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert found.std() > 0.01
    interval = metrics.bootstrap_tables(
        tables, lambda counts: metrics.table_kappa(counts, weights), samples=40, seed=3
    )
    np.testing.assert_allclose([interval.low, interval.high], np.quantile(expected, [0.025, 0.975]))
    whole = metrics.kappa(first, second, where=np.ones(len(first), bool), weights=weights)
    assert interval.value == pytest.approx(whole)


def test_the_interval_of_kappa_covers_the_truth():
    """Judges that are right in a share of queries that differs from query to query; the truth is the kappa of very many."""

    def tables(queries, rng):
        clusters = np.repeat(np.arange(queries), 8)
        right = rng.random(len(clusters)) < np.repeat(rng.choice([0.3, 0.95], queries), 8)
        first = rng.integers(0, 5, len(clusters))
        return metrics.grade_tables(
            first, np.where(right, first, rng.integers(0, 5, len(clusters))), clusters
        )

    # Where it is wrong the judge guesses from the same uniform grades: kappa is the share it knows.
    truth = (0.3 + 0.95) / 2
    assert metrics.table_kappa(tables(100_000, np.random.default_rng(0)).sum(0)) == pytest.approx(
        truth, abs=0.005
    )
    rng = np.random.default_rng(1)
    covered = pairwise = 0
    for _ in range(200):
        found = tables(60, rng)
        interval = metrics.bootstrap_tables(found, metrics.table_kappa, samples=200)
        covered += interval.low <= truth <= interval.high
        pairs = np.repeat(np.eye(25), found.sum(0).ravel(), axis=0).reshape(-1, 5, 5)
        naive = metrics.bootstrap_tables(pairs, metrics.table_kappa, samples=50)
        pairwise += naive.low <= truth <= naive.high
    assert 0.90 <= covered / 200 <= 0.99
    assert pairwise < covered  # pairs drawn singly are more sure than they may be


def test_no_interval_where_none_can_be_said():
    first, second, clusters = graded_clusters(queries=9)
    few = metrics.bootstrap_tables(metrics.grade_tables(first, second, clusters), metrics.table_kappa)
    assert few.value == pytest.approx(metrics.kappa(first, second, where=np.ones(len(first), bool)))
    assert math.isnan(few.low)
    assert math.isnan(few.high)
    same = metrics.grade_tables([3] * 20, [3] * 20, np.arange(20))
    assert all(math.isnan(x) for x in metrics.bootstrap_tables(same, metrics.table_kappa))
    assert metrics.bootstrap_tables(same, metrics.table_agreement) == (1, 1, 1)
    empty = metrics.bootstrap_tables(np.zeros((0, 5, 5)), metrics.table_kappa)
    assert all(math.isnan(x) for x in empty)
    # One pair alone holds another grade: a third of the resamples lack it, and have no kappa.
    lone = metrics.bootstrap_tables(
        metrics.grade_tables([3] * 19 + [1], [3] * 20, np.arange(20)), metrics.table_kappa
    )
    assert lone.value == 0
    assert math.isnan(lone.low)
    with pytest.raises(ValueError, match="clusters is 0"):
        metrics.resamples(0, 5)


def test_bootstrap_mean():
    values = np.random.default_rng(0).normal(0.5, 0.1, 400)
    found = metrics.bootstrap_mean(np.append(values, np.nan), samples=2000)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    np.testing.assert_allclose(
        [found.low, found.high], [values.mean() - half, values.mean() + half], atol=1e-3
    )
    few = metrics.bootstrap_mean([1.0, np.nan, 2.0])
    assert few.value == 1.5
    assert math.isnan(few.low)
    assert all(math.isnan(x) for x in metrics.bootstrap_mean([np.nan]))


def test_paired_bootstrap():
    rng = np.random.default_rng(0)
    base = rng.random(400)
    better = base + 0.02 + 0.1 * rng.standard_normal(400)
    result = metrics.paired_bootstrap(better, base, samples=2000, seed=1)
    difference = better - base
    assert result.mean == pytest.approx(difference.mean())
    half = 1.96 * difference.std() / math.sqrt(400)
    np.testing.assert_allclose(
        [result.low, result.high], [difference.mean() - half, difference.mean() + half], atol=0.001
    )
    assert result.p < 0.01
    assert result == metrics.paired_bootstrap(better, base, samples=2000, seed=1)
    reverse = metrics.paired_bootstrap(base, better, samples=2000, seed=1)
    assert reverse.mean == -result.mean
    assert reverse.p == result.p


def test_paired_bootstrap_without_a_difference():
    noise = np.random.default_rng(2).standard_normal(200)
    centred = noise - noise.mean()
    assert metrics.paired_bootstrap(centred, np.zeros(200), samples=1000).p > 0.9
    same = metrics.paired_bootstrap(noise, noise, samples=100)
    assert same == metrics.Difference(0.0, 0.0, 0.0, 1.0)


def test_paired_bootstrap_leaves_out_queries_without_a_value():
    a, b = np.array([1.0, np.nan, 3.0]), np.array([0.0, np.nan, 1.0])
    assert metrics.paired_bootstrap(a, b, samples=10).mean == 1.5
    with pytest.raises(ValueError, match="query 1 has a value on one side only"):
        metrics.paired_bootstrap(a, np.zeros(3))
    with pytest.raises(ValueError, match="has 1 queries"):
        metrics.paired_bootstrap(a[:2], b[:2])


def test_bad_arguments_are_named():
    scores, grades, where = np.zeros((2, 3)), np.zeros((2, 3)), np.ones((2, 3), bool)
    bad = scores.copy()
    bad[1, 2] = np.nan
    with pytest.raises(ValueError, match=r"scores is NaN at \(1, 2\)"):
        metrics.ndcg(bad, grades, where=where, k=10)
    with pytest.raises(ValueError, match=r"grades is -1\.0 for query 0, item 0"):
        metrics.mrr(scores, grades - 1, where=where)
    with pytest.raises(ValueError, match="grades is nan for query 1, item 2"):
        metrics.precision_at_k(scores, bad, where=where, k=1)
    with pytest.raises(ValueError, match=r"where has shape \(3,\)"):
        metrics.ndcg(scores, grades, where=where[0], k=10)
    with pytest.raises(ValueError, match="where has dtype int64"):
        metrics.ndcg(scores, grades, where=where.astype(int), k=10)
    with pytest.raises(ValueError, match="k is 0"):
        metrics.recall_at_k(scores, grades, where=where, k=0)
    with pytest.raises(ValueError, match="gain is 'exp'"):
        metrics.ndcg(scores, grades, where=where, k=10, gain="exp")
    with pytest.raises(ValueError, match="belong together"):
        metrics.ndcg(scores, grades, where=where, k=10, ideal_grades=grades)


def test_doctests():
    assert doctest.testmod(metrics).failed == 0
