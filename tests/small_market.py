"""A data set of eight documents and twenty queries, decoders to match, and the whole funnel trained on them for a few steps."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxsearch.tasks.base
from jaxsearch.config import load_config
from jaxsearch.data.datasets import Dataset, _known_pairs
from jaxsearch.data.records import ACTIONS, Document, Impression, Query
from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.models import presets
from jaxsearch.models.contract import load_model
from jaxsearch.models.decoder import DecoderConfig
from jaxsearch.scoring.label import label
from jaxsearch.serving.bundle import build_bundle
from jaxsearch.tasks.base import train_tokenizer
from jaxsearch.training.loop import run

WORK, CITIES = ("nurse", "welder", "accountant", "chef"), ("Austin", "Boston")
TEACHER = DecoderConfig(
    vocab_size=300, layers=2, width=16, heads=2, kv_heads=1, head_dim=8, mlp_width=24,
    rope_theta=1e4, rms_eps=1e-6, qk_norm=True, tied=True,
)  # fmt: skip
STUDENT = DecoderConfig(
    vocab_size=300, layers=1, width=8, heads=2, kv_heads=2, head_dim=4, mlp_width=16,
    rope_theta=1e4, rms_eps=1e-6, qk_norm=True, tied=True,
)  # fmt: skip
STEPS = 3
M = TypeVar("M", bound=nnx.Module)


def documents() -> list[Document]:
    """Document 2 i + j offers work i in city j."""
    return [
        Document(
            f"p{2 * i + j}",
            {"title": f"Senior {work}", "company": f"Works {j}", "location": city},
            attributes={"city": city},
            numeric={"salary": 50.0 + 10 * i, "age_days": float(j), "company_ctr": 0.1 * (i + 1)},
        )
        for i, work in enumerate(WORK)
        for j, city in enumerate(CITIES)
    ]


def query(name: str, number: int) -> Query:
    """A query for one work in one city."""
    work, city = WORK[number % 4], CITIES[number // 4 % 2]
    searcher = {"headline": f"{work} {number}", "location": city, "wanted_salary": "60"}
    return Query(f"{name}{number}", f"{work} in {city}", searcher=searcher)


def grades(number: int) -> dict[int, int]:
    """Document row -> grade: 4 the work in the city, 3 the work elsewhere, 0 two others; the rest is not graded."""
    work, city = number % 4, number // 4 % 2
    other = (work + 1) % 4
    return {2 * work + city: 4, 2 * work + 1 - city: 3, 2 * other: 0, 2 * other + 1: 0}


def page(item: Query, number: int) -> list[Impression]:
    """Five impressions, the first of them clicked; `apply` was possible on clicked ones alone."""
    rows = [(2 * number + k) % 8 for k in range(5)]
    return [
        Impression(
            item.id,
            f"p{row}",
            position,
            {name: None if name == "bad_fit" and position > 1 else position == 1 for name in ACTIONS["jobs"]},
            "2026-06-01T12:00:00Z",
        )
        for position, row in enumerate(rows, start=1)
    ]


def dataset() -> Dataset:
    """Twelve training, four dev and four test queries."""
    numbers = {"train": range(12), "dev": range(4), "test": range(4, 8)}
    queries = {split: [query(split, i) for i in found] for split, found in numbers.items()}
    graded = {f"{split}{i}": grades(i) for split, found in numbers.items() for i in found}
    pages = {f"{split}{i}": page(query(split, i), i) for split, found in numbers.items() for i in found}
    row = {document.id: i for i, document in enumerate(documents())}
    pairs = [
        _known_pairs(i, graded[item.id], [row[shown.document_id] for shown in pages[item.id]])
        for i, item in enumerate(queries["train"])
    ]
    return Dataset("small", documents(), queries, graded, pairs, pages, held_out=np.zeros(0, np.int32))


@contextmanager
def fast_compilation() -> Iterator[None]:
    """What is compiled here is compiled quickly, not well: half the time of a test that runs few steps."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


class _World:
    """The patches of `small_world` and who is inside: fixtures of several scopes overlap and leave in any order."""

    data: Dataset

    def __init__(self) -> None:
        self.inside, self.patches = 0, ExitStack()

    def enter(self) -> None:
        self.inside += 1
        if self.inside > 1:
            return
        self.data = dataset()
        self.patches.enter_context(fast_compilation())
        patch = self.patches.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(jaxsearch.tasks.base, "load_dataset", lambda name, folder: self.data)
        patch.setitem(presets.PRESETS, "tiny", TEACHER)
        patch.setitem(presets.PRESETS, "tiny_student", STUDENT)

    def leave(self) -> None:
        self.inside -= 1
        if not self.inside:
            self.patches.close()


_WORLD = _World()


@contextmanager
def small_world() -> Iterator[Dataset]:
    """Tasks load this data set whatever they ask for, and the `tiny` presets are smaller still."""
    _WORLD.enter()
    try:
        yield _WORLD.data
    finally:
        _WORLD.leave()


@dataclass(frozen=True)
class Funnel:
    """Every stage, trained for three steps; folders of runs and score stores by name, and final evaluations."""

    data: Dataset
    folder: Path
    figures: dict[str, dict[str, float]]

    def model(self, name: str) -> Path:
        """Folder of a stage's model."""
        return self.folder / name / "model"

    def store(self, name: str) -> Path:
        """Folder of the scores that a stage gave."""
        return self.folder / f"{name}_scores"


def small_tokenizer() -> Tokenizer:
    """A tokenizer trained on this data set."""
    return train_tokenizer(dataset(), 300)


def train_funnel(folder: Path) -> Funnel:
    """All stages by their `configs/`, as the demo chains them."""
    with small_world() as data:
        funnel = Funnel(data, folder, {})

        def train(name: str, config: str, *options: str) -> None:
            common = ["--steps", str(STEPS), "--batch-size", "4", "--optimizer.warmup-steps", "1"]
            small = ["--task.model.vocab-size", "300"]
            wanted = load_config(f"configs/{config}", [*common, *small, *options])
            funnel.figures[name] = run(wanted, folder / name)

        def score(name: str) -> None:
            label(load_model(funnel.model(name)), data, funnel.store(name), shard=8)

        def start(name: str) -> list[str]:
            return ["--task.model.init-from", str(funnel.model(name))]

        train("base", "base.py:tiny")
        train("judge", "judge.py:tiny", *start("base"))
        score("judge")
        train("retriever", "retriever.py:tiny", *start("base"), "--task.model.layers", "1")
        labels = ["--task.labels", str(funnel.store("judge"))]
        train("relevance_teacher", "relevance_teacher.py:tiny", *start("judge"), *labels)
        train("engagement_teacher", "engagement_teacher.py:tiny", *start("judge"))
        score("relevance_teacher")
        score("engagement_teacher")
        stores = [
            "--task.relevance-teachers", str(funnel.store("relevance_teacher")),
            "--task.engagement-teachers", str(funnel.store("engagement_teacher")),
        ]  # fmt: skip
        train("ranker", "ranker.py:tiny", *start("retriever"), *stores)
        return funnel


def build_small_bundle(funnel: Funnel, folder: Path) -> Path:
    """The bundle of a funnel's ranker and retriever."""
    with fast_compilation():
        build_bundle(
            folder, load_model(funnel.model("ranker")), load_model(funnel.model("retriever")), documents()
        )
    return folder


def filled(make: Callable[[nnx.Rngs], M], seed: int) -> M:
    """A module with random parameters that cost no compilation."""
    module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    rng = np.random.default_rng(seed)
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    for path, parameter in flat:
        values = 0.4 * rng.normal(size=parameter.shape).astype(np.float32)
        parameter.set_value(jnp.asarray(1 + values if "norm" in str(path[-1]) else values))
    nnx.update(module, nnx.from_flat_state(flat))
    return module
