"""What MixLM's encoder learns before it meets the ranker: to say a document's words in the ranker's own token embeddings.

Left alone, encoder and ranker have to agree on a language while they learn to rank by it, and five embeddings per document then often
fail to. Here each of the S embeddings of a document learns the direction of

    sum over the tokens t of its part of the document of idf(t) E[t],

E being the ranker's embedding table and the parts contiguous, as long as each other: sums of word vectors weighted by rarity, as texts
have long been compared by (Arora et al. 2017, "A Simple but Tough-to-Beat Baseline for Sentence Embeddings"). A ranker of text reads such
a sum at once, if not well: but for the norm before it, its first layer takes keys and values of it that are sums of the tokens' own.
No ranker is run, so that it costs a minute where MixLM costs a quarter of an hour. The paper's encoder starts from stage I instead.

Axes: M documents, T tokens, S embeddings per document, W width of the ranker, V vocabulary.
"""

import dataclasses
import logging
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
from jaxsearch.models.contract import (
    CONTRACT_FILE,
    Contract,
    ContractError,
    Golden,
    MixLMPart,
    Model,
    load_model,
    read_contract,
    save_model,
)
from jaxsearch.models.mixlm import DocumentEncoder
from jaxsearch.models.scorer import Scorer
from jaxsearch.scoring.mixed import DocumentEmbedder, golden_numbers
from jaxsearch.scoring.prefill import Prefix, pad_prefixes, prefix_shape
from jaxsearch.tasks.base import (
    DataConfig,
    ModelConfig,
    Start,
    abstract_start,
    check_prompt,
    load_start,
    open_data,
)
from jaxsearch.training.distributed import share_work
from jaxsearch.training.step import Batch, Losses
from jaxsearch.training.task import Task

DEV_EVERY = 20
"""One document in so many is left for the evaluation."""
DEV_LIMIT = 512
"""Documents in an evaluation at most."""
PART = 64
"""Documents that a process embeds at a time in an evaluation."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncoderConfig(TaskConfig):
    """Train an encoder alone, before `MixLMConfig.encoder` starts from it."""

    data: DataConfig = field(default_factory=DataConfig)
    """Data set; what is searched for in it does not matter."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Size and start of the encoder."""
    prompt: PromptConfig = field(default_factory=lambda: PromptConfig("document"))
    """Template that it reads a document by, with the cut that holds for the words, too."""
    ranker: str = ""
    """Model folder of what MixLM's ranker starts from: its token embeddings are learned."""
    tokens: int = 1
    """T_S, embeddings per document."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"task.tokens is {self.tokens}: use at least 1 embedding per document")

    def build(self, config: TrainConfig) -> "EncoderTask":
        """The task on its data.

        Raises:
          ConfigError: `ranker` is empty, missing or reads no pairs, the prompt does not fit, or no word tells documents apart.
        """
        return EncoderTask(self, open_data(self.data), load_ranker(self.ranker))

    def build_abstract(self) -> "EncoderTask":
        """The task without data, for a ranker as wide as the encoder."""
        return EncoderTask.abstract(self)


class EncoderTask(Task):
    """Cosine distance to the words of each part of a document, mean over embeddings."""

    def __init__(self, config: EncoderConfig, data: Dataset, ranker: Model):
        self.config, self.data = config, data
        self.start = load_start(config.model, data)
        room = check_prompt("prompt", config.prompt, "document", self.start.tokenizer)
        self._texts = [part.ids for part in room.documents(data.documents)]
        self._length = max(map(len, self._texts))
        # The ranker's tokens of what the encoder reads, in its order: a part never lies behind the embedding that stands for it.
        cut = {name: getattr(config.prompt, name) for name in ("max_document_tokens", "longest_first")}
        read = PromptRoom(ranker.tokenizer, dataclasses.replace(ranker.contract.prompts["pair"], **cut))
        self._words = [np.array(part.ids, np.int64) for part in read.documents(data.documents)]
        self._table = np.asarray(ranker.module.decoder.embedding[...], np.float32)
        self._trained = trained_encoder(
            config.model.init_from, self.start, config.tokens, self._table.shape[1], "task.model"
        )
        hidden = set(data.held_out.tolist())
        known = [row for row in range(len(self._words)) if row not in hidden]
        self._dev = known[::DEV_EVERY][:DEV_LIMIT]
        self._train = [row for i, row in enumerate(known) if i % DEV_EVERY]
        if self._train:
            self._idf = idf([self._words[row] for row in self._train], len(self._table))
        if not self._train or not self._idf.any():
            raise ConfigError(
                f"data {data.name} has {len(self._train)} documents to learn from and no word that some of them lack: give more"
            )

    @classmethod
    def abstract(cls, config: EncoderConfig) -> "EncoderTask":
        """The task without examples (`TaskConfig.build_abstract`)."""
        task = cls.__new__(cls)
        task.config, task.start, task._trained = config, abstract_start(config.model), None
        room = check_prompt("prompt", config.prompt, "document", task.start.tokenizer)
        task._length = room.longest().document
        task._table = np.ones((1, task.start.architecture.width), np.float32)
        return task

    def batch_shape(self, size: int) -> Batch:
        """What `batch` gives."""
        kept, width = self.config.tokens, self._table.shape[1]
        return {
            "documents": prefix_shape(size, self._length),
            "targets": jax.ShapeDtypeStruct((size, kept, width), np.float32),
            "where": jax.ShapeDtypeStruct((size, kept), np.bool_),
        }

    def init(self, rngs: nnx.Rngs) -> nnx.Module:
        """An encoder that starts as the config says."""
        encoder = DocumentEncoder(
            self.start.architecture, tokens=self.config.tokens, width=self._table.shape[1], rngs=rngs
        )
        if self.start.weights is not None:
            nnx.update(encoder.decoder, nnx.state(self.start.weights))
        if self._trained is None:
            encoder.fit_scale(jnp.asarray(self._table))
        else:
            encoder.take_projection(self._trained)
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
        rows = [self._train[i] for i in indices]
        targets = np.zeros((len(rows), self.config.tokens, self._table.shape[1]), np.float32)
        for target, row in zip(targets, rows, strict=True):
            found = self._target(row)
            target[: len(found)] = found
        return {
            "documents": pad_prefixes([self._texts[row] for row in rows], length=self._length),
            "targets": targets,
            "where": np.any(targets != 0, axis=-1),
        }

    def _target(self, row: int) -> NDArray[np.float32]:
        """fp32 [<= S, W], as many as the encoder keeps of this document."""
        kept = min(self.config.tokens, len(self._texts[row]))
        return sums(self._words[row], kept, self._idf, self._table)

    def loss(self, model: DocumentEncoder, batch: Batch, key: jax.Array) -> Losses:
        """One minus the cosine, mean over embeddings."""
        documents: Prefix = batch["documents"]
        found = model(jnp.asarray(documents.tokens), jnp.asarray(documents.where)).astype(jnp.float32)
        where = jnp.asarray(batch["where"])
        apart = cosine_distance(found, jnp.asarray(batch["targets"]), where=where, reduction="sum")
        return Losses((apart, jnp.sum(where)))

    def evaluate(self, model: Any) -> dict[str, float]:
        """Mean cosine with the words of documents that it has not learned; NaN where none has a word of weight."""
        embedder = DocumentEmbedder(model, self.start.tokenizer, self.config.prompt)
        parts = [self._dev[start : start + PART] for start in range(0, len(self._dev), PART)]

        def cosines(rows: Sequence[int]) -> NDArray[np.float32]:
            embedded = embedder([self.data.documents[row] for row in rows])
            x, y = np.concatenate(embedded).astype(np.float32), np.concatenate([*map(self._target, rows)])
            where = np.any(y != 0, axis=1)
            x, y = x[where], y[where]
            return np.sum(x * y, axis=1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))

        found = share_work(lambda numbers: [cosines(parts[i]) for i in numbers], len(parts))
        values = np.concatenate(found) if found else np.zeros(0)
        return {"dev/cosine": float(values.mean()) if len(values) else float("nan")}

    def export(self, model: Any, folder: Path, config: TrainConfig) -> None:
        """Write the encoder; its embeddings are as large as the ranker's own, which the loss does not see to."""

        def embed(rows: Sequence[int]) -> list[NDArray]:
            embedder = DocumentEmbedder(model, self.start.tokenizer, self.config.prompt)
            return embedder([self.data.documents[row] for row in rows])

        norm, found = model.decoder.final_norm, np.concatenate(embed(self._train[:PART])).astype(np.float32)
        norm.set_value(norm[...] * np.sqrt(np.mean(self._table**2) / np.mean(found**2)))
        rows = self._train[:3]
        documents = [self.data.documents[row] for row in rows]
        query = next(
            query for queries in self.data.queries.values() for query in queries
        )  # no encoder reads it
        contract = Contract(
            kind="encoder",
            architecture=self.start.architecture,
            prompts={"document": self.config.prompt},
            training=to_dict(config),
            golden=tuple(map(Golden, [query] * len(rows), documents, golden_numbers(embed(rows)))),
            mixlm=MixLMPart(self.config.tokens, self._table.shape[1]),
        )
        save_model(folder, model, contract, self.start.tokenizer)


def load_ranker(folder: str) -> Model:
    """What MixLM's ranker starts from: a ranker, judge or base model.

    Raises:
      ConfigError: another model, or none.
    """
    if not folder:
        raise ConfigError("task.ranker is empty: give the model folder of what MixLM's ranker starts from")
    try:
        model = load_model(folder)
    except ContractError as error:
        raise ConfigError(f"task.ranker: {error}") from error
    if not isinstance(model.module, Scorer) or "pair" not in model.contract.prompts:
        raise ConfigError(
            f"task.ranker is {folder!r}, a {model.contract.kind}: give the model folder of a ranker, judge or base model"
        )
    return model


def trained_encoder(
    checkpoint: str, start: Start, tokens: int, width: int, field: str
) -> DocumentEncoder | None:
    """The encoder in a model folder, where `checkpoint` is one of an encoder and `start` has all its layers; `field` is as in `load_start`.

    Raises:
      ConfigError: its embeddings are of another width.
    """
    folder = Path(checkpoint)
    if not (folder / CONTRACT_FILE).is_file():
        return None
    contract = read_contract(folder)
    if contract.kind != "encoder" or contract.architecture.layers != start.architecture.layers:
        return None
    part = contract.mixlm
    assert part is not None  # an encoder has one
    if part.width != width:
        raise ConfigError(
            f"{field}.init_from is {checkpoint!r}, whose embeddings are {part.width} wide, the ranker {width}: "
            "give an encoder for this ranker"
        )
    if part.tokens != tokens:
        log.warning(
            "%s has learned %d embeddings per document, task.tokens is %d: the others start from nothing; set task.tokens to %d, or train "
            "an encoder with as many",
            checkpoint,
            part.tokens,
            tokens,
            part.tokens,
        )
    module = load_model(folder).module
    assert isinstance(module, DocumentEncoder)
    return module


def idf(texts: Sequence[NDArray], size: int) -> NDArray[np.float32]:
    """log(M / documents that hold a token), fp32 [V] of M texts int [n]: 0 for a token of all or of no document (Spärck Jones 1972)."""
    held = np.bincount(np.concatenate([np.unique(text) for text in texts]), minlength=size)
    return np.log(len(texts) / np.where(held == 0, len(texts), held)).astype(np.float32)


def sums(words: NDArray, parts: int, weights: NDArray, table: NDArray) -> NDArray[np.float32]:
    """Weighted sums of token embeddings over contiguous parts of a text, as equal in length as can be.

    Args:
      words: int [n].
      parts: S.
      weights: fp32 [V].
      table: fp32 [V, W].

    Returns:
      fp32 [S, W]; 0 for a part without a weighted token, as are the last ones of a text with fewer tokens than parts.
    """
    return np.stack([weights[part] @ table[part] for part in np.array_split(words, parts)])
