"""Stages that a former run finished are not trained again, unless they were trained by other settings."""

import dataclasses
import json
from pathlib import Path

from jaxsearch.config import TrainConfig, to_dict
from jaxsearch.errors import InputError
from jaxsearch.models.contract import CONTRACT_FILE


def finished(folder: Path, config: TrainConfig) -> bool:
    """Whether the run in `folder` is done.

    Raises:
      InputError: it is done with other settings; names them.
    """
    contract = folder / "model" / CONTRACT_FILE
    if not contract.is_file():
        return False
    there = _flat(json.loads(contract.read_text())["training"])
    wanted = _plain(config)
    # A setting that came later is neutral by its default: a run that did not know it was made with that.
    neutral = _plain(dataclasses.replace(config, task=type(config.task)()))
    there |= {key: value for key, value in neutral.items() if key.startswith("task.") and key not in there}
    if differing := sorted(key for key in there | wanted if there.get(key) != wanted.get(key)):
        shown = ", ".join(f"{key} {there.get(key)!r} (not {wanted.get(key)!r})" for key in differing[:3])
        raise InputError(
            f"{folder} was trained with other settings, {shown}: delete it, or give another --workdir"
        )
    return True


def _plain(config: TrainConfig) -> dict[str, object]:
    return _flat(json.loads(json.dumps(to_dict(config))))


def _flat(values: object, name: str = "") -> dict[str, object]:
    if not isinstance(values, dict):
        return {name: values}
    return {k: v for key, part in values.items() for k, v in _flat(part, f"{name}.{key}".strip(".")).items()}
