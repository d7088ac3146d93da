"""The ScaNN index: approximate search over unit embeddings by dot product.

ScaNN takes no filter: a filtered query asks for every document and drops those that do not pass.
"""

import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import scann

from jaxsearch.retrieval.common import ABSENT, check_embeddings, check_k, new_folder

_FORMAT = 1
_SETTINGS = "index.json"
_LEAST_REORDER = 25  # results; a small k would lose documents to the coarse scores and save nothing
_LEAST_FOR_TREE = 16  # 4-bit codes have 16 centres
BRUTE_FORCE_BELOW = 10_000
"""Documents below which comparing with every one is cheap (25,000 queries/s at 10,000 x 128 on two cores) and
loses nothing."""


@dataclass(frozen=True)
class IndexParams:
    """How the index is laid out. `for_corpus` derives it from the corpus; set it yourself to trade recall for
    speed.

    `tree_ah` partitions the documents into leaves, scores the nearest leaves with 4-bit product quantisation,
    and scores the best of those again exactly.
    """

    kind: Literal["brute_force", "tree_ah"]
    leaves: int = 1
    """Partitions of the documents."""
    leaves_to_search: int = 1
    """Partitions looked into per query (more when k asks for more documents than they hold)."""
    reorder: int = 4
    """Candidates scored again exactly, per result wanted."""

    def __post_init__(self) -> None:
        if self.kind not in ("brute_force", "tree_ah"):
            raise ValueError(f"IndexParams.kind is {self.kind!r}: use 'brute_force' or 'tree_ah'")
        if not 1 <= self.leaves_to_search <= self.leaves:
            raise ValueError(
                f"IndexParams.leaves_to_search is {self.leaves_to_search}: use 1 to leaves ({self.leaves})"
            )
        if self.reorder < 1:
            raise ValueError(f"IndexParams.reorder is {self.reorder}: use at least 1")

    @classmethod
    def for_corpus(
        cls, documents: int, kind: Literal["auto", "brute_force", "tree_ah"] = "auto"
    ) -> "IndexParams":
        """The layout for a corpus of this many documents.

        Below `BRUTE_FORCE_BELOW`: brute force. From there on sqrt(documents) leaves, of which each query
        searches a fifth, and exact scores for four candidates per result: Recall@100 of 0.99 at 10,000 and at
        100,000 documents on clustered vectors of 24 latent dimensions (benchmarks/retrieval_recall.py
        measures it on yours).
        """
        if kind == "auto":
            kind = "brute_force" if documents < BRUTE_FORCE_BELOW else "tree_ah"
        if kind == "brute_force":
            return cls(kind)
        leaves = max(1, round(math.sqrt(documents)))
        return cls(kind, leaves, math.ceil(leaves / 5))


class ScannIndex:
    """A ScaNN searcher over M documents of D dimensions. Make it with `build` or `load`."""

    def __init__(
        self, params: IndexParams, searcher: "scann.ScannSearcher", documents: int, dims: int
    ) -> None:
        self.params = params
        self.documents = documents
        self.dims = dims
        self._searcher = searcher

    def __len__(self) -> int:
        return self.documents

    @classmethod
    def build(
        cls, embeddings: np.ndarray, params: IndexParams | None = None, *, threads: int = 1
    ) -> "ScannIndex":
        """Index unit embeddings; their order gives the document positions.

        The same embeddings and params give the same index (k-means++ from ScaNN's fixed seeds; random starts
        do not).

        Args:
          embeddings: fp32 [M, D], rows of length 1.
          params: the layout; by default what `IndexParams.for_corpus` says.
          threads: for building.

        Raises:
          ValueError: the embeddings are empty, not finite or not of unit length, or there are fewer documents
            than leaves.
        """
        rows = check_embeddings(embeddings, "document embeddings", unit=True)
        params = params or IndexParams.for_corpus(len(rows))
        if params.kind == "tree_ah" and len(rows) < _LEAST_FOR_TREE:
            raise ValueError(
                f"IndexParams.kind is 'tree_ah': it needs at least {_LEAST_FOR_TREE} documents, "
                f"not {len(rows)}; use 'brute_force'"
            )
        if params.leaves > len(rows):
            raise ValueError(f"IndexParams.leaves is {params.leaves}: use at most the {len(rows)} documents")
        builder = scann.scann_ops_pybind.builder(rows, min(10, len(rows)), "dot_product")
        builder.set_n_training_threads(threads)
        if params.kind == "brute_force":
            builder.score_brute_force()
        else:
            builder.tree(
                num_leaves=params.leaves,
                num_leaves_to_search=params.leaves_to_search,
                training_sample_size=min(len(rows), 250_000),
                random_init=False,
            )
            builder.score_ah(2, anisotropic_quantization_threshold=0.2)
            builder.reorder(params.reorder * _LEAST_REORDER)  # search gives its own number
        return cls(params, builder.build(), *rows.shape)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k documents with the largest dot product, approximately.

        Args:
          queries: fp32 [Q, D], rows of length 1.
          k: results per query, at least 1; may exceed the number of documents.

        Returns:
          ids int32 [Q, k] and scores fp32 [Q, k], best first, equal scores by document position; -1 and -inf
          where the searched leaves hold fewer documents.
        """
        queries = check_embeddings(queries, "query embeddings", dims=self.dims, unit=True, empty_ok=True)
        ids = np.full((len(queries), check_k(k)), ABSENT, np.int32)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        wide = min(k, self.documents)
        if not len(queries):
            return ids, scores
        params = self.params
        leaves = math.ceil(
            4 * wide * params.leaves / self.documents
        )  # with four times as many documents as k
        found, dots = self._searcher.search_batched(
            queries,
            wide,
            min(self.documents, params.reorder * max(wide, _LEAST_REORDER)),
            min(params.leaves, max(params.leaves_to_search, leaves)),
        )
        # ScaNN fills empty places with document 0 and a NaN score.
        dots = np.where(np.isnan(dots), -np.inf, dots)
        found = np.where(dots == -np.inf, ABSENT, found.astype(np.int32))
        order = np.lexsort((found, -dots))
        ids[:, :wide] = np.take_along_axis(found, order, axis=1)
        scores[:, :wide] = np.take_along_axis(dots, order, axis=1)
        return ids, scores

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the index to `folder`, whole or not at all. The folder may be moved."""
        with new_folder(folder) as new:
            self._searcher.serialize(str(new), relative_path=True)
            settings = {
                "format": _FORMAT,
                "documents": self.documents,
                "dims": self.dims,
                "params": dataclasses.asdict(self.params),
                "files": {file.name: file.stat().st_size for file in sorted(new.iterdir())},
            }
            (new / _SETTINGS).write_text(json.dumps(settings, indent=1))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "ScannIndex":
        """The index that `save` wrote, from wherever the folder lies now.

        Raises:
          FileNotFoundError: there is no index in `folder`.
          ValueError: a file is missing, cut short or foreign, or names a file outside the folder.
        """
        path = Path(folder)
        settings = json.loads((path / _SETTINGS).read_text())
        if settings.get("format") != _FORMAT:
            raise ValueError(f"{folder}: format {settings.get('format')!r}; this version reads {_FORMAT}")
        sizes = {file.name: file.stat().st_size for file in path.iterdir() if file.name != _SETTINGS}
        # ScaNN would unpickle a file of document ids: with the suffix refused here, nothing is ever
        # unpickled.
        for name in sorted({*sizes, *settings["files"]}):
            if sizes.get(name) != settings["files"].get(name) or name.endswith(".pkl"):
                raise ValueError(
                    f"{path / name}: {sizes.get(name, 'no')} bytes where the index has "
                    f"{settings['files'].get(name, 'no such file')}; copy or build the index again"
                )
        for asset in re.findall(r'asset_path:\s*"([^"]*)"', (path / "scann_assets.pbtxt").read_text()):
            if asset not in sizes:
                raise ValueError(f"{path}: the index refers to {asset!r}, which is not one of its files")
        searcher = scann.scann_ops_pybind.load_searcher(str(path), assets_backcompat_shim=False)
        if searcher.size() != settings["documents"]:
            raise ValueError(
                f"{path}: {searcher.size()} documents where {_SETTINGS} has {settings['documents']}"
            )
        return cls(IndexParams(**settings["params"]), searcher, settings["documents"], settings["dims"])


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean share of the true results that were found: Recall@k of `found` [Q, k] against the exhaustive
    `truth` [Q, k].

    Places that hold -1 in `truth` do not count; queries without any true result are left out (NaN when all
    are).
    """
    if len(found) != len(truth):
        raise ValueError(
            f"found has {len(found)} rows and truth {len(truth)}: give one row per query in both"
        )
    shares = [
        np.isin(true[true != ABSENT], row).mean()
        for row, true in zip(found, truth, strict=True)
        if (true != ABSENT).any()
    ]
    return float(np.mean(shares)) if shares else math.nan
