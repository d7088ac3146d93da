"""The ranker: one student of several teachers, whose scores are read from stores (paper section 4)."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsearch.config import ConfigError, TrainConfig
from jaxsearch.data.prompts import FEATURES, PromptConfig
from jaxsearch.data.records import ACTIONS
from jaxsearch.losses import action_loss, binary_kl, listwise_kl
from jaxsearch.models.scorer import Scorer
from jaxsearch.scoring.records import RANKER_LABELS, action_log_odds, relevance_log_odds
from jaxsearch.tasks.base import open_data
from jaxsearch.tasks.cross_encoder import CrossEncoderConfig, CrossEncoderTask, Example, store_targets
from jaxsearch.tasks.engagement_teacher import engagement_auroc
from jaxsearch.training.step import Batch, Losses


@dataclass(frozen=True)
class RankerConfig(CrossEncoderConfig):
    """Distil teachers into one ranker."""

    prompt: PromptConfig = field(
        default_factory=lambda: PromptConfig(
            "ranker", features=tuple(name for name in FEATURES if name != "position")
        )
    )
    """Prompt template of kind "ranker"."""
    relevance_scores: str = ""
    """Folder of the relevance teacher's score store."""
    engagement_scores: str = ""
    """Folder of the engagement teacher's score store; empty: relevance only."""
    alpha: float = 0.5
    """Weight of relevance; 1 - alpha is engagement's."""
    task_weights: tuple[float, ...] = ()
    """Weight of each action; empty: 1 each."""
    listwise_weight: float = 2.0
    """Weight of the listwise term beside the relevance KL; 0: none."""
    list_temperature: float = 0.5
    """Temperature of the two distributions over a query's candidates that the listwise term compares; below 1 it sharpens them."""
    temperature: float = 1.0
    """Softens the engagement teacher's probabilities."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigError(
                f"task.alpha is {self.alpha}: give a number from 0 (engagement only) to 1 (relevance only)"
            )
        for name in ("temperature", "list_temperature"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"task.{name} is {getattr(self, name)}: give a positive number")

    def build(self, config: TrainConfig) -> "RankerTask":
        """The task on its data.

        Raises:
          ConfigError: no relevance scores, engagement scores for data without impressions, or task weights that do not fit the actions.
        """
        data = open_data(self.data)
        if not self.relevance_scores:
            raise ConfigError(
                "task.relevance_scores is empty: give the folder that the labelling job wrote for the relevance teacher"
            )
        if self.engagement_scores and not data.actions:
            raise ConfigError(f"data {self.data.name} has no impressions: leave task.engagement_scores empty")
        actions = data.actions if self.engagement_scores else ()
        if self.task_weights and len(self.task_weights) != len(actions):
            raise ConfigError(
                f"task.task_weights has {len(self.task_weights)} numbers: give one for each of {', '.join(actions)}"
            )
        return RankerTask(self, config, data, actions)

    def build_abstract(self) -> "RankerTask":
        """The task without data; with `engagement_scores` named, of any folder, it has the actions of jobs."""
        return RankerTask.abstract(self, ACTIONS["jobs"] if self.engagement_scores else ())


class RankerTask(CrossEncoderTask):
    """alpha (KL + listwise KL) to the relevance teacher + (1 - alpha) masked KL to the engagement teacher."""

    config: RankerConfig

    def make_examples(self) -> list[Example]:
        """Pairs that at least one teacher scored: relevance as log-odds, engagement as probabilities, NaN where a teacher did not score."""
        stores = {
            "relevance": store_targets(self.config.relevance_scores, self.data, "ranker", RANKER_LABELS)
        }
        if self.actions:
            stores["engagement"] = store_targets(
                self.config.engagement_scores, self.data, "ranker", self.actions
            )
        pairs: dict[int, dict[int, None]] = {}
        for query, row in (pair for store in stores.values() for pair in store):
            pairs.setdefault(query, {})[row] = None
        return [self._example(query, list(pairs[query]), stores) for query in sorted(pairs)]

    def _example(self, query: int, rows: list[int], stores: dict[str, dict[tuple[int, int], Any]]) -> Example:
        def scores(store: dict[tuple[int, int], Any], width: int) -> np.ndarray:
            nothing = np.full(width, np.nan, np.float32)
            return np.array([store.get((query, row), nothing) for row in rows], np.float32)

        targets = {"relevance": relevance_log_odds(scores(stores["relevance"], len(RANKER_LABELS)))}
        if self.actions:
            targets["engagement"] = _sigmoid(scores(stores["engagement"], len(self.actions)))
        return Example(query, np.array(rows, np.int32), targets)

    def target_shapes(self) -> dict[str, tuple[int, ...]]:
        """A log-odds, and a probability for each action."""
        return {"relevance": ()} | ({"engagement": (len(self.actions),)} if self.actions else {})

    def loss(self, model: Scorer, batch: Batch, key: jax.Array) -> Losses:
        """Each teacher's term is a mean over what that teacher scored."""
        config, logits = self.config, self.logits(model, batch)
        exists = jnp.asarray(batch["items"].where)
        scored = exists & ~jnp.isnan(batch["relevance"])
        log_odds, teacher = relevance_log_odds(logits), batch["relevance"]
        kl = binary_kl(log_odds, jax.nn.sigmoid(teacher), where=scored, reduction="sum")
        terms = {"kl": (kl, jnp.sum(scored))}
        if config.listwise_weight:
            lists = listwise_kl(
                log_odds, teacher, where=scored, temperature=config.list_temperature, reduction="sum"
            )
            # A list of one has no order; `listwise_kl` leaves it out, and so does the mean.
            terms["listwise"] = (config.listwise_weight * lists, jnp.sum(jnp.sum(scored, axis=-1) > 1))
        alpha = config.alpha if self.actions else 1.0
        terms = {name: (alpha * total, weight) for name, (total, weight) in terms.items()}
        if self.actions:
            where = exists[..., None] & ~jnp.isnan(batch["engagement"])
            weights = config.task_weights or (1.0,) * len(self.actions)
            total = action_loss(
                action_log_odds(logits),
                batch["engagement"],
                where=where,
                task_weights=weights,
                temperature=config.temperature,
                reduction="sum",
            )
            terms["engagement"] = ((1 - alpha) * total, jnp.sum(where.any(axis=-1)))
        return Losses(terms)

    def evaluate(self, model: Any) -> dict[str, float]:
        """Ranking metrics, and AUROC per action where there are impressions."""
        figures = super().evaluate(model)
        if self.actions:
            found = engagement_auroc(self, model, list(self.data.queries["dev"]))
            figures |= {f"dev/auroc/{name}": value for name, value in found.items()}
        return figures


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return (0.5 * (1 + np.tanh(0.5 * x))).astype(np.float32)
