"""MixLM made from a pretrained decoder: an encoder and a ranker of full text, trained together and measured beside that ranker.

    python benchmarks/mixlm_pair.py --ranker runs/smollm2/ranker/model --encoder SmolLM2-135M-Instruct.Q4_1.gguf --dataset onet_jobs \
        --data-dir runs/smollm2/data --max-queries 800 --tokens 5 --steps 250 --workdir runs/mixlm_smollm2 \
        [--jsonl benchmarks/results/mixlm_pair.jsonl] [--set --task.candidates 8]

The ranker scores `--per-query` documents of each training query first, unless `--scores` names a store of its scores (`serve.py label`, or
what `benchmarks/pruning.py --recover` leaves); its prompt is what the new ranker reads by, its cut of documents holds for the encoder, too.
A line per test split: NDCG@10 (gain 2^grade - 1) on the first --test-queries of its own lists for MixLM, for the ranker on full text, with
each document's embeddings swapped for another's, and in random order; differences paired by query (95% interval). Documents of
`test_unseen` are in no training list. What a former run trained is kept. --set hands the rest of the line to `train.py`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from funnel import Demo, parameters
from machine import describe
from record import append, show

from jaxsearch.errors import InputError
from jaxsearch.metrics import paired_bootstrap
from jaxsearch.models.contract import load_model
from jaxsearch.scoring.mixed import OnDemand, make_document_embedder, make_mixed_scorer, shuffled
from jaxsearch.scoring.records import RecordScorer, relevance_log_odds
from jaxsearch.serving.bundle import make_scorer
from jaxsearch.tasks.base import DataConfig, evaluation_lists, open_data, ranking_metrics


def train(options: argparse.Namespace) -> Path:
    """The folder of the trained ranker, its encoder inside."""
    workdir = Path(options.workdir)
    demo = Demo(workdir, options.dataset, options.data_dir, options.seed, 1, options.max_queries, False)
    ranker = load_model(options.ranker)
    scores = options.scores
    if not scores:
        data = open_data(DataConfig(options.dataset, options.data_dir, max_queries=options.max_queries))
        scores = demo.label("scores", ranker, data, options.per_query)
    cut = str(ranker.contract.prompts["pair"].max_document_tokens)
    name = f"mixlm_{options.tokens}"
    demo.train(
        name, options.config, "--task.model.init-from", options.ranker, "--task.model.layers", "0",
        "--task.encoder.init-from", options.encoder, *demo.taught_by(ranker, scores),
        "--task.encoder-prompt.max-document-tokens", cut, "--task.tokens", str(options.tokens), "--steps", str(options.steps), *options.set,
    )  # fmt: skip
    return workdir / name / "model"


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A line per test split."""
    data = open_data(DataConfig(options.dataset, options.data_dir, max_queries=options.max_queries))
    full, ranker, encoder = (load_model(path) for path in (Path(options.ranker), folder, folder / "encoder"))
    fetch = OnDemand(make_document_embedder(encoder), data.documents)
    lines = []
    for split in options.splits or data.test_splits:
        queries, candidates = evaluation_lists(data, split, options.test_queries)

        def ndcg(scores: list[np.ndarray]) -> np.ndarray:
            return ranking_metrics(data, queries, candidates, scores)["ndcg@10"]  # noqa: B023 - called in this turn alone

        def read(scorer: RecordScorer) -> np.ndarray:
            return ndcg([relevance_log_odds(x) for x in scorer(queries, candidates)])  # noqa: B023 - as above

        rng, scorer = np.random.default_rng(0), make_mixed_scorer(ranker, data.documents, fetch)
        text, mixed = read(make_scorer(full, data.documents)), read(scorer)
        scorer.fetch = shuffled(fetch, np.arange(len(data.documents)))
        other, chance = read(scorer), ndcg([rng.random(len(rows)) for rows in candidates])
        figures = {"ndcg@10": mixed, "full_text": text, "shuffled": other, "chance": chance}
        change = paired_bootstrap(mixed, text)
        lines.append(
            {
                "split": split, "tokens": options.tokens, "steps": options.steps, "test_queries": len(queries),
                **{name: float(np.nanmean(values)) for name, values in figures.items()},
                "kept": float(np.nanmean(mixed) / np.nanmean(text)),
                "over_full_text": [round(float(x), 5) for x in (change.mean, change.low, change.high)],
                "parameters": parameters(ranker), "parent": full.hash,
            }
        )  # fmt: skip
    return lines


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranker", required=True, help="model folder of a ranker of full text")
    parser.add_argument("--encoder", required=True, help="what the encoder starts from")
    parser.add_argument("--scores", default="", help="store of that ranker's scores (default: made here)")
    parser.add_argument("--per-query", type=int, default=8, help="documents of a query that it scores")
    parser.add_argument("--dataset", default="onet_jobs")
    parser.add_argument("--data-dir", default="runs/smollm2/data")
    parser.add_argument("--workdir", default="runs/mixlm_smollm2")
    parser.add_argument("--config", default="mixlm.py:smollm2_135m_8l", help="of configs/")
    parser.add_argument("--tokens", type=int, default=1, help="T_S")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--max-queries", type=int, default=0, help="training queries; 0: all")
    parser.add_argument("--splits", nargs="*", default=[], help="default: every test split")
    parser.add_argument("--test-queries", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jsonl", type=Path, help="append the results to this file")
    parser.add_argument(
        "--set", nargs=argparse.REMAINDER, default=[], help="options of train.py, last of all"
    )
    options = parser.parse_args()
    common = {
        "command": " ".join(["python", *sys.argv]),
        "dataset": options.dataset,
        "machine": describe(),
        "seed": options.seed,
    }
    for line in measure(options, train(options)):
        show(line)
        append(options.jsonl, [common | line])
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"mixlm_pair.py: {error}")
