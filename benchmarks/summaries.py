"""What summaries cost a ranker: full text, plain truncation, extractive and trained summaries of equal budget, with the reward's curve.

    python benchmarks/summaries.py --workdir runs/summaries --ranker runs/demo/ranker/model --base runs/demo/base/model \
        --dataset job_market:tiny --data-dir runs/demo/data --tokens 8 4 [--jsonl benchmarks/results/summaries.jsonl]

For each budget of --tokens: summaries by truncation and by selection; a summariser that starts from --base (a language model with the
ranker's tokenizer) and imitates both, then learns from the ranker by GRPO; and for each kind of summary the ranker as it is
(`frozen`) and the ranker after --tune steps on those summaries (`tuned`), taught by its own scores of the full text. The ranker tuned as
long on full text is there too. `grpo` is rewarded by the ranker as it is; `grpo_1` by the one that was tuned on the extracts, `grpo_2` goes
on from there, rewarded by the one that was tuned on the summaries of `grpo_1`, and so on for --rounds. Nothing here reads a grade until the
end. What a former run finished is kept.

Lines:

- `ranking`: per budget, kind of summary and ranker: NDCG@10 (gain 2^grade - 1) and poor-match rate@10 over --test-queries searches of a
  test split, on BM25's candidates (or the data set's own); the difference from the full-text ranker, paired by query (95% interval);
  mean tokens of a document and how many times fewer they are; KL of relevance to the full-text ranker; documents read in full.
- `units` (without --ranker, and then alone; tokens are those of --base): per budget and kind of summary, mean tokens, and for each field of
  few words the share of its entries that stand in the summary, word for word.
- `curve`: per budget, the metrics of every logged GRPO step.

The figure beside them (--workdir, `reward_N.png`) shows reward, KL to the ranker and length over the steps, one line for each round.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from funnel import Demo
from machine import describe
from record import append, show

from jaxsearch.compression.extractive import Extractive, Truncation, plain_text, split_units
from jaxsearch.data.datasets import Dataset
from jaxsearch.data.records import Document, Query
from jaxsearch.data.summaries import Summariser, show_documents, summarise_documents
from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.errors import InputError
from jaxsearch.metrics import paired_bootstrap
from jaxsearch.models.contract import Model, load_model
from jaxsearch.scoring.records import relevance_log_odds
from jaxsearch.scoring.summaries import make_summary_writer
from jaxsearch.serving.bundle import make_scorer
from jaxsearch.tasks.base import DataConfig, evaluation_lists, open_data, ranking_metrics
from jaxsearch.tasks.summariser import mean_divergence, mean_tokens

CURVE = ("reward", "ranker_kl", "summary_tokens", "copied", "moved", "loss")
WORD = re.compile(r"[^\W_]+")
SHORT = 12
"""Words of a field that is no running text, at most."""


class Measured(NamedTuple):
    """What a ranker says on one kind of text."""

    log_odds: list[np.ndarray]
    metrics: dict[str, np.ndarray]
    tokens: float


class Bench:
    """Models, stores and measurements of one run."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        workdir = Path(options.workdir)
        self.demo = Demo(
            workdir, options.dataset, options.data_dir, options.seed, 1, options.max_queries, False
        )
        config = DataConfig(options.dataset, options.data_dir, max_queries=options.max_queries)
        self.data: Dataset = open_data(config)
        self.ranker = load_model(options.ranker)
        self.queries: list[Query]
        split = options.split or self.data.test_splits[0]
        self.split = split
        self.queries, self.candidates = evaluation_lists(self.data, split, options.test_queries)

    # --- stores and models -----------------------------------------------------------------------------------

    @cached_property
    def scores(self) -> str:
        """The ranker's own scores of the full text."""
        return self.demo.label("ranker_scores", self.ranker, self.data, self.options.per_query)

    def store(self, name: str, summariser: Summariser) -> str:
        """A store of summaries, brought up to date."""
        folder = self.demo.workdir / name
        with self.demo.stage(name):
            print(summarise_documents(summariser, self.data.documents, folder))
        return str(folder)

    def summariser(self, name: str, budget: int, variant: str, *options: str) -> Model:
        """Trains a summariser of so many tokens."""
        limit = str(self.ranker.contract.prompts["pair"].max_document_tokens)
        sizes = [
            "--task.prompt.max-answer-tokens",
            str(budget + 1),
            "--task.prompt.max-document-tokens",
            limit,
        ]
        return self.demo.train(f"{name}_{budget}", f"summariser.py:{variant}", *sizes, *options)

    def stores(self, budget: int) -> dict[str, str]:
        """A store for each kind of summary."""
        tokenizer, documents = self.ranker.tokenizer, self.data.documents
        found = {
            "truncate": self.store(f"store_truncate_{budget}", Truncation(tokenizer, budget)),
            "extractive": self.store(f"store_extractive_{budget}", Extractive(tokenizer, budget, documents)),
        }
        steps = [["--steps", str(n)] if n else [] for n in (self.options.imitation, self.options.grpo)]
        imitation = self.summariser(
            "imitation", budget, "tiny_imitation", "--task.model.init-from", self.options.base,
            "--task.targets", found["extractive"], found["truncate"], *steps[0],
        )  # fmt: skip
        found["imitation"] = self.store(f"store_imitation_{budget}", make_summary_writer(imitation))
        start = self.path("imitation", budget)
        found["grpo"] = self.rewarded("grpo", budget, start, self.options.ranker, steps[1])
        latest = "extractive"
        for name in self.rounds:
            self.tuned(f"{latest}_{budget}", found[latest])
            found[name] = self.rewarded(name, budget, start, self.path(f"tuned_{latest}", budget), steps[1])
            latest, start = name, self.path(name, budget)
        return found

    @property
    def rounds(self) -> list[str]:
        """Names of the rounds in which ranker and summariser learn by turns."""
        return [f"grpo_{n}" for n in range(1, self.options.rounds + 1)]

    def path(self, name: str, budget: int) -> str:
        """Model folder of a stage."""
        return str(self.demo.workdir / f"{name}_{budget}" / "model")

    def rewarded(self, name: str, budget: int, start: str, ranker: str, steps: list[str]) -> str:
        """A store of the summaries of a summariser that learned by GRPO what pays with this ranker."""
        model = self.summariser(
            name, budget, "tiny", "--task.model.init-from", start, "--task.ranker", ranker,
            "--task.scores", self.scores, *steps,
        )  # fmt: skip
        return self.store(f"store_{name}_{budget}", make_summary_writer(model))

    def tuned(self, name: str, summaries: str) -> Model:
        """The ranker after some steps on summaries ("": on full text), taught by what it says of the full text."""
        return self.demo.train(
            f"tuned_{name}", "ranker.py:tiny", "--task.model.init-from", self.options.ranker,
            *self.demo.taught_by(self.ranker, self.scores),
            "--steps", str(self.options.tune), "--task.summaries", summaries,
            "--optimizer.learning-rate", "1e-3", "--optimizer.muon-learning-rate", "0.006",
        )  # fmt: skip

    # --- measurements ----------------------------------------------------------------------------------------

    def measure(self, ranker: Model, documents: list[Document]) -> Measured:
        """The test searches, ranked by what these documents say."""
        scorer = make_scorer(ranker, documents)
        odds = [relevance_log_odds(x) for x in scorer(self.queries, self.candidates)]
        metrics = ranking_metrics(self.data, self.queries, self.candidates, odds)
        return Measured(odds, metrics, mean_tokens(scorer.room, documents))

    def line(
        self, kind: str, ranker: str, found: Measured, full: Measured, more: dict[str, Any]
    ) -> dict[str, Any]:
        """One `ranking` line."""
        values, reference = found.metrics["ndcg@10"], full.metrics["ndcg@10"]
        change = paired_bootstrap(values, reference)
        odds = [np.concatenate(x.log_odds) for x in (found, full)]
        return {
            "kind": "ranking", "text": kind, "ranker": ranker, "split": self.split, "test_queries": len(self.queries),
            "ndcg@10": float(np.nanmean(values)),
            "kept": float(np.nanmean(values) / np.nanmean(reference)),
            "difference": [round(float(x), 5) for x in (change.mean, change.low, change.high)],
            "poor_match@10": float(np.nanmean(found.metrics["poor_match@10"])),
            "tokens": found.tokens, "shorter": full.tokens / found.tokens,
            "ranker_kl": mean_divergence(*odds), **more,
        }  # fmt: skip

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every line, as soon as it is measured."""
        documents = list(self.data.documents)
        full, read = self.measure(self.ranker, documents), {"budget": 0, "full": len(documents)}
        yield self.line("full", "frozen", full, full, read)
        tuned: list[tuple[str, str, list[Document], dict[str, Any]]] = [("full", "", documents, read)]
        for budget in self.options.tokens:
            stores = self.stores(budget)
            yield from self.curve(budget)
            for kind, store in stores.items():
                shown = show_documents(documents, store)
                kept = kept_units(documents, [plain_text(document) for document in shown.documents])
                more = {"budget": budget, "full": shown.full, "fields": kept}
                yield self.line(kind, "frozen", self.measure(self.ranker, shown.documents), full, more)
                tuned.append((kind, store, shown.documents, more))
        for kind, store, texts, more in tuned if self.options.tune else ():
            model = self.tuned(f"{kind}_{more['budget']}", store)
            yield self.line(kind, "tuned", self.measure(model, texts), full, more)

    def curve(self, budget: int) -> Iterator[dict[str, Any]]:
        """The GRPO runs' metrics, and their figure."""
        curves = {}
        for name in ("grpo", *self.rounds):
            lines = (self.demo.workdir / f"{name}_{budget}" / "metrics.jsonl").read_text().splitlines()
            curves[name] = [row for row in map(json.loads, lines) if row["kind"] == "train"]
        draw(self.demo.workdir / f"reward_{budget}.png", curves, budget)
        for name, rows in curves.items():
            for row in rows:
                some = {"step": row["step"], **{key: row[key] for key in CURVE}}
                yield {"kind": "curve", "text": name, "budget": budget, **some}


def _words(text: str) -> str:
    """The words alone, with a space around each."""
    return f" {' '.join(WORD.findall(text.casefold()))} "


def kept_units(documents: Sequence[Document], texts: Sequence[str]) -> dict[str, float]:
    """For each field of short entries, the mean share of its entries that stand in the summary."""
    shares: dict[str, list[float]] = {}
    for document, text in zip(documents, texts, strict=True):
        said = _words(text)
        for name, value in document.fields.items():
            if value.strip() and len(value.split()) <= SHORT:
                entries = split_units(dataclasses.replace(document, fields={name: value}))
                found = [_words(entry) in said for entry in entries]
                shares.setdefault(name, []).append(float(np.mean(found)))
    return {name: round(float(np.mean(values)), 4) for name, values in shares.items()}


def units(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What truncation and selection keep, without any model."""
    documents = open_data(DataConfig(options.dataset, options.data_dir)).documents
    tokenizer = Tokenizer.load(options.base)

    def line(kind: str, budget: int, texts: Sequence[str]) -> dict[str, Any]:
        tokens = float(np.mean([len(ids) for ids in tokenizer.encode(texts)]))
        return {
            "kind": "units",
            "text": kind,
            "budget": budget,
            "tokens": tokens,
            "fields": kept_units(documents, texts),
        }

    full = [plain_text(document) for document in documents]
    yield line("full", 0, full)
    for budget in options.tokens:
        yield line("truncate", budget, Truncation(tokenizer, budget)(documents))
        yield line("extractive", budget, Extractive(tokenizer, budget, documents)(documents))


def draw(path: Path, curves: dict[str, list[dict[str, float]]], budget: int) -> None:
    """Reward, divergence and length over the steps of each run."""
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    names = {"reward": "reward", "ranker_kl": "KL to the ranker on full text", "summary_tokens": "tokens"}
    for axis, (name, label) in zip(axes, names.items(), strict=True):
        for run, rows in curves.items():
            axis.plot([row["step"] for row in rows], [row[name] for row in rows], label=run)
        axis.set(xlabel="step", title=label)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.suptitle(f"GRPO, at most {budget} tokens")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", default="runs/summaries")
    parser.add_argument("--ranker", default="", help="model folder of a ranker of full text")
    parser.add_argument("--base", required=True, help="model folder that the summariser starts from")
    parser.add_argument("--dataset", default="job_market:tiny")
    parser.add_argument("--data-dir", default="runs/demo/data")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 4], help="most tokens of a summary")
    parser.add_argument("--imitation", type=int, default=0, help="steps (default: the config's)")
    parser.add_argument("--grpo", type=int, default=0, help="steps (default: the config's)")
    parser.add_argument("--rounds", type=int, default=2, help="of GRPO with a ranker used to summaries")
    parser.add_argument("--tune", type=int, default=120, help="steps of a ranker on summaries; 0: none")
    parser.add_argument("--per-query", type=int, default=16, help="pairs of a training query that are scored")
    parser.add_argument("--max-queries", type=int, default=0, help="training queries (default: all)")
    parser.add_argument("--split", default="", help="default: the first test split")
    parser.add_argument("--test-queries", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jsonl", type=Path, help="append the results to this file")
    options = parser.parse_args()
    common = {"command": " ".join(["python", *sys.argv]), "dataset": options.dataset, "seed": options.seed}
    common["machine"] = describe()
    lines = units(options)
    if options.ranker:
        bench = Bench(options)
        common["model"] = bench.ranker.hash
        lines = bench.rows()
    for line in lines:
        if line["kind"] != "curve":
            show(line)
        append(options.jsonl, [common | line])
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"summaries.py: {error}")
