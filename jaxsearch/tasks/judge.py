"""The relevance judge: grades a (query, document) pair 0 to 4 and says why, trained on precedents (paper section 1).

It is read in two ways: by prefill alone, where the five grade tokens at the answer position give a soft label, and by generating grade
and rationale (`scoring.answers`). Where a larger judge has graded the training pairs, the rest of them is learned from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsearch.config import ConfigError, TrainConfig
from jaxsearch.data.datasets import Dataset, Pairs
from jaxsearch.data.prompts import PromptConfig
from jaxsearch.data.summaries import show_data
from jaxsearch.losses import soft_label_kl, token_cross_entropy
from jaxsearch.measurement.agreement import measure_judge, write_report
from jaxsearch.metrics import kappa
from jaxsearch.models.contract import load_model
from jaxsearch.models.scorer import Scorer
from jaxsearch.scoring.prefill import answer_hidden, read_labels
from jaxsearch.scoring.records import JUDGE_LABELS, expected_grade, grade_probabilities
from jaxsearch.tasks.base import open_data, precedent_count
from jaxsearch.tasks.cross_encoder import (
    NO_TOKEN,
    CrossEncoderConfig,
    CrossEncoderTask,
    Example,
    store_targets,
)
from jaxsearch.training.step import Batch, Losses


@dataclass(frozen=True)
class JudgeConfig(CrossEncoderConfig):
    """Train the judge on graded pairs."""

    prompt: PromptConfig = field(default_factory=lambda: PromptConfig("judge", answer="grade_rationale"))
    """Prompt template of kind "judge"; its `answer` says whether rationales are learned."""
    precedents: float = 0.7
    """Share of the training queries whose grades the judge may learn from; the rest it will label unseen."""
    labels: str = ""
    """Folder of a larger judge's score store, from whose soft labels other pairs are learned; empty: precedents alone."""
    rationale_weight: float = 0.5
    """Weight of the answer's tokens (a mean over them) beside the grade's KL (a mean over pairs)."""
    golden: tuple[str, ...] = ("golden",)
    """Precedents that the finished judge is measured on, split by split; the first one's report lies beside the model. Empty: none."""
    minimum_kappa: float = 0.6
    """Linear-weighted kappa with the first of `golden` below which the judge may not label training data; -1: no gate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.precedents <= 1:
            raise ConfigError(f"task.precedents is {self.precedents}: give a share from 0 to 1")
        if self.rationale_weight < 0:
            raise ConfigError(f"task.rationale_weight is {self.rationale_weight}: give 0 or more")
        if not -1 <= self.minimum_kappa <= 1:
            raise ConfigError(
                f"task.minimum_kappa is {self.minimum_kappa}: give a kappa from -1 (no gate) to 1"
            )

    def build(self, config: TrainConfig) -> "JudgeTask":
        """The task on its data."""
        return JudgeTask(self, config, open_data(self.data))

    def build_abstract(self) -> "JudgeTask":
        """The task without data."""
        return JudgeTask.abstract(self)


class JudgeTask(CrossEncoderTask):
    """KL over the five grade tokens at the answer position, and cross entropy over the answer's text where there is a rationale."""

    kind = "judge"
    config: JudgeConfig

    def __init__(self, config: JudgeConfig, train: TrainConfig, data: Dataset):
        super().__init__(config, train, data)
        self._learned = self._precedent_count()

    def make_examples(self) -> list[Example]:
        """Graded candidates of the first share of training queries; of the others what a larger judge says, where there is one."""
        count = self._precedent_count()
        examples = [self._precedent(pairs) for pairs in self.data.pairs[:count]]
        if self.config.labels:
            found = store_targets(self.config.labels, self.data, "judge", JUDGE_LABELS)
            examples += [self._labelled(pairs, found) for pairs in self.data.pairs[count:]]
        return [example for example in examples if len(example.documents)]

    def _precedent_count(self) -> int:
        """At least one, unless a larger judge is learned from."""
        return precedent_count(self.config.precedents, self.data, 0 if self.config.labels else 1)

    def _precedent(self, pairs: Pairs) -> Example:
        graded = np.flatnonzero(pairs.grades >= 0)
        grades = pairs.grades[graded]
        answers: list[list[int]] | None = None
        if self.config.prompt.answer != "grade":
            reasons = [pairs.rationales[i] if pairs.rationales else "" for i in graded]
            answers = self.room.answers(grades.tolist(), reasons)
        one_hot = np.eye(len(JUDGE_LABELS), dtype=np.float32)[grades]
        return Example(pairs.query, pairs.documents[graded], {"grade": one_hot}, answers=answers)

    def _labelled(self, pairs: Pairs, found: dict[tuple[int, int], np.ndarray]) -> Example:
        rows = np.array([row for row in pairs.documents if (pairs.query, int(row)) in found], np.int32)
        logits = np.array([found[pairs.query, int(row)] for row in rows], np.float32)
        target = grade_probabilities(logits.reshape(-1, len(JUDGE_LABELS)))
        # Nobody wrote why: the grade alone is learned.
        answers: list[list[int]] | None = [[]] * len(rows) if self.config.prompt.answer != "grade" else None
        return Example(pairs.query, rows, {"grade": target}, answers=answers)

    def target_shapes(self) -> dict[str, tuple[int, ...]]:
        """A probability for each grade."""
        return {"grade": (len(JUDGE_LABELS),)}

    def loss(self, model: Scorer, batch: Batch, key: jax.Array) -> Losses:
        """KL from the grade, a mean over pairs; with rationales also their cross entropy, a mean over tokens."""
        where, terms = jnp.asarray(batch["items"].where), {}
        if "answers" in batch:
            hidden, tokens = self._answer_states(model, batch)
            logits = read_labels(model, hidden[:, :, 0])
            said = where[..., None] & (tokens != NO_TOKEN)
            terms["answer"] = (
                self.config.rationale_weight * _answer_loss(model, hidden, tokens, said),
                jnp.sum(said),
            )
        else:
            logits = self.logits(model, batch)
        count = jnp.sum(where)
        terms["grade"] = (soft_label_kl(logits, batch["grade"], where=where, reduction="sum"), count)
        right = jnp.sum((jnp.argmax(logits, -1) == jnp.argmax(batch["grade"], -1)) & where)
        return Losses(terms, {"accuracy": (right, count)})

    def _answer_states(self, model: Scorer, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Hidden states [B, L, J, D] that predict the answers' tokens int [B, L, J]; the first is the answer position."""
        prefix, tokens = batch["prefix"], jnp.asarray(batch["answers"])
        length = jnp.sum(tokens != NO_TOKEN, axis=-1, keepdims=True)
        back = jnp.maximum(length - jnp.arange(tokens.shape[-1])[None, None], 0)
        hidden = answer_hidden(model.decoder, prefix.tokens, prefix.where, batch["items"], back, alone=True)
        return hidden, tokens

    def relevance(self, logits: np.ndarray) -> np.ndarray:
        """The expected grade."""
        return expected_grade(logits)

    def evaluate(self, model: Scorer) -> dict[str, float]:
        """As other tasks, and linear-weighted kappa against the grades of training queries that are no precedents (else of dev)."""
        pairs = self.data.pairs[self._learned :][: self.config.data.eval_queries]
        if not pairs:
            return super().evaluate(model)
        queries = [self.data.queries["train"][p.query] for p in pairs]
        logits = np.concatenate(self.scored(self.scorer(model), queries, [p.documents for p in pairs]))
        grades = np.concatenate([p.grades for p in pairs])
        found = np.argmax(logits, axis=-1)
        agreement = kappa(np.where(grades >= 0, grades, 0), found, where=grades >= 0)
        return {**super().evaluate(model), "held_out/kappa": agreement}

    def export(self, model: Any, folder: Path, config: TrainConfig) -> None:
        """Write the model with its contract, and how far it agrees with the precedents it never saw."""
        super().export(model, folder, config)
        judge = load_model(folder)
        data = show_data(self.data, self.config.summaries)
        for number, split in enumerate(self.config.golden):
            if split in data.precedent_pairs:
                write_report(measure_judge(judge, data, split), folder if number == 0 else folder / split)


def _answer_loss(model: Scorer, hidden: jax.Array, tokens: jax.Array, where: jax.Array) -> jax.Array:
    """Sum over answer tokens [B, L, J] in nats; one place at a time, so that the vocabulary's logits are never held for all of them."""

    @jax.checkpoint
    def place(state: jax.Array, token: jax.Array, exists: jax.Array) -> jax.Array:
        return token_cross_entropy(model.decoder.logits(state), token, where=exists, reduction="sum")

    by_place: Sequence[jax.Array] = [jnp.moveaxis(x, 2, 0) for x in (hidden, tokens, where)]
    return jnp.sum(jax.lax.map(lambda part: place(*part), tuple(by_place)))
