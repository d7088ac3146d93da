"""The relevance teacher: learns the judge's labels in one of four forms, with a ranking term over a list's candidates (paper section 4)."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logit

from jaxsearch.config import ConfigError, TrainConfig
from jaxsearch.data.prompts import PromptConfig
from jaxsearch.losses import binary_kl, listwise_kl, pairwise_logistic, soft_label_kl, softmax_listwise
from jaxsearch.models.scorer import Scorer
from jaxsearch.scoring.records import (
    JUDGE_LABELS,
    expected_grade,
    grade_probabilities,
    graded_log_odds,
    relevance_log_odds,
)
from jaxsearch.tasks.base import open_data
from jaxsearch.tasks.cross_encoder import CrossEncoderConfig, CrossEncoderTask, Example, store_targets
from jaxsearch.training.step import Batch, Losses, Mean

LABEL_FORMS = ("expected_grade", "yes_probability", "grade", "ordinal")
RANKING_LOSSES = ("listwise", "listwise_kl", "pairwise")


@dataclass(frozen=True)
class RelevanceTeacherConfig(CrossEncoderConfig):
    """Train a Yes/No ranker on the judge's labels."""

    prompt: PromptConfig = field(default_factory=lambda: PromptConfig("ranker"))
    """Prompt template of kind "ranker"; for ordinal labels of kind "judge"."""
    labels: str = ""
    """Folder of the judge's score store; empty: the data set's own grades."""
    label_form: str = "expected_grade"
    """What p(Yes) is learned from: "expected_grade" (the judge's mean grade / 4), "yes_probability" (its probability of grade 3 or 4) or
    "grade" (its likeliest grade / 4). With "ordinal" the five likeliest grades are classes, and the model is of kind "judge"."""
    ranking_loss: str = "listwise"
    """Over a query's candidates, beside the pointwise term: "listwise" (softmax cross entropy on gains 2^grade - 1), "listwise_kl" (KL to
    the softmax over the targets' log-odds) or "pairwise" (logistic)."""
    ranking_weight: float = 0.5
    """Weight of the ranking loss; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("label_form", LABEL_FORMS), ("ranking_loss", RANKING_LOSSES)):
            if getattr(self, name) not in known:
                raise ConfigError(f"task.{name} is {getattr(self, name)!r}: use one of {', '.join(known)}")
        if self.ranking_weight < 0:
            raise ConfigError(f"task.ranking_weight is {self.ranking_weight}: give 0 or more")

    def build(self, config: TrainConfig) -> "RelevanceTeacherTask":
        """The task on its data."""
        return RelevanceTeacherTask(self, config, open_data(self.data))

    def build_abstract(self) -> "RelevanceTeacherTask":
        """The task without data."""
        return RelevanceTeacherTask.abstract(self)


class RelevanceTeacherTask(CrossEncoderTask):
    """KL to p(Yes), or cross entropy over five classes, plus a ranking term."""

    config: RelevanceTeacherConfig

    @classmethod
    def kind_for(cls, config: CrossEncoderConfig) -> str:
        """Five classes are a judge's."""
        assert isinstance(config, RelevanceTeacherConfig)
        return "judge" if config.label_form == "ordinal" else "ranker"

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
        if self.config.label_form in ("grade", "ordinal"):
            return logits.argmax(axis=-1).astype(np.float32) / 4
        return np.minimum(grade_probabilities(logits)[:, 3:].sum(axis=-1), 1)  # the sum rounds up at times

    def target_shapes(self) -> dict[str, tuple[int, ...]]:
        """A probability."""
        return {"target": ()}

    def loss(self, model: Scorer, batch: Batch, key: jax.Array) -> Losses:
        """The pointwise term over pairs and the ranking term over lists, each a mean of its own."""
        logits, where = self.logits(model, batch), jnp.asarray(batch["items"].where)
        target = jnp.where(where, batch["target"], 0)
        log_odds = graded_log_odds(logits) if self.kind == "judge" else relevance_log_odds(logits)
        if self.kind == "judge":
            classes = jax.nn.one_hot(jnp.round(4 * target).astype(jnp.int32), len(JUDGE_LABELS))
            pointwise = soft_label_kl(logits, classes, where=where, reduction="sum")
        else:
            pointwise = binary_kl(log_odds, target, where=where, reduction="sum")
        terms = {"kl": (pointwise, jnp.sum(where))}
        if self.config.ranking_weight:
            total, lists = ranking_loss(self.config.ranking_loss, log_odds, target, where)
            terms[self.config.ranking_loss] = (self.config.ranking_weight * total, lists)
        return Losses(terms)

    def relevance(self, logits: np.ndarray) -> np.ndarray:
        """Log-odds of Yes, or the mean of the five classes."""
        return expected_grade(logits) if self.kind == "judge" else super().relevance(logits)


def ranking_loss(kind: str, log_odds: jax.Array, target: jax.Array, where: jax.Array) -> Mean:
    """Sum over lists that say something about the order, and their number.

    Args:
      kind: of `RANKING_LOSSES`.
      log_odds: [B, L], the model's.
      target: [B, L], in [0, 1].
      where: bool [B, L], the candidates that exist.
    """
    if kind == "pairwise":
        different = (target[..., :, None] > target[..., None, :]) & where[..., :, None] & where[..., None, :]
        total = pairwise_logistic(log_odds, target, where=where, reduction="sum")
        return total, jnp.sum(different.any(axis=(-2, -1)))
    if kind == "listwise_kl":
        limit = 1e-3  # targets of 0 and 1 have no log-odds
        teacher = logit(jnp.clip(target, limit, 1 - limit))
        return listwise_kl(log_odds, teacher, where=where, reduction="sum"), jnp.sum(jnp.sum(where, -1) > 1)
    # Gains as in the metric, so that the top of the list counts most.
    gains = jnp.exp2(4 * target) - 1
    total = softmax_listwise(log_odds, gains, where=where, reduction="sum")
    return total, jnp.sum((where & (gains > 0)).any(axis=-1))
