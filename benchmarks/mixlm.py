"""MixLM beside its full-text teacher: what one embedding keeps, what more of them add, what each part of the recipe is worth.

    python benchmarks/funnel.py --workdir runs/demo
    python benchmarks/mixlm.py --funnel runs/demo --workdir runs/mixlm --jsonl benchmarks/results/mixlm.jsonl \
        [--arms full tokens_5 no_alignment] [--seeds 0 1 2]

An arm is the recipe of `configs/mixlm.py:tiny` with one thing changed, trained from the funnel's stages, which are the same for all
arms and seeds. Stage I alone, where the funnel has a larger judge, is trained here, once per seed, and taken away from five embeddings.
Every line has:

- NDCG@10, poor matches@10 and click AUROC on the funnel's test searches, and what share of the ranker's on full text that is;
- `shuffled`: NDCG@10 with each document's embeddings swapped for another's, beside `chance`, which is that of random orders;
- `unseen`: NDCG@10 of the same searches over postings that no stage has seen: the market's next ones, which training data ends before.
  Beside it the full-text ranker, the retriever's cosine and LightGBM (trained on seen postings) on the same lists: `lightgbm` learned
  the true grades, which no other model here has seen, `lightgbm_judge` the judge's labels, as the ranker did, `lightgbm_clicks` clicks.

Runs and lines that are there already are not made again.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from bars import judged, make_training
from funnel import AUROC, DEPTH, Demo, Evaluation, parameters, train_traditional, unseen_postings
from machine import describe
from record import append

from jaxsearch.data.datasets import Dataset
from jaxsearch.errors import InputError
from jaxsearch.metrics import auroc, paired_bootstrap
from jaxsearch.models.contract import Model, load_model
from jaxsearch.retrieval.traditional import Features, train_ranker
from jaxsearch.scoring.mixed import OnDemand, make_document_embedder, make_mixed_scorer, shuffled
from jaxsearch.scoring.records import RecordScorer, action_log_odds, relevance_log_odds
from jaxsearch.serving.bundle import make_scorer
from jaxsearch.serving.first_stage import FirstStage
from jaxsearch.tasks.base import DataConfig, open_data, ranking_metrics

VARIANT = "tiny"
TOKENS = (5, 10, 20, 50)
WORDS = (1, 5, 20)
LEARNED = {n: ("--task.tokens", str(n), "--task.encoder.init-from", "WORDS") for n in WORDS}
FROM_RANKER = ("--task.encoder.init-from", "FUNNEL/ranker/model")
ARMS: dict[str, tuple[str, ...]] = {
    "full": (),
    "long": ("--steps", "5000"),
    **{f"tokens_{n}": ("--task.tokens", str(n)) for n in TOKENS},
    "no_alignment": ("--task.align-weight", "0"),
    "no_distillation": ("--task.distill-weight", "0"),
    "labels_alone": ("--task.align-weight", "0", "--task.distill-weight", "0"),
    "one_phase": ("--task.curriculum", "0"),
    "from_base": ("--task.model.init-from", "FUNNEL/base_student/model"),
    "encoder_ranker": FROM_RANKER,
    "encoder_ranker_5": ("--task.tokens", "5", *FROM_RANKER),
    "long_first_5": ("--task.tokens", "5", *FROM_RANKER, "--task.curriculum", "0.5"),
    **{f"words_{n}": LEARNED[n] for n in WORDS},
    **{f"lesson_{n}": LEARNED[n] for n in WORDS[:2]},
    "words_5_no_alignment": (*LEARNED[5], "--task.align-weight", "0"),
    "words_5_no_distillation": (*LEARNED[5], "--task.distill-weight", "0"),
    "words_5_two_phases": (*LEARNED[5], "--task.curriculum", "0.25"),
    "words_5_stage_1": (*LEARNED[5], "--task.model.init-from", "STAGE_1"),
    "words_5_no_stage_1": (*LEARNED[5], "--task.model.init-from", "FUNNEL/base_student/model"),
    "stage_1": ("--task.tokens", "5", "--task.model.init-from", "STAGE_1"),
    "no_stage_1": ("--task.tokens", "5", "--task.model.init-from", "FUNNEL/base_student/model"),
}
"""What is changed. `from_base`: the ranker starts from a language model that has learned neither to retrieve nor to rank.
`encoder_ranker`: the encoder starts from the ranker of full text, as the mixed ranker does, not from the retriever; `long_first_5`: so,
and half of the steps in the first phase. `words_N`: N embeddings, the encoder first learns the document's words (`configs/encoder.py`),
and `configs/mixlm.py:tiny_words` goes on from there, in one phase; `words_5_NAME`: so, with one thing changed;
`lesson_N`: no further, the ranker of full text reads what that encoder says.
`stage_1`, as in the paper: the ranker starts from that language model after it learned the judge's grades and reasons; `no_stage_1`:
without that. These two have five embeddings, and the teacher of all other arms.
"""
PAPER = {
    "full": "98.0% of full text", "long": "98.0% of full text",
    "tokens_5": "+.0017", "tokens_10": "+.0044", "tokens_20": "+.0111", "tokens_50": "+.0198",
    "no_alignment": "-.0017", "no_distillation": "-.0094", "labels_alone": "-.0108", "one_phase": "-.0020",
    "two_phases": "+.0020",
    "no_stage_1": "-.0185 (of stage_1)",
}  # fmt: skip
"""Published change of NDCG@10 by each; of alignment and distillation from what both, and each alone, add to the labels."""
BARS = {
    "lightgbm_clicks": "LightGBM, clicks", "lightgbm_judge": "LightGBM, judge's labels", "lightgbm": "LightGBM, true grades",
}  # fmt: skip
TREES = 4_500
"""Training queries of LightGBM at most."""
UNSEEN = 1_200
"""Postings behind those of the data set."""


@dataclasses.dataclass
class Bench:
    """What all arms share."""

    funnel: Path
    workdir: Path
    steps: float
    test_queries: int

    @cached_property
    def demo(self) -> Demo:
        """Trains arms on the funnel's data."""
        dataset = f"job_market:{VARIANT}"
        return Demo(self.workdir, dataset, str(self.funnel / "data"), 0, self.steps, 0, False)

    @cached_property
    def data(self) -> Dataset:
        """The funnel's."""
        return open_data(DataConfig(self.demo.dataset, self.demo.data_dir))

    def stage(self, name: str) -> Model:
        """A model of the funnel."""
        if not (self.funnel / name / "model").is_dir():
            raise InputError(
                f"{self.funnel} has no {name}/model: run benchmarks/funnel.py --workdir {self.funnel} first"
            )
        return load_model(self.funnel / name / "model")

    @cached_property
    def seen(self) -> Evaluation:
        """The test searches over the data set's postings."""
        return Evaluation(self.data, "test", self.stage("retriever"), self.test_queries)

    @cached_property
    def unseen(self) -> Evaluation:
        """The test searches over postings that no stage has seen."""
        return Evaluation(
            unseen_postings(self.data, VARIANT, UNSEEN), "test", self.stage("retriever"), self.test_queries
        )

    @cached_property
    def scores(self) -> str:
        """The teacher's store: the funnel's ranker on the training pairs and on what the first stages find."""
        first = FirstStage(self.stage("retriever"), DEPTH)
        return self.demo.label("ranker_scores", self.stage("ranker"), self.data, 0, first)

    def stage_1(self, seed: int) -> Path:
        """Folder of the language model of the ranker's size that learned grades and reasons of precedents, and the judge's other grades."""
        name = f"stage_1_model_{seed}"
        self.demo.train(
            name, "judge.py:tiny_grade_first", "--task.model.init-from", str(self.funnel / "base_student/model"),
            "--task.labels", str(self.funnel / "judge_labels"),
        )  # fmt: skip
        return self.workdir / name / "model"

    def words(self, tokens: str, seed: int, ranker: str) -> Path:
        """Folder of an encoder that learned to say a document's words in this ranker's token embeddings."""
        start = "" if ranker == str(self.funnel / "ranker/model") else f"_{Path(ranker).parent.name}"
        name = f"encoder_{tokens}{start}_{seed}"
        self.demo.train(
            name, "encoder.py:tiny", "--task.model.init-from", str(self.funnel / "retriever/model"),
            "--task.ranker", ranker, "--task.tokens", tokens,
        )  # fmt: skip
        return self.workdir / name / "model"

    def train(self, arm: str, seed: int) -> tuple[Model, Model]:
        """Ranker and encoder of an arm."""
        self.stage("ranker")
        self.demo.seed = seed
        changes = [part.replace("FUNNEL", str(self.funnel)) for part in ARMS[arm]]
        if "STAGE_1" in changes:
            changes[changes.index("STAGE_1")] = str(self.stage_1(seed))
        for part, start in (("model", "ranker"), ("encoder", "retriever")):
            if f"--task.{part}.init-from" not in changes:
                changes += [f"--task.{part}.init-from", str(self.funnel / start / "model")]
        if "WORDS" in changes:
            tokens, ranker = (
                changes[changes.index(f"--task.{name}") + 1] for name in ("tokens", "model.init-from")
            )
            changes[changes.index("WORDS")] = str(self.words(tokens, seed, ranker))
        if arm.startswith("lesson"):
            reader = self.stage("ranker")
            encoder = load_model(changes[changes.index("--task.encoder.init-from") + 1])
            contract = dataclasses.replace(reader.contract, mixlm=encoder.contract.mixlm)
            return dataclasses.replace(reader, contract=contract), encoder
        name, variant = f"{arm}_{seed}", "tiny_words" if arm.startswith("words") else VARIANT
        self.demo.train(
            name, f"mixlm.py:{variant}", "--task.labels", str(self.funnel / "judge_labels"), "--task.relevance-teachers", self.scores,
            "--task.engagement-teachers", self.scores, *changes,
        )  # fmt: skip
        folder = self.workdir / name / "model"
        return load_model(folder), load_model(folder / "encoder")

    @cached_property
    def references(self) -> dict[str, dict[str, Any]]:
        """What arms stand beside: per corpus and way to rank, the NDCG@10 of each query; and the ranker's click AUROC."""
        ranker, retriever = self.stage("ranker"), self.stage("retriever")
        features, trees, clicked = train_traditional(self.data, retriever, self.seen, TREES, 0)
        labels = judged(self.funnel / "judge_labels", self.data)
        learned = make_training(self.data, retriever, self.seen, TREES, labels)
        assert clicked is not None  # the market has impressions
        judge = train_ranker(learned.spec, *learned.ranked)
        traditional = {"lightgbm": trees, "lightgbm_judge": judge, "lightgbm_clicks": clicked}
        found: dict[str, dict[str, Any]] = {}
        for name, evaluation in self.corpora.items():
            own = Features(evaluation.data.documents, features.spec, bm25=evaluation.bm25)
            scores = {
                "full_text": relevance(make_scorer(ranker, evaluation.data.documents), evaluation),
                "retrieval": evaluation.semantic(retriever).scores,
                "chance": chance(evaluation),
                **{key: evaluation.traditional(own, x, None).scores for key, x in traditional.items()},
            }
            found[name] = {key: ndcg(evaluation, values) for key, values in scores.items()}
        found["seen"][AUROC] = clicks(make_scorer(ranker, self.data.documents), ranker, self.seen)
        return found

    @property
    def corpora(self) -> dict[str, Evaluation]:
        """Both."""
        return {"seen": self.seen, "unseen": self.unseen}

    def measure(self, arm: str, seed: int) -> dict[str, Any]:
        """An arm's line."""
        ranker, encoder = self.train(arm, seed)
        line: dict[str, Any] = {"arm": arm, "seed": seed, "parameters": parameters(ranker)}
        for name, evaluation in self.corpora.items():
            documents, there = evaluation.data.documents, self.references[name]
            fetch = OnDemand(make_document_embedder(encoder), documents)
            scorer = make_mixed_scorer(ranker, documents, fetch)
            values = ndcg(evaluation, relevance(scorer, evaluation))
            if name == "seen":
                line |= {
                    "poor_match@10": self.poor(scorer, evaluation),
                    AUROC: clicks(scorer, ranker, evaluation),
                }
                line["clicks_kept"] = (line[AUROC] - 0.5) / (there[AUROC] - 0.5)
            figures = {"ndcg@10": mean(values), "kept": mean(values) / mean(there["full_text"])}
            for other in ("full_text", "retrieval", *BARS):
                change = paired_bootstrap(values, there[other])
                figures[other] = mean(there[other])
                figures[f"over_{other}"] = [round(x, 5) for x in (change.mean, change.low, change.high)]
            scorer.fetch = shuffled(fetch, np.arange(len(documents)))
            figures["shuffled"] = mean(ndcg(evaluation, relevance(scorer, evaluation)))
            figures["chance"] = mean(there["chance"])
            figures["queries"] = len(evaluation.queries)
            line |= figures if name == "seen" else {"unseen": figures}
        return line

    @staticmethod
    def poor(scorer: RecordScorer, evaluation: Evaluation) -> float:
        """Poor matches@10."""
        scores = relevance(scorer, evaluation)
        found = ranking_metrics(evaluation.data, evaluation.queries, evaluation.candidates, scores)
        return float(np.nanmean(found["poor_match@10"]))


def relevance(scorer: RecordScorer, evaluation: Evaluation) -> list[np.ndarray]:
    """What the candidates are ordered by, one [L] per query."""
    return [relevance_log_odds(x) for x in scorer(evaluation.queries, evaluation.candidates)]


def chance(evaluation: Evaluation) -> list[np.ndarray]:
    """Random orders."""
    rng = np.random.default_rng(0)
    return [rng.random(len(rows)) for rows in evaluation.candidates]


def ndcg(evaluation: Evaluation, scores: list[np.ndarray]) -> np.ndarray:
    """NDCG@10 of each query."""
    return ranking_metrics(evaluation.data, evaluation.queries, evaluation.candidates, scores)["ndcg@10"]


def clicks(scorer: RecordScorer, model: Model, evaluation: Evaluation) -> float:
    """AUROC of the first action on the test searches' pages."""
    place = model.contract.actions.index(evaluation.action)
    values = action_log_odds(np.concatenate(scorer(evaluation.queries, evaluation.page_rows)))[:, place]
    return auroc(values, evaluation.clicks, where=np.ones(evaluation.clicks.shape, bool))


def mean(values: np.ndarray) -> float:
    """Of the queries that have a value."""
    return float(np.nanmean(values))


# --- the report ------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    """Lines that are there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def compared(arm: str) -> str:
    """The arm that it is a change of."""
    if arm.endswith("stage_1"):
        return arm.replace("no_", "")
    return "words_5" if arm.startswith("words_5") else "full"


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: one line per arm, means over seeds, the published change beside it."""
    names = (
        "arm",
        "seeds",
        "NDCG@10",
        "kept",
        "change",
        "published change",
        "click AUROC",
        "shuffled",
        "chance",
    )
    names += ("unseen: MixLM", "full text", "retrieval", *BARS.values())
    rows = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    measured = {(line["arm"], line["seed"]): line["ndcg@10"] for line in lines}
    for arm in ARMS:
        mine = [line for line in lines if line["arm"] == arm]
        if not mine:
            continue

        def average(*path: str, mine: list[dict[str, Any]] = mine) -> str:
            values = []
            for line in mine:
                value: Any = line
                for key in path:
                    value = value[key]
                values.append(value)
            return f"{np.mean(values):.4f}"

        beside = compared(arm)
        pairs = [(x["ndcg@10"], measured.get((beside, x["seed"]))) for x in mine]
        changes = [value - other for value, other in pairs if other is not None]
        change = "-" if arm == beside or not changes else f"{np.mean(changes):+.4f}"
        unseen = [average("unseen", key) for key in ("ndcg@10", "full_text", "retrieval", *BARS)]
        cells = [
            arm,
            str(len(mine)),
            average("ndcg@10"),
            average("kept"),
            change,
            PAPER.get(arm.removeprefix("words_5_"), "-"),
            average(AUROC),
        ]
        rows.append("| " + " | ".join([*cells, average("shuffled"), average("chance"), *unseen]) + " |")
    return "\n".join(rows) + "\n"


def draw(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """NDCG@10 over T_S, and the arms of the recipe with every seed as a point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5))
    curves = {
        "encoder from the retriever": [(1, "full"), *((n, f"tokens_{n}") for n in TOKENS)],
        "encoder that learned the words": [(n, f"words_{n}") for n in WORDS],
    }
    for label, curve in curves.items():
        points = [(n, line["ndcg@10"]) for n, arm in curve for line in lines if line["arm"] == arm]
        if points:
            (dots,) = axes[0].plot(*zip(*points, strict=True), "o")
            means = {n: np.mean([y for x, y in points if x == n]) for n, _ in points}
            axes[0].plot(list(means), list(means.values()), "-", color=dots.get_color(), label=label)
            axes[0].set_xscale("log")
    if lines:
        axes[0].axhline(lines[0]["full_text"], ls="--", color="grey", label="full text")
        axes[0].legend()
    axes[0].set(xlabel="embeddings per document (T_S)", ylabel="NDCG@10 (gain 2^g - 1)")
    # What a curve shows stands there alone, but for the arms that others are a change of.
    of_curve = {arm for curve in curves.values() for _, arm in curve} - {*map(compared, ARMS)}
    arms = [arm for arm in ARMS if arm not in of_curve and any(x["arm"] == arm for x in lines)]
    for place, arm in enumerate(arms):
        values = [line["ndcg@10"] for line in lines if line["arm"] == arm]
        axes[1].plot(values, [place] * len(values), "o")
    axes[1].set_yticks(
        range(len(arms)),
        [f"{arm}, T_S = {ARMS[arm][1]}" if "--task.tokens" in ARMS[arm] else arm for arm in arms],
    )
    axes[1].invert_yaxis()
    axes[1].set(xlabel="NDCG@10, a point per run", title="T_S = 1, where nothing else is said")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--funnel", type=Path, default=Path("runs/demo"), help="folder of benchmarks/funnel.py"
    )
    parser.add_argument("--workdir", type=Path, default=Path("runs/mixlm"))
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--curve-seeds", type=int, nargs="*", default=[0], help="seeds of the curve over T_S")
    parser.add_argument(
        "--steps", type=float, default=1.0, help="multiplies every arm's steps, for a quick look"
    )
    parser.add_argument("--test-queries", type=int, default=800)
    parser.add_argument("--jsonl", type=Path, default=Path("runs/mixlm/mixlm.jsonl"))
    options = parser.parse_args()
    options.workdir.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str((options.workdir / "compiled").resolve()))
    bench = Bench(options.funnel, options.workdir, options.steps, options.test_queries)
    common = {
        "dataset": bench.data.name, "steps": options.steps, "test_queries": options.test_queries,
        "ranker": load_model(options.funnel / "ranker/model").hash[:12],
    }  # fmt: skip
    for arm in options.arms:
        for seed in options.curve_seeds if arm.startswith("tokens") else options.seeds:
            known = [
                line
                for line in read(options.jsonl)
                if (line["arm"], line["seed"]) == (arm, seed) and common.items() <= line.items()
            ]
            if not known:
                line = bench.measure(arm, seed)
                print(json.dumps(line), flush=True)
                command = " ".join(["python", *sys.argv])
                append(options.jsonl, [{"command": command} | common | line | {"machine": describe()}])
    lines = [line for line in read(options.jsonl) if common.items() <= line.items()]
    print(table(lines))
    draw(options.jsonl.with_suffix(".png"), lines)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"mixlm.py: {error}")
