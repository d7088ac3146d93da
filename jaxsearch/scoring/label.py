"""The labelling job: a judge or teacher scores the training pairs, once each, into a store that students learn from.

Resumable: pairs are scored in ranges of queries, each range is one file, and a second run goes on with the files that are missing. Several
processes share the files between them.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from jaxsearch.data.datasets import Dataset, Pairs
from jaxsearch.data.score_store import ScoreStore, StoreMeta
from jaxsearch.errors import InputError
from jaxsearch.models.contract import ContractError, Model
from jaxsearch.models.scorer import Scorer
from jaxsearch.scoring.records import RecordScorer


@dataclass(frozen=True)
class LabelReport:
    """What one run of the job did."""

    pairs: int
    """Pairs scored by this run; what was there already is not counted."""
    seconds: float
    store: str


def chosen_pairs(pairs: Pairs, limit: int) -> np.ndarray:
    """int32 [n], the documents of a query that are scored: all, or `limit` of them drawn by the query's number."""
    if not limit or limit >= len(pairs.documents):
        return pairs.documents
    order = np.random.default_rng(pairs.query).permutation(len(pairs.documents))
    return pairs.documents[np.sort(order[:limit])]


def label(
    model: Model,
    data: Dataset,
    folder: str | Path,
    *,
    per_query: int = 0,
    shard: int = 256,
    pairs: Sequence[Pairs] = (),
    source: str = "",
) -> LabelReport:
    """Score training pairs into the store at `folder`.

    Args:
      model: judge, teacher or ranker.
      data: whose pairs.
      per_query: pairs of each query; 0 for all.
      shard: queries per file.
      pairs: score these instead, of training queries of `data`.
      source: where they come from, so that a store is not resumed with other ones.

    Raises:
      InputError: a number is out of range.
      ContractError: the model is neither judge nor ranker.
      StoreError: the folder holds scores of another model, of other data, or with other settings.
    """
    for name, value, least in (("per_query", per_query, 0), ("shard", shard, 1)):
        if value < least:
            raise InputError(f"{name} is {value}: use at least {least}")
    contract = model.contract
    if not isinstance(model.module, Scorer) or not contract.labels:
        raise ContractError(f"a {contract.kind} gives no scores per pair: label with a judge or ranker")
    pairs = pairs or data.pairs
    meta = StoreMeta(
        model=model.hash,
        kind=contract.kind,
        dataset=data.name,
        fingerprint=data.fingerprint,
        columns=(*contract.labels, *contract.actions),
        queries=len(pairs),
        per_query=per_query,
        shard=shard,
        source=source,
    )
    store = ScoreStore(folder, meta)
    scorer = RecordScorer(model.module, model.tokenizer, contract.prompts["pair"], data.documents)
    first = pairs[:shard]
    # A resumed job gives the bits of an uninterrupted one, and so does each of several processes.
    scorer.settle(
        [data.queries["train"][p.query] for p in first], [chosen_pairs(p, per_query) for p in first]
    )
    mine = [s for s in store.missing() if s % jax.process_count() == jax.process_index()]
    started, count = time.perf_counter(), 0
    with tqdm(
        total=sum(len(pairs[s * shard : (s + 1) * shard]) for s in mine), desc="labelling", unit="query"
    ) as bar:
        for number in mine:
            part = pairs[number * shard : (number + 1) * shard]
            rows = [chosen_pairs(p, per_query) for p in part]
            scores = scorer([data.queries["train"][p.query] for p in part], rows, bar.update)
            query = np.repeat([p.query for p in part], [len(r) for r in rows])
            store.write(number, query, np.concatenate(rows), np.concatenate(scores))
            count += len(query)
    return LabelReport(count, time.perf_counter() - started, str(folder))
