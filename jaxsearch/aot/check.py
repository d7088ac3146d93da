"""Compile a configuration's train step, or its scoring call, for chips that are not here: what it needs and what bounds its speed."""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxsearch.aot.hlo import Work, read_work
from jaxsearch.config import ConfigError, TrainConfig
from jaxsearch.scoring.buckets import Buckets
from jaxsearch.scoring.packing import PackedItems, packed_shape
from jaxsearch.scoring.prefill import Prefix, prefix_shape, score
from jaxsearch.tasks.cross_encoder import CrossEncoderTask
from jaxsearch.tasks.retriever import RetrieverTask
from jaxsearch.training.chips import Chip, find_chip
from jaxsearch.training.flops import count_flops
from jaxsearch.training.loop import Trainer, check_layout
from jaxsearch.training.sharding import BATCH, make_mesh, parameter_shardings, put_abstract, replicated
from jaxsearch.training.task import Task

TOWER_TOKENS = 8192
"""Of one call of `scoring.records.Embedder`."""


@dataclass(frozen=True)
class Report:
    """What one device needs for one call of a program, and how fast that can be at best."""

    program: str
    """"train step" or "scoring"."""
    topology: str
    mesh: dict[str, int]
    batch: dict[str, Any]
    """Sizes that the program was compiled for."""
    fits: bool
    hbm_bytes: int
    """Memory of a chip, as published."""
    peak_bytes: int
    """Most that the program holds at once on one device, arguments and results included: what the compiler refuses by (its size of
    temporaries counts those of nested loops more than once); -1 where it does not say."""
    argument_bytes: int
    """Parameters, optimiser state and batch alone."""
    flops: float
    """Matmuls of one call over all devices, recomputation included, counted in the traced function (scans times their lengths,
    Pallas kernels times their steps)."""
    device_flops: float | None
    """The same on one device, counted in the compiled program (Pallas kernels: in the traced function); null where it does not fit, as all
    below."""
    bytes: float | None
    """HBM traffic of one device, operation by operation."""
    collective_bytes: float | None
    """What one device receives from others."""
    collectives: dict[str, dict[str, float]]
    """By kind: runs and bytes."""
    bounds: dict[str, float] | None
    """Seconds by published peaks: compute, memory, interconnect; step: the longest of them (perfect overlap)."""
    compiler: str = ""
    """What the compiler said where it does not fit."""


def check(config: TrainConfig, topology: str, *, scoring: bool = False) -> Report:
    """Compile and report; no weights are made, nothing runs.

    Args:
        config: what would be trained; its data need not exist.
        topology: such as "v5e:4x4".
        scoring: compile the scoring call of evaluation and labelling instead of the train step.

    Raises:
        ConfigError: an unknown topology, no TPU compiler, or a configuration that cannot be compiled or does not fit the mesh.
    """
    chip = find_chip(topology)
    task = config.task.build_abstract()
    mesh = make_mesh(config.mesh, topology_devices(topology))
    if not scoring:
        check_layout(config, task, mesh)
    traced, inputs, sizes = (trace_scoring if scoring else trace_step)(config, task, mesh)
    flops = count_flops(traced.jaxpr)
    memory, work, message = compile_for(traced)
    if work is not None:
        own = count_flops(traced.jaxpr, kernels=True) / mesh.size
        work = dataclasses.replace(work, flops=work.flops + own)
    arguments = _device_bytes(inputs)
    peak = None if memory is None else memory.peak_memory_in_bytes
    needed = _needed(message) if peak is None else peak
    return Report(
        program="scoring" if scoring else "train step",
        topology=topology,
        mesh=dict(mesh.shape),
        batch=sizes,
        fits=peak is not None and peak <= chip.hbm_bytes,
        hbm_bytes=chip.hbm_bytes,
        peak_bytes=needed,
        argument_bytes=arguments,
        flops=flops,
        device_flops=work.flops if work else None,
        bytes=work.bytes if work else None,
        collective_bytes=sum(c.bytes for c in work.collectives.values()) if work else None,
        collectives={kind: asdict(found) for kind, found in work.collectives.items()} if work else {},
        bounds=bounds(work, chip) if work else None,
        compiler=message,
    )


def topology_devices(topology: str) -> list[Any]:
    """Return the devices of a slice, to compile for.

    Raises:
        ConfigError: no TPU compiler on this machine.
    """
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # what the plugin raises differs from version to version
        raise ConfigError(
            f"no TPU compiler for {topology} here ({type(error).__name__}: {str(error).splitlines()[0][:160]}): "
            "install it in an environment of its own, python -m venv .venv-tpu && .venv-tpu/bin/pip install -c constraints.txt -e '.[tpu]'"
        ) from error


Program = tuple[jax.stages.Traced, Any, dict[str, Any]]
"""A traced function, its arguments as `jax.ShapeDtypeStruct`s, and the sizes of its batch."""


def trace_step(config: TrainConfig, task: Task, mesh: Mesh) -> Program:
    """Return the trainer's own step on a batch of the longest texts."""
    batch = put_abstract(task.batch_shape(config.batch_size), NamedSharding(mesh, BATCH))
    trainer = Trainer(config, task, mesh, abstract=True)
    trainer.compile(batch)
    sizes = {"batch_size": config.batch_size, "accumulation": config.accumulation}
    return trainer.trace(batch), trainer.arguments(batch), sizes | _sizes(batch)


def trace_scoring(config: TrainConfig, task: Task, mesh: Mesh) -> Program:
    """Return the call that evaluation, labelling and serving make, with one query's candidates, or one call of texts for a tower."""
    model = nnx.eval_shape(lambda: task.init(nnx.Rngs(config.seed)))
    graphdef, state = nnx.split(model)
    placed = put_abstract(nnx.to_pure_dict(state), parameter_shardings(state, mesh))
    whole = replicated(mesh)
    if isinstance(task, CrossEncoderTask):
        longest, buckets = task.room.longest(), Buckets()
        prefix, row_length, rows = (
            next(size for size in sizes if size >= least)
            for sizes, least in (
                (buckets.prefix, longest.prefix),
                (buckets.row_length, longest.item),
                (buckets.rows, task.config.candidates),
            )
        )
        arrays = put_abstract(
            (prefix_shape(1, prefix), packed_shape(1, rows, row_length, rows * buckets.per_row(row_length))),
            whole,
        )

        def run(state: Any, prefix: Prefix, items: PackedItems) -> jax.Array:
            scorer: Any = nnx.merge(graphdef, nnx.State(state))
            return score(scorer, prefix.tokens, prefix.where, items)

        traced = jax.jit(run).trace(placed, *arrays)
    elif isinstance(task, RetrieverTask):
        length = task.batch_shape(1)["documents"].tokens.shape[1]
        arrays = put_abstract(prefix_shape(max(TOWER_TOKENS // length, 1), length), whole)
        traced = jax.jit(
            lambda state, texts: nnx.merge(graphdef, nnx.State(state))(texts.tokens, texts.where)
        ).trace(placed, arrays)
    else:
        raise ConfigError(f"task is {type(task).__name__}: it has no scoring call to compile")
    return traced, (placed, arrays), _sizes({"call": arrays})


def compile_for(traced: jax.stages.Traced) -> tuple[Any, Work | None, str]:
    """Return the compiled program's memory and work, or nothing and the compiler's words where it does not fit.

    Raises:
        ConfigError: the compiler refuses the program for another reason than memory.
    """
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" not in message and "hbm" not in message.lower():
            raise ConfigError(f"the compiler refuses this configuration: {message[:500]}") from error
        return None, None, message.split("\n\n")[0][:600]
    return compiled.memory_analysis(), read_work(compiled.as_text()), ""


def bounds(work: Work, chip: Chip) -> dict[str, float]:
    """Return the least seconds that compute, memory traffic and interconnect take at published peaks, and the longest of them.

    Every link is taken to be busy in both directions; a slice without wrap-around links, or a collective over one axis of it, is slower.
    """
    seconds = {
        "compute": work.flops / chip.flops,
        "memory": work.bytes / chip.hbm_bandwidth,
        "interconnect": sum(c.bytes for c in work.collectives.values()) / chip.ici_bandwidth,
    }
    return seconds | {"step": max(seconds.values())}


def weak_scaling(seconds: Mapping[str, float], own: int, devices: int) -> tuple[float, float]:
    """Return the share of one device's speed that each of `devices` keeps at the same batch per device, at published peaks.

    What a device receives grows with (n - 1) / n, as where parameters are gathered and gradients summed over all of them; its
    compute does not grow. One device alone would wait for nobody.

    Args:
        seconds: `bounds` of the program that was compiled.
        own: devices that it was compiled for, at least 2.
        devices: how many there would be.

    Returns:
        The share if nothing of the communication hides behind compute, and if all of it does.
    """
    compute = seconds["compute"]
    moved = seconds["interconnect"] * (1 - 1 / devices) / (1 - 1 / own)
    return compute / (compute + moved), min(1.0, compute / moved) if moved else 1.0


def _device_bytes(tree: Any) -> int:
    """Bytes of placed arrays on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _needed(message: str) -> int:
    """Bytes that the compiler wanted, out of its message."""
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    found = found or re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\)", message)
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")) if found else -1


def _sizes(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): list(leaf.shape) for path, leaf in leaves}


def write(report: Report) -> str:
    """Return a report as text for people."""

    def size(number: float | None) -> str:
        return "?" if number is None or number < 0 else f"{number / 2**30:.2f} GiB"

    mesh = ", ".join(f"{axis} {n}" for axis, n in report.mesh.items())
    lines = [
        f"{report.program} on {report.topology} ({mesh}): {'fits' if report.fits else 'DOES NOT FIT'}",
        f"memory per device   {size(report.peak_bytes)} of {size(report.hbm_bytes)} (arguments {size(report.argument_bytes)})",
        f"matmuls             {report.flops:.4g} FLOP over all devices",
    ]
    if report.bounds is None:
        return "\n".join(
            [
                *lines,
                f"the compiler said    {report.compiler}",
                "Try a larger --accumulation or more devices.",
            ]
        )
    share = (report.device_flops or 0.0) * math.prod(report.mesh.values()) / max(report.flops, 1.0)
    lines += [
        f"on one device       {report.device_flops:.4g} FLOP ({share:.0%} of its share), {size(report.bytes)} to and from HBM, "
        f"{size(report.collective_bytes)} received",
        *(
            f"  {kind:<18}{found['count']:.0f} runs, {size(found['bytes'])}"
            for kind, found in report.collectives.items()
        ),
        "at published peaks   " + ", ".join(f"{name} {t * 1e3:.1f} ms" for name, t in report.bounds.items()),
    ]
    return "\n".join(lines)
