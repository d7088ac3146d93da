"""Teachers of the ranker: stored, in the student's step, or ahead of it, they say the same. Masks and label forms."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from scipy.special import expit, logit, softmax
from small_market import Funnel, documents
from test_summaries import Counting
from test_tasks import answers, build, configured, rngs, write_store

from jaxsearch.config import ConfigError
from jaxsearch.data.datasets import Dataset
from jaxsearch.data.pipeline import Pipeline
from jaxsearch.data.records import ACTIONS
from jaxsearch.data.summaries import FIELD, summarise_documents
from jaxsearch.models.contract import load_model, save_model
from jaxsearch.scoring.records import JUDGE_LABELS, expected_grade, graded_log_odds
from jaxsearch.serving.bundle import golden_error
from jaxsearch.tasks.engagement_teacher import mask_rare
from jaxsearch.tasks.ranker import RankerTask, teacher_devices
from jaxsearch.tasks.teachers import Distillation, student_of
from jaxsearch.training.loop import run

NAMES = ("relevance", "engagement")


def taught(funnel: Funnel, source: str, *options: str) -> list[str]:
    """Options of a ranker whose teachers are stored or live."""
    where = funnel.store if source == "stored" else funnel.model
    folders = [word for n in NAMES for word in (f"--task.{n}-teachers", str(where(f"{n}_teacher")))]
    start = ["--task.model.init-from", str(funnel.model("retriever"))]
    return [*folders, *start, "--task.teachers", source, "--log-every", "1", "--steps", "4", *options]


def losses(workdir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("online", []),
        ("online", ["--mesh.data", "2", "--mesh.tensor", "2"]),
        ("async", []),
        ("async", ["--task.teacher-devices", "2", "--mesh.data", "4", "--task.queue", "1"]),
    ],
)
def test_live_teachers_give_the_losses_of_stored_ones(
    funnel: Funnel, world: Dataset, tmp_path: Path, source: str, options: list[str]
) -> None:
    ends = {}
    for name, given in (("stored", []), (source, options)):
        ends[name] = run(configured("ranker", *taught(funnel, name, *given)), tmp_path / name)
    found, expected = losses(tmp_path / source), losses(tmp_path / "stored")
    assert len(found) == 4
    for a, b in zip(found, expected, strict=True):
        for name in ("loss", "kl", "listwise", "engagement"):
            assert a[name] == pytest.approx(b[name], rel=2e-4), name
    assert ends[source] == pytest.approx(ends["stored"], abs=1e-3, nan_ok=True)
    model = load_model(tmp_path / source / "model")  # the student alone
    assert golden_error(model) <= 1e-3
    student = sum(x.size for x in jax.tree.leaves(nnx.state(model.module)))
    stored = load_model(tmp_path / "stored" / "model").module
    assert student == sum(x.size for x in jax.tree.leaves(nnx.state(stored)))


def test_a_teacher_in_the_step_is_not_trained(funnel: Funnel, world: Dataset) -> None:
    task: RankerTask = build("ranker", *taught(funnel, "online"))
    model = task.init(nnx.Rngs(0))
    assert isinstance(model, Distillation)
    _, trained, frozen, _ = nnx.split(model, task.trainable(), nnx.Param, ...)
    assert {path[0] for path, _ in nnx.to_flat_state(trained)} == {"student"}
    assert {path[0] for path, _ in nnx.to_flat_state(frozen)} == {"teachers"}
    assert student_of(model) is model.student


def test_live_teachers_say_what_their_stores_say(funnel: Funnel, world: Dataset) -> None:
    found = {
        source: build("ranker", *taught(funnel, source)).batch(np.arange(4), rngs(1, 4))
        for source in ("stored", "async")
    }
    for name in ("relevance_0", "engagement_0"):
        np.testing.assert_allclose(found["async"][name], found["stored"][name], atol=1e-4)
        assert np.isfinite(found["stored"][name]).any()


def test_any_number_of_teachers(world: Dataset, tmp_path: Path) -> None:
    """Two relevance teachers, one of them a judge; a specialist of one action and one of two; weights and temperatures of each."""
    judged = softmax(np.array([0.0, 1, 0, 2, 0]))
    folders = {
        "yes": write_store(tmp_path / "a", world, "ranker", ("Yes", "No"), lambda q, row: (row / 4, 0.5)),
        "judge": write_store(tmp_path / "b", world, "judge", JUDGE_LABELS, lambda q, row: np.log(judged)),
        "click": write_store(
            tmp_path / "c", world, "ranker", ("Yes", "No", "click"), lambda q, row: (0, 0, 0.3)
        ),
        "two": write_store(
            tmp_path / "d",
            world,
            "ranker",
            ("Yes", "No", "apply", "click"),
            lambda q, row: (0, 0, -1.0, 0.1) if row % 2 else None,
        ),
    }
    task: RankerTask = build(
        "ranker", "--task.relevance-teachers", folders["yes"], folders["judge"],
        "--task.engagement-teachers", folders["click"], folders["two"], "--task.alpha", "0.25",
        "--task.teacher-weights", "1", "3", "2", "2", "--task.temperatures", "1", "2", "1", "3",
        "--task.listwise-weight", "0",
    )  # fmt: skip
    batch = task.batch(np.array([0, 4]), rngs(0, 2))
    logits = answers(task, batch)
    where, log_odds = batch["items"].where, logits[..., 0] - logits[..., 1]
    expected = logit(judged @ np.arange(5) / 4)
    np.testing.assert_allclose(batch["relevance_1"][where][:, 0], expected, rtol=1e-5)
    assert np.isnan(batch["engagement_0"][..., 1:]).all()  # says nothing of apply

    def kl(target: Any, student: np.ndarray, tau: float) -> np.ndarray:
        p, q = expit(target / tau), expit(student.astype(np.float64) / tau)
        return tau**2 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))

    found = {
        n: (float(a), float(b)) for n, (a, b) in task.loss(logits, batch, jax.random.key(0)).terms().items()
    }
    rows = batch["relevance_0"][..., 0][where]
    click, apply = logits[..., 2][where], logits[..., 3][where]
    odd = ~np.isnan(batch["engagement_1"][..., 1][where])
    assert 0 < odd.sum() < where.sum()
    two = kl(0.1, click[odd], 3) + kl(-1.0, apply[odd], 3)
    wanted = {
        "kl_0": 0.25 * 1 / 4 * kl(rows, log_odds[where], 1).mean(),
        "kl_1": 0.25 * 3 / 4 * kl(expected, log_odds[where], 2).mean(),
        "engagement_0": 0.75 * 0.5 * kl(0.3, click, 1).mean(),
        "engagement_1": 0.75 * 0.5 * two.mean(),
    }
    assert {name: a / b for name, (a, b) in found.items()} == pytest.approx(wanted, rel=1e-4)


def test_what_searchers_did_may_be_learned_too(world: Dataset, tmp_path: Path) -> None:
    yes = write_store(
        tmp_path / "a", world, "ranker", ("Yes", "No", *ACTIONS["jobs"]), lambda q, row: np.ones(7)
    )
    task: RankerTask = build(
        "ranker", "--task.relevance-teachers", yes, "--task.engagement-teachers", yes,
        "--task.truth-weight", "0.5", "--task.candidates", "8", "--task.alpha", "0.5",
    )  # fmt: skip
    batch = task.batch(np.array([3]), rngs(0, 1))
    shown = {world.document_row[i.document_id]: i for i in world.impressions["train3"]}
    assert (~np.isnan(batch["actions"][0, :, 0])).sum() == len(shown) == 5
    assert np.nansum(batch["actions"][0, :, 0]) == 1
    logits = answers(task, batch)
    total, count = task.loss(logits, batch, jax.random.key(0)).terms()["truth"]
    done = batch["actions"]
    each = np.where(done == 1, -np.log(expit(logits[..., 2:])), -np.log(expit(-logits[..., 2:])))
    assert float(total) / float(count) == pytest.approx(
        0.5 * 0.5 * np.nansum(np.where(np.isnan(done), 0, each)) / 5, rel=1e-4
    )


# --- loss masking ----------------------------------------------------------------------------------------------------


def test_rare_negatives_count_only_beside_a_positive() -> None:
    nan = np.nan
    pages = [
        np.array([[1.0, 0], [0, 0], [1, nan]]),  # nobody followed here
        np.array([[0.0, 1], [1, 0], [0, nan]]),  # somebody did
        np.zeros((0, 2)),
    ]
    masked = mask_rare(pages, below=0.3)  # follow: one of four eligible
    np.testing.assert_array_equal(masked[0], [[1, nan], [0, nan], [1, nan]])
    np.testing.assert_array_equal(masked[1], pages[1])
    assert masked[2].shape == (0, 2)
    for page, same in zip(pages, mask_rare(pages, below=0.2), strict=True):
        np.testing.assert_array_equal(page, same)
    everything = mask_rare(pages, below=1.0)
    np.testing.assert_array_equal(everything[0][:, 0], [1, 0, 1])


def test_the_engagement_teacher_masks_by_its_config(world: Dataset) -> None:
    """Dismissals were made on clicked documents alone in this world: one of five."""
    values = {
        below: np.stack(
            [e.targets["actions"] for e in build("engagement_teacher", "--task.mask-below", below).examples]
        )
        for below in ("0", "1")
    }
    np.testing.assert_array_equal(values["0"], values["1"])  # each page has its positive
    blank = [page * np.where(np.isnan(page), np.nan, 0) for page in values["0"]]
    assert np.isnan(mask_rare(blank, 0.5)).all()


# --- label forms -----------------------------------------------------------------------------------------------------


def test_log_odds_of_a_grade_are_exact_where_the_judge_is_sure() -> None:
    logits = np.array(
        [[0.0, 0, 0, 0, 0], [-40, -40, -40, 0, 40], [60, 0, 0, 0, -60], [0, 1, 2, 3, 4]], np.float32
    )
    mean = softmax(logits.astype(np.float64), axis=-1) @ np.arange(5) / 4
    odds = graded_log_odds(logits)
    np.testing.assert_allclose(expit(odds[[0, 3]]), mean[[0, 3]], rtol=1e-5)
    np.testing.assert_allclose(odds[1], 40 - np.log(0.25), rtol=1e-4)  # sigmoid would round it to 1
    assert odds[2] < -55
    np.testing.assert_allclose(np.asarray(graded_log_odds(jax.numpy.asarray(logits))), odds, rtol=1e-5)


def test_ordinal_classes(world: Dataset, tmp_path: Path) -> None:
    logits = np.array([0.0, 0.0, 1.0, 3.0, 2.0])
    labels = write_store(tmp_path, world, "judge", JUDGE_LABELS, lambda q, row: np.roll(logits, q))
    options = ["--task.labels", labels, "--task.ranking-weight", "0"]
    graded = build("relevance_teacher", *options, "--task.label-form", "grade")
    assert graded.examples[0].targets["target"].tolist() == [0.75] * len(graded.examples[0].documents)
    task = build("relevance_teacher", *options, "--task.label-form", "ordinal", "--task.prompt.kind", "judge")
    assert list(task.labels) == list(JUDGE_LABELS)
    batch = task.batch(np.array([0, 1]), rngs(0, 2))
    given = answers(task, batch)
    total, count = task.loss(given, batch, jax.random.key(0)).terms()["kl"]
    where = batch["items"].where
    classes = np.where(np.arange(2)[:, None] == 0, 3, 4) * np.ones(where.shape, int)
    logs = np.log(softmax(given.astype(np.float64), axis=-1))
    nll = -np.take_along_axis(logs, classes[..., None], axis=-1)[..., 0][where].mean()
    assert float(total) / float(count) == pytest.approx(nll, rel=1e-5)
    np.testing.assert_array_equal(task.relevance(given), expected_grade(given))


@pytest.mark.parametrize("kind", ["listwise_kl", "pairwise"])
def test_ranking_losses(world: Dataset, kind: str) -> None:
    task = build(
        "relevance_teacher",
        "--task.candidates",
        "5",
        "--task.ranking-loss",
        kind,
        "--task.ranking-weight",
        "0.5",
    )
    batch = task.batch(np.array([0, 1, 2]), rngs(0, 3))
    batch["target"][2, :4] = 0.25  # all alike
    logits = answers(task, batch)
    where, log_odds = batch["items"].where, logits[..., 0] - logits[..., 1]
    values = []
    for s, p, exists in zip(log_odds.astype(np.float64), batch["target"], where, strict=True):
        s, p = s[exists], p[exists]
        if kind == "pairwise":
            pairs = [
                np.log1p(np.exp(s[j] - s[i])) for i in range(len(s)) for j in range(len(s)) if p[i] > p[j]
            ]
            values += [np.mean(pairs)] if pairs else []
        else:
            t = softmax(logit(np.clip(p, 1e-3, 1 - 1e-3)))
            values.append((t * np.log(t / softmax(s))).sum())
    assert len(values) == (2 if kind == "pairwise" else 3)
    total, count = task.loss(logits, batch, jax.random.key(0)).terms()[kind]
    assert float(total) / float(count) == pytest.approx(0.5 * np.mean(values), rel=1e-4)


# --- what cannot be --------------------------------------------------------------------------------------------------


def test_teachers_that_cannot_teach(funnel: Funnel, world: Dataset, tmp_path: Path) -> None:
    retriever = str(funnel.model("retriever"))
    with pytest.raises(ConfigError, match="is a bi_encoder: a teacher is a judge or a ranker"):
        build("ranker", *taught(funnel, "online", "--task.relevance-teachers", retriever))
    judge = str(funnel.model("judge"))
    with pytest.raises(ConfigError, match="holds scores of a judge for 0, 1, 2, 3, 4: an engagement teacher"):
        build("ranker", *taught(funnel, "async", "--task.engagement-teachers", judge))
    with pytest.raises(ConfigError, match=r"task\.teacher_devices is 5: with mesh \(4, 1, 1\)"):
        build("ranker", *taught(funnel, "async", "--task.teacher-devices", "5", "--mesh.data", "4"))
    ranker = load_model(funnel.model("ranker"))
    taught_by = dataclasses.replace(ranker.contract, summariser="a" * 64)
    save_model(tmp_path / "short", ranker.module, taught_by, ranker.tokenizer)
    short = taught(funnel, "online", "--task.relevance-teachers", str(tmp_path / "short"))
    with pytest.raises(
        ConfigError, match=r"short reads the summaries of summariser aaaaaaaaaaaa, task\.summaries is empty"
    ):
        build("ranker", *short)
    summarise_documents(Counting(), documents(), tmp_path / "summaries")
    reading = build("ranker", *short, "--task.summaries", str(tmp_path / "summaries"))
    assert reading._live[0]._data.documents[0].fields == {FIELD: Counting()(documents()[:1])[0].strip()}
    assert teacher_devices(3, configured("ranker")) == jax.local_devices()[-3:]


def test_the_queue_is_bounded(world: Dataset) -> None:
    class Counting:
        num_examples = 400
        made = 0

        def batch(self, indices: np.ndarray, generators: Any) -> dict[str, np.ndarray]:
            self.made += 1
            return {"x": indices}

    source = Counting()
    pipeline = Pipeline(source, batch_size=4, seed=0, prefetch=3)
    for taken, _ in enumerate(pipeline.batches(0, 60), start=1):
        # The queue, and one in the hands of the thread.
        assert taken <= source.made <= taken + 3 + 1
        assert 0 <= pipeline.ahead <= 3 + 1
    assert source.made == taken == 60
