"""A bundle: everything that ranks queries, in one folder (ranker, retriever, index, documents), data only.

`bundle.json` comes last and names what belongs together. Opening a bundle checks the contracts, the hashes and the golden scores: one that
does not reproduce them is not ready.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxsearch.data.jsonl import read_records, write_lines
from jaxsearch.data.records import Document, Query, to_dict, unique_ids
from jaxsearch.errors import InputError
from jaxsearch.models.contract import Model, load_model, save_model
from jaxsearch.models.scorer import BiEncoder, Scorer
from jaxsearch.retrieval.index import ScannIndex
from jaxsearch.scoring.records import Embedder, RecordScorer, action_log_odds, relevance_log_odds

FORMAT = 1
BUNDLE_FILE = "bundle.json"


class BundleError(InputError):
    """A bundle that cannot be used; the message names what does not fit."""


def build_bundle(
    folder: str | os.PathLike[str], ranker: Model, retriever: Model, documents: Sequence[Document]
) -> None:
    """Encode the documents, build the index, and write a bundle.

    Raises:
      BundleError: the folder is not empty and no bundle, or the models are of the wrong kind.
      RecordError: a bad document, or two with one id.
    """
    root = Path(folder)
    if root.exists() and any(root.iterdir()) and not (root / BUNDLE_FILE).is_file():
        raise BundleError(f"{root} is not empty and holds no bundle: give a new folder")
    _check_kinds(ranker, retriever)
    for document in documents:
        document.validate()
    unique_ids(documents)
    root.mkdir(parents=True, exist_ok=True)
    (root / BUNDLE_FILE).unlink(missing_ok=True)
    save_model(root / "ranker", ranker.module, ranker.contract, ranker.tokenizer)
    save_model(root / "retriever", retriever.module, retriever.contract, retriever.tokenizer)
    write_lines(root / "documents.jsonl", map(to_dict, documents))
    ScannIndex.build(make_embedder(retriever).documents(documents)).save(root / "index")
    values = {
        "format": FORMAT,
        "ranker": ranker.hash,
        "retriever": retriever.hash,
        "documents": len(documents),
        "documents_sha256": _digest(root / "documents.jsonl"),
    }
    temporary = root / (BUNDLE_FILE + ".tmp")
    temporary.write_text(json.dumps(values, indent=1) + "\n")
    os.replace(temporary, root / BUNDLE_FILE)


def make_embedder(retriever: Model) -> Embedder:
    """The retriever's two towers with the prompts of its contract."""
    assert isinstance(retriever.module, BiEncoder)
    prompts = retriever.contract.prompts
    return Embedder(retriever.module, retriever.tokenizer, prompts["query"], prompts["document"])


def make_scorer(ranker: Model, documents: Sequence[Document]) -> RecordScorer:
    """The ranker with the prompt of its contract."""
    assert isinstance(ranker.module, Scorer)
    return RecordScorer(ranker.module, ranker.tokenizer, ranker.contract.prompts["pair"], documents)


def golden_error(model: Model) -> float:
    """Largest deviation from the contract's golden scores; 0 where it has none."""
    worst = 0.0
    for golden in model.contract.golden:
        if isinstance(model.module, BiEncoder):
            embedder = make_embedder(model)
            found = np.sum(embedder.queries([golden.query]) * embedder.documents([golden.document]), axis=1)
        else:
            found = make_scorer(model, [golden.document])([golden.query], [np.zeros(1, np.int32)])[0][0]
        worst = max(worst, float(np.abs(found - np.asarray(golden.scores)).max()))
    return worst


def _check_kinds(ranker: Model, retriever: Model) -> None:
    for name, model, kind in (("ranker", ranker, "ranker"), ("retriever", retriever, "bi_encoder")):
        if model.contract.kind != kind:
            raise BundleError(f"{name} is a {model.contract.kind}: give the model folder of a {kind}")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Result(NamedTuple):
    """One ranked document."""

    row: int
    """Of `Bundle.documents`."""
    score: float
    """Relevance log-odds, what results are ordered by."""
    relevance: float
    """Probability."""
    actions: dict[str, float]
    """Probability per action."""


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

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "Bundle":
        """Read and check a bundle.

        Raises:
          BundleError: missing, unfinished, its parts do not fit, or golden scores are not reproduced.
        """
        root = Path(folder)
        path = root / BUNDLE_FILE
        if not path.is_file():
            raise BundleError(f"{root} holds no {BUNDLE_FILE}: make one with `serve.py build`")
        text = path.read_text()
        try:
            values = json.loads(text)
            if values["format"] != FORMAT:
                raise BundleError(f"{path}: format is {values['format']}, this version reads {FORMAT}")
            wanted = {name: values[name] for name in ("ranker", "retriever", "documents_sha256")}
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{path} cannot be used ({error}): build the bundle anew") from error
        ranker, retriever = load_model(root / "ranker"), load_model(root / "retriever")
        _check_kinds(ranker, retriever)
        found = {
            "ranker": ranker.hash,
            "retriever": retriever.hash,
            "documents_sha256": _digest(root / "documents.jsonl"),
        }
        if differing := [name for name in wanted if wanted[name] != found[name]]:
            raise BundleError(
                f"{root}: {', '.join(differing)} changed since the bundle was built; build it anew"
            )
        for name, model in (("ranker", ranker), ("retriever", retriever)):
            if (error := golden_error(model)) > model.contract.tolerance:
                raise BundleError(
                    f"{root}: the {name} misses its golden scores by {error:.3g} (allowed {model.contract.tolerance}): not ready to serve"
                )
        documents = read_records(root / "documents.jsonl", Document)
        index = ScannIndex.load(root / "index")
        if len(index) != len(documents):
            raise BundleError(
                f"{root}: the index holds {len(index)} documents, documents.jsonl {len(documents)}; build it anew"
            )
        return cls(
            documents,
            index,
            make_embedder(retriever),
            make_scorer(ranker, documents),
            ranker.contract.actions,
            hashlib.sha256(text.encode()).hexdigest(),
        )

    def rank(
        self, queries: Sequence[Query], *, depth: int, progress: Callable[[int], None] | None = None
    ) -> list[list[Result]]:
        """Retrieve `depth` candidates per query and order them by the ranker's relevance, ties by document row.

        Raises:
          ValueError: a query that is empty or too long.
        """
        found, _ = self.index.search(self.embedder.queries(queries), min(depth, len(self.documents)))
        candidates = [row[row >= 0] for row in found]
        results = []
        for rows, logits in zip(candidates, self.scorer(queries, candidates, progress), strict=True):
            scores = relevance_log_odds(logits)
            actions = 1 / (1 + np.exp(-action_log_odds(logits)))
            results.append(
                [
                    Result(
                        int(rows[i]),
                        float(scores[i]),
                        float(1 / (1 + np.exp(-scores[i]))),
                        dict(zip(self.actions, map(float, actions[i]), strict=True)),
                    )
                    for i in np.lexsort((rows, -scores))
                ]
            )
        return results
