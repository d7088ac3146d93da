"""What each choice in the ranker's training is worth: a grid of arms with seeds, one table, the paper's figure beside ours.

    python benchmarks/ablations.py --funnels runs/demo runs/demo_1 runs/demo_2 --dataset job_market:tiny \
        [--rows labels start alpha ...] [--jsonl benchmarks/results/ablations.jsonl]

Each funnel is the work folder of a finished `funnel.py`, and one seed. An arm is a training run that differs from the funnel's own in a few
options; it is trained into FUNNEL/ablations/ARM and measured on the funnel's test searches (candidates of BM25 and retriever, and the pages
that were shown). What a former call trained or measured is not done again. Rows:

- core: the funnel's own teachers and ranker: how much of its teachers the student keeps
- labels: what p(Yes) is learned from: students trained on the judge's labels directly, from the retriever
- start: the ranker from the relevance specialist, from the retriever, from the base model
- alpha: relevance against engagement, and with 0 and 1 one student per objective
- masking: the engagement teacher with and without loss masking of rare actions
- encodings: how the engagement teacher's features are written
- sources: stored, online and asynchronous teachers for a few steps: the losses
- calibration: ECE and AUROC before and after, with and without the position

Differences are paired by query and pooled over seeds; their intervals are a bootstrap over queries (of AUROC over the pages of queries).
The jsonl gets one line per arm (mean and standard error over seeds) and one per difference; FIGURES/ROW.png shows them.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from bars import Bars
from machine import describe
from record import append
from scipy.special import expit
from stages import finished

from jaxsearch.config import load_config
from jaxsearch.errors import InputError
from jaxsearch.metrics import auroc, paired_bootstrap
from jaxsearch.models.contract import load_model
from jaxsearch.scoring.calibration import calibrate, compare, observe
from jaxsearch.scoring.label import label
from jaxsearch.scoring.records import action_log_odds, expected_grade, relevance_log_odds
from jaxsearch.serving.bundle import make_scorer
from jaxsearch.tasks.base import DataConfig, open_data, ranking_metrics
from jaxsearch.training.loop import run

SOURCE_QUERIES = 256
"""Training queries of the row `sources`."""
SAMPLES = 500
"""Bootstrap samples of a difference in AUROC."""


@dataclass(frozen=True)
class Arm:
    """One training run, or a stage that the funnel trained."""

    name: str
    config: str = ""
    """Empty: the funnel's stage of this name."""
    options: tuple[str, ...] = ()
    """`{funnel}` stands for the funnel's folder, `{arms}` for that of the arms."""


@dataclass(frozen=True)
class Row:
    """Arms that are compared with the first one."""

    name: str
    paper: str
    arms: tuple[Arm, ...]


def _ranker(name: str, start: str, *options: str) -> Arm:
    scores = (
        "--task.relevance-teachers", "{funnel}/relevance_scores",
        "--task.engagement-teachers", "{funnel}/engagement_scores",
    )  # fmt: skip
    return Arm(name, "ranker.py:tiny", ("--task.model.init-from", start, *scores, *options))


def _labels(name: str, *options: str) -> Arm:
    start = ("--task.model.init-from", "{funnel}/retriever/model", "--steps", "300", "--optimizer.learning-rate", "3e-3",
             "--optimizer.muon-learning-rate", "0.02")  # fmt: skip
    labels = ("--task.labels", "{funnel}/judge_labels")
    return Arm(name, "relevance_teacher.py:tiny", (*start, *labels, *options))


def _engagement(name: str, *options: str) -> Arm:
    start = ("--task.model.init-from", "{funnel}/judge/model")
    return Arm(name, "engagement_teacher.py:tiny", (*start, *options))


RETRIEVER = "{funnel}/retriever/model"
RATES = ("company_ctr", "connect_rate")
WITHOUT_RATES = ("position", "age_days", "pays", "distance", "active_days")
ALPHAS = (0.0, 0.3, 0.5, 0.9, 1.0)
ROWS = {
    row.name: row
    for row in (
        Row(
            "core",
            "97.4% of the teacher's NDCG@10; of AUROC above 0.5, 96.2% (click) and 98.6% (apply)",
            (Arm("relevance_teacher"), Arm("engagement_teacher"), Arm("ranker")),
        ),
        Row(
            "labels",
            "soft labels over ordinal: NDCG@10 +11.0%",
            (
                _labels("ordinal", "--task.label-form", "ordinal", "--task.prompt.kind", "judge"),
                _labels("grade", "--task.label-form", "grade"),
                _labels("expected_grade", "--task.label-form", "expected_grade"),
                _labels("yes_probability", "--task.label-form", "yes_probability"),
            ),
        ),
        Row(
            "start",
            "from the specialist over the open model: NDCG@10 +0.68%, click AUROC +1.98%",
            (
                _ranker("cold", "{funnel}/base_student/model"),
                Arm("ranker"),
                _ranker("alpha_1.0", RETRIEVER, "--task.alpha", "1.0"),
                _ranker("specialist", "{arms}/alpha_1.0/model"),
            ),
        ),
        Row(
            "alpha",
            "-",
            (
                Arm("ranker"),
                *(_ranker(f"alpha_{a}", RETRIEVER, "--task.alpha", str(a)) for a in ALPHAS),
            ),
        ),
        Row(
            "masking",
            "mean predicted score of rare actions on their positives: 5x, ranking unharmed",
            (
                _engagement("unmasked", "--task.mask-below", "0"),
                _engagement("masked", "--task.mask-below", "0.02"),
            ),
        ),
        Row(
            "encodings",
            "descriptive names +5.8%, click rates +5.1%, True/False words +1.7% (AUC)",
            (
                _engagement("short_names"),
                _engagement("full_names", "--task.prompt.feature-names", "full"),
                _engagement("codes", "--task.prompt.feature-names", "code"),
                _engagement("digits", "--task.prompt.booleans", "digits"),
                _engagement("four_decimals", "--task.prompt.decimals", "4"),
                _engagement("no_rates", "--task.prompt.features", *WITHOUT_RATES),
            ),
        ),
    )
}
OTHERS = ("sources", "calibration")


@dataclass
class Measured:
    """What an arm says of the test searches."""

    ndcg: np.ndarray
    """fp64 [Q], NaN where a query has no value."""
    poor: np.ndarray
    actions: np.ndarray
    """Log-odds fp32 [N, A] of the impressions; [N, 0] where the model predicts none."""
    truth: np.ndarray
    """fp32 [N, A], NaN where not eligible."""
    page: np.ndarray
    """int [N], the query that an impression belongs to."""


@dataclass
class Funnel:
    """One seed: its folder, its data, and its evaluation, made when something is to be measured."""

    folder: Path
    seed: int
    dataset: str
    data_dir: str
    split: str = "test"
    limit: int = 800
    _bars: list[Bars] = field(default_factory=list)

    @property
    def arms(self) -> Path:
        """Where arms are trained."""
        return self.folder / "ablations"

    def bars(self) -> Bars:
        """Candidates, pages and truth."""
        if not self._bars:
            data = open_data(DataConfig(self.dataset, self.data_dir))
            self._bars.append(Bars(data, self.split, load_model(self.folder / "retriever/model"), self.limit))
        return self._bars[0]

    def train(self, arm: Arm) -> Path:
        """The arm's model folder, trained unless it is there."""
        if not arm.config:
            return self.folder / arm.name / "model"
        places = {"{funnel}": str(self.folder), "{arms}": str(self.arms)}
        options = [_placed(option, places) for option in arm.options]
        data = ["--task.data.name", self.dataset, "--task.data.dir", self.data_dir, "--seed", str(self.seed)]
        config = load_config(f"configs/{arm.config}", [*data, *options])
        folder = self.arms / arm.name
        if not finished(folder, config):
            print(f"== {folder}", flush=True)
            run(config, folder)
        return folder / "model"

    def measure(self, arm: Arm) -> Measured:
        """The arm's figures, from the file of a former call where there is one for the same model."""
        model = load_model(self.train(arm))
        path = self.arms / f"{arm.name}-{model.hash[:12]}.npz"
        if not path.is_file():
            self.arms.mkdir(exist_ok=True)
            bars = self.bars()
            scorer = make_scorer(model, bars.data.documents)
            logits = scorer(bars.queries, bars.candidates)
            order = expected_grade if model.contract.kind == "judge" else relevance_log_odds
            values = _ranking(bars, [order(x) for x in logits])
            shown = np.zeros((len(bars.truth), 0), np.float32)
            if model.contract.actions:
                shown = action_log_odds(np.concatenate(scorer(bars.queries, bars.page_rows)))
            page = np.repeat(np.arange(len(bars.pages)), [len(p) for p in bars.pages])
            temporary = path.with_suffix(".tmp.npz")
            np.savez_compressed(
                temporary,
                ndcg=values["ndcg@10"],
                poor=values["poor_match@10"],
                actions=shown,
                truth=bars.truth,
                page=page,
            )
            os.replace(temporary, path)
        with np.load(path, allow_pickle=False) as found:
            return Measured(**{name: found[name] for name in found.files})


def _ranking(bars: Bars, scores: list[np.ndarray]) -> dict[str, np.ndarray]:
    return ranking_metrics(bars.data, bars.queries, bars.candidates, scores)


def _placed(option: str, places: dict[str, str]) -> str:
    for name, value in places.items():
        option = option.replace(name, value)
    return option


# --- figures of arms and differences ---------------------------------------------------------------------------------


def auroc_of(found: Measured, action: int, rows: np.ndarray | None = None) -> float:
    """AUROC of one action over all impressions, or over some rows of them."""
    chosen = slice(None) if rows is None else rows
    truth, scores = found.truth[chosen, action], found.actions[chosen, action]
    where = ~np.isnan(truth)
    return auroc(scores, np.nan_to_num(truth), where=where)


def on_positives(found: Measured, action: int) -> float:
    """Mean predicted probability where the action was done."""
    return float(expit(found.actions[found.truth[:, action] == 1, action].astype(np.float64)).mean())


def summary(values: Sequence[float]) -> list[float | None]:
    """Mean and standard error over seeds (None for one seed)."""
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return [round(float(np.mean(values)), 4), None if error is None else round(error, 4)]


def arm_figures(runs: list[Measured], actions: tuple[str, ...]) -> dict[str, Any]:
    """Mean and standard error over seeds of everything that is measured."""
    figures: dict[str, Any] = {
        "ndcg@10": summary([float(np.nanmean(m.ndcg)) for m in runs]),
        "poor_match@10": summary([float(np.nanmean(m.poor)) for m in runs]),
    }
    if all(m.actions.size for m in runs):
        figures["auroc"] = {a: summary([auroc_of(m, i) for m in runs]) for i, a in enumerate(actions)}
        figures["mean_score_on_positives"] = {
            a: summary([on_positives(m, i) for m in runs]) for i, a in enumerate(actions)
        }
    return figures


def difference(first: list[Measured], second: list[Measured], actions: tuple[str, ...]) -> dict[str, Any]:
    """first - second: mean, 95% interval and p of NDCG@10 and poor matches, mean and interval of AUROC, pooled over seeds."""
    result: dict[str, Any] = {"queries": sum(len(m.ndcg) for m in first)}
    for name in ("ndcg", "poor"):
        a, b = (np.concatenate([getattr(m, name) for m in runs]) for runs in (first, second))
        found = paired_bootstrap(a, b)
        result[name] = [round(float(x), 5) for x in (found.mean, found.low, found.high, found.p)]
    if all(m.actions.size for m in (*first, *second)):
        result["auroc"] = {a: auroc_difference(first, second, i) for i, a in enumerate(actions)}
        result["times_on_positives"] = {
            a: round(
                float(np.mean([on_positives(m, i) for m in first]))
                / float(np.mean([on_positives(m, i) for m in second])),
                3,
            )
            for i, a in enumerate(actions)
        }
    return result


def auroc_difference(first: list[Measured], second: list[Measured], action: int) -> list[float]:
    """Mean over seeds of the difference, and its 95% interval: pages of the same queries are drawn for both."""

    def mean(draw: np.random.Generator | None) -> float:
        values = []
        for a, b in zip(first, second, strict=True):
            rows = None
            if draw is not None:
                places = [np.flatnonzero(a.page == q) for q in np.unique(a.page)]
                rows = np.concatenate([places[i] for i in draw.integers(len(places), size=len(places))])
            values.append(auroc_of(a, action, rows) - auroc_of(b, action, rows))
        return float(np.mean(values))

    rng = np.random.default_rng(0)
    drawn = [mean(rng) for _ in range(SAMPLES)]
    return [round(x, 5) for x in (mean(None), *np.nanquantile(drawn, [0.025, 0.975]))]


def kept(funnels: list[Funnel], runs: dict[str, list[Measured]], actions: tuple[str, ...]) -> dict[str, Any]:
    """How much of its teachers the student keeps, mean and standard error over seeds."""
    lexical = [float(np.nanmean(_ranking(f.bars(), f.bars().lexical().scores)["ndcg@10"])) for f in funnels]
    teacher, student = ([float(np.nanmean(m.ndcg)) for m in runs[n]] for n in ("relevance_teacher", "ranker"))
    result: dict[str, Any] = {
        "ndcg_ratio": summary([s / t for s, t in zip(student, teacher, strict=True)]),
        "gain_over_bm25": summary(
            [(s - b) / (t - b) for s, t, b in zip(student, teacher, lexical, strict=True)]
        ),
    }
    pairs = list(zip(runs["ranker"], runs["engagement_teacher"], strict=True))
    result["auroc_above_half"] = {
        a: summary([(auroc_of(s, i) - 0.5) / (auroc_of(t, i) - 0.5) for s, t in pairs])
        for i, a in enumerate(actions)
    }
    return result


# --- rows that are no grid -------------------------------------------------------------------------------------------


def sources(funnel: Funnel, steps: int = 20) -> dict[str, Any]:
    """Losses of the first steps with stored, online and asynchronous teachers of the same pairs."""
    losses: dict[str, list[float]] = {}
    ahead = 0.0
    objectives = ("relevance", "engagement")
    data = open_data(DataConfig(funnel.dataset, funnel.data_dir, max_queries=SOURCE_QUERIES))
    for objective in objectives:  # all pairs, which is what live teachers see
        teacher = load_model(funnel.folder / f"{objective}_teacher/model")
        label(teacher, data, funnel.arms / f"{objective}_scores")
    for name in ("stored", "online", "async"):
        places = [
            f"{{arms}}/{objective}_scores" if name == "stored" else f"{{funnel}}/{objective}_teacher/model"
            for objective in objectives
        ]
        teachers = [
            f"--task.{objectives[0]}-teachers",
            places[0],
            f"--task.{objectives[1]}-teachers",
            places[1],
        ]
        options = ("--task.model.init-from", RETRIEVER, *teachers, "--task.teachers", name, "--steps", str(steps),
                   "--optimizer.decay-steps", "440", "--log-every", "1", "--task.data.eval-queries", "10",
                   "--task.data.max-queries", str(SOURCE_QUERIES), "--batch-size", "16")  # fmt: skip
        arm = Arm(f"source_{name}", "ranker.py:tiny", options)
        funnel.train(arm)
        rows = [
            json.loads(line) for line in (funnel.arms / arm.name / "metrics.jsonl").read_text().splitlines()
        ]
        losses[name] = [row["loss"] for row in rows if row["kind"] == "train"]
        if name == "async":
            ahead = max(row["batches_ahead"] for row in rows if row["kind"] == "train")
    stored = np.array(losses["stored"])
    return {
        "steps": steps,
        "loss_first": losses["stored"][0],
        "loss_last": losses["stored"][-1],
        **{
            f"{name}_relative_difference": float(np.max(np.abs(np.array(losses[name]) / stored - 1)))
            for name in ("online", "async")
        },
        "batches_ahead_most": ahead,
        "queue": 2,
    }


def calibration(funnel: Funnel) -> dict[str, Any]:
    """Fitted on dev, measured on test."""
    bars = funnel.bars()
    model = load_model(funnel.folder / "ranker/model")
    seen = observe(model, bars.data, "test")
    result = {}
    for name, found in calibrate(model, bars.data).items():
        figures = compare(found, seen[name])
        result[name] = {
            key: round(getattr(figures, key), 4)
            for key in ("pairs", "positives", "ece_before", "ece_after", "auroc_before", "auroc_after")
        }
    return result


# --- output ----------------------------------------------------------------------------------------------------------


def draw(path: Path, row: Row, figures: dict[str, dict[str, Any]]) -> None:
    """NDCG@10 beside the first action's AUROC; for alpha one against the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(figures)
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    clicks = {n: next(iter(f["auroc"].values())) for n, f in figures.items() if "auroc" in f}
    if row.name == "alpha":
        for name in names:
            axes[0].scatter(clicks[name][0], figures[name]["ndcg@10"][0], label=name)
        axes[0].legend()
        axes[0].set(xlabel="AUROC of the first action", ylabel="NDCG@10 (gain 2^g - 1)", title="alpha")
    for axis, values, name in ((axes[0], {n: figures[n]["ndcg@10"] for n in names}, "NDCG@10"), (axes[1], clicks, "AUROC")):  # fmt: skip
        if axis is axes[0] and row.name == "alpha":
            continue
        errors = [value[1] or 0 for value in values.values()]
        axis.errorbar([v[0] for v in values.values()], list(values), xerr=errors, fmt="o")
        axis.set(xlabel=name, title=f"{row.name} (paper: {row.paper[:60]})" if axis is axes[0] else "")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.stem + ".tmp.png")
    figure.savefig(temporary, dpi=100)
    pyplot.close(figure)
    os.replace(temporary, path)


def show(row: Row, figures: dict[str, dict[str, Any]], found: dict[str, dict[str, Any]]) -> None:
    """The row as text."""
    print(f"\n{row.name}   (paper: {row.paper})")
    for name, values in figures.items():
        shown = [f"NDCG@10 {values['ndcg@10'][0]:.4f} +- {values['ndcg@10'][1] or 0:.4f}"]
        shown += [f"{a} {v[0]:.4f}" for a, v in values.get("auroc", {}).items()]
        print(f"  {name:20} {'  '.join(shown)}")
    for name, values in found.items():
        low, high = values["ndcg"][1:3]
        print(
            f"  {name:40} NDCG@10 {values['ndcg'][0]:+.4f} ({low:+.4f} to {high:+.4f}), {values['queries']} queries"
        )


def run_row(
    row: Row, funnels: list[Funnel], about: dict[str, Any], figures_folder: Path
) -> list[dict[str, Any]]:
    """Train, measure, show and draw one row; its lines."""
    actions = open_data(DataConfig(funnels[0].dataset, funnels[0].data_dir)).actions
    runs = {arm.name: [funnel.measure(arm) for funnel in funnels] for arm in row.arms}
    figures = {name: arm_figures(measured, actions) for name, measured in runs.items()}
    first = row.arms[0].name
    found = {
        f"{name} minus {first}": difference(measured, runs[first], actions)
        for name, measured in runs.items()
        if name != first
    }
    show(row, figures, found)
    draw(figures_folder / f"{row.name}.png", row, figures)
    about = {**about, "row": row.name, "paper": row.paper, "seeds": [f.seed for f in funnels]}
    lines = [{**about, "arm": name, **values} for name, values in figures.items()]
    lines += [{**about, "difference": name, **values} for name, values in found.items()]
    if row.name == "core":
        lines.append({**about, "kept": kept(funnels, runs, actions)})
        print(f"  kept: {lines[-1]['kept']}")
    return lines


def main() -> int:
    """Run rows of the grid."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--funnels", nargs="+", default=["runs/demo"], help="work folders, one per seed")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=None, help="of the funnels (default: 0 1 2 ...)"
    )
    parser.add_argument("--dataset", default="job_market:tiny")
    parser.add_argument("--data-dir", default="", help="folder of prepared data (default: FUNNEL/data)")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, *OTHERS], default=[*ROWS, *OTHERS])
    parser.add_argument("--figures", default="", help="folder of the figures (default: FUNNEL/ablations)")
    parser.add_argument("--jsonl", default="", help="append the lines to this file")
    options = parser.parse_args()
    seeds = options.seeds or list(range(len(options.funnels)))
    if len(seeds) != len(options.funnels):
        raise InputError(f"--seeds has {len(seeds)} numbers: give one per funnel, {len(options.funnels)}")
    funnels = [
        Funnel(Path(folder), seed, options.dataset, options.data_dir or f"{folder}/data")
        for folder, seed in zip(options.funnels, seeds, strict=True)
    ]
    jax.config.update("jax_compilation_cache_dir", str((funnels[0].folder / "compiled").resolve()))
    about = {"command": "python " + " ".join(sys.argv), "dataset": options.dataset}
    machine = describe()
    figures = Path(options.figures) if options.figures else funnels[0].arms
    for name in options.rows:
        if name in ROWS:
            lines = run_row(ROWS[name], funnels, about, figures)
        else:
            found = (sources if name == "sources" else calibration)(funnels[0])
            lines = [{**about, "row": name, "seeds": seeds[:1], **found}]
            print(f"\n{name}\n{json.dumps(found, indent=1)}")
        append(options.jsonl, [{**line, "machine": machine} for line in lines])
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"ablations.py: {error}")
