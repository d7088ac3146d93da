"""Rankers of real occupations on fixed rerank lists, beside BM25 and a random order, with their learning curves.

    ONET_DIR=... python benchmarks/real_rankers.py --runs runs/onet/retriever runs/onet/relevance_teacher --queries 200 \
        [--jsonl benchmarks/results/real_rankers.jsonl] [--figure real_rankers.png]

Each run is a work folder of `train.py`, of a retriever or of anything that answers Yes or No. All score the same lists of the first queries
of each test split; nothing is injected, so that no order can reach 1: `ceiling` is the best order's NDCG@10. One line per model and split,
with the difference from BM25 (95% interval, paired bootstrap over queries). The curve shows what the run's own metrics.jsonl says: the loss
in training, and NDCG@10 of dev queries where it was measured.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe
from record import append

from jaxsearch.data.datasets import Dataset, load_dataset
from jaxsearch.data.records import Query
from jaxsearch.errors import InputError
from jaxsearch.metrics import paired_bootstrap
from jaxsearch.models.contract import Model, load_model
from jaxsearch.retrieval.bm25 import Bm25, document_text
from jaxsearch.retrieval.common import pad_candidates
from jaxsearch.scoring.records import relevance_log_odds
from jaxsearch.serving.bundle import make_embedder, make_scorer
from jaxsearch.tasks.base import ranking_metrics

RANDOM_ORDERS = 20
Lists = list[np.ndarray]


def score(model: Model, data: Dataset, queries: list[Query], candidates: Lists) -> Lists:
    """What the model orders these candidates by."""
    if model.contract.kind == "bi_encoder":
        embedder = make_embedder(model)
        documents = embedder.documents(data.documents)
        return [documents[rows] @ q for rows, q in zip(candidates, embedder.queries(queries), strict=True)]
    if "Yes" not in model.contract.labels:
        raise InputError(
            f"--runs: a {model.contract.kind} with labels {', '.join(model.contract.labels)} answers neither Yes nor No"
        )
    return [relevance_log_odds(x) for x in make_scorer(model, data.documents)(queries, candidates)]


def _document_tokens(model: Model) -> int:
    prompts = model.contract.prompts
    return prompts["document" if "document" in prompts else "pair"].max_document_tokens


def figures(found: dict[str, np.ndarray], bm25: np.ndarray) -> dict[str, Any]:
    """Means, and the difference from BM25."""
    difference = paired_bootstrap(found["ndcg@10"], bm25)
    return {
        **{name: round(float(np.nanmean(values)), 4) for name, values in found.items()},
        "over_bm25": [round(float(x), 4) for x in (difference.mean, difference.low, difference.high)],
    }


def measure(runs: dict[str, Model], data: Dataset, split: str, limit: int) -> list[dict[str, Any]]:
    """One line per model, with BM25 and random orders."""
    queries = list(data.queries[split])[:limit]
    candidates = [data.rerank[query.id] for query in queries]

    def metrics(scores: Lists) -> dict[str, np.ndarray]:
        return ranking_metrics(data, queries, candidates, scores)

    rng = np.random.default_rng(0)
    orders = [metrics([rng.random(len(rows)) for rows in candidates]) for _ in range(RANDOM_ORDERS)]
    chance = {name: np.mean([order[name] for order in orders], axis=0) for name in orders[0]}
    padded = Bm25.build([document_text(document) for document in data.documents]).score(
        [query.text for query in queries], pad_candidates(candidates)
    )
    lexical = metrics([row[: len(rows)] for row, rows in zip(padded, candidates, strict=True)])
    best = metrics([data.grades(q, rows).astype(float) for q, rows in zip(queries, candidates, strict=True)])
    items = sum(map(len, candidates))
    about = {
        "split": split,
        "queries": len(queries),
        "items": items,
        "ceiling": round(float(np.nanmean(best["ndcg@10"])), 4),
    }
    lines = [
        {**about, "model": name, **figures(found, lexical["ndcg@10"])}
        for name, found in (("random", chance), ("bm25", lexical))
    ]
    for name, model in runs.items():
        started = time.perf_counter()
        found = metrics(score(model, data, queries, candidates))
        seconds = time.perf_counter() - started
        architecture = model.contract.architecture
        lines.append(
            {
                **about,
                "model": name,
                **figures(found, lexical["ndcg@10"]),
                "layers": architecture.layers,
                "parameters": architecture.parameters,
                "document_tokens": _document_tokens(model),
                "items_per_s": round(items / seconds, 1),
            }
        )
        print(json.dumps(lines[-1]), flush=True)
    return lines


def curve(folder: Path) -> dict[str, Any]:
    """Loss by step, NDCG@10 on dev by step, and the seconds that training took."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    dev = [row for row in rows if "dev/ndcg@10" in row]
    starts = [
        0,
        *(i + 1 for i in range(len(train) - 1) if train[i + 1]["seconds"] < train[i]["seconds"]),
        len(train),
    ]
    seconds = sum(train[end - 1]["seconds"] for end in starts[1:])
    return {
        "loss": [[row["step"], round(row["loss"], 4)] for row in train],
        "dev_ndcg@10": [[row["step"], round(row["dev/ndcg@10"], 4)] for row in dev],
        "train_s": round(seconds),
    }


def draw(path: Path, curves: dict[str, dict[str, Any]], lines: list[dict[str, Any]]) -> None:
    """Loss by step for each run, and NDCG@10 of every model on each split."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves) + 1, figsize=(5 * (len(curves) + 1), 4))
    for axis, (name, found) in zip(axes, curves.items(), strict=False):
        axis.plot(*zip(*found["loss"], strict=True))
        dev = ", ".join(f"{value:.3f} after {step}" for step, value in found["dev_ndcg@10"])
        axis.set(xlabel="step", ylabel="loss", title=f"{name}\nNDCG@10 on dev: {dev}")
    names = list(dict.fromkeys(line["model"] for line in lines))
    splits = list(dict.fromkeys(line["split"] for line in lines))
    for i, split in enumerate(splits):
        chosen = {line["model"]: line["ndcg@10"] for line in lines if line["split"] == split}
        axes[-1].barh(
            np.arange(len(names)) + 0.4 * i, [chosen[name] for name in names], height=0.4, label=split
        )
    axes[-1].set(yticks=np.arange(len(names)) + 0.2, yticklabels=names, xlabel="NDCG@10 (gain 2^g - 1)")
    axes[-1].invert_yaxis()
    axes[-1].legend()
    figure.tight_layout()
    temporary = path.with_name(f"{path.stem}.tmp.png")
    figure.savefig(temporary, dpi=100)
    pyplot.close(figure)
    os.replace(temporary, path)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", nargs="+", required=True, help="work folders of train.py")
    parser.add_argument("--queries", type=int, default=200, help="the first so many of each test split")
    parser.add_argument("--data-dir", default="", help="folder of prepared data")
    parser.add_argument("--figure", default="", help="where to draw the curves")
    parser.add_argument("--jsonl", default="", help="append the lines to this file")
    options = parser.parse_args()
    data = load_dataset("onet_jobs", options.data_dir) if options.data_dir else load_dataset("onet_jobs")
    folders = {Path(run).name: Path(run) for run in options.runs}
    models = {name: load_model(folder / "model") for name, folder in folders.items()}
    about = {"command": "python " + " ".join(sys.argv), "dataset": data.name}
    lines = [line for split in data.test_splits for line in measure(models, data, split, options.queries)]
    curves = {name: curve(folder) for name, folder in folders.items()}
    for line in lines:
        if line["model"] in curves:
            line["train_s"] = curves[line["model"]]["train_s"]
    if options.figure:
        draw(Path(options.figure), curves, lines)
    rows = [{**about, **line} for line in lines]
    rows += [{**about, "curve": name, **found} for name, found in curves.items()]
    append(options.jsonl, [*rows, {**about, "machine": describe()}])
    for line in lines:
        print(
            f"{line['split']:12} {line['model']:20} NDCG@10 {line['ndcg@10']:.4f}  over BM25 {line['over_bm25']}"
        )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"real_rankers.py: {error}")
