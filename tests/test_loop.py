"""The training loop on a toy task: exact accumulation, metrics, schedule, NaN, evaluation and export."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy_task import ToyConfig, ToyModel, ToyTask, toy_config

from jaxsearch.config import ConfigError, MeshConfig, OptimizerConfig, TrainConfig
from jaxsearch.data.pipeline import Pipeline
from jaxsearch.training.loop import Trainer, run
from jaxsearch.training.optimizer import decay_mask, learning_rate, make_optimizer
from jaxsearch.training.sharding import make_mesh
from jaxsearch.training.step import Losses, Tools, TrainState, microbatches
from jaxsearch.training.writers import TIMING


def rows(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def trained(config: TrainConfig, steps: int = 1, task: ToyTask | None = None) -> Trainer:
    """Return a trainer after some steps on the first batches."""
    task = task or ToyTask(config.task)  # type: ignore[arg-type]
    trainer = Trainer(config, task, make_mesh(config.mesh))
    pipeline = Pipeline(task, batch_size=config.batch_size, seed=config.seed)
    trainer.compile(pipeline.batch(0))
    for step in range(steps):
        trainer.step(pipeline.batch(step))
    return trainer


@pytest.mark.parametrize(("accumulation", "two_terms"), [(2, True), (4, False), (8, True)])
def test_accumulation_equals_the_big_batch(two_terms: bool, accumulation: int) -> None:
    # With 8 microbatches some hold nothing but masked examples.
    task = ToyConfig(two_terms=two_terms)
    whole = trained(toy_config(task=task), 3)
    parts = trained(toy_config(task=task, accumulation=accumulation), 3)
    for name, value in whole.window().items():
        assert parts.window()[name] == pytest.approx(value, rel=2e-6), name
    for a, b in zip(jax.tree.leaves(whole.state.params), jax.tree.leaves(parts.state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_microbatches_by_hand() -> None:
    parts = microbatches({"x": jnp.arange(12).reshape(6, 2)}, 3)["x"]
    assert parts.tolist() == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]


def test_losses_by_hand() -> None:
    pair = (jnp.float32(6), jnp.float32(4))
    empty = (jnp.float32(0), jnp.float32(0))
    assert float(Losses(pair).value()) == 1.5
    assert float(Losses({"a": pair, "b": (jnp.float32(1), jnp.float32(2)), "c": empty}).value()) == 2.0
    gradient = jax.grad(lambda x: Losses((x * 0, x * 0)).value())(jnp.float32(3))
    assert float(gradient) == 0


class AllMasked(ToyTask):
    """Nothing to learn from."""

    def batch(self, indices: np.ndarray, rngs: Any) -> dict[str, Any]:
        return super().batch(indices, rngs) | {"where": np.zeros(len(indices), bool)}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_all_masked_batch_changes_nothing(accumulation: int) -> None:
    config = toy_config(accumulation=accumulation, optimizer=OptimizerConfig(weight_decay=0))
    before = trained(config, 0, AllMasked(ToyConfig()))
    after = trained(config, 2, AllMasked(ToyConfig()))
    assert after.window()["loss"] == 0
    assert np.isnan(after.window()["mae"])
    assert int(after.state.bad_step) == 0
    for a, b in zip(jax.tree.leaves(before.state.params), jax.tree.leaves(after.state.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_pass_that_counts_weights_computes_no_model() -> None:
    """The weights of microbatches cost no forward pass: the compiler drops it."""
    text = {}
    for accumulation in (1, 2):
        config = toy_config(accumulation=accumulation)
        task = ToyTask(config.task)  # type: ignore[arg-type]
        trainer = Trainer(config, task, make_mesh(config.mesh))
        batch = Pipeline(task, batch_size=8, seed=0).batch(0)
        trainer.compile(batch)
        lowered = trainer._jitted.lower(trainer.state, trainer._frozen, batch)  # type: ignore[attr-defined]
        text[accumulation] = lowered.compile().as_text().count("tanh")
    assert text[2] == text[1]
    assert text[1] > 0


def test_only_the_trainable_move_and_the_random_stream_advances() -> None:
    config = toy_config(task=ToyConfig(noise_scale=0.1))
    before, after = trained(config, 0), trained(config, 3)
    start, end = before.model(), after.model()
    assert isinstance(start, ToyModel)
    assert isinstance(end, ToyModel)
    np.testing.assert_array_equal(start.teacher[...], end.teacher[...])
    assert float(jnp.abs(start.inner[...] - end.inner[...]).max()) > 1e-4
    assert int(end.noise.noise.count[...]) == 3
    assert int(trained(dataclasses.replace(config, accumulation=2), 3).model().noise.noise.count[...]) == 6  # type: ignore[attr-defined]


def test_rows_are_means_over_their_window(tmp_path: Path) -> None:
    run(toy_config(log_every=1, steps=5), tmp_path / "one")
    run(toy_config(log_every=2, steps=5), tmp_path / "two")
    each = [row for row in rows(tmp_path / "one") if row["kind"] == "train"]
    pairs = [row for row in rows(tmp_path / "two") if row["kind"] == "train"]
    assert [row["step"] for row in each] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in pairs] == [2, 4, 5]
    assert pairs[0]["loss"] == pytest.approx((each[0]["loss"] + each[1]["loss"]) / 2, rel=1e-6)
    assert pairs[1]["grad_norm"] == pytest.approx((each[2]["grad_norm"] + each[3]["grad_norm"]) / 2, rel=1e-6)
    assert pairs[2]["loss"] == pytest.approx(each[4]["loss"], rel=1e-6)
    assert pairs[1]["lr"] == each[3]["lr"]
    assert {*TIMING, "step", "kind", "loss", "mae", "grad_norm", "lr"} == {*pairs[0], "mfu", "memory_gib"}
    assert 0 <= pairs[2]["data_wait"] <= 1
    assert pairs[1]["examples_per_s"] > 0
    assert list((tmp_path / "two" / "tensorboard").glob("events*"))


def test_evaluation_and_export(tmp_path: Path) -> None:
    final = run(toy_config(eval_every=4), tmp_path)
    kinds = [(row["kind"], row["step"]) for row in rows(tmp_path)]
    assert kinds == [("eval", 4), ("train", 5), ("eval", 8), ("train", 10), ("final", 10)]
    assert rows(tmp_path)[-1]["norm"] == pytest.approx(final["norm"])
    weights = np.load(tmp_path / "model" / "weights.npz")["inner"]
    assert float(np.linalg.norm(weights)) == pytest.approx(final["norm"], rel=1e-6)
    assert not (tmp_path / "model.tmp").exists()
    assert json.loads((tmp_path / "config.json").read_text())["task"]["class"] == "ToyConfig"
    # A finished run evaluates and exports again, and trains no more.
    assert run(toy_config(eval_every=4), tmp_path) == final
    assert [(row["kind"], row["step"]) for row in rows(tmp_path)] == kinds


def test_training_learns(tmp_path: Path) -> None:
    optimizer = OptimizerConfig(learning_rate=0.1, warmup_steps=3)
    run(toy_config(steps=60, log_every=10, batch_size=24, optimizer=optimizer), tmp_path)
    losses = [row["loss"] for row in rows(tmp_path) if row["kind"] == "train"]
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(("accumulation", "log_every"), [(1, 100), (2, 1)])
def test_nan_names_step_and_examples_and_saves_nothing(
    tmp_path: Path, accumulation: int, log_every: int
) -> None:
    # Example 7 comes first at the second step.
    config = toy_config(
        task=ToyConfig(poison=7), log_every=log_every, accumulation=accumulation, steps=9, batch_size=4
    )
    pipeline = Pipeline(ToyTask(ToyConfig()), batch_size=4, seed=0)
    step = next(step for step in range(9) if 7 in pipeline.indices(step))
    assert step > 0
    with pytest.raises(FloatingPointError) as error:
        run(config, tmp_path)
    assert f"at step {step + 1}," in str(error.value)
    for index in pipeline.indices(step):
        assert f"toy-{index}" in str(error.value)
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
    assert not (tmp_path / "model").exists()
    assert all(row["loss"] is not None for row in rows(tmp_path))


class InBatchNegatives(ToyTask):
    """A task that cannot be accumulated."""

    accumulable = False


def test_misfits_are_refused(tmp_path: Path) -> None:
    task = InBatchNegatives(ToyConfig())
    with pytest.raises(
        ConfigError, match=r"accumulation is 2, but InBatchNegatives .* set accumulation to 1"
    ):
        run(toy_config(accumulation=2), tmp_path / "a", task=task)
    with pytest.raises(ConfigError, match=r"batch_size is 8: expected a multiple of .* = 16"):
        run(toy_config(accumulation=2, mesh=MeshConfig(data=8)), tmp_path / "b")


class Twice(ToyTask):
    """A step of its own: two updates for each batch."""

    def step(self, state: TrainState, batch: Any, key: jax.Array, tools: Tools) -> tuple[TrainState, Losses]:
        state, _ = super().step(state, batch, key, tools)
        return super().step(state, batch, key, tools)


def test_a_task_may_bring_its_own_step(tmp_path: Path) -> None:
    task = Twice(ToyConfig())
    trainer = trained(toy_config(), 3, task)
    assert int(trainer.state.step) == 3
    assert int(trainer.state.opt_state[1][0].count) == 6


class NamedTwice(ToyTask):
    """A metric that takes a reserved name."""

    def loss(self, model: ToyModel, batch: Any, key: jax.Array) -> Losses:
        losses = super().loss(model, batch, key)
        return Losses(losses.total, {"lr": losses.metrics["mae"]})


def test_reserved_metric_names_are_refused() -> None:
    with pytest.raises(ValueError, match="metrics named twice: lr"):
        trained(toy_config(), 1, NamedTwice(ToyConfig()))


def test_schedule_by_hand() -> None:
    optimizer = OptimizerConfig(learning_rate=0.8, warmup_steps=4, final_fraction=0.5)
    schedule = learning_rate(toy_config(steps=12, optimizer=optimizer))
    assert float(schedule(0)) == pytest.approx(0.2)
    assert float(schedule(2)) == pytest.approx(0.5)
    assert float(schedule(4)) == pytest.approx(0.8)
    assert float(schedule(8)) == pytest.approx(0.6)
    assert float(schedule(12)) == pytest.approx(0.4)
    longer = dataclasses.replace(optimizer, decay_steps=20)
    assert float(learning_rate(toy_config(steps=12, optimizer=longer))(12)) == pytest.approx(0.6)


def test_weight_decay_spares_norms_and_embeddings() -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.scale = nnx.Param(jnp.ones((2, 3)), axes=("layer", "embed"))
            self.up = nnx.Param(jnp.ones((2, 3, 4)), axes=("layer", "embed", "mlp"))
            self.table = nnx.Param(jnp.ones((5, 3)), axes=("vocab", "embed"))
            self.bias = nnx.Param(jnp.ones(3))
            self.plain = nnx.Param(jnp.ones((3, 3)))

    params = nnx.state(Model(), nnx.Param)
    expected = {"scale": False, "up": True, "table": False, "bias": False, "plain": True}
    assert decay_mask(params, decay_embeddings=False) == expected
    assert decay_mask(params, decay_embeddings=True) == expected | {"table": True}

    config = toy_config(optimizer=OptimizerConfig(learning_rate=0.1, weight_decay=0.5))
    optimizer = make_optimizer(config, params)
    values = nnx.to_pure_dict(params)
    zero = jax.tree.map(jnp.zeros_like, values)
    updates, _ = jax.jit(optimizer.update)(zero, jax.jit(optimizer.init)(values), values)
    # Without a gradient only the decay moves: - learning rate * decay * parameter.
    assert {name: float(x.ravel()[0]) for name, x in updates.items()} == pytest.approx(
        {name: -0.05 if moves else 0 for name, moves in expected.items()}
    )


def test_clipping() -> None:
    params = nnx.state(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), nnx.Param)
    values = nnx.to_pure_dict(params)
    grads = {"kernel": jnp.full((1, 1), 3.0), "bias": jnp.full((1,), 4.0)}
    for clip, seen in [(1.0, 0.6), (0.0, 3.0), (10.0, 3.0)]:
        config = toy_config(optimizer=OptimizerConfig(clip_norm=clip, b1=0.5))
        optimizer = make_optimizer(config, params)
        _, state = jax.jit(optimizer.update)(grads, jax.jit(optimizer.init)(values), values)
        assert float(state[1][0].mu["kernel"][0, 0]) == pytest.approx(0.5 * seen)
