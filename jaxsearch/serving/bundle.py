"""A bundle: everything that ranks queries, in one folder (ranker, retriever, index, documents, and their embeddings for MixLM), data only.

`bundle.json` comes last and names what belongs together. Opening a bundle checks the contracts, the hashes and the golden scores: one that
does not reproduce them is not ready. A MixLM ranker's are those of its text; `encode` proved the encoder's when it filled the store.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxsearch.data.jsonl import read_records, read_rows, write_lines
from jaxsearch.data.records import Document, Query, to_dict, unique_ids
from jaxsearch.data.summaries import FIELD, show_documents, with_summary
from jaxsearch.errors import InputError
from jaxsearch.models.contract import RELEVANCE, ContractError, Model, load_model, save_model
from jaxsearch.models.mixlm import DocumentEncoder
from jaxsearch.models.scorer import BiEncoder, Scorer
from jaxsearch.retrieval.common import new_folder
from jaxsearch.retrieval.exhaustive import filter_mask
from jaxsearch.retrieval.index import ScannIndex
from jaxsearch.scoring.calibration import (
    CALIBRATED_ON,
    Calibrator,
    load_calibrators,
    objective_log_odds,
    probabilities,
)
from jaxsearch.scoring.embedding_store import ARRAY, EmbeddingStore, EmbeddingStoreError, copy_embeddings
from jaxsearch.scoring.mixed import encoder_golden_error, make_mixed_scorer, mixlm_part
from jaxsearch.scoring.records import Embedder, RecordScorer
from jaxsearch.scoring.summaries import make_summary_writer
from jaxsearch.scoring.utility import UtilityConfig, order, utility

FORMAT = 4
_READ = (1, 2, 3, 4)
"""Format 1 knew no utility: it orders by relevance alone. Format 2 knew no summaries, format 3 no embeddings."""
BUNDLE_FILE = "bundle.json"
SUMMARIES_FILE = "summaries.jsonl"
"""What the ranker reads in the place of text, document by document in their order; not there where it reads the text."""
EMBEDDINGS = "embeddings"
"""Store of the documents' embeddings, where the ranker reads those."""


class BundleError(InputError):
    """A bundle that cannot be used; the message names what does not fit."""


def build_bundle(
    folder: str | os.PathLike[str],
    ranker: Model,
    retriever: Model,
    documents: Sequence[Document],
    config: UtilityConfig | None = None,
    summaries: str | os.PathLike[str] = "",
    embeddings: str | os.PathLike[str] = "",
) -> int:
    """Encode the documents, build the index, and write a bundle; one that is there stays as it is until the new one is whole.

    Args:
      folder: of the bundle.
      ranker: with its calibrators, where it has some.
      retriever: a bi-encoder.
      documents: the corpus.
      config: what results are ordered by; left out: relevance alone.
      summaries: store of summaries that the ranker reads in the place of text; the retriever reads the text.
      embeddings: store of embeddings that a MixLM ranker reads in the place of text, a folder or URL; those of the corpus are copied.

    Returns:
      How many documents the ranker reads in full, as text.

    Raises:
      InputError: the utility names an action that the ranker does not score.
      SummaryStoreError: the store cannot be read, or the ranker was trained on the summaries of another summariser.
      EmbeddingStoreError: the store cannot be read, is of another encoder than the ranker's, or has none of the documents.
      ContractError: there are embeddings, and the ranker reads none.
      BundleError: the folder is not empty and no bundle, there is no document, the models are of the wrong kind, there are both summaries
        and embeddings, or the ranker was calibrated on the other of text and embeddings.
      RecordError: a bad document, or two with one id.
    """
    root = Path(folder)
    if root.exists() and any(root.iterdir()) and not (root / BUNDLE_FILE).is_file():
        raise BundleError(f"{root} is not empty and holds no bundle: give a new folder")
    _check_kinds(ranker, retriever)
    config = config or UtilityConfig()
    config.check(ranker.contract.actions)
    if not documents:
        raise BundleError("there are no documents: give at least one")
    for document in documents:
        document.validate()
    unique_ids(documents)
    if summaries and embeddings:
        raise BundleError(
            f"summaries are {summaries}, embeddings {embeddings}: a ranker reads one of them in the place of text, leave the other out"
        )
    shown = show_documents(documents, summaries, ranker.contract.summariser)
    store = EmbeddingStore.open(str(embeddings), mixlm_part(ranker)) if embeddings else None
    _check_calibration(ranker, "embeddings" if embeddings else "text")
    as_text = shown.full
    with new_folder(root.resolve()) as new:
        values: dict[str, object] = {"format": FORMAT, "documents": len(documents)}
        for name, model in (("ranker", ranker), ("retriever", retriever)):
            values[name] = save_model(new / name, model.module, model.contract, model.tokenizer)
        write_lines(new / "documents.jsonl", map(to_dict, documents))
        if shown.summariser:
            values["summariser"] = shown.summariser
            pairs = zip(shown.documents, documents, strict=True)
            rows = [{FIELD: "" if read is full else read.fields[FIELD]} for read, full in pairs]
            write_lines(new / SUMMARIES_FILE, rows)
        if store is not None:
            values["encoder"] = store.meta.encoder
            as_text = copy_embeddings(store, documents, new / EMBEDDINGS)
        ScannIndex.build(make_embedder(retriever).documents(documents)).save(new / "index")
        values |= {**_data_hashes(new), "utility": config.to_dict()}
        (new / BUNDLE_FILE).write_text(json.dumps(values, indent=1) + "\n")
    return as_text


def make_embedder(retriever: Model) -> Embedder:
    """The retriever's two towers with the prompts of its contract.

    Raises:
      ContractError: another kind of model.
    """
    if not isinstance(retriever.module, BiEncoder):
        raise ContractError(
            f"the retriever is a {retriever.contract.kind}: give the model folder of a bi_encoder"
        )
    prompts = retriever.contract.prompts
    return Embedder(retriever.module, retriever.tokenizer, prompts["query"], prompts["document"])


def make_scorer(ranker: Model, documents: Sequence[Document]) -> RecordScorer:
    """The ranker with the prompt of its contract."""
    assert isinstance(ranker.module, Scorer)
    return RecordScorer(ranker.module, ranker.tokenizer, ranker.contract.prompts["pair"], documents)


def golden_error(model: Model) -> float:
    """Largest deviation from the contract's golden scores (of an encoder a share); 0 where it has none, NaN where a score is no number."""
    golden = model.contract.golden
    if not golden:
        return 0.0
    queries, documents = [g.query for g in golden], [g.document for g in golden]
    if isinstance(model.module, BiEncoder):
        embedder = make_embedder(model)
        found = np.sum(embedder.queries(queries) * embedder.documents(documents), axis=1, keepdims=True)
    elif model.contract.kind == "summariser":
        found = make_summary_writer(model).first_log_probs(documents)
    elif isinstance(model.module, DocumentEncoder):
        return encoder_golden_error(model)
    else:
        rows = [np.array([i], np.int32) for i in range(len(golden))]
        found = np.concatenate(make_scorer(model, documents)(queries, rows))
    return float(np.abs(found - np.array([g.scores for g in golden])).max())


def _check_kinds(ranker: Model, retriever: Model) -> None:
    for name, model, kind in (("ranker", ranker, "ranker"), ("retriever", retriever, "bi_encoder")):
        if model.contract.kind != kind:
            raise BundleError(f"{name} is a {model.contract.kind}: give the model folder of a {kind}")


def _check_calibration(ranker: Model, reads: str) -> None:
    """Refuse a MixLM ranker whose calibrators were fitted to other scores than those of what it will read."""
    fitted = ranker.contract.training.get(CALIBRATED_ON, "text")
    if ranker.contract.mixlm is not None and ranker.contract.calibrators and fitted != reads:
        raise BundleError(
            f"the ranker was calibrated on {fitted}, the bundle ranks by {reads}: run `serve.py calibrate` "
            f"{'with' if reads == 'embeddings' else 'without'} --embeddings"
        )


def _check_golden(root: Path, name: str, model: Model) -> None:
    allowed = model.contract.tolerance
    try:
        deviation = golden_error(model)
    except FloatingPointError as error:
        raise BundleError(
            f"{root}: the {name} gives scores that are no numbers ({error}): not ready to serve"
        ) from error
    if not deviation <= allowed:
        raise BundleError(
            f"{root}: the {name} misses its golden scores by {deviation:.3g} (allowed {allowed}): not ready to serve"
        )


def _data_hashes(root: Path) -> dict[str, str]:
    """SHA-256 of the documents, of the index with the names of its files, and of summaries and embeddings where there are some."""
    hashes = {
        "documents_sha256": _digest(root / "documents.jsonl"),
        "index_sha256": _digest_folder(root / "index"),
    }
    if (root / SUMMARIES_FILE).is_file():
        hashes["summaries_sha256"] = _digest(root / SUMMARIES_FILE)
    if (root / EMBEDDINGS).is_dir():
        hashes["embeddings_sha256"] = _digest_folder(root / EMBEDDINGS)
    return hashes


def _digest_folder(folder: Path) -> str:
    """Of every file in it and its name."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()} {_digest(path)}\n".encode())
    return digest.hexdigest()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_shown(root: Path, documents: Sequence[Document]) -> list[Document]:
    """The documents as the ranker reads them."""
    try:
        rows = [row[FIELD] for _, row in read_rows(root / SUMMARIES_FILE)]
        return [with_summary(document, text) for document, text in zip(documents, rows, strict=True)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BundleError(
            f"{root / SUMMARIES_FILE} cannot be used ({error}): build the bundle anew"
        ) from error


def _make_mixed_scorer(root: Path, ranker: Model, documents: Sequence[Document]) -> RecordScorer:
    """The ranker on the bundle's embeddings, and on the text of documents that have none."""
    folder = root / EMBEDDINGS
    try:
        store = EmbeddingStore.open(folder, mixlm_part(ranker))
        meta = store.meta
        if not meta.rows == len(store) <= len(documents):
            raise EmbeddingStoreError(f"{meta.rows} rows for {len(store)} of {len(documents)} documents")
        size = meta.rows * meta.tokens * meta.width * (2 if meta.dtype == "bfloat16" else 4)
        # Chunks are not compressed: a claim of more than the files hold would fill the memory.
        if size > sum(path.stat().st_size for path in (folder / ARRAY / "c").rglob("*") if path.is_file()):
            raise EmbeddingStoreError(f"{meta.rows} rows need {size} bytes, which the files do not hold")
        store.preload()
    except (ContractError, EmbeddingStoreError) as error:
        raise BundleError(f"{folder} cannot be used ({error}): build the bundle anew") from error
    return make_mixed_scorer(ranker, documents, store.fetcher(documents))


def _check_unchanged(path: Path, text: str) -> None:
    """Refuse a bundle that another one has taken the place of: its file names the hashes of all that lies beside it."""
    try:
        now = path.read_text()
    except OSError:
        now = ""
    if now != text:
        raise BundleError(f"{path.parent} was replaced while it was read: open it again")


class Result(NamedTuple):
    """One ranked document."""

    row: int
    """Of `Bundle.documents`."""
    score: float
    """Utility, what results are ordered by."""
    relevance: float
    """Probability, calibrated where the ranker has a calibrator."""
    actions: dict[str, float]
    """Probability per action at the serving position, calibrated likewise."""


@dataclass(frozen=True)
class Bundle:
    """An opened bundle, ready to rank."""

    documents: Sequence[Document]
    index: ScannIndex
    embedder: Embedder
    scorer: RecordScorer
    actions: tuple[str, ...]
    hash: str
    """SHA-256 of bundle.json: what results were made with."""
    calibrators: Mapping[str, Calibrator] = field(default_factory=dict)
    """By objective; what has none is the sigmoid of its log-odds."""
    position: int = 1
    """The serving position, which actions are calibrated at."""
    utility: UtilityConfig = field(default_factory=UtilityConfig)
    """What results are ordered by; replace it with `with_utility`."""

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "Bundle":
        """Read and check a bundle.

        Raises:
          BundleError: missing, unfinished, its parts do not fit, or golden scores are not reproduced.
          ContractError: a model folder in it cannot be read.
        """
        root = Path(folder)
        path = root / BUNDLE_FILE
        if not path.is_file():
            raise BundleError(f"{root} holds no {BUNDLE_FILE}: make one with `serve.py build`")
        text = path.read_text()
        try:
            values = json.loads(text)
            if values["format"] not in _READ:
                raise BundleError(f"{path}: format is {values['format']}, this version reads {FORMAT}")
            names = ["ranker", "retriever", "documents_sha256", "index_sha256"]
            summariser = values.get("summariser", "")
            names += ["summaries_sha256"] * bool(summariser)
            names += ["embeddings_sha256"] * ("encoder" in values)
            wanted = {name: values[name] for name in names}
            hashes = _data_hashes(root)
            config = UtilityConfig() if values["format"] == 1 else UtilityConfig.from_dict(values["utility"])
        except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
            raise BundleError(f"{path} cannot be used ({error}): build the bundle anew") from error
        ranker, retriever = load_model(root / "ranker"), load_model(root / "retriever")
        _check_kinds(ranker, retriever)
        found = {"ranker": ranker.hash, "retriever": retriever.hash, **hashes}
        if differing := [name for name in wanted if wanted[name] != found.get(name)]:
            raise BundleError(
                f"{root}: {', '.join(differing)} changed since the bundle was built; build it anew"
            )
        try:
            config.check(ranker.contract.actions)
        except InputError as error:
            raise BundleError(f"{path} cannot be used ({error}): build the bundle anew") from error
        for name, model in (("ranker", ranker), ("retriever", retriever)):
            _check_golden(root, name, model)
        documents = read_records(root / "documents.jsonl", Document)
        try:
            index = ScannIndex.load(root / "index")
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise BundleError(f"{root}: the index cannot be used ({error}): build the bundle anew") from error
        _check_unchanged(path, text)
        if len(index) != len(documents):
            raise BundleError(
                f"{root}: the index holds {len(index)} documents, documents.jsonl {len(documents)}; build it anew"
            )
        if "encoder" in values:
            try:
                scorer: RecordScorer = _make_mixed_scorer(root, ranker, documents)
            except BundleError:
                _check_unchanged(path, text)  # what looks damaged may be half of another bundle
                raise
        else:
            scorer = make_scorer(ranker, _read_shown(root, documents) if summariser else documents)
        _check_unchanged(path, text)
        return cls(
            documents,
            index,
            make_embedder(retriever),
            scorer,
            ranker.contract.actions,
            hashlib.sha256(text.encode()).hexdigest(),
            load_calibrators(ranker.contract),
            ranker.contract.prompts["pair"].serving_position,
            config,
        )

    def with_utility(self, config: UtilityConfig) -> "Bundle":
        """The same bundle with another final order.

        Raises:
          InputError: it names an action that the ranker does not score.
        """
        config.check(self.actions)
        return replace(self, utility=config)

    def rank(
        self, queries: Sequence[Query], *, depth: int, progress: Callable[[int], None] | None = None
    ) -> list[list[Result]]:
        """Retrieve `depth` candidates per query and order them by utility, ties by relevance log-odds, then by document row.

        Raises:
          InputError: a query that is empty or too long, or filters on an attribute that no document has.
        """
        candidates = self._candidates(queries, depth)
        logits = self.scorer(queries, candidates, progress)
        return [self._order(rows, found) for rows, found in zip(candidates, logits, strict=True)]

    def _order(self, rows: np.ndarray, logits: np.ndarray) -> list[Result]:
        """The results of one query, whose documents (rows [L]) got these logits [L, 2 + A]."""
        log_odds = objective_log_odds(logits, self.actions)
        found = probabilities(log_odds, self.calibrators, self.position)
        scores = utility(self.utility, found)
        return [
            Result(
                int(rows[i]),
                float(scores[i]),
                float(found[RELEVANCE][i]),
                {name: float(found[name][i]) for name in self.actions},
            )
            for i in order(self.utility, scores, log_odds[RELEVANCE], rows)
        ]

    def check(self, queries: Sequence[Query]) -> None:
        """Raise `InputError`, which names the query, unless every one of them can be ranked."""
        self.embedder.check(queries)
        self.scorer.room.prefixes(queries)
        known = sorted({name for document in self.documents for name in document.attributes})
        for query in queries:
            for name in query.filters:
                if name not in known:
                    raise InputError(
                        f"query {query.id!r} filters on {name!r}, which no document has: use one of {', '.join(known) or 'none'}"
                    )

    def settle(self, queries: Sequence[Query], *, depth: int) -> None:
        """Keep to the shapes that suit queries like these; the same queries then give the same bits in any process."""
        self.scorer.settle(queries, self._candidates(queries, depth))

    def _candidates(self, queries: Sequence[Query], depth: int) -> list[np.ndarray]:
        """Rows of at most `depth` documents per query, best first, those alone that its filters allow."""
        emb = self.embedder.queries(queries)
        found = list(self.index.search(emb, min(depth, len(self.documents)))[0])
        filtered = [i for i, query in enumerate(queries) if query.filters]
        if filtered:
            try:
                allowed = filter_mask([queries[i] for i in filtered], self.documents)
            except ValueError as error:
                raise InputError(str(error)) from error
            # The index takes no filter: these queries look at every document, and drop those that do not pass.
            every, _ = self.index.search(emb[filtered], len(self.documents))
            for i, row, may in zip(filtered, every, allowed, strict=True):
                found[i] = row[(row >= 0) & may[row]][:depth]
        return [row[row >= 0] for row in found]
