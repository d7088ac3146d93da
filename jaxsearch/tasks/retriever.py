"""The retriever: a bi-encoder trained with lambda InfoNCE + (1 - lambda) pairwise margin on graded pairs (paper section 3)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsearch.config import ConfigError, TaskConfig, TrainConfig, to_dict
from jaxsearch.data.datasets import Dataset, Pairs
from jaxsearch.data.prompts import PromptConfig
from jaxsearch.losses import info_nce, pairwise_margin
from jaxsearch.models.contract import Contract, Golden, save_model
from jaxsearch.models.scorer import BiEncoder
from jaxsearch.retrieval.exhaustive import ExhaustiveIndex
from jaxsearch.scoring.prefill import Prefix, pad_prefixes, prefix_shape
from jaxsearch.scoring.records import JUDGE_LABELS, Embedder, expected_grade
from jaxsearch.tasks.base import (
    EVALUATION_DEPTH,
    DataConfig,
    ModelConfig,
    abstract_start,
    check_prompt,
    load_start,
    open_data,
    precedent_count,
    ranking_metrics,
)
from jaxsearch.tasks.cross_encoder import store_targets
from jaxsearch.training.distributed import share_work
from jaxsearch.training.step import Batch, Losses
from jaxsearch.training.task import Task

PART = 256
"""Documents that a process embeds at a time in an evaluation."""


@dataclass(frozen=True)
class RetrieverConfig(TaskConfig):
    """Train both towers on graded pairs."""

    data: DataConfig = field(default_factory=DataConfig)
    """Data set."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Size and start."""
    query_prompt: PromptConfig = field(default_factory=lambda: PromptConfig("query"))
    """Template of the query tower."""
    document_prompt: PromptConfig = field(default_factory=lambda: PromptConfig("document"))
    """Template of the document tower."""
    labels: str = ""
    """Folder of the judge's score store; empty: the data set's own grades."""
    precedents: float = 1.0
    """Share of the training queries in use, the first ones."""
    positives: int = 2
    """Documents above `threshold` per query in a batch."""
    negatives: int = 3
    """Documents at or below it, of the query's own candidates."""
    threshold: float = 2.5
    """A positive's grade is above this."""
    info_nce_weight: float = 0.7
    """lambda: weight of InfoNCE; the rest is the margin term's."""
    temperature: float = 0.05
    """Of InfoNCE."""
    margin: float = 0.2
    """How far a positive must stand above a negative, in cosine, per grade apart."""

    def __post_init__(self) -> None:
        if not 0 <= self.info_nce_weight <= 1:
            raise ConfigError(f"task.info_nce_weight is {self.info_nce_weight}: give a number from 0 to 1")
        for name, least in (("positives", 1), ("negatives", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"task.{name} is {getattr(self, name)}: use at least {least}")
        for name in ("temperature", "margin"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"task.{name} is {getattr(self, name)}: give a positive number")

    def build(self, config: TrainConfig) -> "RetrieverTask":
        """The task on its data."""
        return RetrieverTask(self, open_data(self.data))

    def build_abstract(self) -> "RetrieverTask":
        """The task without data."""
        return RetrieverTask.abstract(self)


class RetrieverTask(Task):
    """In-batch negatives from the whole batch, margins within a query's own candidates."""

    accumulable = False

    def __init__(self, config: RetrieverConfig, data: Dataset):
        self.config, self.data = config, data
        self.start = load_start(config.model, data)
        room = check_prompt("query_prompt", config.query_prompt, "query", self.start.tokenizer)
        self._queries = data.queries["train"]
        self._query_tokens = room.prefixes(self._queries)
        other = check_prompt("document_prompt", config.document_prompt, "document", self.start.tokenizer)
        self._document_tokens = [part.ids for part in other.documents(data.documents)]
        self._query_length = max(map(len, self._query_tokens))
        self._document_length = max(map(len, self._document_tokens))
        self.examples = self._examples()

    @classmethod
    def abstract(cls, config: RetrieverConfig) -> "RetrieverTask":
        """The task without examples (`TaskConfig.build_abstract`)."""
        task = cls.__new__(cls)
        task.config, task.start = config, abstract_start(config.model)
        tokenizer = task.start.tokenizer
        rooms = {
            kind: check_prompt(f"{kind}_prompt", prompt, kind, tokenizer)
            for kind, prompt in (("query", config.query_prompt), ("document", config.document_prompt))
        }
        task._query_length = rooms["query"].longest().prefix
        task._document_length = rooms["document"].longest().document
        return task

    def batch_shape(self, size: int) -> Batch:
        """What `batch` gives."""
        slots = self.config.positives + self.config.negatives
        return {
            "queries": prefix_shape(size, self._query_length),
            "documents": prefix_shape(size * slots, self._document_length),
            "rows": jax.ShapeDtypeStruct((size, slots), np.int64),
            "labels": jax.ShapeDtypeStruct((size, slots), np.float32),
        }

    def _examples(self) -> list[Pairs]:
        """Queries with a positive; `Pairs.grades` holds the labels in use (a judge's are not whole numbers)."""
        count = precedent_count(self.config.precedents, self.data)
        chosen = self.data.pairs[:count]
        if self.config.labels:
            found = store_targets(self.config.labels, self.data, "judge", JUDGE_LABELS)
            labelled = []
            for p in chosen:
                rows = np.array([row for row in p.documents if (p.query, int(row)) in found], np.int32)
                if len(rows):
                    logits = np.stack([found[p.query, int(row)] for row in rows])
                    labelled.append(Pairs(p.query, rows, expected_grade(logits)))
            chosen = labelled
        examples = [p for p in chosen if (p.grades > self.config.threshold).any()]
        if not examples:
            raise ConfigError(
                f"task.threshold is {self.config.threshold}: no training query has a document above it"
            )
        return examples

    def init(self, rngs: nnx.Rngs) -> nnx.Module:
        """A `BiEncoder` that starts as the config says."""
        encoder = BiEncoder(self.start.architecture, rngs=rngs)
        if self.start.weights is not None:
            nnx.update(encoder.decoder, nnx.state(self.start.weights))
        return encoder

    @property
    def num_examples(self) -> int:
        """Training queries with a positive."""
        return len(self.examples)

    def example_ids(self, indices: np.ndarray) -> list[str]:
        """Query ids."""
        return [self._queries[self.examples[i].query].id for i in indices]

    @property
    def data_version(self) -> str:
        """Fingerprint of the data set."""
        return self.data.fingerprint

    def batch(self, indices: np.ndarray, rngs: Sequence[np.random.Generator]) -> Batch:
        """Queries [B, Tq]; documents [B * n, Td] with their labels, query by query; which of them a query knows the label of."""
        slots = self.config.positives + self.config.negatives
        rows = np.full((len(indices), slots), -1, np.int64)
        labels = np.zeros(rows.shape, np.float32)
        for i, (index, rng) in enumerate(zip(indices, rngs, strict=True)):
            example = self.examples[index]
            good = rng.permutation(np.flatnonzero(example.grades > self.config.threshold))[
                : self.config.positives
            ]
            poor = rng.permutation(
                np.flatnonzero((example.grades >= 0) & (example.grades <= self.config.threshold))
            )
            chosen = np.concatenate([good, poor[: slots - len(good)]])
            rows[i, : len(chosen)] = example.documents[chosen]
            labels[i, : len(chosen)] = example.grades[chosen]
        documents = [
            self._document_tokens[row] if row >= 0 else self._document_tokens[0][-1:] for row in rows.ravel()
        ]
        return {
            "queries": pad_prefixes(
                [self._query_tokens[self.examples[i].query] for i in indices], length=self._query_length
            ),
            "documents": pad_prefixes(documents, length=self._document_length),
            "rows": rows,
            "labels": labels,
        }

    def loss(self, model: BiEncoder, batch: Batch, key: jax.Array) -> Losses:
        """lambda InfoNCE + (1 - lambda) margin."""
        config = self.config
        queries: Prefix = batch["queries"]
        documents: Prefix = batch["documents"]
        query_emb = model(jnp.asarray(queries.tokens), jnp.asarray(queries.where))
        doc_emb = model(jnp.asarray(documents.tokens), jnp.asarray(documents.where))
        rows, labels = jnp.asarray(batch["rows"]), jnp.asarray(batch["labels"])
        b, n = rows.shape
        exists = rows >= 0

        # [B, B * n]: a query's own positives; its own other candidates and everybody else's are negatives, except
        # documents that are among its own positives under another query.
        own = jnp.repeat(jnp.eye(b, dtype=bool), n, axis=1)
        positive = exists & (labels > config.threshold)
        positives = own & positive.reshape(1, b * n)
        same = rows[:, :, None] == rows.reshape(1, 1, b * n)
        known_positive = jnp.any(same & positive[:, :, None], axis=1)
        where = exists.reshape(1, b * n) & (own | ~known_positive)
        contrast = info_nce(
            query_emb, doc_emb, positives, temperature=config.temperature, where=where, reduction="sum"
        )

        scores = jnp.einsum("BD,BnD->Bn", query_emb, doc_emb.reshape(b, n, -1), precision="highest")
        apart = labels[:, :, None] - labels[:, None, :]
        pairs = exists[:, :, None] & exists[:, None, :] & (apart > 0.5)
        # The margin grows with the grades apart: scaled here, since the loss takes one number.
        scale = jnp.maximum(apart, 0.5) * config.margin
        shape = pairs.shape
        margin = pairwise_margin(
            jnp.broadcast_to(scores[:, :, None], shape) / scale,
            jnp.broadcast_to(scores[:, None, :], shape) / scale,
            margin=1.0,
            where=pairs,
            reduction="sum",
        )
        return Losses(
            {
                "info_nce": (config.info_nce_weight * contrast, jnp.sum(positives.any(axis=1))),
                "margin": ((1 - config.info_nce_weight) * margin, jnp.sum(pairs)),
            }
        )

    def embedder(self, model: BiEncoder) -> Embedder:
        """The model as it will be served."""
        return Embedder(model, self.start.tokenizer, self.config.query_prompt, self.config.document_prompt)

    def evaluate(self, model: Any) -> dict[str, float]:
        """Ranking metrics of a search over all documents, on dev queries."""
        embedder = self.embedder(model)
        queries = list(self.data.queries["dev"])[: self.config.data.eval_queries]
        index = ExhaustiveIndex(self._document_embeddings(embedder))
        rows, scores = index.search(
            embedder.queries(queries), min(EVALUATION_DEPTH, len(self.data.documents))
        )
        metrics = ranking_metrics(self.data, queries, list(rows), list(scores))
        return {f"dev/{name}": float(np.nanmean(values)) for name, values in metrics.items()}

    def _document_embeddings(self, embedder: Embedder) -> np.ndarray:
        """fp32 [M, D] of all documents; several processes share them."""
        documents = self.data.documents
        parts = [slice(start, start + PART) for start in range(0, len(documents), PART)]
        return np.concatenate(
            share_work(lambda numbers: [embedder.documents(documents[parts[i]]) for i in numbers], len(parts))
        )

    def export(self, model: Any, folder: Path, config: TrainConfig) -> None:
        """Write the model with its contract."""
        embedder = self.embedder(model)
        count = min(3, len(self.data.queries["dev"]), len(self.data.documents))
        queries, documents = list(self.data.queries["dev"][:count]), list(self.data.documents[:count])
        cosines = np.sum(embedder.queries(queries) * embedder.documents(documents), axis=1)
        contract = Contract(
            kind="bi_encoder",
            architecture=self.start.architecture,
            prompts={"query": self.config.query_prompt, "document": self.config.document_prompt},
            training=to_dict(config),
            golden=tuple(
                Golden(query, document, (float(cosine),))
                for query, document, cosine in zip(queries, documents, cosines, strict=True)
            ),
        )
        save_model(folder, model, contract, self.start.tokenizer)
