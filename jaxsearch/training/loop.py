"""The training loop: config -> mesh -> state -> step -> metrics, checkpoints, evaluation, export."""

import dataclasses
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxsearch.config import ConfigError, TrainConfig, to_dict
from jaxsearch.data.pipeline import Pipeline
from jaxsearch.numerics import wide
from jaxsearch.training.checkpoints import Checkpoints
from jaxsearch.training.distributed import check_agreement, on_host
from jaxsearch.training.flops import count_flops
from jaxsearch.training.health import choose, examine, first_health
from jaxsearch.training.interruption import PATIENCE, Preempted, StopRequest, Watchdog, leave_lost
from jaxsearch.training.optimizer import learning_rate, make_optimizer
from jaxsearch.training.profile import Profiler
from jaxsearch.training.sharding import (
    make_mesh,
    optimizer_shardings,
    parameter_shardings,
    put_abstract,
    put_batch,
    replicated,
)
from jaxsearch.training.step import Batch, Losses, Mean, Tools, TrainState, split_model
from jaxsearch.training.task import Task
from jaxsearch.training.throughput import count_tokens, peak_memory, total_peak
from jaxsearch.training.writers import MetricsWriter, Progress

log = logging.getLogger(__name__)

RESERVED = ("step", "kind", "lr", "grad_norm", "skipped")


class Trainer:
    """A task on a mesh: its state, its compiled step, and the model at any moment.

    Args:
        config: the training configuration.
        task: what to train.
        mesh: devices.
        abstract: hold shapes alone, to compile for devices that are not there (`trace`).

    Attributes:
        mesh: devices.
        faults: what is done about bad steps.
        state: the current state; a step consumes it.
    """

    def __init__(self, config: TrainConfig, task: Task, mesh: Mesh, *, abstract: bool = False) -> None:
        self._config, self._task, self.mesh, self.faults = config, task, mesh, config.faults
        self._put = put_abstract if abstract else jax.device_put
        with jax.default_device(_host()):
            rngs = nnx.Rngs(config.seed)
            model = nnx.eval_shape(lambda: task.init(nnx.Rngs(config.seed))) if abstract else task.init(rngs)
        self._trainable = task.trainable()
        self._graphdef, params, frozen, rest = split_model(model, self._trainable)
        if not jax.tree.leaves(params):
            raise ValueError(f"{type(task).__name__}.trainable() selects no parameter")
        self._optimizer = make_optimizer(config, params)
        self._frozen = self._put(nnx.to_pure_dict(frozen), parameter_shardings(frozen, mesh))
        self.state = self._first_state(params, nnx.to_pure_dict(rest))
        log.info(
            "%s: %s parameters train, %s are frozen; mesh %s",
            config.name, f"{_count(params):,}", f"{_count(frozen):,}", dict(mesh.shape),
        )  # fmt: skip

    def _first_state(self, params: nnx.State, rest: Any) -> TrainState:
        shardings = parameter_shardings(params, self.mesh)
        placed = self._put(nnx.to_pure_dict(params), shardings)
        opt_shapes = jax.eval_shape(self._optimizer.init, placed)
        opt_shardings = optimizer_shardings(opt_shapes, shardings, self.mesh)
        whole = replicated(self.mesh)
        return TrainState(
            step=self._put(np.int32(0), whole),
            params=placed,
            opt_state=put_abstract(opt_shapes, opt_shardings)
            if self._put is put_abstract
            else jax.jit(self._optimizer.init, out_shardings=opt_shardings)(placed),
            rest=self._whole(rest),
            grad_norm=self._put(np.zeros((), wide()), whole),
            window={},
            bad_step=self._put(np.int32(0), whole),
            health=self._put(first_health(), whole),
        )

    def _whole(self, rest: Any) -> Any:
        """Variables that are not parameters, on every device; random keys cannot be put on other processes' devices as they are."""
        whole = replicated(self.mesh)
        if self._put is put_abstract or jax.process_count() == 1:
            return self._put(rest, whole)
        return jax.jit(lambda: rest, out_shardings=jax.tree.map(lambda _: whole, rest))()

    def _tools(self, frozen: Any) -> Tools:
        return Tools(self._graphdef, self._trainable, frozen, self._optimizer, self._config.accumulation)

    def _step(self, state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, dict[str, Mean]]:
        key = jax.random.fold_in(jax.random.key(self._config.seed), state.step)
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):  # for `models.decoder.split_batch`
            new, losses = self._task.step(state, batch, key, self._tools(frozen))
        values = _values(losses, new.grad_norm)
        faults = self._config.faults
        good, health, stop = examine(faults, state.health, values["loss"][0], new.grad_norm)
        bad = jnp.where((state.bad_step == 0) & stop, state.step + 1, state.bad_step)
        if faults.on_bad_step == "skip":
            new, values = choose(good, (new, values), (state, jax.tree.map(jnp.zeros_like, values)))
            values["skipped"] = (jnp.asarray(~good, wide()), jnp.ones((), wide()))
        return dataclasses.replace(
            new, step=state.step + 1, bad_step=bad, health=health, window=state.window
        ), values

    def _windowed(self, state: TrainState, frozen: Any, batch: Batch) -> TrainState:
        new, values = self._step(state, frozen, batch)
        return dataclasses.replace(new, window=jax.tree.map(jnp.add, state.window, values))

    def compile(self, batch: Batch) -> None:
        """Prepare the step for batches like this one (others are compiled when they come)."""
        values = jax.eval_shape(self._step, self.state, self._frozen, batch)[1]
        self._zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), values)
        self.reset_window()
        self._jitted = jax.jit(
            self._windowed,
            donate_argnums=0,
            out_shardings=jax.tree.map(lambda x: x.sharding, self.state),
        )

    def trace(self, batch: Batch) -> jax.stages.Traced:
        """Return the step that `compile` prepared, to lower and compile it without running it."""
        return self._jitted.trace(*self.arguments(batch))

    def arguments(self, batch: Batch) -> tuple[TrainState, Any, Batch]:
        """Return what the step is called with."""
        return self.state, self._frozen, batch

    def step(self, batch: Batch) -> None:
        """Advance the state by one step; returns before the devices are done."""
        self.state = self._jitted(self.state, self._frozen, batch)

    def reset_window(self) -> None:
        """Forget the sums of metrics."""
        zeros = self._put(self._zeros, replicated(self.mesh))
        self.state = dataclasses.replace(self.state, window=zeros)

    def window(self) -> dict[str, float]:
        """Return the metrics since the last reset; waits for the devices. A metric without weight is NaN."""
        sums = jax.device_get(self.state.window)
        return {
            name: float(total) / float(weight) if weight else float("nan")
            for name, (total, weight) in sums.items()
        }

    def model(self) -> nnx.Module:
        """Return the module with the current parameters; use it before the next step, which consumes them.

        In a job of several processes it is whole on each of them, in host memory; call it in all of them.
        """
        frozen, params, rest = self._frozen, self.state.params, self.state.rest
        if jax.process_count() > 1:
            frozen, params = on_host((frozen, params))
        return self._tools(frozen).model(params, rest)


def _host() -> jax.Device:
    """Return a CPU device, so that a model larger than one accelerator is made in host memory."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def _count(params: nnx.State) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def _values(losses: Losses, grad_norm: jax.Array) -> dict[str, Mean]:
    one = jnp.ones((), wide())
    named = {name: pair for name, pair in losses.terms().items() if name != "loss"}
    clash = (set(named) & set(losses.metrics)) | (set(losses.metrics) & {*RESERVED, "loss"})
    if clash:
        raise ValueError(f"metrics named twice: {', '.join(sorted(clash))}")
    pairs = {
        "loss": (losses.value(), one),
        **named,
        **losses.metrics,
        "grad_norm": (grad_norm, one),
    }
    return jax.tree.map(lambda x: jnp.asarray(x, wide()), pairs)


def check_layout(config: TrainConfig, task: Task, mesh: Mesh) -> None:
    """Refuse an accumulation or a batch that task and mesh cannot divide.

    Raises:
        ConfigError: names the field.
    """
    if config.accumulation > 1 and not task.accumulable:
        raise ConfigError(
            f"accumulation is {config.accumulation}, but {type(task).__name__} compares the examples of a "
            "batch with each other and cannot be accumulated: set accumulation to 1"
        )
    parts = config.accumulation * mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch_size % parts:
        raise ConfigError(
            f"batch_size is {config.batch_size}: expected a multiple of "
            f"accumulation * mesh.data * mesh.fsdp = {parts}"
        )


def _stop_if_bad(trainer: Trainer, task: Task, pipeline: Pipeline) -> None:
    """Raise if a step so far was bad, or too many in a row were; waits for the devices."""
    bad = int(trainer.state.bad_step)
    if bad:
        ids = task.example_ids(pipeline.indices(bad - 1))
        raise FloatingPointError(
            f"the loss or its gradient is not finite{_spike(trainer)} at step {bad}, on the examples {', '.join(ids)}; "
            "no checkpoint was written since. Lower optimizer.learning_rate, look at these examples, or set "
            "faults.on_bad_step to skip"
        )


def _spike(trainer: Trainer) -> str:
    faults = trainer.faults
    text = (
        f", or above {faults.spike_factor:g} times its running mean (faults.spike_factor),"
        if faults.spike_factor
        else ""
    )
    if faults.on_bad_step == "skip":
        text += f" for more than faults.skip_limit = {faults.skip_limit} steps in a row, the last"
    return text


def _export(task: Task, model: nnx.Module, workdir: Path, config: TrainConfig) -> None:
    """Put the model at `workdir/model`, whole or not at all."""
    folder, temporary = workdir / "model", workdir / "model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    task.export(model, temporary, config)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


class Guards(NamedTuple):
    """What looks on while the steps run."""

    request: StopRequest
    watchdog: Watchdog
    profiler: Profiler


def run(
    config: TrainConfig, workdir: str | Path, *, task: Task | None = None, stop_at: int | None = None
) -> dict[str, float]:
    """Train, or go on with what `workdir` holds, then evaluate and export to `workdir/model`.

    Args:
        config: the training configuration.
        workdir: folder of the run: config.json, metrics.jsonl, tensorboard/, checkpoints/, model/.
        task: used instead of building it from the configuration.
        stop_at: save and return after this many steps, as if interrupted: no evaluation, no export.

    Returns:
        The final evaluation; nothing when stopped early.

    Raises:
        ConfigError: the configuration does not fit the task, the mesh or the run in `workdir`.
        CheckpointError: the checkpoint to go on from cannot be read; names its folder.
        FloatingPointError: a bad step under `faults`; names step and examples. Nothing is saved after it.
        Preempted: SIGTERM came; the state after the last step is saved.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    mesh = make_mesh(config.mesh)
    checkpoints = Checkpoints(workdir, config.checkpoint)
    checkpoints.check_config(config)
    task = config.task.build(config) if task is None else task
    check_agreement(to_dict(config), task.data_version)
    check_layout(config, task, mesh)
    pipeline = Pipeline(
        task,
        batch_size=config.batch_size,
        seed=config.seed,
        process=(jax.process_index(), jax.process_count()),
        prefetch=task.prefetch,
    )
    trainer = Trainer(config, task, mesh)
    trainer.compile(put_batch(pipeline.batch(0), mesh))
    start = checkpoints.latest() or 0
    if start > config.steps:
        raise ConfigError(f"steps is {config.steps}, but {workdir} already holds a checkpoint after {start}")
    if start:
        trainer.state = checkpoints.restore(start, trainer.state)
        log.info("resuming after step %d", start)

    first = jax.process_index() == 0
    writer = MetricsWriter(workdir, step=start, log_every=config.log_every, enabled=first)
    stop = min(stop_at or config.steps, config.steps)
    try:
        with (
            StopRequest() as request,
            Watchdog(config.faults.watchdog_seconds) as watchdog,
            Profiler(workdir / "profile", config.profiled) as profiler,
        ):
            guards = Guards(request, watchdog, profiler)
            _train(config, task, trainer, pipeline, checkpoints, writer, start, stop, guards)
        if stop < config.steps:
            return {}
        final = _finish(config, task, trainer, checkpoints)
        writer.write("final", stop, final)
        model = trainer.model()
        if first:
            _export(task, model, workdir, config)
        return final
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() > 1:
            leave_lost(error)
        raise
    finally:
        writer.close()
        checkpoints.close()


def _finish(config: TrainConfig, task: Task, trainer: Trainer, checkpoints: Checkpoints) -> dict[str, float]:
    """Evaluate the last state, and the best one if that is another, which then is the trainer's."""
    final = task.evaluate(trainer.model())
    checkpoints.offer(config.steps, trainer.state, final)
    best = checkpoints.best()
    if best is None or best == config.steps:
        return final
    trainer.state = checkpoints.restore_best(trainer.state)
    log.info("exporting the state after step %d, the best by %s", best, config.checkpoint.best)
    return task.evaluate(trainer.model())


def _train(
    config: TrainConfig,
    task: Task,
    trainer: Trainer,
    pipeline: Pipeline,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    start: int,
    stop: int,
    guards: Guards,
) -> None:
    request, watchdog, profiler = guards
    schedule = learning_rate(config)
    progress = Progress(config.name, start, config.steps, config.batch_size, jax.process_index() == 0)
    batches = pipeline.batches(start, stop)
    peak, flops = total_peak(config.peak_flops), 0.0
    try:
        for step in range(start + 1, stop + 1):
            before = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - before
            profiler.before(step, trainer.state)
            placed = put_batch(batch, trainer.mesh)
            if peak and not flops:
                flops = count_flops(trainer.trace(placed).jaxpr)
            trainer.step(placed)
            progress.advance(waited, pipeline.ahead, count_tokens(batch) * jax.process_count())
            if config.faults.watchdog_seconds:
                jax.block_until_ready(trainer.state.step)
                watchdog.alive()
            preempted = request.due(step)
            if step == start + 1:
                _stop_if_bad(trainer, task, pipeline)
                progress.restart()  # leaves compilation out of the rate
            if step % config.log_every == 0 or step == config.steps:
                _stop_if_bad(trainer, task, pipeline)
                row = trainer.window() | {"lr": float(schedule(step - 1))} | progress.timing() | peak_memory()
                if peak:
                    row["mfu"] = flops / row["step_seconds"] / peak
                writer.write("train", step, row)
                progress.show(step, row)
                if step % config.log_every == 0:
                    trainer.reset_window()
                progress.restart()
            if config.eval_every and step % config.eval_every == 0 and step < config.steps:
                _stop_if_bad(trainer, task, pipeline)
                watchdog.alive(PATIENCE)
                figures = task.evaluate(trainer.model())
                writer.write("eval", step, figures)
                checkpoints.offer(step, trainer.state, figures)
                watchdog.alive()
                progress.restart()
            # Last, so that a checkpoint never stands for a step whose rows are still missing.
            regular = config.checkpoint.every and step % config.checkpoint.every == 0
            if step == stop or regular or preempted:
                _stop_if_bad(trainer, task, pipeline)
                watchdog.alive(PATIENCE)
                checkpoints.save(step, trainer.state)
                watchdog.alive()
                progress.restart()
            if preempted and step < stop:
                raise Preempted(f"stopped by SIGTERM; saved after step {step}, start it again to go on")
    finally:
        progress.close()
