"""Runs that are killed at random moments and started again, against one that was left alone.

    python benchmarks/kills.py --jsonl benchmarks/results/kills.jsonl

One process, killed --kills times (SIGTERM and SIGKILL in turn) at random moments and started again each time: its exported
parameters are compared with those of an uninterrupted run, byte for byte. Two processes on localhost: their losses against those
of one; then one of two is killed with SIGKILL in mid-run: how long the other lives, how it ends, and what one process that goes on
from the checkpoint arrives at.

One JSON line each, `kind` kills, two_processes or lost_process.
"""

import argparse
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe
from record import append
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/base.py:tiny"


class Runs:
    """One experiment in several workdirs.

    Args:
        options: command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.root = options, Path(options.workdir)

    def start(self, name: str, *extra: str) -> subprocess.Popen[str]:
        """Start or go on with a run."""
        self.root.mkdir(parents=True, exist_ok=True)
        words = ["train.py", "--config", CONFIG, "--workdir", str(self.root / name)]
        words += ["--steps", str(self.options.steps), "--log-every", "5"]
        words += ["--checkpoint.every", str(self.options.every), "--task.data.dir", str(self.root / "data")]
        with open(self.root / f"{name}.log", "a") as file:
            return subprocess.Popen(
                [sys.executable, *words, *extra], cwd=ROOT, stdout=file, stderr=file, text=True
            )

    def two(self, name: str, *extra: str) -> list[subprocess.Popen[str]]:
        """Start two processes of one job."""
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        words = ["--coordinator", address, "--processes", "2", "--mesh.data", "2", *extra]
        return [self.start(name, *words, "--process-id", str(i)) for i in range(2)]

    def steps(self, name: str) -> int:
        """Steps in the latest checkpoint."""
        folder = self.root / name / "checkpoints"
        found = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
        return max(found, default=0)

    def parameters(self, name: str) -> dict[str, np.ndarray]:
        """Exported arrays by file and name."""
        files = sorted((self.root / name / "model").rglob("*.safetensors"))
        return {f"{file.name}/{key}": x for file in files for key, x in load_file(file).items()}

    def losses(self, name: str) -> np.ndarray:
        """Training losses, a row each."""
        lines = (self.root / name / "metrics.jsonl").read_text().splitlines()
        return np.array([row["loss"] for row in map(json.loads, lines) if row["kind"] == "train"])


def compare(runs: Runs, name: str) -> dict[str, Any]:
    """Against the run that was left alone."""
    mine, whole = runs.parameters(name), runs.parameters("whole")
    a, b = runs.losses(name), runs.losses("whole")
    return {
        "parameters": sum(x.size for x in whole.values()),
        "bit_for_bit": mine.keys() == whole.keys()
        and all(mine[key].tobytes() == whole[key].tobytes() for key in whole),
        "max_relative_loss_difference": float(np.max(np.abs(a - b) / np.abs(b)))
        if len(a) == len(b)
        else None,
        "relative_parameter_difference": float(
            max(np.abs(mine[key] - whole[key]).max() / np.abs(whole[key]).max() for key in whole)
        ),
    }


def kills(runs: Runs, seconds: float) -> dict[str, Any]:
    """Kill a run again and again; `seconds` is what it takes undisturbed."""
    random.seed(runs.options.seed)
    done, codes, saved = 0, Counter[str](), []
    while done < runs.options.kills:
        process = runs.start("killed")
        number = signal.SIGTERM if done % 2 == 0 else signal.SIGKILL
        try:
            process.wait(random.uniform(0, min(0.8 * seconds, runs.options.longest)))
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            codes[f"{number.name}: {process.wait()}"] += 1
            done += 1
            saved.append(runs.steps("killed"))
            print(f"kill {done}: {number.name}, {saved[-1]} steps saved", flush=True)
        else:
            if process.returncode:
                raise SystemExit(f"the run failed by itself: see {runs.root / 'killed.log'}")
            print(f"the run was done after {done} kills: raise --steps", flush=True)
            break
    if runs.start("killed").wait():
        raise SystemExit(f"the last part failed: see {runs.root / 'killed.log'}")
    return {"kind": "kills", "kills": done, "exit_codes": codes, "saved": saved} | compare(runs, "killed")


def two_processes(runs: Runs) -> dict[str, Any]:
    """Two processes, left alone."""
    codes = [process.wait() for process in runs.two("two")]
    return {"kind": "two_processes", "exit_codes": codes} | compare(runs, "two")


def lost_process(runs: Runs) -> dict[str, Any]:
    """Two processes, one of them killed once a checkpoint is there; then one goes on."""
    first, second = runs.two("lost", "--heartbeat", "10")
    while not runs.steps("lost"):
        if second.poll() is not None:
            raise SystemExit(f"a process ended by itself: see {runs.root / 'lost.log'}")
        time.sleep(0.1)
    second.kill()
    started = time.monotonic()
    code = first.wait(300)
    seconds = time.monotonic() - started
    said = (runs.root / "lost.log").read_text().strip().splitlines()
    saved = runs.steps("lost")
    if runs.start("lost").wait():
        raise SystemExit(f"the run could not go on: see {runs.root / 'lost.log'}")
    found = {"exit_code": code, "seconds": round(seconds, 1), "message": said[-1][:400], "saved": saved}
    return {"kind": "lost_process"} | found | compare(runs, "lost")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", default="runs/kills", help="must not hold an earlier one's runs")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--longest", type=float, default=20.0, help="seconds that a part lives at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--parts", nargs="+", choices=("kills", "two", "lost"), default=["kills", "two", "lost"]
    )
    parser.add_argument("--jsonl", type=Path, help="append the results to this file")
    options = parser.parse_args()
    runs = Runs(options)
    runs.start("warm", "--steps", "1").wait()  # makes the data
    started = time.monotonic()
    if runs.start("whole").wait():
        raise SystemExit(f"the run failed: see {runs.root / 'whole.log'}")
    seconds = time.monotonic() - started
    common = {
        "command": " ".join(["python", *sys.argv]), "config": CONFIG, "steps": options.steps,
        "every": options.every, "machine": describe(),
    }  # fmt: skip
    print(f"uninterrupted: {seconds:.0f} s", flush=True)
    parts = {
        "kills": lambda: kills(runs, seconds),
        "two": lambda: two_processes(runs),
        "lost": lambda: lost_process(runs),
    }
    for name in options.parts:
        found = parts[name]()
        print(found, flush=True)
        append(options.jsonl, [found | common])


if __name__ == "__main__":
    main()
