"""Stages that a former run finished are not trained again, unless they were trained by other settings."""

import dataclasses
import json
from pathlib import Path

from jaxsearch.compression.pruning import Pruning
from jaxsearch.config import TrainConfig, to_dict, with_defaults
from jaxsearch.errors import InputError, differences
from jaxsearch.models.contract import CONTRACT_FILE, Model, read_contract
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


def check_pruned(folder: Path, model: Model, plan: Pruning, queries: int, candidates: int) -> None:
    """Refuse a folder that a former run pruned otherwise.

    Raises:
      InputError: it was pruned from another model, by another plan or on other calibration data; names the differences.
    """
    told = read_contract(folder).training["pruning"]
    found = {"parent": told["parent"], **told["plan"], **told["calibration"]}
    wanted = {"parent": model.hash, **dataclasses.asdict(plan), "queries": queries, "candidates": candidates}
    if differing := differences(found, wanted):
        raise InputError(
            f"{folder} was pruned with {', '.join(differing)}: delete it, or give another --workdir"
        )
