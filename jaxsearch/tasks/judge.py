"""The relevance judge: grades a (query, document) pair 0 to 4, trained on precedents (paper section 1)."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from jaxsearch.config import TrainConfig
from jaxsearch.data.prompts import PromptConfig
from jaxsearch.losses import soft_label_kl
from jaxsearch.metrics import kappa
from jaxsearch.models.scorer import Scorer
from jaxsearch.scoring.records import expected_grade
from jaxsearch.tasks.base import open_data
from jaxsearch.tasks.cross_encoder import CrossEncoderConfig, CrossEncoderTask, Example
from jaxsearch.training.step import Batch, Losses


@dataclass(frozen=True)
class JudgeConfig(CrossEncoderConfig):
    """Train the judge on graded pairs."""

    prompt: PromptConfig = field(default_factory=lambda: PromptConfig("judge"))
    """Prompt template of kind "judge"."""
    precedents: float = 0.7
    """Share of the training queries whose grades the judge may learn from; the rest it will label unseen."""

    def build(self, config: TrainConfig) -> "JudgeTask":
        """The task on its data."""
        return JudgeTask(self, config, open_data(self.data))


class JudgeTask(CrossEncoderTask):
    """Cross entropy over the five grade tokens at the answer position."""

    kind = "judge"
    config: JudgeConfig

    def make_examples(self) -> list[Example]:
        """Graded candidates of the first share of training queries."""
        count = max(round(self.config.precedents * len(self.data.pairs)), 1)
        examples = []
        for pairs in self.data.pairs[:count]:
            graded = pairs.grades >= 0
            one_hot = np.eye(5, dtype=np.float32)[pairs.grades[graded]]
            examples.append(Example(pairs.query, pairs.documents[graded], {"grade": one_hot}))
        return examples

    def loss(self, model: Scorer, batch: Batch, key: jax.Array) -> Losses:
        """KL from the grade, a mean over pairs."""
        logits, where = self.logits(model, batch), jnp.asarray(batch["items"].where)
        count = jnp.sum(where)
        loss = soft_label_kl(logits, batch["grade"], where=where, reduction="sum")
        right = jnp.sum((jnp.argmax(logits, -1) == jnp.argmax(batch["grade"], -1)) & where)
        return Losses((loss, count), {"accuracy": (right, count)})

    def relevance(self, logits: np.ndarray) -> np.ndarray:
        """The expected grade."""
        return expected_grade(logits)

    def evaluate(self, model: Scorer) -> dict[str, float]:
        """As other tasks, and linear-weighted kappa against the grades of training queries that are no precedents (else of dev)."""
        pairs = self.data.pairs[len(self.examples) :][: self.config.data.eval_queries]
        if not pairs:
            return super().evaluate(model)
        queries = [self.data.queries["train"][p.query] for p in pairs]
        logits = np.concatenate(self.scorer(model)(queries, [p.documents for p in pairs]))
        grades = np.concatenate([p.grades for p in pairs])
        found = np.argmax(logits, axis=-1)
        agreement = kappa(np.where(grades >= 0, grades, 0), found, where=grades >= 0)
        return {**super().evaluate(model), "held_out/kappa": agreement}
