"""Teachers of the ranker: where their scores come from (paper section 4).

Stored: an offline job wrote them (`serve.py label`). Online: the teachers run in the student's own step, in the same jitted and sharded
program. Async: they run ahead of the student, in the thread that prepares its batches, on devices of their own where there are any.
All three give the same targets: log-odds of relevance and of each action, NaN where a teacher says nothing.

Axes: B queries, L candidates, A actions, C labels and actions of a teacher.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsearch.config import ConfigError
from jaxsearch.data.datasets import Dataset
from jaxsearch.data.prompts import PromptRoom
from jaxsearch.data.score_store import read_scores
from jaxsearch.data.summaries import show_data
from jaxsearch.models.contract import load_model
from jaxsearch.models.scorer import Scorer
from jaxsearch.scoring.packing import PackedItems, pack_items, packed_shape
from jaxsearch.scoring.prefill import Prefix, prefix_shape, score
from jaxsearch.scoring.records import (
    JUDGE_LABELS,
    RANKER_LABELS,
    Scores,
    graded_log_odds,
    relevance_log_odds,
)
from jaxsearch.tasks.base import Start
from jaxsearch.tasks.cross_encoder import Example, PairTokens

SOURCES = ("stored", "online", "async")
Targets = dict[tuple[int, int], np.ndarray]
"""(query row, document row) -> log-odds [1], or [A] of actions."""


def read_relevance(kind: str, logits: Scores) -> Scores:
    """Relevance log-odds [..., 1] of a ranker's logits [..., C], or of a judge's."""
    odds = graded_log_odds if kind == "judge" else relevance_log_odds
    return odds(logits)[..., None]


def stored_relevance(folder: str, data: Dataset) -> Targets:
    """Log-odds from a store that a ranker, a relevance teacher or a judge wrote.

    Raises:
      ConfigError: the store lacks a column.
      StoreError: it is unfinished, damaged, or of other data.
    """
    meta, found = read_scores(folder, data.fingerprint)
    names = JUDGE_LABELS if meta.kind == "judge" else RANKER_LABELS
    places = [_column(folder, meta.columns, name) for name in names]
    odds = read_relevance(meta.kind, np.array([scores[places] for scores in found.values()], np.float32))
    return dict(zip(found, odds, strict=True))


def stored_actions(folder: str, data: Dataset, actions: Sequence[str]) -> Targets:
    """Log-odds of actions from a ranker's store; NaN for actions that it does not hold.

    Raises:
      ConfigError: the store holds none of them.
      StoreError: as above.
    """
    meta, found = read_scores(folder, data.fingerprint)
    places = _action_places(folder, meta.kind, meta.columns, actions)
    padded = np.array([np.r_[scores, np.nan] for scores in found.values()], np.float32)
    return dict(zip(found, padded[:, places], strict=True))


def _column(folder: str, columns: Sequence[str], name: str) -> int:
    if name not in columns:
        raise ConfigError(f"{folder} has no scores for {name}: it holds {', '.join(columns)}")
    return list(columns).index(name)


def _action_places(folder: str, kind: str, columns: Sequence[str], actions: Sequence[str]) -> list[int]:
    """Where each action stands among the columns; -1 where it does not."""
    places = [list(columns).index(name) if name in columns else -1 for name in actions]
    if kind != "ranker" or max(places, default=-1) < 0:
        raise ConfigError(
            f"{folder} holds scores of a {kind} for {', '.join(columns)}: an engagement teacher scores some of {', '.join(actions)}"
        )
    return places


class LiveTeacher:
    """A teacher that is run while the student trains.

    Args:
      folder: its model folder.
      objective: "relevance" or "engagement".
      data: whose pairs.
      actions: of the student.
      summaries: store of summaries, for a teacher that reads them.

    Raises:
      ConfigError: a model that cannot teach this objective, or that reads summaries where no store of them is given.
      SummaryStoreError: that store is of another summariser.
      ContractError: no model there.
    """

    def __init__(
        self, folder: str, objective: str, data: Dataset, actions: Sequence[str], summaries: str = ""
    ):
        model = load_model(folder)
        contract = model.contract
        if not isinstance(model.module, Scorer) or not contract.labels:
            raise ConfigError(f"{folder} is a {contract.kind}: a teacher is a judge or a ranker")
        if contract.summariser and not summaries:
            raise ConfigError(
                f"{folder} reads the summaries of summariser {contract.summariser[:12]}, task.summaries is empty: name a store of them"
            )
        if contract.summariser:
            data = show_data(data, summaries, contract.summariser)
        self.module, self._objective, self._kind = model.module, objective, contract.kind
        if objective == "engagement":
            columns = (*contract.labels, *contract.actions)
            self._places = _action_places(folder, contract.kind, columns, actions)
        self._room, self._data = PromptRoom(model.tokenizer, contract.prompts["pair"]), data

    def make_module(self) -> Scorer:
        """The teacher, for a step of which it is a part."""
        return self.module

    def prepare(self, examples: Sequence[Example]) -> None:
        """Tokenise all that may be asked for; every call has the same shape from now on."""
        self._tokens = PairTokens(self._room, self._data, examples)

    def inputs(
        self, examples: Sequence[Example], chosen: Sequence[np.ndarray], slots: int
    ) -> tuple[Prefix, PackedItems]:
        """The teacher's own prompts for these candidates (B examples, `slots` items each), at its serving position."""
        items = [self._tokens.items(e, places) for e, places in zip(examples, chosen, strict=True)]
        packed = pack_items(
            items, row_length=self._tokens.item_length, rows=slots, slots=slots, one_per_row=True
        )
        return self._tokens.prefix([example.query for example in examples]), packed

    def targets(self, module: Scorer, prefix: Prefix, items: PackedItems) -> jax.Array:
        """Log-odds fp32 [B, L, 1], or [B, L, A]; NaN where there is no candidate or action. No gradient flows back."""
        logits = jax.lax.stop_gradient(score(module, prefix.tokens, prefix.where, items, alone=True))
        if self._objective == "relevance":
            found = read_relevance(self._kind, logits)
        else:
            places = np.array(self._places)
            known = logits[..., np.maximum(places, 0)]
            found = jnp.where(jnp.asarray(places >= 0)[None, None], known, jnp.nan)
        return jnp.where(jnp.asarray(items.where)[..., None], found, jnp.nan)


class AbstractTeacher(LiveTeacher):
    """A teacher by its sizes alone, so that a step can be compiled with it (`TaskConfig.build_abstract`).

    Args:
      start: architecture and tokenizer.
      labels: of the student, and of the teacher.
      objective: "relevance" or "engagement".
      actions: of the student, and of an engagement teacher.
      lengths: P and T.
    """

    def __init__(
        self,
        start: Start,
        labels: dict[str, int],
        objective: str,
        actions: Sequence[str],
        lengths: tuple[int, int],
    ):
        self._objective, self._kind, self._lengths = objective, "ranker", lengths
        heads = len(actions) if objective == "engagement" else 0
        self._places = [len(labels) + i for i in range(heads)]
        ids = list(labels.values())
        self._make = lambda: Scorer(start.architecture, label_ids=ids, actions=heads, rngs=nnx.Rngs(0))

    def make_module(self) -> Scorer:
        """A fresh one, under `nnx.eval_shape`."""
        return self._make()

    def input_shapes(self, queries: int, slots: int) -> tuple[Prefix, PackedItems]:
        """`jax.ShapeDtypeStruct`s of `inputs`."""
        prefix, row = self._lengths
        return prefix_shape(queries, prefix), packed_shape(queries, slots, row, slots)


class AheadTeacher:
    """A live teacher on a device of its own, called from the thread that prepares batches.

    Args:
      teacher: the teacher.
      device: where it runs.
    """

    def __init__(self, teacher: LiveTeacher, device: jax.Device):
        self._teacher, self._device = teacher, device
        graphdef, state = nnx.split(teacher.module)
        self._state = jax.device_put(state, device)

        def run(state: Any, prefix: Prefix, items: PackedItems) -> jax.Array:
            return teacher.targets(nnx.merge(graphdef, state), prefix, items)

        self._run = jax.jit(run)

    def __call__(self, examples: Sequence[Example], chosen: Sequence[np.ndarray], slots: int) -> np.ndarray:
        """As `LiveTeacher.targets`, on the host; waits for the device."""
        inputs = jax.device_put(self._teacher.inputs(examples, chosen, slots), self._device)
        return np.asarray(self._run(self._state, *inputs))


class Distillation(nnx.Module):
    """A student and the teachers that run in its step; the teachers are frozen."""

    def __init__(self, student: Scorer, teachers: Sequence[Scorer]):
        self.student = student
        self.teachers = nnx.List(teachers)


def student_of(model: Any) -> Scorer:
    """The student alone."""
    return model.student if isinstance(model, Distillation) else model
