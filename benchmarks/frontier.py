"""Quality beside speed, from full text to a document in one embedding: every way to rank, on one machine and one data set.

    python benchmarks/frontier.py --jsonl benchmarks/results/frontier.jsonl [--workdir runs/long] [--dataset job_market:long] \
        [--budget-ms 500] [--tokens 1] [--rows full_text mixlm_1]

Trains the models (`frontier_models.Chain`; what a former run finished is kept), then measures each row and keeps its figures in
`WORKDIR/rows`, so that an interrupted run goes on where it stopped: delete a file to measure that row again. With `--untrained` all
weights are random, which costs no training: speed and FLOPs do not depend on them. Then rankers may have any size and dtype (`--preset
qwen3_0_6b --compute-dtype bfloat16`), with the vocabulary of the data.

- Quality: NDCG@10 and poor matches@10 of the first `--test-queries` test searches over BM25's and the retriever's first 30 documents, and
  click AUROC over the pages of all of them, or of the first `--click-queries`.
- Speed: requests of growing size from `--clients` at once, each size for `--seconds`, from records to scores; documents' tokens are made
  before and embeddings preloaded, as in serving. The figure is the highest rate whose p99 stays within `--budget-ms`, of the three
  sizes that looked best, each timed a second time.
  `engine_items_per_s` leaves out tokenising queries and writing pair features.
- How many times as fast: MixLM and the fastest full-text path answer in turns, `--rounds` times for `--seconds` each, at the sizes that
  suited them; the figure is the median of the rounds' ratios. A core's speed wanders by tens of percent within minutes, and whatever is
  timed in one of its good moments would look better than it is.

With `--text-fields title` MixLM's ranker reads titles as text beside the embeddings, and its rows are named by it (`mixlm_5_title`).
With `--unseen` rows are ranked on postings of the same generated market that no stage has seen, quality alone (`WORKDIR/rows_unseen`).

`WORKDIR/frontier.md` holds the table with the published row beside each, `frontier.png` quality against items per second.
"""

import argparse
import copy
import dataclasses
import gc
import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from frontier_models import Chain, Untrained
from funnel import AUROC, Demo, Evaluation, parameters, train_traditional, unseen_postings
from machine import describe
from record import append
from workloads import Workload, flops

from jaxsearch.data.datasets import Dataset
from jaxsearch.data.prompts import PromptRoom
from jaxsearch.data.records import Document, Query
from jaxsearch.errors import InputError, differences
from jaxsearch.metrics import auroc, paired_bootstrap
from jaxsearch.models.attention import BACKENDS
from jaxsearch.models.contract import Model
from jaxsearch.models.decoder import DecoderConfig
from jaxsearch.models.presets import PRESETS
from jaxsearch.models.scorer import Scorer
from jaxsearch.retrieval.bm25 import document_text
from jaxsearch.retrieval.traditional import Features
from jaxsearch.scoring.buckets import Buckets, steps
from jaxsearch.scoring.embedding_store import EmbeddingStore, encode_documents
from jaxsearch.scoring.mixed import make_mixed_scorer, shuffled
from jaxsearch.scoring.packing import Item
from jaxsearch.scoring.prefill import PrefillScorer
from jaxsearch.scoring.records import RecordScorer, action_log_odds, relevance_log_odds
from jaxsearch.serving.bundle import make_embedder, make_scorer
from jaxsearch.tasks.base import DataConfig, open_data, ranking_metrics
from jaxsearch.training.checkpoints import write_json

PAPER: dict[str, dict[str, float]] = {
    "full_text": {"ndcg@10": 0.9432, "items_per_s": 270},
    "shared_prefix": {"ndcg@10": 0.9432, "items_per_s": 290},
    "pruned": {"ndcg@10": 0.8652},
    "pruned_summarised": {"ndcg@10": 0.9218, "items_per_s": 2_200},
    "mixlm_1": {"ndcg@10": 0.9239, "items_per_s": 22_000},
    "retrieval": {"ndcg@10": 0.8380, "items_per_s": 1.6e9},
}
"""Published figures, one H100, 0.6B, p99 <= 500 ms. The pruned one is of people search, where the dense one has 0.8629."""
TEXT_BYTES = 4
"""Of a token id."""
CALL_TOKENS = (2_048, 4_096, 16_384)
"""Of a call of the engine at most (`--call-tokens`): what suits a row best is found out."""
FORMER = {"clients": 1, "preset": "tiny_student", "compute_dtype": "float32", "backend": "xla"}
"""Of rows that were measured before these could be chosen."""
AGAIN = 3
"""Sizes that are timed twice."""
MOST_REQUESTS = 100
REQUESTS = 1_024
"""That shapes are compiled for: as a server has them, which runs for long, not as many as are timed here."""
LARGEST = 50_000
"""Items in the largest request that is tried."""

Queries = list[Query]
Lists = list[np.ndarray]


@dataclass
class Contender:
    """One way to rank."""

    score: Callable[[Queries, Lists], Lists]
    """Logits, or one number, of every candidate: all that a request costs."""
    bytes_per_document: float
    """What is held of a document."""
    params: int | None = None
    truncated: float = 0.0
    """Share of documents that lose their end."""
    order: Callable[[np.ndarray], np.ndarray] = lambda x: x
    """Logits of a list -> what it is ordered by."""
    clicks: Callable[[Queries, Lists], np.ndarray] | None = None
    """Scores of the first action on pages, one after another; None where no clicks are predicted."""
    fit: Callable[[Queries, Lists, int], None] | None = None
    """Chooses shapes for lists like these, with so many tokens a call."""
    engine: Callable[[Queries, Lists], Callable[[], Any]] | None = None
    """The same without making tokens, to be called again and again."""
    flops: Callable[[Queries, Lists], float] | None = None
    """FLOPs per item, padding left out."""
    swapped: Callable[[Queries, Lists], Lists] | None = None
    """`score` with each document's embeddings swapped for another's; None where there are none."""
    weights: str | None = None
    """Hash of the model."""
    compiled: Callable[[], int] = lambda: 0
    """How many programs there are."""


# --- the rows --------------------------------------------------------------------------------------------------------


def item_flops(
    config: DecoderConfig, prefixes: Sequence[Sequence[int]], items: Sequence[Sequence[Item]]
) -> float:
    """FLOPs per item of lists, prefixes computed once a list."""
    total = 0.0
    for prefix, some in zip(prefixes, items, strict=True):
        one = flops(config, Workload(len(prefix), 0, 0), 0, prefixes=1)
        total += one + sum(flops(config, Workload(len(prefix), len(i), 1), 1, prefixes=1) - one for i in some)
    return total / sum(map(len, items))


def alone(queries: Queries, lists: Lists) -> tuple[Queries, Lists]:
    """Every candidate as a list of its own, which brings its own prefix."""
    pairs = [(query, row) for query, rows in zip(queries, lists, strict=True) for row in rows]
    return [query for query, _ in pairs], [np.array([row], np.int32) for _, row in pairs]


def language_model(
    scorer: RecordScorer,
    model: Model,
    bytes_per_document: float,
    action: str,
    *,
    share: bool = True,
    backend: str = "xla",
) -> Contender:
    """A ranker through the prefill engine."""
    split: Callable[[Queries, Lists], tuple[Queries, Lists]] = (lambda q, c: (q, c)) if share else alone

    def fit(queries: Queries, lists: Lists, tokens: int) -> None:
        prefixes, items = scorer.tokens(*split(queries, lists))
        lengths = [list(map(len, some)) for some in items]
        assert isinstance(model.module, Scorer)
        buckets = Buckets.fit(list(map(len, prefixes)), lengths, tokens=tokens)
        scorer.prefill = PrefillScorer(model.module, buckets=buckets, backend=backend, requests=REQUESTS)

    def engine(queries: Queries, lists: Lists) -> Callable[[], Any]:
        prefixes, items = scorer.tokens(*split(queries, lists))
        return lambda: scorer.prefill.score_lists(prefixes, items)

    place = model.contract.actions.index(action) if action in model.contract.actions else None
    return Contender(
        lambda queries, lists: scorer(*split(queries, lists)),
        bytes_per_document,
        parameters(model),
        float(np.mean(scorer.truncated > 0)),
        relevance_log_odds,
        None
        if place is None
        else lambda queries, lists: action_log_odds(np.concatenate(scorer(queries, lists)))[:, place],
        fit,
        engine,
        lambda queries, lists: item_flops(
            model.contract.architecture, *scorer.tokens(*split(queries, lists))
        ),
        weights=model.hash,
        compiled=lambda: len(scorer.prefill.compiled_shapes),
    )


@dataclass
class Bench:
    """Data, models and lists that all rows share; each made when it is first asked for."""

    chain: Chain
    data: Dataset
    """What is ranked."""
    options: argparse.Namespace

    @cached_property
    def evaluation(self) -> Evaluation:
        """Test searches with their candidates."""
        return Evaluation(self.data, self.data.test_splits[0], self.chain.retriever(), 1_000_000)

    @property
    def suffix(self) -> str:
        """Of the names of files about this corpus."""
        return "_unseen" if self.options.unseen else ""

    @property
    def workdir(self) -> Path:
        """Of the run."""
        return self.chain.demo.workdir

    def row_file(self, name: str) -> Path:
        """Where a row's figures are kept."""
        return self.workdir / f"rows{self.suffix}" / f"{name}.json"

    def contender(
        self, scorer: RecordScorer, model: Model, bytes_per_document: float, *, share: bool = True
    ) -> Contender:
        """A ranker of this data, with the attention of the options."""
        action, backend = self.evaluation.action, self.options.backend
        return language_model(scorer, model, bytes_per_document, action, share=share, backend=backend)

    def text(
        self, model: Model, documents: Sequence[Document] | None = None, share: bool = True
    ) -> Contender:
        """A ranker on these texts (default: the documents as they are)."""
        scorer = make_scorer(model, documents or self.data.documents)
        parts = scorer.room.documents(documents or self.data.documents)
        size = TEXT_BYTES * float(np.mean([len(part.ids) for part in parts]))
        return self.contender(scorer, model, size, share=share)

    def summaries(self) -> Sequence[Document]:
        """The documents as a summary says them."""
        found = importlib.import_module("jaxsearch.data.summaries")
        return found.show_documents(self.data.documents, self.chain.summaries()).documents

    def mixlm(self, tokens: int, *, cut: bool = False) -> Contender:
        """MixLM with embeddings from its store; cut: of an encoder that reads the first tokens of a document."""
        ranker, encoder = (self.chain.short_mixlm if cut else self.chain.mixlm)(tokens)
        name = self.chain.mixlm_name(tokens)
        path = self.workdir / f"embeddings_{name}{'_cut' if cut else ''}{self.suffix}"
        encode_documents(encoder, self.data.documents, path)
        store = EmbeddingStore.open(path, ranker.contract.mixlm)
        store.require(self.data.documents)
        store.preload()
        documents = self.data.documents
        fetch = store.fetcher(documents)
        scorer = make_mixed_scorer(ranker, documents, fetch)
        other = copy.copy(scorer)  # the same tokens and programs
        other.fetch = shuffled(fetch, np.arange(len(documents)))
        size = (
            tokens
            * ranker.contract.architecture.width
            * np.dtype(ranker.contract.architecture.dtype).itemsize
        )
        size += TEXT_BYTES * float(np.mean([len(tokens) for tokens in scorer.field_tokens]))
        read = PromptRoom(encoder.tokenizer, encoder.contract.prompts["document"]).documents(documents)
        contender = self.contender(scorer, ranker, size)
        ends = float(np.mean([part.truncated > 0 for part in read]))
        return dataclasses.replace(contender, truncated=ends, swapped=other)

    def lightgbm(self) -> Contender:
        """Boosted trees on fields, BM25 and the retriever's cosine."""
        retriever, evaluation = self.chain.retriever(), self.evaluation
        # It learns from the data set, whatever is ranked then.
        known = self.chain.data
        learned = evaluation if known is self.data else Evaluation(known, known.test_splits[0], retriever, 1)
        features, ranker, clicks = train_traditional(known, retriever, learned, 4_500, 0)
        features = Features(self.data.documents, features.spec, bm25=evaluation.bm25)
        embedder = make_embedder(retriever)

        def score(queries: Queries, lists: Lists, model: Any = ranker) -> Lists:
            found = model.score(evaluation.features(features, lists, queries, embedder.queries(queries)))
            return [values[: len(rows)] for values, rows in zip(found, lists, strict=True)]

        text = np.mean([len(document_text(document).encode()) for document in self.data.documents])
        size = float(text) + evaluation.documents_emb[0].nbytes
        pages = None if clicks is None else lambda q, c: np.concatenate(score(q, c, clicks))
        return Contender(score, size, clicks=pages)

    def retrieval(self) -> Contender:
        """The retriever's cosine with the candidates."""
        embedder, documents = make_embedder(self.chain.retriever()), self.evaluation.documents_emb

        def score(queries: Queries, lists: Lists) -> Lists:
            found = embedder.queries(queries)
            return [documents[rows] @ query for query, rows in zip(found, lists, strict=True)]

        retriever = self.chain.retriever()
        return Contender(score, documents[0].nbytes, parameters(retriever), weights=retriever.hash)


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    make: Callable[[], Contender]
    same_scores: str = ""
    """The row that gives the same scores in another way: quality is measured there alone."""


def rows(bench: Bench) -> dict[str, Row]:
    """Every row by name."""
    models = bench.chain
    found = {
        "shared_prefix": Row(lambda: bench.text(models.ranker())),
        "full_text": Row(lambda: bench.text(models.ranker(), share=False), "shared_prefix"),
        **{models.mixlm_name(n): Row(lambda n=n: bench.mixlm(n)) for n in bench.options.tokens},
        "lightgbm": Row(bench.lightgbm),
        "retrieval": Row(bench.retrieval),
        "pruned": Row(lambda: bench.text(models.pruned())),
    }
    if bench.options.unseen:
        print("unseen postings have no summaries: the rows summarised and pruned_summarised are left out")
    elif models.can_summarise:
        found["summarised"] = Row(lambda: bench.text(models.summarised("ranker"), bench.summaries()))
        found["pruned_summarised"] = Row(lambda: bench.text(models.summarised("pruned"), bench.summaries()))
    else:
        print("no jaxsearch.data.summaries here: the rows summarised and pruned_summarised are left out")
    if models.warm:
        found["cut"] = Row(lambda: bench.text(models.short_ranker()))
        found |= {
            f"cut_{models.mixlm_name(n)}": Row(lambda n=n: bench.mixlm(n, cut=True))
            for n in bench.options.tokens
        }
    return found


# --- quality ---------------------------------------------------------------------------------------------------------


def quality(bench: Bench, contender: Contender, row: Row) -> dict[str, Any]:
    """NDCG@10 and poor matches of every query, and click AUROC; of a row with the same scores, where there is one."""
    if row.same_scores:
        same = measure(bench, row.same_scores, rows(bench)[row.same_scores])
        same_model(bench.row_file(row.same_scores), same, contender)
        names = ("ndcg@10", "poor_match@10", AUROC, "ndcg_of_queries", "impressions")
        return {name: same.get(name) for name in names}
    evaluation, options = bench.evaluation, bench.options
    some = slice(0, options.test_queries)
    queries, lists = evaluation.queries[some], evaluation.candidates[some]
    scores = [contender.order(x) for x in contender.score(queries, lists)]
    found = ranking_metrics(bench.data, queries, lists, scores)
    figures: dict[str, Any] = {name: float(np.nanmean(found[name])) for name in ("ndcg@10", "poor_match@10")}
    figures |= {AUROC: None, "ndcg_of_queries": found["ndcg@10"].tolist()}
    if contender.swapped is not None:
        other = [contender.order(x) for x in contender.swapped(queries, lists)]
        figures["swapped_ndcg@10"] = float(
            np.nanmean(ranking_metrics(bench.data, queries, lists, other)["ndcg@10"])
        )
    if contender.clicks is not None and bench.data.impressions:
        pages = slice(0, options.click_queries or None)
        values = contender.clicks(evaluation.queries[pages], evaluation.page_rows[pages])
        done = evaluation.clicks[: len(values)]
        figures[AUROC] = auroc(values, done, where=np.ones(done.shape, bool))
        figures["impressions"] = len(values)
    return figures


def about(bench: Bench, contender: Contender) -> dict[str, Any]:
    """What a row is, and the arithmetic it needs."""
    some, evaluation = slice(0, bench.options.test_queries), bench.evaluation
    lists = evaluation.queries[some], evaluation.candidates[some]
    return {
        "flops_per_item": None if contender.flops is None else contender.flops(*lists),
        "params": contender.params,
        "weights": contender.weights,
        "truncated": contender.truncated,
        "bytes_per_document": round(contender.bytes_per_document, 1),
    }


# --- speed -----------------------------------------------------------------------------------------------------------


def requests(queries: Queries, lists: Lists, size: int) -> list[tuple[Queries, Lists]]:
    """Different requests of about `size` items: a part of one list, or several whole ones."""
    found, q, c = [], list[Query](), list[np.ndarray]()
    for query, candidates in zip(queries, lists, strict=True):
        q, c = [*q, query], [*c, candidates[: size - sum(map(len, c))]]
        if sum(map(len, c)) >= size:
            found.append((q, c))
            q, c = [], []
    return found


def rate(
    calls: Sequence[Callable[[], Any]], items: Sequence[int], seconds: float, clients: int = 1
) -> tuple[float, float, int]:
    """Items per second, p99 in ms and the number of calls, in so many seconds; each call has been made before.

    Each client waits for its answer before it asks again: their rates add up.
    """
    end = time.perf_counter() + seconds

    def client(first: int) -> tuple[int, list[float]]:
        times, done = list[float](), 0
        while (len(times) < MOST_REQUESTS and time.perf_counter() < end) or len(times) < 3:
            number = (first + len(times) * clients) % len(calls)
            started = time.perf_counter()
            calls[number]()
            times.append(time.perf_counter() - started)
            done += items[number]
        return done, times

    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(client, range(clients)))
    every = [one for _, times in found for one in times]
    p99 = float(np.percentile(every, 99, method="higher")) * 1e3
    return sum(done / sum(times) for done, times in found), p99, len(every)


def speed(bench: Bench, contender: Contender, row: Row) -> dict[str, Any]:
    """The best rate within the budget, over sizes of requests and of the engine's calls.

    What is fastest of many timings was lucky, too: the first `AGAIN` of them that keep the budget once more count by their second timing.
    """
    evaluation, options = bench.evaluation, bench.options
    sizes = [size for size in steps(1, LARGEST) if size <= sum(map(len, evaluation.candidates))]

    def timed(size: int, tokens: int) -> tuple[dict[str, Any], float]:
        some = requests(evaluation.queries, evaluation.candidates, size)
        found = _timed(contender, some, tokens, options)
        return found | {"call_tokens": tokens}, options.budget_ms / found["p99_ms"]

    tried = []
    for tokens in options.call_tokens if contender.fit is not None else (0,):
        size = 1
        while size:
            found, room = timed(size, tokens)
            if room >= 1:
                tried.append((found["items_per_s"], size, tokens))
            factor = 4 if room > 16 else 2 if room > 4 else 1.2
            size = next((s for s in sizes if s > size * factor), 0) if room >= 1 else 0
    kept: list[dict[str, Any]] = []
    for _, size, tokens in sorted(tried, reverse=True):
        found, room = timed(size, tokens)
        kept += [found] if room >= 1 else []
        if len(kept) == AGAIN:
            break
    nothing = {"items_per_s": 0.0, "p99_ms": None}
    return max(kept, key=lambda one: one["items_per_s"], default=nothing) | {"machine": describe()}


def _ready(
    contender: Contender, some: list[tuple[Queries, Lists]], tokens: int, seconds: float
) -> tuple[list[tuple[Queries, Lists]], list[int]]:
    """As many of the requests as `seconds` hold, three at least, compiled and made once; and their items."""
    some = some[:MOST_REQUESTS]
    if contender.fit is not None:
        queries, lists = ([x for part in parts for x in part] for parts in zip(*some, strict=True))
        contender.fit(queries, lists, tokens)
    _compile(contender, some[:1])
    started = time.perf_counter()
    contender.score(*some[0])
    some = some[: max(3, int(seconds / max(time.perf_counter() - started, 1e-4)))]
    _compile(contender, some)
    # As a server does once it is warm: else Python's collector looks at all models and documents again and again, .3 s each time.
    gc.unfreeze()  # what was timed before may go
    gc.collect()
    gc.freeze()
    return some, [sum(map(len, lists)) for _, lists in some]


def _compile(contender: Contender, some: list[tuple[Queries, Lists]]) -> None:
    """Score the requests until nothing more is compiled: a shape that one of them needed may suit another, in other calls than before."""
    known = -1
    while known < contender.compiled():
        known = contender.compiled()
        for one in some:
            contender.score(*one)


def _timed(
    contender: Contender, some: list[tuple[Queries, Lists]], tokens: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Figures of requests of one size."""
    some, items = _ready(contender, some, tokens, options.seconds)
    whole = [lambda one=one: contender.score(*one) for one in some]
    found, p99, calls = rate(whole, items, options.seconds, options.clients)
    figures = {
        "items_per_s": found, "p99_ms": p99, "items_per_request": float(np.mean(items)), "requests": calls,
    }  # fmt: skip
    if contender.engine is not None:
        figures["engine_items_per_s"], figures["engine_p99_ms"], _ = rate(
            [contender.engine(*one) for one in some], items, options.seconds, options.clients
        )
    return figures


def in_turns(bench: Bench, found: dict[str, dict[str, Any]]) -> None:
    """MixLM rows and the fastest full-text path, one after the other again and again; adds `in_turns` to each such row and its file."""
    options, every, best = bench.options, rows(bench), fastest(found)
    for name, row in found.items():
        if "mixlm" not in name or best is None or not row.get("items_per_s") or not best.get("items_per_s"):
            continue
        kept = row.get("in_turns")
        if kept is not None and kept["over"] == best["model"] and len(kept["ratios"]) == options.rounds:
            continue
        with bench.chain.demo.stage(f"{name} and {best['model']} in turns"):
            pair = []
            for known in (row, best):
                contender = every[known["model"]].make()
                same_model(bench.row_file(known["model"]), known, contender)
                size = round(known["items_per_request"])  # of each of them
                some = requests(bench.evaluation.queries, bench.evaluation.candidates, size)
                some, items = _ready(contender, some, known["call_tokens"], options.seconds)
                pair.append(([lambda c=contender, one=one: c.score(*one) for one in some], items))
            timed = [
                [rate(*one, options.seconds, options.clients) for one in pair] for _ in range(options.rounds)
            ]
        (mine, mine_p99), (other, other_p99) = (
            ([one[side][0] for one in timed], max(one[side][1] for one in timed)) for side in (0, 1)
        )
        row["in_turns"] = {
            "over": best["model"], "ratios": [a / b for a, b in zip(mine, other, strict=True)], "items_per_s": mine,
            "over_items_per_s": other, "slowest_p99_ms": mine_p99, "over_slowest_p99_ms": other_p99, "machine": describe(),
        }  # fmt: skip
        keep(bench, name, row)


PARTS: dict[str, tuple[str, Callable[[Bench, Contender, Row], dict[str, Any]]]] = {
    "quality": ("ndcg@10", quality),
    "speed": ("items_per_s", speed),
}
"""What is measured, each with a figure that tells that it is done."""


# --- the report ------------------------------------------------------------------------------------------------------


def measure(bench: Bench, name: str, row: Row) -> dict[str, Any]:
    """A row's figures; what its file has is not measured again."""
    options, path = bench.options, bench.row_file(name)
    settings = {
        "model": name, "dataset": bench.data.name, "budget_ms": options.budget_ms, "warm_tokens": bench.chain.warm,
        "test_queries": options.test_queries, "click_queries": options.click_queries, "seed": options.seed,
        "steps": options.steps, "untrained": options.untrained, "clients": options.clients, "preset": options.preset,
        "compute_dtype": options.compute_dtype, "backend": options.backend,
    }  # fmt: skip
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else dict(settings)
    for setting, value in FORMER.items():
        known.setdefault(setting, value)
    if differing := differences(known, settings):
        raise InputError(
            f"{path} was measured with {', '.join(differing)}: delete it, or give another --workdir"
        )
    missing = [part for part in options.parts if PARTS[part][0] not in known]
    if not missing:
        return known
    with bench.chain.demo.stage(name):
        contender = row.make()
        told = about(bench, contender)
        same_model(path, known, contender)
        if "weights" not in known and len(known) > len(settings):
            del told["weights"]  # a file from before models were named: the figures in it may be of any
        known |= told
        for part in missing:
            known |= PARTS[part][1](bench, contender, row)
            keep(bench, name, known)
    return known


def same_model(path: Path, known: dict[str, Any], contender: Contender) -> None:
    """Refuse to put figures of one model beside those of another."""
    there = known.get("weights")
    if there is not None and there != contender.weights:
        raise InputError(
            f"{path} was measured with model {there[:12]}, there is {str(contender.weights)[:12]} now: delete the file"
        )


def keep(bench: Bench, name: str, known: dict[str, Any]) -> None:
    """Write a row's file, whole or not at all."""
    path = bench.row_file(name)
    path.parent.mkdir(exist_ok=True)
    write_json(path, known)


def fastest(found: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The full-text path with most items per second, or where none was timed any; None where there is none."""
    full = [found[name] for name in ("full_text", "shared_prefix") if name in found]
    return max(full, key=lambda row: row.get("items_per_s") or 0, default=None)


def compare(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every MixLM row over the fastest full-text path, or where none was timed over any: ratios of figures and of FLOPs."""
    best = fastest(found)
    if best is None:
        return {}
    result = {}
    for row in (row for name, row in found.items() if "mixlm" in name):
        ratios = {"over": best["model"], "flop_ratio": best["flops_per_item"] / row["flops_per_item"]}
        turns = row.get("in_turns")
        if turns is not None and turns["over"] == best["model"]:
            low, ratios["speed_ratio"], high = np.quantile(turns["ratios"], (0.25, 0.5, 0.75)).tolist()
            ratios["speed_ratio_quartiles"] = [low, high]
        elif row.get("items_per_s") and best.get("items_per_s"):
            ratios["speed_ratio"] = row["items_per_s"] / best["items_per_s"]
        if "ndcg@10" in row and "ndcg@10" in best:
            change = paired_bootstrap(row["ndcg_of_queries"], best["ndcg_of_queries"])
            ratios["ndcg_kept"] = row["ndcg@10"] / best["ndcg@10"]
            ratios["ndcg_difference"] = [change.mean, change.low, change.high]
            if "cut" in found:  # the first tokens' ranker taught it
                change = paired_bootstrap(row["ndcg_of_queries"], found["cut"]["ndcg_of_queries"])
                ratios["ndcg_kept_of_cut"] = row["ndcg@10"] / found["cut"]["ndcg@10"]
                ratios["ndcg_difference_from_cut"] = [change.mean, change.low, change.high]
        if row.get(AUROC) is not None and best.get(AUROC) is not None:
            ratios["clicks_kept"] = (row[AUROC] - 0.5) / (best[AUROC] - 0.5)
        result[row["model"]] = ratios
    return result


COLUMNS = {
    "ndcg@10": "NDCG@10", "poor_match@10": "poor@10", AUROC: "click AUROC", "items_per_s": "items/s", "p99_ms": "p99 ms",
    "flops_per_item": "FLOPs/item", "params": "parameters", "bytes_per_document": "bytes/document",
}  # fmt: skip


def shown(value: float | None) -> str:
    """Four decimals of what lies between 0 and 1, else a whole number or three digits of a large one."""
    if value is None:
        return "-"
    return f"{value:.4f}" if value < 1 else f"{value:,.0f}" if value < 1e7 else f"{value:.3g}"


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown, the published figures in the last two columns."""
    head = ["row", *COLUMNS.values(), "published NDCG@10", "published items/s"]
    lines = [head, ["---"] * len(head)]
    for name, row in found.items():
        there = PAPER.get(name, {})
        cells = [shown(row.get(key)) for key in COLUMNS]
        lines.append([name, *cells, *(shown(there.get(key)) for key in ("ndcg@10", "items_per_s"))])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(path: Path, found: dict[str, dict[str, Any]], title: str) -> None:
    """NDCG@10 against items per second, ours and the published ones."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.8))
    for axis, rows_of, name in ((axes[0], found, title), (axes[1], PAPER, "published (one H100, 0.6B)")):
        for model, row in rows_of.items():
            if row.get("items_per_s") and row.get("ndcg@10"):
                axis.scatter(row["items_per_s"], row["ndcg@10"])
                place = (row["items_per_s"], row["ndcg@10"])
                axis.annotate(model, place, xytext=(5, 4), textcoords="offset points")
        axis.set(xscale="log", xlabel="items/s", ylabel="NDCG@10 (gain 2^g - 1)", title=name)
        axis.margins(x=0.15, y=0.1)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workdir", default="runs/long", help="folder of the run; a former one is gone on with"
    )
    parser.add_argument("--dataset", default="job_market:long")
    parser.add_argument("--data-dir", default="", help="folder of prepared data (default: WORKDIR/data)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps", type=float, default=1.0, help="multiplies every stage's steps, for a quick look"
    )
    parser.add_argument(
        "--warm-tokens",
        type=int,
        default=40,
        help="tokens of a document read at first; 0: whole ones at once",
    )
    parser.add_argument(
        "--untrained", action="store_true", help="random weights in a work folder of its own: speed alone"
    )
    parser.add_argument(
        "--preset",
        default=FORMER["preset"],
        choices=list(PRESETS),
        help="size of the rankers, with --untrained",
    )
    parser.add_argument(
        "--compute-dtype",
        default=FORMER["compute_dtype"],
        choices=("float32", "bfloat16"),
        help="with --untrained",
    )
    parser.add_argument(
        "--backend", default=FORMER["backend"], choices=BACKENDS, help="of the attention that is timed"
    )
    parser.add_argument("--call-tokens", type=int, nargs="+", default=list(CALL_TOKENS))
    parser.add_argument("--unseen", action="store_true", help="on postings that no stage has seen: quality")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1], help="T_S of the MixLM rows")
    parser.add_argument(
        "--text-fields", nargs="*", default=[], help="that MixLM's ranker reads as text beside the embeddings"
    )
    parser.add_argument(
        "--rows", nargs="*", default=[], help="only these rows; a name that does not exist shows all"
    )
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS), help="of a row")
    parser.add_argument("--budget-ms", type=float, default=500.0, help="p99 of a request at most")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="of timing per size of request and of call"
    )
    parser.add_argument(
        "--clients",
        type=int,
        default=1,
        help="that ask at the same time, each one request after another: about the number of cores, which one request may not fill",
    )
    parser.add_argument(
        "--rounds", type=int, default=15, help="in which MixLM and full text are timed in turns"
    )
    parser.add_argument("--test-queries", type=int, default=150)
    parser.add_argument(
        "--click-queries", type=int, default=0, help="pages in the click AUROC; 0: of all queries"
    )
    parser.add_argument("--jsonl", default="", help="append one line per row to this file")
    options = parser.parse_args()
    workdir = Path(options.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str((workdir / "compiled").resolve()))
    data_dir = options.data_dir or str(workdir / "data")
    demo = Demo(workdir, options.dataset, data_dir, options.seed, options.steps, 0, False)
    data = open_data(DataConfig(options.dataset, data_dir))
    if options.untrained:
        options.parts = ["speed"]
    known = {name for document in data.documents for name in document.fields}
    if unknown := [name for name in options.text_fields if name not in known]:
        raise InputError(f"--text-fields has {unknown[0]!r}: documents have {', '.join(sorted(known))}")
    size = options.preset, options.compute_dtype
    if options.untrained:
        chain: Chain = Untrained(demo, data, options.warm_tokens, options.text_fields, *size)
    elif size != (FORMER["preset"], FORMER["compute_dtype"]):
        raise InputError(f"--preset and --compute-dtype are {' and '.join(size)}: give --untrained as well")
    else:
        chain = Chain(demo, data, options.warm_tokens, options.text_fields)
    corpus = data
    if options.unseen:
        options.parts = ["quality"]
        name, _, variant = options.dataset.partition(":")
        if options.untrained or name != "job_market":
            raise InputError(
                "--unseen measures quality on more postings of job_market: leave out --untrained"
            )
        corpus = unseen_postings(data, variant or "default", len(data.documents))
    bench = Bench(chain, corpus, options)
    every = rows(bench)
    if unknown := [name for name in options.rows if name not in every]:
        raise InputError(f"--rows has {unknown[0]!r}: known are {', '.join(every)}")
    found = {
        name: measure(bench, name, row) for name, row in every.items() if name in (options.rows or every)
    }
    if "speed" in options.parts:
        in_turns(bench, found)
    ratios, limit = compare(found), describe()
    text = table(found)
    (workdir / f"frontier{bench.suffix}.md").write_text(text)
    draw(
        workdir / f"frontier{bench.suffix}.png", found, f"{bench.data.name}, {options.test_queries} searches"
    )
    print(f"\n{text}")
    for name, values in ratios.items():
        print(name, json.dumps(values))
    command = "python " + " ".join(sys.argv)
    for name, row in found.items():
        line = {key: value for key, value in row.items() if key != "ndcg_of_queries"}
        # A row that was timed names the machine that it was timed on.
        told = {"machine": limit, "ratios": ratios.get(name), "command": command}
        append(options.jsonl, [told | line])
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"frontier.py: {error}")
