"""The traditional ranker: hand-computed features, what its models learn, and files that come back."""

import dataclasses
import json

import numpy as np
import pytest

from jaxsearch.data.records import Document, Query
from jaxsearch.retrieval.bm25 import Bm25, Bm25Params, document_text
from jaxsearch.retrieval.traditional import (
    BoostingParams,
    FeatureMatrix,
    Features,
    FeatureSpec,
    TraditionalModel,
    train_click_model,
    train_ranker,
)

DOCUMENTS = [
    Document(
        "a",
        {"title": "Senior Data Engineer", "skills": "Spark, SQL", "salary": "$150,000"},
        attributes={"city": "New York", "workplace": "remote", "seniority": "senior", "company": "Acme"},
        numeric={"salary_min": 150_000, "age_days": 3},
    ),
    Document(
        "b",
        {"title": "Data Engineer", "skills": "C++"},
        attributes={"city": "Austin", "workplace": "onsite", "seniority": "junior", "company": "Bolt"},
        numeric={"salary_min": 90_000},
    ),
    Document("c", {"title": "Registered Nurse"}, attributes={"city": "Austin"}, numeric={"age_days": 40.5}),
]
QUERIES = [
    Query(
        "p",
        "senior data engineer new york",
        searcher={"location": "Austin, TX", "headline": "Junior analyst", "desired_salary": "$120,000"},
        filters={"workplace": "Remote"},
    ),
    Query("q", "nurse", searcher={"location": "New York", "desired_salary": "80k USD"}),
]
SPEC = FeatureSpec.from_records(QUERIES, DOCUMENTS, similarity=True)
ALL = np.array([[0, 1, 2, -1], [2, 0, -1, -1]])
SIMILARITY = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)


def column(matrix, name):
    return matrix.values[..., matrix.names.index(name)]


@pytest.fixture(scope="module")
def matrix():
    return Features(DOCUMENTS, SPEC)(QUERIES, ALL, SIMILARITY)


def test_the_spec_holds_what_the_records_give_rise_to():
    assert dataclasses.astuple(SPEC)[:-2] == (
        ("title", "skills", "salary"),
        ("workplace",),  # filters
        ("city", "seniority"),  # in query texts; nobody names a company
        (("location", "city"), ("headline", "seniority")),
        ("salary_min", "age_days"),
        ("desired_salary",),
    )
    assert SPEC.distances == (("salary_min", "desired_salary"),)
    assert SPEC.names == (
        *("query_words", "bm25", "bm25:title", "covers:title", "named:title"),
        *("bm25:skills", "covers:skills", "named:skills", "bm25:salary", "covers:salary", "named:salary"),
        *("similarity", "filter:workplace", "query:city", "query:seniority"),
        *("searcher.location:city", "searcher.headline:seniority"),
        *("number:salary_min", "number:age_days", "searcher:desired_salary", "salary_min-desired_salary"),
    )


def test_text_features(matrix):
    np.testing.assert_array_equal(column(matrix, "query_words")[:, 0], [5, 1])
    # Query p has five words; title a has all of its three among them, title b both, title c none.
    np.testing.assert_allclose(column(matrix, "covers:title")[0, :3], [3 / 5, 2 / 5, 0], rtol=1e-6)
    np.testing.assert_allclose(column(matrix, "named:title")[0, :3], [1, 1, 0], rtol=1e-6)
    np.testing.assert_allclose(column(matrix, "named:title")[1, :2], [1 / 2, 0], rtol=1e-6)
    texts = [query.text for query in QUERIES]
    whole = Bm25.build([document_text(document) for document in DOCUMENTS])
    titles = Bm25.build([document.fields["title"] for document in DOCUMENTS])
    for name, bm25 in (("bm25", whole), ("bm25:title", titles)):
        np.testing.assert_array_equal(
            column(matrix, name)[matrix.where], bm25.score(texts, ALL)[matrix.where]
        )
    assert column(matrix, "bm25:title")[0, 0] > column(matrix, "bm25:title")[0, 1] > 0
    np.testing.assert_array_equal(column(matrix, "similarity")[matrix.where], SIMILARITY[matrix.where])


def test_agreement_is_one_zero_or_unknown(matrix):
    nan = np.nan
    wanted = {
        "filter:workplace": [[1, 0, nan], [nan, nan]],  # c has no workplace, q no filter
        "query:city": [[1, 0, 0], [nan, nan]],
        "query:seniority": [[1, 0, nan], [nan, nan]],
        "searcher.location:city": [[0, 1, 1], [0, 1]],
        "searcher.headline:seniority": [[0, 1, nan], [nan, nan]],
    }
    for name, (first, second) in wanted.items():
        np.testing.assert_array_equal(column(matrix, name)[0, :3], first, err_msg=name)
        np.testing.assert_array_equal(column(matrix, name)[1, :2], second, err_msg=name)


def test_a_filter_that_no_document_meets_disagrees_with_all():
    query = dataclasses.replace(QUERIES[0], filters={"workplace": "on the moon"})
    values = column(
        Features(DOCUMENTS, SPEC)([query, QUERIES[0]], ALL[[0, 0]], SIMILARITY), "filter:workplace"
    )
    np.testing.assert_array_equal(values[:, :3], [[0, 0, np.nan], [1, 0, np.nan]])


def test_numbers_and_their_distances(matrix):
    nan = np.nan
    np.testing.assert_array_equal(column(matrix, "number:salary_min")[0], [150_000, 90_000, nan, nan])
    np.testing.assert_array_equal(column(matrix, "number:age_days")[0], [3, nan, 40.5, nan])
    np.testing.assert_array_equal(column(matrix, "searcher:desired_salary")[:, 0], [120_000, 80_000])
    np.testing.assert_array_equal(column(matrix, "salary_min-desired_salary")[0, :3], [30_000, -30_000, nan])


def test_empty_places_are_unknown_and_padding_changes_nothing(matrix):
    assert np.isnan(matrix.values[~matrix.where]).all()
    assert matrix.where.tolist() == (ALL >= 0).tolist()
    alone = Features(DOCUMENTS, SPEC)(QUERIES[1:], ALL[1:, :2], SIMILARITY[1:, :2])
    np.testing.assert_array_equal(alone.values[0], matrix.values[1, :2])


def test_no_queries_give_no_rows():
    matrix = Features(DOCUMENTS, SPEC)([], np.zeros((0, 4), int), np.zeros((0, 4)))
    assert matrix.values.shape == (0, 4, len(SPEC.names))


def test_a_given_index_is_used_and_must_fit():
    texts = [document_text(document) for document in DOCUMENTS]
    whole = Bm25.build(texts)
    again = Features(DOCUMENTS, SPEC, bm25=whole)(QUERIES, ALL, SIMILARITY)
    np.testing.assert_array_equal(again.values, Features(DOCUMENTS, SPEC)(QUERIES, ALL, SIMILARITY).values)
    for other in (Bm25.build(texts[:2]), Bm25.build(texts, Bm25Params(k1=0.5))):
        with pytest.raises(ValueError, match="or leave it out"):
            Features(DOCUMENTS, SPEC, bm25=other)


def test_bad_arguments_are_named():
    features = Features(DOCUMENTS, SPEC)
    with pytest.raises(ValueError, match=r"similarity was not given: FeatureSpec\.similarity is True"):
        features(QUERIES, ALL)
    with pytest.raises(ValueError, match=r"similarity has shape \(2, 3\).*shape \(2, 4\)"):
        features(QUERIES, ALL, SIMILARITY[:, :3])
    with pytest.raises(ValueError, match="give finite numbers"):
        features(QUERIES, ALL, np.where(ALL == 2, np.nan, SIMILARITY))
    with pytest.raises(ValueError, match="candidate 3 is not a document"):
        features(QUERIES, ALL + 1, SIMILARITY)
    with pytest.raises(ValueError, match=r"FeatureSpec\.text_fields: 'benefits': none of the 3 texts"):
        Features(DOCUMENTS, dataclasses.replace(SPEC, text_fields=("benefits",)))
    with pytest.raises(ValueError, match=r"BoostingParams\.leaves is 1"):
        BoostingParams(leaves=1)


# Models: synthetic features whose meaning is known. "similarity" carries the grade, "bm25" is noise.

SMALL = FeatureSpec((), (), (), (), ("popularity",), (), similarity=True, bm25=Bm25Params())
QUICK = BoostingParams(rounds=60, early_stopping=10, learning_rate=0.1, leaves=7, min_documents_in_leaf=5)


def graded(queries, seed, items=12):
    """Features of SMALL, grades that follow the similarity, and clicks that follow the popularity."""
    rng = np.random.default_rng(seed)
    values = rng.random((queries, items, 4)).astype(np.float32)
    grades = np.clip((values[..., 2] * 5).astype(int), 0, 4)
    clicks = (rng.random((queries, items)) < values[..., 3] ** 3).astype(int)
    where = np.arange(items) < rng.integers(2, items + 1, queries)[:, None]
    values[~where] = np.nan
    return FeatureMatrix(values, where, SMALL.names), grades, clicks


TRAIN, DEV, TEST = graded(80, 0), graded(30, 1), graded(30, 2)


@pytest.fixture(scope="module")
def ranker():
    return train_ranker(SMALL, TRAIN[:2], DEV[:2], QUICK)


@pytest.fixture(scope="module")
def clicks():
    return train_click_model(SMALL, (TRAIN[0], TRAIN[2]), (DEV[0], DEV[2]), QUICK)


def test_the_ranker_learns_the_order(ranker):
    assert SMALL.names == ("query_words", "bm25", "similarity", "number:popularity")
    matrix, grades, _ = TEST
    scores = ranker.score(matrix)
    better = worse = 0
    for row, row_grades, where in zip(scores, grades, matrix.where, strict=True):
        right = np.sign(row[where, None] - row[where]) * np.sign(row_grades[where, None] - row_grades[where])
        better, worse = better + (right > 0).sum(), worse + (right < 0).sum()
    assert better > 20 * worse
    assert next(iter(ranker.importance().items()))[0] == "similarity"
    assert sum(ranker.importance().values()) == pytest.approx(1)


def test_the_click_model_gives_probabilities_that_follow_the_popularity(clicks):
    matrix, _, happened = TEST
    scores = clicks.score(matrix)
    inside = scores[matrix.where]
    assert ((inside > 0) & (inside < 1)).all()
    assert abs(inside.mean() - happened[matrix.where].mean()) < 0.08
    popular = column(matrix, "number:popularity")[matrix.where]
    assert inside[popular > 0.8].mean() > 3 * inside[popular < 0.4].mean()
    assert next(iter(clicks.importance())) == "number:popularity"


def test_empty_places_score_below_everything(ranker, clicks):
    for model in (ranker, clicks):
        scores = model.score(TEST[0])
        assert (scores[~TEST[0].where] == -np.inf).all()
        assert np.isfinite(scores[TEST[0].where]).all()
        nothing = TEST[0]._replace(where=np.zeros_like(TEST[0].where))
        assert (model.score(nothing) == -np.inf).all()


def test_labels_in_empty_places_do_not_matter(ranker):
    changed = np.where(TRAIN[0].where, TRAIN[1], 99)
    again = train_ranker(SMALL, (TRAIN[0], changed), DEV[:2], QUICK)
    np.testing.assert_array_equal(ranker.score(TEST[0]), again.score(TEST[0]))


def test_training_is_deterministic_on_any_number_of_threads(ranker):
    for threads in (1, 2):
        again = train_ranker(SMALL, TRAIN[:2], DEV[:2], dataclasses.replace(QUICK, threads=threads))
        np.testing.assert_array_equal(ranker.score(TEST[0]), again.score(TEST[0]))


def test_training_stops_early_and_keeps_the_best_round():
    patient = dataclasses.replace(QUICK, rounds=400)
    model = train_ranker(SMALL, TRAIN[:2], DEV[:2], patient)
    assert model.booster.num_trees() < 300


def test_saved_models_come_back_the_same(ranker, clicks, tmp_path):
    full = dataclasses.replace(SPEC, bm25=Bm25Params(k1=0.7))
    for model in (ranker, clicks):
        model.save(tmp_path / "model")
        loaded = TraditionalModel.load(tmp_path / "model")
        assert (loaded.objective, loaded.spec) == (model.objective, model.spec)
        np.testing.assert_array_equal(loaded.score(TEST[0]), model.score(TEST[0]))
        assert loaded.importance() == model.importance()
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["model.txt", "traditional.json"]
    # A spec with pairs and nested parameters survives too.
    values = np.random.default_rng(0).random((40, 6, len(full.names))).astype(np.float32)
    matrix = FeatureMatrix(values, np.ones((40, 6), bool), full.names)
    labels = (values[..., 0] > 0.5).astype(int)
    train_click_model(full, (matrix, labels), (matrix, labels), QUICK).save(tmp_path / "full")
    assert TraditionalModel.load(tmp_path / "full").spec == full


def test_other_features_are_refused(ranker, tmp_path):
    matrix = TEST[0]
    with pytest.raises(ValueError, match=r"missing \['number:popularity'\], unknown \['number:age'\]"):
        ranker.score(matrix._replace(names=(*SMALL.names[:-1], "number:age")))
    with pytest.raises(ValueError, match="the same in another order"):
        ranker.score(matrix._replace(names=SMALL.names[::-1]))
    with pytest.raises(ValueError, match="missing"):
        train_ranker(SPEC, TRAIN[:2], DEV[:2], QUICK)
    ranker.save(tmp_path / "model")
    path = tmp_path / "model" / "traditional.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "features": settings["features"][:-1]}))
    with pytest.raises(ValueError, match=r"missing \['number:popularity'\]"):
        TraditionalModel.load(tmp_path / "model")
    spec = {**settings["spec"], "numeric": ["popularity", "age"]}
    path.write_text(json.dumps({**settings, "spec": spec, "features": [*settings["features"], "number:age"]}))
    with pytest.raises(
        ValueError, match=r"4 features and traditional\.json 5: the two files are of different"
    ):
        TraditionalModel.load(tmp_path / "model")
    path.write_text(json.dumps({**settings, "format": 2}))
    with pytest.raises(ValueError, match="format 2; this version reads 1"):
        TraditionalModel.load(tmp_path / "model")


def test_bad_labels_are_named():
    matrix, grades, happened = TRAIN
    with pytest.raises(ValueError, match=r"dev: label 5 is none of \(0, 1, 2, 3, 4\)"):
        train_ranker(SMALL, (matrix, grades), (matrix, np.full_like(grades, 5)), QUICK)
    with pytest.raises(ValueError, match=r"train: label 0\.5 is none of"):
        train_ranker(SMALL, (matrix, grades * 0 + 0.5), DEV[:2], QUICK)
    with pytest.raises(ValueError, match="no order to learn"):
        train_ranker(SMALL, (matrix, grades * 0 + 2), DEV[:2], QUICK)
    with pytest.raises(ValueError, match="all clicks are equal"):
        train_click_model(SMALL, (matrix, happened * 0), (DEV[0], DEV[2]), QUICK)
    with pytest.raises(ValueError, match=r"train: labels have shape \(80,\), candidates \(80, 12\)"):
        train_click_model(SMALL, (matrix, happened[:, 0]), (DEV[0], DEV[2]), QUICK)
    with pytest.raises(ValueError, match="no candidate at all"):
        train_ranker(SMALL, (matrix._replace(where=matrix.where & False), grades), DEV[:2], QUICK)
