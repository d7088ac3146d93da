"""Recall@k and speed of the ScaNN index against the exhaustive search.

    python benchmarks/retrieval_recall.py --folder EMBEDDINGS --jsonl recall.jsonl
    python benchmarks/retrieval_recall.py --documents 100000 --dims 128

EMBEDDINGS holds `documents.npy` [M, D] and `queries.npy` [Q, D], rows of length 1. Without it, the vectors
are drawn around random centres in a latent space of `--latent` dimensions, plus noise: easier than isotropic
noise, harder than well separated clusters. Below the size at which the index searches by brute force, the
tree is measured as well: small corpora prove little.

One JSON object per layout: kind, documents, dims, queries, k, leaves, leaves_to_search, build_seconds,
recall, queries_per_s (the best of three passes over all queries), exhaustive_queries_per_s, and the shape of
the data.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from machine import describe
from record import append

from jaxsearch.retrieval.exhaustive import ExhaustiveIndex
from jaxsearch.retrieval.index import IndexParams, ScannIndex, recall


def load(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """documents [M, D] and queries [Q, D] from `folder`."""
    documents, queries = (
        np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("documents", "queries")
    )
    return documents, queries


def clustered(
    documents: int, queries: int, dims: int, latent: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Random unit vectors [documents, dims] and [queries, dims], about 200 documents around each centre."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(8, documents // 200), latent)).astype(np.float32)
    spread = (rng.normal(size=(latent, dims)) / np.sqrt(latent)).astype(np.float32)

    def draw(rows: int) -> np.ndarray:
        points = centres[rng.integers(0, len(centres), rows)] + 0.8 * rng.normal(size=(rows, latent))
        vectors = (points @ spread + 0.2 * rng.normal(size=(rows, dims))).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return draw(documents), draw(queries)


def rate(search: Callable[[], object], queries: int) -> float:
    """Queries per second: the best of three, after one pass to compile and to fill caches."""
    search()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        search()
        seconds.append(time.perf_counter() - start)
    return round(queries / min(seconds), 1)


def measure(
    documents: np.ndarray, queries: np.ndarray, k: int, threads: int, kind: str
) -> list[dict[str, object]]:
    """One row per layout."""
    oracle = ExhaustiveIndex(documents)
    truth, _ = oracle.search(queries, k)
    exhaustive = rate(lambda: oracle.search(queries, k), len(queries))
    layouts = {IndexParams.for_corpus(len(documents), kind)}  # type: ignore[arg-type]
    if kind == "auto":
        layouts.add(IndexParams.for_corpus(len(documents), "tree_ah"))
    rows = []
    for params in sorted(layouts, key=lambda params: params.kind):
        start = time.perf_counter()
        index = ScannIndex.build(documents, params, threads=threads)
        seconds = time.perf_counter() - start
        rows.append(
            {
                **dataclasses.asdict(params),
                "documents": len(documents),
                "dims": documents.shape[1],
                "queries": len(queries),
                "k": k,
                "build_seconds": round(seconds, 3),
                "recall": round(recall(index.search(queries, k)[0], truth), 4),
                "queries_per_s": rate(lambda index=index: index.search(queries, k), len(queries)),  # type: ignore[misc]
                "exhaustive_queries_per_s": exhaustive,
            }
        )
    return rows


def main() -> None:
    """Measure, print, and append to the JSON lines file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="holds documents.npy and queries.npy")
    parser.add_argument("--documents", type=int, default=20_000, help="random documents, without --folder")
    parser.add_argument("--queries", type=int, default=1_000, help="random queries, without --folder")
    parser.add_argument("--dims", type=int, default=128)
    parser.add_argument("--latent", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--kind", choices=("auto", "brute_force", "tree_ah"), default="auto")
    parser.add_argument("--threads", type=int, default=1, help="for building the index")
    parser.add_argument("--name", help="what to call the data; by default the folder's name, or clustered")
    parser.add_argument("--jsonl", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    if args.folder:
        documents, queries = load(args.folder)
    else:
        documents, queries = clustered(args.documents, args.queries, args.dims, args.latent, args.seed)
    name = args.name or (args.folder.name if args.folder else f"clustered, {args.latent} latent dimensions")
    about = describe()
    for row in measure(documents, queries, args.k, args.threads, args.kind):
        line = {"command": "python " + " ".join(sys.argv), "data": name, **row, "machine": about}
        print(json.dumps(line), flush=True)
        append(args.jsonl, [line])


if __name__ == "__main__":
    main()
