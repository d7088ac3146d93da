"""What judge, teachers and ranker share: a batch is a few queries with their candidates, read at the answer position.

Training goes through the same prefill as scoring (`scoring.prefill.score`), so that a query's prefix is computed once for all
of its candidates in training too. Axes: B queries, L candidates, C labels and actions.
"""

import abc
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from flax import nnx

from jaxsearch.config import ConfigError, TaskConfig, TrainConfig, to_dict
from jaxsearch.data.datasets import Dataset
from jaxsearch.data.prompts import PromptConfig, PromptRoom
from jaxsearch.data.records import Query
from jaxsearch.data.sampling import sample_places
from jaxsearch.data.score_store import StoreMeta, read_scores
from jaxsearch.data.summaries import show_documents
from jaxsearch.models.contract import Contract, Golden, save_model
from jaxsearch.models.scorer import Scorer
from jaxsearch.scoring.packing import pack_items, packed_shape
from jaxsearch.scoring.prefill import Prefix, pad_prefixes, prefix_shape, score
from jaxsearch.scoring.records import JUDGE_LABELS, RANKER_LABELS, RecordScorer
from jaxsearch.tasks.base import (
    DataConfig,
    ModelConfig,
    abstract_start,
    check_prompt,
    evaluation_lists,
    load_start,
    ranking_metrics,
)
from jaxsearch.training.distributed import share_work
from jaxsearch.training.step import Batch
from jaxsearch.training.task import Task

NO_TOKEN = -1
"""Fills answers up to the longest."""


@dataclass(frozen=True)
class CrossEncoderConfig(TaskConfig):
    """Fields of every task that reads query and document together."""

    data: DataConfig = field(default_factory=DataConfig)
    """Data set."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Size and start."""
    prompt: PromptConfig = field(default_factory=lambda: PromptConfig("ranker"))
    """Prompt template."""
    candidates: int = 16
    """Candidates of one query in a batch (L)."""
    summaries: str = ""
    """Store of summaries (`serve.py summarise`) that the model reads in the place of documents' text; empty: the text."""
    document_sample: int = 0
    """In training read so many tokens of a longer document, each at its place in the whole (`data.sampling`), drawn anew each time; 0: all.
    Evaluation and what is exported read whole documents."""

    def __post_init__(self) -> None:
        if self.document_sample < 0:
            raise ConfigError(
                f"task.document_sample is {self.document_sample}: give a number of tokens, or 0 for all"
            )


class Example(NamedTuple):
    """One training query with all that may be drawn as its candidates."""

    query: int
    documents: np.ndarray
    """int32 [n], rows."""
    targets: dict[str, np.ndarray]
    """Target name -> [n, ...]; NaN where there is none."""
    positions: np.ndarray | None = None
    """int [n], places on the page; None: the serving position."""
    answers: Sequence[Sequence[int]] | None = None
    """Token ids of the text that is learned behind each item, empty where there is none; None: no text is learned."""


class PairTokens:
    """Token ids of training queries with their candidates under one prompt, in shapes that hold every example.

    Args:
      room: the prompt.
      data: whose training queries and documents.
      examples: all that will be asked for.
    """

    def __init__(self, room: PromptRoom, data: Dataset, examples: Sequence[Example]):
        self._room, self._corpus = room, data.documents
        self._queries = data.queries["train"]
        self.prefixes = room.prefixes(self._queries)
        self._documents = [part.ids for part in room.documents(data.documents)]
        self.prefix_length = max(map(len, self.prefixes))
        """P: room for the longest prefix."""
        texts = {""}
        for example in examples if room.config.features else ():
            texts.update(self._pair_texts(example, np.arange(len(example.documents))))
        longest = max(map(len, room.pairs(list(texts))))
        self.document_length = max(map(len, self._documents))
        """Tokens of the longest document."""
        self.item_length = self.document_length + longest + len(room.suffix)
        """T: room for the longest document, the longest pair part and the suffix."""

    def _pair_texts(self, example: Example, chosen: np.ndarray) -> list[str]:
        query = self._queries[example.query]
        return [
            self._room.pair_text(
                query,
                self._corpus[example.documents[i]],
                None if example.positions is None else int(example.positions[i]),
            )
            for i in chosen
        ]

    def items(self, example: Example, chosen: np.ndarray) -> list[list[int]]:
        """Token ids of the items (document + pair + suffix) of these places in an example's documents."""
        pairs = self._room.pairs(self._pair_texts(example, chosen))
        return [
            self._documents[example.documents[i]] + pair + self._room.suffix
            for i, pair in zip(chosen, pairs, strict=True)
        ]

    def document_lengths(self, example: Example, chosen: np.ndarray) -> list[int]:
        """Tokens of the documents that these items begin with."""
        return [len(self._documents[row]) for row in example.documents[chosen]]

    def prefix(self, queries: Sequence[int]) -> Prefix:
        """The prefixes of these training queries, all of one length."""
        return pad_prefixes([self.prefixes[query] for query in queries], length=self.prefix_length)


class CrossEncoderTask(Task):
    """Base of the tasks; a subclass says what the examples and the loss are."""

    kind = "ranker"
    _prefix_length: int
    """P of a batch."""
    _row_length: int
    """T of a batch."""

    def __init__(
        self, config: CrossEncoderConfig, train: TrainConfig, data: Dataset, actions: Sequence[str] = ()
    ):
        if config.candidates < 1:
            raise ConfigError(f"task.candidates is {config.candidates}: use at least 1")
        self.config, self.data, self.actions = config, data, tuple(actions)
        self.kind = self.kind_for(config)
        self.start = load_start(config.model, data)
        self.room = check_prompt("prompt", config.prompt, self.kind, self.start.tokenizer)
        self.labels = self._label_ids()
        self.examples = self.make_examples()
        if not self.examples:
            raise ConfigError(f"data {config.data.name} has no training examples for {type(self).__name__}")
        self.shown = show_documents(data.documents, config.summaries)
        self.pairs = PairTokens(
            self.room, dataclasses.replace(data, documents=self.shown.documents), self.examples
        )
        self._answer_length = max((len(a) for e in self.examples for a in e.answers or ()), default=0)
        self._prefix_length = self.pairs.prefix_length
        self._row_length = (
            self.pairs.item_length + self._answer_length - self._left_out(self.pairs.document_length)
        )
        self._scorer: RecordScorer | None = None

    @abc.abstractmethod
    def make_examples(self) -> list[Example]:
        """The training examples."""

    @classmethod
    def kind_for(cls, config: CrossEncoderConfig) -> str:
        """The model's kind, "judge" or "ranker"."""
        return cls.kind

    def _label_ids(self) -> dict[str, int]:
        names = JUDGE_LABELS if self.kind == "judge" else RANKER_LABELS
        return {name: self.start.tokenizer.label(name) for name in names}

    @classmethod
    def abstract(cls, config: CrossEncoderConfig, actions: Sequence[str] = ()) -> Self:
        """The task without examples (`TaskConfig.build_abstract`)."""
        task = cls.__new__(cls)
        task.config, task.actions, task.kind = config, tuple(actions), cls.kind_for(config)
        task.start = abstract_start(config.model)
        task.room = check_prompt("prompt", config.prompt, task.kind, task.start.tokenizer)
        task.labels = task._label_ids()
        longest = task.room.longest()
        task._prefix_length = longest.prefix
        task._answer_length = 0 if config.prompt.answer == "grade" else config.prompt.max_answer_tokens
        task._row_length = longest.item + task._answer_length - task._left_out(longest.document)
        return task

    def _left_out(self, length: int) -> int:
        """How many tokens of a document of so many are not read in training."""
        return max(length - self.config.document_sample, 0) if self.config.document_sample else 0

    def batch_shape(self, size: int) -> Batch:
        """What `batch` gives; a subclass adds its targets by `target_shapes`."""
        slots = self.config.candidates
        targets: dict[str, tuple[tuple[int, ...], Any]] = {
            name: ((size, slots, *shape), np.float32) for name, shape in self.target_shapes().items()
        }
        if self._answer_length:
            targets["answers"] = ((size, slots, self._answer_length), np.int32)
        return {
            "prefix": prefix_shape(size, self._prefix_length),
            "items": packed_shape(size, slots, self._row_length, slots),
        } | {name: jax.ShapeDtypeStruct(*target) for name, target in targets.items()}

    def target_shapes(self) -> dict[str, tuple[int, ...]]:
        """Target name -> its shape for one candidate."""
        raise NotImplementedError(f"{type(self).__name__} has no target_shapes()")

    def init(self, rngs: nnx.Rngs) -> nnx.Module:
        """A `Scorer` that starts as the config says."""
        scorer = Scorer(
            self.start.architecture,
            label_ids=list(self.labels.values()),
            actions=len(self.actions),
            rngs=rngs,
        )
        if self.start.weights is not None:
            nnx.update(scorer.decoder, nnx.state(self.start.weights))
        # A ranker that starts from a ranker, such as a pruned one, keeps what it knows of actions.
        for number, name in enumerate(self.actions):
            if name in self.start.action_rows:
                scorer.action_head[...] = scorer.action_head[...].at[number].set(self.start.action_rows[name])
        return scorer

    @property
    def num_examples(self) -> int:
        """Training queries."""
        return len(self.examples)

    def example_ids(self, indices: np.ndarray) -> list[str]:
        """Query ids."""
        queries = self.data.queries["train"]
        return [queries[self.examples[i].query].id for i in indices]

    @property
    def data_version(self) -> str:
        """Fingerprint of the data set."""
        return self.data.fingerprint

    def batch(self, indices: np.ndarray, rngs: Sequence[np.random.Generator]) -> Batch:
        """prefix, items (one per row), targets [B, L, ...] and answers of these queries; candidates are drawn anew each time."""
        slots = self.config.candidates
        drawn = zip(indices, rngs, strict=True)
        chosen = [self.choose(self.examples[i], slots, rng) for i, rng in drawn]
        return self.assemble(indices, chosen, rngs)

    def assemble(
        self, indices: np.ndarray, chosen: Sequence[np.ndarray], rngs: Sequence[np.random.Generator]
    ) -> Batch:
        """The batch of these queries with these of their documents as candidates (one int [<= L] per query)."""
        slots = self.config.candidates
        items: list[list[list[int]]] = []
        samples: list[tuple[int, int, np.ndarray]] = []
        answers = np.full((len(indices), slots, self._answer_length), NO_TOKEN, np.int32)
        targets: dict[str, np.ndarray] = {}
        for i, (index, places, rng) in enumerate(zip(indices, chosen, rngs, strict=True)):
            example = self.examples[index]
            items.append(self.pairs.items(example, places))
            if example.answers is not None:
                for slot, number in enumerate(places):
                    answer = example.answers[number]
                    items[-1][slot] = items[-1][slot] + list(answer)
                    answers[i, slot, : len(answer)] = answer
            if room := self.config.document_sample:
                for slot, length in enumerate(self.pairs.document_lengths(example, places)):
                    item = items[-1][slot]
                    read = np.append(sample_places(length, room, rng), np.arange(length, len(item)))
                    items[-1][slot] = [item[place] for place in read]
                    samples.append((i, slot, read))
            for name, values in example.targets.items():
                if name not in targets:
                    targets[name] = np.full((len(indices), slots, *values.shape[1:]), np.nan, np.float32)
                targets[name][i, : len(places)] = values[places]
        prefix = self.pairs.prefix([self.examples[index].query for index in indices])
        packed = pack_items(items, row_length=self._row_length, rows=slots, slots=slots, one_per_row=True)
        for i, slot, read in samples:
            packed.offsets[i, slot, : len(read)] = read
        text = {"answers": answers} if self._answer_length else {}
        return {"prefix": prefix, "items": packed, **targets, **text}

    def choose(self, example: Example, slots: int, rng: np.random.Generator) -> np.ndarray:
        """Which of an example's documents are candidates this time, int [<= slots]."""
        return rng.permutation(len(example.documents))[:slots]

    def logits(self, model: Scorer, batch: Batch) -> jax.Array:
        """Label logits fp32 [B, L, C]."""
        return score(model, batch["prefix"].tokens, batch["prefix"].where, batch["items"], alone=True)

    # --- evaluation and export -----------------------------------------------------------------------------------

    def scorer(self, model: Scorer) -> RecordScorer:
        """The model as it will be served; made once, later ones take over its compiled shapes."""
        if self._scorer is None:
            self._scorer = RecordScorer(model, self.start.tokenizer, self.config.prompt, self.shown.documents)
        else:
            self._scorer.prefill.update(model)
        return self._scorer

    def scored(
        self, scorer: RecordScorer, queries: Sequence[Query], rows: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """Logits [L, C] of each query's documents; several processes share the queries and all know the result."""
        return share_work(
            lambda numbers: scorer([queries[i] for i in numbers], [rows[i] for i in numbers]), len(queries)
        )

    def relevance(self, logits: np.ndarray) -> np.ndarray:
        """What candidates are ordered by in the evaluation, [L] (logits [L, C])."""
        return logits[..., 0] - logits[..., 1]

    def evaluate(self, model: Any) -> dict[str, float]:
        """NDCG@10, poor-match rate@10 and MRR on dev queries."""
        queries, candidates = evaluation_lists(self.data, "dev", self.config.data.eval_queries)
        found = [self.relevance(logits) for logits in self.scored(self.scorer(model), queries, candidates)]
        metrics = ranking_metrics(self.data, queries, candidates, found)
        return {f"dev/{name}": float(np.nanmean(values)) for name, values in metrics.items()}

    def export(self, model: Any, folder: Path, config: TrainConfig) -> None:
        """Write the model with its contract."""
        save_model(folder, model, self.contract(self.scorer(model), config), self.start.tokenizer)

    def golden_pairs(self) -> tuple[list[Query], list[np.ndarray]]:
        """Queries, and for each the row of one document, whose scores go into the contract."""
        queries = list(self.data.queries["dev"][:3])
        return queries, [np.array([i], np.int32) for i in range(len(queries))]

    def contract(self, scorer: RecordScorer, config: TrainConfig) -> Contract:
        """The contract, with golden scores that the scorer gives now."""
        queries, rows = self.golden_pairs()
        golden = tuple(
            Golden(query, self.shown.documents[row[0]], tuple(float(x) for x in found[0]))
            for query, row, found in zip(queries, rows, scorer(queries, rows), strict=True)
        )
        return Contract(
            kind=self.kind,
            architecture=self.start.architecture,
            prompts={"pair": self.config.prompt},
            labels=self.labels,
            actions=self.actions,
            training=to_dict(config),
            golden=golden,
            summariser=self.shown.summariser,
        )


def store_targets(
    folder: str, data: Dataset, kind: str, columns: Sequence[str]
) -> dict[tuple[int, int], np.ndarray]:
    """(query row, document row) -> scores of `columns` from a store of the wanted kind.

    Raises:
      ConfigError: the store holds another kind of scores, or lacks a column.
      StoreError: it is unfinished or of other data.
    """
    meta, found = read_scores(folder, data.fingerprint)
    if meta.kind != kind:
        raise ConfigError(f"{folder} holds scores of a {meta.kind}, needed is a {kind}'s")
    places = _columns(meta, columns, folder)
    return {pair: scores[places] for pair, scores in found.items()}


def _columns(meta: StoreMeta, columns: Sequence[str], folder: str) -> list[int]:
    missing = [name for name in columns if name not in meta.columns]
    if missing:
        raise ConfigError(
            f"{folder} has no scores for {', '.join(missing)}: it holds {', '.join(meta.columns)}"
        )
    return [meta.columns.index(name) for name in columns]
