"""The device mesh, and which logical axis of a parameter is split over which mesh axis."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxsearch.config import ConfigError, MeshConfig

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | None] = {
    "layer": None,  # scanned over
    "actions": None,  # a handful of rows
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
}
"""Logical axis of a parameter -> mesh axis it is split over."""

BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh; it takes the first devices when the configuration asks for fewer than there are.

    Args:
        config: sizes of the axes.
        devices: default: all there are, of every process.

    Raises:
        ConfigError: more devices asked for than there are, or -1 on an axis and a remainder.
    """
    devices = jax.devices() if devices is None else devices
    shape = [config.data, config.fsdp, config.tensor]
    fixed = math.prod(size for size in shape if size != -1)
    if len(devices) < fixed or (-1 in shape and len(devices) % fixed):
        named = ", ".join(f"mesh.{axis} {size}" for axis, size in zip(AXES, shape, strict=True))
        raise ConfigError(f"{named} do not fit on {len(devices)} devices")
    shape = [len(devices) // fixed if size == -1 else size for size in shape]
    used = math.prod(shape)
    if used < len(devices):
        log.info("using %d of %d devices; set --mesh.data -1 to use all", used, len(devices))
    return Mesh(np.asarray(devices[:used]).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_spec(
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...] | None,
    mesh: Mesh,
    rules: Mapping[str, str | None] = RULES,
) -> PartitionSpec:
    """Return how one parameter is split.

    An axis that the mesh axis does not divide (3 key/value heads over 2 devices) stays whole, with a
    warning. A mesh axis is used once in a parameter, by the first logical axis that asks for it.

    Raises:
        ValueError: `axes` does not fit the shape, or names an axis that the rules do not know.
    """
    if axes is None:
        return PartitionSpec()
    if len(axes) != len(shape):
        raise ValueError(f"parameter {name} of shape {shape} has {len(axes)} logical axes {axes}")
    spec: list[str | None] = []
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in rules:
            raise ValueError(
                f"parameter {name} has unknown logical axis {axis!r}: known are {', '.join(rules)}"
            )
        target = None if axis is None else rules[axis]
        if target is not None and size % mesh.shape[target]:
            log.warning(
                "parameter %s: axis %s of size %d stays whole, mesh.%s %d does not divide it",
                name, axis, size, target, mesh.shape[target],
            )  # fmt: skip
            target = None
        spec.append(None if target in spec else target)
    return PartitionSpec(*spec)


def parameter_shardings(params: nnx.State, mesh: Mesh, rules: Mapping[str, str | None] = RULES) -> Any:
    """Return a sharding for each parameter, as nested dicts.

    Args:
        params: variables whose `axes` metadata names their logical axes; those without are replicated.
        mesh: the device mesh.
        rules: logical axis -> mesh axis.
    """
    return nnx.traversals.unflatten_mapping(
        {
            path: NamedSharding(
                mesh,
                parameter_spec(
                    ".".join(map(str, path)),
                    variable.get_value().shape,
                    variable.get_metadata().get("axes"),
                    mesh,
                    rules,
                ),
            )
            for path, variable in nnx.to_flat_state(params)
        }
    )


def optimizer_shardings(opt_state: Any, params_shardings: Any, mesh: Mesh) -> Any:
    """Return shardings of the optimiser's state: moments like their parameters, the rest replicated.

    A moment is known by its place: its path in the state ends with the path of its parameter. (optax's own map over parameters does
    not reach into `optax.contrib.muon`, which keeps a part of the parameters in each of two states.)
    """
    known = {tuple(path): sharding for path, sharding in jax.tree.leaves_with_path(params_shardings)}
    lengths = sorted({len(path) for path in known}, reverse=True)

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        found = (known.get(tuple(path[-n:])) for n in lengths)
        return next((s for s in found if s is not None and leaf.ndim), replicated(mesh))

    return jax.tree.map_with_path(place, opt_state)


def put_abstract(tree: Any, shardings: Any) -> Any:
    """Return what `jax.device_put` would, as `jax.ShapeDtypeStruct`s: for devices that are not there.

    Args:
        tree: arrays or `jax.ShapeDtypeStruct`s.
        shardings: one for each of them, or one for all.
    """
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def put(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype, True), sharding=sharding)

    return jax.tree.map(put, tree, shardings)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Place a batch on the mesh, leading axes split over `data` and `fsdp`.

    Args:
        batch: arrays [B / processes, ...] of this process.
        mesh: the device mesh.

    Raises:
        ValueError: the devices do not divide a leading axis.
    """
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    sharding = NamedSharding(mesh, BATCH)

    def put(path: Any, x: np.ndarray) -> jax.Array:
        if np.ndim(x) == 0 or x.shape[0] * jax.process_count() % split:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} of shape {np.shape(x)}: its leading axis is "
                f"not a multiple of mesh.data * mesh.fsdp = {split}"
            )
        return jax.make_array_from_process_local_data(sharding, x)

    return jax.tree_util.tree_map_with_path(put, batch)
