"""A MixLM ranker in serving: bundles rank by embeddings, by text where none is fresh, and calibrators are fitted to what is served."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit
from small_market import STUDENT, dataset, documents, fast_compilation, query, small_tokenizer
from small_models import SMALL, untrained

import jaxsearch.data.datasets
from jaxsearch.data.jsonl import write_lines
from jaxsearch.data.prompts import PromptConfig
from jaxsearch.data.records import ACTIONS, Document, to_dict
from jaxsearch.data.tokenizer import LABELS
from jaxsearch.models.contract import (
    Contract,
    ContractError,
    MixLMPart,
    load_model,
)
from jaxsearch.scoring import embedding_store
from jaxsearch.scoring.calibration import CALIBRATED_ON, Calibrator, Knots, observe
from jaxsearch.scoring.calibration import calibrate as fit_all
from jaxsearch.scoring.embedding_store import (
    EmbeddingStore,
    EmbeddingStoreError,
    copy_embeddings,
    encode_documents,
)
from jaxsearch.scoring.mixed import make_mixed_scorer
from jaxsearch.scoring.records import action_log_odds
from jaxsearch.serving import bundle as bundles
from jaxsearch.serving.bundle import BUNDLE_FILE, Bundle, BundleError, build_bundle, make_scorer
from jaxsearch.serving.main import main

S, W = 3, 8


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with fast_compilation():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an encoder, a ranker that reads its embeddings and titles as text, and a retriever."""
    folder = tmp_path_factory.mktemp("models")
    prompts = {kind: PromptConfig(kind, *SMALL) for kind in ("document", "query", "ranker")}
    document = {"document": prompts["document"]}
    encoder = untrained(folder / "encoder", Contract("encoder", STUDENT, document, mixlm=MixLMPart(S, W)))
    labels = {label: small_tokenizer().label(label) for label in LABELS[:2]}
    part = MixLMPart(S, W, encoder.hash, ("title",))
    ranker = Contract("ranker", STUDENT, {"pair": prompts["ranker"]}, labels, ACTIONS["jobs"])
    untrained(folder / "plain", ranker)
    untrained(folder / "ranker", dataclasses.replace(ranker, mixlm=part))
    untrained(folder / "retriever", Contract("bi_encoder", STUDENT, {"query": prompts["query"], **document}))
    return folder


@pytest.fixture(scope="module")
def store(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings of documents 0 to 5 and of one that is in no bundle; 5 is of a text that has changed since."""
    folder = tmp_path_factory.mktemp("embeddings")
    changed = dataclasses.replace(documents()[5], fields={"title": "another text"})
    stranger = Document("stranger", {"title": "Diver"})
    encode_documents(load_model(models / "encoder"), [stranger, *documents()[:5], changed], folder)
    return folder


@pytest.fixture(scope="module")
def bundle_folder(models: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "b"
    retriever = load_model(models / "retriever")
    assert build_bundle(folder, load_model(models / "ranker"), retriever, documents(), embeddings=store) == 3
    return folder


def test_a_bundle_ranks_by_embeddings_and_as_text_where_none_is_fresh(
    bundle_folder: Path, models: Path, store: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(bundle_folder, tmp_path / "moved"))  # it needs nothing that lies elsewhere
    bundle, ranker = Bundle.open(moved), load_model(models / "ranker")
    queries, every = [query("x", 0), query("x", 5)], np.arange(8)
    fetch = EmbeddingStore.open(store).fetcher(documents())
    mixed = make_mixed_scorer(ranker, documents(), fetch)(queries, [every, every])
    text = make_scorer(ranker, documents())(queries, [every, every])
    for results, by_embedding, by_text in zip(bundle.rank(queries, depth=8), mixed, text, strict=True):
        found = {result.row: result for result in results}
        for row in range(8):
            relevance = expit(by_embedding[row, 0] - by_embedding[row, 1])
            np.testing.assert_allclose(found[row].relevance, relevance, atol=1e-5)
            np.testing.assert_allclose(
                list(found[row].actions.values()), expit(by_embedding[row, 2:]), atol=1e-5
            )
            as_text = abs(found[row].relevance - expit(by_text[row, 0] - by_text[row, 1])) < 1e-5
            assert as_text == (row in (5, 6, 7))
    assert bundle.scorer.embedded == 10  # type: ignore[attr-defined]
    assert bundle.scorer.as_text == 6  # type: ignore[attr-defined]


def test_a_bundle_holds_the_embeddings_of_its_own_documents(bundle_folder: Path, store: Path) -> None:
    kept, whole = EmbeddingStore.open(bundle_folder / "embeddings"), EmbeddingStore.open(store)
    assert (len(kept), len(whole)) == (5, 7)
    for mine, theirs in zip(kept.fetch(documents()[:5]), whole.fetch(documents()[:5]), strict=True):
        assert mine is not None
        assert theirs is not None
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("name", ["store.json", "embeddings/zarr.json", "embeddings/c/0/0/0", "new"])
def test_changed_embeddings_are_noticed(bundle_folder: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(bundle_folder, tmp_path / "copy"))
    path = copy / "embeddings" / name
    path.write_bytes((path.read_bytes() if name != "new" else b"") + b"\n")
    with pytest.raises(BundleError, match="embeddings_sha256 changed since the bundle was built"):
        Bundle.open(copy)
    shutil.rmtree(copy / "embeddings")
    with pytest.raises(BundleError, match="embeddings_sha256 changed since the bundle was built"):
        Bundle.open(copy)


def test_embeddings_of_another_encoder_under_a_good_hash(bundle_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle_folder, tmp_path / "copy"))
    path = copy / "embeddings/store.json"
    meta = json.loads(path.read_text())

    def opened(change: dict[str, object]) -> None:
        path.write_text(json.dumps(meta | change))
        values = json.loads((copy / BUNDLE_FILE).read_text()) | bundles._data_hashes(copy)
        (copy / BUNDLE_FILE).write_text(json.dumps(values))
        Bundle.open(copy)

    opened({})
    with pytest.raises(BundleError, match=r"embeddings cannot be used \(.* with encoder ffffffffffff"):
        opened({"encoder": "f" * 64})
    array = copy / "embeddings/embeddings/zarr.json"
    values = json.loads(array.read_text())
    array.write_text(json.dumps(values | {"shape": [10**9, S, W]}))
    with pytest.raises(BundleError, match=r"1000000000 rows for 5 of 8 documents"):
        opened({"rows": 10**9})
    array.write_text(json.dumps(values))
    (copy / "embeddings/embeddings/c/0/0/0").unlink()
    with pytest.raises(BundleError, match=r"5 rows need 480 bytes, which the files do not hold"):
        opened({})


@pytest.mark.parametrize("start", [0, 1], ids=["as many rows", "fewer rows"])
def test_a_bundle_that_is_replaced_while_its_embeddings_are_read_is_not_opened(
    bundle_folder: Path,
    models: Path,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    start: int,
) -> None:
    """Its index would say which rows are whose, the array of the other one would give them."""
    copy, real = Path(shutil.copytree(bundle_folder, tmp_path / "copy")), EmbeddingStore.preload
    ranker, retriever = load_model(models / "ranker"), load_model(models / "retriever")
    corpus = documents()[start:][::-1]

    def replace_first(self: EmbeddingStore) -> None:
        monkeypatch.undo()
        build_bundle(copy, ranker, retriever, corpus, embeddings=store)
        real(self)

    monkeypatch.setattr(EmbeddingStore, "preload", replace_first)
    with pytest.raises(BundleError, match=r"was replaced while it was read: open it again"):
        Bundle.open(copy)
    assert Bundle.open(copy).documents == corpus


def test_embeddings_are_copied_in_parts(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_store, "PART", 2)
    corpus = [*documents()[:5][::-1], Document("short", {"title": "a"})]
    encode_documents(load_model(models / "encoder"), corpus, tmp_path / "from")
    source = EmbeddingStore.open(tmp_path / "from")
    assert copy_embeddings(source, [*documents(), corpus[-1]], tmp_path / "to") == 3
    found = EmbeddingStore.open(tmp_path / "to")
    for mine, theirs in zip(found.fetch(corpus), source.fetch(corpus), strict=True):
        assert mine is not None
        assert theirs is not None
        np.testing.assert_array_equal(mine, theirs)
    with pytest.raises(EmbeddingStoreError, match="is not empty: give a new place"):
        copy_embeddings(source, documents(), tmp_path / "to")
    found.preload()
    np.testing.assert_array_equal(found.fetch(corpus[:1])[0], source.fetch(corpus[:1])[0])  # type: ignore[arg-type]


def test_what_cannot_be_built(models: Path, store: Path, tmp_path: Path) -> None:
    ranker, retriever = load_model(models / "ranker"), load_model(models / "retriever")
    plain, target = load_model(models / "plain"), tmp_path / "b"
    with pytest.raises(
        ContractError, match="this ranker reads no embeddings: give the model folder of a MixLM ranker"
    ):
        build_bundle(target, plain, retriever, documents(), embeddings=store)
    with pytest.raises(BundleError, match=r"summaries are x, embeddings .*: a ranker reads one of them"):
        build_bundle(target, ranker, retriever, documents(), summaries="x", embeddings=store)
    part = dataclasses.replace(ranker.contract.mixlm, encoder="e" * 64)  # type: ignore[type-var]
    other = dataclasses.replace(ranker, contract=dataclasses.replace(ranker.contract, mixlm=part))
    with pytest.raises(EmbeddingStoreError, match=r"with encoder .* \(not eeeeeeeeeeee\): make a store with"):
        build_bundle(target, other, retriever, documents(), embeddings=store)
    with pytest.raises(EmbeddingStoreError, match="has no fresh embedding of any of 3 documents: run"):
        build_bundle(target, ranker, retriever, documents()[5:], embeddings=store)
    with pytest.raises(EmbeddingStoreError, match="holds no embedding store"):
        build_bundle(target, ranker, retriever, documents(), embeddings=tmp_path / "nowhere")
    assert not target.exists()
    values = Calibrator((), (Knots((0.0,), (0.5,)),)).to_dict()
    for training, embeddings, words in (
        ({}, str(store), "was calibrated on text, the bundle ranks by embeddings: run .* with --embeddings"),
        ({CALIBRATED_ON: "embeddings"}, "", "on embeddings, the bundle ranks by text: run .* without --emb"),
    ):
        contract = dataclasses.replace(ranker.contract, calibrators={"relevance": values}, training=training)
        with pytest.raises(BundleError, match=words):
            build_bundle(
                target,
                dataclasses.replace(ranker, contract=contract),
                retriever,
                documents(),
                embeddings=embeddings,
            )


def test_the_commands(
    models: Path,
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`calibrate`, `build` and `batch`: what is served by embeddings is calibrated by embeddings."""
    data = dataset()
    monkeypatch.setattr(jaxsearch.data.datasets, "load_dataset", lambda name, folder: data)
    out, fetch = tmp_path / "calibrated", EmbeddingStore.open(store).fetcher(documents())
    calibrate = ["calibrate", "--model", str(models / "ranker"), "--dataset", "small", "--output", str(out)]
    assert main([*calibrate, "--embeddings", str(store), "--summaries", "x"]) == 2
    assert "--summaries is x, --embeddings" in capsys.readouterr().err
    encode_documents(
        load_model(models / "encoder"), [Document("stranger", {"title": "Diver"})], tmp_path / "e"
    )
    assert main([*calibrate, "--embeddings", str(tmp_path / "e")]) == 2
    assert "which has no fresh embedding of any document of small: run" in capsys.readouterr().err
    assert not out.exists()
    assert main([*calibrate, "--embeddings", str(store)]) == 0
    assert "3 of 8 documents have no fresh embedding and are read in full" in capsys.readouterr().out
    ranker, before = load_model(out), load_model(models / "ranker")
    fitted = {name: item.to_dict() for name, item in fit_all(before, data, fetch=fetch).items()}
    assert ranker.contract.calibrators == fitted
    assert fitted != {name: item.to_dict() for name, item in fit_all(before, data).items()}
    assert ranker.contract.training[CALIBRATED_ON] == "embeddings"
    seen = observe(ranker, data, "dev", fetch=fetch)["click"]
    pages = [data.impressions[q.id] for q in data.queries["dev"]]
    rows = [np.array([data.document_row[shown.document_id] for shown in page]) for page in pages]
    logits = make_mixed_scorer(ranker, documents(), fetch)(list(data.queries["dev"]), rows)
    expected = np.concatenate([action_log_odds(x)[:, ranker.contract.actions.index("click")] for x in logits])
    np.testing.assert_allclose(seen.log_odds, expected, atol=1e-4)
    assert np.abs(seen.log_odds - observe(ranker, data, "dev")["click"].log_odds).max() > 1e-3

    lines, queries = tmp_path / "documents.jsonl", tmp_path / "queries.jsonl"
    write_lines(lines, map(to_dict, documents()))
    write_lines(queries, [to_dict(query("q", i)) for i in range(3)])
    build = ["build", "--ranker", str(out), "--retriever", str(models / "retriever")]
    build += ["--documents", str(lines), "--output", str(tmp_path / "bundle")]
    capsys.readouterr()
    assert main(build) == 2
    assert "was calibrated on embeddings, the bundle ranks by text" in capsys.readouterr().err
    assert main([*build[:2], str(models / "ranker"), *build[3:]]) == 0
    assert "8 documents, read in full: the ranker also reads embeddings" in capsys.readouterr().out
    assert main([*build, "--embeddings", str(store)]) == 0
    assert "8 documents, 3 of them without a fresh embedding" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*")), "what was begun under another name is gone"
    batch = ["batch", "--bundle", str(tmp_path / "bundle"), "--queries", str(queries)]
    assert main([*batch, "--output", str(tmp_path / "ranked"), "--depth", "8"]) == 0
    rankings = [json.loads(line) for line in (tmp_path / "ranked/rankings.jsonl").read_text().splitlines()]
    wanted = Bundle.open(tmp_path / "bundle").rank([query("q", i) for i in range(3)], depth=8)
    for row, results in zip(rankings, wanted, strict=True):
        assert [x["document_id"] for x in row["results"]] == [f"p{result.row}" for result in results]
        np.testing.assert_allclose(
            [x["score"] for x in row["results"]], [x.score for x in results], atol=1e-5
        )
