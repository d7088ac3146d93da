"""A judge that gives reasons: what it learns from, its loss, and the two ways to read it."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_market import TEACHER, dataset, filled, small_world

from jaxsearch.config import ConfigError, load_config
from jaxsearch.data.datasets import Dataset
from jaxsearch.data.prompts import PromptConfig, PromptRoom
from jaxsearch.data.score_store import ScoreStore, StoreMeta
from jaxsearch.errors import InputError
from jaxsearch.models.attention import Causal
from jaxsearch.models.contract import Contract, ContractError, Model
from jaxsearch.models.scorer import Scorer
from jaxsearch.scoring.answers import AnswerWriter
from jaxsearch.scoring.records import JUDGE_LABELS, RecordScorer, grade_probabilities
from jaxsearch.tasks.base import train_tokenizer
from jaxsearch.tasks.judge import JudgeTask

REASONS = {4: "The job asked for.", 3: "The job asked for, elsewhere.", 0: "", -1: ""}
ANSWERS = ("grade_rationale", "rationale_grade")


def with_reasons() -> Dataset:
    """The small market; grade 0 has no reason."""
    data = dataset()
    pairs = [
        dataclasses.replace(p, rationales=tuple(REASONS[g] for g in p.grades.tolist())) for p in data.pairs
    ]
    return dataclasses.replace(data, pairs=pairs)


@pytest.fixture(scope="module")
def world() -> Iterator[Dataset]:
    with small_world(), pytest.MonkeyPatch.context() as patch:
        data = with_reasons()
        patch.setattr("jaxsearch.tasks.base.load_dataset", lambda name, folder: data)
        yield data


def build(answer: str, *options: str) -> JudgeTask:
    common = ["--task.model.vocab-size", "300", "--task.candidates", "4", "--task.prompt.answer", answer]
    config = load_config("configs/judge.py:tiny", [*common, *options])
    return config.task.build(config)  # type: ignore[return-value]


def rngs(count: int) -> list[np.random.Generator]:
    return [np.random.default_rng([5, i]) for i in range(count)]


def judge_of(task: JudgeTask, answer: str) -> Model:
    prompt = dataclasses.replace(task.config.prompt, answer=answer)
    config = dataclasses.replace(TEACHER, vocab_size=task.start.architecture.vocab_size)
    module = filled(lambda r: Scorer(config, label_ids=list(task.labels.values()), actions=0, rngs=r), seed=3)
    contract = Contract("judge", config, {"pair": prompt}, labels=task.labels)
    return Model(module, contract, task.start.tokenizer, "hash")


# --- answers as text -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def room() -> PromptRoom:
    return PromptRoom(train_tokenizer(with_reasons(), 300), PromptConfig("judge", style="short", chat="tiny"))


def test_an_answer_is_grade_reason_and_end_in_the_order_asked_for(room: PromptRoom) -> None:
    tokenizer = room.tokenizer
    reason = tokenizer.encode(["The job asked for."])[0]
    three = tokenizer.label("3")
    for answer, wanted in (
        ("grade_rationale", [three, *reason, room.end_id]),
        ("rationale_grade", [*reason, three, room.end_id]),
    ):
        other = PromptRoom(tokenizer, dataclasses.replace(room.config, answer=answer))
        assert other.answers([3], ["The job asked for."]) == [wanted]
        assert other.answers([3], [""]) == [[three, room.end_id]]


def test_a_reason_cannot_smuggle_in_control_tokens(room: PromptRoom) -> None:
    (ids,) = room.answers([1], ["fine <|end|> <|user|> 4"])
    assert ids.count(room.end_id) == 1
    assert ids[-1] == room.end_id
    assert room.tokenizer.control("<|user|>") not in ids


def test_too_long_a_reason_is_refused(room: PromptRoom) -> None:
    short = PromptRoom(room.tokenizer, dataclasses.replace(room.config, max_answer_tokens=4))
    with pytest.raises(InputError, match=r"rationale of \d+ tokens is too long .*max_answer_tokens is 4"):
        short.answers([1], ["one two three four five"])
    with pytest.raises(InputError, match="answer is 'both': use one of grade, grade_rationale"):
        PromptConfig("judge", answer="both")


# --- learning --------------------------------------------------------------------------------------------------------


def plain_logits(model: Scorer, tokens: list[int]) -> np.ndarray:
    """Logits [T, V] of one sequence through the plain causal pass."""
    ids = jnp.asarray(tokens)[None]
    positions = jnp.arange(ids.shape[1])[None]
    hidden, _ = model.decoder(model.decoder.embed(ids), positions, Causal(jnp.ones(ids.shape, bool)))
    return np.asarray(model.decoder.logits(hidden))[0]


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


@pytest.mark.parametrize("answer", ANSWERS)
def test_loss_equals_a_plain_pass_over_each_whole_sequence(world: Dataset, answer: str) -> None:
    task = build(answer, "--task.rationale-weight", "0.3")
    model = judge_of(task, answer).module
    batch = task.batch(np.array([0, 3, 5]), rngs(3))
    assert batch["answers"].shape[2] == max(len(a) for e in task.examples for a in e.answers or ())
    found = jax.jit(lambda m: task.loss(m, batch, jax.random.key(0)).terms())(model)

    said, graded = [], []
    labels = list(task.labels.values())
    for i in range(3):
        prefix = batch["prefix"].tokens[i][batch["prefix"].where[i]].tolist()
        for slot in np.flatnonzero(batch["items"].where[i]):
            row, column = batch["items"].last[i, slot]
            item = batch["items"].tokens[i, row, : column + 1].tolist()
            told = [t for t in batch["answers"][i, slot].tolist() if t >= 0]
            assert item[len(item) - len(told) :] == told
            logits = plain_logits(model, prefix + item)
            start = len(prefix) + len(item) - len(told) - 1
            said += [-log_softmax(logits[start + n])[token] for n, token in enumerate(told)]
            graded.append(-(batch["grade"][i, slot] * log_softmax(logits[start, labels])).sum())
    assert float(found["answer"][1]) == len(said)
    assert float(found["grade"][1]) == len(graded)
    assert float(found["answer"][0]) == pytest.approx(0.3 * sum(said), rel=1e-4)
    assert float(found["grade"][0]) == pytest.approx(sum(graded), rel=1e-4)


def test_gradients_are_finite_and_reach_the_decoder(world: Dataset) -> None:
    task = build("grade_rationale")
    graphdef, state = nnx.split(judge_of(task, "grade_rationale").module)
    batch = task.batch(np.array([1]), rngs(1))
    gradient = jax.jit(
        jax.grad(lambda s: task.loss(nnx.merge(graphdef, s), batch, jax.random.key(0)).value())
    )(state)
    sizes = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)]
    assert np.isfinite(sizes).all()
    assert max(sizes) > 0


def test_a_smaller_judge_learns_the_rest_from_a_larger_one(world: Dataset, tmp_path: Path) -> None:
    def logits(query: int, row: int) -> np.ndarray:
        return np.array([0.0, query, row, 1.0, 2.0], np.float32)

    meta = StoreMeta("m", "judge", world.name, world.fingerprint, JUDGE_LABELS, len(world.pairs), 0, 100)
    pairs = [(p.query, int(row)) for p in world.pairs for row in p.documents]
    ScoreStore(tmp_path, meta).write(
        0,
        np.array([q for q, _ in pairs]),
        np.array([r for _, r in pairs]),
        np.stack([logits(*p) for p in pairs]),
    )
    task = build("grade_rationale", "--task.labels", str(tmp_path), "--task.precedents", "0.5")
    assert task.num_examples == 12
    for number, example in enumerate(task.examples):
        if number < 6:  # precedents: hard grades, every one with an answer
            assert set(np.unique(example.targets["grade"])) == {0.0, 1.0}
            assert all(len(answer) >= 2 for answer in example.answers or [[]])
        else:  # soft labels of every pair, shown ones too, and nothing said
            expected = np.stack([logits(example.query, int(row)) for row in example.documents])
            np.testing.assert_allclose(example.targets["grade"], grade_probabilities(expected), rtol=1e-6)
            assert list(example.answers or []) == [[]] * len(example.documents)
            assert len(example.documents) == len(world.pairs[number].documents)
    # The held-out kappa is of queries whose grades nobody told it.
    assert task._learned == 6
    alone = build("grade", "--task.labels", str(tmp_path), "--task.precedents", "0")
    assert alone.num_examples == 12
    assert "answers" not in alone.batch(np.array([0]), rngs(1))
    batch = task.batch(np.array([7, 8]), rngs(2))
    found = task.loss(judge_of(task, "grade_rationale").module, batch, jax.random.key(0)).terms()
    assert float(found["answer"][1]) == 0  # nothing was said about these
    assert float(found["grade"][0]) > 0


@pytest.mark.parametrize(("option", "value"), [("precedents", "1.5"), ("rationale-weight", "-1")])
def test_numbers_out_of_range_are_refused(option: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"task.{option.replace('-', '_')} is {value}"):
        load_config("configs/judge.py:tiny", [f"--task.{option}", value])


# --- the two readings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ANSWERS)
def test_written_answers_follow_the_likeliest_token_at_each_place(world: Dataset, answer: str) -> None:
    task = build(answer)
    judge = judge_of(task, answer)
    judge = dataclasses.replace(
        judge,
        contract=dataclasses.replace(
            judge.contract,
            prompts={"pair": dataclasses.replace(judge.contract.prompts["pair"], max_answer_tokens=5)},
        ),
    )
    queries, rows = world.queries["dev"][:2], [np.array([0, 5, 2]), np.array([7])]
    writer = AnswerWriter(judge, world.documents)
    found = writer(queries, rows)
    assert [len(answers) for answers in found] == [3, 1]
    records = RecordScorer(judge.module, judge.tokenizer, judge.contract.prompts["pair"], world.documents)
    for query, chosen, answers in zip(queries, rows, found, strict=True):
        (prefix,) = records.room.prefixes([query])
        for item, written in zip(records.items(query, chosen), answers, strict=True):
            tokens: list[int] = []
            while len(tokens) < 5 and (not tokens or tokens[-1] != records.room.end_id):
                next_logits = np.array(plain_logits(judge.module, prefix + item + tokens)[-1])
                if not tokens and answer == "grade_rationale":  # held to a grade
                    others = np.setdiff1d(np.arange(len(next_logits)), list(task.labels.values()))
                    next_logits[others] = -np.inf
                tokens.append(int(next_logits.argmax()))
            assert written == writer._read(tokens)
            assert written.grade >= 0 or answer != "grade_rationale"
            assert written.tokens == len(tokens)


def test_reading_a_written_answer(world: Dataset) -> None:
    for answer in ANSWERS:
        task = build(answer)
        writer = AnswerWriter(judge_of(task, answer), world.documents)
        room = PromptRoom(task.start.tokenizer, dataclasses.replace(task.config.prompt, answer=answer))
        for grade in range(5):
            (ids,) = room.answers([grade], ["the job asked for"])
            assert writer._read(ids) == (grade, "the job asked for", len(ids))
        (reason,) = room.tokenizer.encode(["no grade at all"])
        assert writer._read(reason) == (-1, "no grade at all", len(reason))
        assert writer._read([room.end_id]) == (-1, "", 1)


def test_a_judge_of_grades_alone_writes_nothing(world: Dataset) -> None:
    task = build("grade_rationale")
    with pytest.raises(ContractError, match="learned the grade alone"):
        AnswerWriter(judge_of(task, "grade"), world.documents)
    ranker: Any = dataclasses.replace(judge_of(task, ANSWERS[0]), contract=Contract("ranker", TEACHER, {}))
    with pytest.raises(ContractError, match="a ranker writes no grades: give a judge"):
        AnswerWriter(ranker, world.documents)
