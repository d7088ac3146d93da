"""Many processes as one job: how they find each other, and the check that they run the same thing."""

import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxsearch.config import ConfigError

PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Processes:
    """How `jax.distributed` is started; all empty: JAX asks the cluster (Cloud TPU, GKE, SLURM) itself."""

    coordinator: str | None = None
    """HOST:PORT of process 0."""
    count: int | None = None
    index: int | None = None


def find_processes(
    coordinator: str | None = None,
    processes: str | None = None,
    process_id: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Processes | None:
    """Return how this process joins others; None where it is alone.

    In this order: the arguments; JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; then "auto" by JAXSEARCH_PROCESSES=auto, by
    SLURM (a step of several tasks), or by a TPU slice of several hosts (GKE, JobSet).

    Args:
        coordinator: HOST:PORT of process 0.
        processes: how many there are, or "auto".
        process_id: number of this one.
        environment: variables.

    Raises:
        ConfigError: one of the three without the others, or numbers that do not fit.
    """
    if processes == "auto" and coordinator is None and process_id is None:
        return Processes()
    flags = {"--coordinator": coordinator, "--processes": processes, "--process-id": process_id}
    if any(value is not None for value in flags.values()):
        return _explicit(flags)
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if any(environment.get(name) for name in names):
        return _explicit({name: environment.get(name) or None for name in names})
    hosts = [host for host in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    several = (
        environment.get("JAXSEARCH_PROCESSES") == "auto",
        _number("SLURM_STEP_NUM_TASKS", environment.get("SLURM_STEP_NUM_TASKS") or "1") > 1,
        len(hosts) > 1,
        bool(environment.get("MEGASCALE_COORDINATOR_ADDRESS")),
    )
    return Processes() if any(several) else None


def _explicit(values: Mapping[str, Any]) -> Processes:
    missing = [name for name, value in values.items() if value is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} missing: give {', '.join(values)} together, or none of them")
    (coordinator_name, coordinator), (count_name, count), (index_name, index) = values.items()
    number, place = _number(count_name, count), _number(index_name, index)
    if number < 1 or not 0 <= place < number:
        raise ConfigError(f"{index_name} is {place}: give a number from 0 to {count_name} - 1 = {number - 1}")
    host, _, port = str(coordinator).rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"{coordinator_name} is {coordinator!r}: give HOST:PORT of process 0")
    return Processes(str(coordinator), number, place)


def _number(name: str, value: Any) -> int:
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"{name} is {value!r}: give a whole number") from None


def start(processes: Processes | None, heartbeat: int = 100) -> None:
    """Join the others, before any other use of JAX; nothing for a process alone.

    Args:
        processes: which there are.
        heartbeat: seconds without a sign of life after which one counts as gone.

    Raises:
        ConfigError: a heartbeat of no seconds; they cannot be reached, or the cluster cannot be made out.
    """
    if processes is None:
        return
    if heartbeat < 1:
        raise ConfigError(f"--heartbeat is {heartbeat}: give a whole number of seconds, at least 1")
    if processes.coordinator:
        where = (
            f"process {processes.index} of {processes.count} waits for the others at {processes.coordinator}"
        )
        print(where, file=sys.stderr, flush=True)
    try:
        jax.distributed.initialize(
            processes.coordinator, processes.count, processes.index, heartbeat_timeout_seconds=heartbeat
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"cannot join the other processes ({str(error).splitlines()[0]}): start every one of them, with the same "
            "JAX_COORDINATOR_ADDRESS (HOST:PORT) and JAX_NUM_PROCESSES and its own JAX_PROCESS_ID, in train.py also --coordinator, "
            "--processes and --process-id; JAXSEARCH_PROCESSES=auto needs a cluster that says so itself"
        ) from error


def wait_for_others(what: str) -> None:
    """Return when every process has called this; one that leaves a job early ends the others."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def code_version() -> str:
    """Return a hash of this package's source files and JAX's version; needs no git on the machine."""
    digest = hashlib.sha256(jax.__version__.encode())
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(file.relative_to(PACKAGE).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def check_agreement(settings: Mapping[str, Any], data_version: str) -> None:
    """Refuse to go on unless every process has the same settings, data and code; call it in all of them.

    Raises:
        ConfigError: in every process; names what differs, with each process's value.
    """
    if jax.process_count() == 1:
        return
    mine = {"config": settings, "data": data_version, "code": code_version()}
    differences = find_differences([json.loads(text) for text in _gather(json.dumps(mine))])
    if differences:
        raise ConfigError(
            f"the processes do not run the same thing: {'; '.join(differences)}. Install the same code, bring the same data and "
            "give the same options everywhere"
        )


def find_differences(versions: list[dict[str, Any]]) -> list[str]:
    """Return `field: value on process 0, value on process 1` for each field that is not the same everywhere (nested: dotted)."""
    from jaxsearch.training.checkpoints import flatten

    flat = [flatten(version) for version in versions]
    found = []
    for name in sorted({name for values in flat for name in values}):
        by_value: dict[str, list[str]] = {}
        for process, values in enumerate(flat):
            by_value.setdefault(repr(values.get(name, "(absent)")), []).append(str(process))
        if len(by_value) > 1:
            parts = [f"{value} on process {', '.join(where)}" for value, where in by_value.items()]
            found.append(f"{name}: {'; '.join(parts)}")
    return found


def _gather(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    return [data.decode() for data in _gather_bytes(text.encode())]


def _gather_bytes(mine: bytes) -> list[bytes]:
    data = np.frombuffer(mine, np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(data)], np.int32)).reshape(-1)
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]) for row, size in zip(rows, sizes, strict=True)]


def share_work(compute: Callable[[np.ndarray], Sequence[np.ndarray]], count: int) -> list[np.ndarray]:
    """Return what `compute` gives for numbers 0 to count - 1, each computed by one process and known to all; call it in all of them.

    Args:
        compute: function of int [n], some of the numbers in order; gives an array for each.
        count: how many there are.
    """
    processes, index = jax.process_count(), jax.process_index()
    if processes == 1:
        return list(compute(np.arange(count)))
    numbers = np.arange(index, count, processes)
    file = io.BytesIO()
    np.savez(file, *(compute(numbers) if len(numbers) else ()))
    parts = []
    for data in _gather_bytes(file.getvalue()):
        with np.load(io.BytesIO(data)) as arrays:
            parts.append([arrays[name] for name in arrays.files])
    return [parts[number % processes][number // processes] for number in range(count)]


def on_host(tree: Any) -> Any:
    """Return a pytree of global arrays as numpy arrays, whole on every process; call it in all of them."""
    return jax.tree.map(
        lambda x: (
            np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
        ),
        tree,
    )
