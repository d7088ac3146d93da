"""The summariser: a decoder that shortens documents so that a ranker hardly notices (paper section 5).

Two phases, each a run of its own:

- imitation (`targets`): cross entropy of summaries from stores, such as the extractive ones: a start from which sampling finds something;
- GRPO (`ranker`): sample G summaries of each document and push up those that did better than the others of their document. The reward is

      - KL(ranker on summary || ranker on full text), a mean over K training queries
      - length_weight * tokens + copy_weight * share of tokens that stand in the document

  and the loss adds `reference_weight` times the divergence from the model that training began with.

The ranker that rewards may be one that learned to read summaries (`configs/ranker.py` with `task.summaries`); the scores are then those of
the ranker of full text that taught it. One that has seen whole documents alone is sure of a miss wherever a text is unlike them, so that
words pay that make it unsure; one that knows short texts is already unsure of what they leave out, and only what they say pays.

Sampled tokens go into the ranker's prompt as they are, so that both models need one tokenizer; the evaluation goes the way of serving:
greedy text, tokenised anew. Scores of the full text come from a store (`serve.py label` with the ranker): they never change.

Axes: B documents, G summaries of each, K queries of each, T prompt tokens, M tokens of a summary, P prefix tokens, E tokens behind a
document in the ranker's prompt, C labels and actions, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsearch.config import ConfigError, TaskConfig, TrainConfig, to_dict
from jaxsearch.data.datasets import Dataset
from jaxsearch.data.prompts import PromptConfig, PromptRoom
from jaxsearch.data.records import Document
from jaxsearch.data.score_store import read_scores
from jaxsearch.data.summaries import FIELD, SummaryStore, with_summary
from jaxsearch.losses import binary_kl, clipped_policy, group_advantages, reference_kl, token_cross_entropy
from jaxsearch.models.contract import Contract, Golden, Model, load_model, save_model
from jaxsearch.models.decoder import Decoder
from jaxsearch.models.generate import continue_texts
from jaxsearch.models.scorer import Scorer
from jaxsearch.scoring.mixed import keep_fields
from jaxsearch.scoring.packing import PackedItems
from jaxsearch.scoring.prefill import Prefix, answer_hidden, pad_prefixes, prefix_shape, score
from jaxsearch.scoring.records import (
    RANKER_LABELS,
    RecordScorer,
    action_log_odds,
    relevance_log_odds,
)
from jaxsearch.scoring.summaries import SummaryWriter, text_masks
from jaxsearch.tasks.base import (
    DataConfig,
    ModelConfig,
    Start,
    abstract_start,
    check_prompt,
    evaluation_lists,
    load_start,
    may_learn,
    open_data,
    ranking_metrics,
)
from jaxsearch.tasks.cross_encoder import NO_TOKEN, Example, PairTokens
from jaxsearch.training.step import Batch, Losses, Tools, TrainState, gradient_step
from jaxsearch.training.task import Task

_FORBIDDEN = -1e30
"""Logit of what may not be sampled; finite, so that no gradient is NaN."""


@dataclass(frozen=True)
class SummariserConfig(TaskConfig):
    """Train a summariser, by imitation or by a ranker's reward."""

    data: DataConfig = field(default_factory=DataConfig)
    """Data set."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Size and start."""
    prompt: PromptConfig = field(default_factory=lambda: PromptConfig("summariser"))
    """Prompt template of kind "summariser"; its `max_answer_tokens` is the budget, the end token included."""
    targets: tuple[str, ...] = ()
    """Stores of summaries to imitate (`serve.py summarise`), one of them drawn for a document each time: samples then differ, and GRPO has
    something to choose from. Empty: GRPO."""
    ranker: str = ""
    """Model folder of the ranker that rewards, of full text or of summaries; with `targets` it only measures."""
    scores: str = ""
    """Store of scores of the full text (`serve.py label`): by that ranker or, where it reads summaries, by the one that taught it."""
    queries: int = 8
    """K, training queries that a summary is judged by, drawn anew each time."""
    samples: int = 8
    """G, summaries of one document in a step."""
    temperature: float = 1.0
    """Of sampling."""
    alpha: float = 1.0
    """Weight of relevance in the ranker's divergence; 1 - alpha is that of its actions, on average."""
    length_weight: float = 0.0
    """w, what a token costs."""
    copy_weight: float = 0.0
    """What it is worth that every token of a summary stands in the document: the quality term."""
    reference_weight: float = 0.02
    """beta, of the divergence from the reference model, the one that training began with."""
    clip: float = 0.2
    """How far the probability of a token may move on one set of samples before its gradient ends."""
    updates: int = 1
    """Updates on one set of samples; each counts in the learning-rate schedule, so that more than one needs `optimizer.decay_steps`."""

    def __post_init__(self) -> None:
        for name, least in (("queries", 1), ("samples", 2), ("updates", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"task.{name} is {getattr(self, name)}: use at least {least}")
        for name in ("length_weight", "copy_weight", "reference_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"task.{name} is {getattr(self, name)}: give 0 or more")
        for name in ("temperature", "clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"task.{name} is {getattr(self, name)}: give a positive number")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(
                f"task.alpha is {self.alpha}: give a number from 0 (actions only) to 1 (relevance only)"
            )
        if self.prompt.max_answer_tokens < 2:
            raise ConfigError(
                f"task.prompt.max_answer_tokens is {self.prompt.max_answer_tokens}: a summary and its end need 2 or more"
            )

    def build(self, config: TrainConfig) -> "SummariserTask":
        """The task on its data.

        Raises:
          ConfigError: neither targets nor a ranker with its scores, models and stores that do not fit each other, or several updates
            without `optimizer.decay_steps`.
        """
        if self.updates > 1 and not config.optimizer.decay_steps:
            raise ConfigError(
                f"task.updates is {self.updates}, each of which counts in the learning-rate schedule: "
                f"give optimizer.decay_steps, {self.updates * config.steps} to end with the run"
            )
        data = open_data(self.data)
        if self.targets:
            return ImitationTask(self, data)
        if not self.ranker or not self.scores:
            raise ConfigError(
                f"task.ranker is {self.ranker!r}, task.scores {self.scores!r}: give a ranker's model folder and the store of its scores "
                "(`serve.py label`), or task.targets to imitate"
            )
        return GrpoTask(self, data)

    def build_abstract(self) -> "SummariserTask":
        """GRPO without data and weights; `ranker` is taken for a preset ("qwen3_0_6b"), of relevance alone."""
        return GrpoTask.abstract(self)


class SummariserTask(Task):
    """What both phases share: prompts, the probability of a text, evaluation and export."""

    _ranker: Model | None = None

    def __init__(self, config: SummariserConfig, data: Dataset):
        self.config, self.data = config, data
        self.start = load_start(config.model, data)
        self._prepare()
        self._ranker = _load_ranker(config.ranker, self.start) if config.ranker else None
        self._prompts = self.room.summary_prompts(data.documents)
        self._prompt_length = max(map(len, self._prompts))
        self._full_logits: list[np.ndarray] | None = None

    def _prepare(self) -> None:
        self.room = check_prompt("prompt", self.config.prompt, "summariser", self.start.tokenizer)
        self._masks = text_masks(self.room, self.start.architecture.vocab_size)

    @property
    def budget(self) -> int:
        """M."""
        return self.config.prompt.max_answer_tokens

    @property
    def data_version(self) -> str:
        """Fingerprint of the data set."""
        return self.data.fingerprint

    def make_policy(self, rngs: nnx.Rngs) -> Scorer:
        """The summariser as training begins: a decoder without labels."""
        model = Scorer(self.start.architecture, label_ids=(), actions=0, rngs=rngs)
        if self.start.weights is not None:
            nnx.update(model.decoder, nnx.state(self.start.weights))
        return model

    def prompts(self, rows: Sequence[int]) -> Prefix:
        """Prompts [B, T] of these documents."""
        return pad_prefixes([self._prompts[row] for row in rows], length=self._prompt_length)

    def log_probs(self, decoder: Decoder, prompt: Prefix, texts: jax.Array, said: jax.Array) -> jax.Array:
        """Log-probability of every token of texts by the distribution that is sampled from; differentiable.

        The prompt but for its last token is a prefix that its texts share, as a query's prefix is shared by its candidates.

        Args:
          decoder: any decoder of the start's vocabulary.
          prompt: [B, T].
          texts: int [B, G, M].
          said: bool [B, G, M], the tokens that exist, end tokens included, left-aligned.

        Returns:
          fp32 [B, G, M], 0 where there is no token.
        """
        tokens, where = jnp.asarray(prompt.tokens), jnp.asarray(prompt.where)
        b, g, m = texts.shape
        length = jnp.sum(where, axis=1)
        before = where & (jnp.arange(where.shape[1])[None] < (length - 1)[:, None])
        last = jnp.take_along_axis(tokens, (length - 1)[:, None], axis=1)
        inputs = jnp.concatenate(
            [jnp.broadcast_to(last[:, :, None], (b, g, 1)), jnp.where(said, texts, 0)[..., :-1]], axis=-1
        )
        count = jnp.sum(said, axis=-1)
        steps = jnp.arange(m)[None, None]
        row = jnp.broadcast_to(jnp.arange(g)[None], (b, g))
        items = PackedItems(
            jnp.where(said, inputs, 0),
            said.astype(jnp.int32),
            jnp.broadcast_to(steps, texts.shape),
            jnp.stack([row, jnp.maximum(count - 1, 0)], axis=-1),
            count > 0,
        )
        back = jnp.maximum(count[..., None] - 1 - steps, 0)
        hidden = answer_hidden(decoder, tokens, before, items, back)

        @jax.checkpoint
        def place(number: jax.Array, state: jax.Array, token: jax.Array, exists: jax.Array) -> jax.Array:
            may = jnp.where(number == 0, *self._masks)[None, None]
            logits = jnp.where(may, decoder.logits(state) / self.config.temperature, _FORBIDDEN)
            return -token_cross_entropy(logits, token, where=exists, reduction="none")

        # One place at a time, so that the vocabulary's logits are never held for all of them.
        by_place = [jnp.moveaxis(x, 2, 0) for x in (hidden, texts, said)]
        found = jax.lax.map(lambda part: place(*part), (jnp.arange(m), *by_place))
        return jnp.moveaxis(found, 0, 2)

    # --- evaluation and export -----------------------------------------------------------------------------------

    def policy(self, model: Any) -> Scorer:
        """The summariser alone."""
        return model.policy if isinstance(model, Rewarded) else model

    def evaluate(self, model: Any) -> dict[str, float]:
        """Length of greedy summaries of the dev queries' candidates and, with a ranker, NDCG@10 and divergence on them."""
        queries, candidates = evaluation_lists(self.data, "dev", self.config.data.eval_queries)
        rows = np.unique(np.concatenate(candidates)).tolist()
        some = [self.data.documents[row] for row in rows]
        texts = SummaryWriter(self.policy(model).decoder, self.room)(some)
        shown = [with_summary(document, text) for document, text in zip(some, texts, strict=True)]
        written = mean_tokens(self.room, shown)
        figures = {"dev/summary_tokens": written, "dev/shorter": mean_tokens(self.room, some) / written}
        if self._ranker is None:
            return figures
        documents = list(self.data.documents)
        for row, document in zip(rows, shown, strict=True):
            documents[row] = document
        logits = _scorer(self._ranker, documents)(queries, candidates)
        odds = [relevance_log_odds(x) for x in logits]
        metrics = ranking_metrics(self.data, queries, candidates, odds)
        figures |= {f"dev/{name}": float(np.nanmean(values)) for name, values in metrics.items()}
        if self._ranker.contract.summariser:  # which says nothing of the full text
            return figures
        if self._full_logits is None:
            self._full_logits = _scorer(self._ranker, self.data.documents)(queries, candidates)
        full = relevance_log_odds(np.concatenate(self._full_logits))
        return {**figures, "dev/ranker_kl": float(mean_divergence(np.concatenate(odds), full))}

    def export(self, model: Any, folder: Path, config: TrainConfig) -> None:
        """Write the summariser with its contract."""
        policy = self.policy(model)
        documents = list(self.data.documents[:3])
        found = SummaryWriter(policy.decoder, self.room).first_log_probs(documents)
        golden = tuple(
            Golden(query, document, (float(values[0]),))
            for query, document, values in zip(self.data.queries["dev"], documents, found, strict=False)
        )
        contract = Contract(
            kind="summariser",
            architecture=self.start.architecture,
            prompts={"summary": self.config.prompt},
            training=to_dict(config),
            golden=golden,
        )
        save_model(folder, policy, contract, self.start.tokenizer)


def mean_tokens(room: PromptRoom, documents: Sequence[Document]) -> float:
    """Mean length of the document parts of a prompt."""
    return float(np.mean([len(part.ids) for part in room.documents(documents)]))


def mean_divergence(summary: np.ndarray, full: np.ndarray) -> float:
    """Mean KL of relevance, read from summaries, to relevance read from the full text (log-odds [n] both)."""
    there = jnp.ones(full.shape, bool)
    return float(binary_kl(jnp.asarray(full), jax.nn.sigmoid(jnp.asarray(summary)), where=there))


def _scorer(ranker: Model, documents: Sequence[Document]) -> RecordScorer:
    assert isinstance(ranker.module, Scorer)  # `_load_ranker` refuses anything else
    return RecordScorer(ranker.module, ranker.tokenizer, ranker.contract.prompts["pair"], documents)


def _load_ranker(folder: str, start: Start) -> Model:
    """The ranker that rewards.

    Raises:
      ConfigError: it is no ranker, or has another tokenizer than the summariser.
    """
    model = load_model(folder)
    if model.contract.kind != "ranker" or not isinstance(model.module, Scorer):
        raise ConfigError(
            f"task.ranker is {folder!r}, a {model.contract.kind}: give the model folder of a ranker"
        )
    if model.tokenizer.inner.to_str() != start.tokenizer.inner.to_str():
        raise ConfigError(
            f"task.ranker is {folder!r}, whose tokenizer is not the summariser's: start both from checkpoints of one tokenizer"
        )
    return model


class ImitationTask(SummariserTask):
    """Cross entropy of the summaries in some stores, a mean over tokens."""

    def __init__(self, config: SummariserConfig, data: Dataset):
        super().__init__(config, data)
        stores, hidden = [SummaryStore.open(folder) for folder in config.targets], set(data.held_out.tolist())
        found = {
            row: texts
            for row, document in enumerate(data.documents)
            if row not in hidden and (texts := [text for store in stores if (text := store.get(document))])
        }
        if not found:
            raise ConfigError(
                f"task.targets is {config.targets!r}: there is no fresh summary of any document of {data.name}"
            )
        self._rows = list(found)
        self._texts = [
            [[*ids[: self.budget - 1], self.room.end_id] for ids in self.start.tokenizer.encode(texts)]
            for texts in found.values()
        ]

    @property
    def num_examples(self) -> int:
        """Documents with a summary."""
        return len(self._rows)

    def example_ids(self, indices: np.ndarray) -> list[str]:
        """Document ids."""
        return [self.data.documents[self._rows[i]].id for i in indices]

    def init(self, rngs: nnx.Rngs) -> nnx.Module:
        """The summariser."""
        return self.make_policy(rngs)

    def batch(self, indices: np.ndarray, rngs: Sequence[np.random.Generator]) -> Batch:
        """prompt [B, T], and text int [B, 1, M], its end token included, `NO_TOKEN` behind it."""
        text = np.full((len(indices), 1, self.budget), NO_TOKEN, np.int32)
        for place, (index, rng) in enumerate(zip(indices, rngs, strict=True)):
            texts = self._texts[index]
            ids = texts[rng.integers(len(texts))]
            text[place, 0, : len(ids)] = ids
        return {"prompt": self.prompts([self._rows[i] for i in indices]), "text": text}

    def loss(self, model: Scorer, batch: Batch, key: jax.Array) -> Losses:
        """Nats per token."""
        text = jnp.asarray(batch["text"])
        said = text != NO_TOKEN
        return Losses((-jnp.sum(self.log_probs(model.decoder, batch["prompt"], text, said)), jnp.sum(said)))


class Rewarded(nnx.Module):
    """The summariser that trains, the one it began as, and the ranker; the last two are frozen."""

    def __init__(self, policy: Scorer, reference: Scorer, ranker: Scorer):
        self.policy, self.reference, self.ranker = policy, reference, ranker


class _Judged(NamedTuple):
    """A document and the queries that its summary can be judged by."""

    document: int
    queries: np.ndarray
    """int32 [n], rows of training queries."""
    log_odds: np.ndarray
    """fp32 [n, 1 + A], of relevance and actions on the full text."""


class GrpoTask(SummariserTask):
    """Group relative policy optimisation against a ranker's own scores of the full text (arXiv 2402.03300)."""

    _ranker: Model
    _make_ranker: Callable[[], Scorer]

    def __init__(self, config: SummariserConfig, data: Dataset):
        super().__init__(config, data)
        contract, module = self._ranker.contract, self._ranker.module
        assert isinstance(module, Scorer)  # `_load_ranker` refuses anything else
        self._make_ranker = lambda: module
        if config.alpha < 1 and not contract.actions:
            raise ConfigError(f"task.alpha is {config.alpha}, but the ranker scores no actions: give 1")
        found = self._read_scores()
        self.examples = self._judged(found)
        self._ranker_room = PromptRoom(self.start.tokenizer, contract.prompts["pair"])
        self._lead = self._make_lead()
        by_query: dict[int, list[int]] = {}
        for query, row in found:
            by_query.setdefault(query, []).append(row)
        # The same pairs with nothing of the document: what stands behind a summary in the ranker's prompt.
        empty = dataclasses.replace(data, documents=keep_fields(data.documents, ()))
        self._pairs = PairTokens(
            self._ranker_room,
            empty,
            [Example(query, np.array(rows, np.int32), {}) for query, rows in by_query.items()],
        )
        self._prefix_length, self._tail_length = self._pairs.prefix_length, self._pairs.item_length
        self._actions = len(contract.actions)

    @classmethod
    def abstract(cls, config: SummariserConfig) -> Self:
        """The task without examples (`TaskConfig.build_abstract`)."""
        task = cls.__new__(cls)
        task.config, task.start = config, abstract_start(config.model)
        task._prepare()
        prompt = PromptConfig("ranker", style=config.prompt.style, chat=config.prompt.chat)
        task._ranker_room = PromptRoom(task.start.tokenizer, prompt)
        task._lead = task._make_lead()
        longest = task._ranker_room.longest()
        task._prefix_length, task._actions = longest.prefix, 0
        task._tail_length = longest.item - longest.document
        own = task.room.longest()
        task._prompt_length = own.prefix + own.item
        model = config.model
        sizes = ModelConfig(config.ranker, compute_dtype=model.compute_dtype, vocab_size=model.vocab_size)
        architecture = abstract_start(sizes).architecture
        labels = [task.start.tokenizer.label(name) for name in RANKER_LABELS]
        task._make_ranker = lambda: Scorer(architecture, label_ids=labels, actions=0, rngs=nnx.Rngs(0))
        return task

    def _make_lead(self) -> list[int]:
        """What the ranker's prompt says before a summary: the name of its field, where it writes names."""
        text = self._ranker_room.document_text(Document("", {FIELD: ""})).rstrip()
        return self.start.tokenizer.encode([text])[0] if text else []

    # --- examples and batches ------------------------------------------------------------------------------------

    def _read_scores(self) -> dict[tuple[int, int], np.ndarray]:
        """(query row, document row) -> log-odds [1 + A] of relevance and actions.

        Raises:
          ConfigError: the store is another model's, or of summaries.
          StoreError: it is unfinished, damaged, or of other data.
        """
        folder, contract = self.config.scores, self._ranker.contract
        meta, stored = read_scores(folder, self.data.fingerprint)
        if meta.dataset != self.data.name:
            raise ConfigError(
                f"task.scores is {folder!r}, scores of {meta.dataset}: label the full text of {self.data.name}, without --summaries"
            )
        wanted = (*contract.labels, *contract.actions)
        own = meta.model == self._ranker.hash
        if own and contract.summariser:
            raise ConfigError(
                f"task.scores is {folder!r}, what task.ranker says of summaries: label with the ranker of full text that taught it"
            )
        if not (own or contract.summariser) or meta.columns != wanted:
            raise ConfigError(
                f"task.scores is {folder!r}, which holds {', '.join(meta.columns)} by model {meta.model[:12]}; task.ranker is "
                f"{self._ranker.hash[:12]}, of {', '.join(wanted)}: label with that ranker, or with the one of full text that taught it"
            )
        found = may_learn(stored, self.data, self.config.data.max_queries)
        logits = np.array([stored[pair] for pair in found], np.float32)
        values = np.concatenate([relevance_log_odds(logits)[:, None], action_log_odds(logits)], axis=1)
        return dict(zip(found, values, strict=True))

    def _judged(self, found: dict[tuple[int, int], np.ndarray]) -> list[_Judged]:
        known: dict[int, list[tuple[int, np.ndarray]]] = {}
        for (query, row), values in found.items():
            known.setdefault(row, []).append((query, values))
        return [
            _Judged(
                row, np.array([q for q, _ in pairs], np.int32), np.array([v for _, v in pairs], np.float32)
            )
            for row, pairs in sorted(known.items())
        ]

    @property
    def num_examples(self) -> int:
        """Documents that the ranker scored for some query."""
        return len(self.examples)

    def example_ids(self, indices: np.ndarray) -> list[str]:
        """Document ids."""
        return [self.data.documents[self.examples[i].document].id for i in indices]

    def batch(self, indices: np.ndarray, rngs: Sequence[np.random.Generator]) -> Batch:
        """Documents, and for each some of the queries that the ranker scored it for.

        prompt [B, T]; body bool [B, T], the document in it; query: prefixes [B, K, P] of the ranker; tail int [B, K, E], what stands behind
        the document in its prompt, `NO_TOKEN` behind that; full fp32 [B, K, 1 + A], log-odds on the full text; where bool [B, K].
        """
        slots, size = self.config.queries, len(indices)
        prefixes: list[list[int]] = []
        tail = np.full((size, slots, self._tail_length), NO_TOKEN, np.int32)
        full = np.zeros((size, slots, 1 + self._actions), np.float32)
        where = np.zeros((size, slots), bool)
        examples = [self.examples[i] for i in indices]
        for b, (example, rng) in enumerate(zip(examples, rngs, strict=True)):
            chosen = rng.permutation(len(example.queries))[:slots]
            for k, place in enumerate(chosen):
                asked = int(example.queries[place])
                pair = Example(asked, np.array([example.document], np.int32), {})
                (ids,) = self._pairs.items(pair, np.array([0]))
                tail[b, k, : len(ids)] = ids
                prefixes.append(self._pairs.prefixes[asked])
            # Slots without a query repeat the first one, masked: a prefix is never empty.
            prefixes += [self._pairs.prefixes[int(example.queries[0])]] * (slots - len(chosen))
            full[b, : len(chosen)] = example.log_odds[chosen]
            where[b, : len(chosen)] = True
        query = pad_prefixes(prefixes, length=self._prefix_length)
        shape = (size, slots, self._prefix_length)
        prompt = self.prompts([example.document for example in examples])
        return {
            "prompt": prompt,
            "body": self._bodies(prompt, [self.data.documents[e.document] for e in examples]),
            "query": Prefix(np.reshape(query.tokens, shape), np.reshape(query.where, shape)),
            "tail": tail,
            "full": full,
            "where": where,
        }

    def _bodies(self, prompt: Prefix, documents: Sequence[Document]) -> np.ndarray:
        """bool [B, T], where the document stands in its prompt."""
        places = np.arange(self._prompt_length)
        lengths = np.sum(prompt.where, axis=1) - len(self.room.suffix)
        counts = np.array([len(part.ids) for part in self.room.documents(documents)])
        return (places >= (lengths - counts)[:, None]) & (places < lengths[:, None])

    def batch_shape(self, size: int) -> Batch:
        """What `batch` gives."""
        slots = self.config.queries

        def shape(*sizes: int, dtype: Any = np.int32) -> Any:
            return jax.ShapeDtypeStruct(sizes, dtype)

        query = (size, slots, self._prefix_length)
        return {
            "prompt": prefix_shape(size, self._prompt_length),
            "body": shape(size, self._prompt_length, dtype=np.bool_),
            "query": Prefix(shape(*query), shape(*query, dtype=np.bool_)),
            "tail": shape(size, slots, self._tail_length),
            "full": shape(size, slots, 1 + self._actions, dtype=np.float32),
            "where": shape(size, slots, dtype=np.bool_),
        }

    # --- the step ------------------------------------------------------------------------------------------------

    def init(self, rngs: nnx.Rngs) -> nnx.Module:
        """Summariser, reference and ranker."""
        policy = self.make_policy(rngs)
        graphdef, state = nnx.split(policy)
        # Arrays of its own: a step gives the summariser's old ones away.
        return Rewarded(policy, nnx.merge(graphdef, jax.tree.map(jnp.copy, state)), self._make_ranker())

    def trainable(self) -> Any:
        """The summariser's parameters."""
        return nnx.All(nnx.Param, nnx.PathContains("policy"))

    def step(
        self, state: TrainState, batch: Batch, key: jax.Array, tools: Tools
    ) -> tuple[TrainState, Losses]:
        """Sample and judge summaries, then `updates` gradients of the loss on them."""
        part = self.roll_out(tools.model(state.params, state.rest), batch, key)
        for _ in range(self.config.updates):
            state, losses = gradient_step(self.loss, state, part, key, tools)
        return state, losses

    def roll_out(self, model: Any, batch: Batch, key: jax.Array) -> Batch:
        """A batch for `loss`: prompt, texts int [B, G, M], said bool [B, G, M], advantage fp32 [B, G], old and reference log-probabilities
        [B, G, M], and what the rewards were made of, fp32 [B, G]."""
        prompt: Prefix = batch["prompt"]
        config, where = self.config, jnp.asarray(prompt.where)
        graphdef, state = nnx.split(model.policy.decoder)
        texts, counts = continue_texts(
            graphdef, state, jnp.asarray(prompt.tokens), jnp.sum(where, axis=1), jnp.asarray([self.room.end_id]),
            *self._masks, (key, jnp.float32(config.temperature), None),
            max_new_tokens=self.budget, samples=config.samples,
        )  # fmt: skip
        texts, counts = (x.reshape(len(where), config.samples, *x.shape[1:]) for x in (texts, counts))
        said = jnp.arange(self.budget)[None, None] < counts[..., None]
        rewards = self.rewards(model.ranker, batch, texts, said)
        return {
            "prompt": prompt,
            "texts": texts,
            "said": said,
            "advantage": group_advantages(rewards["reward"], where=jnp.ones(counts.shape, bool)),
            "old": self.log_probs(model.policy.decoder, prompt, texts, said),
            "reference": self.log_probs(model.reference.decoder, prompt, texts, said),
            **rewards,
        }

    def rewards(
        self, ranker: Scorer, batch: Batch, texts: jax.Array, said: jax.Array
    ) -> dict[str, jax.Array]:
        """reward, and what it is made of: ranker_kl, summary_tokens, copied; fp32 [B, G] each."""
        config, asked = self.config, jnp.asarray(batch["where"])
        b, g, _ = texts.shape
        words = said & (texts != self.room.end_id)
        query: Prefix = batch["query"]
        items = summary_items(self._lead, texts, words, jnp.asarray(batch["tail"]))
        prefix, there = (jnp.reshape(jnp.asarray(x), (-1, x.shape[-1])) for x in query)
        logits = score(ranker, prefix, there, items).reshape(b, config.queries, g, -1)
        full = jnp.asarray(batch["full"])[:, :, None]
        judged = jnp.broadcast_to(asked[..., None], logits.shape[:-1])

        def divergence(found: jax.Array, target: jax.Array) -> jax.Array:
            odds = jnp.broadcast_to(target, found.shape)
            mask = judged if found.ndim == judged.ndim else jnp.broadcast_to(judged[..., None], found.shape)
            return binary_kl(odds, jax.nn.sigmoid(found), where=mask, reduction="none")

        kl = divergence(relevance_log_odds(logits), full[..., 0])
        if config.alpha < 1:
            actions = divergence(action_log_odds(logits), full[..., 1:])
            kl = config.alpha * kl + (1 - config.alpha) * jnp.mean(actions, axis=-1)
        kl = jnp.sum(kl, axis=1) / jnp.maximum(jnp.sum(asked, axis=1), 1)[:, None]
        tokens = jnp.sum(words, axis=-1).astype(kl.dtype)
        prompt: Prefix = batch["prompt"]
        copied = copied_share(texts, words, jnp.asarray(prompt.tokens), jnp.asarray(batch["body"]))
        reward = config.copy_weight * copied - kl - config.length_weight * tokens
        return {"reward": reward, "ranker_kl": kl, "summary_tokens": tokens, "copied": copied}

    def loss(self, model: Any, batch: Batch, key: jax.Array) -> Losses:
        """The clipped policy gradient and the divergence from the reference, means over the tokens of what `roll_out` gave."""
        said = batch["said"]
        found = self.log_probs(model.policy.decoder, batch["prompt"], batch["texts"], said)
        policy = clipped_policy(
            found, batch["old"], batch["advantage"], where=said, clip=self.config.clip, reduction="sum"
        )
        apart = reference_kl(found, batch["reference"], where=said, reduction="sum")
        tokens, texts = jnp.sum(said), batch["reward"].size
        names = ("reward", "ranker_kl", "summary_tokens", "copied")
        metrics = {name: (jnp.sum(batch[name]), jnp.asarray(texts)) for name in names}
        metrics["moved"] = (jax.lax.stop_gradient(apart), tokens)
        terms = {"policy": (policy, tokens)}
        if self.config.reference_weight:
            terms["reference"] = (self.config.reference_weight * apart, tokens)
        return Losses(terms, metrics)


def summary_items(lead: Sequence[int], texts: jax.Array, words: jax.Array, tail: jax.Array) -> PackedItems:
    """Every summary of a document as an item of each of the document's queries.

    Args:
      lead: tokens before every summary.
      texts: int [B, G, M].
      words: bool [B, G, M], the tokens of the summaries, left-aligned.
      tail: int [B, K, E], what follows the document in the prompt of each query, `NO_TOKEN` behind it.

    Returns:
      Items of B K queries, G of each, one a row.
    """
    b, g, m = texts.shape
    k, e = tail.shape[1:]
    length = len(lead) + m + e
    begin = jnp.broadcast_to(jnp.asarray(lead, jnp.int32)[None, None], (b, g, len(lead)))
    body = jnp.concatenate([begin, texts, jnp.zeros((b, g, e), texts.dtype)], axis=-1)[:, None]
    size = (len(lead) + jnp.sum(words, axis=-1))[:, None, :, None]
    behind = jnp.sum(tail != NO_TOKEN, axis=-1)[..., None, None]
    place = jnp.arange(length)[None, None, None]
    index = jnp.clip(place - size, 0, e - 1)
    shape = (b, k, g, length)
    after = jnp.take_along_axis(
        jnp.broadcast_to(tail[:, :, None], (b, k, g, e)), jnp.broadcast_to(index, shape), axis=-1
    )
    exists = jnp.broadcast_to(place < size + behind, shape)
    tokens = jnp.where(exists, jnp.where(place < size, body, after), 0)
    last = jnp.broadcast_to((size + behind - 1)[..., 0], (b, k, g))
    row = jnp.broadcast_to(jnp.arange(g)[None, None], last.shape)
    segments, offsets = exists.astype(jnp.int32), jnp.broadcast_to(place, shape)
    tokens, segments, offsets = (jnp.reshape(x, (b * k, g, length)) for x in (tokens, segments, offsets))
    ends = jnp.stack([row, last], axis=-1).reshape(b * k, g, 2)
    return PackedItems(tokens, segments, offsets, ends, jnp.ones((b * k, g), bool))


def copied_share(texts: jax.Array, words: jax.Array, tokens: jax.Array, body: jax.Array) -> jax.Array:
    """Share of each summary's tokens that stand in its document, fp32 [B, G]; 0 of an empty one.

    Args:
      texts: int [B, G, M].
      words: bool [B, G, M], the tokens of the summaries.
      tokens: int [B, T], prompts.
      body: bool [B, T], the documents in them.
    """

    def found(token: jax.Array) -> jax.Array:
        return jnp.any((token[..., None] == tokens[:, None]) & body[:, None], axis=-1)

    hits = jnp.moveaxis(jax.lax.map(found, jnp.moveaxis(texts, 2, 0)), 0, 2) & words
    return jnp.sum(hits, axis=-1) / jnp.maximum(jnp.sum(words, axis=-1), 1).astype(jnp.float32)
