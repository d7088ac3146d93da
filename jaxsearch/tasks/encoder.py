"""What MixLM's encoder learns before it meets the ranker: to say a document's words in the ranker's own token embeddings.

Left alone, encoder and ranker have to agree on a language while they learn to rank by it, and for one embedding per document that takes
ten times the steps of everything else. Here each of the S embeddings of a document learns the direction of

    sum over the tokens t of its part of the document of idf(t) E[t],

E being the ranker's embedding table and the parts contiguous, as long as each other. A ranker of text reads such a sum at once, if not
well: keys and values of its first layer are linear in what it is given. idf leaves out what every document says. No ranker is run, so that
it costs a minute where MixLM costs a quarter of an hour. It is ours: the paper's encoder starts from stage I (section 6).

Axes: M documents, T tokens, S embeddings per document, W width of the ranker, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from jaxsearch.config import ConfigError, TaskConfig, TrainConfig, to_dict
from jaxsearch.data.datasets import Dataset
from jaxsearch.data.prompts import PromptConfig, PromptRoom
from jaxsearch.losses import cosine_distance
from jaxsearch.models.contract import Contract, Golden, MixLMPart, load_model, save_model
from jaxsearch.models.mixlm import DocumentEncoder
from jaxsearch.models.scorer import Scorer
from jaxsearch.scoring.mixed import DocumentEmbedder, golden_numbers
from jaxsearch.scoring.prefill import Prefix, pad_prefixes
from jaxsearch.tasks.base import DataConfig, ModelConfig, check_prompt, load_start, open_data
from jaxsearch.training.step import Batch, Losses
from jaxsearch.training.task import Task

HELD_OUT = 20
"""One document in so many is left for the evaluation."""


@dataclass(frozen=True)
class EncoderConfig(TaskConfig):
    """Train an encoder alone, before `MixLMConfig.encoder` starts from it."""

    data: DataConfig = field(default_factory=DataConfig)
    """Data set; of its queries nothing is used."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Size and start of the encoder."""
    prompt: PromptConfig = field(default_factory=lambda: PromptConfig("document"))
    """Template that it reads a document by."""
    ranker: str = ""
    """Model folder of the ranker whose token embeddings it learns to give; documents are cut as that one cuts them."""
    tokens: int = 1
    """T_S, embeddings per document."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"task.tokens is {self.tokens}: use at least 1 embedding per document")

    def build(self, config: TrainConfig) -> "EncoderTask":
        """The task on its data.

        Raises:
          ConfigError: `ranker` is empty or no ranker, or the prompt does not fit.
        """
        return EncoderTask(self, open_data(self.data))


class EncoderTask(Task):
    """Cosine distance to the words of each part of a document, mean over embeddings."""

    def __init__(self, config: EncoderConfig, data: Dataset):
        if not config.ranker:
            raise ConfigError(
                "task.ranker is empty: give the model folder of the ranker that MixLM starts from"
            )
        self.config, self.data = config, data
        ranker = load_model(config.ranker)
        if not isinstance(ranker.module, Scorer) or "pair" not in ranker.contract.prompts:
            raise ConfigError(
                f"task.ranker is {config.ranker!r}, a {ranker.contract.kind}: give the model folder of a ranker"
            )
        self.start = load_start(config.model, data)
        room = check_prompt("prompt", config.prompt, "document", self.start.tokenizer)
        self._texts = [part.ids for part in room.documents(data.documents)]
        self._length = max(map(len, self._texts))
        read = PromptRoom(ranker.tokenizer, ranker.contract.prompts["pair"])
        self._words = [np.array(part.ids, np.int64) for part in read.documents(data.documents)]
        self._table = np.asarray(ranker.module.decoder.embedding[...], np.float32)
        hidden = set(data.held_out.tolist())
        known = [row for row in range(len(self._words)) if row not in hidden]
        self._dev, self._train = known[::HELD_OUT], [r for i, r in enumerate(known) if i % HELD_OUT]
        if not self._train:
            raise ConfigError(f"data {data.name} has {len(known)} documents to learn from: give at least 2")
        self._idf = idf([self._words[row] for row in self._train], len(self._table))

    def init(self, rngs: nnx.Rngs) -> nnx.Module:
        """An encoder that starts as the config says."""
        encoder = DocumentEncoder(
            self.start.architecture, tokens=self.config.tokens, width=self._table.shape[1], rngs=rngs
        )
        if self.start.weights is not None:
            nnx.update(encoder.decoder, nnx.state(self.start.weights))
        encoder.fit_scale(jnp.asarray(self._table))
        return encoder

    @property
    def num_examples(self) -> int:
        """Documents."""
        return len(self._train)

    def example_ids(self, indices: np.ndarray) -> list[str]:
        """Document ids."""
        return [self.data.documents[self._train[i]].id for i in indices]

    @property
    def data_version(self) -> str:
        """Fingerprint of the data set."""
        return self.data.fingerprint

    def batch(self, indices: np.ndarray, rngs: Sequence[np.random.Generator]) -> Batch:
        """Documents (tokens [M, T]) and what their embeddings learn: targets fp32 [M, S, W] and where [M, S] there is one."""
        return self._read([self._train[i] for i in indices])

    def _read(self, rows: Sequence[int]) -> Batch:
        texts = [self._texts[row] for row in rows]
        targets = np.zeros((len(rows), self.config.tokens, self._table.shape[1]), np.float32)
        for i, row in enumerate(rows):
            kept = min(self.config.tokens, len(texts[i]))
            targets[i, :kept] = sums(self._words[row], kept, self._idf, self._table)
        return {
            "documents": pad_prefixes(texts, length=self._length),
            "targets": targets,
            "where": np.any(targets != 0, axis=-1),
        }

    def loss(self, model: DocumentEncoder, batch: Batch, key: jax.Array) -> Losses:
        """One minus the cosine, mean over embeddings."""
        documents: Prefix = batch["documents"]
        found = model(jnp.asarray(documents.tokens), jnp.asarray(documents.where)).astype(jnp.float32)
        where = jnp.asarray(batch["where"])
        apart = cosine_distance(found, jnp.asarray(batch["targets"]), where=where, reduction="sum")
        return Losses((apart, jnp.sum(where)))

    def evaluate(self, model: Any) -> dict[str, float]:
        """Mean distance on documents that it has not seen."""
        losses = jax.jit(self.loss)(model, self._read(self._dev[:512]), jax.random.key(0))
        return {"dev/distance": float(losses.value())}

    def export(self, model: Any, folder: Path, config: TrainConfig) -> None:
        """Write the encoder; its embeddings are as large as the ranker's own (the loss does not see how large they are)."""
        model.fit_scale(jnp.asarray(self._table))
        documents = list(self.data.documents[:3])
        embeddings = DocumentEmbedder(model, self.start.tokenizer, self.config.prompt)(documents)
        queries = [self.data.queries["dev"][0]] * len(
            documents
        )  # a golden pair names one, an encoder reads none
        contract = Contract(
            kind="encoder",
            architecture=self.start.architecture,
            prompts={"document": self.config.prompt},
            training=to_dict(config),
            golden=tuple(map(Golden, queries, documents, golden_numbers(embeddings))),
            mixlm=MixLMPart(self.config.tokens, self._table.shape[1]),
        )
        save_model(folder, model, contract, self.start.tokenizer)


def idf(texts: Sequence[NDArray], size: int) -> NDArray[np.float32]:
    """log(M / documents that hold a token), fp32 [V]: 0 for a token of all or of no document."""
    held = np.bincount(np.concatenate([np.unique(text) for text in texts]), minlength=size)
    return np.log(len(texts) / np.where(held == 0, len(texts), held)).astype(np.float32)


def sums(words: NDArray, parts: int, weights: NDArray, table: NDArray) -> NDArray[np.float32]:
    """Weighted sums of token embeddings fp32 [parts, W] over contiguous parts of a text (int [n]), as equal in length as can be.

    A part without a weighted token is 0, as are the last ones of a text with fewer tokens than parts.
    """
    part = np.repeat(np.arange(parts), [len(some) for some in np.array_split(words, parts)])
    found = np.zeros((parts, table.shape[1]), np.float32)
    np.add.at(found, part, weights[words][:, None] * table[words])
    return found
