"""Checkpoints of the training state, and the check that a resumed run is still the same experiment."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxsearch.config import CheckpointConfig, ConfigError, TrainConfig, to_dict, with_defaults
from jaxsearch.errors import InputError

MAY_DIFFER = (
    "name", "steps", "log_every", "eval_every", "checkpoint", "faults", "mesh", "accumulation", "profile", "peak_flops",
)  # fmt: skip
"""Fields that a resumed run may change: they decide how long and on what it runs, not what is learnt."""


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that readers see the old file or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted names."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return `field: old -> new` for each field whose change makes it another experiment."""
    kept = [flatten({k: v for k, v in values.items() if k not in MAY_DIFFER}) for values in (old, new)]
    missing = "(absent)"
    return [
        f"{name}: {kept[0].get(name, missing)!r} -> {kept[1].get(name, missing)!r}"
        for name in sorted(kept[0].keys() | kept[1].keys())
        if kept[0].get(name, missing) != kept[1].get(name, missing)
    ]


class CheckpointError(InputError):
    """A checkpoint that cannot be read; the message names its folder."""


class Checkpoints:
    """Checkpoints below `workdir/checkpoints`, the best below `workdir/best`; half-written ones are ignored.

    Args:
        workdir: folder of the run.
        config: how many are kept, and by which metric the best is chosen.
    """

    def __init__(self, workdir: Path, config: CheckpointConfig) -> None:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep,
            # On CPU there is no second processor to write while the first computes.
            enable_async_checkpointing=jax.default_backend() != "cpu",
        )
        self._config_file = workdir / "config.json"
        self._metric = config.best
        self._best: ocp.CheckpointManager | None = None
        if config.best:
            chosen = ocp.CheckpointManagerOptions(
                max_to_keep=1,
                best_fn=lambda metrics: metrics[config.best],
                best_mode="max",
                enable_async_checkpointing=False,
            )
            self._best = ocp.CheckpointManager((workdir / "best").absolute(), options=chosen)
        self._manager = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)

    def latest(self) -> int | None:
        """Return the number of steps in the latest complete checkpoint."""
        return self._manager.latest_step()

    def check_config(self, config: TrainConfig) -> None:
        """Compare with the configuration that the checkpoints were made with, and store this one.

        Raises:
            ConfigError: names every field whose change would make the resumed run another experiment.
        """
        new = to_dict(config)
        if self.latest() is not None and self._config_file.exists():
            old = with_defaults(json.loads(self._config_file.read_text()), config)
            differences = config_differences(old, new)
            if differences:
                raise ConfigError(
                    f"{self._config_file.parent} holds a run with another configuration "
                    f"({'; '.join(differences)}): undo the change, or start in a new workdir"
                )
        if jax.process_index() == 0:
            write_json(self._config_file, new)

    def save(self, step: int, state: Any) -> None:
        """Save a pytree of arrays after `step` steps, unless that is there already."""
        if step != self.latest():
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def offer(self, step: int, state: Any, metrics: Mapping[str, float]) -> None:
        """Keep this state apart if no other had a better metric; nothing without `checkpoint.best`.

        Raises:
            ConfigError: the evaluation has no such metric.
        """
        if self._best is None:
            return
        if self._metric not in metrics:
            raise ConfigError(
                f"checkpoint.best is {self._metric!r}, the evaluation has {', '.join(sorted(metrics))}: choose one of these"
            )
        value = float(metrics[self._metric])
        if math.isfinite(value) and step not in self._best.all_steps():
            own = {self._metric: value}
            self._best.save(step, args=ocp.args.StandardSave(state), metrics=own)

    def best(self) -> int | None:
        """Return the number of steps in the best checkpoint."""
        return self._best.best_step() if self._best else None

    def restore_best(self, like: Any) -> Any:
        """Return the best state; see `restore`."""
        step = self.best()
        assert self._best is not None
        assert step is not None
        return _restore(self._best, step, like)

    def restore(self, step: int, like: Any) -> Any:
        """Return the state after `step` steps.

        Args:
            step: one that `latest` returned.
            like: arrays of the wanted structure, shapes, dtypes and shardings; the mesh may differ from
                the saved one.

        Raises:
            CheckpointError: it cannot be read, or holds other arrays; names the folder.
        """
        return _restore(self._manager, step, like)

    def close(self) -> None:
        """Wait until everything is on disk."""
        for manager in filter(None, (self._manager, self._best)):
            manager.wait_until_finished()
            manager.close()


def _restore(manager: ocp.CheckpointManager, step: int, like: Any) -> Any:
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    try:
        return manager.restore(step, args=ocp.args.StandardRestore(target))
    except jax.errors.JaxRuntimeError:
        raise  # the devices' fault, not the file's
    except Exception as error:  # whatever the storage library finds wrong with a file
        first = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise CheckpointError(
            f"the checkpoint {manager.directory / str(step)} cannot be read ({first}): it is damaged, or made by other code. "
            "Delete that folder to go on from the one before it, or start in a new workdir"
        ) from error
