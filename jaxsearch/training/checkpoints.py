"""Checkpoints of the training state, and the check that a resumed run is still the same experiment."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxsearch.config import CheckpointConfig, ConfigError, TrainConfig, to_dict

MAY_DIFFER = ("name", "steps", "log_every", "eval_every", "checkpoint", "mesh", "accumulation")
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


class Checkpoints:
    """Checkpoints below `workdir/checkpoints`; half-written ones are ignored.

    Args:
        workdir: folder of the run.
        config: how many are kept.
    """

    def __init__(self, workdir: Path, config: CheckpointConfig) -> None:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep,
            # On CPU there is no second processor to write while the first computes.
            enable_async_checkpointing=jax.default_backend() != "cpu",
        )
        self._config_file = workdir / "config.json"
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
            differences = config_differences(json.loads(self._config_file.read_text()), new)
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

    def restore(self, step: int, like: Any) -> Any:
        """Return the state after `step` steps.

        Args:
            step: one that `latest` returned.
            like: arrays of the wanted structure, shapes, dtypes and shardings; the mesh may differ from
                the saved one.
        """
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        return self._manager.restore(step, args=ocp.args.StandardRestore(target))

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
