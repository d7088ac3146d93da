"""The training tasks: what starts from what, what a batch holds, what a loss leaves out, and that trained models work as exported."""

import dataclasses
import itertools
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_market import STEPS, TEACHER, Funnel, filled, grades, small_tokenizer

import jaxsearch.tasks.base
from jaxsearch.config import ConfigError, TrainConfig, load_config
from jaxsearch.data.datasets import Dataset, Pairs
from jaxsearch.data.records import ACTIONS, Query
from jaxsearch.data.score_store import ScoreStore, StoreError, StoreMeta
from jaxsearch.data.tokenizer import LABELS, train
from jaxsearch.errors import InputError
from jaxsearch.models.contract import load_model
from jaxsearch.models.decoder import Decoder
from jaxsearch.models.weights import huggingface
from jaxsearch.scoring.prefill import Prefix
from jaxsearch.scoring.records import JUDGE_LABELS
from jaxsearch.serving.bundle import golden_error
from jaxsearch.tasks.base import (
    DataConfig,
    ModelConfig,
    evaluation_lists,
    first_layers,
    load_start,
    may_learn,
    open_data,
    ranking_metrics,
)
from jaxsearch.tasks.cross_encoder import CrossEncoderTask, store_targets
from jaxsearch.tasks.engagement_teacher import action_values, engagement_auroc
from jaxsearch.tasks.judge import JudgeTask
from jaxsearch.tasks.language_model import LanguageModelTask
from jaxsearch.tasks.ranker import RankerTask
from jaxsearch.tasks.relevance_teacher import RelevanceTeacherTask
from jaxsearch.tasks.retriever import RetrieverTask
from jaxsearch.training.main import main

SMALL = [
    "--steps",
    "3",
    "--batch-size",
    "4",
    "--optimizer.warmup-steps",
    "1",
    "--task.model.vocab-size",
    "300",
]
STAGES = ("base", "judge", "retriever", "relevance_teacher", "engagement_teacher", "ranker")


def configured(name: str, *options: str) -> TrainConfig:
    return load_config(f"configs/{name}.py:tiny", [*SMALL, *options])


def build(name: str, *options: str) -> Any:
    config = configured(name, *options)
    return config.task.build(config)


def rngs(seed: int, count: int) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, i]) for i in range(count)]


def flat(module: nnx.Module) -> dict[str, np.ndarray]:
    return {
        ".".join(map(str, path)): np.asarray(v[...])
        for path, v in nnx.to_flat_state(nnx.state(module, nnx.Param))
    }


def from_start(funnel: Funnel, stage: str) -> list[str]:
    return ["--task.model.init-from", str(funnel.model(stage))]


def stores(funnel: Funnel) -> list[str]:
    names = ("relevance", "engagement")
    return [word for n in names for word in (f"--task.{n}-teachers", str(funnel.store(f"{n}_teacher")))]


# --- every stage, trained for three steps by its config -------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_trained_models_reproduce_their_golden_scores(funnel: Funnel, stage: str) -> None:
    model = load_model(funnel.model(stage))
    kind = {"base": "base", "judge": "judge", "retriever": "bi_encoder"}.get(stage, "ranker")
    labels = {"judge": JUDGE_LABELS, "ranker": ("Yes", "No")}.get(kind, ())
    actions = ACTIONS["jobs"] if stage in ("engagement_teacher", "ranker") else ()
    assert model.contract.kind == kind
    assert tuple(model.contract.labels) == labels
    assert model.contract.actions == actions
    assert model.contract.training["steps"] == STEPS
    assert model.contract.training["task"]["data"]["name"] == "job_market:tiny"
    assert len(model.contract.golden) == (0 if stage == "base" else 3)
    assert golden_error(model) < 1e-4
    if model.contract.golden:
        assert np.ptp([golden.scores for golden in model.contract.golden], axis=0).max() > 0


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_logs_learns_and_evaluates(funnel: Funnel, stage: str) -> None:
    rows = [json.loads(line) for line in (funnel.folder / stage / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "train"]
    assert steps[-1]["step"] == STEPS
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in steps)
    figures = funnel.figures[stage]
    ranking = {"dev/ndcg@10", "dev/poor_match@10", "dev/mrr"}
    auroc = {f"dev/auroc/{name}" for name in ACTIONS["jobs"]}
    expected = {
        "base": {"dev/nats_per_token"}, "judge": ranking | {"held_out/kappa"}, "retriever": ranking,
        "relevance_teacher": ranking, "engagement_teacher": auroc, "ranker": ranking | auroc,
    }[stage]  # fmt: skip
    assert set(figures) == expected
    assert all(0 <= figures[name] <= 1 for name in ranking & set(figures))
    assert math.isnan(
        figures.get("dev/auroc/bad_fit", math.nan)
    )  # possible on clicked ones alone, where it was True
    assert 0 <= figures.get("dev/auroc/click", 0.5) <= 1
    assert 3 < figures.get("dev/nats_per_token", 5) < 8  # ln 300 is 5.7


def test_stages_start_from_the_ones_before_and_move(funnel: Funnel) -> None:
    models = {stage: flat(load_model(funnel.model(stage)).module) for stage in STAGES}
    for stage, start in (("judge", "base"), ("relevance_teacher", "judge"), ("ranker", "retriever")):
        after, before = models[stage], models[start]
        moved = {name: np.abs(after[name] - before[name]).max() for name in before if name in after}
        assert len(moved) >= 12
        assert 0 < max(moved.values()) < 0.5, stage
    # The retriever was cut out of the base model: one layer of two.
    assert models["retriever"]["decoder.layers.q"].shape[0] == 1
    gap = np.abs(models["retriever"]["decoder.layers.q"][0] - models["base"]["decoder.layers.q"])
    assert gap[0].max() < gap[1].max()


# --- starts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["judge", "retriever", "base"])
def test_a_warm_start_copies_the_weights(funnel: Funnel, world: Dataset, stage: str) -> None:
    start = {"base": "retriever", "judge": "base", "retriever": "judge"}[stage]
    source = load_model(funnel.model(start))
    task = build(stage, *from_start(funnel, start))
    module = task.init(nnx.Rngs(7))
    found = flat(module.decoder)
    for name, value in flat(source.module.decoder).items():
        np.testing.assert_array_equal(found.pop(name), value)
    assert not found
    assert task.start.architecture == source.contract.architecture
    assert task.start.tokenizer.encode(["Senior nurse"]) == source.tokenizer.encode(["Senior nurse"])


def test_compute_settings_are_the_configs_and_sizes_the_checkpoints(funnel: Funnel, world: Dataset) -> None:
    sizes = load_model(funnel.model("base")).contract.architecture
    start = load_start(
        ModelConfig("tiny_student", str(funnel.model("base")), compute_dtype="bfloat16", remat="full"), world
    )
    assert start.architecture == dataclasses.replace(sizes, compute_dtype="bfloat16", remat="full")
    assert load_start(ModelConfig("tiny_student", str(funnel.model("base"))), world).architecture == sizes


def test_fields_that_a_base_model_does_not_read_whole_stay_last(world: Dataset) -> None:
    untouched = build("base")
    room, document = untouched._room, untouched.data.documents[0]
    names = list(document.fields)
    two = dataclasses.replace(document, fields={name: document.fields[name] for name in names[:2]})
    (head,), (whole,) = room.documents([two]), room.documents([document])
    assert untouched._whole_fields(0) == (3, len(whole.ids))
    assert len({tuple(untouched._shuffled(0, rng)) for rng in rngs(0, 40)}) == 6

    task = build("base", "--task.prompt.max-document-tokens", str(len(head.ids) + 1))
    assert task._whole_fields(0) == (2, len(head.ids))
    found = {tuple(task._shuffled(0, rng)) for rng in rngs(0, 20)}
    assert len(found) == 2
    for ids in found:
        assert len(ids) <= len(head.ids) + 2
        assert ids[-1] == room.end_id
        text = room.tokenizer.decode(list(ids[:-1]))
        assert not [value for value in two.fields.values() if value.lower() not in text], text


def test_first_layers_are_kept_exactly() -> None:
    decoder = filled(lambda rngs: Decoder(dataclasses.replace(TEACHER, layers=3, tied=False), rngs=rngs), 0)
    before = flat(decoder)
    for layers in (1, 2, 3):
        shorter = first_layers(decoder, layers)
        assert shorter.config == dataclasses.replace(decoder.config, layers=layers)
        after = flat(shorter)
        assert after.keys() == before.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(
                after[name], value[:layers] if name.startswith("layers.") else value
            )
        assert shorter.layers.q.get_metadata()["axes"] == ("layer", "embed", "heads", "head_dim")
    for layers in (0, 4, -1):
        with pytest.raises(ConfigError, match=rf"model\.layers is {layers}: the checkpoint has 3"):
            first_layers(decoder, layers)


def test_a_start_from_a_hugging_face_folder(world: Dataset, tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    decoder = filled(lambda rngs: Decoder(TEACHER, rngs=rngs), 4)
    huggingface.save_decoder(decoder, tmp_path)
    tokenizer.save(tmp_path)
    start = load_start(ModelConfig("qwen3_8b", str(tmp_path), layers=1), world)
    assert start.weights is not None
    assert start.architecture == dataclasses.replace(TEACHER, layers=1)
    np.testing.assert_array_equal(flat(start.weights)["layers.down"], flat(decoder)["layers.down"][:1])
    assert start.tokenizer.vocab_size == tokenizer.vocab_size


def test_random_starts(funnel: Funnel, world: Dataset) -> None:
    start = load_start(ModelConfig("tiny", vocab_size=300), world)
    assert start.weights is None
    assert start.architecture == dataclasses.replace(TEACHER, vocab_size=start.tokenizer.vocab_size)
    assert all(len(start.tokenizer.encode([label])[0]) == 1 for label in LABELS)
    other = load_start(ModelConfig("tiny", tokenizer=str(funnel.model("base"))), world)
    assert other.tokenizer.encode(["Senior nurse"]) == start.tokenizer.encode(["Senior nurse"])
    # A published size keeps its published vocabulary, whatever the tokenizer at hand.
    assert load_start(ModelConfig("qwen3_0_6b", vocab_size=300), world).architecture.vocab_size == 151_936


def test_the_tokenizer_does_not_see_held_out_documents(world: Dataset) -> None:
    secret = dataclasses.replace(world.documents[0], fields={"title": "zyzzyva " * 30})
    hidden = dataclasses.replace(
        world, documents=[secret, *world.documents[1:]], held_out=np.array([0], np.int32)
    )
    seen = dataclasses.replace(hidden, held_out=np.zeros(0, np.int32))
    lengths = [
        len(jaxsearch.tasks.base.train_tokenizer(d, 600).encode(["zyzzyva"])[0]) for d in (hidden, seen)
    ]
    assert lengths[0] >= 7 > lengths[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init_from": "nowhere"}, "model.init_from is 'nowhere': give a model folder"),
        ({"init_from": "nowhere.gguf"}, "does not exist"),
        ({"preset": "huge"}, "preset 'huge' is unknown"),
        ({"layers": 1}, "model.layers is 1, but there is no model.init_from"),
        ({"tokenizer": "nowhere"}, "no tokenizer there"),
        ({"vocab_size": 9}, "vocab_size is 9: use at least"),
        ({"compute_dtype": "int8"}, "compute_dtype is 'int8'"),
        ({"remat": "some"}, "remat is 'some'"),
        ({"attention": "some"}, "attention is 'some'"),
    ],
)
def test_starts_that_cannot_be(world: Dataset, changes: dict, words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_start(ModelConfig(**changes), world)
    assert words in str(caught.value)


def test_more_layers_or_tokens_than_the_checkpoint_has(
    funnel: Funnel, world: Dataset, tmp_path: Path
) -> None:
    base = str(funnel.model("base"))
    with pytest.raises(ConfigError, match=r"model\.layers is 3: the checkpoint has 2"):
        load_start(ModelConfig(init_from=base, layers=3), world)
    train(["".join(letters) for letters in itertools.product("abcdefgh", repeat=3)], 600).save(tmp_path)
    with pytest.raises(ConfigError, match=r"has \d+ tokens, .* only \d+: use the checkpoint's own"):
        load_start(ModelConfig(init_from=base, tokenizer=str(tmp_path)), world)


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def judge(world: Dataset) -> JudgeTask:
    return build("judge", "--task.candidates", "3", "--task.precedents", "1")


def items_of(task: CrossEncoderTask, batch: dict, i: int) -> list[list[int]]:
    """The tokens of each existing candidate of query i."""
    items = batch["items"]
    rows = [items.last[i, slot] for slot in np.flatnonzero(items.where[i])]
    return [items.tokens[i, row, : column + 1].tolist() for row, column in rows]


def test_a_batch_is_a_function_of_indices_and_generators(judge: JudgeTask) -> None:
    one, same = (judge.batch(np.array([2, 5]), rngs(3, 2)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    alone = judge.batch(np.array([5]), rngs(3, 2)[1:])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1:], b), one, alone)
    other = judge.batch(np.array([2, 5]), rngs(4, 2))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    assert judge.example_ids(np.array([2, 5])) == ["train2", "train5"]
    assert judge.num_examples == 12


def test_prefix_items_and_targets_belong_together(judge: JudgeTask, world: Dataset) -> None:
    batch = judge.batch(np.arange(4), rngs(0, 4))
    assert {leaf.shape[0] for leaf in jax.tree.leaves(batch)} == {4}
    prefixes = judge.room.prefixes(world.queries["train"])
    parts = {
        tuple(part.ids + judge.room.suffix): row
        for row, part in enumerate(judge.room.documents(world.documents))
    }
    for i in range(4):
        length = batch["prefix"].where[i].sum()
        assert batch["prefix"].tokens[i, :length].tolist() == prefixes[i]
        rows = [parts[tuple(item)] for item in items_of(judge, batch, i)]
        assert len(set(rows)) == 3
        assert batch["grade"][i].argmax(-1).tolist() == [grades(i)[row] for row in rows]
        assert batch["grade"][i].sum(-1).tolist() == [1, 1, 1]


def test_shown_documents_without_a_grade_are_no_precedents(judge: JudgeTask, world: Dataset) -> None:
    for example, pairs in zip(judge.examples, world.pairs, strict=True):
        assert set(example.documents.tolist()) == set(grades(pairs.query))
        assert len(pairs.documents) > len(example.documents)
    assert len(build("judge", "--task.precedents", "0.5").examples) == 6


def test_short_lists_leave_slots_empty(world: Dataset) -> None:
    task = build("judge", "--task.candidates", "6")
    batch = task.batch(np.array([0]), rngs(0, 1))
    assert batch["items"].where[0].tolist() == [True] * 4 + [False] * 2
    assert np.isnan(batch["grade"][0, 4:]).all()
    assert not np.isnan(batch["grade"][0, :4]).any()


def test_impressions_keep_their_positions(world: Dataset) -> None:
    task = build("engagement_teacher")
    batch = task.batch(np.array([1]), rngs(0, 1))
    page = world.impressions["train1"]
    texts = [task.start.tokenizer.decode(item) for item in items_of(task, batch, 0)]
    assert len(texts) == 5
    for text, actions in zip(texts, batch["actions"][0], strict=False):
        (shown,) = (s for s in page if world.documents[world.document_row[s.document_id]].fields["title"].lower() in text.lower()
                    and world.documents[world.document_row[s.document_id]].fields["location"].lower() in text.lower())  # fmt: skip
        assert f"position{shown.position}" in text.replace(" ", "")
        np.testing.assert_array_equal(actions, action_values([shown], task.actions)[0])
    assert action_values(page, ACTIONS["jobs"])[:2].tolist()[0] == [1, 1, 1, 1, 1]
    assert np.isnan(action_values(page, ACTIONS["jobs"])[1, 3])  # bad_fit was not possible
    assert np.isnan(action_values(page, ("unheard_of",))).all()


def test_every_pair_part_fits_into_its_row(world: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first query has the shortest pair parts of all; a longer one must not stop the run later."""
    queries = [
        dataclasses.replace(q, searcher={} if i == 0 else q.searcher)
        for i, q in enumerate(world.queries["train"])
    ]
    rich = [
        dataclasses.replace(d, numeric=d.numeric | {"company_ctr": 10.0**i, "age_days": 10.0**i})
        for i, d in enumerate(world.documents)
    ]
    data = dataclasses.replace(world, documents=rich, queries={**world.queries, "train": queries})
    monkeypatch.setattr(jaxsearch.tasks.base, "load_dataset", lambda name, folder: data)
    task = build("engagement_teacher")
    batch = task.batch(np.arange(12), rngs(0, 12))
    assert batch["items"].where.sum() == 60
    lengths = [len(item) for i in range(12) for item in items_of(task, batch, i)]
    first = max(map(len, items_of(task, batch, 0)))
    assert first < max(lengths) <= batch["items"].tokens.shape[2] < max(lengths) + 10


def test_retriever_batches(world: Dataset) -> None:
    task: RetrieverTask = build("retriever", "--task.positives", "1", "--task.negatives", "4")
    batch = task.batch(np.array([3, 0]), rngs(1, 2))
    assert batch["rows"].shape == batch["labels"].shape == (2, 5)
    for i, query in enumerate((3, 0)):
        known = grades(query)
        exists = batch["rows"][i] >= 0
        assert exists.tolist() == [True] * 3 + [False] * 2  # one positive, the two poor ones there are
        assert [known[row] for row in batch["rows"][i][exists]] == batch["labels"][i][exists].tolist()
        assert (batch["labels"][i] > 2.5).sum() == 1
        for slot, row in enumerate(batch["rows"][i]):
            tokens, where = batch["documents"].tokens[5 * i + slot], batch["documents"].where[5 * i + slot]
            expected = task._document_tokens[row] if row >= 0 else [task._document_tokens[0][-1]]
            assert tokens[where].tolist() == expected
    assert task.num_examples == 12
    assert build("retriever", "--task.precedents", "0.25").num_examples == 3
    assert not task.accumulable


def test_language_model_sequences(world: Dataset) -> None:
    task: LanguageModelTask = build(
        "base", "--task.documents", "3", "--task.precedents", "1", "--task.shuffle-fields", "False"
    )
    text = task.batch(np.array([2, 7]), rngs(0, 2))["text"]
    assert text.tokens.shape[0] == 6
    prefixes = task._room.prefixes(world.queries["train"])
    for row in range(6):
        query = (2, 7)[row // 3]
        found = text.tokens[row][text.where[row]].tolist()
        good = [prefixes[query] + task._documents[d] for d, grade in grades(query).items() if grade >= 3]
        assert found in good
        assert found[-1] == task._room.end_id
    drawn = [text.tokens[row].tolist() for row in range(3)]
    assert drawn[2] == drawn[0] != drawn[1]  # two good documents, three places


# --- losses, against hand-written ones, with the model's answers given -----------------------------------------------


def answers(task: Any, batch: dict, seed: int = 0) -> np.ndarray:
    """Random logits for a batch, and the task made to give them."""
    shape = (*batch["items"].where.shape, len(task.labels) + len(task.actions))
    logits = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    task.logits = lambda model, batch: model
    return logits


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def check_masked(task: Any, batch: dict, logits: np.ndarray, expected: dict[str, float]) -> None:
    """The loss has these parts; what is masked may hold anything; gradients are finite, and 0 where masked."""

    def loss(x: jax.Array) -> tuple[jax.Array, dict]:
        losses = task.loss(x, batch, jax.random.key(0))
        return losses.value(), losses.terms()

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, terms), gradient = run(logits)
    found = {name: float(total) / float(weight) for name, (total, weight) in terms.items()}
    assert found == pytest.approx(expected, rel=1e-4)
    assert float(value) == pytest.approx(sum(expected.values()), rel=1e-4)
    where = batch["items"].where
    assert not where.all()
    (wild, _), wild_gradient = run(np.where(where[..., None], logits, np.nan).astype(np.float32))
    assert float(wild) == float(value)
    np.testing.assert_array_equal(wild_gradient, gradient)
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[~where] == 0).all()
    assert np.abs(np.asarray(gradient)[where]).max() > 0


def binary(p: np.ndarray, log_odds: np.ndarray) -> np.ndarray:
    q = sigmoid(log_odds)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(p * np.log(p / q)) + np.nan_to_num((1 - p) * np.log((1 - p) / (1 - q)))


def listwise(log_odds: np.ndarray, p: np.ndarray, where: np.ndarray) -> float:
    losses = []
    for s, target, exists in zip(log_odds, p, where, strict=True):
        gain = 2 ** (4 * target[exists]) - 1
        if gain.sum():
            logs = s[exists] - np.log(np.exp(s[exists]).sum())
            losses.append(-(gain / gain.sum() * logs).sum())
    return float(np.mean(losses))


def listwise_teacher(log_odds: np.ndarray, teacher: np.ndarray, where: np.ndarray, tau: float) -> float:
    losses = []
    for s, t, exists in zip(log_odds / tau, teacher / tau, where, strict=True):
        p, q = (np.exp(x[exists]) / np.exp(x[exists]).sum() for x in (t, s))
        losses.append(tau**2 * (p * np.log(p / q)).sum())
    return float(np.mean(losses))


def test_the_base_model_reads_fields_in_any_order(world: Dataset) -> None:
    fixed, shuffled = build("base", "--task.shuffle-fields", "False"), build("base")
    orders = set()
    for seed in range(12):
        batch = shuffled.batch(np.array([0]), rngs(seed, 1))
        plain = fixed.batch(np.array([0]), rngs(seed, 1))
        same = shuffled.batch(np.array([0]), rngs(seed, 1))
        np.testing.assert_array_equal(batch["text"].tokens, same["text"].tokens)
        assert (batch["text"].where.sum(1) <= plain["text"].where.sum(1).max()).all()
        for row, where in zip(*batch["text"], strict=True):
            ids = row[where].tolist()
            prefix = shuffled._prefixes[shuffled.examples[0].query]
            assert ids[: len(prefix)] == prefix
            assert ids[-1] == shuffled._room.end_id
            orders.add(shuffled.start.tokenizer.decode(ids[len(prefix) : -1]).strip().split(";")[0])
    firsts = {part.strip() for part in orders}
    assert any("works" in first for first in firsts)
    assert any("senior" in first for first in firsts)
    assert any(first in ("austin", "boston") for first in firsts)


def test_judge_loss(world: Dataset) -> None:
    task = build("judge", "--task.candidates", "5")
    batch = task.batch(np.array([0, 1]), rngs(0, 2))
    logits = answers(task, batch)
    where = batch["items"].where
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -(np.where(where[..., None], batch["grade"], 0) * log_p).sum() / where.sum()
    check_masked(task, batch, logits, {"grade": expected})
    right = (logits.argmax(-1) == np.nan_to_num(batch["grade"]).argmax(-1)) & where
    total, weight = task.loss(jnp.asarray(logits), batch, jax.random.key(0)).metrics["accuracy"]
    assert (int(total), int(weight)) == (right.sum(), 8)
    np.testing.assert_array_equal(task.relevance(np.array([[[0, 0, 0, 0, 99.0]]])), [[4.0]])


def test_relevance_teacher_loss_on_grades(world: Dataset) -> None:
    task: RelevanceTeacherTask = build(
        "relevance_teacher", "--task.candidates", "5", "--task.ranking-weight", "0.25"
    )
    batch = task.batch(np.array([0, 1, 2]), rngs(0, 3))
    batch["target"][2, :4] = 0  # a list that nothing can be learnt of the order from
    logits = answers(task, batch)
    where, log_odds = batch["items"].where, logits[..., 0] - logits[..., 1]
    kl = binary(batch["target"][where], log_odds[where]).mean()
    check_masked(
        task, batch, logits, {"kl": kl, "listwise": 0.25 * listwise(log_odds, batch["target"], where)}
    )
    assert set(np.unique(batch["target"][:2, :4])) == {0, 0.75, 1}


def write_store(
    folder: Path, data: Dataset, kind: str, columns: tuple[str, ...], score: Callable, **changes: Any
) -> str:
    """A store with score(query, row) for every pair (None: not scored)."""
    meta = StoreMeta("m", kind, data.name, data.fingerprint, columns, len(data.pairs), 0, shard=100)
    store = ScoreStore(folder, dataclasses.replace(meta, **changes))
    pairs = [(p.query, int(row), score(p.query, int(row))) for p in data.pairs for row in p.documents]
    kept = [pair for pair in pairs if pair[2] is not None]
    query, document, scores = (np.array(column) for column in zip(*kept, strict=True))
    store.write(0, query, document, scores.astype(np.float32))
    return str(folder)


def test_relevance_teacher_targets_from_a_judge(world: Dataset, tmp_path: Path) -> None:
    logits = np.array([0.0, 0.0, 1.0, 2.0, 3.0])
    p = np.exp(logits) / np.exp(logits).sum()
    labels = write_store(
        tmp_path, world, "judge", ("4", "3", "2", "1", "0"), lambda q, row: None if row == 1 else logits[::-1]
    )
    for form, expected in (("expected_grade", p @ np.arange(5) / 4), ("yes_probability", p[3:].sum())):
        task = build("relevance_teacher", "--task.labels", labels, "--task.label-form", form)
        for example, pairs in zip(task.examples, world.pairs, strict=True):
            assert example.documents.tolist() == [row for row in pairs.documents if row != 1]
            np.testing.assert_allclose(example.targets["target"], expected, rtol=1e-5)


def ranker_stores(world: Dataset, tmp_path: Path) -> list[str]:
    """Relevance of all but document 1; engagement of all but document 2."""
    columns = ("Yes", "No", *ACTIONS["jobs"])
    relevance = write_store(
        tmp_path / "r", world, "ranker", ("Yes", "No"), lambda q, row: None if row == 1 else (row / 4, q / 8)
    )
    engagement = write_store(
        tmp_path / "e",
        world,
        "ranker",
        columns,
        lambda q, row: None if row == 2 else (9, 9, *(row / 5 - np.arange(5) / 3)),
    )
    return ["--task.relevance-teachers", relevance, "--task.engagement-teachers", engagement]


def test_a_sure_judges_yes_probability_is_no_more_than_one(world: Dataset, tmp_path: Path) -> None:
    # In fp32 the two probabilities sum to 1.0000001, whose entropy is no number.
    sure = np.array([-30, -30, -30, 0, -2.943], np.float32)
    labels = write_store(tmp_path / "labels", world, "judge", JUDGE_LABELS, lambda q, row: sure)
    task = build("relevance_teacher", "--task.labels", labels, "--task.label-form", "yes_probability")
    assert {float(target) for example in task.examples for target in example.targets["target"]} == {1.0}


def test_relevance_teacher_leaves_out_what_nobody_judged(world: Dataset) -> None:
    nothing = Pairs(0, np.arange(3, dtype=np.int32), np.full(3, -1, np.int32))
    data = dataclasses.replace(world, pairs=[nothing, *world.pairs[1:]])
    config = configured("relevance_teacher")
    task = RelevanceTeacherTask(config.task, config, data)
    assert [example.query for example in task.examples] == [p.query for p in world.pairs[1:]]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_retriever_of_few_dev_queries_is_measured_and_written(
    world: Dataset, tmp_path: Path, count: int
) -> None:
    few = dataclasses.replace(world, queries={**world.queries, "dev": world.queries["dev"][:count]})
    config = configured("retriever")
    task = RetrieverTask(config.task, few)
    model = filled(lambda rngs: task.init(rngs), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a mean of nothing
        assert np.isnan(task.evaluate(model)["dev/ndcg@10"]) == (count == 0)
    task.export(model, tmp_path, config)
    assert len(load_model(tmp_path).contract.golden) == count


def test_ranker_learns_from_each_teacher_what_that_teacher_scored(world: Dataset, tmp_path: Path) -> None:
    weights = (1.0, 2.0, 0.5, 0.0, 1.0)
    options = [
        "--task.alpha",
        "0.25",
        "--task.listwise-weight",
        "3",
        "--task.list-temperature",
        "0.4",
        "--task.candidates",
        "8",
        "--task.task-weights",
    ]
    task: RankerTask = build("ranker", *ranker_stores(world, tmp_path), *options, *map(str, weights))
    batch = task.batch(np.array([0, 4]), rngs(0, 2))
    logits = answers(task, batch)
    where = batch["items"].where
    rel = where & ~np.isnan(batch["relevance_0"][..., 0])
    eng = where & ~np.isnan(batch["engagement_0"]).any(-1)
    assert 0 < rel.sum() < where.sum()
    assert 0 < eng.sum() < where.sum()
    assert (rel | eng)[where].all()
    log_odds, teacher = logits[..., 0] - logits[..., 1], batch["relevance_0"][..., 0]
    each = binary(sigmoid(batch["engagement_0"][eng]), logits[..., 2:][eng])
    check_masked(
        task,
        batch,
        logits,
        {
            "kl": 0.25 * binary(sigmoid(teacher[rel]), log_odds[rel]).mean(),
            "listwise": 0.25 * 3 * listwise_teacher(log_odds, teacher, rel, 0.4),
            "engagement": 0.75 * (each @ np.array(weights)).mean(),
        },
    )


def test_ranker_targets_are_what_the_teachers_say(world: Dataset, tmp_path: Path) -> None:
    task: RankerTask = build("ranker", *ranker_stores(world, tmp_path))
    assert task.num_examples == 12
    for example in task.examples:
        rows = example.documents.astype(float)
        expected = np.where(rows == 1, np.nan, rows / 4 - example.query / 8)
        np.testing.assert_allclose(example.targets["relevance_0"][:, 0], expected, rtol=1e-5)
        expected = np.where(rows[:, None] == 2, np.nan, rows[:, None] / 5 - np.arange(5) / 3)
        np.testing.assert_allclose(example.targets["engagement_0"], expected, rtol=1e-5, atol=1e-6)


def test_ranker_without_an_engagement_teacher(world: Dataset, tmp_path: Path) -> None:
    task: RankerTask = build(
        "ranker", *ranker_stores(world, tmp_path)[:2], "--task.alpha", "0.25", "--task.candidates", "8"
    )
    assert task.actions == ()
    batch = task.batch(np.array([0, 4]), rngs(0, 2))
    logits = answers(task, batch)
    where, log_odds = batch["items"].where, logits[..., 0] - logits[..., 1]
    teacher = batch["relevance_0"][..., 0]
    kl = binary(sigmoid(teacher[where]), log_odds[where]).mean()
    lists = listwise_teacher(log_odds, teacher, where, 0.5)
    check_masked(task, batch, logits, {"kl": kl, "listwise": 2.0 * lists})


def test_engagement_loss(world: Dataset) -> None:
    weights = (1.0, 2.0, 0.5, 4.0, 1.0)
    task = build("engagement_teacher", "--task.task-weights", *map(str, weights))
    batch = task.batch(np.array([0, 3]), rngs(0, 2))
    logits = answers(task, batch)
    done, log_odds = batch["actions"], logits[..., 2:]
    each = np.where(done == 1, -np.log(sigmoid(log_odds)), -np.log(sigmoid(-log_odds)))
    each = np.where(np.isnan(done), 0, each)  # not eligible, or no impression
    check_masked(task, batch, logits, {"loss": float((each @ np.array(weights)).sum() / 10)})


def test_language_model_loss_counts_existing_tokens(funnel: Funnel, world: Dataset) -> None:
    task: LanguageModelTask = build("base", *from_start(funnel, "base"))
    model = task.init(nnx.Rngs(0))
    batch = task.batch(np.array([0, 1]), rngs(0, 2))
    text = batch["text"]
    run = jax.jit(task.loss)
    total, weight = run(model, batch, jax.random.key(0)).terms()["loss"]
    assert int(weight) == text.where[:, 1:].sum() == text.where.sum() - len(text.where)
    wild = {"text": text._replace(tokens=np.where(text.where, text.tokens, 7))}
    assert float(run(model, wild, jax.random.key(0)).terms()["loss"][0]) == pytest.approx(
        float(total), rel=1e-6
    )
    assert 3 < float(total) / float(weight) < 8


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def test_retriever_loss(world: Dataset) -> None:
    """Against the formulas of the paper: who is whose positive, negative, and neither."""
    task: RetrieverTask = build(
        "retriever", "--task.info-nce-weight", "0.6", "--task.temperature", "0.5", "--task.margin", "0.1"
    )
    rng = np.random.default_rng(0)
    # Document 5 is query 0's positive and query 1's negative; document 6 is a positive of both.
    rows = np.array([[5, 6, 1, 2], [6, 7, 5, -1], [3, -1, -1, -1]])
    labels = np.array([[4, 3, 0, 2], [4, 3, 1, 0], [0, 0, 0, 0]], np.float32)
    queries, documents = unit(rng.normal(size=(3, 6))), unit(rng.normal(size=(12, 6)))
    texts = {n: Prefix(np.zeros((n, 2), np.int32), np.ones((n, 2), bool)) for n in (3, 12)}
    batch = {"queries": texts[3], "documents": texts[12], "rows": rows, "labels": labels}

    @jax.jit
    def run(documents: jax.Array) -> Any:
        def loss(documents: jax.Array) -> Any:
            model = lambda tokens, where: queries if len(tokens) == 3 else documents  # noqa: E731
            losses = task.loss(model, batch, jax.random.key(0))  # type: ignore[arg-type]
            return losses.value(), losses.terms()

        return jax.value_and_grad(loss, has_aux=True)(documents)

    contrast, count = 0.0, 0
    for q in range(3):
        own = [4 * q + i for i in range(4) if rows[q, i] >= 0 and labels[q, i] > 2.5]
        mine = {rows[q, i] for i in range(4) if labels[q, i] > 2.5}
        negatives = [
            4 * other + i
            for other in range(3)
            for i in range(4)
            if rows[other, i] >= 0 and 4 * other + i not in own and (other == q or rows[other, i] not in mine)
        ]
        s = documents @ queries[q] / 0.5
        losses = [-np.log(np.exp(s[p]) / (np.exp(s[p]) + np.exp(s[negatives]).sum())) for p in own]
        contrast, count = contrast + (float(np.mean(losses)) if own else 0.0), count + bool(own)
    margins = []
    for q in range(3):
        s = documents[4 * q : 4 * q + 4] @ queries[q]
        for i in range(4):
            for j in range(4):
                if min(rows[q, i], rows[q, j]) >= 0 and labels[q, i] > labels[q, j]:
                    wide = 0.1 * (labels[q, i] - labels[q, j])
                    margins.append(max(0, 1 - (s[i] - s[j]) / wide))
    (value, found), gradient = run(documents)
    terms = {name: (float(t), float(w)) for name, (t, w) in found.items()}
    assert count == 2
    assert terms["info_nce"] == (pytest.approx(0.6 * contrast, rel=1e-5), 2)
    assert terms["margin"] == (pytest.approx(0.4 * sum(margins), rel=1e-5), len(margins))
    assert len(margins) == 6 + 3

    # Padding may hold anything, and nothing flows back into it.
    absent = rows.ravel() < 0
    (wild, _), _ = run(np.where(absent[:, None], np.float32(7), documents))
    assert float(wild) == float(value)
    assert (np.asarray(gradient)[absent] == 0).all()
    assert np.isfinite(gradient).all()
    assert np.abs(np.asarray(gradient)[~absent]).max() > 0


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_ranking_metrics_by_hand(world: Dataset) -> None:
    queries = list(world.queries["dev"][:3])
    # dev0: documents 0 (grade 4), 1 (3), 2 and 3 (0); dev1: one list without anything good; dev2: no candidate at all.
    candidates = [np.array([3, 1, 0]), np.array([7, 6]), np.zeros(0, np.int32)]
    scores = [np.array([0.5, 2.0, 1.0]), np.array([1.0, 1.0]), np.zeros(0)]
    found = ranking_metrics(world, queries, candidates, scores)
    best = 15 + 7 / math.log2(3)
    assert found["ndcg@10"].tolist() == pytest.approx([(7 + 15 / math.log2(3)) / best, 0.0, 0.0])
    assert found["poor_match@10"][:2].tolist() == pytest.approx([1 / 3, 1.0])
    assert np.isnan(found["poor_match@10"][2])
    assert found["mrr"][:2].tolist() == [0.5, 0.0]


def test_candidates_of_an_evaluation(world: Dataset) -> None:
    queries, candidates = evaluation_lists(world, "dev", 2)
    assert [query.id for query in queries] == ["dev0", "dev1"]
    assert candidates[0][0] == 0  # BM25 finds the nurse in Austin
    assert all((rows >= 0).all() for rows in candidates)
    fixed = dataclasses.replace(world, rerank={f"dev{i}": np.array([i, 7]) for i in range(4)})
    assert [rows.tolist() for rows in evaluation_lists(fixed, "dev", 9)[1]] == [
        [0, 7],
        [1, 7],
        [2, 7],
        [3, 7],
    ]


def test_auroc_over_impressions(world: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    task = build("engagement_teacher")
    places = {}

    def score(queries: list[Query], rows: list[np.ndarray]) -> list[np.ndarray]:
        places.update({query.id: found.tolist() for query, found in zip(queries, rows, strict=True)})
        logits = np.zeros((5, 7), np.float32)
        logits[:, 2] = [5, 4, 3, 2, 1]  # click: the first is best, as it was
        logits[:, 3] = [1, 2, 3, 4, 5]  # apply: upside down
        return [logits] * len(queries)

    monkeypatch.setattr(task, "scorer", lambda model: score)
    extra = Query("dev99", "x")  # a query that nothing was shown for
    found = engagement_auroc(task, None, [*world.queries["dev"], extra])
    assert places == {f"dev{i}": [(2 * i + k) % 8 for k in range(5)] for i in range(4)}
    assert (found["click"], found["apply"], found["shortlist"]) == (1.0, 0.0, 0.5)
    assert math.isnan(found["bad_fit"])
    assert engagement_auroc(task, None, [extra]) == {}


def test_a_scorer_is_made_once_and_takes_over_new_weights(world: Dataset) -> None:
    task = build("judge")
    models = [filled(lambda rngs: task.init(rngs), seed) for seed in (1, 2)]
    query, rows = list(world.queries["dev"][:1]), [np.array([0, 1])]
    first = task.scorer(models[0])
    old = first(query, rows)[0]
    shapes = first.prefill.compiled_shapes
    assert task.scorer(models[1]) is first
    new = first(query, rows)[0]
    assert np.abs(new - old).max() > 1e-3
    np.testing.assert_array_equal(task.scorer(models[0])(query, rows)[0], old)
    assert first.prefill.compiled_shapes == shapes


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        ("judge", ["--task.candidates", "0"], "task.candidates is 0: use at least 1"),
        ("judge", ["--task.prompt.kind", "ranker"], "task.prompt.kind is 'ranker': this task needs 'judge'"),
        (
            "judge",
            ["--task.prompt.chat", "qwen3"],
            "task.prompt: control token is '<|endoftext|>': this tokenizer has none",
        ),
        ("judge", ["--task.prompt.max-query-tokens", "3"], "max_query_tokens is 3: shorten it"),
        ("base", ["--task.threshold", "5"], "task.threshold is 5: no training query"),
        (
            "relevance_teacher",
            ["--task.label-form", "mood"],
            "task.label_form is 'mood': use one of expected_grade",
        ),
        ("relevance_teacher", ["--task.labels", "nowhere"], "nowhere holds no score store"),
        (
            "engagement_teacher",
            ["--task.task-weights", "1", "2"],
            "task.task_weights has 2 numbers: give one for each of click",
        ),
        ("ranker", [], "task.relevance_teachers is empty"),
        ("ranker", ["--task.alpha", "1.5"], "task.alpha is 1.5: give a number from 0"),
        ("ranker", ["--task.list-temperature", "0"], "task.list_temperature is 0.0: give a positive number"),
        (
            "ranker",
            ["--task.teachers", "dreamt"],
            "task.teachers is 'dreamt': use one of stored, online, async",
        ),
        (
            "ranker",
            ["--task.relevance-teachers", "a", "--task.temperatures", "1", "2"],
            "task.temperatures is (1.0, 2.0): give a positive number for each of the 1 teachers",
        ),
        (
            "relevance_teacher",
            ["--task.ranking-loss", "mood"],
            "task.ranking_loss is 'mood': use one of listwise",
        ),
        (
            "relevance_teacher",
            ["--task.label-form", "ordinal"],
            "task.prompt.kind is 'ranker': this task needs 'judge'",
        ),
        (
            "engagement_teacher",
            ["--task.mask-below", "2"],
            "task.mask_below is 2.0: give a share from 0 to 1",
        ),
        (
            "retriever",
            ["--task.threshold", "4"],
            "task.threshold is 4.0: no training query has a document above it",
        ),
        ("retriever", ["--task.positives", "0"], "task.positives is 0: use at least 1"),
        ("retriever", ["--task.negatives", "-1"], "task.negatives is -1"),
        ("retriever", ["--task.temperature", "0"], "task.temperature is 0.0"),
        ("retriever", ["--task.margin", "-1"], "task.margin is -1.0"),
        ("retriever", ["--task.info-nce-weight", "1.1"], "task.info_nce_weight is 1.1"),
        (
            "retriever",
            ["--task.query-prompt.kind", "ranker"],
            "task.query_prompt.kind is 'ranker': this task needs 'query'",
        ),
        ("retriever", ["--task.document-prompt.kind", "query"], "task.document_prompt.kind is 'query'"),
    ],
)
def test_refused_before_training(world: Dataset, config: str, options: list[str], words: str) -> None:
    with pytest.raises(InputError) as caught:
        build(config, *options)
    assert words in str(caught.value)


def test_a_data_set_without_impressions(world: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataclasses.replace(world, impressions={})
    monkeypatch.setattr(jaxsearch.tasks.base, "load_dataset", lambda name, folder: data)
    with pytest.raises(
        ConfigError, match="data job_market:tiny has no impressions: an engagement teacher cannot"
    ):
        build("engagement_teacher")
    with pytest.raises(ConfigError, match=r"has no impressions: leave task\.engagement_teachers empty"):
        build("ranker", "--task.relevance-teachers", "r", "--task.engagement-teachers", "e")


def test_stores_that_do_not_fit(world: Dataset, tmp_path: Path) -> None:
    judge = write_store(tmp_path / "j", world, "judge", JUDGE_LABELS, lambda q, row: np.zeros(5))
    short = write_store(tmp_path / "s", world, "ranker", ("Yes",), lambda q, row: np.zeros(1))
    stale = write_store(
        tmp_path / "o", world, "judge", JUDGE_LABELS, lambda q, row: np.zeros(5), fingerprint="0" * 64
    )
    with pytest.raises(ConfigError, match="holds scores of a judge, needed is a ranker's"):
        store_targets(judge, world, "ranker", ("Yes", "No"))
    with pytest.raises(ConfigError, match="has no scores for No: it holds Yes"):
        store_targets(short, world, "ranker", ("Yes", "No"))
    with pytest.raises(StoreError, match="the store is stale"):
        build("retriever", "--task.labels", stale)
    assert len(store_targets(judge, world, "judge", ("4", "0"))) == sum(len(p.documents) for p in world.pairs)


def test_a_store_of_all_queries_serves_the_first_ones_too(world: Dataset, tmp_path: Path) -> None:
    labels = write_store(
        tmp_path, world, "judge", JUDGE_LABELS, lambda q, row: np.eye(5)[grades(q).get(row, 2)] * 20
    )
    task = build("retriever", "--task.labels", labels, "--task.data.max-queries", "3")
    assert task.num_examples == 3
    assert open_data(DataConfig(max_queries=3)).fingerprint == world.fingerprint
    every = {(p.query, int(row)): None for p in world.pairs for row in p.documents}
    first = open_data(DataConfig(max_queries=3))
    assert {q for q, _ in may_learn(every, first, 3)} == {p.query for p in world.pairs[:3]}
    assert may_learn(every, first, 0) == list(every)
    hidden = dataclasses.replace(world, held_out=np.array([2, 5], np.int32))
    assert may_learn(every, hidden, 0) == [(q, row) for q, row in every if row not in (2, 5)]
    # The judge has graded what was shown without a grade, too.
    assert all(isinstance(p, Pairs) and len(p.documents) > 4 for p in task.examples)
    assert max(float(p.grades.max()) for p in task.examples) == pytest.approx(4, abs=1e-3)


def test_the_command_prints_what_is_wrong(
    world: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--config",
        "configs/judge.py:tiny",
        "--workdir",
        str(tmp_path),
        "--task.model.init-from",
        "nowhere",
    ]
    assert main(options) == 2
    assert "train.py: model.init_from is 'nowhere'" in capsys.readouterr().err
    assert main([*options[:4], "--task.prompt.style", "loud"]) == 2
    assert "prompt.style is 'loud'" in capsys.readouterr().err
