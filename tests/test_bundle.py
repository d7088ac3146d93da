"""The bundle: built whole, opened only when it is what was built, and ranking as its parts do."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit
from small_market import Funnel, documents, fast_compilation, query

from jaxsearch.data.records import ACTIONS, Document, Query, RecordError
from jaxsearch.errors import InputError
from jaxsearch.models.contract import ContractError, load_model, save_model
from jaxsearch.scoring.calibration import Calibrator, Knots, load_calibrators
from jaxsearch.scoring.utility import UtilityConfig
from jaxsearch.serving import bundle as bundles
from jaxsearch.serving.bundle import BUNDLE_FILE, Bundle, BundleError, build_bundle, golden_error


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with fast_compilation():
        yield


@pytest.fixture
def copy(bundle_folder: Path, tmp_path: Path) -> Path:
    """A bundle to tamper with."""
    return Path(shutil.copytree(bundle_folder, tmp_path / "copy"))


# --- ranking ---------------------------------------------------------------------------------------------------------


def test_results_are_ordered_by_the_ranker(bundle: Bundle) -> None:
    queries = [query("x", i) for i in range(3)]
    done: list[int] = []
    ranked = bundle.rank(queries, depth=5, progress=done.append)
    assert sum(done) == 3
    for item, results in zip(queries, ranked, strict=True):
        similar = (bundle.embedder.queries([item]) @ bundle.embedder.documents(bundle.documents).T)[0]
        rows = [result.row for result in results]
        assert sorted(rows) == sorted(np.argsort(-similar, kind="stable")[:5].tolist())
        (logits,) = bundle.scorer([item], [np.array(rows)])
        scores = logits[:, 0] - logits[:, 1]
        np.testing.assert_allclose([result.score for result in results], expit(scores), atol=1e-4)
        assert [result.score for result in results] == sorted((r.score for r in results), reverse=True)
        np.testing.assert_allclose([result.relevance for result in results], expit(scores), atol=1e-4)
        for result, row in zip(results, logits, strict=True):
            assert tuple(result.actions) == ACTIONS["jobs"]
            np.testing.assert_allclose(list(result.actions.values()), expit(row[2:]), atol=1e-4)


def test_ties_go_to_the_earlier_document(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def score(queries: list[Query], rows: list[np.ndarray], progress: Any = None) -> list[np.ndarray]:
        return [
            np.where(np.isin(found, [2, 6])[:, None], [1.0, 0, 0, 0, 0, 0, 0], [0.0] * 7) for found in rows
        ]

    tied = dataclasses.replace(bundle, scorer=score)
    (results,) = tied.rank([query("x", 0)], depth=8)
    assert [result.row for result in results] == [2, 6, 0, 1, 3, 4, 5, 7]


def scored(bundle: Bundle, **changes: Any) -> Bundle:
    """A bundle whose ranker gives document m the relevance 5 - m, but 1 to documents 4 and 5, and the click m - 3; nothing else."""

    def score(queries: list[Query], rows: list[np.ndarray], progress: Any = None) -> list[np.ndarray]:
        relevance = [np.where(np.isin(found, [4, 5]), 1.0, 5.0 - found) for found in rows]
        return [
            np.stack([one, *[np.zeros(len(one))] * 6], 1) + np.eye(7)[2] * (found[:, None] - 3.0)
            for one, found in zip(relevance, rows, strict=True)
        ]

    return dataclasses.replace(bundle, scorer=score, **changes)


RELEVANCE = Calibrator((), (Knots((-2.0, 2.0), (0.1, 0.9)),))
CLICK = Calibrator((1, 10), (Knots((-3.0, 5.0), (0.2, 0.6)), Knots((0.0,), (0.01,))))


def test_probabilities_are_calibrated_at_the_serving_position(bundle: Bundle) -> None:
    calibrated = scored(bundle, calibrators={"relevance": RELEVANCE, "click": CLICK})
    (results,) = calibrated.rank([query("x", 0)], depth=8)
    # Documents 0 to 3 lie beyond the last knot: what ties after calibration keeps the order of the ranker.
    assert [result.row for result in results] == [0, 1, 2, 3, 4, 5, 6, 7]
    np.testing.assert_allclose([r.relevance for r in results], [0.9] * 4 + [0.7, 0.7, 0.3, 0.1])
    np.testing.assert_allclose([r.actions["click"] for r in results], 0.2 + 0.05 * np.arange(8))
    assert {result.actions["apply"] for result in results} == {0.5}
    assert [result.score for result in results] == [result.relevance for result in results]
    (elsewhere,) = dataclasses.replace(calibrated, position=2).rank([query("x", 0)], depth=8)
    assert {result.actions["click"] for result in elsewhere} == {0.01}


def test_the_final_order_by_hand(bundle: Bundle) -> None:
    found = scored(bundle, calibrators={"relevance": RELEVANCE, "click": CLICK})
    config = UtilityConfig({"relevance": 1, "click": 3}, floor=0.5)
    (results,) = found.with_utility(config).rank([query("x", 0)], depth=8)
    # Relevance .9 four times, .7 twice, then .3 and .1, which is below the floor; clicks .2, .25, ... .55.
    assert [result.row for result in results] == [5, 3, 4, 2, 1, 0, 6, 7]
    np.testing.assert_allclose([r.score for r in results], [2.05, 1.95, 1.9, 1.8, 1.65, 1.5, -0.7, -0.9])
    assert found.utility == UtilityConfig()
    with pytest.raises(InputError, match="'connect' is not scored by this ranker: use relevance, click"):
        found.with_utility(UtilityConfig({"connect": 1}))


def test_depth(bundle: Bundle) -> None:
    assert [len(bundle.rank([query("x", 0)], depth=depth)[0]) for depth in (1, 3, 8, 50)] == [1, 3, 8, 8]
    assert bundle.rank([], depth=3) == []


def test_filters_hold(bundle: Bundle) -> None:
    plain = query("x", 0)
    boston = dataclasses.replace(plain, filters={"city": "Boston"})
    nowhere = dataclasses.replace(plain, filters={"city": "Atlantis"})
    found = bundle.rank([plain, boston, nowhere], depth=3)
    assert [len(results) for results in found] == [3, 3, 0]
    similar = (bundle.embedder.queries([boston]) @ bundle.embedder.documents(bundle.documents).T)[0]
    allowed = [
        row
        for row in np.argsort(-similar, kind="stable")
        if bundle.documents[row].attributes["city"] == "Boston"
    ]
    assert sorted(result.row for result in found[1]) == sorted(allowed[:3])
    (alone,) = bundle.rank([plain], depth=3)
    assert [result.row for result in found[0]] == [result.row for result in alone]
    with pytest.raises(InputError, match=r"filters\['colour'\]: no document has this attribute"):
        bundle.rank([dataclasses.replace(plain, filters={"colour": "red"})], depth=3)


@pytest.mark.parametrize(
    ("text", "words"),
    [("  ", "query 'q' is empty"), ("nurse " * 200, "tokens, max_query_tokens is 128: shorten it")],
)
def test_queries_that_cannot_be_ranked(bundle: Bundle, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        bundle.rank([Query("q", text)], depth=3)


# --- building --------------------------------------------------------------------------------------------------------


def test_a_bundle_is_complete_and_opens_after_a_move(bundle: Bundle, bundle_folder: Path, copy: Path) -> None:
    assert sorted(path.name for path in bundle_folder.iterdir()) == [
        BUNDLE_FILE, "documents.jsonl", "index", "ranker", "retriever"
    ]  # fmt: skip
    assert list(bundle.documents) == documents()
    moved = Bundle.open(copy)
    assert moved.hash == bundle.hash
    ours, theirs = (opened.rank([query("x", 1)], depth=4)[0] for opened in (bundle, moved))
    assert [result.row for result in ours] == [result.row for result in theirs]
    np.testing.assert_allclose(
        [result.score for result in ours], [result.score for result in theirs], atol=1e-5
    )


def test_what_cannot_be_built(funnel: Funnel, tmp_path: Path) -> None:
    ranker, retriever, judge = (load_model(funnel.model(name)) for name in ("ranker", "retriever", "judge"))
    target = tmp_path / "bundle"
    with pytest.raises(BundleError, match="ranker is a judge: give the model folder of a ranker"):
        build_bundle(target, judge, retriever, documents())
    with pytest.raises(BundleError, match="retriever is a ranker: give the model folder of a bi_encoder"):
        build_bundle(target, ranker, ranker, documents())
    with pytest.raises(BundleError, match="there are no documents"):
        build_bundle(target, ranker, retriever, [])
    with pytest.raises(RecordError, match=r"Document\.id is 'p0': ids must be unique"):
        build_bundle(target, ranker, retriever, [documents()[0], documents()[0]])
    with pytest.raises(RecordError, match=r"Document\.fields"):
        build_bundle(target, ranker, retriever, [Document("d", {})])
    assert not target.exists()
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "love.txt").write_text("keep me")
    with pytest.raises(BundleError, match="is not empty and holds no bundle: give a new folder"):
        build_bundle(tmp_path / "letters", ranker, retriever, documents())
    assert (tmp_path / "letters" / "love.txt").read_text() == "keep me"


def test_calibrators_and_utility_are_kept(funnel: Funnel, tmp_path: Path) -> None:
    ranker, retriever = load_model(funnel.model("ranker")), load_model(funnel.model("retriever"))
    values = {"relevance": RELEVANCE.to_dict(), "click": CLICK.to_dict()}
    contract = dataclasses.replace(ranker.contract, calibrators=values)
    config = UtilityConfig({"relevance": 1, "click": -0.25}, 0.2)
    calibrated = dataclasses.replace(ranker, contract=contract)
    build_bundle(tmp_path / "b", calibrated, retriever, documents(), config)
    opened = Bundle.open(tmp_path / "b")
    assert opened.utility == config
    assert opened.position == 1
    assert opened.calibrators == load_calibrators(contract) == {"relevance": RELEVANCE, "click": CLICK}
    assert golden_error(calibrated) == golden_error(ranker)
    (results,) = opened.rank([query("x", 0)], depth=8)
    (logits,) = opened.scorer([query("x", 0)], [np.array([result.row for result in results])])
    relevance, click = RELEVANCE(logits[:, 0] - logits[:, 1]), CLICK(logits[:, 2], 1)
    np.testing.assert_allclose([result.relevance for result in results], relevance, atol=1e-4)
    np.testing.assert_allclose([result.actions["click"] for result in results], click, atol=1e-4)
    np.testing.assert_allclose([result.score for result in results], relevance - 0.25 * click, atol=1e-4)
    with pytest.raises(InputError, match="'connect' is not scored by this ranker"):
        build_bundle(tmp_path / "c", ranker, retriever, documents(), UtilityConfig({"connect": 1}))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_older_bundles_are_opened(copy: Path, bundle: Bundle, number: int) -> None:
    """Format 1 knew no utility: it is ordered by relevance."""
    values = json.loads((copy / BUNDLE_FILE).read_text())
    assert values["format"] == bundles.FORMAT == 4
    if number == 1:
        del values["utility"]
    (copy / BUNDLE_FILE).write_text(json.dumps(values | {"format": number}))
    opened = Bundle.open(copy)
    assert opened.utility == UtilityConfig()
    ours, theirs = (found.rank([query("x", 1)], depth=4)[0] for found in (bundle, opened))
    assert [result.row for result in ours] == [result.row for result in theirs]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "utility is 'None': give an object"),
        ({"weights": {"relevance": "1"}, "floor": 0}, "the weight of 'relevance' is '1'"),
        ({"weights": {"relevance": 0}, "floor": 0}, "no weight differs from 0"),
        ({"weights": {"relevance": 1}, "floor": 2}, "the floor is 2"),
        ({"weights": {"connect": 1}, "floor": 0}, "'connect' is not scored by this ranker"),
    ],
)
def test_hostile_utilities(copy: Path, value: Any, words: str) -> None:
    values = json.loads((copy / BUNDLE_FILE).read_text())
    (copy / BUNDLE_FILE).write_text(json.dumps(values | {"utility": value}))
    with pytest.raises(BundleError, match="cannot be used") as caught:
        Bundle.open(copy)
    assert words in str(caught.value)


def test_a_build_that_stops_leaves_what_was_there(
    funnel: Funnel, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bundles, "make_embedder", stop)
    with pytest.raises(KeyboardInterrupt):
        build_bundle(
            copy, load_model(funnel.model("ranker")), load_model(funnel.model("retriever")), documents()[:3]
        )
    monkeypatch.undo()
    assert Bundle.open(copy).documents == documents()  # the bundle that was there
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]
    build_bundle(
        copy, load_model(funnel.model("ranker")), load_model(funnel.model("retriever")), documents()[:3]
    )
    assert Bundle.open(copy).documents == documents()[:3]
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_a_bundle_that_is_replaced_while_it_is_read_is_not_opened(
    funnel: Funnel, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace_first(*_: object) -> None:
        monkeypatch.undo()
        build_bundle(
            copy, load_model(funnel.model("ranker")), load_model(funnel.model("retriever")), documents()[::-1]
        )

    monkeypatch.setattr(bundles, "_check_golden", replace_first)
    with pytest.raises(BundleError, match="was replaced while it was read: open it again"):
        Bundle.open(copy)
    assert Bundle.open(copy).documents == documents()[::-1]


# --- what is not opened ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be used"),
        ("[]", "cannot be used"),
        ("{}", "cannot be used .*format"),
        ('{"format": 5}', "format is 5, this version reads 4"),
        ('{"format": 1, "ranker": "x"}', "cannot be used .*retriever"),
        ("[" * 100_000, "cannot be used"),
    ],
)
def test_bad_bundle_files(copy: Path, content: str, words: str) -> None:
    (copy / BUNDLE_FILE).write_text(content)
    with pytest.raises(BundleError, match=words):
        Bundle.open(copy)


def change(path: Path) -> None:
    """Another letter in the middle of a file, which keeps its length."""
    content = bytearray(path.read_bytes())
    place = content.index(b"nurse") if b"nurse" in content else len(content) // 2
    content[place] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("documents.jsonl", "documents_sha256 changed since the bundle was built"),
        ("index/dataset.npy", "index_sha256 changed"),
        ("index/index.json", "index_sha256 changed"),
        ("ranker/model.safetensors", "is not the file the contract was written for"),
        ("retriever/tokenizer.json", "is not the file the contract was written for"),
        ("ranker/contract.json", "ranker changed since the bundle was built|cannot be used"),
    ],
)
def test_changed_parts_are_noticed(copy: Path, part: str, words: str) -> None:
    change(copy / part)
    with pytest.raises(InputError, match=words):
        Bundle.open(copy)


@pytest.mark.parametrize(
    "part", ["documents.jsonl", "index", "ranker", "retriever/contract.json", "index/index.json"]
)
def test_missing_parts_are_noticed(copy: Path, part: str) -> None:
    shutil.rmtree(copy / part) if (copy / part).is_dir() else (copy / part).unlink()
    with pytest.raises(InputError, match=r"cannot be used|holds no contract|changed since"):
        Bundle.open(copy)


def test_another_model_of_the_same_shape(funnel: Funnel, copy: Path) -> None:
    other = load_model(copy / "ranker")
    other.module.decoder.final_norm.set_value(other.module.decoder.final_norm[...] * 1.01)
    save_model(copy / "ranker", other.module, other.contract, other.tokenizer)
    with pytest.raises(BundleError, match="ranker changed since the bundle was built; build it anew"):
        Bundle.open(copy)


def rebuilt(copy: Path, part: str, module: Any) -> None:
    """The bundle with other weights in one of its models, and all hashes made to fit."""
    model = load_model(copy / part)
    digest = save_model(copy / part, module, model.contract, model.tokenizer)
    values = json.loads((copy / BUNDLE_FILE).read_text())
    (copy / BUNDLE_FILE).write_text(json.dumps(values | {part: digest}))


@pytest.mark.parametrize("part", ["ranker", "retriever"])
@pytest.mark.parametrize("scale", [-1.0, float("nan")])
def test_golden_scores_that_are_not_reproduced(copy: Path, part: str, scale: float) -> None:
    module = load_model(copy / part).module
    embedding = module.decoder.embedding
    # The first documents' own words, so that scores and cosines move.
    embedding.set_value(
        embedding[...] * jnp.where(jnp.arange(embedding.shape[0]) % 2 == 0, scale, 1.0)[:, None]
    )
    rebuilt(copy, part, module)
    words = "misses its golden scores by|gives scores that are no numbers"
    with pytest.raises(BundleError, match=f"the {part} ({words}).*: not ready to serve"):
        Bundle.open(copy)


def test_golden_error_is_the_largest_deviation(funnel: Funnel) -> None:
    for stage in ("retriever", "ranker"):
        model = load_model(funnel.model(stage))
        first, second, third = model.contract.golden
        moved = dataclasses.replace(second, scores=(second.scores[0] - 0.25, *second.scores[1:]))
        contract = dataclasses.replace(model.contract, golden=(first, moved, third))
        assert golden_error(dataclasses.replace(model, contract=contract)) == pytest.approx(0.25, abs=1e-4)
        assert (
            golden_error(dataclasses.replace(model, contract=dataclasses.replace(contract, golden=()))) == 0
        )


def test_other_documents_than_the_index_was_built_of(copy: Path) -> None:
    lines = (copy / "documents.jsonl").read_text().splitlines(keepends=True)
    (copy / "documents.jsonl").write_text("".join(lines[:-1]))
    values = json.loads((copy / BUNDLE_FILE).read_text()) | bundles._data_hashes(copy)
    (copy / BUNDLE_FILE).write_text(json.dumps(values))
    with pytest.raises(BundleError, match=r"the index holds 8 documents, documents\.jsonl 7; build it anew"):
        Bundle.open(copy)


def test_an_index_that_is_none(copy: Path) -> None:
    for path in (copy / "index").iterdir():
        path.write_bytes(b"{}")
    values = json.loads((copy / BUNDLE_FILE).read_text()) | bundles._data_hashes(copy)
    (copy / BUNDLE_FILE).write_text(json.dumps(values))
    with pytest.raises(BundleError, match="the index cannot be used"):
        Bundle.open(copy)


def test_a_bundle_of_two_rankers(copy: Path) -> None:
    shutil.rmtree(copy / "retriever")
    shutil.copytree(copy / "ranker", copy / "retriever")
    with pytest.raises(BundleError, match="retriever is a ranker"):
        Bundle.open(copy)
    shutil.rmtree(copy / "ranker")
    with pytest.raises(ContractError, match="holds no contract"):
        Bundle.open(copy)
