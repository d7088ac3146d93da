"""MixLM, stage III: an encoder that turns documents into embeddings, and the ranker that reads them, trained together (paper section 6).

Stage I (the judge's knowledge) is `tasks.judge`, stage II (the full-text ranker) `tasks.ranker`: the ranker starts from a stage II
folder, the encoder from a retriever's. The paper's ranker starts from stage I, fine-tuned itself on grades and reasons, and a judge's
folder is taken as well; where a larger judge learned those, the ranker learns from its labels. The loss is

    L = sft_weight L_SFT + distill_weight L_distill + align_weight (pred_weight L_pred + hidden_weight L_hidden)

- L_SFT: KL to the judge's labels or to the data set's grades, and with `truth_weight` what searchers did;
- L_distill: KL to the stage II teachers' stored scores, of relevance and of every action (alpha and 1 - alpha, as in the ranker);
- L_pred: KL to what the ranker itself says of the full text, of relevance and of every action (alpha and 1 - alpha);
- L_hidden: 1 - cosine between the hidden states that the two answers are read from.

Beside each relevance KL stands the ranker's listwise term (`listwise_weight`; 0: the paper's loss).

L_pred and L_hidden move the encoder alone: the ranker is held still in both of its passes. Its own text pass is their target, and a
ranker that may move towards what it says itself soon says the same of everything. With `text_weight` L_SFT and L_distill hold for the full
text too, so that documents without an embedding are still read well.

Axes: B queries, L candidates, M documents, S embeddings per document, W width of the ranker, C labels and actions.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsearch.config import ConfigError, TrainConfig, to_dict
from jaxsearch.data.datasets import Dataset
from jaxsearch.data.prompts import PromptConfig
from jaxsearch.data.records import ACTIONS
from jaxsearch.data.sampling import sample_places
from jaxsearch.losses import cosine_distance
from jaxsearch.models.contract import (
    CONTRACT_FILE,
    Contract,
    Golden,
    MixLMPart,
    read_contract,
    save_model,
)
from jaxsearch.models.mixlm import DocumentEncoder, MixLM
from jaxsearch.models.scorer import Scorer
from jaxsearch.scoring.mixed import (
    DocumentEmbedder,
    MixedScorer,
    OnDemand,
    golden_numbers,
    keep_fields,
    no_embeddings,
    shuffled,
)
from jaxsearch.scoring.packing import Array, EmbeddedItem, PackedItems, assign_rows, packed_shape, place_items
from jaxsearch.scoring.prefill import Prefix, answer_hidden, pad_prefixes, prefix_shape, read_labels
from jaxsearch.scoring.records import action_log_odds, relevance_log_odds
from jaxsearch.tasks.base import (
    ModelConfig,
    abstract_start,
    check_prompt,
    evaluation_lists,
    load_start,
    open_data,
    ranking_metrics,
)
from jaxsearch.tasks.cross_encoder import CrossEncoderConfig, Example, PairTokens
from jaxsearch.tasks.encoder import trained_encoder
from jaxsearch.tasks.engagement_teacher import engagement_auroc
from jaxsearch.tasks.ranker import RankerConfig, RankerTask
from jaxsearch.tasks.teachers import Targets, stored_relevance
from jaxsearch.training.step import Batch, Losses, Mean, Tools, TrainState, gradient_step

CERTAIN = 0.98
"""Probability that stands for the grade 4, and from 1 for the grade 0: neither has finite log-odds."""
ENCODER_FOLDER = "encoder"
"""Where the encoder lies in an exported ranker's folder."""


@dataclass(frozen=True)
class MixLMConfig(RankerConfig):
    """Train encoder and ranker together. `model` is the ranker, `relevance_teachers` and `engagement_teachers` are stage II stores; a
    ranker's own store may be both.
    """

    encoder: ModelConfig = field(default_factory=ModelConfig)
    """Size and start of the encoder."""
    encoder_prompt: PromptConfig = field(default_factory=lambda: PromptConfig("document"))
    """Template that the encoder reads a document by; its tail is the last token that is kept."""
    tokens: int = 1
    """T_S, embeddings per document: the encoder's last hidden states."""
    text_fields: tuple[str, ...] = ()
    """Fields of a document that the ranker also reads as text, behind the embeddings."""
    unique_documents: int = 0
    """Room for different documents in a batch, per query; candidates beyond it are left out. 0: for all that can occur."""
    labels: str = ""
    """Score store of the judge, for L_SFT; empty: the data set's own grades."""
    sft_weight: float = 1.0
    """Of L_SFT."""
    distill_weight: float = 1.0
    """lambda_distill."""
    align_weight: float = 1.0
    """lambda_align."""
    pred_weight: float = 1.0
    """alpha of the alignment."""
    hidden_weight: float = 1.0
    """beta of the alignment."""
    curriculum: float = 0.25
    """Share of the steps in the first phase, which aligns alone; 0, or without alignment: one phase."""
    align_after: float = 1.0
    """Factor of `align_weight` in the second phase."""
    text_weight: float = 0.0
    """Weight of L_SFT and L_distill on the full text, in both phases; costs a backward pass through it."""
    text_every: int = 1
    """Only each so-manieth query of a batch is read as text, for the alignment and by `text_weight`: text is what a step costs most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teachers != "stored":
            raise ConfigError(f"task.teachers is {self.teachers!r}: MixLM learns from stores, use 'stored'")
        if self.summaries:
            raise ConfigError(
                f"task.summaries is {self.summaries!r}: the encoder reads the text itself, leave it empty"
            )
        if self.text_every < 1:
            raise ConfigError(
                f"task.text_every is {self.text_every}: use 1 for all queries of a batch, 4 for a quarter of them"
            )
        if self.tokens < 1:
            raise ConfigError(f"task.tokens is {self.tokens}: use at least 1 embedding per document")
        if 0 < self.document_sample < 4 * self.tokens:
            raise ConfigError(
                f"task.document_sample is {self.document_sample}: its last quarter must hold the {self.tokens} tokens that are kept, "
                f"use 0 or at least {4 * self.tokens}"
            )
        if not 0 <= self.curriculum < 1:
            raise ConfigError(f"task.curriculum is {self.curriculum}: give a share from 0 to below 1")
        names = ("sft_weight", "distill_weight", "align_weight", "pred_weight", "hidden_weight")
        for name in (*names, "align_after", "text_weight", "unique_documents"):
            if getattr(self, name) < 0:
                raise ConfigError(f"task.{name} is {getattr(self, name)}: give 0 or more")
        if not (self.sft_weight or self.distill_weight or self.aligns):
            raise ConfigError(
                "task.sft_weight, distill_weight and align_weight are 0: there is nothing to learn"
            )

    @property
    def aligns(self) -> bool:
        """Whether there is an alignment term."""
        return bool(self.align_weight and (self.pred_weight or self.hidden_weight))

    def build(self, config: TrainConfig) -> "MixLMTask":
        """The task on its data.

        Raises:
          ConfigError: L_distill without a teacher's store, or other settings that do not fit the data.
        """
        data = open_data(self.data)
        if self.distill_weight and not self.relevance_teachers:
            raise ConfigError(
                "task.relevance_teachers is empty: give the stage II ranker's score store, or set task.distill-weight 0"
            )
        if self.engagement_teachers and not data.actions:
            raise ConfigError(
                f"data {self.data.name} has no impressions: leave task.engagement_teachers empty"
            )
        known = {name for document in data.documents for name in document.fields}
        for name in self.text_fields:
            if name not in known:
                raise ConfigError(
                    f"task.text_fields has {name!r}: documents have {', '.join(sorted(known))}; give several with spaces between them"
                )
        learned = self.engagement_teachers or self.truth_weight or knows_actions(self.model.init_from)
        actions = data.actions if learned else ()
        if self.task_weights and len(self.task_weights) != len(actions):
            raise ConfigError(
                f"task.task_weights has {len(self.task_weights)} numbers: give one for each of {', '.join(actions)}"
            )
        return MixLMTask(self, config, data, actions)

    def build_abstract(self) -> "MixLMTask":
        """The task without data and weights; with engagement teachers (of any name) it has the actions of jobs."""
        return MixLMTask.abstract(self, ACTIONS["jobs"] if self.engagement_teachers else ())


class Documents(NamedTuple):
    """What the encoder reads."""

    tokens: Array
    """int32 [M, T], 0 where padded."""
    where: Array
    """bool [M, T], left-aligned."""
    positions: Array
    """int32 [M, T], where each token stands in the whole document."""


class Shares(NamedTuple):
    """How much of each group of terms counts at a step."""

    task: Any
    """Of L_SFT and L_distill."""
    align: Any


def knows_actions(checkpoint: str) -> bool:
    """Whether it is the model folder of a ranker with action heads; `init` then starts from them."""
    folder = Path(checkpoint)
    return (folder / CONTRACT_FILE).is_file() and bool(read_contract(folder).actions)


def scaled(terms: Mapping[str, Mean], weight: Any, prefix: str = "") -> dict[str, Mean]:
    """The terms times a weight, under longer names."""
    return {f"{prefix}{name}": (weight * total, n) for name, (total, n) in terms.items()}


def held_still(module: Scorer) -> Scorer:
    """The same module, into whose parameters no gradient flows."""
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, jax.lax.stop_gradient(state))


class MixLMTask(RankerTask):
    """Both models on the ranker's data; a document that occurs for several queries of a batch is encoded once."""

    config: MixLMConfig
    accumulable = False

    def __init__(
        self,
        config: MixLMConfig,
        train: TrainConfig,
        data: Dataset,
        actions: Sequence[str] = (),
    ):
        self._labels: Targets = (
            stored_relevance(config.labels, data) if config.labels and config.sft_weight else {}
        )
        super().__init__(config, train, data, actions)
        self._labels = {}  # the examples hold them now
        self._steps = train.steps
        self.encoder_start = load_start(config.encoder, data, "encoder")
        self._trained = trained_encoder(
            config.encoder.init_from,
            self.encoder_start,
            config.tokens,
            self.start.architecture.width,
            "task.encoder",
        )
        tokenizer = self.encoder_start.tokenizer
        self.encoder_room = check_prompt("encoder_prompt", config.encoder_prompt, "document", tokenizer)
        self._texts = [part.ids for part in self.encoder_room.documents(data.documents)]
        longest = max(map(len, self._texts))
        self._text_length = longest - self._left_out(longest)
        # The same queries and pairs, with documents of which nothing is left but the fields that stay text.
        left = dataclasses.replace(data, documents=keep_fields(data.documents, config.text_fields))
        self.mixed = PairTokens(self.room, left, self.examples)
        self._mixed_length = config.tokens + self.mixed.item_length
        self._documents = len({int(row) for example in self.examples for row in example.documents})
        self._mixed_scorer: tuple[MixedScorer, OnDemand] | None = None

    @classmethod
    def abstract(cls, config: CrossEncoderConfig, actions: Sequence[str] = ()) -> Self:
        """The task without examples (`TaskConfig.build_abstract`)."""
        task = super().abstract(config, actions)
        settings = task.config
        task._steps, task._documents, task._trained = 0, 0, None
        task.encoder_start = abstract_start(settings.encoder, "encoder")
        tokenizer = task.encoder_start.tokenizer
        task.encoder_room = check_prompt("encoder_prompt", settings.encoder_prompt, "document", tokenizer)
        longest_text = task.encoder_room.longest().document
        task._text_length = longest_text - task._left_out(longest_text)
        longest = task.room.longest()
        fields = longest.document if settings.text_fields else 0
        task._mixed_length = settings.tokens + fields + longest.item - longest.document
        return task

    # --- examples and batches ------------------------------------------------------------------------------------

    def make_examples(self) -> list[Example]:
        """The ranker's, or all known pairs where there is no teacher; with labels for L_SFT as log-odds, NaN where there are none."""
        if self._stores:
            examples = super().make_examples()
        else:
            examples = [Example(p.query, p.documents, {}) for p in self.data.pairs if len(p.documents)]
            if self.actions and self.config.truth_weight:
                examples = self._with_actions(examples)
        if not self.config.sft_weight:
            return examples
        graded = {} if self.config.labels else {p.query: p for p in self.data.pairs}
        return [
            example._replace(targets={**example.targets, "labels": self._label(example, graded)})
            for example in examples
        ]

    def _label(self, example: Example, graded: Mapping[int, Any]) -> np.ndarray:
        """fp32 [n, 1]."""
        rows = example.documents.tolist()
        if self.config.labels:
            nothing = np.full(1, np.nan, np.float32)
            return np.array([self._labels.get((example.query, row), nothing) for row in rows], np.float32)
        judged = graded.get(example.query)  # a store may hold queries that nobody judged
        known = {} if judged is None else dict(zip(judged.documents.tolist(), judged.grades, strict=True))
        grades = np.array([known.get(row, -1) for row in rows], np.float32)
        share = np.clip(grades / 4, 1 - CERTAIN, CERTAIN)
        return np.where(grades >= 0, np.log(share / (1 - share)), np.nan)[:, None].astype(np.float32)

    def target_shapes(self) -> dict[str, tuple[int, ...]]:
        """As the ranker's, with the labels of L_SFT."""
        return {**super().target_shapes(), **({"labels": (1,)} if self.config.sft_weight else {})}

    def _room(self, queries: int) -> int:
        """M, room for different documents in a batch of so many queries; a multiple of them."""
        slots = self.config.candidates
        return queries * (self.config.unique_documents or min(slots, -(-self._documents // queries) or slots))

    def assemble(
        self, indices: np.ndarray, chosen: Sequence[np.ndarray], rngs: Sequence[np.random.Generator]
    ) -> Batch:
        """The ranker's batch, and beside it the same candidates as embeddings:

        documents (tokens [M, T]), each once; mixed, items whose embeddings are not there yet; gather int32 [B, L S], which of all
        embeddings [M S] belong to a query's items in order.
        """
        examples, kept = [self.examples[i] for i in indices], self.config.tokens
        chosen, places = self._share(examples, chosen)
        room, slots = self._room(len(indices)), self.config.candidates
        first = jax.process_index() * room  # a process builds a contiguous share of the batch
        items, gather = [], np.zeros((len(indices), slots * kept), np.int32)
        for i, (example, some) in enumerate(zip(examples, chosen, strict=True)):
            rows = example.documents[some].tolist()
            counts = [min(kept, len(self._texts[row])) for row in rows]
            tails = self.mixed.items(example, some)
            items.append(
                [EmbeddedItem(np.zeros((n, 1)), tail) for n, tail in zip(counts, tails, strict=True)]
            )
            found = [
                (first + places[row]) * kept + s
                for row, n in zip(rows, counts, strict=True)
                for s in range(n)
            ]
            gather[i, : len(found)] = found
        mixed = place_items(
            items,
            [assign_rows(list(map(len, some)), self._mixed_length, one_per_row=True) for some in items],
            row_length=self._mixed_length,
            rows=slots,
            slots=slots,
            embeddings=slots * kept,
            width=1,
        )._replace(embeddings=None)
        return {
            **super().assemble(indices, chosen, rngs),
            "mixed": mixed,
            "documents": self._read(list(places), room, rngs[0]),
            "gather": gather,
        }

    def _read(self, rows: Sequence[int], room: int, rng: np.random.Generator) -> Documents:
        """These documents, or samples of them, in so many rows."""
        texts = [self._texts[row] for row in rows]
        places = [sample_places(len(text), self.config.document_sample, rng) for text in texts]
        read = [[text[i] for i in some] for text, some in zip(texts, places, strict=True)]
        prefix = pad_prefixes(read, length=self._text_length, queries=room)
        documents = Documents(*prefix, np.zeros(prefix.tokens.shape, np.int32))
        documents.positions[documents.where] = np.concatenate(places)
        return documents

    def _share(
        self, examples: Sequence[Example], chosen: Sequence[np.ndarray]
    ) -> tuple[list[np.ndarray], dict[int, int]]:
        """The candidates that there is room for, first of all queries' first ones; document row -> place in the batch."""
        room, places = self._room(len(examples)), dict[int, int]()
        kept: list[list[int]] = [[] for _ in examples]
        for slot in range(self.config.candidates):
            for example, some, mine in zip(examples, chosen, kept, strict=True):
                row = int(example.documents[some[slot]]) if slot < len(some) else -1
                if row in places or (row >= 0 and len(places) < room):
                    places.setdefault(row, len(places))
                    mine.append(int(some[slot]))
        return [np.array(mine, np.int64) for mine in kept], places

    def batch_shape(self, size: int) -> Batch:
        """As the ranker's, with documents and mixed items."""
        slots, kept = self.config.candidates, self.config.tokens
        mixed = packed_shape(size, slots, self._mixed_length, slots)
        index: Any = jax.ShapeDtypeStruct((size, slots, self._mixed_length), np.int32)
        texts = self._room(size), self._text_length
        places: Any = jax.ShapeDtypeStruct(texts, np.int32)
        return {
            **super().batch_shape(size),
            "mixed": mixed._replace(embedded=index),
            "documents": Documents(*prefix_shape(*texts), places),
            "gather": jax.ShapeDtypeStruct((size, slots * kept), np.int32),
        }

    # --- the step ------------------------------------------------------------------------------------------------

    def init(self, rngs: nnx.Rngs) -> nnx.Module:
        """A `MixLM` that starts as the config says; embeddings are as large as the ranker's own, or as a trained encoder makes them."""
        ranker = super().init(rngs)
        assert isinstance(ranker, Scorer)
        encoder = DocumentEncoder(
            self.encoder_start.architecture,
            tokens=self.config.tokens,
            width=self.start.architecture.width,
            rngs=rngs,
        )
        if self.encoder_start.weights is not None:
            nnx.update(encoder.decoder, nnx.state(self.encoder_start.weights))
        if self._trained is None:
            encoder.fit_scale(ranker.decoder.embedding[...])
        else:
            encoder.take_projection(self._trained)
        return MixLM(ranker, encoder)

    @property
    def first_phase(self) -> int:
        """Steps of the first phase."""
        return round(self.config.curriculum * self._steps) if self.config.aligns else 0

    def shares(self, step: jax.Array | int) -> Shares:
        """What counts after so many completed steps."""
        later = jnp.asarray(step) >= self.first_phase
        return Shares(jnp.where(later, 1.0, 0.0), jnp.where(later, self.config.align_after, 1.0))

    def step(
        self, state: TrainState, batch: Batch, key: jax.Array, tools: Tools
    ) -> tuple[TrainState, Losses]:
        """A gradient of the loss as it is in the step's phase."""
        shares = self.shares(state.step)
        return gradient_step(
            lambda model, part, _: self.losses(model, part, shares), state, batch, key, tools
        )

    def loss(self, model: Any, batch: Batch, key: jax.Array) -> Losses:
        """All terms, as in the second phase."""
        return self.losses(model, batch, Shares(1.0, self.config.align_after))

    def embedded(self, model: MixLM, batch: Batch) -> PackedItems:
        """The mixed items with the embeddings that the encoder gives now."""
        found = model.encoder(*map(jnp.asarray, batch["documents"]))
        table = jnp.take(found.reshape(-1, found.shape[-1]), jnp.asarray(batch["gather"]), axis=0)
        return batch["mixed"]._replace(embeddings=table)

    def losses(self, model: Any, batch: Batch, shares: Shares) -> Losses:
        """The terms whose weight is not 0, each a mean over what has a target."""
        config, mixed = self.config, self.embedded(model, batch)
        terms = scaled(self._task_terms(self._answers(model.ranker, batch, mixed)[1], batch), shares.task)
        if config.aligns or config.text_weight:
            part = self._read_as_text({**batch, "mixed": mixed})
            full, full_logits = self._answers(model.ranker, part, part["items"])
            if config.text_weight:
                terms |= scaled(self._task_terms(full_logits, part), config.text_weight, "text_")
            if config.aligns:
                found = self._answers(held_still(model.ranker), part, part["mixed"])
                target = jax.lax.stop_gradient((full, full_logits))
                terms |= scaled(self._align_terms(*found, *target, part), config.align_weight * shares.align)
        return Losses(terms)

    def _read_as_text(self, batch: Batch) -> Batch:
        """What belongs to each `text_every`-th query, documents left out.

        Raises:
          ConfigError: devices would have different numbers of these queries: jax 0.10 then gave wrong losses on one mesh of three.
        """
        every, mesh = slice(None, None, self.config.text_every), jax.sharding.get_abstract_mesh()
        devices = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
        size = len(batch["gather"])
        if devices > 1 and size % (self.config.text_every * devices):
            raise ConfigError(
                f"task.text_every is {self.config.text_every}: batch_size {size} must be a multiple of "
                f"text_every * mesh.data * mesh.fsdp = {self.config.text_every * devices}"
            )
        return {
            name: jax.tree.map(lambda x: x[every], part)
            for name, part in batch.items()
            if name != "documents"
        }

    @staticmethod
    def _answers(ranker: Scorer, batch: Batch, items: PackedItems) -> tuple[jax.Array, jax.Array]:
        """Hidden states [B, L, W] of the answers, and what is read from them [B, L, C]."""
        prefix: Prefix = batch["prefix"]
        hidden = answer_hidden(ranker.decoder, prefix.tokens, prefix.where, items, alone=True)
        return hidden, read_labels(ranker, hidden)

    def _task_terms(self, logits: jax.Array, batch: Batch) -> dict[str, Mean]:
        """L_SFT and L_distill (logits [B, L, C])."""
        config, terms = self.config, dict[str, Mean]()
        exists = jnp.asarray(batch["items"].where)
        if config.sft_weight:
            labels = jnp.asarray(batch["labels"])[..., 0]
            found = self._relevance_terms(relevance_log_odds(logits), labels, exists, 1.0)
            terms |= scaled(found, config.sft_weight, "sft_")
        for name, mean in self.teacher_terms(logits, self._targets(None, batch), batch).items():
            if weight := config.sft_weight if name == "truth" else config.distill_weight:
                terms |= scaled({name: mean}, weight)
        return terms

    def _align_terms(
        self, hidden: jax.Array, logits: jax.Array, full: jax.Array, full_logits: jax.Array, batch: Batch
    ) -> dict[str, Mean]:
        """alpha L_pred + beta L_hidden (hidden [B, L, W], logits [B, L, C])."""
        config, terms = self.config, dict[str, Mean]()
        exists = jnp.asarray(batch["items"].where)
        if config.pred_weight:
            share = config.alpha if self.actions else 1.0
            found = self._relevance_terms(
                relevance_log_odds(logits), relevance_log_odds(full_logits), exists, 1.0
            )
            terms |= scaled(found, config.pred_weight * share, "pred_")
            if self.actions:
                target = jax.nn.sigmoid(action_log_odds(full_logits))
                found = {"engagement": self._action_term(logits, target, exists, 1.0)}
                terms |= scaled(found, config.pred_weight * (1 - share), "pred_")
        if config.hidden_weight:
            apart = cosine_distance(hidden, full, where=exists, reduction="sum")
            terms |= scaled({"hidden": (apart, jnp.sum(exists))}, config.hidden_weight)
        return terms

    # --- evaluation and export -----------------------------------------------------------------------------------

    def scorer(self, model: Any) -> MixedScorer:
        """The pair as it will be served, with embeddings made when they are asked for."""
        config = self.config
        if self._mixed_scorer is None:
            embedder = DocumentEmbedder(model.encoder, self.encoder_start.tokenizer, config.encoder_prompt)
            fetch = OnDemand(embedder, self.data.documents)
            scorer = MixedScorer(
                model.ranker,
                self.start.tokenizer,
                config.prompt,
                self.data.documents,
                fetch,
                text_fields=config.text_fields,
            )
            self._mixed_scorer = scorer, fetch
        scorer, fetch = self._mixed_scorer
        scorer.prefill.update(model.ranker)
        fetch.update(model.encoder)
        scorer.fetch = fetch
        return scorer

    def evaluate(self, model: Any) -> dict[str, float]:
        """Ranking metrics by embeddings, of the full text ("text/"), and with every document's embeddings swapped ("shuffled/")."""
        queries, candidates = evaluation_lists(self.data, "dev", self.config.data.eval_queries)
        scorer, rows = self.scorer(model), np.unique(np.concatenate(candidates))
        ways = {"": scorer.fetch, "text/": no_embeddings, "shuffled/": shuffled(scorer.fetch, rows)}
        figures: dict[str, float] = {}
        for way, fetch in ways.items():
            scorer.fetch = fetch
            found = [self.relevance(logits) for logits in self.scored(scorer, queries, candidates)]
            metrics = ranking_metrics(self.data, queries, candidates, found)
            figures |= {f"dev/{way}{name}": float(np.nanmean(values)) for name, values in metrics.items()}
        if self.actions:
            found_auroc = engagement_auroc(self, model, list(self.data.queries["dev"]))
            figures |= {f"dev/auroc/{name}": value for name, value in found_auroc.items()}
        return figures

    def export(self, model: Any, folder: Path, config: TrainConfig) -> None:
        """Write the ranker, which reads text as any other, and the encoder into a folder inside."""
        tokens, width = self.config.tokens, self.start.architecture.width
        queries, rows = self.golden_pairs()
        scorer = self.scorer(model)
        embeddings = [values for row in rows for values in scorer.fetch(row) if values is not None]
        documents = [self.data.documents[row[0]] for row in rows]
        encoder = Contract(
            kind="encoder",
            architecture=self.encoder_start.architecture,
            prompts={"document": self.config.encoder_prompt},
            training=to_dict(config),
            golden=tuple(map(Golden, queries, documents, golden_numbers(embeddings))),
            mixlm=MixLMPart(tokens, width),
        )
        digest = save_model(folder / ENCODER_FOLDER, model.encoder, encoder, self.encoder_start.tokenizer)
        golden = tuple(tuple(float(x) for x in found[0]) for found in scorer(queries, rows))
        part = MixLMPart(tokens, width, digest, tuple(self.config.text_fields), golden)
        scorer.fetch = no_embeddings
        contract = dataclasses.replace(self.contract(scorer, config), mixlm=part)
        save_model(folder, model.ranker, contract, self.start.tokenizer)
