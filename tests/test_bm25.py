"""BM25: hand-computed scores, empty results instead of arbitrary ones, and a folder that comes back the
same."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxsearch.data.records import Document
from jaxsearch.retrieval.bm25 import Bm25, Bm25Params, document_text, words
from jaxsearch.retrieval.common import new_folder, pad_candidates

TEXTS = ["spark engineer", "spark spark pipelines in austin", "nurse", ""]


def expected(frequency: int, length: int, *, having: int, k1: float = 1.2, b: float = 0.75) -> float:
    """Lucene's BM25 of one word for TEXTS (4 documents, 8 words)."""
    idf = math.log(1 + (4 - having + 0.5) / (having + 0.5))
    return idf * frequency / (frequency + k1 * (1 - b + b * length / 2))


def test_words_keep_the_names_of_languages():
    assert words("C++/C# & F#, Node.js; R&D (Zürich) 100k+") == (
        ["c++", "c#", "f#", "node", "js", "r", "d", "zürich", "100k"]
    )
    assert words("\uff33\uff31\uff2c") == ["sql"]  # full-width letters
    assert words("") == []


def test_scores_are_those_of_the_formula():
    ids, scores = Bm25.build(TEXTS).search(["spark", "nurses"], 4)
    # Two occurrences among five words score less than one among two: ln 2 * 2/4.55 and ln 2 * 1/2.2.
    first, second = expected(1, 2, having=2), expected(2, 5, having=2)
    assert (first, second) == pytest.approx((0.31507, 0.30468), abs=1e-5)
    np.testing.assert_array_equal(ids, [[0, 1, -1, -1], [2, -1, -1, -1]])
    np.testing.assert_allclose(
        scores, [[first, second, -np.inf, -np.inf], [expected(1, 1, having=1), *[-np.inf] * 3]], rtol=1e-6
    )


def test_parameters_are_used():
    params = Bm25Params(k1=2.0, b=0.0, stemmer=None)
    ids, scores = Bm25.build(TEXTS, params).search(["spark", "sparks"], 1)
    np.testing.assert_allclose(scores[0], expected(2, 5, having=2, k1=2.0, b=0.0), rtol=1e-6)
    assert ids[1, 0] == -1  # without the stemmer, sparks is another word


@pytest.mark.parametrize("query", ["", "?!", "astronaut", "   "])
def test_a_query_without_known_words_finds_nothing(query):
    bm25 = Bm25.build(TEXTS)
    ids, scores = bm25.search([query, "spark"], 3)
    assert ids[0].tolist() == [-1, -1, -1]
    assert (scores[0] == -np.inf).all()
    assert ids[1].tolist() == [0, 1, -1]
    np.testing.assert_array_equal(bm25.score([query], np.array([[0, 1, -1]])), [[0, 0, -np.inf]])


def test_equal_scores_keep_the_order_of_the_documents():
    bm25 = Bm25.build(["data nurse", *["data engineer"] * 40])
    ids, scores = bm25.search(["engineer"], 12)
    assert len(np.unique(scores)) == 1
    assert ids[0].tolist() == list(range(1, 13))


def test_masked_documents_are_never_found():
    mask = np.array([[False, True, True, True], [True, True, False, True]])
    ids, _ = Bm25.build(TEXTS).search(["spark", "nurse"], 2, mask=mask)
    assert ids.tolist() == [[1, -1], [-1, -1]]
    with pytest.raises(ValueError, match=r"mask has shape \(4,\): give \[2, 4\]"):
        Bm25.build(TEXTS).search(["spark", "nurse"], 2, mask=mask[0])


def test_score_agrees_with_search_and_marks_empty_places():
    bm25 = Bm25.build(TEXTS)
    queries = ["spark in austin", "nurse", "pipelines engineer"]
    ids, scores = bm25.search(queries, 4)
    np.testing.assert_array_equal(bm25.score(queries, ids), scores)
    with pytest.raises(ValueError, match="candidate 4 is not a document: use positions 0 to 3"):
        bm25.score(["nurse"], np.array([[4]]))
    with pytest.raises(ValueError, match="one row per query"):
        bm25.score(["nurse", "spark"], np.array([[1]]))


def test_overlap_counts_different_words():
    # Query: spark, engineer, remote. Document 1 has spark, pipelines, in, austin.
    of_query, of_document = Bm25.build(TEXTS).overlap(
        ["spark engineer remote spark", ""], np.array([[0, 1, 2, 3, -1], [0, 1, 2, 3, -1]])
    )
    np.testing.assert_allclose(of_query[0], [2 / 3, 1 / 3, 0, 0, -np.inf], rtol=1e-6)
    np.testing.assert_allclose(of_document[0], [1, 1 / 4, 0, 0, -np.inf], rtol=1e-6)
    assert (of_query[1, :4] == 0).all()
    assert (of_document[1, :4] == 0).all()


@pytest.mark.parametrize("texts", [[], ["", " ?"]])
def test_nothing_to_search_is_refused(texts):
    with pytest.raises(ValueError, match="holds a word"):
        Bm25.build(texts)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"Bm25Params.b is 1\.5"):
        Bm25Params(b=1.5)
    with pytest.raises(ValueError, match=r"Bm25Params\.k1 is -1"):
        Bm25Params(k1=-1)
    with pytest.raises(ValueError, match=r"Bm25Params.stemmer is 'klingon': use None or one of .*english"):
        Bm25Params(stemmer="klingon")
    with pytest.raises(TypeError, match="list of strings"):
        Bm25.build("one text")
    with pytest.raises(ValueError, match="k is 0"):
        Bm25.build(TEXTS).search(["spark"], 0)


def test_a_saved_index_comes_back_the_same_and_may_be_moved(tmp_path):
    bm25 = Bm25.build(TEXTS, Bm25Params(k1=0.9, stemmer=None))
    bm25.save(tmp_path / "a")
    bm25.save(tmp_path / "a")  # replaces
    (tmp_path / "a").rename(tmp_path / "b")
    loaded = Bm25.load(tmp_path / "b")
    assert loaded.params == bm25.params
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    mine, theirs = (index.search(["spark austin"], 4) for index in (bm25, loaded))
    np.testing.assert_array_equal(mine, theirs)


def test_the_saved_files_do_not_depend_on_the_process(tmp_path):
    code = (
        "import sys; from jaxsearch.retrieval.bm25 import Bm25;"
        "Bm25.build(['spark engineer in austin', 'nurse in reno', 'data scientist']).save(sys.argv[1])"
    )
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
        )
    files = [{path.name: path.read_bytes() for path in (tmp_path / seed).iterdir()} for seed in ("1", "2")]
    assert files[0] == files[1]


def test_damaged_indexes_are_refused(tmp_path):
    Bm25.build(TEXTS).save(tmp_path / "a")
    postings = tmp_path / "a" / "indices.csc.index.npy"
    np.save(postings, np.load(postings) + 100)
    with pytest.raises(ValueError, match="do not fit together"):
        Bm25.load(tmp_path / "a")
    (tmp_path / "a" / "bm25.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match="format 0; this version reads 1"):
        Bm25.load(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        Bm25.load(tmp_path / "nowhere")


def test_document_text_is_every_field_in_order():
    document = Document("d", {"title": "Nurse", "description": "Care."}, attributes={"city": "Reno"})
    assert document_text(document) == "Nurse\nCare."


def test_pad_candidates():
    assert pad_candidates([[3, 1], [], [2]]).tolist() == [[3, 1], [-1, -1], [2, -1]]
    assert pad_candidates([[], []]).tolist() == [[-1], [-1]]
    assert pad_candidates([]).shape == (0, 1)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    with new_folder(tmp_path / "x") as folder:
        (folder / "file").write_text("old")

    def fail() -> None:
        with new_folder(tmp_path / "x") as folder:
            (folder / "file").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert (tmp_path / "x" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
