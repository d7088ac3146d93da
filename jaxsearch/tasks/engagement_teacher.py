"""The engagement teacher: one binary head per action, learned from impressions with their position (paper section 4)."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsearch.config import ConfigError, TrainConfig
from jaxsearch.data.prompts import FEATURES, PromptConfig
from jaxsearch.data.records import ACTIONS, Impression, Query
from jaxsearch.losses import action_loss
from jaxsearch.metrics import auroc
from jaxsearch.models.scorer import Scorer
from jaxsearch.scoring.records import action_log_odds
from jaxsearch.tasks.base import open_data
from jaxsearch.tasks.cross_encoder import CrossEncoderConfig, CrossEncoderTask, Example
from jaxsearch.training.step import Batch, Losses


@dataclass(frozen=True)
class EngagementTeacherConfig(CrossEncoderConfig):
    """Train one head per action on impressions."""

    prompt: PromptConfig = field(default_factory=lambda: PromptConfig("ranker", features=tuple(FEATURES)))
    """Prompt template of kind "ranker"; `position` among its features is the true one in training and fixed when serving."""
    candidates: int = 10
    """Impressions of one search in a batch."""
    task_weights: tuple[float, ...] = ()
    """Weight of each action, in the order of the vertical's actions; empty: 1 each."""

    mask_below: float = 0.02
    """Actions done in less than this share of eligible training impressions are rare: a document counts as a negative only if it was shown
    together with a positive (paper section 4). 0: every impression counts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mask_below <= 1:
            raise ConfigError(f"task.mask_below is {self.mask_below}: give a share from 0 to 1")

    def build(self, config: TrainConfig) -> "EngagementTeacherTask":
        """The task on its data.

        Raises:
          ConfigError: the data set has no impressions.
        """
        data = open_data(self.data)
        if not data.impressions:
            raise ConfigError(
                f"data {self.data.name} has no impressions: an engagement teacher cannot be trained on it"
            )
        if self.task_weights and len(self.task_weights) != len(data.actions):
            raise ConfigError(
                f"task.task_weights has {len(self.task_weights)} numbers: give one for each of {', '.join(data.actions)}"
            )
        return EngagementTeacherTask(self, config, data, data.actions)

    def build_abstract(self) -> "EngagementTeacherTask":
        """The task without data, with the actions of jobs."""
        return EngagementTeacherTask.abstract(self, ACTIONS["jobs"])


def action_values(page: list[Impression], actions: tuple[str, ...]) -> np.ndarray:
    """fp32 [L, A]: 1 done, 0 not done, NaN not eligible."""
    values = [[shown.actions.get(name) for name in actions] for shown in page]
    return np.array(
        [[np.nan if value is None else float(value) for value in row] for row in values], np.float32
    )


def mask_rare(pages: list[np.ndarray], below: float) -> list[np.ndarray]:
    """Pages of actions [L, A] with NaN for the negatives of rare actions on pages without a positive (paper section 4, loss masking).

    Args:
      pages: 1 done, 0 not done, NaN not eligible.
      below: actions done in less than this share of eligible impressions are rare.
    """
    shown = np.concatenate(pages)
    eligible = np.maximum((~np.isnan(shown)).sum(axis=0), 1)
    rare = np.nansum(shown, axis=0) / eligible < below
    return [np.where(rare & ~(page == 1).any(axis=0), np.nan, page) for page in pages]


class EngagementTeacherTask(CrossEncoderTask):
    """Masked multi-task binary cross entropy."""

    config: EngagementTeacherConfig

    def make_examples(self) -> list[Example]:
        """One page of impressions per training query, with the negatives of rare actions masked."""
        examples: list[Example] = []
        for p in self.data.pairs:
            page = list(self.data.impressions.get(self.data.queries["train"][p.query].id, ()))
            if page:
                rows = np.array([self.data.document_row[shown.document_id] for shown in page], np.int32)
                positions = np.array([shown.position for shown in page])
                examples.append(
                    Example(p.query, rows, {"actions": action_values(page, self.actions)}, positions)
                )
        masked = mask_rare([example.targets["actions"] for example in examples], self.config.mask_below)
        return [
            example._replace(targets={"actions": actions})
            for example, actions in zip(examples, masked, strict=True)
        ]

    def target_shapes(self) -> dict[str, tuple[int, ...]]:
        """One value for each action."""
        return {"actions": (len(self.actions),)}

    def loss(self, model: Scorer, batch: Batch, key: jax.Array) -> Losses:
        """Sum over actions, mean over impressions."""
        logits = self.logits(model, batch)
        actions = batch["actions"]
        where = jnp.asarray(batch["items"].where)[..., None] & ~jnp.isnan(actions)
        weights = self.config.task_weights or (1.0,) * len(self.actions)
        loss = action_loss(
            action_log_odds(logits), actions, where=where, task_weights=weights, reduction="sum"
        )
        return Losses((loss, jnp.sum(where.any(axis=-1))))

    def evaluate(self, model: Any) -> dict[str, float]:
        """AUROC per action on the pages of dev queries, scored at the serving position."""
        queries: list[Query] = list(self.data.queries["dev"])
        return {f"dev/auroc/{name}": value for name, value in engagement_auroc(self, model, queries).items()}


def engagement_auroc(task: CrossEncoderTask, model: Any, queries: list[Query]) -> dict[str, float]:
    """AUROC of each action over all impressions of these queries, scored at the serving position; none without impressions."""
    queries = [query for query in queries if task.data.impressions.get(query.id)]
    if not queries:
        return {}
    pages = [list(task.data.impressions[query.id]) for query in queries]
    rows = [
        np.array([task.data.document_row[shown.document_id] for shown in page], np.int32) for page in pages
    ]
    scores = action_log_odds(np.concatenate(task.scored(task.scorer(model), queries, rows)))
    truth = np.concatenate([action_values(page, task.actions) for page in pages])
    return {
        name: auroc(scores[:, i], np.nan_to_num(truth[:, i]), where=~np.isnan(truth[:, i]))
        for i, name in enumerate(task.actions)
    }
