"""The ranker: one student of any number of teachers (paper section 4)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsearch.config import ConfigError, TrainConfig
from jaxsearch.data.datasets import Dataset
from jaxsearch.data.prompts import FEATURES, PromptConfig
from jaxsearch.data.records import ACTIONS
from jaxsearch.losses import action_loss, binary_kl, listwise_kl
from jaxsearch.models.scorer import Scorer
from jaxsearch.scoring.records import action_log_odds, relevance_log_odds
from jaxsearch.tasks.base import ModelConfig, abstract_start, may_learn, open_data
from jaxsearch.tasks.cross_encoder import CrossEncoderConfig, CrossEncoderTask, Example
from jaxsearch.tasks.engagement_teacher import action_values, engagement_auroc, mask_rare
from jaxsearch.tasks.teachers import (
    SOURCES,
    AbstractTeacher,
    AheadTeacher,
    Distillation,
    LiveTeacher,
    Targets,
    stored_actions,
    stored_relevance,
    student_of,
)
from jaxsearch.training.step import Batch, Losses, Mean


@dataclass(frozen=True)
class RankerConfig(CrossEncoderConfig):
    """Distil teachers into one ranker."""

    prompt: PromptConfig = field(
        default_factory=lambda: PromptConfig(
            "ranker", features=tuple(name for name in FEATURES if name != "position")
        )
    )
    """Prompt template of kind "ranker"."""
    teachers: str = "stored"
    """Where the teachers' scores come from: "stored" (score stores that `serve.py label` wrote), "online" (they run in the student's
    step) or "async" (they run ahead of it, in the thread that prepares batches)."""
    relevance_teachers: tuple[str, ...] = ()
    """A folder for each relevance teacher: its score store, or its model where it runs. A judge may teach too."""
    engagement_teachers: tuple[str, ...] = ()
    """Likewise of engagement teachers, each for some or all of the actions; empty: relevance only."""
    teacher_weights: tuple[float, ...] = ()
    """Weight of each teacher among those of its objective, relevance teachers first; empty: 1 each."""
    temperatures: tuple[float, ...] = ()
    """Softens each teacher's probabilities, in the same order; empty: 1 each."""
    teacher_devices: int = 0
    """"async": so many of the last devices are the teachers'; 0: they share the student's first one."""
    queue: int = 2
    """Batches that are prepared, and with "async" scored by the teachers, ahead of the student; never more."""
    alpha: float = 0.5
    """Weight of relevance; 1 - alpha is engagement's."""
    task_weights: tuple[float, ...] = ()
    """Weight of each action; empty: 1 each."""
    listwise_weight: float = 2.0
    """Weight of the listwise term beside the relevance KL; 0: none."""
    list_temperature: float = 0.5
    """Temperature of the two distributions over a query's candidates that the listwise term compares; below 1 it sharpens them."""
    truth_weight: float = 0.0
    """Weight of the actions themselves beside what the engagement teachers say of them; 0: teachers alone."""
    mask_below: float = 0.02
    """For `truth_weight`: as in the engagement teacher."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ConfigError(
                f"task.alpha is {self.alpha}: give a number from 0 (engagement only) to 1 (relevance only)"
            )
        if self.teachers not in SOURCES:
            raise ConfigError(f"task.teachers is {self.teachers!r}: use one of {', '.join(SOURCES)}")
        if not self.list_temperature > 0:
            raise ConfigError(f"task.list_temperature is {self.list_temperature}: give a positive number")
        count = len(self.relevance_teachers) + len(self.engagement_teachers)
        for name in ("teacher_weights", "temperatures"):
            values = getattr(self, name)
            if values and (len(values) != count or min(values) <= 0):
                raise ConfigError(
                    f"task.{name} is {values}: give a positive number for each of the {count} teachers"
                )
        if not 0 <= self.mask_below <= 1:
            raise ConfigError(f"task.mask_below is {self.mask_below}: give a share from 0 to 1")
        if self.queue < 1:
            raise ConfigError(f"task.queue is {self.queue}: give 1 or more")
        for name in ("truth_weight", "listwise_weight", "teacher_devices"):
            if getattr(self, name) < 0:
                raise ConfigError(f"task.{name} is {getattr(self, name)}: give 0 or more")

    def build(self, config: TrainConfig) -> "RankerTask":
        """The task on its data.

        Raises:
          ConfigError: no relevance teacher, engagement teachers for data without impressions, or task weights that do not fit the actions.
        """
        data = open_data(self.data)
        if not self.relevance_teachers:
            what = "score store" if self.teachers == "stored" else "model"
            raise ConfigError(
                f"task.relevance_teachers is empty: give the folder of the relevance teacher's {what}"
            )
        if self.engagement_teachers and not data.actions:
            raise ConfigError(
                f"data {self.data.name} has no impressions: leave task.engagement_teachers empty"
            )
        actions = data.actions if self.engagement_teachers else ()
        if self.task_weights and len(self.task_weights) != len(actions):
            raise ConfigError(
                f"task.task_weights has {len(self.task_weights)} numbers: give one for each of {', '.join(actions)}"
            )
        return RankerTask(self, config, data, actions)

    def build_abstract(self) -> "RankerTask":
        """The task without data and weights. Teachers are taken to be there: stored ones by any name, those that run in the step by
        their preset ("qwen3_1_7b"), with the student's prompt. With engagement teachers it has the actions of jobs.
        """
        if self.teachers == "async":
            raise ConfigError(
                "task.teachers is 'async': the teachers are programs of their own; compile with 'stored' for the student's step"
            )
        return RankerTask.abstract(self, ACTIONS["jobs"] if self.engagement_teachers else ())


class RankerTask(CrossEncoderTask):
    """alpha (KL + listwise KL) to the relevance teachers + (1 - alpha) masked KL to the engagement teachers."""

    config: RankerConfig

    def __init__(self, config: RankerConfig, train: TrainConfig, data: Dataset, actions: Sequence[str] = ()):
        folders = [("relevance", folder) for folder in config.relevance_teachers]
        folders += [("engagement", folder) for folder in config.engagement_teachers]
        self._stores: list[Targets] = []
        self._live: list[LiveTeacher] = []
        if config.teachers == "stored":
            self._stores = [
                stored_relevance(folder, data)
                if objective == "relevance"
                else stored_actions(folder, data, actions)
                for objective, folder in folders
            ]
        else:
            self._live = [
                LiveTeacher(folder, objective, data, actions, config.summaries)
                for objective, folder in folders
            ]
        self.prefetch = config.queue
        super().__init__(config, train, data, actions)
        self._stores = []  # the examples hold them now
        for teacher in self._live:
            teacher.prepare(self.examples)
        self._ahead: list[AheadTeacher] = []
        if config.teachers == "async":
            devices = teacher_devices(config.teacher_devices, train)
            self._ahead = [
                AheadTeacher(teacher, devices[i % len(devices)]) for i, teacher in enumerate(self._live)
            ]

    @classmethod
    def abstract(cls, config: CrossEncoderConfig, actions: Sequence[str] = ()) -> Self:
        """The task without examples; teachers that run in its step are as large as the presets that are named."""
        task = super().abstract(config, actions)
        names = [("relevance", name) for name in task.config.relevance_teachers]
        names += [("engagement", name) for name in task.config.engagement_teachers]
        task._ahead, task._stores, task._live = [], [], []
        if task.config.teachers == "online":
            sizes = (task._prefix_length, task._row_length)
            task._live = [
                AbstractTeacher(
                    abstract_start(task.teacher_model(name)), task.labels, objective, actions, sizes
                )
                for objective, name in names
            ]
        return task

    def teacher_model(self, name: str) -> ModelConfig:
        """A teacher of this preset, computed as the student is."""
        model = self.config.model
        return ModelConfig(name, compute_dtype=model.compute_dtype, vocab_size=model.vocab_size)

    # --- examples ------------------------------------------------------------------------------------------------

    def make_examples(self) -> list[Example]:
        """Pairs that a stored teacher scored, with the teachers' log-odds; all judged and shown pairs where teachers are live."""
        if self.config.teachers != "stored":
            rows = {p.query: p.documents.tolist() for p in self.data.pairs if len(p.documents)}
        else:
            found: dict[int, dict[int, None]] = {}
            pairs = (pair for store in self._stores for pair in store)
            for query, row in may_learn(pairs, self.data, self.config.data.max_queries):
                found.setdefault(query, {})[row] = None
            rows = {query: list(found[query]) for query in sorted(found)}
        examples = [
            Example(query, np.array(rows[query], np.int32), self._stored(query, rows[query]))
            for query in rows
        ]
        return self._with_actions(examples) if self.actions and self.config.truth_weight else examples

    def _stored(self, query: int, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Target name -> log-odds [n, ...] of every stored teacher, NaN where it did not score."""
        targets = {}
        for number, store in enumerate(self._stores):
            nothing = np.full(self._width(number), np.nan, np.float32)
            scores = [store.get((query, row), nothing) for row in rows]
            targets[self._target(number)] = np.array(scores, np.float32)
        return targets

    def _target(self, number: int) -> str:
        """What the targets of the so many-th teacher are called in a batch."""
        count = len(self.config.relevance_teachers)
        return f"relevance_{number}" if number < count else f"engagement_{number - count}"

    def _width(self, number: int) -> int:
        return 1 if number < len(self.config.relevance_teachers) else len(self.actions)

    def _with_actions(self, examples: list[Example]) -> list[Example]:
        """Adds what searchers did; NaN where a document was not shown, the action not eligible, or its negative masked."""
        queries = self.data.queries["train"]
        shown = [list(self.data.impressions.get(queries[e.query].id, ())) for e in examples]
        pages = mask_rare([action_values(page, self.actions) for page in shown], self.config.mask_below)
        result = []
        for example, page, actions in zip(examples, shown, pages, strict=True):
            place = {self.data.document_row[s.document_id]: i for i, s in enumerate(page)}
            padded = np.vstack(
                [actions.reshape(-1, len(self.actions)), np.full((1, len(self.actions)), np.nan)]
            )
            known = padded[[place.get(int(row), -1) for row in example.documents]].astype(np.float32)
            result.append(example._replace(targets={**example.targets, "actions": known}))
        return result

    # --- batches -------------------------------------------------------------------------------------------------

    def assemble(
        self, indices: np.ndarray, chosen: Sequence[np.ndarray], rngs: Sequence[np.random.Generator]
    ) -> Batch:
        """As for every cross-encoder; with live teachers also their inputs ("online") or what they say ("async")."""
        batch = super().assemble(indices, chosen, rngs)
        if not self._live:
            return batch
        slots, examples = self.config.candidates, [self.examples[i] for i in indices]
        if self._ahead:
            scored = {self._target(i): ahead(examples, chosen, slots) for i, ahead in enumerate(self._ahead)}
            return {**batch, **scored}
        return {**batch, "teachers": [teacher.inputs(examples, chosen, slots) for teacher in self._live]}

    def target_shapes(self) -> dict[str, tuple[int, ...]]:
        """Log-odds of each stored or async teacher, and what searchers did."""
        count = len(self.config.relevance_teachers) + len(self.config.engagement_teachers)
        online = self.config.teachers == "online"
        shapes: dict[str, tuple[int, ...]] = {
            self._target(i): (self._width(i),) for i in range(0 if online else count)
        }
        truth = self.actions and self.config.truth_weight
        return {**shapes, "actions": (len(self.actions),)} if truth else shapes

    def batch_shape(self, size: int) -> Batch:
        """As for every cross-encoder, with the inputs of teachers that run in the step."""
        slots = self.config.candidates
        inputs = [t.input_shapes(size, slots) for t in self._live if isinstance(t, AbstractTeacher)]
        return {**super().batch_shape(size), **({"teachers": inputs} if inputs else {})}

    # --- the step ------------------------------------------------------------------------------------------------

    def init(self, rngs: nnx.Rngs) -> nnx.Module:
        """The student; with it the teachers, where they run in its step."""
        student = super().init(rngs)
        if self.config.teachers != "online":
            return student
        assert isinstance(student, Scorer)
        return Distillation(student, [teacher.make_module() for teacher in self._live])

    def trainable(self) -> Any:
        """The student's parameters."""
        online = self.config.teachers == "online"
        return nnx.All(nnx.Param, nnx.PathContains("student")) if online else nnx.Param

    def _targets(self, model: Any, batch: Batch) -> list[jax.Array]:
        """Log-odds of each teacher, [B, L, 1] of relevance or [B, L, A] of engagement."""
        if self.config.teachers != "online":
            count = len(self.config.relevance_teachers) + len(self.config.engagement_teachers)
            return [jnp.asarray(batch[self._target(number)]) for number in range(count)]
        parts = zip(self._live, model.teachers, batch["teachers"], strict=True)
        return [teacher.targets(module, *inputs) for teacher, module, inputs in parts]

    def loss(self, model: Any, batch: Batch, key: jax.Array) -> Losses:
        """Each teacher's term is a mean over what that teacher scored."""
        logits = self.logits(student_of(model), batch)
        return Losses(self.teacher_terms(logits, self._targets(model, batch), batch))

    def teacher_terms(self, logits: jax.Array, targets: Sequence[jax.Array], batch: Batch) -> dict[str, Mean]:
        """The terms of the loss by name: those of the teachers' targets, and "truth" (logits [B, L, C])."""
        config, exists = self.config, jnp.asarray(batch["items"].where)
        count = len(config.relevance_teachers)
        weights = config.teacher_weights or (1.0,) * len(targets)
        temperatures = config.temperatures or (1.0,) * len(targets)
        alpha = config.alpha if self.actions else 1.0
        terms: dict[str, Mean] = {}
        for number, (target, weight, temperature) in enumerate(
            zip(targets, weights, temperatures, strict=True)
        ):
            group = weights[:count] if number < count else weights[count:]
            name = f"_{number if number < count else number - count}" if len(group) > 1 else ""
            share = (alpha if number < count else 1 - alpha) * weight / sum(group)
            if number < count:
                found = self._relevance_terms(relevance_log_odds(logits), target[..., 0], exists, temperature)
            else:
                found = {"engagement": self._action_term(logits, jax.nn.sigmoid(target), exists, temperature)}
            terms |= {f"{kind}{name}": (share * total, n) for kind, (total, n) in found.items()}
        if "actions" in batch:
            done, n = self._action_term(logits, batch["actions"], exists, 1.0)
            terms["truth"] = ((1 - alpha) * config.truth_weight * done, n)
        return terms

    def _relevance_terms(
        self, log_odds: jax.Array, teacher: jax.Array, exists: jax.Array, temperature: float
    ) -> dict[str, Mean]:
        """Sums over pairs and over lists (all arguments [B, L])."""
        config, scored = self.config, exists & ~jnp.isnan(teacher)
        kl = binary_kl(
            log_odds, jax.nn.sigmoid(teacher), where=scored, temperature=temperature, reduction="sum"
        )
        terms = {"kl": (kl, jnp.sum(scored))}
        if config.listwise_weight:
            lists = listwise_kl(
                log_odds, teacher, where=scored, temperature=config.list_temperature, reduction="sum"
            )
            # A list of one has no order; `listwise_kl` leaves it out, and so does the mean.
            terms["listwise"] = (config.listwise_weight * lists, jnp.sum(jnp.sum(scored, axis=-1) > 1))
        return terms

    def _action_term(
        self, logits: jax.Array, target: jax.Array, exists: jax.Array, temperature: float
    ) -> Mean:
        """Sum over items of the KL of every action (target [B, L, A], NaN where nothing is known)."""
        where = exists[..., None] & ~jnp.isnan(target)
        total = action_loss(
            action_log_odds(logits),
            target,
            where=where,
            task_weights=self.config.task_weights or (1.0,) * len(self.actions),
            temperature=temperature,
            reduction="sum",
        )
        return total, jnp.sum(where.any(axis=-1))

    # --- evaluation and export -----------------------------------------------------------------------------------

    def evaluate(self, model: Any) -> dict[str, float]:
        """Ranking metrics, and AUROC per action where there are impressions."""
        student = student_of(model)
        figures = super().evaluate(student)
        if self.actions:
            found = engagement_auroc(self, student, list(self.data.queries["dev"]))
            figures |= {f"dev/auroc/{name}": value for name, value in found.items()}
        return figures

    def export(self, model: Any, folder: Path, config: TrainConfig) -> None:
        """Write the student with its contract."""
        super().export(student_of(model), folder, config)


def teacher_devices(count: int, train: TrainConfig) -> list[jax.Device]:
    """The last `count` of this process's devices; the first one for 0.

    Raises:
      ConfigError: the student's mesh needs them too.
    """
    devices = jax.local_devices()
    if not count:
        return devices[:1]
    mesh = (train.mesh.data, train.mesh.fsdp, train.mesh.tensor)
    if -1 in mesh or int(np.prod(mesh)) + count > len(devices):
        raise ConfigError(
            f"task.teacher_devices is {count}: with mesh {mesh} that is more than the {len(devices)} devices; give the mesh fixed sizes"
        )
    return devices[-count:]
