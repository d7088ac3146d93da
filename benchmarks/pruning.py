"""What structured pruning costs a ranker: reconstruction error and NDCG@10 of OSSCAR beside random, magnitude and activation norm.

    python benchmarks/pruning.py --model runs/demo/ranker/model --dataset job_market:tiny --data-dir runs/demo/data \
        [--mlp 0.5 --layers-drop 1 --which last --heads 0] [--recover 150 --workdir runs/recovery] \
        [--jsonl benchmarks/results/pruning.jsonl] [--set --optimizer.learning-rate 1e-3]

Two kinds of lines:

- `reconstruction`: per method and share of neurons, ||X W - X_S V||^2 / ||X W||^2 of each layer's MLP and their mean, with the dense
  model's own activations X; on the calibration queries, and on as many others that nothing was fitted to (`held_out`). The baselines
  come as published and with refitted weights (`refit`).
- `ranking`: NDCG@10 on the first --test-queries of a split of the dense model, of each method after one-shot pruning (--mlp, --layers-drop,
  --heads), and after --recover steps of the ranker's task (--config) in which the dense model's scores teach each method's pruned model,
  and the dense model itself; with the difference from dense paired by query. With --grades the task is one that learns the data set's
  own grades (--config relevance_teacher.py:tiny), as the dense model did, which may then end above it: compare with the dense model that
  went on for as long. --set hands the rest of the line to `train.py`.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from funnel import Demo
from machine import describe
from record import append, show
from stages import check_pruned

from jaxsearch.compression.calibration import Walk, choose_queries, make_batches
from jaxsearch.compression.osscar import METHODS, reduce_map, relative_error
from jaxsearch.compression.pruning import Pruning, prune_model, save_pruned
from jaxsearch.data.datasets import Dataset
from jaxsearch.errors import InputError
from jaxsearch.metrics import paired_bootstrap
from jaxsearch.models.contract import Model, load_model
from jaxsearch.models.scorer import Scorer
from jaxsearch.scoring.records import RecordScorer, relevance_log_odds
from jaxsearch.serving.first_stage import FirstStage
from jaxsearch.tasks.base import DataConfig, evaluation_lists, open_data, ranking_metrics

ARMS = [("osscar", True), *((method, refit) for refit in (False, True) for method in METHODS[1:])]
"""Method, and whether the kept weights are refitted."""


def mlp_grams(model: Model, data: Dataset, options: argparse.Namespace) -> Iterator[tuple[Any, ...]]:
    """Per layer: W of `down` [F, D], and Gram matrices [F, F] on calibration and on other queries (None where the data has too few)."""
    assert isinstance(model.module, Scorer)
    both = min(2 * options.queries, sum(len(p.documents) > 0 for p in data.pairs))
    chosen = choose_queries(data, both)
    fitted = chosen[::2] if both == 2 * options.queries else choose_queries(data, options.queries)
    parts = [fitted, chosen[1::2]] if both == 2 * options.queries else [fitted]
    walks = [
        Walk(model.module.decoder, make_batches(model, data, part, candidates=options.candidates))
        for part in parts
    ]
    for layer in range(model.contract.architecture.layers):
        w, grams = walks[0].weights(layer), []
        for walk in walks:
            walk.pass_heads(w)
            grams.append(walk.mlp_gram(w))
            walk.pass_mlp(w)
        yield w["down"], grams[0], grams[1] if len(grams) > 1 else None


def reconstruction(model: Model, data: Dataset, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One line per share and arm."""
    found: dict[tuple[float, str, bool], list[tuple[float, float, float]]] = {}
    for layer, (weights, gram, other) in enumerate(mlp_grams(model, data, options)):
        for share in options.shares:
            for method, refit in ARMS:
                started = time.perf_counter()
                keep = len(weights) - int(share * len(weights) + 0.5)
                kept = reduce_map(gram, weights, keep, method=method, refit=refit, seed=options.seed + layer)
                seconds = time.perf_counter() - started
                held_out = relative_error(other, weights, kept) if other is not None else float("nan")
                row = (relative_error(gram, weights, kept), held_out, seconds)
                found.setdefault((share, method, refit), []).append(row)
        print(f"layer {layer} reconstructed", file=sys.stderr, flush=True)
    lines = []
    for (share, method, refit), layers in found.items():
        errors, held_out, seconds = np.array(layers).T
        line = {
            "kind": "reconstruction", "method": method, "refit": refit, "share": share,
            "error": float(errors.mean()), "errors": [round(float(e), 6) for e in errors],
            "seconds": round(float(seconds.sum()), 2),
        }  # fmt: skip
        if np.isfinite(held_out).all():
            line |= {
                "held_out_error": float(held_out.mean()),
                "held_out_errors": [round(float(e), 6) for e in held_out],
            }
        lines.append(line)
    return lines


def ranking(model: Model, data: Dataset, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line per model, as soon as it is measured."""
    split = options.split or data.test_splits[0]
    queries, candidates = evaluation_lists(data, split, options.test_queries)

    def measure(module: Any, of: Model) -> np.ndarray:
        scorer = RecordScorer(module, of.tokenizer, of.contract.prompts["pair"], data.documents)
        scores = [relevance_log_odds(x) for x in scorer(queries, candidates)]
        return ranking_metrics(data, queries, candidates, scores)["ndcg@10"]

    dense = measure(model.module, model)

    def line(name: str, method: str, refit: bool, values: np.ndarray, parameters: int) -> dict[str, Any]:
        change = paired_bootstrap(values, dense)
        return {
            "kind": "ranking", "model": name, "method": method, "refit": refit, "split": split,
            "test_queries": len(queries), "ndcg@10": float(np.nanmean(values)), "params": parameters,
            "kept": float(np.nanmean(values) / np.nanmean(dense)),
            "difference": [round(float(x), 5) for x in (change.mean, change.low, change.high)],
        }  # fmt: skip

    yield line("dense", "", False, dense, model.contract.architecture.parameters)
    every = ARMS if options.mlp or options.heads else ARMS[:1]
    folders = {method: f"{options.workdir}/pruned_{method}" for method in dict(every)}
    plans = {
        arm: Pruning(
            mlp=options.mlp, heads=options.heads, layers=options.layers_drop, which=options.which, method=arm[0],
            refit=arm[1], seed=options.seed,
        )
        for arm in every
    }  # fmt: skip
    if options.methods:
        plans = {arm: plan for arm, plan in plans.items() if arm[0] in options.methods}
    # A baseline's folder holds it as published, which comes first.
    for method, plan in {method: plan for (method, _), plan in reversed(plans.items())}.items():
        if options.recover and Path(folders[method]).is_dir():
            check_pruned(Path(folders[method]), model, plan, options.queries, options.candidates)
    for (method, refit), plan in () if options.recover_only else plans.items():
        pruned = prune_model(model, data, plan, queries=options.queries, candidates=options.candidates)
        parameters = pruned.contract.architecture.parameters
        yield line("one-shot", method, refit, measure(pruned.module, model), parameters)
        if options.recover and not Path(folders[method]).is_dir():
            save_pruned(Path(folders[method]), pruned, model)
    if not options.recover:
        return
    demo = Demo(
        Path(options.workdir), options.dataset, options.data_dir, options.seed, 1, options.max_queries, False
    )
    some = "_grades" if options.grades else f"_{options.found}" if options.found else ""
    if options.grades:
        taught = demo.reads_as(model)
    else:
        first = FirstStage(None, options.found) if options.found else None
        taught = demo.taught_by(model, demo.label(f"scores{some}", model, data, options.per_query, first))
    for method, start in {**folders, "dense": options.model}.items():
        if options.methods and method not in options.methods:
            continue
        recovered = demo.train(
            f"recovered_{method}{some}", options.config, "--task.model.init-from", start, "--task.model.layers", "0",
            *taught, "--steps", str(options.recover), *options.set,
        )  # fmt: skip
        parameters = recovered.contract.architecture.parameters
        values = measure(recovered.module, recovered)
        yield line("recovered", method, method == "osscar", values, parameters) | {
            "steps": options.recover, "found": options.found, "grades": options.grades,
        }  # fmt: skip


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="model folder of a ranker")
    parser.add_argument("--dataset", default="job_market:tiny")
    parser.add_argument("--data-dir", default="runs/demo/data")
    parser.add_argument("--queries", type=int, default=64, help="calibration queries")
    parser.add_argument("--candidates", type=int, default=16, help="documents of each")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.25, 0.5, 0.75])
    parser.add_argument("--mlp", type=float, default=0.5, help="one-shot: share of neurons")
    parser.add_argument("--heads", type=float, default=0.0, help="one-shot: share of key/value heads")
    parser.add_argument("--layers-drop", type=int, default=0, help="one-shot: whole layers")
    parser.add_argument("--which", default="last", help="one-shot: last or least")
    parser.add_argument("--recover", type=int, default=0, help="steps of recovery; 0: none")
    parser.add_argument(
        "--recover-only", action="store_true", help="go on from the pruned models in --workdir"
    )
    parser.add_argument(
        "--workdir", default="runs/recovery", help="of the recoveries; finished ones are kept"
    )
    parser.add_argument("--config", default="ranker.py:tiny", help="that recovers, of configs/")
    parser.add_argument("--max-queries", type=int, default=0, help="training queries; 0: all")
    parser.add_argument("--per-query", type=int, default=16, help="pairs of each that the dense model scores")
    parser.add_argument(
        "--found", type=int, default=0, help="documents that BM25 finds for each, scored beside its pairs"
    )
    parser.add_argument(
        "--grades", action="store_true", help="recover on grades, not on the dense model's scores"
    )
    parser.add_argument(
        "--methods",
        nargs="*",
        default=[],
        help="prune and recover by these alone (dense: the control of recovery)",
    )
    parser.add_argument("--split", default="", help="default: the first test split")
    parser.add_argument("--test-queries", type=int, default=200, help="0: no ranking")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jsonl", type=Path, help="append the results to this file")
    parser.add_argument(
        "--set", nargs=argparse.REMAINDER, default=[], help="options of train.py, last of all"
    )
    options = parser.parse_args()
    model = load_model(options.model)
    if model.contract.summariser:
        raise InputError(f"--model is {options.model}, which reads summaries: give a ranker of full text")
    data = open_data(DataConfig(options.dataset, options.data_dir, max_queries=options.max_queries))
    common = {
        "command": " ".join(["python", *sys.argv]),
        "folder": options.model,
        "parent": model.hash,
        "dataset": data.name,
        "queries": options.queries,
        "candidates": options.candidates,
    }
    common["machine"] = describe()
    sizes = {name: getattr(options, name) for name in ("mlp", "heads", "layers_drop", "which")}
    for measure, wanted, own in (
        (reconstruction, bool(options.shares), {}),
        (ranking, bool(options.test_queries), sizes),
    ):
        for line in measure(model, data, options) if wanted else ():
            show(line)
            append(options.jsonl, [common | own | line])
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"pruning.py: {error}")
