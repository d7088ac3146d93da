"""Stages that a former run finished are not trained again, unless they were trained by other settings."""

import json
from pathlib import Path

from jaxsearch.config import TrainConfig, to_dict, with_defaults
from jaxsearch.errors import InputError
from jaxsearch.models.contract import CONTRACT_FILE
from jaxsearch.training.checkpoints import flatten


def finished(folder: Path, config: TrainConfig) -> bool:
    """Whether the run in `folder` is done.

    Raises:
      InputError: it is done with other settings; names them.
    """
    contract = folder / "model" / CONTRACT_FILE
    if not contract.is_file():
        return False
    there = flatten(with_defaults(json.loads(contract.read_text())["training"], config))
    wanted = flatten(to_dict(config))
    if differing := sorted(key for key in there | wanted if there.get(key) != wanted.get(key)):
        shown = ", ".join(f"{key} {there.get(key)!r} (not {wanted.get(key)!r})" for key in differing[:3])
        raise InputError(
            f"{folder} was trained with other settings, {shown}: delete it, or give another --workdir"
        )
    return True
