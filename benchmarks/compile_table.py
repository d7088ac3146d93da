"""Which configuration fits on which TPU slice, and what bounds its step: compiled without a TPU, without data and without weights.

    python -m venv .venv-tpu && .venv-tpu/bin/pip install -c constraints.txt -e '.[tpu]'
    .venv-tpu/bin/python benchmarks/compile_table.py --jsonl benchmarks/results/compile.jsonl
    .venv-tpu/bin/python benchmarks/compile_table.py --show benchmarks/results/compile.jsonl

Two to ten minutes a row on one core; rows that the file holds already are left out. Each device takes
one query with all its candidates at a time, by accumulation, except for the retriever and MixLM, whose batches cannot be cut.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

from record import append

from jaxsearch.aot.check import weak_scaling

ROOT = Path(__file__).resolve().parent.parent
TOPOLOGIES = ("v5e:4x4", "v5e:8x8", "v6e:4x4", "v5p:4x4x4")
STORED = ("--task.relevance-teachers", "any", "--task.engagement-teachers", "any")
ROWS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    # name: configuration, its batch size where it can be cut (else 0), further options
    "ranker 0.6B": ("configs/ranker.py:qwen3_0_6b", 128, STORED),
    "ranker 0.6B, two 1.7B teachers online": (
        "configs/ranker.py:qwen3_0_6b",
        128,
        (
            "--task.teachers",
            "online",
            "--task.relevance-teachers",
            "qwen3_1_7b",
            "--task.engagement-teachers",
            "qwen3_1_7b",
        ),
    ),
    "MixLM 0.6B + 0.6B": ("configs/mixlm.py:qwen3_0_6b", 0, STORED),
    # Where the batch of the row above is too large.
    "MixLM 0.6B + 0.6B, batch 64": ("configs/mixlm.py:qwen3_0_6b", 0, (*STORED, "--batch-size", "64")),
    "retriever 0.6B": ("configs/retriever.py:qwen3_0_6b", 0, ()),
    "judge 8B": ("configs/judge.py:qwen3_8b", 64, ()),
}
LARGE = 256
"""Chips that weak scaling is carried on to."""
ASSUMPTIONS = """Weak scaling: the batch per device stays, and the speed of a device is compared with that of one alone. Left: compute and
communication wait for each other; right: as much communication hides behind compute as there is room. Compute runs at the bf16 peak (a
program that is slower hides more), every link is busy in both directions, what a device receives grows with (n - 1) / n, and nobody
waits for a slower chip."""


def command(name: str, topology: str) -> list[str]:
    """The compile check of one row."""
    config, batch, options = ROWS[name]
    devices = math.prod(map(int, topology.partition(":")[2].split("x")))
    cut = ["--accumulation", str(max(1, batch // devices))] if batch else []
    return ["tpu_setup/compile_check.py", "--topology", topology, "--config", config, *options, *cut]


def measure(name: str, topology: str) -> dict[str, object] | None:
    """One row, or None where the check itself failed."""
    words = command(name, topology)
    done = subprocess.run([sys.executable, *words, "--json"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        print(f"{name} on {topology}: {done.stderr.strip()[-500:]}", file=sys.stderr)
        return None
    report = json.loads(done.stdout.splitlines()[-1])
    return {"name": name, **report, "command": f"python {' '.join(words)} --json"}


def show(rows: list[dict]) -> str:
    """Both tables in Markdown, in the order of the rows' definitions."""
    names, places = list(ROWS), list(TOPOLOGIES)
    rows = sorted(rows, key=lambda row: (names.index(row["name"]), places.index(row["topology"])))
    return "\n\n".join([show_fit(rows), ASSUMPTIONS, show_scaling([row for row in rows if row["bounds"]])])


def show_fit(rows: list[dict]) -> str:
    """What each program needs, and the least seconds that its compute, memory traffic and communication take."""
    lines = [
        "| | slice | fits | GiB per device | FLOP per step | GiB received per device | compute | memory | interconnect |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        peak = f"{row['peak_bytes'] / 2**30:.1f} of {row['hbm_bytes'] / 2**30:.0f}"
        times = row["bounds"]
        rest = ["-"] * 4
        if times:
            kinds = ("compute", "memory", "interconnect")
            rest = [
                f"{row['collective_bytes'] / 2**30:.1f}",
                *(f"{times[kind] * 1e3:.0f} ms" for kind in kinds),
            ]
        words = [
            row["name"], row["topology"], "yes" if row["fits"] else "**no**", peak, f"{row['flops']:.3g}", *rest,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


def show_scaling(rows: list[dict]) -> str:
    """Weak scaling of each program, on its own slice and on a larger one."""
    lines = [f"| | compiled for | on that slice | on {LARGE} chips |", "|---|---|---|---|"]
    for row in rows:
        own = math.prod(row["mesh"].values())
        shares = (weak_scaling(row["bounds"], own, chips) for chips in (own, LARGE))
        words = [f"{least:.0%} to {most:.0%}" for least, most in shares]
        lines.append(f"| {row['name']} | {row['topology']} | {' | '.join(words)} |")
    return "\n".join(lines)


def main() -> None:
    """Fill the file row by row, or show it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--topologies", nargs="+", default=list(TOPOLOGIES))
    parser.add_argument("--jsonl", type=Path, help="file that rows are added to")
    parser.add_argument("--show", type=Path, help="print a file as a table, measure nothing")
    args = parser.parse_args()
    if args.show:
        print(show([json.loads(line) for line in args.show.read_text().splitlines()]))
        return
    known = set()
    if args.jsonl and args.jsonl.exists():
        rows = [json.loads(line) for line in args.jsonl.read_text().splitlines()]
        known = {(row["name"], row["topology"]) for row in rows}
    for name in args.rows:
        for topology in args.topologies:
            if (name, topology) in known or not (row := measure(name, topology)):
                continue
            print(show_fit([row]).splitlines()[-1], flush=True)
            append(args.jsonl, [row])


if __name__ == "__main__":
    main()
