"""Where parameters and batches lie on the mesh, and that sharded training equals unsharded training."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from toy_task import ToyConfig, toy_config

from jaxsearch.config import MeshConfig, OptimizerConfig, TrainConfig
from jaxsearch.data.pipeline import Pipeline
from jaxsearch.models.decoder import Decoder, DecoderConfig
from jaxsearch.training.loop import Trainer
from jaxsearch.training.sharding import (
    make_mesh,
    optimizer_shardings,
    parameter_shardings,
    parameter_spec,
    put_batch,
)
from jaxsearch.training.step import Batch, Losses
from jaxsearch.training.task import Task

MESHES = [(8, 1, 1), (2, 2, 2), (1, 4, 2)]


def test_mesh_shapes() -> None:
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(MeshConfig(data=-1, tensor=2)).shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    with pytest.raises(
        ValueError, match=r"mesh\.data 4, mesh\.fsdp 3, mesh\.tensor 1 do not fit on 8 devices"
    ):
        make_mesh(MeshConfig(4, 3))
    with pytest.raises(ValueError, match="do not fit on 8 devices"):
        make_mesh(MeshConfig(-1, 3))


def test_specs(caplog: pytest.LogCaptureFixture) -> None:
    mesh = make_mesh(MeshConfig(2, 2, 2))
    q = parameter_spec("q", (3, 8, 4, 16), ("layer", "embed", "heads", "head_dim"), mesh)
    assert q == PartitionSpec(None, "fsdp", "tensor", None)
    assert parameter_spec("table", (10, 8), ("vocab", "embed"), mesh) == PartitionSpec("tensor", "fsdp")
    assert parameter_spec("square", (8, 8), ("mlp", "heads"), mesh) == PartitionSpec("tensor", None)
    assert parameter_spec("plain", (8, 8), None, mesh) == PartitionSpec()
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        kept = parameter_spec("layers.k", (8, 3, 16), ("embed", "kv_heads", "head_dim"), mesh)
    assert kept == PartitionSpec("fsdp", None, None)
    assert caplog.messages == [
        "parameter layers.k: axis kv_heads of size 3 stays whole, mesh.tensor 2 does not divide it"
    ]
    with pytest.raises(
        ValueError, match="parameter x has unknown logical axis 'wide': known are layer, actions, vocab"
    ):
        parameter_spec("x", (8,), ("wide",), mesh)
    with pytest.raises(ValueError, match=r"parameter x of shape \(8,\) has 2 logical axes"):
        parameter_spec("x", (8,), ("embed", "mlp"), mesh)


def test_moments_lie_like_their_parameters() -> None:
    mesh = make_mesh(MeshConfig(2, 2, 2))
    params = nnx.state(nnx.eval_shape(lambda: DecoderTask().init(nnx.Rngs(0))), nnx.Param)
    shardings = parameter_shardings(params, mesh)
    optimizer = optax.adamw(1e-3)
    values = nnx.to_pure_dict(params)
    placed = optimizer_shardings(jax.eval_shape(optimizer.init, values), shardings, mesh)
    assert placed[0].mu == shardings
    assert placed[0].nu == shardings
    assert placed[0].count.spec == PartitionSpec()
    assert shardings["layers"]["up"].spec == PartitionSpec(None, "fsdp", "tensor")


def test_batches() -> None:
    mesh = make_mesh(MeshConfig(2, 2, 2))
    placed = put_batch({"x": np.arange(16).reshape(8, 2), "many": {"y": np.zeros((12, 3))}}, mesh)
    assert placed["x"].addressable_shards[0].data.shape == (2, 2)
    assert placed["many"]["y"].addressable_shards[0].data.shape == (3, 3)
    np.testing.assert_array_equal(placed["x"], np.arange(16).reshape(8, 2))
    with pytest.raises(ValueError, match=r"batch\['y'\] of shape \(6,\): .* mesh\.fsdp = 4"):
        put_batch({"y": np.zeros(6)}, mesh)
    with pytest.raises(ValueError, match=r"batch\['y'\] of shape \(\)"):
        put_batch({"y": np.float32(3)}, mesh)


class DecoderTask(Task):
    """Next-token prediction with a small decoder on counted sequences."""

    num_examples = 64
    attention = ""

    def init(self, rngs: nnx.Rngs) -> Decoder:
        config = DecoderConfig(
            vocab_size=32, layers=2, width=16, heads=4, kv_heads=2, head_dim=8, mlp_width=32,
            rope_theta=1e4, rms_eps=1e-6, qk_norm=True, tied=True, attention=self.attention,
        )  # fmt: skip
        return Decoder(config, rngs=rngs)

    def batch(self, indices: np.ndarray, rngs: Sequence[np.random.Generator]) -> Batch:
        steps = 1 + indices[:, None] % 5
        tokens = (indices[:, None] + steps * np.arange(12)[None]) % 32
        return {"tokens": tokens.astype(np.int32), "where": np.arange(12)[None] < 6 + indices[:, None] % 7}

    def loss(self, model: Decoder, batch: Batch, key: jax.Array) -> Losses:
        tokens, where = batch["tokens"], batch["where"]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        hidden, _ = model(model.embed(tokens), positions, model.causal(where))
        loss = optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden[:, :-1]), tokens[:, 1:])
        mask = where[:, 1:].astype(jnp.float32)
        return Losses(((loss * mask).sum(), mask.sum()))

    def evaluate(self, model: Any) -> dict[str, float]:
        return {}

    def export(self, model: Any, folder: Path, config: TrainConfig) -> None:
        return None


def train(config: TrainConfig, task: Task, steps: int = 20) -> tuple[np.ndarray, Trainer]:
    """Return the loss of each step, and the trainer after the last."""
    mesh = make_mesh(config.mesh)
    trainer = Trainer(config, task, mesh)
    pipeline = Pipeline(task, batch_size=config.batch_size, seed=config.seed)
    trainer.compile(put_batch(pipeline.batch(0), mesh))
    out = []
    for step in range(steps):
        trainer.reset_window()
        trainer.step(put_batch(pipeline.batch(step), mesh))
        out.append(trainer.window()["loss"])
    return np.array(out), trainer


def config_of(mesh: tuple[int, int, int], **changes: Any) -> TrainConfig:
    return toy_config(
        steps=20,
        batch_size=16,
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        mesh=MeshConfig(*mesh),
        **changes,
    )


@pytest.fixture(scope="module")
def unsharded() -> np.ndarray:
    return train(config_of((1, 1, 1)), DecoderTask())[0]


@pytest.mark.parametrize(("mesh", "accumulation"), [*((mesh, 1) for mesh in MESHES), ((2, 2, 2), 4)])
def test_sharded_equals_unsharded(
    unsharded: np.ndarray, mesh: tuple[int, int, int], accumulation: int
) -> None:
    losses, trainer = train(config_of(mesh, accumulation=accumulation), DecoderTask())
    difference = np.abs(losses / unsharded - 1)
    assert difference[0] <= 1e-5
    assert difference[19] <= 1e-3
    assert unsharded[19] < 0.95 * unsharded[0]
    # Parameters and moments stay where the rules put them.
    for up in (trainer.state.params, trainer.state.opt_state[1][0].mu):
        array = up["layers"]["up"]
        assert array.shape == (2, 16, 32)
        assert array.addressable_shards[0].data.shape == (2, 16 // mesh[1], 32 // mesh[2])


def test_the_kernel_is_split_over_devices(unsharded: np.ndarray) -> None:
    task = DecoderTask()
    task.attention = "pallas_interpret"
    losses, _ = train(config_of((2, 2, 2)), task, 3)
    np.testing.assert_allclose(losses, unsharded[:3], rtol=1e-5)


def test_sharded_equals_unsharded_with_two_terms_and_noise() -> None:
    toy = ToyConfig(two_terms=True, noise_scale=0.1)
    one, many = (config_of(mesh, task=toy) for mesh in [(1, 1, 1), (2, 2, 2)])
    np.testing.assert_allclose(
        train(one, toy.build(one), 5)[0], train(many, toy.build(many), 5)[0], rtol=1e-5
    )
