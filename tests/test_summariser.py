"""Training of the summariser: its losses by hand, samples as they are scored alone, and a reward that rises."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_market import documents, fast_compilation, filled, small_world
from small_models import small_bundle
from test_summaries import Counting
from test_tasks import flat, rngs

from jaxsearch.config import ConfigError, load_config
from jaxsearch.data.prompts import PromptRoom
from jaxsearch.data.summaries import show_data, summarise_documents, with_summary
from jaxsearch.losses import clipped_policy, group_advantages, reference_kl
from jaxsearch.models.attention import Causal
from jaxsearch.models.contract import Model, load_model, make_module, save_model
from jaxsearch.models.generate import generate
from jaxsearch.models.scorer import Scorer
from jaxsearch.scoring.label import label
from jaxsearch.scoring.records import RecordScorer
from jaxsearch.scoring.summaries import make_summary_writer
from jaxsearch.serving.bundle import golden_error
from jaxsearch.tasks.cross_encoder import NO_TOKEN
from jaxsearch.tasks.summariser import GrpoTask, Rewarded, copied_share, summary_items
from jaxsearch.training.loop import run

BUDGET = 5


# --- losses by hand --------------------------------------------------------------------------------------------------


def test_advantages_by_hand() -> None:
    rewards = jnp.array([[1.0, 2.0, 3.0, 9.0], [5.0, 5.0, 5.0, 5.0], [2.0, jnp.nan, jnp.nan, jnp.nan]])
    where = jnp.array([[True, True, True, False], [True] * 4, [True, False, False, False]])
    found = group_advantages(rewards, where=where)
    deviation = np.sqrt(2 / 3) + 1e-4
    np.testing.assert_allclose(found[0], [-1 / deviation, 0, 1 / deviation, 0], rtol=1e-5)
    np.testing.assert_array_equal(found[1:], 0)  # alike, and alone
    scaled = group_advantages(100 * rewards + 7, where=where)
    np.testing.assert_allclose(scaled[0], found[0], rtol=1e-3)  # no unit of the reward counts


def test_policy_gradient_by_hand() -> None:
    old = jnp.log(jnp.array([[0.5, 0.2, 0.1], [0.4, 0.4, 0.4]]))
    now = jnp.log(jnp.array([[0.55, 0.4, jnp.nan], [0.4, 0.1, 0.5]]))
    said = jnp.array([[True, True, False], [True, True, True]])
    gain = jnp.array([2.0, -1.0])

    def loss(x: Any) -> Any:
        return clipped_policy(x, old, gain, where=said, clip=0.2, reduction="sum")

    # Ratios 1.1, 2 (clipped to 1.2), then 1, 0.25 (clipped to 0.8: the smaller gain is the one it has), 1.25 (not clipped).
    np.testing.assert_allclose(loss(now), -(2 * 1.1 + 2 * 1.2 - 1 - 0.8 - 1.25), rtol=1e-5)
    expected = [[-2.2, 0, 0], [1, 0, 1.25]]  # - gain * ratio where it is not clipped
    np.testing.assert_allclose(jax.grad(loss)(now), expected, atol=1e-5)
    mean = clipped_policy(now, old, gain, where=said, clip=0.2)
    np.testing.assert_allclose(mean, loss(now) / 5, rtol=1e-6)
    assert clipped_policy(now, old, gain, where=said & False, clip=0.2) == 0
    with pytest.raises(ValueError, match=r"clip is 0\.0"):
        clipped_policy(now, old, gain, where=said, clip=0.0)


def test_at_the_old_policy_the_gradient_is_that_of_the_reward() -> None:
    """With one update per sample this is REINFORCE with the group's mean as baseline: the gradient of - A log p."""
    logits = jax.random.normal(jax.random.key(0), (3, 4, 7))
    tokens = jax.random.randint(jax.random.key(1), (3, 4), 0, 7)
    said = jnp.arange(4)[None] < jnp.array([[4], [2], [3]])
    gain = jnp.array([1.0, -2.0, 0.5])

    def log_probs(x: Any) -> Any:
        return jnp.take_along_axis(jax.nn.log_softmax(x), tokens[..., None], axis=-1)[..., 0]

    old = log_probs(logits)
    found = jax.grad(lambda x: clipped_policy(log_probs(x), old, gain, where=said, clip=0.2))(logits)
    plain = jax.grad(lambda x: -jnp.sum(jnp.where(said, gain[:, None] * log_probs(x), 0)) / 9)(logits)
    np.testing.assert_allclose(found, plain, atol=1e-6)


def test_divergence_from_the_reference_is_zero_there_and_never_negative() -> None:
    here = jnp.log(jnp.array([0.3, 0.5, 0.9, 0.2]))
    there = jnp.log(jnp.array([0.3, 0.25, 0.95, jnp.nan]))
    said = jnp.array([True, True, True, False])
    values = reference_kl(here, there, where=said, reduction="none")
    by_hand = [0, 0.5 - np.log(0.5) - 1, 0.95 / 0.9 - np.log(0.95 / 0.9) - 1, 0]
    np.testing.assert_allclose(values, by_hand, atol=1e-6)
    gradient = jax.grad(lambda x: reference_kl(x, there, where=said, reduction="sum"))(here)
    np.testing.assert_allclose(gradient, [0, 1 - 0.5, 1 - 0.95 / 0.9, 0], atol=1e-6)  # 1 - ratio


# --- the task --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with fast_compilation():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ranker that was never trained, its scores of the full text, and summaries to imitate."""
    folder = tmp_path_factory.mktemp("summariser")
    small_bundle(folder)
    with small_world() as data:
        label(load_model(folder / "ranker"), data, folder / "scores")
    summarise_documents(Counting(), documents(), folder / "targets")
    return folder


def options(folder: Path, *more: str) -> list[str]:
    small = [
        "--task.model.tokenizer",
        str(folder / "ranker"),
        "--batch-size",
        "4",
        "--optimizer.warmup-steps",
        "1",
    ]
    return [
        *small,
        "--task.prompt.max-answer-tokens",
        str(BUDGET),
        "--task.samples",
        "3",
        "--task.queries",
        "2",
        *more,
    ]


def build(folder: Path, *more: str) -> GrpoTask:
    reward = ["--task.ranker", str(folder / "ranker"), "--task.scores", str(folder / "scores")]
    config = load_config("configs/summariser.py:tiny", options(folder, *reward, *more))
    task = config.task.build(config)
    assert isinstance(task, GrpoTask)
    return task


@pytest.fixture(scope="module")
def task(folder: Path) -> Iterator[GrpoTask]:
    with small_world():
        yield build(folder, "--task.queries", "7", "--task.temperature", "0.8")


@pytest.fixture(scope="module")
def models(task: GrpoTask) -> Rewarded:
    policy, reference = (filled(task.make_policy, seed) for seed in (4, 5))
    ranker = task._ranker.module
    assert isinstance(ranker, Scorer)
    return Rewarded(policy, reference, ranker)


@pytest.fixture(scope="module")
def batch(task: GrpoTask) -> dict[str, Any]:
    return task.batch(np.array([0, 3, 5]), rngs(0, 3))


@pytest.fixture(scope="module")
def rolled(task: GrpoTask, models: Rewarded, batch: dict[str, Any]) -> dict[str, Any]:
    return jax.jit(task.roll_out)(models, batch, jax.random.key(3))


def test_a_batch_holds_what_the_ranker_was_asked(task: GrpoTask, batch: dict[str, Any]) -> None:
    room = PromptRoom(task.start.tokenizer, task._ranker.contract.prompts["pair"])
    assert task.num_examples == 8
    assert (batch["where"].sum(axis=1) == [len(task.examples[i].queries) for i in (0, 3, 5)]).tolist() == [
        len(task.examples[i].queries) <= 7 for i in (0, 3, 5)
    ]
    for b, i in enumerate((0, 3, 5)):
        example = task.examples[i]
        prompt = batch["prompt"].tokens[b][batch["prompt"].where[b]].tolist()
        assert [prompt] == task.room.summary_prompts([task.data.documents[example.document]])
        (part,) = task.room.documents([task.data.documents[example.document]])
        assert batch["prompt"].tokens[b][batch["body"][b]].tolist() == part.ids
        known = {tuple(room.prefixes([task.data.queries["train"][q]])[0]): q for q in example.queries}
        for k in np.flatnonzero(batch["where"][b]):
            tail = batch["tail"][b, k]
            assert tail[tail != NO_TOKEN].tolist() == room.suffix
            query = known.pop(tuple(batch["query"].tokens[b, k][batch["query"].where[b, k]].tolist()))
            place = example.queries.tolist().index(query)
            np.testing.assert_array_equal(batch["full"][b, k], example.log_odds[place])
    again = task.batch(np.array([0, 3, 5]), rngs(0, 3))
    jax.tree.map(np.testing.assert_array_equal, batch, again)
    shapes = task.batch_shape(3)
    assert jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), shapes) == jax.tree.map(
        lambda x: (np.shape(x), np.asarray(x).dtype), batch
    )


def test_samples_are_texts_of_their_documents(task: GrpoTask, rolled: dict[str, Any]) -> None:
    texts, said = np.asarray(rolled["texts"]), np.asarray(rolled["said"])
    assert texts.shape == said.shape == (3, 3, BUDGET)
    end, control = task.room.end_id, set(task.start.tokenizer.control_ids)
    assert len({tuple(text) for text in texts.reshape(-1, BUDGET).tolist()}) > 3
    for text, there in zip(texts.reshape(-1, BUDGET), said.reshape(-1, BUDGET), strict=True):
        count = there.sum()
        assert there[:count].all()  # left-aligned
        ends = np.flatnonzero(text == end)
        assert not ends.size or (ends.tolist() == [count - 1] and count > 1)
        assert ends.size or count == BUDGET
        assert not control & (set(text[:count].tolist()) - {end})
    np.testing.assert_array_equal(
        rolled["summary_tokens"], (said & (texts != end)).sum(axis=-1)
    )  # the end token is none


def test_log_probs_are_those_of_the_whole_text_alone(
    task: GrpoTask, models: Rewarded, batch: dict[str, Any], rolled: dict[str, Any]
) -> None:
    decoder = models.policy.decoder
    for b in range(3):
        prompt = batch["prompt"].tokens[b][batch["prompt"].where[b]]
        for g in range(2):
            count = int(rolled["said"][b, g].sum())
            text = np.asarray(rolled["texts"][b, g, :count])
            whole = jnp.asarray(np.r_[prompt, text])[None]
            hidden, _ = decoder(
                decoder.embed(whole), jnp.arange(whole.shape[1])[None], Causal(jnp.ones(whole.shape, bool))
            )
            logits = np.asarray(decoder.logits(hidden)[0, len(prompt) - 1 : -1]) / 0.8
            logits[:, [i for i in task.start.tokenizer.control_ids if i != task.room.end_id]] = -np.inf
            logits[0, task.room.end_id] = -np.inf
            expected = logits[np.arange(count), text] - np.log(np.exp(logits).sum(axis=-1))
            np.testing.assert_allclose(rolled["old"][b, g, :count], expected, atol=1e-4)
            np.testing.assert_array_equal(rolled["old"][b, g, count:], 0)


def test_what_stands_behind_the_end_never_counts(
    task: GrpoTask, models: Rewarded, batch: dict[str, Any], rolled: dict[str, Any]
) -> None:
    cut = {**rolled, "said": rolled["said"] & (jnp.arange(BUDGET)[None, None] < 3)}
    other = {**cut, "texts": jnp.where(cut["said"], cut["texts"], 77)}
    found = jax.jit(jax.value_and_grad(lambda p, part: _loss(task, models, p, part)))
    params = nnx.state(models.policy, nnx.Param)
    for a, b in zip(jax.tree.leaves(found(params, cut)), jax.tree.leaves(found(params, other)), strict=True):
        np.testing.assert_array_equal(a, b)
    judge = jax.jit(task.rewards)
    for name, values in judge(models.ranker, batch, cut["texts"], cut["said"]).items():
        np.testing.assert_array_equal(values, judge(models.ranker, batch, other["texts"], cut["said"])[name])


def _loss(task: GrpoTask, models: Rewarded, params: Any, part: dict[str, Any]) -> jax.Array:
    graphdef, _, rest = nnx.split(models.policy, nnx.Param, ...)
    policy = nnx.merge(graphdef, params, rest)
    return task.loss(Rewarded(policy, models.reference, models.ranker), part, jax.random.key(0)).value()


def test_summaries_are_judged_as_they_are_scored_alone(
    task: GrpoTask, models: Rewarded, batch: dict[str, Any], rolled: dict[str, Any]
) -> None:
    """The reward by hand: prompts of the ranker with the sampled tokens in the document's place, scored one by one."""
    room = PromptRoom(task.start.tokenizer, task._ranker.contract.prompts["pair"])
    run_one = jax.jit(lambda tokens, where: _odds(models.ranker, tokens, where))
    for b in range(3):
        words = np.asarray(rolled["said"][b] & (rolled["texts"][b] != task.room.end_id))
        for g in (0, 2):
            text = np.asarray(rolled["texts"][b, g])[words[g]].tolist()
            values = []
            for k in np.flatnonzero(batch["where"][b]):
                prefix = batch["query"].tokens[b, k][batch["query"].where[b, k]].tolist()
                ids = np.zeros((1, 64), np.int32)
                whole = prefix + text + room.suffix
                ids[0, : len(whole)] = whole
                odds = float(run_one(ids, np.arange(64)[None] < len(whole)))
                p, q = 1 / (1 + np.exp(-odds)), 1 / (1 + np.exp(-float(batch["full"][b, k, 0])))
                values.append(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
            np.testing.assert_allclose(rolled["ranker_kl"][b, g], np.mean(values), rtol=1e-3, atol=1e-5)
            body = set(batch["prompt"].tokens[b][batch["body"][b]].tolist())
            copied = np.mean([token in body for token in text])
            reward = (
                task.config.copy_weight * copied - np.mean(values) - task.config.length_weight * len(text)
            )
            np.testing.assert_allclose(rolled["reward"][b, g], reward, rtol=1e-3, atol=1e-5)


def _odds(ranker: Scorer, tokens: jax.Array, where: jax.Array) -> jax.Array:
    hidden, _ = ranker.decoder(ranker.decoder.embed(tokens), jnp.arange(tokens.shape[1])[None], Causal(where))
    last = hidden[0, jnp.sum(where) - 1]
    logits = ranker.label_matrix() @ last
    return logits[0] - logits[1]


def test_actions_count_by_their_share(folder: Path, tmp_path: Path) -> None:
    ranker = load_model(folder / "ranker")
    contract = dataclasses.replace(ranker.contract, actions=("click", "apply"))
    save_model(tmp_path / "ranker", filled(lambda r: make_module(contract, r), 7), contract, ranker.tokenizer)
    with small_world() as data:
        label(load_model(tmp_path / "ranker"), data, tmp_path / "scores")
        found = {}
        for alpha in (1.0, 0.5, 0.0):
            task = build(
                tmp_path, "--task.model.tokenizer", str(folder / "ranker"), "--task.alpha", str(alpha)
            )
            batch = task.batch(np.array([1]), rngs(0, 1))
            assert batch["full"].shape == (1, 2, 3)
            texts = jnp.array([[[40, 41, 42, 43, 44], [50, 51, 52, 53, 54], [40, 41, 42, 43, 44]]])
            module = task._ranker.module
            judged = jax.jit(task.rewards)(module, batch, texts, jnp.ones(texts.shape, bool))
            found[alpha] = np.asarray(judged["ranker_kl"])[0]
    np.testing.assert_allclose(found[0.5], (found[1.0] + found[0.0]) / 2, rtol=1e-4)
    assert abs(found[1.0] - found[0.0]).max() > 1e-3
    np.testing.assert_allclose(found[0.0][0], found[0.0][2], rtol=1e-5)  # one text twice


def test_items_of_summaries() -> None:
    texts = jnp.array([[[5, 6, 1], [7, 8, 9]]])
    words = jnp.array([[[True, True, False], [True] * 3]])
    tail = jnp.array([[[21, 22], [23, NO_TOKEN]]])
    items = summary_items([50], texts, words, tail)
    assert items.tokens.tolist() == [
        [[50, 5, 6, 21, 22, 0], [50, 7, 8, 9, 21, 22]],
        [[50, 5, 6, 23, 0, 0], [50, 7, 8, 9, 23, 0]],
    ]
    assert items.last.tolist() == [[[0, 4], [1, 5]], [[0, 3], [1, 4]]]
    np.testing.assert_array_equal(items.segments, items.tokens > 0)
    assert items.offsets[1, 1].tolist() == list(range(6))
    body = jnp.array([[False, True, True]])
    found = copied_share(texts, words, jnp.array([[7, 5, 9]]), body)
    np.testing.assert_allclose(found, [[1 / 2, 1 / 3]])


def test_the_reference_holds_and_the_ranker_too(task: GrpoTask, rolled: dict[str, Any]) -> None:
    started = task.init(nnx.Rngs(1))
    assert isinstance(started, Rewarded)
    for name, value in flat(started.policy).items():
        np.testing.assert_array_equal(flat(started.reference)[name], value)
    params = nnx.state(started.policy, nnx.Param)
    trained = nnx.state(started, task.trainable())
    assert {path[0] for path, _ in nnx.to_flat_state(trained)} == {"policy"}
    assert len(jax.tree.leaves(trained)) == len(jax.tree.leaves(params))

    @jax.jit
    def apart(model: Rewarded) -> jax.Array:
        here = task.log_probs(model.policy.decoder, rolled["prompt"], rolled["texts"], rolled["said"])
        return task.loss(model, {**rolled, "reference": here}, jax.random.key(0)).terms()["reference"][0]

    assert abs(float(apart(started))) < 1e-6


def test_several_samples_of_a_prompt_are_those_of_the_prompt_alone(models: Rewarded) -> None:
    """The prompt is read once for all its samples: greedily they are all the same text, the one of `generate`."""
    from jaxsearch.models.generate import allowed_tokens, continue_texts

    decoder = models.policy.decoder
    tokens, lengths = np.array([[5, 9, 7, 0], [8, 6, 0, 0]]), np.array([3, 2])
    avoid = [
        int(i) for i in np.asarray(generate(decoder, tokens, lengths, max_new_tokens=4, eos_id=None)[0])[:, 0]
    ]
    alone, counts = generate(decoder, tokens, lengths, max_new_tokens=4, eos_id=None, avoid_ids=avoid)
    assert not np.isin(alone, avoid).any()
    may = allowed_tokens(decoder.config.vocab_size, avoid)
    graphdef, state = nnx.split(decoder)
    found, _ = continue_texts(
        graphdef, state, tokens, lengths, jnp.zeros(0, jnp.int32), may, may, None, max_new_tokens=4, samples=3
    )
    np.testing.assert_array_equal(found, np.repeat(alone, 3, axis=0))
    assert counts.tolist() == [4, 4]


# --- runs ------------------------------------------------------------------------------------------------------------


def test_imitation_then_a_reward_that_rises(folder: Path, tmp_path: Path) -> None:
    """Ten steps learn the summaries of a store; then GRPO finds shorter ones that the ranker reads better."""
    with small_world():
        config = load_config(
            "configs/summariser.py:tiny_imitation",
            options(folder, "--task.targets", str(folder / "targets"), "--steps", "30", "--log-every", "5"),
        )
        figures = run(config, tmp_path / "imitation")
        losses = [row["loss"] for row in _rows(tmp_path / "imitation")]
        assert losses[-1] < 0.5 * losses[0]
        assert 1 <= figures["dev/summary_tokens"] <= BUDGET - 1
        assert "dev/ndcg@10" not in figures
        start = ["--task.model.init-from", str(tmp_path / "imitation" / "model")]
        reward = ["--task.ranker", str(folder / "ranker"), "--task.scores", str(folder / "scores")]
        strong = ["--optimizer.learning-rate", "0.01", "--task.length-weight", "0.02", "--task.samples", "8"]
        steps = ["--steps", "30", "--log-every", "6"]
        config = load_config("configs/summariser.py:tiny", options(folder, *start, *reward, *strong, *steps))
        figures = run(config, tmp_path / "grpo")
        rows = _rows(tmp_path / "grpo")
        assert rows[-1]["reward"] > rows[0]["reward"] + 0.02
        assert all(row["moved"] >= 0 for row in rows)
        assert rows[-1]["moved"] > rows[0]["moved"]
        assert {"dev/ndcg@10", "dev/ranker_kl", "dev/shorter"} <= set(figures)
        model = load_model(tmp_path / "grpo" / "model")
        assert model.contract.kind == "summariser"
        assert golden_error(model) < 1e-4
        assert all(make_summary_writer(model)(documents()))
        before, after = (flat(load_model(tmp_path / name / "model").module) for name in ("imitation", "grpo"))
        assert max(np.abs(after[name] - before[name]).max() for name in before) > 1e-3


def _rows(workdir: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


def test_the_evaluation_goes_the_way_of_serving(task: GrpoTask, models: Rewarded) -> None:
    """Greedy text, tokenised anew, in the ranker's own prompt."""
    from jaxsearch.scoring.summaries import SummaryWriter
    from jaxsearch.tasks.base import evaluation_lists, ranking_metrics

    figures = task.evaluate(models)
    queries, candidates = evaluation_lists(task.data, "dev", 100)
    texts = SummaryWriter(models.policy.decoder, task.room)(documents())
    shown = [with_summary(document, text) for document, text in zip(documents(), texts, strict=True)]
    prompt = task._ranker.contract.prompts["pair"]
    found = RecordScorer(models.ranker, task.start.tokenizer, prompt, shown)(queries, candidates)
    scores = [x[:, 0] - x[:, 1] for x in found]
    expected = np.nanmean(ranking_metrics(task.data, queries, candidates, scores)["ndcg@10"])
    np.testing.assert_allclose(figures["dev/ndcg@10"], expected, atol=1e-6)
    assert figures["dev/ranker_kl"] > 0


def test_compiled_without_data() -> None:
    """By presets alone, as `tpu_setup/compile_check.py` does."""
    config = load_config(
        "configs/summariser.py:tiny",
        ["--task.ranker", "tiny_student", "--task.samples", "2", "--task.queries", "3"],
    )
    task = config.task.build_abstract()
    shapes = task.batch_shape(2)
    model = nnx.eval_shape(lambda: task.init(nnx.Rngs(0)))
    key = jax.random.key(0)
    part = jax.eval_shape(task.roll_out, model, shapes, key)
    assert part["texts"].shape == (2, 2, 9)
    assert jax.eval_shape(lambda m, p: task.loss(m, p, key).value(), model, part).shape == ()


def taught_ranker(folder: Path, where: Path) -> Model:
    """A ranker with other weights that says it learned to read summaries."""
    ranker = load_model(folder / "ranker")
    contract = dataclasses.replace(ranker.contract, summariser="a" * 64)
    save_model(where, make_module(contract, nnx.Rngs(7)), contract, ranker.tokenizer)
    return load_model(where)


def test_a_ranker_of_summaries_rewards_by_scores_of_its_teacher(
    folder: Path, task: GrpoTask, models: Rewarded, batch: dict[str, Any], tmp_path: Path
) -> None:
    """Targets are the teacher's; what is divided from them is what the ranker of summaries says."""
    taught = taught_ranker(folder, tmp_path / "taught")
    with small_world():
        other = build(folder, "--task.queries", "7", "--task.temperature", "0.8", "--task.ranker", str(tmp_path / "taught"))  # fmt: skip
        found = other.batch(np.array([0, 3, 5]), rngs(0, 3))
        np.testing.assert_array_equal(found["full"], batch["full"])
        own = Rewarded(models.policy, models.reference, taught.module)
        figures = other.evaluate(own)
    assert "dev/ndcg@10" in figures
    assert "dev/ranker_kl" not in figures  # it knows nothing of the full text
    texts = jnp.asarray(np.random.default_rng(0).integers(0, 200, (3, 3, BUDGET)))
    said = jnp.ones(texts.shape, bool)
    mine = other.rewards(own.ranker, found, texts, said)["ranker_kl"]
    theirs = task.rewards(models.ranker, batch, texts, said)["ranker_kl"]
    assert float(jnp.max(jnp.abs(mine - theirs))) > 1e-3


# --- refused before training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--task.samples", "1"], "task.samples is 1: use at least 2"),
        (["--task.queries", "0"], "task.queries is 0"),
        (["--task.clip", "0"], "task.clip is 0"),
        (["--task.temperature", "0"], "task.temperature is 0"),
        (["--task.alpha", "1.5"], "task.alpha is 1.5"),
        (["--task.length-weight", "-1"], "task.length_weight is -1"),
        (["--task.prompt.max-answer-tokens", "1"], "max_answer_tokens is 1"),
        ([], "task.ranker is '', task.scores ''"),
        (["--task.prompt.kind", "ranker", "--task.targets", "TARGETS"], "prompt.kind is 'ranker'"),
        (
            ["--task.ranker", "RETRIEVER", "--task.scores", "SCORES"],
            "a bi_encoder: give the model folder of a ranker",
        ),
        (
            ["--task.ranker", "TAUGHT", "--task.scores", "TAUGHT_SCORES"],
            "says of summaries: label with the ranker of full",
        ),
        (
            ["--task.ranker", "RANKER", "--task.scores", "SHORT"],
            "scores of small.*: label the full text of small",
        ),
        (
            ["--task.ranker", "RANKER", "--task.scores", "SCORES", "--task.updates", "2", "--steps", "3"],
            "task.updates is 2.* give optimizer.decay_steps, 6",
        ),
        (
            ["--task.ranker", "OTHER", "--task.scores", "SCORES"],
            "which holds Yes, No by model .* label with that ranker",
        ),
        (["--task.ranker", "RANKER", "--task.scores", "SCORES", "--task.alpha", "0.5"], "scores no actions"),
        (
            [
                "--task.model.tokenizer",
                "",
                "--task.model.vocab-size",
                "280",
                "--task.ranker",
                "RANKER",
                "--task.scores",
                "SCORES",
            ],
            "tokenizer is not the summariser's",
        ),
    ],
)
def test_refused(folder: Path, tmp_path: Path, more: list[str], words: str) -> None:
    ranker = load_model(folder / "ranker")
    names = {"RANKER": folder / "ranker", "RETRIEVER": folder / "retriever", "SCORES": folder / "scores"}
    names |= {"TAUGHT": tmp_path / "taught", "OTHER": tmp_path / "other", "TARGETS": folder / "targets"}
    if "TAUGHT" in more:
        with small_world() as data:
            label(taught_ranker(folder, tmp_path / "taught"), data, tmp_path / "taught_scores")
        names["TAUGHT_SCORES"] = tmp_path / "taught_scores"
    if "SHORT" in more:
        with small_world() as data:
            shown = show_data(data, str(folder / "targets"), "")
            label(ranker, shown, tmp_path / "short")
        names["SHORT"] = tmp_path / "short"
    if "OTHER" in more:
        other = dataclasses.replace(ranker.contract, training={"seed": 1})
        save_model(tmp_path / "other", ranker.module, other, ranker.tokenizer)
    given = [str(names.get(word, word)) for word in more]

    def start() -> None:
        config = load_config("configs/summariser.py:tiny", options(folder, *given))
        config.task.build(config)

    with small_world(), pytest.raises(ConfigError, match=words):
        start()


def test_a_ranker_learns_on_summaries(folder: Path, tmp_path: Path) -> None:
    """Prompts and golden scores hold summaries, teachers' scores are of the full text, the contract names the summariser."""
    with small_world() as data:
        config = load_config(
            "configs/ranker.py:tiny",
            ["--steps", "1", "--batch-size", "4", "--optimizer.warmup-steps", "0", "--task.summaries", str(folder / "targets"),
             "--task.model.init-from", str(folder / "ranker"), "--task.relevance-teachers", str(folder / "scores")],
        )  # fmt: skip
        task = config.task.build(config)
        batch = task.batch(np.array([0]), rngs(0, 1))
        shown = task.shown.documents
        ids = {tuple(part.ids) for part in task.room.documents(shown)}
        items = batch["items"]
        for row in range(int(items.where[0].sum())):
            item = items.tokens[0, row][: items.last[0, row, 1] + 1]
            assert any(tuple(item[: len(text)].tolist()) == text for text in ids)
        run(config, tmp_path / "run")
    model = load_model(tmp_path / "run" / "model")
    assert model.contract.summariser == "a" * 64
    assert [g.document for g in model.contract.golden] == shown[:3]
    assert golden_error(model) < 1e-4
    assert data.documents[0].fields != shown[0].fields
    with pytest.raises(ConfigError, match="the encoder reads the text itself"):
        load_config("configs/mixlm.py:tiny", ["--task.summaries", str(folder / "targets")])
