"""The store of embeddings: only what changed is encoded, interrupted jobs go on, one read for a list, refusals by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from small_market import STUDENT, documents
from small_models import SMALL, untrained

from jaxsearch.data.jsonl import write_lines
from jaxsearch.data.prompts import PromptConfig
from jaxsearch.data.records import Document, Query, content_hash, to_dict
from jaxsearch.models.contract import (
    Contract,
    ContractError,
    Golden,
    MixLMPart,
    Model,
    load_model,
    make_module,
    save_model,
)
from jaxsearch.scoring import embedding_store
from jaxsearch.scoring.embedding_store import (
    EmbeddingStore,
    EmbeddingStoreError,
    encode_documents,
)
from jaxsearch.scoring.mixed import (
    DocumentEmbedder,
    encoder_golden_error,
    golden_numbers,
    make_document_embedder,
)
from jaxsearch.serving.main import main

S, W = 6, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder that was never trained."""
    folder = tmp_path_factory.mktemp("encoder")
    contract = Contract(
        "encoder", STUDENT, {"document": PromptConfig("document", *SMALL)}, mixlm=MixLMPart(S, W)
    )
    untrained(folder, contract)
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Model:
    return load_model(folder)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the documents that were encoded, in order."""
    names: list[str] = []
    real = DocumentEmbedder.__call__

    def call(self: DocumentEmbedder, documents: list[Document]) -> list:
        names.extend(document.id for document in documents)
        return real(self, documents)

    monkeypatch.setattr(DocumentEmbedder, "__call__", call)
    return names


def short(document: Document) -> Document:
    return dataclasses.replace(document, fields={"title": "a"})


def test_what_is_encoded_is_fetched_in_one_read(encoder: Model, tmp_path: Path, monkeypatch: Any) -> None:
    corpus = [*documents()[:5], short(documents()[5])]
    report = encode_documents(encoder, corpus, tmp_path / "s", part=4)
    assert (report.documents, report.encoded, report.resumed, report.dropped) == (6, 6, 0, 0)
    store = EmbeddingStore.open(tmp_path / "s")
    assert len(store) == 6
    expected = make_document_embedder(encoder)(corpus)
    assert [len(values) for values in expected] == [S] * 5 + [2]  # a letter and its tail
    reads = []
    real = EmbeddingStore._read
    monkeypatch.setattr(
        EmbeddingStore, "_read", lambda self, rows: reads.append(len(rows)) or real(self, rows)
    )
    wanted = np.array([5, 0, 3, 0])
    for _ in range(2):
        found = store.fetcher(corpus)(wanted)
        for row, values in zip(wanted, found, strict=True):
            np.testing.assert_array_equal(values, expected[row])
        store.preload()  # from memory it is the same
    assert reads == [4, 6, 4, 6]
    assert store.fetch([]) == []


def test_new_and_changed_documents_alone_are_encoded(
    encoder: Model, tmp_path: Path, encoded: list[str]
) -> None:
    first = documents()[:4]
    encode_documents(encoder, first, tmp_path)
    old = EmbeddingStore.open(tmp_path)
    dearer = dataclasses.replace(first[1], numeric={"salary": 99.0})  # not in an embedding
    rewritten = dataclasses.replace(first[2], fields={**first[2].fields, "title": "Junior nurse"})
    second = [first[0], dearer, rewritten, documents()[6]]
    assert old.fresh(second).tolist() == [True, True, False, False]
    assert [values is None for values in old.fetch(second)] == [False, False, True, True]
    with pytest.raises(EmbeddingStoreError, match=r"no fresh embedding of 2 of 4 documents \(p2, p6\)"):
        old.require(second)
    del encoded[:]
    report = encode_documents(encoder, second, tmp_path)
    assert encoded == ["p2", "p6"]
    assert (report.encoded, report.dropped) == (2, 1)
    new = EmbeddingStore.open(tmp_path)
    new.require(second)
    assert not new.fresh([first[3]]).any()
    for values, expected in zip(new.fetch(second), make_document_embedder(encoder)(second), strict=True):
        np.testing.assert_allclose(values, expected, atol=1e-6)
    assert old.fresh(first).all()  # a reader of before keeps what it saw
    before = (tmp_path / "store.json").read_bytes()
    assert encode_documents(encoder, second, tmp_path).encoded == 0
    assert (tmp_path / "store.json").read_bytes() == before
    assert content_hash(first[1]) == content_hash(dearer) != content_hash(rewritten)


def test_an_interrupted_job_goes_on(
    encoder: Model, tmp_path: Path, encoded: list[str], monkeypatch: Any
) -> None:
    corpus = documents()
    encode_documents(encoder, corpus[:2], tmp_path)
    before = EmbeddingStore.open(tmp_path)
    real = embedding_store._pack

    def stop(entries: dict) -> bytes:
        if "p6" in entries:
            raise KeyboardInterrupt  # the rows are there, the note of them is not
        return real(entries)

    with monkeypatch.context() as patch:
        patch.setattr(embedding_store, "_pack", stop)
        with pytest.raises(KeyboardInterrupt):
            encode_documents(encoder, corpus, tmp_path, part=2)
    seen = EmbeddingStore.open(tmp_path)  # nothing of it is visible
    assert len(seen) == 2
    for a, b in zip(seen.fetch(corpus[:2]), before.fetch(corpus[:2]), strict=True):
        np.testing.assert_array_equal(a, b)
    del encoded[:]
    report = encode_documents(encoder, corpus, tmp_path, part=2)
    assert encoded == ["p6", "p7"]
    assert (report.encoded, report.resumed) == (2, 4)
    store = EmbeddingStore.open(tmp_path)
    assert store.meta.rows == 10  # two that were claimed stay unused: whoever claimed them might still write
    for values, expected in zip(store.fetch(corpus), make_document_embedder(encoder)(corpus), strict=True):
        np.testing.assert_allclose(values, expected, atol=1e-6)
    assert not (tmp_path / "building").exists() or not list((tmp_path / "building").iterdir())


def test_of_two_jobs_at_once_one_is_refused(
    encoder: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever the second one comes, no document ever gets another one's embeddings."""
    corpus, real = documents()[:4], DocumentEmbedder.__call__
    expected = make_document_embedder(encoder)(corpus)

    def run(place: Path, at: int, meanwhile: Any) -> None:
        calls = []

        def call(self: DocumentEmbedder, some: list[Document]) -> list:
            calls.append(some)
            if len(calls) == at and some != [corpus[0]]:
                meanwhile()
            return real(self, some)

        with monkeypatch.context() as patch:
            patch.setattr(DocumentEmbedder, "__call__", call)
            with pytest.raises(EmbeddingStoreError, match=r"another job writes to .*: let it end, then run"):
                encode_documents(encoder, corpus, place, part=2)

    for at in (1, 2):  # before anything of the first is there, and after its first part
        place = tmp_path / str(at)
        run(place, at, lambda place=place: encode_documents(encoder, corpus[::-1], place, part=3))
        store = EmbeddingStore.open(place)
        store.require(corpus)
        for values, wanted in zip(store.fetch(corpus), expected, strict=True):
            np.testing.assert_allclose(values, wanted, atol=1e-6)
        assert encode_documents(encoder, corpus, place).encoded == 0

    def claim() -> None:
        (tmp_path / "third/building").mkdir(exist_ok=True)
        (tmp_path / "third/building/000000.claim").write_text("2")

    run(tmp_path / "third", 1, claim)
    # That one never came back: its rows are left alone.
    encode_documents(encoder, corpus, tmp_path / "third")
    store = EmbeddingStore.open(tmp_path / "third")
    assert store.meta.rows == 6
    for values, wanted in zip(store.fetch(corpus), expected, strict=True):
        np.testing.assert_allclose(values, wanted, atol=1e-6)
    (tmp_path / "third/building").mkdir(exist_ok=True)
    (tmp_path / "third/building/000007.claim").write_text("somebody")
    with pytest.raises(EmbeddingStoreError, match=r"000007\.claim is damaged: delete the store"):
        encode_documents(encoder, documents(), tmp_path / "third")


def test_an_encoder_that_is_computed_wrongly_here_fills_no_store(encoder: Model, tmp_path: Path) -> None:
    document = documents()[0]
    numbers = golden_numbers(make_document_embedder(encoder)([document]))[0]
    assert encoder_golden_error(encoder) == 0.0  # it has none
    for factor, error in ((1.0, 0.0), (1.01, 0.01 / 1.01)):
        golden = (Golden(Query("q", "x"), document, tuple(factor * x for x in numbers)),)
        known = dataclasses.replace(encoder, contract=dataclasses.replace(encoder.contract, golden=golden))
        assert encoder_golden_error(known) == pytest.approx(error, abs=1e-5)
    with pytest.raises(EmbeddingStoreError, match=r"misses its golden embeddings by 0\.0099"):
        encode_documents(known, documents(), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_stores_that_do_not_fit_are_refused_by_name(encoder: Model, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(EmbeddingStoreError, match=r"holds no embedding store \(store.json\): run"):
        EmbeddingStore.open(tmp_path / "nowhere")
    with pytest.raises(EmbeddingStoreError, match="is no place for a store"):
        EmbeddingStore.open("nothing://here")
    path = tmp_path / "s"
    with monkeypatch.context() as patch:
        patch.setattr(embedding_store, "_publish", lambda *_: None)
        encode_documents(encoder, documents(), path)
    with pytest.raises(EmbeddingStoreError, match="is unfinished: run the same"):
        EmbeddingStore.open(path)
    assert encode_documents(encoder, documents(), path).resumed == 8
    good = MixLMPart(S, W, encoder.hash)
    EmbeddingStore.open(path, good)
    for change, name in (
        ({"encoder": "f" * 64}, "encoder"),
        ({"tokens": 1}, "tokens"),
        ({"width": 4}, "width"),
    ):
        with pytest.raises(EmbeddingStoreError, match=f"holds embeddings with {name} .* make a store with"):
            EmbeddingStore.open(path, dataclasses.replace(good, **change))
    other = make_module(encoder.contract, nnx.Rngs(7))
    save_model(tmp_path / "other", other, encoder.contract, encoder.tokenizer)
    with pytest.raises(
        EmbeddingStoreError, match=r"with encoder .* give another --output, or delete this one"
    ):
        encode_documents(load_model(tmp_path / "other"), documents(), path)
    with pytest.raises(EmbeddingStoreError, match="is not empty and holds no embedding store"):
        encode_documents(encoder, documents(), tmp_path / "other")
    with pytest.raises(EmbeddingStoreError, match="0 documents in parts"):
        encode_documents(encoder, [], path)
    base = dataclasses.replace(encoder.contract, kind="base", mixlm=None)
    with pytest.raises(ContractError, match="a base encodes no documents"):
        encode_documents(
            Model(make_module(base, nnx.Rngs(0)), base, encoder.tokenizer, ""), documents(), path
        )


def test_damage_is_refused(encoder: Model, tmp_path: Path) -> None:
    encode_documents(encoder, documents(), tmp_path)
    meta = json.loads((tmp_path / "store.json").read_text())
    for values in (
        "[]",
        "{",
        json.dumps({**meta, "rows": "8"}),
        json.dumps({**meta, "format": 2}),
        json.dumps({"a": 1}),
    ):
        (tmp_path / "store.json").write_text(values)
        with pytest.raises(EmbeddingStoreError, match=r"store.json is damaged"):
            EmbeddingStore.open(tmp_path)
    (tmp_path / "store.json").write_text(json.dumps(meta))
    index = tmp_path / meta["index"]
    good = index.read_bytes()
    index.write_bytes(good[:-4] + b"abcd")
    with pytest.raises(EmbeddingStoreError, match=r"index-000000.npz is missing or damaged"):
        EmbeddingStore.open(tmp_path)
    index.write_bytes(good)
    store = EmbeddingStore.open(tmp_path)
    (shard,) = [path for path in (tmp_path / "embeddings" / "c").rglob("*") if path.is_file()]
    data = bytearray(shard.read_bytes())
    data[5] ^= 255
    shard.write_bytes(data)
    with pytest.raises(EmbeddingStoreError, match="is damaged"):
        EmbeddingStore.open(tmp_path).fetch(documents())
    shard.unlink()
    with pytest.raises(EmbeddingStoreError, match="has lost rows"):
        store.fetch(documents())


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "d.jsonl", map(to_dict, documents()[:3]))
    options = [
        "encode",
        "--model",
        str(folder),
        "--documents",
        str(tmp_path / "d.jsonl"),
        "--output",
        str(tmp_path / "s"),
    ]
    for encoded in (3, 0):
        assert main(options) == 0
        assert f"3 documents, {encoded} of them encoded now, 0 by a run" in capsys.readouterr().out
    EmbeddingStore.open(tmp_path / "s").require(documents()[:3])
    assert main([*options[:-1], str(folder)]) == 2
    assert "is not empty and holds no embedding store" in capsys.readouterr().err


class Denied:
    """A bucket that is not ours: TensorStore says so by a ValueError."""

    def read(self, key: str) -> Any:
        raise ValueError("PERMISSION_DENIED")

    def list(self) -> Any:
        raise ValueError("PERMISSION_DENIED")


def test_places_that_cannot_be_read(encoder: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(
        EmbeddingStoreError, match=r"http://x is no place for a store: give a folder or file://, gs://"
    ):
        EmbeddingStore.open("http://x")
    encode_documents(encoder, documents()[:2], tmp_path)
    store = EmbeddingStore.open(tmp_path)
    monkeypatch.setattr(embedding_store, "_kvstore", lambda path: Denied())
    with pytest.raises(EmbeddingStoreError, match=r"gs://b/store\.json cannot be read \(PERMISSION_DENIED\)"):
        EmbeddingStore.open("gs://b")
    with pytest.raises(EmbeddingStoreError, match=r"gs://b cannot be listed \(PERMISSION_DENIED\)"):
        embedding_store.copy_embeddings(store, documents()[:2], "gs://b")
