"""The relevance teacher: learns the judge's soft labels, with a listwise term over a query's candidates (paper section 4)."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from jaxsearch.config import ConfigError, TrainConfig
from jaxsearch.data.prompts import PromptConfig
from jaxsearch.losses import binary_kl, softmax_listwise
from jaxsearch.models.scorer import Scorer
from jaxsearch.scoring.records import JUDGE_LABELS, expected_grade, grade_probabilities
from jaxsearch.tasks.base import open_data
from jaxsearch.tasks.cross_encoder import CrossEncoderConfig, CrossEncoderTask, Example, store_targets
from jaxsearch.training.step import Batch, Losses

LABEL_FORMS = ("expected_grade", "yes_probability")


@dataclass(frozen=True)
class RelevanceTeacherConfig(CrossEncoderConfig):
    """Train a Yes/No ranker on the judge's labels."""

    prompt: PromptConfig = field(default_factory=lambda: PromptConfig("ranker"))
    """Prompt template of kind "ranker"."""
    labels: str = ""
    """Folder of the judge's score store; empty: the data set's own grades."""
    label_form: str = "expected_grade"
    """What p(Yes) is learned from: "expected_grade" (mean grade / 4) or "yes_probability" (the judge's probability of grade 3 or 4)."""
    listwise_weight: float = 0.5
    """Weight of the softmax cross entropy over a query's candidates beside the KL term."""

    def __post_init__(self) -> None:
        if self.label_form not in LABEL_FORMS:
            raise ConfigError(f"task.label_form is {self.label_form!r}: use one of {', '.join(LABEL_FORMS)}")

    def build(self, config: TrainConfig) -> "RelevanceTeacherTask":
        """The task on its data."""
        return RelevanceTeacherTask(self, config, open_data(self.data))

    def build_abstract(self) -> "RelevanceTeacherTask":
        """The task without data."""
        return RelevanceTeacherTask.abstract(self)


class RelevanceTeacherTask(CrossEncoderTask):
    """KL to p(Yes), plus a listwise term."""

    config: RelevanceTeacherConfig

    def make_examples(self) -> list[Example]:
        """Labelled candidates of every training query."""
        if not self.config.labels:
            return [
                Example(
                    p.query,
                    p.documents[p.grades >= 0],
                    {"target": p.grades[p.grades >= 0].astype(np.float32) / 4},
                )
                for p in self.data.pairs
                if (p.grades >= 0).any()
            ]
        found = store_targets(self.config.labels, self.data, "judge", JUDGE_LABELS)
        examples = []
        for p in self.data.pairs:
            rows = np.array([row for row in p.documents if (p.query, int(row)) in found], np.int32)
            if len(rows):
                logits = np.stack([found[p.query, int(row)] for row in rows])
                examples.append(Example(p.query, rows, {"target": self._target(logits)}))
        return examples

    def _target(self, logits: np.ndarray) -> np.ndarray:
        if self.config.label_form == "expected_grade":
            return expected_grade(logits) / 4
        return np.minimum(grade_probabilities(logits)[:, 3:].sum(axis=-1), 1)  # the sum rounds up at times

    def target_shapes(self) -> dict[str, tuple[int, ...]]:
        """A probability."""
        return {"target": ()}

    def loss(self, model: Scorer, batch: Batch, key: jax.Array) -> Losses:
        """KL over pairs and cross entropy over lists, each a mean of its own."""
        logits, where = self.logits(model, batch), jnp.asarray(batch["items"].where)
        log_odds, target = logits[..., 0] - logits[..., 1], batch["target"]
        return relevance_losses(log_odds, target, where, self.config.listwise_weight)


def relevance_losses(
    log_odds: jax.Array, target: jax.Array, where: jax.Array, listwise_weight: float
) -> Losses:
    """KL to p(Yes) over pairs and, weighted, softmax cross entropy over a query's candidates (log_odds, target, where all [B, L])."""
    terms = {"kl": (binary_kl(log_odds, target, where=where, reduction="sum"), jnp.sum(where))}
    if listwise_weight:
        # Gains as in the metric, so that the top of the list counts most.
        gains = jnp.exp2(4 * jnp.where(where, target, 0)) - 1
        lists = softmax_listwise(log_odds, gains, where=where, reduction="sum")
        # Lists without a gain say nothing about the order; `softmax_listwise` leaves them out, and so does the mean.
        terms["listwise"] = (listwise_weight * lists, jnp.sum((where & (gains > 0)).any(axis=-1)))
    return Losses(terms)
