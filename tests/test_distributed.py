"""How processes find each other, and that two of them are one job."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxsearch.config import ConfigError
from jaxsearch.training.distributed import (
    Processes,
    code_version,
    find_differences,
    find_processes,
    share_work,
)

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "4"}, Processes()),
        ({"TPU_WORKER_HOSTNAMES": "one"}, None),
        ({"TPU_WORKER_HOSTNAMES": "one,two", "TPU_WORKER_ID": "1"}, Processes()),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "one"}, Processes()),
        ({"JAXSEARCH_PROCESSES": "auto"}, Processes()),
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"},
            Processes("h:1", 4, 3),
        ),
    ],
)
def test_environment(environment: dict[str, str], expected: Processes | None) -> None:
    assert find_processes(environment=environment) == expected


def test_flags_come_before_the_environment() -> None:
    slurm = {"SLURM_STEP_NUM_TASKS": "4"}
    assert find_processes("h:1", "2", 0, environment=slurm) == Processes("h:1", 2, 0)
    assert find_processes(processes="auto", environment={}) == Processes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("h:1", None, None), "--processes, --process-id missing"),
        ((None, "2", 0), "--coordinator missing"),
        (("h:1", "two", 0), "--processes is 'two'"),
        (("h:1", "2", 2), "--process-id is 2: give a number from 0 to --processes - 1 = 1"),
        (("h:1", "0", 0), "--process-id is 0"),
        (("localhost", "2", 0), "--coordinator is 'localhost': give HOST:PORT of process 0"),
    ],
)
def test_flags_that_do_not_fit(flags: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_processes(*flags, environment={})


def test_differences_name_field_and_processes() -> None:
    versions = [
        {"config": {"steps": 3, "task": {"alpha": 0.5}}, "data": "a", "code": "x"},
        {"config": {"steps": 3, "task": {"alpha": 0.7}}, "data": "a", "code": "x"},
        {"config": {"steps": 3, "task": {}}, "data": "b", "code": "x"},
    ]
    assert find_differences(versions) == [
        "config.task.alpha: 0.5 on process 0; 0.7 on process 1; '(absent)' on process 2",
        "data: 'a' on process 0, 1; 'b' on process 2",
    ]
    assert find_differences(versions[:1] * 3) == []


def test_code_version_follows_the_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("jaxsearch.training.distributed.PACKAGE", tmp_path)
    (tmp_path / "a.py").write_text("x = 1")
    first = code_version()
    assert first == code_version()
    (tmp_path / "a.py").write_text("x = 2")
    assert code_version() != first


def train(folder: Path, *, devices: int, batch_sizes: list[str]) -> list[tuple[int, str]]:
    """Run as many processes as there are batch sizes; their exit codes and what they said."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parent.parent)]),
        "JAX_PLATFORMS": "cpu",
    }
    running = [
        subprocess.Popen(
            [
                sys.executable, str(SCRIPT), str(folder), str(port), str(len(batch_sizes)), str(index),
                str(devices), batch_size,
            ],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for index, batch_size in enumerate(batch_sizes)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[1] for process in running]
    return [(process.returncode, text) for process, text in zip(running, said, strict=True)]


def losses(folder: Path) -> list[float]:
    """The loss of each step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    assert [code for code, _ in train(tmp_path / "one", devices=4, batch_sizes=["8"])] == [0]
    for code, text in train(tmp_path / "two", devices=2, batch_sizes=["8", "8"]):
        assert code == 0, text
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-6)
    one, two = (np.load(tmp_path / name / "model" / "weights.npz")["inner"] for name in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-5)


def test_processes_with_another_configuration_do_not_start(tmp_path: Path) -> None:
    for code, text in train(tmp_path, devices=2, batch_sizes=["8", "16"]):
        assert code == 2
        assert "config.batch_size: 8 on process 0; 16 on process 1" in text
    assert not (tmp_path / "checkpoints" / "4").exists()


SHARED = """
import sys
import jax
import numpy as np
from jaxsearch.training.distributed import find_processes, share_work, start

start(find_processes("localhost:" + sys.argv[1], "2", int(sys.argv[2])))
mine = []
found = share_work(lambda numbers: mine.extend(numbers) or [np.full((i, 2), i, np.float32) for i in numbers], 5)
empty = share_work(lambda numbers: [np.zeros(3)] * len(numbers), 1)
print(mine == list(range(int(sys.argv[2]), 5, 2)), [x.shape for x in found], [x.sum() for x in found], len(empty))
"""


def test_processes_share_work_and_all_know_the_result() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent.parent), "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SHARED, port, index],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in "01"
    ]  # fmt: skip
    shapes, sums = [(i, 2) for i in range(5)], [np.float32(2 * i * i) for i in range(5)]
    for process in running:
        said, errors = process.communicate(timeout=120)
        assert said.splitlines()[-1] == f"True {shapes} {sums} 1", errors


def test_a_process_alone_does_all_the_work() -> None:
    found = share_work(lambda numbers: [np.array(i) for i in numbers], 3)
    assert [int(x) for x in found] == [0, 1, 2]
