"""The losses of 20 steps on one device and on eight, laid out in three ways: ranker with two online teachers, retriever, MixLM.

    python benchmarks/sharding_parity.py --dtypes float64 float32 --jsonl benchmarks/results/sharding_parity.jsonl

Tiny random models on the tests' own small data set (needs `make venv`), eight simulated CPU devices. In float64 (`jax_enable_x64`,
parameters and teachers too) nothing is left but the order of sums; in fp32 rounding grows with the steps.

One JSON line per task, dtype and mesh: relative_difference of the losses at step 1, at step 20 and at most. Exit status 1 where one is
above its bound (float64: 1e-9 at every step; fp32: 1e-5 at step 1, 1e-3 at step 20).
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MESHES = ((1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 4, 2))
TASKS = ("ranker", "retriever", "mixlm")


def own_process(dtype: str, options: argparse.Namespace) -> int:
    """Whether JAX knows float64 is decided before it starts."""
    flags = "--xla_cpu_collective_call_terminate_timeout_seconds=600"  # eight devices share two cores
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_ENABLE_X64": str(dtype == "float64"),
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
    }
    words = [sys.executable, *sys.argv, "--only", dtype]
    return subprocess.run(words, env=environment, check=False).returncode


def measure(dtype: str, options: argparse.Namespace) -> bool:
    """All tasks on all meshes in this process; whether all are within their bounds."""
    sys.path.insert(0, str(ROOT / "tests"))
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from machine import describe
    from record import append
    from small_market import TEACHER, filled, small_tokenizer, small_world
    from test_tasks import write_store

    from jaxsearch.config import MeshConfig, load_config
    from jaxsearch.data.pipeline import Pipeline
    from jaxsearch.data.prompts import PromptConfig
    from jaxsearch.data.records import ACTIONS
    from jaxsearch.data.tokenizer import LABELS
    from jaxsearch.models.contract import Contract, make_module, save_model
    from jaxsearch.models.decoder import Decoder
    from jaxsearch.scoring.records import JUDGE_LABELS
    from jaxsearch.training.loop import Trainer
    from jaxsearch.training.sharding import make_mesh, put_batch

    def teacher(folder: Path, seed: int) -> str:
        tokenizer = small_tokenizer()
        labels = {name: tokenizer.label(name) for name in LABELS[:2]}
        prompts = {"pair": PromptConfig("ranker", "short", "tiny")}
        contract = Contract("ranker", TEACHER, prompts, labels, actions=tuple(ACTIONS["jobs"]))
        save_model(folder, filled(lambda rngs: make_module(contract, rngs), seed), contract, tokenizer)
        return str(folder)

    def widened(init: Callable[[nnx.Rngs], Any]) -> Callable[[nnx.Rngs], Any]:
        def make(rngs: nnx.Rngs) -> Any:
            module = init(rngs)
            nnx.update(module, jax.tree.map(lambda x: x.astype(dtype), nnx.state(module, nnx.Param)))
            for _, part in nnx.iter_graph(module):
                if isinstance(part, Decoder):
                    part.config = dataclasses.replace(part.config, compute_dtype=dtype)
            return module

        return make

    def losses(task: Any, config: Any, mesh: tuple[int, ...]) -> np.ndarray:
        config = dataclasses.replace(config, mesh=MeshConfig(*mesh))
        devices = make_mesh(config.mesh)
        trainer = Trainer(config, task, devices)
        pipeline = Pipeline(task, batch_size=config.batch_size, seed=config.seed)
        trainer.compile(put_batch(pipeline.batch(0), devices))
        found = []
        for step in range(options.steps):
            trainer.reset_window()
            trainer.step(put_batch(pipeline.batch(step), devices))
            found.append(trainer.window()["loss"])
        assert jax.tree.leaves(trainer.state.params)[0].dtype == jnp.dtype(dtype)
        return np.array(found)

    machine, good = describe(), True
    with small_world() as world, TemporaryDirectory() as name:
        folder = Path(name)
        scores = ("Yes", "No", *ACTIONS["jobs"])
        judge = write_store(folder / "judge", world, "judge", JUDGE_LABELS, lambda q, row: np.eye(5)[row % 5])

        def said(q: int, row: int) -> tuple[float, ...]:
            return (row / 4, 0.5, *np.sin(row + np.arange(len(ACTIONS["jobs"]))))

        store = write_store(folder / "ranker", world, "ranker", scores, said)
        first, second = teacher(folder / "first", 1), teacher(folder / "second", 2)
        common = ["--batch-size", "8", "--steps", str(options.steps), "--optimizer.warmup-steps", "2"]
        common += ["--task.model.vocab-size", "295"]
        own = {
            "ranker": [
                "--task.teachers", "online", "--task.relevance-teachers", first, "--task.engagement-teachers", second,
            ],
            "retriever": [],
            "mixlm": [
                "--task.relevance-teachers", store, "--task.engagement-teachers", store, "--task.labels", judge,
                "--task.candidates", "3", "--task.tokens", "2", "--task.text-weight", "0.5", "--task.curriculum", "0.5",
                "--task.text-every", "1",
                "--task.encoder.vocab-size", "295", "--task.encoder.preset", "tiny",
            ],
        }  # fmt: skip
        for task_name in options.tasks:
            config = load_config(f"configs/{task_name}.py:tiny", [*common, *own[task_name]])
            task: Any = config.task.build(config)
            task.init = widened(task.init)
            alone = losses(task, config, MESHES[0])
            for mesh in MESHES[1:]:
                difference = np.abs(losses(task, config, mesh) / alone - 1)
                row = {
                    "task": task_name, "dtype": dtype, "mesh": mesh, "steps": options.steps,
                    "first_loss": float(alone[0]), "last_loss": float(alone[-1]),
                    "relative_difference": {
                        "step_1": float(difference[0]), "last": float(difference[-1]), "max": float(difference.max()),
                    },
                }  # fmt: skip
                bounds = (1e-9, 1e-9) if dtype == "float64" else (1e-5, 1e-3)
                good &= bool(difference[0] <= bounds[0] and difference.max() <= bounds[1])
                print(row, flush=True)
                append(options.jsonl, [row | {"command": options.command, "machine": machine}])
    return good


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtypes", nargs="+", choices=("float64", "float32"), default=["float64", "float32"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--jsonl", type=Path, help="append the results to this file")
    parser.add_argument("--only", choices=("float64", "float32"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.only:
        return max(own_process(dtype, options) for dtype in options.dtypes)
    words = sys.argv[: sys.argv.index("--only")]
    options.command = " ".join(["python", *words])
    return 0 if measure(options.only, options) else 1


if __name__ == "__main__":
    sys.exit(main())
