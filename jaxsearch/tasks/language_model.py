"""A base language model from scratch, where no pretrained checkpoint is loaded: next-token prediction on queries followed by good answers.

A small decoder learns to match a query with a document much sooner from predicting the document's words (one label a token) than from
grades (one label a pair), so that every `:tiny` model starts from this one, as the larger ones start from Qwen3.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsearch.config import ConfigError, TaskConfig, TrainConfig, to_dict
from jaxsearch.data.datasets import Dataset
from jaxsearch.data.prompts import PromptConfig
from jaxsearch.losses import token_cross_entropy
from jaxsearch.models.contract import Contract, save_model
from jaxsearch.models.scorer import Scorer
from jaxsearch.scoring.prefill import Prefix, pad_prefixes
from jaxsearch.tasks.base import DataConfig, ModelConfig, check_prompt, load_start, open_data, precedent_count
from jaxsearch.training.step import Batch, Losses
from jaxsearch.training.task import Task


@dataclass(frozen=True)
class LanguageModelConfig(TaskConfig):
    """Train a decoder on prefix + document sequences of well-matched pairs."""

    data: DataConfig = field(default_factory=DataConfig)
    """Data set."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Size and start."""
    prompt: PromptConfig = field(default_factory=lambda: PromptConfig("ranker"))
    """Prompt template whose prefix and document are put one after the other."""
    precedents: float = 0.7
    """Share of the training queries in use, the first ones."""
    threshold: int = 3
    """Lowest grade of a document that follows a query."""
    documents: int = 4
    """Documents of one query in a batch."""
    shuffle_fields: bool = False
    """Put a document's fields into another order each time. In a fixed order the later fields of a small corpus are known by heart from the
    earlier ones, and what is known by heart is not learned from the query. Fields that the template cuts stay last."""

    def build(self, config: TrainConfig) -> "LanguageModelTask":
        """The task on its data."""
        return LanguageModelTask(self, open_data(self.data))


class _Example(NamedTuple):
    query: int
    documents: np.ndarray


class LanguageModelTask(Task):
    """Cross entropy of the next token, over all tokens that exist."""

    def __init__(self, config: LanguageModelConfig, data: Dataset):
        self.config, self.data = config, data
        self.start = load_start(config.model, data)
        self._room = check_prompt("prompt", config.prompt, "ranker", self.start.tokenizer)
        self._documents = [[*part.ids, self._room.end_id] for part in self._room.documents(data.documents)]
        self._whole: dict[int, tuple[int, int]] = {}
        self._prefixes = self._room.prefixes(data.queries["train"])
        count = precedent_count(config.precedents, data)
        self.examples = [
            _Example(p.query, p.documents[p.grades >= config.threshold])
            for p in data.pairs[:count]
            if (p.grades >= config.threshold).any()
        ]
        if not self.examples:
            raise ConfigError(
                f"task.threshold is {config.threshold}: no training query has a document graded so high"
            )
        self._length = max(map(len, self._prefixes)) + max(map(len, self._documents))

    def init(self, rngs: nnx.Rngs) -> nnx.Module:
        """A `Scorer` without labels: nothing but its decoder."""
        model = Scorer(self.start.architecture, label_ids=(), actions=0, rngs=rngs)
        if self.start.weights is not None:
            nnx.update(model.decoder, nnx.state(self.start.weights))
        return model

    @property
    def num_examples(self) -> int:
        """Training queries with a good document."""
        return len(self.examples)

    def example_ids(self, indices: np.ndarray) -> list[str]:
        """Query ids."""
        return [self.data.queries["train"][self.examples[i].query].id for i in indices]

    @property
    def data_version(self) -> str:
        """Fingerprint of the data set."""
        return self.data.fingerprint

    def batch(self, indices: np.ndarray, rngs: Sequence[np.random.Generator]) -> Batch:
        """Token sequences [B * documents, T]: each query before some of its good documents (drawn again where there are few)."""
        sequences = []
        for index, rng in zip(indices, rngs, strict=True):
            example = self.examples[index]
            order = rng.permutation(len(example.documents))
            for i in range(self.config.documents):
                document = int(example.documents[order[i % len(order)]])
                ids = (
                    self._shuffled(document, rng) if self.config.shuffle_fields else self._documents[document]
                )
                sequences.append(self._prefixes[example.query] + ids)
        return {"text": pad_prefixes(sequences, length=self._length)}

    def _shuffled(self, row: int, rng: np.random.Generator) -> list[int]:
        """Token ids of a document with its fields in another order, no more of them than in its own order."""
        document, limit = self.data.documents[row], len(self._documents[row])
        whole, length = self._whole_fields(row)
        names = list(document.fields)
        fields = {names[i]: document.fields[names[i]] for i in rng.permutation(whole)}
        (part,) = self._room.documents([dataclasses.replace(document, fields=fields)])
        rest = self._documents[row][length:-1]
        return [*[*part.ids, *rest][: limit - 1], self._room.end_id]

    def _whole_fields(self, row: int) -> tuple[int, int]:
        """How many of a document's first fields are read whole, and how many tokens these have."""
        if row not in self._whole:
            document, found = self.data.documents[row], (0, 0)
            names = list(document.fields)
            for count in range(1, len(names) + 1):
                fields = {name: document.fields[name] for name in names[:count]}
                (part,) = self._room.documents([dataclasses.replace(document, fields=fields)])
                if part.truncated:
                    break
                found = count, len(part.ids)
            self._whole[row] = found
        return self._whole[row]

    def loss(self, model: Scorer, batch: Batch, key: jax.Array) -> Losses:
        """Mean over tokens, in nats."""
        text: Prefix = batch["text"]
        tokens, where = jnp.asarray(text.tokens), jnp.asarray(text.where)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        hidden, _ = model.decoder(model.decoder.embed(tokens), positions, model.decoder.causal(where))
        logits = model.decoder.logits(hidden[:, :-1])
        return Losses(
            (
                token_cross_entropy(logits, tokens[:, 1:], where=where[:, 1:], reduction="sum"),
                jnp.sum(where[:, 1:]),
            )
        )

    def evaluate(self, model: Any) -> dict[str, float]:
        """Nats per token on good documents of dev queries."""
        queries = [
            q
            for q in self.data.queries["dev"]
            if max(self.data.graded[q.id].values(), default=0) >= self.config.threshold
        ]
        queries = queries[: self.config.data.eval_queries]
        sequences = []
        for query, prefix in zip(queries, self._room.prefixes(queries), strict=True):
            good = next(
                row for row, grade in self.data.graded[query.id].items() if grade >= self.config.threshold
            )
            sequences.append(prefix + self._documents[good])
        losses = jax.jit(self.loss)(model, {"text": pad_prefixes(sequences)}, jax.random.key(0))
        return {"dev/nats_per_token": float(losses.value())}

    def export(self, model: Any, folder: Path, config: TrainConfig) -> None:
        """Write the decoder; it has no answers and so no golden scores."""
        contract = Contract(
            kind="base",
            architecture=self.start.architecture,
            prompts={"pair": self.config.prompt},
            training=to_dict(config),
        )
        save_model(folder, model, contract, self.start.tokenizer)
